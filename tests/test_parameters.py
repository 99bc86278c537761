"""Every parameter is checked in one place, by name, kind and range: in Python, at the command and on the page."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client
from helpers import run_scq
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from studio_client import EDIT, GENERATE, drawing, edit, generate, serving

from scq.engine.checks import finite_number, one_of, whole_number, yes_or_no
from scq.engine.errors import UserError
from scq.sampling.app import build_page
from scq.sampling.images import to_mask, to_pixels
from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline
from scq.sampling.studio.controls import Slider, WholeNumber
from scq.sampling.studio.edit import OUTPAINT, VARY
from scq.stage2_prior.scheduler import UnmaskingScheduler, parse_settings
from scq.stage2_prior.transformer import MaskedTransformer

pytestmark = pytest.mark.usefixtures("downloads")

HUGE = 10**5000  # Python refuses to write it
A_HUGE_ONE = pytest.param(HUGE, id="huge")
NO_NUMBERS = (None, True, "8", [8], math.nan, math.inf, -math.inf, 1j, np.bool_(True), torch.ones(2), HUGE, [HUGE])


@pytest.fixture(scope="module")
def pipeline() -> SoftConvexPipeline:
    return SoftConvexPipeline.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def conditional(pipeline: SoftConvexPipeline) -> SoftConvexPipeline:
    """Of three classes, untrained."""
    torch.manual_seed(0)
    codes, grid = pipeline.tokenizer.config.codebook_size, pipeline.tokenizer.grid
    return SoftConvexPipeline(pipeline.tokenizer, MaskedTransformer(codes, grid, 32, 1, 2, num_classes=3))


@pytest.fixture(scope="module")
def client(pipeline: SoftConvexPipeline) -> Iterator[Client]:
    with serving(build_page(pipeline, max_batch=4)) as client:
        yield client


@pytest.mark.parametrize("value", [7, 7.0, np.int64(7), np.float32(7), torch.tensor(7), np.array(7), Fraction(7)])
def test_a_number_of_any_library_is_a_number(value: Any) -> None:
    number = finite_number("x", value, 0, 10)
    assert (number, type(number)) == (7.0, float)
    if not isinstance(value, Fraction):
        whole = whole_number("x", value, 7, 7)
        assert (whole, type(whole)) == (7, int)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_named(value: Any) -> None:
    for check in (whole_number, finite_number):
        with pytest.raises(UserError, match=r"^steps=.* must be a (whole|finite) number, at least 1 and at most 9$"):
            check("steps", value, 1, 9)


@given(st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.binary(), st.complex_numbers()))
def test_a_check_returns_a_value_in_its_range_or_names_the_parameter(value: Any) -> None:
    for check, kind in ((whole_number, int), (finite_number, float)):
        found = _checked_or_refused(check, value)
        if isinstance(found, str):
            assert found.startswith("x=")
            assert len(found) < 200
        else:
            assert type(found) is kind
            assert -3 <= found <= 3
            assert found == value


def _checked_or_refused(check: Callable[..., float], value: Any) -> float | str:
    try:
        return check("x", value, -3, 3)
    except UserError as error:
        return str(error)


def test_texts_and_flags() -> None:
    assert one_of("x", "b", "ab") == "b"
    assert yes_or_no("x", np.bool_(False)) is False
    for value in (None, 0, 1, "yes", math.nan, [True]):
        with pytest.raises(UserError, match="must be True or False"):
            yes_or_no("x", value)
        with pytest.raises(UserError, match="must be one of a, b"):
            one_of("x", value, "ab")


NUMBERS = ("steps", "temperature", "top_k", "top_p", "choice_temperature", "remask", "guidance_scale", "refiner_steps")


@pytest.mark.parametrize("name", [*NUMBERS, "final_temperature", "sampler", "schedule", "guidance_schedule", "refine"])
def test_no_setting_takes_what_is_no_value_of_its_kind(name: str, pipeline: SoftConvexPipeline) -> None:
    for value in (math.nan, math.inf, -1, HUGE, "many", [1]):
        with pytest.raises(UserError, match=f"^{name}="):
            UnmaskingScheduler(**{name: value})
        with pytest.raises(UserError, match=f"^{name}="):
            pipeline(1, seed=0, **{name: value})


def test_a_number_of_steps_has_an_end() -> None:
    with pytest.raises(UserError, match="steps=1000000000 must be a whole number, at least 1 and at most 10000"):
        UnmaskingScheduler(steps=1000000000, sampler="remask")


@pytest.mark.parametrize("name", ["num_images", "batch_size", "num_inference_steps", "seed", "strength"])
@pytest.mark.parametrize("value", [True, math.nan, math.inf, 1.5, "2", A_HUGE_ONE, -(2**64), [1]])
def test_no_argument_of_a_call_takes_what_is_no_number(name: str, value: Any, pipeline: SoftConvexPipeline) -> None:
    if (name, value) == ("batch_size", HUGE):
        assert pipeline(1, seed=0, batch_size=value).tokens.shape == (1, 4, 4), "drawn in one batch"
        return
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(UserError, match="^steps=" if name == "num_inference_steps" else f"^{name}="):
        pipeline(**{"num_images": 1, "init_image": picture, "strength": 0.5, name: value})


def test_other_arguments_are_named(pipeline: SoftConvexPipeline) -> None:
    picture, tokens = Image.new("RGB", (32, 32)), torch.zeros(1, 4, 4, dtype=torch.int64)
    for mistake, words in (
        (lambda: pipeline(1, seed=7.5), r"seed=7\.5 must be a whole number"),
        (lambda: pipeline(1, generator=3), "generator=3 must be a torch.Generator"),
        (lambda: pipeline(1, generator=[torch.Generator()] * 2), "2 generators for 1 images"),
        (lambda: pipeline(1, callback_on_step_end=3), "callback_on_step_end=3"),
        (lambda: pipeline(1, output_type=None), "output_type=None must be one of pil, pt, np"),
        (lambda: pipeline(1, init_image="cat.png"), "image='cat.png' must be a picture of Pillow"),
        (lambda: pipeline(1, start=tokens.float()), "start must hold codes, which are whole numbers"),
        (lambda: pipeline(1, start=tokens + 513), "start must hold codes from 0 to 512, not 513 to 513"),
        (lambda: pipeline.decode_tokens(tokens - 1), "tokens must hold codes from 0 to 511, not -1 to -1"),
        (lambda: pipeline.decode_tokens(tokens[0]), r"tokens must be \(B, h, w\), not \(4, 4\)"),
        (lambda: pipeline.preview(tokens + 513), "tokens must hold codes from 0 to 512"),
        (lambda: pipeline.decode(torch.zeros(1, 3, 4, 4)), r"latents must be a floating tensor \(B, 8, h, w\)"),
        (lambda: pipeline.decode(tokens), "latents must be a floating tensor"),
        (lambda: pipeline.decode("z"), "latents must be a floating tensor"),
        (lambda: pipeline.decode(torch.full((1, 8, 4, 4), math.nan)), "latents has 128 entries that are not finite"),
        (lambda: pipeline.interpolate(picture, picture, 1), "num_images=1 must be a whole number, at least 2"),
        (lambda: pipeline.outpaint(picture, left=2.5), r"left=2\.5 must be a whole number, at least 0"),
        (lambda: pipeline.outpaint(picture, top=10**9), "top=1000000000 must be a whole number"),
        (lambda: pipeline.outpaint(picture, bottom=None), "bottom=None"),
        (lambda: pipeline.inpaint(picture, np.full((32, 32), 2.0)), r"mask holds floats from 2\.0 to 2\.0"),
    ):
        with pytest.raises(ValueError, match=words):
            mistake()


def test_a_dtype_may_be_named_and_a_variant_is_refused_before_anything_is_touched(
    pipeline: SoftConvexPipeline, tmp_path: Path
) -> None:
    assert SoftConvexPipeline.from_pretrained(EMBEDDED, torch_dtype="float16").prior.dtype == torch.float16
    for dtype in ("half", torch.int8, 16):
        with pytest.raises(UserError, match="must be one of float16, bfloat16, float32"):
            SoftConvexPipeline.from_pretrained(EMBEDDED, torch_dtype=dtype)
    with pytest.raises(UserError, match="variant='fp16': a model's folder holds one set of weights"):
        pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("labels", [np.int64(2), torch.tensor(2), [2, 2], np.array([2, 2]), torch.tensor([2, 2]), 2.0])
def test_a_label_of_any_library_is_a_label(labels: Any, conditional: SoftConvexPipeline) -> None:
    assert torch.equal(conditional(2, labels, 1, seed=0).tokens, conditional(2, 2, 1, seed=0).tokens)


@pytest.mark.parametrize("label", [3, -1, 1.5, True, "2", None, math.nan, A_HUGE_ONE])
def test_a_label_that_is_none_is_named(label: Any, conditional: SoftConvexPipeline) -> None:
    with pytest.raises(UserError, match=r"^class_labels=.* must be a whole number, at least 0 and at most 2"):
        conditional(2, [0, label])


def test_each_image_may_have_a_generator_of_its_own(pipeline: SoftConvexPipeline) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    drawn = pipeline(2, num_inference_steps=2, generator=generators())
    for i, generator in enumerate(generators()):
        assert torch.equal(pipeline(1, num_inference_steps=2, generator=generator).tokens[0], drawn.tokens[i])


def test_an_image_is_the_same_as_picture_array_or_tensor() -> None:
    generator = np.random.default_rng(0)
    for shape in ((40, 32, 3), (40, 32), (40, 32, 4)):
        array = generator.integers(0, 256, shape, np.uint8)
        wanted = to_pixels(Image.fromarray(array), 16)
        tensor = torch.from_numpy(array if array.ndim == 2 else array.transpose(2, 0, 1))
        unit = tensor.float() / 255
        forms: list[Any] = [array, tensor, array / 255, array.astype(np.float32) / 255, unit, unit.double()]
        forms += [[each] for each in forms]
        if array.ndim == 3:
            forms += [array[None], tensor[None], unit[None], unit[None].requires_grad_()]
        for form in forms:
            assert torch.equal(to_pixels(form, 16), wanted)
        assert len(to_pixels([array, Image.fromarray(array), unit], 16)) == 3
    for wrong in (np.zeros((4, 4), np.int32), np.zeros((4, 4, 2)), np.zeros(4), np.zeros((0, 4)), torch.zeros(5, 4, 3)):
        with pytest.raises(UserError, match=r"^image is "):
            to_pixels(wrong, 16)
    for value in (255.0, -1.0, math.nan):
        with pytest.raises(UserError, match=r"floats must be in \[0, 1\], and pixels from 0 to 255 must be uint8"):
            to_pixels(np.full((4, 4, 3), value), 16)
    for wrong in ("cat.png", None, 3, Path("cat.png"), [None], {"a": 1}):
        with pytest.raises(UserError, match="must be a picture of Pillow, an array, a tensor"):
            to_pixels(wrong, 16)


def test_a_mask_is_the_same_whatever_its_type() -> None:
    light = np.zeros((32, 32), bool)
    light[8:20, 4:9] = True
    grey = Image.fromarray((light * 255).astype(np.uint8))
    wanted = to_mask(grey, 16)
    assert 0 < wanted.sum() < 256
    forms: list[Any] = [light, light.astype(np.float32), light * 0.5, light.astype(np.uint8), light.astype(np.int64)]
    forms += [light[..., None], light[None], (light * 255).astype(np.int32), np.repeat(light[..., None], 3, -1) * 1.0]
    forms += [torch.from_numpy(light), torch.from_numpy(light)[None, None].float(), torch.from_numpy(light)[None]]
    forms += [Image.fromarray(light), Image.fromarray(light.astype(np.float32)), Image.fromarray(light.astype("uint8"))]
    forms += [Image.fromarray(light.astype(np.int32)), grey.convert("RGB"), [light]]
    for form in forms:
        assert torch.equal(to_mask(form, 16), wanted)
    assert not to_mask(light * 0.49, 16).any(), "darker than middle grey"
    assert to_mask(torch.zeros(3, 32, 32, dtype=torch.bool), 16).shape == (3, 16, 16), "three masks"


@pytest.mark.parametrize("setting", ["top_p=nan", "temperature=inf", "steps=0", "remask=2", "guidance_scale=-1"])
def test_the_command_names_a_setting(setting: str) -> None:
    with pytest.raises(UserError, match=f"^{setting.partition('=')[0]}="):
        parse_settings([setting])


def test_the_command_prints_one_line(tmp_path: Path) -> None:
    result = run_scq("sample", "--num", 1, "--out", tmp_path, "--temperature", "nan")
    assert result.returncode == 2
    assert "temperature=nan must be a finite number, at least 1e-06" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("painted")
    Image.new("RGB", (64, 64), "green").save(folder / "image.png")
    Image.new("RGBA", (64, 64), "red").save(folder / "layer.png")
    return drawing(folder / "image.png", folder / "layer.png")


@pytest.mark.parametrize("control", [name for name in GENERATE if name != "refine"])
def test_generate_answers_a_bad_value_with_words(client: Client, control: str) -> None:
    for value in (None, "many", [3], {}, True):
        _is_refused_in_words(lambda value=value: generate(client, **{"steps": 1, control: value}))


@pytest.mark.parametrize("control", [name for name in EDIT if name != "refine"])
def test_edit_answers_a_bad_value_with_words(client: Client, painted: dict[str, Any], control: str) -> None:
    for value in (None, "many"):
        request = {"steps": 1, "what": OUTPAINT, "left": 8, control: value}
        _is_refused_in_words(lambda request=request: edit(client, painted, **request))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1, 5, 0.5, "1", True, A_HUGE_ONE, [1], {}])
def test_a_control_refuses_what_no_client_of_gradio_sends(value: Any) -> None:
    for control in (Slider(0, 4, 2, step=1, label="Steps"), WholeNumber(0, label="Steps", minimum=0, maximum=4)):
        with pytest.raises(UserError, match=r"Steps=.* must be a whole number, at least 0 and at most 4"):
            control.preprocess(value)
    assert Slider(0, 4, 2, step=0.5, label="Strength").preprocess(0.25) == 0.25


def test_edit_takes_a_request_without_layers(client: Client, painted: dict[str, Any]) -> None:
    for layers in (None, []):
        request = {**painted, "layers": layers}
        _is_refused_in_words(lambda request=request: edit(client, request, steps=1), "Paint over the part")
        assert len(edit(client, request, steps=1, what=VARY)) == 2


def test_a_request_that_is_no_image_is_answered_with_words(client: Client, painted: dict[str, Any]) -> None:
    for image in (3, {"background": 3}, {**painted, "layers": 3}, {**painted, "layers": [3]}, [], "data:"):
        _is_refused_in_words(lambda image=image: edit(client, image, steps=1))
        _is_refused_in_words(lambda image=image: client.predict(image, api_name="/reconstruct"))


def test_other_controls_answer_a_bad_value_with_words(client: Client) -> None:
    generate(client, steps=1)
    for value in (None, "one", 0, 99):
        _is_refused_in_words(lambda value=value: client.predict(value, api_name="/take"))
    for row in (None, -1, 99, "one"):
        _is_refused_in_words(lambda row=row: client.predict(row, 0, api_name="/patch"), "Row of the patch=")


def _is_refused_in_words(request: Callable[[], object], words: str = ".") -> None:
    """The server answers with a message of its own, not with ``null`` and a traceback in its log."""
    with pytest.raises(Exception, match=words) as refused:
        request()
    assert "The upstream Gradio app has raised an exception but has not enabled verbose" not in str(refused.value)
    assert str(refused.value) not in ("", "None")
