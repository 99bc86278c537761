"""LPIPS: that it is the published distance, what it costs is all that differs, and what its weights must be."""

from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS

from scq.engine.errors import UserError
from scq.stage1_tokenizer.losses import LossConfig, TokenizerLoss
from scq.stage1_tokenizer.perceptual import PerceptualLoss


@pytest.fixture
def published(vgg_weights: Path) -> _LPIPS:
    """torchmetrics' LPIPS with the same weights."""
    network = _LPIPS(net="vgg", pnet_rand=True)
    weights = torch.load(vgg_weights, weights_only=True)
    for stage in network.net.children():
        for index, layer in stage.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.load_state_dict({leaf: weights[f"features.{index}.{leaf}"] for leaf in ("weight", "bias")})
    return network


def pictures(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and others near to them."""
    torch.manual_seed(0)
    images = torch.rand(count, 3, 32, 32) * 2 - 1
    return images, (images + 0.2 * torch.randn_like(images)).requires_grad_()


@pytest.mark.parametrize("count", [2, 19])  # fewer and more than go through the network at once
def test_it_is_the_published_distance_and_has_its_gradient(published: _LPIPS, vgg_weights: Path, count: int) -> None:
    images, others = pictures(count)
    expected = published(images, others).mean()
    (slope,) = torch.autograd.grad(expected, others)
    found = PerceptualLoss(str(vgg_weights))(images, others)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    (found_slope,) = torch.autograd.grad(found, others)
    assert (found_slope - slope).norm() < 3e-3 * slope.norm()  # an untrained network's maps are nearly parallel


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_the_first_stages_add_up(published: _LPIPS, vgg_weights: Path, stages: int) -> None:
    images, others = pictures()
    _, each = published(images, others.detach(), retperlayer=True)
    found = PerceptualLoss(str(vgg_weights), stages)(images, others.detach())
    torch.testing.assert_close(found, torch.stack(each[:stages]).sum(0).mean(), rtol=1e-4, atol=1e-6)


def test_under_autocast_it_is_nearly_the_same(vgg_weights: Path) -> None:
    images, others = pictures()
    loss = PerceptualLoss(str(vgg_weights))
    expected = loss(images, others)
    (slope,) = torch.autograd.grad(expected, others)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(images, others)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)
    (found_slope,) = torch.autograd.grad(found, others)
    assert (found_slope - slope).norm() < 0.2 * slope.norm()


def test_a_share_of_a_batch_is_its_first_images(vgg_weights: Path) -> None:
    images, others = pictures(5)
    settings = {"l1": 0.0, "perceptual": 1.0, "perceptual_weights": str(vgg_weights), "adversarial": 0.0}
    loss = TokenizerLoss(LossConfig(**settings, perceptual_share=0.5))
    found, _, _ = loss.generator(images, others, torch.nn.Parameter(torch.zeros(1)), 0, torch.zeros(5, 7))
    torch.testing.assert_close(found, loss.perceptual(images[:3], others[:3]))
    (slope,) = torch.autograd.grad(found, others)
    assert [bool(each.abs().sum() > 0) for each in slope] == [True, True, True, False, False]


FEATURES = {"l1": 0.0, "perceptual": 1.0, "perceptual_stages": 3, "adversarial": 1.0, "discriminator": "features"}
FEATURES |= {"adversarial_start": 2, "adversarial_ramp": 0, "discriminator_lead": 1, "adaptive_max": 0.0}


def test_a_discriminator_of_features_learns_to_tell_and_teaches_the_generator(vgg_weights: Path) -> None:
    images, _ = pictures(5)
    others = images.mean((2, 3), keepdim=True).expand_as(images).clone().requires_grad_()  # each a single colour
    loss = TokenizerLoss(LossConfig(**FEATURES, perceptual_weights=str(vgg_weights), perceptual_share=0.6))
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=1e-2)
    last, noise = torch.nn.Parameter(torch.zeros(1)), torch.zeros(5, 7)
    total, terms, shown = loss.generator(images, others, last, 0, noise)
    assert "adversarial" not in terms, "it is not asked before its time"
    assert [tuple(maps.shape) for maps in shown.fake] == [(3, 128, 16, 16), (3, 256, 8, 8)], "from the second stage on"
    assert not any(maps.requires_grad for maps in shown.fake)
    (without,) = torch.autograd.grad(total, others)
    for _ in range(60):
        loss.discriminate(loss.discriminator, shown, 1, noise)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    real, fake = loss.discriminator(shown.real), loss.discriminator(shown.fake)
    assert real.shape == (3, 16 * 16 + 8 * 8)
    assert (real > fake).float().mean() > 0.9
    total, terms, _ = loss.generator(images, others, last, 2, noise)
    (taught,) = torch.autograd.grad(total, others)
    assert terms["adversarial"].isfinite()
    assert not torch.allclose(taught[:3], without[:3])
    assert not taught[3:].any(), "of images that LPIPS does not see"
    assert all(parameter.grad is None for parameter in loss.discriminator.parameters())


def test_maps_are_compared_as_images_are(vgg_weights: Path) -> None:
    images, others = pictures(19)
    loss = PerceptualLoss(str(vgg_weights), 3)
    distance, real, found = loss.compare(images, others)
    torch.testing.assert_close(distance, loss(images, others))
    assert [tuple(maps.shape) for maps in found] == [(19, 64, 32, 32), (19, 128, 16, 16), (19, 256, 8, 8)]
    assert found[-1].requires_grad
    assert not real[-1].requires_grad


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"perceptual": 0.0}, "set loss.perceptual, too"),
        ({"perceptual_stages": 1}, "raise loss.perceptual_stages"),
        ({"perceptual_start": 2}, "begins at step 1, before loss.perceptual_start"),
        ({"r1": 1.0}, "set loss.r1=0"),
        ({"augment": ["colour"]}, r"set loss.augment=\[\]"),
    ],
)
def test_what_does_not_fit_a_discriminator_of_features_is_named(changes: dict, expected: str) -> None:
    with pytest.raises(UserError, match=f"discriminator=features does not fit: .*{expected}"):
        TokenizerLoss(LossConfig(**{**FEATURES, **changes}))


def test_lpips_sets_in_at_its_step(vgg_weights: Path) -> None:
    images, others = pictures()
    settings = {"perceptual_weights": str(vgg_weights), "adversarial": 0.0, "perceptual_start": 3}
    loss = TokenizerLoss(LossConfig(**settings))
    terms = [
        loss.generator(images, others, torch.nn.Parameter(torch.zeros(1)), step, torch.zeros(2, 7))[1]
        for step in (2, 3)
    ]
    assert ["perceptual" in each for each in terms] == [False, True]


def test_perceptual_loss_is_a_distance_that_teaches_nothing_to_itself(vgg_weights: Path) -> None:
    loss = PerceptualLoss(str(vgg_weights)).train()
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    near = (image + 0.05 * torch.randn_like(image)).requires_grad_()
    far = torch.rand_like(image) * 2 - 1
    assert loss(image, image).abs() < 1e-6
    assert 0 < loss(image, near) < loss(image, far)
    loss(image, near).backward()
    assert near.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())


def test_perceptual_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VGG16's weights .* do not exist"):
        PerceptualLoss(str(tmp_path / "none.pth"))
    (tmp_path / "torn.pth").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=r"torn\.pth cannot be read"):
        PerceptualLoss(str(tmp_path / "torn.pth"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="features"):
        PerceptualLoss(str(tmp_path / "other.pth"))
    torch.save({"features.0.weight": torch.zeros(1), "features.0.bias": torch.zeros(64)}, tmp_path / "shape.pth")
    with pytest.raises(UserError, match=r"size mismatch") as shape:
        PerceptualLoss(str(tmp_path / "shape.pth"))
    assert "\n" not in str(shape.value)
