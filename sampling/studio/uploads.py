"""Components that take pictures: bounded before they are decoded, and decoded as the data room does it. A file that is
none gets an answer in words instead of an internal error."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, ImageData
from PIL import ExifTags, Image, ImageOps

from scq.data.transforms import to_rgb
from scq.engine.errors import BadImage

LARGEST_BYTES = 20_000_000  # of one file, however it arrives: gradio itself bounds uploads, not pictures in a request
LARGEST_PIXELS = 40_000_000  # of one picture; a few kilobytes of PNG can hold gigabytes of pixels
# Formats whose header says how large the picture is, those that the data room reads. Containers of other files (ICO,
# ICNS) need not tell the truth, and EPS would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000")


def open_bounded(encoded: bytes) -> Image.Image:
    """An opened picture of which only the header was read.

    Raises:
        BadImage: it has more than LARGEST_BYTES or LARGEST_PIXELS.
        UnidentifiedImageError and its kin: it is none.
    """
    if len(encoded) > LARGEST_BYTES:
        raise BadImage(f"This file has {len(encoded) / 1e6:.0f} MB; at most {LARGEST_BYTES // 10**6} are taken.")
    Image.init()
    picture = Image.open(BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])
    if picture.width * picture.height > LARGEST_PIXELS:
        raise BadImage(
            f"This image has {picture.width} x {picture.height} pixels; at most {LARGEST_PIXELS // 10**6} million are "
            "taken."
        )
    return picture


def read_upload(path: str | None, folder: str) -> bytes:
    """What was uploaded to ``folder``. Gradio leaves it to a component to look whether a path that a client names lies
    there, where the client leaves out that it is one.

    Raises:
        BadImage: the path is outside.
        OSError: there is no such file.
    """
    place = Path(path or "").resolve()
    if not place.is_relative_to(Path(folder).resolve()):
        raise BadImage("Only an image that was uploaded is read.")
    return place.read_bytes()


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except BadImage as error:
        raise gr.Error(str(error)) from error
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        raise gr.Error("This file is no image that can be read, or a damaged or far too large one.") from error


class UploadedImage(gr.Image):
    """gr.Image that gives upright 8-bit RGB, transparency on white."""

    is_template = True  # gradio's word for: the page shows it as its parent

    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        if payload is None:
            return None
        with _readable():
            if payload.url and payload.url.startswith("data:"):
                encoded = base64.b64decode(payload.url.partition(",")[2])
            else:
                encoded = read_upload(payload.path, self.GRADIO_CACHE)
            return to_rgb(open_bounded(encoded))


class UploadedDrawing(gr.ImageEditor):
    """gr.ImageEditor, likewise. Its layers (RGBA) lie on the picture as it is stored and are turned with it; what the
    browser sends is upright already. There is no composite: nobody asks for it, so it is not decoded."""

    is_template = True

    def convert_and_format_image(
        self, file: FileData | bytes | None, flatten_on_white: bool = False
    ) -> Image.Image | None:
        """Gradio calls this for each part; `preprocess` decodes those that are wanted."""
        if file is None:
            return None
        return open_bounded(read_upload(file.path, self.GRADIO_CACHE) if isinstance(file, FileData) else file)

    def preprocess(self, payload: Any) -> dict[str, Any] | None:
        with _readable():
            edited = super().preprocess(payload)
            if edited is None or edited["background"] is None:
                return edited
            background = edited["background"]
            orientation = background.getexif().get(ExifTags.Base.Orientation, 1)
            layers = [_turned(layer.convert("RGBA"), orientation) for layer in edited["layers"]]
            return {"background": to_rgb(background), "layers": layers, "composite": None}


def _turned(layer: Image.Image, orientation: int) -> Image.Image:
    layer.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(layer)
