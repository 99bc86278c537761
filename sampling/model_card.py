"""The model card that is saved with a pipeline: what it is, how to use it, what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scq.sampling.pipeline import SoftConvexPipeline

STAGES = ("tokenizer", "prior", "refiner")
TWEMOJI = (
    "Trained on Twemoji graphics, copyright 2020 Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), resized to {size} pixels on white."
)


def with_numbers(measured: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What is known of a model after `evaluation.evaluate.evaluate` found new numbers: how it was trained stays."""
    return {name: measured[name] for name in ("training", "license") if name in measured} | found


def model_card(pipeline: SoftConvexPipeline) -> str:
    """README.md of a model folder, from its components' configs and from ``pipeline.measured``: what
    `evaluation.evaluate.evaluate` returned, and, as far as they are known,

    - ``training``: ``dataset``, git ``revision``, and for each of STAGES its ``steps`` and ``images_seen``;
    - ``license``: of the weights, by its name on the hub.
    """
    tokenizer, prior, refiner = pipeline.tokenizer.config, pipeline.prior.config, pipeline.refiner
    sizes = {"tokenizer": pipeline.tokenizer, "prior": pipeline.prior, "refiner": refiner}
    parameters = [f"{name} {model.num_parameters() / 1e6:.2f}M" for name, model in sizes.items() if model is not None]
    measured = pipeline.measured
    training, reference = measured.get("training", {}), measured.get("reference", {})
    emoji = "emoji" in (training.get("dataset"), reference.get("dataset"))
    licence = measured.get("license", "cc-by-4.0" if emoji else None)
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
        "from sampling import SoftConvexPipeline",
        "",
        'pipeline = SoftConvexPipeline.from_pretrained("THIS_FOLDER")',
        "images = pipeline(num_images=16, seed=0).images",
        "```",
        "",
        *(["## Training", "", *_training(training), ""] if training else []),
        "## Measured",
        "",
        *(
            _numbers(measured)
            if reference
            else ["Nothing yet: `scq evaluate --model THIS_FOLDER --data SHARDS --card`."]
        ),
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in pipeline.scheduler.config.items() if not name.startswith("_")),
        "",
    ]
    if emoji:
        lines += ["## Licence of the data", "", TWEMOJI.format(size=tokenizer.image_size), ""]
    return "\n".join(lines)


def _training(training: dict[str, Any]) -> list[str]:
    dataset, revision = training.get("dataset"), training.get("revision")
    lines = [f"- {name}: {value}" for name, value in (("dataset", dataset), ("git revision", revision)) if value]
    for stage in STAGES:
        if stage in training:
            steps, images = training[stage]["steps"], training[stage]["images_seen"]
            lines.append(f"- {stage}: {steps:,} steps, {images:,} images seen")
    return lines


def _numbers(measured: dict[str, Any]) -> list[str]:
    """What `evaluation.evaluate.evaluate` returned, as far as it is there."""
    reference = measured["reference"]
    unseen = "" if reference["split"] == "train" else ", which the model was not trained on"
    lines = [
        f"Against {reference['count']} {reference['dataset']} images of the split '{reference['split']}' "
        f"({reference['crop']} pixels){unseen}; {measured['network']['weights']}.",
        "",
    ]
    for way, found in measured.get("reconstruction", {}).items():
        fid = f", rFID {found['rfid']:.1f}" if "rfid" in found else ""
        lines.append(f"- reconstructed from {way}: MSE {found['mse']:.5f}, PSNR {found['psnr']:.2f} dB{fid}")
    usage, samples = measured.get("codebook"), measured.get("samples")
    if usage:
        lines.append(f"- codes used: {usage['used_share']:.1%}, perplexity {usage['perplexity']:.0f}")
    if samples:
        biased = " (biased)" if samples["fid_biased"] else ""
        drawn_against = measured.get("sample_reference", reference)
        against = f", against {drawn_against['count']} images of the split '{drawn_against['split']}'"
        lines.append(
            f"- {samples['count']} samples{'' if drawn_against == reference else against}: "
            f"KID x 1000 {1e3 * samples['kid']:.1f} ± {1e3 * samples['kid_error']:.1f}, "
            f"FID {samples['fid']:.1f}{biased}, precision {samples['precision']:.2f}, recall {samples['recall']:.2f}"
        )
    return lines
