"""Which positions are predicted, and what a few of them say about all: pytest tests/test_targets.py"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st
from models import VOCAB, bert, candidates, gpt2

from siftloader import (
    EarlyExit,
    First,
    Loss,
    Predictions,
    Rarity,
    ScoringError,
    Sifter,
    Stride,
)
from siftloader.targets import LATER, Capacity, Targets, Unigrams


HOST = torch.device("cpu")
CLASSES = 5
COUNTS = np.array([0, 1, 10, 100, 1000])


@st.composite
def labels(draw, least=1, unlabelled=True):
    rows, length = draw(st.integers(least, 5)), draw(st.integers(1, 9))
    label = st.integers(0, CLASSES - 1)
    if unlabelled:
        label = st.one_of(st.just(-100), label)
    row = st.lists(label, min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))


def chosen(control):
    return st.one_of(
        st.integers(1, 10).map(lambda n: Stride(n, control)),
        st.integers(1, 10).map(lambda n: First(n, control)),
    )


def of_a_device(labels, device, shift, positions=None, capacity=None):
    """In place of ``Targets.of``: as if the labels of a batch lay on a GPU."""
    return on_device(labels, shift, positions, capacity)


def room_for(most):
    capacity = Capacity()
    capacity.state = [most, None, None, 0]
    return capacity


POSITIONS = st.one_of(st.none(), chosen(None), chosen(COUNTS))


def takes(positions, rank):
    """Whether the labelled position number ``rank`` of a sample is scored, told independently."""
    if isinstance(positions, Stride):
        return rank % positions.step == 0
    return not isinstance(positions, First) or rank < positions.count


def slow(labels, shift, positions):
    """Of every sample: [(place of the prediction, label) of the scored], all labels it has."""
    found = []
    for row in labels.tolist():
        wanted = row[1:] if shift else row
        all_of_it = [(t, label) for t, label in enumerate(wanted) if label != -100]
        scored = [pair for rank, pair in enumerate(all_of_it) if takes(positions, rank)]
        found.append((scored, [label for _, label in all_of_it]))
    return found


def fast(targets):
    """The same, read from targets."""
    rows = []
    for i in range(targets.samples):
        part = slice(targets.starts[i], targets.starts[i + 1])
        places = (targets.positions[part] - i * targets.length).tolist()
        real = [True] * len(places) if targets.real is None else targets.real[part].tolist()
        every = zip(places, targets.labels[part].tolist(), real, strict=True)
        assert places == sorted(set(places)) and all(0 <= p < targets.length for p in places)
        rows.append([(place, label) for place, label, counts in every if counts])
    return rows


def on_device(labels, shift, positions=None, capacity=None):
    """The way of a GPU, where nobody asks how many labels there are."""
    wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if shift else labels
    return Targets._of_capacity(wanted, positions, capacity)


WAYS = {"host": lambda y, s, p: Targets.of(y, HOST, s, p), "device": on_device}


@pytest.mark.parametrize("way", WAYS)
@examples(40)
@given(y=labels(), shift=st.booleans(), positions=POSITIONS)
def test_targets_are_those_found_one_by_one(way, y, shift, positions):
    targets, expected = WAYS[way](y, shift, positions), slow(y, shift, positions)
    assert fast(targets) == [scored for scored, _ in expected]
    assert targets.counts.tolist() == [len(every) for _, every in expected]
    assert targets.labelled().tolist() == [bool(every) for _, every in expected]
    assert targets.samples == len(y) and targets.length == y.shape[1]
    for scored, every in expected:
        assert bool(scored) == bool(every)  # whoever has labels is scored somewhere


@pytest.mark.parametrize("way", WAYS)
@examples(40)
@given(y=labels(), shift=st.booleans(), positions=chosen(COUNTS))
def test_the_control_is_known_at_every_labelled_position(way, y, shift, positions):
    targets = WAYS[way](y, shift, positions)
    surprise = [-math.log((n + 1) / (COUNTS + 1).sum()) for n in COUNTS]
    values, means = targets.correction.values, targets.correction.means
    real = torch.ones_like(values, dtype=torch.bool) if targets.real is None else targets.real
    expected = slow(y, shift, positions)
    scored = [surprise[label] for row, _ in expected for _, label in row]
    assert values[real].tolist() == pytest.approx(scored, abs=1e-5)
    for mean, (_, every) in zip(means.tolist(), expected, strict=True):
        if every:
            assert mean == pytest.approx(np.mean([surprise[label] for label in every]), abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
@examples(40)
@given(y=labels(2), shift=st.booleans(), positions=POSITIONS, data=st.data())
def test_a_part_is_what_the_cut_labels_give(way, y, shift, positions, data):
    first = data.draw(st.integers(0, len(y) - 1))
    last = data.draw(st.integers(first + 1, len(y)))
    part = WAYS[way](y, shift, positions).part(first, last)
    alone = WAYS[way](y[first:last], shift, positions)
    assert fast(part) == fast(alone) and part.starts == alone.starts
    for name in ("positions", "labels", "counts", "real"):
        one, other = getattr(part, name), getattr(alone, name)
        assert (one is None and other is None) or torch.equal(one, other), name
    if positions is not None and positions.control is not None:
        one, other = part.correction, alone.correction
        assert torch.equal(one.values, other.values)
        assert torch.allclose(one.means, other.means, equal_nan=True)


@examples(40)
@given(y=labels(), soft=st.booleans())
def test_soft_labels_are_taken_everywhere_and_zeros_are_none(y, soft):
    one_hot = torch.nn.functional.one_hot(y.clamp_min(0), CLASSES).double()
    one_hot = 0.6 * one_hot + 0.4 / CLASSES if soft else one_hot
    one_hot = one_hot * (y != -100)[..., None]
    targets = Targets.of(one_hot, HOST, shift=False)
    assert targets.counts.tolist() == (y != -100).sum(1).tolist()
    kept = targets.labels.argmax(1)[targets.real]
    assert kept.tolist() == y[y != -100].tolist()
    part = targets.part(0, 1)
    assert part.counts.tolist() == targets.counts[:1].tolist()
    assert torch.equal(part.labels, targets.labels[: y.shape[1]])


# --- the mean of all from the values of some


def early(targets):
    return Predictions(targets, None)


def estimate(y, value, positions=None, reduction="mean", way="host"):
    """Scores of samples whose positions have the values [P, T], through the scored ones."""
    targets = WAYS[way](y, False, positions)
    return early(targets).reduce(value.reshape(-1)[targets.positions], reduction)


def means(y, value, reduction="mean"):
    mask = y != -100
    total = torch.where(mask, value, 0).sum(1)
    return (
        total / mask.sum(1) if reduction == "mean" else torch.where(mask.any(1), total, torch.nan)
    )


def close(one, other, atol=1e-5):
    return torch.allclose(one, other, atol=atol, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@examples(40)
@given(y=labels(), positions=st.sampled_from([None, Stride(1), First(9), Stride(1, COUNTS)]))
def test_all_positions_give_the_mean_itself(way, reduction, y, positions):
    value = torch.linspace(-2, 3, y.numel(), dtype=torch.float64).view(y.shape)
    found = estimate(y, value, positions, reduction, way)
    assert close(found, means(y, value, reduction))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@examples(40)
@given(y=labels(), positions=chosen(COUNTS), slope=st.sampled_from([1.0, -0.5, 3.0]))
def test_a_control_that_is_the_value_gives_the_mean_of_all(way, reduction, y, positions, slope):
    value = slope * Unigrams(COUNTS)(y)
    found = estimate(y, value, positions, reduction, way)
    varies = any(
        len({label for _, label in scored}) > 1 for scored, _ in slow(y, False, positions)
    )
    if varies:  # else no slope can be found
        assert close(found, means(y, value, reduction), 1e-4)
    else:
        scored = [[value[i, t].item() for t, _ in row] for i, (row, _) in
                  enumerate(slow(y, False, positions))]  # fmt: skip
        plain = torch.tensor([np.mean(row) if row else math.nan for row in scored])
        plain = plain if reduction == "mean" else plain * (y != -100).sum(1)
        assert close(found.double(), plain.double(), 1e-4)


def synthetic(seed, noise, slope=0.7, samples=64, length=128):
    """Labels whose surprise explains a part of the value, more or less of it in each sample."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (samples, length), generator=draw)
    y[torch.rand(y.shape, generator=draw) < 0.1] = -100
    level = torch.randn(samples, 1, generator=draw)  # of the sample: no control knows it
    error = noise * torch.randn(y.shape, generator=draw)
    return y, slope * Unigrams(COUNTS)(y.clamp_min(0)) + level + error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("positions", [Stride(8), Stride(16), First(16)])
def test_a_control_that_explains_most_leaves_little_error(positions, seed):
    y, value = synthetic(seed, noise=0.3)
    truth = means(y, value)
    plain = (estimate(y, value, positions) - truth).square().mean().sqrt()
    controlled = type(positions)(getattr(positions, "step", 16), COUNTS)
    corrected = (estimate(y, value, controlled) - truth).square().mean().sqrt()
    # The control explains 0.7 ** 2 * var, a deviation of 1.9; left is 0.3: six times less.
    assert corrected < plain / 3


def test_a_control_that_explains_nothing_does_little_harm():
    y, value = synthetic(0, noise=2.0, slope=0.0)
    truth = means(y, value)
    plain = (estimate(y, value, Stride(8)) - truth).square().mean()
    corrected = (estimate(y, value, Stride(8, COUNTS)) - truth).square().mean()
    assert corrected < 1.05 * plain


def test_the_estimate_has_no_bias():
    gaps = []
    for seed in range(20):
        y, value = synthetic(seed, noise=0.3)
        gaps.append((estimate(y, value, Stride(8, COUNTS)) - means(y, value)).mean().item())
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / math.sqrt(len(gaps))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4, -3.3])
def test_a_control_without_variation_changes_nothing(way, constant):
    y, value = synthetic(1, noise=1.0)
    control = Stride(5, lambda labels: torch.full(labels.shape, constant))
    found = estimate(y, value, control, way=way)
    assert torch.allclose(found, estimate(y, value, Stride(5), way=way), atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_samples_with_a_single_label_keep_it_and_those_without_have_none(way):
    y = torch.tensor([[-100, 3, -100, -100], [-100] * 4, [0, 1, 4, 3]])
    value = torch.tensor([[9.0, 2.5, 9, 9], [9.0] * 4, [1.0, 2, 3, 4]])
    for positions in (Stride(2, COUNTS), First(1, COUNTS), First(3, COUNTS)):
        found = estimate(y, value, positions, way=way)
        assert found[0] == 2.5 and found[1].isnan() and found[2].isfinite(), positions


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_not_finite_spoils_its_own_sample_only(way, bad):
    y, value = synthetic(2, noise=0.3, samples=8)
    rest = torch.arange(8) != 5
    expected = estimate(y[rest], value[rest], Stride(4, COUNTS), way=way)
    place = Targets.of(y, HOST, False, Stride(4)).part(5, 6).positions[3]
    value[5, place] = bad
    found = estimate(y, value, Stride(4, COUNTS), way=way)
    assert not found[5].isfinite()
    assert torch.allclose(found[rest], expected, atol=1e-5)


# --- room for labels that nobody counts on the host


def sparse(share, rows=6, length=64, seed=0):
    """Labels at about a share of the positions."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (rows, length), generator=draw)
    return y.masked_fill(torch.rand(y.shape, generator=draw) >= share, -100)


def with_labels(*numbers, length=64):
    """Rows with so many labels, at their end."""
    y = torch.full((len(numbers), length), -100)
    for row, number in enumerate(numbers):
        y[row, length - number :] = torch.arange(number) % CLASSES
    return y


@examples(60)
@given(
    share=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 99),
    length=st.integers(1, 48),
    shift=st.booleans(),
    positions=POSITIONS,
)
def test_within_its_room_a_pool_is_read_in_full(share, seed, length, shift, positions):
    capacity = Capacity()
    for y in (sparse(share, 5, length, seed), sparse(share / 2, 3, length, seed + 1)):
        found = on_device(y, shift, positions, capacity)
        assert fast(found) == [scored for scored, _ in slow(y, shift, positions)]
        value = torch.linspace(-2, 3, y.numel()).view(y.shape)
        one = early(found).reduce(value.reshape(-1)[found.positions])
        other = Targets.of(y, HOST, shift, positions)
        other = early(other).reduce(value.reshape(-1)[other.positions])
        if capacity.most is None or (y != -100).sum(1).max() <= capacity.most:
            assert close(one, other, 1e-4)
            assert int(capacity.capped) == 0


def test_room_is_made_for_an_eighth_more():
    for most, room in [(0, 8), (1, 16), (8, 16), (9, 24), (77, 88), (100, 120), (320, 360)]:
        capacity = Capacity()
        assert capacity.of(torch.tensor([0, most]), 512) == min(room, 512)
        assert room >= most * 9 / 8


def test_a_row_without_room_is_read_at_its_first_labels_and_counted():
    capacity = room_for(16)
    y = with_labels(10, 30, 16, 0, 17)
    found, expected = on_device(y, False, None, capacity), slow(y, False, None)
    assert fast(found) == [scored[:16] for scored, _ in expected]
    assert found.counts.tolist() == [10, 30, 16, 0, 17] and int(capacity.capped) == 2
    assert len(found.positions) == 5 * 16
    value = torch.rand(y.shape)
    assert close(
        early(found).reduce(value.reshape(-1)[found.positions], "sum")[1],
        30 * value[1, 34:50].mean(),  # as First(16) estimates it
    )


def test_room_grows_once_the_host_has_heard():
    capacity = Capacity()
    assert capacity.of(torch.tensor([3, 10]), 512) == 24
    most = [capacity.of(torch.tensor([3, 40 if pool == 2 else 10]), 512) for pool in range(20)]
    assert most[0] == 24 and most[-1] == 48 and most == sorted(most)
    assert most.index(48) <= 2 * LATER
    assert int(capacity.capped) == 1
    assert capacity.of(torch.tensor([30]), 32) == 32  # rows may be shorter than that


@pytest.mark.parametrize("stop", range(1, 24, 3))
def test_room_is_the_same_after_a_restart(stop):
    def counts(pool):
        return torch.tensor([5, 10 + 3 * pool])

    def run(capacity, pools):
        return [capacity.of(counts(pool), 512) for pool in pools]

    straight = run(Capacity(), range(30))
    capacity, resumed = Capacity(), Capacity()
    before = run(capacity, range(stop))
    resumed.state = json.loads(json.dumps(capacity.state))
    assert before + run(resumed, range(stop, 30)) == straight
    assert len(set(straight)) > 2


def test_there_is_nothing_to_save_before_the_first_pool():
    capacity = Capacity()
    assert capacity.state is None
    capacity.state = None
    assert capacity.of(torch.tensor([3]), 64) == 16


# --- through a model


ROWS = torch.arange(8) != 3


def unigrams_of(labels):
    return Unigrams(np.arange(VOCAB) ** 2)(labels)


@pytest.mark.parametrize("family", [bert, gpt2])
@pytest.mark.parametrize("criterion", ["loss", "entropy", Loss("sum")])
def test_every_position_taken_one_by_one_is_all_of_them(family, criterion):
    model, batch = family(), candidates(family.__name__)
    whole = Sifter(model, criterion=criterion).score(batch)
    for positions in (Stride(1), First(64), First(24), Stride(1, unigrams_of)):
        found = Sifter(model, criterion=criterion, positions=positions).score(batch)
        if positions.control is None:
            assert torch.equal(found, whole), positions
        else:
            assert torch.allclose(found, whole, rtol=1e-5, atol=1e-6)
    fewer = Sifter(model, criterion=criterion, positions=Stride(2)).score(batch)
    assert (fewer - whole)[ROWS].abs().max() > 0.01


@pytest.mark.parametrize("positions", [Stride(3), First(5), Stride(64), Stride(4, unigrams_of)])
def test_scores_of_some_positions_are_those_of_the_slow_reference(positions, monkeypatch):
    model, batch = gpt2(), candidates("gpt2")
    logits = EarlyExit(model, layer=1).logits(batch).double()
    y = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    value = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    expected = []
    for i, (scored, _) in enumerate(slow(batch["labels"], True, positions)):
        expected.append(np.mean([value[i, t].item() for t, _ in scored] or [math.nan]))
    expected = torch.tensor(expected)
    if positions.control is not None:
        surprise = unigrams_of(y.clamp_min(0)).double()
        products, squares, shifts = 0.0, 0.0, []
        for i, (scored, _) in enumerate(slow(batch["labels"], True, positions)):
            at = [t for t, _ in scored]
            own, losses = surprise[i, at], value[i, at]
            products += ((own - own.mean()) * (losses - losses.mean())).sum() if at else 0.0
            squares += (own - own.mean()).square().sum() if at else 0.0
            shifts.append(surprise[i][y[i] != -100].mean() - own.mean())
        expected = expected + products / squares * torch.stack(shifts)
    found = Sifter(model, positions=positions).score(batch)
    assert (found.double() - expected)[ROWS].abs().max() < 2e-5
    assert found[3] == -torch.inf
    monkeypatch.setattr(Targets, "of", of_a_device)
    there = Sifter(model, positions=positions).score(batch)
    assert torch.allclose(there, found, atol=1e-5)


@pytest.mark.parametrize(
    "control",
    [
        lambda labels: torch.zeros(labels.shape[0]),
        lambda labels: torch.zeros(*labels.shape, 2),
        lambda labels: torch.zeros(labels.numel()),
        lambda labels: 0.5,
    ],
    ids=["a sample", "a pair", "flat", "a number"],
)
def test_a_control_of_another_shape_is_refused(control):
    model, batch = gpt2(), candidates("gpt2")
    with pytest.raises(ScoringError, match=r"control must give one value per position.*\(8, 24\)"):
        Sifter(model, positions=Stride(2, control)).score(batch)


def test_a_control_sees_no_negative_label():
    model, batch = gpt2(), candidates("gpt2")
    seen = []

    def control(labels):
        seen.append(int(labels.min()))
        return labels.double()

    Sifter(model, positions=First(2, control)).score(batch)
    assert min(seen) >= 0


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2", None])
@pytest.mark.parametrize(("kind", "name"), [(Stride, "step"), (First, "count")])
def test_wrong_counts_fail_at_construction(kind, name, count):
    with pytest.raises(ValueError, match=rf"{name} must be an int of at least 1, got {count!r}"):
        kind(count)


@pytest.mark.parametrize("control", [np.array([-1, 2]), np.ones((2, 2)), np.ones(1)])
def test_wrong_counts_as_control_fail_at_construction(control):
    with pytest.raises(ValueError, match="non-negative counts"):
        Stride(2, control)


LABELS = [
    ("three dimensions", torch.zeros(2, 3, 4, dtype=torch.long), {}, "integers of shape"),
    ("a shift of [P]", torch.zeros(4, dtype=torch.long), {"shift": True}, r"labels \[P, T\]"),
    ("another mark", torch.tensor([[1, -1]]), {}, "found label -1"),
    ("probabilities shifted", torch.ones(2, 3, 4), {"shift": True}, "unshifted"),
    ("probabilities, some", torch.ones(2, 3, 4), {"positions": Stride(2)}, "without positions"),
    ("a float each", torch.ones(4), {}, "must be probabilities"),
]


@pytest.mark.parametrize(("_name", "y", "options", "text"), LABELS, ids=[row[0] for row in LABELS])
def test_labels_that_cannot_be_read_say_why(_name, y, options, text):
    with pytest.raises(ScoringError, match=text):
        Targets.of(y, HOST, **({"shift": False} | options))


@examples(40)
@given(y=labels(unlabelled=False), positions=POSITIONS)
def test_samples_without_any_gap_are_read_alike(y, positions):
    targets = Targets.of(y, HOST, False, positions)
    assert fast(targets) == [scored for scored, _ in slow(y, False, positions)]


@pytest.mark.parametrize("criterion", ["loss", Rarity(np.arange(VOCAB))], ids=["loss", "rarity"])
def test_a_wrong_label_on_a_device_is_a_score_that_is_not_finite(criterion, monkeypatch):
    # On the host it is an error; to look at a GPU's labels would be to wait for it.
    model, batch = gpt2(), candidates("gpt2")
    expected = Sifter(model, criterion=criterion).score(batch)
    batch["labels"][2, 5] = -1
    with pytest.raises(ScoringError, match="found label -1"):
        Sifter(model, criterion=criterion).score(batch)
    monkeypatch.setattr(Targets, "of", of_a_device)
    sifter = Sifter(model, criterion=criterion)
    sifter(batch)
    scores = sifter.score(batch)
    rest = torch.arange(8) != 2
    assert scores[2] == -torch.inf and sifter.stats["nonfinite"] == 1
    assert torch.allclose(scores[rest], expected[rest], atol=1e-6)


def test_values_may_be_true_or_false(monkeypatch):
    model, batch = gpt2(), candidates("gpt2")

    def missed(early):
        return early.reduce(early.each(lambda logits, labels: logits.argmax(-1) != labels))

    logits, labels = EarlyExit(model, layer=1).logits(batch), batch["labels"][:, 1:]
    wrong = (logits[:, :-1].argmax(-1) != labels) & (labels != -100)
    expected = wrong.sum(1) / (labels != -100).sum(1)
    found = Sifter(model, criterion=missed).score(batch)
    assert torch.allclose(found[ROWS], expected[ROWS])
    monkeypatch.setattr(Targets, "of", of_a_device)
    assert torch.allclose(Sifter(model, criterion=missed).score(batch), found)


@pytest.mark.parametrize("use", ["control", "criterion"])
def test_counts_of_another_tokenizer_are_refused(use):
    model, batch = gpt2(), candidates("gpt2")
    few = np.ones(50, np.int64)
    options = {"positions": Stride(2, few)} if use == "control" else {"criterion": Rarity(few)}
    largest = int(batch["labels"].max())
    with pytest.raises(ScoringError, match=rf"label {largest}.*counts of 50 ids.*tokenizer"):
        Sifter(model, **options).score(batch)


@pytest.mark.parametrize(
    "value",
    [
        lambda logits, labels: logits.softmax(-1),
        lambda logits, labels: logits.mean(),
        lambda logits, labels: logits[1:, 0],
        lambda logits, labels: 0.5,
    ],
    ids=["all classes", "one for all", "one too few", "a number"],
)
def test_a_value_is_one_number_per_position(value):
    model, batch = gpt2(), candidates("gpt2")
    with pytest.raises(ScoringError, match=r"one number per position, \[152\], got"):
        Sifter(model, criterion=lambda early: early.reduce(early.each(value))).score(batch)
