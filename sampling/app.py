"""The Gradio page, ``scq app``: draw images, edit them, look inside the tokenizer, read what was measured."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from scq.engine.errors import UserError
from scq.sampling.pipeline import SoftConvexPipeline
from scq.sampling.studio.edit import edit_tab
from scq.sampling.studio.generate import generate_tab
from scq.sampling.studio.inspect import inspect_tab
from scq.sampling.studio.results import results_tab
from scq.sampling.studio.steps import fingerprints
from scq.sampling.studio.uploads import LARGEST_BYTES

KEPT_SECONDS = 3600  # how long a drawn picture stays on the server


def build_page(pipeline: SoftConvexPipeline, max_batch: int = 64, results: Sequence[Path] = ()) -> gr.Blocks:
    """Build the page for a pipeline.

    Args:
        max_batch: the most images that one request may draw.
        results: folders to show reports from: their own, and those of their sub-folders.
    """
    prior, model = pipeline.prior.config, fingerprints(pipeline)
    with gr.Blocks(title="scq", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            f"# scq\nImages from {prior.grid[0]}x{prior.grid[1]} dominant codes out of {prior.codebook_size}, "
            f"{pipeline.image_size} pixels."
        )
        with gr.Tab("Generate"):
            drawn = generate_tab(pipeline, max_batch, model)
        with gr.Tab("Edit"):
            edit_tab(pipeline, drawn, max_batch, model)
        with gr.Tab("Inspect"):
            inspect_tab(pipeline)
        with gr.Tab("Benchmark"):
            results_tab(results)
    return page


def serve(page: gr.Blocks, host: str, port: int | None, block: bool = True, auth: tuple[str, str] | None = None) -> str:
    """Serve the page and return its address: at once or, with ``block``, only when interrupted.

    Args:
        port: None for any free one.
        auth: user name and password that the page asks for; None lets everybody in.

    Raises:
        UserError: the address is not one of this machine's, or the port is taken.
    """
    _refuse_address(host, port)
    try:
        _, address, _ = page.queue(max_size=256).launch(
            server_name=host, server_port=port, prevent_thread_lock=not block, quiet=not block, auth=auth,
            max_file_size=LARGEST_BYTES,
            _frontend=False,  # otherwise gradio first requests the page, and gives up after 3 seconds on a busy machine
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} of {host} is not free; choose another with --port") from error
    return address


def _refuse_address(host: str, port: int | None) -> None:
    """Ask the system what is wrong with an address; gradio says of any failure that the port was not free."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bare, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {host} is neither an address nor a known host name") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host} is not an address of this machine; 0.0.0.0 is all of its own") from error
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is not free; choose another with --port") from error
        raise UserError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
