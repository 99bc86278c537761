"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: what runs is saved, the exit code says so, and the run goes on bit for bit."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from helpers import REPOSITORY, SEVERAL, launcher, write_tiny_benchmark
from safetensors.torch import load_file
from test_prior import stripes_config, train_prior, write_stripes

from scq.engine.checkpoint import whole_checkpoints
from scq.engine.errors import Interrupted
from scq.engine.interruption import SECONDS_OF_ONE_REQUEST, Signals
from scq.engine.tracking import read_metrics

STEPS = 120
SETTINGS = [
    f"training.steps={STEPS}", "training.checkpoint_every=100000", "training.log_every=4", "training.images_every=0",
    "training.precision=fp32", "architecture.width=16", "architecture.depth=1", "architecture.heads=2",
]  # fmt: skip
TRAIN = """
import sys, time
from pathlib import Path
from test_interruption import SETTINGS
from test_prior import stripes_config, train_prior
from scq.stage2_prior.prior_stage import PriorTask

step = PriorTask.training_step
PriorTask.training_step = lambda *given: (time.sleep(0.03), step(*given))[1]  # long enough to be interrupted
train_prior(stripes_config(Path(sys.argv[1]), Path(sys.argv[2]), *SETTINGS, *sys.argv[3:]))
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As the processes that are started have: another number of threads adds in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes") / "tokens")


@pytest.fixture(scope="module")
def whole(tokens: Path) -> Path:
    """A run that nothing interrupted."""
    train_prior(stripes_config(tokens, tokens.parent / "whole", *SETTINGS))
    return tokens.parent / "whole"


@pytest.fixture(scope="module")
def whole_of_two(tokens: Path) -> Path:
    """The same in two processes."""
    process = train(tokens, tokens.parent / "two", processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return tokens.parent / "two"


def start(arguments: list[str], processes: int = 1) -> subprocess.Popen:
    environment = SEVERAL | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    }
    command = [*launcher(processes), *arguments]
    # A session of its own: its process group can be sent a signal without the tests.
    return subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def train(tokens: Path, out: Path, *settings: str, processes: int = 1) -> subprocess.Popen:
    program = tokens.parent / "train.py"
    program.write_text(TRAIN)
    return start([str(program), str(tokens), str(out), *settings], processes)


def wait_for_steps(run: Path, process: subprocess.Popen, after: int = 0) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] > after for row in read_metrics(run)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def newest(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    path = whole_checkpoints(run / "checkpoints")[-1]
    tensors = [load_file(path / f"{name}.safetensors") for name in ("model", "ema")]
    return int(path.name[5:]), {f"{i} {key}": value for i, each in enumerate(tensors) for key, value in each.items()}


def assert_same(one: Path, other: Path) -> None:
    (first, mine), (second, theirs) = newest(one), newest(other)
    assert first == second
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key


def test_one_process_saves_after_the_step_and_goes_on_bit_for_bit(tokens: Path, whole: Path, tmp_path: Path) -> None:
    """Interrupted by each of the signals in turn, and then trained to its end."""
    saved = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        process = train(tokens, tmp_path / "run")
        wait_for_steps(tmp_path / "run", process, after=saved)
        process.send_signal(number)
        process.send_signal(number)  # as `timeout` and launchers do: within a second, it is the same request
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 75), errors
        before, (saved, _) = saved, newest(tmp_path / "run")
        assert before < saved < STEPS
        assert f"{number.name}: a checkpoint will be saved after the running step" in errors
        assert f"saved {tmp_path}/run/checkpoints/step_{saved:08d}, run again to go on" in " ".join(errors.split())
    train_prior(stripes_config(tokens, tmp_path / "run", *SETTINGS))
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("who", ["all of them", pytest.param("one process", marks=pytest.mark.slow)])
def test_two_processes_agree_on_the_step(who: str, tokens: Path, whole_of_two: Path, tmp_path: Path) -> None:
    process = train(tokens, tmp_path / "run", processes=2)
    wait_for_steps(tmp_path / "run", process)
    launched = [
        each for each in psutil.Process(process.pid).children(recursive=True) if "train.py" in each.cmdline()[-3]
    ]
    assert len(launched) == 2
    for each in [psutil.Process(process.pid), *launched] if who == "all of them" else launched[1:]:
        each.send_signal(signal.SIGTERM)  # the launcher passes it on, so that each gets two
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    saved, _ = newest(tmp_path / "run")
    assert 0 < saved < STEPS, errors
    assert f"step_{saved:08d}, run again to go on" in " ".join(errors.split()), errors
    again = train(tokens, tmp_path / "run", processes=2)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert_same(tmp_path / "run", whole_of_two)


def test_a_second_signal_ends_at_once(tokens: Path, tmp_path: Path) -> None:
    slow = "import time\nfrom scq.engine.checkpoint import Checkpoints\n"
    slow += "Checkpoints.save = lambda *_, **__: (print('saving', flush=True), time.sleep(600))\n"
    (tmp_path / "slow.py").write_text(slow + TRAIN)
    process = start([str(tmp_path / "slow.py"), str(tokens), str(tmp_path / "run")])
    wait_for_steps(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(SECONDS_OF_ONE_REQUEST + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def be_stuck(*_: object) -> None:
    """Wait for something that never comes, and be sent SIGUSR1 meanwhile."""
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1]).start()
    time.sleep(600)


class Stuck:
    """A stream that waits forever for its fourth batch."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def __iter__(self):
        for number, batch in enumerate(self.stream):
            if number == 3:
                be_stuck()
            yield batch


@pytest.mark.parametrize("log_every", [4, 1])  # before the step, and just after a line of the log
def test_it_saves_while_data_is_awaited(
    log_every: int, tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scq.stage2_prior.prior_stage import PriorStage

    settings = [*SETTINGS, f"training.log_every={log_every}"]
    opened = PriorStage.open_stream
    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patched:
        patched.setattr(PriorStage, "open_stream", lambda self, accelerator: Stuck(opened(self, accelerator)))
        with pytest.raises(Interrupted, match=r"SIGUSR1: saved .*step_00000003") as raised:
            train_prior(stripes_config(tokens, tmp_path / "run", *settings))
    assert raised.value.code == 75
    assert signal.getsignal(signal.SIGUSR1) == before, "handlers are put back"
    train_prior(stripes_config(tokens, tmp_path / "run", *settings))
    assert_same(tmp_path / "run", whole)


def test_a_score_is_left_to_the_run_that_goes_on(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scq.stage2_prior.prior_stage import PriorTask

    settings = [*SETTINGS, "training.steps=4", "training.checkpoint_every=2"]
    monkeypatch.setattr(PriorTask, "score_name", "wait")
    with monkeypatch.context() as patched:
        patched.setattr(PriorTask, "score", be_stuck)
        with pytest.raises(Interrupted):
            train_prior(stripes_config(tokens, tmp_path / "run", *settings))
    assert newest(tmp_path / "run")[0] == 2
    monkeypatch.setattr(PriorTask, "score", lambda *_: {"wait": 1.0})
    trained = train_prior(stripes_config(tokens, tmp_path / "run", *settings))
    assert trained.best is not None
    assert trained.best.name == "step_00000002", "the oldest among equals"
    rows = read_metrics(tmp_path / "run")
    assert [(row["step"], row["wait"]) for row in rows] == [(2, 1.0), (4, 1.0)]
    assert all("loss" in row for row in rows)


def test_another_thread_and_other_handlers_are_left_alone(tokens: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)}
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals(hold=True) as signals:
            for number in before:
                os.kill(os.getpid(), number)
            assert not signals.asked
        assert seen == [signal.SIGUSR1]
        settings = [*SETTINGS, "training.steps=2"]
        thread = threading.Thread(target=train_prior, args=(stripes_config(tokens, tmp_path / "run", *settings),))
        thread.start()
        thread.join()
        assert newest(tmp_path / "run")[0] == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_that_comes_too_late_is_passed_on() -> None:
    def late() -> None:
        with Signals(hold=True) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.agreed()
        time.sleep(5)

    with pytest.raises(Interrupted, match="SIGTERM"), Signals(hold=False):
        late()
    with pytest.raises(KeyboardInterrupt), Signals(hold=True):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_closed_terminal_does_not_keep_it_from_saving(tokens: Path, tmp_path: Path) -> None:
    import pty

    program = tmp_path / "train.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n{TRAIN}")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, str(program), str(tokens), str(tmp_path / "run")])
    deadline = time.monotonic() + 120
    os.set_blocking(terminal, False)
    while not read_metrics(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            os.read(terminal, 65536)
        except BlockingIOError:
            continue
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert 0 < newest(tmp_path / "run")[0] < STEPS


@pytest.mark.slow
def test_workers_outlive_a_signal_to_the_whole_group(emoji: dict[str, Path], tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "quickstart" / "tokenizer_scq.yaml"
    arguments = ["train", "tokenizer", "--config", str(config), f"out={tmp_path / 'run'}"]
    arguments += [f"data.train={emoji['train']}"]
    arguments += ["quantizer.codebook_size=32", "architecture.channels=[8,16]", "training.batch_size=8"]
    arguments += ["training.images_every=0", "training.log_every=1", "data.workers=2", "training.precision=fp32"]
    process = start(["-m", "scq", *arguments])
    wait_for_steps(tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert newest(tmp_path / "run")[0] > 0


@pytest.mark.slow
def test_a_benchmark_saves_the_phase_that_runs(tmp_path: Path) -> None:
    config = write_tiny_benchmark(tmp_path)
    arm = tmp_path / "tokenizer_scq.yaml"
    arm.write_text(arm.read_text().replace("steps: 12", "steps: 100000").replace("log_every: 3", "log_every: 1"))
    out, saved = tmp_path / "run", 0
    for _ in range(2):  # the second one goes on
        process = start(["-m", "scq", "benchmark", "quality", "--config", str(config), "--out", str(out)])
        wait_for_steps(out / "arms" / "scq" / "tokenizer", process, after=saved)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert "Traceback" not in errors
        before, (saved, _) = saved, newest(out / "arms" / "scq" / "tokenizer")
        assert saved > before
