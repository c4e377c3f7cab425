"""The compiled twin: pytest tests/test_compiled.py"""

from __future__ import annotations

import gc
import random
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import families
import numpy as np
import pytest
import torch
from models import FAMILIES, LAYERS, VOCAB, bert, candidates, classifier, scaled, trace
from torch import Tensor, nn

from siftloader import EarlyExit, Sifter, SiftingDataLoader, compiled, twin
from siftloader.compiled import GRAPHS, SHAPES, SIGHTS, Compiled
from siftloader.scores import token_loss
from siftloader.targets import Targets


# Of torch's own, while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """All that torch.compile does but for generating code, which takes seconds; the modes asked for."""
    modes: list[str | None] = []

    def run_as_it_is(graph: torch.fx.GraphModule, inputs: list[Any], mode: str | None) -> Any:
        modes.append(mode)
        return graph.forward

    monkeypatch.setattr(compiled, "inductor", run_as_it_is)
    yield modes
    torch._dynamo.reset()


class Trunk(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.shift = what, 0.0
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.shift
        if self.what == "a break" and hidden.sum().item() > 1e9:
            return hidden
        if self.what == "chance":
            hidden = hidden + torch.rand(())
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


class Small(nn.Module):
    """Traced in a moment; in its trunk something may go wrong. [P, T] ids to [P, T, V] logits."""

    def __init__(self, what: str = "", trunk: bool = True) -> None:
        super().__init__()
        self.trunk = Trunk(what)
        self.called = trunk
        self.head = nn.Linear(16, VOCAB)
        scaled(self, 3.0)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        if self.called:
            return self.head(self.trunk(ids))
        hidden = self.trunk.embed(ids)
        for layer in self.trunk.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden)


IDS = torch.randint(5, VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))
POOL = {"ids": IDS, "labels": IDS}
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def scored(early: EarlyExit, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    targets = Targets.of(labels, torch.device("cpu"), shift=False)
    with torch.no_grad():
        return torch.cat(list(early.logits_at(batch, targets)))


def cached(function: Any) -> int:
    """How many graphs dynamo keeps for a function's code."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return len(_debug_get_cache_entry_list(function.__code__))


def graphs(early: EarlyExit) -> list[int]:
    return [part._compiled.graphs for part in early._twin._quick]


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "llama"))]
)
def test_fifty_pools_of_one_shape_are_one_graph_and_score_alike(family, quick):
    model, batch = FAMILIES[family](), candidates(family)
    early, plain = EarlyExit(model, 2, compile=True), EarlyExit(model, 2)
    for step in range(50):
        assert torch.equal(scored(early, batch), scored(plain, batch)), f"pool {step}"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.999)  # the weights of this moment
    assert graphs(early) == [1] and quick == [None]


def test_weights_that_are_replaced_are_read_and_resized_ones_cost_one_more_graph(quick):
    torch.manual_seed(0)
    model = Small()
    early, plain = EarlyExit(model, 1, compile=True), EarlyExit(model, 1)
    for _ in range(SIGHTS):
        before = scored(early, POOL)
    other = {name: value + 0.05 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    now = scored(early, POOL)
    assert torch.equal(now, scored(plain, POOL)) and (now - before).abs().max() > 1e-3
    assert len(quick) == 1
    model.trunk.embed = nn.Embedding(
        VOCAB + 3, 16
    )  # a module anew, and a weight within its module
    for _ in range(2 * SIGHTS):
        assert torch.equal(scored(early, POOL), scored(plain, POOL))
    assert len(quick) == 2
    model.trunk.embed.weight.data = torch.randn(VOCAB + 5, 16)
    for _ in range(2 * SIGHTS):
        assert torch.equal(scored(early, POOL), scored(plain, POOL))
    assert len(quick) == 3


def test_a_loop_that_compiles_its_model_has_the_graphs_it_would_have_without_us(quick):
    def graphs_of_a_loop(sift: bool) -> list[int]:
        torch._dynamo.reset()
        made: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            made.append(len(graph.graph.nodes))
            return graph.forward

        torch.manual_seed(0)
        model = Small()
        loop = torch.compile(model, backend=backend, dynamic=False)
        # Parts that are compiled by themselves share their class, hence their code, with the shells.
        trunk = torch.compile(model.trunk, backend=backend, dynamic=False)
        early = EarlyExit(loop, 1, compile=True)
        for step, length in enumerate([12, 12, 12, 12, 8, 8, 8, 8, 12, 12]):
            if sift:
                scored(early, {name: value[:, :length] for name, value in POOL.items()})
            loop(IDS[:4, :length]).sum().backward()
            trunk(IDS[:2, :length])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.001)
            if step == 6:
                model.eval()
        assert not sift or graphs(early) == [2]
        return [
            *made,
            *map(cached, (Small.forward, Trunk.forward, nn.Linear.forward, nn.Module.__call__)),
        ]

    with_us = graphs_of_a_loop(True)
    assert with_us == graphs_of_a_loop(False) and with_us[-4:-2] == [2, 2]


@pytest.mark.parametrize("where", ["class", "method", "object"])
def test_a_forward_that_its_author_compiled_has_no_graph_of_ours(where, quick):
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made.append(len(graph.graph.nodes))
        return graph.forward

    class Quick(Small):
        pass

    torch._dynamo.reset()
    if where == "class":
        Quick.forward = torch.compile(Small.forward, backend=backend)
    model = Quick()
    if where == "method":
        model.forward = torch.compile(model.forward, backend=backend)
    elif where == "object":
        model.forward = MethodType(torch.compile(Small.forward, backend=backend), model)
    model(IDS).sum().backward()
    plain = Small()
    plain.load_state_dict(model.state_dict())
    expected = scored(EarlyExit(plain, 1), POOL)
    for mode in (False, True):
        early = EarlyExit(model, 1, compile=mode)
        with torch.no_grad():
            early.values_at(POOL, Targets.of(IDS, torch.device("cpu"), shift=False), (token_loss,))
        assert torch.equal(scored(early, POOL), expected)
    assert len(made) == 1


def test_compiling_leaves_no_trace(quick, monkeypatch):
    def draws_while_it_compiles(graph: torch.fx.GraphModule, inputs: Any, mode: Any) -> Any:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002 - an autotuner's
        return graph.forward

    monkeypatch.setattr(compiled, "inductor", draws_while_it_compiles)
    model, batch = Small(), POOL
    model(IDS).sum().backward()
    tensors = [*model.parameters(), *model.buffers()]
    model.trunk.embed.weight.mark = "the user's own"
    before = trace(model), [dict(each.__dict__) for each in tensors]
    early = EarlyExit(model, 1, compile=True)
    for _ in range(SIGHTS + 2):
        scored(early, batch)
    assert graphs(early) == [1]
    assert (trace(model), [dict(each.__dict__) for each in tensors]) == before


def test_the_end_of_an_epoch_costs_one_graph_at_most_and_many_lengths_a_few(quick):
    model, batch = Small(), POOL
    early, plain = EarlyExit(model, 1, compile=True), EarlyExit(model, 1)
    tail = {name: value[:4] for name, value in batch.items()}
    for epoch in range(6):
        for pool in (batch, batch, batch, tail):
            assert torch.equal(scored(early, pool), scored(plain, pool))
        assert graphs(early) == [1 if epoch < SIGHTS - 1 else 2]
    with pytest.warns(UserWarning, match=f"more than {SHAPES} shapes.*pad them") as told:
        for length in [*range(3, 12)] * SIGHTS:
            pool = {name: value[:, :length] for name, value in batch.items()}
            assert torch.equal(scored(early, pool), scored(plain, pool))
    assert graphs(early) == [SHAPES] and len(told) == 1


def test_what_changes_for_ever_is_given_up(quick, monkeypatch):
    model, batch = Small(), POOL
    early, plain = EarlyExit(model, 1, compile=True), EarlyExit(model, 1)
    monkeypatch.setattr(compiled, "GRAPHS", 3)
    with pytest.warns(UserWarning, match="something in it changes") as told:
        for step in range(12):
            # A number that the graph was built upon.
            model.trunk.shift = float(step)
            assert torch.equal(scored(early, batch), scored(plain, batch))
    assert graphs(early) == [4] and len(told) == 1 < GRAPHS


def test_autocast_has_a_graph_of_its_own_and_gradients_none(quick):
    model, batch = Small(), POOL
    early, plain = EarlyExit(model, 1, compile=True), EarlyExit(model, 1)
    for _ in range(SIGHTS + 1):
        scored(early, batch)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            assert torch.equal(scored(early, batch), scored(plain, batch))
    assert graphs(early) == [2]
    targets = Targets.of(batch["labels"], torch.device("cpu"), shift=False)
    list(early.logits_at(batch, targets))
    assert graphs(early) == [2]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("a break", "Trunk is scored without: .*data-dependent"),
        ("a backend that fails", "no compiler here"),
        ("a backend that lies", "it returned something else"),
        ("chance", "draws random numbers"),
    ],
)
def test_what_cannot_be_compiled_is_scored_without_and_said_once(what, reason, quick, monkeypatch):
    def fails(*args: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long story")

    def lies(graph: torch.fx.GraphModule, *args: Any) -> Any:
        return lambda *inputs: [each * 1.5 for each in graph.forward(*inputs)]

    if what.startswith("a backend"):
        monkeypatch.setattr(compiled, "inductor", lies if what.endswith("lies") else fails)
    torch.manual_seed(0)
    model = Small(what)
    early, plain = EarlyExit(model, 1, compile=True), EarlyExit(model, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(SIGHTS + 3):
            torch.manual_seed(1)
            found = scored(early, POOL)
            torch.manual_seed(1)
            assert torch.equal(found, scored(plain, POOL))
    said = [str(each.message) for each in told if "compile:" in str(each.message)]
    assert len(said) == 1 and re.search(reason, said[0]), said
    assert "long story" not in said[0]


def test_layers_that_a_forward_calls_itself_are_compiled_one_by_one(quick):
    torch.manual_seed(0)
    model = Small(trunk=False)
    early, plain = EarlyExit(model, 2, compile=True), EarlyExit(model, 2)
    for _ in range(SIGHTS + 2):
        assert torch.equal(scored(early, POOL), scored(plain, POOL))
    assert graphs(early) == [1, 1]


def test_the_first_call_of_each_kind_is_watched_without_a_graph(quick):
    model, batch = Small(), POOL
    early = EarlyExit(model, 1, compile=True)
    for _ in range(SIGHTS):
        scored(early, batch)
    ran: list[str] = []
    (part,) = early._twin._quick
    part._compiled._forward = lambda *args, **kwargs: pytest.fail("not asked for")
    kept = {kind: lambda *a, run=run, **k: ran.append("graph") or run(*a, **k)
            for kind, run in part._compiled._graphs.items()}  # fmt: skip
    part._compiled._graphs = kept
    scored(early, batch)
    assert ran == ["graph"]
    model.eval()  # another kind
    scored(early, batch)
    assert ran == ["graph"]
    scored(early, batch)
    assert ran == ["graph", "graph"]


def test_a_model_without_a_head_to_capture_has_its_layers_compiled(quick):
    model, batch = classifier(), candidates("classifier")
    early, plain = EarlyExit(model, 2, compile=True), EarlyExit(model, 2)
    for _ in range(SIGHTS + 2):
        assert torch.equal(scored(early, batch), scored(plain, batch))
    assert graphs(early) == [1, 1]


def test_a_model_whose_loss_is_listened_to_has_its_layers_compiled(quick):
    class Told(Small):
        def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
            logits = super().forward(ids)
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    model = Told(trunk=False)
    sifters = [
        Sifter(model, exit_layer=2, compile=each, labels="targets") for each in (True, False)
    ]
    for _ in range(twin.UNCAPTURED + SIGHTS + 2):
        quickly, slowly = (each.score({"ids": IDS, "targets": IDS}) for each in sifters)
        assert torch.equal(quickly, slowly)
    early = sifters[0].scorer._early
    assert graphs(early) == [1, 1] and early.twin is not None


def test_a_model_without_layers_is_told(quick):
    model = nn.Linear(8, 10)
    early = EarlyExit(model, "full", compile=True)
    with pytest.warns(UserWarning, match="no stack of layers was found in Linear") as told:
        for _ in range(SIGHTS + 2):
            scored(early, {"input": X, "labels": torch.zeros(6).long()})
    assert len(told) == 1 and early.twin is not None


def test_with_a_default_device_the_model_is_compiled_too(quick):
    early = EarlyExit(Small(), 1, compile=True)
    with torch.device("cpu"):
        for _ in range(SIGHTS):
            scored(early, POOL)
    assert graphs(early) == [1]


def test_what_several_layers_say_is_said_once(quick, monkeypatch):
    def fails(*args: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "inductor", fails)
    early = EarlyExit(Small(trunk=False), 3, compile=True)
    with pytest.warns(UserWarning, match="Linear is scored without.*no compiler here") as told:
        for _ in range(SIGHTS + 2):
            scored(early, POOL)
    assert len(told) == 1


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_mode_is_handed_on(mode, quick):
    early = EarlyExit(Small(), 1, compile=mode)
    for _ in range(SIGHTS):
        scored(early, POOL)
    assert quick == [mode]


def test_a_mode_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"one of torch.compile's modes.*got 'fast'"):
        EarlyExit(Small(), 1, compile="fast")


def test_listeners_hear_the_forward_itself():
    ran = []
    quick = Compiled(lambda x: x + 1, True, lambda run: (run(), False), lambda: iter(()), set())
    quick._first = lambda *args: ran.append("compiled") or args[1][0] + 1
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        for _ in range(SIGHTS + 2):
            with FlopCounterMode(display=False):
                quick(torch.zeros(2))
        assert not ran
        for _ in range(SIGHTS):
            quick(torch.zeros(2))
    assert ran == ["compiled"]


def test_lengths_that_never_repeat_are_not_remembered_for_ever():
    quick = Compiled(lambda x: x, True, lambda run: (run(), False), lambda: iter(()), set())
    with torch.no_grad():
        for length in range(1000):
            quick(torch.zeros(length))
    assert len(quick._sights) <= compiled.COUNTED


def test_beside_the_loop_nothing_is_compiled(quick):
    model = Small()
    early, plain = EarlyExit(model, 1, compile=True), EarlyExit(model, 1)
    scored(early, POOL)
    assert early.twin is None, "the loop is to score until it is compiled"
    with ThreadPoolExecutor(1) as beside:
        for _ in range(2 * SIGHTS):
            assert torch.equal(beside.submit(scored, early, POOL).result(), scored(plain, POOL))
        assert graphs(early) == [0]
        for _ in range(SIGHTS):
            scored(early, POOL)
        assert graphs(early) == [1] and early.twin is not None
        assert torch.equal(beside.submit(scored, early, POOL).result(), scored(plain, POOL))
        assert not early._twin._quick[0]._compiled._eager
        model.trunk.shift = 1.0
        with pytest.warns(UserWarning, match="beside the training step nothing can be compiled"):
            found = beside.submit(scored, early, POOL).result()
    assert torch.equal(found, scored(plain, POOL)) and quick == [None]


def test_twins_that_are_replaced_are_forgotten(quick):
    model = Small()
    early, held = EarlyExit(model, 1, compile=True), []
    for _ in range(3):
        for _ in range(SIGHTS + 1):
            scored(early, POOL)
        assert graphs(early) == [1]
        held.append((weakref.ref(early._twin), weakref.ref(model.trunk.layers[0].weight)))
        model.trunk.layers[0] = nn.Linear(16, 16)
    scored(early, POOL)
    gc.collect()
    assert [each() for pair in held for each in pair] == [None] * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_compiled_twin_of_any_family_scores_alike(name, quick):
    family = families.FAMILIES[name]
    model, batch, layer = family.model(), family.batch(), family.exit(2)
    sifters = [
        Sifter(model, exit_layer=layer, score_fn=family.loss, compile=each)
        for each in (True, False)
    ]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(twin.UNCAPTURED + SIGHTS):
            quickly, slowly = (each.score(batch) for each in sifters)
            assert torch.equal(quickly, slowly)
    said = [str(each.message) for each in told if "compile:" in str(each.message)]
    # How many rows an expert sees is a number that a graph would depend on.
    experts = name in ("mixtral", "qwen3-moe")
    assert len(said) == experts and all("data-dependent" in each for each in said)
    assert experts or all(1 <= each <= 2 for each in graphs(sifters[0].scorer._early))


@pytest.mark.slow
def test_inductor_scores_like_the_eager_twin():
    model, batch = bert(), candidates("bert")
    early, plain = EarlyExit(model, 1, compile=True), EarlyExit(model, 1)
    for _ in range(SIGHTS + 2):
        found, expected = scored(early, batch), scored(plain, batch)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs(early) == [1]
    torch._dynamo.reset()


def test_held_its_buffers_are_those_of_now_in_the_same_memory():
    model, batch = bert(), candidates("bert")
    early = EarlyExit(model, 1)
    scored(early, batch)
    addresses = set()
    for step in range(4):
        with torch.no_grad():
            model.bert.embeddings.token_type_ids.fill_(step % 2)
        early.hold()
        found = scored(early, batch)
        model.bert.embeddings.token_type_ids.fill_(7)  # none of the two there are
        assert torch.equal(scored(early, batch), found)
        shell = early._twin.shell_of(model.bert.embeddings)
        addresses.add(shell.token_type_ids.data_ptr())
        assert int(shell.token_type_ids.max()) == step % 2
        early.release()
    assert len(addresses) == 1


def test_overlapped_a_compiled_twin_keeps_what_an_eager_one_keeps(quick, monkeypatch):
    threads = []

    def tells_its_thread(graph: torch.fx.GraphModule, inputs: Any, mode: Any) -> Any:
        return lambda *given: threads.append(threading.get_ident()) or graph.forward(*given)

    monkeypatch.setattr(compiled, "inductor", tells_its_thread)

    def kept(compile: bool) -> list[Tensor]:  # noqa: A002
        torch.manual_seed(0)
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = [
            {"ids": torch.randint(5, VOCAB, (12,), generator=torch.Generator().manual_seed(each))}
            for each in range(96)
        ]
        loader = SiftingDataLoader(
            [row | {"labels": row["ids"]} for row in rows],
            batch_size=4,
            model=model,
            warmup_steps=0,
            overlap=True,
            compile=compile,
            shift_labels=False,
        )
        found = []
        for batch in loader:
            nn.functional.cross_entropy(
                model(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(batch["ids"])
        if compile:
            assert graphs(loader._sifter.scorer._early) == [1]
        return found

    assert all(map(torch.equal, kept(True), kept(False)))
    here = threading.get_ident()
    assert threads[0] == here and len(threads) > 4 and here not in threads[1:]


def test_weights_that_lie_on_several_ranks_are_scored_without_and_told(quick, monkeypatch):
    monkeypatch.setattr(twin, "is_spread", lambda module: True)
    early = EarlyExit(Small(), 1, compile=True)
    with pytest.warns(UserWarning, match="compile: the weights lie on several ranks") as told:
        for _ in range(SIGHTS + 2):
            scored(early, POOL)
    assert len(told) == 1 and early.twin is not None and not quick


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [True, "reduce-overhead"])  # the latter by CUDA graphs
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_on_a_gpu_it_scores_like_the_eager_twin_and_waits_for_nothing(family, mode):
    model, batch = FAMILIES[family]().cuda(), candidates(family)
    targets = Targets.of(batch["labels"], torch.device("cuda"), shift=False)
    batch = {name: each.cuda() for name, each in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    early, plain = EarlyExit(model, 2, compile=mode), EarlyExit(model, 2)

    def logits(by: EarlyExit) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return torch.cat(list(by.logits_at(batch, targets))).float()

    for step in range(SIGHTS + 10):
        expected = logits(plain)
        if step > SIGHTS + 2:  # a CUDA graph is recorded by the run after that which is compared
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            found = logits(early)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert graphs(early) == [1] and not early._twin._quick[0]._compiled._eager
    torch._dynamo.reset()
