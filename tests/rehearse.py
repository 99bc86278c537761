"""The half hour on a GPU, rehearsed on a CPU: ``make rehearse SOURCE=FOLDER LPIPS=FILE INCEPTION=FILE``.

It makes an environment that has what that machine has (Python 3.12, torch 2.11, the packages of machine_packages.txt)
and no more, and a bundle of configs/benchmarks/cifar10_gpu.yaml with networks, steps and samples of about a hundredth
of their size. Then it plays that machine: a folder to which each call brings one part, no network, an output folder
that is emptied before each call, a few files of limited size that come back. One call is killed in the middle of a
training. At the end the benchmark must be whole here: all results, and a model that draws.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers import REPOSITORY

from scq.engine.files import write_json
from scq.evaluation.benchmark.config import load_benchmark
from scq.evaluation.benchmark.plan import write_configs
from scq.evaluation.benchmark.results import BenchmarkResults, load_results
from scq.evaluation.bundle.collect import collect
from scq.evaluation.bundle.make import Budget, make_bundle
from scq.evaluation.bundle.wheels import lacking, read_packages
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.stage import TokenizerExperiment

CONFIG = REPOSITORY / "configs" / "benchmarks" / "cifar10_gpu.yaml"
PACKAGES = REPOSITORY / "tests" / "machine_packages.txt"
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scipy", "psutil", "setuptools")
SECONDS = 300  # of a call; on the device it is 560
FILES, MEGABYTES = 8, 15.5  # that come back from a call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the environment, the bundle and the machine")
    parser.add_argument("--python", default="python3.12", help="of which the environment is made")
    parser.add_argument("--source", required=True, help="CIFAR-10 as a folder of images")
    parser.add_argument("--lpips", default="", help="file of VGG16's weights")
    parser.add_argument("--inception", default="", help="file of Inception's weights")
    options = parser.parse_args()
    folder = options.folder.resolve()
    python = make_environment(options.python, folder / "venv")
    config = write_miniature(folder / "config")
    bundle, machine = folder / "bundle", folder / "machine"
    given = {
        "dataset.source": options.source,
        "measure.lpips_weights": options.lpips,
        "measure.inception_weights": options.inception,
    }
    manifest = make_bundle(
        config,
        bundle,
        packages=PACKAGES,
        budget=Budget(arm=1e5, longest=1.0, cells=((655, 8, 1024),)),
        overrides=[f"{key}={value}" for key, value in given.items() if value],
    )
    for part in manifest["parts"]:
        print(f"{part['name']}: {part['bytes'] / 2**20:.1f} MiB", flush=True)
    shutil.rmtree(machine, ignore_errors=True)
    calls = play(python, bundle, machine, manifest)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    missing = collect(calls, run)
    assert not missing, missing
    results = load_results(BenchmarkResults, run / "results.json")
    assert list(results.arms) == ["scq", "vq"]
    assert all(arm.samples["codes"].scores.fid_to_training for (arm,) in results.arms.values())
    for name in results.arms:
        pipeline = SoftConvexPipeline.from_pretrained(run / "arms" / name / "prior" / "model")
        assert pipeline(2, steps=2).images[0].size == (32, 32)
    print(f"the rehearsal went well: {run / 'report.md'}")


def make_environment(python: str, folder: Path) -> Path:
    """A virtual environment with the machine's packages as far as scq needs them; its interpreter."""
    there, interpreter = read_packages(PACKAGES), folder / "bin" / "python"
    wanted = [name for name in (*lacking({}, "3.12"), *TOOLS) if name in there]
    wanted = [f"{name}=={there[name]}" if there[name] else name for name in wanted]
    done = folder / "made.json"
    if not done.is_file() or json.loads(done.read_text()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *wanted], check=True)
        write_json(done, wanted)
    return interpreter


def write_miniature(folder: Path) -> Path:
    """The benchmark's first two arms with about a hundredth of everything."""
    config = load_benchmark(CONFIG)
    measure = replace(config.measure, reference_images=150, samples=150, neighbours=300, pictured=16)
    arms = dict(list(config.arms.items())[:2])
    return write_configs(replace(config, arms=arms, measure=measure), CONFIG.parent, folder, miniature)


def miniature(training: Any) -> Any:
    loop = replace(training.training, steps=80, batch_size=8, compile=False, log_every=5, checkpoint_every=20)
    optimizer = replace(training.optimizer, warmup_steps=5)
    small = replace(training, training=loop, optimizer=optimizer)
    if isinstance(training, TokenizerExperiment):
        loss = replace(training.loss, adversarial_start=20, adversarial_ramp=10, discriminator_lead=5)
        loss = replace(loss, discriminator_channels=8)
        return replace(small, loss=loss, architecture=replace(training.architecture, channels=[16, 16]))
    return replace(small, architecture=replace(training.architecture, width=64, depth=2, heads=2))


def play(python: Path, bundle: Path, machine: Path, manifest: dict[str, Any]) -> list[Path]:
    """Call run.sh until all is done; the folders that came back."""
    machine.mkdir(parents=True)
    parts, calls, killed = [part["name"] for part in manifest["parts"]], [], False
    for number in range(1, 40):
        for name in ("run.sh", "run.py", "manifest.json", *parts[number - 1 : number]):
            shutil.copyfile(bundle / name, machine / name)
        for name in parts[: number - 1]:  # whoever brings parts may take them away again
            (machine / name).unlink(missing_ok=True)
        returned = machine.parent / "returned" / f"call_{number:02d}"
        shutil.rmtree(returned, ignore_errors=True)
        returned.mkdir(parents=True)
        kill = not killed and number > len(parts)
        started = time.monotonic()
        code = call(python, machine, returned, kill)
        print(f"call {number}: {time.monotonic() - started:.0f} s, code {code}{', killed' if kill else ''}", flush=True)
        killed = killed or kill
        if kill:
            shutil.rmtree(returned)
            continue
        files = [path for path in returned.rglob("*") if path.is_file()]
        assert len(files) <= FILES, files
        assert all(path.stat().st_size <= MEGABYTES * 2**20 for path in files)
        assert time.monotonic() - started < SECONDS + 30
        calls.append(returned)
        assert code in (0, 75), f"a step failed: see {machine / 'work' / 'logs'}"
        if code == 0 and not any("000" in path.suffix or path.suffix[1:].isdecimal() for path in files):
            return calls
    raise AssertionError("forty calls did not suffice")


def call(python: Path, machine: Path, returned: Path, kill: bool) -> int:
    """One call on that machine, without a network; killed in the middle of a training if asked."""
    environment = {
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "HOME": str(machine),
        "SCQ_TEST_DEVICE": "cpu",
        "PYTEST_XDIST_WORKER_COUNT": "2",  # as if it shared the cores: threads that wait for each other take longest
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    arguments = ["--seconds", str(SECONDS), "--results", str(returned), "--megabytes", str(MEGABYTES)]
    command = ["unshare", "--user", "--net", "bash", "run.sh", *arguments]
    process = subprocess.Popen(command, cwd=machine, env=environment, start_new_session=True)
    run, pattern = machine / "work" / "run", "arms/*/*/checkpoints/step_*"
    before = set(run.glob(pattern))  # of what an earlier call had trained
    while process.poll() is None:
        if kill and set(run.glob(pattern)) - before:
            everything = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True)
            for pid in everything.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.2)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
