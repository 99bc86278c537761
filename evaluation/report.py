"""The results of a benchmark for people: report.md and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import write_atomically
from evaluation.plots import (
    Runs,
    draw_curves,
    draw_neighbours,
    draw_rates,
    draw_reconstructions,
    draw_samples,
    draw_sweep,
)
from evaluation.tables import look, markdown_table, spread, verdict
from evaluation.tokenizers import render as render_tokenizers


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write report.md and its pictures to ``out``.

    Args:
        results: what evaluation.benchmark.run_benchmark measured.
        out: its folder; the arms' pictures are read from ``out/pictures``.
    """
    arms: Runs = results["arms"]
    draw_samples(out, arms).save(out / "samples.png")
    draw_reconstructions(out, arms).save(out / "reconstructions.png")
    draw_curves(arms, out / "curves.png")
    draw_rates(arms, out / "rates.png")
    draw_sweep(arms, out / "sweep.png")
    neighbours = draw_neighbours(out, arms)
    if neighbours is not None:
        neighbours.save(out / "neighbours.png")
    write_atomically(out / "report.md", render(results))


def render(results: dict[str, Any]) -> str:
    """The text of report.md."""
    arms, reference, machine = results["arms"], results["reference"], results["machine"]
    seeds = max(len(runs) for runs in arms.values())
    lines = [
        f"# {results['title']}",
        "",
        f"Reference: {reference['count']} {reference['dataset']} images of the split '{reference['split']}', "
        f"{reference['crop']} pixels, which no model was trained on. Features: {results['network']['weights']}; "
        f"protocol: {results['network']['protocol']}."
        + (" Of several seeds: the mean, and the range in brackets." if seeds > 1 else ""),
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
        "continuous and costs more than the rate of the codes: never compare the two as if they had one rate.",
        "",
        *render_tokenizers({name: [run["tokenizer"] for run in runs] for name, runs in arms.items()}),
        "",
        *_at_a_rate(arms),
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
    ]
    if any("sweep" in runs[0] for runs in arms.values()):
        lines += ["## Settings of sampling", *_sweep(arms), "", "![FID over sampling steps](sweep.png)", ""]
    ways = [found for runs in arms.values() for found in runs[0].get("samples", {}).values()]
    if any("nearest_training_distance" in found for found in ways):
        lines += [
            "## Memorised?",
            "Samples, and below each the training image nearest to it in Inception features.",
            "",
            "![samples and their nearest training images](neighbours.png)",
            "",
        ]
    return "\n".join(
        [
            *lines,
            "## Seconds",
            *markdown_table(["phase", "seconds"], [[name, f"{s:.0f}"] for name, s in results["seconds"].items()]),
            "",
            f"In all {results['seconds_in_all']:.0f} s on {machine['device']} with {machine['threads']} threads, "
            f"torch {machine['torch']}, code at {results['revision']}.",
            "",
        ]
    )


def summary_table(results: dict[str, Any]) -> list[str]:
    """The few numbers that a README shows, one row for each arm and way of decoding its samples."""
    rows = []
    for name, runs in results["arms"].items():
        tokenizers = [run["tokenizer"] for run in runs]
        reconstruction = [
            f"{spread([look(t, way, 'mse') for t in tokenizers], '.4f')} / "
            f"{spread([look(t, way, 'rfid') for t in tokenizers], '.1f')}"
            for way in ("z_q", "dominant")
        ]
        usage = [run["codebook"]["train"] for run in runs if "codebook" in run]
        used = f"{spread([u['used_share'] for u in usage], '.0%')} / {spread([u['perplexity'] for u in usage], '.0f')}"
        ways = list(runs[0].get("samples", {})) or [""]
        for way in ways:
            found = [run["samples"][way] for run in runs if way]
            generated = [
                spread([1e3 * f["kid"] for f in found], ".1f")
                + (f" ± {1e3 * found[0]['kid_error']:.1f}" if len(found) == 1 else ""),
                spread([f["fid"] for f in found], ".1f"),
            ]
            title = name if way in ("", "codes") else f"{name}, {way} refiner"
            rows.append([title, *(reconstruction if way in ("", "codes") else ["", ""]), used, *generated])
    head = ["arm", "z_q: MSE / rFID", "dominant codes: MSE / rFID", "codes used / perplexity", "KID x 1000", "FID"]
    return markdown_table(head, rows)


def _samples(arms: Runs) -> list[str]:
    """What was measured of samples, and how the first arm's stand beside the others'."""
    rows, values = [], {}
    for name, runs in arms.items():
        for way in runs[0].get("samples", ()):
            found = [run["samples"][way] for run in runs]
            title = name if way == "codes" else f"{name}, {way} refiner"
            values[title] = [each["fid"] for each in found]
            rows.append(
                [title, *(spread([scale * each[key] for each in found], form) for key, scale, form in _OF_SAMPLES)]
                + [spread([look(each, "fid_infinity", "value") for each in found], ".1f")]
                + [spread([_refiner_share(run, way) for run in runs], ".1%"), found[0]["count"]]
            )
    first = next(runs[0]["samples"]["codes"] for runs in arms.values() if "samples" in runs[0])
    fid = "FID (biased)" if first["fid_biased"] else "FID"
    head = ["", "KID x 1000", "±", fid, "precision", "recall", "FID at infinity", "refiner's share of time", "samples"]
    ours = [title for title in values if title.split(",")[0] == next(iter(arms))]
    best = min(ours, key=lambda title: sum(values[title]) / len(values[title]))
    told = [
        f"- against {title}: {_ratio(values[best], values[title])} of its FID, {verdict(values[best], values[title])}"
        for title in values
        if title not in ours
    ]
    return [
        "KID leads; " + (first["fid_note"] or f"FID at {first['count']} samples") + ".",
        "",
        *markdown_table(head, rows),
        "",
        f"**{best}** beside the other arms (a difference under 5%, or within the seeds' range, is a tie):",
        "",
        *told,
    ]


_OF_SAMPLES = [
    ("kid", 1e3, ".1f"),
    ("kid_error", 1e3, ".1f"),
    ("fid", 1, ".1f"),
    ("precision", 1, ".3f"),
    ("recall", 1, ".3f"),
]


def _ratio(ours: list[float], theirs: list[float]) -> str:
    return f"{sum(ours) / len(ours) / (sum(theirs) / len(theirs)):.2f}"


def _refiner_share(run: dict[str, Any], way: str) -> float | None:
    """Of the time from nothing to images: what a refiner adds to decoding the same codes."""
    if way == "codes":
        return None
    plain, refined = run["samples"]["codes"]["seconds_of"], run["samples"][way]["seconds_of"]
    return max(0.0, refined["decode"] - plain["decode"]) / (refined["prior"] + refined["decode"])


def _at_a_rate(arms: Runs) -> list[str]:
    """What soft latents cost when their weights are rounded, and what refiners make of codes alone."""
    rows = []
    for name, runs in arms.items():
        row = runs[0]["tokenizer"]
        for way, found in row.items():
            if isinstance(found, dict) and "bits_per_image" in found and "mse" in found:
                title = f"{name}: {way.replace('_', ' ').replace('z q', 'z_q, weights of')}"
                rows.append([title, f"{found['bits_per_image']:.0f}", *_pixels(found)])
        if "dominant" in row and len(runs[0].get("samples", {})) > 1:
            rows.append([f"{name}: codes", f"{row['codebook']['fixed_bits_per_image']:.0f}", *_pixels(row["dominant"])])
        for way, found in runs[0].get("samples", {}).items():
            if "reconstruction" in found:
                bits = f"{row['codebook']['fixed_bits_per_image']:.0f}"
                rows.append([f"{name}: codes, {way} refiner", bits, *_pixels(found["reconstruction"])])
        if rows and rows[-1][0].startswith(f"{name}:"):
            rows.append([f"{name}: z_q", "continuous", *_pixels(row["z_q"])])
    head = ["decoded from", "bits per image", "MSE", "PSNR", "rFID"]
    return [*markdown_table(head, rows), ""] if rows else []


def _pixels(found: dict[str, Any]) -> list[str]:
    return [f"{found['mse']:.5f}", f"{found['psnr']:.2f}", f"{found['rfid']:.1f}" if "rfid" in found else "-"]


def _sweep(arms: Runs) -> list[str]:
    rows = [
        [name, row["way"], settings, f"{1e3 * row['kid']:.1f} ± {1e3 * row['kid_error']:.1f}", f"{row['fid']:.1f}"]
        + [f"{row['precision']:.3f}", f"{row['recall']:.3f}", row["count"]]
        for name, runs in arms.items()
        for settings, row in runs[0].get("sweep", {}).items()
    ]
    return markdown_table(["", "decoded", "settings", "KID x 1000", "FID", "precision", "recall", "samples"], rows)


def _codebook(arms: Runs) -> list[str]:
    rows = [
        [name, part.replace("_", "-"), f"{usage['used_share']:.1%}", f"{usage['perplexity']:.0f}"]
        + [f"{usage['bits_per_token']:.2f}", f"{usage['bits_per_image']:.0f} of {usage['fixed_bits_per_image']:.0f}"]
        for name, runs in arms.items()
        for part, usage in runs[0].get("codebook", {}).items()
    ]
    return markdown_table(["", "images", "codes used", "perplexity", "bits per token", "bits per image"], rows)


def _training(arms: Runs) -> list[str]:
    rows = []
    for name, runs in arms.items():
        parts = {"tokenizer": runs[0]["tokenizer"], "prior": runs[0].get("prior")}
        parts |= {
            f"{way} refiner": found["refiner"]
            for way, found in runs[0].get("samples", {}).items()
            if "refiner" in found
        }
        rows += [
            [name, part, f"{found['parameters']:,}", f"{found['steps']:,}", f"{found['images_seen']:,}"]
            for part, found in parts.items()
            if found is not None
        ]
    return markdown_table(["", "", "parameters", "steps", "images seen"], rows)
