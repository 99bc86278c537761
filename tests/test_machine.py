"""What a machine may lack, or bring along: a home, a sound cache, threads after a fork."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import REPOSITORY

from scq.engine.files import cache_folder
from scq.stage1_tokenizer.solver import kept_code, soft_convex_solve

SMALL = """
from scq.stage1_tokenizer.solver.kept_code import njit

@njit()
def plus(x):
    return x + {added}
"""


def solved() -> list[list]:
    """A solution and its gradient, as plain numbers that travel between processes unchanged."""
    generator = torch.Generator().manual_seed(0)
    z, codes = (torch.randn(rows, 4, generator=generator, requires_grad=True) for rows in (700, 32))
    solution = soft_convex_solve(z, codes, 0.3)
    solution.z_q.square().sum().backward()
    return [x.tolist() for x in (solution.z_q, solution.weights, z.grad, codes.grad)]


def convolved(_: int) -> float:
    return float(torch.nn.functional.conv2d(torch.ones(4, 8, 64, 64), torch.ones(32, 8, 3, 3)).sum())


def test_a_fork_computes_what_its_parent_does() -> None:
    """OpenMP's threads stay behind in the parent, and a fork would wait for them forever, or be ended by numba."""
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
        "import multiprocessing, torch, test_machine\n"
        "torch.set_num_threads(2)\n"
        "expected = test_machine.convolved(0), test_machine.solved()\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    sums, found = pool.map_async(test_machine.convolved, [0, 1]), pool.apply_async(test_machine.solved)\n"
        "    assert (sums.get(120), found.get(120)) == ([expected[0]] * 2, expected[1])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, timeout=300)


def test_compiling_without_a_compiler_ends_in_one_line(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")}
    # A cache of torch's own would hide that there is no compiler.
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scq", "sample", "--num", "1", "--out", str(tmp_path / "out"), "--compile"]
    found = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert "scq: torch.compile failed" in found.stderr.splitlines()[-1]


def load(folder: Path, added: int = 1) -> ModuleType:
    """A module with one compiled function, as a new process would import it."""
    file = folder / "small.py"
    file.write_text(SMALL.format(added=added))
    kept_code._sha256.cache_clear()
    kept_code._folder.cache_clear()
    spec = importlib.util.spec_from_file_location("small", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def was_kept(module: ModuleType) -> bool:
    return bool(module.plus.stats.cache_hits)


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "a flipped bit": lambda file: file.write_bytes(file.read_bytes()[:-200] + b"?" + file.read_bytes()[-199:]),
    "something else": lambda file: file.write_bytes(b"\x80\x05]." * 100),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_compiled_code_that_is_damaged_is_compiled_again(tmp_path: Path, damage: str) -> None:
    assert load(tmp_path).plus(1.0) == 2.0
    again = load(tmp_path)
    assert again.plus(1.0) == 2.0
    assert was_kept(again)
    (file,) = (tmp_path / "__pycache__").glob("plus.*.scq")
    DAMAGES[damage](file)
    mended = load(tmp_path)
    assert mended.plus(1.0) == 2.0
    assert not was_kept(mended)
    if damage != "a folder":
        again = load(tmp_path)
        assert again.plus(1.0) == 2.0
        assert was_kept(again)


def test_compiled_code_of_another_source_is_compiled_again(tmp_path: Path) -> None:
    assert load(tmp_path, added=1).plus(1.0) == 2.0
    assert load(tmp_path, added=2).plus(1.0) == 3.0


def test_code_is_compiled_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "__pycache__").write_text("in the way of a folder")
    (tmp_path / "home").write_text("in the way of a folder")
    monkeypatch.delenv("SCQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(tmp_path).plus(1.0) == 2.0
    assert "nothing can be kept in" in capsys.readouterr().err


def test_a_user_without_a_home_has_a_cache_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a user that the system does not know, and ~ stays ~."""
    for variable in ("SCQ_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(tmp_path)
    folder = cache_folder()
    (folder / "file").write_text("kept")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())
