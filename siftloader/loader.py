"""``SiftingDataLoader``: a DataLoader whose batches are the candidates worth training on.

    loader = SiftingDataLoader(dataset, batch_size=32, model=model)    # was DataLoader(dataset, batch_size=32)
    for batch in loader: ...                                           # unchanged

Every step draws ``P = b / keep`` candidates, scores them with the first ``j`` layers of the live model
under its own head, and hands out the ``b`` with the highest score.

Letters: b rows the loop receives, P rows of a pool, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from siftloader.batches import Batch, cut, leaves, merge, merge_labels, move, rows, select
from siftloader.candidates import Cursor, LoaderCandidates, Piece, ShardCandidates
from siftloader.errors import EmptyEpoch, StateError
from siftloader.schedule import Epoch, Schedule
from siftloader.scores import Criterion, criterion_named
from siftloader.selection import Selection
from siftloader.sifter import Labels, Model, ScoreFunction, Sifter, whole
from siftloader.stats import Stats
from siftloader.stream import TokenShards
from siftloader.world import World


STATE_VERSION = 1
OnSelect: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class _Existing:
    loader: Iterable[Batch]
    sharded: bool


@dataclass
class _Held:
    """A piece on its way into a pool: the batch on the device, its labels where they came from."""

    batch: Batch
    labels: Tensor | None
    piece: Piece
    used: int = 0  # rows of the piece that are gone

    @property
    def rows(self) -> int:
        return self.piece.rows - self.used

    def take(self, count: int) -> tuple[Batch, Tensor | None]:
        first, self.used = self.used, self.used + count
        if count == self.piece.rows:
            return self.batch, self.labels
        labels = None if self.labels is None else self.labels[first : self.used]
        return cut(self.batch, first, self.used), labels


class _Finished(IterableDataset[Batch]):
    """The finished batches as a data set, so that a framework that rebuilds the loader keeps them.

    Without ``state_dict``: some frameworks would resume it in samples, which it does not count in.
    """

    def __init__(self, owner: SiftingDataLoader) -> None:
        self._owner = owner

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._owner)

    def __len__(self) -> int:
        """Samples handed out per epoch."""
        return self._owner.epoch().samples


@final
class SiftingDataLoader(DataLoader[Any]):
    """Hand out the ``batch_size`` candidates of ``batch_size / keep`` that the model has most to learn from.

    loader = SiftingDataLoader(dataset, batch_size=32, shuffle=True, model=model, exit_layer=1)
    loader = SiftingDataLoader.wrap(any_iterable_of_batches, model=model)

    Positional and unknown arguments go to torch's ``DataLoader`` untouched; the other options are those of
    ``Sifter``, and:

    * ``warmup_steps``: batches handed out as they come before sifting begins (the paper: 20,000 of
      800,000); ``cooldown_steps`` (a number, or a fraction of ``total_steps``): the same at the end.
    * ``pool="merge"`` draws ``batch_size / keep`` rows; ``"split"`` takes each inner batch as the pool and
      hands out ``keep`` of it.
    * ``output_device="inner"`` gives tensors back where the inner loader had them; else they are on
      the model's device, in every phase.
    * ``on_select(ids, scores, kept)`` sees every pool: ids [P] (``batch["id"]``, else the number of the
      candidate), scores [P], kept [P] bool.

    The same number of epochs is about half the updates: build schedules from ``total_batches(epochs)``.
    Each ``iter()`` begins the next epoch, the first after ``load_state_dict`` continues.
    """

    def __init__(
        self,
        dataset: Any,
        *loader_args: Any,
        model: Model,
        exit_layer: int | str = 1,
        criterion: Criterion | str = "loss",
        keep: float = 0.5,
        warmup_steps: int = 1000,
        cooldown_steps: int | float = 0,
        total_steps: int | None = None,
        selection: Selection | None = None,
        pool: Literal["merge", "split"] = "merge",
        labels: Labels | None = None,
        score_fn: ScoreFunction | None = None,
        shift_labels: bool | None = None,
        autocast: torch.dtype | None = None,
        output_device: Literal["inner"] | None = None,
        on_select: OnSelect | None = None,
        **loader_options: Any,
    ) -> None:
        if pool not in ("merge", "split"):
            raise ValueError(f'pool must be "merge" or "split", got {pool!r}')
        if output_device not in (None, "inner"):
            raise ValueError(f'output_device must be None or "inner", got {output_device!r}')
        self._schedule = Schedule(warmup_steps, cooldown_steps, total_steps)
        self._sifter = Sifter(
            model,
            exit_layer=exit_layer,
            criterion=criterion_named(criterion, getattr(dataset, "unigrams", None)),
            keep=keep,
            selection=selection,
            labels=labels,
            score_fn=score_fn,
            shift_labels=shift_labels,
            autocast=autocast,
        )
        self._source = _candidates(dataset, loader_args, loader_options)
        self._split, self._on_select = pool == "split", on_select
        self._gives_back = output_device == "inner"
        self._epoch, self._begun = 0, False  # the epoch to begin next, or the one under way
        self._cursor: Cursor = {}
        self._epoch_step = 0  # at which the epoch under way began
        self._told_epoch: int | None = None
        self._tested = keep == 1.0
        self._warned = False
        self._batch_size: int | None = None
        self._pool: int | None = None
        if (size := self._source.batch_size) is not None:
            self._set_sizes(size)
        super().__init__(_Finished(self), batch_size=None)

    @classmethod
    def wrap(
        cls, loader: Iterable[Batch], *, model: Model, sharded: bool = False, **options: Any
    ) -> SiftingDataLoader:
        """Sift the batches of a loader that exists: any iterable of batches, drawn as it is.

        ``sharded`` declares that it gives each rank its own share already; ``options`` are the class's.
        """
        return cls(_Existing(loader, sharded), model=model, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self._begun:
            self._epoch, self._cursor = self._epoch + 1, {}
        self._begun = True
        resumed = bool(self._cursor)
        if not resumed:
            self._epoch_step = self._sifter.counts.steps
        # Taken now: the inner iter() must draw what it draws in the plain loader, when it draws it.
        self._cursor, pieces = self._source.draw(self._epoch, self._cursor)
        return self._batches(pieces, resumed)

    def __len__(self) -> int:
        """Batches of the epoch under way, else of the next: ``w + n // P + (n % P >= b)``."""
        return self.epoch().batches

    def epoch(self) -> Epoch:
        """Batches and samples of the epoch under way, else of the next; TypeError where unknown."""
        under_way = self._begun or self._cursor
        return self._plan(self._epoch_step if under_way else self._sifter.counts.steps)

    def total_batches(self, epochs: int) -> int:
        """Batches of that many epochs from step 0: what a learning-rate schedule must span."""
        steps = 0
        for _ in range(epochs):
            steps += self._plan(steps).batches
        return steps

    @property
    def stats(self) -> dict[str, Any]:
        """What happened so far, a plain dict; reading it may wait for the GPU, nothing else does."""
        self._sifter.counts.sifting = self._sifts()
        return {"epoch": self._epoch, **self._sifter.counts.read()}

    def attach_model(self, model: Model) -> None:
        """Score with this model from now on: after wrapping it, say."""
        self._sifter.attach_model(model)

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch next, from its start; a state restored in it keeps its place."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if self._begun or epoch != self._epoch:
            self._epoch, self._cursor, self._begun = epoch, {}, False
        self._told_epoch = epoch
        self._source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What was handed to the loop so far, JSON-able; valid after a break and at an epoch's end."""
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "epoch_step": self._epoch_step,
            "cursor": self._cursor,
            "batch_size": self._batch_size,
            "keep": self._sifter.keep,
            "ranks": World.detect().ranks,
            "pools": self._sifter.pools,
            "set_epoch": self._told_epoch,
            "stats": self._sifter.counts.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; StateError where it belongs to something else."""
        version = state.get("version")
        if not isinstance(version, int) or version > STATE_VERSION:
            raise StateError(
                f"found a state of version {version!r}, this siftloader reads up to {STATE_VERSION}; "
                f"upgrade siftloader, or start afresh without the state"
            )
        missing = set(self.state_dict()) - set(state)
        if missing:
            raise StateError(
                f"the state lacks {sorted(missing)}; it needs all that state_dict gives"
            )
        self._source.check(state["cursor"])
        self._check_topology(state)
        if self._batch_size is None and (size := state["batch_size"]) is not None:
            # Not to be learned again: the next inner batch may be a ragged one.
            self._set_sizes(whole(size / self._sifter.keep) or size if self._split else size)
        if (told := state["set_epoch"]) is not None:
            self._told_epoch = told
            self._source.set_epoch(told)
        self._epoch, self._cursor, self._begun = state["epoch"], dict(state["cursor"]), False
        self._epoch_step = state["epoch_step"]
        self._sifter.pools = state["pools"]
        self._sifter.counts = Stats.from_state(state["stats"])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a SiftingDataLoader holds the live model and is not pickled; save state_dict() instead"
        )

    def _batches(self, pieces: Iterator[Piece], resumed: bool) -> Iterator[Batch]:
        held: deque[_Held] = deque()
        handed, before = 0, self._sifter.pools
        try:
            while True:
                sifts = self._sifts()
                batch = (
                    self._next_sifted(pieces, held) if sifts else self._next_plain(pieces, held)
                )
                if batch is None:
                    break
                handed += 1
                # Counted before it leaves: the loop may never come back.
                self._sifter.counts.samples += rows(batch)
                self._sifter.counts.steps += self._sifter.model.training
                yield batch
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
        self._end_epoch(handed, resumed, self._sifter.pools > before)

    def _next_plain(self, pieces: Iterator[Piece], held: deque[_Held]) -> Batch | None:
        one = held.popleft() if held else self._draw(pieces)
        if one is None:
            return None
        batch, labels = one.take(one.rows)
        if not self._tested:
            # What cannot be scored fails on the first batch, not when the warm-up ends.
            self._sifter.rate(batch, labels)
            self._tested = True
        if self._split and self._sifter.keep < 1:
            batch = cut(batch, 0, max(1, int(one.piece.rows * self._sifter.keep)))
        self._cursor = one.piece.after(one.used)
        return self._handed(batch, one)

    def _next_sifted(self, pieces: Iterator[Piece], held: deque[_Held]) -> Batch | None:
        drawn = sum(one.rows for one in held)
        while not (self._pool and drawn >= self._pool) and not (self._split and held):
            one = self._draw(pieces)
            if one is None:
                break
            held.append(one)
            drawn += one.rows
        if not held:
            return None
        assert self._pool is not None and self._batch_size is not None
        take = min(drawn, self._pool)
        if take < self._batch_size:
            self._cursor = held[-1].piece.after(held[-1].piece.rows)
            self._sifter.counts.tail_dropped += drawn
            held.clear()
            return self._next_sifted(pieces, held) if self._split else None
        parts, labels, last = [], [], held[0]
        while take:
            last = held[0]
            count = min(take, last.rows)
            part, its_labels = last.take(count)
            parts.append(part)
            labels.append(its_labels)
            take -= count
            if not last.rows:
                held.popleft()
        candidates = merge(parts, self._pad_id)
        index, scores = self._sifter.winners(candidates, merge_labels(labels), self._batch_size)
        self._tested = True
        if self._on_select is not None:
            self._report(candidates, scores, index)
        self._cursor = last.piece.after(last.used)
        return self._handed(select(candidates, index), last)

    def _draw(self, pieces: Iterator[Piece]) -> _Held | None:
        piece = next(pieces, None)
        if piece is None:
            return None
        if self._pool is None:
            self._set_sizes(piece.rows)
        labels = self._sifter.labels_of(piece.batch) if self._sifter.keep < 1 else None
        return _Held(move(piece.batch, self._sifter.device), labels, piece)

    def _handed(self, batch: Batch, one: _Held) -> Batch:
        if not self._gives_back:
            return batch
        where = next(leaf.device for leaf in leaves(one.piece.batch) if isinstance(leaf, Tensor))
        return move(batch, where)

    def _sifts(self) -> bool:
        counts, sifter = self._sifter.counts, self._sifter
        return sifter.keep < 1 and self._schedule.sifts(counts.steps) and sifter.model.training

    def _report(self, candidates: Batch, scores: Tensor, index: Tensor) -> None:
        assert self._on_select is not None
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[index] = True
        ids = candidates.get("id") if isinstance(candidates, Mapping) else None
        if ids is None:
            seen = self._sifter.counts.candidates
            ids = torch.arange(seen - len(scores), seen, device=scores.device)
        self._on_select(ids, scores, kept)

    def _end_epoch(self, handed: int, resumed: bool, scored: bool) -> None:
        self._epoch, self._cursor, self._begun = self._epoch + 1, {}, False
        counts, steps = self._sifter.counts, self._schedule.warmup_steps
        if not handed and not resumed:
            raise EmptyEpoch(
                f"an epoch handed out nothing: {counts.tail_dropped} rows were drawn in all, a pool "
                f"needs at least batch_size = {self._batch_size} rows (of {self._pool} wanted); "
                f"use more data, a smaller batch_size, or a sampler that is not empty"
                if counts.tail_dropped
                else "an epoch handed out nothing: the inner loader is empty"
            )
        if scored or self._warned or self._sifter.keep == 1 or resumed:
            return
        self._warned = True
        if counts.steps < steps:
            warnings.warn(
                f"the epoch ended inside the warm-up ({counts.steps} of {steps} steps): nothing was "
                f"sifted; lower warmup_steps if the run is short",
                stacklevel=3,
            )
        elif not self._sifter.model.training:
            warnings.warn(
                "an epoch passed without sifting because the model is in eval mode; call "
                "model.train() before the epoch if it was meant for training",
                stacklevel=3,
            )

    def _set_sizes(self, size: int) -> None:
        # size: rows of an inner batch
        keep = self._sifter.keep
        batch, pool = (whole(size * keep), size) if self._split else (size, whole(size / keep))
        if not batch or not pool:
            raise ValueError(
                f"batch_size {size} {'*' if self._split else '/'} keep {keep} must be a whole "
                f"number of rows; choose a batch_size that fits"
            )
        self._batch_size, self._pool = batch, pool

    def _plan(self, step: int) -> Epoch:
        rows_ = self._source.epoch_rows()
        if rows_ is None or self._batch_size is None or self._pool is None:
            raise TypeError(
                f"the length of {type(self._source.loader).__name__} is not known before it was "
                f"drawn from"
                if isinstance(self._source, LoaderCandidates)
                else "unknown length"
            )
        if self._split:
            return Epoch(-(-rows_ // self._pool), rows_ // self._pool * self._batch_size)
        return self._schedule.epoch(step, rows_, self._batch_size, self._pool)

    @property
    def _pad_id(self) -> int:
        pad = getattr(getattr(self._sifter.model, "config", None), "pad_token_id", None)
        return pad if isinstance(pad, int) else 0

    def _check_topology(self, state: Mapping[str, Any]) -> None:
        ranks = World.detect().ranks
        for name, here in (("batch_size", self._batch_size), ("keep", self._sifter.keep)):
            if here is not None and state[name] not in (None, here):
                raise StateError(
                    f"the state was saved with {name} {state[name]}, this loader has {here}; build "
                    f"it with {name}={state[name]}, or start afresh without the state"
                )
        if state["ranks"] == ranks:
            return
        if isinstance(self._source, LoaderCandidates):
            raise StateError(
                f"the state was saved with {state['ranks']} ranks, {ranks} run now: what each had "
                f"read is not known; use TokenShards to change the number of ranks, or as many as then"
            )
        warnings.warn(
            f"resuming with {ranks} ranks what {state['ranks']} began: the candidates are those an "
            f"unbroken run would draw, which of them are kept depends on the number of ranks",
            stacklevel=3,
        )


def _candidates(
    dataset: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> ShardCandidates | LoaderCandidates:
    if isinstance(dataset, _Existing):
        if isinstance(dataset.loader, Dataset):
            raise TypeError(
                f"wrap takes a loader of batches, {type(dataset.loader).__name__} is a data set of "
                f"samples; use SiftingDataLoader(dataset, batch_size=..., model=...)"
            )
        if args or options:
            raise TypeError(
                f"wrap takes a loader as it is; it does not take {sorted(options) or args}"
            )
        return LoaderCandidates(dataset.loader, dataset.sharded)
    inner: DataLoader[Any] = DataLoader(
        dataset, *args, **options
    )  # torch's own errors, for torch's arguments
    if isinstance(dataset, TokenShards) and inner.batch_size and options.get("collate_fn") is None:
        pinned = inner.pin_memory and torch.cuda.is_available()
        return ShardCandidates(dataset, inner.batch_size, inner.drop_last, pinned)
    return LoaderCandidates(inner)
