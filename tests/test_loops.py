"""Loops as people write them, each unchanged but for the line that makes its loader: pytest tests/test_loops.py

A loop is a text below. It runs plain, sifted, and with a loader written by hand that does the same in the most
obvious way: the losses of the last two must be equal, bit for bit, for then the kept sets are.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, VOCAB
from models import classifier
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    default_collate,
)

from siftloader import EarlyExit, RanksDisagree, ScoringError, Sifter, SiftingDataLoader
from siftloader.integrations import sift_calls


T = 24  # positions of a row


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def run(script: str, **names: Any) -> dict[str, Any]:
    names.setdefault("losses", [])
    exec(compile(script, "loop", "exec"), names)
    return names


def with_line(script: str, line: str, other: str) -> str:
    """The script with another text for one line, and nothing else."""
    changed = script.replace(line, other)
    rows = difflib.unified_diff(script.splitlines(), changed.splitlines(), n=0)
    removed = [row for row in rows if row[0] == "-" and row[:3] != "---"]
    assert len(removed) == 1 and script.count(line) == 1
    return changed


def best(scores: Tensor, keep: int) -> Tensor:
    """The rows with the highest scores, in the order of the pool; the lower one of two equals."""
    order = sorted(range(len(scores)), key=lambda row: (-float(scores[row]), row))
    return torch.tensor(sorted(order[:keep]))


def mean_loss(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """One loss per row, over its labelled positions: logits [P, T, V], labels [P, T] -> [P]."""
    rows = zip(logits, labels, strict=True)
    return torch.stack([functional.cross_entropy(a, b, ignore_index=ignored) for a, b in rows])


# nanochat: a generator of (inputs, targets, where to resume from) whose buffers come again and again; the loss
# inside of the model, `next` between backward and step.


CHAT = """
loader = batches(start)
x, y, place = next(loader)
for step in range(steps):
    for _ in range(2):
        loss = model(x, y)
        losses.append(loss.item())
        (loss / 2).backward()
        x, y, place = next(loader)
    optimizer.step()
    optimizer.zero_grad()
"""
CHAT_LINE = "loader = batches(start)"
CHAT_SIFTED = (
    "loader = SiftingDataLoader.wrap(batches(start), model=model, warmup_steps=2, keep=keep)"
)


def buffered(start: int = 0, rows: int = 4) -> Iterator[tuple[Tensor, Tensor, dict[str, int]]]:
    x, y = torch.empty(rows, T, dtype=torch.long), torch.empty(rows, T, dtype=torch.long)
    while True:
        drawn = torch.randint(VOCAB, (rows, T + 1), generator=torch.Generator().manual_seed(start))
        x.copy_(drawn[:, :-1])
        y.copy_(drawn[:, 1:])
        start += 1
        yield x, y, {"row_group": start, "epoch": 1}


def chat(script: str = CHAT, **names: Any) -> dict[str, Any]:
    model = FAMILIES["nanochat"].model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    given = {"model": model, "optimizer": optimizer, "SiftingDataLoader": SiftingDataLoader}
    return run(
        script, **given, **{"batches": buffered, "start": 0, "steps": 4, "keep": 0.5} | names
    )


def chat_by_hand(start: int, rows: int = 4) -> Any:
    def batches(model: nn.Module) -> Iterator[Any]:
        inner, handed = buffered(start, rows), 0
        while True:
            x, y, place = copy.deepcopy(next(inner))
            if handed >= 2:
                x2, y2, place = copy.deepcopy(next(inner))
                x, y = torch.cat((x, x2)), torch.cat((y, y2))
                kept = best(mean_loss(EarlyExit(model, 1).logits((x, y)), y), rows)
                x, y = x[kept], y[kept]
            handed += 1
            yield x, y, place

    return batches


def test_a_generator_with_a_third_element_is_sifted_by_one_line():
    sifted = chat(with_line(CHAT, CHAT_LINE, CHAT_SIFTED))
    hand = chat(with_line(CHAT, CHAT_LINE, "loader = by_hand(model)"), by_hand=chat_by_hand(0))
    assert sifted["losses"] == hand["losses"] != chat()["losses"]
    assert sifted["place"] == hand["place"] == {"row_group": 2 + 2 * 7, "epoch": 1}, (
        "the last drawn"
    )
    assert sifted["loader"].stats["kept"] == 4 * 7


def test_a_generator_with_a_third_element_is_itself_while_nothing_is_sifted():
    plain, off = chat(), chat(with_line(CHAT, CHAT_LINE, CHAT_SIFTED), keep=1.0)
    assert off["losses"] == plain["losses"] and off["place"] == plain["place"]


@pytest.mark.parametrize("rows", [2, 3])
def test_a_tuple_of_as_many_parts_as_rows_is_no_list_of_samples(rows):
    model = FAMILIES["nanochat"].model()
    loader = SiftingDataLoader.wrap(buffered(0, rows), model=model, warmup_steps=0)
    x, y, place = next(loader)
    pool = torch.cat([next(buffered(start, rows))[0] for start in range(2)])
    wanted = torch.cat([next(buffered(start, rows))[1] for start in range(2)])
    kept = best(mean_loss(EarlyExit(model, 1).logits((pool, wanted)), wanted), rows)
    assert torch.equal(x, pool[kept]) and torch.equal(y, wanted[kept])
    assert place == {"row_group": 2, "epoch": 1}


def test_what_holds_no_tensor_at_the_end_of_a_tuple_is_no_label():
    model, (x, y, place) = FAMILIES["nanochat"].model(), next(buffered())
    scores = Sifter(model).score((x, y))
    assert torch.equal(Sifter(model).score([x, y, place]), scores)
    assert torch.equal(Sifter(model).score((x, y, list("abcd"), None)), scores)
    with pytest.raises(ScoringError, match="last in a tuple"):
        Sifter(model).score((x, place))


# nanoGPT: a function draws at random, for training and for evaluation; the next batch is drawn between forward and
# backward, the loop owns autocast, gradients are accumulated, the model may be compiled or in DDP.


GPT = """
def get_batch(split):
    data = texts[split]
    starts = torch.randint(len(data) - T, (rows, 1))
    places = starts + torch.arange(T)
    return data[places], data[places + 1]
# here

@torch.no_grad()
def evaluate():
    model.eval()
    found = [model(*get_batch(split))[1].item() for split in texts for _ in range(2)]
    model.train()
    return found

if "wrap" in globals():
    model = wrap(model)
evaluations = []
x, y = get_batch("train")
for step in range(steps):
    if step % 3 == 0:
        evaluations.append(evaluate())
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, loss = model(x, y)
        losses.append(loss.item())
        x, y = get_batch("train")
        scaler.scale(loss / 3).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
"""
GPT_SIFTED = "get_batch = sift_calls(get_batch, model=lambda: model, warmup_steps=2, keep=keep)"


def gpt(script: str = GPT, **names: Any) -> dict[str, Any]:
    torch.manual_seed(names.pop("seed", 1))
    model = FAMILIES["nanogpt"].model()
    draw = torch.Generator().manual_seed(2)
    texts = {split: torch.randint(VOCAB, (200,), generator=draw) for split in ("train", "val")}
    defaults = {
        "texts": texts,
        "rows": 4,
        "T": T,
        "bf16": False,
        "steps": 4,
        "keep": 0.5,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
    }
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.05)}
    return run(script, torch=torch, sift_calls=sift_calls, **given, **defaults | names)


def gpt_sifted(**names: Any) -> dict[str, Any]:
    return gpt(with_line(GPT, "# here", GPT_SIFTED), **names)


def gpt_by_hand(**names: Any) -> dict[str, Any]:
    """The same by a function that draws twice and keeps the half with the higher loss at layer 1."""

    def by_hand(draw: Any, found: dict[str, Any], bf16: bool) -> Any:
        calls = []

        def get_batch(split: str) -> Any:
            model = found["model"]
            if not model.training or len(calls) < 2:
                calls.extend([split] * model.training)
                return draw(split)
            x, y = (torch.cat(each) for each in zip(draw(split), draw(split), strict=True))
            bare = getattr(model, "module", model)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits, _ = EarlyExit(getattr(bare, "_orig_mod", bare), 1)(x, y)
            kept = best(mean_loss(logits.float(), y), len(x) // 2)
            return x[kept], y[kept]

        return get_batch

    line = "get_batch = by_hand(get_batch, globals(), bf16)"
    return gpt(with_line(GPT, "# here", line), by_hand=by_hand, **names)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_function_that_draws_is_sifted_by_one_line(bf16):
    sifted, hand, plain = gpt_sifted(bf16=bf16), gpt_by_hand(bf16=bf16), gpt(bf16=bf16)
    assert sifted["losses"] == hand["losses"] != plain["losses"]
    assert sifted["evaluations"] == hand["evaluations"]
    assert sifted["evaluations"][0] == plain["evaluations"][0], "the same random numbers"
    stats, drawn = sifted["get_batch"].stats, 1 + 3 * 4
    assert stats["steps"] == drawn and stats["candidates"] == 2 * 4 * (drawn - 2)
    assert stats["sifting"] and stats["score_kept"] > stats["score_dropped"]
    state = sifted["get_batch"].state_dict()
    assert state["precision"] == ("bfloat16" if bf16 else None), (
        "heard from the loop's own forward"
    )


def test_a_function_that_draws_is_itself_while_nothing_is_sifted():
    plain = gpt()
    end = torch.get_rng_state()
    off = gpt_sifted(keep=1.0)
    assert torch.equal(torch.get_rng_state(), end)
    assert off["losses"] == plain["losses"] and off["evaluations"] == plain["evaluations"]
    assert off["get_batch"].__name__ == "get_batch" and not off["get_batch"].stats["sifting"]


def test_updates_may_be_counted_in_the_place_of_calls():
    line = GPT_SIFTED.replace("keep=keep", 'keep=keep, count="optimizer", accumulation=3')
    found = gpt(with_line(GPT, "# here", line))["get_batch"].stats
    assert found["updates"] == 4 and found["steps"] == 1 + 3 * 4
    assert found["candidates"] == 2 * 4 * (3 * 2), (
        "the draws after two updates, not after two calls"
    )


@pytest.mark.slow  # that of cramming below is compiled, too
def test_a_compiled_model_is_scored_as_it_is():
    def wrap(model: nn.Module) -> Any:
        return torch.compile(model, backend="eager")

    torch._dynamo.reset()
    sifted = gpt_sifted(wrap=wrap, steps=2)
    torch._dynamo.reset()
    assert sifted["losses"] == gpt_by_hand(wrap=wrap, steps=2)["losses"]
    torch._dynamo.reset()


def test_a_run_that_goes_on_draws_and_keeps_the_same_rows():
    model = FAMILIES["nanogpt"].model()

    def draw(split: str) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(VOCAB, (4, T + 1))
        return drawn[:, :-1], drawn[:, 1:]

    def sifted() -> Any:
        return sift_calls(draw, model=model, warmup_steps=3, criterion="loss")

    first = sifted()
    for _ in range(5):
        first("train")
    state, streams = json.loads(json.dumps(first.state_dict())), torch.get_rng_state()
    straight = [first("train") for _ in range(3)]
    second = sifted()
    second.load_state_dict(state)
    torch.set_rng_state(streams)
    for (x, y), (again, wanted) in zip(straight, (second("train") for _ in range(3)), strict=True):
        assert torch.equal(x, again) and torch.equal(y, wanted)
    assert second.stats["steps"] == first.stats["steps"] == 8
    assert second.stats["candidates"] == first.stats["candidates"] == 8 * 5


def drawing(rows: int = 4) -> Any:
    def draw(split: Any = 0, rows: int = rows) -> tuple[Tensor, Tensor]:
        first = 10 if split == "b" else 50
        drawn = torch.randint(first, first + 20, (rows, T + 1))
        return drawn[:, :-1], drawn[:, 1:]

    return draw


def test_other_arguments_are_another_pool():
    get_batch = sift_calls(drawing(), model=FAMILIES["nanogpt"].model(), warmup_steps=0)
    for split in "abbabaab":
        x, y = get_batch(split)
        assert len(x) == len(y) == 4 and bool((x >= 50).all()) is (split == "a")


def test_eval_mode_passes_through_and_counts_nothing():
    model, drawn = FAMILIES["nanogpt"].model(), []
    original = drawing()
    get_batch = sift_calls(lambda s: drawn.append(s) or original(s), model=model, warmup_steps=1)
    get_batch("a")
    model.eval()
    before = get_batch.state_dict()
    for _ in range(3):
        get_batch("b")
    assert get_batch.state_dict() == before and drawn == list("abbb")
    model.train()
    get_batch("a")
    assert drawn == list("abbbaa") and get_batch.stats["steps"] == 2


def test_an_error_of_the_function_leaves_it_usable():
    model, fails = FAMILIES["nanogpt"].model(), [False, True, False, False]
    original = drawing()

    def draw() -> Any:
        if fails and fails.pop(0):
            raise OSError("the disk is gone")
        return original()

    get_batch = sift_calls(draw, model=model, warmup_steps=0)
    with pytest.raises(OSError, match="the disk is gone"):
        get_batch()
    assert len(get_batch()[0]) == 4 and get_batch.stats["steps"] == 1


# What would not sift says so.


def test_what_draws_the_same_again_is_told():
    fixed = drawing()()
    get_batch = sift_calls(lambda i: fixed, model=FAMILIES["nanogpt"].model(), warmup_steps=0)
    with pytest.warns(UserWarning, match="same batch twice for the same arguments"):
        get_batch(0)
    get_batch(1)  # once is enough


def test_a_model_that_never_trains_is_told():
    get_batch = sift_calls(drawing(), model=FAMILIES["nanogpt"].model().eval())
    with pytest.warns(UserWarning, match="none was sifted, because the model is in eval mode"):
        for _ in range(100):
            get_batch()
    trained = sift_calls(drawing(), model=(model := FAMILIES["nanogpt"].model()))
    trained()
    model.eval()
    for _ in range(100):  # an evaluation is no reason to warn
        trained()


def test_draws_of_another_size_are_refused():
    get_batch = sift_calls(drawing(), model=FAMILIES["nanogpt"].model(), warmup_steps=0)
    get_batch("a")
    with pytest.raises(ValueError, match=r"draw\(\) drew 6 rows, and 4 before"):
        get_batch("b", rows=6)


def test_a_function_given_to_wrap_is_told_where_it_belongs():
    with pytest.raises(TypeError, match=r"sift_calls\(\) one that draws a batch"):
        SiftingDataLoader.wrap(lambda split: None, model=lambda: nn.Identity())


@pytest.mark.parametrize(
    ("given", "options", "error", "text"),
    [
        (buffered(), {}, TypeError, "takes a function that draws a batch, got generator"),
        ([], {}, TypeError, r"for an iterable of batches use SiftingDataLoader.wrap"),
        (nn.Identity, {}, TypeError, "got type"),
        (drawing(), {"keep": 0.4}, ValueError, "keep must be 1, 1/2, 1/3 or so"),
        (drawing(), {"keep": {0: 0.5, 9: 0.75}}, ValueError, "called 1 / keep times: got 0.75"),
        (drawing(), {"warmup": 3}, TypeError, "warmup"),
        (sift_calls(drawing(), model=nn.Identity), {}, ValueError, "sifted already"),
    ],
)
def test_wrong_arguments_of_sift_calls_fail_at_once(given, options, error, text):
    with pytest.raises(error, match=text):
        sift_calls(given, model=lambda: nn.Identity(), **options)


class ByHand:
    """Two batches of ``size`` rows drawn, the better half handed out: ``SiftingDataLoader`` in its simplest words."""

    def __init__(
        self, inner: Any, model: nn.Module, score: Any, size: int, warmup: int = 0
    ) -> None:
        self.inner, self.model, self.score, self.size = inner, model, score, size
        self.handed, self.warmup = 0, warmup

    def __iter__(self) -> Iterator[list[Tensor]]:
        held: list[list[Tensor]] = []
        for batch in self.inner:
            held.append([each.clone() for each in batch])
            plain = self.handed < self.warmup
            if plain or sum(len(each[0]) for each in held) == 2 * self.size:
                yield held.pop() if plain else self._best(held)
                held, self.handed = [], self.handed + 1
        if sum(len(each[0]) for each in held) >= self.size:
            yield self._best(held)
            self.handed += 1

    def _best(self, held: list[list[Tensor]]) -> list[Tensor]:
        pool = [torch.cat(each) for each in zip(*held, strict=True)]
        kept = best(self.score(self.model, *pool), self.size)
        return [each[kept] for each in pool]


# PyTorch's quickstart: a model that is no stack of equal layers, `len(dataloader.dataset)`, a test after each epoch.


QUICKSTART = """
def train(dataloader, model, loss_fn, optimizer):
    size = len(dataloader.dataset)
    model.train()
    for batch, (X, y) in enumerate(dataloader):
        X, y = X.to(device), y.to(device)
        pred = model(X)
        loss = loss_fn(pred, y)
        loss.backward()
        if (batch + 1) % 3 == 0 or batch + 1 == len(dataloader):
            optimizer.step()
            optimizer.zero_grad()
            updates.append(batch)
        losses.append(loss.item())
        told.append(((batch + 1) * len(X), size))

def test(dataloader, model, loss_fn):
    model.eval()
    with torch.no_grad():
        found = [loss_fn(model(X.to(device)), y.to(device)).item() for X, y in dataloader]
    tests.append((sum(found) / len(dataloader), len(dataloader.dataset)))

told, tests, updates = [], [], []
train_dataloader = DataLoader(training_data, batch_size=8, shuffle=True)
test_dataloader = DataLoader(test_data, batch_size=8)
for epoch in range(2):
    train(train_dataloader, model, loss_fn, optimizer)
    test(test_dataloader, model, loss_fn)
"""
QUICK_LINE = "train_dataloader = DataLoader(training_data, batch_size=8, shuffle=True)"
QUICK_SIFTED = (
    "train_dataloader = SiftingDataLoader(training_data, batch_size=8, shuffle=True, model=model, "
    "exit_layer=exit_layer, exit_head=exit_head, warmup_steps=0, keep=keep)"
)


def quick(script: str = QUICKSTART, **names: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    layers = [nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    model = nn.Sequential(nn.Flatten(), nn.Sequential(*layers))
    images, classes = torch.randn(110, 1, 28, 28), torch.randint(10, (110,))
    defaults = {
        "training_data": TensorDataset(images[:90], classes[:90]),
        "test_data": TensorDataset(images[90:], classes[90:]),
        "device": "cpu",
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "SiftingDataLoader": SiftingDataLoader,
        "keep": 0.5,
        "exit_layer": "full",
        "exit_head": None,
    }
    return run(script, torch=torch, DataLoader=DataLoader, model=model, **defaults | names)


def loss_of_all(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    logits = EarlyExit(model, "full").logits(images)
    return functional.cross_entropy(logits, classes, reduction="none")


def test_the_quickstart_is_sifted_by_one_line():
    sifted = quick(with_line(QUICKSTART, QUICK_LINE, QUICK_SIFTED))
    line = (
        "train_dataloader = by_hand(DataLoader(training_data, batch_size=8, shuffle=True), model)"
    )

    class Sized(ByHand):
        dataset = range(48)  # 90 rows: five pools of 16, and a sixth of 10

        def __len__(self) -> int:
            return 6

    def by_hand(inner: Any, model: nn.Module) -> ByHand:
        return Sized(inner, model, loss_of_all, 8)

    hand = quick(with_line(QUICKSTART, QUICK_LINE, line), by_hand=by_hand)
    assert sifted["losses"] == hand["losses"] and sifted["tests"] == hand["tests"]
    assert sifted["told"] == [((batch + 1) * 8, 48) for batch in range(6)] * 2
    assert sifted["updates"] == [2, 5] * 2
    plain = quick()
    assert plain["losses"][0] != sifted["losses"][0] and plain["updates"] == [2, 5, 8, 11] * 2


def test_the_last_partial_step_happens():
    # 75 rows: five batches, so that the second step of an epoch has two of them.
    data = quick()["training_data"]
    few = TensorDataset(*(each[:75] for each in data.tensors))
    sifted = quick(with_line(QUICKSTART, QUICK_LINE, QUICK_SIFTED), training_data=few)
    assert sifted["updates"] == [2, 4] * 2 and sifted["told"][-1] == (40, 40)


def test_the_quickstart_is_itself_while_nothing_is_sifted():
    plain, off = quick(), quick(with_line(QUICKSTART, QUICK_LINE, QUICK_SIFTED), keep=1.0)
    assert off["losses"] == plain["losses"] and off["tests"] == plain["tests"]
    assert off["told"] == plain["told"]


def test_the_quickstart_with_a_head_beside_its_model():
    line = with_line(QUICKSTART, QUICK_LINE, QUICK_SIFTED)
    with pytest.raises(ScoringError, match="exit_head"):  # no stack of layers that are alike
        quick(line, exit_layer=1)
    found = quick(line, exit_layer="1:2", exit_head="probe")["train_dataloader"].stats
    assert found["kept"] == 96


# cramming: an endless loader that is its own iterator, with a counter; an engine that owns autocast and steps.


CRAMMING = """
for step, batch in enumerate(loader, 1):
    loss = engine.step({name: batch[name] for name in ("input_ids", "labels")})
    losses.append(loss.item())
    epochs.append(loader.epoch_counter)
    if step == steps:
        break
"""


class Endless(DataLoader[Any]):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches, self.epoch_counter = super().__iter__(), 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if (batch := next(self.batches, None)) is None:
            self.batches, self.epoch_counter = super().__iter__(), self.epoch_counter + 1
            batch = next(self.batches)
        return batch


class Engine(nn.Module):
    def __init__(self, model: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.model, self.bf16, self.steps = torch.compile(model, backend="eager"), bf16, 0
        self.optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**batch)["loss"]
        (loss / 3).backward()
        self.steps += 1
        if self.steps % 3 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def cramming(sifted: str = "loader", bf16: bool = True, **names: Any) -> dict[str, Any]:
    torch.manual_seed(4)
    ids = torch.randint(5, VOCAB, (30, T))
    hidden = torch.rand(ids.shape) < 0.2
    fields = {"input_ids": ids.masked_fill(hidden, 4), "labels": ids.masked_fill(~hidden, -100)}
    data = [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
    loader = Endless(data, sampler=RandomSampler(data), batch_size=4, drop_last=True)
    engine = Engine(FAMILIES["cramming"].model(), bf16).train()
    given = {"engine": engine, "epochs": [], "steps": 12, "loader": loader}
    given["SiftingDataLoader"] = SiftingDataLoader
    return run(f"loader = {sifted}\n{CRAMMING}", **given, **names)


def test_an_endless_loader_with_a_counter_is_sifted_by_one_line():
    torch._dynamo.reset()
    line = "SiftingDataLoader.wrap(loader, model=lambda: engine.model, warmup_steps=2)"
    sifted = cramming(line)

    class Cramming(ByHand):
        @property
        def epoch_counter(self) -> int:
            return self.inner.epoch_counter

        def __iter__(self) -> Any:
            names = ("input_ids", "labels")
            inner, self.inner = self.inner, _Pairs(self.inner, names)
            for batch in super().__iter__():
                self.inner = inner
                yield dict(zip(names, batch, strict=True))

    def score(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = EarlyExit(model._orig_mod, 1).logits({"input_ids": ids, "labels": labels})
        return mean_loss(logits.float().view(len(ids), T, -1), labels)

    hand = cramming(
        "by_hand(loader, engine.model)", by_hand=lambda a, b: Cramming(a, b, score, 4, 2)
    )
    assert sifted["losses"] == hand["losses"]
    assert sifted["epochs"] == hand["epochs"] and sifted["epochs"][-1] == (2 + 2 * 10 - 1) // 7
    assert sifted["loader"].state_dict()["precision"] == "bfloat16"
    plain = cramming()
    assert plain["losses"] != sifted["losses"] and plain["losses"][:2] == sifted["losses"][:2]
    off = cramming("SiftingDataLoader.wrap(loader, model=lambda: engine.model, keep=1.0)")
    assert off["losses"] == plain["losses"] and off["epochs"] == plain["epochs"]
    torch._dynamo.reset()


class _Pairs:
    def __init__(self, inner: Any, names: tuple[str, ...]) -> None:
        self.inner, self.names = inner, names

    def __iter__(self) -> Iterator[list[Tensor]]:
        return ([batch[name] for name in self.names] for batch in self.inner)


# timm: a loader around the loader that moves and normalises, one batch ahead; mixup in its collate_fn, turned off
# by the loop through an attribute of the loader; soft targets; the epoch told to `loader.sampler`.


TIMM = """
for epoch in range(3):
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    if epoch >= 2 and loader.mixup_enabled:
        loader.mixup_enabled = False
    last = len(loader) - 1
    for index, (images, targets) in enumerate(loader):
        loss = -(targets * model(images).log_softmax(-1)).sum(-1).mean()
        (loss / 2).backward()
        losses.append(loss.item())
        soft.append(bool(((targets > 0) & (targets < 0.9)).any()))
        if index % 2 or index == last:
            optimizer.step()
            optimizer.zero_grad()
"""


class Mixup:
    def __init__(self) -> None:
        self.mixup_enabled = True

    def __call__(self, rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([row[0] for row in rows])
        classes = functional.one_hot(torch.tensor([row[1] for row in rows]), 10).float()
        if not self.mixup_enabled:
            return images, classes
        share = float(torch.rand(())) / 4 + 0.5
        return images.lerp(images.flip(0), 1 - share), classes.lerp(classes.flip(0), 1 - share)


class Prefetch:
    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        before = None
        for images, targets in self.loader:
            if before is not None:
                yield before
            before = images.sub(0.5), targets
        yield before

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        return self.loader.batch_sampler

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    @property
    def mixup_enabled(self) -> bool:
        return self.loader.collate_fn.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, on: bool) -> None:
        self.loader.collate_fn.mixup_enabled = on


def timm(sifted: str = "loader", **names: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.randint(10, (24,)))
    sampler = DistributedSampler(data, 1, 0, seed=7)
    inner = DataLoader(data, 4, sampler=sampler, collate_fn=Mixup(), drop_last=True)
    model = FAMILIES["timm-vit"].model()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.02), "soft": []}
    given |= {"SiftingDataLoader": SiftingDataLoader, "loader": Prefetch(inner)}
    return run(f"loader = {sifted}\n{TIMM}", **given, **names)


def test_a_timm_loop_is_sifted_by_one_line():
    line = "SiftingDataLoader.wrap(loader, model=model, exit_layer=2, warmup_steps=0)"
    sifted = timm(line)

    class Timm(ByHand):
        def __len__(self) -> int:
            return 3

        sampler = property(lambda self: self.inner.sampler)
        mixup_enabled = property(
            lambda self: self.inner.mixup_enabled,
            lambda self, on: setattr(self.inner, "mixup_enabled", on),
        )

    def score(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return -(targets * EarlyExit(model, 2).logits(images).log_softmax(-1)).sum(-1)

    hand = timm("by_hand(loader, model)", by_hand=lambda a, b: Timm(a, b, score, 4))
    assert sifted["losses"] == hand["losses"] and sifted["soft"] == hand["soft"]
    assert sifted["soft"] == [True] * 6 + [False] * 3, "mixup goes off where the loop says so"
    plain, off = timm(), timm("SiftingDataLoader.wrap(loader, model=model, keep=1.0)")
    assert off["losses"] == plain["losses"] and off["soft"] == plain["soft"]


def test_attributes_of_the_inner_loader_are_its_own_and_no_others():
    inner = Prefetch(DataLoader(TensorDataset(torch.zeros(8, 3)), 2, collate_fn=Mixup()))
    inner.note, inner._private, inner.reset = "a word", 1, lambda: None  # type: ignore[attr-defined]
    loader = SiftingDataLoader.wrap(inner, model=FAMILIES["timm-vit"].model())
    assert loader.note == "a word" and loader.mixup_enabled
    loader.note = "another"
    loader.of_the_loop = "stays"
    assert inner.note == "another" and not hasattr(inner, "of_the_loop")  # type: ignore[attr-defined]
    assert loader.of_the_loop == "stays"
    assert loader.dataset is not inner.dataset and loader.batch_sampler is None
    for name in ("_private", "reset", "nothing"):
        with pytest.raises(AttributeError, match=f"SiftingDataLoader.*{name}"):
            getattr(loader, name)
    with pytest.raises(ValueError, match="dataset attribute should not be set"):
        loader.dataset = inner.dataset


# torchdata.nodes, and its StatefulDataLoader


def nodes(stateful: bool) -> Any:
    data = [
        {"x": torch.full((8,), float(row)), "labels": torch.tensor(row % 10)} for row in range(50)
    ]
    if stateful:
        torchdata = pytest.importorskip("torchdata.stateful_dataloader")
        return torchdata.StatefulDataLoader(data, batch_size=4, shuffle=True)
    torchdata = pytest.importorskip("torchdata.nodes")
    # Its own RandomSampler does not go on exactly after the first epoch, whoever draws from it.
    sampler = DistributedSampler(data, 1, 0, seed=6)
    rows = torchdata.Mapper(torchdata.SamplerWrapper(sampler), data.__getitem__)
    batches = torchdata.Batcher(rows, 4, drop_last=False)
    return torchdata.Loader(torchdata.Prefetcher(torchdata.Mapper(batches, default_collate), 2))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("stateful", [True, False])
def test_a_stateful_inner_loader_goes_on_where_it_was(stateful):
    model = classifier()

    def sifting() -> SiftingDataLoader:
        torch.manual_seed(8)
        return SiftingDataLoader.wrap(nodes(stateful), model=model, warmup_steps=3)

    def drawn(loader: SiftingDataLoader, batches: int) -> list[list[float]]:
        found = zip(range(batches), repeated(loader), strict=False)
        return [batch["x"][:, 0].tolist() for _, batch in found]

    straight = drawn(sifting(), 14)
    first_epoch = [row for batch in straight[:8] for row in batch]
    assert len({*first_epoch}) == len(first_epoch) == 32
    for stop in (1, 4, 8, 9, 12):
        first, second = sifting(), sifting()
        found = drawn(first, stop)
        state, streams = json.loads(json.dumps(first.state_dict())), torch.get_rng_state()
        second.load_state_dict(state)
        torch.set_rng_state(streams)
        assert found + drawn(second, 14 - stop) == straight, stop


def test_nodes_are_sifted_as_by_hand():
    model = classifier()
    batches = [batch["x"][:, 0] for batch in nodes(False)]
    sifted = SiftingDataLoader.wrap(nodes(False), model=model, warmup_steps=0)

    def score(model: nn.Module, ids: Tensor) -> Tensor:
        logits = EarlyExit(model, 1).logits(ids[:, None].expand(-1, 8))
        return functional.cross_entropy(logits, ids.long() % 10, reduction="none")

    hand = ByHand([[ids] for ids in batches], model, score, 4)
    found = [batch["x"][:, 0].tolist() for batch in sifted]
    assert found == [ids.tolist() for (ids,) in hand] and len(found) == 6


def repeated(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# The examples


def example(name: str) -> Any:
    folder = str(Path(__file__).resolve().parent.parent / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


@pytest.mark.slow
def test_whether_it_pays_is_asked_three_ways(capsys):
    example("when_it_pays").main(["--steps=12"])
    told = capsys.readouterr().out
    assert "trial at step 10" in told and "audits" in told and "speed" in told


def test_the_plain_loop_runs_with_and_without(capsys):
    example("plain_loop").main(["--steps=6"])
    first, kept, scores = capsys.readouterr().out.splitlines()
    assert first.startswith("step 6: loss ") and kept.startswith("kept 8 of 16 candidates")
    high, low = re.findall(r"\d+\.\d+", scores)
    assert float(high) > float(low)
    example("plain_loop").main(["--steps=1", "--plain"])
    assert capsys.readouterr().out.startswith("step 1: loss ")


def test_a_criterion_of_ones_own(capsys):
    own = example("own_criterion")
    own.main(["--steps=3"])
    assert re.match(r"step 3: loss \d\.\d+; \d+% of what it kept", capsys.readouterr().out)
    model, logits = FAMILIES["bert"].model(), None
    batch = {k: v[:3] for k, v in FAMILIES["bert"].batch().items()}
    logits = EarlyExit(model, 1).logits(batch)
    expected = []
    for row, labels in zip(logits, batch["labels"], strict=True):
        losses = functional.cross_entropy(row, labels, reduction="none", ignore_index=-100)
        losses = losses[labels != -100].sort(descending=True).values
        expected.append(losses[: -(-len(losses) // 4)].mean())
    scores = Sifter(model, criterion=own.hardest_quarter).score(batch)
    assert torch.allclose(scores, torch.stack(expected), atol=1e-5)


def test_the_example_that_resumes_goes_on_to_the_bit(capsys, tmp_path, monkeypatch):
    resume = example("resume")
    resume.main([str(tmp_path / "straight.pt"), "--steps=7", "--every=3"])
    straight = capsys.readouterr().out.splitlines()
    save = resume.save

    def save_and_die(file: Path, step: int, *rest: Any) -> None:
        save(file, step, *rest)
        raise KeyboardInterrupt

    killed = [str(tmp_path / "killed.pt"), "--steps=7", "--every=3"]
    monkeypatch.setattr(resume, "save", save_and_die)
    for _ in range(2):  # inside of the warm-up, and after it
        with pytest.raises(KeyboardInterrupt):
            resume.main(killed)
    monkeypatch.undo()
    resume.main(killed)
    assert capsys.readouterr().out.splitlines() == straight and len(straight) == 7
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("straight", "killed"))
    assert all(torch.equal(two["model"][name], value) for name, value in one["model"].items())


def test_shards_behind_a_url(capsys, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("SIFTLOADER_CACHE", str(tmp_path))
    urls = example("webdataset_urls")
    urls.main(["--steps=1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "TokenShards, step 1",
        "webdataset, step 1",
    ]
    urls.main([Path("shards/demo").resolve().as_uri(), "--steps=1"])
    # The order of tars hangs on their names, of which the port is a part; that of TokenShards does not.
    assert capsys.readouterr().out.splitlines()[0] == lines[0]


def test_the_loop_in_the_style_of_nanogpt(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    example("nanogpt_style").main([str(text), "--steps=24"])
    *steps, kept = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert [line.split(":")[0] for line in steps] == ["step 0", "step 24"]
    assert losses[0] > losses[-1] + 0.3
    assert kept.startswith(f"{8 * (1 + 2 * 24 - 20)} of {16 * (1 + 2 * 24 - 20)} rows kept")


# Composer, which cannot be installed beside the others: its calls, as recorded with 0.32.1 (fit, checkpoints, resume).


def composer(
    loader: Any, epochs: int, state: Any = None, at: tuple[int, int] = (0, 0)
) -> Iterator[Any]:
    """Its training loop: (batch, the state of the data set at the end of that batch)."""
    epoch, batch = at
    if state is not None:
        loader.dataset.load_state_dict(state)
    for each in range(epoch, epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(each)
        # As many as len() says: it never asks for the end, and a data set with a state skips for itself.
        left = len(loader) - (batch if each == epoch else 0)
        for number, found in enumerate(itertools.islice(loader, left), 1):
            samples = 4 * number
            yield found[0].tolist(), (each, number), loader.dataset.state_dict(samples, True)


@pytest.mark.parametrize("warmup", [0, 2, 9])
def test_composer_resumes_in_any_epoch(warmup):
    data = TensorDataset(torch.arange(45.0)[:, None].expand(-1, 8).clone(), torch.arange(45) % 10)
    model = classifier()

    def sifting() -> SiftingDataLoader:
        inner = DataLoader(data, 4, sampler=DistributedSampler(data, 1, 0, seed=9))
        return SiftingDataLoader.wrap(inner, model=model, warmup_steps=warmup)

    straight = list(composer(sifting(), 3))
    epochs = {
        epoch: [rows for rows, (each, _), _ in straight if each == epoch] for epoch in range(3)
    }
    assert len({str(rows) for rows in epochs.values()}) == 3, "another order in every epoch"
    for stop in (1, len(epochs[0]), len(epochs[0]) + 2, len(straight) - 2):
        _, (epoch, number), state = straight[stop - 1]
        at = (epoch, number) if number < len(epochs[epoch]) else (epoch + 1, 0)
        rest = composer(sifting(), 3, json.loads(json.dumps(state)), at)
        assert [rows for rows, _, _ in rest] == [rows for rows, _, _ in straight[stop:]], stop


# Two ranks


class Noting(DistributedDataParallel):
    """DDP that keeps what it was trained on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            self.__dict__.setdefault("trained", []).append(args[0].clone())
        return super().forward(*args, **kwargs)


QUICK_RANKS = "train_dataloader = DataLoader(training_data, batch_size=8, sampler=sampler)"


def quick_ranks(line: str, **names: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(108, 1, 28, 28), torch.randint(10, (108,)))
    given = {"training_data": data, "sampler": DistributedSampler(data, seed=1), **names}
    script = with_line(QUICKSTART, QUICK_LINE, f"model = wrap(model)\n{line}")
    return quick(script, wrap=Noting, **given)


def on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, script in (("sifted", gpt_sifted), ("hand", gpt_by_hand)):
        run = script(wrap=Noting, seed=1 + rank, steps=2)
        found[f"gpt {name}"] = run["losses"], torch.cat(run["model"].trained)
    sifted = QUICK_RANKS.replace(
        "sampler)", 'sampler, model=model, exit_layer="full", warmup_steps=0)'
    )
    sifted = sifted.replace("DataLoader(", "SiftingDataLoader(")
    hand = QUICK_RANKS.replace("DataLoader(", "by_hand(DataLoader(") + ", model.module)"

    class Sized(ByHand):
        dataset = range(24)  # 54 rows a rank: three pools of 16, and 6 rows that are too few

        def __len__(self) -> int:
            return 3

    def by_hand(inner: Any, model: nn.Module) -> ByHand:
        return Sized(inner, model, loss_of_all, 8)

    for name, run in (
        ("sifted", quick_ranks(sifted)),
        ("hand", quick_ranks(hand, by_hand=by_hand)),
    ):
        found[f"quick {name}"] = run["losses"], torch.cat(run["model"].trained), run["updates"]
    model, chats = FAMILIES["nanochat"].model(), buffered(100 * rank)
    chat = SiftingDataLoader.wrap(chats, model=model, warmup_steps=0, sharded=True)
    found["chat"] = torch.cat([next(chat)[0] for _ in range(3)])
    torch.manual_seed(0)  # the same on both ranks
    for name, misplugged in (
        ("same draws", lambda: sift_calls(drawing(), model=model, warmup_steps=0)()),
        ("meant", lambda: sift_calls(drawing(), model=model, warmup_steps=0, sharded=True)()),
        ("unsharded", lambda: next(SiftingDataLoader.wrap(buffered(), model=model))),
    ):
        try:
            misplugged()
            found[name] = None
        except (ValueError, RanksDisagree) as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(on_rank, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_that_draw_by_a_function_train_on_their_own_best_rows(two_ranks):
    for found in two_ranks:
        assert found["gpt sifted"][0] == found["gpt hand"][0]
        assert torch.equal(found["gpt sifted"][1], found["gpt hand"][1])
    mine, yours = ({tuple(row) for row in found["gpt sifted"][1].tolist()} for found in two_ranks)
    assert len(mine - yours) > 10, "other draws; in a text of 200 characters some come twice"


def test_two_ranks_share_an_epoch_and_step_together(two_ranks):
    for found in two_ranks:
        assert found["quick sifted"][0] == found["quick hand"][0]
        assert torch.equal(found["quick sifted"][1], found["quick hand"][1])
        assert found["quick sifted"][2] == found["quick hand"][2] == [2] * 2
    epochs = [found["quick sifted"][1][:24].flatten(1).tolist() for found in two_ranks]
    assert len({tuple(row) for rows in epochs for row in rows}) == 48, (
        "no sample twice, on no rank"
    )
    chats = [{tuple(row) for row in found["chat"].tolist()} for found in two_ranks]
    assert not chats[0] & chats[1]


def test_two_ranks_that_draw_alike_are_told(two_ranks):
    for found in two_ranks:  # all of them, so that none waits for another
        assert "ValueError: draw() drew the same batch on ranks [0, 1]" in found["same draws"]
    assert [found["meant"] for found in two_ranks] == [None, None]
    for found in two_ranks:
        assert (
            "nothing says that the inner generator gives each its own share" in found["unsharded"]
        )


@pytest.mark.slow
def test_the_loop_in_the_style_of_nanogpt_on_two_ranks(tmp_path):
    (text := tmp_path / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog\n" * 400
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    script = Path(__file__).resolve().parent.parent / "examples" / "nanogpt_style.py"
    done = subprocess.run(
        [*torchrun, script, text, "--steps=14"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["step", "step", "72"]
