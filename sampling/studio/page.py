"""The page as gradio's Blocks, with answers in words to users' mistakes and to requests that no browser sends."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio_client import utils

from scq.engine.errors import UserError


class Page(gr.Blocks):
    """gr.Blocks that answers a malformed request with a message, where gradio answers ``null`` and logs a traceback.

    It reads uploads only: gradio would first fetch a file that is given as an address, of any size. A `UserError` from
    anywhere behind the page is shown there; it is no event for the server's log.
    """

    async def process_api(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*arguments, **keywords)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *arguments: Any, **keywords: Any) -> list[Any]:
        try:
            utils.traverse(inputs, _refuse, _is_foreign)
            return await super().preprocess_data(block_fn, inputs, *arguments, **keywords)
        except Exception as error:
            # Gradio wraps what a component of ours raises.
            mistake = error if isinstance(error, UserError) else error.__cause__
            if isinstance(mistake, UserError):
                raise mistake from None
            raise UserError(
                "This request does not fit the page: a value is missing, of another kind, or a file that was not "
                "uploaded."
            ) from error


def _is_foreign(value: Any) -> bool:
    return isinstance(value, dict) and utils.is_http_url_like(value.get("path"))


def _refuse(value: dict[str, Any]) -> None:
    raise UserError("Only uploaded images are read, not addresses.")
