"""Drawing images: samplers, the diffusers pipeline, the page."""

from scq.sampling.pipeline import EMBEDDED, SoftConvexPipeline

__all__ = ["EMBEDDED", "SoftConvexPipeline"]
