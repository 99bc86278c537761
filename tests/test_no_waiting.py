"""The host never waits for a GPU in a training step or a step of a sampler, as far as a CPU can tell.

tests/test_gpu.py asks CUDA itself.
"""

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_steps import STAGES, training

import scq.stage1_tokenizer.stage
import scq.stage2_prior.prior_stage
import scq.stage2_prior.refiner_stage
from scq.sampling.samplers import SAMPLERS, GuidedPrior
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer

pytestmark = pytest.mark.usefixtures("halfway")
aten = torch.ops.aten
# What the host must know before it can go on: a value, or the size of a result.
READS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes each operation that would have to wait, and each constant that would have to be sent.

    Tensors that are given to `hold` stand for a GPU's, and so does what is computed from them.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        super().__init__()
        self.storages: dict[int, Any] = {}  # kept alive, so that no other tensor gets the address of one
        self.found: list[str] = []
        self.hold(tensors)

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        held = any(each.untyped_storage()._cdata in self.storages for each in given)
        operation = func.overloadpacket
        by_truth = operation in (aten.index, aten.index_put, aten.index_put_) and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if (held and (operation in READS or by_truth)) or operation is aten.lift_fresh:
            ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(REPOSITORY)]
            self.found.append(f"{operation}: {ours[-2].filename}:{ours[-2].lineno}")
        result = func(*args, **(kwargs or {}))
        if held:
            self.hold(each for each in tree_leaves(result) if isinstance(each, torch.Tensor))
        return result


def send_copies(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is sent to the device be a copy, which the watch holds: on a CPU it would be the host's own tensor."""

    def send(tensors: Iterable[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        copies = [each.clone() for each in tensors]
        watch.hold(copies)
        return copies

    for module in (scq.stage1_tokenizer.stage, scq.stage2_prior.prior_stage, scq.stage2_prior.refiner_stage):
        monkeypatch.setattr(module, "send", send)


def test_the_watch_sees_what_would_wait() -> None:
    there, here = torch.rand(4), torch.rand(4)
    with Watch([there]) as watch:
        int(here.sum()), here[here > 0.5]
        assert watch.found == []
        changed = there * 2 + 1
        int(changed.sum()), changed[changed > 0], changed.nonzero(), torch.bincount(changed.long())
        torch.tensor(1.0)
    names = [each.split(":")[0] for each in watch.found]
    assert names == ["aten._local_scalar_dense", "aten.index", "aten.nonzero", "aten.bincount", "aten.lift_fresh"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_step_waits_for_nothing(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, step = training(stage, tmp_path, "training.precision=fp32")
    step(0)
    modules = [*task.modules.values(), *task.frozen.values(), task.average.module]
    if stage == "tokenizer":
        modules.append(task.losses)
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    watch = Watch(weights)
    send_copies(watch, monkeypatch)
    with watch:
        terms = step(1)
    assert watch.found == []
    assert all(each.untyped_storage()._cdata in watch.storages for each in terms.values()), "the watch held it all"


@pytest.mark.parametrize("stage", STAGES)
def test_every_tensor_of_a_training_step_names_its_device(stage: str, tmp_path: Path) -> None:
    """One that does not would lie on the host; here it lies nowhere, and nothing can be done with it."""
    _, step = training(stage, tmp_path, "training.precision=fp32")
    expected = step(0)
    with torch.device("meta"):
        found = step(1)
    assert found.keys() == expected.keys()
    assert all(each.device.type == "cpu" for each in found.values())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_waits_for_nothing(sampler: str) -> None:
    torch.manual_seed(0)
    prior = MaskedTransformer(16, (4, 4), width=32, depth=1, heads=2, num_classes=2).eval()
    start, seeds, labels = torch.full((3, 4, 4), prior.mask_token), torch.arange(3), torch.arange(3) % 2
    settings = UnmaskingScheduler(steps=4, sampler=sampler, top_k=8, top_p=0.9, guidance_schedule="linear")
    predict = GuidedPrior(prior, prior.mask_token, labels, 2, guidance_scale=1.0, guidance_schedule="linear")
    with torch.no_grad():
        SAMPLERS[sampler](predict, start, seeds, settings)  # what is kept from call to call is sent once
        with Watch([*prior.parameters(), *prior.buffers(), start, seeds, labels]) as watch:
            tokens = SAMPLERS[sampler](predict, start, seeds, settings)
    # The share that a schedule leaves masked is a tensor of the host, and stays there.
    assert [each for each in watch.found if not each.startswith("aten.lift_fresh")] == []
    assert tokens.untyped_storage()._cdata in watch.storages
