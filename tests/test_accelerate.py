"""Training scripts of Hugging Face accelerate, one line of them changed: pytest tests/test_accelerate.py"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from test_laws import write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from siftloader import EarlyExit, SiftingDataLoader, TokenShards
from siftloader.accelerated import Prepared


accelerate = pytest.importorskip("accelerate")
from accelerate import Accelerator, DataLoaderConfiguration  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"
ROWS, BATCH, ACCUMULATION, EPOCHS = 83, 4, 3, 2


class Classifier(nn.Module):
    """Features [P, 8] -> logits [P, 10]; the weights are large, so that depths disagree."""

    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + self.drop(torch.tanh(layer(x)))
        return self.head(x)


def classifier() -> nn.Module:
    model = Classifier()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.train()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def _no_accelerator_before() -> Iterator[None]:
    forget_accelerator()  # tests of other files leave theirs
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Rows(Dataset):
    def __init__(self, count: int = ROWS) -> None:
        draw = torch.Generator().manual_seed(count)
        self.x = torch.randn(count, 8, generator=draw)
        self.labels = torch.randint(0, 10, (count,), generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "labels": self.labels[index], "id": index}


def plain(model: nn.Module, rows: int = ROWS) -> DataLoader:
    return DataLoader(Rows(rows), BATCH, shuffle=True)


def sifting(model: nn.Module, rows: int = ROWS, **options: Any) -> SiftingDataLoader:
    options = {"warmup_steps": 2} | options
    return SiftingDataLoader(Rows(rows), BATCH, shuffle=True, model=model, **options)


class Killed(Exception):
    pass


@dataclass
class Log:
    ids: list[list[int]] = field(default_factory=list)  # of every batch
    losses: list[float] = field(default_factory=list)
    updates: list[bool] = field(default_factory=list)  # whether an optimizer step followed it
    epochs: list[int] = field(default_factory=list)  # batches of each
    rates: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # before and after prepare
    weights: float = 0.0

    def same_from(self, other: Log) -> bool:
        count = len(self.ids)
        return self.ids == other.ids[-count:] and self.losses == other.losses[-count:]


def script(
    make: Callable[[nn.Module], DataLoader],
    folder: Path | None = None,
    *,
    save_every: int | None = None,
    resume: str | None = None,
    kill_after: int | None = None,
    accumulation: int = ACCUMULATION,
    epochs: int = EPOCHS,
    configuration: DataLoaderConfiguration | None = None,
    rate: float = 0.01,
) -> Log:
    """The loop of run_mlm_no_trainer.py, with a log; the loader is made in one line."""
    log = Log()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulation,
        dataloader_config=configuration,
    )
    set_seed(5)
    model = classifier()
    train_dataloader = make(model)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    log.lengths.append(len(train_dataloader))
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / accumulation)
    max_train_steps = epochs * num_update_steps_per_epoch
    lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, max_train_steps)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    log.lengths.append(len(train_dataloader))
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / accumulation)
    completed_steps = starting_epoch = 0
    resume_step = None
    if resume is not None:
        accelerator.load_state(str(folder / resume))
        if "epoch" in resume:
            starting_epoch = int(resume.replace("epoch_", "")) + 1
            completed_steps = starting_epoch * num_update_steps_per_epoch
        else:
            resume_step = int(resume.replace("step_", "")) * accumulation
            starting_epoch = resume_step // len(train_dataloader)
            completed_steps = resume_step // accumulation
            resume_step -= starting_epoch * len(train_dataloader)
    for epoch in range(starting_epoch, epochs):
        model.train()
        log.epochs.append(0)
        if resume is not None and epoch == starting_epoch and resume_step is not None:
            active_dataloader = accelerator.skip_first_batches(train_dataloader, resume_step)
        else:
            active_dataloader = train_dataloader
        for batch in active_dataloader:
            if len(log.ids) == kill_after:
                raise Killed
            with accelerator.accumulate(model):
                loss = cross_entropy(model(batch["x"]), batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            log.ids.append(batch["id"].tolist())
            log.losses.append(loss.item())
            log.updates.append(accelerator.sync_gradients)
            log.rates.append(lr_scheduler.get_last_lr()[0])
            log.epochs[-1] += 1
            if accelerator.sync_gradients:
                completed_steps += 1
                if save_every and completed_steps % save_every == 0:
                    accelerator.save_state(str(folder / f"step_{completed_steps}"))
        if save_every == 0:
            accelerator.save_state(str(folder / f"epoch_{epoch}"))
    log.weights = sum(p.double().sum().item() for p in model.parameters())
    return log


def by_hand(rows: int = ROWS, warmup: int = 2, keep: float = 0.5) -> Log:
    """The same training in plain torch: draw, score with the reference, keep the best, step."""
    log = Log()
    set_seed(5)
    model = classifier()
    loader = plain(model, rows)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, EPOCHS * 4)
    early, pool = EarlyExit(model, layer=1), round(BATCH / keep)
    for _ in range(EPOCHS):
        drawn = torch.cat([batch["id"] for batch in loader])
        batches = 0
        while len(drawn) >= BATCH:
            count = BATCH if len(log.ids) < warmup else pool
            index, drawn = drawn[:count], drawn[count:]
            x, labels = loader.dataset.x[index], loader.dataset.labels[index]
            if len(log.ids) >= warmup:
                logits = early.logits({"x": x, "labels": labels})
                scores = cross_entropy(logits, labels, reduction="none")
                best = scores.topk(BATCH).indices.sort().values
                index, x, labels = index[best], x[best], labels[best]
            loss = cross_entropy(model(x), labels)
            (loss / ACCUMULATION).backward()
            batches += 1
            update = batches % ACCUMULATION == 0 or len(drawn) < BATCH
            if update:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            log.ids.append(index.tolist())
            log.losses.append(loss.item())
            log.updates.append(update)
        log.epochs.append(batches)
    return log


def test_what_is_kept_and_when_it_steps_is_what_a_loop_by_hand_does():
    expected = by_hand()
    found = script(sifting, epochs=EPOCHS)
    assert found.epochs == expected.epochs == [11, 10]
    assert found.ids == expected.ids
    assert found.updates == expected.updates
    assert found.losses == expected.losses


def test_with_keep_1_it_is_the_plain_loader_bit_for_bit():
    assert script(lambda model: sifting(model, keep=1.0)) == script(plain)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Log, Path]:
    """One run, saved after every step; its checkpoints are what a killed one leaves."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return script(sifting, folder, save_every=1), folder


@pytest.mark.parametrize("saved", ["step_1", "step_3"])
def test_a_script_that_was_killed_goes_on_with_exactly_the_samples_that_were_left(straight, saved):
    log, folder = straight
    resumed = script(sifting, folder, resume=saved)
    assert resumed.epochs == [11 - 3 * int(saved[-1]), 10]
    assert resumed.same_from(log)
    assert resumed.updates == log.updates[-len(resumed.updates) :]
    assert resumed.weights == log.weights


@pytest.mark.parametrize(("saved", "left"), [("step_4", [10]), ("step_5", [7])])
def test_where_a_script_miscounts_batches_the_state_is_believed_and_that_is_said(
    straight, saved, left
):
    # Steps times accumulation: an epoch that ended with a partial step had fewer batches than that.
    log, folder = straight
    with pytest.warns(UserWarning, match="skip_first_batches was told"):
        resumed = script(sifting, folder, resume=saved)
    assert resumed.epochs == left
    assert resumed.same_from(log)


def test_an_epoch_that_is_done_is_not_begun_again(tmp_path):
    log = script(sifting, tmp_path, save_every=0)
    resumed = script(sifting, tmp_path, resume="epoch_0")
    assert resumed.epochs == [10]
    assert resumed.same_from(log)


def test_a_state_saved_with_the_last_batch_out_goes_on_with_the_next_epoch(tmp_path):
    log = script(sifting, tmp_path, save_every=1, accumulation=1)  # steps are batches
    resumed = script(sifting, tmp_path, resume="step_11", accumulation=1)
    assert resumed.epochs == [10]
    assert resumed.same_from(log)
    # Scripts that look whether there is anything to skip iterate over the loader itself.
    accelerator, loader = prepared_alone()
    accelerator.load_state(str(tmp_path / "step_11"))
    assert [batch["id"].tolist() for batch in loader][:1] == log.ids[11:12]


def prepared_alone(**options: Any) -> tuple[Accelerator, SiftingDataLoader]:
    accelerator = Accelerator(cpu=True)
    set_seed(5)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
    _, loader, *_ = accelerator.prepare(model, sifting(model, **options), optimizer, scheduler)
    return accelerator, loader


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def fixed(model: nn.Module, rows: int = ROWS, **options: Any) -> SiftingDataLoader:
    """Candidates in order and a model that stays: epochs differ in nothing but their steps."""
    return SiftingDataLoader(Rows(rows), BATCH, model=model, **{"warmup_steps": 2} | options)


@pytest.mark.parametrize("count", [0, 2, 5, 11])
@pytest.mark.parametrize("options", [{}, {"pool": "split"}, {"criterion": "random"}])
def test_skipped_without_a_state_batches_are_drawn_and_not_scored(count, options):
    seen: list[int] = []
    accelerator, model = Accelerator(cpu=True), classifier()
    straight = fixed(model, **options)
    expected = ids(straight)
    loader = fixed(
        model, on_select=lambda rows, scores, kept: seen.extend(rows.tolist()), **options
    )
    rest = accelerator.skip_first_batches(accelerator.prepare(loader), count)
    found, ends = [], []
    for batch in rest:
        found.append(batch["id"].tolist())
        ends.append(accelerator.gradient_state.end_of_dataloader)
    assert found == expected[count:]
    assert ends == [False] * (len(found) - 1) + [True] * (len(found) > 0)
    assert set(seen).isdisjoint(row for batch in expected[:count] for row in batch)
    for name in ("steps", "samples", "tail_dropped"):
        assert loader.stats[name] == straight.stats[name]
    assert ids(loader) == ids(straight)  # the next epoch is whole


def test_the_last_batch_is_known_and_nobody_is_left_under_way():
    for keep in (0.5, 1.0):
        accelerator, loader = prepared_alone(keep=keep, warmup_steps=3)
        state = accelerator.gradient_state
        for _ in range(2):
            ends = [state.end_of_dataloader for _ in loader]
            assert ends == [False] * (len(ends) - 1) + [True]
            assert state.dataloader_references == [None]
        for _ in loader:
            assert state.active_dataloader is loader
            break
        assert state.dataloader_references == [None]


def test_another_loader_inside_the_loop_does_not_stay_the_one_under_way():
    accelerator, loader = prepared_alone()
    evaluation = accelerator.prepare(DataLoader(Rows(), BATCH))
    ends = []
    for number, _ in enumerate(loader):
        ends.append(accelerator.gradient_state.end_of_dataloader)
        for _ in evaluation:
            if number % 2:
                break
    assert ends == [False] * 10 + [True]


def test_what_goes_wrong_in_rows_read_ahead_comes_with_the_batch_they_belong_to():
    class Broken(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 44:
                raise OSError("unreadable")
            return super().__getitem__(index)

    model = classifier()
    loader = SiftingDataLoader(Broken(), BATCH, model=model, warmup_steps=0)
    accelerator = Accelerator(cpu=True)
    batches = iter(accelerator.prepare(loader))
    handed = 0
    with pytest.raises(OSError, match="unreadable"):
        for _ in batches:
            handed += 1
    state = loader.state_dict()
    assert state["stats"]["steps"] == handed == 5  # accelerate looks one batch ahead, we another


def test_prepared_by_whoever_and_however_often_it_is_the_same_loader():
    model, rows = classifier(), Rows()
    loader = fixed(model)
    assert not loader._is_accelerate_prepared  # asked by nobody in particular
    accelerator = Accelerator(cpu=True)
    assert accelerator.prepare_data_loader(loader) is loader
    inner = loader._source.loader
    assert accelerator.prepare(loader) is loader
    assert accelerator._dataloaders == [loader]
    accelerator.free_memory()
    assert accelerator._dataloaders == []
    assert accelerator.prepare(loader, model)[0] is loader
    assert accelerator._dataloaders == [loader]
    assert Accelerator(cpu=True).prepare(loader) is loader
    assert loader._source.loader is inner and loader._is_accelerate_prepared
    assert len(loader) == 11 and len(loader.dataset) == 44
    wrapped = SiftingDataLoader.wrap(
        accelerator.prepare(DataLoader(rows, BATCH)),
        model=accelerator.prepare(model),
        warmup_steps=2,
    )
    assert len(wrapped) == 11
    assert ids(wrapped) == ids(loader)


def test_an_inner_loader_that_cannot_be_prepared_is_not_rebuilt_without_a_word():
    accelerator = Accelerator(cpu=True)
    accelerator.dataloader_config = None  # as another version might have it
    with pytest.raises(RuntimeError, match="the inner loader could not be prepared"):
        accelerator.prepare(fixed(classifier()))


def test_a_loader_around_a_prepared_one_is_resumed_and_ends_like_it(tmp_path):
    def around() -> tuple[Accelerator, SiftingDataLoader]:
        accelerator = Accelerator(cpu=True)
        set_seed(5)
        model = accelerator.prepare(classifier())
        inner = accelerator.prepare(DataLoader(Rows(), BATCH, shuffle=True))
        return accelerator, SiftingDataLoader.wrap(inner, model=model, warmup_steps=2)

    accelerator, loader = around()
    straight, states, ends = [], [], []
    for _ in range(2):
        for batch in loader:
            straight.append(batch["id"].tolist())
            states.append((json.dumps(loader.state_dict()), torch.get_rng_state()))
            ends.append(accelerator.gradient_state.end_of_dataloader)
    assert [place for place, end in enumerate(ends) if end] == [10, 20]
    for place in (0, 4, 10, 13):
        _, again = around()
        state, stream = states[place]
        again.load_state_dict(json.loads(state))
        torch.set_rng_state(stream)  # as accelerate's load_state does
        assert [*ids(again), *ids(again)][: 20 - place] == straight[place + 1 :]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_half_precision_scores_are_those_of_the_model_that_accelerate_made():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    set_seed(5)
    model = classifier()
    loader = fixed(model, warmup_steps=0, exit_layer="full")
    model, loader = accelerator.prepare(model, loader)
    drawn = Rows()
    for number, batch in enumerate(loader):
        rows = torch.arange(8 * number, 8 * number + 8)
        model.eval()
        with torch.no_grad():
            scores = cross_entropy(model(drawn.x[rows]), drawn.labels[rows], reduction="none")
        model.train()
        kept = rows[scores.topk(BATCH).indices.sort().values]
        assert batch["id"].tolist() == kept.tolist()


@pytest.mark.parametrize("make", ["rebuilt", "dispatched"])
def test_the_data_set_of_a_sifting_loader_is_refused(make):
    accelerator = Accelerator(cpu=True)
    loader = fixed(classifier())
    again = DataLoader(loader.dataset, batch_size=None)
    if make == "dispatched":
        loader = accelerator.prepare(again)
    else:
        loader = accelerate.data_loader.prepare_data_loader(again)
    with pytest.raises(ValueError, match=r"give accelerator\.prepare\(\) the SiftingDataLoader"):
        next(iter(loader))


def test_a_wrapper_that_hides_the_loader_from_prepare_is_warned_about():
    class Hidden:
        def __init__(self, loader: SiftingDataLoader) -> None:
            self.loader = loader

        def __getattr__(self, name: str) -> Any:
            return getattr(self.loader, name)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.loader)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    hidden = accelerator.prepare(Hidden(fixed(classifier())))
    with pytest.warns(UserWarning, match="this loader was not prepared"):
        first = next(iter(hidden))
    assert len(first["id"]) == BATCH


def test_a_checkpoint_without_a_state_is_warned_about(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(classifier())
    accelerator.save_state(str(tmp_path))
    accelerator.prepare(fixed(model))
    with pytest.warns(UserWarning, match="holds no state of the SiftingDataLoader"):
        accelerator.load_state(str(tmp_path))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("rows", [2, 24, 31, 36, 41])
def test_the_rows_of_a_rank_are_counted_as_accelerate_deals_them(rows, even, split, drop_last):
    for rank in range(3):
        shard = accelerate.data_loader.prepare_data_loader(
            DataLoader(Rows(rows), 6, drop_last=drop_last),
            num_processes=3,
            process_index=rank,
            split_batches=split,
            even_batches=even,
        )
        batches = Prepared(shard)
        size = 2 if split else 6
        assert batches.batch_size == size
        assert batches.rows(size) == sum(len(batch["id"]) for batch in batches)


@pytest.mark.filterwarnings("ignore:resuming by drawing")
def test_a_stream_without_a_length_divided_among_ranks_is_sifted_and_resumed():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            rows = Rows(24)
            return (rows[number] for number in range(len(rows)))

    def made() -> SiftingDataLoader:
        divided = accelerate.data_loader.prepare_data_loader(
            DataLoader(Stream(), 2), num_processes=2, process_index=1, dispatch_batches=False
        )
        return SiftingDataLoader.wrap(
            divided, model=classifier(), warmup_steps=1, criterion="random"
        )

    loader, found = made(), []
    for batch in loader:
        found.append(batch["id"].tolist())
        if len(found) == 2:
            state = loader.state_dict()
    assert found[0] == [2, 3] and len(found) == 4  # 12 rows of this rank: 2, then 4, 4 and 2
    resumed = made()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert ids(resumed) == found[2:]


KINDS = {
    "": None,
    "split": DataLoaderConfiguration(split_batches=True),
    "dispatch": DataLoaderConfiguration(dispatch_batches=True),
    "seeded": DataLoaderConfiguration(use_seedable_sampler=True),
    "stateful": DataLoaderConfiguration(use_stateful_dataloader=True),
}


def rank_of_two(rank: int, port: int, folder: Path, kind: str) -> None:
    """All that takes two ranks, in one pair of processes; what they saw is compared outside."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    rows = rows_of(kind)

    def run(
        make: Callable[..., DataLoader], *arguments: Any, keep: float = 0.5, **options: Any
    ) -> Log:
        more = {} if make is plain else {"keep": keep}
        configuration = KINDS[kind]
        return script(
            lambda m: make(m, rows, **more), *arguments, configuration=configuration, **options
        )

    logs: dict[str, Any] = {
        "plain": run(plain),
        "all": run(sifting, keep=1.0),
        "still": run(sifting, rate=0.0),
        "straight": run(sifting, folder, save_every=2),
        "resumed": run(sifting, folder, resume="step_2"),
    }
    if not kind:
        logs["errors"] = [mistake("unprepared"), mistake("rebuilt")]
        logs["shards"] = own_shares(folder)
        uneven = DataLoaderConfiguration(even_batches=False)  # 28 and 24 rows: 5 and 4 batches
        logs["uneven"] = script(lambda m: fixed(m, 52), configuration=uneven, epochs=1)
    torch.save(logs, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def rows_of(kind: str) -> int:
    # An epoch that accelerate dispatches is filled up with the first rows of that iteration, resumed or not.
    return 84 if kind == "dispatch" else ROWS


def mistake(kind: str) -> str:
    accelerator = Accelerator(cpu=True)
    loader = fixed(classifier())
    if kind == "rebuilt":
        loader = accelerator.prepare(DataLoader(loader.dataset, batch_size=None))
    with pytest.raises(ValueError) as raised:
        next(iter(loader))
    return str(raised.value)


def own_shares(folder: Path) -> tuple[list[list[int]], list[list[int]], int, str]:
    """Batches of TokenShards, those after a restart in the middle, where the last was known, and an error."""

    def made() -> tuple[Accelerator, SiftingDataLoader]:
        accelerator = Accelerator(cpu=True)
        shards = TokenShards(DEMO, with_ids=True)
        loader = SiftingDataLoader(
            shards, 64, model=classifier(), criterion="random", warmup_steps=1
        )
        return accelerator, accelerator.prepare(loader)

    accelerator, loader = made()
    found, last = [], []
    for number, batch in enumerate(loader):
        found.append(batch["id"].tolist())
        if accelerator.gradient_state.end_of_dataloader:
            last.append(number)
        if number == 2:
            accelerator.save_state(str(folder / "shards"))
    assert last == [len(found) - 1]
    accelerator, loader = made()
    accelerator.load_state(str(folder / "shards"))
    rest = ids(accelerator.skip_first_batches(loader, 3))
    twice = accelerator.prepare(DataLoader(TokenShards(DEMO), 64))
    with pytest.raises(ValueError) as raised:
        SiftingDataLoader.wrap(twice, model=classifier())
    return found, rest, len(TokenShards(DEMO)), str(raised.value)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind]


@pytest.mark.parametrize("kind", ["", *SLOW])
def test_on_two_ranks_each_sifts_its_own_share_and_resumes_in_it(tmp_path, kind):
    mp.spawn(rank_of_two, (free_port(), tmp_path, kind), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    rows, size = rows_of(kind), BATCH // 2 if kind == "split" else BATCH
    filled = 2 * sum(map(len, one["plain"].ids[: one["plain"].epochs[0]])) - rows
    for log in (one, two):
        assert log["all"] == log["plain"]  # lengths too, from which schedules are made
        # What accelerate dispatches comes in an order of the global stream, which dropout has moved since.
        comparable = log["still"].epochs[0] if kind == "dispatch" else None
        assert log["still"].ids[:comparable] == kept_of(log["plain"], rows, size)[:comparable]
        assert log["resumed"].same_from(log["straight"])
        assert log["resumed"].weights == log["straight"].weights
        lengths = log["straight"].epochs
        assert log["straight"].updates == [
            number % ACCUMULATION == 0 or number == length
            for length in lengths
            for number in range(1, length + 1)
        ]
        assert log["straight"].lengths[1] == lengths[0]
    for name in ("plain", "still"):
        seen = [row for log in (one, two) for row in rows_in(log[name], 0)]
        assert len(seen) - len({*seen}) <= filled < 8
    if not kind:
        seen = []
        for log in (one, two):
            handed, rest, count, error = log["shards"]
            assert rest == handed[3:]
            assert "it would be divided twice" in error
            seen += [row for batch in handed for row in batch]
        assert len({*seen}) == len(seen) == 2 * 64 * (1 + (count - 64) // 128)
        assert one["uneven"].updates == two["uneven"].updates == [False, False, True, True]
    for log in (one, two):
        for text, expected in zip(
            log.get("errors", ()), ("2 ranks run", "the SiftingDataLoader itself"), strict=False
        ):
            assert expected in text


def rows_in(log: Log, epoch: int) -> list[int]:
    first = sum(log.epochs[:epoch])
    return [row for batch in log.ids[first : first + log.epochs[epoch]] for row in batch]


def kept_of(drawn: Log, count: int, size: int) -> list[list[int]]:
    """What a model that stands still keeps of what the plain loader drew."""
    set_seed(5)
    early, rows = EarlyExit(classifier(), layer=1), Rows(count)
    kept: list[list[int]] = []
    for epoch in range(EPOCHS):
        left = torch.tensor(rows_in(drawn, epoch))
        while len(left) >= size:
            pool = size if len(kept) < 2 else 2 * size
            index, left = left[:pool], left[pool:]
            logits = early.logits({"x": rows.x[index], "labels": rows.labels[index]})
            scores = cross_entropy(logits, rows.labels[index], reduction="none")
            kept.append(index[scores.topk(size).indices.sort().values].tolist())
    return kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
def test_the_example_resumes_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(DEMO.parent.parent / "examples"))
    from accelerate_loop import main

    given = [
        "--split=val",
        "--epochs=1",
        "--accumulation=3",
        f"--checkpoint={tmp_path}",
        "--save-after=6",
    ]
    straight = main(given)
    assert "kept 32 of 64 candidates" in capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert main([*given, "--resume"]) == straight[6:]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    all_kept = write(tmp_path / "mlm-0", (40,), "mlm")  # the last pool is a batch
    main([str(all_kept), "--epochs=1"])
    assert "kept 8 of 8 candidates" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_of_a_prepared_loader_are_begun_where_the_epoch_was_left():
    def made() -> SiftingDataLoader:
        set_seed(5)
        loader = SiftingDataLoader(
            Rows(), BATCH, shuffle=True, num_workers=2, model=classifier(), warmup_steps=2
        )
        return Accelerator(cpu=True).prepare(loader)

    loader = made()
    straight, states = [], []
    for batch in loader:
        straight.append(batch["id"].tolist())
        states.append(json.dumps(loader.state_dict()))
    assert straight == ids(prepared_alone()[1])
    again = made()
    again.load_state_dict(json.loads(states[4]))
    assert ids(again) == straight[5:]
