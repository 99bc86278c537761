"""How a pipeline is saved, found, loaded and moved, whatever it draws."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from scq.engine.errors import UserError
from scq.engine.files import replaced_model, write_file
from scq.sampling.hub import first_line, local_folder
from scq.sampling.hub import upload as upload_folder
from scq.sampling.model_card import model_card
from scq.sampling.scheduler import UnmaskingScheduler
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.train import load_tokenizer
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.transformer import MaskedTransformer

MEASURED = "measured.json"
_LOCAL = {"local_files_only": True, "use_safetensors": True}  # nothing is looked for elsewhere, nothing is unpickled


class Parts(NamedTuple):
    """What a pipeline is made of."""

    tokenizer: ImageTokenizer
    prior: MaskedTransformer
    refiner: ConvexRefiner | None
    scheduler: UnmaskingScheduler


def model_root(folder: Path) -> Path | None:
    """Where in a run's or a model's folder the pipeline lies; None where there is none."""
    return next((root for root in (folder, folder / "model") if (root / "model_index.json").is_file()), None)


def load_parts(root: Path) -> tuple[Parts, dict[str, Any]]:
    """The parts of the pipeline in ``root``, and what was measured of it.

    Raises:
        UserError: one of them cannot be loaded.
    """
    tokenizer = load_tokenizer(root / "tokenizer")
    try:
        prior = MaskedTransformer.from_pretrained(root / "prior", **_LOCAL)
        refiner = ConvexRefiner.from_pretrained(root / "refiner", **_LOCAL) if (root / "refiner").is_dir() else None
        scheduler = UnmaskingScheduler.from_pretrained(root / "scheduler", local_files_only=True)
        measured = json.loads((root / MEASURED).read_text()) if (root / MEASURED).is_file() else {}
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{root} cannot be loaded: {first_line(error)}") from error
    for part in filter(None, (tokenizer, prior, refiner)):
        part.register_to_config(_name_or_path="")  # a path of this machine, which a copy would carry on
    return Parts(tokenizer, prior, refiner, scheduler), measured


class SavedPipeline(DiffusionPipeline):
    """What `sampling.pipeline.SoftConvexPipeline` inherits: its parts in a folder, on the hub, on a device.

    Attributes:
        measured: what `scq evaluate` found, and how it was trained, for the model card.
    """

    measured: dict[str, Any]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write every component, model_index.json and a model card; the folder appears when it is complete.

        Args:
            push_to_hub: upload it as well, with the arguments of `push_to_hub` (``repo_id="you/model"``) in ``kwargs``.
            kwargs: further ones are diffusers'.

        Raises:
            UserError: the folder holds anything but a model, the weights were rounded by ``to(dtype)``, or they are
                not to be written as safetensors.
        """
        folder = Path(save_directory).resolve()
        if not kwargs.get("safe_serialization", True):
            raise UserError("safe_serialization=False writes weights that run code when they are read; leave it out")
        if any(part.dtype != torch.float32 for part in self._networks()):
            raise UserError("these weights were rounded by a dtype; load them in float32, `scq export` writes halves")
        upload = {name: kwargs.pop(name) for name in ("repo_id", "private", "token") if name in kwargs}
        self._forget_origin()
        with replaced_model(folder, self.replaceable) as fresh:
            super().save_pretrained(fresh, **kwargs)
            self.write_card(fresh)
        if push_to_hub:
            upload_folder(folder, **{"repo_id": folder.name, **upload})

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload to the Hugging Face hub with this model's own card; returns the address of the commit.

        Args:
            repo_id: "you/model"; made where there is none.
            private: whether a new one is; None: as the account says.
            token: of the account; None: the one that is logged in.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            self.save_pretrained(folder)
            return upload_folder(folder, repo_id, private, token)

    def write_card(self, folder: Path) -> None:
        """Write README.md, and the numbers that are in it, to a model's folder."""
        write_file(folder / MEASURED, json.dumps(self.measured, indent=1) + "\n")
        write_file(folder / "README.md", model_card(self))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        use_safetensors: bool = True,
        **parts: Any,
    ) -> Self:
        """The pipeline in ``folder``: one that ``save_pretrained`` wrote, a run folder of a prior, or a model of the
        Hugging Face hub, as "you/model".

        Args:
            dtype: to compute in, see `to`; ``torch_dtype`` is its older name in diffusers.
            token, revision, cache_dir, local_files_only: of a model on the hub: who asks, which version, where copies
                are kept, and whether only they are looked at.
            use_safetensors: always; nothing else is read.
            parts: components to take instead of the saved ones, as ``scheduler=UnmaskingScheduler(steps=8)``.

        Raises:
            UserError: nothing there is a pipeline, a part of it cannot be loaded, or is none of a pipeline's.
        """
        if not use_safetensors:
            raise UserError("use_safetensors=False would run code in the files that are read; leave it out")
        if unknown := parts.keys() - set(Parts._fields):
            raise UserError(f"a pipeline has no {', '.join(sorted(unknown))}; its parts are {', '.join(Parts._fields)}")
        access = {"token": token, "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        root = model_root(local_folder(folder, **access))
        if root is None:
            raise UserError(
                f"no model in {folder}: expected a folder that `scq train prior` or `scq quickstart` wrote "
                "(with model_index.json)"
            )
        saved, measured = load_parts(root)
        pipeline = cls(*saved._replace(**parts))
        pipeline.measured = measured
        return pipeline.to(device=device, dtype=dtype or torch_dtype)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, and compute in a dtype, as in any diffusers pipeline: ``to("cuda", torch.bfloat16)``.

        A dtype is for the prior and the tokenizer's networks, where the work is. Quantizer and refiner stay in float32:
        rounding would undo the convex detail that they are there for.
        """
        dtype = next((each for each in args if isinstance(each, torch.dtype)), kwargs.pop("dtype", None))
        super().to(*(each for each in args if not isinstance(each, torch.dtype)), **kwargs)
        if dtype is not None:
            networks = [network for name, network in self.tokenizer.named_children() if name != "quantizer"]
            for network in (self.prior, *networks):
                nn.Module.to(network, dtype)  # ModelMixin's own warns of what it keeps in float32: nothing here
        return self

    def _forget_origin(self) -> None:
        """diffusers' own loader leaves the path that it read in the configs, where a copy would carry it on, and does
        not read what was measured: the card would lose its numbers, and the licence with them."""
        origin = Path(self.config.get("_name_or_path") or "") / MEASURED
        if not self.measured and origin.is_file():
            self.measured = json.loads(origin.read_text())
        for part in (self, *self._networks()):
            part.register_to_config(_name_or_path="")

    @property
    def replaceable(self) -> set[str]:
        """Classes whose saved models this one may take the place of: itself, and its parts."""
        return {type(self).__name__, *(type(part).__name__ for part in self._networks())}

    def _networks(self) -> list[ModelMixin]:
        return [part for part in (self.tokenizer, self.prior, self.refiner) if part is not None]
