"""The GPU's kernels where there is no GPU: they run in Triton's interpreter, and they compile for Hopper."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
fused = pytest.importorskip("scq.stage1_tokenizer.solver.fused")

TESTS = Path(__file__).resolve().parent
SHARED_MEMORY = 64 * 1024  # bytes for a program, on the smallest GPUs that Triton serves
LONG = ("order", "support", "nearest", "first", "entry")
INT = ("count", "queue", "members", "taken", "moves")
SCALARS = ("n", "width", "max_moves")


@pytest.mark.parametrize("only", ["k-means or ran_out", pytest.param("", marks=pytest.mark.slow)])
def test_kernels_in_tritons_interpreter(only):
    """In a process of its own, because Triton must know of it when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "fused_in_interpreter.py", "-k", only],
        cwd=TESTS,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter cannot work with a numpy this new")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def signature(kernel, price, sizes):
    """Triton's types of a kernel's arguments, told by their names."""
    types = {}
    for name in kernel.arg_names:
        if name in sizes:
            types[name] = "constexpr"
        elif name in SCALARS:
            types[name] = "i32"
        elif name == "tol":
            types[name] = "fp32"
        elif name in LONG:
            types[name] = "*i64"
        elif name in INT:
            types[name] = "*i32"
        else:
            types[name] = f"*{price if name in ('columns', 'query', 'queries') else 'fp64'}"
    return types


@pytest.mark.parametrize("price", ["fp32", "fp64"])
@pytest.mark.parametrize("dim", [8, pytest.param(16, marks=pytest.mark.slow), pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["nearest", "solve", "combine", "gradient", "sum"])
def test_kernels_compile_for_hopper(name, dim, price):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(fused.kernels, f"{name}_kernel")
    slots, words = fused._layout(dim)
    every = {
        "DIM": dim,
        "PADDED": triton.next_power_of_2(dim),
        "SLOTS": slots,
        "WORDS": words,
        "ROOM": triton.next_power_of_2(2 * dim + 32),
        "ROWS": slots,
        "ENTRIES": 32,
    }
    sizes = {key: value for key, value in every.items() if key in kernel.arg_names}
    constants = {(kernel.arg_names.index(key),): value for key, value in sizes.items()}
    source = ASTSource(fn=kernel, signature=signature(kernel, price, sizes), constexprs=constants)
    options = {"num_warps": fused._WARPS} | ({"maxnreg": fused._REGISTERS} if name == "solve" else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY
    if price == "fp32" and name in ("nearest", "solve"):
        assert "tf32" not in compiled.asm["ptx"]
