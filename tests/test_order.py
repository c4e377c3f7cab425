from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from siftloader.order import Order, permute


COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum).map(tuple)


def everything(order: Order) -> list[tuple[int, int]]:
    shard, row = order.locate(np.arange(len(order)))
    return list(zip(shard.tolist(), row.tolist(), strict=True))


@given(size=st.integers(1, 5000), key=st.binary(min_size=32, max_size=32))
def test_the_permutation_is_one_to_one_for_any_size_and_key(size, key):
    places = permute(np.arange(size), size, key)
    assert sorted(places.tolist()) == list(range(size))


@given(
    counts=COUNTS,
    seed=st.integers(-5, 2**70),
    epoch=st.integers(0, 2**40),
    window=st.integers(1, 14),
    shuffle=st.booleans(),
)
def test_an_epoch_visits_every_row_once(counts, seed, epoch, window, shuffle):
    order = Order(counts, "data", seed, epoch, window, shuffle)
    rows = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert sorted(everything(order)) == rows


@given(counts=COUNTS, window=st.integers(1, 14), data=st.data())
def test_a_position_is_found_without_those_around_it(counts, window, data):
    order = Order(counts, "data", 1, 2, window)
    asked = data.draw(st.lists(st.integers(0, len(order) - 1)))
    shard, row = order.locate(np.array(asked, np.int64))
    whole = everything(order)
    assert list(zip(shard.tolist(), row.tolist(), strict=True)) == [whole[p] for p in asked]


@given(counts=COUNTS, window=st.integers(1, 5), epoch=st.integers(0, 9))
def test_at_any_time_only_one_window_of_shards_is_being_read(counts, window, epoch):
    read = [shard for shard, _ in everything(Order(counts, "data", 0, epoch, window))]
    first, last = {}, {}
    for position, shard in enumerate(read):
        first.setdefault(shard, position)
        last[shard] = position
    for position in range(len(read)):
        alive = [shard for shard in first if first[shard] <= position <= last[shard]]
        assert len(alive) <= window


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"epoch": 1},
        {"fingerprint": "other"},
        {"window": 2},
        {"shuffle": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_changes_the_order(other):
    counts = (50, 60, 70, 80)
    given = {"fingerprint": "data", "seed": 0, "epoch": 0, "window": 4}
    assert everything(Order(counts, **given)) != everything(Order(counts, **(given | other)))


def test_seed_and_epoch_are_not_interchangeable():
    assert everything(Order((99,), "d", 1, 11)) != everything(Order((99,), "d", 11, 1))
    assert everything(Order((99,), "d", 0, 1)) != everything(Order((99,), "d", 1, 0))


def test_windows_of_equal_size_are_permuted_differently():
    order = Order((200, 200), "data", window=1)
    _, row = order.locate(np.arange(400))
    assert row[:200].tolist() != row[200:].tolist()


def test_without_shuffle_the_order_is_that_of_the_manifest():
    assert everything(Order((2, 0, 3), shuffle=False)) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(("size", "epochs"), [(12, 4000), (1100, 400)], ids=["sort", "Feistel"])
def test_every_sample_is_equally_likely_at_every_position(size, epochs):
    """Chi-square of (tenth of the samples, tenth of the positions) over epochs, within five sigma."""
    parts = min(size, 11)
    seen = np.zeros((parts, parts))
    for epoch in range(epochs):
        _, row = Order((size,), "data", 3, epoch).locate(np.arange(size))
        np.add.at(seen, (np.arange(size) * parts // size, row * parts // size), 1)
    expected = np.outer(*2 * [np.bincount(np.arange(size) * parts // size)]) / size * epochs
    freedom = (parts - 1) ** 2
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_order_of_shards_is_equally_likely_too():
    shards, epochs = 5, 3000
    seen = np.zeros(shards)
    for epoch in range(epochs):
        shard, _ = Order((1,) * shards, "data", 3, epoch, window=1).locate(np.arange(1))
        seen[shard] += 1
    assert (abs(seen - epochs / shards) < 5 * (epochs / shards) ** 0.5).all()


def test_neighbours_are_torn_apart():
    """The mean distance of two samples that were neighbours is that of a uniform shuffle: a third."""
    size = 30_000
    _, row = Order((size,), "data").locate(np.arange(size))
    position = np.empty(size, np.int64)
    position[row] = np.arange(size)
    assert abs(np.abs(np.diff(position)).mean() / size - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(size), row)[0, 1]) < 5 / size**0.5


def test_a_corpus_of_any_size_takes_no_memory():
    order = Order((2**40, 2**41, 2**39), "data")
    positions = np.random.default_rng(0).integers(0, len(order), 10_000)
    shard, row = order.locate(positions)
    assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == len(np.unique(positions))
    assert (row < np.array(order.counts)[shard]).all()
    shares = np.bincount(shard, minlength=3) / len(shard)
    assert np.allclose(shares, np.array(order.counts) / len(order), atol=0.03)


def test_the_order_is_pinned():
    """A change here silently reorders every run that resumes: do not, or raise the state version."""
    assert everything(Order((3, 2, 4, 1), "fingerprint", 7, 2, window=2)) == GOLDEN
    shard, row = Order((2**40, 2**41), "fingerprint").locate(np.array([0, 1, 2**41]))
    assert (shard.tolist(), row.tolist()) == GOLDEN_LARGE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"counts": ()}, "one number >= 0 per shard"),
        ({"counts": (3, -1)}, "one number >= 0 per shard"),
        ({"window": 0}, "window must be at least 1"),
        ({"epoch": -1}, "epoch must be 0 or more"),
    ],
    ids=["no shards", "negative", "window", "epoch"],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Order(**({"counts": (3,)} | wrong))


@pytest.mark.parametrize("position", [-1, 5], ids=["below", "above"])
def test_positions_outside_the_epoch_are_refused(position):
    with pytest.raises(IndexError, match=r"0\.\.4"):
        Order((2, 3)).locate(np.array([0, position]))


GOLDEN = [(0, 1), (1, 1), (0, 0), (0, 2), (1, 0), (2, 2), (2, 1), (2, 0), (2, 3), (3, 0)]
GOLDEN_LARGE = ([1, 1, 0], [653878982607, 737088842020, 690020457550])


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 7),
    window=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
def test_lanes_visit_every_row_once_and_each_reads_a_stretch(counts, lanes, window, epoch):
    order = Order(counts, "data", epoch=epoch, window=window, lanes=lanes)
    shard, row = order.locate(np.arange(len(order)))
    assert sorted(zip(shard.tolist(), row.tolist(), strict=True)) == [
        (s, r) for s, count in enumerate(counts) for r in range(count)
    ]
    touched = [set(shard[lane::lanes].tolist()) for lane in range(lanes)]
    # Every lane border is shared by at most two.
    assert sum(map(len, touched)) <= len([c for c in counts if c]) + lanes - 1


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 4),
    window=st.integers(1, 4),
)
def test_the_window_at_a_position_holds_all_up_to_the_next_one(counts, lanes, window):
    order = Order(counts, "data", window=window, lanes=lanes)
    shard, _ = order.locate(np.arange(len(order)))
    for position in range(len(order)):
        shards, following = order.window_at(position)
        end = len(order) if following is None else following
        assert set(shard[position:end:lanes].tolist()) <= set(shards)
        assert len([s for s in shards if counts[s]]) <= window + 1
        assert following is None or (following - position) % lanes == 0 < following - position


def test_one_lane_is_the_order_without_lanes():
    assert everything(Order((3, 2, 4, 1), "fingerprint", 7, 2, window=2, lanes=1)) == GOLDEN
    with pytest.raises(ValueError, match="lanes must be at least 1"):
        Order((3,), lanes=0)
