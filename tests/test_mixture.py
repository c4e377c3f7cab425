from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from siftloader.mixture import BLOCK, Mixture


def stream(mixture: Mixture, epochs: int) -> list[tuple[int, int, int]]:
    parts = [mixture.locate(np.arange(len(mixture)), epoch) for epoch in range(epochs)]
    return [triple for part in parts for triple in zip(*(a.tolist() for a in part), strict=True)]


@given(
    sets=st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4),
    length=st.one_of(st.none(), st.integers(1, 90)),
    lanes=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_set_goes_through_its_samples_once_before_any_comes_again(sets, length, lanes, seed):
    sizes, weights = zip(*sets, strict=True)
    mixture = Mixture(sizes, weights, length, seed, lanes)
    found = stream(mixture, 3)
    assert len(set(found)) == len(found), "no sample twice within a repeat of its set"
    for number, size in enumerate(sizes):
        for lane in range(lanes):
            turns = [(r, position) for which, r, position in found[lane::lanes] if which == number]
            # In the order of the set itself, one repeat after the other; each lane has every lanes-th.
            assert turns == [divmod(i * lanes + lane, size) for i in range(len(turns))]


def test_lanes_advance_alike_however_short_an_epoch_is():
    """An epoch of fewer samples than lanes, or of no multiple of them, would starve the last lanes."""
    found = Counter(stream(Mixture((40,), length=5, lanes=8), epochs=16))
    assert sorted(found) == [(0, repeat, at) for repeat in range(2) for at in range(40)]
    mixture = Mixture((50, 7), (2, 1), length=44, lanes=9)
    drawn = Counter((k, at) for k, _, at in stream(mixture, 9 * BLOCK // 44 + 1))
    for number, size in enumerate(mixture.sizes):
        times = [drawn[number, at] for at in range(size)]
        assert max(times) - min(times) <= 2, "but for the last, unfinished epochs"


def test_one_set_and_an_epoch_of_its_size_is_the_plain_order():
    which, repeat, position = Mixture((10,), lanes=3).locate(np.arange(10), epoch=4)
    assert (which == 0).all() and (repeat == 4).all() and position.tolist() == list(range(10))


def test_a_position_is_found_without_those_around_it():
    mixture = Mixture((100, 7, 1000), (3, 1, 2), lanes=2)
    whole = np.stack(mixture.locate(np.arange(len(mixture)), 2))
    some = np.random.default_rng(0).permutation(len(mixture))[:50]
    assert np.array_equal(np.stack(mixture.locate(some, 2)), whole[:, some])


def test_shares_are_those_of_the_weights_everywhere():
    mixture = Mixture((10**9, 10**7, 10**8), (0.7, 0.1, 0.2), length=10**12)
    start = 123_456_789 * BLOCK
    which, _, _ = mixture.locate(np.arange(start, start + 3 * BLOCK), 0)
    counts = Counter(which.tolist())
    assert [counts[k] / 3 / BLOCK for k in range(3)] == pytest.approx([0.7, 0.1, 0.2], abs=2e-4)
    assert mixture.shares == pytest.approx((0.7, 0.1, 0.2), abs=2e-4)
    # No rank of any number of them sees one set more than another does.
    for ranks in (2, 4, 8):
        for rank in range(ranks):
            assert abs((which[rank::ranks] == 0).mean() - 0.7) < 0.04


PINNED = {
    1: (
        [1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 2],
        [8, 0, 1, 2, 1, 2, 3, 3, 0, 1, 4, 5, 2],
    ),
    2: (
        [1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 1, 0, 1, 1, 2, 1, 1, 1],
        [2, 0, 4, 1, 6, 2, 3, 3, 1, 0, 3, 5, 8],
    ),
}


@pytest.mark.parametrize("lanes", PINNED)
def test_the_mixture_is_pinned(lanes):
    """A change here silently reorders every run that resumes."""
    mixture = Mixture((4, 9), (1, 2), 13, seed=5, lanes=lanes)
    assert tuple(found.tolist() for found in mixture.locate(np.arange(13), 1)) == PINNED[lanes]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": ()}, "one weight per set"),
        ({"weights": (1, 2, 3)}, "got 3 for 2 sets"),
        ({"weights": (1, 0)}, "positive"),
        ({"weights": (1, float("nan"))}, "positive"),
        ({"weights": (1e308, 1e308)}, "positive numbers with a finite sum"),
        ({"weights": (1, 1e-5)}, "never drawn"),
        ({"sizes": (3, 0)}, "every set needs a sample"),
        ({"length": 0}, "at least 1 sample"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**({"sizes": (5, 6), "weights": (1, 1)} | wrong))
