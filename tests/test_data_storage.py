"""Sets behind a URL: range requests, local cache, retries, and errors that name the file."""

import contextlib
import gc
import http.server
import itertools
import multiprocessing
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from data_samples import write_folder
from fsspec.implementations.local import LocalFileSystem
from helpers import within

from scq.data.check import check
from scq.data.pack import pack
from scq.data.shards import ShardSet
from scq.data.storage import CachedStorage, LocalStorage, RemoteStorage, with_retries
from scq.data.stream import ImageStream, iterate_once
from scq.engine.errors import DataError
from scq.engine.references import Referenced

NUM_IMAGES = 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("storage")
    folder = write_folder(root / "photos", NUM_IMAGES)
    pack(folder, root / "out", format="folder", size=16, images_per_shard=10, workers=0)
    return root / "out"


@pytest.fixture(autouse=True)
def quick_and_private(tmp_path, monkeypatch):
    monkeypatch.setattr("scq.data.storage.PAUSES", (0.01, 0.02))
    monkeypatch.setenv("SCQ_CACHE", str(tmp_path / "user_cache"))


class Handler(http.server.BaseHTTPRequestHandler):
    """A file server with range requests that logs what it is asked and can fail on demand."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        path = server.root / Path(self.path).name
        server.log.append((self.command, path.name, self.headers.get("Range")))
        if path.suffix == ".tar" and server.failures > 0:
            server.failures -= 1
            return self.answer(503, b"busy")
        if not path.is_file():
            return self.answer(404, b"")
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and server.ranges:
            first, last = map(int, wanted.groups())
            part = data[first : last + 1]
            return self.answer(206, part, {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        return self.answer(200, data)

    def answer(self, status, data, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def server(shards):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.log, server.failures, server.ranges = shards, [], 0, True
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    yield server
    server.shutdown()
    server.server_close()


def read(location, batches=6, **settings):
    stream = ImageStream(location, batch_size=10, seed=3, flip=True, **settings)
    return [torch.cat(column) for column in zip(*itertools.islice(stream.iterate(), batches), strict=True)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def asked(server):
    return [(name, wanted) for command, name, wanted in server.log if command == "GET" and name.endswith(".tar")]


def test_http_reads_single_images_by_range_requests(server, shards):
    stream = ImageStream(server.url, batch_size=10, shuffle=False)
    batch = next(stream.iterate(start_image=12))
    assert torch.equal(batch.images, next(ImageStream(shards, batch_size=10, shuffle=False).iterate(12)).images)
    assert len(asked(server)) == 10
    assert all(wanted is not None for _, wanted in asked(server))
    assert {name for name, _ in asked(server)} == {"shard-000001.tar", "shard-000002.tar"}
    assert same(read(server.url), read(shards))
    everything = np.arange(NUM_IMAGES)
    assert ShardSet(server.url).keys(everything) == [ShardSet(shards).key(i) for i in range(NUM_IMAGES)]


@pytest.mark.parametrize("workers", [0, 2])
def test_http_with_workers_and_a_cache(server, shards, tmp_path, workers):
    expected = read(shards)
    assert same(read(server.url, cache=tmp_path / "cache", workers=workers), expected)
    assert len(asked(server)) == 3  # each shard once, whatever the number of workers
    server.log.clear()
    assert same(read(server.url, cache=tmp_path / "cache"), expected)
    assert asked(server) == []
    assert same(read(server.url, workers=workers), expected)  # range requests from forked workers


def test_iterate_once_over_http(server, shards):
    here, there = (torch.cat([b.images for b in iterate_once(place, 7)]) for place in (shards, server.url))
    assert torch.equal(here, there)


def test_failing_reads_are_tried_again_then_named(server, shards, tmp_path):
    expected = read(shards, batches=1)
    server.failures = 2
    assert same(read(server.url, batches=1), expected)
    server.failures = 2
    assert same(read(server.url, batches=1, cache=tmp_path / "cache"), expected)
    server.failures = 1000
    with pytest.raises(DataError, match=rf"{server.url}shard-00000\d.tar' cannot be read after 3 tries: .*503"):
        read(server.url, batches=1)


def test_a_missing_remote_set_is_named_at_once(server, tmp_path):
    server.root = tmp_path
    with pytest.raises(DataError, match=rf"{server.url}manifest.json' cannot be read: FileNotFoundError"):
        ImageStream(server.url, batch_size=1)
    assert len(server.log) <= 2  # asked for, not asked again


def test_a_server_without_ranges_is_told_apart(server, shards, tmp_path):
    server.ranges = False
    with pytest.raises(DataError, match="ignores range requests: name a cache folder"):
        read(server.url)
    assert same(read(server.url, cache=tmp_path / "cache"), read(shards))


def test_a_shard_that_came_wrong_is_fetched_again_and_never_kept(server, shards, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(shards, wrong)
    shard = wrong / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[::-1])
    server.root = wrong
    with pytest.raises(DataError, match=r"shard-000001.tar' cannot be read after 3 tries: .*another sha256"):
        read(server.url, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("shard-000001.tar"))
    server.root = shards
    assert same(read(server.url, cache=tmp_path / "cache"), read(shards))


def test_check_reads_a_remote_set(server, tmp_path, shards):
    assert check(server.url) == []
    wrong = tmp_path / "wrong"
    shutil.copytree(shards, wrong)
    (wrong / "shard-000002.tar").unlink()
    server.root = wrong
    assert check(server.url) == [f"'{server.url}shard-000002.tar' cannot be read: FileNotFoundError"]


class Bucket(fsspec.get_filesystem_class("memory")):
    """What stands for a library of a cloud's storage: folders in memory, under a protocol of its own."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("s3://").strip("/")


def test_other_urls_are_read_by_fsspec(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec, "get_filesystem_class", {"s3": Bucket, "file": LocalFileSystem}.__getitem__)
    for path in shards.iterdir():
        Bucket().pipe(f"/bucket/set/{path.name}", path.read_bytes())
    expected = read(shards)
    assert same(read("s3://bucket/set"), expected)
    assert same(read("S3://bucket/set/", cache=tmp_path / "cache"), expected)
    assert same(read(f"file://{shards}"), expected)
    Bucket().rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    "location",
    [
        "nosuch://x",
        "memory://bucket/set",
        "ftp://{host}/set",
        "github://user:repo@main/set",
        "local://{folder}",
        "reference::{url}x.json",
        "reference://x?fo={url}x.json",
        "simplecache::{url}",
        "filecache::file://{folder}",
        "blockcache::{url}",
        "dir::file://{folder}",
        "zip://set::{url}x.zip",
        "file://{folder}::{url}",
        "{url}::reference://",
        "http://[::1]:1/set::simplecache",
        "://{host}",
    ],
)
def test_a_url_is_of_a_known_protocol_and_not_a_chain(location, server, shards):
    location = location.format(url=server.url, host=f"127.0.0.1:{server.server_port}", folder=shards)
    for opened in (lambda: ImageStream(location, batch_size=1), lambda: RemoteStorage(location)):
        with pytest.raises(DataError, match="begins with one of file://, http://, https://, s3://, gs://, hf://") as no:
            opened()
        assert "\n" not in str(no.value)
    assert server.log == [], "nothing was asked for"


def test_a_folder_may_have_colons_in_its_name(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "a::b")
    assert same(read(tmp_path / "a::b"), read(shards))


def test_an_address_of_ipv6_is_not_a_chain(shards):
    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6

    try:
        server = Server(("::1", 0), Handler)
    except OSError:
        pytest.skip("this machine has no IPv6")
    server.root, server.log, server.failures, server.ranges = shards, [], 0, True
    server.daemon_threads = True
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert same(read(f"http://[::1]:{server.server_port}/"), read(shards))
        server.shutdown()


def test_a_server_cannot_lead_to_a_file(server, shards, monkeypatch):
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: self.answer(302, b"", {"Location": f"file://{shards}/manifest.json"})
    )
    with pytest.raises(DataError, match=r"manifest.json' cannot be read"):
        ImageStream(server.url, batch_size=1)


def endless(self, status, first=b""):
    """Answer without an end, until the client leaves."""
    self.send_response(status)
    self.end_headers()
    self.close_connection = True
    with contextlib.suppress(OSError):
        self.wfile.write(first)
        while self.command == "GET" and self.server.sent < 2**29:
            self.server.sent += self.wfile.write(bytes(2**16))


@pytest.mark.parametrize("endless_file", ["manifest.json", "index", "shard"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_server_without_an_end_is_left(server, tmp_path, monkeypatch, endless_file, cached):
    monkeypatch.setattr("scq.data.pace.LARGEST_MANIFEST", 2**22)
    monkeypatch.setattr("scq.data.http_client.LARGEST_MANIFEST", 2**22)
    monkeypatch.setattr("scq.data.storage.LARGEST_MANIFEST", 2**22)
    server.sent, answer = 0, Handler.do_GET
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: endless(self, 206) if f"/{endless_file}" in self.path else answer(self)
    )
    with within(30), pytest.raises(DataError, match=f"{endless_file}.* (longer than|larger than|ignores range)"):
        next(ImageStream(server.url, batch_size=4, cache=tmp_path / "cache" if cached else None).iterate())
    assert server.sent < 2**27, "no more than was on its way"
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_server_that_drips_or_says_nothing_is_left(server, tmp_path, monkeypatch, cached):
    monkeypatch.setattr("scq.data.pace.PATIENCE", 0.5)
    monkeypatch.setattr("scq.data.http_client.PATIENCE", 0.5)
    clients = fsspec.get_filesystem_class("http")
    clients.clear_instance_cache()  # or the patient one of another test would serve

    def drip(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * self.server.drops)
                time.sleep(0.1)

    monkeypatch.setattr(Handler, "do_GET", drip)
    for server.drops in (0, 1):
        with within(30), pytest.raises(DataError, match=r"manifest.json' cannot be read after 3 tries: .*Timeout"):
            ImageStream(server.url, batch_size=4, cache=tmp_path / "cache" if cached else None)
    storage = CachedStorage(RemoteStorage(server.url), tmp_path, {}, {"shard-000000.tar": 10**6})
    with within(30), pytest.raises(DataError, match=r"shard-000000.tar' cannot be read after 3 tries: .*Timeout"):
        storage.read_range("shard-000000.tar", 0, 1)
    clients.clear_instance_cache()


def test_messages_do_not_tell_credentials(server, tmp_path):
    server.root, host = tmp_path, f"127.0.0.1:{server.server_port}"
    closed = "127.0.0.1:9"
    for url, told in (
        (f"http://ada:hunter2@{host}/set", f"http://***@{host}/set"),
        (f"http://{host}/set?X-Amz-Signature=hunter2", f"http://{host}/set?***"),
        (f"http://ada:hunter2@{closed}/set", f"http://***@{closed}/set"),
        (Referenced(f"http://{host}/hunter2/set", f"http://{host}/${{oc.env:KEY}}/set"), "/${oc.env:KEY}/set"),
        (Referenced("/nowhere/hunter2", "/nowhere/${oc.env:KEY}"), "/nowhere/${oc.env:KEY}"),
        ("nosuch://ada:hunter2@bucket/set", "nosuch://***@bucket/set"),
    ):
        with pytest.raises(DataError, match=re.escape(told)) as error:
            ImageStream(url, batch_size=1)
        assert "hunter2" not in str(error.value)
    server.failures = 1000
    monkey = RemoteStorage(f"http://ada:hunter2@{host}/set")
    with pytest.raises(DataError, match="503") as error:
        monkey.read_range("shard-000000.tar", 0, 1)
    assert "hunter2" not in str(error.value)


def test_a_url_without_its_credentials_says_so():
    with pytest.raises(DataError, match="lacks its credentials, which are never saved"):
        RemoteStorage("http://***@127.0.0.1/set")


def test_a_local_read_survives_a_lost_handle(shards):
    storage = LocalStorage(shards)
    first = storage.read_range("shard-000000.tar", 0, 512)
    os.close(storage._descriptors["shard-000000.tar"])  # as a network file system that was mounted again
    storage._descriptors["shard-000000.tar"] = os.open("/", os.O_RDONLY)
    assert storage.read_range("shard-000000.tar", 0, 512) == first


def test_pauses_grow_and_end(monkeypatch):
    slept, tries = [], []
    monkeypatch.setattr("scq.data.storage.PAUSES", (1, 2, 4))
    monkeypatch.setattr("time.sleep", slept.append)

    def fail():
        tries.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(DataError, match="'x' cannot be read after 4 tries: TimeoutError: no answer"):
        with_retries(fail, "'x'")
    assert (slept, len(tries)) == ([1, 2, 4], 4)


def test_many_shards_do_not_exhaust_file_handles(tmp_path):
    folder = write_folder(tmp_path / "photos", 80)
    pack(folder, tmp_path / "out", format="folder", size=8, images_per_shard=1, workers=0)
    stream = ImageStream(tmp_path / "out", batch_size=80)
    next(stream.iterate())
    assert len(stream._batches.reader.shards.storage._descriptors) <= 64


def test_a_hostile_manifest_cannot_write_outside_the_cache(server, shards, tmp_path):
    hostile = tmp_path / "hostile"
    shutil.copytree(shards, hostile)
    manifest = hostile / "manifest.json"
    manifest.write_text(manifest.read_text().replace("shard-000001.tar", "../../outside.tar"))
    server.root = hostile
    for place in (server.url, hostile):
        with pytest.raises(DataError, match=r"names the file '../../outside.tar', which is not a plain file name"):
            read(place, cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("outside*"))


def read_in_child(storage):
    storage.read_range("shard-000000.tar", 0, 512)
    del storage
    gc.collect()


@pytest.mark.timeout(30)
def test_a_forked_child_leaves_its_parents_connection_alone(server):
    storage = RemoteStorage(server.url)
    for _ in range(5):
        expected = storage.read_range("shard-000000.tar", 0, 512)
        child = multiprocessing.get_context("fork").Process(target=read_in_child, args=(storage,))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert storage.read_range("shard-000000.tar", 0, 512) == expected
