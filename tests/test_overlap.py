from __future__ import annotations

import copy
import gc
import json
import signal
import threading
import warnings
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.optim import optimizer as torch_optimizer

from siftloader import EarlyExit, ScoringError, SiftingDataLoader, StateError
from siftloader.overlap import _GONE, Overlap, _Pending
from siftloader.scorer import Scorer
from siftloader.twin import Twin


CPU = torch.device("cpu")
WIDTH, CLASSES = 8, 5


class Layer(nn.Linear):
    """In another thread than the loop's it waits, half-way through the model, for weights to be written."""

    def forward(self, x: Tensor) -> Tensor:
        if (gate := getattr(self, "gate", None)) is not None:
            gate()
        return super().forward(x).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Layer(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def early(self, x: Tensor) -> Tensor:
        return self.head(self.layers[1](self.layers[0](x)))


class Overwrite(torch.optim.Optimizer):
    """Writes every weight anew, whatever the gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(torch.randn(parameter.shape, generator=self.generator))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(row)
        x = torch.randn(WIDTH, generator=generator)
        return {"x": x, "labels": torch.tensor(row % CLASSES), "id": torch.tensor(row)}


def reference(weights: dict[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
    net = Net()
    net.load_state_dict(weights)
    x = torch.stack([rows[int(row)]["x"] for row in ids])
    labels = torch.tensor([int(row) % CLASSES for row in ids])
    with torch.no_grad():
        return functional.cross_entropy(net.early(x), labels, reduction="none")


def make(rows: Rows, model: nn.Module, **options: Any) -> SiftingDataLoader:
    options = {"exit_layer": 2, "warmup_steps": 0, "overlap": True, **options}
    return SiftingDataLoader(rows, 4, model=model, **options)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Race:
    """A loop that writes all weights as soon as it may, beside a scoring thread that dawdles."""

    def __init__(self, steps: int, patience: float = 0.003, **options: Any) -> None:
        self.steps, self.rows, self.model = steps, Rows(8 * steps), Net()
        self.reached, self.written = threading.Event(), threading.Event()
        loop = threading.current_thread()

        def gate() -> None:
            if threading.current_thread() is not loop:
                self.reached.set()
                self.written.wait(patience)

        self.model.layers[1].gate = gate
        self.pools: list[tuple[Tensor, Tensor]] = []
        self.handed: list[dict[str, Tensor]] = []  # the weights as each batch left
        self.loader = make(self.rows, self.model, on_select=self.selected, **options)

    def selected(self, ids: Tensor, scores: Tensor, kept: Tensor) -> None:
        self.pools.append((ids, scores))
        self.reached.clear()  # before the next pool is begun
        self.written.clear()

    def stale(self) -> list[bool]:
        """Whether the scores of each pool are those of the weights one batch earlier, to the bit.

        Not the first two: before the loop's first forward its precision is not known.
        """
        return [
            torch.equal(scores, reference(weights, ids, self.rows))
            for weights, (ids, scores) in zip(self.handed[1:], self.pools[2:], strict=False)
        ]

    def run(self, each: int = 1) -> None:
        optimizer = Overwrite(self.model)
        for number, batch in enumerate(self.loader):
            self.handed.append(weights_of(self.model))
            functional.cross_entropy(self.model(batch["x"]), batch["labels"]).backward()
            if 0 < number < self.steps - 1:
                assert self.reached.wait(20)  # the scoring is half-way through the model
            if number % each == each - 1:
                optimizer.step()
            self.written.set()


@pytest.mark.parametrize("each, options", [(1, {}), (3, {}), (2, {"scorer_device": "cpu"})])
def test_scores_are_those_of_the_weights_one_step_earlier(
    each: int, options: dict[str, Any]
) -> None:
    steps = 200 // each
    race = Race(steps, **options)
    race.run(each)
    assert len(race.pools) == steps and all(race.stale())
    # It would show: no other weights of the run give these scores.
    ids, scores = race.pools[10]
    others = [race.handed[number] for number in (8, 10) if each == 1]
    assert all(not torch.equal(scores, reference(w, ids, race.rows)) for w in others)


@pytest.mark.filterwarnings("ignore:the model's weights were written")
def test_without_the_wait_of_the_optimizer_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Overlap, "_listen", lambda self: None)
    race = Race(20)
    race.run()
    assert not any(race.stale())


def test_a_half_written_model_is_what_the_wait_and_the_versions_prevent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Overlap, "_listen", lambda self: None)
    monkeypatch.setattr("siftloader.overlap._versions", lambda weights: [])
    race = Race(20, patience=10)
    race.run()
    later = zip(race.handed[2:], race.pools[2:], strict=True)
    fresh = [torch.equal(s, reference(w, ids, race.rows)) for w, (ids, s) in later]
    assert not any(race.stale()) and not any(fresh)  # neither the old weights nor the new ones


def test_optimizers_in_backward_wait_too() -> None:
    race = Race(60)
    optimizers = {p: torch.optim.SGD([p], 0.5) for p in race.model.parameters()}

    def stepped(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in race.model.parameters():
        parameter.register_post_accumulate_grad_hook(stepped)
    for batch in race.loader:
        race.handed.append(weights_of(race.model))
        functional.cross_entropy(race.model(batch["x"]), batch["labels"]).backward()
        race.written.set()
    assert all(race.stale())


def test_an_optimizer_of_another_model_does_not_wait() -> None:
    model, other, go = Net(), Net(), threading.Event()
    overlap = Overlap(lambda: model)
    overlap.start(lambda _: go.wait(20), CPU)
    Overwrite(other).step()  # would hang
    assert overlap.runs and not go.is_set()
    go.set()
    assert overlap.result() is True and not overlap.runs
    overlap.close()


def test_an_optimizer_waits_until_the_weights_are_read_and_no_longer() -> None:
    model, steps, go = Net(), [], threading.Event()
    overlap = Overlap(lambda: model)

    def job(has_read: Any) -> str:
        steps.append("read")
        has_read()
        assert go.wait(20)
        return "scores"

    overlap.start(job, CPU)
    Overwrite(model).step()
    steps.append("written")
    go.set()
    assert overlap.result() == "scores" and steps == ["read", "written"]
    overlap.close()


def test_a_copy_lets_the_optimizer_write_while_it_is_scored_by() -> None:
    """The weights are read when the copy is made; only half-way through the scoring the loop goes on to write."""
    race = Race(20, patience=20, scorer_device="cpu")  # without that it would wait 20 s a step
    race.run()
    assert len(race.pools) == 20 and all(race.stale())


def test_what_goes_wrong_in_a_job_is_raised_where_its_result_is_wanted() -> None:
    model = Net()
    overlap = Overlap(lambda: model)

    def job(_: Any) -> None:
        raise KeyError("deep in a model")

    overlap.start(job, CPU)
    Overwrite(model).step()
    with pytest.raises(KeyError, match="deep in a model"):
        overlap.result()
    overlap.close()


def listening() -> int:
    gc.collect()  # loaders of other tests
    while _GONE:
        _GONE.pop().remove()
    return len(torch_optimizer._global_optimizer_pre_hooks)


def test_closing_the_loader_takes_the_hook_off() -> None:
    before = listening()
    race = Race(4)
    batches = drawn(race.loader, race.model)
    next(batches)
    next(batches)
    assert listening() == before + 1
    batches.close()
    race.loader.close()
    assert listening() == before
    assert len(list(drawn(race.loader, race.model))) == 4  # and goes on when it is asked to
    assert listening() == before  # an epoch's end takes it off, too


def test_a_loader_that_is_dropped_leaves_a_hook_that_hears_nothing_and_is_swept_away() -> None:
    before = listening()
    race = Race(4)
    batches = drawn(race.loader, race.model)
    next(batches)
    next(batches)
    loader = weakref.ref(race.loader)
    del race, batches
    while loader() is not None:  # the job under way holds it
        gc.collect()
    Overwrite(Net()).step()
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before + 1
    again = Race(4)
    batches = drawn(again.loader, again.model)
    next(batches)
    next(batches)
    assert listening() == before + 1
    again.loader.close()


@pytest.mark.filterwarnings("ignore:the epoch ended inside", "ignore:.*eval mode")
@pytest.mark.parametrize("pool", ["merge", "split"])
@settings(max_examples=15)
@given(rows=st.integers(16, 70), batch=st.sampled_from([2, 4]), data=st.data())
def test_with_weights_that_stand_still_nothing_changes(
    pool: str, rows: int, batch: int, data: st.DataObject
) -> None:
    """Whatever the loop does in between: evaluate, break off, end the warm-up or begin the cool-down."""
    options = {
        "pool": pool,
        "warmup_steps": data.draw(st.integers(0, 3), "warm-up"),
        "cooldown_steps": data.draw(st.integers(0, 3), "cool-down"),
        "total_steps": 9,
    }
    size = batch if pool == "merge" else 2 * batch
    breaks = data.draw(st.integers(0, 9), "breaks after")
    evaluates = data.draw(st.lists(st.integers(0, 9), max_size=2), "evaluates at")
    seen = []
    for overlap in (False, True):
        model = Net().train()
        loader = SiftingDataLoader(
            Rows(rows), size, model=model, exit_layer=2, overlap=overlap, **options
        )
        handed: list[Any] = []
        for epoch in range(2):
            for number, each in enumerate(loader):
                handed.append((each["id"].tolist(), json.loads(json.dumps(loader.state_dict()))))
                model.train(number not in evaluates)
                if epoch == 0 and number == breaks:
                    break
            model.train()
        handed.append(loader.stats)
        loader.close()
        seen.append(handed)
    for one, other in zip(*seen, strict=True):
        if isinstance(one, tuple):
            for state in (one[1], other[1]):
                state["stats"].pop("seconds_scoring"), state["stats"].pop("seconds_auditing")
            other[1]["ahead"] = None
        else:
            for stats in (one, other):
                stats.pop("seconds_scoring"), stats.pop("seconds_auditing")
        assert one == other


def drawn(loader: SiftingDataLoader, model: nn.Module) -> Generator[dict[str, Tensor], None, None]:
    """As by a loop that trains, so that its precision is seen."""
    for batch in loader:
        model(batch["x"])
        yield batch


def train(
    loader: SiftingDataLoader, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[list[int]]:
    for batch in loader:
        functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield batch["id"].tolist()


@pytest.mark.parametrize("at", [1, 2, 5, 11])
def test_a_run_that_is_taken_up_again_keeps_what_the_unbroken_one_keeps(at: int) -> None:
    rows = Rows(8 * 12)
    whole, model = [], Net()
    optimizer = torch.optim.SGD(model.parameters(), 3.0)
    pools: list[Tensor] = []
    loader = make(rows, model, on_select=lambda i, s, k: pools.append(s))
    for number, kept in enumerate(train(loader, model, optimizer), 1):
        whole.append(kept)
        if number == at:
            saved = json.loads(json.dumps(loader.state_dict())), copy.deepcopy(model.state_dict())
    assert (saved[0]["ahead"] is None) == (at == 1)
    again, resumed = Net(), []
    again.load_state_dict(saved[1])
    late: list[Tensor] = []
    loader = make(rows, again, on_select=lambda i, s, k: late.append(s))
    loader.load_state_dict(saved[0])
    assert (
        loader.state_dict()["ahead"] == saved[0]["ahead"]
    )  # saved again before anything was drawn
    resumed = list(train(loader, again, torch.optim.SGD(again.parameters(), 3.0)))
    assert resumed == whole[at:] and all(map(torch.equal, late, pools[at:]))
    if at == 1:
        return
    # It would show: with the weights of then that pool scores otherwise.
    fresh = make(rows, again)
    again.load_state_dict(saved[1])
    fresh.load_state_dict({**saved[0], "ahead": None})
    assert not torch.equal(pools[at], scores_of_next(fresh))


def scores_of_next(loader: SiftingDataLoader) -> Tensor:
    next(iter(loader))
    scores = loader._sifter.counts._scores
    assert scores is not None
    loader.close()
    return scores


def test_a_state_of_before_overlapping_loads_and_one_with_scores_loads_without() -> None:
    rows, model = Rows(64), Net()
    loader = make(rows, model)
    batches = drawn(loader, model)
    next(batches)
    next(batches)
    state = loader.state_dict()
    older = {name: value for name, value in state.items() if name != "ahead"} | {"version": 2}
    make(rows, model).load_state_dict(older)
    assert state["ahead"] is not None
    plain = make(rows, model, overlap=False)
    plain.load_state_dict(state)
    assert plain.state_dict()["ahead"] is None
    loader.close()


def test_weights_swapped_for_an_evaluation_are_not_scored() -> None:
    rows, model = Rows(8 * 6), Net()
    pools: list[tuple[Tensor, Tensor]] = []
    loader = make(rows, model, on_select=lambda i, s, k: pools.append((i, s)))
    batches = drawn(loader, model)
    next(batches)
    next(batches)
    own = weights_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.load_state_dict(own)
    with pytest.warns(UserWarning, match="written while they were read for scoring"):
        next(batches)
    ids, scores = pools[2]
    assert torch.equal(scores, reference(own, ids, rows))
    next(batches)  # told once
    loader.close()


class Broken(Rows):
    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if row == 20:
            raise OSError("a broken disk")
        return super().__getitem__(row)


def test_what_cannot_be_read_ahead_fails_when_its_batch_is_due() -> None:
    model = Net()
    loader = make(Broken(64), model)
    batches = drawn(loader, model)
    next(batches)
    next(batches)  # while it leaves, row 20 is looked at
    with pytest.raises(OSError, match="a broken disk"):
        next(batches)
    loader.close()


def test_what_cannot_be_scored_ahead_fails_when_its_batch_is_due() -> None:
    race = Race(6)
    loop, fails = threading.current_thread(), threading.Event()

    def gate() -> None:
        if fails.is_set() and threading.current_thread() is not loop:
            raise RuntimeError("out of memory, say")

    race.model.layers[1].gate = gate
    batches = drawn(race.loader, race.model)
    next(batches)
    fails.set()
    next(batches)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        next(batches)
    race.loader.close()


def test_what_learns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exit_head and Predicted cannot learn"):
        make(Rows(64), Net(), exit_head="probe")


def test_a_model_that_draws_random_numbers_is_scored_in_turn() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0 * torch.rand(1))

    rows, model = Rows(8 * 6), Noisy()
    threads: set[str] = set()
    model.layers[0].gate = lambda: threads.add(threading.current_thread().name)
    with pytest.warns(UserWarning, match="draws random numbers"):
        assert len(list(make(rows, model))) == 6
    assert threads == {"MainThread"}


def test_autocast_of_the_loop_holds_in_the_thread_too() -> None:
    seen = {}
    for overlap in (False, True):
        model, scores = Net(), []
        loader = make(
            Rows(8 * 5), model, overlap=overlap, on_select=lambda i, s, k, to=scores: to.append(s)
        )
        with torch.autocast("cpu", torch.bfloat16):
            for batch in loader:
                model(batch["x"])
        seen[overlap] = scores
    assert all(map(torch.equal, seen[False], seen[True]))


def test_the_gradients_of_a_step_are_those_without() -> None:
    """Scoring in another thread leaves no cast, hook, flag or buffer to the step beside it."""
    found = []
    for overlap in (False, True):
        model = Net()
        loader = make(Rows(8 * 5), model, overlap=overlap)
        with torch.autocast("cpu", torch.bfloat16):
            for batch in loader:
                functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_model_that_lies_on_several_ranks_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        refuse_sharded(fully_shard)
    finally:
        dist.destroy_process_group()


def refuse_sharded(fully_shard: Any) -> None:
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ScoringError, match="weights lie on several ranks"):
        next(iter(make(Rows(64), model)))


def rank_of_two(rank: int, folder: str, scope: Literal["rank", "global"]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    model, rows = Net(), Rows(96)
    batches = [
        torch.utils.data.default_collate([rows[16 * number + 8 * rank + row] for row in range(8)])
        for number in range(6 - rank)  # the other rank has one more
    ]
    handed: list[tuple[dict[str, Tensor], list[int]]] = []
    pools: list[tuple[Tensor, Tensor]] = []
    loader = SiftingDataLoader.wrap(
        batches,
        model=model,
        sharded=True,
        exit_layer=2,
        warmup_steps=0,
        pool="split",
        overlap=True,
        scope=scope,
        on_select=lambda ids, scores, kept: pools.append((ids, scores)),
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 3.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the epoch ends here because another rank")
        for batch in loader:
            handed.append((weights_of(model), batch["id"].tolist()))
            functional.cross_entropy(parallel(batch["x"]), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(handed) == 5 and not listening()
    for (weights, _), (ids, scores) in zip(handed[1:], pools[2:], strict=False):
        assert torch.equal(scores, reference(weights, ids, rows))
    own = [kept for _, kept in handed], [(s.tolist(), i.tolist()) for i, s in pools]
    of_ranks: list[Any] = [None, None]
    dist.all_gather_object(of_ranks, own)
    for step in range(5) if scope == "global" else ():
        pool = [pair for _, each in of_ranks for pair in zip(*each[step], strict=True)]
        winners = {row for kept, _ in of_ranks for row in kept[step]}
        assert {row for _, row in sorted(pool)[-8:]} == winners
    dist.destroy_process_group()


@pytest.mark.parametrize("scope", ["rank", "global"])
def test_two_ranks_overlap_and_end_together(scope: str, tmp_path: Path) -> None:
    on_ranks(rank_of_two, str(tmp_path), scope)


# Interrupts, and what fails at the edges


@contextmanager
def ctrl_c(after: float = 0.2) -> Iterator[None]:
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(after, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    timer.join()


def test_a_job_stays_under_way_where_the_wait_for_its_result_is_interrupted() -> None:
    model, go = Net(), threading.Event()
    overlap = Overlap(lambda: model)
    overlap.start(lambda _: go.wait(20), CPU)
    with ctrl_c():
        overlap.result()
    assert overlap.runs  # else the next job would run beside it, with the same shells
    go.set()
    assert overlap.result() is True
    overlap.close()


def test_who_interrupts_the_wait_of_an_optimizer_and_writes_is_seen() -> None:
    model, go = Net(), threading.Event()
    overlap = Overlap(lambda: model)
    overlap.start(lambda _: go.wait(20), CPU)
    with ctrl_c():
        Overwrite(model).step()
    with torch.no_grad():
        model.head.weight.zero_()
    go.set()
    assert overlap.result() is None
    overlap.close()


def test_nobody_waits_for_a_thread_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = Net(), []
    overlap = Overlap(lambda: model)

    def refuse(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            overlap.start(lambda _: ran.append(1), CPU)
    Overwrite(model).step()  # would hang
    overlap.start(lambda _: ran.append(2), CPU)
    overlap.result()
    assert ran == [2]
    overlap.close()


def test_nobody_waits_for_a_gpu_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        def record_event(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    model = Net()
    pending: _Pending[int] = _Pending(model, torch.device("cuda"))
    pending.run(lambda _: 1, Lost())  # type: ignore[arg-type]
    pending.hold()  # would hang
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pending.result()


def test_an_interrupt_of_a_job_in_the_loops_own_thread_is_raised_there() -> None:
    model = Net()

    def job(_: Any) -> None:
        raise KeyboardInterrupt

    pending: _Pending[None] = _Pending(model, CPU)
    with pytest.raises(KeyboardInterrupt):
        pending.run(job, None)
    pending.hold()
    pending.wait()


class Interrupted(Rows):
    on = True

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if row == 20 and self.on:
            self.on = False
            raise KeyboardInterrupt
        return super().__getitem__(row)


def test_an_interrupt_while_the_next_pool_is_read_loses_no_batch() -> None:
    model, rows = Net(), Interrupted(64)
    loader = make(rows, model)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for batch in drawn(loader, model):
            seen += [batch["id"].tolist()]
    assert len(seen) == loader.stats["steps"] == 2
    again = make(rows, model)
    again.load_state_dict(loader.state_dict())
    seen += [batch["id"].tolist() for batch in drawn(again, model)]
    assert seen == [batch["id"].tolist() for batch in drawn(make(rows, model), model)]


def test_an_interrupt_while_it_is_begun_comes_with_the_next_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rows = Net(), Rows(64)
    loader = make(rows, model)
    batches = drawn(loader, model)
    next(batches)

    def interrupt(self: Any, *others: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Overlap, "start", interrupt)
    next(batches)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    loader.close()


def test_parameters_that_are_replaced_meanwhile_are_seen() -> None:
    model, go = Net(), threading.Event()
    overlap = Overlap(lambda: model)
    overlap.start(lambda _: go.wait(20), CPU)
    model.head = nn.Linear(WIDTH, CLASSES + 1)  # as resize_token_embeddings does
    go.set()
    assert overlap.result() is None
    overlap.close()


def test_a_state_can_be_saved_though_scoring_ahead_failed() -> None:
    race = Race(6)
    loop, fails = threading.current_thread(), threading.Event()

    def gate() -> None:
        if fails.is_set() and threading.current_thread() is not loop:
            raise RuntimeError("out of memory, say")

    race.model.layers[1].gate = gate
    batches = drawn(race.loader, race.model)
    next(batches)
    fails.set()
    next(batches)
    assert race.loader.state_dict()["ahead"] is None
    race.loader.close()


# Scores ahead belong to one pool


def ahead(**options: Any) -> tuple[SiftingDataLoader, Net, Any, dict[str, Any]]:
    """A loader after two batches, the third pool scored, and its state."""
    model = Net()
    loader = make(Rows(64), model, **options)
    batches = drawn(loader, model)
    next(batches)
    next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["ahead"] is not None
    return loader, model, batches, state


def test_another_epoch_than_the_states_is_not_given_its_scores() -> None:
    loader, model, _, state = ahead(shuffle=True)
    loader.close()
    pools: list[tuple[Tensor, Tensor]] = []
    again = make(Rows(64), model, shuffle=True, on_select=lambda i, s, k: pools.append((i, s)))
    again.load_state_dict(state)
    again.set_epoch(5)
    next(iter(again))
    ids, scores = pools[0]
    assert torch.equal(scores, reference(weights_of(model), ids, Rows(64)))
    again.close()


@pytest.mark.parametrize("how", ["iter", "set_epoch"])
def test_a_state_of_another_epoch_holds_no_scores_of_this_one(how: str) -> None:
    loader, _, batches, _ = ahead()
    batches.close()
    if how == "iter":
        iter(loader)
    else:
        loader.set_epoch(4)
    assert loader.state_dict()["ahead"] is None
    loader.close()


@pytest.mark.filterwarnings("ignore:.*iterator")
def test_an_older_iterator_leaves_no_scores_to_the_state_of_the_newest() -> None:
    loader, model, older, _ = ahead(shuffle=True)
    newest = drawn(loader, model)
    next(newest)
    next(newest)
    next(older)
    assert loader.state_dict()["ahead"] is None
    loader.close()


@pytest.mark.parametrize("change", [{"ranks": 2}, {"override": ["data"]}])
def test_scores_of_a_state_are_not_those_of_other_ranks_or_data(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, model, _, state = ahead()
    loader.close()
    monkeypatch.setattr("siftloader.loader.check_fits", lambda *_, **__: None)
    again = make(Rows(64), model)
    again._source.checked = lambda cursor, override: cursor  # type: ignore[method-assign]
    override = change.pop("override", ())
    again.load_state_dict({**state, **change}, override=override)
    assert again.state_dict()["ahead"] is None


def test_closing_keeps_the_scores_for_the_state_and_the_next_batch() -> None:
    pools: list[tuple[Tensor, Tensor]] = []
    loader, model, batches, state = ahead(on_select=lambda i, s, k: pools.append((i, s)))
    own = weights_of(model)
    loader.close()
    assert loader.state_dict()["ahead"] == state["ahead"]
    Overwrite(model).step()
    next(batches)
    ids, scores = pools[2]
    assert torch.equal(scores, reference(own, ids, Rows(64)))
    loader.close()


def test_a_state_is_read_when_the_job_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    loader = make(Rows(64), model)
    batches = drawn(loader, model)
    next(batches)
    next(batches)
    runs = []
    prescored = loader._prescored
    assert prescored is not None
    room = property(lambda self: runs.append(prescored._overlap.runs))
    monkeypatch.setattr(Scorer, "room_state", room)
    loader.state_dict()
    assert runs == [False]
    loader.close()


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("ahead", {"scores": [float("nan")], "missing": [0, 0, 0], "rank": 0}),
        ("ahead", {"scores": [float("inf")], "missing": [0, 0, 0], "rank": 0}),
        ("ahead", {"scores": [10**400], "missing": [0, 0, 0], "rank": 0}),
        ("ahead", {"scores": [True], "missing": [0, 0, 0], "rank": 0}),
        ("ahead", {"scores": "none", "missing": [0, 0, 0], "rank": 0}),
        ("ahead", {"scores": [], "missing": [0, -1, 0], "rank": 0}),
        ("ahead", {"scores": []}),
        ("ahead", []),
        ("room", [0, None, None, 0]),
        ("room", [8, None, None]),
        ("room", [8, -1, None, 0]),
        ("watched", None),
    ],
)
def test_a_damaged_state_is_refused_by_name(name: str, damaged: Any) -> None:
    loader, model, _, state = ahead()
    loader.close()
    with pytest.raises(StateError, match=f"the state is damaged: {name} "):
        make(Rows(64), model).load_state_dict({**state, name: damaged})


def test_no_forward_is_watched_in_the_scoring_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks on the live model must not come while it runs; a pool without any label tells nothing of its mask."""

    class Masked(Net):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    rows, model = Rows(8), Masked()
    pool = torch.utils.data.default_collate([rows[row] for row in range(8)])
    pool["attention_mask"] = torch.ones(8, 3, dtype=torch.long)
    none = {**pool, "labels": torch.full((8,), -100)}
    threads: list[str] = []
    watch = Twin._watch

    def watched(self: Twin, *others: Any) -> Any:
        threads.append(threading.current_thread().name)
        return watch(self, *others)

    monkeypatch.setattr(Twin, "_watch", watched)
    pools = [none, none, pool, pool, none, pool]
    loader = SiftingDataLoader.wrap(pools, model=model, pool="split", warmup_steps=0, overlap=True)
    assert len(list(drawn(loader, model))) == 6
    assert len(threads) > 1 and set(threads) == {"MainThread"}


def test_a_copy_has_the_buffers_of_when_the_batch_left() -> None:
    """The loop's forward writes its own before the job, which dawdles, has fetched the weights."""

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    rows, model = Rows(8 * 6), Normed()
    pools: list[tuple[Tensor, Tensor]] = []
    handed: list[dict[str, Tensor]] = []
    loop, trained = threading.current_thread(), threading.Event()
    fetch = EarlyExit.fetch

    def late(self: EarlyExit) -> None:
        if threading.current_thread() is not loop:
            trained.wait(20)
        fetch(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EarlyExit, "fetch", late)
        loader = make(
            rows, model, scorer_device="cpu", on_select=lambda i, s, k: pools.append((i, s))
        )
        for batch in loader:
            handed.append(weights_of(model))
            trained.clear()
            model(3 * batch["x"])
            trained.set()
    for weights, (ids, scores) in zip(handed[1:], pools[2:], strict=False):
        net = Normed().eval()
        net.load_state_dict(weights)
        x = torch.stack([rows[int(row)]["x"] for row in ids])
        with torch.no_grad():
            expected = functional.cross_entropy(
                net.early(net.norm(x)), ids % CLASSES, reduction="none"
            )
        assert torch.equal(scores, expected)


class Stream:
    """One of CUDA, that notes what is put on it; ``log`` is of all of them."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.marks = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name}: after all of {other.name}")

    def record_event(self) -> str:
        self.marks += 1
        self.log.append(f"{self.name}: mark {self.marks}")
        return f"mark {self.marks} of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name}: after {event}")


@pytest.mark.parametrize("copies", [False, True])
def test_on_a_gpu_the_job_stands_between_the_writes_of_two_steps(
    copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With streams that only take notes: nothing is waited for by the host."""
    log: list[str] = []
    now = [Stream("loop", log)]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    model = Net()
    overlap = Overlap(lambda: model)
    for _ in range(2):

        def job(has_read: Any) -> str:
            if copies:
                log.append(f"{now[-1].name}: copy")
                has_read()
            log.append(f"{now[-1].name}: score")
            return "scores"

        overlap.start(job, torch.device("cuda", 0))
        Overwrite(Net()).step()
        Overwrite(model).step()
        log.append("loop: write")
        assert overlap.result() == "scores"
    overlap.close()
    read, done = ("mark 1", "mark 2") if copies else ("mark 1", "mark 1")
    reading = ["side: copy", "side: mark 1", "side: score"] if copies else ["side: score"]
    first = log[: len(log) // 2]
    assert first[: len(reading) + 2] == ["side: after all of loop", *reading, f"side: {done}"]
    rest = first[len(reading) + 2 :]
    assert rest[0] == f"loop: after {read} of side" and rest[1] == "loop: write"
    assert rest[2] == f"loop: after {done} of side"
    assert len(log) == 2 * len(first)
