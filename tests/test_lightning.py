"""Lightning's Trainer and Fabric: they sift, resume, and tell where they would not."""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, scaled
from ranks import on_ranks
from test_laws import write
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from siftloader import EarlyExit, SiftingDataLoader, TokenShards
from siftloader.errors import ScoringError, StateError


lightning = pytest.importorskip("lightning")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    # Lightning's, of every data set that is both iterable and sized; and of few workers
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
ROWS, BATCH, EPOCH = 64, 4, 8  # 8 sifted batches in an epoch


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 8, generator=draw)
        self.labels = torch.randint(0, 10, (ROWS,), generator=draw)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.x[row], "labels": self.labels[row], "id": torch.tensor(row)}


def network(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(1)
    model = scaled(Classifier(3), 3.0).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


Maker = Callable[["Module"], Any]


class Module(lightning.LightningModule):
    """A user's module; ``make`` is its one line that differs."""

    def __init__(self, make: Maker | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = network(dropout)
        self.make = make
        self.seen: list[list[int]] = []
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = functional.cross_entropy(self(batch["x"]), batch["labels"])
        self.seen.append(batch["id"].tolist())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        assert not self.model.training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        assert self.make is not None
        self.loader = self.make(self)
        return self.loader


class Saving(Module):
    """As in examples/lightning_module.py."""

    state: Any = None

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        if self.state is not None:
            loader.load_state_dict(self.state)
        return loader

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loader"] = self.loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.state = checkpoint["loader"]


def sifting(module: Module, **options: Any) -> SiftingDataLoader:
    options = {"shuffle": True, "warmup_steps": 0, "model": module.model, **options}
    return SiftingDataLoader(Rows(), BATCH, **options)


def by_epoch(module: Module, **options: Any) -> SiftingDataLoader:
    # Its order is a function of the epoch alone, if it is told.
    sampler = DistributedSampler(Rows(), 1, 0)
    return sifting(module, shuffle=False, sampler=sampler, **options)


def trainer(**options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 2}
    return lightning.Trainer(**{**quiet, **options})


def fit(module: Module, *arguments: Any, ckpt: Path | None = None, **options: Any) -> Module:
    torch.manual_seed(5)
    trainer(**options).fit(module, *arguments, ckpt_path=ckpt)
    return module


def by_hand(epochs: int, accumulate: int) -> tuple[list[list[int]], list[float]]:
    """A loop that draws pools, scores them with EarlyExit, and trains on the better half."""
    torch.manual_seed(5)
    model = Module().model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(5)
    seen, losses = [], []
    for _ in range(epochs):
        for number, pool in enumerate(DataLoader(Rows(), 2 * BATCH, shuffle=True), 1):
            with torch.no_grad():
                logits = EarlyExit(model, 1).logits({"x": pool["x"]})
            scores = functional.cross_entropy(logits, pool["labels"], reduction="none")
            kept = scores.topk(BATCH).indices.sort().values
            loss = functional.cross_entropy(model(pool["x"][kept]), pool["labels"][kept])
            (loss / accumulate).backward()
            seen.append(pool["id"][kept].tolist())
            losses.append(loss.item())
            if (
                number % accumulate == 0 or number == EPOCH
            ):  # the last step of an epoch is a partial one
                optimizer.step()
                optimizer.zero_grad()
    return seen, losses


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trainer_trains_on_the_better_half_and_does_the_last_partial_step(accumulate):
    module = fit(Module(sifting), accumulate_grad_batches=accumulate)
    seen, losses = by_hand(2, accumulate)
    assert module.seen == seen
    assert module.losses == pytest.approx(losses, rel=1e-6)
    assert module.loader.stats["candidates"] == 2 * ROWS


def test_wherever_the_loader_comes_from_the_same_is_trained():
    class Data(lightning.LightningDataModule):
        def train_dataloader(self) -> Any:
            return sifting(module)

    expected = fit(Module(sifting)).losses
    module = Module()
    fit(module, sifting(module))
    assert module.losses == expected
    module = Module()
    fit(module, Data())
    assert module.losses == expected
    # the LightningModule itself is scored like the model in it
    assert fit(Module(lambda self: sifting(self, model=self))).losses == expected


def test_with_keep_1_it_is_the_plain_loader_bit_for_bit():
    def plain(module: Module) -> Any:
        return DataLoader(Rows(), BATCH, shuffle=True)

    options = {"accumulate_grad_batches": 3, "val_check_interval": 5, "limit_train_batches": 13}
    found = [
        fit(Module(make, dropout=0.1), **options)
        for make in (plain, lambda module: sifting(module, keep=1.0))
    ]
    assert len(found[0].losses) == 26
    assert found[0].losses == found[1].losses and found[0].seen == found[1].seen


def test_a_validation_in_the_middle_of_an_epoch_changes_nothing():
    expected = fit(Module(by_epoch))
    module = Module(by_epoch)
    fit(module, None, DataLoader(Rows(), BATCH), val_check_interval=3, num_sanity_val_steps=2)
    assert (module.seen, module.losses) == (expected.seen, expected.losses)


@pytest.mark.parametrize("steps", [3, 11])
def test_max_steps_and_limits_stop_where_they_say(steps):
    expected = fit(Module(by_epoch), max_epochs=3).losses
    assert fit(Module(by_epoch), max_epochs=-1, max_steps=steps).losses == expected[:steps]
    module = fit(Module(by_epoch), max_epochs=3, limit_train_batches=5)
    assert len(module.seen) == 15 and module.seen[:5] == fit(Module(by_epoch)).seen[:5]
    epochs = [{*chain(*module.seen[first : first + 5])} for first in (0, 5, 10)]
    assert epochs[0] != epochs[1] != epochs[2], "each in another order"


def test_every_epoch_is_told_to_the_sampler_inside():
    told: list[int] = []

    class Told(DistributedSampler[Any]):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)
            super().set_epoch(epoch)

    fit(Module(lambda self: sifting(self, shuffle=False, sampler=Told(Rows(), 1, 0))))
    assert sorted({*told}) == [0, 1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, Saving]:
    """Three epochs, the first with a warm-up in it, and a checkpoint after every optimizer step."""
    folder = tmp_path_factory.mktemp("straight")
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1
    )
    module = Saving(lambda self: by_epoch(self, warmup_steps=10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            module,
            max_epochs=3,
            accumulate_grad_batches=3,
            callbacks=[saving],
            enable_checkpointing=True,
        )
    assert [len(module.seen)] == [13 + 2 * EPOCH]
    return folder, module


# After how many batches: inside the warm-up, after it, with the last batch of an epoch, inside the next.
@pytest.mark.parametrize(("step", "batches"), [(1, 3), (4, 12), (5, 13), (6, 16), (8, 21)])
def test_killed_and_resumed_it_goes_on_with_exactly_the_right_samples(straight, step, batches):
    folder, whole = straight
    module = Saving(lambda self: by_epoch(self, warmup_steps=10))
    fit(
        module,
        ckpt=folder / f"step={step}.ckpt",
        max_epochs=3,
        accumulate_grad_batches=3,
    )
    assert module.seen == whole.seen[batches:]
    assert module.losses == whole.losses[batches:], "the last partial steps were done, too"


def test_lightning_alone_restores_it_inside_an_epoch(straight):
    folder, whole = straight
    module = Module(lambda self: by_epoch(self, warmup_steps=10))
    fit(module, ckpt=folder / "step=4.ckpt", max_epochs=3, accumulate_grad_batches=3)
    assert module.seen == whole.seen[12:]


class Planned(Module):
    """Asks how long the run will be, for a schedule: Lightning sets up its loaders then, before it restores them."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.filterwarnings("ignore:epoch 1 begins")
@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_state_that_lightning_forgets_is_told(straight, step):
    folder, _ = straight
    module = Planned(lambda self: by_epoch(self, warmup_steps=10))
    with pytest.raises(StateError, match="on_load_checkpoint"):
        fit(module, ckpt=folder / f"step={step}.ckpt", max_epochs=3, accumulate_grad_batches=3)
    assert not module.seen


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_search_for_the_learning_rate_is_no_loss(tmp_path):
    module = Planned(lambda self: sifting(self))
    module.lr = 0.1
    run = trainer(default_root_dir=tmp_path)
    lightning.pytorch.tuner.Tuner(run).lr_find(module, num_training=3, update_attr=False)
    searched = len(module.seen)
    run.fit(module)
    assert len(module.seen) == searched + 2 * EPOCH


class PlannedSaving(Planned, Saving):
    pass


@pytest.mark.parametrize(("step", "batches"), [(4, 12), (5, 13)])
def test_a_planned_run_that_restores_its_loader_goes_on(straight, step, batches):
    folder, whole = straight
    module = PlannedSaving(lambda self: by_epoch(self, warmup_steps=10))
    fit(module, ckpt=folder / f"step={step}.ckpt", max_epochs=3, accumulate_grad_batches=3)
    assert module.seen == whole.seen[batches:]


def test_a_warm_up_that_begins_anew_is_told(tmp_path):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "end", save_on_train_epoch_end=True
    )
    options = {"callbacks": [saving], "enable_checkpointing": True}
    fit(Module(lambda self: by_epoch(self, warmup_steps=3)), max_epochs=1, **options)
    with pytest.warns(
        UserWarning, match="epoch 1 begins, .* counts its steps from 0.*on_save_check"
    ):
        fit(Module(lambda self: by_epoch(self, warmup_steps=3)), ckpt=tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match="epoch 1 begins, .*build it once, not for every epoch"):
        fit(
            Module(lambda self: by_epoch(self, warmup_steps=3)),
            reload_dataloaders_every_n_epochs=1,
        )


def test_a_loader_built_anew_for_every_epoch_has_the_order_of_that_epoch():
    expected = fit(Module(by_epoch), max_epochs=3)
    assert (
        fit(Module(by_epoch), max_epochs=3, reload_dataloaders_every_n_epochs=1).seen
        == expected.seen
    )


def test_shards_are_read_in_the_order_of_the_epoch_however_often_the_loader_is_built(tmp_path):
    write(tmp_path / "mlm-0", (40,), "mlm")

    class Shards(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            self.seen.append(batch["id"].tolist())
            return self(batch["input_ids"][:, :8].float()).square().mean()

    def make(module: Module) -> Any:
        shards = TokenShards(tmp_path / "mlm-0", with_ids=True)
        return SiftingDataLoader(shards, 4, model=module.model, warmup_steps=0, criterion="random")

    once, anew = (
        fit(Shards(make), max_epochs=3, reload_dataloaders_every_n_epochs=every).seen
        for every in (0, 1)
    )
    assert len(once) == len(anew) == 15
    drawn = [[*chain(*each[first : first + 5])] for each in (once, anew) for first in (0, 5, 10)]
    pools = [
        b["id"].tolist() for b in TokenShards(tmp_path / "mlm-0", with_ids=True).read_batches(8, 1)
    ]
    for seen in (drawn[1], drawn[4]):
        assert all({*seen[4 * n : 4 * n + 4]} <= {*pool} for n, pool in enumerate(pools))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_lightning_may_not_build_it_anew_with_another_sampler(inside):
    with pytest.raises(
        TypeError, match=r"build this SiftingDataLoader anew .*overfit_batches.*shuffle=F"
    ):
        if inside:
            fit(Module(sifting), overfit_batches=2)
        else:
            module = Module()
            fit(module, sifting(module), overfit_batches=2)
    in_order = fit(Module(lambda self: sifting(self, shuffle=False)), overfit_batches=2)
    drawn = {row for batch in in_order.seen for row in batch}
    assert drawn <= {*range(16)} and len(in_order.seen) == 4


@pytest.mark.parametrize("itself", [False, True])
def test_the_precision_of_the_trainer_is_learned(itself):
    module = Module(lambda self: sifting(self, model=self if itself else self.model))
    fit(module, precision="bf16-mixed")
    assert module.loader.state_dict()["precision"] == "bfloat16"


def test_a_model_in_bf16_is_scored_in_bf16():
    class Tokens(Module):
        def __init__(self, make: Maker) -> None:
            super().__init__(make)
            torch.manual_seed(0)
            self.model = scaled(Lm(), 3.0)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            assert self.model.head.weight.dtype == torch.bfloat16
            return loss_of(self.model, batch)

    module = Tokens(
        lambda self: SiftingDataLoader(
            tokens(), 4, model=self.model, score_fn=loss_of, warmup_steps=0
        )
    )
    fit(module, precision="bf16-true")
    assert module.loader.stats["kept"] == 32 and module.loader.stats["nonfinite"] == 0
    # Lightning casts what is no id after the loader, so such a batch is cast for its scores, too.
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        fit(Module(sifting), precision="bf16-true")

    def cast(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch["x"].bfloat16()), batch["labels"])

    fit(Module(lambda self: sifting(self, score_fn=cast)), precision="bf16-true")


def test_workers_are_seeded_as_lightning_seeds_them(monkeypatch):
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    seen = []

    def make(module: Module) -> Any:
        loader = sifting(module)
        seen.append(loader._source.loader)
        return loader

    fit(Module(make), max_epochs=1)
    assert seen[0].worker_init_fn.func.__name__ == "pl_worker_init_function"


def test_a_model_that_is_not_the_one_trained_is_told(monkeypatch):
    monkeypatch.setattr("siftloader.concerns.STILL", 5)

    class Late(Module):
        def configure_model(self) -> None:
            self.model = network()

    module = Late()
    with pytest.warns(UserWarning, match="5 batches were sifted by a model that the loop neither"):
        fit(module, sifting(module))
    fit(Late(lambda self: sifting(self)))  # made when the model is there
    fit(Late(lambda self: sifting(self, model=lambda: self.model)))
    frozen = network().requires_grad_(False)
    fit(Module(lambda self: sifting(self, model=frozen)))  # a proxy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_module_is_scored_like_the_module():
    expected = fit(Module(sifting)).losses
    module = Module(sifting)
    fit(torch.compile(module, backend="eager"))
    assert module.losses == pytest.approx(expected, rel=1e-6)
    # litgpt compiles before setup(), which compiles again inside of its wrapper
    eager = [*fabric_loop(fabric_of(), over(), 9)]
    compiled = [
        *fabric_loop(fabric_of(), over(), 9, prepare=partial(torch.compile, backend="eager"))
    ]
    assert [seen for seen, _ in compiled] == [seen for seen, _ in eager]
    torch._dynamo.reset()


# Fabric


class Lm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def loss_of(model: Any, rows: Tensor) -> Tensor:
    # Cross-entropy in chunks, as litgpt has it.
    logits, targets = model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
    parts = zip(logits.split(20), targets.split(20), strict=True)
    each = [functional.cross_entropy(*part, reduction="none") for part in parts]
    return torch.cat(each).mean()


def tokens() -> Tensor:
    return torch.randint(0, 50, (32, 9), generator=torch.Generator().manual_seed(0))


def fabric_of(**options: Any) -> Any:
    return lightning.Fabric(accelerator="cpu", devices=1, **options)


def fabric_loop(
    fabric: Any,
    make: Callable[[nn.Module], Any],
    steps: int,
    checkpoint: Path | None = None,
    prepare: Callable[[nn.Module], Any] = lambda model: model,
) -> Iterator[tuple[list[int], float]]:
    """A Fabric script as a user has it; a checkpoint is taken up, and written after ``steps``."""
    model = fabric.setup(prepare(network(0.0)))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 0.1))
    loader = fabric.setup_dataloaders(make(model))
    state = {"model": model, "optimizer": optimizer, "train_dataloader": loader, "iter_num": 0}
    if checkpoint is not None and checkpoint.exists():
        fabric.load(checkpoint, state)
    end = state["iter_num"] + steps
    while True:
        for batch in loader:
            state["iter_num"] += 1
            accumulating = state["iter_num"] % 3 != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                loss = functional.cross_entropy(model(batch["x"]), batch["labels"])
                fabric.backward(loss)
            if not accumulating:
                optimizer.step()
                optimizer.zero_grad()
            yield batch["id"].tolist(), loss.item()
            if state["iter_num"] == end:
                if checkpoint is not None:
                    fabric.save(checkpoint, state)
                return


def over(**options: Any) -> Callable[[nn.Module], Any]:
    options = {"warmup_steps": 0, "sampler": DistributedSampler(Rows(), 1, 0), **options}
    return lambda model: SiftingDataLoader(Rows(), BATCH, model=model, **options)


def test_fabric_is_resumed_in_any_epoch_by_its_own_checkpoints(tmp_path):
    straight = [*fabric_loop(fabric_of(), over(), 30)]
    assert straight[0][0] != straight[8][0] != straight[16][0]
    file = tmp_path / "checkpoint.pt"
    for first, steps in ((0, 3), (3, 9), (12, 12), (24, 6)):  # 24 is the end of an epoch
        found = [*fabric_loop(fabric_of(), over(), steps, file)]
        assert found == straight[first : first + steps]
    saved = torch.load(file, weights_only=True)["train_dataloader"]
    assert saved["stats"]["steps"] == 30 and len(json.dumps(saved)) < 3000, "no model in there"


def test_fabric_with_keep_1_is_the_plain_loader_bit_for_bit():
    found = []
    for make in (
        over(keep=1.0),
        lambda _: DataLoader(Rows(), BATCH, sampler=DistributedSampler(Rows(), 1, 0)),
    ):
        torch.manual_seed(5)
        found.append([*fabric_loop(fabric_of(), make, 35)])
    assert found[0] == found[1]


def test_fabric_owns_the_precision(tmp_path):
    loaders = []

    def make(model: nn.Module) -> Any:
        loaders.append(over()(model))
        return loaders[-1]

    list(fabric_loop(fabric_of(precision="bf16-mixed"), make, 4))
    scores = loaders[0].stats["score_kept"]
    list(fabric_loop(fabric_of(), make, 4))
    assert scores != loaders[1].stats["score_kept"]
    assert scores == pytest.approx(loaders[1].stats["score_kept"], rel=0.05)
    # A loader made on the model as it was before setup() learns it from the first forward.
    list(fabric_loop(fabric_of(precision="bf16-mixed"), lambda model: make(model.module), 4))
    assert loaders[2].state_dict()["precision"] == "bfloat16"


def test_a_bare_tensor_needs_the_lines_of_the_loop_and_no_more():
    rows = tokens()
    with pytest.raises(
        ScoringError, match=r"no labels in a Tensor.*score_fn= with .*ids\[:, 1:\]"
    ):
        next(iter(SiftingDataLoader(rows, 4, model=Lm())))
    torch.manual_seed(0)
    fabric, model = fabric_of(), scaled(Lm(), 3.0)
    model = fabric.setup(model)
    loader = fabric.setup_dataloaders(
        SiftingDataLoader(rows, 4, model=model, score_fn=loss_of, warmup_steps=0)
    )
    for pool, batch in zip(rows.split(8), loader, strict=True):
        logits = EarlyExit(model, 1).logits(pool[:, :-1])
        scores = functional.cross_entropy(
            logits.transpose(1, 2), pool[:, 1:], reduction="none"
        ).mean(1)
        assert torch.equal(batch, pool[scores.topk(4).indices.sort().values])
    assert len(loader) == 4


# Two ranks


def train_on(rank: int, port: int, folder: Path) -> None:
    """What a rank does under torchrun: Lightning, Fabric, and what they refuse."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    os.environ["TORCHELASTIC_RUN_ID"] = "1"  # as torchrun sets it
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    found: dict[str, Any] = {}
    module = Module(sifting)
    # Lightning trips over its own clean-up, and Python prints both: the reason is the first.
    with pytest.raises(RuntimeError) as failed:
        trainer(**options).fit(module)
    assert "2 ranks run, but nothing says" in str(failed.value.__context__)
    assert "use a DistributedSampler" in str(failed.value.__context__)

    class Shards(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            x = functional.one_hot(batch["input_ids"][:, :1] % 8, 8).float().squeeze(1)
            self.seen.append(batch["id"].tolist())
            return self(x).square().mean()

    shards = TokenShards(folder / "mlm-0", with_ids=True)
    module = Shards(
        lambda self: SiftingDataLoader(
            shards, 2, model=self.model, criterion="random", warmup_steps=2
        )
    )
    trainer(**options).fit(module)
    found["shards"] = module.seen
    module = Module(lambda self: sifting(self, shuffle=False, sampler=DistributedSampler(Rows())))
    trainer(**options, accumulate_grad_batches=3).fit(module)
    found["sampler"], found["weights"] = module.seen, [p.sum().item() for p in module.parameters()]
    pool = default_collate([Rows()[row] for row in [*DistributedSampler(Rows())][: 2 * BATCH]])
    logits = EarlyExit(Module().model, 1).logits({"x": pool["x"]})
    scores = functional.cross_entropy(logits, pool["labels"], reduction="none")
    assert module.seen[0] == pool["id"][scores.topk(BATCH).indices.sort().values].tolist()
    # Rank 0 saves, and its state serves both.
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=1, save_top_k=-1
    )
    make: Any = lambda self: sifting(self, shuffle=False, sampler=DistributedSampler(Rows()))  # noqa: E731
    trainer(**options, callbacks=[saving], enable_checkpointing=True).fit(Module(make))
    straight = Module(make)
    trainer(**options).fit(straight)
    for step in (3, 5):
        resumed = Module(make)
        trainer(**options).fit(resumed, ckpt_path=folder / f"step={step}.ckpt")
        assert (resumed.seen, resumed.losses) == (straight.seen[step:], straight.losses[step:])
    fabric = lightning.Fabric(accelerator="cpu", **options)
    fabric.launch()
    make = over(sampler=DistributedSampler(Rows()))
    looped = [*fabric_loop(fabric, make, 9)]
    file = folder / "checkpoint.pt"
    again = [*fabric_loop(fabric, make, 3, file), *fabric_loop(fabric, make, 6, file)]
    assert again == looped
    found["fabric"] = [seen for seen, _ in looped]
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_ranks_train_on_samples_of_their_own(tmp_path):
    write(tmp_path / "mlm-0", (42,), "mlm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_ranks(train_on, port, tmp_path)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["weights"] == two["weights"]
    for kind, epoch in (("sampler", 4), ("fabric", 4)):
        assert len(one[kind]) == len(two[kind]) >= 2 * epoch
        for first in range(0, 2 * epoch, epoch):
            mine, yours = ([*chain(*each[kind][first : first + epoch])] for each in (one, two))
            assert len({*mine, *yours}) == 4 * 2 * epoch, kind
    assert not {*one["shards"][0], *one["shards"][1]} & {*two["shards"][0], *two["shards"][1]}


# Examples


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_example_of_lightning_is_resumed(tmp_path, capsys):
    from lightning_module import main

    shards = write(tmp_path / "mlm-0", (300,), "mlm")
    options = [f"--shards={shards}", f"--folder={tmp_path}"]
    main([*options, "--epochs=1"])
    module = main([*options, "--epochs=2", f"--resume={tmp_path / 'last.ckpt'}"])
    assert module.loader.stats["epoch"] == 1 or module.loader.stats["steps"] > 5
    assert "candidates" in capsys.readouterr().out


def test_the_example_of_fabric_goes_on_from_its_checkpoint(tmp_path, capsys):
    from fabric_loop import main

    shards = write(tmp_path / "mlm-1", (100,), "mlm")
    options = [f"--shards={shards}", f"--folder={tmp_path}"]
    main([*options, "--steps=12"])
    assert main([*options, "--steps=16"]).stats["steps"] == 16
    assert "12 batches, 32 candidates, 16 kept" in capsys.readouterr().out
