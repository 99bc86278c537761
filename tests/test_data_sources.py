"""Each source format against small sets in the layout people have on disk."""

import contextlib
import errno
import io
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import ClassVar

import lmdb
import numpy as np
import pytest
from data_samples import EMOJI_FILES, encoded, photo, write_folder, write_lmdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import GTSRB

from scq.data.cifar10 import read_batch
from scq.data.emoji import emoji_group, emoji_split
from scq.data.lmdb_file import LmdbFile
from scq.data.lsun import LARGEST_RATIO
from scq.data.source import FolderSource
from scq.data.sources import open_source
from scq.data.transforms import decode
from scq.engine.errors import BadImage, DataError


def listed(source):
    return [(key, label) for key, _, label in source]


def test_folder_takes_classes_from_sub_folders_in_sorted_order(tmp_path):
    write_folder(tmp_path, 6, classes=("dogs", "cats"))
    (tmp_path / "cats" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "cats" / "deep" / "er" / "x.PNG").write_bytes(encoded(photo(1), "PNG"))
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    (tmp_path / "cats" / "._photo.jpg").write_text("left by macOS")
    source = open_source("folder", tmp_path)
    assert source.class_names == ("cats", "dogs")
    assert len(source) == 7
    assert listed(source)[:4] == [
        ("cats/photo.0001.png", 0),
        ("cats/photo.0003.jpg", 0),
        ("cats/photo.0005.webp", 0),
        ("cats/deep/er/x.PNG", 0),
    ]
    assert {label for key, label in listed(source) if key.startswith("dogs")} == {1}


def test_folder_without_sub_folders_has_no_classes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo(1), "PNG"))
    assert open_source("folder", tmp_path).class_names == ()
    write_folder(tmp_path, 2)  # images beside sub-folders: no classes either
    source = open_source("folder", tmp_path)
    assert (source.class_names, len(source)) == ((), 3)


def test_folder_with_splits_asks_which_one(tmp_path):
    write_folder(tmp_path / "train", 4)
    write_folder(tmp_path / "test", 2)
    with pytest.raises(DataError, match=r"are splits, not classes \(test, train\): choose one with --split"):
        open_source("folder", tmp_path)
    assert len(open_source("folder", tmp_path, "train")) == 4
    with pytest.raises(DataError, match="no sub-folder 'val'"):
        open_source("folder", tmp_path, "val")


def test_folder_follows_links_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "real", 2)
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "circle").symlink_to(root)
    assert len(open_source("folder", root)) == 2


def write_odd_files(folder):
    """What is no image for one reason or another; reading the pipe would wait forever."""
    (folder / "a.txt").write_text("no image")
    (folder / "b.docx").write_text("no image")
    (folder / "c.DOCX").write_text("no image")
    (folder / "README").write_text("no image")
    (folder / ".hidden.png").write_text("left by something")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.png"))
    (folder / "nowhere.png").symlink_to("nothing")
    (folder / "circle.png").symlink_to("circle.png")
    return {".docx": 2, ".txt": 1, "no suffix": 1, "hidden": 1, "no plain file": 2, "broken link": 2}


def test_what_is_no_image_is_counted_and_never_opened(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos", 4)
    monkeypatch.chdir(tmp_path / "photos" / "cats")  # a socket's path has to be short
    odd = write_odd_files(Path())
    source = open_source("folder", tmp_path / "photos")
    assert (len(source), len(listed(source)), source.class_names) == (4, 4, ("cats", "dogs"))
    assert source.passed_over() == odd
    shutil.copy(EMOJI_FILES[0], "1f600.png")
    emoji = open_source("emoji", tmp_path / "photos" / "cats")
    assert emoji.passed_over() == odd | {".jpg": 1, ".webp": 1}
    assert len(listed(emoji)) == len(emoji) == 1


def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path):
    write_folder(tmp_path, 2)
    source = open_source("folder", tmp_path)
    (entry, *_) = source.entries()
    Path(entry.where).unlink()
    os.mkfifo(entry.where)
    with pytest.raises(DataError, match=r"photo.0000.jpg' is not a file"):
        source.load(entry)
    with pytest.raises(DataError, match="is not a file"):
        read_batch(Path(entry.where))


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    with (tmp_path / "disk.png").open("wb") as file:
        file.truncate(2**31)
    source = open_source("folder", tmp_path)
    with pytest.raises(BadImage, match="has 2,147,483,648 bytes"):
        source.load(next(source.entries()))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 4)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "dogs":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"folder '.*dogs' cannot be read: Permission denied"):
        open_source("folder", tmp_path)


def test_heic_is_read_where_it_can_be(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(photo(1)).save(tmp_path / "IMG_0001.HEIC")
    source = open_source("folder", tmp_path)
    ((key, data, _),) = source
    assert key == "IMG_0001.HEIC"
    assert np.abs(np.asarray(decode(data)).astype(int) - np.asarray(photo(1))).mean() < 5


@pytest.mark.parametrize("format", ["folder", "lsun", "cifar10", "gtsrb", "emoji"])
def test_missing_and_empty_paths_are_named(format, tmp_path):
    with pytest.raises(DataError, match="nowhere' does not exist"):
        open_source(format, tmp_path / "nowhere")
    with pytest.raises(DataError, match=str(tmp_path)):
        open_source(format, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file' is not a folder"):
        open_source(format, tmp_path / "file")


def test_unknown_format_lists_what_exists():
    with pytest.raises(DataError, match="'imagenet'; choose one of: folder, lsun, cifar10, gtsrb, emoji"):
        open_source("imagenet", ".")


def test_lsun_reads_keys_in_order_and_bytes_untouched(tmp_path):
    values = {f"{i:040x}".encode(): encoded(photo(i), ("WEBP", "JPEG")[i % 2]) for i in (9, 3, 300, 41)}
    directory = write_lmdb(tmp_path / "church_outdoor_val_lmdb", values)
    source = open_source("lsun", directory)
    assert [(key.encode(), data) for key, data, _ in source] == sorted(values.items())
    assert source.class_names == ()
    around = open_source("lsun", tmp_path, "val")
    assert len(around) == 4
    assert len(pickle.loads(pickle.dumps(around))) == 4
    with pytest.raises(DataError, match="is the other split"):
        open_source("lsun", directory, "train")
    with pytest.raises(DataError, match=r"neither data.mdb nor a folder \*train_lmdb"):
        open_source("lsun", tmp_path, "train")


def test_lsun_zip_as_downloaded(tmp_path):
    values = {f"{i:040x}".encode(): encoded(photo(i), "WEBP") for i in range(5)}
    directory = write_lmdb(tmp_path / "made" / "church_outdoor_val_lmdb", values)
    archive = tmp_path / "church_outdoor_val_lmdb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(directory / "data.mdb", "../church_outdoor_val_lmdb/data.mdb")
        zipped.writestr("../evil.txt", "written outside")
    source = open_source("lsun", archive)
    assert [(key.encode(), data) for key, data, _ in source] == sorted(values.items())
    unpacked = tmp_path / "church_outdoor_val_lmdb" / "data.mdb"
    before = unpacked.stat().st_mtime_ns
    assert len(open_source("lsun", archive)) == 5
    assert unpacked.stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["church_outdoor_val_lmdb", archive.name, "made"]
    whole = archive.read_bytes()
    shutil.rmtree(unpacked.parent)
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"church_outdoor_val_lmdb.zip' is damaged"):
        open_source("lsun", archive)
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("readme.txt", "nothing here")
    with pytest.raises(DataError, match=r"holds 0 files data.mdb, not one"):
        open_source("lsun", archive)


def test_lsun_with_a_damaged_file_is_named(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(DataError, match=r"data.mdb' is not a readable LMDB file"):
        open_source("lsun", tmp_path)


def lmdb_values(directory):
    with lmdb.open(str(directory), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return [(bytes(key), bytes(value)) for key, value in transaction.cursor()]


def test_lmdb_files_are_read_as_lmdb_reads_them(tmp_path):
    draw = random.Random(0)
    with lmdb.open(str(tmp_path), map_size=2**26) as environment:
        for _ in range(6):  # several transactions, with deletions, so that pages are freed and used again
            with environment.begin(write=True) as transaction:
                for i in range(120):
                    value = draw.randbytes(draw.choice([0, 1, 100, 2000, 2040, 4000, 5000, 20000]))
                    transaction.put(draw.randbytes(draw.randint(1, 200)), value)
                    cursor = transaction.cursor()
                    if i % 3 == 0 and cursor.set_range(draw.randbytes(2)):
                        cursor.delete()
    opened = LmdbFile(tmp_path / "data.mdb")
    read = [(key, opened.read(value)) for key, value in opened.items()]
    assert len(read) > 400
    assert read == lmdb_values(tmp_path)
    with lmdb.open(str(tmp_path), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        transaction.drop(environment.open_db())
    assert list(LmdbFile(tmp_path / "data.mdb").items()) == []


@pytest.fixture(scope="module")
def sound_lmdb(tmp_path_factory):
    values = {f"{i:040x}".encode(): encoded(photo(i), "WEBP") for i in range(150)}
    return write_lmdb(tmp_path_factory.mktemp("lmdb") / "sound", values) / "data.mdb"


def read_all(path):
    """Read a data.mdb as packing does. A signal would end the tests; any other error than these fails them."""
    try:
        source = open_source("lsun", path.parent)
        for entry in source.entries():
            with contextlib.suppress(BadImage):
                source.load(entry)
    except DataError as error:
        return str(error)
    return None


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_lmdb_never_ends_in_more_than_one_line(data, sound_lmdb, tmp_path_factory):
    mutated = bytearray(sound_lmdb.read_bytes())
    where = st.one_of(st.integers(0, 8191), st.integers(0, len(mutated) - 1))  # half of them in the two meta pages
    for _ in range(data.draw(st.integers(1, 4))):
        at, junk = data.draw(where), data.draw(st.binary(min_size=1, max_size=12))
        mutated[at : at + len(junk)] = junk
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "data.mdb").write_bytes(mutated[: data.draw(st.just(len(mutated)) | st.integers(0, len(mutated)))])
    assert "\n" not in (read_all(folder / "data.mdb") or "")


def test_an_lmdb_with_overwritten_or_missing_pages_is_named(sound_lmdb, tmp_path):
    sound, page = sound_lmdb.read_bytes(), 4096
    cases = [(sound[: len(sound) // 2], "truncated|ends at byte")]
    for number in range(2, len(sound) // page):
        kind = int.from_bytes(sound[page * number + 10 : page * number + 12], "little")
        if kind in (1, 2):  # a page of the tree
            cases.append((sound[: page * number] + b"\xff" * page + sound[page * (number + 1) :], "was overwritten"))
            cases.append(
                (sound[: page * number] + sound[2 * page : 3 * page] + sound[page * (number + 1) :], "damaged")
            )
    assert len(cases) > 4
    for number, (content, words) in enumerate(cases):
        if content != sound:
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "data.mdb").write_bytes(content)
            assert re.search(words, read_all(tmp_path / str(number) / "data.mdb"))


def test_an_lmdb_whose_pages_lead_in_a_circle_ends(sound_lmdb, tmp_path):
    content = bytearray(sound_lmdb.read_bytes())
    (root,) = {int.from_bytes(content[at + 128 : at + 136], "little") for at in (0, 4096)} - {2**64 - 1}
    start = int.from_bytes(content[4096 * root + 16 : 4096 * root + 18], "little")  # the first node leads to the root
    content[4096 * root + start : 4096 * root + start + 6] = root.to_bytes(6, "little")
    (tmp_path / "data.mdb").write_bytes(content)
    assert "in a circle" in read_all(tmp_path / "data.mdb")


def zip_with(archive, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(archive, "w", method) as zipped:
        zipped.writestr(zipfile.ZipInfo("data.mdb", (1980, 1, 1, 0, 0, 0)), content, method)
    return bytearray(archive.read_bytes())


def test_a_zip_that_cannot_be_unpacked_is_one_line(sound_lmdb, tmp_path):
    archive = tmp_path / "church_train_lmdb.zip"
    sound = zip_with(archive, sound_lmdb.read_bytes())
    central = sound.index(b"PK\x01\x02")
    for local, also, value, words in (
        (6, 8, 1, "encrypted"),
        (8, 10, 97, "compression method"),
        (8, 10, 14, "is damaged|cannot be unpacked"),
        (10, 12, 0xFFFF, None),  # a time and a date that do not exist harm nothing
        (12, 14, 0, None),
    ):
        changed = bytearray(sound)
        for at in (local, central + also):
            changed[at : at + 2] = value.to_bytes(2, "little")
        archive.write_bytes(changed)
        if words:
            with pytest.raises(DataError, match=words) as caught:
                open_source("lsun", archive)
            assert "\n" not in str(caught.value)
        else:
            assert len(open_source("lsun", archive)) == 150
            shutil.rmtree(archive.with_suffix(""))
    zip_with(archive, bytes(2**21 * LARGEST_RATIO // 100))
    with pytest.raises(DataError, match="which no images do"):
        open_source("lsun", archive)
    assert not archive.with_suffix("").exists()


def test_another_archive_of_equal_size_is_unpacked_again(tmp_path):
    archive = tmp_path / "church_train_lmdb.zip"
    for colour in "red", "blue":
        image = encoded(Image.new("RGB", (8, 8), colour), "BMP")
        directory = write_lmdb(tmp_path / colour, {b"0": image})
        zip_with(archive, (directory / "data.mdb").read_bytes())
        assert [data for _, data, _ in open_source("lsun", archive)] == [image]
        os.utime(tmp_path / "church_train_lmdb" / "data.mdb", (1, 1))


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did when CIFAR-10 was made: both as byte strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def cifar_batch(path: Path, numbers: range, python3: bool) -> np.ndarray:
    images = np.stack([np.asarray(photo(i).resize((32, 32))) for i in numbers])
    rows = images.transpose(0, 3, 1, 2).reshape(len(numbers), -1)
    labels = [i % 10 for i in numbers]
    if path.suffix == ".bin":
        path.write_bytes(np.c_[np.uint8(labels), rows].tobytes())
    else:
        batch = {"batch_label": "testing", "labels": labels, "data": rows, "filenames": [f"{i}.png" for i in numbers]}
        buffer = io.BytesIO()
        (pickle.Pickler(buffer, 4) if python3 else Python2Pickler(buffer, 2)).dump(batch)
        path.write_bytes(buffer.getvalue())
    return images


@pytest.mark.parametrize("layout", ["py2", "py3", "bin"])
def test_cifar10_batches(layout, tmp_path):
    directory = tmp_path / ("cifar-10-batches-bin" if layout == "bin" else "cifar-10-batches-py")
    directory.mkdir()
    suffix = ".bin" if layout == "bin" else ""
    expected = [
        cifar_batch(directory / f"data_batch_{b}{suffix}", range(4 * b, 4 * b + 4), layout == "py3")
        for b in range(1, 6)
    ]
    source = open_source("cifar10", tmp_path)
    assert len(source) == 20
    assert source.class_names[3] == "cat"
    assert np.array_equal([np.asarray(decode(image)) for _, image, _ in source], np.concatenate(expected))
    assert listed(source)[0] == ("data_batch_1/00000", 4)
    with pytest.raises(DataError, match="holds neither CIFAR-10 batches"):
        open_source("cifar10", tmp_path, "test")
    (directory / f"data_batch_4{suffix}").unlink()
    with pytest.raises(DataError, match=rf"data_batch_4{suffix}' is missing"):
        open_source("cifar10", tmp_path)


def test_a_cifar10_folder_is_not_walked_for_every_image(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        for i in range(3):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "train" / name / f"{i}.png")
    source = open_source("cifar10", tmp_path, "train")
    monkeypatch.setattr(FolderSource, "__len__", lambda self: pytest.fail("counting walks the whole folder"))
    assert len([source.load(entry) for entry in source.entries()]) == 6


def test_cifar10_as_an_image_folder(tmp_path):
    write_folder(tmp_path / "test", 4, classes=("airplane", "cat"))
    source = open_source("cifar10", tmp_path, "test")
    assert (len(source), source.class_names) == (4, ("airplane", "cat"))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_batch_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(DataError, match="which no CIFAR-10 batch does"):
        open_source("cifar10", tmp_path, "test")
    assert not (tmp_path / "evil").exists()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_batch_ends_in_no_other_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("batch") / "test_batch"
    cifar_batch(path, range(2), python3=data.draw(st.booleans()))
    mutated = bytearray(path.read_bytes())
    edges = st.integers(0, 200) | st.integers(len(mutated) - 200, len(mutated) - 1)  # outside of the pixels
    for _ in range(data.draw(st.integers(1, 3))):
        at, junk = data.draw(edges), data.draw(st.binary(min_size=1, max_size=8))
        mutated[at : at + len(junk)] = junk
    path.write_bytes(mutated)
    with contextlib.suppress(DataError):
        read_batch(path)


def test_a_batch_takes_no_memory_that_its_bytes_only_ask_for(tmp_path):
    (tmp_path / "test_batch").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")  # a memo of 2**31 places
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32));"
    read = "from pathlib import Path; from scq.data.cifar10 import read_batch; read_batch(Path('test_batch'))"
    done = subprocess.run([sys.executable, "-c", limited + read], cwd=tmp_path, capture_output=True, text=True)
    assert "is not a CIFAR-10 batch: TypeError" in done.stderr.splitlines()[-1]


def write_gtsrb(root: Path) -> Path:
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for label in (0, 7):
        directory = root / "Final_Training" / "Images" / f"{label:05d}"
        directory.mkdir(parents=True)
        for i in range(3):
            (directory / f"00000_{i:05d}.ppm").write_bytes(encoded(photo(i, 30 + i, 29), "PPM"))
        rows = "".join(f"00000_{i:05d}.ppm;{30 + i};29;5;5;24;24;{label}\n" for i in range(3))
        (directory / f"GT-{label:05d}.csv").write_text(head + rows)
    test = root / "Final_Test" / "Images"
    test.mkdir(parents=True)
    for i in range(4):
        (test / f"{i:05d}.ppm").write_bytes(encoded(photo(i, 40, 41), "PPM"))
    (test / "GT-final_test.test.csv").write_text(head.replace(";ClassId", "") + "00000.ppm;40;41;5;5;30;30\n")
    return root


def test_gtsrb_training_and_test_set(tmp_path):
    write_gtsrb(tmp_path / "GTSRB")
    source = open_source("gtsrb", tmp_path)
    assert len(source.class_names) == 43
    assert listed(source)[2:4] == [("00000/00000_00002.ppm", 0), ("00007/00000_00000.ppm", 7)]
    assert [decode(data).size for _, data, _ in source][:3] == [(30, 29), (31, 29), (32, 29)]
    with pytest.raises(DataError, match=r"GT-final_test.csv with the test labels is missing .*GTSRB_Final_Test_GT.zip"):
        open_source("gtsrb", tmp_path, "test")
    rows = "".join(f"{i:05d}.ppm;40;41;5;5;30;30;{40 + i % 3}\n" for i in range(4))
    (tmp_path / "GT-final_test.csv").write_text("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows)
    test = open_source("gtsrb", tmp_path, "test")
    assert listed(test) == [(f"{40 + i % 3:05d}/{i:05d}.ppm", 40 + i % 3) for i in range(4)]


def test_gtsrb_table_cannot_point_outside(tmp_path):
    table = write_gtsrb(tmp_path) / "Final_Training" / "Images" / "00000" / "GT-00000.csv"
    table.write_text(table.read_text().replace("00000_00001.ppm", "../../../secret.ppm"))
    with pytest.raises(DataError, match="not a plain file name"):
        len(open_source("gtsrb", tmp_path))


@pytest.mark.parametrize("root", ["", "gtsrb", "gtsrb/GTSRB"])
def test_gtsrb_as_torchvision_downloads_it(root, tmp_path):
    official = write_gtsrb(tmp_path / "gtsrb" / "GTSRB")
    (official / "Final_Training" / "Images").rename(official / "Training")
    (official / "Final_Training").rmdir()
    (official / "Readme-Images.txt").write_text("of the archive")
    (official / "Training" / "00007" / "GT-00007.csv").unlink()  # torchvision itself reads the folders' names alone
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text(head + "00001.ppm;40;41;5;5;30;30;12\n")
    train = open_source("gtsrb", tmp_path / root)
    assert listed(train) == [(f"{label:05d}/00000_{i:05d}.ppm", label) for label in (0, 7) for i in range(3)]
    assert (listed(open_source("gtsrb", tmp_path / root, "test")), train.passed_over()) == (
        [("00012/00001.ppm", 12)],
        {},
    )
    theirs = GTSRB(tmp_path, "train")._samples
    assert [path for path, _ in theirs] == [entry.where for entry in train.entries()]
    assert GTSRB(tmp_path, "test")._samples == [(str(official / "Final_Test" / "Images" / "00001.ppm"), 12)]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"Filename", b"Datei\xfc", "has no column Filename"),
        (b";ClassId", b"", "has no column ClassId: its columns are divided by ';'"),
        (b";", b",", "has no column ClassId and Filename"),
        (b";0\n", b";\n", "no class 0..42 for '00000_00000.ppm': ClassId is ''"),
        (b";0\n", b";" + b"9" * 6000 + b"\n", "no class 0..42"),
        (b";0\n", b";43\n", "ClassId is '43'"),
        (b";0\n", ";٣\n".encode(), "ClassId is '٣'"),
        (b"00000_00001.ppm", b"..", "not a plain file name"),
        (b"00000_00001.ppm", b"a\0.ppm", "not a plain file name|damaged"),
        (b"00000_00001.ppm", b"x" * 200_000, "is damaged: field larger"),
    ],
)
def test_a_wrong_gtsrb_table_is_one_line(old, new, words, tmp_path):
    table = write_gtsrb(tmp_path) / "Final_Training" / "Images" / "00000" / "GT-00000.csv"
    table.write_bytes(table.read_bytes().replace(old, new))
    with pytest.raises(DataError, match=words) as caught:
        open_source("gtsrb", tmp_path)
    assert str(table) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gtsrb_takes_names_in_any_encoding_and_needs_no_boxes(tmp_path):
    folder = write_gtsrb(tmp_path) / "Final_Training" / "Images" / "00000"
    latin = os.fsdecode(b"\xfc.ppm")
    (folder / "00000_00001.ppm").rename(folder / latin)
    table = folder / "GT-00000.csv"
    table.write_bytes(table.read_bytes().replace(b"00000_00001.ppm;31;29;5;5", b"\xfc.ppm;wide;-1;NaN;99999"))
    (folder / "stranger.ppm").write_bytes(b"in no table")
    source = open_source("gtsrb", tmp_path)
    assert [key for key, _ in listed(source)][1] == f"00000/{latin}"
    assert source.passed_over() == {"not in a table": 1}
    (folder / latin).unlink()
    with pytest.raises(DataError, match=r"ppm' cannot be read: No such file"):
        source.survey()


def test_emoji_groups_join_what_shows_the_same_picture():
    same = [
        ("1f44d-1f3fb", "1f44d-1f3ff", "1f44d"),
        ("1faf1-1f3fb-200d-1faf2-1f3fc", "1f91d-1f3fd", "1f91d"),
        ("1f468-1f3fb-200d-1f91d-200d-1f468-1f3fc", "1f46c-1f3fe", "1f46c"),
        ("1f469-1f3fb-200d-1f91d-200d-1f468-1f3fc", "1f46b"),
        ("1f9d1-1f3fb-200d-2764-fe0f-200d-1f9d1-1f3ff", "1f491-1f3fb", "1f491"),
        ("1f468-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3fb", "1f48f"),
        ("1f468-1f3fb-200d-1faef-200d-1f468-1f3fc", "1f93c-1f3fb-200d-2642-fe0f", "1f93c"),
        ("1f469-1f3fb-200d-1f430-200d-1f469-1f3fc", "1f46f-200d-2640-fe0f", "1f46f"),
        ("1f575-fe0f-200d-2642-fe0f", "1f575-1f3fb-200d-2642-fe0f"),
    ]
    for names in same:
        assert len({emoji_group(name) for name in names}) == 1, names
    assert emoji_group("1f469-1f3fb-200d-1f91d-200d-1f469-1f3fc") == "1f46d"
    assert emoji_group("1f468-200d-1f469-200d-1f467") == "1f9d1-1f9d1-1f9d2"


def test_no_emoji_group_crosses_the_split():
    train, test = open_source("emoji", "twemoji", "train"), open_source("emoji", "twemoji", "test")
    assert len(train) + len(test) == len(open_source("emoji", "twemoji")) == len(EMOJI_FILES)
    groups = [{emoji_group(entry.key) for entry in source.entries()} for source in (train, test)]
    assert not groups[0] & groups[1]
    assert 0.08 < len(groups[1]) / (len(groups[0]) + len(groups[1])) < 0.12
    assert emoji_split("1f600") == emoji_split("1f600-fe0f")


def test_no_emoji_picture_crosses_the_split():
    """By pixels, not names: no test picture is, pixel for pixel, a training picture under another name."""
    splits = {}
    for file in EMOJI_FILES:
        picture = np.asarray(Image.open(file).convert("RGBA")).copy()
        picture[picture[..., 3] == 0] = 0
        splits.setdefault(picture.tobytes(), set()).add(emoji_split(file.stem))
    crossing = [name for name, found in splits.items() if len(found) > 1]
    assert len(splits) > 3000
    assert not crossing
