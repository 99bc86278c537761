"""The line of requests that wait for the model: everybody has a share of its places, and is served in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import Any

import fastapi
import gradio as gr
from gradio.data_classes import PredictBodyInternal
from gradio.queueing import Event, Queue

from scq.sampling.studio.guards import client_of

PLACES = 256
PLACES_OF_ADDRESS = 128  # or of a user, where users log in; behind a proxy that hides them, many have one address
PLACES_OF_SESSION = 16  # of one open page


class FairQueue(Queue):
    """Gradio's queue, in another order: by turns among addresses, and within an address by turns among sessions.

    One who waits for a hundred drawings delays everybody else by one of them.
    """

    async def push(self, body: PredictBodyInternal, request: fastapi.Request, username: str | None) -> Any:
        waiting = [event for line in self.event_queue_per_concurrency_id.values() for event in line.queue]
        mine = username or client_of(request.scope)
        of_address = [event for event in waiting if _address(event) == mine]
        of_session = [event for event in of_address if event.session_hash == body.session_hash]
        if len(of_session) >= PLACES_OF_SESSION or len(of_address) >= PLACES_OF_ADDRESS:
            told = f"You have {len(of_session)} requests in the line"
            if len(of_session) < PLACES_OF_SESSION:
                told = f"There are {len(of_address)} requests from your address in the line"
            return False, f"{told}, which is all that one may have; wait until some are answered.", "queue_full"
        result = await super().push(body, request, username)
        for line in self.event_queue_per_concurrency_id.values():
            line.queue[:] = in_turn(line.queue, lambda event: event.session_hash, _address)
        return result


def use_fair_queue(page: gr.Blocks) -> None:
    """Let a page's requests wait in a `FairQueue`; none is answered past it."""
    page.queue(api_open=False)
    page._queue = FairQueue(
        live_updates=True, concurrency_count=page.max_threads, update_intervals=1, max_size=PLACES, blocks=page
    )


def in_turn(waiting: Iterable[Event], *groups: Callable[[Event], Hashable]) -> list[Event]:
    """Reorder by turns: the first of every group, then the second of every group, and so on.

    Args:
        groups: what an event belongs to, the innermost group first.
    """
    ordered = list(waiting)
    for group in groups:
        place: defaultdict[Hashable, count[int]] = defaultdict(count)
        ordered.sort(key=lambda event, place=place, group=group: next(place[group(event)]))
    return ordered


def _address(event: Event) -> str:
    return event.username or client_of(event.request.scope)
