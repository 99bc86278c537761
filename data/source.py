"""What a source of images is, and the simplest one: a folder.

A source yields (key, label, where) for every image, and loads single images on demand. It is cheap to copy into worker
processes: it holds paths and names, never pixels, and opens files only to read them. Entries come in one fixed order,
so that packing is a pure function of the source.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from scq.engine.errors import DataError

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif",
))
# fmt: on
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


class Entry(NamedTuple):
    """One image of a source: its key (unique, shown to people), its label (0 without classes), and its location."""

    key: str
    label: int
    where: Any


class Source(ABC):
    """A set of images in a fixed order.

    Attributes:
        format: its name, as in `scq data pack --format`.
        default_crop: the crop protocol that is usual for this format, see data.transforms.
        path: as given.
        split: its name; None for the whole set.
        class_names: by label; empty if the set has no classes.
    """

    format: str
    default_crop: str

    def __init__(self, path: str, split: str | None):
        self.path, self.split = path, split
        self.class_names: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """The number of entries, readable or not."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """The entries in their fixed order, without reading any image."""

    @abstractmethod
    def load(self, entry: Entry) -> bytes | Image.Image:
        """The encoded bytes of the entry, or its image if the source stores raw pixels.

        Raises:
            OSError: the entry cannot be read.
        """

    def __iter__(self) -> Iterator[tuple[str, bytes | Image.Image, int]]:
        """Yield (key, encoded bytes or image, label)."""
        for entry in self.entries():
            yield entry.key, self.load(entry), entry.label


def existing_directory(path: str) -> Path:
    """The path as a directory, with a leading ~ expanded.

    Raises:
        DataError: it does not exist, or is not a folder.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        raise DataError(f"source '{path}' does not exist")
    if not directory.is_dir():
        raise DataError(f"source '{path}' is not a folder")
    return directory


class FolderSource(Source):
    """All images below a folder, in sorted order; its direct sub-folders are the classes.

    If there are images beside the sub-folders, or no sub-folders, the set has no classes. Hidden files are ignored, and
    so are files without an image suffix.

    Args:
        path: the folder.
        split: the sub-folder to take as the root; None for the folder itself.

    Raises:
        DataError: the folder or the split does not exist, or the sub-folders are splits and none was chosen.
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
        if real in parents:  # following a symbolic link to a parent would never end
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
