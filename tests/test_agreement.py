"""Ranks that would do different things stop together, within seconds; spawned gloo processes."""

from __future__ import annotations

import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from siftloader import RanksDisagree, Sifter, SiftingDataLoader, agreement as agreement_module
from siftloader.agreement import Agreement, Doing, number_of
from siftloader.gate import Threshold
from siftloader.trials import TrialGate


RANKS = 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batches(count: int, rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        {"x": torch.randn(4, 4, generator=generator), "labels": torch.arange(4)}
        for _ in range(count)
    ]


def make(rank: int, count: int = 8, **options: Any) -> SiftingDataLoader:
    torch.manual_seed(0)
    loader: Any = options.pop("loader", None) or batches(count, rank)
    options = {"warmup_steps": 2, **options}
    return SiftingDataLoader.wrap(loader, model=Net(), sharded=True, **options)


def run(loader: SiftingDataLoader) -> int:
    """Batches handed out; a training step has a collective of its own, as that of DDP."""
    handed = 0
    for _ in loader:
        dist.all_reduce(torch.ones(1))
        handed += 1
    return handed


# What two ranks do, by name: it returns what each of them found.


def alike(rank: int) -> Any:
    return run(make(rank))


def waited_for(name: str) -> None:
    """What the other rank does when it comes to it."""
    end = time.monotonic() + 60
    while not (FOLDER / name).exists():
        assert time.monotonic() < end, name
        time.sleep(0.01)


def late(rank: int) -> Any:
    told: list[str] = []

    def show(message: Warning | str, *_: Any) -> None:
        told.append(str(message))
        agreement_module.PATIENCE = timedelta(seconds=100)
        (FOLDER / "told").touch()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        handed = 0
        for _ in make(rank):
            handed += 1
            if handed == 3 and rank:
                waited_for("told")
            elif handed == 3:
                agreement_module.PATIENCE = timedelta(seconds=1)  # in this process alone
    return handed, told


def uneven_while_sifting(rank: int) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = make(rank, count=8 + 3 * rank)
        handed = run(loader)
    return handed, loader.stats["tail_dropped"], [str(each.message) for each in caught]


def uneven_in_the_warm_up(rank: int) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handed = run(make(rank, count=3 + rank, warmup_steps=50))
    return handed, [str(each.message) for each in caught]


def other_warm_up(rank: int) -> Any:
    return run(make(rank, warmup_steps=2 + rank))


def other_layer(rank: int) -> Any:
    return run(make(rank, exit_layer=1 + rank))


def forgets_to_train(rank: int) -> Any:
    loader = make(rank)
    for number, _ in enumerate(loader):
        dist.all_reduce(torch.ones(1))
        if rank and number == 3:
            loader._sifter.scorer.model.eval()


def other_step(rank: int) -> Any:
    loader = make(rank)
    state = loader.state_dict()
    if rank:
        loader.load_state_dict({**state, "stats": {**state["stats"], "steps": 4}})
    return run(loader)


def fails_to_score(rank: int) -> Any:
    def score(early: Any, batch: Any) -> Tensor:
        if rank and len(batch["x"]) == 8:
            raise OverflowError("planted")
        return batch["x"].sum(1)

    return run(make(rank, score_fn=score))


def fails_to_report(rank: int) -> Any:
    def report(ids: Tensor, scores: Tensor, kept: Tensor) -> None:
        if rank:
            raise OverflowError("planted")

    return run(make(rank, on_select=report))


def cannot_merge(rank: int) -> Any:
    rows = batches(8, rank)
    if rank:
        rows[5] = {"x": rows[5]["x"], "labels": torch.zeros(4, 2)}  # unlike the one before
    return run(make(rank, loader=rows))


def begins_anew_alone(rank: int) -> Any:
    loader, handed = make(rank), 0
    for epoch in range(3):
        loader.set_epoch(epoch)  # which decides what a sampler gives to which rank
        for _ in loader:
            dist.all_reduce(torch.ones(1))
            handed += 1
            if rank and handed == 3:
                break
    return handed


def fails_to_report_globally(rank: int) -> Any:
    calls = []

    def report(*_: Tensor) -> None:
        calls.append(0)
        if rank and len(calls) == 2:
            raise OverflowError("planted")

    return run(make(rank, on_select=report, scope="global"))


def fails_unheard(rank: int) -> Any:
    agreement_module.LAST_WORD = timedelta(seconds=1)  # in this process alone
    agreement = Agreement()
    agreement.step(Doing.PASSES, 0, 1)
    if rank:
        agreement.failed()
        (FOLDER / "gave up").touch()
        return None
    waited_for("gave up")
    return agreement.step(Doing.PASSES, 1, 1)


def fails_after_a_disagreement(rank: int) -> Any:
    agreement = Agreement()
    with pytest.raises(RanksDisagree):
        agreement.step(Doing.PASSES, rank, 1)
    if not rank:
        return agreement.step(Doing.PASSES, 0, 1)
    try:
        raise OverflowError("planted")
    except OverflowError:
        agreement.failed()
        agreement.failed()  # says nothing more
        raise


def other_shapes(rank: int) -> Any:
    return Agreement().gathered(torch.zeros(2, 1 + rank))


class Broken(IterableDataset[dict[str, Tensor]]):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from batches(3 + 5 * (not self.rank), self.rank)
        if self.rank:
            raise OverflowError("planted")


def fails_to_draw(rank: int) -> Any:
    loader = torch.utils.data.DataLoader(Broken(rank), batch_size=None)
    return run(make(rank, loader=loader))


class BrokenAtOnce(Broken):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.rank:
            raise OverflowError("planted")
        return super().__iter__()


def fails_at_once(rank: int) -> Any:
    return run(make(rank, loader=torch.utils.data.DataLoader(BrokenAtOnce(rank), batch_size=None)))


def evaluates_alone(rank: int) -> Any:
    loader = make(rank)
    if rank == 0:  # as scripts do: only the first rank, with the model in eval mode
        other = make(rank)
        other._sifter.scorer.model.eval()
        assert len(list(other)) == 8
    return run(loader)


def evaluates_alone_with_the_same_loader(rank: int) -> Any:
    loader = make(rank)
    if rank == 0:
        loader._sifter.scorer.model.eval()
        list(loader)
        loader._sifter.scorer.model.train()
    return run(loader)


def of_a_few(rank: int) -> Any:
    group = dist.new_group([0])
    return run_alone(make(rank, process_group=group)) if rank == 0 else None


def run_alone(loader: SiftingDataLoader) -> int:
    return len(list(loader))


def gathers(rank: int) -> Any:
    agreement = Agreement()
    found = agreement.gathered(torch.arange(rank * 2).view(-1, 2))
    few = agreement.gathered(torch.arange(3, dtype=torch.int16)[rank:])  # gloo knows no int16
    assert agreement.gathered(torch.zeros(0))[0].tolist() == []
    return [each.tolist() for each in found], [each.tolist() for each in few]


def audited(rank: int) -> Any:
    loader = make(rank, count=24, audit_every=3, warmup_steps=4)
    run(loader)
    every = [batches(24, each) for each in range(RANKS)]
    losses = [Sifter(loader._scorer.model, exit_layer="full").score(b[3]).double() for b in every]
    return loader.audits, torch.stack(losses)


def gated(rank: int) -> Any:
    # By figures that differ from rank to rank: a rank that decided by its own would go on alone.
    middle = 1.0
    for _ in range(2):
        gate = Threshold("rho", opens=middle, closes=middle)
        loader = make(rank, count=40, audit_every=2, warmup_steps=0, gate=gate)
        handed = run(loader)
        middle = sorted(each["rho"] for each in loader.audits)[3] + 1e-9
    return handed, loader.stats["candidates"], loader.stats["samples"]


def gated_by_a_function(rank: int) -> Any:
    def gate(audits: Any, is_open: bool) -> bool:  # lies elsewhere in every process
        return len(audits) % 2 == 0

    loader = make(rank, count=40, audit_every=2, warmup_steps=0, gate=gate)
    return run(loader), loader.stats["candidates"]


def tried(rank: int) -> Any:
    # The ranks have other data, so that alone each would find another gain.
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    held_out = batches(2, 9 + rank)
    gate = TrialGate(held_out=held_out, steps=2, repeats=2, share=1.0, cost=0.1, loss=loss)
    loader = make(rank, count=120, audit_every=0, warmup_steps=3, gate=gate)
    optimizer = torch.optim.SGD(loader._scorer.model.parameters(), 0.1)
    handed = 0
    for batch in loader:
        optimizer.zero_grad()
        loss(loader._scorer.model, batch).backward()
        optimizer.step()
        dist.all_reduce(torch.ones(1))
        handed += 1
    return handed, loader.trials, loader.stats["candidates"]


def other_audits(rank: int) -> Any:
    return run(make(rank, audit_every=2 + rank))


def audits_taken_up(rank: int) -> Any:
    # Saved while an audit is under way, by every rank for itself.
    whole = make(rank, count=40, audit_every=6, warmup_steps=0)
    run(whole)
    before = make(rank, count=40, audit_every=6, warmup_steps=0)
    batches = iter(before)
    for _ in range(8):
        next(batches)
    state = json.loads(json.dumps(before.state_dict()))
    after = make(rank, count=40, audit_every=6, warmup_steps=0)
    after.load_state_dict(state)
    run(after)
    timed = "scoring_cost"
    ends = [[{**each, timed: 0} for each in one.audits] for one in (whole, after)]
    return ends, state["audits"]["under_way"] is not None


CASES: dict[str, Callable[[int], Any]] = {
    each.__name__: each
    for each in (
        alike,
        late,
        uneven_while_sifting,
        uneven_in_the_warm_up,
        other_warm_up,
        other_layer,
        other_step,
        forgets_to_train,
        fails_to_score,
        fails_to_report,
        fails_to_report_globally,
        fails_after_a_disagreement,
        other_shapes,
        begins_anew_alone,
        cannot_merge,
        fails_to_draw,
        fails_at_once,
        evaluates_alone,
        evaluates_alone_with_the_same_loader,
        of_a_few,
        gathers,
        audited,
        gated,
        gated_by_a_function,
        tried,
        other_audits,
        audits_taken_up,
        fails_unheard,
    )
}


FOLDER = Path()  # of the ranks


def work(rank: int, folder: str) -> None:
    global FOLDER
    FOLDER = Path(folder)
    torch.set_num_threads(1)
    agreement_module.LAST_WORD = timedelta(seconds=100)  # nobody waits for it
    for name, case in CASES.items():
        file = f"file://{folder}/{name}"
        dist.init_process_group("gloo", init_method=file, rank=rank, world_size=RANKS)
        begin = time.monotonic()
        try:
            found: Any = case(rank)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            if not isinstance(error, (OverflowError,)) and "disagree" not in str(error):
                found += traceback.format_exc()
        torch.save((found, time.monotonic() - begin), f"{folder}/{name}-{rank}.pt")
        if name != "fails_unheard":
            dist.barrier()
        dist.destroy_process_group()  # waits for every question that is open


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What every rank found in every case; all within seconds."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    results: dict[str, list[Any]] = {}
    for name in CASES:
        files = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)]
        assert max(seconds for _, seconds in files) < 50
        results[name] = [value for value, _ in files]
    return results


def test_ranks_that_agree_go_on(found: dict[str, list[Any]]) -> None:
    assert found["alike"] == [5, 5]
    first, second = found["late"]
    assert second == (5, []) and first[0] == 5 and len(first[1]) == 1
    assert "did not come to this step" in first[1][0]
    assert found["evaluates_alone"] == found["evaluates_alone_with_the_same_loader"] == [5, 5]
    assert found["of_a_few"] == [5, None]
    assert found["gathers"] == [([[], [[0, 1]]], [[0, 1, 2], [1, 2]])] * 2


def test_an_audit_is_of_all_ranks_and_the_same_on_all(found: dict[str, list[Any]]) -> None:
    (first, losses), (second, _) = found["audited"]
    assert first == second and [each["step"] for each in first] == [3, 6, 9]
    assert first[0]["rows"] == 8 and not first[0]["sifting"] and first[1]["sifting"]
    assert first[0]["population_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert abs(losses[0].mean() - losses[1].mean()) > 0.01, "or each might tell of itself"
    (whole, after), saved = found["audits_taken_up"][0]
    assert saved and whole == after and len(whole) == 2
    assert found["audits_taken_up"][1] == found["audits_taken_up"][0]


def test_a_gate_decides_alike_on_all_ranks(found: dict[str, list[Any]]) -> None:
    first, second = found["gated"]
    assert first == second
    handed, candidates, _ = first
    assert 0 < candidates < 8 * handed, "open for a while, and closed for a while"


def test_a_gate_may_be_a_function_of_every_rank(found: dict[str, list[Any]]) -> None:
    first, second = found["gated_by_a_function"]
    assert first == second and 0 < first[1] < 8 * first[0]


def test_a_gate_by_trials_decides_alike_on_all_ranks(found: dict[str, list[Any]]) -> None:
    first, second = found["tried"]
    assert first == second
    _, trials, candidates = first
    assert len(trials) > 3 and candidates > 0


def test_an_epoch_ends_for_all_where_one_has_no_more(found: dict[str, list[Any]]) -> None:
    first, second = found["uneven_while_sifting"]
    assert first == (5, 0, [])
    assert second[:2] == (5, 8) and "8 rows that this rank has drawn are dropped" in second[2][0]
    first, second = found["uneven_in_the_warm_up"]
    assert first[0] == second[0] == 3
    assert any("another rank has no more batches" in each for each in second[1])


@pytest.mark.parametrize(
    "name, text",
    [
        ("other_warm_up", "rank 0 and rank 1 sift with different options"),
        (
            "forgets_to_train",
            "rank 0 sifts at step 4; rank 1 passes a batch through to a model in eval",
        ),
        ("other_layer", "rank 0 and rank 1 sift with different options"),
        ("other_audits", "rank 0 and rank 1 sift with different options"),
        ("other_step", "passes a batch through at step 0; rank 1 sifts at step 4"),
        ("other_shapes", "rank 0 and rank 1 have candidates, or fields, of different shapes"),
    ],
)
def test_ranks_that_would_diverge_all_stop(
    found: dict[str, list[Any]], name: str, text: str
) -> None:
    for each in found[name]:
        assert each.startswith("RanksDisagree: the ranks disagree: ") and text in each


FAILS = [name for name in CASES if name.startswith("fails_") and name != "fails_unheard"]


@pytest.mark.parametrize("name", FAILS)
def test_where_one_rank_fails_the_others_do_not_wait(
    found: dict[str, list[Any]], name: str
) -> None:
    first, second = found[name]
    assert second == "OverflowError: planted"
    assert first.startswith("RanksDisagree") and "rank 1 failed" in first


def test_a_rank_that_nobody_hears_gives_up_for_good(found: dict[str, list[Any]]) -> None:
    first, second = found["fails_unheard"]
    assert second is None and "another one went away, or failed while this one was else" in first


def test_what_cannot_merge_fails_before_anything_is_communicated(
    found: dict[str, list[Any]],
) -> None:
    first, second = found["cannot_merge"]
    assert second.startswith("BatchError: rows of different shapes")
    assert (
        first.startswith("RanksDisagree") and "rank 0 sifts" in first and "rank 1 failed" in first
    )


@pytest.mark.parametrize("fails", [False, True])
def test_others_that_come_the_moment_after_the_warning_was_due_are_there(fails: bool) -> None:
    class Question:
        """Open when the wait for it is over, and answered, or broken, when it is looked at."""

        def wait(self, timeout: timedelta | None = None) -> None:
            if timeout is not None:
                raise RuntimeError("Operation timed out!")
            if fails:
                raise RuntimeError("Connection closed by peer")

        def is_completed(self) -> bool:
            return True

    with pytest.raises(RuntimeError, match="closed by peer") if fails else nullcontext():
        Agreement()._wait(Question(), None)


def test_alone_everything_is_agreed() -> None:
    agreement = Agreement()
    assert agreement.step(Doing.SIFTS, 0, 1) and not agreement.step(Doing.ENDS, 0, 1)
    agreement.failed()
    assert agreement.gathered(torch.ones(2))[0].tolist() == [1, 1]


def test_a_group_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match="this rank is not one of process_group's"):
        make(0, process_group=dist.GroupMember.NON_GROUP_MEMBER)


def test_a_number_stands_for_settings() -> None:
    assert number_of(1, "a") == number_of(1, "a") != number_of(1, "b")
    assert 0 <= number_of() < 1 << 62
