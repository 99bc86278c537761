"""Components that take pictures. Sizes are checked before anything is decoded, and decoding is that of the data room. A
file that is not a picture gets a message in words instead of an internal error."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, ImageData
from PIL import ExifTags, Image, ImageOps

from scq.data.image_files import open_image
from scq.data.transforms import to_rgb
from scq.engine.errors import BadImage

LARGEST_BYTES = 20_000_000  # of one file, however it arrives: gradio itself limits uploads, but not data in a request
LARGEST_PIXELS = 40_000_000  # of one picture; a few kilobytes of PNG can hold gigabytes of pixels


def open_bounded(encoded: bytes) -> Image.Image:
    """Open a picture, reading only its header.

    Raises:
        BadImage: it has more than LARGEST_BYTES or LARGEST_PIXELS, or decoding it would take far too much work.
        UnidentifiedImageError and others: it is not a picture that Pillow can read.
    """
    if len(encoded) > LARGEST_BYTES:
        raise BadImage(f"This file has {len(encoded) / 1e6:.0f} MB; at most {LARGEST_BYTES // 10**6} MB are accepted.")
    picture = open_image(encoded)
    if picture.width * picture.height > LARGEST_PIXELS:
        raise BadImage(
            f"This image has {picture.width} x {picture.height} pixels; at most {LARGEST_PIXELS // 10**6} million are "
            "accepted."
        )
    return picture


def read_upload(path: str | None, folder: str) -> bytes:
    """The bytes of a file that was uploaded to ``folder``.

    A client may name any path, and gradio checks it only if the client marks it as a file. So it is checked here.

    Raises:
        BadImage: the path is outside ``folder``.
        OSError: there is no such file.
    """
    file = Path(path or "").resolve()
    if not file.is_relative_to(Path(folder).resolve()):
        raise BadImage("Only uploaded images are read.")
    return file.read_bytes()


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except BadImage as error:
        raise gr.Error(str(error)) from error
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        raise gr.Error("This file is not an image that can be read: it may be damaged, or far too large.") from error


class UploadedImage(gr.Image):
    """gr.Image that gives upright 8-bit RGB, transparency on white."""

    is_template = True  # tells gradio to show it on the page like its parent class

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
    """gr.ImageEditor, likewise. Its layers (RGBA) fit the picture as it is stored, and are rotated with it; what the
    browser sends is already upright. The composite is not decoded, because nothing uses it."""

    is_template = True

    def convert_and_format_image(
        self, file: FileData | bytes | None, flatten_on_white: bool = False
    ) -> Image.Image | None:
        """Open one part of what was edited. Gradio calls this for each; `preprocess` decodes those that are needed."""
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
