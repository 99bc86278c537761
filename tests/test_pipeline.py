"""The pipeline as a user of diffusers calls it: drawing, editing, saving, and what it says of mistakes."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from scq.data.stream import iterate_once
from scq.engine.errors import UserError
from scq.engine.measurements import Measured, TrainedFor, TrainingFacts
from scq.sampling.editing import OnStep, fill, tokens_under, variation_mask, windows
from scq.sampling.images import to_mask
from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.model_folder import load_tokenizer
from scq.stage2_prior.model_card import model_card
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> SoftConvexPipeline:
    return SoftConvexPipeline.from_pretrained(tiny_run / "model")


@pytest.fixture(scope="module")
def emoji_images(emoji: dict[str, Path]) -> torch.Tensor:
    return next(iterate_once(emoji["test"], batch_size=4)).images


def test_images_do_not_depend_on_the_batch_whatever_its_size(pipeline: SoftConvexPipeline) -> None:
    whole = pipeline(24, seed=0, batch_size=24, output_type="pt").images
    for batch_size in (1, 7, 16):
        assert torch.equal(pipeline(24, seed=0, batch_size=batch_size, output_type="pt").images, whole)


def test_settings_change_the_images(pipeline: SoftConvexPipeline) -> None:
    usual = pipeline(4, seed=0).tokens
    changes = ({"seed": 9}, {"num_inference_steps": 3}, {"temperature": 0.3}, {"choice_temperature": 0.0})
    for change in (*changes, {"sampler": "halton"}, {"top_k": 2}):
        assert not torch.equal(pipeline(4, **{"seed": 0, **change}).tokens, usual), change


def test_a_generator_draws_seeds_that_draw_the_images_again(pipeline: SoftConvexPipeline) -> None:
    first = pipeline(3, generator=torch.Generator().manual_seed(1))
    again = pipeline(3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(pipeline(1, seed=int(first.seeds[2])).tokens[0], first.tokens[2])
    assert not torch.equal(pipeline(3).tokens, pipeline(3).tokens), "without a seed, other images every time"
    with pytest.raises(ValueError, match="not both"):
        pipeline(1, seed=0, generator=torch.Generator())


def test_arrays_are_as_diffusers_has_them(pipeline: SoftConvexPipeline) -> None:
    pixels = pipeline(2, seed=0, output_type="pt").images
    arrays = pipeline(2, seed=0, output_type="np").images
    assert (arrays.dtype, arrays.shape) == ("float32", (2, 32, 32, 3))
    assert torch.equal((torch.from_numpy(arrays) * 255).round().to(torch.uint8), pixels.permute(0, 2, 3, 1))


@pytest.mark.gpu
def test_a_generator_of_the_gpu_draws_seeds(pipeline: SoftConvexPipeline, device: torch.device) -> None:
    first, again = (pipeline(2, generator=torch.Generator(device).manual_seed(1)) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)


def test_the_callback_sees_every_step_and_can_end_the_drawing(pipeline: SoftConvexPipeline) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(pipe: SoftConvexPipeline, step: int, left: int, kept: dict[str, torch.Tensor]) -> None:
        seen.append((step, left, int((kept["tokens"] == pipe.prior.mask_token).sum())))
        preview = pipe.preview(kept["tokens"])
        assert preview.shape == (2, 3, 32, 32)

    pipeline(2, seed=0, num_inference_steps=4, callback_on_step_end=look)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [left for _, left, _ in seen] == [3, 2, 1, 0]
    assert [hidden for _, _, hidden in seen] == sorted((hidden for _, _, hidden in seen), reverse=True)
    assert seen[-1][2] == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(2, callback_on_step_end=stop)


def test_a_preview_is_grey_where_nothing_is_revealed(pipeline: SoftConvexPipeline) -> None:
    tokens = pipeline(1, seed=0).tokens
    tokens[0, 0, 0] = pipeline.prior.mask_token
    cell = pipeline.tokenizer.factor
    preview = pipeline.preview(tokens)
    assert (preview[0, :, :cell, :cell] == 128).all()
    assert not (preview[0, :, cell:, cell:] == 128).all()


def test_inpainting_keeps_every_pixel_outside_the_mask(
    pipeline: SoftConvexPipeline, emoji_images: torch.Tensor
) -> None:
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 10:20, 4:9] = True  # cells of 8 pixels: rows 1 and 2, columns 0 and 1
    drawn = pipeline.inpaint(emoji_images[:1], mask, num_images=3, seed=0, output_type="pt")
    outside = ~mask.expand(3, 32, 32)
    kept = emoji_images[:1].expand(3, -1, -1, -1).permute(0, 2, 3, 1)
    assert torch.equal(drawn.images.permute(0, 2, 3, 1)[outside], kept[outside])
    assert not torch.equal(drawn.images[0], drawn.images[1])
    codes = pipeline.encode(emoji_images[:1]).indices[0]
    redrawn = tokens_under(mask, pipeline.tokenizer.factor)[0]
    assert redrawn.nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert torch.equal(drawn.tokens[0][~redrawn], codes[~redrawn])
    as_pictures = pipeline.inpaint(
        Image.fromarray(emoji_images[0].permute(1, 2, 0).numpy()), Image.fromarray(mask[0].numpy()), 3, seed=0
    )
    assert torch.equal(as_pictures.tokens, drawn.tokens)


def test_a_variation_keeps_the_other_share(pipeline: SoftConvexPipeline, emoji_images: torch.Tensor) -> None:
    codes = pipeline.encode(emoji_images).indices
    same = pipeline(4, init_image=emoji_images, strength=0.0, seed=0)
    assert torch.equal(same.tokens, codes)
    half = pipeline(4, init_image=emoji_images, strength=0.5, seed=0)
    assert ((half.tokens == codes).flatten(1).sum(1) >= 8).all()
    assert not torch.equal(half.tokens, codes)
    mask = variation_mask(torch.arange(4), (4, 4), 0.25)
    assert (mask.flatten(1).sum(1) == 4).all()
    assert not torch.equal(mask[0], mask[1])


def test_outpainting_grows_beyond_the_training_grid(pipeline: SoftConvexPipeline, emoji_images: torch.Tensor) -> None:
    drawn = pipeline.outpaint(emoji_images[:1], left=3, right=24, bottom=8, num_images=2, seed=0, output_type="pt")
    assert drawn.tokens.shape == (2, 5, 8)
    assert drawn.images.shape == (2, 3, 40, 64)
    codes = pipeline.encode(emoji_images[:1]).indices[0]
    assert torch.equal(drawn.tokens[0, :4, 1:5], codes)
    assert int(drawn.tokens.max()) < pipeline.prior.mask_token
    assert not torch.equal(drawn.tokens[0], drawn.tokens[1])
    seen = []

    def look(_: SoftConvexPipeline, step: int, left: int, found: dict[str, torch.Tensor]) -> None:
        seen.append((step, left, found["tokens"].clone()))

    borders = {"left": 3, "right": 24, "bottom": 8}
    alone = pipeline.outpaint(emoji_images[:1], **borders, seed=1, output_type="pt", callback_on_step_end=look)
    assert torch.equal(alone.tokens[0], drawn.tokens[1]), "image i has seed + i"
    steps = len(seen)
    assert [(step, left) for step, left, _ in seen] == [(step, steps - 1 - step) for step in range(steps)]
    assert all(tokens.shape == (1, 5, 8) for *_, tokens in seen), "whole canvases, not windows"
    hidden = [int((tokens == pipeline.prior.mask_token).sum()) for *_, tokens in seen]
    assert hidden == sorted(hidden, reverse=True)
    assert torch.equal(seen[-1][2].cpu(), alone.tokens)


def test_windows_cover_the_canvas_and_begin_at_what_is_known() -> None:
    known = torch.zeros(9, 12, dtype=torch.bool)
    known[5:9, 8:12] = True
    corners = windows((9, 12), (4, 4), known)
    assert corners[0] == (5, 8)
    covered = torch.zeros(9, 12, dtype=torch.bool)
    for top, left in corners:
        covered[top : top + 4, left : left + 4] = True
    assert covered.all()
    with pytest.raises(ValueError, match="3x4 tokens is smaller"):
        fill(lambda start, *_: start, torch.zeros(1, 3, 4, dtype=torch.int64), (4, 4), 9, torch.zeros(1), print)


def test_every_window_sees_what_the_others_drew() -> None:
    """A prior that copies the code to the left: the whole canvas must become the one known code."""

    def copy_left(start: torch.Tensor, seeds: torch.Tensor, on_step: OnStep) -> torch.Tensor:
        known = torch.where(start == 9, -1, start).amax((1, 2), keepdim=True)
        return torch.where(start == 9, known, start)

    start = torch.full((2, 6, 9), 9)
    start[:, 2, 2] = torch.tensor([3, 4])
    filled = fill(copy_left, start, (4, 4), 9, torch.arange(2), print)
    assert (filled[0] == 3).all()
    assert (filled[1] == 4).all()


def test_interpolation_ends_at_the_two_images(pipeline: SoftConvexPipeline, emoji_images: torch.Tensor) -> None:
    way = pipeline.interpolate(emoji_images[:1], emoji_images[1:2], num_images=5, output_type="pt")
    assert way.shape == (5, 3, 32, 32)
    ends = pipeline.decode(pipeline.encode(emoji_images[:2]).z_q, "pt")
    assert (way[[0, -1]].int() - ends.int()).abs().max() <= 1, "encoded in batches of another size"
    with pytest.raises(ValueError, match="at least 2"):
        pipeline.interpolate(emoji_images[:1], emoji_images[1:2], num_images=1)


def test_what_is_saved_comes_back(pipeline: SoftConvexPipeline, tmp_path: Path) -> None:
    changed = SoftConvexPipeline(
        pipeline.tokenizer, pipeline.prior, scheduler=pipeline.scheduler.changed(sampler="halton", steps=3)
    )
    changed.save_pretrained(tmp_path / "model")
    loaded = SoftConvexPipeline.from_pretrained(tmp_path / "model")
    assert loaded.scheduler.sampler == "halton"
    assert torch.equal(loaded(2, seed=0, output_type="pt").images, changed(2, seed=0, output_type="pt").images)
    weights = {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert weights == {".json", ".md", ".safetensors"}, "nothing that has to be unpickled"
    assert UnmaskingScheduler.from_config(loaded.scheduler.config) == loaded.scheduler


def test_diffusers_loads_what_we_saved(pipeline: SoftConvexPipeline, tiny_run: Path) -> None:
    loaded = DiffusionPipeline.from_pretrained(str(tiny_run / "model"))
    assert isinstance(loaded, SoftConvexPipeline)
    assert torch.equal(loaded.to("cpu")(2, seed=0).tokens, pipeline(2, seed=0).tokens)


def test_a_copy_made_with_diffusers_keeps_the_card_and_no_path_of_this_disk(tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(str(EMBEDDED)).save_pretrained(tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "Twemoji" in card
    assert "license: cc-by-4.0" in card
    assert "KID x 1000" in card
    configs = [path.read_text() for path in (tmp_path / "copy").rglob("*.json")]
    assert not any(str(EMBEDDED) in text for text in configs)


def test_saving_and_loading_take_diffusers_words(pipeline: SoftConvexPipeline, tiny_run: Path, tmp_path: Path) -> None:
    faster = UnmaskingScheduler(steps=2)
    loaded = SoftConvexPipeline.from_pretrained(
        tiny_run / "model", scheduler=faster, use_safetensors=True, local_files_only=True
    )
    assert loaded.scheduler.steps == 2
    with pytest.raises(UserError, match="has no unet; its components are tokenizer, prior"):
        SoftConvexPipeline.from_pretrained(tiny_run / "model", unet=None)
    with pytest.raises(UserError, match="use_safetensors=False"):
        SoftConvexPipeline.from_pretrained(tiny_run / "model", use_safetensors=False)
    with pytest.raises(UserError, match="safe_serialization=False"):
        pipeline.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


def test_guidance_without_classes_is_refused(pipeline: SoftConvexPipeline) -> None:
    with pytest.raises(ValueError, match="this prior has no classes"):
        pipeline(1, seed=0, guidance_scale=3.0)


def test_a_dtype_is_for_the_networks_and_not_for_the_codes(
    pipeline: SoftConvexPipeline, tiny_run: Path, tmp_path: Path
) -> None:
    rounded = SoftConvexPipeline.from_pretrained(tiny_run / "model", torch_dtype=torch.bfloat16)
    assert rounded.prior.dtype == rounded.tokenizer.dtype == torch.bfloat16
    assert torch.equal(rounded.tokenizer.codes(), pipeline.tokenizer.codes())
    tokens = pipeline(3, seed=0).tokens
    difference = rounded.decode_tokens(tokens).float() - pipeline.decode_tokens(tokens).float()
    assert difference.abs().mean() < 2
    drawn = rounded(3, seed=0, output_type="pt")
    assert drawn.images.shape == (3, 3, 32, 32)
    assert rounded.encode(drawn.images).z_q.isfinite().all()
    with pytest.raises(UserError, match="rounded"):
        rounded.save_pretrained(tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()


def test_a_model_on_the_hub_is_asked_for_as_diffusers_does(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, **settings: object) -> str:
        asked.append((name, settings))
        return str(tiny_run / "model")

    monkeypatch.setattr("scq.engine.network.snapshot_download", download)
    loaded = SoftConvexPipeline.from_pretrained("ada/emoji", token="secret", revision="v2", cache_dir=tmp_path)
    assert loaded.image_size == 32
    ((name, settings),) = asked
    assert name == "ada/emoji"
    assert (settings["token"], settings["revision"], settings["cache_dir"]) == ("secret", "v2", tmp_path)
    assert not any("bin" in pattern for pattern in settings["allow_patterns"]), "nothing that has to be unpickled"
    for local in ("runs/typo", "Models/typo", f"{tmp_path}/typo", "./typo", "a/b/c"):
        with pytest.raises(UserError, match="no model in"):
            SoftConvexPipeline.from_pretrained(local)
    assert len(asked) == 1


@pytest.mark.parametrize("sampler", ["maskgit", "halton", "ancestral", "remask"])
def test_the_usual_steps_fit_a_grid_of_few_tokens(sampler: str) -> None:
    tokenizer = ImageTokenizer(24, (8, 8), patch_size=4, latent_dim=4, codebook_size=16)
    pipeline = SoftConvexPipeline(tokenizer, MaskedTransformer(16, tokenizer.grid, width=16, depth=1, heads=2))
    assert pipeline.prior.length == 9
    assert pipeline.scheduler.steps == 12
    seen = []
    drawn = pipeline(2, seed=0, sampler=sampler, callback_on_step_end=lambda _, step, left, found: seen.append(step))
    assert drawn.tokens.shape == (2, 3, 3)
    assert len(seen) == (12 if sampler == "remask" else 9)
    if sampler != "remask":
        with pytest.raises(ValueError, match="steps=10 must be at most 9"):
            pipeline(1, sampler=sampler, num_inference_steps=10)


def card_of(pipeline: SoftConvexPipeline) -> str:
    return model_card(pipeline.as_model(), pipeline.measured)


def test_a_card_says_how_a_model_was_trained(pipeline: SoftConvexPipeline) -> None:
    plain = SoftConvexPipeline(pipeline.tokenizer, pipeline.prior)
    head = card_of(plain).split("---")[1]
    assert "license:" not in head
    assert "pipeline_tag: unconditional-image-generation" in head
    assert "## Training" not in card_of(plain)
    facts = TrainingFacts(dataset="folder", revision="1a2b3c", prior=TrainedFor(steps=3000, images_seen=96000))
    plain.measured = Measured(training=facts, license="mit")
    card = card_of(plain)
    assert "license: mit" in card.split("---")[1]
    for fact in ("dataset: folder", "git revision: 1a2b3c", "prior: 3,000 steps, 96,000 images seen", "Nothing yet"):
        assert fact in card
    after = plain.measured.with_numbers(pipeline.measured)
    assert after.samples == pipeline.measured.samples
    assert after.license == "mit"
    tokenizer = pipeline.tokenizer
    conditional = MaskedTransformer(tokenizer.config.codebook_size, tokenizer.grid, 16, 1, 2, num_classes=3)
    assert "pipeline_tag" not in card_of(SoftConvexPipeline(tokenizer, conditional))


def test_a_model_hangs_on_no_name_of_our_modules(pipeline: SoftConvexPipeline, tiny_run: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_run / "model" / "model_index.json").read_text())
    classes = {name: value for name, value in index.items() if not name.startswith("_")}
    assert {library for library, _ in classes.values()} <= {"scq", None}
    for library, name in filter(all, classes.values()):
        assert getattr(importlib.import_module(library), name)
    # A folder of before there was one import name: the modules that it names are gone.
    shutil.copytree(tiny_run / "model", tmp_path / "old")
    modules = {"tokenizer": "stage1_tokenizer.autoencoder", "prior": "stage2_prior.transformer"}
    modules |= {"refiner": "stage2_prior.refiner", "scheduler": "sampling.scheduler"}
    old = {name: [modules[name], value[1]] if name in modules else value for name, value in index.items()}
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(old))
    loaded = SoftConvexPipeline.from_pretrained(tmp_path / "old")
    assert torch.equal(loaded(2, seed=0).tokens, pipeline(2, seed=0).tokens)
    loaded.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "model_index.json").read_text()) == index


def test_an_upload_carries_the_models_own_card(
    pipeline: SoftConvexPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = []

    class Hub:
        def __init__(self, token: str | None):
            assert token in (None, "secret")

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            names = {path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*")}
            uploads.append((repo_id, names, (folder_path / "README.md").read_text()))
            return f"hub/{repo_id}"

    monkeypatch.setattr("scq.sampling.hub.HfApi", Hub)
    assert pipeline.push_to_hub("ada/emoji", token="secret") == "hub/ada/emoji"
    pipeline.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="ada/other")
    for name, (repo_id, names, card) in zip(("ada/emoji", "ada/other"), uploads, strict=True):
        assert repo_id == name
        assert {"README.md", "model_index.json", "tokenizer/config.json", "scheduler/scheduler_config.json"} <= names
        assert "KID x 1000" in card


def test_a_tokenizer_of_another_prior_is_refused(pipeline: SoftConvexPipeline, tiny_run: Path) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        SoftConvexPipeline(load_tokenizer(tiny_run / "arms" / "vqgan" / "tokenizer"), pipeline.prior)


def test_mistakes_are_named(pipeline: SoftConvexPipeline, emoji_images: torch.Tensor, tmp_path: Path) -> None:
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    for mistake, words in (
        ({"num_images": 0}, "num_images=0"),
        ({"temprature": 1.0}, "'temprature'"),
        ({"num_inference_steps": 65}, "at most 16"),
        ({"num_inference_steps": 0}, "steps=0"),
        ({"seed": 2**63 - 1}, "seed=9223372036854775807 must be a whole number"),
        ({"output_type": "latent"}, "'latent'"),
        ({"mask_image": mask}, "no init_image"),
        ({"init_image": emoji_images, "num_images": 3}, "init_image holds 4 images"),
        ({"init_image": emoji_images[:1], "strength": 2.0}, "strength=2.0"),
        ({"init_image": emoji_images.float()}, "uint8"),
        ({"class_labels": 3}, "without classes"),
        ({"start": torch.zeros(2, 4, 4)}, "start must be"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(**{"num_images": 1, **mistake})
    codes = pipeline.encode(emoji_images[:1])
    for wrong_output in (
        lambda kind: pipeline.decode(codes.z_q, kind),
        lambda kind: pipeline.inpaint(emoji_images[:1], mask, output_type=kind),
        lambda kind: pipeline.interpolate(emoji_images[:1], emoji_images[1:2], 2, kind),
    ):
        with pytest.raises(ValueError, match="output_type='latent' must be one of pil, pt, np"):
            wrong_output("latent")
    with pytest.raises(ValueError, match="no mask was given"):
        to_mask([], 32)
    with pytest.raises(UserError, match="no model in"):
        SoftConvexPipeline.from_pretrained(tmp_path)
