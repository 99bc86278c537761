"""scq: image generation with soft convex quantization (arXiv 2310.03004).

This folder, the root of the repository, is the package. Importing it costs nothing: the names below are loaded when
they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Every public name, and the module that it is loaded from. Saved models name their classes by these, never by modules.
_PUBLIC = {
    "ConvexRefiner": "scq.stage2_prior.refiner",
    "ImageTokenizer": "scq.stage1_tokenizer.autoencoder",
    "MaskedTransformer": "scq.stage2_prior.transformer",
    "SoftConvexPipeline": "scq.sampling.pipeline",
    "SoftConvexQuantizer": "scq.stage1_tokenizer.quantizers",
    "UnmaskingScheduler": "scq.stage2_prior.scheduler",
    "soft_convex_solve": "scq.stage1_tokenizer.solver",
}
__all__ = ["__version__", *_PUBLIC]
# diffusers looks the bases of a saved model's classes up in the module that its index names, which is this one.
_BASES = {"ModelMixin": "diffusers", "SchedulerMixin": "diffusers"}

if TYPE_CHECKING:
    from scq.sampling.pipeline import SoftConvexPipeline as SoftConvexPipeline
    from scq.stage1_tokenizer.autoencoder import ImageTokenizer as ImageTokenizer
    from scq.stage1_tokenizer.quantizers import SoftConvexQuantizer as SoftConvexQuantizer
    from scq.stage1_tokenizer.solver import soft_convex_solve as soft_convex_solve
    from scq.stage2_prior.refiner import ConvexRefiner as ConvexRefiner
    from scq.stage2_prior.scheduler import UnmaskingScheduler as UnmaskingScheduler
    from scq.stage2_prior.transformer import MaskedTransformer as MaskedTransformer


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name) or _BASES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
