"""Token shards: what is written is read back, by any number of processes, from any interruption."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from data_samples import photo

from scq.data.order import EpochOrder
from scq.data.tokens import TokenDataset, TokenStream, TokenWriter
from scq.data.views import augmented_view
from scq.engine.errors import DataError

GRID, CODES, COUNT = (2, 3), 1000, 23


def tokens(count=COUNT, views=1, codes=CODES):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(codes, (count, views, *GRID), generator=generator)


def writer(out, **settings):
    defaults = {"grid": GRID, "codebook_size": CODES, "fingerprint": "f00d", "source": {"set": "a"}, "num_classes": 3}
    return TokenWriter(out, **{**defaults, "images_per_shard": 5, **settings})


def write_all(target, indices, first=0):
    for begin in range(first, len(indices), 4):
        part = indices[begin : begin + 4]
        numbers = range(begin, begin + len(part))
        target.write(part, torch.tensor([n % 3 for n in numbers]), [f"key {n}" for n in numbers])


@pytest.mark.parametrize(("codes", "dtype"), [(1000, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_written_tokens_are_read_back(tmp_path, codes, dtype):
    indices = tokens(codes=codes)
    indices[0, 0, 0, 0] = codes - 1
    target = writer(tmp_path, codebook_size=codes)
    write_all(target, indices[:, 0])
    target.close()
    dataset = TokenDataset(tmp_path)
    assert dataset.manifest["dtype"] == dtype
    assert (dataset.fingerprint, dataset.codebook_size, dataset.grid) == ("f00d", codes, GRID)
    assert len(dataset) == COUNT
    everything = np.arange(COUNT)
    assert torch.equal(dataset.read(everything, everything * 0), indices[:, 0])
    shuffled = np.random.default_rng(0).permutation(COUNT)
    assert torch.equal(dataset.read(shuffled, shuffled * 0), indices[shuffled, 0])
    assert dataset.labels.tolist() == [n % 3 for n in range(COUNT)]
    assert list(dataset.keys()) == [f"key {n}" for n in range(COUNT)]
    assert isinstance(dataset._indices(0), np.memmap)


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("scq.data.tokens.OPEN_SHARDS", 2)
    indices = tokens()
    target = writer(tmp_path)
    write_all(target, indices[:, 0])
    target.close()
    dataset = TokenDataset(tmp_path)
    shuffled = np.random.default_rng(0).permutation(COUNT)
    for images in np.array_split(shuffled, 4):
        assert torch.equal(dataset.read(images, images * 0), indices[images, 0])
        assert len(dataset._mapped) == 2, "of five"


def test_processes_write_parts_that_join_in_order(tmp_path):
    indices = tokens()[:, 0]
    for rank in (2, 0, 1):
        first, last = (COUNT * r // 3 for r in (rank, rank + 1))
        target = writer(tmp_path, rank=rank, world_size=3)
        write_all(target, indices[:last], first)
        target.close()
        assert (tmp_path / "manifest.json").is_file() == (rank == 1)
    assert torch.equal(TokenDataset(tmp_path).read(np.arange(COUNT), np.zeros(COUNT, int)), indices)
    assert not list(tmp_path.glob("part-*"))


def test_an_interrupted_run_goes_on(tmp_path):
    indices = tokens()[:, 0]
    write_all(writer(tmp_path), indices[:12])  # no close: the process was killed
    with pytest.raises(DataError, match="no tokens at"):
        TokenDataset(tmp_path)
    (tmp_path / ".tokens-0000-000002.npy.tmp99").write_bytes(b"half")
    again = writer(tmp_path)
    assert again.num_written == 10
    assert not again.complete
    write_all(again, indices, again.num_written)
    again.close()
    assert torch.equal(TokenDataset(tmp_path).read(np.arange(COUNT), np.zeros(COUNT, int)), indices)
    assert not list(tmp_path.glob(".*"))
    assert writer(tmp_path).complete


def test_tokens_of_another_tokenizer_are_refused_by_name(tmp_path):
    target = writer(tmp_path)
    write_all(target, tokens()[:, 0])
    target.close()
    with pytest.raises(DataError, match="fingerprint was 'f00d', now 'beef'"):
        writer(tmp_path, fingerprint="beef")
    with pytest.raises(DataError, match="grid was"):
        writer(tmp_path, grid=(4, 4))


def test_another_number_of_processes_is_refused_while_unfinished(tmp_path):
    target = writer(tmp_path, world_size=2)
    write_all(target, tokens()[:, 0])
    with pytest.raises(DataError, match="another number of processes"):
        writer(tmp_path)


def test_wrong_tokens_are_refused(tmp_path):
    target = writer(tmp_path)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match="outside the codebook of 1000"):
        target.write(torch.full((2, *GRID), 1000), labels, ["a", "b"])
    with pytest.raises(DataError, match="do not match 1 views of 2x3"):
        target.write(torch.zeros(2, 3, 3, dtype=torch.int64), labels, ["a", "b"])
    with pytest.raises(DataError, match="1 keys"):
        target.write(torch.zeros(2, *GRID, dtype=torch.int64), labels, ["a"])


@pytest.fixture
def written(tmp_path):
    target = writer(tmp_path, views=4)
    indices = tokens(views=4)
    write_all(target, indices)
    target.close()
    return tmp_path, indices


def take(stream, count, start=0):
    return [torch.cat(c) for c in zip(*itertools.islice(stream.iterate(start), count), strict=True)]


def test_stream_follows_the_global_order_and_draws_views(written):
    path, indices = written
    stream = TokenStream(path, batch_size=COUNT, seed=4)
    drawn, labels, positions = take(stream, 8)
    assert drawn.dtype == torch.int64
    images = EpochOrder(COUNT, 4).images(positions.numpy())
    views = [(indices[i] == drawn[n]).flatten(1).all(1).nonzero()[0].item() for n, i in enumerate(images)]
    assert {0, 1, 2, 3} == set(views)
    assert labels.tolist() == [i % 3 for i in images]


def test_stream_ranks_and_resume(written):
    path, _ = written
    whole = take(TokenStream(path, batch_size=6, seed=4), 10)
    ranks = [
        list(itertools.islice(TokenStream(path, batch_size=6, seed=4, rank=r, world_size=3), 10)) for r in range(3)
    ]
    joined = [torch.cat([getattr(rank[t], f) for t in range(10) for rank in ranks]) for f in whole_fields()]
    assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))
    first = TokenStream(path, batch_size=6, seed=4)
    list(itertools.islice(first, 4))
    second = TokenStream(path, batch_size=6, seed=4)
    second.load_state_dict(first.state_dict())
    rest = next(iter(second))
    assert torch.equal(rest.indices, whole[0][24:30])
    with pytest.raises(DataError, match="its seed was 4"):
        TokenStream(path, batch_size=6, seed=5).load_state_dict(first.state_dict())


def whole_fields():
    return ("indices", "labels", "positions")


def test_a_truncated_shard_is_named(written):
    path, _ = written
    shard = sorted(path.glob("tokens-*.npy"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=shard.name):
        TokenDataset(path)


def test_state_belongs_to_the_tokens_not_only_to_the_tokenizer(tmp_path):
    states = []
    for name, count in (("a", 11), ("b", 12)):
        target = writer(tmp_path / name)
        write_all(target, tokens(count)[:, 0])
        target.close()
        states.append(TokenStream(tmp_path / name, batch_size=2))
    assert states[0].fingerprint == states[1].fingerprint == "f00d"
    with pytest.raises(DataError, match="its fingerprint was"):
        states[1].load_state_dict(states[0].state_dict())


def test_views_are_a_pure_function_of_image_number_and_view():
    images = torch.from_numpy(np.stack([np.asarray(photo(i)).transpose(2, 0, 1) for i in range(40)]))  # (b, 3, H, W)
    numbers = torch.arange(40)
    assert torch.equal(augmented_view(images, numbers, 0), images)
    assert torch.equal(augmented_view(images, numbers, 1), images.flip(-1))
    third = augmented_view(images, numbers, 2)
    assert third.shape == images.shape
    assert torch.equal(third[30:], augmented_view(images[30:], numbers[30:], 2))
    assert not torch.equal(third, augmented_view(images, numbers, 3))
    # Each is the image itself or its mirror image, moved by at most a sixteenth of the side: 4 of 72 pixels.
    shifts = set()
    for image, view in zip(images, third, strict=True):
        found = [
            (mirrored, down, right)
            for mirrored, turned in enumerate((view, view.flip(-1)))
            for down in range(-4, 5)
            for right in range(-4, 5)
            if torch.equal(turned[:, 8:-8, 8:-8], image[:, 8 + down : 64 + down, 8 + right : 64 + right])
        ]
        assert found
        shifts.add(found[0])
    assert len(shifts) > 25
    assert {shift[0] for shift in shifts} == {0, 1}


@pytest.mark.parametrize("others", [{}, {"fingerprint": "beef"}, {"views": 2}, {"world_size": 2, "rank": 1}])
def test_a_folder_that_is_being_written_is_refused_before_any_work(tmp_path, others):
    first = writer(tmp_path)
    write_all(first, tokens()[:12, 0])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"another process is writing|is still writing: run again with that number"):
        writer(tmp_path, **others)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_all(first, tokens()[:, 0], 12)
    first.close()
    assert torch.equal(TokenDataset(tmp_path).read(np.arange(COUNT), np.zeros(COUNT, int)), tokens()[:, 0])


def test_processes_of_another_tokenizer_cannot_join(tmp_path):
    first = writer(tmp_path, rank=0, world_size=2)
    with pytest.raises(DataError, match="fingerprint was 'f00d', now 'beef'"):
        writer(tmp_path, rank=1, world_size=2, fingerprint="beef")
    second = writer(tmp_path, rank=1, world_size=2)
    for target, part in ((second, range(11, COUNT)), (first, range(11))):
        write_all(target, tokens()[: part.stop, 0], part.start)
        target.close()
    assert len(TokenDataset(tmp_path)) == COUNT
    assert not list(tmp_path.glob(".*"))


def tokenize_slowly(out, fingerprint, codes, started, go_on):
    target = writer(out, fingerprint=fingerprint)
    started.set()
    go_on.wait(60)
    write_all(target, codes)
    target.close()


def test_of_two_tokenizers_at_once_one_is_refused_and_the_other_loses_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    started, go_on = context.Event(), context.Event()
    first = context.Process(target=tokenize_slowly, args=(tmp_path, "f00d", tokens()[:, 0], started, go_on))
    first.start()
    assert started.wait(60)
    with pytest.raises(DataError, match="another process is writing tokens"):
        writer(tmp_path, fingerprint="beef")
    go_on.set()
    first.join(60)
    assert first.exitcode == 0
    assert TokenDataset(tmp_path).fingerprint == "f00d"
    with pytest.raises(DataError, match="already holds other tokens"):
        writer(tmp_path, fingerprint="beef")


def test_tokens_that_nobody_claims_are_not_overwritten(tmp_path):
    (tmp_path / "tokens-0000-000000.npy").write_bytes(b"somebody's")
    with pytest.raises(DataError, match=r"holds tokens without a manifest \(tokens-0000-000000.npy ...\)"):
        writer(tmp_path)
    assert (tmp_path / "tokens-0000-000000.npy").read_bytes() == b"somebody's"


def test_an_unfinished_set_whose_shard_was_changed_is_not_continued(tmp_path):
    write_all(writer(tmp_path), tokens()[:12, 0])
    labels = tmp_path / "tokens-0000-000001.labels.npy"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"000001.labels.npy' was changed.*; delete that folder, and run it again"):
        writer(tmp_path)


@pytest.mark.parametrize("when", [0, 1, 2, 4, 9])
def test_a_full_disk_is_named_and_leaves_nothing_half(tmp_path, monkeypatch, when):
    """Python and numpy word it differently: 'No space left on device', and '9600 requested and 8128 written'."""
    written = [0]

    def fsync(_):
        written[0] += 1
        if written[0] > when:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(DataError, match=rf"cannot write tokens to '{tmp_path}': No space left on device; make room"):
        write_all(writer(tmp_path), tokens()[:, 0])
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]
    monkeypatch.undo()
    again = writer(tmp_path)
    write_all(again, tokens()[:, 0], again.num_written)
    again.close()
    assert torch.equal(TokenDataset(tmp_path).read(np.arange(COUNT), np.zeros(COUNT, int)), tokens()[:, 0])


def rewrite(path, array):
    """Put another array into a token shard and its digest into the manifest."""
    np.save(path, array)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    key = "labels_sha256" if ".labels" in path.name else "sha256"
    manifest["shards"][0][key] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("suffix", "value", "dtype", "said"),
    [
        (".npy", 60000, "<u2", "has codes from .* to 60000, but they must be from 0 to 999"),
        (".npy", 3, "<i2", "holds int16 of shape"),
        (".npy", 3, "<f4", "holds float32 of shape"),
        (".npy", 3, ">u2", "holds >u2 of shape"),
        (".labels.npy", -1, "<i4", "has labels from -1 to"),
        (".labels.npy", 3, "<i4", "has labels from .* to 3, but they must be from 0 to 2"),
        (".labels.npy", 1, "<i8", "holds int64 of shape"),
    ],
)
def test_what_is_no_code_or_label_is_refused_whatever_its_digest_says(written, suffix, value, dtype, said):
    path, _ = written
    file = path / f"tokens-0000-000000{suffix}"
    array = np.load(file).astype(dtype)
    array.flat[3] = value
    rewrite(file, array)
    with pytest.raises(DataError, match=said):
        TokenDataset(path)


@pytest.mark.parametrize("suffix", [".npy", ".labels.npy", ".keys.txt"])
def test_a_flipped_bit_is_found_when_the_set_is_opened(written, suffix):
    path, _ = written
    file = path / f"tokens-0000-000002{suffix}"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"000002{suffix}' was changed"):
        TokenStream(path, batch_size=4)


def test_a_set_is_read_once_in_a_process(written, monkeypatch):
    path, _ = written
    monkeypatch.setattr("scq.data.arrays._SETTLED", -1.0)
    TokenDataset(path)
    monkeypatch.setattr("hashlib.file_digest", None)
    TokenDataset(path)


def test_tokens_of_older_versions_are_read(written):
    """They have no digests of labels and keys, and no names of classes."""
    path, indices = written
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["class_names"]
    for shard in manifest["shards"]:
        del shard["labels_sha256"], shard["keys_sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    dataset = TokenDataset(path)
    assert torch.equal(dataset.read(np.arange(COUNT), np.zeros(COUNT, int)), indices[:, 0])
    assert (dataset.num_classes, dataset.class_names) == (3, ())
    assert writer(path, views=4, class_names=["a", "b", "c"]).complete


def write_rank(out, rank, world_size, die_after):
    """Writes this rank's part of the tokens; with die_after, kills itself as kill -9 would after so many batches."""
    target = writer(out, rank=rank, world_size=world_size, images_per_shard=5)
    first, last = (60 * r // world_size for r in (rank, rank + 1))
    indices = tokens(60)[:, 0]
    for count, begin in enumerate(range(first + target.num_written, last, 4)):
        if count == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        write_all(target, indices[: min(begin + 4, last)], begin)
    target.close()


def test_processes_killed_and_run_again_write_the_same_tokens(tmp_path):
    context = multiprocessing.get_context("fork")
    for deaths in ((None, 3), (None, 2), (None, None)):
        ranks = [context.Process(target=write_rank, args=(tmp_path, r, 2, deaths[r])) for r in range(2)]
        for rank in ranks:
            rank.start()
        for rank, death in zip(ranks, deaths, strict=True):
            rank.join(60)
            assert rank.exitcode == (0 if death is None else -signal.SIGKILL)
    dataset = TokenDataset(tmp_path)
    assert torch.equal(dataset.read(np.arange(60), np.zeros(60, int)), tokens(60)[:, 0])
    assert list(dataset.keys()) == [f"key {n}" for n in range(60)]
