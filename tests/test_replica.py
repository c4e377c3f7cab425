"""The copy that scores on another device: pytest tests/test_replica.py"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from models import FAMILIES, LAYERS, VOCAB, bert, candidates, classifier, gpt2, scaled, trace
from simulated import Gpu
from torch import Tensor, nn

from siftloader import EarlyExit, ScoringError, Sifter, compiled
from siftloader.replica import Replica
from siftloader.targets import Targets


def scored(early: EarlyExit, batch: dict[str, Tensor]) -> Tensor:
    targets = Targets.of(batch["labels"], batch["labels"].device, shift=False)
    with torch.no_grad():
        return torch.cat(list(early.logits_at(batch, targets)))


def tensors(model: nn.Module) -> list[Tensor]:
    """All that lie in a module, registered or not."""
    found = []
    for module in model.modules():
        own = [each for each in vars(module).values() if isinstance(each, Tensor)]
        found += [*module._parameters.values(), *module._buffers.values(), *own]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("layer", [1, LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_scores_as_the_live_twin_and_stays_as_it_was_until_it_is_fetched(family, layer):
    model, batch = FAMILIES[family](), candidates(family)
    there, here = EarlyExit(model, layer, device="cpu"), EarlyExit(model, layer)
    expected = scored(here, batch)
    assert torch.equal(scored(there, batch), expected)
    with torch.no_grad():
        was = [each.clone() for each in tensors(model)]
        for each in tensors(model):  # nothing that reads the live model now goes unseen
            each.fill_(float("nan") if each.is_floating_point() else 10**6)
        assert torch.equal(scored(there, batch), expected), "it reads the live model"
        for each, before in zip(tensors(model), was, strict=True):
            each.copy_(before)
        for each in dict.fromkeys(model.parameters()):
            each.mul_(1.1)
    there.fetch()
    now = scored(there, batch)
    assert torch.equal(now, scored(here, batch)) and (now - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_copying_leaves_no_trace(family):
    model, batch = FAMILIES[family](), candidates(family)
    before = trace(model)
    early = EarlyExit(model, 1, device="cpu")
    scored(early, batch)
    early.fetch()
    assert trace(model) == before


def test_what_is_copied_is_what_scores_and_tied_weights_are_copied_once():
    model, batch = bert(), candidates("bert")
    early = EarlyExit(model, 1, device="cpu")
    scored(early, batch)
    dropped = sum(
        each.numel() * each.element_size()
        for layer in model.bert.encoder.layer[1:]
        for each in layer.parameters()
    )
    whole = sum(
        each.numel() * each.element_size() for each in [*model.parameters(), *model.buffers()]
    )
    assert early.copied_bytes == whole - dropped and EarlyExit(model, 1).copied_bytes == 0
    shell = early._twin.shell_of(model)
    assert shell.cls.predictions.decoder.weight is shell.bert.embeddings.word_embeddings.weight
    own = {id(each) for each in model.parameters()}
    assert not own & {id(each) for _, each in shell.named_parameters()}


def test_it_grows_with_the_model():
    model, batch = bert(), candidates("bert")
    there, here = EarlyExit(model, 1, device="cpu"), EarlyExit(model, 1)
    before, size = scored(there, batch), there.copied_bytes
    with torch.no_grad():
        model.resize_token_embeddings(VOCAB + 3)
    assert torch.equal(scored(there, batch), before)
    there.fetch()
    assert torch.equal(scored(there, batch), scored(here, batch))
    assert scored(there, batch).shape[1] == VOCAB + 3
    assert there.copied_bytes == size + 3 * (32 + 1) * 4
    other = {name: value * 1.01 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    model.tie_weights()
    gc.collect()
    there.fetch()
    assert torch.equal(scored(there, batch), scored(here, batch))
    assert there.copied_bytes == size + 3 * (32 + 1) * 4, "what was replaced is not kept"
    model.to(torch.float64)
    there.fetch()
    assert scored(there, batch).dtype == torch.float64


class Odd(nn.Module):
    """Keeps tensors in all places, and writes to some; [P, 8] to [P, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 10)
        self.table = torch.randn(16)
        self.tables = [torch.randn(16), (torch.randn(16),)]
        self.named = {"one": torch.randn(16)}
        self.alias = self.table
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table + self.tables[0] + self.tables[1][0] + self.named["one"]
        self.count += 1
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x) + self.count + self.alias.sum()


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def test_tensors_that_are_not_registered_are_copied_too_and_what_a_forward_writes_is_its_own():
    torch.manual_seed(0)
    model = Odd()
    there = EarlyExit(model, 1, device="cpu")
    with torch.no_grad():
        expected = EarlyExit(model, 1)(X)
        assert all(torch.equal(there(X), expected) for _ in range(3))
        assert model.count == 0
        kept = [model.table, model.tables[0], model.tables[1][0], model.named["one"]]
        for each in kept:
            each.add_(1)
        assert torch.equal(there(X), expected)
        there.fetch()
        assert torch.equal(there(X), EarlyExit(model, 1)(X))
        model.table = torch.zeros(16)
        model.count.add_(5)
        there.fetch()
        assert torch.equal(there(X), EarlyExit(model, 1)(X))


def test_all_that_a_forward_reads_lies_on_the_other_device():
    # Tensors without contents cannot meet others in one product: a live weight would be an error.
    early = EarlyExit(bert(), 2, device="meta")
    logits = early.logits({"input_ids": candidates("bert")["input_ids"].to("meta")})
    assert logits.device.type == "meta" and logits.shape == (8, 24, VOCAB)
    early = EarlyExit(Odd(), 1, device="meta")
    early.fetch()
    assert early(X.to("meta")).device.type == "meta"


def test_held_it_takes_weights_when_they_are_fetched_and_nothing_else():
    model, batch = bert(), candidates("bert")
    there = EarlyExit(model, 1, device="cpu")
    scored(there, batch)
    there.hold()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    expected = scored(EarlyExit(model, 1), batch)
    model.eval()
    model.bert.encoder.layer[0] = copy.deepcopy(model.bert.encoder.layer[1])
    there.fetch()
    assert torch.equal(scored(there, batch), expected)
    there.release()
    there.fetch()
    assert not torch.equal(scored(there, batch), expected)


def test_held_it_reads_nothing_that_a_training_forward_writes():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen += self.training
            x = self.norm(x) + self.seen
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model, x = Normed(), torch.randn(8, 4)
    there = EarlyExit(model, 1, device="cpu")
    there(x)
    model(x)
    there.hold()
    expected = EarlyExit(model, 1)(x)
    model(x + 100)
    there.fetch()
    assert torch.equal(there(x), expected)
    there.release()
    there.fetch()
    assert torch.equal(there(x), EarlyExit(model, 1)(x)) and not torch.equal(there(x), expected)


def test_a_compiled_copy_is_one_graph(monkeypatch):
    def run_as_it_is(graph: Any, inputs: Any, mode: Any) -> Callable[..., Any]:
        return graph.forward

    monkeypatch.setattr(compiled, "inductor", run_as_it_is)
    model, batch = gpt2(), candidates("gpt2")
    there, here = EarlyExit(model, 1, compile=True, device="cpu"), EarlyExit(model, 1)
    for _ in range(8):
        there.fetch()
        assert torch.equal(scored(there, batch), scored(here, batch))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)
    assert [part._compiled.graphs for part in there._twin._quick] == [1]
    torch._dynamo.reset()


def test_nobody_is_kept_alive():
    replica = Replica(torch.device("cpu"))
    live = torch.zeros(3)
    held = weakref.ref(replica.of(live))
    assert replica.of(live) is held() and replica.bytes == 12
    del live
    gc.collect()
    replica.fetch()
    assert replica.bytes == 0 and held() is None


def test_weights_of_a_kind_of_their_own_and_spread_ones_are_refused(monkeypatch):
    class Packed(nn.Parameter):
        pass

    model = classifier()
    model.head.weight = Packed(model.head.weight.detach())
    with pytest.raises(ScoringError, match=r"a weight is a Packed.*without scorer_device="):
        EarlyExit(model, 1, device="cpu").fetch()
    monkeypatch.setattr("siftloader.replica.is_spread", lambda module: module is model)
    with pytest.raises(ScoringError, match=r"lie on several ranks.*without scorer_device="):
        EarlyExit(model, 1, device="cpu").fetch()


def test_a_forward_that_reads_the_live_object_trips():
    model, batch = scaled(bert()), candidates("bert")
    own = type(model).forward
    model.forward = lambda *args, **kwargs: own(model, *args, **kwargs)
    with pytest.raises(ScoringError, match="beyond the exit"):
        scored(EarlyExit(model, 1, device="cpu"), batch)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_copy_of_any_family_reads_nothing_of_the_live_model(name):
    family = families.FAMILIES[name]
    model, batch = family.model(), family.batch()
    layer = family.exit(2)
    here, there = (Sifter(model, exit_layer=layer, score_fn=family.loss) for _ in range(2))
    there.scorer._early = EarlyExit(model, layer, device="cpu")
    expected = here.score(batch)
    assert torch.equal(there.score(batch), expected)
    with torch.no_grad():
        for each in tensors(model):
            each.fill_(float("nan") if each.is_floating_point() else 10**6)
    assert torch.equal(there.score(batch), expected)
    try:
        spoilt = here.score(batch)
    except (IndexError, RuntimeError):  # positions that no table has
        return
    assert not torch.equal(spoilt, expected), "or this test could not fail"


def test_from_a_gpu_weights_come_without_waiting_and_are_waited_for_where_they_are_used(
    monkeypatch,
):
    model, batch = bert(), candidates("bert")
    expected = scored(EarlyExit(model, 1), batch)

    def pinned(
        self: Replica, live: Tensor
    ) -> Tensor:  # which of this GPU that is none are another kind
        return torch.empty(live.shape, dtype=live.dtype, device=self.device, pin_memory=True)

    monkeypatch.setattr(Replica, "_room", pinned)
    with Gpu() as gpu:
        early = EarlyExit(gpu.moved(model), 1, device="cpu")
        assert torch.equal(scored(early, batch), expected)
        early.hold()
        gpu.waits.clear()
        early.fetch()
        assert not gpu.waits
        assert torch.equal(scored(early, batch), expected)
        assert gpu.waits and all("Event.synchronize" in each for each in gpu.waits)
        gpu.waits.clear()
        scored(early, batch)
        assert not gpu.waits, "what has arrived is not waited for again"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
def test_weights_of_a_gpu_are_copied_without_waiting(device):
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model, batch = gpt2().cuda(), candidates("gpt2")
    early = EarlyExit(model, 2, device=device)
    batch = {name: each.to(device) for name, each in batch.items()}
    scored(early, batch)
    side = torch.cuda.Stream()
    for _ in range(20):
        torch.cuda.synchronize()
        early.hold()
        expected = copy.deepcopy(model)
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**7)
            early.fetch()
            read = side.record_event()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_event(read)
        with torch.no_grad():  # as an optimizer would, that overwrites all
            for parameter in model.parameters():
                parameter.mul_(1.01)
        if device != "cpu":
            torch.cuda.current_stream(device).wait_event(read)
        found = scored(early, batch)
        early.release()
        if device == "cuda:0":
            assert torch.equal(found, scored(EarlyExit(expected, 2), batch))
        else:
            truth = scored(EarlyExit(expected.to(device), 2), batch)
            assert torch.equal(found, truth)
