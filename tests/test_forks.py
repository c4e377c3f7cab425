"""Does sifting pay, from here? pytest tests/test_forks.py"""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Classifier, candidates, gpt2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from siftloader import Criterion, Entropy, Predictions, Random, Sifter
from siftloader.exits import token_loss
from siftloader.forks import (
    ROUNDS,
    WARM_UP,
    Step,
    Trial,
    arm,
    at_random,
    cost_of,
    fork,
    held_out_loss,
    model_loss,
    trial,
)
from siftloader.intervals import interval


RULE = torch.randn(8, 10, generator=torch.Generator().manual_seed(5))


class Hinted(Classifier):
    """A classifier that adds a hint to its logits: what is hinted is known, and cannot be forgotten."""

    def forward(self, x: Tensor, hint: Tensor) -> Tensor:
        return super().forward(x) + hint


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["hint"]), batch["labels"])


def pools(kind: str, count: int, seed: int, size: int = 32) -> list[dict[str, Tensor]]:
    """Half of the rows of every pool are "noise" (random labels), "known" (hinted), or like the others."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        x = torch.randn(size, 8, generator=draw)
        labels = (x @ RULE).argmax(-1)
        half = torch.rand(size, generator=draw) < 0.5
        if kind == "noise":
            labels = torch.where(half, torch.randint(0, 10, (size,), generator=draw), labels)
        told = 10.0 * (half & (kind == "known"))
        hint = told[:, None] * F.one_hot(labels, 10)
        ids = torch.arange(size) + size * number
        made.append({"x": x, "hint": hint, "labels": labels, "id": ids})
    return made


def learner(kind: str = "plain", steps: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Hinted(layers=2, width=16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in pools(kind, steps, seed=1):
        Step(loss_of, clip=None)(model, optimizer, batch)
    return model, optimizer


def run(model: nn.Module, optimizer: Any, **options: Any) -> Trial:
    """A small trial of a ``Hinted``; by default nothing is timed."""
    given = {"steps": 4, "repeats": 2, "cost": 1.0, "loss": loss_of, **options}
    drawn = given.pop("pools", None) or pools("plain", 20, seed=2, size=8)
    return trial(
        model, optimizer, drawn, given.pop("held_out", pools("plain", 1, seed=3)), **given
    )


# ---- what it finds


@pytest.mark.parametrize(("kind", "verdict"), [("noise", "do not sift"), ("known", "sift")])
def test_it_recommends_rightly_in_both_directions(kind, verdict):
    model, optimizer = learner(kind, steps=40)
    found = run(
        model,
        optimizer,
        pools=pools(kind, 160, seed=21),
        held_out=pools(kind, 4, seed=9, size=128),
        steps=40,
        repeats=4,
        cost=1.1,
        clip=None,
    )
    assert found.verdict == verdict, str(found)
    assert found.sifted_steps == 36
    assert all(plain < found.before for plain in found.plain)


def covered(seeds: range) -> int:
    """In how many trials of two plain arms the interval covers zero."""
    model, optimizer = learner(steps=20)
    held = pools("plain", 2, seed=9, size=128)
    count, gains = 0, []
    for seed in seeds:
        drawn = pools("plain", 36, seed=100 + seed)
        options = {"pools": drawn, "held_out": held, "steps": 12, "repeats": 3, "seed": seed}
        found = run(model, optimizer, criterion=Random(), **options)
        count += found.verdict == "no difference seen"
        gains += found.gains
    assert all(gains), "arms that draw alike would differ in nothing"
    return count


def test_of_two_plain_arms_the_interval_covers_zero():
    assert covered(range(10, 20)) >= 8


@pytest.mark.slow
def test_of_two_plain_arms_the_interval_covers_zero_as_often_as_it_should():
    assert covered(range(60)) >= 52  # 57 of 60 are expected; fewer than 52 once in 350 such tests


def test_a_step_that_costs_time_and_gains_nothing_is_a_loss():
    model, optimizer = learner()
    drawn, held = pools("plain", 90, seed=4), pools("plain", 4, seed=9, size=128)
    found = run(
        model,
        optimizer,
        pools=drawn,
        held_out=held,
        criterion="random",
        steps=30,
        repeats=3,
        cost=2.0,
    )
    assert found.verdict == "do not sift" and found.sifted_steps == 15


VERDICTS = [
    # plain, sifted: verdict
    ((3.0, 3.1), (2.9, 3.0), "sift"),
    ((2.9, 3.0), (3.0, 3.1), "do not sift"),
    ((3.0, 3.1), (3.1, 3.0), "no difference seen"),
    ((3.0, 3.0), (3.0, 3.0), "no difference seen"),
    ((3.0, 3.026), (2.9, 2.9), "no difference seen"),  # 0.113 ± 0.165
    ((3.0, 3.013), (2.9, 2.9), "sift"),  # 0.107 ± 0.083
    ((3.0, math.nan), (3.0, 3.0), "diverged"),
    ((3.0, 3.0), (math.inf, 3.0), "diverged"),
]


@pytest.mark.parametrize(("plain", "sifted", "verdict"), VERDICTS)
def test_the_verdict_is_that_of_the_interval(plain, sifted, verdict):
    found = Trial(200, 160, 1.25, 0.01, 3.5, plain, sifted)
    assert found.verdict == verdict and found.sentence.startswith(verdict)
    assert found.sentence in str(found)
    if verdict != "diverged":
        assert (found.gain, found.half_width) == interval(np.subtract(plain, sifted))


def test_what_was_found_is_good_to_read_and_to_keep():
    found = Trial(200, 160, 1.25, 0.01, 3.5, (3.0, 3.1), (2.9, 2.95))
    assert str(found).splitlines() == [
        "trial: 200 plain steps against 160 sifted ones in the same time, 2 times from the same start",
        "a sifted step takes 1.250 x a plain one (measured; a plain one 10 ms)",
        "",
        "held-out loss    before     plain    sifted      gain",
        "repeat 1         3.5000    3.0000    2.9000   +0.1000",
        "repeat 2         3.5000    3.1000    2.9500   +0.1500",
        "mean             3.5000    3.0500    2.9250   +0.1250 ± 0.3177",
        "per second                -0.2250   -0.2875   +0.0625",
        "",
        "no difference seen: +0.1250 ± 0.3177 nats in equal time; more than 0.4427 either way is unlikely, "
        "and less takes more repeats or steps to see",
    ]
    kept = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert kept["plain"] == [3.0, 3.1] and kept["verdict"] == "no difference seen"
    assert kept["gain"] == pytest.approx(0.125) and kept["sifted_per_second"] == pytest.approx(
        0.2875
    )


def test_what_diverged_can_be_kept_and_what_was_given_is_not_called_measured():
    found = Trial(8, 8, 1.0, None, 3.5, (3.0, math.nan), (2.9, 2.9))
    kept = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (
        kept["plain"] == [3.0, None] and kept["gain"] is None and kept["plain_per_second"] is None
    )
    assert "(given)" in str(found) and "per second" not in str(found)


# ---- what it leaves alone


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a trial must leave as it was, by value."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, each.tolist(), each._version, id(each)) for name, each in tensors],
        [
            (name, None if each.grad is None else each.grad.tolist())
            for name, each in model.named_parameters()
        ],
        [(name, each.training, sorted(vars(each))) for name, each in model.named_modules()],
        repr(optimizer.state_dict()),
        [{id(each) for each in group["params"]} for group in optimizer.param_groups],
        sorted(vars(optimizer)),
        torch.get_rng_state().tolist(),
        random.getstate(),
        repr(np.random.get_state()),  # noqa: NPY002
    ]


class Normed(Hinted):
    """With buffers that training writes, and a draw from every global stream."""

    def __init__(self) -> None:
        super().__init__(layers=2, width=16)
        self.batch_norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor, hint: Tensor) -> Tensor:
        if self.training:
            random.random(), np.random.rand()  # noqa: NPY002
        return super().forward(self.batch_norm(x), hint)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True),
    "AdamW, lr a tensor": lambda parameters: torch.optim.AdamW(parameters, torch.tensor(1e-2)),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "two groups": lambda parameters: torch.optim.Adam(
        [{"params": [each], "lr": 1e-3 * (1 + n % 2)} for n, each in enumerate(parameters)]
    ),
}


def trained(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with a state: of two steps."""
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for batch in pools("plain", 2, seed=7, size=8):
        Step(loss_of)(model, optimizer, batch)
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_model_optimizer_and_streams_are_left_as_they_were(name):
    model = Normed()
    optimizer = trained(name, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model.blocks[1].eval()  # flags that differ
    before, scheduled = state(model, optimizer), repr(schedule.state_dict())
    found = run(model, optimizer, repeats=2, cost=None, steps=3)
    assert all(math.isfinite(each) for each in (*found.plain, *found.sifted, found.cost))
    assert len({*found.plain, *found.sifted, found.before}) == 5, "the copies did not learn"
    for was, now in zip(before, state(model, optimizer), strict=True):
        assert was == now
    assert scheduled == repr(schedule.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fork_trains_as_the_original_would(name):
    model = Normed()
    optimizer = trained(name, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    forked, its_optimizer = fork(model, optimizer)
    assert all(each.grad is None for each in forked.parameters())
    assert not {*map(id, model.parameters())} & {*map(id, forked.parameters())}
    for one, its in ((model, optimizer), (forked, its_optimizer)):
        torch.manual_seed(11)
        for batch in pools("plain", 3, seed=8, size=8):
            Step(loss_of)(one, its, batch)
    for ours, theirs in zip(model.state_dict().items(), forked.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert repr(optimizer.state_dict()) == repr(its_optimizer.state_dict())


def test_the_original_goes_on_as_if_there_had_been_no_trial():
    ends = []
    for tries in (False, True):
        torch.manual_seed(3)
        model = Normed()
        optimizer = trained("AdamW", model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if tries:
            run(model, optimizer)
        for batch in pools("plain", 3, seed=8, size=8):
            Step(loss_of)(model, optimizer, batch)
            schedule.step()
        ends.append([each.tolist() for each in model.state_dict().values()])
    assert ends[0] == ends[1]


def test_tied_weights_stay_tied_and_an_optimizers_own_fields_are_kept():
    class Own(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, 0.1)
            self.first = self.param_groups[0]["params"][0]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert self.first.grad is not None
            super().step(closure)

    model = gpt2(layers=2)
    optimizer = Own(model.parameters())
    forked, its_optimizer = fork(model, optimizer)
    assert forked.lm_head.weight is forked.transformer.wte.weight
    assert its_optimizer.first is its_optimizer.param_groups[0]["params"][0]
    assert its_optimizer.first is not optimizer.first
    Step(model_loss)(forked, its_optimizer, candidates("gpt2"))


def test_copies_are_gone_when_their_arm_has_ended():
    model, optimizer = learner()
    alive: list[weakref.ref[nn.Module]] = []
    at_once = []

    def sift(forked: nn.Module) -> Sifter:
        at_once.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(forked))
        return Sifter(forked)

    gc.collect()
    gc.disable()
    try:
        run(model, optimizer, sift=sift, repeats=3)
    finally:
        gc.enable()
    assert len(at_once) == 4 and max(at_once) == 0, at_once


class Counting(Criterion):
    values = (token_loss,)

    def __init__(self) -> None:
        self.pools = 0

    def __call__(self, early: Predictions) -> Tensor:
        self.pools += 1
        return Entropy()(early)


def test_a_criterion_that_remembers_does_so_in_each_arm_by_itself():
    criterion = Counting()
    run(*learner(), criterion=criterion)
    assert criterion.pools == 0


# ---- both arms


class Recording:
    """What a trial trained on: the ids of every step's rows, and of the pools they were kept from."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.pools: list[list[int]] = []

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            self.steps.append(batch["id"].tolist())
        return loss_of(model, batch)

    def sift(self, forked: nn.Module) -> Any:
        sifter = Sifter(forked, keep=0.25)

        def call(pool: dict[str, Tensor]) -> dict[str, Tensor]:
            self.pools.append(pool["id"].tolist())
            return sifter(pool)

        call.keep = sifter.keep  # type: ignore[attr-defined]
        return call


def test_both_arms_of_a_repeat_draw_from_the_same_candidates_and_repeats_from_others():
    seen = Recording()
    model, optimizer = learner()
    drawn = pools("plain", 99, seed=2, size=16)
    found = run(model, optimizer, pools=drawn, steps=5, cost=1.25, loss=seen.loss, sift=seen.sift)
    assert found.sifted_steps == 4
    steps, kept_from = iter(seen.steps), iter(seen.pools)
    places: list[list[list[int]]] = [[], []]
    for repeat in range(2):
        ids = [each["id"].tolist() for each in drawn[5 * repeat : 5 * repeat + 5]]
        for pool in ids:  # plain
            rows = next(steps)
            assert len(rows) == 4 and set(rows) < set(pool) and rows == sorted(rows)
            places[repeat].append([pool.index(row) for row in rows])
        for pool in ids[:4]:  # sifted
            assert next(kept_from) == pool
            rows = next(steps)
            assert len(rows) == 4 and set(rows) < set(pool)
    assert next(steps, None) is None and next(kept_from, None) is None
    assert places[0] != places[1]  # each repeat has a key of its own, also for dropout


def test_the_random_rows_differ_from_pool_to_pool_and_are_drawn_by_key():
    batch = {"x": torch.arange(64)}
    first, second = [
        [choose(batch)["x"].tolist() for _ in range(3)]
        for choose in (at_random(0.5, 1), at_random(0.5, 1))
    ]
    assert first == second and len({*map(tuple, first)}) == 3
    assert at_random(0.5, 2)(batch)["x"].tolist() != first[0]
    drawn = torch.cat([at_random(0.5, seed)(batch)["x"] for seed in range(400)])
    assert torch.bincount(drawn, minlength=64).sub(200).abs().max() < 60  # 6 standard deviations


@pytest.mark.parametrize(
    ("steps", "cost", "sifted"), [(40, 1.0, 40), (40, 1.25, 32), (5, 1.4, 4), (2, 9.0, 1)]
)
def test_equal_time_is_fewer_sifted_steps(steps, cost, sifted):
    seen = Recording()
    model, optimizer = learner()
    drawn = pools("plain", 80, seed=2, size=4)
    found = run(
        model, optimizer, pools=drawn, steps=steps, cost=cost, loss=seen.loss, sift=seen.sift
    )
    assert (found.steps, found.sifted_steps, found.cost) == (steps, sifted, cost)
    assert len(seen.pools) == 2 * sifted and len(seen.steps) == 2 * (steps + sifted)


def test_the_learning_rate_falls_linearly_to_zero():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    arm(
        model,
        optimizer,
        [None] * 4,
        lambda _: None,
        Step(lambda m, _: -m.weight.sum(), None),
        seed=0,
    )
    assert model.weight.item() == pytest.approx(0.5 * (1 + 0.75 + 0.5 + 0.25))


def test_equal_seeds_draw_equal_dropout():
    model, optimizer = learner()
    ends = []
    for seed, moved in ((1, 0), (1, 5), (2, 0)):
        torch.rand(moved)
        forked, its_optimizer = fork(model, optimizer)
        arm(
            forked.eval(),
            its_optimizer,
            pools("plain", 3, seed=2),
            at_random(0.5, 1),
            Step(loss_of),
            seed,
        )
        assert forked.training
        ends.append(forked.head.weight.detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_gradients_are_clipped_as_told():
    moved = []
    for clip in (None, 1e-3):
        model, optimizer = learner()
        torch.nn.init.zeros_(model.head.bias)
        Step(loss_of, clip)(model, optimizer, pools("plain", 1, seed=2)[0])
        moved.append(model.head.bias.detach().norm().item())
    assert moved[0] > 1e-2 > 1e-4 >= moved[1] > 0


# ---- held-out loss


class Says(nn.Module):
    """A model whose loss is the mean of its labelled positions' labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout(0.5)

    def forward(self, labels: Tensor) -> Any:
        assert not self.training
        wanted = labels[labels != -100].float()
        return SimpleNamespace(loss=wanted.mean() + self.drop(self.weight).sum())


class SaysForCausalLM(Says):
    def forward(self, labels: Tensor) -> Any:
        return super().forward(labels[:, 1:])


def test_held_out_loss_is_the_mean_over_labelled_positions():
    model = Says().train()
    model.drop.eval()
    none = -100
    batches = [
        {"labels": torch.tensor([[3, none, 5], [none, none, 1]])},
        {"labels": torch.tensor([[none, 10, none]])},
        {"labels": torch.tensor([[none, none, none]])},
    ]
    before = torch.get_rng_state()
    assert held_out_loss(model, batches, Step(model_loss)) == pytest.approx(19 / 4)
    assert model.training and not model.drop.training
    assert torch.equal(before, torch.get_rng_state())
    # A causal model predicts none of the first labels.
    assert held_out_loss(SaysForCausalLM(), batches, Step(model_loss)) == pytest.approx(16 / 3)


def test_held_out_data_without_labels_are_refused():
    with pytest.raises(ValueError, match="held_out holds no labelled position"):
        held_out_loss(Says(), [{"labels": torch.tensor([[-100]])}], Step(model_loss))
    with pytest.raises(ValueError, match="held_out holds no labelled position"):
        run(*learner(), held_out=[])


# ---- what it costs


def test_costs_are_the_median_of_ratios_after_warming_up(monkeypatch):
    # Seconds of a plain and of a sifted step, round by round: slow while warming up, then a machine that is
    # disturbed for whole rounds; the ratio of medians would be another.
    slow = [(9.0, 99.0)] * WARM_UP
    timed = [(1.0 + number, (1.0 + number) * 1.5) for number in range(ROUNDS - 5)]
    timed += [(1.0, 30.0)] * 3 + [(100.0, 100.0)] * 2
    now, clock = 0.0, []
    for plain, sifted in slow + timed:
        for took in (plain, sifted):
            clock += [now, now + took]
            now += took + 0.25
    monkeypatch.setattr(
        "siftloader.forks.time", SimpleNamespace(perf_counter=iter(clock).__next__)
    )
    seen: list[str] = []

    def way(name: str) -> Any:
        def choose(pool: Any) -> Any:
            seen.append(name)
            return pool

        return choose

    model, optimizer = fork(*learner())
    found = cost_of(
        model, optimizer, pools("plain", 2, seed=2), (way("plain"), way("sifted")), Step(loss_of)
    )
    assert found == (pytest.approx(float(np.median([plain for plain, _ in timed]))), 1.5)
    assert seen == ["plain", "sifted"] * (WARM_UP + ROUNDS)


def test_a_sifted_step_never_costs_less_than_a_plain_one(monkeypatch):
    clock = iter(float(number) ** 0.5 for number in range(1000))  # each step a little quicker
    model, optimizer = learner()
    monkeypatch.setattr("siftloader.forks.time", SimpleNamespace(perf_counter=clock.__next__))
    found = run(model, optimizer, cost=None)
    assert found.cost == 1.0 and found.sifted_steps == found.steps
    assert found.seconds > 0 and found.per_second is not None


# ---- what it is given


def test_a_model_of_hugging_face_in_bf16_says_its_own_loss():
    model = gpt2(layers=2).eval()  # as from_pretrained gives it
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    batch = candidates("gpt2")
    found = trial(
        torch.compile(model, backend="eager"),  # copies are not
        optimizer,
        [batch] * 6,
        [batch],
        steps=3,
        repeats=2,
        autocast=torch.bfloat16,
    )
    assert found.cost >= 1 and found.seconds > 0 and not model.training
    assert len({*found.plain, *found.sifted}) > 1


def test_loaders_begin_anew_with_a_warning_and_iterators_do_not():
    model, optimizer = learner()
    rows = [{name: field[0] for name, field in each.items()} for each in pools("plain", 20, 2, 1)]
    loader = DataLoader(rows, 8, shuffle=True)  # its last batch is smaller
    with pytest.warns(UserWarning, match="the pools ended after 2 of 8 and begin anew"):
        found = run(model, optimizer, pools=loader)
    assert len(found.plain) == 2
    with pytest.raises(
        ValueError, match=r"the pools ended after 2, and steps x repeats = 8 are needed"
    ):
        run(model, optimizer, pools=iter(loader))
    with pytest.raises(ValueError, match="the pools ended after 0"):
        run(model, optimizer, pools=iter([]))


def test_a_buffer_that_is_used_again_and_again_is_copied():
    drawn = pools("plain", 8, seed=2, size=8)

    def reused() -> Iterator[dict[str, Tensor]]:
        buffer = copy.deepcopy(drawn[0])
        for each in drawn:
            for name, field in each.items():
                buffer[name].copy_(field)
            yield buffer

    both = learner()
    assert run(*both, pools=reused()) == run(*both, pools=drawn)


REFUSED = [
    ({"steps": 0}, ValueError, "steps must be an int of at least 1, got 0"),
    ({"steps": True}, ValueError, "steps must be an int"),
    ({"repeats": 1}, ValueError, "repeats must be an int of at least 2, got 1"),
    ({"cost": 0.9}, ValueError, "cost must be a number of at least 1"),
    ({"cost": math.nan}, ValueError, "cost must be a number of at least 1"),
    ({"keep": 0.3}, ValueError, r"8 candidates of a pool \* keep 0.3 is not a whole number"),
    ({"keep": 2.0}, ValueError, "keep must be a number above 0"),
    ({"autocast": torch.float16}, ValueError, "float16 needs scaled gradients"),
    ({"loss": None}, ValueError, r"model\(\*\*batch\).loss is what a trial trains on"),
    ({"exit_layer": 3}, Exception, "exit_layer must be in 1..2"),
]


@pytest.mark.parametrize(
    ("options", "error", "said"), REFUSED, ids=[repr(each[0]) for each in REFUSED]
)
def test_wrong_arguments_are_refused(options, error, said):
    model, optimizer = learner()
    drawn = pools("plain", 20, seed=2, size=8)
    if options == {"loss": None}:
        drawn = [tuple(each.values()) for each in drawn]
        options = {"loss": None, "held_out": drawn}
    with pytest.raises(error, match=said):
        run(model, optimizer, pools=drawn, **options)


def test_optimizers_of_something_else_are_refused():
    model, _ = learner()
    other, its_optimizer = learner()
    with pytest.raises(ValueError, match="trains none of the parameters of Hinted"):
        fork(model, its_optimizer)
    both = torch.optim.SGD([*model.parameters(), *other.head.parameters()], 0.1)
    with pytest.raises(ValueError, match="trains 2 parameters that Hinted does not have"):
        fork(model, both)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer that trains the model, got list"):
        fork(model, [its_optimizer])
    with pytest.raises(TypeError, match=r"a torch.nn.Module, got function"):
        fork(lambda: model, its_optimizer)


def test_what_cannot_be_copied_is_refused_with_the_reason():
    model, optimizer = learner()
    model.kept = model.head.weight * 2  # with a history
    with pytest.raises(
        ValueError, match=r"Hinted and its SGD cannot be copied .*explicitly by the user"
    ):
        fork(model, optimizer)
    model, optimizer = learner()
    model.head.forward = lambda x: F.linear(x, model.head.weight)
    with pytest.raises(ValueError, match="the forward of 'head' was replaced by a function"):
        fork(model, optimizer)


def test_the_forward_that_accelerate_lays_over_a_model_is_left_off():
    model, optimizer = learner()
    model._original_forward = model.forward
    model.forward = lambda *given: model._original_forward(*given)
    wrapper = SimpleNamespace(optimizer=optimizer)
    forked, its_optimizer = fork(model, wrapper)
    before = model.head.weight.clone()
    Step(loss_of)(forked, its_optimizer, pools("plain", 1, seed=2)[0])
    assert all(each.grad is None for each in model.parameters())
    assert torch.equal(before, model.head.weight) and not torch.equal(before, forked.head.weight)


@pytest.fixture
def two_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_models_that_several_ranks_train_together_are_refused(two_ranks):
    model, optimizer = learner()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(
        ValueError, match="DistributedDataParallel is trained by several ranks together"
    ):
        fork(wrapped, optimizer)
    model, _ = learner()
    sharded = torch.distributed.fsdp.fully_shard(model)
    with pytest.raises(ValueError, match="FSDPHinted is trained by several ranks together"):
        fork(sharded, torch.optim.SGD(sharded.parameters(), 0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
def test_on_a_gpu_its_streams_come_back_and_steps_are_timed():
    model = gpt2(layers=2).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    batch = candidates("gpt2")
    before = torch.cuda.get_rng_state()
    found = trial(
        model, optimizer, [batch] * 12, [batch], steps=6, repeats=2, autocast=torch.bfloat16
    )
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert found.seconds > 0 and all(each < found.before for each in found.plain)
