"""Each source format against small sets in the layout people have on disk."""

import io
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from data_samples import EMOJI_FILES, encoded, photo, write_folder, write_lmdb
from PIL import Image

from scq.data.emoji import emoji_group, emoji_split
from scq.data.source import FolderSource
from scq.data.sources import open_source
from scq.data.transforms import decode
from scq.engine.errors import DataError


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
