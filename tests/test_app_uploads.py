"""Pictures that users give to the page: of any kind, far too large, turned, painted thinly or in the wrong place."""

import base64
import struct
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio.data_classes import FileData
from gradio_client import Client, handle_file
from PIL import ExifTags, Image
from starlette.exceptions import HTTPException
from studio_client import drawing, edit, generate, pixels, serving

from scq.sampling.app import build_page
from scq.sampling.images import enlarge, to_mask, to_pictures, to_pixels
from scq.sampling.pipeline import SoftConvexPipeline
from scq.sampling.studio import uploads
from scq.sampling.studio.edit import VARY
from scq.sampling.studio.uploads import Drawing, UploadedDrawing

pytestmark = pytest.mark.usefixtures("downloads")


@pytest.fixture(scope="module")
def client(tiny_run: Path) -> Iterator[Client]:
    with serving(build_page(SoftConvexPipeline.from_pretrained(tiny_run / "model"))) as client:
        yield client


def reconstruct(client: Client, path: Path) -> list[str]:
    return client.predict(handle_file(str(path)), api_name="/reconstruct")


def bomb(path: Path, side: int) -> Path:
    """A few kilobytes of PNG that hold side x side black pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows, packer = bytes(side // 8 + 1 + (side % 8 > 0)), zlib.compressobj()
    packed = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    return path


def bitmap(side: int) -> bytes:
    """A BMP of side x side black pixels, three bytes each."""
    head = struct.pack("<IIIIiiHHIIiiII", 54 + 3 * side**2, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + head + bytes(3 * side**2)


def test_uploads_of_any_kind_are_reconstructed(client: Client, tmp_path: Path) -> None:
    for mode, size in (("RGBA", (50, 90)), ("L", (10, 10)), ("P", (200, 40))):
        path = tmp_path / f"{mode}.png"
        Image.linear_gradient("L").resize(size).convert(mode).save(path)
        seen, soft, dominant = map(pixels, reconstruct(client, path)[:3])
        assert len({seen, soft, dominant}) == 3, "the soft quantizer's z_q is not its dominant codes"


def test_transparent_pixels_are_seen_as_white(client: Client, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (10, 200, 10, 0)).save(tmp_path / "clear.png")
    shown = reconstruct(client, tmp_path / "clear.png")
    assert set(pixels(shown[0])) == {255}


def test_sixteen_bit_grey_keeps_its_shades(client: Client, tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    Image.fromarray(((shades.astype(int) + 128) // 257).astype(np.uint8)).save(tmp_path / "shallow.png")
    deep, shallow = (pixels(reconstruct(client, tmp_path / name)[0]) for name in ("deep.png", "shallow.png"))
    assert deep == shallow
    assert len(set(deep)) > 100


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(client: Client, tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.png", 13000)
    assert path.stat().st_size < 100_000
    for refused in (
        lambda: reconstruct(client, path),
        lambda: edit(client, drawing(path), what=VARY),
        lambda: edit(client, drawing(bomb(tmp_path / "small.png", 64), path)),
    ):
        with pytest.raises(Exception, match="13000 x 13000 pixels; at most 40 million"):
            refused()
    assert len(reconstruct(client, bomb(tmp_path / "fine.png", 1000))) == 9


def test_a_file_over_the_limit_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(21 * 2**20))
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        reconstruct(client, tmp_path / "large.png")
    with (tmp_path / "large.png").open("rb") as file:
        answer = httpx.post(f"{client.src}gradio_api/upload", files={"files": ("large.png", file)}, timeout=60)
    assert answer.status_code == 413
    assert "maximum allowed size" in answer.text


def test_a_picture_within_a_request_is_refused_unless_it_is_small(client: Client, tmp_path: Path) -> None:
    """As a data URL it is no upload, and it would wait in memory as long as its request waits in line."""

    def reconstructed(encoded: bytes) -> list[str]:
        address = "data:image/png;base64," + base64.b64encode(encoded).decode()
        file = {"path": None, "url": address, "meta": {"_type": "gradio.FileData"}}
        return client.predict(file, api_name="/reconstruct")

    assert len(reconstructed(bomb(tmp_path / "small.png", 64).read_bytes())) == 9
    with pytest.raises(Exception, match="413"):
        reconstructed(bytes(200_000))
    with pytest.raises(Exception, match="13000 x 13000 pixels; at most 40 million"):
        reconstructed(bomb(tmp_path / "bomb.png", 13000).read_bytes())


def test_the_pictures_of_a_drawing_are_bounded_together(client: Client, tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.png", 6300)
    small = bomb(tmp_path / "small.png", 64)
    (tmp_path / "heavy.bmp").write_bytes(bitmap(2500))
    for given, words in (
        (drawing(path, *[path] * 30), "30 layers; at most 16 are accepted"),
        (drawing(path, *[path] * 3), "159 million pixels together; at most 80 million are accepted"),
        (drawing(small, *[small] * 17), "17 layers; at most 16 are accepted"),
        (drawing(small, *[tmp_path / "heavy.bmp"] * 3), "over 40 MB"),
    ):
        with pytest.raises(Exception, match=words):
            edit(client, given)
    assert len(edit(client, {**drawing(small), "layers": None}, what=VARY)) == 2


def test_decoding_a_drawing_holds_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Image.Image]] = []
    most = 0

    def turned(layer: Image.Image, orientation: int) -> Image.Image:
        nonlocal most
        opened.append(weakref.ref(layer))
        most = max(most, sum(each() is not None for each in opened))
        return layer

    monkeypatch.setattr(uploads, "_turned", turned)
    bomb(tmp_path / "layer.png", 64)
    with gr.Blocks():
        editor = UploadedDrawing()
    monkeypatch.setattr(editor, "GRADIO_CACHE", str(tmp_path))
    files = [FileData(path=str(tmp_path / "layer.png")) for _ in range(9)]
    assert editor.preprocess(Drawing(background=files[0], layers=files[1:]))["painted"].all()
    assert len(opened) == 8
    assert most <= 2


def test_drawings_that_nobody_redraws_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser sends the parts of a drawing past the queue, under a name and a number that it chooses."""
    monkeypatch.setattr(uploads, "LARGEST_WAITING_BYTES", 1000)
    with gr.Blocks():
        editor = UploadedDrawing()

    def send(kind: str, name: str, index: object, size: int = 100) -> None:
        data = {"type": kind, "id": name, "index": index}
        editor.accept_blobs(SimpleNamespace(data=data, files=[("part", bytes(size))]))

    for index in ("16", "1000000000", "-1", "x"):
        with pytest.raises(HTTPException, match="16 layers"):
            send("layer", "a", index)
    send("composite", "a", "null", 10_000)
    for i in range(100):
        send("background", f"{i}", "null")
        send("layer", f"{i}", "15")
    assert list(editor.blob_storage) == ["95", "96", "97", "98", "99"]
    send("background", "large", "null", 1001)
    assert not editor.blob_storage


def test_formats_that_start_programs_or_hide_other_files_are_refused(client: Client, tmp_path: Path) -> None:
    for name in ("picture.eps", "picture.ico"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
        with pytest.raises(Exception, match="not an image that can be read"):
            reconstruct(client, tmp_path / name)


def test_paint_turns_with_a_photograph_that_its_camera_turned(client: Client, tmp_path: Path) -> None:
    """The same photograph, stored upright and stored lying with a note to turn it, is redrawn alike."""
    photograph = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    paint = Image.new("RGBA", (96, 64))
    paint.paste((255, 0, 255, 255), (20, 0, 48, 20))
    photograph.save(tmp_path / "upright.png")
    paint.save(tmp_path / "paint.png")
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=lying)
    paint.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "paint_lying.png")
    upright = edit(client, drawing(tmp_path / "upright.png", tmp_path / "paint.png"))
    assert upright[0] != upright[1]
    assert edit(client, drawing(tmp_path / "lying.png", tmp_path / "paint_lying.png")) == upright


def test_an_image_taken_from_generate_keeps_every_pixel_that_is_not_painted(client: Client, tmp_path: Path) -> None:
    (before,) = generate(client, count=1)
    taken = client.predict(1, api_name="/take")["background"]
    layer = Image.new("RGBA", Image.open(taken).size)
    layer.putpixel((500, 3), (255, 0, 255, 255))  # the thinnest stroke, in the cell at the top right
    layer.save(tmp_path / "layer.png")
    first, second = edit(client, drawing(Path(taken), tmp_path / "layer.png"))
    before, first, second = (np.frombuffer(each, np.uint8).reshape(128, 128, 3) for each in (before, first, second))
    assert (first[:, :96] == before[:, :96]).all()
    assert (first[32:] == before[32:]).all()
    assert (first[:4, 124:] != second[:4, 124:]).any()
    changed = (first != before).any(2)
    changed[:4, 124:] = False
    assert not changed.any(), "one pixel of the model's was painted"


def test_paint_in_the_part_that_is_cut_off_gets_a_message(client: Client, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((200, 100)).convert("RGB").save(tmp_path / "wide.png")
    layer = Image.new("RGBA", (200, 100))
    layer.save(tmp_path / "none.png")
    layer.paste((255, 0, 255, 255), (0, 0, 40, 100))
    layer.save(tmp_path / "outside.png")
    for name, words in (("none.png", "Paint over"), ("outside.png", "central square")):
        with pytest.raises(Exception, match=words):
            edit(client, drawing(tmp_path / "wide.png", tmp_path / name))


def test_enlarged_pictures_come_back_as_they_were() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = [enlarge(picture, 512) for picture in to_pictures(images)]
    assert large[0].size == (512, 512)
    assert torch.equal(to_pixels(large, 32), images)


def test_masks_of_any_size_keep_thin_strokes() -> None:
    for side in (32, 100, 512, 777):
        mask = Image.new("L", (side, side))
        mask.putpixel((side - 1, side // 2), 255)
        small = to_mask(mask, 32)
        assert small.nonzero().tolist() == [[0, 16, 31]], side
    coarse = Image.new("L", (4, 4))
    coarse.putpixel((1, 2), 255)
    grown = to_mask(coarse, 32)
    assert grown[0, 16:24, 8:16].all()
    assert grown.sum() == 64
