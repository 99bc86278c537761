"""The global sequence with real processes: ranks, loader workers, and a kill -9 in the middle of an epoch."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from data_samples import write_folder

from scq.data.pack import pack
from scq.data.stream import ImageStream
from scq.engine.files import write_json

NUM_IMAGES, BATCH, BATCHES = 53, 8, 17  # two and a half epochs
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    folder = write_folder(root / "photos", NUM_IMAGES)
    pack(folder, root / "out", format="folder", size=16, images_per_shard=20, workers=0)
    return root / "out"


def digests(batch):
    """One line per image: its position and what was seen there, label and pixels."""
    return [
        f"{position} {label} {hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]}"
        for image, label, position in zip(batch.images, batch.labels.tolist(), batch.positions.tolist(), strict=True)
    ]


def stream(shards, shuffle, **settings):
    return ImageStream(shards, batch_size=BATCH, seed=11, flip=True, shuffle=shuffle, **settings)


def sequence(shards, shuffle=True):
    return [line for b in itertools.islice(stream(shards, shuffle).iterate(), BATCHES) for line in digests(b)]


def run_rank(shards, shuffle, rank, world_size, workers, out):
    batches = stream(shards, shuffle, rank=rank, world_size=world_size, workers=workers).iterate()
    out.write_text(json.dumps([digests(batch) for batch in itertools.islice(batches, BATCHES)]))


def start(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("shuffle", [True, "blocks"])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_and_workers_give_the_same_global_sequence(shards, tmp_path, world_size, workers, shuffle):
    files = [tmp_path / f"{rank}.json" for rank in range(world_size)]
    ranks = [start(run_rank, shards, shuffle, r, world_size, workers, file) for r, file in enumerate(files)]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    seen = [json.loads(file.read_text()) for file in files]
    joined = [line for t in range(BATCHES) for rank in seen for line in rank[t]]
    assert joined == sequence(shards, shuffle)


def train(shards, workers, folder):
    """Reads until it is killed; writes the state and everything seen up to it in one file, as a checkpoint would."""
    images = stream(shards, True, workers=workers)
    if (folder / "checkpoint.json").is_file():
        checkpoint = json.loads((folder / "checkpoint.json").read_text())
        images.load_state_dict(checkpoint["stream"])
        seen = checkpoint["seen"]
    else:
        seen = []
    for batch in images:
        seen += digests(batch)
        write_json(folder / "checkpoint.json", {"stream": images.state_dict(), "seen": seen})
        if len(seen) >= BATCH * BATCHES:
            return
        time.sleep(0.02)  # a training step


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_kill_9_in_mid_epoch_resumes_to_the_same_remaining_sequence(shards, tmp_path, workers):
    checkpoint = tmp_path / "checkpoint.json"
    for images_before_the_kill in (20, 90):
        process = start(train, shards, workers, tmp_path)
        while not checkpoint.is_file() or len(json.loads(checkpoint.read_text())["seen"]) < images_before_the_kill:
            assert process.is_alive()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(train, shards, workers, tmp_path)
    process.join(60)
    assert process.exitcode == 0
    assert json.loads(checkpoint.read_text())["seen"] == sequence(shards)


def resident(process_id):
    """Private and shared memory of a process in KiB, pages of mapped files not counted."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def read_epochs(shards, connection):
    batches = stream(shards, True, keep_decoded=False).iterate()
    for _ in range(4):
        for _ in range(20 * NUM_IMAGES // BATCH):
            next(batches)
        connection.send(resident(os.getpid()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_over_epochs(shards):
    here, there = FORK.Pipe()
    process = start(read_epochs, shards, there)
    measured = [here.recv() for _ in range(4)]
    process.join()
    assert measured[3] - measured[0] < 1024, measured


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_without_shared_locks_this_process_reads(shards, monkeypatch, capsys):
    def refuse():
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(multiprocessing, "Lock", refuse)
    batches = itertools.islice(stream(shards, True, workers=2).iterate(), BATCHES)
    assert [line for batch in batches for line in digests(batch)] == sequence(shards)
    assert "images are read in one process" in capsys.readouterr().err
