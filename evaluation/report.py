"""The results of a benchmark for people: report.md and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from engine.config import write_atomically
from engine.pictures import picture_grid
from engine.tracking import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLE_HEIGHT = 28


def save_images(path: Path, images: torch.Tensor) -> None:
    """Keep uint8 images (N, 3, H, W) for the report."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.save(file, images.cpu().numpy(), allow_pickle=False)
    temporary.rename(path)


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write samples.png, reconstructions.png, curves.png and report.md to ``out``.

    Args:
        results: what evaluation.benchmark.run_benchmark measured.
        out: its folder; the arms' images and training logs are read from ``out/arms``.
    """
    arms = list(results["arms"])
    draw_samples(out, arms).save(out / "samples.png")
    draw_reconstructions(out, arms).save(out / "reconstructions.png")
    draw_curves(out, arms)
    write_atomically(out / "report.md", render(results))


def draw_samples(out: Path, arms: list[str]) -> Image.Image:
    """The arms' samples beside each other, not chosen: the first ones of the seed."""
    sheets = [picture_grid(_load_images(out / "arms" / arm / "samples.npy"), columns=8) for arm in arms]
    width = sum(sheet.width for sheet in sheets) + 24 * (len(sheets) - 1)
    picture = Image.new("RGB", (width, max(sheet.height for sheet in sheets) + TITLE_HEIGHT), "white")
    left = 0
    for arm, sheet in zip(arms, sheets, strict=True):
        _write(picture, (left, 4), f"{arm}: samples")
        picture.paste(sheet, (left, TITLE_HEIGHT))
        left += sheet.width + 24
    return picture


def draw_reconstructions(out: Path, arms: list[str]) -> Image.Image:
    """Held-out originals, then for each arm what z_q and what the dominant codes alone decode to."""
    rows: list[tuple[str, torch.Tensor]] = []
    for arm in arms:
        original, soft, dominant = _load_images(out / "arms" / arm / "reconstructions.npy").chunk(3)
        if not rows:
            rows.append(("held-out originals", original))
        if torch.equal(soft, dominant):
            rows.append((f"{arm}: reconstructed", soft))
        else:
            rows += [(f"{arm}: from z_q", soft), (f"{arm}: from dominant codes", dominant)]
    sheets = [(title, picture_grid(images, columns=len(images))) for title, images in rows]
    height = sum(sheet.height + TITLE_HEIGHT for _, sheet in sheets)
    picture = Image.new("RGB", (max(sheet.width for _, sheet in sheets), height), "white")
    top = 0
    for title, sheet in sheets:
        _write(picture, (0, top + 4), title)
        picture.paste(sheet, (0, top + TITLE_HEIGHT))
        top += sheet.height + TITLE_HEIGHT
    return picture


def draw_curves(out: Path, arms: list[str]) -> None:
    """Training curves of both stages, one line for each arm."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    panels = [("tokenizer", "l2", "tokenizer: mean squared error"), ("tokenizer", "perplexity", "codebook perplexity")]
    panels.append(("prior", "loss", "prior: masked cross-entropy"))
    for axis, (stage, key, title) in zip(axes, panels, strict=True):
        for arm in arms:
            rows = [row for row in read_metrics(out / "arms" / arm / stage) if key in row]
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], label=arm)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


def render(results: dict[str, Any]) -> str:
    """The text of report.md."""
    arms, reference = results["arms"], results["reference"]
    samples = [arm["samples"] for arm in arms.values()]
    lines = [
        f"# {results['title']}",
        "",
        f"Reference: {reference['count']} {reference['dataset']} images of the split '{reference['split']}', "
        f"{reference['crop']} pixels, which no model was trained on. Features: {results['network']['weights']}; "
        f"protocol: {results['network']['protocol']}.",
        "",
        "## Samples",
        "![samples](samples.png)",
        "",
        "KID leads; " + (samples[0]["fid_note"] or f"FID at {samples[0]['count']} samples") + ".",
        "",
        *markdown_table(
            ["", "KID x 1000", "FID (biased)" if samples[0]["fid_biased"] else "FID", "samples"],
            [
                [name, f"{1e3 * s['kid']:.1f} ± {1e3 * s['kid_error']:.1f}", f"{s['fid']:.1f}", s["count"]]
                for name, s in zip(arms, samples, strict=True)
            ],
        ),
        "",
        "## Reconstructions of held-out images",
        "![reconstructions](reconstructions.png)",
        "",
        "The prior draws dominant codes only; z_q is what the soft quantizer hands to the decoder in training. It is "
        "continuous and costs more than the rate of the codes: never compare the two as if they had one rate.",
        "",
        *markdown_table(
            ["", "decoded from", "MSE", "PSNR", "SSIM", "rFID (biased)", "rKID x 1000"], _reconstruction_rows(arms)
        ),
        "",
        "## Codebook",
        *markdown_table(
            ["", "images", "codes used", "perplexity", "bits per token", "bits per image"],
            [
                [name, part.replace("_", "-"), f"{u['used_share']:.1%}", f"{u['perplexity']:.0f}"]
                + [f"{u['bits_per_token']:.2f}", f"{u['bits_per_image']:.0f} of {u['fixed_bits_per_image']:.0f}"]
                for name, arm in arms.items()
                for part, u in arm["codebook"].items()
            ],
        ),
        "",
        "## Training",
        "![curves](curves.png)",
        "",
        *markdown_table(
            ["", "tokenizer parameters", "steps", "prior parameters", "steps"],
            [
                [name, f"{a['tokenizer']['parameters']:,}", f"{a['tokenizer']['steps']:,}"]
                + [f"{a['prior']['parameters']:,}", f"{a['prior']['steps']:,}"]
                for name, a in arms.items()
            ],
        ),
        "",
        "## Seconds",
        *markdown_table(["phase", "seconds"], [[name, f"{s:.0f}"] for name, s in results["seconds"].items()]),
        "",
        f"In all {results['seconds_in_all']:.0f} s on {results['machine']['device']} with "
        f"{results['machine']['threads']} threads, torch {results['machine']['torch']}, code at {results['revision']}.",
        "",
    ]
    return "\n".join(lines)


def summary_table(results: dict[str, Any]) -> list[str]:
    """The few numbers that a README shows, one row for each arm."""
    rows = []
    for name, arm in results["arms"].items():
        soft, dominant, samples = arm["reconstruction"]["z_q"], arm["reconstruction"]["dominant"], arm["samples"]
        usage, kid = arm["codebook"]["train"], f"{1e3 * samples['kid']:.1f} ± {1e3 * samples['kid_error']:.1f}"
        reconstruction = [f"{r['mse']:.4f} / {r['rfid']:.1f}" for r in (soft, dominant)]
        rows.append([name, *reconstruction, f"{usage['used_share']:.0%} / {usage['perplexity']:.0f}", kid])
        rows[-1].append(f"{samples['fid']:.1f}")
    head = ["arm", "z_q: MSE / rFID", "dominant codes: MSE / rFID", "codes used / perplexity", "KID x 1000", "FID"]
    return markdown_table(head, rows)


def _reconstruction_rows(arms: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for name, arm in arms.items():
        for source, r in arm["reconstruction"].items():
            numbers = [f"{r['mse']:.5f}", f"{r['psnr']:.2f}", f"{r['ssim']:.3f}", f"{r['rfid']:.1f}"]
            rows.append([name, source, *numbers, f"{1e3 * r['rkid']:.1f} ± {1e3 * r['rkid_error']:.1f}"])
    return rows


def markdown_table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A table as lines of Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _load_images(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _write(picture: Image.Image, place: tuple[int, int], text: str) -> None:
    ImageDraw.Draw(picture).text(place, text, fill="black", font=ImageFont.load_default(size=16))
