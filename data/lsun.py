"""LSUN in its own format: one LMDB file per category and split, or the zip it is downloaded as."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scq.data.source import Entry, Source, existing_directory
from scq.engine.errors import DataError
from scq.engine.files import atomic_write

_environments: dict[str, tuple[int, Any]] = {}  # directory -> (process id, LMDB environment)


def open_lmdb(directory: Path) -> Any:
    """The LMDB environment of a directory, read-only. LMDB allows one per process, which must not be used after a fork.

    Raises:
        DataError: data.mdb is not a readable LMDB file.
    """
    import lmdb

    path, process = os.path.realpath(directory), os.getpid()
    owner, environment = _environments.get(path, (process, None))
    if owner != process:
        environment.close()  # only this process's copy of its parent's mapping
    if environment is None or owner != process:
        try:
            environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise DataError(f"'{path}/data.mdb' is not a readable LMDB file: {error}") from error
        _environments[path] = (process, environment)
    return environment


def unpack(archive: Path) -> Path:
    """Extract data.mdb from a downloaded LSUN zip into a folder beside it that has the archive's name.

    Nothing else is extracted, and no name inside the archive decides where. A second call finds the file and stops.

    Returns:
        the folder.

    Raises:
        DataError: the archive is damaged or has no data.mdb, or the disk is full or not writable.
    """
    folder = archive.with_suffix("")
    target = folder / "data.mdb"
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [info for info in opened.infolist() if Path(info.filename).name == "data.mdb"]
            if len(members) != 1:
                raise DataError(f"'{archive}' is not an LSUN archive: it holds {len(members)} files data.mdb, not one")
            size = members[0].file_size
            if target.is_file() and target.stat().st_size == size:
                return folder
            free = shutil.disk_usage(archive.parent).free
            if free < size:
                raise DataError(f"unpacking '{archive}' needs {size:,} bytes on its disk, but only {free:,} are free")
            folder.mkdir(exist_ok=True)
            with opened.open(members[0]) as packed, atomic_write(target) as file:
                shutil.copyfileobj(packed, file, 2**20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"'{archive}' is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"'{archive}' cannot be unpacked into its own folder: {error.strerror}") from error
    return folder


class LsunSource(Source):
    """An LSUN category as it ships: <category>_<split>_lmdb/data.mdb, which maps ASCII keys to encoded images.

    Images are webp or jpeg. Source: github.com/fyu/lsun.

    Args:
        path: that folder; a folder around several of them, with a split; or the downloaded zip file, which is first
            unpacked beside itself.
        split: 'train' or 'val'; None if the path decides.

    Raises:
        DataError: the path holds no LSUN set, several of them, or the other split; or the archive cannot be unpacked.
    """

    format, default_crop = "lsun", "lsun-ldm"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split)
        zipped = Path(path).expanduser()
        directory = unpack(zipped) if zipped.suffix == ".zip" and zipped.is_file() else existing_directory(path)
        self.directory = self._find(directory, split)

    def _find(self, directory: Path, split: str | None) -> Path:
        if (directory / "data.mdb").is_file():
            name = directory.resolve().name
            other = {"train": "_val_lmdb", "val": "_train_lmdb"}.get(split or "")
            if other and name.endswith(other):
                raise DataError(f"split '{split}' was asked for, but '{self.path}' is the other split")
            return directory
        found = sorted(p for p in directory.glob(f"*{split or ''}_lmdb") if (p / "data.mdb").is_file())
        if len(found) == 1:
            return found[0]
        if not found:
            raise DataError(f"'{self.path}' holds no LSUN data: neither data.mdb nor a folder *{split or ''}_lmdb")
        names = ", ".join(p.name for p in found)
        raise DataError(f"'{self.path}' holds several LSUN sets ({names}): give the path of one of them")

    def __len__(self) -> int:
        return open_lmdb(self.directory).stat()["entries"]

    def entries(self) -> Iterator[Entry]:
        with open_lmdb(self.directory).begin() as transaction:
            for key in transaction.cursor().iternext(values=False):
                yield Entry(bytes(key).decode("ascii", "backslashreplace"), 0, bytes(key))

    def load(self, entry: Entry) -> bytes:
        with open_lmdb(self.directory).begin() as transaction:
            value = transaction.get(entry.where)
        if value is None:
            raise OSError(f"key '{entry.key}' vanished from {self.directory / 'data.mdb'}")
        return value
