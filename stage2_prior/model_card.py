"""The model card that is saved with a model: what it is, how to use it, what was measured."""

from __future__ import annotations

import json
import re

from scq.engine.measurements import Measured, TrainingFacts
from scq.stage2_prior.model import Model

STAGES = ("tokenizer", "prior", "refiner")
TWEMOJI = (
    "Trained on Twemoji graphics, copyright 2020 Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), resized to {size} pixels on white."
)


def model_card(model: Model, measured: Measured) -> str:
    """The text of README.md in a model's folder, from the configs of its networks and from what was measured."""
    tokenizer, prior = model.tokenizer.config, model.prior.config
    parameters = [f"{name} {network.num_parameters() / 1e6:.2f}M" for name, network in model.networks().items()]
    training, reference = measured.training, measured.reference
    settings = [pair for pair in model.scheduler.config.items() if not pair[0].startswith("_")]
    emoji = "emoji" in (training.dataset, reference.dataset if reference else None)
    licence = measured.license or ("cc-by-4.0" if emoji else None)
    if licence and not re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        licence = json.dumps(licence)  # which is YAML, too, and one line
    lines = [
        "---",
        "library_name: diffusers",
        *([] if prior.num_classes else ["pipeline_tag: unconditional-image-generation"]),
        *([f"license: {licence}"] if licence else []),
        "tags: [soft-convex-quantization, masked-transformer, image-generation]",
        "---",
        "# Images from soft convex quantization" if tokenizer.quantizer_name == "scq" else "# Images from codes",
        "",
        f"{tokenizer.image_size} pixels, {prior.grid[0]}x{prior.grid[1]} tokens out of {prior.codebook_size} codes of "
        f"{tokenizer.latent_dim} channels, quantizer `{tokenizer.quantizer_name}`"
        + (f", {prior.num_classes} classes" if prior.num_classes else "")
        + f". Parameters: {', '.join(parameters)}.",
        "",
        "```python",
        "from scq import SoftConvexPipeline",
        "",
        'pipeline = SoftConvexPipeline.from_pretrained("THIS_FOLDER")',
        "images = pipeline(num_images=16, seed=0).images",
        "```",
        "",
        *_training(training),
        "## Measured",
        "",
        *_numbers(measured),
        "",
        "## Settings",
        "",
        *(f"- {as_words(name)}: {as_words(value)}" for name, value in settings),
        "",
    ]
    if emoji:
        lines += ["## Licence of the data", "", TWEMOJI.format(size=tokenizer.image_size), ""]
    return "\n".join(lines)


def as_words(value: object) -> str:
    """A value from a file as words in one line of Markdown: no link, picture, HTML or further line comes of it."""
    return re.sub(r"([\\`<>\[\]!])", r"\\\1", " ".join(str(value).split()))


def _training(training: TrainingFacts) -> list[str]:
    named = (("dataset", training.dataset), ("git revision", training.revision))
    lines = [f"- {name}: {as_words(value)}" for name, value in named if value]
    for stage in STAGES:
        trained = getattr(training, stage)
        if trained is not None:
            lines.append(f"- {stage}: {trained.steps:,} steps, {trained.images_seen:,} images seen")
    return ["## Training", "", *lines, ""] if lines else []


def _numbers(measured: Measured) -> list[str]:
    """What `scq evaluate` has found so far."""
    reference = measured.reference
    if reference is None:
        return ["Nothing yet: `scq evaluate --model THIS_FOLDER --data SHARDS --card`."]
    unseen = "" if reference.split == "train" else ", which the model was not trained on"
    weights = f"; {as_words(measured.network.weights)}" if measured.network else ""
    lines = [
        f"Against {reference.count} {as_words(reference.dataset)} images of the split '{as_words(reference.split)}' "
        f"({as_words(reference.crop)} pixels){unseen}{weights}.",
        "",
    ]
    for way, found in measured.reconstruction.items():
        fid = "" if found.rfid is None else f", rFID {found.rfid:.1f}"
        lines.append(f"- reconstructed from {as_words(way)}: MSE {found.mse:.5f}, PSNR {found.psnr:.2f} dB{fid}")
    usage, samples = measured.codebook, measured.samples
    if usage is not None:
        lines.append(f"- codes used: {usage.used_share:.1%}, perplexity {usage.perplexity:.0f}")
    if samples is not None:
        biased = " (biased)" if samples.fid_biased else ""
        drawn_against = measured.sample_reference or reference
        against = f", against {drawn_against.count} images of the split '{as_words(drawn_against.split)}'"
        lines.append(
            f"- {samples.count} samples{'' if drawn_against == reference else against}: "
            f"KID x 1000 {1e3 * samples.kid:.1f} ± {1e3 * samples.kid_error:.1f}, "
            f"FID {samples.fid:.1f}{biased}, precision {samples.precision:.2f}, recall {samples.recall:.2f}"
        )
    return lines
