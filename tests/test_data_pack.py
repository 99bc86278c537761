"""Packing: what comes out, that nothing is lost, and that nothing but the source and the settings matters."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_samples import encoded, photo, pixels, tree_bytes, write_folder, write_lmdb
from PIL import Image

from scq.cli.main import main
from scq.data.check import check, preview
from scq.data.pack import TIMES, pack
from scq.data.shards import ShardSet, key_of, member_name
from scq.data.source import IMAGE_SUFFIXES, FolderSource, Source
from scq.data.transforms import PROTOCOLS, decode
from scq.engine.errors import DataError, UserError
from scq.evaluation.reference import Reference


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "photos", 41)


def packed(source, out, **settings):
    defaults = {"format": "folder", "size": 32, "images_per_shard": 16, "workers": 0}
    return pack(source, out, **{**defaults, **settings})


def test_manifest_says_what_lies_there(folder, tmp_path):
    seen = []
    manifest = packed(folder, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["num_images"], manifest["image_size"]) == (41, 32)
    assert [shard["images"] for shard in manifest["shards"]] == [16, 16, 9]
    assert manifest["class_names"] == ["cats", "dogs"]
    assert manifest["source"] == {
        "format": "folder", "path": str(folder), "name": folder.name, "split": None, "images": 41
    }  # fmt: skip
    assert manifest["protocol"]["crop"] == "resize-shorter"
    assert manifest["bytes"] == sum((tmp_path / "out" / s["name"]).stat().st_size for s in manifest["shards"])
    assert seen[-1] == (41, 41)
    assert sorted(seen) == seen
    assert check(tmp_path / "out") == []


def test_a_set_packed_before_names_were_kept_is_still_taken(folder, tmp_path):
    manifest = packed(folder, tmp_path / "out")
    assert Reference(tmp_path / "out").description.dataset == folder.name
    del manifest["source"]["name"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert packed(folder, tmp_path / "out") == manifest
    assert Reference(tmp_path / "out").description.dataset == "folder"


def test_pixels_keys_and_labels_survive(folder, tmp_path):
    packed(folder, tmp_path / "out")
    opened = ShardSet(tmp_path / "out")
    files = sorted(folder.rglob("*.*"))
    for i, file in enumerate(files):
        expected = PROTOCOLS["resize-shorter"].apply(decode(file.read_bytes()), 32)
        assert np.array_equal(decode(opened.read(i)), expected)
        assert opened.key(i) == file.relative_to(folder).as_posix()
        assert opened.rows["label"][i] == ["cats", "dogs"].index(file.parent.name)


def test_webdataset_reads_the_shards(folder, tmp_path):
    packed(folder, tmp_path / "out")
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls")
    samples = list(dataset)
    assert [key_of(key + ".png") for key, _, _ in samples][:2] == ["cats/photo.0000.jpg", "cats/photo.0002.webp"]
    assert len(samples) == 41
    assert all(image.size == (32, 32) for _, image, _ in samples)
    assert [label for _, _, label in samples] == [0] * 21 + [1] * 20


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers(folder, tmp_path, workers):
    packed(folder, tmp_path / "a")
    packed(folder, tmp_path / "b", workers=workers)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_packing_again_returns_what_is_there(folder, tmp_path):
    first = packed(folder, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert packed(folder, tmp_path / "out") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(DataError, match=r"already holds another set .*size was 32, now 24"):
        packed(folder, tmp_path / "out", size=24)


def pack_in_process(folder, out, workers, wait=False):
    """Starts packing in a process of its own; returns it and the pipe on which it reports its progress.

    With wait, it packs no further than its first report until the pipe is closed.
    """
    here, there = multiprocessing.Pipe()

    def report(done, total):
        with contextlib.suppress(OSError):
            there.send(done)
        if wait:
            here.close()
            there.poll(60)

    settings = {"workers": workers, "progress": report}
    process = multiprocessing.get_context("fork").Process(target=packed, args=(folder, out), kwargs=settings)
    process.start()
    there.close()
    return process, here


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_and_again_gives_the_same_bytes(tmp_path, workers):
    folder = write_folder(tmp_path / "photos", 150, side=200)
    packed(folder, tmp_path / "whole")
    out = tmp_path / "killed"
    for when in (20, 60, 100):
        process, progress = pack_in_process(folder, out, workers)
        while progress.recv() < when:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    packed(folder, out)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_an_interrupted_pack_goes_on_after_the_last_complete_shard(folder, tmp_path):
    packed(folder, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 35:
            raise Stop

    with pytest.raises(Stop):
        packed(folder, tmp_path / "out", images_per_shard=8, progress=stop)
    complete = {name: stat for name, stat in tree_bytes(tmp_path / "out").items() if name.endswith(".tar")}
    assert sorted(complete) == [f"shard-{i:06d}.tar" for i in range(5)]
    with pytest.raises(DataError, match="the pack was interrupted, run it again"):
        ShardSet(tmp_path / "out")
    with pytest.raises(DataError, match=r"unfinished pack with other settings .*images_per_shard was 8, now 16"):
        packed(folder, tmp_path / "out")
    journal = tmp_path / "out" / "pack.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"name": "shard-0000')  # the kill came in the middle of a line
    seen = []
    packed(folder, tmp_path / "out", images_per_shard=8, progress=lambda done, total: seen.append(done))
    assert min(seen) > 40
    packed(folder, tmp_path / "straight", images_per_shard=8)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "straight")


@pytest.mark.parametrize("setting", [{"workers": 100_000}, {"workers": -1}, {"images_per_shard": 10**25}])
def test_numbers_without_an_end_are_refused(tmp_path, setting):
    write_folder(tmp_path / "photos", 2)
    with pytest.raises(UserError, match=f"^{next(iter(setting))}=.* must be a whole number"):
        pack(tmp_path / "photos", tmp_path / "set", format="folder", size=8, **setting)


def test_two_packs_at_once_are_refused(folder, tmp_path):
    process, progress = pack_in_process(folder, tmp_path / "out", 0, wait=True)
    progress.recv()
    with pytest.raises(DataError, match="another process is packing into"):
        packed(folder, tmp_path / "out")
    progress.close()  # the other one may go on
    process.join()
    assert packed(folder, tmp_path / "out")["num_images"] == 41


def spoil(folder):
    """Four bad files of 41: truncated, no image, empty, too small; returns key -> part of the reason."""
    files = sorted(folder.rglob("*.*"))
    files[3].write_bytes(files[3].read_bytes()[:400])
    files[10].write_text("this is no image")
    files[20].write_bytes(b"")
    files[30].write_bytes(encoded(photo(1, 40, 20), "PNG"))
    reasons = ("cannot be decoded", "not an image", "not an image", "smaller than the crop: 40x20 < 32x32")
    return {files[i].relative_to(folder).as_posix(): r for i, r in zip((3, 10, 20, 30), reasons, strict=True)}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_counted_and_named(folder, tmp_path, workers):
    bad = spoil(folder)
    manifest = packed(folder, tmp_path / "out", max_bad=0.1, workers=workers)
    assert manifest["num_images"] == 37
    assert manifest["source"]["images"] == 41
    assert {image["key"]: image["reason"] for image in manifest["skipped"]}.keys() == bad.keys()
    for image in manifest["skipped"]:
        assert bad[image["key"]] in image["reason"]
    assert check(tmp_path / "out") == []


def test_too_many_bad_images_fail_and_are_named(folder, tmp_path):
    bad = spoil(folder)
    with pytest.raises(DataError) as caught:
        packed(folder, tmp_path / "out")
    message = str(caught.value)
    assert "at most 0 may be bad" in message
    assert next(iter(bad)) in message
    assert "\n" not in message
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert packed(folder, tmp_path / "out", max_bad=0.1)["num_images"] == 37  # nothing done before is lost


TRANSIENT = [errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE]


def failing(monkeypatch, error, times):
    """Let the reading of every file fail so many times."""
    monkeypatch.setattr("scq.data.storage.PAUSES", (0.001, 0.002))
    load, tries = FolderSource.load, {}

    def fail(self, entry):
        tries[entry.key] = tries.get(entry.key, 0) + 1
        if tries[entry.key] <= times:
            raise OSError(error, os.strerror(error), entry.where)
        return load(self, entry)

    monkeypatch.setattr(FolderSource, "load", fail)


@pytest.mark.parametrize("error", TRANSIENT, ids=errno.errorcode.get)
def test_what_cannot_be_read_for_a_moment_is_not_lost(error, folder, tmp_path, monkeypatch):
    packed(folder, tmp_path / "whole")
    failing(monkeypatch, error, times=2)
    packed(folder, tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [*TRANSIENT, errno.EACCES], ids=errno.errorcode.get)
def test_what_cannot_be_read_at_all_ends_the_pack_which_resumes(error, workers, folder, tmp_path, monkeypatch):
    packed(folder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        failing(patch, error, times=99)
        with pytest.raises(DataError, match=rf"{os.strerror(error)}.*; run it again to resume") as caught:
            packed(folder, tmp_path / "out", max_bad=1.0, workers=workers)
        assert "'cats/photo.0000.jpg'" in str(caught.value)
    packed(folder, tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_a_file_that_vanishes_while_packing_is_named(folder, tmp_path):
    def remove(done, total):
        (folder / "dogs" / "photo.0039.jpg").unlink(missing_ok=True)

    with pytest.raises(
        DataError, match=r"'dogs/photo.0039.jpg' cannot be read: No such file or directory; run it again"
    ):
        packed(folder, tmp_path / "out", max_bad=1.0, progress=remove)
    with pytest.raises(DataError, match="source images was 41, now 40"):
        packed(folder, tmp_path / "out", max_bad=1.0)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_a_machine_without_files_or_memory_is_not_the_images_fault(error, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("scq.data.transforms.to_rgb", lambda image: (_ for _ in ()).throw(error))
        with pytest.raises(DataError, match=r"'cats/photo.0000.jpg': (Too many open files|memory ran out); .*resume"):
            packed(folder, tmp_path / "out", max_bad=1.0)
    assert packed(folder, tmp_path / "out")["num_images"] == 41


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "Function not implemented"), NotImplementedError("no locks")])
def test_without_shared_locks_one_process_packs(error, folder, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise error

    packed(folder, tmp_path / "whole")
    monkeypatch.setattr("scq.data.pack.ProcessPoolExecutor", refuse)
    packed(folder, tmp_path / "out", workers=2)
    assert "packing in one process" in capsys.readouterr().err
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def replace_by_another(file):
    file.write_bytes(encoded(photo(7), "PNG"))
    os.utime(file, (2e9, 2e9))


def replace_by_one_of_equal_size(file):
    file.write_bytes(bytes(reversed(file.read_bytes())))
    os.utime(file, (2e9, 2e9))


CHANGES = {
    "another file": (
        replace_by_another,
        r"names or sizes .*, \d+ bytes before, now \d+; 'dogs/photo.0005.webp' was written",
    ),
    "equal size": (replace_by_one_of_equal_size, r"files were written again, 'dogs/photo.0005.webp' was written last"),
    "older": (lambda file: os.utime(file, (1e9, 1e9)), "files were written again"),
    "name": (lambda file: file.rename(file.with_name("x.webp")), "names or sizes of the source's files changed"),
    "one less": (lambda file: file.unlink(), "source images was 41, now 40"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_was_changed_is_another_source(change, folder, tmp_path):
    def stop(done, total):
        if done >= 32:
            raise InterruptedError(errno.EINTR, "stopped")

    packed(folder, tmp_path / "out")
    with pytest.raises(DataError, match="stopped"):
        packed(folder, tmp_path / "unfinished", progress=stop)
    do, words = CHANGES[change]
    do(folder / "dogs" / "photo.0005.webp")
    with pytest.raises(DataError, match=f"already holds another set .*{words}"):
        packed(folder, tmp_path / "out")
    with pytest.raises(DataError, match=f"an unfinished pack with other settings .*{words}"):
        packed(folder, tmp_path / "unfinished")


def test_a_copy_with_other_times_gives_the_same_set_and_can_be_kept(folder, tmp_path):
    manifest = packed(folder, tmp_path / "out")
    for file in folder.rglob("*.*"):
        os.utime(file, (1e9, 1e9))
    packed(folder, tmp_path / "again")
    ours, theirs = tree_bytes(tmp_path / "out"), tree_bytes(tmp_path / "again")
    assert ours.pop(TIMES) != theirs.pop(TIMES)
    assert ours == theirs
    with pytest.raises(DataError, match="were written again"):
        packed(folder, tmp_path / "out")
    (tmp_path / "out" / TIMES).unlink()
    assert packed(folder, tmp_path / "out") == manifest


def test_a_set_packed_before_files_were_known_is_still_taken(folder, tmp_path):
    manifest = packed(folder, tmp_path / "out")
    for name in ("source_files", "passed_over"):
        del manifest[name]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "out" / TIMES).unlink()
    assert packed(folder, tmp_path / "out") == manifest


@pytest.mark.parametrize("wrong", [3, [], {}, {"bytes": 1}, {"bytes": "1", "names_and_sizes": "x"}, {".x": "1"}])
@pytest.mark.parametrize("name", ["source_files", "passed_over"])
def test_a_manifest_with_wrong_files_is_one_line(name, wrong, folder, tmp_path):
    manifest = packed(folder, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({**manifest, name: wrong}))
    if (name, wrong) == ("passed_over", {}):
        assert packed(folder, tmp_path / "out") == manifest
    elif (name, wrong) == ("passed_over", {"bytes": 1}):
        assert packed(folder, tmp_path / "out")["passed_over"] == wrong
    else:
        with pytest.raises(DataError, match=f"says that {name} is"):
            packed(folder, tmp_path / "out")


def test_an_installed_package_may_be_installed_again(tmp_path, monkeypatch):
    settings = {"format": "emoji", "split": "test", "size": 8}
    first = packed("twemoji", tmp_path / "out", **settings)
    survey = Source.survey
    monkeypatch.setattr(Source, "survey", lambda self: survey(self)._replace(times="later"))
    assert packed("twemoji", tmp_path / "out", **settings) == first


@pytest.mark.parametrize("line", [b"{}", b"[]", b"null", b"{", b'{"name": 3, "sha256": ""}', b'{"name": "x"}', b"\xff"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_journal_is_one_line(line, place, folder, tmp_path):
    def stop(done, total):
        if done >= 32:
            raise InterruptedError(errno.EINTR, "stopped")

    with pytest.raises(DataError, match="stopped"):
        packed(folder, tmp_path / "out", progress=stop)
    journal = tmp_path / "out" / "pack.jsonl"
    lines = journal.read_bytes().splitlines()
    lines[place] = line
    journal.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match="is damaged: delete"):
        packed(folder, tmp_path / "out")


@pytest.mark.parametrize("readable", [False, True])
def test_what_is_passed_over_is_said(readable, folder, tmp_path, monkeypatch, capsys):
    for number in range(5):
        (folder / "cats" / f"IMG_{number}.xcf").write_text("no image for us")
    (folder / "dogs" / "IMG_1.heic").write_text("")
    monkeypatch.setattr("scq.data.source.IMAGE_SUFFIXES", IMAGE_SUFFIXES - {".heic"})
    monkeypatch.setattr("scq.data.sources.HEIF_SUFFIXES", {".heic"} if readable else frozenset())
    command = ["data", "pack", str(folder), str(tmp_path / "out"), "--format", "folder", "--size", "32"]
    for _ in range(2):  # once more, when nothing is left to do
        assert main(command) == 0
        words = capsys.readouterr().out
        assert "41 images in 1 shards\npassed over: 1 .heic, 5 .xcf" in words
        assert ("pip install 'scq[heif]'" in words) == (not readable)
    assert ShardSet(tmp_path / "out").manifest["passed_over"] == {".heic": 1, ".xcf": 5}
    for file in folder.rglob("photo.*"):
        file.unlink()
    with pytest.raises(DataError, match=r"no images found in .*; passed over: 1 .heic, 5 .xcf"):
        packed(folder, tmp_path / "none")


def test_one_image_smaller_than_the_crop_gives_one_clear_line(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "tiny.png").write_bytes(encoded(photo(1, 20, 30), "PNG"))
    with pytest.raises(DataError, match=r"'tiny.png' smaller than the crop: 20x30 < 64x64") as caught:
        packed(tmp_path / "photos", tmp_path / "out", size=64)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_named(folder, tmp_path):
    for settings, message in (
        ({"crop": "lsun"}, "unknown crop protocol 'lsun'"),
        ({"size": None}, "needs an image size"),
        ({"keep_encoded": True}, "needs the crop protocol 'none'"),
        ({"images_per_shard": 0}, "at least 1, not 0"),
        ({"max_bad": 3.0}, "0..1, not 3.0"),
        ({"format": "png"}, "unknown source format 'png'"),
    ):
        with pytest.raises(DataError, match=message):
            packed(folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_lossless_webp_holds_the_pixels_of_png_in_less_room(tmp_path):
    folder = write_folder(tmp_path / "photos", 9)
    png, webp = (packed(folder, tmp_path / encoding, size=32, encoding=encoding) for encoding in ("png", "webp"))
    shards = [ShardSet(tmp_path / encoding) for encoding in ("png", "webp")]
    for i in range(len(shards[0])):
        one, other = (np.asarray(Image.open(io.BytesIO(each.read(i))).convert("RGB")) for each in shards)
        assert np.array_equal(one, other)
    assert sum(map(len, map(shards[1].read, range(9)))) < 0.95 * sum(map(len, map(shards[0].read, range(9))))
    assert (png["protocol"]["encoding"], webp["protocol"]["encoding"]) == ("png", "webp")
    with pytest.raises(UserError, match="encoding"):
        packed(folder, tmp_path / "out", size=32, encoding="jpeg")


def test_an_image_that_webp_cannot_hold_is_named(tmp_path):
    folder = write_folder(tmp_path / "photos", 2)
    (folder / "cats" / "wide.png").write_bytes(encoded(Image.new("RGB", (16384, 1)), "PNG"))
    manifest = packed(folder, tmp_path / "out", size=None, crop="none", encoding="webp", max_bad=0.5)
    assert [(image["key"], "WebP" in image["reason"]) for image in manifest["skipped"]] == [("cats/wide.png", True)]


def test_keep_encoded_stores_the_original_bytes(tmp_path):
    folder = write_folder(tmp_path / "photos", 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "cats" / "rotated.jpg").write_bytes(encoded(photo(1, 80, 72), "JPEG", exif=exif))
    (folder / "dogs" / "old.bmp").write_bytes(encoded(photo(1, 80, 72), "BMP"))
    manifest = packed(folder, tmp_path / "out", size=None, keep_encoded=True)
    opened = ShardSet(tmp_path / "out")
    files = sorted(folder.rglob("*.*"))
    assert [opened.read(i) for i in range(len(files))] == [file.read_bytes() for file in files]
    assert [int(label) for label in opened.rows["label"]] == [int(file.parent.name == "dogs") for file in files]
    assert manifest["image_size"] is None
    assert manifest["protocol"]["encoding"] == "original bytes"
    suffixes = {name.rsplit(".", 1)[1] for name in tar_names(tmp_path / "out")}
    assert suffixes == {"jpg", "png", "webp", "bmp", "cls"}


def tar_names(out):
    import tarfile

    return [name for path in sorted(out.glob("*.tar")) for name in tarfile.open(path).getnames()]


def test_nothing_in_a_shard_points_outside(tmp_path):
    values = {key: encoded(photo(1), "PNG") for key in (b"/etc/passwd", b"../../up", b"a.b/..", b"~root/x", b"plain")}
    write_lmdb(tmp_path / "odd_train_lmdb", values)
    packed(tmp_path, tmp_path / "out", format="lsun")
    names = tar_names(tmp_path / "out")
    assert len(names) == 10
    for name in names:
        assert not name.startswith(("/", "~"))
        assert ".." not in Path(name).parts
    opened = ShardSet(tmp_path / "out")
    assert {opened.key(i).encode() for i in range(5)} == set(values)


@pytest.mark.parametrize("key", ["a/b.jpg", "/x", "..", "ä/ü ö.png", "100%.tar", "\udce4.jpg", "x" * 300 + ".jpg"])
def test_member_names_are_reversible(key):
    assert key_of(member_name(key) + ".png") == key
    assert member_name(key).isascii()


def test_long_and_strange_file_names(tmp_path):
    folder = tmp_path / "photos"
    names = ["x" * 200 + ".png", "ä ö%.v2.png", "[1].png"]
    for name in names:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(photo(1), "PNG"))
    packed(folder, tmp_path / "out")
    opened = ShardSet(tmp_path / "out")
    assert sorted(opened.key(i) for i in range(3)) == sorted(names)
    assert check(tmp_path / "out") == []


def test_check_names_every_damage(folder, tmp_path):
    packed(folder, tmp_path / "out")
    out = tmp_path / "out"
    first, second, third = sorted(out.glob("*.tar"))
    data = bytearray(first.read_bytes())
    data[2000] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-512])
    third.unlink()
    shutil.copy(first, out / "stranger.tar")
    problems = check(out)
    assert len(problems) == 4
    for problem, words in zip(
        problems,
        ("000000.tar was changed", "000001.tar has", "000002.tar is missing", "stranger.tar is not"),
        strict=True,
    ):
        assert words in problem
    with pytest.raises(DataError, match="no packed images at"):
        check(tmp_path)


def test_preview_shows_the_images(folder, tmp_path):
    packed(folder, tmp_path / "out")
    preview(tmp_path / "out", tmp_path / "deep" / "sheet.png", columns=5, rows=3)
    sheet = Image.open(tmp_path / "deep" / "sheet.png")
    assert sheet.size == (5 * 66 + 2, 3 * 66 + 2)
    first = decode(ShardSet(tmp_path / "out").read(0)).resize((64, 64), Image.Resampling.NEAREST)
    assert np.array_equal(pixels(sheet)[2:66, 2:66], pixels(first))


SCENES = Path(__file__).parents[2] / "shared" / "data" / "scenes_val_lmdb"


@pytest.mark.skipif(not SCENES.is_dir(), reason="the photographs of ../shared/data are not on this machine")
def test_real_photographs_are_packed_without_one_lost(tmp_path):
    manifest = pack(SCENES, tmp_path / "out", format="lsun", size=64, workers=2, images_per_shard=100)
    assert (manifest["num_images"], manifest["skipped"], manifest["protocol"]["crop"]) == (300, [], "lsun-ldm")
    image = Image.open(io.BytesIO(ShardSet(tmp_path / "out").read(299)))
    assert (image.size, image.mode) == ((64, 64), "RGB")


def test_no_worker_survives_its_killed_parent(tmp_path):
    folder = write_folder(tmp_path / "photos", 150, side=200)
    process, progress = pack_in_process(folder, tmp_path / "out", 2)
    progress.recv()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_killed_worker_is_a_clear_error_and_nothing_is_lost(tmp_path):
    folder = write_folder(tmp_path / "photos", 120)

    def kill_one(done, total):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        if done == 48:
            for child in children:
                os.kill(int(child), signal.SIGKILL)

    with pytest.raises(DataError, match="a packing process was killed"):
        packed(folder, tmp_path / "out", workers=2, images_per_shard=8, progress=kill_one)
    packed(folder, tmp_path / "out", images_per_shard=8)
    packed(folder, tmp_path / "whole", images_per_shard=8)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(folder, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def write(self, data):
        if self.bytes > 60_000:
            raise full
        self.bytes += len(data)
        self.sha256.update(data)
        return self.file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr("scq.data.pack._Hashing.write", write)
        with pytest.raises(DataError, match=r"packing stopped at .*No space left on device; run it again to resume"):
            packed(folder, tmp_path / "out", size=64, images_per_shard=20)
    assert not list((tmp_path / "out").glob(".*"))
    assert packed(folder, tmp_path / "out", size=64, images_per_shard=20)["num_images"] == 41
