"""A model from others is checked while it is loaded, before memory or time is taken for it."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file

from scq.engine.errors import UserError
from scq.engine.network import Network
from scq.sampling.pipeline import EMBEDDED
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.model_folder import load_tokenizer
from scq.stage1_tokenizer.quantizers import quantizer_names
from scq.stage2_prior.model_folder import open_model
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.transformer import MaskedTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def networks() -> dict[str, Network]:
    return {
        "tokenizer": ImageTokenizer(16, (8, 16), latent_dim=4, codebook_size=16),
        "prior": MaskedTransformer(16, (4, 4), 16, 2, 2, num_classes=3, code_dim=4),
        "refiner": ConvexRefiner(16, 4, "flow", 16, 2),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, network in networks().items():
        network.save_pretrained(folder / name)
    return folder


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Change the weights' file; ``change`` also gets the name of a large floating weight."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = max(
            (name for name, each in tensors.items() if each.is_floating_point()), key=lambda n: tensors[n].numel()
        )
        change(tensors, name)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return rewrite


def make_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def claim_terabytes(folder: Path) -> None:
    """A header whose tensors need more bytes than the file has."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def set_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[3] = torch.nan


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "class": (config(_class_name="UNet2DModel"), "is of class 'UNet2DModel', not"),
    "no class": (config(_class_name=None), "is of class None, not"),
    "unknown key": (config(hidden=3), "has an unknown key 'hidden'"),
    "depth": (config(depth=10_000_000), "unknown key 'depth'|depth=10000000 must be a whole number"),
    "text": (config(codebook_size="many"), "codebook_size='many' must be a whole number"),
    "null": (config(codebook_size=None), "codebook_size=None must be a whole number"),
    "nan": (config(codebook_size=float("nan")), "codebook_size=nan must be a whole number"),
    "large": (config(codebook_size=2**24), "has shape .*, but config.json implies .*16777216"),
    "huge": (config(codebook_size=10**18), "codebook_size=1000000000000000000 must be a whole number"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "must hold an object, not list"),
    "nested": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not valid JSON"),
    "long": (lambda folder: (folder / "config.json").write_text(" " * 2**25), "a config has at most"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    "a pipe": (make_pipe, "config.json is not a file"),
    "terabytes": (claim_terabytes, "cannot be loaded"),
    "header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64), "cannot be loaded"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be loaded"),
    "missing weight": (weights(lambda tensors, name: tensors.pop(name)), "lacks "),
    "extra weight": (weights(lambda tensors, name: tensors.update(more=torch.ones(3))), "holds more, which is no part"),
    "shape": (weights(lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()})), "has shape"),
    "int8": (
        weights(lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)})),
        "is I8; it must be F16",
    ),
    "NaN": (weights(set_nan), "has 1 entries that are not finite"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["tokenizer", "prior", "refiner"])
def test_a_model_from_others_is_refused_at_once_and_in_words(
    saved: Path, tmp_path: Path, name: str, attack: str
) -> None:
    change, words = ATTACKS[attack]
    folder = tmp_path / name
    shutil.copytree(saved / name, folder)
    change(folder)
    start = time.monotonic()
    with pytest.raises(UserError, match=words):
        type(networks()[name]).from_pretrained(folder)
    assert time.monotonic() - start < 20
    if name == "tokenizer":
        with pytest.raises(UserError, match=words):
            load_tokenizer(folder)


def test_a_model_without_its_prior_is_not_looked_for_on_a_hub(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "prior")
    with pytest.raises(UserError, match="model has no folder 'prior': the model is damaged"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("quantizer", quantizer_names())
def test_a_good_tokenizer_of_any_quantizer_is_loaded(tmp_path: Path, quantizer: str) -> None:
    tokenizer = ImageTokenizer(16, (8, 16), latent_dim=4, codebook_size=64, quantizer_name=quantizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert not loaded.training


def test_a_prior_with_many_classes_is_loaded(tmp_path: Path) -> None:
    names = [f"{i:05d} {'a long name ' * 4}" for i in range(30_000)]
    MaskedTransformer(16, (4, 4), 16, 2, 2, num_classes=len(names), class_names=names).save_pretrained(tmp_path)
    assert list(MaskedTransformer.from_pretrained(tmp_path).config.class_names) == names


def test_a_network_alone_is_saved_whole_and_leaves_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, folder = networks()["prior"], tmp_path / "prior"
    network.save_pretrained(folder, max_shard_size="10KB")
    network.save_pretrained(folder, variant="fp16")
    for name in ("notes.txt", "README.md"):
        (folder / name).write_text("mine")
    before = os.umask(0o027)
    try:
        network.save_pretrained(folder)
    finally:
        os.umask(before)
    kept = {"config.json", WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "notes.txt", "README.md"}
    assert {path.name for path in folder.iterdir()} == kept
    assert (folder / WEIGHTS).stat().st_mode & 0o777 == 0o640
    weights = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr(ModelMixin, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="the model that was there is untouched"):
        network.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == weights
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds something other than a model"):
        network.save_pretrained(tmp_path / "mine")


def test_shards_variants_and_types_are_diffusers(saved: Path, tmp_path: Path) -> None:
    for name, network in networks().items():
        network.save_pretrained(tmp_path / name, max_shard_size="10KB", variant="fp16")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        loaded = type(network).from_pretrained(tmp_path, subfolder=name, variant="fp16", torch_dtype="bfloat16")
        assert loaded.dtype == (torch.float32 if name == "refiner" else torch.bfloat16)
        with pytest.raises(UserError, match=r"holds no diffusion_pytorch_model\.safetensors"):
            type(network).from_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="dtype='int8' must be one of float16, bfloat16, float32"):
        ImageTokenizer.from_pretrained(saved / "tokenizer", torch_dtype="int8")
    rounded = ImageTokenizer.from_pretrained(saved / "tokenizer", torch_dtype=torch.float16)
    assert rounded.quantizer.codebook.dtype == torch.float32
    assert rounded.decode_indices(torch.zeros(1, 4, 4, dtype=torch.int64)).dtype == torch.float16


@pytest.mark.parametrize("damage", ["a name", "a list", "nested", "long"])
def test_settings_of_a_model_from_others_are_only_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    (model / "scheduler" / "scheduler_config.json").write_text(
        {"a name": '"somebody/else"', "a list": "[]", "nested": "[" * 100_000, "long": " " * 2**25}[damage]
    )
    looked_up = []
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", lambda *_, **more: looked_up.append(more))
    with pytest.raises(UserError, match="scheduler_config"):
        open_model(model)
    assert not looked_up
