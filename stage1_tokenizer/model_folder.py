"""Networks as folders: saving a network with what was measured of it, and finding and loading a tokenizer."""

from __future__ import annotations

from pathlib import Path

from scq.engine.errors import UserError
from scq.engine.files import write_json
from scq.engine.folders import read_unmixed, replaced_model
from scq.engine.measurements import Measured, from_plain, to_plain
from scq.engine.network import Network, weight_files
from scq.engine.plain_json import read_json
from scq.stage1_tokenizer.autoencoder import ImageTokenizer

# The classes that the project saves. A new model may replace a folder with a model of one of them, and nothing else.
MODEL_CLASSES = frozenset(["ImageTokenizer", "MaskedTransformer", "ConvexRefiner", "SoftConvexPipeline"])
MEASURED = "measured.json"


def save_network(network: Network, folder: Path, measured: Measured | None = None) -> None:
    """Save one network so that ``folder`` is never seen half-written.

    Raises:
        UserError: ``folder`` holds anything but a model.
    """
    with replaced_model(folder, MODEL_CLASSES) as fresh:
        network.save_files(fresh)
        if measured is not None:
            write_json(fresh / MEASURED, to_plain(measured))


def read_measured(folder: Path) -> Measured:
    """What was measured of the model in ``folder``; an empty `Measured` if it was not recorded.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / MEASURED
    if not path.is_file():
        return Measured()
    return from_plain(
        Measured, read_json(path, "delete it, and the model's card will lack what was measured"), str(path)
    )


def find_tokenizer(path: Path | str) -> Path:
    """The folder with a tokenizer's weights: ``path`` itself, or a folder in it if it is a pipeline or a run.

    Raises:
        UserError: there is no tokenizer in ``path``.
    """
    path = Path(path)
    for folder in (path, path / "tokenizer", path / "model", path / "model" / "tokenizer"):
        if weight_files(folder):
            return folder
    raise UserError(f"no tokenizer in {path}: expected a folder that `scq train tokenizer` or `scq train prior` wrote")


def load_tokenizer(path: Path | str) -> ImageTokenizer:
    """The tokenizer in ``path`` (see `find_tokenizer`), in eval mode.

    Raises:
        UserError: there is no tokenizer in ``path``, or it cannot be loaded.
    """
    folder = find_tokenizer(path)
    return read_unmixed(folder, lambda: ImageTokenizer.from_pretrained(folder, local_files_only=True))


def tokenizer_measured(path: Path | str) -> Measured:
    """What was measured of the tokenizer in ``path``, recorded in its own folder or in that of its pipeline.

    Raises:
        UserError: there is no tokenizer in ``path``, or the file is damaged.
    """
    folder = find_tokenizer(path)
    return read_measured(folder if (folder / MEASURED).is_file() else folder.parent)
