"""A phase runs again exactly when something that it depends on changed: proved for every field of a benchmark."""

import copy
import dataclasses
import hashlib
import inspect
import json
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from scq.engine.config import as_dict, load_config
from scq.engine.errors import UserError
from scq.engine.measurements import from_plain
from scq.evaluation.benchmark import config as benchmark_config
from scq.evaluation.benchmark import work
from scq.evaluation.benchmark.config import ArmConfig, BenchmarkConfig, DatasetConfig, MeasureConfig, Recipe
from scq.evaluation.benchmark.images import Images
from scq.evaluation.benchmark.phases import Job, Phase, identity
from scq.evaluation.benchmark.results import ArmResult, BenchmarkResults, Shards, load_results
from scq.evaluation.benchmark.run import list_phases
from scq.stage1_tokenizer.stage import TokenizerExperiment
from scq.stage2_prior.prior_stage import PriorExperiment
from scq.stage2_prior.refiner_stage import RefinerExperiment
from scq.stage2_prior.scheduler import UnmaskingScheduler

# ---- a job ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    number: int
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Weights:
    fingerprint: str
    seconds: float = 3.0


def phase(work: Callable[..., Any], name: str = "phase", result: type = Answer, **inputs: Any) -> Phase[Any]:
    return Phase(name, work, inputs, result)


def run(folder: Path, *phases: Phase[Any]) -> Job:
    job = Job(phases, folder)
    for each in phases:
        job.run(each)
    return job


def test_a_phase_runs_again_when_an_input_changes(tmp_path: Path) -> None:
    calls: list[int] = []

    def count(number: int) -> Answer:
        calls.append(number)
        return Answer(len(calls))

    for number, answer in ((1, 1), (1, 1), (2, 2)):
        assert run(tmp_path, phase(count, number=number)).results == {"phase": Answer(answer)}
    assert calls == [1, 2]


def test_a_job_that_goes_on_elsewhere_does_not_claim_what_it_found(tmp_path: Path) -> None:
    first = phase(lambda: Answer(1))
    run(tmp_path, first)
    kept = tmp_path / "phase.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "machine": "another", "seconds": 12.5}))
    job = run(tmp_path, first, phase(lambda: Answer(2), "next"))
    assert (job.machines["phase"], job.seconds["phase"]) == ("another", 12.5)
    assert "torch" in job.machines["next"]


def test_a_phase_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Answer:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(tmp_path, phase(fail))
    assert not list(tmp_path.iterdir())


def test_work_is_given_its_inputs_and_nothing_else(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    def train(**inputs: Any) -> Weights:
        given.append(inputs)
        return Weights("a1")

    trained = phase(train, "train", Weights, steps=3)
    measured = phase(lambda weights, count: Answer(count, weights.fingerprint), "measure", weights=trained, count=2)
    job = run(tmp_path, trained, measured)
    assert given == [{"steps": 3}]
    assert job.found(measured) == Answer(2, "a1")
    assert job.seconds["train"] == 3.0, "a result that knows its seconds says how long the phase took"
    assert json.loads((tmp_path / "measure.json").read_text())["inputs"] == {"weights": "a1", "count": 2}


def test_a_phase_stands_for_the_fingerprint_of_its_result(tmp_path: Path) -> None:
    """Trained anew with the same outcome, nothing that uses the weights runs again; with another, all of it does."""
    ran: list[str] = []

    def measure(weights: Weights) -> Answer:
        ran.append(weights.fingerprint)
        return Answer(1)

    for steps, fingerprint in ((3, "a"), (4, "a"), (5, "b")):
        trained = phase(lambda steps, f=fingerprint: Weights(f, seconds=steps), "train", Weights, steps=steps)
        run(tmp_path, trained, phase(measure, "measure", weights=trained))
    assert ran == ["a", "b"]


def test_files_of_another_shape_run_again_or_are_named(tmp_path: Path) -> None:
    kept = tmp_path / "phase.json"
    kept.write_text(json.dumps({"settings": [1], "result": {}, "seconds": 1.0}))  # as older versions wrote it
    each = phase(lambda number: Answer(number), number=7)
    assert run(tmp_path, each).found(each) == Answer(7)
    plain = json.loads(kept.read_text())
    kept.write_text(json.dumps({**plain, "result": {"number": "seven"}}))
    with pytest.raises(UserError, match=r"phase\.json \(delete it to run the phase again\) cannot be read: number: "):
        run(tmp_path, each)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"\xff", b"\0" * 40, b"[" * 100_000, b'{"seconds": "long"}'])
def test_damaged_files_of_a_benchmark_are_named_in_one_line(damaged: bytes, tmp_path: Path) -> None:
    each = phase(lambda number: Answer(number), number=7)
    run(tmp_path, each)
    (tmp_path / "phase.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"phase\.json .*delete it to run the phase again") as phases:
        run(tmp_path, each)
    (tmp_path / "results.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"results\.json ") as results:
        load_results(BenchmarkResults, tmp_path / "results.json")
    assert all(len(str(raised.value).splitlines()) == 1 for raised in (phases, results))


def test_phases_come_after_their_inputs_and_have_names_of_their_own(tmp_path: Path) -> None:
    first = phase(lambda: Answer(1), "first")
    second = phase(lambda answer: answer, "second", answer=first)
    for listed in ([second, first], [first, first], [second]):
        with pytest.raises(ValueError, match="comes twice, or before one of its inputs"):
            Job(listed, tmp_path)


# ---- a benchmark ----------------------------------------------------------------------------------------------------


class Network:
    """Stands for the Inception network, which no fake asks for features."""

    def __init__(self, fingerprint: str = "inception"):
        self.fingerprint, self.num_features = fingerprint, 2048
        self.description = self.protocol = "a network"


FILES = {
    "tokenizer": ("tokenizer.yaml", TokenizerExperiment),
    "prior": ("prior.yaml", PriorExperiment),
    "refiner": ("refiner.yaml", RefinerExperiment),
}
BASE: dict[str, Any] = {
    "tokenizer": "tokenizer.yaml",
    "prior": "prior.yaml",
    "refiner": "refiner.yaml",
    "dataset": {"source": "photos", "test_source": "more_photos"},
    "arms": {
        "scq": {"refiners": ["regression", "flow"], "seeds": 2, "sweep": True},
        "vq": {"overrides": ["quantizer.name=vq"]},
    },
    "measure": {
        **{"reference_images": 24, "sample_reference": "train", "sample_reference_images": 30, "samples": 20},
        **{"neighbours": 40, "sweep": ["steps=2"], "weight_bits": [2], "lpips_weights": "here/vgg16.pth"},
    },
}
ARMS = ("scq", "scq_seed1", "vq")
KINDS = {"scq": ("regression", "flow"), "scq_seed1": ("regression",), "vq": ()}


def of(*parts: str, arms: tuple[str, ...] = ARMS) -> set[str]:
    """These phases of every arm; those of a refiner, of every one that the arm has."""
    names = set()
    for part in parts:
        for arm in arms:
            refined = part.startswith("refined ") or part == "refiner"
            names |= {f"{arm} {kind} {part.removeprefix('refined ')}" for kind in KINDS[arm] if refined}
            names |= set() if refined else {f"{arm} {part}"}
    return names


PACKED = {"pack training images", "pack held-out images"}
OF_TRAINING = {"features of training images", "features that samples are measured against"}
OF_HELD_OUT = {"features of the held-out images"}
SWEPT = {"scq steps=2"}
MEASURED_SAMPLES = of("samples", "refined samples")
RECONSTRUCTED = of("reconstructions", "refined reconstructions")
WITH_REFINER = of("refiner", "refined reconstructions", "refined samples") | SWEPT
DRAWN = of("codes") | MEASURED_SAMPLES
WITH_PRIOR = of("prior", "likelihood") | DRAWN | WITH_REFINER
WITH_TOKENIZER = of("tokenizer", "reconstructions", "tokens", "codebook") | WITH_PRIOR
FROM_TRAINING = OF_TRAINING | WITH_TOKENIZER
FROM_HELD_OUT = OF_HELD_OUT | RECONSTRUCTED | of("codebook", "likelihood")
NOTHING: set[str] = set()


def of_scq(phases: set[str]) -> set[str]:
    return {name for name in phases if name.startswith("scq")}


# Every field, another value of it, and the phases that then run again.
DATASET = {
    "source": ("others", {"pack training images"} | FROM_TRAINING),
    "test_source": ("others", {"pack held-out images"} | FROM_HELD_OUT),
    "format": ("folder", PACKED | FROM_TRAINING | FROM_HELD_OUT),
    "size": (64, PACKED | FROM_TRAINING | FROM_HELD_OUT),
    "crop": ("center", PACKED | FROM_TRAINING | FROM_HELD_OUT),
    "encoding": ("webp", PACKED | FROM_TRAINING | FROM_HELD_OUT),
    "train_split": ("all", {"pack training images"} | FROM_TRAINING),
    "test_split": ("val", {"pack held-out images"} | FROM_HELD_OUT),
}
MEASURE = {
    "reference_images": (25, OF_HELD_OUT | RECONSTRUCTED | of("likelihood")),
    "sample_reference": ("test", MEASURED_SAMPLES | SWEPT),
    "sample_reference_images": (
        31,
        {"features that samples are measured against"} | MEASURED_SAMPLES | SWEPT,
    ),
    "samples": (21, DRAWN),
    "pictured": (8, MEASURED_SAMPLES),
    "seed": (5, DRAWN | SWEPT),
    "sweep": (["steps=3"], {"scq steps=3"}),
    "sweep_samples": (13, SWEPT),
    "weight_bits": ([3], of("reconstructions", arms=("scq", "vq"))),
    "lpips_weights": ("there/vgg16.pth", NOTHING),  # where the one network of LPIPS lies
    "inception_weights": ("there/inception.pth", NOTHING),  # the network's fingerprint counts, see below
    "neighbours": (41, {"features of training images"} | MEASURED_SAMPLES),
}
SAMPLING = {
    "steps": (16, DRAWN | SWEPT),
    "schedule": ("arccos", DRAWN | SWEPT),
    "temperature": (0.9, DRAWN | SWEPT),
    "final_temperature": (0.5, DRAWN | SWEPT),
    "top_k": (3, DRAWN | SWEPT),
    "top_p": (0.9, DRAWN | SWEPT),
    "choice_temperature": (2.0, DRAWN | SWEPT),
    "remask": (0.2, DRAWN | SWEPT),
    "sampler": ("halton", DRAWN | SWEPT),
    "guidance_scale": (1.5, DRAWN | SWEPT),
    "guidance_schedule": ("linear", DRAWN | SWEPT),
    "refine": (False, of("refined samples") | SWEPT),
    "refiner_steps": (4, of("refined samples", "refined reconstructions") | SWEPT),
}
OF_SCQ = {
    "tokenizer": ("copy.yaml", NOTHING),  # another file with the same in it
    "overrides": (["data.flip=false"], of_scq(WITH_TOKENIZER)),
    "seeds": (3, {name.replace("seed1", "seed2") for name in WITH_TOKENIZER if "seed1" in name}),
    "prior": (False, NOTHING),
    # With the flow first, it is the arm's own: the second seed trains it, and other settings are decoded with it.
    "refiners": (
        ["flow", "regression"],
        SWEPT | of("flow refiner", "flow reconstructions", "flow samples", arms=ARMS[1:2]),
    ),
    "refiner_seeds": (1, NOTHING),
    "sweep": (False, NOTHING),
}
BENCHMARK = {
    "title": ("another", NOTHING),
    "tokenizer": ("copy.yaml", NOTHING),
    "prior": ("prior_copy.yaml", NOTHING),
    "refiner": ("refiner_copy.yaml", NOTHING),
}
SECTIONS = {
    "dataset.": (DatasetConfig, DATASET),
    "measure.": (MeasureConfig, MEASURE),
    "sampling.": (UnmaskingScheduler, SAMPLING),
    "arms.scq.": (ArmConfig, OF_SCQ),
}
CASES = [(f"{prefix}{name}", *case) for prefix, (_, table) in SECTIONS.items() for name, case in table.items()]
CASES += [(name, *case) for name, case in BENCHMARK.items()]


def test_every_field_of_a_benchmark_is_in_a_table() -> None:
    for schema, table in SECTIONS.values():
        assert list(table) == [field.name for field in dataclasses.fields(schema)], schema.__name__
    named = {prefix.split(".")[0] for prefix in SECTIONS}
    assert {field.name for field in dataclasses.fields(BenchmarkConfig)} == named | set(BENCHMARK)


LOADED: dict[Any, Any] = {}


def load_once(schema: Any, path: Path, overrides: list[str] | None = None) -> Any:
    """What `load_config` gives, remembered, because most cases read the same few trainings."""
    key = schema, path.read_text(), tuple(overrides or ())
    if key not in LOADED:
        LOADED[key] = load_config(schema, path, overrides)
    return copy.deepcopy(LOADED[key])


class FakeBenchmark:
    """Runs a benchmark's list of phases with works that do nothing but name a result after its inputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in (
            "tokenizer.yaml",
            "copy.yaml",
            "prior.yaml",
            "prior_copy.yaml",
            "refiner.yaml",
            "refiner_copy.yaml",
        ):
            (folder / name).write_text("training: {seed: 0}\n")
        OmegaConf.save(BASE, folder / "benchmark.yaml")

    def listed(self, config: BenchmarkConfig, network: str = "inception") -> list[Phase[Any]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark_config, "load_config", load_once)
            return list_phases(config, self.folder, self.folder / "out", Network(network)).listed()

    def run(self, changes: list[str], network: str = "inception") -> list[str]:
        """The names of the phases that ran, beside what an earlier run left in the folder."""
        config = load_config(BenchmarkConfig, self.folder / "benchmark.yaml", changes)
        before, ran = copy.deepcopy(config), []
        listed = self.listed(config, network)
        faked: dict[str, Phase[Any]] = {}
        for each in listed:
            inputs = {name: faked[v.name] if isinstance(v, Phase) else v for name, v in each.inputs.items()}
            faked[each.name] = Phase(each.name, self._fake(each, ran), inputs, each.result)
        run(self.folder / "phases", *faked.values())
        assert config == before, "a config that was handed in was changed"
        return ran

    @staticmethod
    def _fake(phase: Phase[Any], ran: list[str]) -> Callable[..., Any]:
        def work(**inputs: Any) -> Any:
            ran.append(phase.name)
            key = json.dumps({name: identity(value, {}) for name, value in inputs.items()})
            return example(phase.result, hashlib.sha256(key.encode()).hexdigest()[:8])

        return work


def example(schema: Any, text: str) -> Any:
    """A value of a type, with ``text`` in every string."""
    if dataclasses.is_dataclass(schema):
        hints = typing.get_type_hints(schema)
        required = [field.name for field in dataclasses.fields(schema) if field.default is dataclasses.MISSING]
        return schema(**{name: example(hints[name], text) for name in required if hints[name] is not typing.Any})
    simple = {str: text, int: 1, float: 1.0, bool: False}
    return simple[schema] if schema in simple else (typing.get_origin(schema) or schema)()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a benchmark whose phases all ran."""
    folder = tmp_path_factory.mktemp("finished")
    ran = FakeBenchmark(folder).run([])
    assert set(ran) == PACKED | FROM_TRAINING | FROM_HELD_OUT
    return folder


def again(finished: Path, folder: Path, changes: list[str], network: str = "inception") -> set[str]:
    shutil.copytree(finished / "phases", folder / "phases")
    ran = FakeBenchmark(folder).run(changes, network)
    assert len(ran) == len(set(ran))
    return set(ran)


def test_every_work_takes_the_inputs_that_its_phase_names(tmp_path: Path) -> None:
    benchmark = FakeBenchmark(tmp_path)
    for each in benchmark.listed(load_config(BenchmarkConfig, tmp_path / "benchmark.yaml")):
        inspect.signature(each.work).bind(**each.inputs)


def test_nothing_runs_again_without_a_change(finished: Path, tmp_path: Path) -> None:
    assert again(finished, tmp_path, []) == NOTHING


@pytest.mark.parametrize(("field", "value", "expected"), CASES, ids=[case[0] for case in CASES])
def test_what_depends_on_a_field_runs_again(
    field: str, value: Any, expected: set[str], finished: Path, tmp_path: Path
) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    assert again(finished, tmp_path, [f"{field}={text}"]) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["measure.lpips_weights="], RECONSTRUCTED),
        (["measure.neighbours=0"], MEASURED_SAMPLES),
        # As many samples as there are real images: now their count is an input, too.
        (["measure.samples=0"], DRAWN),
        (["arms.vq.overrides=[quantizer.name=vq_ema]"], {name for name in WITH_TOKENIZER if name.startswith("vq ")}),
        (["arms.vq.sweep=true"], {"vq steps=2"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_else_changes(changes: list[str], expected: set[str], finished: Path, tmp_path: Path) -> None:
    assert again(finished, tmp_path, changes) == expected


def test_another_inception_network_measures_everything_again(finished: Path, tmp_path: Path) -> None:
    measured = OF_TRAINING | OF_HELD_OUT | RECONSTRUCTED | MEASURED_SAMPLES | SWEPT
    assert again(finished, tmp_path, [], network="another") == measured


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("tokenizer.yaml", "training: {seed: 0, steps: 7}\n", WITH_TOKENIZER),
        ("prior.yaml", "training: {seed: 1}\n", WITH_PRIOR),
        ("refiner.yaml", "pixel_weight: 2.0\n", WITH_REFINER),
    ],
)
def test_a_trainings_config_counts(file: str, text: str, expected: set[str], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "phases", tmp_path / "phases")
    benchmark = FakeBenchmark(tmp_path)
    (tmp_path / file).write_text(text)
    assert set(benchmark.run([])) == expected


# ---- what a training stands for -------------------------------------------------------------------------------------

# Where something lies, who reads it, and what chooses a best checkpoint that a benchmark does not take.
WITHOUT_A_SAY = {
    TokenizerExperiment: {
        *("out", "data.train", "data.validation", "data.cache", "data.workers", "data.max_bad"),
        *("loss.perceptual_weights", "score.images", "score.inception_weights"),
    },
    PriorExperiment: {"out", "tokenizer", "data.train", "data.validation"},
    RefinerExperiment: {
        *("out", "tokenizer", "prior", "data.train", "data.validation", "data.cache", "data.workers", "data.max_bad"),
    },
}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def changed(config: Any, field: str) -> Any:
    """A copy with another value of ``section.key``."""
    first, _, rest = field.partition(".")
    value = getattr(config, first)
    if rest:
        return dataclasses.replace(config, **{first: changed(value, rest)})
    others = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "_other"}
    other = {"new": 1} if isinstance(value, dict) else others[type(value)](value) if type(value) in others else ["new"]
    return dataclasses.replace(config, **{first: other})


@pytest.mark.parametrize("schema", WITHOUT_A_SAY, ids=lambda schema: schema.__name__)
def test_every_setting_of_a_training_counts_but_where_things_lie(schema: Any) -> None:
    config = schema()
    known = identity(Recipe(config), {})
    fields = leaves(as_dict(config))
    assert WITHOUT_A_SAY[schema] <= set(fields)
    silent = {field for field in fields if identity(Recipe(changed(config, field)), {}) == known}
    assert silent == WITHOUT_A_SAY[schema]


@pytest.mark.parametrize("train", ["tokenizer", "prior", "refiner"])
def test_a_config_that_is_handed_in_stays_as_it_is(train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained is a copy that names folders."""
    seen = []

    class Seen(Exception):
        pass

    def stage(config: Any, *_: Any) -> None:
        seen.append(config)
        raise Seen

    for name in ("TokenizerStage", "PriorStage", "RefinerStage"):
        monkeypatch.setattr(work, name, stage)
    monkeypatch.setattr(work.ArmWork, "_tokenizer", lambda *_: None)
    monkeypatch.setattr(work.ArmWork, "_pipeline", lambda *_: None)
    monkeypatch.setattr(Images, "folder", lambda *_: str(tmp_path / "train"))
    images = Images({"train": tmp_path / "train", "test": tmp_path / "test"}, tmp_path)
    arm = work.ArmWork("arm", tmp_path / "arm", tmp_path, images, "cpu")
    shards, (_, schema) = Shards("train", 3, "ab"), FILES[train]
    config = schema()
    before = copy.deepcopy(config)
    calls: dict[str, Callable[[], Any]] = {
        "tokenizer": lambda: arm.train_tokenizer(shards, Recipe(config)),
        "prior": lambda: arm.train_prior(None, None, Recipe(config)),
        "refiner": lambda: arm.train_refiner(None, None, shards, Recipe(config)),
    }
    with pytest.raises(Seen):
        calls[train]()
    assert config == before
    assert seen[0].out.startswith(str(tmp_path / "arm"))
    assert seen[0].data.train.startswith(str(tmp_path))


def test_the_kept_phases_hold_the_kept_results() -> None:
    """docs/results/cifar10_cpu can be gone on with: its phases are those that the config lists, one file each."""
    kept = REPOSITORY / "docs" / "results" / "cifar10_cpu"
    path = REPOSITORY / "configs" / "benchmarks" / "cifar10_cpu.yaml"
    benchmark = list_phases(load_config(BenchmarkConfig, path), path.parent, kept, Network())
    job = Job(benchmark.listed(), kept / "phases")
    for each in job.phases:
        file = kept / "phases" / f"{each.name.replace(' ', '_')}.json"
        if not each.name.startswith("pack"):  # every machine packs for itself
            job.results[each.name] = from_plain(each.result, json.loads(file.read_text())["result"], str(file))
    arms: dict[str, list[ArmResult]] = {}
    for name, arm in benchmark.arms:
        arms.setdefault(name, []).append(arm.result(job))
    assert arms == load_results(BenchmarkResults, kept / "results.json").arms
    assert len(list((kept / "phases").iterdir())) == len(job.results)
