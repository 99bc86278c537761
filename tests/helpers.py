"""What tests call: the command line as a user runs it, and a tiny experiment."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def run_scq(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as a user calls it."""
    command = [sys.executable, "-m", "scq", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full once a file has so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block, which may wait for ever, takes longer."""

    def too_long(*_: object) -> None:
        pytest.fail(f"after {seconds} s it still waits")  # which is no Exception, so that no retry catches it

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_pipe(path: Path) -> None:
    """Put a pipe that nobody writes to in the place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    """Put a link to a device without an end in the place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def launcher(processes: int) -> list[str]:
    """The command that starts a Python module or script in so many processes, on CPUs too, where accelerate's own
    launcher starts only one."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


# For those processes: no GPU, and one thread each, because the machine is shared.
SEVERAL = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def write_tiny_benchmark(folder: Path) -> Path:
    """The quickstart with a few steps, so that every phase runs in seconds. Returns the config."""
    quickstart = REPOSITORY / "configs" / "quickstart"
    tiny_tokenizer = (
        "training: {steps: 12, checkpoint_every: 6, log_every: 3, images_every: 6, batch_size: 16}\n"
        "quantizer: {codebook_size: 64}\narchitecture: {channels: [8, 16, 32]}\n"
    )
    for name in ("tokenizer_scq", "tokenizer_vqgan"):
        (folder / f"{name}.yaml").write_text(f"base: {quickstart / name}.yaml\n{tiny_tokenizer}")
    (folder / "prior.yaml").write_text(
        f"base: {quickstart}/prior.yaml\narchitecture: {{width: 32, depth: 2, heads: 2}}\n"
        "training: {steps: 12, checkpoint_every: 6, log_every: 3, batch_size: 16, images_every: 6}\n"
    )
    (folder / "refiner.yaml").write_text(
        "architecture: {width: 16, depth: 1}\nresampled_share: 0.3\n"
        "training: {steps: 8, checkpoint_every: 4, log_every: 2, batch_size: 16, images_every: 8}\n"
    )
    (folder / "benchmark.yaml").write_text(
        f"base: {quickstart}/benchmark.yaml\nrefiner: refiner.yaml\n"
        "arms: {scq: {refiners: [regression], sweep: true}}\n"
        "measure: {reference_images: 24, samples: 24, pictured: 8, sweep: [steps=2, steps=4 sampler=halton], "
        "sweep_samples: 12, weight_bits: [2], neighbours: 40}\n"
    )
    return folder / "benchmark.yaml"
