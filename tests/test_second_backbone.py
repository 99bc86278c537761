"""A vision transformer as a second feature network, and what `scq evaluate` says of samples with it."""

import json
import subprocess
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from helpers import REPOSITORY, SEVERAL, launcher, run_scq
from PIL import Image
from safetensors.torch import save_file

from scq.engine.errors import UserError
from scq.engine.measurements import RealSet, to_plain
from scq.evaluation.evaluate import evaluate_codebook
from scq.evaluation.metrics.dinov2 import load_transformer
from scq.evaluation.metrics.features import cached_features
from scq.evaluation.reference import Reference
from scq.sampling.pipeline import EMBEDDED
from scq.stage1_tokenizer.model_folder import load_tokenizer

NAME = "test_vit"  # 0.4M parameters, trained at 160 pixels


@pytest.fixture(scope="module")
def model() -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(NAME).eval()
    for parameter in model.parameters():  # as they come, an image hardly moves the class token
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def weights(model: timm.models.VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(emoji: dict[str, Path]) -> torch.Tensor:
    return next(Reference(emoji["test"], 11).batches()).images


def test_features_are_the_class_tokens_of_resized_images(
    model: timm.models.VisionTransformer, weights: Path, images: torch.Tensor
) -> None:
    """Against PIL's resize and timm's own way with images of another size than the trained one."""
    network = load_transformer(NAME, weights)
    assert network.num_features == 64
    found = network(images)
    assert found.shape == (11, 64)
    assert found.dtype == torch.float32
    resized = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC))
        for image in images
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        tokens = model.forward_features((pixels - 0.5) / 0.5)[:, 0]
    assert tokens.std(dim=0).mean() > 0.1, "the images differ"
    torch.testing.assert_close(found, tokens, rtol=0, atol=0.02)
    one_by_one = torch.cat([network(image[None]) for image in images[:3]])
    torch.testing.assert_close(one_by_one, found[:3], rtol=0, atol=1e-4)
    with pytest.raises(TypeError, match="uint8"):
        network(images.float())


def test_the_same_weights_from_other_files_are_the_same_network(
    model: timm.models.VisionTransformer, weights: Path, tmp_path: Path
) -> None:
    known = load_transformer(NAME, weights).fingerprint
    torch.save(model.state_dict() | {"mask_token": torch.zeros(1, 64)}, tmp_path / "as_meta.pth")
    assert load_transformer(NAME, tmp_path / "as_meta.pth").fingerprint == known
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed["blocks.5.mlp.fc2.bias"] += 1e-3
    torch.save(changed, tmp_path / "changed.pth")
    assert load_transformer(NAME, tmp_path / "changed.pth").fingerprint != known


def test_what_does_not_fit_is_named(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("vit_of_mine", "no model named"), ("resnet18", "no vision transformer with a class token")):
        with pytest.raises(UserError, match=message):
            load_transformer(name, weights)
    with pytest.raises(UserError, match=r"nowhere\.pth do not exist"):
        load_transformer(NAME, tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="other shapes"):
        load_transformer("vit_tiny_patch16_224", weights)
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="another network's: they have no tensor named cls_token"):
        load_transformer(NAME, tmp_path / "other.pth")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"test_vit.r160_in1k on the Hugging Face hub.*--second-weights"):
        load_transformer(NAME)


def test_a_real_set_of_another_network_is_refused(
    model: timm.models.VisionTransformer, weights: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    cache, real_set = tmp_path / "real.safetensors", RealSet("emoji", "test", 11, "none 32")
    network = load_transformer(NAME, weights)
    written = cached_features(cache, real_set, network, lambda: [images])
    assert torch.equal(cached_features(cache, real_set, network, list).features, written.features)
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed["norm.bias"] += 1
    torch.save(changed, tmp_path / "changed.pth")
    with pytest.raises(UserError, match="network is"):
        cached_features(cache, real_set, load_transformer(NAME, tmp_path / "changed.pth"), list)


@pytest.mark.slow
def test_evaluate_measures_with_both_networks_and_pictures_the_nearest(
    emoji: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    """One process and two find the same numbers and the same picture; samples are drawn and images encoded once."""
    for processes in (1, 2):
        result = subprocess.run(
            [*launcher(processes), "-m", "scq", "evaluate", "--model", str(EMBEDDED), "--num-real", "14"]
            + ["--data", str(emoji["test"]), "--train", str(emoji["train"]), "--neighbours", "20"]
            + ["--second-backbone", NAME, "--second-weights", str(weights), "--num-samples", "14"]
            + ["--cache", str(tmp_path / "real.safetensors"), "--out", str(tmp_path / f"{processes}.json")],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=SEVERAL,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    samples, second = one["samples"], one["samples"]["second_backbone"]
    assert second["frechet_distance"] > 0
    assert second["network"]["fingerprint"] == load_transformer(NAME, weights).fingerprint
    assert second["network"]["protocol"] != one["network"]["protocol"]
    assert samples["nearest_training_distance"] > 0
    assert samples["nearest_training_among"] == 20
    assert samples["fid_to_training"] > 0
    for key in ("frechet_distance", "kid", "kid_error"):
        assert two["samples"]["second_backbone"][key] == pytest.approx(second[key], rel=1e-5, abs=1e-6)
    assert two["samples"]["nearest_training_distance"] == pytest.approx(samples["nearest_training_distance"], rel=1e-4)
    pictures = [np.asarray(Image.open(tmp_path / f"{processes}_neighbours.png")) for processes in (1, 2)]
    assert np.array_equal(*pictures)
    usage = evaluate_codebook(load_tokenizer(EMBEDDED), Reference(emoji["test"], 14).batches()).summary()
    assert one["codebook"] == pytest.approx(to_plain(usage), rel=0.02)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"real.safetensors", "real_second.safetensors"}


def test_options_that_contradict_each_other_are_named(emoji: dict[str, Path], tmp_path: Path) -> None:
    for arguments, named in (
        (["--model", EMBEDDED, "--second-weights", "x.pth"], "--second-backbone"),
        (["--model", EMBEDDED / "tokenizer", "--train", emoji["train"]], "tokenizer alone"),
    ):
        result = run_scq("evaluate", "--data", emoji["test"], "--out", tmp_path / "out.json", *arguments)
        assert result.returncode == 2
        assert named in result.stderr
