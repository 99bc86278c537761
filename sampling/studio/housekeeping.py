"""What a server does beside answering: deletes old files, gives memory back, and stops when it is asked to."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from scq.engine.memory import give_back_freed_memory
from scq.sampling.studio.folder import private_folder, sweep

EVERY_SECONDS = 15.0
_OPEN_FILES = 16_384  # a connection is an open file, and many shells allow 1024

_log = logging.getLogger(__name__)


def housekeeping(page: gr.Blocks) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """The lifespan of a page's server: old files are deleted meanwhile. Those that the page itself shows stay."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        shown = {Path(file) for component in page.blocks.values() for file in component.keep_in_cache}
        task = asyncio.create_task(_keep_house(private_folder(), shown))
        try:
            yield
        finally:
            task.cancel()

    return lifespan


async def _keep_house(folder: Path, shown: set[Path]) -> None:
    while True:
        try:
            await asyncio.to_thread(sweep, folder, shown)
            await asyncio.to_thread(give_back_freed_memory)
        except Exception:  # whatever it is, the next round comes, and somebody can read why this one failed
            _log.exception("old files in %s were not deleted; trying again in %.0f seconds", folder, EVERY_SECONDS)
        await asyncio.sleep(EVERY_SECONDS)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and requests to end (SIGTERM, SIGHUP) set in the block, instead of ending the process."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stopped
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, lambda *_: stopped.set()) for each in signals}
    try:
        yield stopped
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def allow_open_files() -> None:
    """Let this process have as many open files as a server with many users needs, if its user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
