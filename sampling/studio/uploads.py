"""Components that take pictures. Sizes are checked before anything is decoded, and decoding is that of the data room. A
file that is not a picture gets a message in words instead of an internal error.

What one request may cost is bounded as a whole: the bytes, pixels and number of all its pictures together. Layers are
decoded one after the other, so that memory is that of one image and one layer.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorData
from gradio.data_classes import FileData, ImageData
from PIL import ExifTags, Image, ImageOps
from starlette.exceptions import HTTPException

from scq.data.image_files import open_image
from scq.data.transforms import to_rgb
from scq.engine.errors import BadImage
from scq.sampling.images import resized_mask

LARGEST_BYTES = 20_000_000  # of one file, however it arrives: gradio itself limits uploads, but not data in a request
LARGEST_PIXELS = 40_000_000  # of one picture; a few kilobytes of PNG can hold gigabytes of pixels
MOST_LAYERS = 16
LARGEST_DRAWING = 2 * LARGEST_PIXELS  # of an image and all its layers together
LARGEST_DRAWING_BYTES = 2 * LARGEST_BYTES
LARGEST_WAITING_BYTES = 10 * LARGEST_BYTES  # of all drawings that browsers have sent and nobody has asked to redraw yet


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
    """Say in words what Pillow says in many ways."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        raise BadImage("This file is not an image that can be read: it may be damaged, or far too large.") from error


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


class Drawing(EditorData):
    """What the editor sends; a client may also say that there are no layers."""

    layers: list[FileData] | None = None


class UploadedDrawing(gr.ImageEditor):
    """gr.ImageEditor that gives ``background``, upright 8-bit RGB, and ``painted`` (H, W) bool, True under any paint.

    Layers fit the picture as it is stored, and are turned with it; what the browser sends is already upright. The
    composite is neither kept nor decoded, because nothing uses it.
    """

    is_template = True
    data_model = Drawing

    @server
    def accept_blobs(self, data: AcceptBlobs) -> None:
        """Keep a part of a drawing until its event comes. Browsers send each part in a request of its own, which does
        not wait in the queue; so gradio's method would keep as many as anybody sends, for ever."""
        if data.data["type"] == "composite":
            return
        index = str(data.data["index"] or 0).replace("null", "0")
        if not index.isdecimal() or int(index) >= MOST_LAYERS:
            raise HTTPException(
                413, f"A drawing has at most {MOST_LAYERS} layers, numbered from 0; {index:.20} is none."
            )
        super().accept_blobs(data)
        while sum(map(_bytes_kept, list(self.blob_storage.values()))) > LARGEST_WAITING_BYTES:
            self.blob_storage.pop(next(iter(self.blob_storage)), None)

    def preprocess(self, payload: Any) -> dict[str, Any] | None:
        if payload is not None and payload.id is not None:
            payload = self.blob_storage.pop(payload.id, None)
        if payload is None or payload.background is None:
            return None
        with _readable():
            background, *layers = self._opened([payload.background, *(payload.layers or [])])
            orientation = background.getexif().get(ExifTags.Base.Orientation, 1)
            background = to_rgb(background)
            painted = np.zeros((background.height, background.width), bool)
            for layer in layers:
                cover = _turned(layer.convert("RGBA").getchannel("A"), orientation)
                layer.close()
                painted |= resized_mask(np.asarray(cover) > 0, painted.shape)
            return {"background": background, "painted": painted}

    def _opened(self, parts: list[FileData | bytes | None]) -> list[Image.Image]:
        """Open an image and its layers, reading only their headers.

        Raises:
            BadImage: they are too many, or too large together.
        """
        if len(parts) - 1 > MOST_LAYERS:
            raise BadImage(f"This drawing has {len(parts) - 1} layers; at most {MOST_LAYERS} are accepted.")
        pictures, size = [], 0
        for part in parts:
            if part is None:
                continue
            encoded = read_upload(part.path, self.GRADIO_CACHE) if isinstance(part, FileData) else part
            size += len(encoded)
            if size > LARGEST_DRAWING_BYTES:
                raise BadImage(f"This drawing has over {LARGEST_DRAWING_BYTES // 10**6} MB; fewer are accepted.")
            pictures.append(open_bounded(encoded))
        pixels = sum(picture.width * picture.height for picture in pictures)
        if pixels > LARGEST_DRAWING:
            raise BadImage(
                f"This image and its {len(pictures) - 1} layers have {pixels / 1e6:.0f} million pixels together; "
                f"at most {LARGEST_DRAWING // 10**6} million are accepted."
            )
        return pictures


def _bytes_kept(drawing: Any) -> int:
    return sum(len(part) for part in (drawing.background, *drawing.layers) if part is not None)


def _turned(layer: Image.Image, orientation: int) -> Image.Image:
    layer.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(layer)
