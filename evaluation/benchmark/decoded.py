"""Reconstructions as tables: a row for each arm and each thing that its decoder can be given, and what that costs.

Soft latents never stand in the row of hard ones: theirs says what they cost with rounded weights, or 'continuous'.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from scq.engine.measurements import CodebookSummary, MixtureSummary, Reconstruction, SampleScores
from scq.evaluation.benchmark.results import CODES, ArmResult, Floor
from scq.evaluation.benchmark.tables import markdown_table, spread
from scq.evaluation.reconstructions import rounded_bits


class Decoded(NamedTuple):
    """What one run's images, decoded in one way, come to.

    Attributes:
        bits: per image; None where the latents are continuous.
        codebook: its usage, beside the codes alone.
        mixed: how the codes share the weight of mixtures, beside the mixtures.
        samples: of a prior, which draws codes: nothing decoded from z_q has them.
    """

    bits: float | None
    reconstruction: Reconstruction
    codebook: CodebookSummary | None = None
    samples: SampleScores | None = None
    mixed: MixtureSummary | None = None


def ways_of_decoding(runs: list[ArmResult]) -> dict[str, list[Decoded]]:
    """Everything that an arm's decoder was given, by name, of each seed that has it.

    Args:
        runs: of one arm, one for each seed.
    """
    ways: dict[str, list[Decoded]] = {}
    for run in runs:
        for name, decoded in _ways_of_one(run).items():
            ways.setdefault(name, []).append(decoded)
    return ways


def _ways_of_one(run: ArmResult) -> dict[str, Decoded]:
    found = run.reconstructions
    if found.codebook is None:  # no quantizer, or one that only reconstructs
        only = found.ways["z_q"]
        return {"latents" if only.bits_per_image is None else "codes": Decoded(only.bits_per_image, only)}
    rate = found.codebook.fixed_bits_per_image
    plain = run.samples.get(CODES)
    codes = Decoded(rate, found.ways["dominant"], found.codebook, None if plain is None else plain.scores)
    ways = {found.codes: codes}
    for kind, way in run.samples.items():
        if way.reconstruction is not None:
            ways[f"codes, {kind} refiner"] = Decoded(rate, way.reconstruction, samples=way.scores)
    if found.soft:
        rounded = {bits: each for name, each in found.ways.items() if (bits := rounded_bits(name)) is not None}
        for width, each in sorted(rounded.items()):
            title = f"z_q, weights of {width} bit{'s' if width > 1 else ''}"
            ways[title] = Decoded(each.bits_per_image, each)
        ways["z_q"] = Decoded(None, found.ways["z_q"], mixed=found.mixed)
    return ways


def rate(decoded: list[Decoded]) -> str:
    """Bits per image, or 'continuous'."""
    bits = [each.bits for each in decoded if each.bits is not None]
    return spread(bits, ".0f") if bits else "continuous"


class Column(NamedTuple):
    """A column of a table: its head, the number that a row shows in it, and how that is written."""

    head: str
    value: Callable[[Any], float | None]
    form: str


_OF_RECONSTRUCTIONS = [
    Column("MSE", lambda each: each.reconstruction.mse, ".5f"),
    Column("PSNR", lambda each: each.reconstruction.psnr, ".2f"),
    Column("SSIM", lambda each: each.reconstruction.ssim, ".3f"),
    Column("LPIPS", lambda each: each.reconstruction.lpips, ".3f"),
    Column("rFID", lambda each: each.reconstruction.rfid, ".1f"),
    Column("codes used", lambda each: (used := each.codebook or each.mixed) and used.used_share, ".1%"),
    Column("perplexity", lambda each: (used := each.codebook or each.mixed) and used.perplexity, ".0f"),
    Column("entropy, bits per image", lambda each: each.codebook and each.codebook.bits_per_image, ".0f"),
]
_OF_TRAINING = [
    Column("dominant is nearest", lambda run: run.reconstructions.dominant_is_nearest, ".1%"),
    Column("dominant weight", lambda run: run.reconstructions.dominant_weight, ".2f"),
    Column("soft / hard latent error", lambda run: run.tokenizer.soft_over_hard, ".2f"),
    Column("images/s", lambda run: run.tokenizer.images_per_second, ".0f"),
    Column("CPU minutes", lambda run: run.tokenizer.cpu_seconds and run.tokenizer.cpu_seconds / 60, ".1f"),
]


def reconstruction_table(
    arms: dict[str, list[ArmResult]], floor: Floor | None = None, only: Collection[str] | None = None
) -> list[str]:
    """Every arm's reconstructions, see `ways_of_decoding`, as a Markdown table: of several seeds the mean and range.

    Where there is an arm of VQGAN's quantizer, a column says how many times an arm's squared error goes into VQ's; that
    of no quantizer is the bound of all others. Where there is such an arm, too, columns say which share of the distance
    between both an arm closes: much of an error is the networks', and no quantizer's. Columns of numbers that nobody
    measured are left out.

    Args:
        floor: becomes the first row.
        only: heads of the columns that are shown; None for all.
    """
    ways = {name: ways_of_decoding(runs) for name, runs in arms.items()}
    columns = _filled(
        [each for each in (*_OF_RECONSTRUCTIONS, *_beside_vq(arms)) if only is None or each.head in only],
        [each for found in ways.values() for way in found.values() for each in way],
    )
    first = []
    if floor is not None:
        known = {"rFID": format(floor.rfid, ".1f")}
        first = [[f"{floor.images:,} training images", "-", "-", *(known.get(each.head, "-") for each in columns)]]
    return markdown_table(
        ["arm", "decoded from", "bits per image", *(column.head for column in columns)],
        first
        + [
            [with_seeds(name, decoded), way, rate(decoded), *_cells(columns, decoded)]
            for name, found in ways.items()
            for way, decoded in found.items()
        ],
    )


def _beside_vq(arms: dict[str, list[ArmResult]]) -> list[Column]:
    """Columns that compare with the arm of VQGAN's quantizer; none without it."""
    ends = {}
    for runs in arms.values():
        ends.setdefault(runs[0].tokenizer.quantizer, [run.reconstructions.ways["z_q"] for run in runs])
    if "vq" not in ends:
        return []
    mse = statistics.fmean(each.mse for each in ends["vq"])
    columns = [Column("MSE of vq / MSE", lambda each: each.reconstruction.mse and mse / each.reconstruction.mse, ".2f")]
    for head, name in (("MSE", "mse"), ("rFID", "rfid")):
        hard, free = (
            [value for each in ends.get(end, []) if (value := getattr(each, name)) is not None]
            for end in ("vq", "none")
        )
        if hard and free and (whole := statistics.fmean(hard) - statistics.fmean(free)) > 0:
            columns.append(Column(f"closed, {head}", _share_closed(name, statistics.fmean(hard), whole), ".0%"))
    return columns


def _share_closed(name: str, hard: float, whole: float) -> Callable[[Decoded], float | None]:
    def share(decoded: Decoded) -> float | None:
        value = getattr(decoded.reconstruction, name)
        return None if value is None else (hard - value) / whole

    return share


def training_table(arms: dict[str, list[ArmResult]]) -> list[str]:
    """Speed of the tokenizers' training, and what became of their latents, as a Markdown table."""
    columns = _filled(_OF_TRAINING, [run for runs in arms.values() for run in runs])
    return markdown_table(
        ["arm", *(column.head for column in columns)],
        [[with_seeds(name, runs), *_cells(columns, runs)] for name, runs in arms.items()],
    )


def _filled(columns: list[Column], rows: Sequence[Any]) -> list[Column]:
    """The columns in which some row has a number."""
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


def _cells(columns: list[Column], seeds: Sequence[Any]) -> list[str]:
    return [spread([column.value(each) for each in seeds], column.form) for column in columns]


def with_seeds(name: str, measured: Sequence[Any]) -> str:
    """An arm's name, and of how many seeds its numbers are."""
    return name if len(measured) == 1 else f"{name}, {len(measured)} seeds"
