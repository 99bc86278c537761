"""A complete model in memory: all that it takes to draw images."""

from __future__ import annotations

from dataclasses import dataclass, field

import diffusers
from diffusers.models.modeling_utils import ModelMixin

from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage2_prior.refiner import ConvexRefiner
from scq.stage2_prior.scheduler import UnmaskingScheduler
from scq.stage2_prior.transformer import MaskedTransformer


@dataclass
class Model:
    """A tokenizer, the prior over its codes, optionally a refiner, and the sampling settings."""

    tokenizer: ImageTokenizer
    prior: MaskedTransformer
    refiner: ConvexRefiner | None = None
    scheduler: UnmaskingScheduler = field(default_factory=UnmaskingScheduler)

    def networks(self) -> dict[str, ModelMixin]:
        """The networks that the model has, by name."""
        every = {"tokenizer": self.tokenizer, "prior": self.prior, "refiner": self.refiner}
        return {name: network for name, network in every.items() if network is not None}

    def index(self) -> dict[str, object]:
        """What ``model_index.json`` says: where diffusers finds the class of each component."""
        components = {**self.networks(), "scheduler": self.scheduler}
        return {
            "_class_name": "SoftConvexPipeline",
            "_diffusers_version": diffusers.__version__,
            **{name: ["scq", type(each).__name__] for name, each in components.items()},
            **({} if self.refiner is not None else {"refiner": [None, None]}),
        }
