"""What several tests share: real images from an installed package, and one tiny run of the whole main job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Emoji at 32 pixels as shards, 'train' and 'test'."""
    from data.pack import pack

    folder = tmp_path_factory.mktemp("emoji")
    for split in ("train", "test"):
        pack("twemoji", folder / split, format="emoji", size=32, split=split)
    return {split: folder / split for split in ("train", "test")}


def write_tiny_benchmark(folder: Path) -> Path:
    """The quickstart with a few steps, so that every phase runs in seconds. Returns the config."""
    quickstart = REPOSITORY / "configs" / "quickstart"
    tiny_tokenizer = (
        "training: {steps: 12, checkpoint_every: 6, log_every: 3, images_every: 6, batch_size: 16}\n"
        "quantizer: {codebook_size: 64}\narchitecture: {channels: [16, 32]}\n"
    )
    for name in ("tokenizer_scq", "tokenizer_vqgan"):
        (folder / f"{name}.yaml").write_text(f"base: {quickstart / name}.yaml\n{tiny_tokenizer}")
    (folder / "prior.yaml").write_text(
        f"base: {quickstart}/prior.yaml\narchitecture: {{width: 32, depth: 2, heads: 2}}\n"
        "training: {steps: 12, checkpoint_every: 6, log_every: 3, batch_size: 16, images_every: 6}\n"
    )
    (folder / "benchmark.yaml").write_text(
        f"base: {quickstart}/benchmark.yaml\nmeasure: {{reference_images: 24, samples: 24, pictured: 8}}\n"
    )
    return folder / "benchmark.yaml"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of the whole main job; its ``model`` is barely trained, but real."""
    from evaluation.benchmark import run_benchmark

    folder = tmp_path_factory.mktemp("tiny")
    run_benchmark(write_tiny_benchmark(folder), folder / "run")
    return folder / "run"


def run_scq(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as a user calls it."""
    command = [sys.executable, "-m", "engine.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
