"""What stands between the network and the page: ASGI middlewares, each of which refuses one kind of request.

A refusal is a status and one line of text. Gradio itself serves whoever can reach its port, whatever name they call it
by, and every route that it has.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_REQUEST = 256_000  # bytes of JSON or of a form; pictures are uploaded, not sent within a request
LARGEST_UPLOAD = 24_000_000  # bytes of all the files of one upload; a little more than one file may have
MOST_OPEN = 2048  # requests that are answered at a time, most of them streams that wait for news; half from one address
FREE_LOGINS = 5  # of an address, before it has to wait
LONGEST_WAIT = 600.0  # seconds

# Routes that the page and gradio's clients use. Gradio has more, and every version others: they fetch foreign files
# through this server, start ffmpeg, edit the program, write what a session holds to disk, or wait in a busy loop.
_OPEN = re.compile(
    r"/(gradio_api/(app_id|call/.+|cancel|component_server|file[=/](?!\s*https?:).*|heartbeat/.+|info|login_check|"
    r"openapi\.json|queue/(data|join|status)|reset|(run|api)/.+|startup-events|theme\.css|token|upload(_progress)?|user)|"
    r"config|favicon\.ico|login|logout|manifest\.json|robots\.txt|theme\.css|(assets|static|svelte)/.+)?/?",
    re.IGNORECASE | re.DOTALL,
)
_log = logging.getLogger(__name__)
_UPLOADS = ("/gradio_api/upload", "/gradio_api/component_server")


@dataclass(frozen=True)
class Names:
    """The names that a server answers to.

    Args:
        host: the address it listens at.
        more: further names, such as a proxy's.
    """

    host: str
    more: frozenset[str] = frozenset()

    def include(self, name: str) -> bool:
        """Whether a Host header with this name was meant for this server.

        A page elsewhere whose own name is made to point here (DNS rebinding) has to be called by that name. An
        address cannot be made to point anywhere.
        """
        if name in {"localhost", self.host, *self.more}:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._only_this_machine()

    def _only_this_machine(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def guards(host: str, names: Collection[str] = ()) -> list[Middleware]:
    """All guards of a server, the outermost first.

    Args:
        host: the address that it listens at, without brackets.
        names: further names that it is called by.
    """
    known = Names(host.lower(), frozenset(name.lower() for name in names))
    return [
        Middleware(WholeAnswers),
        Middleware(AnswersForOne),
        Middleware(KnownNames, names=known),
        Middleware(OwnPages, names=known),
        Middleware(OpenRoutes),
        Middleware(OpenRequests),
        Middleware(SlowLogins),
        Middleware(BoundedBodies),
    ]


class Guard:
    """A middleware for requests; everything else passes."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class WholeAnswers(Guard):
    """Answers where gradio fails, as it does on some malformed requests, and logs a line instead of a traceback."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = None  # of the answer, once it has begun

        async def noted(message: Message) -> None:
            nonlocal kind
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            debugging = _log.isEnabledFor(logging.DEBUG)
            asked = f"{scope['method']} {scope['path'][:200]!r}"
            _log.warning("%s failed with %s: %.200s", asked, type(error).__name__, error, exc_info=debugging)
            if kind is None:
                status = 400 if scope["method"] == "POST" else 500
                await PlainTextResponse("This server cannot answer this request.", status)(scope, receive, send)
            elif kind.startswith("text/event-stream"):  # whose events are whole, each by itself
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            # Any other answer breaks off with its connection, so that nobody takes the half for the whole.


class AnswersForOne(Guard):
    """Keeps what one user is answered from others: proxies do not store it, no other page shows it in a frame, and
    browsers do not guess its type.

    Gradio would describe the page to everybody with the address that the first request for `info` names.
    """

    HEADERS = (
        ("Cache-Control", "private"),
        ("Content-Security-Policy", "frame-ancestors 'self'"),
        ("X-Content-Type-Options", "nosniff"),
    )

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.HEADERS:
                    headers.setdefault(name, value)
            await send(message)

        if "app" in scope:
            scope["app"].api_info = None
        await self.app(scope, receive, completed)


class KnownNames(Guard):
    """Refuses a Host header that is none of this server's names."""

    def __init__(self, app: ASGIApp, names: Names):
        super().__init__(app)
        self.names = names

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _name_in(Headers(scope=scope).get("host", ""))
        if self.names.include(name):
            await self.app(scope, receive, send)
        else:
            line = f"This server is not called {name[:100]!r}. Start it with --name NAME if it should be."
            await PlainTextResponse(line, 421)(scope, receive, send)


class OwnPages(Guard):
    """Refuses requests that a page from elsewhere makes in its visitor's browser."""

    def __init__(self, app: ASGIApp, names: Names):
        super().__init__(app)
        self.names = names

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        known = origin is None or self._is_own(origin, (headers.get("host"), headers.get("x-forwarded-host")))
        if known:
            await self.app(scope, receive, send)
        else:
            line = "Only this server's own page may do this. If it has another name, start it with --name NAME."
            await PlainTextResponse(line, 403)(scope, receive, send)

    def _is_own(self, origin: str, hosts: Iterable[str | None]) -> bool:
        place = origin.partition("://")[2].lower()
        return bool(place) and (place in {host.lower() for host in hosts if host} or _name_in(place) in self.names.more)


class OpenRoutes(Guard):
    """Hides the routes that the page does not use."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _OPEN.fullmatch(_path(scope)):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("This server does not offer that.", 404)(scope, receive, send)


class OpenRequests(Guard):
    """Bounds how many requests are open, in all and from one address."""

    def __init__(self, app: ASGIApp, most: int = MOST_OPEN):
        super().__init__(app)
        self.most, self.open = most, Counter[str]()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = client_of(scope)
        if self.open.total() >= self.most or self.open[address] >= self.most // 2:
            line = "This server has as many requests as it can answer at a time; try again later."
            await PlainTextResponse(line, 503, {"Retry-After": "10"})(scope, receive, send)
            return
        self.open[address] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open[address] -= 1
            if not self.open[address]:
                del self.open[address]


class SlowLogins(Guard):
    """Lets an address that fails to log in wait, each time twice as long."""

    def __init__(self, app: ASGIApp, most_addresses: int = 10_000):
        super().__init__(app)
        self.most_addresses = most_addresses
        self.failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address -> attempts, time of the last

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or _path(scope).rstrip("/") != "/login":
            await self.app(scope, receive, send)
            return
        address, now = client_of(scope), time.monotonic()
        attempts, last = self.failed.get(address, (0, now))
        if now - last > 2 * LONGEST_WAIT:
            attempts = 0
        wait = last + min(2.0 ** (attempts - FREE_LOGINS), LONGEST_WAIT) - now if attempts >= FREE_LOGINS else 0
        if wait > 0:
            line = f"Too many failed logins; try again in {wait:.0f} seconds."
            await PlainTextResponse(line, 429, {"Retry-After": f"{wait:.0f}"})(scope, receive, send)
            return
        self.failed[address] = (attempts + 1, now)  # before it is known, so that many at once count as many
        self.failed.move_to_end(address)
        while len(self.failed) > self.most_addresses:
            self.failed.popitem(last=False)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self.failed.pop(address, None)
            await send(message)

        await self.app(scope, receive, noted)


class BoundedBodies(Guard):
    """Refuses a body that is too large, whether or not its length is announced."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = LARGEST_UPLOAD if _path(scope).rstrip("/") in _UPLOADS else LARGEST_REQUEST
        line = f"A request has at most {most / 1e6:g} MB here."
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced) > most:
            await PlainTextResponse(line, 413)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, line)
            return message

        await self.app(scope, counted, send)


def client_of(scope: Scope) -> str:
    """The address that a request comes from; of IPv6 the network, because one client has all addresses of it."""
    host = (scope.get("client") or ("", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((int(address), 64), strict=False))


def _path(scope: Scope) -> str:
    """The path of a request below the server's own, whether or not a proxy took that off."""
    return re.sub("//+", "/", scope["path"].removeprefix(scope.get("root_path", "")))


def _name_in(place: str) -> str:
    """The name in ``name:port``, ``address:port`` or ``[address]:port``."""
    try:
        return urlsplit(f"//{place}").hostname or ""
    except ValueError:
        return ""
