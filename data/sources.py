"""The sources of images that scq reads, by the names of their formats."""

import os

from scq.data.cifar10 import Cifar10Source
from scq.data.emoji import EmojiSource
from scq.data.gtsrb import GtsrbSource
from scq.data.lsun import LsunSource
from scq.data.source import FolderSource, Source
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
    except OSError as error:
        raise DataError(f"'{error.filename or path}' cannot be read: {error.strerror}") from error
    if count == 0:
        raise DataError(f"no images found in '{path}' (format {format}" + (f", split {split})" if split else ")"))
    return source
