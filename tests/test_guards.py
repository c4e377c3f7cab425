"""What each guard prevents, shown by switching it off: pytest tests/test_guards.py

Every test has two halves: without the guard the wrong thing happens and nobody is told; with it the
scores are right or the model is refused.
"""

from __future__ import annotations

import random
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES as TABLE, cast, logits_in
from models import (
    HIDDEN,
    LAYERS,
    VOCAB,
    Classifier,
    bert,
    candidates,
    classifier,
    gpt2,
    trace,
    truncated,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from siftloader import (
    EarlyExit,
    Predictions,
    ScoringError,
    Sifter,
    SiftingDataLoader,
    TopK,
    candidates as pools,
    twin,
)


def switch_off_tripwire(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(twin, "_tripwire", lambda live, layers: nullcontext())


def switch_off_rebinding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(twin, "_rebound", lambda value, memo: value)


def leave_streams_where_they_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(twin._Streams, "put_back", lambda self: False)


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if "label" not in name}


def whole(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the model says with all its layers, in the mode it is in; random numbers are put back."""
    with torch.no_grad(), torch.random.fork_rng():
        return logits_in(model(**inputs(batch)))


def cut(family: str, model: nn.Module, layer: int, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits_in(
            truncated(family, model, layer)(**inputs(cast(batch, torch.float64)))
        ).float()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


# The tripwire


def close_over(module: nn.Module) -> None:
    own = type(module).forward
    module.forward = lambda *args, **kwargs: own(module, *args, **kwargs)


CLOSED = {
    "bert": ["", "bert", "bert.encoder"],
    "t5": ["encoder", "decoder"],
    "albert-1-groups": ["albert", "albert.encoder"],
}


@pytest.mark.parametrize(
    ("name", "path"), [(n, path) for n, paths in CLOSED.items() for path in paths]
)
def test_a_forward_that_belongs_to_the_live_module_would_run_all_its_layers(
    name, path, monkeypatch
):
    family = TABLE[name]
    model, batch = family.model().eval(), family.batch()
    right = EarlyExit(model, 1).logits(batch)
    close_over(model.get_submodule(path))
    with monkeypatch.context() as patch:
        switch_off_tripwire(patch)
        wrong = EarlyExit(model, 1).logits(batch)
    assert not close(wrong, right)
    if name != "t5":  # where the other side is still cut
        assert close(wrong, whole(model, batch))
    with pytest.raises(ScoringError, match="beyond the exit"):
        EarlyExit(model, 1).logits(batch)


def test_a_live_module_in_training_mode_would_drop_out_of_the_score(monkeypatch):
    model, batch = classifier(), candidates("classifier")
    model.blocks[0].drop.p = 0.5
    own = model.blocks[0].drop
    model.embed.forward = lambda x: own(type(own).forward(own, nn.Linear.forward(model.embed, x)))
    with monkeypatch.context() as patch:
        switch_off_tripwire(patch), leave_streams_where_they_are(patch)
        early, state = EarlyExit(model, 1), torch.get_rng_state()
        assert not torch.equal(early.logits(batch), early.logits(batch))
        assert not torch.equal(torch.get_rng_state(), state)
    early = EarlyExit(model.eval(), 1)
    assert torch.equal(early.logits(batch), early.logits(batch))  # harmless while nothing trains
    model.train()
    with pytest.raises(ScoringError, match="one that trains"):
        early.logits(batch)


class Busy(Classifier):
    """While its twin runs, the live model is at work in another thread."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            with ThreadPoolExecutor(1) as pool:
                self.found.append(pool.submit(self.live, x))
        return super().forward(x)


def test_a_model_at_work_in_another_thread_would_trip(monkeypatch):
    model, batch = Busy().train(), candidates("classifier")
    model.found, model.live = deque(), lambda x: model(x)
    for block in model.blocks:
        block.drop.p = 0.0  # that thread would draw from the same streams
    with monkeypatch.context() as patch:
        patch.setattr(twin, "threading", SimpleNamespace(get_ident=lambda: 0))
        EarlyExit(model, 1).logits(batch["x"])
    EarlyExit(model, 1).logits(batch["x"])
    tripped, worked = model.found
    assert isinstance(tripped.exception(), ScoringError)
    assert worked.result().shape == (8, 10)


# Compiled modules


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("part", ["the model", "a part"])
def test_a_compiled_module_would_run_its_live_graph(part, monkeypatch):
    model, batch = classifier().eval(), candidates("classifier")
    right = cut("classifier", model, 1, batch)
    compiled = torch.compile(model, backend="eager")
    outer = nn.Sequential(compiled) if part == "a part" else compiled
    known = type(compiled)
    with monkeypatch.context() as patch:
        switch_off_tripwire(patch), switch_off_rebinding(patch)
        compiled.__class__ = type("Unknown", (known,), {})
        wrong = EarlyExit(outer, 1).logits(batch["x"])
        compiled.__class__ = known
    assert close(wrong, whole(model, {"x": batch["x"]}))
    assert close(EarlyExit(outer, 1).logits(batch["x"]), right)
    assert EarlyExit(outer, 1).layers == LAYERS
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_of_which_one_is_partly_compiled_are_still_alike():
    model, batch = classifier().eval(), candidates("classifier")
    right = EarlyExit(model, 1).logits(batch)
    model.blocks[0].mix = torch.compile(model.blocks[0].mix, backend="eager")
    assert torch.equal(EarlyExit(model, 1).logits(batch), right)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_forward_would_run_the_live_model(monkeypatch):
    model, batch = classifier().eval(), candidates("classifier")
    right = cut("classifier", model, 1, batch)
    model.forward = torch.compile(model.forward, backend="eager")
    with monkeypatch.context() as patch:
        switch_off_tripwire(patch), switch_off_rebinding(patch)
        assert close(EarlyExit(model, 1).logits(batch["x"]), whole(model, {"x": batch["x"]}))
    assert close(EarlyExit(model, 1).logits(batch["x"]), right)
    torch._dynamo.reset()


# Forwards on instances


def own_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(model).forward(model, *args, **kwargs)


BOUND = {
    "a method": lambda model: MethodType(own_forward, model),
    "a partial": lambda model: partial(own_forward, model),
    "a partial of a method": lambda model: partial(MethodType(own_forward, model)),
    "a partial by name": lambda model: partial(
        lambda x, model: own_forward(model, x), model=model
    ),
}


@pytest.mark.parametrize("kind", BOUND)
def test_a_forward_bound_to_the_instance_would_run_the_whole_model(kind, monkeypatch):
    model, batch = classifier().eval(), candidates("classifier")
    right = EarlyExit(model, 1).logits(batch)
    model.forward = BOUND[kind](model)
    with monkeypatch.context() as patch:
        switch_off_tripwire(patch), switch_off_rebinding(patch)
        assert close(EarlyExit(model, 1).logits(batch["x"]), whole(model, {"x": batch["x"]}))
    assert torch.equal(EarlyExit(model, 1).logits(batch["x"]), right)


class Parts(Classifier):
    """Modules are reached through everything that may hold one, never by their registered names."""

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.keyed, self.first = [self.embed], {"norm": self.norm}, self.embed.forward
        self.back = [weakref.ref(self)]
        self.blocks[0].owner = weakref.ref(self)
        self.blocks[0].forward = MethodType(type(self).first_block, self.blocks[0])

    def first_block(self: Any, x: Tensor) -> Tensor:
        return type(self).forward(self, x) + 0 * self.owner().keyed["norm"](x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + 0 * self.listed[0](x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.keyed["norm"](x))


def test_modules_held_elsewhere_would_be_the_live_ones(monkeypatch):
    model, batch = Parts().train(), candidates("classifier")
    right = cut("classifier", model, 1, batch)
    with monkeypatch.context() as patch:
        switch_off_rebinding(patch)
        with pytest.raises(ScoringError, match="one that trains"):
            EarlyExit(model, 1).logits(batch["x"])
    assert close(EarlyExit(model, 1).logits(batch["x"]), right)


# Replaced modules


class Quantised(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax() / 7)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class LowRank(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.base = linear
        self.down, self.up = nn.Linear(HIDDEN, 2), nn.Linear(2, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


REPLACED = {
    "quantised": lambda query: Quantised(query),
    "adapted": lambda query: LowRank(query),
    "hooked": lambda query: (
        query.register_forward_hook(lambda module, args, out: out * 2) and query
    ),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_replaced_module_would_be_missed(kind, monkeypatch):
    model, batch = bert(), candidates("bert")
    early = EarlyExit(model, LAYERS)
    before = early.logits(batch)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = REPLACED[kind](attention.query)
    with monkeypatch.context() as patch:
        patch.setattr(twin.Twin, "is_of", lambda self, root: True)
        assert torch.equal(early.logits(batch), before)
    now = early.logits(batch)
    assert not close(now, before)
    assert torch.equal(now, whole(model.eval(), batch))


@pytest.mark.parametrize("kind", ["replaced", "resized"])
def test_other_embeddings_would_be_missed(kind, monkeypatch):
    model, batch = bert(), candidates("bert")
    early = EarlyExit(model, LAYERS)
    before = early.logits(batch)
    if kind == "replaced":
        model.set_input_embeddings(nn.Embedding(VOCAB, HIDDEN))
        with monkeypatch.context() as patch:
            patch.setattr(twin.Twin, "is_of", lambda self, root: True)
            assert torch.equal(early.logits(batch), before)
    else:  # the parameters of the same modules: those are shared
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert torch.equal(early.logits(batch), whole(model.eval(), batch))
    now = early.logits(batch)
    assert now.shape != before.shape or not torch.equal(now, before)


# Buffers and weights that a forward writes to


class Counting(Classifier):
    """Counts what it sees, as a router of experts does, and normalises by running means."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(8)
        self.register_buffer("tokens_per_expert", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.tokens_per_expert += torch.bincount(x[:, 0].gt(0).long(), minlength=4)
        return super().forward(self.batch_norm(x))


def test_counters_would_count_the_candidates(monkeypatch):
    model, batch = Counting().train(), candidates("classifier")
    with monkeypatch.context() as patch:
        patch.setattr(twin.Twin, "_lend_buffers", lambda self: None)
        EarlyExit(model, 1).logits(batch)
        assert model.tokens_per_expert.sum() == 8
    before, early = trace(model), EarlyExit(model, 1)
    for _ in range(3):
        early.logits(batch)
    assert trace(model) == before


def test_training_mode_would_enter_scores_and_running_means(monkeypatch):
    model, batch = Counting().train(), candidates("classifier")
    shells = twin._shell

    def in_the_live_mode(module: nn.Module, memo: Any, children: int | None = None) -> nn.Module:
        shell = shells(module, memo, children)
        shell.__dict__["training"] = module.training
        return shell

    with monkeypatch.context() as patch:
        patch.setattr(twin, "_shell", in_the_live_mode)
        patch.setattr(twin.Twin, "_lend_buffers", lambda self: None)
        leave_streams_where_they_are(patch)
        sifter, state = Sifter(model, labels="labels"), torch.get_rng_state()
        assert not torch.equal(sifter.score(batch), sifter.score(batch))
        assert model.batch_norm.num_batches_tracked > 0
        assert not torch.equal(torch.get_rng_state(), state)
    before, sifter = trace(model), Sifter(model)
    assert torch.equal(sifter.score(batch), sifter.score(batch))
    assert trace(model) == before


class Rescaling(Classifier):
    """Divides its weights when it is first evaluated, in place (RWKV against overflow in float16)."""

    rescaled = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.rescaled):
            with torch.no_grad():
                self.blocks[0].mix.weight.div_(2)
            self.rescaled = True
        return super().forward(x)


def test_weights_changed_by_a_forward_would_stay_changed(monkeypatch):
    model, batch = Rescaling().train(), candidates("classifier")
    kept = model.blocks[0].mix.weight.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(twin, "_version", lambda tensor: 0)
        Sifter(model).score(batch)
        assert not model.rescaled and torch.equal(model.blocks[0].mix.weight, kept / 2)
    sifter = Sifter(model)
    for _ in range(2):
        with pytest.raises(ScoringError, match="changes the model's weights"):
            sifter.score(batch)


# Random streams that a forward draws from in evaluation mode too


DRAWS = {
    "dropout without training=": lambda x: nn.functional.dropout(x, 0.1),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "random": lambda x: x + random.random(),
    "numpy": lambda x: x + float(np.random.rand()),  # noqa: NPY002
}


class Noisy(Classifier):
    """Draws whatever mode it is in."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x) + self.draw(torch.ones(4)).sum()


def drawn() -> list[float]:
    """The next numbers of every stream; they are drawn."""
    return [*torch.rand(2).tolist(), random.random(), float(np.random.rand())]  # noqa: NPY002


def begin() -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002


READERS = {
    "a sifter": lambda model: Sifter(model, labels="labels").score,
    "all logits": lambda model: EarlyExit(model, 1).logits,
    "a forward": lambda model: (lambda early: lambda batch: early(batch["x"]))(
        EarlyExit(model, 1)
    ),
    "an exit head": lambda model: Sifter(model, exit_head="probe").score,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", DRAWS)
def test_a_forward_that_draws_would_move_the_streams_of_the_loop(kind, reader, monkeypatch):
    model, batch = Noisy(DRAWS[kind]).train(), candidates("classifier")
    begin()
    expected = drawn()
    with monkeypatch.context() as patch:
        leave_streams_where_they_are(patch)
        begin()
        READERS[reader](model)(batch)
        assert drawn() != expected
    begin()
    read = READERS[reader](model)
    with pytest.warns(UserWarning, match="draws random numbers in evaluation mode"):
        read(batch)
    assert drawn() == expected
    with warnings.catch_warnings():  # as errors: it was said once
        for _ in range(3):
            model.train(not model.training)
            begin()
            read(batch)
            assert drawn() == expected


@pytest.mark.filterwarnings("ignore:the forward of Noisy draws", "ignore:the epoch ended inside")
def test_a_warm_up_of_a_model_that_draws_would_not_be_the_plain_training(monkeypatch):
    rows = [{"x": row, "labels": torch.tensor(0)} for row in torch.eye(8)]

    def seen(**sifting: Any) -> list[float]:
        begin()
        model = Noisy(DRAWS["noise"]).train()
        begin()
        kind = SiftingDataLoader if sifting else DataLoader
        sifting = {**sifting, "model": model} if sifting else {}
        return [model(batch["x"]).sum().item() for batch in kind(rows, 2, shuffle=True, **sifting)]

    warming = {"exit_layer": 2, "exit_head": "probe", "warmup_steps": 100}  # a head that learns
    with monkeypatch.context() as patch:
        leave_streams_where_they_are(patch)
        assert seen(**warming) != seen()
    assert seen(**warming) == seen()


class Failing(Noisy):
    """Draws, and fails without its labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        super().forward(x)
        raise TypeError("labels are needed")


def test_a_forward_that_draws_and_fails_moves_no_stream():
    early = EarlyExit(Failing(DRAWS["noise"]), 1)
    begin()
    expected = drawn()
    begin()
    with pytest.raises(TypeError, match="are needed"):
        early.logits(candidates("classifier"))
    assert drawn() == expected


class NoisyLoss(Noisy):
    """Draws only where it is given its labels, as models do that mask for themselves."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return Classifier.forward(self, x) if labels is None else super().forward(x)


def test_a_forward_that_draws_for_its_labels_only_is_found_out():
    model, batch = NoisyLoss(DRAWS["noise"]), candidates("classifier")
    early = EarlyExit(model, 1)
    early(batch["x"])
    begin()
    expected = drawn()
    begin()
    with pytest.warns(UserWarning, match="draws random numbers"):
        early(batch["x"], labels=batch["labels"])
    assert drawn() == expected


@pytest.mark.filterwarnings("ignore:the forward of GPT2LMHeadModel draws")
def test_all_chunks_of_a_head_see_the_same_draw(monkeypatch):
    model, batch = gpt2().train(), candidates("gpt2")
    model.transformer.wte.register_forward_hook(lambda module, args, out: out + torch.rand(()))
    begin()
    expected = drawn()
    begin()
    right = Sifter(model).score(batch)
    monkeypatch.setattr(twin, "CHUNK_ELEMENTS", 5 * VOCAB)
    sifter = Sifter(model)
    for _ in range(2):
        assert torch.allclose(sifter.score(batch), right)
    assert drawn() == expected


def test_a_model_that_does_not_draw_pays_once(monkeypatch):
    taken = []
    streams = twin._Streams
    monkeypatch.setattr(twin, "_Streams", lambda *args: taken.append(args) or streams(*args))
    monkeypatch.setattr(torch.cuda, "get_rng_state", None)  # nobody asks: the model is on the host
    early, batch = EarlyExit(classifier().train(), 1), candidates("classifier")
    early.logits(batch)
    assert taken.pop() == ([],) and taken
    taken.clear()
    for _ in range(3):
        early.logits(batch)
    assert not taken


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stream_of_the_device_is_put_back():
    device = torch.device("cuda", 0)
    batch = {name: value.to(device) for name, value in candidates("classifier").items()}
    early = EarlyExit(Noisy(lambda x: torch.randn(1, device=device)).to(device), 1)
    state = torch.cuda.get_rng_state(device)
    with pytest.warns(UserWarning, match="draws random numbers"):
        early.logits(batch)
    early.logits(batch)
    assert torch.equal(torch.cuda.get_rng_state(device), state)


# What a forward leaves behind


class Experts(Classifier):
    """Collects losses beside its output, in containers that its layers share with it."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.latest, self.kinds = [], {}, set()
        for block in self.blocks:
            block.aux = self.aux

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            block.aux.append(x.square().mean())
            self.latest[number] = x
            self.kinds.add(number)
        return super().forward(x) + len(self.aux)


def test_what_a_forward_collects_would_be_found_by_the_loop(monkeypatch):
    model, batch = Experts().train(), candidates("classifier")
    with monkeypatch.context() as patch:
        patch.setattr(twin, "CONTAINERS", set())
        EarlyExit(model, 1).logits(batch)
        assert len(model.aux) == len(model.latest) == len(model.kinds) == 1, (
            "the loop adds them up"
        )
    model = Experts().train()
    kept = model.aux, model.latest, model.kinds
    right = cut("classifier", model, 1, batch)
    early = EarlyExit(model, 1)
    for _ in range(2):
        # Its layers still share one list with it, and every scoring begins with the live one of now.
        assert close(early.logits(batch), right + 1)
    assert kept == ([], {}, set())
    assert model.aux is kept[0] and model.latest is kept[1] and model.kinds is kept[2]
    model.aux.append(torch.zeros(()))  # in place
    assert close(early.logits(batch), right + 2) and len(model.aux) == 1
    model.aux = model.blocks[0].aux = []  # another object
    assert close(early.logits(batch), right + 1) and model.aux == []


def test_an_attribute_that_was_a_list_for_a_while_is_what_it_is_now():
    model, batch = classifier(), candidates("classifier")
    early, shown = EarlyExit(model, 1), []
    model.norm.register_forward_hook(lambda module, args, out: shown.append(module.mark))
    for model.norm.mark in (None, [1], None):
        early.logits(batch)
    assert shown == [None, [1], None]


def test_parameters_gathered_in_the_middle_of_a_forward_are_seen():
    model, batch = classifier().eval(), candidates("classifier")
    shard, full = torch.zeros_like(model.head.weight), model.head.weight.detach()
    right = cut("classifier", model, 1, batch)

    def hold(weight: Tensor) -> None:
        model.head._parameters["weight"] = nn.Parameter(weight)

    # As sharded models do: on the live modules, which is all that their hooks know.
    model.blocks[0].register_forward_hook(lambda module, args, out: hold(full))
    model.register_forward_hook(lambda module, args, out: hold(shard))
    hold(shard)
    for _ in range(2):
        assert close(EarlyExit(model, 1).logits(batch), right)
    assert not model.head.weight.any()


def test_hooks_that_capture_hidden_states_would_pile_up(monkeypatch):
    model, batch = bert(), inputs(candidates("bert"))
    model.config.output_hidden_states = True

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    with monkeypatch.context() as patch:
        switch_off_rebinding(patch)
        for _ in range(2):
            EarlyExit(model, 1)(**batch)
        assert hooks() > 0, "on the live modules, at every forward of the training loop"
    model = bert()
    model.config.output_hidden_states = True
    for _ in range(2):
        output = EarlyExit(model, 1)(**batch)
    assert hooks() == 0 and len(output.hidden_states) == 2


def test_a_cache_would_be_built_for_nothing(monkeypatch):
    model, batch = gpt2(), candidates("gpt2")
    caches = []
    found = twin.logits_of
    monkeypatch.setattr(
        twin, "logits_of", lambda output: caches.append(output.past_key_values) or found(output)
    )
    early = EarlyExit(model, 1)
    assert early(**inputs(batch)).past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    early.logits(batch)
    assert caches == [None]
    assert early(**inputs(batch), use_cache=False).past_key_values is None


class OneBuffer:
    """A loader that hands out the same tensors again and again, with new content."""

    def __init__(self) -> None:
        self.ids = torch.zeros(2, 6, dtype=torch.long)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        for number in range(4):
            self.ids.copy_(torch.arange(12).view(2, 6) + 12 * number)
            yield {"input_ids": self.ids, "labels": self.ids}


def test_a_reused_buffer_would_hold_the_last_draw_twice(monkeypatch):
    class First:
        def __call__(self, scores: Tensor, keep: int, pool: Any = None) -> Tensor:
            return torch.arange(keep)

    def kept() -> list[int]:
        loader = SiftingDataLoader.wrap(
            OneBuffer(), model=gpt2(), criterion="random", warmup_steps=0, selection=First()
        )
        return [int(batch["input_ids"][0, 0]) for batch in loader]

    with monkeypatch.context() as patch:
        patch.setattr(pools, "clone", lambda batch: batch)
        assert kept() == [12, 36], "the first of each pool was overwritten by the second"
    assert kept() == [0, 24]


# Scores


class Odd:
    """A criterion of a user's, with a value that is no number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, early: Predictions) -> Tensor:
        scores = torch.arange(early.samples).float()
        return scores.index_fill(0, torch.tensor([0, 2]), self.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_would_win(value):
    model, batch = bert(), candidates("bert")
    raw = Odd(value)(SimpleNamespace(samples=8))
    for naive in (raw.topk(4).indices.tolist(), TopK()(raw, 4).tolist()):
        assert ({0, 2} <= {*naive}) == (value != -torch.inf), "NaN and infinity come first"
    index, scores = Sifter(model, criterion=Odd(value)).winners(batch, batch["labels"], 4)[:2]
    assert index.tolist() == [4, 5, 6, 7]
    assert scores[[0, 2]].tolist() == [-torch.inf] * 2


@pytest.mark.parametrize("criterion", ["loss", "entropy", "random"])
def test_a_row_without_labels_would_win(criterion):
    model, batch = gpt2(), candidates("gpt2")
    with torch.no_grad():
        alone = model.eval()(**{name: value[3:4] for name, value in batch.items()}).loss
    assert alone.isnan(), "its mean loss is 0 / 0"
    assert 3 in torch.tensor([5.0, 4.0, 3.0, alone, 6.0]).topk(1).indices.tolist()
    sifter = Sifter(model.train(), criterion=criterion)
    for _ in range(4):
        index, scores = sifter.winners(batch, batch["labels"], 7)[:2]
        assert 3 not in index.tolist() and scores[3] == -torch.inf


def test_ties_would_be_broken_as_topk_likes():
    model, batch = bert(), candidates("bert")
    alike = {name: value[:1].expand(8, -1).clone() for name, value in batch.items()}
    sifter = Sifter(model)
    index, scores = sifter.winners(alike, alike["labels"], 4)[:2]
    assert len(scores.unique()) == 1
    assert scores.topk(4).indices.sort().values.tolist() != [0, 1, 2, 3]
    assert index.tolist() == [0, 1, 2, 3]


def test_the_live_modules_are_watched_once_in_each_mode(monkeypatch):
    model, batch = classifier(), candidates("classifier")
    watched = []
    wire = twin._tripwire
    monkeypatch.setattr(twin, "_tripwire", lambda *args: watched.append(1) or wire(*args))
    early = EarlyExit(model, 1)
    for _ in range(3):
        early.logits(batch), early.logits(batch)
        model.train(not model.training)
    assert len(watched) == 2


class Numbered(Classifier):
    """Keeps its layers in two lists and counts for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number in range(LAYERS):
            x = self.after[number](self.blocks[number](x))
        return self.head(x)


def test_a_layer_asked_for_by_number_is_told_from_an_id_beyond_the_embedding():
    with pytest.raises(ScoringError, match="asks for layers by number"):
        EarlyExit(Numbered(), 1).logits(candidates("classifier"))
    with pytest.raises(IndexError, match="out of range in self"):
        EarlyExit(bert(), 1).logits({"input_ids": torch.full((2, 4), VOCAB)})


def test_a_named_stack_that_holds_the_head_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    holder = nn.Module()
    holder.stack = model
    holder.forward = MethodType(lambda self, x: self.stack(x), holder)  # type: ignore[method-assign]
    batch = {"x": torch.randn(4, 4), "labels": torch.arange(4)}
    with pytest.raises(
        ScoringError, match="predicts 8 classes, as a whole 5: its head is cut off"
    ):
        Sifter(holder, exit_layer="stack:2").score(batch)
    assert Sifter(holder, exit_layer="stack:3").score(batch).shape == (4,)
