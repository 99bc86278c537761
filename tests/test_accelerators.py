"""What a GPU is given to train with changes no number that a CPU can check."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from training_steps import training

import scq.engine.stage
import scq.stage1_tokenizer.stage
from scq.engine.accelerators import send
from scq.engine.fingerprint import fingerprint
from scq.engine.sharding import load_optimizer_state, optimizer_state

pytestmark = pytest.mark.usefixtures("halfway")


def channels_last(network: nn.Module, device: torch.device) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def test_channels_last_is_an_order_in_memory_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    plain, plain_step = training("tokenizer", tmp_path / "plain", "training.precision=fp32")
    for module in (scq.engine.stage, scq.stage1_tokenizer.stage):
        monkeypatch.setattr(module, "place", channels_last)
    (tmp_path / "turned").mkdir()
    turned, turned_step = training("tokenizer", tmp_path / "turned", "training.precision=fp32")
    kernel = turned.modules["model"].encoder.conv_in.weight
    assert not kernel.is_contiguous(), "it did change"
    assert turned.average.module.encoder.conv_in.weight.stride() == kernel.stride()
    for name, module in plain.modules.items():
        assert fingerprint(turned.modules[name]) == fingerprint(module), name
    save_model(turned.modules["model"], str(tmp_path / "saved.safetensors"))
    saved = load_file(tmp_path / "saved.safetensors")
    for name, tensor in plain.modules["model"].state_dict().items():
        assert torch.equal(saved[name], tensor), name
    expected, found = plain_step(0), turned_step(0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_fused_optimizer_goes_on_with_another_devices_state() -> None:
    """With the counters of a plain one, and moments in another order in memory."""

    def gradients_of(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter) * 0.1

    torch.manual_seed(0)
    first = nn.Conv2d(4, 8, 3)
    plain = torch.optim.AdamW(first.parameters(), lr=0.1)
    gradients_of(first)
    plain.step()
    second = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    second.load_state_dict(first.state_dict())
    fused = torch.optim.AdamW(second.parameters(), lr=0.1, fused=True)
    load_optimizer_state(second, fused, deepcopy(optimizer_state(first, plain)))
    assert fused.param_groups[0]["fused"], "the device decides, not the checkpoint"
    assert all(state["exp_avg"].stride() == weights.stride() for weights, state in fused.state.items())
    for layer, optimizer in ((first, plain), (second, fused)):
        gradients_of(layer)
        optimizer.step()
    torch.testing.assert_close(second.weight, first.weight)
    load_optimizer_state(first, plain, deepcopy(optimizer_state(second, fused)))
    assert not plain.param_groups[0]["fused"], "nor on the way back"


def test_what_is_sent_is_what_was_given() -> None:
    sent = send((torch.arange(3), torch.ones(2, 2)), torch.device("cpu"))
    assert [each.tolist() for each in sent] == [[0, 1, 2], [[1, 1], [1, 1]]]
