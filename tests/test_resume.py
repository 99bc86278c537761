"""Training goes on bit for bit after a kill, and two processes train what one would."""

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import REPOSITORY, SEVERAL, launcher, run_scq
from safetensors.torch import load_file, save_file
from test_checkpoint import without_digests

from scq.engine.checkpoint import Checkpoints
from scq.engine.tracking import read_metrics

CONFIG = REPOSITORY / "configs" / "quickstart" / "tokenizer_scq.yaml"
TINY = [
    "quantizer.codebook_size=32", "architecture.channels=[8,16]", "training.batch_size=8", "training.log_every=1",
    "training.images_every=0", "training.precision=fp32", "loss.adversarial=0.5", "loss.adversarial_start=4",
    "loss.discriminator_lead=2", "loss.adversarial_ramp=2", "loss.discriminator_channels=8",
    "loss.discriminator_layers=1", "training.ema_decay=0.9",
]  # fmt: skip


def command(emoji: dict[str, Path], out: Path, *more: str) -> list[str]:
    return [
        *("train", "tokenizer", "--config", str(CONFIG), f"out={out}", f"data.train={emoji['train']}"),
        *(f"data.validation={emoji['test']}", *TINY, *more),
    ]


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    return load_file(newest / f"{name}.safetensors")


def launch(processes: int, arguments: list[str]) -> subprocess.Popen:
    """`scq` in so many processes."""
    return subprocess.Popen(
        [*launcher(processes), "-m", "scq", *arguments],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=SEVERAL if processes > 1 else None,
    )


def finish(process: subprocess.Popen, processes: int = 1) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (f"{processes} processes" in errors) == (processes > 1), "as many as were asked for"


@pytest.mark.parametrize(("processes", "optimizer"), [(1, "muon"), (2, "adamw")])
def test_a_killed_run_goes_on_bit_for_bit(
    processes: int, optimizer: str, emoji: dict[str, Path], tmp_path: Path
) -> None:
    """Weights, averages, discriminator and LeCam's means after kill -9 and resume equal those of a whole run."""
    steps = ["training.steps=40", "training.checkpoint_every=6", "loss.lecam=0.1", "loss.augment=[shift]"]
    steps.append(f"optimizer.name={optimizer}")
    finish(launch(processes, command(emoji, tmp_path / "whole", *steps)), processes)

    killed = tmp_path / "killed"
    process = launch(processes, command(emoji, killed, *steps))
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()  # SIGKILL; the launcher's workers are sessions of their own
    process.communicate()
    assert not (killed / "model").exists(), "the run ended before it could be killed"
    finish(launch(processes, command(emoji, killed, *steps)), processes)

    for name in ("model", "ema", "discriminator", "lecam"):
        first, second = weights(tmp_path / "whole", name), weights(killed, name)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), f"{name}: {key}"
    clocks = ("images_per_second", "data_wait_share", "cpu_seconds")
    rows = [
        [{name: value for name, value in row.items() if name not in clocks} for row in read_metrics(run)]
        for run in (tmp_path / "whole", killed)
    ]
    assert rows[0] == rows[1], "each step stands in the log once, with the same losses"
    assert [row["step"] for row in rows[0]] == list(range(1, 41))


def test_two_processes_train_what_one_would(emoji: dict[str, Path], tmp_path: Path) -> None:
    steps = ["training.steps=8", "training.checkpoint_every=1", "training.keep_checkpoints=8"]
    finish(launch(1, command(emoji, tmp_path / "one", *steps)))
    finish(launch(2, command(emoji, tmp_path / "two", *steps)), 2)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    begun = load_file(tmp_path / "one" / "checkpoints" / "step_00000001" / "model.safetensors")
    apart = moved = 0.0
    for key in first:
        if key.endswith("counts"):  # a latent between two codes may go to either
            assert (first[key] - second[key]).abs().sum() <= 0.02 * first[key].sum(), key
        else:
            assert torch.allclose(first[key].float(), second[key].float(), atol=5e-3), key
            apart += float((first[key] - second[key]).double().square().sum())
            moved += float((first[key] - begun[key]).double().square().sum())
    assert moved > 0
    assert apart**0.5 < 0.02 * moved**0.5, "rounding, beside the way that the weights went"
    losses = [[row["l2"] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5), "the mean over processes is logged"
    assert losses[1] == pytest.approx(losses[0], rel=0.02), "rounding grows with the steps"


GRADIENTS = """
import sys
import torch
import scq.engine.stage
from scq.engine.config import load_config
from scq.engine.accelerators import make_accelerator
from scq.engine.processes import leave_processes
from scq.stage1_tokenizer.stage import TokenizerExperiment, TokenizerStage

out, path, *settings = sys.argv[1:]
stage = TokenizerStage(load_config(TokenizerExperiment, path, settings))
accelerator = make_accelerator(stage.config.training)
stream = stage.open_stream(accelerator)
found = []


def keep(module, *_):
    found.append({name.removeprefix("module."): p.grad.clone() for name, p in module.named_parameters()})
    module.zero_grad()
    return torch.zeros(())


scq.engine.stage.optimizer_step = keep
task = stage.build(accelerator)
task.training_step(next(iter(stream)), 0)
if accelerator.is_main_process:
    torch.save({"gradients": found, "buffers": dict(task.modules["model"].named_buffers())}, out)
leave_processes()
"""


def test_two_processes_have_the_gradients_of_one(emoji: dict[str, Path], tmp_path: Path) -> None:
    """Of autoencoder and discriminator, after k-means over all, with the adaptive weight."""
    program = tmp_path / "program.py"
    program.write_text(GRADIENTS)
    settings = [*TINY, f"data.train={emoji['train']}", "loss.adversarial_start=0", "loss.discriminator_lead=0"]
    settings += ["loss.adversarial_ramp=0", "loss.lecam=0.1", "loss.augment=[colour,shift]"]
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        command = [*launcher(processes), str(program), str(out), str(CONFIG), *settings]
        result = subprocess.run(command, env=SEVERAL, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert len(one["gradients"]) == len(two["gradients"]) == 2
    for first, second in zip(one["gradients"], two["gradients"], strict=True):
        assert first.keys() == second.keys()
        largest = max(float(gradient.abs().max()) for gradient in first.values())
        assert largest > 1e-3
        for name, gradient in first.items():
            torch.testing.assert_close(second[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
    for name, buffer in one["buffers"].items():
        torch.testing.assert_close(two["buffers"][name], buffer, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_main_process_scores_alone_while_the_others_wait(emoji: dict[str, Path], tmp_path: Path) -> None:
    steps = ["training.steps=4", "training.checkpoint_every=2", "score.images=9"]
    for processes in (1, 2):
        finish(launch(processes, command(emoji, tmp_path / str(processes), *steps)), processes)
        scored = {row["step"]: row["rfid"] for row in read_metrics(tmp_path / str(processes)) if "rfid" in row}
        assert scored.keys() == {2, 4}
        assert all(score > 0 for score in scored.values())
        assert (tmp_path / str(processes) / "best" / "config.json").is_file()


def test_a_run_folder_refuses_other_settings(emoji: dict[str, Path], tmp_path: Path) -> None:
    steps = ["training.steps=2", "training.checkpoint_every=2"]
    assert run_scq(*command(emoji, tmp_path / "run", *steps)).returncode == 0
    other = run_scq(*command(emoji, tmp_path / "run", *steps, "optimizer.learning_rate=0.5"))
    assert other.returncode == 2
    assert "optimizer.learning_rate" in other.stderr
    before = [(tmp_path / "run" / name).read_text() for name in ("config.yaml", "metrics.jsonl")]
    data = run_scq(*command(emoji, tmp_path / "run", "training.steps=4"), f"data.train={emoji['test']}")
    assert data.returncode == 2, "going on with other data would not be the same run"
    assert [(tmp_path / "run" / name).read_text() for name in ("config.yaml", "metrics.jsonl")] == before
    more = run_scq(*command(emoji, tmp_path / "run", "training.steps=4", "training.checkpoint_every=2"))
    assert more.returncode == 0, more.stderr
    fewer = run_scq(*command(emoji, tmp_path / "run", "training.steps=3", "training.checkpoint_every=2"))
    assert fewer.returncode == 2, "a model of 4 steps is none of 3"
    assert "has already been trained for 4 steps, but training.steps=3" in fewer.stderr


def test_settings_may_change_until_something_is_trained(emoji: dict[str, Path], tmp_path: Path) -> None:
    steps, run = ["training.steps=2", "training.checkpoint_every=2"], tmp_path / "run"
    uneven = command(emoji, run, *steps, "training.accumulate=3")
    refused = run_scq(*uneven, "--dry-run")
    assert refused.returncode == 2
    assert "training.accumulate=3 does not divide the 8 images" in refused.stderr
    run.mkdir()
    (run / "config.yaml").write_text("optimizer: {learning_rate: 0.5}\n")  # as a run that was killed before it saved
    assert run_scq(*command(emoji, run, *steps)).returncode == 0


def test_two_processes_do_not_train_in_one_folder(emoji: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = launch(1, command(emoji, run, "training.steps=100000", "training.checkpoint_every=100000"))
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = run_scq(*command(emoji, run, "training.steps=100000", "training.checkpoint_every=100000"))
        assert second.returncode == 2
        assert f"another process is training in {run}" in second.stderr
    finally:
        first.kill()
        first.communicate()


def test_divergence_names_step_terms_and_the_last_good_checkpoint(emoji: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_scq(*command(emoji, run, "training.steps=4", "training.checkpoint_every=2")).returncode == 0
    good = sorted((run / "checkpoints").glob("step_*"))[-1]
    without_digests(good)  # what is changed here is not to be taken for damage
    weights_file = good / "model.safetensors"
    before = weights_file.read_bytes()
    state = {name: tensor.clone() for name, tensor in load_file(weights_file).items()}
    poisoned = next(name for name in state if name.startswith("decoder") and state[name].is_floating_point())
    state[poisoned] = torch.full_like(state[poisoned], float("nan"))
    save_file(state, weights_file)
    result = run_scq(*command(emoji, run, "training.steps=8", "training.checkpoint_every=2"))
    assert result.returncode == 2
    assert "diverged at step 4" in result.stderr
    assert "l2=nan" in result.stderr
    assert good.name in result.stderr
    assert sorted((run / "checkpoints").glob("step_*"))[-1] == good
    weights_file.write_bytes(before)

    # Between two lines of the log the weights turn NaN, and the quantizer is the first to see it.
    far = [*command(emoji, run, "training.steps=40", "training.checkpoint_every=40"), "training.log_every=20"]
    state = torch.load(good / "optimizers.pt", weights_only=True)
    names = list(state)
    moments = [each for each in state[names[0]]["state"].values() if "exp_avg" in each]
    moments[0]["exp_avg"].fill_(float("inf"))
    torch.save(state, good / "optimizers.pt")
    result = run_scq(*far)
    assert result.returncode == 2, result.stderr
    assert "diverged at step 5: z has" in result.stderr
    assert good.name in result.stderr


def test_a_term_that_begins_within_a_logging_window_is_logged(emoji: dict[str, Path], tmp_path: Path) -> None:
    result = run_scq(*command(emoji, tmp_path / "run", "training.steps=6", "training.log_every=6"))
    assert result.returncode == 0, result.stderr
    (row,) = read_metrics(tmp_path / "run")
    assert {"l2", "adversarial", "discriminator"} <= row.keys()


def test_checkpoints_are_whole_or_absent(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path, 2, {"model": module}, {})
    for step in (1, 2, 3):
        checkpoints.save(step)
    assert [p.name for p in checkpoints.all()] == ["step_00000002", "step_00000003"]
    (tmp_path / "step_00000004").mkdir()  # a copy that was interrupted: no state.json
    assert checkpoints.latest().name == "step_00000003"
    assert checkpoints.restore()["step"] == 3


def test_a_log_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
