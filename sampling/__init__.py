"""Tokens to images: samplers, the pipeline, the page."""

from sampling.pipeline import SoftConvexPipeline

__all__ = ["SoftConvexPipeline"]
