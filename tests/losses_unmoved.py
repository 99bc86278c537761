"""Prove that a change moved no number: the same short trainings before and after it, compared bit for bit.

    python tests/losses_unmoved.py record BEFORE      # in a checkout without the change
    python tests/losses_unmoved.py record AFTER       # in one with it
    python tests/losses_unmoved.py compare BEFORE AFTER

``record`` trains a tokenizer (SCQ, GAN, LeCam, R1, swapped tokens, averages), a prior and both kinds of refiner for 50
steps each, draws 16 images with every sampler, and runs a small benchmark of two arms. ``compare`` prints a row for
each of them and fails where a logged term, a weight, a pixel or a result differs. Seconds and speeds are left out. Both
recordings belong on one machine: another processor adds in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
# What a clock decides, and names of places and versions.
NOT_COMPARED = frozenset(
    ["images_per_second", "data_wait_share", "seconds", "cpu_seconds", "seconds_in_all", "seconds_of"]
    + ["training_seconds", "machines", "revision", "adaptive_weight_seconds"]
)
STEPS = "training.steps=50 training.log_every=1 training.checkpoint_every=25 training.images_every=0"
TRAININGS = ("tokenizer", "prior", "refiner_regression", "refiner_flow")
SAMPLERS = ("maskgit", "halton", "ancestral", "remask")


def record(out: Path, command: list[str]) -> None:
    """Run everything below ``out``; ``command`` is the command line."""

    def scq(words: str) -> None:
        arguments = [
            str(out / word[1:]) if word.startswith("@") else word.replace("=@", f"={out}/") for word in words.split()
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run([*command, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, env=environment)

    data = "data.train=@shards/train data.validation=@shards/test"
    for split in ("train", "test"):
        scq(f"data pack twemoji @shards/{split} --format emoji --size 32 --split {split}")
    scq(
        f"train tokenizer --config configs/quickstart/tokenizer_scq.yaml out=@tokenizer {data} {STEPS} "
        "training.precision=fp32 training.batch_size=32 training.accumulate=2 data.flip=true "
        "robustness.swapped_share=0.2 loss.adversarial=0.5 loss.adversarial_start=20 loss.adversarial_ramp=10 "
        "loss.discriminator_lead=10 loss.discriminator_layers=2 loss.discriminator_channels=16 loss.lecam=0.01 "
        "loss.r1=0.1 loss.r1_every=4 loss.augment=[colour,shift,cutout]"
    )
    for split, views in (("train", 2), ("test", 1)):
        scq(f"tokenize --model @tokenizer --data @shards/{split} --out @tokens/{split} --views {views}")
    scq(
        "train prior --config configs/quickstart/prior.yaml out=@prior tokenizer=@tokenizer data.train=@tokens/train "
        f"data.validation=@tokens/test {STEPS} training.batch_size=64 architecture.dropout=0.1"
    )
    for kind, options in (("regression", "pixel_weight=1.0 resampled_share=0.3"), ("flow", "")):
        scq(
            f"train refiner --config configs/cifar10/refiner.yaml out=@refiner_{kind} tokenizer=@tokenizer "
            f"prior=@prior {data} {STEPS} training.batch_size=32 architecture.kind={kind} architecture.width=32 "
            f"architecture.depth=2 {options}"
        )
    for sampler in SAMPLERS:
        scq(f"sample --model @refiner_regression --num 16 --out @samples/{sampler} sampler={sampler}")
    scq("sample --model @refiner_flow --num 16 --out @samples/flow")
    write_benchmark(out / "benchmark")
    scq("benchmark quality --config @benchmark/benchmark.yaml --out @benchmark/run")


def write_benchmark(folder: Path) -> None:
    """A small benchmark of two arms beside the quickstart's configs."""
    quickstart = REPOSITORY / "configs" / "quickstart"
    folder.mkdir(parents=True, exist_ok=True)
    small = "training: {steps: 30, checkpoint_every: 15, log_every: 5, batch_size: 16}\n"
    for name in ("tokenizer_scq", "tokenizer_vqgan"):
        text = f"base: {quickstart}/{name}.yaml\n{small}quantizer: {{codebook_size: 64}}\n"
        (folder / f"{name}.yaml").write_text(f"{text}architecture: {{channels: [8, 16, 32]}}\n")
    text = f"base: {quickstart}/prior.yaml\n{small}architecture: {{width: 32, depth: 2, heads: 2}}\n"
    (folder / "prior.yaml").write_text(text)
    (folder / "refiner.yaml").write_text(f"{small}architecture: {{width: 16, depth: 1}}\nresampled_share: 0.3\n")
    (folder / "benchmark.yaml").write_text(
        f"base: {quickstart}/benchmark.yaml\nrefiner: refiner.yaml\n"
        "arms: {scq: {refiners: [regression], sweep: true}}\n"
        "measure: {reference_images: 48, samples: 48, pictured: 8, sweep: [steps=2, steps=4 sampler=halton], "
        "sweep_samples: 12, weight_bits: [2], neighbours: 40}\n"
    )


def compare(before: Path, after: Path) -> bool:
    """Print what is equal, and the first difference of what is not; whether all is."""
    parts = [(f"{name}: logged terms of 50 steps", _log, name) for name in TRAININGS]
    parts += [
        (f"{name}: averaged weights", _digests, f"{name}/checkpoints/step_00000050/ema.safetensors")
        for name in TRAININGS
    ]
    parts += [("tokens", _digests, "tokens/*/*.npy")]
    parts += [(f"{name}: 16 images", _digests, f"samples/{name}/*.png") for name in (*SAMPLERS, "flow")]
    parts += [("benchmark: results.json", _results, "benchmark/run/results.json")]
    equal = True
    for title, read, where in parts:
        one, other = read(before, where), read(after, where)
        same = one == other and bool(one)
        equal &= same
        print(f"{title:44} {len(one):5} values  {'identical' if same else 'DIFFERENT: ' + _difference(one, other)}")
    return equal


def _log(folder: Path, name: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {f"{row['step']} {key}": value for row in rows for key, value in row.items() if key not in NOT_COMPARED}


def _digests(folder: Path, pattern: str) -> dict[str, Any]:
    files = sorted(folder.glob(pattern))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _results(folder: Path, name: str) -> dict[str, Any]:
    return _flat(json.loads((folder / name).read_text()))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    kept = [(key, value) for key, value in items if key not in NOT_COMPARED]
    return {name: leaf for key, value in kept for name, leaf in _flat(value, f"{path}/{key}").items()}


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    name = next((name for name in [*one, *other] if one.get(name) != other.get(name)), "nothing was recorded")
    return f"{name} was {one.get(name)}, is {other.get(name)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--command", default=f"{sys.executable} -m scq", help="of the command line")
    options = parser.parse_args()
    if options.action == "record":
        record(options.folders[0].resolve(), shlex.split(options.command))
    elif not compare(*options.folders):
        raise SystemExit(1)
