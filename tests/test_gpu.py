"""What only a GPU can show: pytest tests/test_gpu.py -m gpu

Scores, waits, copies, memory, overlap, the fused head and the compiled twin, on the device that runs them. What can be
shown without one is in test_syncs.py and beside each module.
"""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import transformers
from models import FAMILIES, VOCAB, candidates, reference_scores, scaled
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
    TrimmedTopK,
)
from siftloader.batches import Copies, move
from siftloader.targets import LATER


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = torch.arange(8) != 3  # of `candidates`, those with labels
COUNTS = np.arange(1, VOCAB + 1)
CUDA = torch.device("cuda", 0)


@contextmanager
def no_waits():
    """Whoever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unmasked(family, rows=8):
    """Without attention_mask, at whose values transformers looks, in training as well."""
    return {k: v for k, v in candidates(family, rows).items() if k != "attention_mask"}


def live(family):
    model = FAMILIES[family]().cuda()
    if getattr(model, "config", None) is not None:
        model.config.pad_token_id = None  # GPT-2 would look for padding
    return model


def placed(batch, where):
    pinned = {name: each.pin_memory() for name, each in batch.items()}
    return pinned if where == "host" else move(pinned, CUDA)


def trained(model, batch, optimizer, autocast=None):
    """One step of a plain loop."""
    with torch.autocast("cuda", autocast) if autocast else nullcontext():
        if "x" in batch:
            loss = nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
        else:
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def steps_without_waiting(model, batch, steps=4, autocast=None, train=True, **options):
    """Steps of loader and training of which none may wait, but for the first two; the last batch."""
    batches = itertools.repeat(batch, 200) if isinstance(batch, dict) else batch
    loader = SiftingDataLoader.wrap(list(batches), model=model, **({"warmup_steps": 0} | options))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    iterator = iter(loader)
    for _ in range(2):  # the first pool is tested; the optimizer makes its state
        trained(model, next(iterator), optimizer, autocast)
    with no_waits():
        for _ in range(steps):
            kept = next(iterator)
            if train:
                trained(model, kept, optimizer, autocast)
    iterator.close()
    loader.close()
    assert all(each.is_cuda for each in kept.values())
    assert loader.stats["nonfinite"] == 0 and loader.stats["seconds_scoring"] > 0
    return kept


# --- scores


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_references(family, criterion):
    model, batch = FAMILIES[family](), candidates(family)
    expected = reference_scores(family, model, 2, batch, criterion)
    model.cuda()
    on_host = Sifter(model, exit_layer=2, criterion=criterion).score(batch).cpu()
    on_device = Sifter(model, exit_layer=2, criterion=criterion).score(move(batch, CUDA))
    assert (on_host[ROWS] - expected[ROWS]).abs().max() < 1e-3
    assert torch.allclose(on_device.cpu()[ROWS], on_host[ROWS], atol=1e-4)


def test_bfloat16_scores_are_no_worse_than_the_eager_path():
    model, batch = FAMILIES["bert"](), candidates("bert")
    truth = reference_scores("bert", model, 1, batch, "loss")
    model.cuda()
    found = Sifter(model, autocast=torch.bfloat16).score(batch).cpu()
    spread = truth[ROWS].max() - truth[ROWS].min()
    assert (found - truth)[ROWS].abs().max() < 0.1 * spread + 0.05


@pytest.mark.parametrize("positions", [Stride(4), First(6), Stride(4, COUNTS)])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_positions_agree_wherever_the_labels_lie(family, positions):
    model, batch = FAMILIES[family]().cuda(), candidates(family)
    sifter = Sifter(model, exit_layer=2, positions=positions)
    on_host = sifter.score(batch)
    on_device = sifter.score(move(batch, CUDA))
    assert torch.allclose(on_device[ROWS], on_host[ROWS], atol=1e-4)


def test_scoring_leaves_the_cuda_stream_of_random_numbers_alone():
    model = FAMILIES["bert"]().cuda()
    before = torch.cuda.get_rng_state()
    Sifter(model, criterion="entropy")(candidates("bert"))
    assert torch.equal(torch.cuda.get_rng_state(), before)


# --- waits


WAITS = {
    "a value": lambda x: x.sum().item(),
    "a mask": lambda x: x[x > 0],
    "a copy": lambda x: x.cpu(),
    "a number": lambda x: torch.tensor(1.0, device=x.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_would_be_found(name):
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        WAITS[name](x)


OPTIONS = {
    "loss": {},
    "entropy": {"criterion": Entropy()},
    "margin": {"criterion": Margin()},
    "least confidence": {"criterion": LeastConfidence()},
    "gradient": {"criterion": GradNorm()},
    "random": {"criterion": Random()},
    "a sum": {"criterion": Loss() + 0.1 * Entropy()},
    "ranks": {"selection": RankSample(), "sift_weight": True},
    "gumbel": {"selection": Gumbel(), "sift_weight": True},
    "trimmed": {"selection": TrimmedTopK()},
    "robust": {"selection": Robust()},
    "strata": {"selection": Stratified(by=lambda batch: batch["labels"] % 2)},
    "exit head": {"exit_head": "probe"},
    "quarter": {"keep": 0.25},
    "told": {"on_select": lambda ids, scores, kept: None},
    "log": {"log_selections": "selections.parquet"},
    "overlap": {"overlap": True},
    "audits": {"audit_every": 2},
    "audits beside": {"audit_every": 2, "overlap": True},
    "audits of a warm-up": {"audit_every": 2, "warmup_steps": 4},
}
OF_TEXT = {
    "rarity": {"criterion": Rarity(COUNTS)},
    "residual": {"criterion": Residual(COUNTS)},
    "stride": {"positions": Stride(3)},
    "stride, control": {"positions": Stride(3, COUNTS)},
    "first": {"positions": First(4)},
    "all layers": {"exit_layer": "full"},
    "parts": {"score_batch_size": 8},
    "audits": {"audit_every": 2},
}


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("option", OPTIONS)
def test_no_step_waits(option, where, tmp_path):
    options = dict(OPTIONS[option])
    if option == "log":
        pytest.importorskip("pyarrow")
        options["log_selections"] = tmp_path / "selections.parquet"
    model, batch = live("classifier"), placed(candidates("classifier", 32), where)
    kept = steps_without_waiting(model, batch, train="sift_weight" not in options, **options)
    assert len(kept["x"]) == 32


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_no_step_of_a_model_of_transformers_waits(family, where, autocast):
    batch = placed(unmasked(family, 32), where)
    steps_without_waiting(live(family), batch, autocast=autocast, exit_layer=2)


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("option", OF_TEXT)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_no_step_over_text_waits(family, option, where):
    batch = placed(unmasked(family, 32), where)
    steps_without_waiting(live(family), batch, **OF_TEXT[option])


def busy(seconds):
    """Keep the stream of now busy; an event that is recorded after it."""
    started = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started[0].record()
    torch.cuda._sleep(10_000_000)
    started[1].record()
    started[1].synchronize()
    torch.cuda._sleep(int(10_000_000 * 1000 * seconds / started[0].elapsed_time(started[1])))
    done = torch.cuda.Event()
    done.record()
    return done


@pytest.mark.parametrize("where", ["list", "host", "gpu"])
def test_a_step_is_drawn_and_scored_while_the_gpu_is_busy(where):
    """The debug mode does not see every wait: pageable copies, and allocations, block without a word."""
    batch = unmasked("bert", 32)
    batch = batch if where == "list" else placed(batch, where)
    loader = SiftingDataLoader.wrap([batch] * 40, model=live("bert"), warmup_steps=0)
    iterator = iter(loader)
    for _ in range(12):
        next(iterator)
    torch.cuda.synchronize()
    done = busy(1.0)
    start = time.perf_counter()
    next(iterator)
    took = time.perf_counter() - start
    assert not done.query(), f"the host waited for the GPU: {took:.2f} s"
    iterator.close()


def test_rows_with_more_labels_than_room_wait_for_nothing():
    few, many = unmasked("bert"), unmasked("bert")
    few["labels"][:, 3:] = -100
    many["labels"] = many["input_ids"].clone()
    sift = Sifter(live("bert"))
    few, there = placed(few, "gpu"), placed(many, "gpu")
    sift(few)
    with no_waits():
        for _ in range(3 * LATER):
            sift(there)
    capped = sift.stats["capped"]
    assert 8 * LATER <= capped <= 16 * LATER
    assert torch.allclose(sift.score(there), sift.score(many), atol=1e-4)
    assert sift.stats["capped"] == capped


# --- copies


def test_copies_are_made_while_the_gpu_is_busy():
    copies = Copies()
    copies.to({"x": torch.zeros(8, 1024)}, CUDA)
    torch.cuda.synchronize()
    done = busy(1.0)
    source = torch.arange(8 * 1024).view(8, 1024)
    moved = copies.to({"x": source}, CUDA)
    copies._sources[-1][0].synchronize()
    assert not done.query(), "the copy waited for what the loop does"
    assert torch.equal(moved["x"].cpu(), source)


def test_copies_are_right_whatever_becomes_of_memory():
    # Sources and destinations are dropped at once, over and over, and the stream is late.
    copies, sums = Copies(), []
    for number in range(200):
        if number % 20 == 0:
            torch.cuda._sleep(50_000_000)
        batch = {"x": torch.full((64, 4096), number)}
        moved = copies.to(batch, CUDA)
        batch["x"].fill_(-1)  # as a loader that reuses its buffers: ours is pinned, a copy
        sums.append(moved["x"].float().mean())
        del moved, batch
    assert torch.stack(sums).tolist() == list(range(200))


# --- memory


def larger(layers=4):
    config = transformers.BertConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
    )
    return transformers.BertForMaskedLM(config).cuda().train()


def text(rows, length=128):
    ids = torch.randint(5, 8192, (rows, length))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)}


def peak_of(batches, model, steps=12):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    for step, batch in enumerate(batches):
        if step == 3:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        trained(model, move(batch, CUDA), optimizer, torch.bfloat16)
        if step == steps:
            break
    return torch.cuda.max_memory_allocated()


def test_the_peak_of_a_loop_is_that_of_the_plain_one():
    data = [text(32) for _ in range(40)]
    model = larger()
    plain = peak_of(data, model)
    options = {"warmup_steps": 0, "autocast": torch.bfloat16}
    sifted = peak_of(SiftingDataLoader.wrap(data, model=model, **options), model)
    assert sifted <= 1.01 * plain, f"{sifted:,} bytes instead of {plain:,}"


@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=["in line", "overlap"])
@pytest.mark.parametrize("where", ["host", "gpu"])
def test_memory_is_constant_over_a_thousand_steps(where, options):
    model, batch = live("bert"), placed(unmasked("bert", 16), where)
    loader = SiftingDataLoader.wrap([batch] * 2400, model=model, warmup_steps=0, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    for step, kept in enumerate(loader):
        trained(model, kept, optimizer)
        if step == 100:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        if step == 1100:
            break
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before[0] + 2**16
    assert torch.cuda.memory_reserved() == before[1]
    loader.close()


# --- the fused head


HEADS = list(itertools.product([(33, 64, 97), (300, 256, 30_522), (5, 72, 50_257)], [False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "more"), HEADS)
def test_the_fused_head_is_no_worse_than_the_eager_one(shape, more, dtype):
    fused = pytest.importorskip("siftloader.fused")
    rows, width, classes = shape
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw).to(CUDA, dtype)
    weight = (torch.randn(classes, width, generator=draw) / width**0.5).to(CUDA, dtype)
    bias = torch.randn(classes, generator=draw).to(CUDA, dtype) if more else None
    softcap, scale = (20.0, 0.7) if more else (None, 1.0)
    labels = torch.randint(0, classes, (rows,), generator=draw).cuda()
    labels[1] = -100

    def eager(dtype):
        logits = nn.functional.linear(hidden.to(dtype), weight.to(dtype))
        logits = scale * (logits if bias is None else logits + bias.to(dtype))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wide = logits if dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(wide, labels, reduction="none")
        log_p = wide.log_softmax(-1)
        return loss, -(log_p.exp() * log_p).sum(-1)

    head = fused.LinearHead(weight, bias, scale, softcap)
    fused.loss_and_entropy(hidden, labels, head)  # the first call may compile
    with no_waits():
        found = fused.loss_and_entropy(hidden, labels, head)
    real = labels >= 0
    assert found[0][1].isnan()
    for ours, truth, plain in zip(found, eager(torch.float64), eager(dtype), strict=True):
        allowed = (plain.double() - truth)[real].abs().max() + 1e-5 * truth[real].abs().max()
        assert (ours.double() - truth)[real].abs().max() <= allowed


# --- the compiled twin


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_compiled_twin_scores_alike_and_does_not_wait(family):
    pytest.importorskip("triton")
    model, batch = live(family), placed(unmasked(family, 16), "host")
    expected = Sifter(model, exit_layer=2).score(batch)
    sift = Sifter(model, exit_layer=2, compile=True)
    rows = expected.isfinite()
    for _ in range(3):
        assert torch.allclose(sift.score(batch)[rows], expected[rows], atol=1e-3)
    with no_waits():
        for _ in range(3):
            sift(batch)


# --- beside the step


def test_overlap_scores_with_the_weights_of_one_step_before():
    torch.manual_seed(0)
    model = scaled(FAMILIES["classifier"](), 1.0).cuda()
    data = [candidates("classifier", 32) | {"x": torch.randn(32, 8)} for _ in range(60)]
    seen = []

    def note(ids, scores, kept):
        seen.append(scores.clone())

    loader = SiftingDataLoader.wrap(
        data, model=model, warmup_steps=0, overlap=True, pool="split", on_select=note
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    expected = []
    for step, kept in enumerate(loader):
        # What the next pool must be scored with: the weights of now, before this step writes.
        if step + 1 < len(data):
            expected.append(Sifter(model).score(data[step + 1]))
        torch.cuda._sleep(20_000_000)
        trained(model, kept, optimizer)
    assert len(seen) == len(data)
    for late, now in zip(seen[2:], expected[1:], strict=False):
        assert torch.allclose(late, now, atol=1e-5)
