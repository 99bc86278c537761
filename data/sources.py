"""The sources of images that scq reads, by the names of their formats."""

import os
from collections.abc import Mapping

from scq.data.cifar10 import Cifar10Source
from scq.data.emoji import EmojiSource
from scq.data.gtsrb import GtsrbSource
from scq.data.lsun import LsunSource
from scq.data.source import FolderSource, Source
from scq.data.transforms import HEIF_SUFFIXES
from scq.engine.errors import DataError

FORMATS: dict[str, type[Source]] = {
    kind.format: kind for kind in (FolderSource, LsunSource, Cifar10Source, GtsrbSource, EmojiSource)
}


def open_source(format: str, path: str | os.PathLike, split: str | None = None) -> Source:
    """Open a source by the name of its format: folder, lsun, cifar10, gtsrb or emoji.

    Raises:
        DataError: the format or the split is unknown, the path is missing, or there are no images.
    """
    if format not in FORMATS:
        raise DataError(f"unknown source format '{format}'; choose one of: {', '.join(FORMATS)}")
    try:
        source = FORMATS[format](os.fspath(path), split)
        count = len(source)
        others = source.passed_over() if count == 0 else {}
    except OSError as error:
        raise DataError(f"'{error.filename or path}' cannot be read: {error.strerror}") from error
    if count == 0:
        where = f"(format {format}" + (f", split {split})" if split else ")")
        passed_over = f"; passed over: {in_words(others)}" if others else ""
        raise DataError(f"no images found in '{path}' {where}{passed_over}")
    return source


def in_words(passed_over: Mapping[str, int]) -> str:
    """What was passed over, and how phones' photographs are read where nothing reads them yet."""
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    heif = not HEIF_SUFFIXES and not passed_over.keys().isdisjoint((".heic", ".heif", ".hif"))
    return f"{counted} (pip install 'scq[heif]' reads HEIC)" if heif else counted
