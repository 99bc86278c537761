"""What a bundle handed out, put together again: ``scq benchmark collect``."""

from __future__ import annotations

import io
import lzma
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from scq.engine.errors import UserError, first_line
from scq.engine.files import make_folder, open_plain, sha256_of, write_file
from scq.engine.plain_json import read_json
from scq.evaluation.bundle.run import INDEX

REPORT = "report.tar.xz"
_HANDED_OUT = "handed_out"  # in the benchmark's folder: every piece that has come back
_INSIDE = "run/"  # the benchmark's folder on the other machine


def collect(folders: Sequence[Path], out: Path) -> list[str]:
    """Write what has come back of a benchmark to ``out``, as if it had run there.

    Args:
        folders: what `evaluation.bundle.run` handed out, of one call or several, the newest last.
        out: the benchmark's folder. It keeps pieces of models until all of a model's have come.

    Returns:
        the pieces that have not come yet.

    Raises:
        UserError: a folder is not what was handed out, or a piece is damaged.
    """
    for folder in folders:
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} has no {INDEX}: name the folder that run.sh wrote with --results")
    make_folder(out / _HANDED_OUT)
    index: dict[str, Any] = {}
    for folder in folders:
        index = read_json(folder / INDEX, "fetch it again")
        with open_plain(folder / REPORT) as file:
            _extract(file, f"{folder / REPORT}", out)
        for piece in folder.glob("*.tar.xz.*"):
            shutil.copyfile(piece, out / _HANDED_OUT / piece.name)
    missing = []
    for entry in index.values():
        pieces = [(out / _HANDED_OUT / piece["name"], piece) for piece in entry["pieces"]]
        lacking = [piece["name"] for path, piece in pieces if not path.is_file()]
        missing += lacking
        if lacking:
            continue
        for path, piece in pieces:
            if sha256_of(path) != piece["sha256"]:
                raise UserError(f"{path} is damaged: fetch it again")
        _extract(io.BytesIO(b"".join(path.read_bytes() for path, _ in pieces)), pieces[0][0].stem, out)
    return missing


def _extract(file: IO[bytes], name: str, out: Path) -> None:
    """Write the files of an archive below ``out``; those of the benchmark's folder become those of ``out`` itself."""
    try:
        with tarfile.open(fileobj=file, mode="r:xz") as archive:
            for member in archive:
                path, stream = Path(member.name.removeprefix(_INSIDE)), archive.extractfile(member)
                if stream is None or ".." in path.parts or path.is_absolute():
                    raise UserError(f"{name} holds {member.name}, which no bundle hands out")
                write_file(out / path, stream.read())
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{name} cannot be read: {first_line(error)}") from error
