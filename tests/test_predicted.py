"""A small model that learns to predict a criterion."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st
from models import candidates, classifier, gpt2, trace
from torch import nn
from torch.nn import functional

from siftloader import EarlyExit, Sifter
from siftloader.errors import ScoringError, StateError
from siftloader.pool import Pool
from siftloader.predicted import Predicted
from siftloader.predictions import Predictions
from siftloader.scores import Entropy, Loss
from siftloader.targets import Targets


def small(width: int = 6) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Dropout(0.5), nn.Linear(24, 1))


def planted(number: int = 0, samples: int = 32, width: int = 6) -> tuple:
    """Features, and a loss of the large model that they tell."""
    draw = torch.Generator().manual_seed(number + 1000)
    x = torch.randn(samples, width, generator=draw)
    return x, 5 + 3 * torch.tanh(x[:, 0] + x[:, 1] * x[:, 2]), number


def early_of(x, losses, number=0, ran=None) -> Predictions:
    """Predictions whose cross-entropy is ``losses``."""
    samples = len(losses)
    targets = Targets.of(torch.zeros(samples, dtype=torch.long), torch.device("cpu"), False)

    def run(batch, targets, first):
        if ran is not None:
            ran.append((first, first + targets.samples))
        wanted = losses[first : first + targets.samples]
        yield torch.stack((torch.zeros_like(wanted), torch.expm1(wanted).log()), 1)

    return Predictions(targets, run, Pool((x, torch.zeros(samples)), number))


def ranks_agree(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's correlation."""
    both = torch.stack([each.argsort().argsort().double() for each in (one, other)])
    return float(torch.corrcoef(both)[0, 1])


def test_it_learns_to_predict_a_planted_loss():
    predicted, rng = Predicted(small(), lr=0.01), torch.get_rng_state()
    agreed, kept, off = [], [], []
    for number in range(250):
        x, losses, _ = planted(number)
        with torch.no_grad():
            scores = predicted(early_of(x, losses, number))
        agreed.append(ranks_agree(scores, losses))
        kept.append(losses[scores.topk(16).indices].mean() - losses.mean())
        off.append((scores - losses).abs().mean())
    assert sum(agreed[:10]) / 10 < 0.5
    assert sum(agreed[-40:]) / 40 > 0.75
    assert torch.stack(kept[-40:]).mean() > 1.2  # nats above a random half
    assert (
        torch.stack(off[-40:]).mean() < 1.2
    )  # and it is in the unit of the loss, not standardised
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_share_of_the_rows_is_scored_by_the_large_model_and_it_rotates():
    ran: list[tuple[int, int]] = []
    predicted = Predicted(small(), teach=0.25)
    for number in range(8):
        predicted(early_of(*planted(number, samples=10), ran))
    assert ran == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (0, 2), (2, 4), (4, 6)]


@given(teach=st.floats(0.01, 1), samples=st.integers(1, 60), start=st.integers(0, 1000))
@examples(60)
def test_every_row_is_taught_once_in_a_turn(teach, samples, start):
    predicted = Predicted(nn.Linear(1, 1), teach=teach)
    size = max(1, round(teach * samples))
    turn = -(-samples // size)
    rows = [r for n in range(start, start + turn) for r in range(*predicted.taught(n, samples))]
    assert sorted(rows) == list(range(samples))
    first, last = predicted.taught(start, samples)
    assert 0 < last - first <= size


def test_a_step_is_one_of_adamw_on_the_standardised_squared_error():
    own = small().eval()
    predicted = Predicted(copy.deepcopy(own), teach=1.0, lr=0.01)
    optimizer = torch.optim.AdamW(own.parameters(), 0.01)
    mean, scale = torch.zeros(()), torch.tensor(1e-6)
    known = weights = torch.zeros(0)
    for number in range(2):
        x, losses, _ = planted(number)
        with torch.no_grad():
            expected = mean + own(x)[:, 0] * scale
        torch.testing.assert_close(predicted(early_of(x, losses, number)), expected)
        # Earlier scores count 0.99 of new ones.
        known, weights = torch.cat((known, losses)), torch.cat((0.99 * weights, torch.ones(32)))
        mean = (known * weights).sum() / weights.sum()
        scale = ((known - mean).square() * weights).sum().div(weights.sum()).sqrt()
        optimizer.zero_grad()
        functional.mse_loss(own(x)[:, 0], (losses - mean) / scale).backward()
        optimizer.step()
    x, losses, _ = planted(2)
    with torch.no_grad():
        expected = mean + own(x)[:, 0] * scale
        torch.testing.assert_close(predicted(early_of(x, losses)), expected, rtol=1e-4, atol=1e-4)


@given(before=st.integers(0, 5), after=st.integers(1, 5))
@examples(10)
def test_a_state_continues_as_if_nothing_had_happened(before, after):
    unbroken = Predicted(small())
    for number in range(before):
        unbroken(early_of(*planted(number)))
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed = Predicted(small().apply(lambda m: [p.data.zero_() for p in m.parameters()]))
    assert resumed.digest() != unbroken.digest()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.digest() == unbroken.digest()
    for number in range(before, before + after):
        one, other = (each(early_of(*planted(number))) for each in (resumed, unbroken))
        assert torch.equal(one, other)
    assert resumed.digest() == unbroken.digest()


def test_states_of_something_else_are_refused():
    with pytest.raises(StateError, match="same module"):
        Predicted(small()).load_state_dict(Predicted(nn.Linear(6, 1)).state_dict())
    with pytest.raises(StateError, match="state_dict"):
        Predicted(small()).load_state_dict({})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("share", ["one", "all"])
def test_scores_that_are_not_finite_do_it_no_harm(bad, share):
    taught, clean = Predicted(small(), teach=1.0, lr=0.01), Predicted(small(), teach=1.0, lr=0.01)
    x, losses, _ = planted()

    class Of:
        values = None

        def __call__(self, early):
            return self.values

    taught.of, clean.of = Of(), Of()
    rest = torch.arange(32) != 7
    for _ in range(3):
        taught.of.values = losses.clone()
        taught.of.values[7 if share == "one" else slice(None)] = bad
        clean.of.values = losses[rest]
        found = taught(early_of(x, losses))
        assert found.isfinite().all()
        if share == "one":
            expected = clean(early_of(x[rest], losses[rest]))
            torch.testing.assert_close(found[rest], expected, rtol=1e-4, atol=1e-4)
    if share == "all":
        assert found.unique().abs().max() < 1e-4  # it learned nothing
    taught.of.values = losses
    taught(early_of(x, losses))
    assert all(each.isfinite().all() for each in taught.state_dict()["module"].values())


def test_rows_without_labels_are_left_out_and_the_model_is_not_touched():
    model, batch = classifier(), candidates("classifier")

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 8), nn.Linear(16, 1)

        def forward(self, x, labels):
            return self.out(torch.cat((x, self.embed(labels.clamp_min(-1) + 1)), 1))

    predicted = Predicted(Small(), teach=0.5, lr=0.02)
    sift = Sifter(model, criterion=predicted)
    before, true = trace(model), Sifter(model, criterion="loss").score(batch)
    for number in range(200):
        sift.pools = number
        scores = sift.winners(batch, batch["labels"], 4).scores
    assert scores[3] == -torch.inf and scores.isfinite().sum() == 7
    assert ranks_agree(scores, true) > 0.9
    assert trace(model) == before


def test_the_inputs_are_those_that_its_forward_names():
    model, batch = gpt2(), candidates("gpt2")
    seen = []

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 1)

        def forward(self, input_ids):
            seen.append(input_ids.shape)
            return self.embed(input_ids).mean((1, 2))

    sift = Sifter(model, criterion=Predicted(Small(), Entropy()), shift_labels=True)
    scores = sift.winners(batch, batch["labels"], 4).scores
    assert scores.shape == (8,) and seen == [(8, 24), (2, 24)]


class Takes(nn.Module):
    def __init__(self, shape) -> None:
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.ones(())), shape

    def forward(self, x):
        return self.weight * torch.zeros(self.shape(len(x)))


def test_one_number_per_sample_is_needed():
    for fits in (lambda p: (p,), lambda p: (p, 1)):
        assert Predicted(Takes(fits))(early_of(*planted())).shape == (32,)
    for wrong in (lambda p: (), lambda p: (p, 2), lambda p: (1, p)):
        with pytest.raises(ScoringError, match="one number per sample"):
            Predicted(Takes(wrong))(early_of(*planted()))


def test_it_adds_up_with_other_criteria_and_asks_no_more_of_the_model():
    x, losses, _ = planted()
    ran: list[tuple[int, int]] = []
    predicted, alone = Predicted(small()), Predicted(small())
    both = (2.0 * predicted)(early_of(x, losses, 0, ran))
    torch.testing.assert_close(both, 2 * alone(early_of(x, losses)))
    assert ran == [(0, 8)]


def test_dropout_stays_off():
    model = small().train()
    predicted = Predicted(model)
    x, losses, _ = planted()
    first, second = (copy.deepcopy(predicted)(early_of(x, losses)) for _ in range(2))
    assert torch.equal(first, second) and not model.training


BAD = [
    ({"model": small}, TypeError, "torch.nn.Module"),
    ({"of": Loss}, TypeError, r"as Loss\(\)"),
    ({"of": 3}, TypeError, r"as Loss\(\)"),
    ({"teach": 0}, ValueError, "above 0"),
    ({"teach": 1.1}, ValueError, "at most 1"),
    ({"teach": True}, ValueError, "above 0"),
    ({"lr": 0}, ValueError, "positive"),
    ({"model": nn.Tanh()}, ValueError, "no parameter"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Predicted(**{"model": nn.Linear(2, 1), **options})


def test_it_follows_what_the_early_exit_says_of_a_real_model():
    """Rows whose label contradicts their features: the small model sees both, as the large one does."""
    model = classifier()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        easy = torch.randn(4000, 8, generator=draw)
        said = EarlyExit(model, 1)(easy).argmax(1)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(2)
                self.hidden, self.out = nn.Linear(18, 64), nn.Linear(64, 1)

        def forward(self, x, labels):
            labels = functional.one_hot(labels, 10).float()
            return self.out(torch.relu(self.hidden(torch.cat((x, labels), 1))))

    sift = Sifter(model, criterion=Predicted(Small(), teach=0.5, lr=0.01))
    kept = []
    for number in range(250):
        at = torch.randint(0, 4000, (32,), generator=draw)
        labels = said[at].clone()
        hard = torch.rand(32, generator=draw) < 0.5
        labels[hard] = torch.randint(0, 10, (int(hard.sum()),), generator=draw)
        sift.pools = number
        scores = sift.winners({"x": easy[at], "labels": labels}, labels, 16).scores
        kept.append(hard[scores.topk(16).indices].float().mean())
    assert torch.stack(kept[:20]).mean() < 0.75
    assert torch.stack(kept[-80:]).mean() > 0.75  # a random half keeps 0.5
