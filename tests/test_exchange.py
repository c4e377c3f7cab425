"""Selecting over all ranks: the winners of one rank that drew it all, and as many for everybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, strategies as st
from test_laws import write
from torch import Tensor, nn

from siftloader import (
    BatchError,
    Gumbel,
    Random,
    RankSample,
    RanksDisagree,
    Robust,
    ScoringError,
    Sifter,
    SiftingDataLoader,
    Stratified,
    TokenShards,
    TopK,
    World,
)
from siftloader.exchange import moves


@st.composite
def dealt(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """The ranks and rows of the winners of a random selection, in the order of the union."""
    ranks, keep, spare = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 6))
    candidates = [(row, rank) for row in range(keep + spare) for rank in range(ranks)]
    won = sorted(draw(st.permutations(candidates))[: ranks * keep])
    return (
        torch.tensor([rank for _, rank in won]),
        torch.tensor([row for row, _ in won]),
        keep,
        ranks,
    )


@given(dealt())
def test_everybody_hands_out_as_many_and_no_winner_is_lost_or_doubled(
    case: tuple[Tensor, Tensor, int, int],
) -> None:
    winners, rows, keep, ranks = case
    every = [moves(winners, rows, keep, ranks, rank) for rank in range(ranks)]
    handed: list[tuple[int, int]] = []
    for rank, own in enumerate(every):
        arriving = [(rank, row) for row in own.stays.tolist()]
        for source, other in enumerate(every):
            sent = other.sends[rank].tolist()
            assert own.receives[source] == len(sent) and (source != rank or not sent)
            arriving += [(source, row) for row in sent]
        out = [arriving[n] for n in own.order.tolist()]
        assert len(out) == keep
        assert out == sorted(out, key=lambda each: (each[1], each[0]))  # as in the union
        assert out == [(int(winners[n]), int(rows[n])) for n in own.mine]
        assert own.kept.tolist() == rows[winners == rank].tolist()
        handed += out
    assert sorted(handed) == sorted(zip(winners.tolist(), rows.tolist(), strict=True))
    moved = sum(sum(own.receives) for own in every)
    assert moved == sum(max(0, len(own.kept) - keep) for own in every)  # not one too many
    assert {own.any for own in every} == {moved > 0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(90, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 90)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


SELECTIONS = {
    "top": TopK(),
    "rank": RankSample(),
    "gumbel": Gumbel(0.5),
    "robust": Robust(),
    "stratified": Stratified("source"),
}


def loader_of(folder: Path, kind: str, batch: int, seen: list[Any]) -> SiftingDataLoader:
    return SiftingDataLoader(
        TokenShards(folder / "mlm-0", with_ids=True),
        batch,
        model=Net(),
        warmup_steps=1,
        scope="global",
        criterion=Random(3) if kind == "random" else "loss",
        selection=SELECTIONS.get(kind),
        sift_weight=kind in ("rank", "random"),
        on_select=lambda ids, scores, kept: seen.append((ids.tolist(), kept.tolist())),
    )


KINDS = [*SELECTIONS, "random"]


def steps(folder: Path, kind: str, batch: int, state: Any = None, count: int | None = None) -> Any:
    """Per step what was handed out: ids, weights, and a digest of the rows."""
    seen: list[Any] = []
    loader = loader_of(folder, kind, batch, seen)
    if state is not None:
        loader.load_state_dict(state)
    out = []
    for each in loader:
        sums = (each["input_ids"] * torch.arange(1, each["input_ids"].shape[1] + 1)).sum(1)
        weight = each.get("sift_weight", torch.ones(len(sums)))
        out.append(list(zip(each["id"].tolist(), sums.tolist(), weight.tolist(), strict=True)))
        if len(out) == count:
            break
    return out, loader.state_dict()


def odd(rank: int) -> dict[str, Any]:
    """What cannot be moved, or is not alike, and what fits after padding: what each rank got or raised."""
    rows = 4
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 90, (rows, 5 + rank), generator=generator)
    batch = {
        "input_ids": ids,
        "labels": ids.clone(),
        "attention_mask": torch.ones_like(ids),
        "flag": torch.tensor([True, False, False, True]),
        "half": torch.arange(rows, dtype=torch.bfloat16) + 10 * rank,
        "nothing": torch.zeros(rows, 0),
        "turned": (torch.arange(2 * rows).view(2, rows) + 100 * rank).t(),
    }

    def score(early: Any, batch: Any) -> Tensor:
        return torch.arange(rows) + 10.0 * rank  # all winners are of the last rank

    found: dict[str, Any] = {}
    sift = Sifter(Net(), score_fn=score, scope="global")
    out = sift(batch)
    found["padded"] = {name: each.tolist() for name, each in out.items()}
    found["counts"] = sift.stats["kept"]
    cases = {
        "list": {**batch, "text": ["a"] * rows},
        "fields": {**batch, **({"more": torch.ones(rows)} if rank else {})},
        "unmasked": {name: each for name, each in batch.items() if name != "attention_mask"},
        "sizes": {name: each[: rows - 2 * rank] for name, each in batch.items()},
        "order": dict(sorted(batch.items(), reverse=rank > 0)),
        "dtypes": {**batch, "half": batch["half"].to(torch.int16 if rank else torch.bfloat16)},
        "one_list": {**batch, **({"text": ["a"] * rows} if rank else {})},
    }
    for name, case in cases.items():
        rows = len(case["flag"])
        try:
            sift(case)
            found[name] = None
        except (BatchError, RanksDisagree) as error:
            found[name] = f"{type(error).__name__}: {error}"
    rows = 4
    by = Sifter(
        Net(),
        score_fn=score,
        scope="global",
        selection=Stratified(lambda batch: batch["flag"].int()),
    )
    seeds = Sifter(Net(), score_fn=score, scope="global", selection=Gumbel(100.0, seed=rank))
    try:
        for _ in range(20):
            seeds({**batch, "flag": torch.ones(len(ids), 1)})
    except RanksDisagree as error:
        found["seeds"] = str(error)
    model = Net()
    split = Sifter(model, score_fn=score, scope="global")
    split.scorer._replica = (model, [dist.group.WORLD])  # as if its parameters lay on both ranks
    for name, each in (("callable", by), ("split", split)):
        try:
            each(batch)
        except ScoringError as error:
            found[name] = str(error)
    return found


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    file = f"file://{folder}/store-{ranks}"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=ranks)
    path = Path(folder)
    found: dict[str, Any] = {
        kind: steps(path, kind, 24 // ranks)[0] for kind in (KINDS if ranks == 2 else ["top"])
    }
    if ranks == 2:
        found["state"] = steps(path, "top", 12, count=5)[1]
        found["odd"] = odd(rank)
    torch.save(found, path / f"found-{ranks}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("global")
    write(folder / "mlm-0", (90, 200, 7, 23, 166), "mlm")
    return folder


def spawned(folder: Path, ranks: int) -> list[dict[str, Any]]:
    mp.spawn(work, (ranks, str(folder)), nprocs=ranks)
    return [torch.load(folder / f"found-{ranks}-{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return spawned(folder, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_winners_are_those_of_one_rank_on_the_union(
    folder: Path, two: list[dict[str, Any]], kind: str
) -> None:
    whole, _ = steps(folder, kind, 24)
    assert len(whole) == len(two[0][kind]) == len(two[1][kind]) > 5
    for one, first, second in zip(whole, two[0][kind], two[1][kind], strict=True):
        assert len(first) == len(second) == 12
        assert sorted(one) == sorted(first + second)
    sizes = {len({each[0] for each in first}) for first in two[0][kind]}
    assert sizes == {12}


def test_another_number_of_ranks_goes_on_with_the_same_winners(
    folder: Path, two: list[dict[str, Any]]
) -> None:
    state = json.loads(json.dumps(two[0]["state"]))
    rest, _ = steps(folder, "top", 24, state)  # no warning, either: nothing changes
    whole, _ = steps(folder, "top", 24)
    assert rest == whole[5:]


@pytest.mark.slow
def test_three_ranks(folder: Path) -> None:
    whole, _ = steps(folder, "top", 24)
    for one, *parts in zip(whole, *(each["top"] for each in spawned(folder, 3)), strict=True):
        assert sorted(one) == sorted(each for part in parts for each in part) and {
            len(part) for part in parts
        } == {8}


def test_rows_of_every_dtype_arrive_as_they_left_padded_where_they_are_longer(
    two: list[dict[str, Any]],
) -> None:
    first, second = (each["odd"]["padded"] for each in two)
    assert first["half"] == [12, 13] and second["half"] == [10, 11]
    assert first["flag"] == [False, True] and second["flag"] == [True, False]
    assert first["turned"] == [[102, 106], [103, 107]] and first["nothing"] == [[], []]
    assert {len(row) for row in first["input_ids"] + second["input_ids"]} == {6}
    assert [each["odd"]["counts"] for each in two] == [0, 4]


def test_what_cannot_move_is_refused_on_all_ranks(two: list[dict[str, Any]]) -> None:
    for each in two:
        found = each["odd"]
        assert found["list"].startswith("BatchError: a field of the batch is a list")
        assert found["fields"].startswith("RanksDisagree: the ranks disagree: their batches have")
        assert found["sizes"].startswith("RanksDisagree: the ranks disagree: they hand out [2, 1]")
        for name in ("order", "dtypes"):
            assert "other fields, in another order, or of another dtype" in found[name]
        assert "each selected other winners from the same scores" in found["seeds"]
        assert "name a field instead" in found["callable"]
        assert 'process_group=mesh["dp"].get_group()' in found["split"]
        assert found["unmasked"].startswith("BatchError: the rows of the ranks differ in shape")


def test_what_one_rank_refuses_stops_the_others(two: list[dict[str, Any]]) -> None:
    first, second = (each["odd"]["one_list"] for each in two)
    assert "rank 1 failed" in first
    assert second.startswith("BatchError: a field of the batch is a list")


def test_what_learns_on_every_rank_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r'scope="global" compares scores of all ranks'):
        Sifter(Net(), scope="global", exit_head="probe")
    with pytest.raises(ValueError, match=r'scope must be "rank" or "global"'):
        Sifter(Net(), scope="all")  # type: ignore[arg-type]


def test_alone_it_is_the_same_as_by_rank(folder: Path) -> None:
    found = []
    for scope in ("rank", "global"):
        shards = TokenShards(folder / "mlm-0", with_ids=True, world=World())
        loader = SiftingDataLoader(shards, 24, model=Net(), warmup_steps=0, scope=scope)
        found.append([each["id"].tolist() for each in loader])
    assert found[0] == found[1]
