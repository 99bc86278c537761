"""The Gradio page, ``scq app``: draw images, edit them, look inside the tokenizer, read what was measured."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr

from scq.engine.errors import UserError
from scq.sampling.pipeline import SoftConvexPipeline
from scq.sampling.studio.edit import edit_tab
from scq.sampling.studio.folder import private_folder
from scq.sampling.studio.generate import generate_tab
from scq.sampling.studio.guards import guards
from scq.sampling.studio.housekeeping import allow_open_files, housekeeping, stop_requests
from scq.sampling.studio.inspect import inspect_tab
from scq.sampling.studio.line import use_fair_queue
from scq.sampling.studio.page import Page
from scq.sampling.studio.results import REPORT_CLASS, results_tab
from scq.sampling.studio.steps import GALLERY_CLASS, fingerprints
from scq.sampling.studio.uploads import LARGEST_BYTES

# Gradio keeps a gallery at one height, whatever is in it, and breaks a table's words where its columns are narrow. Its
# columns of 100 pixels or more reach out of a narrow screen, where what is cut off cannot be scrolled to.
STYLE = f"""
.{GALLERY_CLASS} .grid-wrap.fixed-height {{ min-height: 0; max-height: none; }}
.{REPORT_CLASS} table * {{ word-break: normal; overflow-wrap: normal; }}
@media (max-width: 640px) {{
    .{GALLERY_CLASS} .grid-container {{ grid-template-columns: repeat(auto-fit, minmax(90px, 1fr)); }}
    .{REPORT_CLASS} table {{ display: block; overflow-x: auto; border: 0; padding: 0; }}
}}
"""
MOST_SESSIONS = 500  # whose images the server remembers


def build_page(pipeline: SoftConvexPipeline, max_batch: int = 64, results: Sequence[Path] = ()) -> gr.Blocks:
    """Build the page for a pipeline. What its users send and get is kept in `private_folder`.

    Args:
        max_batch: the most images that one request may draw.
        results: folders to show reports from: their own, and those of their sub-folders.
    """
    private_folder()
    prior, model = pipeline.prior.config, fingerprints(pipeline)
    with Page(title="scq", analytics_enabled=False) as page:
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


def serve(
    page: gr.Blocks,
    host: str,
    port: int | None,
    block: bool = True,
    auth: tuple[str, str] | None = None,
    root_path: str = "",
    names: Sequence[str] = (),
) -> str:
    """Serve the page and return its address: at once or, with ``block``, only when interrupted or asked to end.

    Args:
        host: address or name to listen at, IPv4 or IPv6.
        port: None for any free one.
        auth: user name and password that the page asks for; None lets everybody in.
        root_path: where a proxy in front has the page: a path, "/scq", or a whole address, "https://example.org/scq".
        names: further names that users call this server by; requests that name any other are refused.

    Raises:
        UserError: the address is not one of this machine's, or the port is taken.
    """
    bare = host.removeprefix("[").removesuffix("]")
    _refuse_address(host, bare, port)
    allow_open_files()
    use_fair_queue(page)
    outside = urlsplit(root_path).hostname
    launch = partial(
        page.launch, server_name=f"[{bare}]" if ":" in bare else bare, server_port=port, prevent_thread_lock=True,
        quiet=not block, auth=auth, max_file_size=LARGEST_BYTES, state_session_capacity=MOST_SESSIONS,
        root_path=root_path.rstrip("/"), share=False, ssr_mode=False, mcp_server=False,
        app_kwargs={
            "middleware": guards(bare, [*names, *([outside] if outside else [])]), "lifespan": housekeeping(page)
        },
        css=STYLE,
        footer_links=["api", "gradio", "settings"],  # not the record of past runs, which `OpenRoutes` hides
        _frontend=False,  # otherwise gradio first requests the page, and gives up after 3 seconds on a busy machine
    )  # fmt: skip
    try:
        if not block:
            return launch()[1]
        with stop_requests() as stopped:
            address = launch()[1]
            while page.server.thread.is_alive() and not stopped.wait(0.5):
                pass
            page.close()
            return address
    except OSError as error:
        raise UserError(f"port {port} of {host} is not free; choose another with --port") from error


def _refuse_address(host: str, bare: str, port: int | None) -> None:
    """Ask the system what is wrong with an address; gradio says of any failure that the port was not free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bare, port or 0, type=socket.SOCK_STREAM)[0]
        known = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if known.is_multicast or str(known) == "255.255.255.255":  # can be listened to, but nobody is answered
            raise UserError(f"--host {host} is an address of many machines; 0.0.0.0 is all of this one's own")
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {host} is neither an address nor a known host name") from error
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise UserError(
                f"--host {host} is not an address of this machine; 0.0.0.0 is all of its own, and :: those of IPv6, too"
            ) from error
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is not free; choose another with --port") from error
        raise UserError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
