"""Loops as people write them, each unchanged but for the line that makes its loader: pytest tests/test_loops.py

A loop is a text below. It runs plain, sifted, and with a loader written by hand that does the same in the most
obvious way: the losses of the last two must be equal, bit for bit, for then the kept sets are.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from torch import Tensor, nn
from torch.nn import functional

from siftloader import EarlyExit, ScoringError, Sifter, SiftingDataLoader
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
    torch.manual_seed(1)
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
