"""The parts of a pipeline that lie in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from sampling.hub import first_line, from_hub, is_hub_name
from sampling.scheduler import UnmaskingScheduler
from stage1_tokenizer.autoencoder import ImageTokenizer
from stage1_tokenizer.train import load_tokenizer
from stage2_prior.refiner import ConvexRefiner
from stage2_prior.transformer import MaskedTransformer

MEASURED = "measured.json"
EMBEDDED = Path(__file__).parent / "pretrained"  # the model that comes with the package


class SavedParts(NamedTuple):
    """What `SoftConvexPipeline.save_pretrained` wrote."""

    tokenizer: ImageTokenizer
    prior: MaskedTransformer
    refiner: ConvexRefiner | None
    scheduler: UnmaskingScheduler
    measured: dict[str, Any]  # what `scq evaluate` found; empty where it did not run


def load_parts(folder: str | Path) -> SavedParts:
    """The parts in ``folder``, see `SoftConvexPipeline.from_pretrained`.

    Raises:
        UserError: nothing there is a pipeline, or a part of it cannot be loaded.
    """
    local = from_hub(str(folder)) if is_hub_name(str(folder)) else Path(folder)
    root = model_root(local)
    if root is None:
        raise UserError(
            f"no model in {folder}: expected a folder that `scq train prior` or `scq quickstart` wrote "
            "(with model_index.json)"
        )
    tokenizer = load_tokenizer(root / "tokenizer")
    try:
        prior = MaskedTransformer.from_pretrained(root / "prior", local_files_only=True)
        refined = (root / "refiner").is_dir()
        refiner = ConvexRefiner.from_pretrained(root / "refiner", local_files_only=True) if refined else None
        scheduler = UnmaskingScheduler.from_pretrained(root / "scheduler", local_files_only=True)
        measured = json.loads((root / MEASURED).read_text()) if (root / MEASURED).is_file() else {}
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{root} cannot be loaded: {first_line(error)}") from error
    for part in filter(None, (tokenizer, prior, refiner)):
        part.register_to_config(_name_or_path="")  # a path of this machine, which a copy would carry on
    return SavedParts(tokenizer, prior, refiner, scheduler, measured)


def is_pipeline(folder: str | Path) -> bool:
    """Whether ``folder`` holds both stages, rather than a tokenizer alone."""
    return model_root(Path(folder)) is not None


def model_root(folder: Path) -> Path | None:
    """Where in a run's or a model's folder the pipeline lies; None where there is none."""
    return next((root for root in (folder, folder / "model") if (root / "model_index.json").is_file()), None)
