"""How long quantizers take, side by side: what `scq benchmark speed` runs.

Every arm gets the same latents and the same codebook, both like those of a trained model, and does what a training step
asks of a quantizer: nearest codes, z_q, codebook and commitment terms, backward. Every repeat runs every arm once, so
that whatever else the machine does affects all arms alike.
"""

import platform
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scq.engine.files import atomic_write, write_json
from scq.stage1_tokenizer.quantizers.kmeans import kmeans
from scq.stage1_tokenizer.solver import METHODS, soft_convex_solve
from scq.stage1_tokenizer.solver.codebook import nearest_codes

BASELINE = "plain VQ"
# (N latents, F channels, K codes); the project's targets are stated for the first of them.
CELLS = (
    (16384, 8, 1024),
    (4096, 8, 1024),
    (65536, 8, 1024),
    (16384, 8, 256),
    (16384, 8, 4096),
    (16384, 16, 1024),
    (16384, 32, 1024),
)
# Measured beside them on a GPU, for which a target is stated, too; on a CPU plain VQ would take 4 GB and minutes.
CUDA_CELLS = ((65536, 8, 16384),)
_COMMITMENT = 0.25

Arm = Callable[[Tensor, Tensor], Tensor]  # (z, codebook) -> scalar to differentiate


def benchmark_speed(
    out: str | Path | None = None,
    *,
    cells: tuple[tuple[int, int, int], ...] | None = None,
    rho: float = 0.3,
    repeats: int = 7,
    threads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    echo: Callable[[str], None] = print,
) -> dict:
    """Time forward plus backward of every quantizer over a grid of sizes.

    Args:
        out: folder for ``speed.json`` and ``speed.png``; None writes nothing.
        cells: (N latents, F channels, K codes) to measure, each positive. None: CELLS, and CUDA_CELLS on a GPU.
        rho: lambda as a multiple of the mean squared distance to the nearest code.
        repeats: timed turns of each arm, after one untimed.
        threads: CPU threads, None for torch's present setting.
        device: "cpu" or a CUDA device.
        seed: of latents and codebook.
        echo: what prints each line of the table.

    Returns:
        ``{"machine": .., "settings": .., "rows": [{n, f, k, arm, median_s, low_s, high_s, ratio, peak_mb}, ..]}`` where
        low and high are quartiles, ratio is to plain VQ in the same cell, and peak_mb counts tensors alive at once.

    Raises:
        ValueError: no cell, a size or a repeat count below 1, or rho <= 0.
    """
    if cells is None:
        cells = CELLS + (CUDA_CELLS if device.startswith("cuda") else ())
    if not cells or any(size < 1 for cell in cells for size in cell):
        raise ValueError(f"cells must be (N, F, K) with sizes of at least 1, not {cells!r}")
    if repeats < 1 or not rho > 0:
        raise ValueError(f"repeats must be at least 1 and rho positive, not {repeats!r} and {rho!r}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        rows = []
        echo(f"{'N':>6} {'F':>3} {'K':>6}  {'arm':<24} {'median':>9} {'quartiles':>17} {'ratio':>6} {'peak':>8}")
        for cell in cells:
            for row in _measure(cell, rho, repeats, torch.device(device), seed):
                rows.append(row)
                echo(_line(row))
        result = {
            "machine": _machine(device),
            "settings": {"rho": rho, "repeats": repeats, "seed": seed, "baseline": BASELINE},
            "rows": rows,
        }
    finally:
        torch.set_num_threads(threads_before)
    if out is not None:
        _write(result, Path(out))
    return result


def trained_like(n: int, f: int, k: int, seed: int = 0, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Latents (n, f) in 64 clusters of different shapes, and codes (k, f) by k-means over more latents like them.

    Latents are drawn on the CPU, so they are the same on every ``device``.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(64, f, generator=generator)
    shapes = torch.randn(64, f, f, generator=generator) / f**0.5

    def draw(count: int) -> Tensor:
        cluster = torch.randint(64, (count,), generator=generator)
        noise = torch.randn(count, f, generator=generator)
        return (centres[cluster] + (shapes[cluster] @ noise.unsqueeze(-1)).squeeze(-1)).to(device)

    codes, _ = kmeans(draw(8 * k), k, steps=5, seed=seed)
    return draw(n), codes


def _arms(z: Tensor, codebook: Tensor, rho: float) -> dict[str, Arm]:
    reg = rho * (z - codebook[nearest_codes(z, codebook)]).square().sum(1).mean().item()

    def terms(z: Tensor, nearest: Tensor) -> Tensor:
        return nnf.mse_loss(nearest, z.detach()) + _COMMITMENT * nnf.mse_loss(z, nearest.detach())

    def plain(z: Tensor, codebook: Tensor) -> Tensor:
        distance = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.t()
        nearest = codebook[distance.argmin(1)]
        return (z + (nearest - z).detach()).square().sum() + terms(z, nearest)

    def blocked(z: Tensor, codebook: Tensor) -> Tensor:
        with torch.no_grad():
            index = nearest_codes(z, codebook)  # (N,)
        nearest = codebook[index]
        return (z + (nearest - z).detach()).square().sum() + terms(z, nearest)

    def convex(method: str) -> Arm:
        def arm(z: Tensor, codebook: Tensor) -> Tensor:
            solution = soft_convex_solve(z, codebook, reg, method=method)
            return solution.z_q.square().sum() + terms(z, codebook[solution.nearest])

        return arm

    arms = {BASELINE: plain, "VQ, search in blocks": blocked, "vector-quantize-pytorch": _library_arm(codebook)}
    return arms | {f"SCQ {method}": convex(method) for method in reversed(METHODS)}


def _library_arm(codebook: Tensor) -> Arm:
    from vector_quantize_pytorch import VectorQuantize  # a baseline only; importing it takes seconds

    layer = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook), commitment_weight=_COMMITMENT)
    layer = layer.to(codebook.device).train()
    layer._codebook.embed.data.copy_(codebook.unsqueeze(0))

    def arm(z: Tensor, codebook: Tensor) -> Tensor:
        z_q, _, loss = layer(z.unsqueeze(0))
        return z_q.square().sum() + loss.sum()

    return arm


def _measure(cell: tuple[int, int, int], rho: float, repeats: int, device: torch.device, seed: int) -> list[dict]:
    n, f, k = cell
    z, codebook = trained_like(n, f, k, seed, device)
    arms = _arms(z, codebook, rho)
    peaks = {name: _peak_bytes(arm, z, codebook) for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            leaves = z.clone().requires_grad_(), codebook.clone().requires_grad_()
            _wait(device)
            start = time.perf_counter()
            arm(*leaves).backward()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times[BASELINE])
    rows = []
    for name, taken in times.items():
        low, median, high = torch.tensor(taken, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
        rows.append(
            {"n": n, "f": f, "k": k, "arm": name, "median_s": float(median), "low_s": float(low), "high_s": float(high)}
            | {"ratio": float(median) / base, "peak_mb": peaks[name] / 2**20}
        )
    return rows


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still alive, where no allocator counts them."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self.known.pop(key)


def _peak_bytes(arm: Arm, z: Tensor, codebook: Tensor) -> int:
    leaves = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    if z.is_cuda:
        before = torch.cuda.memory_allocated(z.device)
        torch.cuda.reset_peak_memory_stats(z.device)
        arm(*leaves).backward()
        return torch.cuda.max_memory_allocated(z.device) - before
    with _LiveTensors() as live:
        arm(*leaves).backward()
    return live.peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: str) -> dict:
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    )
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _line(row: dict) -> str:
    quartiles = f"{row['low_s'] * 1e3:.1f} - {row['high_s'] * 1e3:.1f}"
    return (
        f"{row['n']:>6} {row['f']:>3} {row['k']:>6}  {row['arm']:<24} {row['median_s'] * 1e3:>6.1f} ms "
        f"{quartiles:>17} {row['ratio']:>5.2f}x {row['peak_mb']:>5.0f} MB"
    )


def _write(result: dict, folder: Path) -> None:
    write_json(folder / "speed.json", result)
    with atomic_write(folder / "speed.png") as file:
        _plot(result["rows"], file)


def _plot(rows: list[dict], file: IO[bytes]) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    cells = list(dict.fromkeys((row["n"], row["f"], row["k"]) for row in rows))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != BASELINE]
    ratio = {(row["n"], row["f"], row["k"], row["arm"]): row["ratio"] for row in rows}
    figure = Figure(figsize=(max(6, 1.6 * len(cells)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        centres = [x + (i - (len(arms) - 1) / 2) * width for x in range(len(cells))]
        axes.bar(centres, [ratio[(*cell, arm)] for cell in cells], width, label=arm)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(cells)), [f"N={n}\nF={f}, K={k}" for n, f, k in cells])
    axes.set_ylabel(f"time / {BASELINE}")
    axes.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=120)
