"""Every criterion against plain float64 arithmetic, and against winners planted in advance.

pytest tests/test_criteria.py
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import LAYERS, SHIFTED, VOCAB, bert, candidates, classifier, gpt2, truncated
from torch import nn

from siftloader import (
    Criterion,
    Entropy,
    GradNorm,
    Gumbel,
    LeastConfidence,
    Loss,
    Margin,
    Random,
    RankSample,
    Rarity,
    Reducible,
    Residual,
    ScoringError,
    Sifter,
    SiftingDataLoader,
    TokenShards,
    TopK,
)


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"
FAMILIES = {"bert": bert, "gpt2": gpt2, "classifier": classifier}
LABELLED = torch.arange(8) != 3
COUNTS = np.arange(VOCAB) ** 2
IDS = torch.tensor([7, 2**24 + 1, 5, 0, 2**53 + 1, 2**24, 2**53, 2**62])
IRREDUCIBLE = np.linspace(-1, 2, 8)


# --- against arithmetic of one's own


def loss(p, label):
    return -math.log(p[label])


def entropy(p, label):
    return -sum(x * math.log(x) for x in p)


def margin(p, label):
    *_, second, first = sorted(p)
    return 1 - (first - second)


def doubt(p, label):
    return 1 - max(p)


def gradient(p, label):
    logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    nn.functional.cross_entropy(logits[None], torch.tensor([label])).backward()
    return logits.grad.norm().item()


def rarity(p, label):
    return -math.log((COUNTS[label] + 1) / (COUNTS + 1).sum())


VALUES = {
    Loss: loss,
    Entropy: entropy,
    Margin: margin,
    LeastConfidence: doubt,
    GradNorm: gradient,
    Rarity: rarity,
    Residual: lambda p, label: loss(p, label) - rarity(p, label),
}


@cache
def subject(family):
    """A model, its candidates, and of each sample the (probabilities, label) at layer 1, float64."""
    torch.manual_seed(0)
    model, batch = FAMILIES[family](), candidates(family) | {"id": IDS}
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "id")}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        output = truncated(family, model, 1)(**inputs)
    logits, labels = getattr(output, "logits", output), batch["labels"]
    if family in SHIFTED:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    samples = []
    for row, wanted in zip(logits.tolist(), labels.tolist(), strict=True):
        found = []
        for position, label in zip(row, wanted, strict=True):
            if label != -100:
                exact = [math.exp(x - max(position)) for x in position]
                found.append(([x / sum(exact) for x in exact], label))
        samples.append(found)
    return model, batch, samples


def reference(samples, value, reduction="mean"):
    scores = []
    for positions in samples:
        values = [value(p, label) for p, label in positions]
        whole = sum(values) if values else math.nan
        scores.append(whole / len(values) if values and reduction == "mean" else whole)
    return torch.tensor(scores, dtype=torch.float64)[LABELLED]


def of(kind, **options):
    return kind(COUNTS, **options) if kind in (Rarity, Residual) else kind(**options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_criterion_is_what_its_formula_says(family, kind, reduction):
    model, batch, samples = subject(family)
    found = Sifter(model, criterion=of(kind, reduction=reduction)).score(batch)
    expected = reference(samples, VALUES[kind], reduction)
    largest = max(1.0, expected.abs().max().item())
    assert (found[LABELLED] - expected).abs().max() < 2e-5 * largest
    assert found[3] == -torch.inf


def combined(*weighted):
    return lambda p, label: sum(weight * value(p, label) for weight, value in weighted)


SUMS = {
    "sum": (Loss() + 0.1 * Entropy(), combined((1, loss), (0.1, entropy))),
    "reversed": (Entropy() * 2 + Loss(), combined((2, entropy), (1, loss))),
    "negative": (-Loss(), combined((-1, loss))),
    "difference": (Loss() - Rarity(COUNTS), combined((1, loss), (-1, rarity))),
    "nested": (
        3 * (Loss() - 0.5 * (Margin() + GradNorm())) + -LeastConfidence(),
        combined((3, loss), (-1.5, margin), (-1.5, gradient), (-1, doubt)),
    ),
    "of one's own": (Loss() + (lambda early: torch.ones(8)), lambda p, label: loss(p, label) + 1),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sum_of_criteria_is_the_sum(family, name):
    model, batch, samples = subject(family)
    criterion, value = SUMS[name]
    found = Sifter(model, criterion=criterion).score(batch)
    assert (found[LABELLED] - reference(samples, value)).abs().max() < 1e-4
    assert found[3] == -torch.inf


def runs_of(criterion):
    """How often a pool runs the trunk, once everything about the model is known."""
    model, batch, _ = subject("gpt2")
    sifter, calls = Sifter(model, criterion=criterion), []
    with model.transformer.wte.register_forward_hook(lambda *_: calls.append(1)):
        sifter.score(batch)
        calls.clear()
        sifter.score(batch)
    return len(calls)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_criteria_runs_the_model_once(name):
    assert runs_of(SUMS[name][0]) == 1


@pytest.mark.parametrize("criterion", [*map(of, VALUES), Random(), -Rarity(COUNTS)])
def test_a_criterion_runs_the_model_at_most_once(criterion):
    needs_none = not getattr(criterion, "values", ())
    assert runs_of(criterion) == (0 if needs_none else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_reducible_subtracts_the_loss_of_this_very_sample(family):
    # Neighbouring ids above 2**24 and 2**53 are one number in float32 and float64.
    model, batch, samples = subject(family)
    order = np.random.default_rng(0).permutation(8)
    criterion = Reducible(IDS.numpy()[order], IRREDUCIBLE[order])
    found = Sifter(model, criterion=criterion).score(batch)
    expected = reference(samples, loss) - torch.tensor(IRREDUCIBLE)[LABELLED]
    assert (found[LABELLED] - expected).abs().max() < 2e-5
    again = Sifter(model, criterion=criterion).score(batch | {"id": IDS.flip(0)})
    other = reference(samples, loss) - torch.tensor(IRREDUCIBLE[::-1].copy())[LABELLED]
    assert (again[LABELLED] - other).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_reducible_takes_ids_of_any_integer_type(dtype):
    model, batch, _ = subject("classifier")
    small = torch.arange(8)
    criterion = Reducible(small.numpy(), IRREDUCIBLE)
    expected = Sifter(model, criterion=criterion).score(batch | {"id": small})
    assert torch.equal(
        Sifter(model, criterion=criterion).score(batch | {"id": small.to(dtype)}), expected
    )


def test_reducible_refuses_ids_that_are_no_integers():
    model, batch, _ = subject("classifier")
    criterion = Reducible(np.arange(8), IRREDUCIBLE)
    with pytest.raises(ScoringError, match=r"float32.*integer"):
        Sifter(model, criterion=criterion).score(batch | {"id": torch.arange(8.0)})


def test_reducible_names_the_sample_it_does_not_know():
    model, batch, _ = subject("classifier")
    known = np.delete(IDS.numpy(), 4)
    sifter = Sifter(model, criterion=Reducible(known, IRREDUCIBLE[:7]))
    with pytest.raises(ScoringError, match=rf"sample {2**53 + 1} \(there are 7, ids 0 to {2**62}"):
        sifter.score(batch)
    with pytest.raises(ScoringError, match='no field "id"'):
        sifter.score({k: v for k, v in batch.items() if k != "id"})


# --- soft labels


class Given(nn.Module):
    """A frozen model whose logits are its inputs."""

    def forward(self, x):
        return x


SOFT = [Loss, Entropy, Margin, LeastConfidence, GradNorm]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("family", FAMILIES)
def test_hard_labels_as_probabilities_score_alike(family, kind, reduction):
    model, batch, _ = subject(family)
    sifter = Sifter(model, criterion=kind(reduction), shift_labels=False)
    hard = sifter.score(batch)
    labels = batch["labels"]
    classes = 10 if family == "classifier" else VOCAB
    one_hot = nn.functional.one_hot(labels.clamp_min(0), classes) * (labels != -100)[..., None]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        soft = Sifter(model, criterion=kind(reduction), shift_labels=False).score(
            batch | {"labels": one_hot.to(dtype)}
        )
        assert soft[3] == hard[3] == -torch.inf
        gap = (soft - hard)[LABELLED].abs().max()
        assert gap <= (0 if family == "classifier" and kind is not GradNorm else 1e-4), dtype


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)])
def test_probabilities_are_scored_by_cross_entropy(shape):
    draw = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(shape, generator=draw, dtype=torch.float64)
    labels = torch.rand(shape, generator=draw, dtype=torch.float64)
    labels = labels / labels.sum(-1, keepdim=True)
    labels[2] = 0  # a sample without label
    if len(shape) == 3:
        labels[4, 1] = 0  # a position without
    batch = {"x": x, "labels": labels}
    for criterion, value in (
        (Loss(), lambda p, q: -sum(b * math.log(a) for a, b in zip(p, q, strict=True))),
        (GradNorm(), lambda p, q: math.dist(p, q)),
        (Entropy(), entropy),
    ):
        found = Sifter(Given(), exit_layer="full", criterion=criterion).score(batch)
        for i, (row, wanted) in enumerate(zip(x, labels, strict=True)):
            pairs = zip(row.reshape(-1, 5), wanted.reshape(-1, 5), strict=True)
            values = [value(p.softmax(0).tolist(), q.tolist()) for p, q in pairs if q.sum() > 0]
            if not values:
                assert found[i] == -torch.inf
            else:
                assert found[i].item() == pytest.approx(sum(values) / len(values), abs=1e-5)


@pytest.mark.parametrize("criterion", [Rarity(np.ones(10)), Residual(np.ones(10))])
def test_counts_need_hard_labels(criterion):
    model, batch, _ = subject("classifier")
    with pytest.raises(ScoringError, match="labels that are classes, found probabilities"):
        Sifter(model, criterion=criterion).score(batch | {"labels": torch.full((8, 10), 0.1)})


# --- by name, and mistakes at construction


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("loss", Loss),
        ("entropy", Entropy),
        ("margin", Margin),
        ("least-confidence", LeastConfidence),
        ("grad-norm", GradNorm),
    ],
)
def test_a_criterion_is_known_by_name(name, kind):
    model, batch, _ = subject("gpt2")
    named = Sifter(model, criterion=name).score(batch)
    assert torch.equal(named, Sifter(model, criterion=kind()).score(batch))


@pytest.mark.parametrize(("name", "kind"), [("rarity", Rarity), ("residual", Residual)])
def test_names_that_need_counts_take_those_of_the_shards(name, kind):
    shards = TokenShards(DEMO)
    counts = shards.unigrams
    batch = next(shards.read_batches(4, epoch=0))

    class Guess(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Embedding(shards.vocab_size, shards.vocab_size)

        def forward(self, input_ids):
            return self.logits(input_ids)

    model = Guess()
    loader = SiftingDataLoader(
        shards, 2, model=model, exit_layer="full", criterion=name, warmup_steps=0
    )
    kept = next(iter(loader))
    scores = Sifter(model, exit_layer="full", criterion=kind(counts)).score(batch)
    best = sorted(scores.topk(2).indices.tolist())
    assert torch.equal(kept["input_ids"], batch["input_ids"][best])
    with pytest.raises(ValueError, match=rf"pass {kind.__name__}\(unigrams\)"):
        Sifter(model, criterion=name)


NAN = np.array([0.5, np.nan])
WRONG = [
    ("a class", lambda: Sifter(Given(), criterion=Margin), TypeError, r"object: Margin\(\)"),
    ("a wrong name", lambda: Sifter(Given(), criterion="grad_norm"), ValueError, "grad-norm"),
    ("no criterion", lambda: Sifter(Given(), criterion=3), ValueError, "got 3"),
    ("text as weight", lambda: Loss() * "2", TypeError, "scaled by a number, got '2'"),
    ("truth as weight", lambda: True * Loss(), TypeError, "scaled by a number, got True"),
    ("NaN as weight", lambda: Loss() * math.nan, ValueError, "finite number, got nan"),
    ("inf as weight", lambda: -math.inf * Loss(), ValueError, "finite number, got -inf"),
    ("a product", lambda: Loss() * Entropy(), TypeError, "scaled by a number"),
    ("a number added", lambda: Loss() + 3, TypeError, "added to criteria, got 3"),
    ("a class added", lambda: Loss() - Entropy, TypeError, "added to criteria"),
    ("a name added", lambda: Loss() + "entropy", TypeError, "added to criteria, got 'entropy'"),
    *(
        (f"{kind.__name__} median", lambda k=kind: of(k, reduction="median"), ValueError, "median")
        for kind in VALUES
    ),
    ("negative counts", lambda: Residual(np.array([3, -1])), ValueError, "non-negative counts"),
    ("a single count", lambda: Rarity(np.array([3])), ValueError, r"counts \[V\]"),
    ("a matrix", lambda: Rarity(np.ones((2, 2))), ValueError, r"\(2, 2\)"),
    ("an id twice", lambda: Reducible([3, 5, 3], [1, 2, 1]), ValueError, "each id once"),
    ("a NaN loss", lambda: Reducible([3, 5], NAN), ValueError, "2, of which 1 are not"),
    ("float ids", lambda: Reducible([3.0, 5.0], [1, 2]), ValueError, "got float64"),
    ("too few losses", lambda: Reducible([3, 5], [1]), ValueError, r"\(2,\) and \(1,\)"),
    ("nothing", lambda: Reducible(np.zeros(0, int), []), ValueError, "at least one"),
    (
        "huge ids",
        lambda: Reducible(np.array([2**63], np.uint64), [1]),
        ValueError,
        r"below 2\*\*63",
    ),
]


@pytest.mark.parametrize(("_name", "make", "error", "text"), WRONG, ids=[w[0] for w in WRONG])
def test_mistakes_fail_at_construction(_name, make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_method_that_is_missing_is_named():
    class Forgotten(Criterion):
        pass

    model, batch, _ = subject("classifier")
    with pytest.raises(NotImplementedError, match="Forgotten must define __call__"):
        Sifter(model, criterion=Forgotten()).score(batch)


# --- planted importance: who must win is known before anything is scored


def spread(*first):
    """Probabilities of 8 classes: the given ones, the rest evenly."""
    rest = (1 - sum(first)) / (8 - len(first))
    return [*first, *[rest] * (8 - len(first))]


class Planted(NamedTuple):
    """(probabilities, label) of winners and losers, their scores, and what would tell otherwise."""

    criterion: Criterion
    winner: tuple[list[float], int]
    loser: tuple[list[float], int]
    gap: float  # score of a winner minus score of a loser, by hand


EIGHT = np.array([999, 99, 9, 9, 9, 9, 9, 9])  # add one: 1000, 100, 10, ...
TOTAL = (EIGHT + 1).sum()
# In each of these other criteria see no difference, or see it the other way round.
PLANTED = {
    "loss": Planted(Loss(), (spread(0.6, 0.3, 0.05), 1), (spread(0.6, 0.3, 0.05), 0), math.log(2)),
    "entropy": Planted(
        Entropy(),
        (spread(0.5), 0),
        (spread(0.5, 0.499), 0),
        entropy(spread(0.5), 0) - entropy(spread(0.5, 0.499), 0),
    ),
    "margin": Planted(Margin(), (spread(0.45, 0.449), 0), (spread(0.45), 0), 0.449 - 0.55 / 7),
    "least confidence": Planted(LeastConfidence(), (spread(0.4), 1), (spread(0.5, 0.49), 1), 0.1),
    "gradient": Planted(
        GradNorm(),
        (spread(0.3, 0.699), 0),
        (spread(0.3), 0),
        math.sqrt(0.49 + 0.699**2 + 6 * (0.001 / 6) ** 2) - math.sqrt(0.49 + 7 * 0.1**2),
    ),
    "rarity": Planted(Rarity(EIGHT), (spread(0.5, 0.4), 1), (spread(0.4, 0.5), 0), math.log(10)),
    "residual": Planted(
        Residual(EIGHT),
        (spread(0.2), 0),  # frequent, and missed
        (spread(0.5, 0.1), 1),  # missed more, and rare
        math.log(0.1 / 0.2) + math.log(1000 / 100),
    ),
    "reducible": Planted(
        Reducible([0, 1], [0.1, 2.5]),  # losers are id 1
        (spread(0.2), 0),
        (spread(0.1), 0),
        math.log(0.1 / 0.2) + 2.4,
    ),
    "sum": Planted(
        Loss() + 2 * Entropy(),
        (spread(0.6), 0),
        (spread(0.5, 0.499), 0),
        math.log(0.5 / 0.6)
        + 2 * (entropy(spread(0.6), 0) - entropy(spread(0.5, 0.499), 0)),
    ),
}  # fmt: skip
POOL, KEEP = 32, 16


def pools(planted, count):
    """Half winners, half losers in random places; a position without label tells the opposite."""
    draw = torch.Generator().manual_seed(5)
    of = [planted.loser, planted.winner]
    for _ in range(count):
        wins = torch.randperm(POOL, generator=draw) < POOL // 2
        rows = [of[int(w)][0] for w in wins], [of[1 - int(w)][0] for w in wins]
        own, opposite = (torch.tensor(p, dtype=torch.float64).log() for p in rows)
        label = torch.tensor([of[int(w)][1] for w in wins])
        other = torch.full_like(label, -100)
        yield {
            "x": torch.stack([opposite, own, own, opposite], 1),
            "labels": torch.stack([other, label, label, other], 1),
            "id": (~wins).long(),
            "wins": wins,
        }


def share_of_winners(criterion, selection, planted, count):
    sifter = Sifter(Given(), exit_layer="full", criterion=criterion, selection=selection)
    return np.array([sifter(batch)["wins"].double().mean() for batch in pools(planted, count)])


def expected_share(odds):
    """Of the kept, when winners weigh ``odds`` and losers 1, drawn one by one: every way, summed."""
    half = POOL // 2
    ways = {0: 1.0}  # winners drawn so far: probability
    for drawn in range(KEEP):
        after: dict[int, float] = {}
        for won, p in ways.items():
            up = odds * (half - won) / (odds * (half - won) + half - (drawn - won))
            after[won + 1] = after.get(won + 1, 0) + p * up
            after[won] = after.get(won, 0) + p * (1 - up)
        ways = after
    return sum(won * p for won, p in ways.items()) / KEEP


def check_draws(criterion, selection, planted, odds):
    found = share_of_winners(criterion, selection, planted, 60)
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert abs(found.mean() - expected_share(odds)) < 4 * error


def check_all(criterion, planted):
    assert (share_of_winners(criterion, TopK(), planted, 5) == 1).all()


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_scores_are_those_worked_out_by_hand(name):
    planted = PLANTED[name]
    batch = next(pools(planted, 1))
    scores = Sifter(Given(), exit_layer="full", criterion=planted.criterion).score(batch)
    won, lost = scores[batch["wins"]], scores[~batch["wins"]]
    assert won.std() < 1e-5 and lost.std() < 1e-5
    assert (won.mean() - lost.mean()).item() == pytest.approx(planted.gap, abs=1e-5)
    assert planted.gap > 0.05


@pytest.mark.parametrize("name", PLANTED)
def test_all_planted_winners_win_and_none_with_the_sign_flipped(name):
    planted = PLANTED[name]
    check_all(planted.criterion, planted)
    with pytest.raises(AssertionError):
        check_all(-planted.criterion, planted)


@pytest.mark.parametrize("name", PLANTED)
def test_a_gumbel_draw_keeps_as_many_planted_winners_as_enumeration_says(name):
    planted = PLANTED[name]
    selection = Gumbel(temperature=planted.gap)  # winners are e times as likely
    check_draws(planted.criterion, selection, planted, math.e)
    with pytest.raises(AssertionError):
        check_draws(-planted.criterion, selection, planted, math.e)


@pytest.mark.parametrize("name", PLANTED)
def test_a_rank_draw_keeps_as_many_planted_winners_as_enumeration_says(name):
    # Equals share their mean rank, up to rounding of the scores: 23.5 and 7.5, plus a half.
    planted = PLANTED[name]
    check_draws(Rounded(planted.criterion), RankSample(), planted, 24 / 8)
    with pytest.raises(AssertionError):
        check_draws(Rounded(-planted.criterion), RankSample(), planted, 24 / 8)


class Rounded(Criterion):
    def __init__(self, criterion):
        self.criterion = criterion

    def __call__(self, early):
        return self.criterion(early).mul(1000).round()


@pytest.mark.parametrize("selection", [TopK(), Gumbel(), RankSample()])
@pytest.mark.parametrize("criterion", [Random(), Random(1), -Random(), Random() + Random(1)])
def test_random_prefers_nobody(criterion, selection):
    sifter = Sifter(Given(), exit_layer="full", criterion=criterion, selection=selection)
    kept = np.zeros(16)
    x = torch.arange(16.0)[:, None].expand(16, 2)
    for _ in range(160):
        kept[sifter({"x": x, "labels": torch.zeros(16, dtype=int)})["x"][:, 0].long()] += 1
    chi_square = ((kept - 80) ** 2 / 80).sum() * 2 * 15 / 16  # half of each pool, no replacement
    assert 2 < chi_square < 45, kept  # 15 degrees of freedom: out of it 1 in 10,000


def test_depths_matter_to_the_criteria():
    # The references above are of layer 1: another layer must not score alike.
    model, batch, samples = subject("bert")
    deep = Sifter(model, exit_layer=LAYERS, criterion=Loss()).score(batch)
    assert (deep[LABELLED] - reference(samples, loss)).abs().max() > 0.1
