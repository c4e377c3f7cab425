"""Sifting where somebody else builds the loader.

from siftloader import attach

trainer = Trainer(model, args, train_dataset=dataset)
attach(trainer, exit_layer=1, keep=0.5)                # the one line
trainer.train()

get_batch = sift_calls(get_batch, model=lambda: model)  # for loops that draw by calling a function
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import update_wrapper
from itertools import count, islice, pairwise, takewhile
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from siftloader.agreement import Agreement
from siftloader.batches import Batch, holds_tensor, leaves, rows
from siftloader.concerns import PATIENCE
from siftloader.errors import EmptyEpoch, SiftError, StateError
from siftloader.loader import SiftingDataLoader
from siftloader.schedule import Keep, Schedule, whole
from siftloader.scorer import Model
from siftloader.scores import ScoreOf
from siftloader.stack import unwrap
from siftloader.stream import TokenShards


def attach(
    trainer: Any,
    *,
    exit_layer: int | str = 1,
    criterion: ScoreOf | str = "loss",
    keep: Keep = 0.5,
    warmup_steps: int = 1000,
    **options: Any,
) -> Attached:
    """Make a Hugging Face Trainer train on the samples worth training on.

    sifting = attach(trainer, exit_layer=1, warmup_steps=500)    # anywhere before trainer.train()
    trainer.train()
    print(sifting.loader.stats)                                  # in the trainer's logs too, as sift/...

    The options are those of ``SiftingDataLoader``, checked here. Evaluation and prediction stay as they are.

    * **Batches** keep their size; a pool is ``per_device_train_batch_size / keep`` rows of the trainer's own
      loader, with its collator, sampler, workers and sharding. ``TokenShards`` are read directly.
    * **Steps**: as many epochs are about half the updates. ``max_steps``, the learning-rate schedule and the epochs
      are those of the sifted loader, also where a warm-up makes the first epoch longer; ``args.max_steps``
      is as many updates, on up to twice the data. ``warmup_steps`` counts batches; with
      ``count="optimizer"`` it counts updates, like the trainer's own option of that name.
    * **Checkpoints** gain a file ``siftloader-RANK.json``, and ``train(resume_from_checkpoint=...)`` goes on in the
      middle of an epoch without scoring anything again. With ``ignore_data_skip`` the epoch begins anew.
      StateError where that file is missing, or tells of other ranks, batches or accumulation.
    * **Logs** of the training loss gain ``sift/kept``, ``sift/score_kept`` and so on, of this rank. That loss
      is biased upward by selection: compare runs by ``eval_loss``.

    Some methods of this one object are replaced, as a subclass that overrides them would; transformers stays
    as it is. In a subclass of your own: ``attach(self)`` at the end of ``__init__``. A trainer that draws from
    another loader all the same raises SiftError at its first step.

    Where Trainer itself does not resume to the bit, nor does this: what a collator draws from the global random
    stream (masks) is drawn anew after a restart, so others of the same candidates may win. Masks of ``TokenShards``
    are the same again.

    Raises TypeError for anything but a Trainer and for unknown options, ValueError for wrong ones.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"attach takes a transformers.Trainer, got {type(trainer).__name__}; elsewhere give the loop "
            f"SiftingDataLoader.wrap(its_loader, model=model)"
        )
    if not hasattr(trainer, "set_initial_training_values"):
        raise TypeError(
            "attach needs a transformers whose Trainer has set_initial_training_values, to plan the run: "
            "upgrade to 4.57 or later"
        )
    if isinstance(getattr(trainer.train, "__self__", None), Attached):
        raise ValueError("this trainer sifts already: attach() once is enough")
    chosen = {"exit_layer": exit_layer, "criterion": criterion, "keep": keep}
    return Attached(trainer, {**chosen, "warmup_steps": warmup_steps, **options})


@final
class Attached:
    """What ``attach`` did to a Trainer; ``loader`` is the one it trains with, or trained with last.

    Its other methods are called by the trainer, which had them under the same names.
    """

    def __init__(self, trainer: Any, options: dict[str, Any]) -> None:
        self.loader: SiftingDataLoader | None = None
        self._trainer, self._options = trainer, _checked(trainer, options)
        self._checkpoint: Path | None = None  # that is being resumed
        self._before: int | None = (
            None  # samples handed out when this run began; None once it drew
        )
        self._plain: dict[str, Any] = {}
        for name in _REPLACED:
            if hasattr(trainer, name):  # the private ones came in the course of transformers 5
                self._plain[name] = getattr(trainer, name)
                setattr(trainer, name, getattr(self, name))
        trainer.add_callback(_saver())

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Train, from where the checkpoint says that the loader was."""
        self.loader, self._checkpoint = None, self._found(resume_from_checkpoint)
        try:
            result = self._plain["train"](resume_from_checkpoint, *args, **options)
        finally:
            self._checkpoint = None
        self._warn_unless_sifted()
        return result

    def get_train_dataloader(self) -> SiftingDataLoader:
        """Sift the loader that the trainer would train with."""
        trainer, shards, args = self._trainer, self._trainer.train_dataset, self._trainer.args
        # Found late: FSDP puts another module into its place, DDP and torch.compile wrap it.
        options = {"model": lambda: trainer.model_wrapped, **self._options}
        if isinstance(shards, TokenShards) and self._is_stock("get_train_dataloader"):
            # Each rank reads its share, which the trainer would divide once more.
            loader = SiftingDataLoader(
                shards,
                trainer._train_batch_size,
                drop_last=args.dataloader_drop_last,
                pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
                num_workers=args.dataloader_num_workers,
                collate_fn=_collator(trainer),
                **options,
            )
        else:
            inner = self._plain["get_train_dataloader"]()
            if isinstance(inner, SiftingDataLoader):
                raise ValueError(
                    "get_train_dataloader() of this trainer gives a SiftingDataLoader already: remove "
                    "attach(), or what sifts there"
                )
            loader = SiftingDataLoader.wrap(inner, **options)
        if self._checkpoint is not None:
            self._restore(loader, self._checkpoint)
        self.loader, self._before = loader, loader.stats["samples"]
        return loader

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """Draw the batches of an update in the mode that they are trained in."""
        # Trainer says model.train() only after it drew them: what comes first, and what comes after an evaluation,
        # would pass through unsifted.
        with _in_training(self._trainer.model_wrapped):
            found = self._plain["get_batch_samples"](*args, **options)
        if found[0] and (self.loader is None or self._before is not None):
            self._refuse_others()
        return found

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        """Log, and beside the training loss what the loader did."""
        if "loss" in logs and self.loader is not None:
            stats = {k: v for k, v in self.loader.stats.items() if v is not None and k != "epoch"}
            logs.update({f"sift/{name}": float(value) for name, value in stats.items()})
        self._plain["log"](logs, *args, **options)

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any) -> Any:
        """Plan the run, whose epochs need not be equally long."""
        found = self._plain["set_initial_training_values"](args, dataloader, *more)
        if not isinstance(dataloader, SiftingDataLoader) or not _has_length(dataloader):
            return found
        epochs, updates, samples, trained, *others, max_steps = found
        if args.max_steps > 0:
            epochs = 1 + sum(1 for _ in _until(self._ends(dataloader), max_steps))
        ends = [0, *islice(self._ends(dataloader), epochs)]
        if args.max_steps <= 0 < epochs:
            part = args.num_train_epochs - (epochs - 1)  # of the last one
            max_steps = ends[-2] + math.ceil(part * (ends[-1] - ends[-2]))
            trained = samples * args.world_size * max_steps / ends[1]
        if len({end - begin for begin, end in pairwise(ends)}) > 1:
            self._refuse_old_trainer()
        # A sifting loader counts what this rank hands out, Trainer what all of them do.
        return epochs, updates, samples * args.world_size, trained, *others, max_steps

    def _init_training_state(self, *given: Any, **options: Any) -> tuple[int, int]:
        """Find the epoch to resume in, and how many batches of it were trained on."""
        epoch, batches = self._plain["_init_training_state"](*given, **options)
        loader, args, done = self.loader, self._trainer.args, self._trainer.state.global_step
        if self._checkpoint is None or loader is None or not done:
            return epoch, batches
        if _has_length(loader):
            ends = [0, *_until(self._ends(loader), done + 1)]
            epoch, updates = len(ends) - 1, done - ends[-1]
            batches = updates * args.gradient_accumulation_steps
        elif self._options.get("count") != "optimizer":
            state = loader.state_dict()  # Trainer takes the whole run for one epoch
            epoch, batches = state["epoch"], state["stats"]["steps"] - state["epoch_step"]
        return epoch, 0 if args.ignore_data_skip else batches

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Run an epoch of its own length."""
        loader = options.get("train_dataloader")
        if isinstance(loader, SiftingDataLoader):
            loader.set_epoch(
                options["epoch"]
            )  # Trainer does, but where it skips what was trained on
            if _has_length(loader):
                batches, each = len(loader), self._trainer.args.gradient_accumulation_steps
                options["steps_in_epoch"] = batches
                options["num_update_steps_per_epoch"] = max(1, -(-batches // each))
        self._plain["_run_epoch"](*args, **options)

    def _ends(self, loader: SiftingDataLoader) -> Iterator[int]:
        # Updates done when an epoch ends, epoch after epoch, in a run from its beginning. What is left of an epoch
        # is an update too, however few batches that are.
        each = self._trainer.args.gradient_accumulation_steps
        changes = [self._options["warmup_steps"], self._options.get("total_steps") or 0]
        if isinstance(keep := self._options["keep"], Mapping):
            changes += keep
        last = max(changes) * self._options.get("accumulation", 1)  # after it all epochs are alike
        batches = updates = planned = 0
        settled = False
        for epoch in count(1):
            if not settled:
                settled = batches >= last
                planned = loader.total_batches(epoch) - batches
            if not planned:
                raise EmptyEpoch(
                    f"epoch {epoch} of this run would hand out nothing: a pool needs at least "
                    f"per_device_train_batch_size rows; use more data, or smaller batches"
                )
            batches, updates = batches + planned, updates + -(-planned // each)
            yield updates

    def _is_stock(self, name: str) -> bool:
        from transformers import Trainer

        return getattr(self._plain[name], "__func__", None) is getattr(Trainer, name)

    def _found(self, resume: Any) -> Path | None:
        # What Trainer makes of its argument.
        from transformers import trainer_utils

        if resume is True:
            last: Any = trainer_utils.get_last_checkpoint
            resume = last(self._trainer.args.output_dir)
        return Path(resume) if resume else None

    def _restore(self, loader: SiftingDataLoader, folder: Path) -> None:
        args = self._trainer.args
        file, expected = _state_file(folder, args), _layout(args)
        saved = json.loads(file.read_text()) if file.exists() else None
        found = saved and {name: saved[name] for name in expected}
        if saved is None or found != expected:
            what = f"was saved with {found}, this run has {expected}" if saved else "is missing"
            if args.ignore_data_skip:
                warnings.warn(
                    f"{file} {what}: the epoch, and the warm-up, begin anew", stacklevel=2
                )
                return
            raise StateError(
                f"{file} {what}, so what is trained on next is not known; resume a checkpoint of this very run, "
                f"or begin its epoch anew with TrainingArguments(ignore_data_skip=True)"
            )
        loader.load_state_dict(saved["loader"])
        if loader.exit_head is not None:
            tensors = torch.load(file.with_suffix(".pt"), weights_only=True)
            loader.exit_head.load_state_dict(tensors)
        if args.ignore_data_skip:  # to another epoch and back: to its beginning
            epoch = saved["loader"]["epoch"]
            loader.set_epoch(epoch + 1)
            loader.set_epoch(epoch)

    def _refuse_old_trainer(self) -> None:
        resumes = self._checkpoint is not None and not self._trainer.args.ignore_data_skip
        if resumes and "_init_training_state" not in self._plain:
            raise StateError(
                "this transformers takes all epochs for equally long, and would resume at other samples, because a "
                "warm-up makes the first one longer; upgrade transformers, or begin a run with warmup_steps=0"
            )

    def _refuse_others(self) -> None:
        drawn = None if self.loader is None else self.loader.stats["samples"]
        if drawn == self._before:
            raise SiftError(
                "this trainer drew its first batches from a loader that attach() did not make, so nothing would be "
                "sifted; attach last, after get_train_dataloader was replaced"
            )
        self._before = None

    def _warn_unless_sifted(self) -> None:
        stats = {} if self.loader is None else self.loader.stats
        warmup, keep = self._options["warmup_steps"], self._options["keep"]
        if stats.get("steps") and not stats["candidates"] and Schedule(0, keep=keep).ever_sifts:
            warnings.warn(
                f"nothing was sifted: training ended after {stats['steps']} batches, the warm-up lasts "
                f"{warmup} steps; lower warmup_steps",
                stacklevel=3,
            )


_REPLACED = (
    "train",
    "get_train_dataloader",
    "get_batch_samples",
    "log",
    "set_initial_training_values",
    "_init_training_state",
    "_run_epoch",
)


def _checked(trainer: Any, options: dict[str, Any]) -> dict[str, Any]:
    # What is wrong fails here, not when training begins.
    ours = inspect.signature(SiftingDataLoader.__init__).parameters.values()
    known = {each.name for each in ours if each.kind is each.KEYWORD_ONLY} - {"model"}
    if unknown := options.keys() - known:
        raise TypeError(
            f"attach got {sorted(unknown)}, which SiftingDataLoader does not know; its options are "
            f"{sorted(known)}, all others are TrainingArguments"
        )
    names, args = trainer.label_names, trainer.args
    if "score_fn" not in options and len(names) == 1 and names != ["labels"]:
        options = {"labels": names[0], **options}
    if options.get("count") == "optimizer":
        options = {"accumulation": args.gradient_accumulation_steps, **options}
    shards = trainer.train_dataset
    SiftingDataLoader(
        shards if isinstance(shards, TokenShards) else [0],
        args.train_batch_size,
        model=lambda: trainer.model_wrapped,
        **{name: value for name, value in options.items() if name != "log_selections"},
    )
    return options


def _collator(trainer: Any) -> Any:
    # None for those that only stack what shards have stacked already.
    from transformers import DataCollatorWithPadding, default_data_collator

    own = trainer.data_collator
    stacks = own is default_data_collator or isinstance(own, DataCollatorWithPadding)
    return None if stacks else own


def _saver() -> Any:
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **at: Any) -> None:
            loader = at.get("train_dataloader")
            if args.save_only_model or state.is_hyper_param_search:
                return  # nothing to resume, or in a folder of its own
            if isinstance(loader, SiftingDataLoader):
                _save(loader, Path(args.output_dir) / f"checkpoint-{state.global_step}", args)

    return Saver


def _save(loader: SiftingDataLoader, folder: Path, args: Any) -> None:
    folder.mkdir(
        parents=True, exist_ok=True
    )  # this rank may be the first one, on a disk of its own
    file = _state_file(folder, args)
    if loader.exit_head is not None:
        torch.save(loader.exit_head.state_dict(), file.with_suffix(".pt"))
    part = file.with_suffix(".part")
    part.write_text(json.dumps({**_layout(args), "loader": loader.state_dict()}))
    part.replace(file)


def _state_file(folder: Path, args: Any) -> Path:
    return folder / f"siftloader-{args.process_index}.json"


def _layout(args: Any) -> dict[str, int]:
    # What must be the same for the steps of a checkpoint to mean the same batches.
    return {"ranks": args.world_size, "accumulation": args.gradient_accumulation_steps}


def _has_length(loader: SiftingDataLoader) -> bool:
    try:
        return len(loader) > 0
    except TypeError:
        return False


def _until(ends: Iterator[int], updates: int) -> Iterator[int]:
    return takewhile(lambda end: end < updates, ends)


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    # As the training step will have it, and back: who trains in another mode goes on to do so.
    modes = [] if unwrap(model).training else [(each, each.training) for each in model.modules()]
    if modes:
        model.train()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


# Loops that draw a batch by calling a function, as nanoGPT's do.


def sift_calls(
    get_batch: Callable[..., Batch],
    *,
    model: Model,
    keep: Keep = 0.5,
    sharded: bool = False,
    **options: Any,
) -> SiftedCalls:
    """Make a function that draws a batch draw the samples worth training on.

    get_batch = sift_calls(get_batch, model=lambda: model)    # anywhere after get_batch, before the loop
    x, y = get_batch("train")                                 # unchanged
    get_batch.stats, get_batch.state_dict()                   # as of a SiftingDataLoader

    A call while the model is in training mode makes ``1 / keep`` calls with the same arguments and returns the
    best rows of what they drew; other arguments are another pool. A call while it is in eval mode, or warming
    up, is one call of the original: an evaluation before the first sifted batch sees what it saw without us.
    ``keep=1.0`` is the original, bit for bit. ``lambda: model`` finds the model as it is when a batch is
    drawn: compiled, in DDP, or not yet there.

    The other options are those of ``SiftingDataLoader``; ``warmup_steps`` counts calls in training mode (or
    updates, with ``count="optimizer"``: several calls make one, where gradients are accumulated).

    * A loop that draws the next batch between forward and backward has it scored by the weights of before the
      update: one step stale.
    * Ranks draw at random, each with a seed of its own. Two that drew the same first batch raise ValueError:
      ``sharded=True`` says that this is meant to be (tensor parallel ranks), or looked after.
    * ``state_dict()`` counts; where the next draw comes from is known to the random streams only. Save those
      with it (``torch.get_rng_state()``), and a restart draws and keeps the same rows.

    Raises TypeError for what is no function, ValueError for a ``keep`` that is no whole number of calls.
    """
    if isinstance(get_batch, SiftedCalls):
        raise ValueError("get_batch is sifted already: sift_calls() once is enough")
    if not callable(get_batch) or isinstance(get_batch, type):
        raise TypeError(
            f"sift_calls takes a function that draws a batch, got {type(get_batch).__name__}; for an "
            f"iterable of batches use SiftingDataLoader.wrap(loader, model=model)"
        )
    if options.get("pool", "merge") == "merge":
        for share in Schedule(keep=keep).shares:
            if whole(1 / share) is None:
                raise ValueError(
                    f"keep must be 1, 1/2, 1/3 or so for a function, which is called 1 / keep times: got {share}"
                )
    return SiftedCalls(get_batch, model, sharded, {"keep": keep, **options})


@final
class SiftedCalls:
    """What ``sift_calls`` returns: called like the function it was given; ``loader`` does the sifting."""

    def __init__(
        self, get_batch: Callable[..., Batch], model: Model, sharded: bool, options: dict[str, Any]
    ) -> None:
        update_wrapper(self, get_batch, updated=())
        self._draws = _Draws(get_batch)
        self.loader = SiftingDataLoader.wrap(self._draws, model=model, sharded=True, **options)
        if not sharded:
            self._draws.agreement = self.loader._sifter.agreement
        self._evaluations: int | None = 0  # in a row, before the first call in training mode

    @property
    def stats(self) -> dict[str, Any]:
        """What happened so far, a plain dict; reading it may wait for the GPU."""
        return self.loader.stats

    def state_dict(self) -> dict[str, Any]:
        """What was handed to the loop so far, JSON-able; not where the function draws from."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from where ``state`` was taken."""
        self.loader.load_state_dict(state)

    def __call__(self, *args: Any, **kwargs: Any) -> Batch:
        """The next batch, drawn with these arguments."""
        if not self.loader._scorer.model.training:
            self._warn_of_eval_mode()
            return self._draws.function(*args, **kwargs)
        self._evaluations = None
        self._draws.begin(args, kwargs)
        try:
            return next(self.loader)
        except BaseException:
            self.loader.close()  # the next call draws anew
            raise

    def _warn_of_eval_mode(self) -> None:
        if self._evaluations is None:
            return
        self._evaluations += 1
        if self._evaluations == PATIENCE:
            warnings.warn(
                f"{PATIENCE} batches were drawn and none was sifted, because the model is in eval mode; call "
                f"model.train() if this is training, or see that model= finds the model that is trained",
                stacklevel=3,
            )


@final
class _Draws:
    """The function as an endless loader: every batch is one call of it."""

    def __init__(self, function: Callable[..., Batch]) -> None:
        self.function = function
        self.agreement: Agreement | None = None  # of the ranks, to be asked once
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._rows: int | None = None
        self._first: bytes | None = None  # what the first call for the batch under way drew
        self._compares = True

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The calls for the next batch have these arguments."""
        self._arguments, self._first = (args, kwargs), None

    def __iter__(self) -> _Draws:
        return self

    def __next__(self) -> Batch:
        args, kwargs = self._arguments
        batch = self.function(*args, **kwargs)
        if not holds_tensor(batch):
            return batch  # the loader says what is wrong with it
        found, self._rows = rows(batch), self._rows or rows(batch)
        if found != self._rows:
            raise ValueError(
                f"{_named(self.function)} drew {found} rows, and {self._rows} before; batches are sifted in one "
                f"size: give those of another size a sift_calls of their own"
            )
        if self._compares or self.agreement is not None:
            self._compare(_digest(batch))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the function draws from streams of its own."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def _compare(self, digest: bytes) -> None:
        agreement, self.agreement = self.agreement, None
        if agreement is not None and agreement.ranks > 1:
            words = torch.frombuffer(bytearray(digest), dtype=torch.int64)
            drawn = [tuple(each.tolist()) for each in agreement.gathered(words)]
            alike = [rank for rank, each in enumerate(drawn) if drawn.count(each) > 1]
            if alike:  # the same on all ranks, so that they stop together
                raise ValueError(
                    f"{_named(self.function)} drew the same batch on ranks {alike}: seed every rank differently, "
                    f"as torch.manual_seed(seed + rank) does; or pass sharded=True if it is meant"
                )
        if self._first is None:
            self._first = digest
            return
        self._compares = False
        if self._first == digest:
            warnings.warn(
                f"{_named(self.function)} drew the same batch twice for the same arguments, so there is nothing "
                f"to choose from: it must draw anew at every call, at random or one after the other",
                stacklevel=2,
            )


def _named(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}()"


def _digest(batch: Batch) -> bytes:
    found = hashlib.sha256()
    for leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().reshape(-1).contiguous()
            found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.digest()
