"""The results of a benchmark for people: report.md and its pictures."""

from __future__ import annotations

from pathlib import Path

from scq.engine.files import write_file
from scq.engine.measurements import SampleScores
from scq.evaluation.benchmark.decoded import (
    rate,
    reconstruction_table,
    training_table,
    ways_of_decoding,
    with_seeds,
)
from scq.evaluation.benchmark.plots import (
    Runs,
    draw_curves,
    draw_learning,
    draw_neighbours,
    draw_rates,
    draw_reconstructions,
    draw_samples,
    draw_sweep,
)
from scq.evaluation.benchmark.results import CODES, ArmResult, BenchmarkResults, ComparisonResults
from scq.evaluation.benchmark.tables import Seeds, comparison, markdown_table, spread, widest_range
from scq.evaluation.pictures import save_picture


def write_report(results: BenchmarkResults, out: Path) -> None:
    """Write report.md and its pictures to ``out``.

    Args:
        results: what `benchmark.run.run_benchmark` found so far.
        out: its folder; the arms' pictures are read from ``out/pictures``.
    """
    arms = _measured_arms(results)
    pictures = {
        "samples": draw_samples(out, arms),
        "reconstructions": draw_reconstructions(out, arms),
        "neighbours": draw_neighbours(out, arms),
    }
    for name, picture in pictures.items():
        if picture is not None:
            save_picture(picture, out / f"{name}.png")
    draw_curves(arms, out / "curves.png")
    draw_rates(arms, out / "rates.png")
    draw_sweep(arms, out / "sweep.png")
    write_file(out / "report.md", render(results))


def render(results: BenchmarkResults) -> str:
    """The text of report.md."""
    arms, reference, machines = _measured_arms(results), results.reference, results.machines
    against = results.sample_reference or reference
    lines = [
        f"# {results.title}",
        "",
        f"Reference: {reference.count} {reference.dataset} images of the split '{reference.split}', "
        f"{reference.crop} pixels, which no model was trained on. Features: {results.network.weights}; "
        f"protocol: {results.network.protocol}."
        + (
            f" Samples are measured against {against.count:,} images of the split '{against.split}'."
            if against != reference
            else ""
        )
        + (" Of several seeds: the mean, and the range in brackets." if _most_seeds(arms) > 1 else ""),
        "",
        "## Samples",
        "![samples](samples.png)",
        "",
        *_samples(arms),
        "",
        "## Reconstructions of held-out images",
        "![reconstructions](reconstructions.png)",
        "",
        "The prior draws dominant codes only; z_q is what the soft quantizer hands to the decoder in training. It is "
        "continuous: its own row has no rate, and those of rounded weights have the rate that these were coded at.",
        "",
        *reconstruction_table(arms),
        "",
        "![rFID over bits per image](rates.png)",
        "",
        "## Codebook",
        *_codebook(arms),
        "",
        "## Training",
        "![curves](curves.png)",
        "",
        *_training(arms),
        "",
        *training_table(arms),
        *_of_several_machines(machines),
        "",
    ]
    if any(runs[0].sweep for runs in arms.values()):
        lines += ["## Settings of sampling", *_sweep(arms), "", "![FID over sampling steps](sweep.png)", ""]
    ways = [found for runs in arms.values() for found in runs[0].samples.values()]
    if any(found.scores.nearest_training_distance is not None for found in ways):
        lines += [
            "## Memorised?",
            f"Samples, and below each the nearest of {_searched(results)} in Inception features.",
            "",
            "![samples and their nearest training images](neighbours.png)",
            "",
        ]
    return "\n".join(
        [
            *lines,
            *_seconds(results),
        ]
    )


def write_comparison(results: ComparisonResults, out: Path) -> None:
    """Write the report.md of a comparison of tokenizers, and its pictures, to ``out``, as `write_report` does."""
    arms = _measured_arms(results)
    save_picture(draw_reconstructions(out, arms), out / "reconstructions.png")
    draw_learning(arms, out / "learning.png")
    write_file(out / "report.md", render_comparison(results))


def render_comparison(results: ComparisonResults) -> str:
    """The text of the report.md of a comparison of tokenizers, which have no samples."""
    arms, reference, network = _measured_arms(results), results.reference, results.network
    lines = [
        f"# {results.title}",
        "",
        f"Reference: {reference.count:,} {reference.dataset} images of the split '{reference.split}', "
        f"{reference.crop} pixels, which no model was trained on."
        + ("" if network is None else f" Features: {network.weights}; protocol: {network.protocol}.")
        + (" Of several seeds: the mean, and the range in brackets." if _most_seeds(arms) > 1 else ""),
        "",
        "## Reconstructions of held-out images",
        "![reconstructions](reconstructions.png)",
        "",
        *reconstruction_table(arms, results.floor),
        "",
    ]
    if any(runs[0].tokenizer.learned for runs in arms.values()):
        lines += ["## Learning", "![rFID over CPU seconds of training](learning.png)", ""]
    lines += ["## Training", *training_table(arms), *_of_several_machines(results.machines), ""]
    return "\n".join([*lines, *_seconds(results)])


def _seconds(results: BenchmarkResults | ComparisonResults) -> list[str]:
    return [
        "## Seconds",
        *markdown_table(
            ["phase", "seconds", "on"],
            [[name, f"{seconds:.0f}", results.machines[name]] for name, seconds in results.seconds.items()],
        ),
        "",
        f"In all {sum(results.seconds.values()):.0f} s, code at {results.revision}.",
        "",
    ]


def _most_seeds(arms: Runs) -> int:
    return max(len(runs) for runs in arms.values())


def _of_several_machines(machines: dict[str, str]) -> list[str]:
    on = {machine for phase, machine in machines.items() if phase.endswith(" tokenizer")}
    several = f"Tokenizers were trained on {len(on)} machines (see Seconds): their speeds compare within one only."
    return ["", several] if len(on) > 1 else []


# What the table of a page shows of a comparison of tokenizers.
_OF_A_COMPARISON = ("MSE", "LPIPS", "rFID", "codes used", "perplexity", "MSE of vq / MSE", "closed, rFID")


def summary_table(results: BenchmarkResults | ComparisonResults) -> list[str]:
    """The few numbers that a README shows, one row for each arm and thing that is decoded."""
    if isinstance(results, ComparisonResults):
        return reconstruction_table(_measured_arms(results), results.floor, only=_OF_A_COMPARISON)
    rows = []
    for name, runs in _measured_arms(results).items():
        for way, decoded in ways_of_decoding(runs).items():
            samples = [each.samples for each in decoded if each.samples is not None]
            single = f" ± {1e3 * samples[0].kid_error:.1f}" if len(samples) == 1 else ""
            rows.append(
                [
                    with_seeds(name, decoded),
                    way,
                    rate(decoded),
                    spread([each.reconstruction.mse for each in decoded], ".4f"),
                    spread([each.reconstruction.rfid for each in decoded], ".1f"),
                    spread([1e3 * found.kid for found in samples], ".1f") + single,
                    spread([found.fid for found in samples], ".1f"),
                ]
            )
    return markdown_table(["arm", "decoded from", "bits per image", "MSE", "rFID", "KID x 1000", "FID"], rows)


def _measured_arms(results: BenchmarkResults | ComparisonResults) -> Runs:
    """The arms of which at least one seed is there."""
    return {name: runs for name, runs in results.arms.items() if runs}


def _searched(results: BenchmarkResults) -> str:
    count = 0 if results.measure is None else results.measure.neighbours
    return f"{count:,} training images" if count else "the training images that were searched"


Drawn = dict[tuple[str, str], list[SampleScores]]  # arm, way of decoding -> its samples, of each seed


def _samples(arms: Runs) -> list[str]:
    """What was measured of samples, and how the first arm's stand beside the others'."""
    drawn: Drawn = {}
    for arm, runs in arms.items():
        for run in runs:
            for way, found in run.samples.items():
                drawn.setdefault((arm, way), []).append(found.scores)
    rows = [
        [_of(arm, way)]
        + [spread([scale * getattr(each, key) for each in found], form) for key, scale, form in _OF_SAMPLES]
        + [_at_infinity(found), spread([_refiner_share(run, way) for run in arms[arm]], ".1%"), found[0].count]
        for (arm, way), found in drawn.items()
    ]
    first = next(iter(drawn.values()))[0]
    fid = "FID (biased)" if first.fid_biased else "FID"
    head = ["", "KID x 1000", "±", fid, "precision", "recall"]
    head += ["FID at infinity, 90%", "refiner's share of time", "samples"]
    if any(each.fid_to_training is not None for found in drawn.values() for each in found):
        head.append("FID to training images")
        for row, found in zip(rows, drawn.values(), strict=True):
            row.append(spread([each.fid_to_training for each in found], ".1f"))
    return [
        "KID leads; " + (first.fid_note or f"FID at {first.count} samples") + ".",
        "",
        *markdown_table(head, rows),
        *_comparisons(arms, drawn),
    ]


_OF_SAMPLES = [
    ("kid", 1e3, ".1f"),
    ("kid_error", 1e3, ".1f"),
    ("fid", 1, ".1f"),
    ("precision", 1, ".3f"),
    ("recall", 1, ".3f"),
]


def _decoder(way: str) -> str:
    return way if way == CODES else f"{way} refiner"


def _of(arm: str, way: str) -> str:
    return arm if way == CODES else f"{arm}, {_decoder(way)}"


def _comparisons(arms: Runs, drawn: Drawn) -> list[str]:
    """The first arm, and every other with a soft quantizer, beside all others."""
    first, *others = arms
    soft = [arm for arm in others if (arm, CODES) in drawn and arms[arm][0].reconstructions.soft]
    if len({arm for arm, _ in drawn}) < 2:
        return []
    names = " and ".join(f"**{arm}**" for arm in (first, *soft))
    return [
        "",
        f"Each way of decoding {names} as a share of the other arms; below 1 it is ahead. A difference of the means "
        "under 5%, or no larger than the wider range of both, is a tie. A range goes from the lowest to the highest "
        "seed, with KID's error to both sides; an arm of one seed is given the widest that arms of several have, "
        "relative to the mean.",
        *(line for arm in (first, *soft) for line in _beside_the_others(drawn, arm)),
    ]


def _beside_the_others(drawn: Drawn, ours: str) -> list[str]:
    """Every way of decoding the arm ``ours`` beside every other arm: none is picked after the fact."""
    ways = {way: found for (arm, way), found in drawn.items() if arm == ours}
    others = {_of(arm, way): found for (arm, way), found in drawn.items() if arm != ours}
    lines = []
    for key, seeds in (("KID", _kid), ("FID", _fid)):
        assumed = widest_range(seeds(found) for found in drawn.values())
        rows = [
            [_decoder(way), *(comparison(seeds(mine), seeds(found), assumed) for found in others.values())]
            for way, mine in ways.items()
        ]
        lines += ["", *markdown_table([f"{ours}: {key} beside that of", *others], rows)]
    return lines


def _kid(found: list[SampleScores]) -> Seeds:
    return Seeds([each.kid for each in found], max(each.kid_error for each in found))


def _fid(found: list[SampleScores]) -> Seeds:
    return Seeds([each.fid for each in found])


def _at_infinity(found: list[SampleScores]) -> str:
    """The interval of the extrapolation, of several seeds around all of theirs."""
    intervals = [each.fid_infinity for each in found if each.fid_infinity is not None]
    if not intervals:
        return "-"
    return f"{min(each.low for each in intervals):.1f} - {max(each.high for each in intervals):.1f}"


def _refiner_share(run: ArmResult, way: str) -> float | None:
    """Of the time from nothing to images: what a refiner adds to decoding the same codes."""
    if way == CODES or way not in run.samples:
        return None
    plain, refined = run.samples[CODES].scores.seconds_of, run.samples[way].scores.seconds_of
    if plain is None or refined is None:
        return None
    return max(0.0, refined.decode - plain.decode) / (refined.prior + refined.decode)


def _sweep(arms: Runs) -> list[str]:
    rows = []
    for name, runs in arms.items():
        for settings, swept in runs[0].sweep.items():
            found = swept.scores
            kid = f"{1e3 * found.kid:.1f} ± {1e3 * found.kid_error:.1f}"
            shares = [f"{found.precision:.3f}", f"{found.recall:.3f}"]
            rows.append([name, swept.way, settings, kid, f"{found.fid:.1f}", *shares, found.count])
    return markdown_table(["", "decoded", "settings", "KID x 1000", "FID", "precision", "recall", "samples"], rows)


def _codebook(arms: Runs) -> list[str]:
    rows = []
    for name, runs in arms.items():
        written = [run.tokens.usage for run in runs if run.tokens is not None]
        held_out = [run.held_out_usage for run in runs if run.held_out_usage is not None]
        for split, usages in (("train", written), ("held-out", held_out)):
            if usages:
                cells = [spread([getattr(usage, key) for usage in usages], form) for key, form in _OF_CODEBOOK]
                rows.append([name, split, *cells, f"{usages[0].fixed_bits_per_image:.0f}"])
    head = ["", "images", "codes used", "perplexity", "bits per token", "bits per image", "of"]
    return markdown_table(head, rows)


_OF_CODEBOOK = [("used_share", ".1%"), ("perplexity", ".0f"), ("bits_per_token", ".2f"), ("bits_per_image", ".0f")]


def _training(arms: Runs) -> list[str]:
    rows = []
    for name, (run, *_) in arms.items():
        bound = run.likelihood and run.likelihood.bits_per_token
        trained = [("tokenizer", run.tokenizer, None), ("prior", run.prior, bound)]
        trained += [(f"{way} refiner", found.refiner, None) for way, found in run.samples.items()]
        rows += [
            [name, part, f"{found.parameters:,}", f"{found.steps:,}", f"{found.images_seen:,}", spread([bits], ".3f")]
            for part, found, bits in trained
            if found is not None
        ]
    return markdown_table(["", "", "parameters", "steps", "images seen", "held-out bits per token, at most"], rows)
