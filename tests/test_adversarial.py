"""The adversarial game: both losses, its regularizers, and augmentation that gradients pass through."""

import pytest
import torch
import torch.nn.functional as F

from scq.engine.errors import UserError
from scq.stage1_tokenizer.adversarial import (
    AUGMENTATIONS,
    LeCam,
    augment,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from scq.stage1_tokenizer.discriminator import PatchDiscriminator
from scq.stage1_tokenizer.losses import LossConfig, TokenizerLoss, adaptive_weight


def test_hinge_loss() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake, "hinge") == 0.5 * (0.5 + 1.0)
    assert generator_loss(fake, "hinge") == 1.0


def test_non_saturating_loss_is_cross_entropy() -> None:
    real, fake = torch.randn(8), torch.randn(8)
    both = torch.cat([real, fake])
    truth = torch.cat([torch.ones(8), torch.zeros(8)])
    expected = F.binary_cross_entropy_with_logits(both, truth)
    torch.testing.assert_close(discriminator_loss(real, fake, "non-saturating"), expected)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones(8))
    torch.testing.assert_close(generator_loss(fake, "non-saturating"), expected)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
    x = layer * torch.tensor([3.0, 1.0])
    assert torch.isclose(adaptive_weight(x[0] * 4, x[0], layer, 100.0), torch.tensor(4.0), rtol=1e-4)
    assert adaptive_weight(x[0] * 1e6, x[0], layer, 10.0) == 10.0


def test_gradient_penalty_of_a_known_slope() -> None:
    images = torch.rand(4, 3, 5, 5, requires_grad=True)
    slope = torch.randn(3, 5, 5, requires_grad=True)
    penalty = gradient_penalty(images, (images * slope).sum((1, 2, 3)))
    torch.testing.assert_close(penalty, 0.5 * slope.square().sum())
    penalty.backward()
    torch.testing.assert_close(slope.grad, slope.detach())


def test_lecam_pulls_towards_the_other_sides_mean_and_remembers_it() -> None:
    lecam = LeCam(decay=0.5)
    real, fake = torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), -4.0)
    lecam.update(real, fake)
    assert lecam.real_mean == 1.0
    assert lecam.fake_mean == -2.0
    assert lecam(real, fake) == (2.0 + 2.0) ** 2 + (1.0 + 4.0) ** 2
    parted = LeCam(decay=0.5, parts_per_step=2)
    for _ in range(2):
        parted.update(real, fake)
    torch.testing.assert_close(parted.real_mean, lecam.real_mean, msg="two parts of a step forget as much as the step")
    again = LeCam()
    again.load_state_dict(lecam.state_dict())
    assert again(real, fake) == lecam(real, fake)


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_verdicts_do_not_depend_on_the_rest_of_the_batch(norm: str) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(16, 2, norm).eval()
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]))


def test_spectral_norm_bounds_the_slope() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(16, 1, "spectral")
    for _ in range(30):
        discriminator(torch.rand(1, 3, 16, 16))  # every pass in training refines the norms
    for layer in discriminator.layers:
        if isinstance(layer, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.05
    with pytest.raises(ValueError, match="norm must be group or spectral, not 'batch'"):
        PatchDiscriminator(norm="batch")


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_every_augmentation_changes_images_each_by_its_own_noise_and_passes_gradients(kind: str) -> None:
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    noise = 0.3 * torch.rand(4, 7, generator=torch.Generator().manual_seed(0))  # in the middle nothing shifts
    shown = augment(images, noise, (kind,))
    assert shown.shape == images.shape
    assert (shown != images).flatten(1).any(1).all()
    torch.testing.assert_close(augment(images[2:3], noise[2:3], (kind,)), shown[2:3])
    shown.sum().backward()
    assert images.grad.abs().sum() > 0
    assert torch.equal(augment(images, noise, ()), images)


def test_a_shift_moves_pixels_and_a_cutout_removes_a_quarter() -> None:
    images = torch.rand(1, 3, 16, 16) + 1
    noise = torch.zeros(1, 7)
    noise[:, 3:5] = torch.tensor([0.999, 0.0])  # two down, two to the left
    shifted = augment(images, noise, ("shift",))
    assert torch.equal(shifted[..., 2:, :-2], images[..., :-2, 2:])
    assert (shifted[..., :2, :] == 0).all()
    noise[:, 5:] = 0.5
    assert (augment(images, noise, ("cutout",)) == 0).float().mean() == 0.25


def test_unknown_parts_of_the_game_are_named() -> None:
    settings = {"perceptual": 0.0, "adversarial": 1.0}
    with pytest.raises(UserError, match=r"loss.game is 'chess'"):
        TokenizerLoss(LossConfig(**settings, game="chess"))
    with pytest.raises(UserError, match=r"loss.augment has 'mirror'; choose from: colour, shift, cutout"):
        TokenizerLoss(LossConfig(**settings, augment=["mirror"]))
    with pytest.raises(UserError, match="norm must be group or spectral"):
        TokenizerLoss(LossConfig(**settings, discriminator_norm="batch"))
    with pytest.raises(UserError, match=r"loss.r1_every is 0"):
        TokenizerLoss(LossConfig(**settings, r1=1.0, r1_every=0))


def test_a_discriminator_too_deep_for_the_images_is_named() -> None:
    deep = LossConfig(perceptual=0.0, adversarial=1.0, discriminator_layers=4, discriminator_channels=8)
    words = "discriminator_layers=4 needs images of at least 48 pixels, but these have 32"
    with pytest.raises(UserError, match=words):
        TokenizerLoss(deep, image_size=32)
    verdict = TokenizerLoss(deep, image_size=48).discriminator(torch.zeros(1, 3, 48, 48))
    assert verdict.shape[-1] == 1, "the least there is"
