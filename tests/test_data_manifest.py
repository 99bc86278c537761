"""Sets of unknown origin: whatever is wrong with a manifest, an index, a header or a digest ends in one line."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import write_folder
from helpers import make_endless, make_pipe, within
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from scq.data.check import check
from scq.data.manifest import IMAGES, Classes, parse_manifest, refuse_other_classes
from scq.data.pack import pack
from scq.data.shards import ROW, ShardSet
from scq.data.storage import LocalStorage
from scq.data.stream import ImageStream, iterate_once
from scq.data.tokens import TokenDataset, TokenStream, TokenWriter
from scq.engine.errors import DataError, UserError
from scq.engine.plain_json import parse_json

ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**40, -(2**64), 1.5, 1e300, float("nan"), float("inf"), "", "x", "../x"]
ODD += ["a" * 5000, "\ud800", "9" * 64, [], [[]], {}, {"name": "x"}, [1, 2, 3], "shard-000000.tar", [0, 0], [2**40] * 2]
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A good set of images, and one of tokens."""
    root = tmp_path_factory.mktemp("sets")
    folder = write_folder(root / "photos", 13)
    pack(folder, root / "images", format="folder", size=8, images_per_shard=5, workers=0)
    writer = TokenWriter(
        root / "tokens",
        grid=(2, 3),
        codebook_size=512,
        fingerprint="f00d",
        source={"fingerprint": "a"},
        num_classes=2,
        class_names=["cats", "dogs"],
        images_per_shard=5,
    )
    codes = torch.randint(512, (13, 2, 3), generator=torch.Generator().manual_seed(0))
    writer.write(codes, torch.arange(13) % 2, [f"key {n}" for n in range(13)])
    writer.close()
    return root


def digest(found: list) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def read_images(folder: Path) -> str:
    """Everything there is to read."""
    opened, found = ShardSet(folder), []
    for batch in iterate_once(folder, 4):
        found += [batch.images.tolist(), batch.labels.tolist(), opened.keys(batch.positions.numpy())]
    next(ImageStream(folder, batch_size=4).iterate())
    return digest(found)


def read_tokens(folder: Path) -> str:
    opened = TokenDataset(folder)
    everything = np.arange(len(opened))
    next(TokenStream(folder, batch_size=4).iterate())
    return digest([opened.read(everything, 0 * everything).tolist(), opened.labels.tolist(), list(opened.keys())])


READERS = {"images": read_images, "tokens": read_tokens}


@pytest.fixture(scope="module")
def copies(sets, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """A folder of each kind that a test may damage and has to mend, and what is read from a good one."""
    root = tmp_path_factory.mktemp("copies")
    return {kind: (shutil.copytree(sets / kind, root / kind), READERS[kind](sets / kind)) for kind in READERS}


def reads_the_same_or_is_refused(kind: str, copies: dict[str, tuple[Path, str]], file: str, content: bytes) -> None:
    """Read the set with another content of one file."""
    folder, expected = copies[kind]
    good = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        (folder / file).write_bytes(content)
        found = READERS[kind](folder)
    except DataError as error:
        found = None if "\n" in str(error) else expected  # one line
    for path in folder.iterdir():
        if path not in good:
            path.unlink()
    (folder / file).write_bytes(good[folder / file])
    assert found == expected


def paths_in(value: object, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in paths_in(item, (*path, key)))]


@MANY
@given(data=st.data())
@pytest.mark.parametrize("kind", list(READERS))
def test_any_other_value_in_a_manifest_is_refused_or_changes_nothing_that_is_read(copies, kind, data):
    manifest = json.loads((copies[kind][0] / "manifest.json").read_text())
    path = data.draw(st.sampled_from(paths_in(manifest)[1:]))
    parent = manifest
    for key in path[:-1]:
        parent = parent[key]
    change = data.draw(st.sampled_from(["replace", "delete", "repeat", "one more"]))
    if change == "replace":
        parent[path[-1]] = data.draw(st.sampled_from(ODD))
    elif change == "delete":
        del parent[path[-1]]
    elif change == "repeat" and isinstance(parent, list):
        parent.append(parent[path[-1]])
    else:
        assume(type(parent[path[-1]]) is int)
        parent[path[-1]] += 1
    reads_the_same_or_is_refused(kind, copies, "manifest.json", json.dumps(manifest).encode())


@MANY
@given(data=st.data())
@pytest.mark.parametrize("kind", list(READERS))
def test_any_other_bytes_in_any_file_are_refused_or_change_nothing_that_is_read(copies, kind, data):
    folder = copies[kind][0]
    file = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray((folder / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 700) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    reads_the_same_or_is_refused(kind, copies, file, bytes(content))


@pytest.mark.parametrize("put", [make_pipe, make_endless])
@pytest.mark.parametrize("kind", list(READERS))
def test_what_is_no_plain_file_is_not_waited_for(sets, tmp_path, kind, put):
    folder = tmp_path / kind
    for file in sorted(path.name for path in (sets / kind).iterdir()):
        if file.endswith(".lock"):
            continue  # nobody reads it
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sets / kind, folder)
        put(folder / file)
        with within(10):
            try:
                found = READERS[kind](folder)
            except DataError as error:
                found = READERS[kind](sets / kind) if file in str(error) else str(error)
        assert found == READERS[kind](sets / kind)


@MANY
@given(at=st.integers(0, 1600), byte=st.integers(0, 255), longer=st.integers(-600, 600))
def test_an_index_is_rebuilt_from_damaged_shards_only_as_it_was(copies, at, byte, longer):
    folder = copies["images"][0]
    (index,) = folder.glob("index-*.npy")
    good = index.read_bytes()
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[at] = byte
    index.unlink()
    try:
        cut = content[:longer] if longer < 0 else content + bytes(longer)
        reads_the_same_or_is_refused("images", copies, shard.name, bytes(cut))
    finally:
        index.write_bytes(good)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "a key comes twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": ' + b"1" * 100_000 + b"}", "not valid JSON"),
        ('{"a": "é"}'.encode("latin-1"), "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": 1} {}', "not valid JSON"),
    ],
)
def test_json_that_is_no_manifest_is_named(text, said):
    with pytest.raises(DataError, match=said):
        parse_json(text, "'x'", "write it again")
    with pytest.raises(DataError, match="'x'"):
        parse_manifest(text, "'x'", IMAGES)


def test_a_byte_order_mark_is_no_damage(copies):
    folder, expected = copies["images"]
    manifest = folder / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes(b"\xef\xbb\xbf" + good)
    assert read_images(folder) == expected
    manifest.write_bytes(good)


def test_a_manifest_too_large_for_memory_is_not_read(tmp_path):
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(DataError, match="is larger than any manifest"):
        ShardSet(tmp_path)
    with pytest.raises(DataError, match="is larger than any manifest"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".labels.npy"])
@pytest.mark.parametrize("shape", [(2**40, 1, 2, 3), (2**62,), (5, 1, 2, 2), (5,) * 30, (-5, 1, 2, 3), ()])
def test_an_array_that_claims_another_shape_takes_no_memory(sets, tmp_path, suffix, shape):
    folder = shutil.copytree(sets / "tokens", tmp_path / "tokens")
    path = next(iter(sorted(folder.glob(f"tokens-*0{suffix}"))))
    with path.open("wb") as file:
        header = {"descr": "<u2" if suffix == ".npy" else "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(60))
    with pytest.raises(DataError, match=path.name):
        TokenDataset(folder)


def alter_index(folder: Path) -> Path:
    """Exchange the labels of a cat and a dog in the index."""
    (path,) = folder.glob("index-*.npy")
    rows = np.load(path)
    assert rows["label"][0] != rows["label"][-1]
    rows["label"][[0, -1]] = rows["label"][[-1, 0]]
    np.save(path, rows)
    return path


def forget_digest(folder: Path) -> None:
    """Make the manifest that of an older version, which had no digest of the index."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["index_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_altered_index_feeds_no_wrong_labels(sets, tmp_path):
    folder = shutil.copytree(sets / "images", tmp_path / "images")
    expected = read_images(folder)
    index = alter_index(folder)
    with pytest.raises(DataError, match="is damaged or was altered: delete it, and it will be rebuilt"):
        ImageStream(folder, batch_size=4)
    assert "was altered" in check(folder)[0]
    index.unlink()
    assert read_images(folder) == expected


def test_an_index_from_before_digests_is_verified_once_by_the_shards(sets, tmp_path, monkeypatch):
    folder = shutil.copytree(sets / "images", tmp_path / "images")
    forget_digest(folder)
    good = read_images(folder)
    monkeypatch.setattr("scq.data.shards.scan_shard", None)  # the first reading has written the digest down
    assert read_images(folder) == good
    monkeypatch.undo()
    index = alter_index(folder)
    with pytest.raises(DataError, match="delete it, and it will be rebuilt"):
        read_images(folder)
    next(folder.glob("index-*.sha256")).unlink()
    with pytest.raises(DataError, match="delete it, and it will be rebuilt"):
        read_images(folder)
    index.unlink()
    assert read_images(folder) == good


def test_a_row_that_leads_nowhere_is_refused_where_no_digest_can_be_had(sets, tmp_path, monkeypatch):
    """A set of an older version behind a URL."""
    monkeypatch.setenv("SCQ_CACHE", str(tmp_path / "cache"))
    for field, value in (("shard", 77), ("label", 2), ("offset", 2**63), ("length", 2**31), ("offset", 0)):
        folder = shutil.copytree(sets / "images", tmp_path / f"{field}{value}")
        forget_digest(folder)
        (path,) = folder.glob("index-*.npy")
        rows = np.load(path)
        assert rows.dtype == ROW
        rows[field][3] = value
        np.save(path, rows)
        with pytest.raises(DataError, match="delete it, and it will be rebuilt"):
            ShardSet(f"file://{folder}").rows  # noqa: B018
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("kind", list(READERS))
def test_errors_of_a_network_file_system_are_tried_again(sets, kind):
    """A manifest, an index, a header or a shard that cannot be read for a moment is no damaged one."""
    failing = {"left": 0}

    def fail(original):
        def read(*arguments, **keywords):
            if failing["left"]:
                failing["left"] -= 1
                raise OSError(116, "Stale file handle")
            return original(*arguments, **keywords)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scq.data.storage.PAUSES", (0.0, 0.0, 0.0))
        patch.setattr("pathlib.Path.open", fail(Path.open))
        patch.setattr("builtins.open", fail(open))
        patch.setattr("os.pread", fail(os.pread))
        patch.setattr("scq.data.arrays._verified", set())
        expected = READERS[kind](sets / kind)
        for errors in (1, 3):
            failing["left"] = errors
            assert READERS[kind](sets / kind) == expected
        failing["left"] = 1000
        with pytest.raises(DataError, match="cannot be read after 4 tries: OSError"):
            READERS[kind](sets / kind)


def test_a_manifest_that_is_a_folder_is_named_at_once(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    for open_set in (ShardSet, TokenDataset, LocalStorage(tmp_path).read):
        with pytest.raises(DataError, match=r"manifest.json' is a folder"):
            open_set("manifest.json" if open_set not in (ShardSet, TokenDataset) else tmp_path)


def test_classes_are_compared_by_name():
    ours = Classes("ours", 3, ["ant", "bee", "cat"])
    refuse_other_classes(ours, ours, "")
    refuse_other_classes(ours, Classes("a set of an older version", 3, ()), "")
    with pytest.raises(UserError, match=r"label 1 is 'bee' in ours, but 'cat' in theirs, .*: mend it"):
        refuse_other_classes(ours, Classes("theirs", 3, ["ant", "cat", "dog"]), "mend it")
    with pytest.raises(UserError, match="ours has 3 classes, but theirs has 2"):
        refuse_other_classes(ours, Classes("theirs", 2, ["ant", "bee"]), "mend it")
