"""What comes with a run, a model or a set is data: nothing in it is looked up, and no secret of ours gets into it."""

import http.server
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import make_pipe, within
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_prior import stripes_config, stripes_tokenizer, train_prior, write_stripes

from scq.engine.config import load_config, read_saved_config, save_config, saved_form
from scq.engine.errors import UserError
from scq.engine.measurements import Measured, NetworkUsed, RealSet, Reconstruction, TrainingFacts
from scq.engine.references import Referenced, shown
from scq.engine.run import run
from scq.evaluation.benchmark.config import BenchmarkConfig, load_benchmark, load_recipes
from scq.evaluation.benchmark.phases import identity
from scq.sampling.pipeline import EMBEDDED
from scq.stage1_tokenizer.autoencoder import ImageTokenizer
from scq.stage1_tokenizer.model_folder import save_network
from scq.stage1_tokenizer.stage import TokenizerExperiment
from scq.stage2_prior.model_card import model_card
from scq.stage2_prior.model_folder import open_model
from scq.stage2_prior.prior_stage import PriorExperiment, PriorStage
from scq.stage2_prior.scheduler import UnmaskingScheduler, parse_settings

SECRET = "hunter2"
FEW = ["training.steps=2", "training.checkpoint_every=1", "training.images_every=0"]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", SECRET)
    monkeypatch.setenv("SEED", "7")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a server was asked for, and what was looked up in the environment through a config."""
    log: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            log.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SERVER", f"http://127.0.0.1:{server.server_port}")
    OmegaConf.register_new_resolver("spy", lambda name: log.append(name) or name, use_cache=False)  # 2.3 has no other
    yield log
    OmegaConf.clear_resolver("spy")
    server.shutdown()
    server.server_close()


def everything_in(folder: Path) -> bytes:
    """The bytes of all files below a folder, and their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return b"\n".join(str(path.relative_to(folder)).encode() + b"\n" + path.read_bytes() for path in files)


# ---- what is saved of a user's own config --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "used", "saved"),
    [
        ("data.train=http://host/${oc.env:KEY}", "http://host/hunter2", "http://host/${oc.env:KEY}"),
        ("data.train=${oc.env:NOPE,${oc.env:KEY}}/x", "hunter2/x", "${oc.env:NOPE,${oc.env:KEY}}/x"),
        ("data.train=${out}/x", "runs/x", "runs/x"),
        ("data.train=${score.inception_weights}/x", "hunter2/x", "${oc.env:KEY}/x"),
        ("data.train=${.cache}/x", "hunter2/x", "${oc.env:KEY}/x"),
        ("data.train=a\\${oc.env:KEY}", "a${oc.env:KEY}", "a\\${oc.env:KEY}"),
        ("data.train=a\\\\${oc.env:KEY}", "a\\hunter2", "a\\\\${oc.env:KEY}"),
        ("quantizer.options.a=${oc.env:KEY}", None, None),
        ("loss.augment=['${oc.env:KEY}']", None, None),
        ("loss.perceptual_weights=~/${oc.env:KEY}", None, "~/${oc.env:KEY}"),
        ("data.train=http://ada:hunter2@host/x", "http://ada:hunter2@host/x", "http://***@host/x"),
        ("data.train=https://host/x?Signature=hunter2", "https://host/x?Signature=hunter2", "https://host/x?***"),
        ("data.train=http://${oc.env:KEY}@host/", "http://hunter2@host/", "http://${oc.env:KEY}@host/"),
        (
            "data.train=http://a:hunter2@host/${oc.env:SEED}",
            "http://a:hunter2@host/7",
            "http://***@host/${oc.env:SEED}",
        ),
        ("training.seed=${oc.env:SEED}", 7, 7),
    ],
)
def test_a_saved_config_keeps_references_and_no_secret(
    override: str, used: str | None, saved: str | None, tmp_path: Path
) -> None:
    own = ["out=runs", "score.inception_weights=${oc.env:KEY}", "data.cache=${oc.env:KEY}", override]
    config = load_config(TokenizerExperiment, None, own)
    save_config(config, tmp_path / "config.yaml")
    assert SECRET not in (tmp_path / "config.yaml").read_text()
    key = override.partition("=")[0]
    found, section = saved_form(config), config
    for part in key.split(".")[:-1]:
        found, section = found[part], getattr(section, part)
    name = key.split(".")[-1]
    if used is not None:
        assert getattr(section, name) == used
    if saved is not None:
        assert found[name] == saved
    if "***" not in str(saved):
        again = load_config(TokenizerExperiment, tmp_path / "config.yaml")
        assert again == config
        assert saved_form(again) == saved_form(config), "what was loaded is saved the same"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_any_text_is_saved_and_read_as_it_was(text: str) -> None:
    experiment = TokenizerExperiment(out=text)
    experiment.quantizer.options = {"a": text, "b": [text], text: 1}
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("scq.engine.config.write_file", lambda path, content: written.append(content))
        save_config(experiment, Path("config.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(written[0].encode())
        assert read_saved_config(TokenizerExperiment, path) == saved_form(experiment)


def test_a_run_folder_and_its_trackers_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stripes(tmp_path / SECRET)
    monkeypatch.setenv("TOKENS", str(tmp_path / SECRET))
    told: list[object] = []
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *_, **settings: told.append(settings))
    monkeypatch.setattr("scq.engine.tracking.checked_tracker", lambda tracker: None)
    monkeypatch.setattr("scq.engine.accelerators.checked_tracker", lambda tracker: None, raising=False)
    given = stripes_config(tmp_path, tmp_path / "run", "data.train=${oc.env:TOKENS}", "training.tracker=wandb", *FEW)
    train_prior(given)
    assert (tmp_path / "run" / "model").is_dir()
    assert SECRET.encode() not in everything_in(tmp_path / "run")
    assert "${oc.env:TOKENS}" in str(told)
    assert SECRET not in str(told)
    again = load_config(PriorExperiment, tmp_path / "run" / "config.yaml", ["training.steps=3"])
    assert again.data.train == str(tmp_path / SECRET)
    assert train_prior(again).steps == 3, "a run goes on with its own saved config"


def test_a_run_with_references_goes_on_only_with_what_they_stood_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    monkeypatch.setenv("SCHEDULE", "constant")
    own = ["optimizer.schedule=${oc.env:SCHEDULE}", "training.seed=${oc.env:SEED}", *FEW]

    def train(*more: str) -> int:
        return train_prior(stripes_config(tokens, tmp_path / "run", *own, *more)).steps

    assert train() == 2
    assert train("training.steps=3") == 3
    monkeypatch.setenv("SEED", "8")
    with pytest.raises(UserError, match=r"holds a run with training\.seed=7, but this run asks for 8"):
        train("training.steps=4")
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("SCHEDULE", "cosine")
    with pytest.raises(UserError, match=r"optimizer.schedule='\${oc.env:SCHEDULE}', which stands for something else"):
        train("training.steps=4")
    assert b"constant" not in (tmp_path / "run" / "references.json").read_bytes()


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """It saved what its references stood for."""
    tokens = write_stripes(tmp_path / "tokens")
    own = stripes_config(tokens, tmp_path / "run", "optimizer.schedule=constant", *FEW)
    train_prior(own)
    (tmp_path / "run" / "config.yaml").write_text("# resolved by scq\n" + OmegaConf.to_yaml(OmegaConf.structured(own)))
    more = ["optimizer.schedule=${oc.env:NOPE,constant}", *FEW, "training.steps=3"]
    assert train_prior(stripes_config(tokens, tmp_path / "run", *more)).steps == 3


def test_a_run_whose_config_is_gone_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    train_prior(stripes_config(tokens, tmp_path / "run", *FEW))
    assert "config.yaml" not in capsys.readouterr().err
    (tmp_path / "run" / "config.yaml").unlink()
    assert train_prior(stripes_config(tokens, tmp_path / "run", *FEW, "training.steps=3")).steps == 3
    assert "run lacks its config.yaml: its checkpoints may be of a run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("file", [".lock", "metrics.jsonl"])
def test_a_pipe_in_a_run_is_not_waited_for(file: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make_pipe(tmp_path / "run" / file)
    with within(30), pytest.raises(OSError) as refused:
        train_prior(stripes_config(write_stripes(tmp_path / "tokens"), tmp_path / "run", *FEW))
    assert refused.value.filename == str(tmp_path / "run" / file)


def test_overrides_in_a_benchmarks_config_keep_their_references(tmp_path: Path) -> None:
    for name in ("tokenizer", "prior"):
        (tmp_path / f"{name}.yaml").write_text(f"out: {name}\n")
    (tmp_path / "benchmark.yaml").write_text(
        "prior: prior.yaml\ntokenizer: tokenizer.yaml\ndataset: {source: '${oc.env:KEY}'}\n"
        "arms: {scq: {prior: true, overrides: ['data.cache=/cache/${oc.env:KEY}']}, b: {}}\n"
    )
    config = load_benchmark(tmp_path / "benchmark.yaml")
    recipe = load_recipes(config, tmp_path, config.arms["scq"], seed=1).tokenizer
    assert recipe.config.data.cache == f"/cache/{SECRET}"
    assert saved_form(recipe.config)["data"]["cache"] == "/cache/${oc.env:KEY}"
    first = identity({"source": config.dataset.source}, {})
    assert SECRET not in str(first), "a phase's file does not hold it"
    other = identity({"source": Referenced("other", "${oc.env:KEY}")}, {})
    assert first != other, "but the phase runs again when it changes"


# ---- what comes with a run or a model ------------------------------------------------------------------------------

HOSTILE = """
data: {train: "${oc.env:SERVER}/${oc.env:KEY}", validation: "${spy:validation}"}
optimizer: {schedule: "${spy:schedule}"}
masking: {schedule: "${oc.env:KEY}"}
"""


@pytest.mark.parametrize("text", [HOSTILE, "base: ../base.yaml\n", "base: '${spy:base}'\n", "optimizer: ${spy:all}\n"])
def test_a_config_in_a_run_folder_is_read_as_data(text: str, tmp_path: Path, asked: list[str]) -> None:
    tokens = write_stripes(tmp_path / "tokens")
    (tmp_path / "base.yaml").write_text("masking: {schedule: exp}\noptimizer: {schedule: '${spy:base}'}\n")
    train_prior(stripes_config(tokens, tmp_path / "run", *FEW))
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        train_prior(stripes_config(tokens, tmp_path / "run", *FEW, "training.steps=3"))
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)
    assert asked == []


def test_nothing_of_a_tokenizers_folder_but_its_model_is_used(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer that a prior names, in a run's folder with a config of its own."""
    tokenizer = stripes_tokenizer()
    tokens = write_stripes(tmp_path / "tokens", ImageTokenizer.fingerprint(tokenizer))
    save_network(tokenizer, tmp_path / "foreign" / "model")
    for folder in (tmp_path / "foreign", tmp_path / "foreign" / "model"):
        (folder / "config.yaml").write_text(HOSTILE)
    config = stripes_config(tokens, tmp_path / "run", *FEW)
    config.tokenizer = str(tmp_path / "foreign")
    run(PriorStage(config))
    assert (tmp_path / "run" / "model" / "README.md").is_file()
    assert asked == []
    assert SECRET.encode() not in everything_in(tmp_path / "run")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, "alias"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 100_000, "nested too deeply"),
        ("a: " + "x" * 2**21, "larger than"),
        ("- a\n", "must hold a mapping"),
        ("text", "must hold a mapping"),
        ("a: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("a: !!int [x]\n", "not valid YAML"),
        ("a: !!timestamp x\n", "not valid YAML"),
        ("a: 1\na: 2\n", "stands twice"),
        ("? [a]\n: 1\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_damaged_or_hostile_saved_config_is_named(content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=said) as error:
        read_saved_config(TokenizerExperiment, path)
    assert "config.yaml" in str(error.value)
    assert "\n" not in str(error.value)


# ---- text stays as typed -------------------------------------------------------------------------------------------

# fmt: off
TYPED = [
    "007", "12:30:00", "run #1", "yes", "no", "on", "null", "None", "~x", "0x10", "1e3", "1_000", "2026-01-02", "a: b",
    "[a", "{a", "'a'", '"a', "*a", "&a", "!a", "%a", "@a", " a ", "", "a=b", "- a", "true", ".5", "<<",
]
# fmt: on


@pytest.mark.parametrize("text", TYPED)
def test_text_on_the_command_line_stays_as_typed(text: str) -> None:
    assert load_config(TokenizerExperiment, None, [f"out={text}"]).out == text
    with pytest.raises(UserError, match=re.escape(f"schedule={text!r} must be one of")):
        parse_settings([f"schedule={text}", "steps=007"])


@pytest.mark.parametrize(
    ("text", "value"),
    [(each, each) for each in ("007", "12:30:00", "yes", "No", "0x10", "1e3", "1_000", "2026-01-02", "true", "3.10")]
    + [("run #1", "run"), ("'run #1'", "run #1"), ("a#b", "a#b"), ("!!str 007", "007"), ("=", "=")],
)
def test_text_in_a_file_stays_as_typed(text: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(f"out: {text}\nloss: {{augment: [{text.split(' #')[0]}]}}\n")
    if text.startswith("'"):
        (tmp_path / "one.yaml").write_text(f"out: {text}\n")
    assert load_config(TokenizerExperiment, tmp_path / "one.yaml").out == value
    (tmp_path / "arms.yaml").write_text(f"arms: {{{value if ' ' not in value else 'x'}: {{seeds: 2}}}}\n")
    assert list(load_config(BenchmarkConfig, tmp_path / "arms.yaml").arms) == [value if " " not in value else "x"]


def test_other_values_are_read_by_their_declared_type(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "data: {flip: no, workers: 007}\noptimizer: {learning_rate: 1e-4, betas: [.5, 9.e-1]}\n"
        "quantizer: {options: {a: 12:30:00, b: yes, c: true, d: 0o17, e: .inf, f: ~, g: '1', h: 1}}\n"
    )
    config = load_config(TokenizerExperiment, tmp_path / "one.yaml", ["training.compile=yes", "loss.augment=[007,no]"])
    assert (config.data.flip, config.data.workers, config.training.compile) == (False, 7, True)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (1e-4, [0.5, 0.9])
    assert config.loss.augment == ["007", "no"]
    options = {"a": "12:30:00", "b": "yes", "c": True, "d": 15, "e": float("inf"), "f": None, "g": "1", "h": 1}
    assert config.quantizer.options == options
    assert isinstance(config.quantizer.options["h"], int)
    assert parse_settings(["final_temperature=0.5", "refine=no"]) == {"final_temperature": 0.5, "refine": False}
    for wrong in ("training.steps=12:30", "data.flip=maybe", "out=???", "training.steps=8 # many"):
        with pytest.raises(UserError, match=re.escape(wrong.partition("=")[0])):
            load_config(TokenizerExperiment, None, [wrong])


def test_a_file_may_use_anchors_and_merge_keys(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "arms:\n  a: &a {tokenizer: 007, seeds: 2}\n  b:\n    <<: *a\n    seeds: 3\nsampling: {steps: 007}\n"
    )
    config = load_config(BenchmarkConfig, tmp_path / "one.yaml")
    assert (config.arms["b"].tokenizer, config.arms["b"].seeds, config.sampling.steps) == ("007", 3, 7)
    assert isinstance(config.sampling, UnmaskingScheduler)


def test_what_is_shown_of_a_location() -> None:
    assert shown(Path("runs/a?b@c")) == "runs/a?b@c"
    assert shown("hf://datasets/ada/set@main/x") == "hf://datasets/ada/set@main/x"
    assert shown("http://a:p@ss@host:1/b@c?d#e") == "http://***@host:1/b@c?***"


# ---- a model of somebody else ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"}},
        {"quantization_config": {"quant_method": "quanto", "weights_dtype": "int8"}},
        {"quantization_config": 5},
        [],
    ],
)
def test_a_models_config_loads_no_other_library(part: str, config: object, tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config} if isinstance(config, dict) else config))
    said = r"config.json (has an unknown key .quantization_config.|must hold an object)"
    with pytest.raises(UserError, match=said) as error:
        open_model(tmp_path / "model")
    assert "\n" not in str(error.value)


HOSTILE_NAME = "x\n\n---\n![](http://host/p.png) [a](b) <img src=http://host/p.png> `c`\nlicense: mit"


def test_a_card_shows_what_a_file_names_as_words(tmp_path: Path) -> None:
    model, _ = open_model(EMBEDDED)
    reference = RealSet(HOSTILE_NAME, HOSTILE_NAME, 10, HOSTILE_NAME)
    measured = Measured(
        training=TrainingFacts(dataset=HOSTILE_NAME, revision=HOSTILE_NAME),
        license=HOSTILE_NAME,
        reference=reference,
        network=NetworkUsed(HOSTILE_NAME, "", ""),
        reconstruction={HOSTILE_NAME: Reconstruction(0.1, 20.0, 0.5, 10)},
    )
    card = model_card(model, measured)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == HOSTILE_NAME
    assert "\nlicense" not in body
    for raw in ("![](", "[a](", "<img"):
        assert re.search(r"(?<!\\)" + re.escape(raw), body) is None
    assert body.count("```") == 2
    for kept in ("cifar10", "LSUN_church, 256 px (center)"):
        assert f"- dataset: {kept}" in model_card(model, Measured(training=TrainingFacts(dataset=kept)))
