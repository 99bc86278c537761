"""How good a tokenizer under training is: the rFID that chooses its best checkpoint."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection

import torch

from scq.engine.errors import UserError
from scq.engine.processes import join_processes, rank_and_world_size
from scq.engine.progress import say
from scq.evaluation.metrics.features import FeatureSet
from scq.evaluation.metrics.inception import load_inception
from scq.evaluation.metrics.networks import FeatureNetwork
from scq.evaluation.reconstructions import evaluate_reconstructions
from scq.evaluation.reference import Reference
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.stage import ScoreConfig


def rfid_scorer(held_out: str, score: ScoreConfig) -> Callable[[ImageTokenizer], float] | None:
    """A function from a tokenizer to its rFID on held-out images, the mean over z_q and the dominant codes.

    It works in this process alone: training asks the main process, while the others wait.

    Args:
        held_out: shards.
        score: how many of their images, and the network.

    Returns:
        None where ``score.images`` is 0, and in every process but the main one.

    Raises:
        UserError: there are no held-out images or too few of them, or there are no weights for the network.
    """
    if not score.images:
        return None
    if not held_out:
        raise UserError("score.images needs held-out images: set data.validation to their shards")
    join_processes()
    if rank_and_world_size()[0] > 0:
        return None
    reference = Reference(held_out, score.images, alone=True)
    network = load_inception(score.inception_weights or None, "cuda" if torch.cuda.is_available() else "cpu")
    say(f"Inception: {network.description}")
    real = reference.features(network)

    def measure(tokenizer: ImageTokenizer) -> float:
        return mean_rfid(tokenizer, reference, network, real)

    return measure


def mean_rfid(
    tokenizer: ImageTokenizer,
    reference: Reference,
    network: FeatureNetwork,
    real: FeatureSet,
    only: Collection[str] | None = None,
) -> float:
    """The mean of the rFIDs of several ways of decoding; arguments as those of `evaluate_reconstructions`."""
    ways = evaluate_reconstructions(tokenizer, reference, network, real, only=only).ways
    return statistics.fmean(each.rfid for each in ways.values() if each.rfid is not None)
