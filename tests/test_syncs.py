"""No step waits for the GPU: pytest tests/test_syncs.py

On a simulated one (simulated.py), which tells every wait; tests/test_gpu.py asks the same of a real one. The first
pool may wait: it is the one that is tested. Nothing else may, but for what a model asks for by itself.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from models import FAMILIES, HIDDEN, VOCAB, Block, candidates, scaled
from simulated import Gpu, OnGpu
from torch import nn

from siftloader import (
    Entropy,
    First,
    GradNorm,
    Gumbel,
    LeastConfidence,
    Loss,
    Margin,
    Random,
    RankSample,
    Rarity,
    Residual,
    Robust,
    Sifter,
    SiftingDataLoader,
    Stratified,
    Stride,
    TokenShards,
    TrimmedTopK,
)
from siftloader.targets import LATER


COUNTS = np.arange(1, VOCAB + 1)
# Where transformers looks at the values of a mask or of position ids, in training as well.
OWN = ("masking_utils.py", "modeling_utils.py")


class Words(nn.Module):
    """Logits [P, T, V] of token ids [P, T], with the least around them."""

    def __init__(self, vocabulary: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, HIDDEN)
        self.blocks = nn.ModuleList(Block(HIDDEN) for _ in range(3))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, vocabulary)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def words(rows=8):
    return {k: v for k, v in candidates("bert", rows).items() if k != "attention_mask"}


def running(rows=8):
    return {k: v for k, v in candidates("gpt2", rows).items() if k != "attention_mask"}


def placed(gpu, batch, where):
    """The batch in pinned memory, or on the GPU."""
    pinned = {name: each.pin_memory() for name, each in batch.items()}
    if where == "host":
        return pinned
    return {name: each.to(gpu.device, non_blocking=True) for name, each in pinned.items()}


def written(model):
    """Other weights, as an optimizer makes them."""
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(1.01)


def own_aside(waits):
    return [each for each in waits if not any(name in each for name in OWN)]


def waits_of(gpu, model, sift, batch, pools=3):
    """What later pools than the first wait for; each must keep half of its rows."""
    sift(dict(batch))
    gpu.waits.clear()
    for _ in range(pools):
        written(model)
        kept = sift(dict(batch))
        assert all(len(kept[name]) == len(batch[name]) // 2 for name in batch)
        assert all(isinstance(each, OnGpu) for each in kept.values())
    return gpu.waits


# --- the instrument


WAITS = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.any()),
    "float": lambda x: float(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a mask, written": lambda x: x.index_put_((x > 0,), torch.ones(3, device=x.device)),
    "an index of the host": lambda x: x[torch.tensor([1, 0])],
    "cpu": lambda x: x.cpu(),
    "from the host": lambda x: torch.arange(3).pin_memory().to(x.device),
    "a number": lambda x: torch.tensor(1.0, device=x.device),
    "a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "pageable": lambda x: torch.arange(3).to(x.device, non_blocking=True),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "an element by number": lambda x: x[torch.ones((), dtype=torch.long, device=x.device)],
    "a number of the host": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
FREE = {
    "arithmetic": lambda x: (x.softmax(-1) * 2 + torch.tensor(1.0)).sort().values.cumsum(0),
    "an index": lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "pinned": lambda x: torch.arange(3).pin_memory().to(x.device, non_blocking=True),
    "a slice": lambda x: x[1:].clone(),
    "filled": lambda x: x.masked_fill(x > 0, torch.nan),
    "zeros": lambda x: torch.zeros(3, device=x.device),
    "to pinned": lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True),
    "an event": lambda x: torch.cuda.Event().record(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_simulated_gpu_tells_a_wait(name):
    with Gpu() as gpu:
        x = placed(gpu, {"x": torch.tensor([1.0, -1.0, 2.0, 0.5])}, "gpu")["x"]
        assert not gpu.waits
        WAITS[name](x)
        assert gpu.waits


@pytest.mark.parametrize("name", FREE)
def test_the_simulated_gpu_tells_nothing_else(name):
    with Gpu() as gpu:
        x = placed(gpu, {"x": torch.tensor([1.0, -1.0, 2.0, 0.5])}, "gpu")["x"]
        FREE[name](x)
        assert not gpu.waits


def test_host_and_simulated_gpu_do_not_mix():
    with Gpu() as gpu:
        x = torch.zeros(4, device=gpu.device)
        with pytest.raises(RuntimeError, match="on cuda:0 and on the host"):
            x + torch.ones(4)
        assert (x + torch.tensor(1.0)).is_cuda


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_on_the_simulated_gpu_are_those_of_the_host(family, where):
    model, batch = FAMILIES[family](), candidates(family)
    expected = Sifter(model, exit_layer=2).score(batch)
    with Gpu() as gpu:
        sift = Sifter(gpu.moved(model), exit_layer=2)
        for _ in range(2):
            found = sift.score(placed(gpu, batch, where))
            assert torch.allclose(found.held, expected, atol=1e-5)


# --- steps


OPTIONS = {
    "loss": {},
    "entropy": {"criterion": Entropy()},
    "margin": {"criterion": Margin()},
    "least confidence": {"criterion": LeastConfidence()},
    "gradient": {"criterion": GradNorm()},
    "random": {"criterion": Random()},
    "a sum": {"criterion": Loss() + 0.1 * Entropy()},
    "rarity": {"criterion": Rarity(COUNTS)},
    "residual": {"criterion": Residual(COUNTS)},
    "a sum of losses": {"criterion": Loss("sum")},
    "a function": {"criterion": lambda early: early.reduce(early.each(lambda x, y: x.amax(-1)))},
    "stride": {"positions": Stride(3)},
    "stride, control": {"positions": Stride(3, COUNTS)},
    "first": {"positions": First(4)},
    "all layers": {"exit_layer": "full"},
    "bfloat16": {"autocast": torch.bfloat16},
    "exit head": {"exit_head": "probe"},
    "ranks": {"selection": RankSample()},
    "gumbel": {"selection": Gumbel()},
    "trimmed": {"selection": TrimmedTopK()},
    "robust": {"selection": Robust()},
    "strata": {"selection": Stratified(by=lambda batch: batch["input_ids"][:, 0] % 2)},
    "a score function": {"score_fn": lambda early, b: early(b["input_ids"]).amax((1, 2))},
}


@pytest.mark.parametrize(
    ("option", "shift", "where"),
    [
        (option, shift, where)
        for option, given in OPTIONS.items()
        for shift, where in itertools.product([False, True], ["host", "gpu"])
        if "selection" not in given or (shift, where) == (False, "gpu")
    ],
)
def test_no_pool_after_the_first_waits(option, shift, where):
    with Gpu() as gpu:
        model = gpu.moved(scaled(Words()))
        batch = placed(gpu, running() if shift else words(), where)
        sift = Sifter(model, shift_labels=shift, **OPTIONS[option])
        assert not waits_of(gpu, model, sift, batch)


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("option", ["loss", "entropy", "gradient", "exit head"])
def test_one_label_a_row_waits_for_nothing(option, where):
    with Gpu() as gpu:
        model = gpu.moved(FAMILIES["classifier"]())
        batch = placed(gpu, candidates("classifier"), where)
        assert not waits_of(gpu, model, Sifter(model, **OPTIONS[option]), batch)


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_models_of_transformers_wait_for_what_they_ask_themselves_only(family, where):
    with Gpu() as gpu:
        model, batch = gpu.moved(FAMILIES[family]()), placed(gpu, candidates(family), where)
        assert not own_aside(waits_of(gpu, model, Sifter(model), batch, pools=1))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_models_of_transformers_wait_for_nothing_without_a_mask(family):
    with Gpu() as gpu:
        model = gpu.moved(FAMILIES[family]())
        model.config.pad_token_id = None  # GPT-2 would look for padding, in training as well
        batch = placed(gpu, candidates(family), "host")
        del batch["attention_mask"]
        assert not waits_of(gpu, model, Sifter(model), batch, pools=1)


def test_weights_of_the_kept_wait_for_nothing():
    with Gpu() as gpu:
        model, batch = gpu.moved(scaled(Words())), placed(gpu, words(), "host")
        for options in ({"selection": RankSample()}, {"criterion": "random"}):
            sift = Sifter(model, shift_labels=False, sift_weight=True, **options)
            sift(batch)
            gpu.waits.clear()
            assert sift(batch)["sift_weight"].is_cuda and not gpu.waits


# --- whole loops


def trained(loader, model, gpu, steps, forget=2):
    """Steps of a plain loop with AdamW; the waits after the first ``forget``."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step, batch in enumerate(loader):
        if step == forget:
            gpu.waits.clear()
        logits, labels = model(batch["input_ids"]), batch["labels"]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == steps:
            break
    assert step == steps
    return gpu.waits


LOOPS = {
    "plain": {},
    "warm-up": {"warmup_steps": 4},
    "by optimizer steps": {"count": "optimizer", "warmup_steps": 1},
    "weights": {"selection": Gumbel(), "sift_weight": True},
    "told": {"on_select": lambda ids, scores, kept: None},
    "log": {"log_selections": "..."},
    "bfloat16": {"autocast": torch.bfloat16},
    "carried over": {"keep": 0.25},
    "overlap": {"overlap": True},
    "audits": {"audit_every": 2},
    "audits of a warm-up": {"audit_every": 2, "warmup_steps": 4},
    "audits beside": {"audit_every": 2, "overlap": True},
}


@pytest.mark.parametrize(
    ("option", "where"),
    [
        *((each, "host") for each in LOOPS),
        *((each, where) for each in ("plain", "audits") for where in ("gpu", "list")),
    ],
)
def test_no_step_of_a_loop_waits(option, where, tmp_path):
    options = {"warmup_steps": 0, **LOOPS[option]}
    if option == "log":
        pytest.importorskip("pyarrow")
        options["log_selections"] = tmp_path / "selections.parquet"
    with Gpu() as gpu:
        model = gpu.moved(scaled(Words()))
        batch = words() if where == "list" else placed(gpu, words(), where)
        loader = SiftingDataLoader.wrap(
            [batch] * 40,
            model=model,
            shift_labels=False,
            **options,
        )
        forget = 5 if "warm" in option else 2
        assert not trained(loader, model, gpu, forget + 3, forget)
        loader.close()
        assert loader.stats["kept"] >= 8 * 4
        if "audits" in option:
            assert loader.stats["population_loss"] > 0


def test_shards_are_copied_and_scored_without_waiting():
    shards = TokenShards("shards/demo", seed=0)
    with Gpu() as gpu:
        model = gpu.moved(Words(shards.vocab_size))
        loader = SiftingDataLoader(shards, 4, model=model, warmup_steps=0, pin_memory=True)
        batches = iter(loader)
        next(batches)
        gpu.waits.clear()
        for _ in range(3):
            assert next(batches)["labels"].is_cuda
        assert not gpu.waits
        batches.close()


def test_a_pool_with_more_labels_than_room_waits_for_nothing():
    few, many = words(), words()
    few["labels"][:, 3:] = -100
    many["labels"] = many["input_ids"].clone()  # every position: there was room for 16
    with Gpu() as gpu:
        model = gpu.moved(scaled(Words()))
        few, many = placed(gpu, few, "gpu"), placed(gpu, many, "gpu")
        sift = Sifter(model, shift_labels=False)
        sift(few)
        gpu.waits.clear()
        for _ in range(3 * LATER):
            sift(many)
        assert not gpu.waits
        capped = sift.stats["capped"]
        assert 8 * LATER <= capped <= 16 * LATER
        sift(many)
        assert sift.stats["capped"] == capped  # it has grown
        host = sift.score(placed(gpu, words() | {"labels": words()["input_ids"]}, "host"))
        assert torch.allclose(sift.score(many).held, host.held, atol=1e-5)
