"""Components that take pictures, and answer a file that is none in words instead of with an internal error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from PIL import Image, UnidentifiedImageError

@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise gr.Error("This file is no image that can be read, or a damaged or far too large one.") from error

class UploadedImage(gr.Image):
    """gr.Image whose unreadable uploads get a message."""

    is_template = True  # gradio's word for: the page shows it as its parent

    def preprocess(self, payload: Any) -> Any:
        with _readable():
            return super().preprocess(payload)
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class UploadedDrawing(gr.ImageEditor):
    """gr.ImageEditor, likewise."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        with _readable():
            return super().preprocess(payload)
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component
