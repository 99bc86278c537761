"""Quantizers as layers: what the autoencoder, the prior and a checkpoint may rely on."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from scq.stage1_tokenizer.quantizers import SoftConvexQuantizer, VectorQuantizer, create_quantizer
from scq.stage1_tokenizer.quantizers.kmeans import kmeans
from scq.stage1_tokenizer.solver import compiled, compiled_rows


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Between its thousands of short operations the solver's threads spin, and starve whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def latents(batch=4, dim=6, side=5, seed=0):
    return torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(seed))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


ARMS = ["scq", "vq", "vq_ema", "simvq", "fsq", "rvq2"]


@pytest.mark.parametrize("name", [*ARMS, "rvq", "none"])
def test_shapes_and_gradients(name):
    quantizer = create_quantizer(name, codebook_size=64, dim=6)
    z = latents().requires_grad_()
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.indices.shape == (4, 5, 5)
    assert out.indices.dtype == torch.int64
    assert all(value.ndim == 0 and not value.requires_grad for value in out.stats.values())
    (out.z_q.square().mean() + out.loss).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0
    assert quantizer.has_codes == (name not in ("rvq", "none"))
    if quantizer.has_codes:
        assert 0 <= out.indices.min() <= out.indices.max() < 64
        assert quantizer.lookup(out.indices).shape == z.shape
    if name in ("scq", "vq"):
        assert quantizer.codebook.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ARMS[1:])
def test_a_hard_quantizer_returns_its_codes(name):
    quantizer = create_quantizer(name, codebook_size=64, dim=6)
    for step in range(3):
        trained = quantizer(latents(seed=step))
        torch.testing.assert_close(trained.z_q, trained.z_q.detach())
    before = state(quantizer)
    quantizer.eval()
    out = quantizer(latents(seed=5))
    assert torch.equal(out.z_q, quantizer.lookup(out.indices))
    assert same(state(quantizer), before)
    every = quantizer.lookup(torch.arange(64).view(1, 8, 8))
    assert every.flatten(2).unique(dim=2).shape[2] > 32, "codes differ"
    if name in ("vq", "vq_ema", "simvq"):  # the others choose in parts
        distance = torch.cdist(latents(seed=5).permute(0, 2, 3, 1).reshape(-1, 6), every[0].flatten(1).t())
        assert torch.equal(distance.argmin(1), out.indices.flatten())


def test_codebooks_of_other_sizes_say_what_they_need():
    with pytest.raises(ValueError, match="product is codebook_size=100, not None; sizes with published levels: 64, "):
        create_quantizer("fsq", codebook_size=100, dim=4)
    assert create_quantizer("fsq", codebook_size=100, dim=4, levels=[10, 10]).lookup(torch.tensor([[[99]]])).ndim == 4
    with pytest.raises(ValueError, match=r"product is codebook_size=100, not \[7, 7\]"):
        create_quantizer("rvq2", codebook_size=100, dim=4, sizes=[7, 7])
    assert create_quantizer("rvq2", codebook_size=512, dim=4).sizes == [32, 16]


@pytest.mark.parametrize("options", [{}, {"method": "local"}, {"method": "relaxed"}, {"projection_dim": 3}])
def test_eval_is_deterministic_and_touches_no_buffer(options):
    quantizer = SoftConvexQuantizer(32, 6, **options)
    quantizer(latents())
    quantizer.eval()
    before = state(quantizer)
    first, second = quantizer(latents(seed=1)), quantizer(latents(seed=1))
    assert torch.equal(first.z_q, second.z_q)
    assert same(state(quantizer), before)
    assert torch.equal(quantizer(latents(seed=1), image_noise=torch.zeros(4)).z_q, first.z_q)


def test_eval_treats_every_image_alike_whatever_its_batch():
    quantizer = SoftConvexQuantizer(32, 6)
    quantizer(latents())
    quantizer.eval()
    z = latents(8, seed=2)
    together, alone = quantizer(z), quantizer(z[3:4])
    torch.testing.assert_close(together.z_q[3:4], alone.z_q, rtol=0, atol=1e-4)
    assert torch.equal(together.indices[3:4], alone.indices)


def test_z_q_is_the_combination_that_solve_shows():
    quantizer = SoftConvexQuantizer(32, 6)
    quantizer(latents())
    quantizer.eval()
    z = latents(seed=3)
    solution, out = quantizer.solve(z), quantizer(z)
    mixed = (solution.weights.unsqueeze(-1) * quantizer.codebook[solution.support]).sum(1)
    torch.testing.assert_close(out.z_q.permute(0, 2, 3, 1).flatten(0, 2), mixed, rtol=0, atol=1e-5)
    assert torch.equal(out.indices.flatten(), solution.dominant)
    assert out.stats["soft_error"] < out.stats["hard_error"]
    assert out.stats["support_size"] > 1


def test_dominant_dropout_hardens_exactly_the_named_images():
    quantizer = SoftConvexQuantizer(32, 6, dominant_dropout=0.5)
    z = latents().requires_grad_()
    out = quantizer(z, image_noise=torch.tensor([0.1, 0.9, 0.49, 0.5]))
    codes = quantizer.lookup(out.indices)
    hard = torch.isclose(out.z_q, codes, atol=1e-6).flatten(1).all(1)
    assert hard.tolist() == [True, False, True, False]
    (out.z_q * 3).sum().backward()
    torch.testing.assert_close(z.grad[0], torch.full_like(z.grad[0], 3.0))  # straight through to z
    assert not torch.allclose(z.grad[1], torch.full_like(z.grad[1], 3.0))
    with pytest.raises(ValueError, match=r"image_noise must be \(4,\)"):
        quantizer(z, image_noise=torch.zeros(3))


def test_a_latent_may_be_known_by_its_nearest_code():
    torch.manual_seed(0)
    dominant = SoftConvexQuantizer(32, 6, dominant_dropout=1.0, rho=0.01)
    nearest = SoftConvexQuantizer(32, 6, dominant_dropout=1.0, rho=0.01, token="nearest")
    nearest.load_state_dict(dominant.state_dict())
    z = latents()
    solution = dominant.eval().solve(z)
    assert 0 < (solution.dominant != solution.nearest).float().mean() < 0.5, "a small lambda leans on farther codes"
    plain, out = dominant(z), nearest.eval()(z)
    assert torch.equal(out.z_q, plain.z_q)
    assert torch.equal(out.indices.flatten(), solution.nearest)
    assert torch.equal(nearest.mix(z).indices, out.indices)
    trained = nearest.train()(z)
    torch.testing.assert_close(trained.z_q, nearest.lookup(trained.indices), msg="they are what training decodes")
    distance = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), nearest.codebook.detach())
    assert torch.equal(trained.indices.flatten(), distance.argmin(1))


def test_more_levels_of_residuals_come_nearer_at_more_bits():
    errors = []
    for levels in (1, 2, 4):
        torch.manual_seed(0)
        quantizer = create_quantizer("rvq", codebook_size=16, dim=6, levels=levels)
        for step in range(8):
            quantizer(latents(batch=16, seed=step))
        quantizer.eval()
        z = latents(seed=99)
        out = quantizer(z)
        assert torch.equal(quantizer(z).z_q, out.z_q)
        errors.append((z - out.z_q).square().mean().item())
        assert quantizer.bits_per_latent == 4 * levels
        with pytest.raises(ValueError, match="no single codes"):
            quantizer.lookup(out.indices)
    assert errors == sorted(errors, reverse=True)


def test_image_noise_defaults_to_the_global_generator():
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        quantizer = SoftConvexQuantizer(32, 6)
        outs.append(quantizer(latents()).z_q)
    assert torch.equal(*outs)


def test_lambda_follows_the_running_mean_of_the_nearest_distance():
    for parts in (1, 2):
        quantizer = SoftConvexQuantizer(32, 6, momentum=0.9, kmeans_batches=0, revive=False)
        quantizer.parts_per_step = parts
        z, momentum = latents(), 0.9 ** (1 / parts)
        means = [quantizer(s * z).stats["hard_error"] for s in (1.0, 2.0, 3.0)]
        expected = means[0]
        for mean in means[1:]:
            expected = momentum * expected + (1 - momentum) * mean
        torch.testing.assert_close(quantizer.mean_distance, expected)
        assert int(quantizer.steps) == 3 // parts


def test_parts_of_a_step_count_as_one_step():
    options = {"momentum": 0.9, "kmeans_batches": 2, "rho": 0.1, "rho_end": 10.0, "rho_steps": 4, "window": 4}
    whole, parts = (SoftConvexQuantizer(64, 6, dominant_dropout=0.0, **options) for _ in range(2))
    parts.parts_per_step = 2
    for step in range(6):
        z = latents(8, side=2, seed=step)  # fewer latents than codes: some are dead
        rho = whole(z).stats["rho"]
        books = [parts.codebook.detach().clone()]
        for part in z.split(4):
            assert parts(part).stats["rho"] == rho
            books.append(parts.codebook.detach().clone())
        assert not torch.equal(books[0], books[1]), "k-means at first, then the revival of dead codes"
        assert torch.equal(books[1], books[2]) == (step >= 2), "k-means takes every part, revival waits for a step"
        assert parts.steps == whole.steps == step + 1
    assert "parts" not in parts.state_dict(), "it is zero whenever a checkpoint is written"


def test_a_resumed_run_is_the_same_run():
    torch.manual_seed(0)
    straight = SoftConvexQuantizer(16, 6, window=8, kmeans_batches=2)
    resumed = SoftConvexQuantizer(16, 6, window=8, kmeans_batches=2)
    noise = torch.linspace(0, 0.99, 4)
    for step in range(6):
        if step == 3:
            resumed.load_state_dict(straight.state_dict())
        a = straight(latents(seed=step), noise)
        if step >= 3:
            b = resumed(latents(seed=step), noise)
            assert torch.equal(a.z_q, b.z_q)
            assert a.stats == b.stats
    assert same(state(straight), state(resumed))


def test_kmeans_places_codes_on_the_latents():
    centres = 10 * torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    rows = centres.repeat_interleave(50, 0) + 0.01 * torch.randn(400, 3, generator=torch.Generator().manual_seed(2))
    codes, counts = kmeans(rows, 64)
    assert int(counts.sum()) == 400
    assert torch.cdist(centres, codes).amin(1).max() < 0.1
    few, _ = kmeans(rows[:5], 16)
    assert torch.isfinite(few).all()
    assert len(few.unique(dim=0)) == 16
    quantizer = SoftConvexQuantizer(32, 6, kmeans_batches=1)
    z = latents() * 5 + 3
    before = quantizer.codebook.detach().clone()
    first = quantizer(z).stats["hard_error"]
    placed = quantizer.codebook.detach().clone()
    assert not torch.equal(placed, before)
    assert first < 0.6 * z.var() * 6
    quantizer(latents(seed=1))
    assert torch.equal(quantizer.codebook, placed)


REVIVING = {"scq": {"kmeans_batches": 0}, "vq": {}}


@pytest.mark.parametrize("name", REVIVING)
def test_dead_codes_are_revived_when_a_window_ends(name):
    quantizer = create_quantizer(name, codebook_size=32, dim=6, window=8, revive=True, **REVIVING[name])
    with torch.no_grad():
        quantizer.codebook[16:] += 1e3  # nothing can come near these
    z = latents()
    quantizer(z)
    quantizer(z)
    assert (quantizer.codebook[16:].mean() > 500).item()
    quantizer(z)  # the window of eight images was full
    assert (quantizer.codebook.abs() < 10).all()
    kept = create_quantizer(name, codebook_size=32, dim=6, window=8, revive=False, **REVIVING[name])
    with torch.no_grad():
        kept.codebook[16:] += 1e3
    for _ in range(3):
        kept(z)
    assert (kept.codebook[16:].mean() > 500).item()


def test_vq_that_revives_comes_to_use_its_codebook_and_vqgans_does_not():
    batches = [2 + latents(seed=seed) for seed in range(30)]  # far from where VQGAN's codes start
    usage = {}
    for revive in (False, True):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 6, revive=revive, window=16)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
        for z in batches:
            quantizer(z).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        usage[revive] = len(torch.cat([quantizer(z).indices for z in batches]).unique()) / 64
    assert usage[True] > 0.9
    assert usage[False] < 0.5


def test_vqgans_quantizer_keeps_no_counts():
    assert set(VectorQuantizer(8, 6).state_dict()) == {"codebook"}
    assert VectorQuantizer(8, 6).usage_counts() is None


def test_usage_and_perplexity_cover_a_window_of_images():
    quantizer = SoftConvexQuantizer(64, 6, window=1000, revive=False)
    usage = [quantizer(latents(1, side=3, seed=s)).stats["usage"].item() for s in range(12)]
    assert usage == sorted(usage)
    assert usage[-1] > 2 * usage[0]
    assert usage[0] <= 9 / 64
    quantizer.eval()
    assert quantizer(latents(1, side=3)).stats["usage"] <= 9 / 64


def test_rho_is_annealed_and_ends_straight_through():
    quantizer = SoftConvexQuantizer(32, 6, rho=0.1, rho_end=10.0, rho_steps=4, dominant_dropout=0.0)
    seen = []
    for step in range(6):
        z = latents(seed=step).requires_grad_()
        out = quantizer(z)
        seen.append(out.stats["rho"].item())
        out.z_q.sum().backward()
    assert seen == pytest.approx([0.1, 0.1 * 10**0.5, 1.0, 10**0.5, 10.0, 10.0], rel=1e-5)
    torch.testing.assert_close(z.grad, torch.ones_like(z))


def test_projection_quantizes_normalised_latents():
    quantizer = SoftConvexQuantizer(32, 6, projection_dim=3)
    z = latents().requires_grad_()
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    solution = quantizer.solve(z)
    assert solution.z_q.shape == (100, 3)
    assert (solution.z_q.norm(dim=1) <= 1 + 1e-5).all()
    assert quantizer.lookup(out.indices).shape == z.shape
    out.z_q.sum().backward()
    assert quantizer.down.weight.grad is not None
    codes = torch.nn.functional.normalize(quantizer.codebook, dim=1)
    torch.testing.assert_close(quantizer.lookup(out.indices)[0, :, 0, 0], quantizer.up(codes[out.indices[0, 0, 0]]))


def test_unknown_names_and_options_are_listed():
    with pytest.raises(ValueError, match="there are: fsq, none, rvq, rvq2, scq, simvq, vq, vq_ema"):
        create_quantizer("fancy", codebook_size=4, dim=2)
    with pytest.raises(ValueError, match="has no option 'colour'; it has: commitment"):
        create_quantizer("vq", codebook_size=4, dim=2, colour=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size=0 must be a whole number, at least 1"),
        ({"rho": 0.0}, r"rho=0\.0 must be a finite number, above 0"),
        ({"rho_end": 1.0}, "rho_steps=0 must be a whole number, at least 1"),
        ({"method": "fast"}, "method='fast' must be one of exact, local, relaxed"),
        ({"dominant_dropout": 1.5}, r"dominant_dropout=1\.5 must be a finite number, at least 0 and at most 1"),
        ({"momentum": 1.0}, r"momentum=1\.0 must be a finite number, at least 0 and below 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SoftConvexQuantizer(**({"codebook_size": 8, "dim": 4} | options))


@pytest.mark.parametrize("name", [*ARMS, "rvq", "none"])
def test_a_non_finite_latent_is_named_before_anything_changes(name):
    quantizer = create_quantizer(name, codebook_size=64, dim=6)
    quantizer(latents())
    before = state(quantizer)
    z = latents()
    z[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"z has 1 entries that are not finite; the first is z\[1, 2, 3, 4\] = nan"):
        quantizer(z)
    assert same(state(quantizer), before)
    with pytest.raises(ValueError, match=r"z must be \(B, 6, h, w\), not \(4, 5, 5, 5\)"):
        quantizer(latents(dim=5))


def test_training_goes_on_where_every_latent_is_a_code():
    """Then the running mean of the distance, and with it lambda, is next to nothing, and a latent that moves is far."""
    quantizer = SoftConvexQuantizer(100, 6, kmeans_batches=0)
    z = latents()  # 100 of them
    with torch.no_grad():
        quantizer.codebook.copy_(z.permute(0, 2, 3, 1).reshape(100, 6) + 1e-8 * torch.randn(100, 6))
    quantizer(z)
    assert 0 < quantizer.mean_distance < 1e-12
    out = quantizer(z + 0.1 * latents(seed=1))
    assert out.z_q.isfinite().all()
    assert out.indices.max() < 100


@pytest.mark.parametrize("name", [*ARMS, "rvq", "none"])
def test_latents_whose_squares_overflow_are_named_before_anything_changes(name):
    quantizer = create_quantizer(name, codebook_size=64, dim=6)
    before = state(quantizer)
    for z in (latents() * 1e19, (latents() * 1e19).double(), latents() * 1e30):
        with pytest.raises(ValueError, match=r"z has entries up to \d.*; squared distances need 1.8e\+17 at most"):
            quantizer(z)
    assert same(state(quantizer), before)
    assert quantizer(latents() * 1e15).z_q.isfinite().all()


def test_indices_out_of_range_are_named():
    for quantizer in (SoftConvexQuantizer(16, 6), VectorQuantizer(16, 6)):
        with pytest.raises(ValueError, match=r"indices must be in \[0, 16\), but span \[0, 16\]"):
            quantizer.lookup(torch.tensor([[[0, 16]]]))


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_codes_of_any_integer_type_are_looked_up_as_numbers(name, dtype):
    quantizer = create_quantizer(name, codebook_size=64, dim=6).eval()
    indices = torch.arange(2 * 64).view(2, 8, 8) % 64
    assert torch.equal(quantizer.lookup(indices.to(dtype)), quantizer.lookup(indices))
    with pytest.raises(ValueError, match=r"indices must be integers \(B, h, w\), not \(2, 8, 8\) torch.bool"):
        quantizer.lookup(indices.bool())


@pytest.mark.parametrize("name", ARMS)
def test_half_precision_outside_is_float32_inside(name):
    quantizer = create_quantizer(name, codebook_size=64, dim=6)
    quantizer(latents())
    quantizer.eval()
    z = latents().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(z)
    outside = quantizer(z.float())
    assert inside.z_q.dtype == torch.float32
    assert torch.equal(inside.z_q, outside.z_q)
    assert torch.equal(inside.indices, outside.indices)


@pytest.mark.parametrize("name", [*ARMS, "rvq", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inside_a_cast_model_it_computes_in_float32(name, dtype):
    """As a layer of somebody's autoencoder that is cast: z_q in the model's type, from codes that nobody rounded."""
    torch.manual_seed(0)
    options = {"projection_dim": 3} if name == "scq" else {}
    quantizer = create_quantizer(name, codebook_size=64, dim=6, **options)
    quantizer(latents())
    before = state(quantizer)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), quantizer, _Decoder()).to(dtype)
    assert same(state(quantizer), before)
    z = latents().to(dtype).requires_grad_()
    for train in (False, True):
        model.train(train)
        out = quantizer(z)
        assert out.z_q.dtype == dtype
        decoded, loss = model(z)
        assert decoded.dtype == dtype
    (decoded.float().square().mean() + loss).backward()
    assert z.grad.dtype == dtype
    assert z.grad.isfinite().all()
    quantizer.eval()
    wanted = quantizer(z.float())
    assert torch.equal(quantizer(z).z_q, wanted.z_q.to(dtype))
    assert torch.equal(quantizer(z).indices, wanted.indices)
    assert quantizer.mix(z).z_q.dtype == torch.float32
    if quantizer.has_codes:
        assert quantizer.lookup(wanted.indices).dtype == torch.float32


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_of_the_layer_itself_changes_nothing(cast):
    quantizer = SoftConvexQuantizer(32, 6)
    quantizer(latents())
    before = state(quantizer)
    getattr(quantizer, cast)().eval()
    assert same(state(quantizer), before)
    assert quantizer(latents()).z_q.dtype == torch.float32, "of the latents' type"
    assert quantizer.to("meta", torch.float16).codebook.dtype == torch.float32, "moved, not cast"
    assert quantizer.codebook.is_meta


class _Decoder(nn.Conv2d):
    def __init__(self):
        super().__init__(6, 3, 1)

    def forward(self, quantized):
        return super().forward(quantized.z_q), quantized.loss


def test_inside_a_compiled_model_it_computes_the_same(monkeypatch):
    for function in ("solve_all", "combine_all", "gradient_all"):  # as in a process that has not called them yet
        fresh = compiled_rows.compiled_in_parallel(getattr(compiled, function).py_func)
        monkeypatch.setattr(compiled, function, fresh)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 1), create_quantizer("scq", codebook_size=64, dim=6))
    inside = copy.deepcopy(plain)
    results = []
    for network, call in ((inside, torch.compile(inside, backend="eager")), (plain, plain)):
        torch.manual_seed(1)
        out = call(latents(2, 3, 4))
        (out.z_q.square().sum() + out.loss).backward()
        results.append({"z_q": out.z_q.detach(), "indices": out.indices, "gradient": network[0].weight.grad})
    assert results[0]["gradient"].abs().sum() > 0
    assert same(*results)


def test_vq_trains_as_published():
    quantizer = VectorQuantizer(8, 6, commitment=0.25)
    z = latents().requires_grad_()
    out = quantizer(z)
    codes = quantizer.lookup(out.indices)
    torch.testing.assert_close(out.z_q, codes)
    assert torch.equal(out.indices, torch.cdist(z.permute(0, 2, 3, 1), quantizer.codebook).argmin(-1))
    torch.testing.assert_close(out.loss, 1.25 * (z - codes).square().mean())
    (from_decoder,) = torch.autograd.grad(out.z_q.sum(), z, retain_graph=True)
    torch.testing.assert_close(from_decoder, torch.ones_like(z))
    (from_loss,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(from_loss, 0.25 * 2 * (z - codes).detach() / z.numel())


WORKER = """
import sys, torch, torch.distributed as dist
from scq.stage1_tokenizer.quantizers import create_quantizer
rank, world, path, name = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=world)
torch.manual_seed(0)
options = {"scq": {"kmeans_batches": 2}, "vq": {"revive": True}}[name]
quantizer = create_quantizer(name, codebook_size=48, dim=4, window=16, **options)
for step in range(6):
    z = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step)) * (1 + step)
    mine = z.chunk(world)[rank]
    stats = quantizer(mine, image_noise=torch.zeros(len(mine))).stats
kept = {"state": quantizer.state_dict(), "usage": stats["usage"], "perplexity": stats["perplexity"]}
torch.save(kept, f"{path}.{rank}")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("name", REVIVING)
def test_two_processes_have_the_running_statistics_of_one(name, tmp_path):
    results = {}
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    for world in (1, 2):
        path = str(tmp_path / f"world{world}")
        running = [
            subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(world), path, name], env=env)
            for rank in range(world)
        ]
        assert [process.wait(timeout=120) for process in running] == [0] * world
        results[world] = [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(world)]
    one, (left, right) = results[1][0], results[2]
    assert same(left["state"], right["state"])
    for buffer in one["state"]:
        torch.testing.assert_close(left["state"][buffer], one["state"][buffer], rtol=1e-5, atol=1e-5)
    for statistic in ("usage", "perplexity") if name == "scq" else ():  # VQ's are those of a process's own batch
        torch.testing.assert_close(left[statistic], one[statistic])


def test_the_documented_example_runs():
    page = Path(__file__).resolve().parents[1] / "docs" / "quantizer.md"
    example = page.read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(example, names)
    assert names["z"].grad is not None
    assert names["z_q"].shape == (4, 8, 16, 16)
