from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from siftloader.masking import Mlm
from siftloader.shards import Tokenizer


SPECIAL = (0, 100, 101, 102, 103)
BERT = Mlm(0.15, mask_id=103, vocab_size=30522, special_ids=SPECIAL)
KEYS = {"seed": 0, "epoch": 0}


def text(rows: int, width: int, vocabulary: int = 30522) -> np.ndarray:
    """Ids with a special token in one place of eight."""
    rng = np.random.default_rng(1)
    ids = rng.integers(200, vocabulary, (rows, width)).astype(np.uint16)
    ids[rng.random(ids.shape) < 1 / 8] = 102
    return ids


def same(left: tuple[np.ndarray, ...], right: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@given(
    picks=st.lists(st.integers(0, 39), min_size=1, max_size=20),
    width=st.integers(1, 48),
    seed=st.integers(-3, 2**66),
    epoch=st.integers(0, 2**33),
    repeat=st.integers(0, 3),
)
def test_masks_do_not_depend_on_the_batch_around_them(picks, width, seed, epoch, repeat):
    ids, names, keys = text(40, 48), np.arange(40) * 7**11, {"seed": seed, "epoch": epoch}
    whole = BERT(ids, names, repeat=repeat, **keys)
    part = BERT(ids[picks, :width], names[picks], repeat=repeat, **keys)
    assert same(part, tuple(array[picks, :width] for array in whole))


@given(
    probability=st.floats(0.001, 0.999),
    vocabulary=st.integers(6, 65_536),
    special=st.sets(st.integers(0, 4)),
    first=st.integers(0, 2**62),
)
def test_a_mask_changes_only_what_it_labels(probability, vocabulary, special, first):
    mlm = Mlm(probability, mask_id=4, vocab_size=vocabulary, special_ids=tuple(special))
    ids = np.random.default_rng(0).integers(0, vocabulary, (8, 32)).astype(np.uint16)
    before = ids.copy()
    inputs, labels = mlm(ids, first + np.arange(8), **KEYS)
    chosen, never = labels != -100, [*special, 4]
    assert inputs.dtype == labels.dtype == np.int64
    assert np.array_equal(ids, before)
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    assert not np.isin(labels[chosen], never).any()
    assert not np.isin(inputs[chosen & (inputs != 4)], never).any()
    assert inputs.min() >= 0
    assert inputs.max() < vocabulary


def test_rates_are_those_of_bert():
    """15 % of the ordinary tokens; of those 80 / 10 / 10; all within five sigma."""
    ids = text(4096, 256)
    inputs, labels = BERT(ids, np.arange(4096), **KEYS)
    ordinary, chosen = ids != 102, labels != -100
    within(chosen.sum(), ordinary.sum(), 0.15)
    within((inputs[chosen] == 103).sum(), chosen.sum(), 0.8)
    within((inputs[chosen] == ids[chosen]).sum(), chosen.sum(), 0.1 + 0.1 / 30517)
    per_place = (chosen & ordinary).sum(axis=0) / ordinary.sum(axis=0)  # [T]: no favoured places
    assert np.abs(per_place - 0.15).max() < 5 * (0.15 * 0.85 / (4096 * 7 / 8)) ** 0.5


def within(count: int, trials: int, probability: float) -> None:
    sigma = (trials * probability * (1 - probability)) ** 0.5
    assert abs(count - trials * probability) < 5 * sigma, (count / trials, probability)


def test_replacements_are_uniform_over_the_ordinary_ids():
    mlm = Mlm(0.5, mask_id=4, vocab_size=1000, special_ids=(0, 1, 2, 3, 4))
    ids = np.full((4096, 256), 999, np.uint16)
    inputs, labels = mlm(ids, np.arange(4096), **KEYS)
    drawn = inputs[(labels != -100) & (inputs != 4) & (inputs != 999)]
    seen = np.bincount(drawn, minlength=1000)[5:999]
    expected = seen.sum() / len(seen)
    chi2, freedom = ((seen - expected) ** 2 / expected).sum(), len(seen) - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


NEIGHBOURS = {
    "epochs": lambda mlm, ids, names: (
        mlm(ids, names, seed=0, epoch=0),
        mlm(ids, names, seed=0, epoch=1),
    ),
    "seeds": lambda mlm, ids, names: (
        mlm(ids, names, seed=0, epoch=0),
        mlm(ids, names, seed=1, epoch=0),
    ),
    "repeats": lambda mlm, ids, names: (
        mlm(ids, names, **KEYS),
        mlm(ids, names, repeat=1, **KEYS),
    ),
    "next sample": lambda mlm, ids, names: (
        mlm(ids, names, **KEYS),
        mlm(ids, names + 1, **KEYS),
    ),
    "a sample 2**32 on": lambda mlm, ids, names: (
        mlm(ids, names, **KEYS),
        mlm(ids, names + 2**32, **KEYS),
    ),
    "next token": lambda mlm, ids, names: tuple(
        tuple(array[:, cut] for array in mlm(ids, names, **KEYS))
        for cut in (slice(None, -1), slice(1, None))
    ),
    "next sample, next token": lambda mlm, ids, names: (
        tuple(array[:, 1:] for array in mlm(ids, names, **KEYS)),
        tuple(array[:, :-1] for array in mlm(ids, names + 1, **KEYS)),
    ),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_draws_are_independent_of_those_beside_them(pair):
    """Both chosen as often as chance says, and then equal fates and replacements as often, too."""
    mlm = Mlm(0.4, mask_id=4, vocab_size=50, special_ids=(0, 1, 2, 3, 4))
    ids = np.full((2048, 256), 49, np.uint16)
    (one, left), (two, right) = pair(mlm, ids, np.arange(2048))
    both = (left != -100) & (right != -100)
    within(both.sum(), both.size, 0.4**2)
    one, two = one[both], two[both]
    within(((one == 4) & (two == 4)).sum(), both.sum(), 0.8**2)
    drawn = (one != 4) & (two != 4) & (one != 49) & (two != 49)
    within((one[drawn] == two[drawn]).sum(), drawn.sum(), 1 / 44)


def test_any_two_samples_and_any_two_places_overlap_as_chance_says():
    mlm = Mlm(0.3, mask_id=4, vocab_size=50)
    _, labels = mlm(np.full((1024, 512), 49, np.uint16), np.arange(1024), **KEYS)
    chosen = (labels != -100) - 0.3  # [n, T]
    for side in (chosen, chosen.T):
        overlaps = (side @ side.T)[np.triu_indices(len(side), 1)]
        assert abs(overlaps.var() / (side.shape[1] * 0.21**2) - 1) < 0.03
        assert np.abs(overlaps).max() < 7 * overlaps.std()


def test_being_chosen_says_nothing_about_the_fate():
    """Lowering the probability keeps a subset of the choices, with the fates they had."""
    ids, names = text(64, 128), np.arange(64)
    many, few = (
        Mlm(p, mask_id=103, vocab_size=30522, special_ids=SPECIAL)(ids, names, **KEYS)
        for p in (0.3, 0.15)
    )
    kept = few[1] != -100
    assert np.array_equal(few[1][kept], many[1][kept])
    assert np.array_equal(few[0][kept], many[0][kept])
    assert 0 < kept.sum() < (many[1] != -100).sum()


def test_masks_are_pinned():
    """A change here silently changes the masks of every run that resumes."""
    mlm = Mlm(0.3, mask_id=4, vocab_size=100, special_ids=(0, 1, 2, 3, 4))
    ids = np.arange(5, 29).reshape(2, 12)
    inputs, labels = mlm(ids, np.array([0, 2**40]), seed=7, epoch=2, repeat=1)
    assert (inputs.tolist(), labels.tolist()) == GOLDEN


def test_a_recorded_tokenizer_says_what_is_special():
    tokenizer = Tokenizer("bert", "", 50, {"pad": 0, "cls": 2, "mask": 4, "sep": 2})
    assert Mlm.of(tokenizer) == Mlm(0.15, mask_id=4, vocab_size=50, special_ids=(0, 2, 4))
    with pytest.raises(ValueError, match=r"needs a mask token.*\['eos'\].*masking=None"):
        Mlm.of(Tokenizer("gpt2", "", 50, {"eos": 1}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probability": 0.0}, "between 0 and 1"),
        ({"probability": 1.0}, "between 0 and 1"),
        ({"probability": float("nan")}, "between 0 and 1"),
        ({"mask_id": 50}, r"0\.\.49, got 50"),
        ({"mask_id": -1}, r"0\.\.49, got -1"),
        ({"special_ids": (3, 50)}, r"got \[50\]"),
        ({"special_ids": tuple(range(50))}, "all 50 ids are special"),
    ],
    ids=["never", "always", "nan", "mask id", "no mask id", "special id", "all special"],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Mlm(**({"mask_id": 4, "vocab_size": 50} | wrong))


def test_ids_of_another_tokenizer_are_refused():
    mlm = Mlm(0.5, mask_id=4, vocab_size=50)
    with pytest.raises(ValueError, match="token id 77, but vocab_size is 50"):
        mlm(np.full((4, 16), 77, np.uint16), np.arange(4), **KEYS)


def test_no_rows_are_no_rows():
    inputs, labels = BERT(np.zeros((0, 8), np.uint16), np.zeros(0, np.int64), **KEYS)
    assert inputs.shape == labels.shape == (0, 8)


GOLDEN = (
    [[5, 4, 4, 4, 9, 4, 11, 4, 4, 14, 4, 16], [17, 18, 19, 20, 21, 65, 4, 24, 25, 4, 27, 28]],
    [
        [-100, 6, 7, 8, -100, 10, -100, 12, 13, -100, 15, -100],
        [-100, -100, -100, -100, -100, 22, 23, -100, -100, 26, -100, -100],
    ],
)
