"""Trackers beside metrics.jsonl: every run logs into its own folder, and goes on where it stopped."""

from pathlib import Path

import pytest
from test_prior import stripes_config, train_prior, write_stripes

from scq.engine.errors import UserError
from scq.engine.tracking import read_metrics


def train(tmp_path: Path, out: str, steps: int, tracker: str) -> None:
    settings = [f"training.steps={steps}", f"training.tracker={tracker}", "training.log_every=1"]
    settings += ["training.checkpoint_every=2", "optimizer.schedule=constant"]
    train_prior(stripes_config(tmp_path / "tokens", tmp_path / out, *settings))


def test_tensorboard_shows_what_the_log_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write_stripes(tmp_path / "tokens")
    train(tmp_path, "one", 2, "tensorboard")
    train(tmp_path, "other", 3, "tensorboard")
    train(tmp_path, "one", 4, "tensorboard")
    for out, steps in (("one", 4), ("other", 3)):
        events = EventAccumulator(str(tmp_path / out / "tensorboard"))
        events.Reload()
        shown = [(event.step, event.value) for event in events.Scalars("loss")]
        assert shown == [(row["step"], pytest.approx(row["loss"])) for row in read_metrics(tmp_path / out)]
        assert [step for step, _ in shown] == list(range(1, steps + 1))
    assert not any(here.iterdir()), "nothing lands in the working directory"


def test_wandb_knows_name_config_and_where_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    started = []
    begin = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings) or begin(**settings))
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_stripes(tmp_path / "tokens")
    for out, steps in (("one", 2), ("one", 4), ("other", 2)):
        train(tmp_path, out, steps, "wandb")
    first, resumed, other = (settings["id"] for settings in started)
    assert first == resumed != other
    assert [settings["name"] for settings in started] == [f"{tmp_path.name}/{out}" for out in ("one", "one", "other")]
    assert started[0]["config"]["training"]["batch_size"] == 32
    assert len(list((tmp_path / "one" / "wandb").glob("offline-run-*"))) >= 1
    assert len(read_metrics(tmp_path / "one")) == 4


def test_a_tracker_that_cannot_be_is_named(tmp_path: Path) -> None:
    write_stripes(tmp_path / "tokens")
    with pytest.raises(UserError, match="tracker is 'paper'; it must be none, tensorboard or wandb"):
        train(tmp_path, "run", 2, "paper")
