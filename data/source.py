"""What a source of images is, and the simplest one: a folder.

A source yields (key, label, where) for every image, and loads single images on demand. It is cheap to copy into worker
processes: it holds paths and names, never pixels, and opens files only to read them. Entries come in one fixed order,
so that packing is a pure function of the source.
"""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from scq.data.storage import with_retries
from scq.data.transforms import HEIF_SUFFIXES
from scq.engine.errors import BadImage, DataError
from scq.engine.files import expand_home, open_at_once

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif",
)) | HEIF_SUFFIXES
# fmt: on
LARGEST_FILE = 2**30  # bytes of one image; what is larger is none, and need not be read
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


class Entry(NamedTuple):
    """One image of a source: its key (unique, shown to people), its label (0 without classes), and its location."""

    key: str
    label: int
    where: Any


class Files(NamedTuple):
    """What the files of a source are, without reading them: another set has others.

    Attributes:
        bytes: of all of them.
        names_and_sizes: a sha256.
        times: a sha256 of when each was last written. A copy of the source may differ in it.
        newest: the name of the file that was written last; empty without files.
    """

    bytes: int
    names_and_sizes: str
    times: str
    newest: str


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
            BadImage: something is wrong with the image itself.
            OSError: it cannot be read now, which says nothing about the image.
            DataError: it cannot be read for good.
        """

    def files(self) -> Iterator[tuple[str, Path]]:
        """The name and the path of every file that the set is made of, in a fixed order; none are known by default."""
        yield from ()

    def passed_over(self) -> Counter[str]:
        """How many files beside the images are not taken, by suffix or by another reason."""
        return Counter()

    def survey(self) -> Files:
        """Look at every file without reading it.

        Raises:
            DataError: one is missing, or is no file.
        """
        total, names, times, newest = 0, hashlib.sha256(), hashlib.sha256(), (0, "")
        for name, path in self.files():
            found = with_retries(path.stat, f"'{path}'")
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"'{path}' is not a file")
            total += found.st_size
            names.update(os.fsencode(name) + b"\0%d\n" % found.st_size)
            times.update(os.fsencode(name) + b"\0%d\n" % found.st_mtime_ns)
            newest = max(newest, (found.st_mtime_ns, name))
        return Files(total, names.hexdigest(), times.hexdigest(), newest[1])

    def __iter__(self) -> Iterator[tuple[str, bytes | Image.Image, int]]:
        """Yield (key, encoded bytes or image, label)."""
        for entry in self.entries():
            yield entry.key, self.load(entry), entry.label


def existing_directory(path: str) -> Path:
    """The path as a directory, with a leading ~ expanded.

    Raises:
        DataError: it does not exist, or is not a folder.
    """
    directory = expand_home(path)
    if not directory.exists():
        raise DataError(f"source '{path}' does not exist")
    if not directory.is_dir():
        raise DataError(f"source '{path}' is not a folder")
    return directory


class Listing(NamedTuple):
    """What is in one folder, each sorted by name: sub-folders and image files, and how much else there is."""

    folders: list[Path]
    images: list[Path]
    passed_over: Counter[str]


def list_folder(folder: Path) -> Listing:
    """List a folder without its sub-folders; a hidden file or folder is passed over, and so is what is no plain file.

    Raises:
        DataError: it cannot be read.
    """

    def read() -> Listing:
        listing = Listing([], [], Counter())
        with os.scandir(folder) as found:
            for entry in sorted(found, key=lambda each: each.name):
                path = Path(entry.path)
                if entry.name.startswith("."):
                    listing.passed_over["hidden"] += 1
                elif entry.is_symlink() and not path.exists():  # it leads nowhere, or to itself
                    listing.passed_over["broken link"] += 1
                elif entry.is_dir():
                    listing.folders.append(path)
                elif not entry.is_file():  # reading a pipe would wait forever
                    listing.passed_over["no plain file"] += 1
                elif path.suffix.lower() in IMAGE_SUFFIXES:
                    listing.images.append(path)
                else:
                    listing.passed_over[path.suffix.lower() or "no suffix"] += 1
        return listing

    return with_retries(read, f"folder '{folder}'")


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImage: it is larger than LARGEST_FILE.
        DataError: it is a pipe, a socket or a device.
        OSError: it cannot be read now.
    """
    with open(path, "rb", opener=open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"'{path}' is not a file")
        if found.st_size > LARGEST_FILE:
            raise BadImage(f"has {found.st_size:,} bytes, more than an image has")
        return file.read()


class FolderSource(Source):
    """All images below a folder, in sorted order; its direct sub-folders are the classes.

    If there are images beside the sub-folders, or no sub-folders, the set has no classes. What is hidden, is no plain
    file, or has no image suffix is passed over and counted.

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
        top = list_folder(self.root)
        names = {folder.name.lower() for folder in top.folders}
        if not top.images and len(names) > 1 and names <= SPLIT_NAMES:
            found = ", ".join(folder.name for folder in top.folders)
            raise DataError(f"the sub-folders of '{path}' are splits, not classes ({found}): choose one with --split")
        if top.folders and not top.images:
            self.class_names = tuple(d.name for d in top.folders if any(found.images for found in self._walk(d)))

    def _walk(self, folder: Path, parents: frozenset[str] = frozenset()) -> Iterator[Listing]:
        real = os.path.realpath(folder)
        if real in parents:  # following a symbolic link to a parent would never end
            return
        listing = list_folder(folder)
        yield listing
        for child in listing.folders:
            yield from self._walk(child, parents | {real})

    def __len__(self) -> int:
        return sum(len(listing.images) for listing in self._walk(self.root))

    def files(self) -> Iterator[tuple[str, Path]]:
        for listing in self._walk(self.root):
            for image in listing.images:
                yield image.relative_to(self.root).as_posix(), image

    def passed_over(self) -> Counter[str]:
        return sum((listing.passed_over for listing in self._walk(self.root)), Counter())

    def entries(self) -> Iterator[Entry]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        for name, path in self.files():
            yield Entry(name, labels.get(name.split("/", 1)[0], 0), str(path))

    def load(self, entry: Entry) -> bytes:
        return read_file(entry.where)
