"""``attach``: a Hugging Face Trainer that sifts: pytest tests/test_trainer.py

The reference scores every pool apart, with ``EarlyExit(...).logits``, a cross-entropy and the weights that the
kept half is then trained with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import LENGTH, VOCAB, bert
from test_laws import write
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from siftloader import EarlyExit, SiftError, SiftingDataLoader, StateError, TokenShards, attach


B, EVALUATED, ROWS = 4, 3, 50
Batch = dict[str, Tensor]


class Rows(Dataset[Batch]):
    def __init__(self, samples: int = ROWS, **more: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, VOCAB, (samples, LENGTH), generator=generator)
        hidden = torch.rand(samples, LENGTH, generator=generator) < 0.5
        self.fields = {"input_ids": ids, "labels": ids.masked_fill(hidden, -100), **more}

    def __len__(self) -> int:
        return len(self.fields["labels"])

    def __getitem__(self, index: int) -> Batch:
        return {name: values[index] for name, values in self.fields.items()}


class Collator:
    """Remembers the training rows that it collated, in the order in which they were drawn."""

    def __init__(self) -> None:
        self.drawn: list[Batch] = []

    def __call__(self, samples: list[Batch]) -> Batch:
        self.drawn += samples if len(samples) != EVALUATED else []
        return default_data_collator(samples)


class Watch(TrainerCallback):
    """What a model is trained on: batch by batch, update by update; and rows evaluated."""

    def __init__(self, trainer: Trainer) -> None:
        self.batches: list[Tensor] = []
        self.updates: list[int] = []  # batches trained on when each was done
        self.evaluated = 0
        self.expect: Iterator[list[Batch]] = iter([])  # the pools
        self.model: nn.Module = trainer.model
        self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        self.updates.append(len(self.batches))

    def _look(self, model: nn.Module, args: Any, batch: dict[str, Any]) -> None:
        if model is not self.model:  # its early exit
            return
        if not model.training:
            self.evaluated += len(batch["input_ids"])
            return
        ids = batch["input_ids"].clone()
        self.batches.append(ids)
        if pool := next(self.expect, None):
            assert torch.equal(ids, self._best(pool))

    def _best(self, pool: list[Batch]) -> Tensor:
        ids, labels = (
            torch.stack([row[name] for row in pool]) for name in ("input_ids", "labels")
        )
        if len(ids) <= B:
            return ids
        with torch.no_grad():
            logits = EarlyExit(self.model, layer=1).logits({"input_ids": ids})
        losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return ids[(losses.sum(1) / (labels != -100).sum(1)).topk(B).indices.sort().values]


def pools(drawn: list[Batch], rows: int, warmup: int) -> Iterator[list[Batch]]:
    """The rows of each step, epoch after epoch, from rows as they are drawn."""
    step = begin = 0
    while True:
        end = begin + rows
        while begin < end:
            size = min(B if step < warmup else 2 * B, end - begin)
            if size >= B or step < warmup:
                yield drawn[begin : begin + size]
                step += 1
            begin += size


def trainer_of(folder: Path, data: Any = None, **options: Any) -> Trainer:
    """A script, as it would be without siftloader; its model in eval mode, as from_pretrained leaves it."""
    torch.manual_seed(0)
    collator, model = options.pop("data_collator", None), options.pop("model", None)
    kind = options.pop("kind", Trainer)
    given = {"num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=B,
        per_device_eval_batch_size=EVALUATED,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **given,
    )
    return kind(
        bert(2).eval() if model is None else model,
        arguments,
        train_dataset=Rows() if data is None else data,
        eval_dataset=Rows(6),
        data_collator=collator,
    )


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def same_weights(one: Trainer, two: Trainer) -> bool:
    both = zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in both)


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_kept_are_those_of_the_reference_whatever_the_epochs_are_long(tmp_path, warmup):
    # 50 rows are 6 batches, and 2 too few for one; with 5 of warm-up they are 9.
    collator = Collator()
    options = {"num_train_epochs": 3, "gradient_accumulation_steps": 4, "eval_strategy": "steps"}
    trainer = trainer_of(tmp_path, data_collator=collator, eval_steps=2, **options)
    attached = attach(trainer, warmup_steps=warmup)
    watch = Watch(trainer)
    watch.expect = pools(collator.drawn, ROWS, warmup)
    trainer.train()
    epochs = [9, 6, 6] if warmup else [6, 6, 6]
    ends = [sum(epochs[:n]) for n in range(4)]
    wanted = [min(at, end) for begin, end in pairwise(ends) for at in range(begin + 4, end + 4, 4)]
    assert watch.updates == wanted, "what is left of an epoch is an update"
    assert trainer.state.max_steps == trainer.state.global_step == len(wanted)
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}, "the schedule spans the run"
    assert watch.evaluated == 6 * -(-len(wanted) // 2), "evaluation is not sifted"
    stats = attached.loader.stats
    assert stats["steps"] == ends[-1] and stats["kept"] == B * (ends[-1] - warmup)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["sift/steps"] for line in logged] == wanted
    assert logged[-1]["sift/kept"] == stats["kept"]


class Replay(Trainer):
    """Trains on batches that were recorded, epoch by epoch."""

    epochs: list[list[Batch]]

    def get_train_dataloader(self) -> Any:
        return Epochs(self.epochs)


class Epochs:
    def __init__(self, epochs: list[list[Batch]]) -> None:
        self.epochs, self.epoch = epochs, 0

    def __len__(self) -> int:
        return len(self.epochs[0])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        torch.empty((), dtype=torch.int64).random_()  # what iter(DataLoader) draws
        yield from self.epochs[self.epoch]


def test_training_is_that_of_a_run_fed_with_the_same_batches(tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=4)
    attach(trainer, warmup_steps=0)
    fed: list[Batch] = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, batch: fed.append(dict(batch)) if model.training else None,
        with_kwargs=True,
    )
    trainer.train()
    assert len(fed) == 12
    replayed = trainer_of(tmp_path, kind=Replay, gradient_accumulation_steps=4)
    replayed.epochs = [fed[:6], fed[6:]]
    replayed.train()
    assert losses(trainer) == losses(replayed) and same_weights(trainer, replayed)


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"warmup_steps": 100}])
def test_what_does_not_sift_is_the_trainer_as_it_was(tmp_path, options):
    plain = trainer_of(tmp_path, gradient_accumulation_steps=4)
    plain.train()
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=4)
    attach(trainer, **options)
    if "warmup_steps" in options:
        with pytest.warns(
            UserWarning, match="nothing was sifted: training ended after 26 batches"
        ):
            trainer.train()
    else:
        trainer.train()
    assert losses(trainer) == losses(plain) and same_weights(trainer, plain)
    assert trainer.state.max_steps == plain.state.max_steps == 8


class Stop(TrainerCallback):
    """Ends the run when so many updates are done."""

    def __init__(self, update: int | None) -> None:
        self.update = update

    def on_step_begin(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        if state.global_step == self.update:
            raise KeyboardInterrupt


def shards(folder: Path) -> TokenShards:
    return TokenShards(write(folder / "mlm-0", (30, 17, 3), "mlm"), seed=3)


class Stream(IterableDataset[Batch]):
    """The rows without a length, as a data set that is read from somewhere."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __iter__(self) -> Iterator[Batch]:
        return map(self.rows.__getitem__, range(len(self.rows)))


KINDS = {"rows": lambda folder: Rows(), "shards": shards, "stream": lambda folder: Stream()}


@pytest.mark.filterwarnings("ignore:resuming by drawing:UserWarning")  # the stream, once more
@pytest.mark.parametrize(
    ("kind", "accumulation", "every", "stops"),
    [
        ("rows", 4, 4, [5]),  # in the second epoch
        pytest.param("rows", 4, 1, [3, 5], marks=pytest.mark.slow),  # where epochs end
        pytest.param("rows", 1, 3, [4, 7, 13], marks=pytest.mark.slow),
        ("shards", 1, 12, [13]),
        pytest.param("shards", 4, 2, [3, 6], marks=pytest.mark.slow),
        pytest.param("stream", 1, 4, [6, 11], marks=pytest.mark.slow),  # in the warm-up too
    ],
)
def test_a_run_that_was_stopped_goes_on_with_the_same_samples(
    tmp_path, kind, accumulation, every, stops
):
    data = KINDS[kind](tmp_path)
    steps = {"max_steps": 19} if kind == "stream" else {"num_train_epochs": 3}

    def train(folder: Path, stop: int | None = None, resume: bool = False, save: int = 99) -> Any:
        saves = {"save_strategy": "steps", "save_steps": save}
        trainer = trainer_of(
            folder, data, gradient_accumulation_steps=accumulation, **saves, **steps
        )
        attached, watch = attach(trainer, warmup_steps=5), Watch(trainer)
        trainer.add_callback(Stop(stop))
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            assert trainer.state.global_step == stop
        stats = attached.loader.stats
        return trainer, watch, {**stats, "seconds_scoring": None}

    straight, watch, stats = train(tmp_path / "straight")
    begun = 0
    for stop in [*stops, None]:
        trainer, again, found = train(tmp_path / "again", stop, begun > 0, every)
        done = watch.updates[begun - 1] if begun else 0
        upto = watch.updates[-1 if stop is None else stop - 1]
        assert equal(again.batches, watch.batches[done:upto])
        begun = (stop or 0) // every * every
    assert found == stats, "nothing is scored twice"
    assert same_weights(trainer, straight) and losses(trainer) == losses(straight)
    assert trainer.state.global_step == straight.state.global_step == straight.state.max_steps
