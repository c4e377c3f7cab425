"""Which candidates win: pytest tests/test_selection.py"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st

from siftloader import ScoringError, Sifter, SiftingDataLoader, TopK
from siftloader.pool import Pool
from siftloader.selection import (
    Gumbel,
    RankSample,
    Robust,
    Stratified,
    TrimmedTopK,
    samples,
    weights,
)


GUARDS = [TrimmedTopK(0.1), TrimmedTopK(0.3), Robust(), Robust(0.5), Stratified()]
SAMPLING = [RankSample(), RankSample(2.5), Gumbel(), Gumbel(0.05), Gumbel(1e-30), Gumbel(1e30)]
EVERY = [TopK(), *GUARDS, *SAMPLING]
named = pytest.mark.parametrize


def pool(number=0, rank=0, source=None):
    return Pool(None, number, rank, {} if source is None else {"source": torch.tensor(source)})


def room(selection, count):
    """How many of ``count`` candidates a selection can keep."""
    return count - math.floor(getattr(selection, "drop_top", 0) * count + 0.5)


SCORES = st.lists(
    st.one_of(st.floats(-1e3, 1e3, width=32), st.just(-torch.inf), st.integers(0, 3).map(float)),
    min_size=1,
    max_size=24,
)


@given(scores=SCORES, data=st.data())
def test_exactly_the_highest_win_in_candidate_order(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    index = TopK()(torch.tensor(scores), keep).tolist()
    assert index == sorted(set(index)) and len(index) == keep
    kept = [scores[i] for i in index]
    dropped = [score for i, score in enumerate(scores) if i not in index]
    assert not dropped or min(kept) >= max(dropped)


@given(scores=SCORES, data=st.data())
def test_the_lower_position_wins_a_tie(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    index = TopK()(torch.tensor(scores), keep).tolist()
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
    assert index == sorted(expected)


@given(
    scores=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=24, unique=True),
    data=st.data(),
)
def test_the_order_of_the_rows_does_not_matter(scores, data):
    order = data.draw(st.permutations(range(len(scores))))
    keep = data.draw(st.integers(1, len(scores)))
    straight = {scores[i] for i in TopK()(torch.tensor(scores), keep).tolist()}
    shuffled = [scores[i] for i in order]
    assert {shuffled[i] for i in TopK()(torch.tensor(shuffled), keep).tolist()} == straight


def test_planted_winners_win():
    scores = torch.zeros(64)
    planted = torch.tensor([3, 17, 40, 63])
    scores[planted] = 1.0
    assert torch.equal(TopK()(scores, 4), planted)


def test_rows_that_must_not_win_rank_last():
    scores = torch.tensor([-torch.inf, -5.0, -torch.inf, -9.0])
    assert TopK()(scores, 2).tolist() == [1, 3]
    assert TopK()(scores, 3).tolist() == [0, 1, 3]


# What holds for all of them.


@named("selection", EVERY, ids=repr)
@given(scores=SCORES, data=st.data())
@examples(30)
def test_exactly_keep_win_and_what_must_not_win_comes_last(selection, scores, data):
    most = room(selection, len(scores))
    if most < 1:
        return
    keep = data.draw(st.integers(1, most))
    source = data.draw(st.lists(st.integers(-2, 2), min_size=len(scores), max_size=len(scores)))
    found = selection(torch.tensor(scores), keep, pool(data.draw(st.integers(0, 99)), 0, source))
    assert found.dtype == torch.int64 and found.device.type == "cpu"
    index = found.tolist()
    assert index == sorted(set(index)) and len(index) == keep
    assert index[0] >= 0 and index[-1] < len(scores)
    can_win = [i for i, score in enumerate(scores) if score > -math.inf]
    cannot = [i for i, score in enumerate(scores) if score == -math.inf]
    if keep >= len(can_win):  # all that can, and the first of those that must not
        assert index == sorted(can_win + cannot[: keep - len(can_win)])
    else:
        assert set(index) <= set(can_win)


@named("selection", [TopK(), *GUARDS], ids=repr)
@given(
    scores=st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=24, unique=True),
    data=st.data(),
)
@examples(40)
def test_without_draws_the_order_of_the_rows_does_not_matter(selection, scores, data):
    keep = data.draw(st.integers(1, room(selection, len(scores))))
    source = data.draw(st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores)))
    order = data.draw(st.permutations(range(len(scores))))
    straight = selection(torch.tensor(scores), keep, pool(source=source)).tolist()
    shuffled = selection(
        torch.tensor([scores[i] for i in order]),
        keep,
        pool(number=7, source=[source[i] for i in order]),
    )
    assert sorted(order[i] for i in shuffled.tolist()) == straight


@named("selection", [TopK(), TrimmedTopK(), Robust()], ids=repr)
def test_without_draws_no_pool_is_needed(selection):
    scores = torch.arange(10.0)
    assert torch.equal(selection(scores, 5), selection(scores, 5, pool()))


@named("selection", EVERY, ids=repr)
def test_nothing_waits_for_the_device(selection):
    # Tensors without data cannot be looked at, as those of a GPU cannot without waiting.
    scores = torch.zeros(16, device="meta")
    found = selection(scores, 4, pool(source=[0] * 16))
    assert found.device.type == "meta" and found.shape == (4,) and found.dtype == torch.int64
    if samples(selection):
        assert weights(selection, scores, 4, pool()).device.type == "meta"
    for look in (lambda: scores.max().item(), lambda: scores[scores > 0], lambda: scores.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@named("selection", EVERY, ids=repr)
def test_a_gpu_finds_the_same_without_waiting(selection):
    scores = torch.randn(64, generator=torch.Generator().manual_seed(5))
    at = pool(source=[0, 1] * 32)
    on_device = scores.cuda()
    selection(on_device, 32, at)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = selection(on_device, 32, at)
        if samples(selection):
            weights(selection, on_device, 32, at)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda and torch.equal(found.cpu(), selection(scores, 32, at))


@named("selection", EVERY, ids=repr)
def test_random_streams_and_scores_are_left_alone(selection):
    scores = torch.randn(12)
    before = scores.clone(), torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    selection(scores, 6, pool(source=[0] * 12))
    if samples(selection):
        weights(selection, scores, 6, pool())
    assert torch.equal(scores, before[0]) and torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2][1])  # noqa: NPY002
    assert random.getstate() == before[3]


@named("selection", EVERY, ids=repr)
@named("keep", [0, 9])
def test_more_than_there_are_cannot_be_kept(selection, keep):
    with pytest.raises(ValueError, match=rf"cannot keep {keep} of 8|leaves \d, but 9"):
        selection(torch.zeros(8), keep, pool(source=[0] * 8))


@named("selection", EVERY, ids=repr)
def test_one_of_one_and_all_of_all(selection):
    for count in (1, 2):
        if room(selection, count) < count:
            continue
        scores, at = torch.randn(count), pool(source=[3] * count)
        assert selection(scores, count, at).tolist() == list(range(count))


@named("selection", EVERY, ids=repr)
def test_a_view_is_as_good_as_a_copy(selection):
    scores, source = torch.randn(12, 2), torch.arange(24).view(12, 2) % 3
    views, copies = (scores[:, 1], source[:, 1]), (scores[:, 1].clone(), source[:, 1].clone())
    (one, two) = (
        selection(rows, 6, Pool(fields={"source": strata})) for rows, strata in (views, copies)
    )
    assert torch.equal(one, two)


# Draws.


@named("selection", [RankSample(seed=3), Gumbel(seed=3)], ids=repr)
def test_a_draw_repeats_with_its_pool_and_differs_from_every_other(selection):
    scores = torch.zeros(64)

    def drawn(*key):
        return tuple(selection(scores, 32, pool(*key)).tolist())

    assert drawn(5) == drawn(5)
    keys = [(number, rank) for number in range(20) for rank in range(3)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    other = type(selection)(seed=4)
    assert tuple(other(scores, 32, pool(5)).tolist()) != drawn(5)


def test_draws_of_two_ranks_are_independent():
    # 4 of 8 equal rows each: the number of common winners is hypergeometric, mean 2, variance 4 / 7.
    scores, pools = torch.zeros(8), 2000
    for selection in (RankSample(), Gumbel()):
        common = sum(
            len(
                {*selection(scores, 4, pool(k)).tolist()}
                & {*selection(scores, 4, pool(k, 1)).tolist()}
            )
            for k in range(pools)
        )
        assert abs(common / pools - 2) < 5 * math.sqrt(4 / 7 / pools)


def chances(log_weights, keep):
    """P(kept set) for every set, by walking through all orders: Plackett-Luce, in full."""
    p = [math.exp(w - max(log_weights)) for w in log_weights]
    found = Counter()
    for order in itertools.permutations(range(len(p)), keep):
        chance = 1.0
        for place, i in enumerate(order):
            chance *= p[i] / sum(p[j] for j in range(len(p)) if j not in order[:place])
        found[tuple(sorted(order))] += chance
    return found


def distance(drawn, expected):
    """Chi-square of the counts of ``drawn`` over its quantile at one in a million: right is below 1."""
    total = sum(drawn.values())
    observed, wanted, rest = [], [], [0.0, 0.0]
    for kept, chance in expected.items():
        if chance * total < 8:
            rest = [rest[0] + drawn[kept], rest[1] + chance * total]
        else:
            observed.append(drawn[kept])
            wanted.append(chance * total)
    if rest[1] >= 8:
        observed.append(rest[0])
        wanted.append(rest[1])
    chi = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    free = len(wanted) - 1
    assert free >= 2, "nothing to compare"
    # Wilson and Hilferty's quantile; 4.753 standard deviations are one in a million.
    return chi / (free * (1 - 2 / (9 * free) + 4.753 * math.sqrt(2 / (9 * free))) ** 3)


def draws(selection, scores, keep, pools=4000):
    scores = torch.tensor(scores)
    return Counter(tuple(selection(scores, keep, pool(k)).tolist()) for k in range(pools))


def ranks(scores):
    """From the easiest; equal scores share their mean."""
    return [sum(b < a for b in scores) + (sum(b == a for b in scores) - 1) / 2 for a in scores]


UNEQUAL = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5]
TIED = [1.0, 0.0, 1.0, 3.0, 1.0, 0.0, -2.0]


@named(
    ("selection", "scores", "keep", "log_weights"),
    [
        (Gumbel(), UNEQUAL, 3, UNEQUAL),
        (Gumbel(), [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.3, 1.0], 4, None),
        (Gumbel(2.0, seed=9), TIED, 2, [score / 2 for score in TIED]),
        (Gumbel(0.5), UNEQUAL, 2, [score * 2 for score in UNEQUAL]),
        (Gumbel(1e-30), [2.0, 1.0, 1.0, 1.0, 1.0, 0.0], 3, [99.0, 0.0, 0.0, 0.0, 0.0, -99.0]),
        (RankSample(), UNEQUAL, 3, [math.log(r + 0.5) for r in ranks(UNEQUAL)]),
        (RankSample(), TIED, 2, [2.5 * math.log(r + 0.5) for r in ranks(TIED)]),
        (RankSample(3.0, seed=4), TIED, 3, [3 * math.log(r + 0.5) for r in ranks(TIED)]),
        (RankSample(0), UNEQUAL, 3, [0.0] * 6),
        (RankSample(1e30), [2.0, 1.0, 1.0, 1.0, 1.0, 0.0], 3, [99.0, 0, 0, 0, 0, -99.0]),
    ],
)
def test_draws_match_the_enumeration_of_all_orders(selection, scores, keep, log_weights):
    drawn = draws(selection, scores, keep)
    assert distance(drawn, chances(scores if log_weights is None else log_weights, keep)) < 1


def test_the_enumeration_tells_wrong_draws():
    drawn = draws(Gumbel(), UNEQUAL, 3)
    for wrong in ([-w for w in UNEQUAL], [w * 1.2 for w in UNEQUAL], [0.0] * 6):
        assert distance(drawn, chances(wrong, 3)) > 1
    rising = [math.log(r + 0.5) for r in ranks(UNEQUAL)]
    drawn = draws(RankSample(), UNEQUAL, 3)
    for wrong in ([-w for w in rising], [math.log(r + 1) for r in ranks(UNEQUAL)]):
        assert distance(drawn, chances(wrong, 3)) > 1


@named("selection", [RankSample(), Gumbel()], ids=repr)
def test_rows_that_must_not_win_do_not_change_the_others(selection):
    scores = [-math.inf, *UNEQUAL[:3], -math.inf, *UNEQUAL[3:]]
    weight = UNEQUAL
    if isinstance(selection, RankSample):  # 8 candidates, 2 kept
        weight = [3 * math.log(r + 0.5) for r in ranks(UNEQUAL)]
    moved = [1, 2, 3, 5, 6, 7]
    expected = Counter(
        {tuple(moved[i] for i in kept): p for kept, p in chances(weight, 2).items()}
    )
    assert distance(draws(selection, scores, 2), expected) < 1


@named("scale", [1e-38, 1e-3, 1.0, 1e6, 3e38])
@named("selection", SAMPLING, ids=repr)
def test_no_scale_of_the_scores_breaks_a_draw(selection, scale):
    scores = torch.tensor([1.0, -1.0, 0.5, 0.5, 0.0, -torch.inf]) * scale
    for keep, number in itertools.product(range(1, 7), range(20)):
        kept = selection(scores, keep, pool(number))
        likely = selection.inclusion(scores, keep, pool(number))
        assert likely.dtype == torch.float64 and not likely.isnan().any()
        assert (likely >= 0).all() and (likely <= 1).all() and likely[5] == 0
        assert keep < 5 or torch.equal(likely, torch.tensor([1.0, 1, 1, 1, 1, 0]).double())
        found = weights(selection, scores, keep, pool(number))
        assert found.isfinite().all() and found.dtype == torch.float32 and found[5] == 0
        assert (found[kept[kept != 5]] > 0).all()


@named("selection", [Gumbel(1e-30), RankSample(1e30)], ids=repr)
@given(
    scores=st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=16, unique=True),
    scale=st.sampled_from([2.0**-80, 1.0, 2.0**107]),
    data=st.data(),
)
@examples(40)
def test_the_cold_limit_is_topk(selection, scores, scale, data):
    keep, scores = data.draw(st.integers(1, len(scores))), torch.tensor(scores) * scale
    assert torch.equal(selection(scores, keep, pool()), TopK()(scores, keep))


# Weights.


def means(selection, scores, values, keep, pools):
    """Of the mean of weight * value over the kept, and of the plain mean: (mean, standard error)."""
    found = np.empty((pools, 2))
    for k in range(pools):
        kept = selection(scores, keep, pool(k))
        weight = weights(selection, scores, keep, pool(k))[kept]
        found[k] = (weight * values[kept]).mean().item(), values[kept].mean().item()
    return zip(found.mean(0), found.std(0, ddof=1) / math.sqrt(pools), strict=True)


@named("selection", [RankSample(), RankSample(0.5), Gumbel(), Gumbel(2.0), Gumbel(1e30)], ids=repr)
def test_the_weighted_mean_is_unbiased(selection):
    scores = torch.tensor([*UNEQUAL, -math.inf, 0.7, 0.7, -1.7, 0.2, -math.inf])
    can_win = scores > -math.inf
    values = torch.where(can_win, scores, 1e3).double() + torch.linspace(0, 1, 12)
    truth = values[can_win].mean().item()
    for keep in (3, 6):
        (mean, error), (plain, plain_error) = means(selection, scores, values, keep, 1500)
        assert abs(mean - truth) < 4 * error
        # With weights of one the test fails, except where all rows are equally likely.
        assert selection == Gumbel(1e30) or abs(plain - truth) > 4 * plain_error


@named("selection", [RankSample(), Gumbel()], ids=repr)
def test_with_few_that_can_win_the_weighted_mean_is_exact(selection):
    scores = torch.tensor([-math.inf, 1.0, 3.0, -math.inf, 2.0, -math.inf])
    values = torch.tensor([7.0, 1.0, 2.0, 7.0, 6.0, 7.0])
    for keep in (3, 4, 6):
        kept = selection(scores, keep, pool())
        weight = weights(selection, scores, keep, pool())
        assert (weight[kept] * values[kept]).mean().item() == pytest.approx(3.0)
    nothing = torch.full((4,), -math.inf)
    assert weights(selection, nothing, 2, pool()).tolist() == [0, 0, 0, 0]
    assert selection(nothing, 2, pool()).tolist() == [0, 1]


@named("selection", SAMPLING, ids=repr)
def test_the_most_extreme_draws_have_finite_weights(selection):
    edges = torch.tensor(
        [2.0**-53, 1 - 2.0**-53, 0.5, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64
    )
    at = SimpleNamespace(uniform=lambda seed, count: edges)
    for scores in (torch.zeros(5), torch.tensor([80.0, 0.0, 40.0, 80.0, -80.0])):
        for keep in range(1, 6):
            kept, found = selection(scores, keep, at), weights(selection, scores, keep, at)
            assert len({*kept.tolist()}) == keep
            assert found.isfinite().all() and (found[kept] > 0).all()
            assert (selection.inclusion(scores, keep, at)[kept] > 2.0**-54).all()


def test_an_unlikely_row_keeps_its_probability():
    # At 60 nats below the threshold 1 - exp(-x) is 0 in plain arithmetic, and 1 / 0 no weight.
    likely = Gumbel().inclusion(torch.tensor([60.0, 60.0, 0.0]), 1, pool())
    assert likely[0] == likely[1]
    assert likely[2] / -torch.log1p(-likely[0]) == pytest.approx(math.exp(-60), rel=1e-9, abs=0)


@named("selection", [TopK(), *GUARDS], ids=repr)
def test_what_never_draws_has_no_weights(selection):
    assert not samples(selection)
    with pytest.raises(ValueError, match=r"keeps the same rows every time.*RankSample, Gumbel"):
        weights(selection, torch.zeros(4), 2, pool(source=[0] * 4))


def test_what_draws_has_weights():
    assert all(samples(selection) for selection in SAMPLING)


# Planted winners: the sign is pinned.


def rate(selection, scores, planted, pools=400):
    """The share of the planted rows that win."""
    wins = 0
    for k in range(pools):
        kept = selection(scores, len(planted), pool(k, source=[0] * len(scores)))
        wins += len({*kept.tolist()} & {*planted})
    return wins / pools / len(planted)


@named("selection", EVERY, ids=repr)
def test_planted_winners_win_at_the_expected_rate(selection):
    scores, planted = torch.linspace(-0.5, 0.5, 8), [2, 5]
    scores[planted] += 1.5
    if isinstance(selection, TrimmedTopK):  # what is dropped lies above them
        above = math.floor(selection.drop_top * 8 + 0.5)
        scores[torch.tensor([0, 3, 7][:above])] = 9.0
    expected = 1.0
    if samples(selection):
        weight = (scores.double() / max(0.01, getattr(selection, "temperature", 1))).tolist()
        if isinstance(selection, RankSample):
            power = 3.0 if selection.power is None else selection.power
            weight = [power * math.log(r + 0.5) for r in ranks(scores.tolist())]
        expected = sum(p * len({*kept} & {*planted}) / 2 for kept, p in chances(weight, 2).items())
    if selection == Robust(0.5):  # for so strict a guard they are outliers
        expected = 0.0
    error = math.sqrt(expected * (1 - expected) / 400) + 1e-9
    assert abs(rate(selection, scores, planted) - expected) < 5 * error
    if selection not in (Robust(0.5), Gumbel(1e30)):
        assert abs(rate(selection, -scores, planted) - expected) > 5 * error


# Guards against noise.


@named("guard", [TrimmedTopK(0.1), TrimmedTopK(0.15), Robust(), Robust(6.0)], ids=repr)
@given(data=st.data())
@examples(40)
def test_guards_drop_planted_outliers_which_topk_keeps(guard, data):
    seed = data.draw(st.integers(0, 999))
    scores = torch.randn(40, generator=torch.Generator().manual_seed(seed)).clamp(-2.5, 2.5)
    planted = data.draw(st.lists(st.integers(0, 39), min_size=4, max_size=4, unique=True))
    scores[planted] = 50.0
    assert set(planted) <= set(TopK()(scores, 20).tolist())
    kept = guard(scores, 20).tolist()
    assert not set(planted) & set(kept)
    if guard != TrimmedTopK(0.15):  # drops two more
        others = scores.clone()
        others[planted] = -torch.inf
        honest = guard.z == 6.0 if isinstance(guard, Robust) else True
        assert not honest or kept == TopK()(others, 20).tolist()


@named(
    ("drop", "count", "kept"),
    [
        (0.0, 10, [7, 8, 9]),
        (0.04, 10, [7, 8, 9]),
        (0.05, 10, [6, 7, 8]),
        (0.1, 10, [6, 7, 8]),
        (0.25, 10, [4, 5, 6]),  # half a row is rounded up
        (0.7, 10, [0, 1, 2]),
        (0.1, 4, [1, 2, 3]),
    ],
)
def test_a_share_is_rounded_to_the_nearest_row(drop, count, kept):
    assert TrimmedTopK(drop)(torch.arange(float(count)), 3).tolist() == kept


def test_a_share_that_leaves_too_few_is_refused_at_construction():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    )
    with pytest.raises(ValueError, match=r"drop_top=0\.6 .* too few for keep=0\.5"):
        Sifter(model, exit_layer="full", selection=TrimmedTopK(0.6))
    with pytest.raises(ValueError, match=r"drop_top=0\.6 .* too few for keep=0\.5"):
        SiftingDataLoader(
            [torch.zeros(4)], 1, model=model, exit_layer="full", selection=TrimmedTopK(0.6),
            keep={0: 0.25, 10: 0.5},
        )  # fmt: skip
    Sifter(model, exit_layer="full", selection=TrimmedTopK(0.5))


def test_a_short_pool_drops_what_it_can_spare():
    # The end of an epoch must not end the run.
    scores = torch.arange(8.0)
    assert TrimmedTopK(0.5)(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert TrimmedTopK(0.5)(scores, 8).tolist() == list(range(8))


def test_dropped_rows_win_before_those_that_must_not():
    infinite = -math.inf
    scores = torch.tensor([9.0, infinite, 8.0, 1.0, infinite, infinite, infinite, infinite])
    assert TrimmedTopK(0.25)(scores, 2).tolist() == [2, 3]  # 9 and 8 dropped, 8 the lower
    assert TrimmedTopK(0.25)(scores, 4).tolist() == [0, 1, 2, 3]
    assert TrimmedTopK(0.6)(scores, 2).tolist() == [2, 3]  # more than there are
    assert TrimmedTopK(0.5)(scores, 4).tolist() == [0, 1, 2, 3]


def test_outliers_win_only_when_nothing_else_is_left():
    scores = torch.tensor([0.0, 300.0, 1.0, 2.0, 100.0, 3.0, 4.0, -torch.inf])
    # median 3, deviations 3 297 2 1 97 0 1: their median is 2, the bound 3 + 3 * 1.4826 * 2 = 11.9
    guard = Robust(3.0)
    assert guard(scores, 4).tolist() == [2, 3, 5, 6]
    assert guard(scores, 5).tolist() == [0, 2, 3, 5, 6]
    assert guard(scores, 6).tolist() == [0, 2, 3, 4, 5, 6]
    assert guard(scores, 7).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert Robust(40.0)(scores, 1).tolist() == [4]  # 3 + 40 * 2.9652 = 121.6


@given(scores=SCORES, z=st.sampled_from([0.5, 1.0, 3.0]), data=st.data())
def test_robust_is_topk_of_what_is_not_an_outlier(scores, z, data):
    keep = data.draw(st.integers(1, len(scores)))
    finite = np.array([score for score in scores if score > -math.inf])
    bound = math.inf
    if len(finite):
        median = np.median(finite)
        bound = median + z * 1.4826 * np.median(np.abs(finite - median))
    group = [2 if score == -math.inf else int(score > bound) for score in scores]
    order = sorted(
        range(len(scores)),
        key=lambda i: (group[i], scores[i] if group[i] == 1 else -scores[i], i),
    )
    assert Robust(z)(torch.tensor(scores), keep).tolist() == sorted(order[:keep])


# Strata.


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    barred=st.integers(0, 8),
    data=st.data(),
)
def test_every_stratum_keeps_its_share_by_its_highest_scores(sizes, barred, data):
    labels = data.draw(
        st.lists(
            st.integers(-(2**62), 2**62), min_size=len(sizes), max_size=len(sizes), unique=True
        )
    )
    strata = [label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]
    score = st.one_of(st.integers(-3, 3).map(float), st.floats(-9, 9, width=32))
    scores = [data.draw(score) for _ in strata]
    rows = data.draw(
        st.permutations([*zip(strata, scores, strict=True), *[(labels[0], -math.inf)] * barred])
    )
    keep = data.draw(st.integers(1, len(strata)))
    at = pool(source=[stratum for stratum, _ in rows])
    kept = set(Stratified()(torch.tensor([score for _, score in rows]), keep, at).tolist())
    assert len(kept) == keep
    for label, size in zip(labels, sizes, strict=True):
        inside = [i for i, (stratum, _) in enumerate(rows) if stratum == label]
        won = [i for i in inside if i in kept]
        assert keep * size // len(strata) <= len(won) <= -(-keep * size // len(strata))
        best = sorted(inside, key=lambda i: (-rows[i][1], i))
        assert won == sorted(best[: len(won)])


@named(
    ("sizes", "keep", "quotas"),
    [
        ((6, 2), 4, (3, 1)),
        ((5, 3), 4, (2, 2)),  # 2.5 and 1.5: equal remainders, the row of 1 scores higher
        ((7, 2, 1), 5, (3, 1, 1)),  # 3.5, 1.0, 0.5
        ((8, 1, 1), 5, (4, 0, 1)),
        ((3, 3, 3), 3, (1, 1, 1)),
        ((10, 1), 1, (1, 0)),
        ((6, 3, 1), 4, (2, 1, 1)),  # 2.4, 1.2, 0.4: equal remainders again
        ((2, 5), 6, (2, 4)),  # 1.7 and 4.3
    ],
)
def test_largest_remainders_are_rounded_up(sizes, keep, quotas):
    # Scores rise with the stratum, so that plain TopK would serve the last ones first.
    source = [stratum for stratum, size in enumerate(sizes) for _ in range(size)]
    kept = Stratified()(torch.arange(float(len(source))), keep, pool(source=source)).tolist()
    assert tuple(Counter(source[i] for i in kept)[s] for s in range(len(sizes))) == quotas


def test_with_few_that_can_win_strata_do_not_matter():
    infinite = -math.inf
    scores, at = torch.tensor([infinite, 1.0, infinite, 2.0]), pool(source=[0, 1, 1, 2])
    assert Stratified()(scores, 2, at).tolist() == [1, 3]
    assert Stratified()(scores, 3, at).tolist() == [0, 1, 3]  # not row 2, of the fuller stratum
    assert Stratified()(torch.full((4,), infinite), 3, at).tolist() == [0, 1, 2]


def test_strata_come_from_the_batch_or_a_function_of_it():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0])
    batch = {"kind": torch.tensor([1, 1, 0, 0], dtype=torch.uint8)}
    assert Stratified("kind")(scores, 2, Pool(batch)).tolist() == [0, 2]
    by = Stratified(lambda batch: batch["kind"] > 0)
    assert by(scores, 2, Pool(batch)).tolist() == [0, 2]
    assert Stratified("kind")(scores, 2, Pool(SimpleNamespace(**batch))).tolist() == [0, 2]
    with pytest.raises(ScoringError, match='no field "source"'):
        Stratified()(scores, 2, Pool(batch))
    for wrong in (torch.zeros(4), torch.zeros(3).long(), torch.zeros(4, 1).long(), [0, 0, 1, 1]):
        with pytest.raises(ScoringError, match=r"an integer tensor \[4\]"):
            Stratified(lambda batch, wrong=wrong: wrong)(scores, 2, Pool())
    with pytest.raises(ScoringError, match=r"gives list, need the stratum of each"):
        Stratified(lambda batch: [0, 0, 1, 1])(scores, 2, Pool())
    with pytest.raises(ScoringError, match=r"by='weight' gives torch\.float32"):
        Stratified("weight")(scores, 2, Pool({"weight": torch.zeros(4)}))


# Options.


WRONG = [
    (TrimmedTopK, -0.1, "drop_top must be a share .* got -0.1"),
    (TrimmedTopK, 1.0, "below 1"),
    (TrimmedTopK, math.nan, "got nan"),
    (TrimmedTopK, True, "got True"),
    (TrimmedTopK, "0.1", "got '0.1'"),
    (Robust, 0, "z must be a number above 0"),
    (Robust, math.inf, r"it is TopK\(\)"),
    (Robust, None, "got None"),
    (Gumbel, 0.0, r"limits are TopK\(\) at zero"),
    (Gumbel, -1.0, "temperature must be"),
    (Gumbel, math.inf, "at infinity"),
    (Gumbel, math.nan, "got nan"),
    (Gumbel, 1e-31, "at least 1e-30"),
    (RankSample, -1.0, "power must be None or a number from 0"),
    (RankSample, math.inf, "to 1e30"),
    (RankSample, math.nan, "got nan"),
    (RankSample, True, "got True"),
    (Stratified, 3, "name of a field or a function"),
    (Stratified, int, "name of a field or a function"),
]


@named(("kind", "option", "message"), WRONG, ids=[f"{kind.__name__}-{o}" for kind, o, _ in WRONG])
def test_options_are_checked_at_construction(kind, option, message):
    with pytest.raises(TypeError if kind is Stratified else ValueError, match=message):
        kind(option)


@named("kind", [Gumbel, RankSample])
@named("seed", [-1, 0.5, None, False])
def test_seeds_are_whole_numbers(kind, seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number, 0 or more, got {seed}"):
        kind(seed=seed)


@named("selection", EVERY, ids=repr)
def test_a_selection_is_a_value(selection):
    assert eval(repr(selection)) == selection and len({selection, eval(repr(selection))}) == 1
    with pytest.raises(AttributeError):
        selection.seed = 3
