"""What several tests share: real images from an installed package, and one tiny run of the whole main job."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import write_tiny_benchmark
from torchvision.models import vgg16


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    threads = max(1, min(2, os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    if workers > 1:  # the commands that tests start share the cores, too
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none, unless a device is named to try it on."""
    if torch.cuda.is_available() or os.environ.get("SCQ_TEST_DEVICE"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA; SCQ_TEST_DEVICE=cpu tries the same code on a CPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of tests marked ``gpu``."""
    return torch.device(os.environ.get("SCQ_TEST_DEVICE") or "cuda")


@pytest.fixture
def halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantizer of tests/training_steps.py by its name, for one test, so that no other finds it among the names."""
    from training_steps import Halfway

    from scq.stage1_tokenizer.quantizers import interface

    monkeypatch.setitem(interface._REGISTRY, "halfway", Halfway)


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Emoji at 32 pixels as shards, 'train' and 'test'."""
    from scq.data.pack import pack

    folder = tmp_path_factory.mktemp("emoji")
    for split in ("train", "test"):
        pack("twemoji", folder / split, format="emoji", size=32, split=split)
    return {split: folder / split for split in ("train", "test")}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of the whole main job; its ``model`` is barely trained, but real."""
    from scq.evaluation.benchmark.run import run_benchmark

    folder = tmp_path_factory.mktemp("tiny")
    run_benchmark(write_tiny_benchmark(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder for temporary files meanwhile: a client of gradio's leaves an empty folder there for each file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("downloads")))
        yield Path(tempfile.gettempdir())


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16's layers under torchvision's names, untrained: the real code path without a download."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = vgg16(weights=None).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("features.")}, path)
    return path
