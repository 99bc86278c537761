"""Quantizers as layers: what the autoencoder, the prior and a checkpoint may rely on."""

import pytest
import torch

from stage1_tokenizer.quantizers import SoftConvexQuantizer, create_quantizer


def latents(batch=4, dim=6, side=5, seed=0):
    return torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["scq", "vq", "none"])
def test_shapes_and_gradients(name):
    quantizer = create_quantizer(name, codebook_size=32, dim=6)
    z = latents().requires_grad_()
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.indices.shape == (4, 5, 5)
    assert out.indices.dtype == torch.int64
    (out.z_q.square().mean() + out.loss).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0
    if name != "none":
        assert quantizer.lookup(out.indices).shape == z.shape
        assert quantizer.codebook.grad.abs().sum() > 0


def test_eval_is_deterministic_and_touches_no_buffer():
    quantizer = SoftConvexQuantizer(32, 6)
    quantizer(latents())
    quantizer.eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    first, second = quantizer(latents(seed=1)), quantizer(latents(seed=1))
    assert torch.equal(first.z_q, second.z_q)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_dominant_dropout_hardens_exactly_the_named_images():
    quantizer = SoftConvexQuantizer(32, 6, dominant_dropout=0.5)
    z = latents()
    out = quantizer(z, image_noise=torch.tensor([0.1, 0.9, 0.49, 0.5]))
    codes = quantizer.lookup(out.indices)
    hard = torch.isclose(out.z_q, codes, atol=1e-6).flatten(1).all(1)
    assert hard.tolist() == [True, False, True, False]


def test_unknown_names_and_options_are_listed():
    with pytest.raises(ValueError, match="there are: none, scq, vq"):
        create_quantizer("fancy", codebook_size=4, dim=2)
    with pytest.raises(ValueError, match="has no option 'colour'; it has: commitment"):
        create_quantizer("vq", codebook_size=4, dim=2, colour=1)


def test_a_non_finite_latent_is_named_before_anything_changes():
    quantizer = SoftConvexQuantizer(16, 6)
    quantizer(latents())
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    z = latents()
    z[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"z has 1 entries that are not finite; the first is z\[1, 2, 3, 4\] = nan"):
        quantizer(z)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_half_precision_outside_is_float32_inside():
    quantizer = SoftConvexQuantizer(32, 6).eval()
    z = latents().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(z)
    outside = quantizer(z.float())
    assert inside.z_q.dtype == torch.float32
    assert torch.equal(inside.z_q, outside.z_q)
    assert torch.equal(inside.indices, outside.indices)
