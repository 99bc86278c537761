"""What the commands share: their parser, common options, the device."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from scq.engine import files
from scq.engine.errors import UserError

LARGEST = 2**31 - 1  # of the whole numbers that a command is given


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows an option's default where there is one: not for a flag, an empty list, or what has to be given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False or action.default == []
        return action.help if unset else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --debug for every command, and one-line messages for mistakes."""

    def __init__(self, **keywords: Any):
        keywords.setdefault("formatter_class", HelpFormatter)
        super().__init__(**keywords)
        # Suppressed, not False: a sub-command's default would undo a --debug that was given before it.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the full traceback of an error"
        )

    def error(self, message: str) -> None:
        print(f"scq: {message}; see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(2)


def command(
    commands: Any, name: str, run: Any, help: str, description: str = "", keep_freed_memory: bool = True
) -> Parser:
    """Add a command that calls ``run(options)``; its help begins with ``help`` as a sentence, then ``description``.

    Args:
        keep_freed_memory: see `scq.engine.memory.keep_freed_memory`; not for a server.
    """
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {description}")
    parser.set_defaults(run=run, keep_freed_memory=keep_freed_memory)
    return parser


def add_model(parser: argparse.ArgumentParser, help: str, embedded: bool = False) -> None:
    """Add --model; with ``embedded``, the model that comes with the package is its default."""
    if embedded:
        help = f"{help}; by default, the small one that comes with the package"
    parser.add_argument("--model", type=Path, required=not embedded, help=f"folder of {help}")


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    if (number := natural(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def natural(text: str) -> int:
    """A whole number of at least 0, as the type of an argument."""
    if not text.isdecimal():  # "²" is a digit that Python does not read
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    if len(text) > 10 or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:12]!r} is more than {LARGEST}")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0, as the type of an argument."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def port_number(text: str) -> int:
    """A whole number from 1 to 65535, as the type of an argument."""
    if not text.isdecimal() or len(text) > 5 or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 1 to 65535")
    return int(text)


def config_file(text: str) -> Path:
    """A config: the user's own file, or else one of the package, such as ``configs/cifar10/prior.yaml``."""
    from scq.engine.config import PACKAGE

    own, packaged = Path(text), PACKAGE / text
    return packaged if not own.exists() and packaged.is_file() else own


def device() -> str:
    """The device to compute on: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UserError: it cannot be created.
    """
    try:
        files.make_folder(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or os.strerror(error.errno)}") from error


def check_writable(file: Path) -> None:
    """Make sure, before long work, that a file can be written at its end; an existing file stays as it is.

    Raises:
        UserError: the file cannot be written.
    """
    if file.is_dir():
        raise UserError(f"cannot write to {file}: it is a folder")
    make_folder(file.parent)
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {file}: {error.strerror}") from error


def say_once(text: str) -> None:
    """Print a result, from the main process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(text)
