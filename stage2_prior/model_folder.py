"""A complete model as a folder: the networks of both stages, the sampling settings, what was measured, and a card.

It is the folder of a diffusers pipeline. Its ``model_index.json`` names classes as ``scq`` exports them, so that
published models do not depend on the names of our modules.
"""

from __future__ import annotations

from pathlib import Path

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from scq.engine.errors import UserError, first_line
from scq.engine.files import write_file, write_json
from scq.engine.folders import read_unmixed, replaced_model
from scq.engine.measurements import Measured, to_plain
from scq.engine.network import read_config
from scq.stage1_tokenizer.model_folder import MEASURED, MODEL_CLASSES, load_tokenizer, read_measured
from scq.stage2_prior.model import Model
from scq.stage2_prior.model_card import model_card
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer

INDEX = "model_index.json"


def save_model(model: Model, folder: Path | str, measured: Measured) -> None:
    """Write every component, the index, and the card; the folder appears when it is complete.

    Raises:
        UserError: the folder holds anything but a model.
    """
    with replaced_model(folder, MODEL_CLASSES) as fresh:
        for name, network in model.networks().items():
            network.register_to_config(_name_or_path="")  # it is a path on this machine, which copies must not carry
            network.save_files(fresh / name)
        model.scheduler.save_pretrained(fresh / "scheduler")
        write_json(fresh / INDEX, model.index(), indent=2)
        write_card(model, fresh, measured)


def write_card(model: Model, folder: Path, measured: Measured) -> None:
    """Write README.md, and the measurements that it shows, to a model's folder."""
    write_json(folder / MEASURED, to_plain(measured))
    write_file(folder / "README.md", model_card(model, measured))


def model_root(folder: Path) -> Path | None:
    """The folder of a complete model: ``folder`` itself, or ``folder/model`` if it is a run; None if there is none."""
    return next((root for root in (folder, folder / "model") if (root / INDEX).is_file()), None)


def load_model(root: Path) -> tuple[Model, Measured]:
    """The model in ``root``, and what was measured of it: all of one model, even while another one replaces it.

    Raises:
        UserError: a component cannot be loaded.
    """
    return read_unmixed(root, lambda: _load(root))


def _load(root: Path) -> tuple[Model, Measured]:
    tokenizer = load_tokenizer(root / "tokenizer")
    if not (root / "prior").is_dir():  # a path such as model/prior could also be the name of a model on the hub
        raise UserError(f"{root} has no folder 'prior': the model is damaged, fetch or export it again")
    prior = MaskedTransformer.from_pretrained(root / "prior", local_files_only=True)
    # Not wherever there is a folder: a user's own files may be left in that of a refiner that is gone.
    refines = any((root / "refiner" / name).exists() for name in ("config.json", SAFETENSORS_WEIGHTS_NAME))
    refiner = ConvexRefiner.from_pretrained(root / "refiner", local_files_only=True) if refines else None
    settings = root / "scheduler" / UnmaskingScheduler.config_name
    plain = read_config(settings)  # diffusers would take a text in it for the name of a model, and look it up
    try:
        scheduler = UnmaskingScheduler.from_config(plain)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{settings} cannot be loaded: {first_line(error)}") from error
    return Model(tokenizer, prior, refiner, scheduler), read_measured(root)


def open_model(folder: Path | str) -> tuple[Model, Measured]:
    """The model in a model's or a run's folder (see `model_root`), and what was measured of it.

    Raises:
        UserError: there is none, or a component cannot be loaded.
    """
    root = model_root(Path(folder))
    if root is None:
        raise UserError(
            f"no model in {folder}: expected a folder that `scq train prior` or `scq quickstart` wrote (with {INDEX})"
        )
    return load_model(root)
