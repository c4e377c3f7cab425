"""Criteria against an independent float64 reference: pytest tests/test_scores.py"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from models import (
    FAMILIES,
    LAYERS,
    VOCAB,
    Classifier,
    bert,
    candidates,
    classifier,
    gpt2,
    llama,
    reference_scores,
)

from siftloader import (
    EarlyExit,
    Entropy,
    Loss,
    Pool,
    Predictions,
    Random,
    Rarity,
    ScoringError,
    Sifter,
)
from siftloader.scores import token_entropy
from siftloader.targets import Targets


TOLERANCE = 2e-5  # nats; float32 against float64


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
@pytest.mark.parametrize("layer", [1, 2, LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_references_and_no_other_depths(family, layer, criterion):
    model, batch = FAMILIES[family](), candidates(family)
    found = Sifter(model, exit_layer=layer, criterion=criterion).score(batch)
    expected = {
        depth: reference_scores(family, model, depth, batch, criterion)
        for depth in {layer, min(layer + 1, LAYERS), LAYERS}
    }
    rows = torch.arange(8) != 3
    assert found.dtype == torch.float32
    assert (found[rows] - expected[layer][rows]).abs().max() < TOLERANCE
    for depth, scores in expected.items():
        if depth != layer:
            gap = (scores[rows] - expected[layer][rows]).abs().max()
            assert gap > 100 * TOLERANCE, f"depth {depth} scores like {layer}: {gap}"


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_labels_never_wins_and_is_counted(family, criterion):
    model, batch = FAMILIES[family](), candidates(family)
    sifter = Sifter(model, criterion=criterion, keep=7 / 8)
    scores = sifter.score(batch)
    assert scores[3] == -torch.inf
    kept = sifter(batch)
    assert all(torch.equal(kept[k], torch.cat([batch[k][:3], batch[k][4:]])) for k in batch)
    assert sifter.stats["unlabelled"] == 1
    assert sifter.stats["nonfinite"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_rows_score_alike_and_the_first_wins(family):
    model, batch = FAMILIES[family](), candidates(family)
    sifter = Sifter(model, keep=0.5)
    scores = sifter.score(batch)
    assert scores[5] == scores[6]
    pair = {name: value[[6, 5]] for name, value in batch.items()}
    index, *_ = sifter.winners(pair, pair["labels"], 1)
    assert index.tolist() == [0]


def test_padding_does_not_change_a_score():
    model, batch = bert().double(), candidates("bert")
    scores = Sifter(model).score(batch)
    longer = {
        name: torch.nn.functional.pad(value, (0, 5), value=-100 if name == "labels" else 0)
        for name, value in batch.items()
    }
    assert torch.allclose(Sifter(model).score(longer), scores, atol=1e-6)


def test_a_score_that_is_not_finite_ranks_last_and_is_counted():
    model, batch = classifier(), candidates("classifier")
    batch["x"][2] = torch.nan
    sifter = Sifter(model, keep=0.75)
    kept = sifter(batch)
    assert not kept["x"].isnan().any() and len(kept["x"]) == 6
    assert sifter.stats["nonfinite"] == 1


def test_the_label_shift_belongs_to_the_score():
    model, batch = gpt2(), candidates("gpt2")
    shifted = Sifter(model, exit_layer=2).score(batch)
    unshifted = Sifter(model, exit_layer=2, shift_labels=False).score(batch)
    assert (shifted - unshifted).abs()[torch.arange(8) != 3].max() > 0.01

    class Outside(torch.nn.Module):  # a model whose loss lives in the loop
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids):
            return self.inner(input_ids).logits

    x, y = batch["input_ids"][:, :-1], batch["labels"][:, 1:]
    pairs = Sifter(Outside(), exit_layer=2).score((x, y))
    full = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    assert torch.allclose(pairs, Sifter(model, exit_layer=2).score(full), atol=1e-5)
    with pytest.raises(ScoringError, match="shift_labels=True"):
        Sifter(Outside()).score((batch["input_ids"], batch["input_ids"]))


def test_a_subclass_of_a_causal_model_is_causal():
    class Tuned(type(llama())):
        pass

    model, batch = llama(), candidates("llama")
    expected = Sifter(model).score(batch)
    model.__class__ = Tuned
    assert torch.equal(Sifter(model).score(batch), expected)


def test_labels_of_any_integer_type_are_taken_and_negative_ones_refused():
    model, batch = classifier(), candidates("classifier")
    expected = Sifter(model).score(batch)
    assert torch.equal(Sifter(model).score({**batch, "labels": batch["labels"].int()}), expected)
    with pytest.raises(ScoringError, match="found label -1"):
        Sifter(model).score({**batch, "labels": batch["labels"].clamp_min(-1)})


def test_labels_on_the_device_score_like_labels_on_the_host(monkeypatch):
    # What a GPU would see: every position taken along, the unlabelled ones weighted out.
    model, batch = gpt2(), candidates("gpt2")
    expected = {c: Sifter(model, criterion=c).score(batch) for c in ("loss", "entropy")}

    def everywhere(labels, device, shift, positions=None, capacity=None):
        wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        assert shift and positions is None
        return Targets._of_capacity(wanted, None)

    monkeypatch.setattr(Targets, "of", everywhere)
    for criterion, scores in expected.items():
        assert torch.allclose(Sifter(model, criterion=criterion).score(batch), scores, atol=1e-6)


def test_the_sum_is_the_mean_times_the_labels():
    model, batch = bert(), candidates("bert")
    counts = (batch["labels"] != -100).sum(1)
    for kind in (Loss, Entropy):
        mean = Sifter(model, criterion=kind()).score(batch)
        total = Sifter(model, criterion=kind(reduction="sum")).score(batch)
        rows = counts > 0
        assert torch.allclose(total[rows], (mean * counts)[rows], atol=1e-3)
        assert total[3] == -torch.inf


def test_entropy_survives_a_class_that_is_ruled_out():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert math.isclose(token_entropy(logits, torch.tensor([0])).item(), math.log(2), abs_tol=1e-6)


def test_rarity_is_the_mean_surprise_of_the_labels_and_needs_no_model():
    counts = np.arange(VOCAB) ** 2
    batch = candidates("bert")

    def absent():
        raise AssertionError("Rarity asked for the model")

    rarity = Rarity(counts)
    p = (counts + 1) / (counts + 1).sum()
    expected = [
        np.mean([-math.log(p[label]) for label in row if label != -100] or [math.nan])
        for row in batch["labels"].tolist()
    ]
    sifter = Sifter(bert(), criterion=rarity)
    sifter.scorer._exit = absent
    found = sifter.score(batch)
    rows = torch.arange(8) != 3
    assert torch.allclose(found[rows].double(), torch.tensor(expected)[rows], atol=1e-5)
    assert found[3] == -torch.inf


@given(seed=st.integers(0, 2**31), pool=st.integers(0, 2**40))
def test_random_scores_are_a_function_of_seed_and_pool(seed, pool):
    targets = Targets.of(torch.zeros(64, dtype=torch.long), torch.device("cpu"), shift=False)

    def draw(seed, pool, rank=0):
        return Random(seed)(Predictions(targets, None, Pool(None, pool, rank)))

    assert torch.equal(draw(seed, pool), draw(seed, pool))
    assert not torch.equal(draw(seed, pool), draw(seed, pool + 1))
    assert not torch.equal(draw(seed, pool), draw(seed + 1, pool))
    assert not torch.equal(draw(seed, pool), draw(seed, pool, rank=1))


def test_random_has_no_favourites():
    kept = np.zeros(16)
    sifter = Sifter(classifier(), criterion="random")
    batch = {"x": torch.arange(16.0)[:, None].expand(16, 8), "labels": torch.zeros(16, dtype=int)}
    state = torch.get_rng_state()
    for _ in range(800):
        kept[sifter(batch)["x"][:, 0].long().numpy()] += 1
    assert torch.equal(torch.get_rng_state(), state)
    chi_square = ((kept - 400) ** 2 / 400).sum()
    assert chi_square < 45, f"{kept}"  # 16 cells, half kept: above 45 in 1 of 10,000


def test_a_criterion_of_ones_own_takes_five_lines():
    class Confidence:
        def __call__(self, early):
            return early.reduce(early.each(lambda logits, labels: logits.softmax(-1).amax(-1)))

    model, batch = classifier(), candidates("classifier")
    found = Sifter(model, exit_layer=LAYERS, criterion=Confidence()).score(batch)
    model.eval()
    with torch.no_grad():
        expected = model(batch["x"]).softmax(-1).amax(-1)
    rows = torch.arange(8) != 3
    assert torch.allclose(found[rows], expected[rows], atol=1e-6)


def test_a_score_function_gets_the_early_exit():
    model, batch = classifier(), candidates("classifier")

    def score_fn(early, batch):
        logits = early(batch["x"])
        return torch.nn.functional.cross_entropy(
            logits, batch["labels"], reduction="none", ignore_index=-100
        )

    found = Sifter(model, exit_layer=2, score_fn=score_fn).score(batch)
    expected = Sifter(model, exit_layer=2).score(batch)
    rows = torch.arange(8) != 3
    assert torch.allclose(found[rows], expected[rows], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_eager_path(dtype):
    model, batch = bert(), candidates("bert")
    truth = reference_scores("bert", model, 1, batch, "loss")
    low = bert()
    low.load_state_dict(model.state_dict())
    low.to(dtype)
    logits = EarlyExit(low, layer=1).logits(batch).float()
    labels = batch["labels"]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    eager = losses.sum(1) / (labels != -100).sum(1)
    rows = torch.arange(8) != 3
    error = (eager - truth)[rows].abs().max()
    ours = (Sifter(low, exit_layer=1).score(batch) - truth)[rows].abs().max()
    assert ours <= 1.5 * error + 1e-3, f"{ours} against {error}"


def test_the_loops_autocast_is_kept_and_its_cache_is_not_poisoned():
    model, batch = bert(), candidates("bert")
    plain = Sifter(model).score(batch)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Sifter(model).score(batch)
        model(**batch).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)
    given_dtype = Sifter(model, autocast=torch.bfloat16).score(batch)
    assert torch.equal(inside, given_dtype)
    assert not torch.equal(inside, plain)
    assert not torch.is_autocast_enabled("cpu")


BAD = [
    ("keep 0", {"keep": 0.0}, ValueError, "keep must be a number above 0"),
    ("keep 2", {"keep": 2.0}, ValueError, "keep must be a number above 0"),
    ("criterion", {"criterion": "lost"}, ValueError, "must be one of"),
    ("rarity without counts", {"criterion": "rarity"}, ValueError, r"Rarity\(unigrams\)"),
]


@pytest.mark.parametrize(("_name", "options", "error", "text"), BAD)
def test_wrong_options_fail_at_construction(_name, options, error, text):
    with pytest.raises(error, match=text):
        Sifter(classifier(), **options)


def test_wrong_counts_and_reductions_fail_at_construction():
    with pytest.raises(ValueError, match="non-negative counts"):
        Rarity(np.array([3, -1]))
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        Loss(reduction="median")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        Sifter("bert")


def test_batches_that_cannot_be_scored_say_why():
    batch = candidates("classifier")
    model = classifier()
    with pytest.raises(ScoringError, match="no labels"):
        Sifter(model).score({"x": batch["x"]})
    with pytest.raises(ScoringError, match="must be probabilities"):
        Sifter(model).score({"x": batch["x"], "labels": torch.rand(8)})
    with pytest.raises(ScoringError, match="one prediction per label"):
        Sifter(model).score({"x": batch["x"], "labels": torch.zeros(8, 3, dtype=int)})
    with pytest.raises(ScoringError, match="one score per candidate"):
        Sifter(model, score_fn=lambda early, batch: torch.zeros(3)).score(batch)
    with pytest.raises(ValueError, match="not a whole number"):
        Sifter(model, keep=0.3)(batch)

    class One(Classifier):
        def forward(self, x):
            return super().forward(x)[:, :1]

    with pytest.raises(ScoringError, match="single number"):
        Sifter(One()).score({"x": batch["x"], "labels": torch.zeros(8, dtype=int)})
