"""LSUN in its own format: one LMDB file per category and split, or the zip it is downloaded as."""

import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from scq.data.lmdb_file import LmdbFile
from scq.data.source import Entry, Source, existing_directory
from scq.engine.errors import DataError
from scq.engine.files import atomic_write, expand_home, make_folder

LARGEST_RATIO = 100  # of unpacked to packed bytes; encoded images hardly shrink


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
            (member,) = members
            if _is_unpacked(member, archive, target):
                return folder
            if member.file_size > LARGEST_RATIO * member.compress_size:
                raise DataError(f"'{archive}' would unpack to {member.file_size:,} bytes, which no images do")
            free = shutil.disk_usage(archive.parent).free
            if free < member.file_size:
                needed = f"{member.file_size:,} bytes on its disk, but only {free:,} are free"
                raise DataError(f"unpacking '{archive}' needs {needed}")
            make_folder(folder)
            with opened.open(member) as packed, atomic_write(target) as file:
                shutil.copyfileobj(packed, file, 2**20)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{archive}' is damaged: {error}") from error
    except RuntimeError as error:  # it is encrypted, or compressed in a way that zipfile does not know
        raise DataError(f"'{archive}' cannot be unpacked: {error}") from error
    except OSError as error:
        raise DataError(f"'{archive}' cannot be unpacked into its own folder: {error.strerror or error}") from error
    return folder


def _is_unpacked(member: zipfile.ZipInfo, archive: Path, target: Path) -> bool:
    """Whether this very file was unpacked before; its contents are compared if the archive is the newer one."""
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    if target.stat().st_mtime_ns >= archive.stat().st_mtime_ns:
        return True
    checksum = 0
    with target.open("rb") as file:
        while piece := file.read(2**20):
            checksum = zlib.crc32(piece, checksum)
    return checksum == member.CRC


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
        zipped = expand_home(path)
        is_zip = zipped.suffix == ".zip" and zipped.is_file()
        data = self._find(unpack(zipped) if is_zip else existing_directory(path), split) / "data.mdb"
        self.archive = zipped if is_zip else data
        self._file = LmdbFile(data)
        self._count: int | None = None

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
        if self._count is None:
            self._count = sum(1 for _ in self._file.items())  # which finds a damaged file before any work
        return self._count

    def files(self) -> Iterator[tuple[str, Path]]:
        yield self.archive.name, self.archive

    def entries(self) -> Iterator[Entry]:
        for key, value in self._file.items():
            yield Entry(key.decode("ascii", "backslashreplace"), 0, value)

    def load(self, entry: Entry) -> bytes:
        return self._file.read(entry.where)
