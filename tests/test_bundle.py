"""Bundles: a benchmark in parts for a machine without a network, run there bit by bit, and collected again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from helpers import write_tiny_benchmark

from scq.engine.errors import UserError
from scq.evaluation.benchmark.config import load_benchmark
from scq.evaluation.benchmark.plan import pilot_of, pilot_training, scaled
from scq.evaluation.benchmark.results import BenchmarkResults, load_results
from scq.evaluation.bundle.collect import collect
from scq.evaluation.bundle.make import Budget, make_bundle, write_parts
from scq.evaluation.bundle.run import hand_out, main, unpack
from scq.evaluation.bundle.wheels import lacking, read_packages
from scq.sampling.pipeline import SoftConvexPipeline
from scq.stage1_tokenizer.stage import TokenizerExperiment

PART = 1 << 17


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A bundle of files of many sizes without steps, and what they hold."""
    generator, content = random.Random(0), tmp_path / "content"
    sizes = {"empty": 0, "code/small.py": 900, "even": PART, "weights/large.bin": 3 * PART + 17, "last": 1}
    held = {name: generator.randbytes(size) for name, size in sizes.items()} | {"text": b"as before " * 50_000}
    for name, data in held.items():
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        (content / name).write_bytes(data)
    out = tmp_path / "bundle"
    out.mkdir()
    groups = [[content / name for name in held if name.startswith("code")], [content / name for name in held]]
    parts = write_parts(content, [groups[0], [path for path in groups[1] if path not in groups[0]]], out, PART)
    manifest = {"steps": [], "report": ["run/*.json"], "models": ["run/model"], **parts}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out, held


def files_of(work: Path) -> dict[str, bytes]:
    """What was unpacked."""
    found = {str(path.relative_to(work)): path.read_bytes() for path in work.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(("parts/", "unpacked"))}


def test_parts_give_the_files_back_in_whatever_order_they_arrive(bundle, tmp_path: Path) -> None:
    out, held = bundle
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["parts"]) > 4
    assert all(part["bytes"] == (out / part["name"]).stat().st_size <= PART for part in manifest["parts"])
    here, work = tmp_path / "here", tmp_path / "work"
    here.mkdir()
    for number, part in enumerate(reversed(manifest["parts"]), 1):
        (here / part["name"]).write_bytes((out / part["name"]).read_bytes())
        assert len(unpack(manifest, here, work)) == len(manifest["parts"]) - number
        (here / part["name"]).unlink()  # what has come need not stay
        assert files_of(work).items() <= held.items()
    assert files_of(work) == held
    (work / "even").write_bytes(b"a result of the run")
    unpack(manifest, here, work)
    assert (work / "even").read_bytes() == b"a result of the run", "what was unpacked is not unpacked again"


def test_mended_code_changes_one_part_and_replaces_the_old(bundle, tmp_path: Path) -> None:
    out, held = bundle
    before, work, content = json.loads((out / "manifest.json").read_text()), tmp_path / "work", tmp_path / "content"
    assert unpack(before, out, work) == []
    mended = bytes(reversed(held["code/small.py"]))  # as many bytes
    (content / "code/small.py").write_bytes(mended)
    large = [content / name for name in held if not name.startswith("code")]
    after = write_parts(content, [[content / "code/small.py"], large], out, PART)
    assert after["parts"][0] != before["parts"][0]
    assert after["parts"][1:] == before["parts"][1:]
    assert unpack(after, out, work) == []
    assert files_of(work) == held | {"code/small.py": mended}


def test_a_damaged_part_counts_as_missing_and_says_so(bundle, tmp_path: Path, capsys) -> None:
    out, _ = bundle
    manifest = json.loads((out / "manifest.json").read_text())
    name = manifest["parts"][1]["name"]
    data = bytearray((out / name).read_bytes())
    data[PART // 2] ^= 1
    (out / name).write_bytes(data)
    assert unpack(manifest, out, tmp_path / "work") == [name]
    assert f"{name} is damaged" in capsys.readouterr().out


def test_a_part_too_small_for_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small"):
        write_parts(tmp_path, [[]], tmp_path, 1000)


def with_steps(bundle_folder: Path, *steps: tuple[str, str, bool]) -> list[str]:
    """Give a bundle steps (name, Python code, required) and return the arguments to run it in its folder."""
    file = bundle_folder / "manifest.json"
    manifest = json.loads(file.read_text())
    keys = {"needs": ["last"], "least_seconds": 1.0, "most_seconds": 60.0}
    manifest["steps"] = [
        {"name": name, "command": ["{python}", "-c", code], "required": required, **keys}
        for name, code, required in steps
    ]
    file.write_text(json.dumps(manifest))
    return ["--work", str(bundle_folder / "work"), "--results", str(bundle_folder / "results")]


@pytest.fixture
def run_here(bundle, monkeypatch) -> Path:
    """The bundle's folder, in which `main` believes to lie."""
    monkeypatch.setattr("scq.evaluation.bundle.run.__file__", str(bundle[0] / "run.py"))
    return bundle[0]


COUNT = "from pathlib import Path; f = Path('{0}'); f.write_text(f.read_text() + 'x' if f.exists() else 'x')"


def test_a_step_is_run_until_it_succeeded_once(run_here: Path, capsys) -> None:
    second = COUNT.format("second") + "; raise SystemExit(len(f.read_text()) < 3)"
    arguments = with_steps(run_here, ("first", COUNT.format("first"), True), ("second", second, True))
    assert [main(arguments) for _ in range(4)] == [1, 1, 0, 0]
    assert (run_here / "work" / "first").read_text() == "x"
    assert (run_here / "work" / "second").read_text() == "xxx"
    assert main([*arguments, "--again", "first"]) == 0
    assert (run_here / "work" / "first").read_text() == "xx"


def test_what_is_not_required_is_tried_once_and_reported(run_here: Path, capsys) -> None:
    failing = COUNT.format("tests") + "; print('one test failed'); raise SystemExit(1)"
    arguments = with_steps(run_here, ("tests", failing, False), ("main", COUNT.format("main"), True))
    assert main(arguments) == 1
    assert "one test failed" in capsys.readouterr().out
    assert main(arguments) == 0
    assert [(run_here / "work" / name).read_text() for name in ("tests", "main")] == ["x", "x"]


def test_a_step_is_stopped_in_time_and_goes_on_in_the_next_call(run_here: Path, capsys) -> None:
    saves = (
        "import signal, sys, time; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: (Path('saved').write_text('all'), sys.exit(75)))\n"
        "if Path('saved').exists(): sys.exit(0)\n"
        "time.sleep(60)"
    )
    arguments = with_steps(run_here, ("training", saves, True))
    started = time.monotonic()
    assert main([*arguments, "--seconds", "18"]) == 75
    assert time.monotonic() - started < 12
    assert "to go on in the next call" in capsys.readouterr().out
    assert main(arguments) == 0


def test_a_step_waits_for_its_files_and_for_time(run_here: Path, capsys) -> None:
    arguments = with_steps(run_here, ("training", COUNT.format("training"), True))
    assert main([*arguments, "--seconds", "10"]) == 75
    assert "waits for the next call" in capsys.readouterr().out
    manifest = json.loads((run_here / "manifest.json").read_text())
    (file,) = [each for each in manifest["files"] if each["path"] == "last"]
    (run_here / file["pieces"][0][0]).rename(run_here / "later")
    shutil.rmtree(run_here / "work")
    assert main(arguments) == 75
    assert "waits for parts" in capsys.readouterr().out
    (run_here / "later").rename(run_here / file["pieces"][0][0])
    assert main(arguments) == 0


def test_pieces_of_models_are_handed_out_over_several_calls_and_joined(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "collected"
    (work / "run" / "model").mkdir(parents=True)
    weights = random.Random(1).randbytes(5 * PART)
    (work / "run" / "model" / "weights").write_bytes(weights)
    (work / "run" / "results.json").write_text("{}")
    manifest = {"report": ["run/*.json"], "models": ["run/model", "run/other"]}
    calls = []
    for number in range(3):
        calls.append(tmp_path / f"call{number}")
        hand_out(manifest, work, calls[-1], files=5, size=PART)
        files = [path for path in calls[-1].iterdir() if not path.name.startswith(".")]
        assert len(files) <= 5
        assert all(path.stat().st_size <= PART for path in files)
    assert len(collect(calls[:1], out)) == 3
    assert not (out / "model").exists()
    assert collect(calls[1:2], out) == []
    assert (out / "model" / "weights").read_bytes() == weights
    assert (out / "results.json").read_text() == "{}"
    assert len(list(calls[2].iterdir())) == 2, "every piece is handed out once"


def test_damaged_pieces_and_other_folders_are_refused(tmp_path: Path) -> None:
    work, out, call = tmp_path / "work", tmp_path / "collected", tmp_path / "call"
    (work / "run" / "model").mkdir(parents=True)
    (work / "run" / "model" / "weights").write_bytes(random.Random(1).randbytes(PART))
    hand_out({"report": [], "models": ["run/model"]}, work, call, files=5, size=PART)
    (piece,) = call.glob("*.000")
    piece.write_bytes(b"other")
    with pytest.raises(UserError, match="damaged"):
        collect([call], out)
    with pytest.raises(UserError, match=r"pieces\.json"):
        collect([tmp_path], out)


def everything_installed() -> dict[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in installed()}


def installed() -> list[tuple[str, str]]:
    return [(each.metadata["Name"], each.version) for each in metadata.distributions() if each.metadata["Name"]]


def test_wheels_are_those_that_the_other_machine_lacks_with_all_that_they_need(tmp_path: Path) -> None:
    there = everything_installed()
    assert lacking(there, "3.12") == {}
    del there["omegaconf"], there["pydantic"], there["pydantic-core"]
    assert lacking(there, "3.12").keys() == {"omegaconf", "pydantic", "pydantic-core"}
    there = everything_installed() | {"pillow": "1.0"}
    assert lacking(there, "3.12") == {"pillow": everything_installed()["pillow"]}
    assert "gradio" not in lacking({}, "3.12")
    (tmp_path / "list").write_text("Package   Version\n-------  ----\ntorch      2.11.0\nnumba\nHuggingface_Hub==1.0\n")
    assert read_packages(tmp_path / "list") == {"torch": "2.11.0", "numba": "", "huggingface-hub": "1.0"}


def test_a_plan_changes_lengths_and_nothing_else() -> None:
    config = TokenizerExperiment()
    longer = scaled(config, 2.5)
    assert longer.training.steps == round(2.5 * config.training.steps)
    assert longer.loss.adversarial_start == round(2.5 * config.loss.adversarial_start)
    assert longer.robustness.steps == config.robustness.steps == 0
    assert longer.training.batch_size == config.training.batch_size
    assert longer.quantizer == config.quantizer
    assert scaled(config, 1e-9).training.steps == 1
    assert pilot_training(config).loss.adversarial_start == 0


def test_a_pilot_is_the_first_arm_alone(tmp_path: Path) -> None:
    config = load_benchmark(write_tiny_benchmark(tmp_path))
    pilot = pilot_of(config)
    assert list(pilot.arms) == ["scq"]
    assert (pilot.arms["scq"].refiners, pilot.measure.sweep) == ([], [])
    assert pilot.measure.reference_images == config.measure.reference_images


@pytest.mark.slow
def test_a_bundle_runs_where_nothing_is_killed_goes_on_and_comes_back(tmp_path: Path) -> None:
    config = write_tiny_benchmark(tmp_path)
    packages = tmp_path / "packages.txt"
    packages.write_text("\n".join(f"{name}=={version}" for name, version in installed()))
    out, there, handed = tmp_path / "bundle", tmp_path / "there", tmp_path / "handed"
    budget = Budget(arm=3000.0, longest=0.5)
    manifest = make_bundle(config, out, packages=packages, part_bytes=8 << 20, budget=budget)
    manifest["steps"] = [step for step in manifest["steps"] if step["required"]]
    (out / "manifest.json").write_text(json.dumps(manifest))
    there.mkdir()
    for name in ("run.sh", "run.py", "manifest.json"):
        (there / name).write_bytes((out / name).read_bytes())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def call(number: int) -> list[str]:
        return ["bash", str(there / "run.sh"), "--results", str(handed / str(number)), "--seconds", "300"]

    for part in manifest["parts"]:
        done = subprocess.run(call(0), env=environment, capture_output=True, text=True)
        assert done.returncode == 75, done.stdout
        (there / part["name"]).write_bytes((out / part["name"]).read_bytes())
    process = subprocess.Popen(call(1), env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list(there.glob("work/run/pilot/phases/scq_tokenizer.json")) and time.monotonic() < deadline:
        time.sleep(0.5)
    for group in (process.pid, *children_of(process.pid)):  # as a machine does that is taken away
        os.killpg(group, signal.SIGKILL)
    process.wait()
    done = subprocess.run(call(2), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "done before" in (there / "work" / "logs" / "plan.txt").read_text()
    for number in (3, 4):
        subprocess.run(call(number), env=environment, check=True, capture_output=True)
    calls = sorted(handed.iterdir())
    assert collect(calls, tmp_path / "run") == []
    results = load_results(BenchmarkResults, tmp_path / "run" / "results.json")
    assert list(results.arms) == ["scq", "vqgan"]
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["factor"] == 0.5
    assert [arm[0].prior.steps for arm in results.arms.values()] == [6, 6]
    model = next((tmp_path / "run" / "arms" / "scq").glob("prior/model"))
    assert SoftConvexPipeline.from_pretrained(model)(1, steps=2).images[0].size == (32, 32)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]
