"""Reconstructions as tables: a row for each arm and each thing that its decoder can be given, and what that costs.

Soft latents never stand in the row of hard ones: theirs says what they cost with rounded weights, or 'continuous'.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from scq.evaluation.benchmark.tables import look, markdown_table, spread

_ROUNDED = re.compile(r"z_q_(\d+)_bits")  # as `evaluation.evaluate.evaluate_reconstructions` names them


class Decoded(NamedTuple):
    """What one run's images, decoded in one way, come to."""

    bits: float | None  # per image; None where the latents are continuous
    reconstruction: dict[str, Any]  # mse, psnr, ...
    codebook: dict[str, Any] | None = None  # its usage, beside the codes alone
    samples: dict[str, Any] | None = None  # of a prior, which draws codes: nothing decoded from z_q has them


def ways_of_decoding(runs: list[dict[str, Any]]) -> dict[str, list[Decoded]]:
    """Everything that an arm's decoder was given, by name, of each seed that has it.

    Args:
        runs: of one arm, one for each seed: ``tokenizer`` (a row of `benchmark.tokenizers`) and, where there is a
            prior, ``samples``.
    """
    ways: dict[str, list[Decoded]] = {}
    for run in runs:
        for name, decoded in _ways_of_one(run).items():
            ways.setdefault(name, []).append(decoded)
    return ways


def _ways_of_one(run: dict[str, Any]) -> dict[str, Decoded]:
    row, samples = run["tokenizer"], run.get("samples", {})
    if "dominant" not in row:  # no quantizer
        return {"latents": Decoded(None, row["z_q"])}
    rate = row["codebook"]["fixed_bits_per_image"]
    soft = "dominant_weight" in row["latents"]
    ways = {
        "dominant codes" if soft else "codes": Decoded(rate, row["dominant"], row["codebook"], samples.get("codes"))
    }
    for kind, found in samples.items():
        if "reconstruction" in found:
            ways[f"codes, {kind} refiner"] = Decoded(rate, found["reconstruction"], samples=found)
    if soft:
        rounded = {int(name[1]): row[name[0]] for name in map(_ROUNDED.fullmatch, row) if name}
        for width, found in sorted(rounded.items()):
            title = f"z_q, weights of {width} bit{'s' if width > 1 else ''}"
            ways[title] = Decoded(found["bits_per_image"], found)
        ways["z_q"] = Decoded(None, row["z_q"])
    return ways


def rate(decoded: list[Decoded]) -> str:
    """Bits per image, or 'continuous'."""
    bits = [each.bits for each in decoded if each.bits is not None]
    return spread(bits, ".0f") if bits else "continuous"


# (head, where in a Decoded, way into that, format); a column that no row has is left out.
_COLUMNS = [
    ("MSE", "reconstruction", "mse", ".5f"),
    ("PSNR", "reconstruction", "psnr", ".2f"),
    ("SSIM", "reconstruction", "ssim", ".3f"),
    ("LPIPS", "reconstruction", "lpips", ".3f"),
    ("rFID", "reconstruction", "rfid", ".1f"),
    ("codes used", "codebook", "used_share", ".1%"),
    ("perplexity", "codebook", "perplexity", ".0f"),
    ("entropy, bits per image", "codebook", "bits_per_image", ".0f"),
]
# Of a tokenizer's row, whatever is decoded: (head, way into the row, format).
_OF_TRAINING = [
    ("dominant is nearest", ("latents", "dominant_is_nearest"), ".1%"),
    ("dominant weight", ("latents", "dominant_weight"), ".2f"),
    ("soft / hard latent error", ("latents", "soft_over_hard"), ".2f"),
    ("images/s", ("images_per_second",), ".0f"),
]


def reconstruction_table(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every arm's runs, see `ways_of_decoding`, as a Markdown table; of several seeds the mean and the range."""
    ways = {name: ways_of_decoding(runs) for name, runs in arms.items()}
    every = [each for found in ways.values() for decoded in found.values() for each in decoded]
    columns = [
        (head, part, key, form)
        for head, part, key, form in _COLUMNS
        if any(look(getattr(each, part), key) is not None for each in every)
    ]
    return markdown_table(
        ["arm", "decoded from", "bits per image", *(head for head, *_ in columns)],
        [
            [with_seeds(name, decoded), way, rate(decoded)]
            + [spread([look(getattr(each, part), key) for each in decoded], form) for _, part, key, form in columns]
            for name, found in ways.items()
            for way, decoded in found.items()
        ],
    )


def training_table(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Speed of the tokenizers' training, and what became of their latents, as a Markdown table."""
    rows = {name: [run["tokenizer"] for run in runs] for name, runs in arms.items()}
    every = [row for each in rows.values() for row in each]
    columns = [column for column in _OF_TRAINING if any(look(row, *column[1]) is not None for row in every)]
    return markdown_table(
        ["arm", *(head for head, _, _ in columns)],
        [
            [with_seeds(name, each)] + [spread([look(row, *way) for row in each], form) for _, way, form in columns]
            for name, each in rows.items()
        ],
    )


def with_seeds(name: str, measured: Sequence[Any]) -> str:
    """An arm's name, and of how many seeds its numbers are."""
    return name if len(measured) == 1 else f"{name}, {len(measured)} seeds"
