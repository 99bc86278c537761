"""The stream: one global order, whatever the processes, workers and the point of resuming."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from data_samples import write_folder
from hypothesis import given
from hypothesis import strategies as st

from scq.data.order import SHARDS_PER_BLOCK, BlockOrder, EpochOrder, create_order, flips
from scq.data.pack import pack
from scq.data.shards import ShardSet
from scq.data.stream import ImageStream, iterate_once
from scq.data.transforms import decode
from scq.engine.errors import DataError

NUM_IMAGES = 41


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    pack(
        write_folder(root / "photos", NUM_IMAGES),
        root / "out",
        format="folder",
        size=16,
        images_per_shard=10,
        workers=0,
    )
    return root / "out"


def take(stream, batches, start=0):
    return list(itertools.islice(stream.iterate(start), batches))


def join(batches):
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_carry_the_packed_images(shards):
    opened = ShardSet(shards)
    order = EpochOrder(NUM_IMAGES, 5).images(np.arange(12))
    batch = next(ImageStream(shards, batch_size=12, seed=5).iterate())
    assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (12, 3, 16, 16))
    assert batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == list(range(12))
    for i, image in enumerate(order):
        assert np.array_equal(batch.images[i].permute(1, 2, 0), np.asarray(decode(opened.read(int(image)))))
        assert batch.labels[i] == (0 if opened.key(int(image)).startswith("cats") else 1)


def test_every_image_exactly_once_in_each_epoch():
    order = EpochOrder(NUM_IMAGES, 3)
    epochs = [order.images(np.arange(e * NUM_IMAGES, (e + 1) * NUM_IMAGES)) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_IMAGES))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], EpochOrder(NUM_IMAGES, 4).images(np.arange(NUM_IMAGES)))
    assert np.array_equal(epochs[2], EpochOrder(NUM_IMAGES, 3).images(np.arange(2 * NUM_IMAGES, 3 * NUM_IMAGES)))


def test_batches_run_across_epoch_ends_and_drop_nothing(shards):
    by_8 = join(take(ImageStream(shards, batch_size=8), 20))
    by_20 = join(take(ImageStream(shards, batch_size=20), 8))
    assert same(by_8, by_20)
    assert by_8[2].tolist() == list(range(160))


def test_without_shuffle_the_order_is_the_shards(shards):
    images = join(take(ImageStream(shards, batch_size=10, shuffle=False), 5))[0]
    once = join(list(iterate_once(shards, 10)))[0]
    assert torch.equal(images[:NUM_IMAGES], once)
    assert torch.equal(images[NUM_IMAGES:], once[:9])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_global_batch_in_contiguous_parts(shards, world_size):
    whole = take(ImageStream(shards, batch_size=8, seed=1, flip=True), 12)
    ranks = [
        take(ImageStream(shards, batch_size=8, seed=1, flip=True, rank=r, world_size=world_size), 12)
        for r in range(world_size)
    ]
    for t in range(12):
        assert same(whole[t], join([rank[t] for rank in ranks]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_sequence(shards, workers):
    alone = take(ImageStream(shards, batch_size=8, seed=2, flip=True), 14, start=5)
    helped = take(ImageStream(shards, batch_size=8, seed=2, flip=True, workers=workers), 14, start=5)
    assert same(join(alone), join(helped))


def test_resume_goes_on_at_the_very_next_image(shards):
    whole = join(take(ImageStream(shards, batch_size=6, seed=9, flip=True), 20))
    first = ImageStream(shards, batch_size=6, seed=9, flip=True)
    head = list(itertools.islice(first, 7))
    second = ImageStream(shards, batch_size=6, seed=9, flip=True)
    second.load_state_dict(first.state_dict())
    assert second.images_seen == 42
    assert same(whole, join(head + list(itertools.islice(second, 13))))


def test_resume_may_change_batch_size_and_processes(shards):
    whole = join(take(ImageStream(shards, batch_size=6, seed=9), 20))
    parts = [take(ImageStream(shards, batch_size=26, seed=9, rank=r, world_size=2), 3, start=42) for r in range(2)]
    rest = join([batch for pair in zip(*parts, strict=True) for batch in pair])
    assert same([column[42:] for column in whole], rest)


def test_resume_refuses_another_seed_or_other_shards(shards):
    state = ImageStream(shards, batch_size=4, seed=1).state_dict()
    with pytest.raises(DataError, match="its seed was 1, now it is 2"):
        ImageStream(shards, batch_size=4, seed=2).load_state_dict(state)
    with pytest.raises(DataError, match="its fingerprint was 0, now it is"):
        ImageStream(shards, batch_size=4, seed=1).load_state_dict({**state, "fingerprint": "0"})


def test_state_counts_only_what_was_handed_out(shards):
    stream = ImageStream(shards, batch_size=4, workers=2)
    iterator = iter(stream)
    for _ in range(3):
        next(iterator)
    assert stream.state_dict()["images_seen"] == 12  # not what the workers have prefetched


def test_flip_is_a_fair_coin_of_seed_and_position(shards):
    coins = flips(0, np.arange(10_000))
    assert 0.48 < coins.mean() < 0.52
    assert abs(np.corrcoef(coins[1:], coins[:-1])[0, 1]) < 0.05
    assert np.array_equal(coins[777:800], flips(0, np.arange(777, 800)))
    assert 0.45 < (coins != flips(1, np.arange(10_000))).mean() < 0.55
    plain, flipped = (take(ImageStream(shards, batch_size=NUM_IMAGES, flip=f), 1)[0].images for f in (False, True))
    for i in range(NUM_IMAGES):
        assert torch.equal(flipped[i], plain[i].flip(-1) if coins[i] else plain[i])


def test_flipping_leaves_the_images_in_memory_alone(shards):
    stream = ImageStream(shards, batch_size=NUM_IMAGES, flip=True)
    assert same(take(stream, 2)[1], take(stream, 2)[1])
    assert torch.equal(
        take(stream, 1)[0].images, take(ImageStream(shards, batch_size=NUM_IMAGES, flip=True), 1)[0].images
    )


def test_reading_draws_nothing_from_the_global_generator(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        take(ImageStream(shards, batch_size=4, flip=True, workers=workers), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_more_processes_than_shards(shards):
    parts = [join(take(ImageStream(shards, batch_size=32, rank=r, world_size=32), 2)) for r in range(32)]
    positions = torch.cat([part[2] for part in parts]).sort().values
    assert positions.tolist() == list(range(64))


def test_a_batch_that_cannot_be_shared_is_refused(shards):
    with pytest.raises(DataError, match="batch size 10 cannot be divided evenly among 4 processes"):
        ImageStream(shards, batch_size=10, world_size=4)
    with pytest.raises(DataError, match="rank 4 is not one of 4"):
        ImageStream(shards, batch_size=8, rank=4, world_size=4)
    with pytest.raises(DataError, match="at least 1, not 0"):
        ImageStream(shards, batch_size=0)


def test_missing_set_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no packed images at .*manifest.json is missing"):
        ImageStream(tmp_path, batch_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_iterate_once_reads_each_image_once_in_order(shards, world_size):
    parts = [list(iterate_once(shards, 7, rank=r, world_size=world_size)) for r in range(world_size)]
    positions = torch.cat([batch.positions for part in parts for batch in part])
    assert positions.tolist() == list(range(NUM_IMAGES))
    assert all(len(batch.images) <= 7 for part in parts for batch in part)


def test_iterate_once_limit_and_start(shards):
    whole = join(list(iterate_once(shards, 7)))
    assert same([c[:20] for c in whole], join(list(iterate_once(shards, 7, limit=20))))
    assert same([c[13:] for c in whole], join(list(iterate_once(shards, 7, start=13))))
    assert len(join(list(iterate_once(shards, 7, limit=1000)))[0]) == NUM_IMAGES
    assert list(iterate_once(shards, 7, start=NUM_IMAGES)) == []


def test_images_of_different_sizes_are_named(tmp_path):
    folder = write_folder(tmp_path / "photos", 4, classes=("a",))
    from data_samples import encoded, photo

    (folder / "a" / "photo.0002.webp").write_bytes(encoded(photo(1, 50, 40), "WEBP"))
    pack(folder, tmp_path / "out", format="folder", crop="none", workers=0)
    stream = ImageStream(tmp_path / "out", batch_size=4, shuffle=False)
    assert stream.image_size is None
    with pytest.raises(
        DataError, match=r"'a/photo.0000.jpg' is 80x72, 'a/photo.0002.webp' is 50x40; pack the set with"
    ):
        next(stream.iterate())
    assert len(next(iterate_once(tmp_path / "out", 2, limit=2)).images) == 2


def test_a_missing_index_is_built_again_and_a_stale_one_is_not_used(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    (index,) = copy.glob("index-*.npy")
    expected = take(ImageStream(shards, batch_size=8), 3)
    index.rename(copy / "index-0123456789abcdef.npy")
    assert same(join(expected), join(take(ImageStream(copy, batch_size=8), 3)))
    assert index.is_file()
    index.write_bytes(index.read_bytes()[:-24])
    with pytest.raises(DataError, match="delete it, and it will be rebuilt"):
        ImageStream(copy, batch_size=8)


def test_a_damaged_image_is_named(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    row, key = ShardSet(copy).rows[3], ShardSet(copy).key(3)
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(row["offset"]) + 60 : int(row["offset"]) + 200] = bytes(140)
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"image '{key}' of .* cannot be decoded"):
        list(iterate_once(copy, 4))
    said = {}
    for workers in (0, 1):
        with pytest.raises(DataError) as raised:
            take(ImageStream(copy, batch_size=4, shuffle=False, workers=workers), 1)
        said[workers] = str(raised.value)
    assert said[0] == said[1], "no traceback of the worker in front of it"


BAD = (3, 17, 18)


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory):
    """The set with three images that cannot be decoded, two of them neighbours."""
    folder = tmp_path_factory.mktemp("damaged") / "out"
    shutil.copytree(shards, folder)
    rows = ShardSet(folder).rows
    for image in BAD:
        shard = folder / f"shard-{rows['shard'][image]:06d}.tar"
        data, start = bytearray(shard.read_bytes()), int(rows["offset"][image])
        data[start + 40 : start + 120] = bytes(80)
        shard.write_bytes(data)
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2)])
def test_the_next_image_takes_the_place_of_an_unusable_one_for_any_reader(shards, damaged, world_size, workers):
    settings = {"batch_size": 8, "seed": 5, "flip": True}
    whole = join(take(ImageStream(shards, **settings), 16))
    numbers = EpochOrder(NUM_IMAGES, 5).images(np.arange(128))
    stand_in = np.array([{3: 4, 17: 19, 18: 19}.get(image, image) for image in numbers])
    assert (stand_in != numbers).sum() > 6
    good = join(list(iterate_once(shards, 8)))
    pixels = good[0][stand_in]
    mirrored = torch.from_numpy(flips(5, np.arange(128)))
    pixels[mirrored] = pixels[mirrored].flip(-1)
    ranks = [
        ImageStream(damaged, **settings, max_bad=0.1, rank=r, world_size=world_size, workers=workers)
        for r in range(world_size)
    ]
    batches = zip(*(take(rank, 16) for rank in ranks), strict=True)
    found = join([batch for step in batches for batch in step])
    assert same(found, [pixels, good[1][stand_in], whole[2]])
    assert set().union(*(rank.bad for rank in ranks)) == set(BAD)
    assert same([c[40:] for c in found], join(take(ImageStream(damaged, **settings, max_bad=0.1), 11, start=40)))


def test_unusable_images_are_counted_and_named_once_also_after_a_resume(damaged, capsys):
    settings = {"batch_size": NUM_IMAGES, "max_bad": 0.1}
    first = ImageStream(damaged, **settings)
    next(iter(first))
    assert first.measured() == {"bad_images": 3.0}
    next(iter(first))
    said = " ".join(capsys.readouterr().err.split())
    for image in BAD:
        assert said.count(f"'{ShardSet(damaged).key(image)}'") == 1
    second = ImageStream(damaged, **settings)
    second.load_state_dict(first.state_dict())
    assert second.measured() == {"bad_images": 3.0}
    next(iter(second))
    assert capsys.readouterr().err == ""
    assert second.state_dict() == {**first.state_dict(), "images_seen": 3 * NUM_IMAGES}


@pytest.mark.parametrize("workers", [0, 1])
def test_more_unusable_images_than_allowed_end_the_stream(damaged, workers):
    key = ShardSet(damaged).key(3)
    with pytest.raises(DataError, match=f"^image '{key}' of "):
        take(ImageStream(damaged, batch_size=NUM_IMAGES, shuffle=False, workers=workers), 1)
    stream = ImageStream(damaged, batch_size=NUM_IMAGES, shuffle=False, max_bad=0.05, workers=workers)
    with pytest.raises(DataError, match=f"3 images cannot be used, but at most 2 may be bad .*'{key}'"):
        take(stream, 1)
    with pytest.raises(DataError, match=r"in \[0, 1\), not 1"):
        ImageStream(damaged, batch_size=4, max_bad=1.0)


def test_without_unusable_images_nothing_is_said_of_them(shards):
    stream = ImageStream(shards, batch_size=8, max_bad=0.1)
    next(iter(stream))
    assert stream.measured() == {"bad_images": 0.0}
    assert "bad" not in stream.state_dict()
    assert ImageStream(shards, batch_size=8).measured() == {}


def test_an_image_of_another_size_than_its_set_is_named(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"image_size": 16', '"image_size": 32'))
    with pytest.raises(DataError, match="is 16x16, but its set is of 32 pixels"):
        next(ImageStream(copy, batch_size=4).iterate())


SIZES = [10, 7, 0, 12, 9, 30, 1, 1, 25] * 6


def test_block_order_gives_every_image_once_per_epoch():
    order = BlockOrder(SIZES, seed=3)
    total = sum(SIZES)
    epochs = [order.images(np.arange(e * total, (e + 1) * total)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    assert not np.array_equal(epochs[0], epochs[1])
    across = np.arange(total - 30, total + 30)
    assert np.array_equal(BlockOrder(SIZES, seed=3).images(across), np.concatenate(epochs)[across])


def test_block_order_reads_from_few_shards_at_a_time():
    sizes = [100] * 640
    images = BlockOrder(sizes, seed=0).images(np.arange(sum(sizes)))
    block = 100 * SHARDS_PER_BLOCK
    shards = [set(images[i : i + block] // 100) for i in range(0, len(images), block)]
    assert all(len(found) == SHARDS_PER_BLOCK for found in shards)
    assert not shards[0] & shards[1]
    assert len(set(images[:100] // 100)) == SHARDS_PER_BLOCK  # mixed within the block, not shard after shard


def test_order_changes_to_blocks_beyond_the_limit(monkeypatch):
    monkeypatch.setattr("scq.data.order.FULL_SHUFFLE_LIMIT", 40)
    assert isinstance(create_order([20, 20], 0, True), EpochOrder)
    beyond = create_order([20, 21], 0, True)
    assert isinstance(beyond, BlockOrder)
    assert beyond.description == "shards shuffled, then images within blocks of 16 shards"
    with pytest.raises(DataError, match="True, False or 'blocks', not 'shards'"):
        create_order([20], 0, "shards")
    with pytest.raises(DataError, match="must not be negative: -1"):
        create_order([20], -1, True)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=70).filter(any),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    shuffle=st.sampled_from([False, True, "blocks"]),
)
def test_any_way_of_reading_sees_one_sequence(sizes, seed, start, cuts, shuffle):
    positions = np.arange(start, start + 300)
    whole = create_order(sizes, seed, shuffle).images(positions)
    order = create_order(sizes, seed, shuffle)
    parts = [order.images(part) for part in np.split(positions, sorted(cuts))]
    assert np.array_equal(np.concatenate(parts), whole)
    epoch = start // sum(sizes)
    once = order.images(np.arange(epoch * sum(sizes), (epoch + 1) * sum(sizes)))
    assert np.array_equal(np.sort(once), np.arange(sum(sizes)))
