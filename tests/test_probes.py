"""A probe finds the layer that was planted, touches nothing, and says no more than it knows."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from models import LAYERS, candidates, classifier, reference_scores, trace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from siftloader import Margin, Random, Sifter, SiftingDataLoader, Stride, TokenShards, theory
from siftloader.errors import ScoringError
from siftloader.forks import Trial
from siftloader.probe_figure import draw
from siftloader.probes import Choice, Probe, probe


DEPTH, WIDTH, CLASSES = 5, 16, 10


class Rewrite(nn.Module):
    """Writes into the view what its matrix makes of the memory, [P, 2d] to [P, 2d]."""

    calls = 0

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        memory = x[:, WIDTH:]
        return torch.cat((memory @ self.matrix, memory), 1)


class Planted(nn.Module):
    """Logits [P, 10] of x [P, 16]; after a good layer the head sees what it sees at the end, else garbage.

    ``quality`` of each layer: 1 is the final representation, 0 has nothing to do with it.
    """

    def __init__(self, quality: list[float]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        eye = torch.eye(WIDTH)
        garbage = [torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5 for _ in quality]
        self.layers = nn.ModuleList(
            Rewrite(good * eye + (1 - good) * bad)
            for good, bad in zip(quality, garbage, strict=True)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(1.5 * torch.randn(CLASSES, WIDTH, generator=draw) / WIDTH**0.5)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x, x), 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, :WIDTH])


def samples(count: int = 256, seed: int = 1) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=draw)
    return TensorDataset(x, torch.randint(0, CLASSES, (count,), generator=draw))


def planted(*good: int) -> nn.Module:
    """The last layer is good in any case."""
    return Planted([1.0 if number in (*good, DEPTH) else 0.0 for number in range(1, DEPTH + 1)])


def costs(first: float, last: float) -> dict[int, float]:
    return dict(enumerate(np.linspace(first, last, DEPTH).tolist(), 1))


def look(model: nn.Module, cost: dict[int, float], **options: object) -> Probe:
    return probe(model, DataLoader(samples(), 32), batch_size=16, cost=cost, **options)


# ---- what it recommends


@pytest.mark.parametrize("good", [1, 2, 3, 4])
def test_it_recommends_the_one_layer_that_was_planted(good):
    found = look(planted(good), costs(0.05, 0.3))
    assert found.best.layer == good and found.best.criterion == "loss" and found.pays
    assert found.verdict == "worth a trial" and f"exit layer {good} by loss" in found.advice()
    by_layer = {each.layer: each for each in found.choices if each.criterion == "loss"}
    assert by_layer[good].overlap == 1 and by_layer[good].sigma < 1e-5
    for layer in set(by_layer) - {good, DEPTH}:
        assert not by_layer[layer].follows and by_layer[layer].rho < 1.1


def test_of_two_good_layers_the_cheaper_one_is_recommended():
    assert look(planted(2, 3), costs(0.05, 0.3)).best.layer == 2


def test_whether_cheap_or_exact_wins_is_a_matter_of_cost():
    model = Planted([0.8, 0, 1, 0, 1])
    level = look(model, {1: 0.05, 2: 0.1, 3: 0.06, 4: 0.2, 5: 0.3})
    by_layer = {each.layer: each for each in level.choices if each.criterion == "loss"}
    assert by_layer[1].follows and by_layer[1].rho < by_layer[3].rho
    assert level.best.layer == 3
    assert look(model, {1: 0.05, 2: 0.1, 3: 0.5, 4: 0.2, 5: 0.6}).best.layer == 1


def test_where_only_the_whole_model_ranks_its_cost_decides():
    model = planted()
    cheap = look(model, costs(0.05, 0.1))
    assert cheap.best.layer == DEPTH and cheap.pays
    dear = look(model, costs(0.3, 2.0))
    assert dear.best.layer == DEPTH and not dear.pays and dear.verdict == "do not sift"
    assert dear.advice().startswith("Do not sift, by these figures: even with the best")


def test_exits_that_rank_by_chance_are_not_recommended_whatever_they_cost():
    found = look(planted(), costs(0.0, 0.0), exit_layers=[1, 2, 3])
    assert found.best is None and not found.pays
    assert found.advice().startswith("Do not sift: none of these exits ranks candidates")
    assert found.candidate.overlap == max(each.overlap for each in found.choices)


def test_what_the_interval_does_not_decide_is_not_recommended():
    rho = look(planted(2), costs(0, 0)).best.rho
    for side in (-0.01, 0.01):
        found = look(planted(2), dict.fromkeys(range(1, DEPTH + 1), rho - 1 + side))
        assert 0 < abs(found.best.speed - 1) < found.best.speed_half_width and not found.pays
        assert found.advice().startswith("Do not sift on this evidence")


def test_a_score_that_prefers_what_is_easy_is_not_recommended():
    def easy(early):
        return -early.reduce(
            early.each(lambda logits, labels: logits.logsumexp(-1) * 0)
        ) + early.reduce(
            early.each(
                lambda logits, labels: (
                    logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(-1)
                )
            )
        )

    found = look(planted(2), costs(0, 0), criteria=[easy])
    assert found.choices[1].rho < 0.9 and found.choices[1].follows and not found.pays


# ---- what it measures


def test_figures_are_those_of_models_that_never_had_more_layers():
    model, batch = classifier(), candidates("classifier", 16)
    batches = [{name: field[half:][:8] for name, field in batch.items()} for half in (0, 8)]
    cost = dict.fromkeys(range(1, LAYERS + 1), 0.25)
    found = probe(model, batches, batch_size=4, pools=2, cost=cost)
    for choice in found.choices:
        kept_losses, losses, hits = [], [], 0
        for each in batches:
            true, score, full = (
                reference_scores("classifier", model, depth, each, criterion).nan_to_num(-math.inf)
                for depth, criterion in (
                    (LAYERS, "loss"),
                    (choice.layer, choice.criterion),
                    (LAYERS, choice.criterion),
                )
            )
            kept = score.topk(4).indices
            kept_losses.append(true[kept])
            losses.append(true[true.isfinite()])
            hits += len({*kept.tolist()} & {*full.topk(4).indices.tolist()})
        rho = torch.cat(kept_losses).mean() / torch.cat(losses).mean()
        assert choice.rho == pytest.approx(rho.item(), rel=1e-5)
        assert choice.overlap == hits / 8
        assert choice.speed == choice.rho / 1.25
    assert found.population_loss == pytest.approx(torch.cat(losses).mean().item(), rel=0.05)
    assert (found.layers, found.candidates, found.keep) == (LAYERS, 8, 0.5)


def test_rho_reaches_the_most_there_is_where_the_highest_losses_are_kept():
    found = look(planted(2), costs(0, 0), criteria=["loss"])
    assert found.choices[1].rho == pytest.approx(found.rho_full)
    assert all(each.rho <= found.rho_full + 1e-9 for each in found.choices)


def test_intervals_are_those_of_student_over_pools():
    found = look(planted(2), costs(0, 0.5), criteria=["loss"], pools=4)
    by_pool = []
    for first in range(0, 128, 32):
        part = TensorDataset(*samples()[first : first + 32])
        twice = [*DataLoader(part, 32)] * 2
        by_pool.append(
            probe(planted(2), twice, batch_size=16, pools=2, cost=costs(0, 0)).choices[2].rho
        )
    error = np.std(by_pool, ddof=1) / 2
    assert found.choices[1].rho_half_width == pytest.approx(3.18245 * error, rel=1e-4)
    assert found.choices[1].speed_half_width == pytest.approx(3.18245 * error / 1.125, rel=1e-4)


def test_a_pool_goes_once_through_the_whole_model_and_once_to_every_exit():
    model = planted(2)
    look(model, costs(0, 1), pools=2)  # looks at the first pool a few times more
    Rewrite.calls = 0
    look(model, costs(0, 1), pools=2)
    two = Rewrite.calls
    Rewrite.calls = 0
    look(model, costs(0, 1), pools=6)
    assert Rewrite.calls - two == 4 * sum(range(1, DEPTH + 1))


def test_other_criteria_score_as_a_sifter_would():
    model, batches = planted(2), [*DataLoader(samples(), 32)]
    found = look(model, costs(0, 1), criteria=["loss", Margin(), "least-confidence"], pools=2)
    assert [each.criterion for each in found.choices[:3]] == ["loss", "Margin", "least-confidence"]
    sifter, exact = (
        Sifter(model, exit_layer=1, criterion=Margin()),
        Sifter(model, exit_layer="full"),
    )
    kept, losses = [], []
    for batch in batches[:2]:
        index = sifter.score(batch).topk(16).indices
        losses.append(exact.score(batch))
        kept.append(losses[-1][index])
    rho = torch.cat(kept).mean() / torch.cat(losses).mean()
    assert found.choices[1].rho == pytest.approx(rho.item(), rel=1e-5)


def test_sigma_is_held_against_corollary_2_where_two_are_drawn_for_one():
    found = look(planted(2), costs(0, 0))
    losses = Sifter(planted(2), exit_layer="full").score(next(iter(DataLoader(samples(), 256))))
    expected = theory.corollary_2(float(theory.rho(losses.numpy(), 2)))
    assert found.sigma_max == pytest.approx(expected, rel=1e-5)
    assert math.isnan(look(planted(2), costs(0, 0), keep=0.25, pools=4).sigma_max)


def test_rows_without_labels_do_not_count():
    x, y = samples().tensors
    y = y.clone()
    y[::4] = -100
    with_gaps = probe(
        planted(2), DataLoader(TensorDataset(x, y), 32), batch_size=8, pools=2, cost=costs(0, 0)
    )
    assert math.isfinite(with_gaps.choices[0].rho) and math.isfinite(with_gaps.population_loss)
    whole = Sifter(planted(2), exit_layer="full").score((x[:64], y[:64]))
    assert with_gaps.candidates == 16
    first_two = whole[:32]
    assert with_gaps.population_loss == pytest.approx(
        first_two[first_two.isfinite()].mean().item()
    )


def test_candidates_without_any_label_are_refused():
    x, y = samples().tensors
    bare = DataLoader(TensorDataset(x, torch.full_like(y, -100)), 32)
    with pytest.raises(ScoringError, match="none of the candidates has a label and a finite loss"):
        probe(planted(2), bare, batch_size=8, pools=2, cost=costs(0, 0))


def test_costs_are_measured_against_a_step_where_none_are_given():
    found = probe(planted(2), DataLoader(samples(), 32), batch_size=16, pools=2)
    assert found.step_seconds > 0
    for each in found.choices:
        assert each.cost == pytest.approx(each.seconds / found.step_seconds)
    assert math.isnan(look(planted(2), costs(0, 1)).step_seconds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_finds_the_same():
    here = probe(planted(2), DataLoader(samples(), 32), batch_size=16)
    there = probe(planted(2).cuda(), DataLoader(samples(), 32), batch_size=16)
    assert there.step_seconds > 0
    for ours, theirs in zip(here.choices, there.choices, strict=True):
        assert theirs.rho == pytest.approx(ours.rho, rel=1e-3) and theirs.seconds > 0


def test_the_loss_of_a_loop_is_what_a_step_is_timed_with():
    heard = []

    def loss(model, batch):
        heard.append((model.training, torch.is_grad_enabled(), len(batch[0])))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with torch.no_grad():
        probe(planted(2).eval(), DataLoader(samples(), 32), batch_size=16, pools=2, loss=loss)
    assert heard == [(True, True, 16)] * 3  # once before the clock runs


class Answers(Planted):
    """Computes its loss where it is given labels, and hands it out in the way of ``shape``."""

    shape = "dict"

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        logits = super().forward(x)
        if labels is None:
            return logits
        loss = nn.functional.cross_entropy(logits, labels)
        self.heard = loss
        shapes = {
            "dict": {"loss": loss},
            "tuple": (logits, loss),
            "alone": loss,
            "none": {"p": logits},
        }
        return shapes[self.shape]


@pytest.mark.parametrize("shape", ["dict", "tuple", "alone"])
def test_a_loss_is_found_in_whatever_a_model_returns(shape, monkeypatch):
    model, stepped = Answers([0.0, 1.0]), []
    model.shape = shape
    monkeypatch.setattr(Tensor, "backward", lambda loss: stepped.append(loss.shape))
    probe(model, DataLoader(samples(), 32), batch_size=16, pools=2)
    assert stepped == [torch.Size([])] * 3


def test_a_step_that_cannot_be_timed_says_what_to_give():
    model = Answers([0.0, 1.0])
    model.shape = "none"
    with pytest.raises(
        ScoringError, match=r"neither a loss nor logits .* pass loss=, .* or cost="
    ):
        probe(model, DataLoader(samples(), 32), batch_size=16, pools=2)


# ---- a linear network


class Linear(nn.Module):
    def __init__(self, bend: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 2, bias=False)
        self.bend = bend
        with torch.no_grad():
            for each in self.layers:
                each.weight.copy_(torch.eye(8) + 0.3 * torch.randn(8, 8, generator=draw))
            self.head.weight.copy_(torch.randn(2, 8, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh() if self.bend else layer(x)
        return self.head(x)


def normal(count: int = 2048) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(256, 8, generator=draw), torch.randint(0, 2, (256,), generator=draw))
        for _ in range(count // 256)
    ]


def test_a_linear_network_has_theorem_6_from_its_weights_and_it_counts_alike():
    found = probe(Linear(), normal(), batch_size=128, cost={1: 0, 2: 0, 3: 0}, criteria=["loss"])
    for each in found.choices:
        assert 0.6 < each.closed_form <= 1
        assert each.agreement == pytest.approx(each.closed_form, abs=0.03)
    assert found.choices[0].closed_form < 0.95 and found.choices[2].closed_form == 1
    assert "closed" in str(found)


def test_other_networks_of_the_same_parts_have_only_the_count():
    found = probe(Linear(bend=True), normal(), batch_size=128, cost={1: 0, 2: 0, 3: 0})
    assert all(math.isnan(each.closed_form) for each in found.choices)
    assert "closed" not in str(found)


# ---- what it leaves alone


def test_nothing_of_the_model_and_no_random_stream_changes():
    model, batch = classifier(), candidates("classifier", 16)  # it drops out
    nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    before = trace(model)
    probe(model, [batch, batch], batch_size=8, pools=2)
    assert trace(model) == before
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()  # noqa: NPY002
    assert random.getstate() == streams[2]


def test_a_loader_shuffles_afterwards_as_it_would_have():
    def shuffled():
        return DataLoader(samples(), 32, shuffle=True, generator=torch.Generator().manual_seed(5))

    expected, probed = shuffled(), shuffled()
    look(planted(2), costs(0, 0))
    probe(planted(2), probed, batch_size=16, pools=2, cost=costs(0, 0))
    for a, b in zip(expected, probed, strict=True):
        assert torch.equal(a[0], b[0])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 8192)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def test_shards_and_sifting_loaders_begin_where_they_would_have():
    model = Words()
    shards = TokenShards("shards/demo")
    loader = SiftingDataLoader(shards, 8, model=model, warmup_steps=0)
    state, shown = loader.state_dict(), shards.state_dict()
    found = probe(model, loader, pools=2, cost={1: 0.1, 2: 0.2})
    assert (found.batch_size, found.candidates) == (8, 16)
    assert loader.state_dict() == state and shards.state_dict() == shown
    alone = probe(model, shards, batch_size=8, pools=2, cost={1: 0.1, 2: 0.2})
    assert [each.rho for each in alone.choices] == [each.rho for each in found.choices]
    plain = probe(model, DataLoader(shards, 8), pools=2, cost={1: 0.1, 2: 0.2})
    assert plain.choices[0].rho == found.choices[0].rho and shards.state_dict() == shown


def test_a_loader_under_way_is_probed_with_what_it_has_not_handed_out():
    model, shards = Words(), TokenShards("shards/demo", with_ids=True)
    loader = SiftingDataLoader(shards, 8, model=model, warmup_steps=0)
    drawn = iter(loader)
    next(drawn)  # of 16 candidates
    heard = []

    def ids(early):
        heard.append(early.pool.batch["id"])
        return early.reduce(early.each(lambda logits, labels: logits[:, 0]))

    probe(model, loader, pools=2, criteria=[ids], exit_layers=["full"], cost={2: 0.0})
    order = [batch["id"] for batch in shards.read_batches(16, 0)]
    assert torch.equal(heard[0], order[1]) and torch.equal(heard[1], order[2])
    heard.clear()
    ending = SiftingDataLoader(shards, 616, model=model, criterion=Random(), warmup_steps=0)
    drawn = iter(ending)
    (
        next(drawn),
        next(drawn),
    )  # of 1,232 candidates each: 24 are left, and 32 are wanted of the next epoch
    probe(
        model, ending, batch_size=8, pools=2, criteria=[ids], exit_layers=["full"], cost={2: 0.0}
    )
    anew = [batch["id"] for batch in shards.read_batches(16, 1)]
    assert torch.equal(heard[0], anew[0]) and torch.equal(heard[1], anew[1])


# ---- what it is given


def test_the_options_of_a_sifting_loader_are_the_defaults():
    model, data = planted(2), samples()
    loader = SiftingDataLoader(
        data, 8, model=model, keep={0: 1.0, 5: 0.25}, criterion=Margin(), warmup_steps=0
    )
    found = probe(model, loader, pools=2, cost=costs(0, 0))
    assert (found.batch_size, found.candidates) == (8, 32)
    assert [each.criterion for each in found.choices[:3]] == ["loss", "entropy", "Margin"]
    with pytest.raises(ValueError, match="not the one that the loader"):
        probe(planted(3), loader)


def test_positions_count_at_the_exits_and_never_for_the_whole_model():
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    ids = torch.randint(0, 50, (32, 24))
    batches = [{"input_ids": ids, "labels": ids}]
    few = Sifter(model, positions=Stride(8))
    options = {"batch_size": 8, "pools": 2, "cost": {1: 0.1, 2: 0.2}, "criteria": ["loss"]}
    sparse, whole = probe(model, batches, like=few, **options), probe(model, batches, **options)
    assert sparse.population_loss == whole.population_loss
    assert sparse.choices[0].sigma != whole.choices[0].sigma
    assert sparse.choices[1].rho == whole.choices[1].rho, "the last layer is the whole model"
    assert sparse.choices[1].overlap == 1


def test_pools_are_made_of_batches_of_any_size_and_of_buffers_that_are_used_again():
    data = samples()
    expected = probe(planted(2), DataLoader(data, 32), batch_size=16, pools=4, cost=costs(0, 0))

    def buffers():
        x, y = torch.empty(24, WIDTH), torch.empty(24, dtype=torch.long)
        for first in range(0, 240, 24):
            x.copy_(data.tensors[0][first : first + 24])
            y.copy_(data.tensors[1][first : first + 24])
            yield x, y

    for batches in (DataLoader(data, 7), buffers()):
        found = probe(planted(2), batches, batch_size=16, pools=4, cost=costs(0, 0))
        assert [each.rho for each in found.choices] == [each.rho for each in expected.choices]


def test_without_a_batch_size_the_first_batch_tells():
    found = probe(planted(2), [*DataLoader(samples(), 16)], pools=2, cost=costs(0, 0))
    assert (found.batch_size, found.candidates) == (16, 32)


def test_a_deep_model_is_probed_at_a_dozen_layers_first_and_last_among_them():
    deep = Planted([1.0] * 30)
    found = probe(deep, DataLoader(samples(), 32), pools=2, cost=dict.fromkeys(range(1, 31), 0.1))
    layers = list(dict.fromkeys(each.layer for each in found.choices))
    assert len(layers) == 12 and layers[0] == 1 and layers[-1] == 30 and found.layers == 30


def test_layers_may_be_named_by_path_and_the_last_as_full():
    given = {"layers:2": 0.1, "full": 0.2, 1: 0.1, DEPTH: 0.2}
    found = look(planted(2), given, exit_layers=["layers:2", "full"])
    assert [each.layer for each in found.choices[::2]] == ["layers:2", DEPTH]
    assert found.best.layer == "layers:2" and 'exit layer "layers:2" by loss' in found.advice()
    loader = SiftingDataLoader(samples(), 16, model=planted(2), exit_layer="layers:1")
    names = [f"layers:{number}" for number in range(1, DEPTH + 1)]
    found = probe(loader._sifter.scorer.model, loader, pools=2, cost=dict.fromkeys(names, 0.1))
    assert [each.layer for each in found.choices[::2]] == names
    assert found.choices[-2].overlap == 1


def test_a_model_without_a_stack_says_what_to_do_and_goes_whole():
    model = nn.Sequential(nn.Linear(WIDTH, CLASSES))
    with pytest.raises(
        ScoringError, match=r"no stack of equal layers .* exit_layers=\[\"full\"\]"
    ):
        probe(model, DataLoader(samples(), 32))
    found = probe(
        model, DataLoader(samples(), 32), exit_layers=["full"], pools=2, cost={"full": 0.1}
    )
    assert [each.layer for each in found.choices] == ["full", "full"] and found.layers is None
    assert str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pools": 1}, "pools must be an int of at least 2"),
        ({"pools": 9}, "too few samples: they fill 8 pools of 32 rows, 9 are wanted"),
        ({"batch_size": 15, "keep": 0.4}, "batch_size / keep must be whole, got 15 / 0.4"),
        ({"keep": 1.0}, "keep must lie between 0 and 1"),
        ({"keep": 0}, "keep must lie between 0 and 1"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1"),
        ({"exit_layers": []}, "exit_layers must be a list of at least one layer"),
        ({"exit_layers": [9]}, "exit_layer must be in 1..5"),
        ({"criteria": []}, "criteria must be a list of at least one criterion"),
        ({"criteria": "loss"}, "criteria must be a list"),
        ({"criteria": ["lost"]}, "criterion must be one of"),
        ({"cost": {**costs(0, 0), 2: -0.1}}, "a cost is a share of a plain step, 0 or more"),
        (
            {"cost": {1: 0.1}},
            r"cost must tell of every exit layer; there is nothing about \[2, 3, 4, 5\]",
        ),
    ],
)
def test_wrong_arguments_say_what_is_needed(options, message):
    given = {"batch_size": 16, "cost": {**costs(0, 0), 9: 0.0}, **options}
    with pytest.raises((ValueError, ScoringError), match=message):
        probe(planted(2), DataLoader(samples(), 32), **given)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        probe([], [])
    model = classifier()
    loader = SiftingDataLoader(samples(), 16, model=model, exit_head="probe")
    with pytest.raises(ValueError, match="an exit head is trained for one exit layer"):
        probe(model, loader)
    scores = Sifter(planted(2), score_fn=lambda early, batch: early(batch[0])[:, 0])
    with pytest.raises(ScoringError, match="score_fn returns scores, and a probe compares losses"):
        probe(
            scores.scorer.model, DataLoader(samples(), 32), like=scores, pools=2, cost=costs(0, 0)
        )


def test_a_model_that_cannot_be_copied_may_have_its_cost_given():
    class Lone(Planted):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one of it")

    model = Lone([1.0, 1.0])
    with pytest.raises(
        ScoringError, match=r"cannot be copied to time a training step .* give cost="
    ):
        probe(model, DataLoader(samples(), 32), batch_size=16)
    probe(model, DataLoader(samples(), 32), batch_size=16, pools=2, cost={1: 0, 2: 0})


# ---- what it says


def choice(**changed: object) -> Choice:
    known = {
        "layer": 1,
        "criterion": "loss",
        "rho": 1.2,
        "rho_half_width": 0.02,
        "overlap": 0.9,
        "overlap_half_width": 0.02,
        "spearman": 0.9,
        "agreement": 0.9,
        "closed_form": math.nan,
        "sigma": 0.1,
        "seconds": 0.01,
        "cost": 0.1,
        "follows": True,
    }
    return Choice(**{**known, **changed})


def finding(*choices: Choice) -> Probe:
    return Probe("Net", 2, 16, 32, 8, 3.0, 1.3, 0.1, 0.05, choices)


def trial(gain: float) -> Trial:
    plain = (3.0, 3.01, 2.99)
    ours = tuple(each - gain for each in (3.001, 3.009, 2.99))
    return Trial(200, 180, 1.1, 0.1, 3.5, plain, ours)


def test_it_never_calls_a_figure_a_gain():
    said = finding(choice()).advice()
    assert "no proof of a gain" in said and "noise" in said and "--trial" in said


def test_what_a_trial_found_is_what_counts():
    good, bad = finding(choice()), finding(choice(rho=1.0))
    assert good.pays and not bad.pays
    assert good.advice(trial(0.1)).startswith("Sift, from here, with exit layer 1 by loss.")
    lost = good.advice(trial(-0.1))
    assert lost.startswith(
        "Do not sift: exit layer 1 by loss was tried, and lost. In equal time held-out"
    )
    assert "a trial weighs more" in lost and "a trial weighs more" in bad.advice(trial(0.1))
    assert "a trial weighs more" not in good.advice(trial(0.1))
    assert good.advice(trial(0.0)).startswith("Do not sift on this evidence")
    diverged = Trial(9, 8, 1.1, None, 3.5, (3.0, math.nan), (3.0, 3.0))
    assert good.advice(diverged).startswith("Nothing can be said")


@pytest.mark.parametrize(
    ("tried", "said"),
    [
        (None, "Net: worth a trial, exit layer 1 by loss, at a speed of 1.09 ± 0.02"),
        (
            trial(0.1),
            "Net: sift; exit layer 1 by loss was tried, +0.100 ± 0.002 nats in equal time",
        ),
        (trial(-0.1), "Net: do not sift; exit layer 1 by loss was tried, -0.100"),
        (Trial(9, 8, 1.1, None, 3.5, (math.nan,), (3.0,)), "loss was tried, and diverged"),
    ],
)
def test_the_title_of_the_picture_is_the_verdict(tried, said, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    draw(finding(choice(), choice(layer=2, follows=False)), tmp_path / "probe.png", tried)
    assert said in titles[0] and (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_marks_the_best_and_json_has_no_nan():
    found = finding(choice(), choice(layer=2, rho=1.3, cost=0.5, sigma=math.nan))
    marked = [line for line in str(found).splitlines() if line.endswith("<- best")]
    assert len(marked) == 1 and marked[0].split()[:2] == ["1", "loss"]
    told = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(told)["best"]["layer"] == 1 and json.loads(told)["advice"] == found.advice()
    assert found.asked == 0.75 and "50% by chance, 75% is asked for" in found.table()
    assert json.loads(told)["choices"][1]["sigma"] is None
    assert max(map(len, str(found).splitlines())) <= 120


def test_the_best_is_the_fastest_at_the_low_end_of_its_interval():
    sure, unsure = choice(), choice(layer=2, rho=1.25, rho_half_width=0.2)
    assert unsure.speed > sure.speed and finding(sure, unsure).best == sure


def test_a_random_choice_is_no_choice():
    found = look(planted(2), costs(0.05, 0.3), criteria=["loss", Random()])
    drawn = [each for each in found.choices if each.criterion == "Random"]
    assert all(abs(each.rho - 1) < 0.1 for each in drawn) and found.best.criterion == "loss"
    alone = look(planted(), costs(0, 0), exit_layers=[1], criteria=["loss", Random()])
    assert alone.best is None and alone.candidate.criterion == "loss"
    nothing = look(planted(2), costs(0, 0), criteria=[Random()])
    assert nothing.best is None and "nothing here ranks candidates" in nothing.advice()
    assert "nan" not in nothing.table()


EVERY = ("loss", "entropy", "margin", "least-confidence", "grad-norm", "residual", "rarity")


def test_a_picture_of_every_criterion_can_be_read(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), figures.append(self))
    )
    rows = [
        choice(criterion=each, layer=n, overlap_half_width=3.0) for each in EVERY for n in (1, 2)
    ]
    chance = [
        choice(
            criterion="random",
            layer=n,
            follows=False,
            overlap=math.nan,
            overlap_half_width=math.nan,
        )
        for n in (1, 2)
    ]
    draw(finding(*rows, *chance), tmp_path / "probe.png")
    (figure,) = figures
    (legend,) = figure.legends
    names = [each.get_text() for each in legend.get_texts()]
    colors = [each.get_color() for each in legend.legend_handles]
    assert len({colors[names.index(each)] for each in (*EVERY, "random")}) == 8
    drawn = legend.get_window_extent()
    assert drawn.x0 >= 0 and drawn.x1 <= figure.bbox.width
    overlap = next(
        each for each in figure.axes if each.get_title(loc="left").startswith("How much")
    )
    assert overlap.get_ylim()[0] >= -5
