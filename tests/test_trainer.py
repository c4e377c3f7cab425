"""``attach``: a Hugging Face Trainer that sifts: pytest tests/test_trainer.py

The reference scores every pool apart, with ``EarlyExit(...).logits``, a cross-entropy and the weights that the
kept half is then trained with.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import LENGTH, VOCAB, bert
from ranks import on_ranks
from test_examples_ddp import free_port
from test_laws import write
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import hf_trainer

from siftloader import EarlyExit, SiftError, SiftingDataLoader, StateError, TokenShards, attach


B, EVALUATED, ROWS = 4, 3, 50
Batch = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Every train() collects garbage, and would look at all of torch each time: half of its seconds here."""
    gc.freeze()
    yield
    gc.unfreeze()


class Rows(Dataset[Batch]):
    def __init__(self, samples: int = ROWS, **more: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, VOCAB, (samples, LENGTH), generator=generator)
        hidden = torch.rand(samples, LENGTH, generator=generator) < 0.5
        self.fields = {"input_ids": ids, "labels": ids.masked_fill(hidden, -100), **more}

    def __len__(self) -> int:
        return len(self.fields["input_ids"])

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
        self.evaluated = self.sifted = 0
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
            self.sifted += len(pool) > B

    def _best(self, pool: list[Batch]) -> Tensor:
        batch = {name: torch.stack([row[name] for row in pool]) for name in pool[0]}
        batch.pop("unused", None)
        ids, labels = batch["input_ids"], batch.pop("labels")
        if len(ids) <= B:
            return ids
        with torch.no_grad():
            logits = EarlyExit(self.model, layer=1).logits(batch)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        scores = (losses.sum(1) / (labels != -100).sum(1)).nan_to_num(-torch.inf)
        return ids[scores.sort(descending=True, stable=True).indices[:B].sort().values]


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


def trainer_of(folder: Path, data: Any = None, **options: Any) -> Any:
    """A script, as it would be without siftloader; its model in eval mode, as from_pretrained leaves it."""
    torch.manual_seed(0)
    collator, model = options.pop("data_collator", None), options.pop("model", None)
    kind = options.pop("kind", Trainer)
    given = {"num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no"}
    given |= {"logging_steps": 1, **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=B,
        per_device_eval_batch_size=EVALUATED,
        learning_rate=1e-3,
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
        return trainer, watch, {**stats, "seconds_scoring": None, "seconds_auditing": None}

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


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"dataloader_drop_last": True, "max_steps": 11, "logging_steps": 5}, 48),
        ({"train_sampling_strategy": "group_by_length", "bf16": True}, ROWS),
        ({"max_steps": 9, "num_train_epochs": 1, "gradient_accumulation_steps": 3}, ROWS),
    ],
)
def test_the_options_of_the_trainer_stay_what_they_are(tmp_path, options, rows):
    collator = Collator()
    unused = torch.arange(ROWS)  # which the trainer removes
    trainer = trainer_of(tmp_path, Rows(unused=unused), data_collator=collator, **options)
    attach(trainer, warmup_steps=2)
    watch = Watch(trainer)
    watch.expect = pools(collator.drawn, rows, 2)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == len(watch.updates)
    assert watch.sifted > 2


class OutOfMemory(TrainerCallback):
    """What CUDA says, once."""

    def __init__(self) -> None:
        self.said = False

    def on_step_end(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        if not self.said:
            self.said = True
            raise RuntimeError("CUDA out of memory.")


def test_a_smaller_batch_size_begins_anew_and_the_best_model_is_loaded(tmp_path):
    best = {"load_best_model_at_end": True, "save_total_limit": 1, "eval_strategy": "epoch"}
    trainer = trainer_of(tmp_path, auto_find_batch_size=True, save_strategy="epoch", **best)
    attached, watch = attach(trainer, warmup_steps=1), Watch(trainer)
    trainer.add_callback(OutOfMemory())
    trainer.train()
    sizes = [len(batch) for batch in watch.batches]
    assert sizes[:1] == [4] and set(sizes[1:]) == {3}, "accelerate takes a tenth away"
    assert trainer.state.global_step == len(sizes) - 1 == attached.loader.stats["steps"]
    assert [folder.name for folder in tmp_path.glob("checkpoint-*/siftloader-0.json")]


class Named(nn.Module):
    """Has its labels under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bert(2)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Any:
        return self.inner(input_ids=input_ids, labels=targets)


def test_labels_are_where_the_trainer_finds_them(tmp_path):
    data = Rows()
    data.fields["targets"] = data.fields.pop("labels")
    options = {"label_names": ["targets"], "max_steps": 2}
    trainer = trainer_of(tmp_path, [data[i] for i in range(20)], model=Named(), **options)
    attached = attach(trainer, warmup_steps=0)
    trainer.train()
    assert attached.loader.stats["kept"] == 2 * B and attached.loader.stats["unlabelled"] == 0


@pytest.mark.slow
def test_workers_and_a_compiled_model_change_nothing(tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE"):  # which TrainingArguments set and leave
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    pools: list[list[Tensor]] = [[], []]
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    for seen, options in zip(pools, ({}, {**compiled, "dataloader_num_workers": 1}), strict=True):
        trainer = trainer_of(tmp_path, num_train_epochs=1, **options)
        attach(
            trainer, warmup_steps=1, on_select=lambda i, scores, k, seen=seen: seen.append(scores)
        )
        trainer.train()
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert equal(*pools) and len(pools[0]) == 6


def rows_of(batches: Iterable[Batch]) -> list[Batch]:
    return [
        dict(zip(each, row, strict=True))
        for each in batches
        for row in zip(*each.values(), strict=True)
    ]


class Masking(Collator):
    """Labels of its own."""

    def __call__(self, samples: list[Batch]) -> Batch:
        return super().__call__([{**row, "labels": row["input_ids"]} for row in samples])


@pytest.mark.parametrize("own", [False, True])
def test_shards_are_read_directly_or_through_the_collator_that_was_given(tmp_path, own):
    collator = Masking() if own else None
    trainer = trainer_of(tmp_path, shards(tmp_path), num_train_epochs=1, data_collator=collator)
    attach(trainer, warmup_steps=0)
    watch = Watch(trainer)
    plain = rows_of(TokenShards(tmp_path / "mlm-0", seed=3).batches(B))
    watch.expect = pools(collator.drawn if own else plain, ROWS, 0)
    trainer.train()
    assert watch.sifted == 6


@pytest.mark.parametrize("mode", [True, False])
def test_a_draw_leaves_the_modes_of_the_model_as_they_were(tmp_path, mode):
    trainer = trainer_of(tmp_path)
    attach(trainer, warmup_steps=0)
    model = trainer.model.train(mode)
    model.bert.pooler = None
    model.bert.embeddings.eval()  # frozen, say
    before = [each.training for each in model.modules()]
    loader = trainer.get_train_dataloader()
    batches, _ = trainer.get_batch_samples(iter(loader), 2, torch.device("cpu"))
    assert [each.training for each in model.modules()] == before
    assert loader.stats["steps"] == 2 and loader.stats["kept"] == 2 * B and len(batches) == 2


def test_what_is_wrong_is_said_when_it_is_attached(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(
        TypeError, match=r"attach got \['warm_up'\], which SiftingDataLoader does not"
    ):
        attach(trainer, warm_up=3)
    with pytest.raises(ValueError, match=r"batch_size 4 / keep 0.3 must be a whole number"):
        attach(trainer, keep=0.3)
    with pytest.raises(
        TypeError, match=r"attach takes a transformers.Trainer, got BertForMaskedLM"
    ):
        attach(trainer.model)
    attach(trainer)
    with pytest.raises(ValueError, match="sifts already"):
        attach(trainer)


def test_a_loader_that_replaces_the_sifted_one_is_noticed_before_the_first_step(tmp_path):
    trainer = trainer_of(tmp_path)
    plain = trainer.get_train_dataloader
    attach(trainer, warmup_steps=0)
    trainer.get_train_dataloader = plain
    with pytest.raises(SiftError, match="drew its first batches from a loader that attach"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = trainer_of(tmp_path)
    attach(trainer, warmup_steps=0)
    sifted = trainer.get_train_dataloader
    trainer.get_train_dataloader = lambda: sifted() and plain()
    with pytest.raises(SiftError, match="attach last"):
        trainer.train()


class Own(Trainer):
    def get_train_dataloader(self) -> Any:
        return SiftingDataLoader(self.train_dataset, B, model=self.model, warmup_steps=0)


def test_a_trainer_that_sifts_by_itself_is_not_sifted_twice(tmp_path):
    trainer = trainer_of(tmp_path, kind=Own)
    attach(trainer)
    with pytest.raises(ValueError, match="gives a SiftingDataLoader already"):
        trainer.train()


class Sifted(Trainer):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.attached = attach(self, warmup_steps=0, criterion="entropy")


def test_in_a_subclass_and_after_training_and_twice(tmp_path):
    trainer = trainer_of(tmp_path, kind=Sifted, max_steps=2)
    trainer.train()
    first = trainer.attached.loader
    trainer.train()
    second = trainer.attached.loader
    assert first is not second and first.stats["kept"] == second.stats["kept"] == 2 * B
    plain = trainer_of(tmp_path, max_steps=2)
    plain.train()
    attached = attach(plain, warmup_steps=0)
    plain.train()
    assert attached.loader.stats["kept"] == 2 * B


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its first epoch."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = trainer_of(folder, save_strategy="steps", save_steps=2, max_steps=3)
    attach(trainer, warmup_steps=0)
    trainer.train()
    return folder / "checkpoint-2"


def altered(saved: Path, folder: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(saved, folder / saved.name))
    file = copy / "siftloader-0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return copy


def test_a_checkpoint_that_does_not_say_where_the_loader_was_is_refused(tmp_path, saved):
    cases = {
        "was saved with {'ranks': 2, 'accumulation': 1}, this run has {'ranks': 1": {"ranks": 2},
        "was saved with {'ranks': 1, 'accumulation': 4}, this run has": {"accumulation": 4},
        "the state lacks": {"loader": {}},
    }
    for number, (words, changes) in enumerate(cases.items()):
        trainer = trainer_of(tmp_path)
        attach(trainer, warmup_steps=0)
        with pytest.raises(StateError, match=words):
            trainer.train(altered(saved, tmp_path / str(number), **changes))
    (altered(saved, tmp_path) / "siftloader-0.json").unlink()
    trainer = trainer_of(tmp_path)
    attach(trainer, warmup_steps=0)
    with pytest.raises(
        StateError, match=r"siftloader-0.json is missing, .* resume a checkpoint of this"
    ):
        trainer.train(resume_from_checkpoint=True)
    trainer = trainer_of(tmp_path, ignore_data_skip=True)
    attach(trainer, warmup_steps=0)
    with pytest.warns(UserWarning, match="is missing: the epoch, and the warm-up, begin anew"):
        trainer.train(resume_from_checkpoint=True)


def test_a_trainer_of_before_epochs_had_their_own_length_does_not_resume_them(tmp_path, saved):
    trainer = trainer_of(tmp_path)
    attached = attach(trainer, warmup_steps=2)
    attached._plain.pop("_init_training_state")
    with pytest.raises(StateError, match=r"takes all epochs for equally long, .* upgrade"):
        trainer.train(str(saved))


def test_an_epoch_that_begins_anew_does_not_warm_up_again(tmp_path, saved):
    trainer = trainer_of(tmp_path, num_train_epochs=1, ignore_data_skip=True)
    attached, watch = attach(trainer, warmup_steps=2), Watch(trainer)
    plain = trainer_of(tmp_path)
    drawn = rows_of(plain.get_train_dataloader())
    watch.expect = pools(drawn, ROWS, 0)
    trainer.train(str(saved))
    assert watch.sifted == 5 and attached.loader.stats["steps"] == 7 == trainer.state.max_steps


def test_a_head_that_is_trained_beside_the_model_is_resumed_with_it(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        trainer = trainer_of(tmp_path, **options)
        attached = attach(trainer, warmup_steps=0, exit_head="probe")
        trainer.train(resume)
        weights.append(attached.loader.exit_head.state_dict()["module"]["weight"])
    assert torch.equal(*weights)


def test_the_example_is_killed_and_goes_on(tmp_path, capsys):
    shards = str(write(tmp_path / "mlm-0", (30, 17, 3), "mlm"))
    command = [
        shards,
        "--epochs=2",
        "--batch-size=4",
        f"--out={tmp_path / 'out'}",
        "--save-every=3",
    ]
    straight = hf_trainer.main(command)
    assert straight.state.global_step == 8 + 6  # 4 of warm-up, then 34 rows; 50 rows
    shutil.rmtree(tmp_path / "out" / "checkpoint-14")
    again = hf_trainer.main([*command, "--resume"])
    assert same_weights(straight, again)
    plain = hf_trainer.main([*command, "--plain"])
    assert plain.state.global_step == 26
    evaluated = [
        [e["eval_loss"] for e in t.state.log_history if "eval_loss" in e]
        for t in (straight, again)
    ]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 2


class Unsharded(Trainer):
    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, B)


def train_on_two_ranks(rank: int, folder: Path, ports: list[int]) -> None:
    """All that two ranks have to show, in two processes: what each found is left in files."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="resuming by drawing")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns of its own choice
    found: dict[str, Any] = {}
    for kind, data, every in [("rows", Rows(48), 3), ("shards", TokenShards(folder / "mlm-0"), 5)]:
        steps = {"num_train_epochs": 3, "gradient_accumulation_steps": 2 if kind == "rows" else 1}
        for name, stop in [("straight", None), ("again", every + 1), ("again", None)]:
            collator = Collator() if kind == "rows" else None
            saves = {"save_strategy": "steps", "save_steps": every if name == "again" else 99}
            trainer = trainer_of(
                folder / kind / name,
                data,
                data_collator=collator,
                ddp_backend="gloo",
                **steps,
                **saves,
            )
            ids: list[Tensor] = []
            attached = attach(
                trainer, warmup_steps=2, on_select=lambda i, s, k, to=ids: to.append(i)
            )
            watch = Watch(trainer)
            trainer.add_callback(Stop(stop))
            resume = name == "again" and stop is None
            if collator is not None and not resume:
                watch.expect = pools(collator.drawn, 24, 2)
            with suppress(KeyboardInterrupt):
                trainer.train(resume_from_checkpoint=resume)
            found[f"{kind} {name}{' resumed' * resume}"] = {
                "batches": watch.batches,
                "updates": watch.updates,
                "sifted": watch.sifted,
                "ids": ids,
                "stats": {
                    **attached.loader.stats,
                    "seconds_scoring": None,
                    "seconds_auditing": None,
                },
                "weights": trainer.model.state_dict(),
                "wrapped": type(trainer.model_wrapped).__name__,
            }
    for name in ("plain", "off"):
        trainer = trainer_of(folder, Rows(), ddp_backend="gloo", gradient_accumulation_steps=4)
        if name == "off":
            attach(trainer, keep=1.0)
        trainer.train()
        found[name] = {"losses": losses(trainer), "weights": trainer.model.state_dict()}
    trainer = trainer_of(folder, Rows(48), kind=Unsharded, ddp_backend="gloo")
    attach(trainer)
    with pytest.raises(ValueError, match="every rank would train on the same samples"):
        trainer.train()
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.mark.slow
def test_two_ranks_train_on_samples_of_their_own_and_resume(tmp_path):
    write(tmp_path / "mlm-0", (30, 17, 3), "mlm")
    on_ranks(train_on_two_ranks, tmp_path, [free_port()])
    one, two = (torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2))
    for kind, every in (("rows", 3), ("shards", 5)):
        straight = [each[f"{kind} straight"] for each in (one, two)]
        for mine, ranks in zip(straight, (one, two), strict=True):
            assert mine["wrapped"] == "DistributedDataParallel"
            stopped, resumed = ranks[f"{kind} again"], ranks[f"{kind} again resumed"]
            done = mine["updates"][every - 1]
            assert equal(stopped["batches"], mine["batches"][: mine["updates"][every]])
            assert equal(resumed["batches"], mine["batches"][done:])
            assert resumed["stats"] == mine["stats"]
        assert straight[0]["updates"] == straight[1]["updates"]
        for name in ("straight", "again resumed"):
            both = [each[f"{kind} {name}"]["weights"].values() for each in (one, two)]
            assert all(torch.equal(*pair) for pair in zip(*both, strict=True)), "one model"
    for each in (one, two):
        assert len(each["off"]["losses"]) == 4 and each["off"]["losses"] == each["plain"]["losses"]
        pairs = zip(
            each["off"]["weights"].values(), each["plain"]["weights"].values(), strict=True
        )
        assert all(torch.equal(*pair) for pair in pairs)
    rows = [
        {tuple(row.tolist()) for batch in ranks["rows straight"]["batches"][:4] for row in batch}
        for ranks in (one, two)
    ]
    assert len(rows[0]) == len(rows[1]) == 4 * B and not rows[0] & rows[1], "of the first epoch"
    ids = [{int(i) for i in torch.cat(each["shards straight"]["ids"][:2])} for each in (one, two)]
    assert len(ids[0]) == len(ids[1]) == 4 * B and not ids[0] & ids[1]
    assert one["rows straight"]["sifted"] == two["rows straight"]["sifted"] == 8
