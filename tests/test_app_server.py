"""The page's server among others: pages from elsewhere, guessers, hoarders, and what a killed server left behind."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from scq.engine.errors import UserError
from scq.sampling.app import serve
from scq.sampling.studio import housekeeping
from scq.sampling.studio.folder import private_folder, sweep
from scq.sampling.studio.guards import FREE_LOGINS, BoundedBodies, Names, OpenRequests, SlowLogins, client_of
from scq.sampling.studio.line import PLACES_OF_ADDRESS, PLACES_OF_SESSION, in_turn
from scq.sampling.studio.page import Page

pytestmark = pytest.mark.usefixtures("downloads")

gate = threading.Event()
served: list[str] = []


def small_page() -> Page:
    """A page without a model: ``said`` answers at once, ``waited`` when the gate is open."""
    private_folder()

    def waited(text: str) -> str:
        gate.wait(300)
        served.append(text)
        return text

    with Page() as page:
        text, image = gr.Textbox(), gr.Image(type="filepath")
        gr.Button().click(lambda text, count: text * count, [text, gr.Slider(1, 9, 1)], text, api_name="said")
        gr.Button().click(waited, text, text, api_name="waited", concurrency_id="model", concurrency_limit=1)
        gr.Button().click(lambda path: str(path), image, text, api_name="seen")
    return page


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    page = small_page()
    yield serve(page, "127.0.0.1", None, block=False)
    page.close()


def answer_to(address: str, name: str, *values: Any, **headers: str) -> str:
    """The stream of events that answers a call through the queue."""
    call = httpx.post(f"{address}gradio_api/call/{name}", json={"data": values}, headers=headers)
    if not call.is_success:
        return call.text
    return httpx.get(f"{address}gradio_api/call/{name}/{call.json()['event_id']}", timeout=60).text


def test_a_server_answers_to_its_own_names_only(address: str) -> None:
    port = httpx.URL(address).port
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "10.1.2.3", ""):
        refused = httpx.get(f"{address}config", headers={"Host": name})
        assert refused.status_code >= 400, name
        assert "components" not in refused.text
    for name in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", "LOCALHOST"):
        assert httpx.get(f"{address}config", headers={"Host": name}).is_success, name


def test_names_follow_from_where_a_server_listens() -> None:
    opened, closed = Names("0.0.0.0", frozenset({"box.lan"})), Names("127.0.0.1")
    assert opened.include("192.0.2.7")
    assert opened.include("2001:db8::1")
    assert opened.include("box.lan")
    assert not opened.include("evil.example")
    assert not closed.include("192.0.2.7")
    assert not closed.include("box.lan")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://127.0.0.1", "http://127.0.0.1:1", "null", "http://[::1"]
)
def test_a_page_from_elsewhere_can_do_nothing(address: str, origin: str) -> None:
    own, foreign = {"Origin": address.rstrip("/")}, {"Origin": origin}
    for headers, allowed in ((own, True), (foreign, False)):
        upload = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.txt", b"a")}, headers=headers)
        call = httpx.post(f"{address}gradio_api/call/said", json={"data": ["a", 1]}, headers=headers)
        read = httpx.get(f"{address}config", headers=headers)
        assert [each.is_success for each in (upload, call, read)] == [allowed] * 3
        assert allowed or upload.status_code == 403


def test_nothing_is_answered_past_the_queue(address: str) -> None:
    assert Client(address, verbose=False).predict("a", 3, api_name="/said") == "aaa"
    for way in ("run", "api"):
        refused = httpx.post(f"{address}gradio_api/{way}/said", json={"data": ["a", 3]})
        assert refused.status_code == 404
        assert "queue" in refused.text


def test_what_the_page_does_not_use_is_closed(address: str) -> None:
    closed = (
        "gradio_api/file=http://192.0.2.7/a", "gradio_api/file/https://192.0.2.7/a", "gradio_api/proxy=https://a.hf.space",
        "gradio_api/dev/reload", "gradio_api/deep_link?session_hash=a", "gradio_api/runs", "monitoring", "//monitoring",
        "gradio_api/process_recording", "gradio_api/vibe-code", "gradio_api/custom_component/1/client/component/a%0Ab",
        "openapi.json", "gradio_api/of-the-next-version", "gradio_api/file=%0Ahttps://192.0.2.7/a",
    )  # fmt: skip
    for path in closed:
        for method in ("GET", "POST"):
            refused = httpx.request(method, f"{address}{path}", timeout=10)
            assert (refused.status_code, refused.text) == (404, "This server does not offer that."), path


def test_no_user_decides_what_another_is_answered(address: str) -> None:
    """Gradio remembers its description of the page, with the address that the first one to ask has named."""
    for forged in ({"X-Forwarded-Host": "evil.example"}, {"Host": "127.0.0.1:1"}):
        for path in ("info", "openapi.json"):
            httpx.get(f"{address}gradio_api/{path}", headers=forged)
            httpx.post(f"{address}gradio_api/call/v2/said", json={}, headers=forged)
            answer = httpx.get(f"{address}gradio_api/info").text
            assert address.rstrip("/") in answer
            assert "evil.example" not in answer
            assert "127.0.0.1:1/" not in answer


def test_answers_are_for_their_user_and_for_this_page(address: str) -> None:
    (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"<script>")}).json()
    for answer in (httpx.get(f"{address}gradio_api/file={path}"), httpx.get(address), httpx.get(f"{address}runs")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'self'"
        assert answer.headers["Cache-Control"] == "private"


def test_a_request_is_bounded_before_it_is_read(address: str) -> None:
    large = [{"data": ["a" * 300_000, 1]}, {"data": [[]] * 100_000}]
    for body in (json.dumps(each).encode() for each in large):
        for sent in (body, iter([body])):  # with its length announced, and without
            refused = httpx.post(
                f"{address}gradio_api/call/said", content=sent, headers={"Content-Type": "application/json"}
            )
            assert refused.status_code == 413
            assert "at most 0.256 MB" in refused.text
    for body in (b"[" * 200_000, b'{"data":' + b"[" * 90_000 + b"]" * 90_000 + b"}"):
        deep = httpx.post(f"{address}gradio_api/call/said", content=body, headers={"Content-Type": "application/json"})
        assert 400 <= deep.status_code < 500
    files = [("files", (f"{i}.bin", bytes(3_000_000))) for i in range(9)]
    refused = httpx.post(f"{address}gradio_api/upload", files=files, timeout=60)
    assert refused.status_code == 413
    assert "at most 24 MB" in refused.text
    assert "complete" in answer_to(address, "said", "a", 2)


def test_a_length_that_is_not_announced_is_counted() -> None:
    async def read(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def endless() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(100_000), "more_body": True}

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": []}
    with pytest.raises(HTTPException, match=r"0\.256 MB"):
        asyncio.run(BoundedBodies(read)(scope, endless, endless))


@pytest.mark.parametrize(
    "values", [["a", None], ["a"], ["a", "x"], ["a", {"path": 5, "meta": {"_type": "gradio.FileData"}}], [], [[[]], []]]
)
def test_a_malformed_request_gets_words(address: str, values: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    answer = answer_to(address, "said", *values)
    assert "null}" not in answer
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_gradio_fails_on_is_answered_whole(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    join = {"session_hash": "s", "data": []}
    for path, body in (("queue/join", {**join, "fn_index": 999}), ("call/v2/none", {}), ("call/v2/said", {"no": 1})):
        refused = httpx.post(f"{address}gradio_api/{path}", json=body)
        assert (refused.status_code, refused.text) == (400, "This server cannot answer this request.")
    field = httpx.post(f"{address}gradio_api/upload", files={"files": (None, b"no file")})
    assert field.status_code == 400
    for path in ("queue/data?session_hash=none", "call/said/none"):
        assert "Not Found" in httpx.get(f"{address}gradio_api/{path}").text, "the stream ends, rather than breaks"
    assert "no choice" not in answer_to(address, "said", "a", 10), "a mistake of a user"
    assert "Traceback" not in capfd.readouterr().err


def test_no_address_is_fetched(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.5)
        place = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/a.png"
        file = {"path": place, "url": place, "meta": {"_type": "gradio.FileData"}}
        assert "Only uploaded images are read" in answer_to(address, "seen", file)
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_a_session_has_a_share_of_the_line_and_all_are_served_in_turn(address: str) -> None:
    def join(session: str, text: str) -> int:
        body = {"data": [text], "fn_index": 1, "session_hash": session}
        return httpx.post(f"{address}gradio_api/queue/join", json=body).status_code

    served.clear()
    gate.clear()
    try:
        assert join("first", "running") == 200
        deadline = time.monotonic() + 30
        while httpx.get(f"{address}gradio_api/queue/status").json()["queue_size"]:
            assert time.monotonic() < deadline
        answers = Counter(join("hoarder", f"hoarder {i}") for i in range(40))
        assert answers == {200: PLACES_OF_SESSION, 503: 40 - PLACES_OF_SESSION}
        assert join("other", "other 0") == 200
        assert join("third", "third 0") == 200
    finally:
        gate.set()
    deadline = time.monotonic() + 60
    while len(served) < PLACES_OF_SESSION + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert served[:5] == ["running", "hoarder 0", "other 0", "third 0", "hoarder 1"]


def test_many_sessions_of_one_address_hold_half_of_the_line(address: str) -> None:
    gate.clear()
    try:
        with ThreadPoolExecutor(8) as pool:
            calls = pool.map(
                lambda i: httpx.post(f"{address}gradio_api/call/waited", json={"data": [str(i)]}, timeout=60),
                range(150),
            )
            answers = Counter(call.status_code for call in calls)
    finally:
        gate.set()
    assert 0 <= answers[200] - PLACES_OF_ADDRESS <= 1, "one of them may have left the line already"
    assert answers[503] == 150 - answers[200]


def test_turns_go_round_addresses_first_and_then_their_sessions() -> None:
    waiting = [SimpleNamespace(place=f"{a}{s}{i}", address=a, session=a + s) for a in "AB" for s in "xy" for i in "012"]
    waiting = [each for each in waiting if each.place[:2] != "By"] + [
        SimpleNamespace(place="C", address="C", session="")
    ]
    turns = in_turn(waiting, lambda each: each.session, lambda each: each.address)
    assert [each.place for each in turns] == ["Ax0", "Bx0", "C", "Ay0", "Bx1", "Ax1", "Bx2", "Ay1", "Ax2", "Ay2"]
    assert in_turn(turns, lambda each: each.session, lambda each: each.address) == turns, "the order is stable"


def test_one_address_opens_half_of_all_requests() -> None:
    async def run() -> Counter[int]:
        statuses, end = Counter[int](), asyncio.Event()

        async def stream(scope: Any, receive: Any, send: Any) -> None:
            await end.wait()
            await PlainTextResponse("")(scope, receive, send)

        async def send(message: dict[str, Any]) -> None:
            statuses[message.get("status", 0)] += 1

        guard = OpenRequests(stream, most=20)
        calls = [
            asyncio.create_task(guard({"type": "http", "client": (client, 1), "headers": []}, send, send))
            for client in ["192.0.2.1"] * 15 + ["192.0.2.2"] * 15
        ]
        await asyncio.sleep(0.1)
        end.set()
        await asyncio.gather(*calls)
        assert not guard.open
        return statuses

    statuses = asyncio.run(run())
    assert (statuses[200], statuses[503]) == (20, 10)


def test_failed_logins_get_slower_and_slower() -> None:
    page = small_page()
    address = serve(page, "127.0.0.1", None, block=False, auth=("ada", "secret"))
    try:

        def login(password: str) -> int:
            return httpx.post(f"{address}login", data={"username": "ada", "password": password}).status_code

        for _ in range(3):
            assert login("wrong") == 400
        assert login("secret") == 200, "it forgets"
        with ThreadPoolExecutor(10) as pool:
            answers = Counter(pool.map(login, [f"guess {i}" for i in range(40)]))
        assert answers[400] <= FREE_LOGINS + 2
        assert answers[429] == 40 - answers[400]
        assert httpx.get(f"{address}config").status_code == 401
    finally:
        page.close()


def test_the_wait_doubles_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("scq.sampling.studio.guards.time.monotonic", lambda: now)
    guard = SlowLogins(PlainTextResponse("", 400))
    statuses: list[int] = []

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    def attempt(client: str = "192.0.2.1") -> int:
        statuses.clear()
        scope = {"type": "http", "method": "POST", "path": "/login/", "client": (client, 1), "headers": []}
        asyncio.run(guard(scope, send, send))
        return statuses[0]

    waits = []
    for _ in range(18):
        start = now
        while attempt() == 429:
            now += 1
        waits.append(now - start)
    assert waits[: FREE_LOGINS + 4] == [0] * FREE_LOGINS + [1, 2, 4, 8]
    assert waits[-1] == 600
    assert attempt() == 429
    assert attempt("192.0.2.2") == 400, "another address does not wait"


def test_a_network_of_ipv6_is_one_client() -> None:
    assert client_of({"client": ("2001:db8::1", 1)}) == client_of({"client": ("2001:db8::ffff:2", 1)})
    assert client_of({"client": ("2001:db8::1", 1)}) != client_of({"client": ("2001:db8:0:1::1", 1)})
    assert client_of({"client": ("192.0.2.1", 1)}) != client_of({"client": ("192.0.2.2", 1)})


@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_ipv6_addresses_are_served(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    page = small_page()
    address = serve(page, host, None, block=False)
    try:
        assert Client(address.replace("[::]", "[::1]"), verbose=False).predict("a", 2, api_name="/said") == "aa"
    finally:
        page.close()


@pytest.mark.parametrize("root_path", ["/scq", "https://demo.example.org/scq"])
def test_a_proxy_may_have_the_page_below_a_path(root_path: str) -> None:
    page = small_page()
    address = serve(page, "127.0.0.1", None, block=False, root_path=root_path)
    try:
        root = httpx.get(f"{address}config").json()["root"]
        assert root == (root_path if ":" in root_path else f"{address.rstrip('/')}{root_path}")
        assert "complete" in answer_to(address, "said", "a", 2)
        if ":" in root_path:
            own = {"Host": "demo.example.org", "Origin": "https://demo.example.org"}
            assert "complete" in answer_to(address, "said", "a", 2, **own)
        else:
            assert httpx.get(f"{address}scq/config").is_success, "a proxy may leave the path as it is"
            assert httpx.get(f"{address}scq/monitoring").status_code == 404
    finally:
        page.close()


def test_the_folder_is_private_and_uploads_go_there(address: str) -> None:
    folder = private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.txt", b"a")}).json()
    assert Path(path).is_relative_to(folder)


@pytest.mark.parametrize("route", ["upload", "component_server"])
def test_an_upload_that_breaks_off_leaves_nothing_elsewhere(address: str, route: str, downloads: Path) -> None:
    def files() -> set[Path]:
        return {path for path in downloads.rglob("*") if path.is_file() and not path.is_relative_to(private_folder())}

    before, left = files(), len(list(private_folder().iterdir()))
    with socket.create_connection(("127.0.0.1", httpx.URL(address).port)) as connection:
        connection.sendall(
            f"POST /gradio_api/{route} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3000000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            'Content-Disposition: form-data; name="files"; filename="a"\r\n\r\n'.encode()
            + bytes(2_000_000)
        )
        deadline = time.monotonic() + 30
        while len(list(private_folder().iterdir())) == left and files() == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert files() == before, "only what is in the private folder is deleted after an hour"


SERVER = """
import sys
from pathlib import Path
import gradio as gr
from scq.sampling.app import serve
from scq.sampling.studio.folder import private_folder
folder = private_folder()
(folder / "upload").mkdir()
(folder / "upload" / "picture.png").write_bytes(b"a picture")
with gr.Blocks() as page:
    gr.Markdown("a page")
print(folder, flush=True)
for left in folder.parent.iterdir():
    assert left.name.startswith("scq-page-") or left.name == "precious", left
serve(page, "127.0.0.1", None)
print("ended", flush=True)
"""


def started(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A server in a process of its own, and its folder in ``parent``."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "GRADIO_TEMP_DIR": str(parent)},
    )
    folder = Path(process.stdout.readline().strip())
    assert "Running" in process.stdout.readline()
    return process, folder


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_that_is_asked_to_end_leaves_nothing(how: signal.Signals, tmp_path: Path) -> None:
    process, folder = started(tmp_path)
    assert folder.parent == tmp_path
    process.send_signal(how)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "ended" in out
    assert not list(tmp_path.iterdir())


def test_what_a_killed_server_left_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        (killed, left), (running, in_use) = pool.map(started, [tmp_path] * 2)
    killed.kill()
    killed.communicate(timeout=300)
    (tmp_path / "scq-page-linked").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").mkdir()
    assert (left / "upload" / "picture.png").exists()
    third, _ = started(tmp_path)
    assert not left.exists()
    assert (in_use / "upload" / "picture.png").exists(), "its server still runs"
    assert (tmp_path / "precious").is_dir()
    for process in (running, third):
        process.terminate()
        process.communicate(timeout=300)


def test_an_equal_picture_is_not_written_again_while_a_browser_may_be_sent_it(tmp_path: Path) -> None:
    private_folder()  # from then on, gradio's components write pictures in this way
    gallery = gr.Gallery(format="png")
    gallery.GRADIO_CACHE = str(tmp_path)
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "red", "blue")]
    first = [Path(each.image.path) for each in gallery.postprocess(pictures).root]
    assert first[0] == first[1] != first[2]
    with Image.open(first[0]) as red:
        assert red.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    first[0].write_bytes(b"still the first file")
    os.utime(first[0], (0, 0))
    assert [Path(each.image.path) for each in gallery.postprocess(pictures).root] == first
    assert first[0].read_bytes() == b"still the first file"
    assert time.time() - first[0].stat().st_mtime < 60, "it is as young as its last use"


def test_a_sweep_takes_the_old_and_then_the_oldest(tmp_path: Path) -> None:
    now = time.time()
    for age in (4000, 300, 200, 100):
        (tmp_path / f"{age}").mkdir()
        (tmp_path / f"{age}" / "file").write_bytes(bytes(10_000))
        os.utime(tmp_path / f"{age}" / "file", (now - age, now - age))
    (tmp_path / "link").symlink_to("nowhere")
    shown = tmp_path / "shown.png"
    shown.write_bytes(bytes(10_000))
    os.utime(shown, (0, 0))

    def left() -> set[str]:
        return {path.parent.name for path in tmp_path.rglob("file")}

    assert sweep(tmp_path, {shown}, seconds=3600) == 1
    assert left() == {"300", "200", "100"}
    assert sweep(tmp_path, {shown}, largest=25_000) == 1
    assert left() == {"200", "100"}
    assert sweep(tmp_path, {shown}, seconds=0) == 3
    assert not left()
    assert shown.exists()
    for folder in tmp_path.iterdir():
        if folder.is_dir():
            os.utime(folder, (now - 100, now - 100))
    sweep(tmp_path, {shown})
    assert list(tmp_path.iterdir()) == [shown], "empty folders go, too"


def test_a_sweep_that_fails_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = []

    def failing(*_: Any) -> None:
        rounds.append(1)
        if len(rounds) == 1:
            raise RuntimeError("Set changed size during iteration")

    monkeypatch.setattr(housekeeping, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(housekeeping, "sweep", failing)
    page = small_page()
    serve(page, "127.0.0.1", None, block=False)
    deadline = time.monotonic() + 30
    while len(rounds) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    page.close()
    assert "were not deleted; trying again" in caplog.text


@pytest.mark.parametrize("host", ["224.0.0.1", "255.255.255.255"])
def test_an_address_of_many_machines_is_refused(host: str) -> None:
    page = small_page()
    with pytest.raises(UserError, match="an address of many machines"):
        serve(page, host, None, block=False)
