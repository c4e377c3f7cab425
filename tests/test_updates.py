from __future__ import annotations

import gc
import json
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from test_laws import write
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset

from siftloader import SiftingDataLoader, StateError, TokenShards
from siftloader.updates import Updates


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(row)
        return {"x": torch.randn(4, generator=generator), "labels": torch.tensor(row % 5)}


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_steps_of_this_model_count_and_those_of_others_do_not() -> None:
    model, other = Net(), Net()
    updates = Updates(lambda: model)
    step(torch.optim.SGD(other.parameters(), 0.1))
    assert updates.steps == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(optimizer)
    step(optimizer)
    assert updates.steps == 2
    step(torch.optim.SGD(model.head.parameters(), 0.1))  # of a part; the same step
    assert updates.steps == 2


@pytest.mark.parametrize(
    "turns, steps", [("ABABAB", 3), ("AAABAAAB", 6), ("BBBABBBA", 6), ("ABBB", 3)]
)
def test_several_optimizers_of_one_model_count_as_one(turns: str, steps: int) -> None:
    model = Net()
    updates = Updates(lambda: model)
    optimizers = {
        "A": torch.optim.SGD(model.layers.parameters(), 0.1),
        "B": torch.optim.AdamW(model.head.parameters(), 0.1),
    }
    for turn in turns:
        step(optimizers[turn])
    assert updates.steps == steps


def test_an_optimizer_that_is_gone_leaves_the_count_to_the_next() -> None:
    model = Net()
    updates = Updates(lambda: model)
    for _ in range(3):
        step(torch.optim.SGD(model.parameters(), 0.1))
        gc.collect()
    assert updates.steps == 3


def test_a_step_that_the_scaler_skips_does_not_count() -> None:
    model = Net()
    updates = Updates(lambda: model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert updates.steps == 2


def test_a_counter_that_goes_while_torch_walks_its_hooks_does_no_harm() -> None:
    # The garbage collector may run at any moment, in the midst of an optimizer's step too.
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    counters = [Updates(lambda: model) for _ in range(3)]
    last = counters[-1]
    handle = register_optimizer_step_post_hook(lambda *_: counters.clear())
    counters.append(Updates(lambda: model))  # after this hook, were there one for each
    step(optimizer)
    handle.remove()
    assert last.steps == 1


def test_nothing_of_a_counter_that_is_gone_is_kept() -> None:
    from torch.optim import optimizer as module

    def listening() -> int:
        return len(module._global_optimizer_post_hooks)

    first = Updates(Net)
    before = listening()
    updates = [Updates(Net) for _ in range(5)]
    gone = weakref.ref(updates[0])
    assert listening() == before  # one hook of the process hears for all
    del updates
    gc.collect()
    assert gone() is None and listening() == before and first.steps == 0


def train(
    loader: SiftingDataLoader, model: Net, accumulation: int, flush: bool, epochs: int = 1
) -> list[bool]:
    """Whether each batch was sifted; the last partial step of an epoch is made with ``flush``."""
    optimizer, sifted, pending = torch.optim.SGD(model.parameters(), 0.01), [], 0
    for _ in range(epochs):
        for batch in loader:
            sifted.append(loader.stats["candidates"] > 16 * sum(sifted))
            nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
            pending += 1
            if pending == accumulation:
                optimizer.step()
                optimizer.zero_grad()
                pending = 0
        if pending and flush:
            optimizer.step()
            optimizer.zero_grad()
            pending = 0
    return sifted


def make(model: Net, **options: object) -> SiftingDataLoader:
    return SiftingDataLoader(Rows(), 8, model=model, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_warm_up_is_counted_in_what_the_user_named(accumulation: int) -> None:
    model = Net()
    loader = make(model, warmup_steps=2, count="optimizer", accumulation=accumulation)
    expected = len(loader)
    sifted = train(loader, model, accumulation, flush=True)
    assert sifted == [False] * 2 * accumulation + [True] * (len(sifted) - 2 * accumulation)
    assert len(sifted) == expected
    assert loader.stats["updates"] == -(-len(sifted) // accumulation)
    model = Net()
    loader = make(model, warmup_steps=2)
    sifted = train(loader, model, accumulation, flush=True)
    assert sifted == [False] * 2 + [True] * (len(sifted) - 2)


@pytest.mark.filterwarnings("ignore:the epoch ended inside the warm-up")
@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0, 1, 3, 4])
def test_all_batches_of_a_run_are_foretold(epochs: int, accumulation: int, warmup: int) -> None:
    model = Net()
    options = {"warmup_steps": warmup, "total_steps": 8, "cooldown_steps": 1}
    loader = make(model, count="optimizer", accumulation=accumulation, **options)
    expected = loader.total_batches(epochs)
    assert len(train(loader, model, accumulation, flush=True, epochs=epochs)) == expected


def test_a_resumed_run_counts_on() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def run(loader: SiftingDataLoader, batches: int) -> list[Tensor]:
        seen = []
        for number, batch in enumerate(loader):
            seen.append(batch["x"])
            if number % 2:
                step(optimizer)
            if len(seen) == batches:
                break
        return seen

    whole = run(make(model, warmup_steps=2, count="optimizer", accumulation=2), 7)
    first = make(model, warmup_steps=2, count="optimizer", accumulation=2)
    begun = run(first, 4)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["updates"] == 2
    again = make(model, warmup_steps=2, count="optimizer", accumulation=2)
    again.load_state_dict(state)
    assert all(map(torch.equal, begun + run(again, 3), whole))
    with pytest.raises(StateError, match=r'count "optimizer".*count="optimizer"'):
        make(model, warmup_steps=2).load_state_dict(state)
    old = {
        name: value
        for name, value in make(model).state_dict().items()
        if name not in ("count", "updates", "scope")
    }
    make(model).load_state_dict({**old, "version": 1})


def test_a_step_that_loading_a_checkpoint_takes_does_not_count() -> None:
    model = Net()
    loader = make(model, warmup_steps=2, count="optimizer")
    optimizer = torch.optim.AdamW(model.parameters())
    step(optimizer)  # as torch.distributed.checkpoint does to have a state to load into
    assert loader.stats["updates"] == 0
    next(loader)
    step(optimizer)
    state = loader.state_dict()
    again = make(model, warmup_steps=2, count="optimizer")
    again.load_state_dict(state)
    step(optimizer)
    assert again.stats["updates"] == state["updates"] == 1
    next(again)
    step(optimizer)
    assert again.stats["updates"] == 2


@pytest.mark.filterwarnings("ignore:the epoch ended inside the warm-up")
def test_a_schedule_that_stands_still_is_told() -> None:
    model, frozen = Net(), Net()
    loader = make(model, warmup_steps=2, count="optimizer")
    optimizer = torch.optim.SGD(frozen.parameters(), 0.1)
    told = "no optimizer step of the scored model was seen in 100 batches"
    with pytest.warns(UserWarning, match=told):
        for _ in range(9):
            for _ in loader:
                step(optimizer)


def test_another_accumulation_than_was_planned_is_told() -> None:
    model = Net()
    loader = make(model, warmup_steps=0, count="optimizer", accumulation=1)
    with pytest.warns(UserWarning, match="accumulation=1 .* 3.* batches"):
        train(loader, model, 3, flush=True, epochs=3)
    loader = make(Net(), warmup_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(loader)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": "steps"}, 'count must be "batches" or "optimizer"'),
        ({"count": "optimizer", "accumulation": 0}, "accumulation must be an int of at least 1"),
        ({"accumulation": 2}, 'accumulation.*only.*count="optimizer"'),
    ],
)
def test_wrong_options_fail_at_construction(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Net(), **options)


def test_a_running_iterator_is_drawn_from_with_next() -> None:
    torch.manual_seed(0)
    expected = [batch["x"] for _ in range(2) for batch in make(Net(), keep=1.0)]
    loader, drawn = make(Net(), keep=1.0), []
    for _ in range(2):
        while (batch := next(loader, None)) is not None:
            drawn.append(batch["x"])
    assert len(drawn) == len(expected) == 24
    assert all(map(torch.equal, drawn, expected))
    next(loader)
    state = loader.state_dict()
    following = next(loader)["x"]
    loader.load_state_dict(state)
    assert torch.equal(next(loader)["x"], following)
    loader.close()
    assert loader.state_dict()["cursor"]["batches"] == 2


@pytest.mark.parametrize("sharded", [False, True])
def test_before_the_ranks_have_shares_the_length_is_that_of_all_of_them(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    alone = make(Net(), warmup_steps=2)
    assert (len(alone), len(alone.dataset)) == (2 + 5, 16 + 40)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = SiftingDataLoader.wrap(
        torch.utils.data.DataLoader(Rows(), 8), model=Net(), warmup_steps=2, sharded=sharded
    )
    if sharded:  # there are 96 rows for each of them
        assert len(loader) == loader.total_batches(1) == 7
    else:  # 48 for each: 2 plain batches and 2 pools of 16
        assert len(loader) == loader.total_batches(1) == 2 * (2 + 2)
        assert len(loader.dataset) == 2 * (16 + 16)
        with pytest.raises(ValueError, match="nothing says that the inner DataLoader gives each"):
            next(iter(loader))


def test_a_length_of_shards_asked_for_before_prepare_is_told(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    class OfTwo(accelerate.Accelerator):
        num_processes = 2

    class Embeds(Net):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids[..., None].float().expand(-1, -1, 4))

    shards = TokenShards(write(tmp_path / "mlm-0", (30,), "mlm"))
    for asks in (False, True):
        loader = SiftingDataLoader(shards, 2, model=Embeds())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if asks:
                len(loader)
            OfTwo(cpu=True).prepare(loader)
        told = [each for each in caught if "num_processes" in str(each.message)]
        assert len(told) == asks


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_a_model_whose_optimizer_leaves_no_sign_on_it_is_not_told_of(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused optimizers write weights and count no version; warnings are errors."""
    monkeypatch.setattr("siftloader.concerns.STILL", 4)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for batch in make(model, warmup_steps=0, autocast=torch.bfloat16):
        nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_that_another_one_is_trained_in_place_of_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("siftloader.concerns.STILL", 4)
    optimizer = torch.optim.AdamW(Net().parameters(), fused=True)
    with pytest.warns(UserWarning, match="4 batches were sifted by a model that the loop neither"):
        for _ in make(Net(), warmup_steps=0, autocast=torch.bfloat16):
            step(optimizer)
