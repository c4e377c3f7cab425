"""``SiftingDataLoader``: a DataLoader whose batches are the candidates worth training on.

    loader = SiftingDataLoader(dataset, batch_size=32, model=model)    # was DataLoader(dataset, batch_size=32)
    for batch in loader: ...                                           # unchanged

Every step draws ``P = b / keep`` candidates, scores them with the first ``j`` layers of the live model
under its own head, and hands out the ``b`` with the highest score.

Letters: b rows the loop receives, P rows of a pool, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
)

from siftloader.accelerated import (
    Prepared,
    accumulates,
    announce,
    asking,
    is_prepared,
    leave,
    save_with,
)
from siftloader.agreement import Doing, number_of
from siftloader.audit import Audits, Pace, figures
from siftloader.batches import (
    IGNORED,
    Batch,
    Copies,
    cut,
    leaves,
    move,
    rows,
)
from siftloader.candidates import (
    Cursor,
    Existing,
    LoaderCandidates,
    Piece,
    ShardCandidates,
    candidates_of,
)
from siftloader.concerns import Concerns
from siftloader.coverage import Coverage
from siftloader.drawn import Drawn, Taken, take
from siftloader.errors import EmptyEpoch, RanksDisagree, StateError
from siftloader.faces import Finished, kept_from, sampler_of
from siftloader.gate import Gate, gate_named, replayed, settings_of
from siftloader.heads import ExitHead
from siftloader.labels import Labels
from siftloader.pool import Pool
from siftloader.prescored import Merged, Prescored, copied
from siftloader.saved import check_fits, check_learned, checked
from siftloader.schedule import Epoch, Keep, Schedule, whole
from siftloader.scorer import Model, ScoreFunction, Scorer
from siftloader.scores import ScoreOf, criterion_named
from siftloader.selection import Selection, check_share
from siftloader.selection_log import SelectionLog
from siftloader.sifter import Sifter, Winners, weighted
from siftloader.sizes import Sizes
from siftloader.stats import Stats
from siftloader.stream import TokenShards, check_vocabulary
from siftloader.targets import Positions, Stride, to_device
from siftloader.trials import TrialGate, Trials, held_out_of
from siftloader.updates import Updates
from siftloader.world import World


STATE_VERSION = 4
# What `recommended` recommends: a share of the steps, and how many labelled positions to one that is scored.
WARMUP, SPARSE = 0.05, 8
_END, _PASSED = object(), object()
OnSelect: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]


@final
class SiftingDataLoader(DataLoader[Any]):
    """Hand out the ``batch_size`` candidates of ``batch_size / keep`` that the model has most to learn from.

    loader = SiftingDataLoader(dataset, batch_size=32, shuffle=True, model=model, exit_layer=1)
    loader = SiftingDataLoader.wrap(any_iterable_of_batches, model=model)

    Positional and unknown arguments go to torch's ``DataLoader`` untouched; the other options are those of
    ``Sifter``, and:

    * ``warmup_steps``: batches handed out as they come before sifting begins (the paper: 20,000 of
      800,000); ``cooldown_steps`` (a number, or a fraction of ``total_steps``): the same at the end.
    * ``count="optimizer"`` counts ``warmup_steps`` and all other steps in optimizer steps of the scored model,
      not in batches: for loops that accumulate gradients over ``accumulation`` batches (``len`` plans with it).
    * ``pool="merge"`` draws ``batch_size / keep`` rows; ``"split"`` takes each inner batch as the pool and
      hands out ``keep`` of it.
    * ``output_device="inner"`` gives tensors back where the inner loader had them; else they are on
      the model's device, in every phase.
    * ``overlap=True`` scores the next pool while the loop trains on this one, on a stream of its own (on a CPU: in
      a thread), with the weights this batch is trained with: scores are one batch stale, exactly. The optimizers of
      the model wait before they write, until it has read; those weights are written by torch's optimizers only.
      One pool more is drawn and held. With ``scorer_device`` a copy of the layers that score, made anew
      for every pool, lies on another GPU or the CPU, and they wait for the copy only. Refused where weights lie on
      several ranks, and with what learns (``exit_head``, ``Predicted``).
    * ``keep`` may change with the steps: ``{0: 0.5, 10_000: 0.25}`` is half, later a quarter of a pool.
    * Where several ranks run, they are asked at every step whether all do the same, in a reduction of a few bytes
      on the host: ``RanksDisagree`` on all of them where they do not, and the epoch ends for all where one has no
      more. ``process_group`` names the ranks that step together, if those are not all.
    * Every ``audit_every`` batches (0: never) one pool is also scored by the whole model: ``stats`` then has what the
      early scores are worth (``rho``, ``overlap``, ``spearman``, ``sigma``), what they cost, and the loss of all
      candidates, ``population_loss``: the curve to compare across runs, as it is not of the kept alone.
    * ``gate`` decides when sifting pays: ``"trial"`` trains copies of model and optimizer both ways every so often
      (``TrialGate``, with ``held_out`` batches unless shards bring theirs; ``"auto"`` is the same, as nothing
      cheaper predicted the gain), ``Threshold("overlap", 0.8, 0.7)`` or any function of the audits decides by those.
      Closed, batches pass through; ``len`` is that of the gate as it stands.
    * ``on_select(ids, scores, kept)`` sees every pool: ids [P] (``batch["id"]``, that of a shard's sample,
      else the number of the candidate), scores [P], kept [P] bool.
    * ``timeout`` is torch's: seconds without a batch. Over shards it needs no workers. Too late is ``Stalled``, with
      the stacks of all threads; a worker that was killed is ``WorkerDied``, between two batches.
    * ``log_selections="x.parquet"`` writes the same to a folder of Parquet files, readable after a
      crash; ``siftloader inspect-selections x.parquet`` reads it.

    The same number of epochs is about half the updates: build schedules from ``total_batches(epochs)``.
    Each ``iter()`` begins the next epoch, the first after ``load_state_dict`` continues.
    """

    def __new__(cls, dataset: Any = None, *_: Any, **__: Any) -> SiftingDataLoader:
        """Refuse to be built from finished batches: that is a framework's doing."""
        if isinstance(dataset, Finished):
            raise TypeError(
                "a framework wants to build this SiftingDataLoader anew with a sampler of its own (Lightning "
                "does for overfit_batches and predict), which would be no sifting; give it a plain DataLoader "
                "there, or one over candidates in a fixed order (shuffle=False)"
            )
        return super().__new__(cls)

    def __init__(
        self,
        dataset: Any,
        *loader_args: Any,
        model: Model,
        exit_layer: int | str = 1,
        criterion: ScoreOf | str = "loss",
        keep: Keep = 0.5,
        warmup_steps: int = 1000,
        cooldown_steps: int | float = 0,
        total_steps: int | None = None,
        count: Literal["batches", "optimizer"] = "batches",
        accumulation: int = 1,
        scope: Literal["rank", "global"] = "rank",
        selection: Selection | None = None,
        pool: Literal["merge", "split"] = "merge",
        positions: Positions | None = None,
        sift_weight: bool = False,
        exit_head: ExitHead | Literal["probe"] | None = None,
        labels: Labels | None = None,
        score_fn: ScoreFunction | None = None,
        shift_labels: bool | None = None,
        autocast: torch.dtype | None = None,
        score_batch_size: int | None = None,
        compile: bool | str = False,  # noqa: A002
        overlap: bool = False,
        scorer_device: torch.device | str | None = None,
        output_device: Literal["inner"] | None = None,
        process_group: Any = None,
        audit_every: int = 500,
        gate: Gate | TrialGate | Literal["trial", "auto"] | None = None,
        on_select: OnSelect | None = None,
        log_selections: str | os.PathLike[str] | None = None,
        **loader_options: Any,
    ) -> None:
        if pool not in ("merge", "split"):
            raise ValueError(f'pool must be "merge" or "split", got {pool!r}')
        if output_device not in (None, "inner"):
            raise ValueError(f'output_device must be None or "inner", got {output_device!r}')
        if pool == "split" and isinstance(keep, Mapping):
            raise ValueError(
                'pool="split" hands out a share of every inner batch: a keep that changes would change '
                'the batch size; use pool="merge", or one number'
            )
        self._schedule = Schedule(warmup_steps, cooldown_steps, total_steps, keep)
        self._count, self._accumulation = _checked_count(count, accumulation), accumulation
        self._sifter = Sifter(
            model,
            exit_layer=exit_layer,
            scope=scope,
            criterion=criterion_named(
                criterion, lambda: dataset.unigrams if isinstance(dataset, TokenShards) else None
            ),
            selection=selection,
            positions=positions,
            sift_weight=sift_weight,
            exit_head=exit_head,
            labels=labels,
            score_fn=score_fn,
            shift_labels=shift_labels,
            autocast=autocast,
            score_batch_size=score_batch_size,
            compile=compile,
            scorer_device=scorer_device,
            process_group=process_group,
        )
        if overlap and self._sifter.learns:
            raise ValueError(
                "overlap=True scores beside the training step, where exit_head and Predicted cannot learn; use "
                "overlap=False, or a criterion that does not learn"
            )
        self._prescored = Prescored(self._sifter) if overlap else None
        for share in self._schedule.shares:
            if share < 1:
                check_share(self._sifter.selection, share)
        self._updates = Updates(lambda: self._scorer.given_model) if count == "optimizer" else None
        if self._updates is not None:
            self._updates.counts = False  # before the first batch: see there
        self._concerns = Concerns(self._schedule, accumulation, self._updates)
        self._audits = Audits(self._scorer, audit_every, beside=overlap)
        if not self._schedule.ever_sifts:
            self._audits.every = 0
        self._pace = Pace()
        if isinstance(gate, str) and gate in ("trial", "auto"):
            gate = TrialGate()
        self._trials = None
        if isinstance(gate, TrialGate):
            self._trials, gate = Trials(gate, self._sifter, held_out_of(gate, dataset)), None
        self._gate = gate_named(gate)
        priced = self._trials is not None and self._trials.gate.cost is not None
        self._audits.needed = not (gate is None and (self._trials is None or priced))
        if self._audits.needed and not audit_every:
            raise ValueError(
                "a gate needs what audits find, and audit_every=0 makes none; give the steps between two of them"
            )
        # Whether the gate lets through what the schedule sifts.
        self._open = self._trials is None
        if self._gate is not None:
            self._open = replayed(self._gate, ())
        self._source = candidates_of(dataset, loader_args, loader_options)
        self._on_select = on_select
        self._log = SelectionLog(log_selections, World.detect().rank) if log_selections else None
        self._gives_back = output_device == "inner"
        self._copies = Copies()
        # The epoch to begin next, or the one under way; and where in it.
        self._epoch, self._cursor = self._source.first()
        self._begun = False
        self._idle = False  # begun, and nothing handed out yet
        self._resumed = False  # begun from a cursor
        self._moved = False  # to another epoch, after iter()
        self._restored = False  # a state, of which nothing was handed out yet
        self._ahead = 0  # how far it is ahead of what is announced
        self._covered = Coverage()  # of the epoch under way, from where it was taken up
        self._before: tuple[int, Cursor] | None = (self._epoch, self._cursor)  # where that was
        self._asks = False  # whether the other ranks are asked at every step of this iterator
        self._running: Iterator[Batch] | None = None  # what next(loader) draws from
        self._turn = 0  # counts iterators: the newest one moves the state
        self._loads = 0  # counts states loaded: what ran before is told
        self._epoch_step = 0  # at which the epoch under way began
        self._told_epoch: int | None = None
        self._tested = not self._schedule.ever_sifts
        self._warned_unprepared = False
        self._learned: dict[str, str] | None = None  # digests of the tensors a loaded state needs
        data = (
            getattr(dataset.loader, "dataset", None) if isinstance(dataset, Existing) else dataset
        )
        self._vocabulary: Any = (
            data if isinstance(getattr(data, "vocab_size", None), int) else None
        )
        self._fits = self._vocabulary is None  # whether the model was seen to embed every id
        if isinstance(model, nn.Module):
            self._check_vocabulary()
        self._joined = False  # whether an Accelerator prepared this loader
        self._measured = False  # whether its length was asked for
        self._hosts: weakref.WeakSet[Any] = weakref.WeakSet()  # they save the state
        self._sizes = Sizes(self._schedule, pool == "split", accumulation)
        if (size := self._source.batch_size) is not None:
            self._sizes.learn(size)
        # A generator and a collate_fn of its own: who rebuilds this loader draws nothing from the global
        # stream with it, and changes no batch.
        super().__init__(
            Finished(self), batch_size=None, generator=torch.Generator(), collate_fn=_unchanged
        )
        told = sampler_of(getattr(self._source, "loader", None), Finished(self), self._announced)
        self.__dict__["sampler"] = told  # torch lets nobody set it
        # Lightning's, to build this loader anew: see __new__.
        for name in [each for each in self.__dict__ if each.startswith("__pl_saved")]:
            del self.__dict__[name]
        self._built = True

    @classmethod
    def wrap(
        cls, loader: Iterable[Batch], *, model: Model, sharded: bool = False, **options: Any
    ) -> SiftingDataLoader:
        """Sift the batches of a loader that exists: any iterable of batches, drawn as it is.

        ``sharded`` declares that it gives each rank its own share already; ``options`` are the class's.
        """
        if isinstance(loader, cls):
            raise ValueError(
                "this loader sifts already; wrap the loader that it is built on, once"
            )
        return cls(Existing(loader, sharded), model=model, **options)

    @classmethod
    def recommended(
        cls, dataset: Any, *loader_args: Any, model: Model, total_steps: int, **options: Any
    ) -> SiftingDataLoader:
        """Sift with the settings that did best in our own comparisons, where sifting paid at all.

        loader = SiftingDataLoader.recommended(shards, 32, model=model, total_steps=100_000)

        The paper's rule (loss at layer 1, the top half), the first 5 % of the steps plain, no cool-down; for
        causal shards one scored position in eight, corrected by token rarity.

        Evidence: a GPT of 4 layers of 128, at most 2 M tokens of prose, three paired seeds, held-out nats
        minus those of plain training with 95 % intervals (tools/LOG.md, 2026-11-22; tools/results).

        * Half of the text repeated: -0.120 +- 0.002 at equal samples (a random half -0.010 +- 0.015); in
          equal time, scoring paid, -0.045 +- 0.020 at 500 steps of plain training, -0.173 +- 0.010 at 1,000.
          These with the last 20 % of the steps plain; without that cool-down -0.156 +- 0.002 at equal samples.
        * The same prose as it is, read once: +0.050 +- 0.005 at equal samples. *Do not sift such text.*

        Nothing here was measured on large models, on real crawls, or on masked models beyond their
        plateau; the paper's own gain was on BERT-base over days.

        ``options`` are the class's, and replace what is recommended; raises what the class raises.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int of at least 1, got {total_steps!r}")
        chosen: dict[str, Any] = {
            "warmup_steps": round(WARMUP * total_steps),
            "total_steps": total_steps,
        }
        if isinstance(dataset, TokenShards) and not dataset.objective.startswith("mlm"):
            chosen["positions"] = Stride(SPARSE, control=dataset.unigrams)
        return cls(dataset, *loader_args, model=model, **{**chosen, **options})

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        resumed, joined = self._resumes, self._joins
        if not joined and accumulates() and not self._warned_unprepared:
            self._warned_unprepared = True
            warnings.warn(
                "an Accelerator accumulates gradients, but this loader was not prepared: the last steps of an epoch "
                "would be left out; give it to accelerator.prepare()",
                stacklevel=2,
            )
        batches = self._begin(joined)
        return self._or_next(batches) if resumed and joined else batches

    def _begin(self, joined: bool, over: int = 0) -> Iterator[Batch]:
        # The next epoch, or where a state left one, for accelerate to hear of; without its first batches.
        self._asks = self._may_train()
        self._pace.rest()
        with self._telling():
            if (
                self._learned is not None
            ):  # tensors may be loaded before or after the state, until now
                check_learned(self._learned, self._scorer.digests())
                self._learned = None
            epoch, cursor = self._upcoming()
            resumed = bool(cursor)
            if not resumed:
                self._refuse_empty_epoch()
                self._forget_ahead()
            # Taken now: the inner iter() must draw what it draws in the plain loader, when it draws it.
            start, pieces = self._source.draw(epoch, cursor)
        if not resumed:
            self._epoch_step = self._step
            self._covered, self._before = Coverage(), None
        elif self._is_over(cursor):
            self._epoch_step = self._step  # len() is that of the epoch to come
        self._epoch, self._cursor, self._begun = epoch, start, True
        self._idle, self._resumed, self._moved = True, resumed, False
        self._turn += 1
        self._asks = False
        return self._batches(pieces, resumed, self._turn, joined, over)

    def _or_next(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        # A state that was saved while an epoch's last batch was out goes on with the next epoch, as those of
        # accelerate's own stateful loaders do: its scripts count the epoch as done.
        first = list(islice(batches, 1))
        if not first:
            batches = self._begin(joined=True)
        while first:
            yield first.pop()
        yield from batches

    def without_first(self, count: int) -> Iterator[Batch]:
        """For accelerate's ``skip_first_batches``, which drops the first ``count`` of these.

        A script that restored a state skips what that has done already, so there it drops nothing that counts.
        """
        if not self._resumes:
            return chain(repeat(None, count), self._begin(joined=True, over=count))
        return chain(repeat(None, count), self._where_it_was(count))

    def _where_it_was(self, count: int) -> Iterator[Batch]:
        place = self._sifter.counts.steps - self._epoch_step if self._updates is None else count
        batches = self._begin(joined=True)
        first = list(islice(batches, 1))
        if not first and count == place:
            return  # it skips the whole epoch that was under way
        if not first:
            place, batches = 0, self._begin(joined=True)
        if count != place:
            warnings.warn(
                f"skip_first_batches was told {count}, but in the state that was restored {place} batches of this "
                f"epoch are done: it goes on after those (optimizer steps times accumulation are too many "
                f"batches where an epoch ends with a partial step)",
                stacklevel=3,
            )
        while first:
            yield first.pop()
        yield from batches

    def __next__(self) -> Batch:
        """The next batch of a running iterator, for loops that draw by hand; it begins at the first call.

        After the end of an epoch (StopIteration) the next call begins the next one.
        """
        if self._running is None:
            self._running = iter(self)
        batch = next(self._running, _END)
        if batch is _END:
            self._running = None
            raise StopIteration
        return batch

    def close(self) -> None:
        """End the iterator that ``next(loader)`` draws from; the state stays where it is.

        With ``overlap=True`` the optimizers are listened to no more, until the next batch is drawn.
        """
        if isinstance(self._running, Generator):
            self._running.close()
        self._running = None
        if self._prescored is not None:
            self._prescored.close()

    @property
    def _is_accelerate_prepared(self) -> bool:
        # All that accelerate asks before it would rebuild this loader, and lose the sifting: asked by an
        # Accelerator, the inner loader is given to it to be sharded; anybody else hears whether it was.
        accelerator = asking(sys._getframe(1))
        if accelerator is not None and accelerator not in self._hosts:
            try:
                self._prepare_with(accelerator)
            except AttributeError as error:
                # Accelerate would take it for a loader without this attribute, and rebuild it.
                raise RuntimeError(f"the inner loader could not be prepared: {error}") from error
        return self._joined

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        pass  # accelerate marks what it prepared; nobody else can

    def _prepare_with(self, accelerator: Any) -> None:
        self._source.prepare(accelerator)
        if (size := self._source.batch_size) is not None:
            self._sizes.learn(size)  # split_batches divides them among the ranks
        self._hosts.add(accelerator)
        self._joined = True
        save_with(accelerator, self)
        own_shares = isinstance(self._source, ShardCandidates)
        if self._measured and own_shares and accelerator.num_processes > 1:
            warnings.warn(
                "len(loader) was asked for before accelerator.prepare(): over TokenShards it is that of this "
                "rank's share, and accelerate steps a prepared scheduler once for every rank; a schedule made "
                "from it must span len(loader) * accelerator.num_processes",
                stacklevel=4,
            )

    def __getattr__(self, name: str) -> Any:
        # Asked for what this object lacks: what the loop knows of its own loader (cramming's epoch_counter).
        if not self._is_of_inner(name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")
        return getattr(self._extras, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # And set there where it is read there (timm's mixup_enabled).
        if name not in self.__dict__ and self._is_of_inner(name):
            setattr(self._extras, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_inner(self, name: str) -> bool:
        # Figures and flags, not methods: those would move it under our feet.
        if name.startswith("_") or hasattr(type(self), name) or self._extras is None:
            return False
        found = getattr(self._extras, name, _END)
        return found is not _END and not callable(found)

    @property
    def _extras(self) -> Any:
        # The inner loader, if the loop may know it. Accelerate, which asks what it made, must not find it here.
        loader = getattr(self._source, "loader", None) if "_built" in self.__dict__ else None
        return None if isinstance(loader, Prepared) or is_prepared(loader) else loader

    def __len__(self) -> int:
        """Batches of the epoch under way, else of the next: ``w + n // P + (n % P >= b)``.

        Of this rank; of all of them where an Accelerator is yet to divide the data among them.
        """
        self._measured = True
        return self.epoch().batches

    def epoch(self) -> Epoch:
        """Batches and samples of the epoch under way, else of the next; TypeError where unknown."""
        under_way = self._begun or self._cursor
        return self._plan(self._epoch_step if under_way else self._step)

    def total_batches(self, epochs: int) -> int:
        """Batches of that many epochs from step 0, as ``len`` counts: what a learning-rate schedule must span."""
        self._measured = True
        batches = steps = 0
        for _ in range(epochs):
            planned = self._plan(steps).batches
            batches, steps = batches + planned, steps + -(-planned // self._accumulation)
        return batches

    @property
    def stats(self) -> dict[str, Any]:
        """What happened so far, a plain dict; reading it may wait for the GPU, nothing else does."""
        self._sifter.counts.sifting = self._sifts()
        found = {"epoch": self._epoch, **self._sifter.counts.read(), **figures(self.audits)}
        if self._trials is not None:
            found |= self._trials.figures()
        return found if self._updates is None else {**found, "updates": self._updates.steps}

    @property
    def audits(self) -> list[dict[str, Any]]:
        """What every audit found, oldest first, JSON-able; the last one's figures are in ``stats``.

        "step", "sifting", "rows", those of ``fidelity.Fidelity`` by their names, and "scoring_cost": what scoring a
        pool takes, in training steps. Where several ranks run, of all of them, a few steps later. Waits for the GPU.
        """
        alone = self._sifter.agreement.ranks == 1
        return [*self._audits.latest(self._pace, self._sifter.counts.scoring, alone)]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """What every trial of ``gate="trial"`` found, oldest first, JSON-able.

        "step", "gain" and "half_width" (nats of held-out loss in equal time), "cost" (of scoring, in plain steps),
        "open", "steps_spent" (what it cost, in plain steps), "scored" (candidates).
        """
        return [] if self._trials is None else [*self._trials.history]

    def coverage(self) -> Coverage:
        """Which candidates were handed out or scored in the epoch under way, or in the one that ended last.

        Known over TokenShards, else TypeError. Add up those of all ranks to compare with the shards'
        ``expected_coverage``. A row that was only read ahead does not count, nor one of ``stats["tail_dropped"]``;
        one from before a restart does, as for ``TokenShards.coverage``.
        """
        if not isinstance(self._source, ShardCandidates):
            raise TypeError(
                "coverage() is known over TokenShards only: ids of other data say nothing of what there is"
            )
        if self._before is not None:
            (epoch, cursor), self._before = self._before, None
            self._covered += self._source.covered(epoch, cursor)
        return self._covered

    @property
    def exit_head(self) -> ExitHead | None:
        """The head that is trained beside the model; save its ``state_dict()`` beside the loader's."""
        return self._sifter.exit_head

    def attach_model(self, model: Model) -> None:
        """Score with this model from now on: after wrapping it, say."""
        self._forget_ahead()
        self._sifter.attach_model(model)
        self._audits.forget_model()
        if self._trials is not None:
            self._trials.forget_model()
        self._fits = self._vocabulary is None
        if isinstance(model, nn.Module):
            self._check_vocabulary()

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch next, from its start; a state restored in it keeps its place."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if epoch != self._epoch or (self._begun and not self._idle):
            self._turn += not self._idle  # an iterator under way moves the state no more
            self._epoch, self._cursor, self._begun = epoch, {}, self._idle
            self._moved = self._idle
            self._forget_ahead()
        self._tell(epoch)

    def _forget_ahead(self) -> None:
        # What was scored of another pool than the one that comes next must not be saved, or taken for that.
        if self._prescored is not None:
            self._prescored.drop()

    def _tell(self, epoch: int) -> None:
        self._told_epoch = epoch
        self._source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What was handed to the loop so far, JSON-able; valid after a break and at an epoch's end."""
        if self._log is not None:
            self._log.flush()  # a run that continues from here finds its past in the log
        # First: it waits for a job that learns what is read after it.
        ahead = None if self._prescored is None else self._prescored.state()
        cursor = self._cursor
        if not cursor and self._sifter.counts.samples:
            cursor = self._source.next_start()  # between epochs
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "epoch_step": self._epoch_step if self._cursor else self._step,
            "count": self._count,
            "scope": self._sifter.scope,
            "updates": 0 if self._updates is None else self._updates.steps,
            "cursor": cursor,
            "batch_size": self._sizes.batch,
            "inner": self._sizes.inner,
            "keep": _as_json(self._schedule.keep),
            "ranks": World.detect().ranks,
            "pools": self._sifter.pools,
            "precision": self._scorer.precision.name,
            "watched": not self._scorer.precision.watches,
            "reading": self._scorer.reading_state,
            "learned": self._scorer.digests() if self._learned is None else self._learned,
            "room": self._scorer.room_state,
            "ahead": ahead,
            "audits": self._audits.state(
                self._pace, self._sifter.counts.scoring, self._scorer.data_rank
            ),
            "gate": None if self._gate is None else self._open,
            "trials": None if self._trials is None else self._trials.state(),
            "set_epoch": self._told_epoch,
            "stats": self._sifter.counts.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, override: Collection[str] = ()) -> None:
        """Continue where ``state`` was taken; StateError where it belongs to something else.

        ``override`` names what may differ all the same, as for ``TokenShards``: over shards only.
        """
        own = self.state_dict()
        state = checked(state, own)
        cursor = self._source.checked(dict(state["cursor"]), override)
        check_fits(state, own, elastic=isinstance(self._source, ShardCandidates))
        if self._sizes.batch is None:
            # Not to be learned again: the next inner batch may be a ragged one.
            self._sizes.batch, self._sizes.inner = state["batch_size"], state["inner"]
        if (told := state["set_epoch"]) is not None:
            self._told_epoch = told
            self._source.set_epoch(told)
        self._epoch, self._cursor, self._begun = state["epoch"], cursor, False
        self._idle, self._restored, self._ahead = False, True, 0
        self._covered, self._before = Coverage(), (self._epoch, cursor)
        self._epoch_step = state["epoch_step"]
        self._sifter.pools = state["pools"]
        self._scorer.precision.name = state["precision"]
        if state["watched"]:
            self._scorer.precision.settle()
        self._scorer.reading_state = state["reading"]
        self._scorer.room_state = state["room"]
        self._learned = dict(state["learned"])
        self._audits.load(state["audits"], self._scorer.data_rank)
        if self._trials is not None:
            self._trials.load(state["trials"])
            self._open = self._trials.is_open
        if self._gate is not None:
            known = state["gate"]
            self._open = replayed(self._gate, self._audits.history) if known is None else known
        self._turn += 1
        self._loads += 1
        self._sifter.counts = Stats.from_state(state["stats"])
        if self._updates is not None:
            self._updates.steps, self._updates.counts = state["updates"], False
        self.close()
        if self._prescored is not None:
            # Among other ranks, or from other data, this one draws another pool.
            same = state["ranks"] == own["ranks"] and not override
            self._prescored.load(state["ahead"] if same else None)

    @property
    def worker_init_fn(self) -> Any:
        """That of the inner loader, whose workers they are."""
        return getattr(getattr(self._source, "loader", None), "worker_init_fn", None)

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        inner = getattr(self._source, "loader", None)
        if function is not None and isinstance(inner, DataLoader):  # Lightning seeds workers so
            inner.worker_init_fn = function

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a SiftingDataLoader holds the live model and is not pickled; save state_dict() instead"
        )

    def _batches(
        self, pieces: Iterator[Piece], resumed: bool, turn: int, joined: bool, over: int
    ) -> Iterator[Batch]:
        held: deque[Drawn] = deque()
        handed, loads = 0, self._loads
        if self._moved and turn == self._turn:
            pieces, resumed = self._drawn_anew(pieces), False
        try:
            while (batch := self._next(pieces, held, turn, handed >= over)) is not None:
                if loads != self._loads:
                    raise StateError(
                        "a state was loaded while this iterator ran, which cannot follow it; load it "
                        "before iter(), or begin a new iterator"
                    )
                handed += 1
                # The first may be drawn before Lightning restores anything.
                if handed <= 2 and not loads and kept_from(sys._getframe(1)):
                    raise StateError(
                        "Lightning has set up this loader before it restored the checkpoint, and leaves the "
                        "loader's state in there: it would begin the epoch anew, and the warm-up. "
                        "trainer.estimated_stepping_batches in configure_optimizers does that; restore the state "
                        "yourself, in on_load_checkpoint (as examples/lightning_module.py does), or build the "
                        "schedule from loader.total_batches(epochs)"
                    )
                if handed <= over:
                    continue
                if joined:
                    pieces = self._announce(pieces, held)
                # Not before the loop's first forward has told its precision.
                watches = self._scorer.precision.watches
                ahead = turn == self._turn and self._sifts() and not watches
                if self._prescored is not None and ahead:
                    pieces = self._look_ahead(self._prescored, pieces, held)
                # Counted before it leaves: the loop may never come back. And let go of: what the loop
                # drops must not live on here while the next pool is scored.
                out = [batch]
                del batch
                yield out.pop()
        finally:
            if joined:
                leave(self)
            self._scorer.precision.unwatch()  # whoever keeps the model keeps no hook of ours
            if hasattr(pieces, "close"):
                pieces.close()
        if turn == self._turn:
            self._end_epoch(handed, resumed)

    def _announce(self, pieces: Iterator[Piece], held: deque[Drawn]) -> Iterator[Piece]:
        # Accelerate is to know while the last batch is out. What goes wrong beyond this one is the next one's.
        try:
            last = self._is_last(pieces, held)
        except BaseException as error:
            last, pieces = False, _raising(error)
        if accumulates():  # and all ranks must step together: where one has no more, all end
            last = not self._agreed(Doing.ENDS if last else Doing.HANDS_OUT)
        announce(self, last)
        return pieces

    def _look_ahead(
        self, prescored: Prescored, pieces: Iterator[Piece], held: deque[Drawn]
    ) -> Iterator[Piece]:
        # The next pool is scored while the loop trains on this one. What goes wrong there is the next one's.
        try:
            pool, split = self._sizes.pool(self._step) or math.inf, self._sizes.split
            while not (held and split) and _rows(held) < pool and self._draw(pieces, held):
                pass
            if held and _rows(held) >= self._sizes.least:
                peek = copied(held)
                prescored.begin(take(peek, int(min(_rows(peek), pool))), self._pad_id)
        except BaseException as error:
            if not isinstance(error, Exception):
                held.clear()  # an interrupt: the next one raises it, whatever was drawn
            pieces = _raising(error)
        return pieces

    def _is_last(self, pieces: Iterator[Piece], held: deque[Drawn]) -> bool:
        # Whether no batch follows. While sifting that takes the rows of a batch, drawn but not scored.
        if not self._sifts():
            ended = self._source.ended
            return not held and (not self._draw(pieces, held) if ended is None else ended)
        while _rows(held) < self._sizes.least:
            if not self._draw(pieces, held):
                return True
            if self._sizes.split and _rows(held) < self._sizes.least:
                self._drop(held)
        return False

    def _next(
        self, pieces: Iterator[Piece], held: deque[Drawn], turn: int, wanted: bool = True
    ) -> Batch | None:
        self._scorer.precision.unwatch()
        counts = self._sifter.counts
        with self._telling():
            self._check_vocabulary()
            training = self._scorer.model.training
            # An iterator that was never drawn from in training mode is a rank's own: some evaluate alone.
            self._asks |= training and self._schedule.ever_sifts
            if training and self._schedule.sifts(self._step) and self._trials is not None:
                self._try(self._trials, pieces, held)
            if training and self._open and self._schedule.sifts(self._step):
                found = self._next_sifted(pieces, held, wanted)
            else:
                found = self._next_plain(pieces, held, training)
            if found is None:
                return None
            batch, taken = found
            trained_on = training and batch is not _PASSED
            if trained_on and self._trials is not None and self._schedule.ahead(self._step):
                self._trials.rehearse(batch)
        if turn == self._turn:
            self._cursor, self._idle, self._restored = taken.cursor, False, False
            if isinstance(self._source, ShardCandidates):
                self._covered += taken.covered()
        elif training:
            self._concerns.older_iterator()
        sifted = training and self._sifts()
        counts.steps += training
        if training:
            self._pace.tick(time.perf_counter(), sifted)
            with self._telling():
                self._settle()
        else:
            self._pace.rest()
        if self._updates is not None and training:
            self._updates.counts = True
        self._concerns.batch(counts, self._scorer, training)
        precision = self._scorer.precision
        if training and precision.watches and self._schedule.ahead(self._step):
            precision.watch(self._scorer.given_model, self._scorer.device)
        return self._handed(batch, taken.last)

    def _try(self, trials: Trials, pieces: Iterator[Piece], held: deque[Drawn]) -> None:
        # A trial, if one is due, of the pools that come next; they stay held.
        agreement = self._sifter.agreement
        if not trials.due(self._step, self._epoch):
            return
        cost, wanted, split = trials.cost(self._audits.history), trials.pools, self._sizes.split
        if cost is None:
            return  # on all ranks: audits are of all of them
        if self._prescored is not None:
            self._prescored.wait()  # its job may look at what is copied
        able = self._tested and trials.optimizer() is not None
        found: list[Merged] = []
        if able:
            while len(held) < wanted if split else _rows(held) < wanted * self._pool_rows:
                if not self._draw(pieces, held):
                    break
            peek = copied(held)
            while len(found) < wanted and peek and _rows(peek) >= self._pool_rows:
                taken = take(peek, self._pool_rows)
                found.append(Merged.of(taken, self._sifter, self._pad_id))
        votes = agreement.gathered(torch.tensor([[able, len(found) >= wanted]]))
        if not all(bool(vote[0, 0]) for vote in votes):
            trials.postpone(self._step, 1)
        elif not all(bool(vote[0, 1]) for vote in votes):
            trials.wait_for_epoch(self._epoch, len(found))
        else:
            assert self._sizes.batch is not None
            self._open = trials.run(self._step, found, self._sizes.batch, cost, agreement)

    @property
    def _pool_rows(self) -> int:
        rows = self._sizes.pool(self._step)
        assert rows is not None
        return rows

    def _settle(self) -> None:
        # The figures of an audit, and what the gate makes of them, on all ranks at the same step.
        counts = self._sifter.counts
        audit = self._audits.settle(
            counts.steps, self._pace, self._sifter.agreement, counts.scoring
        )
        if audit is not None and self._gate is not None:
            self._open = bool(self._gate(self._audits.history, self._open))

    def _audit(self, pool: Pool, labels: Tensor | None, won: Tensor | None) -> None:
        # Of a batch that passes through, the share that would be kept if it were a pool.
        counts, count = self._sifter.counts, rows(pool.batch)
        share = min(self._schedule.shares)

        def kept(scores: Tensor) -> Tensor:
            keep = whole(count * share) or max(1, int(count * share))
            return self._sifter.selection(scores, keep, pool) if won is None else won

        of_pool = 1.0 if won is not None or self._sizes.split else share
        sifting = won is not None
        if self._audits.look(
            counts.steps, pool, labels, kept, sifting, of_pool, counts.scoring, counts.auditing
        ):
            counts.audited += count

    def _next_plain(
        self, pieces: Iterator[Piece], held: deque[Drawn], training: bool
    ) -> tuple[Batch, Taken] | None:
        self._forget_ahead()  # its rows are handed out as they are
        ends = not held and not self._draw(pieces, held)
        doing = Doing.PASSES if training else Doing.EVALUATES
        if not self._agreed(Doing.ENDS if ends else doing):
            self._end_with_others(0, held)
            return None
        count, counts = held[0].rows, self._sifter.counts
        taken = take(held, count)
        if training and self._schedule.ahead(self._step):
            tests, teaches = not self._tested, self._scorer.exit_head is not None
            if tests:
                self._test(taken)  # what cannot be scored fails now, not when the warm-up ends
            if teaches:  # it is to be ready when the warm-up ends
                self._scorer.teach(taken.parts[0], taken.labels(self._scorer.labels_of))
            if tests or teaches:
                self._agreed(Doing.HANDS_OUT)  # what fails on one rank alone fails before it
        if training and self._audits.due(self._sifter.counts.steps):
            pool = self._sifter.pool(taken.parts[0], taken.fields())
            self._audit(pool, taken.labels(self._scorer.labels_of), None)
        batch = taken.parts.pop()
        if self._sizes.split and self._schedule.ever_sifts:
            count = self._sizes.kept_of(count)
            batch = cut(batch, 0, count)
        if self._sifter.weighs:
            batch = weighted(batch, torch.ones(rows(batch), device=self._scorer.device), None)
        counts.samples += count
        return batch, taken

    def _next_sifted(
        self, pieces: Iterator[Piece], held: deque[Drawn], wanted: bool
    ) -> tuple[Batch, Taken] | None:
        while True:
            while not (held and self._sizes.split) and _rows(held) < (
                self._sizes.pool(self._step) or math.inf
            ):
                if not self._draw(pieces, held):
                    break
            if not held or _rows(held) >= self._sizes.least:
                break
            self._drop(held)  # less than a batch, at the end of the data
        if not held:
            self._agreed(Doing.ENDS)
            return None
        pool = self._sizes.pool(self._step)
        assert pool is not None and self._sizes.batch is not None
        taken = take(held, min(_rows(held), pool))
        if not wanted:
            return self._passed_over(taken) if self._agreed(Doing.SIFTS) else None
        return self._sifted(taken, self._sizes.batch, held)

    def _may_train(self) -> bool:
        # A function may have no model to show before the first batch.
        try:
            return self._schedule.ever_sifts and self._scorer.model.training
        except Exception:
            return False

    @contextmanager
    def _telling(self) -> Iterator[None]:
        # The other ranks wait for this one at their next step, or will: they hear of what fails here.
        try:
            yield
        except RanksDisagree:
            raise
        except BaseException:
            if self._asks:
                self._sifter.agreement.failed()
            raise

    def _agreed(self, doing: Doing) -> bool:
        # Whether there is a batch.
        if self._asks:
            # Over other data than shards the number of the epoch says nothing of the order, unless it was told.
            shards = isinstance(self._source, ShardCandidates)
            epoch = self._epoch if shards else self._told_epoch or 0
            return self._sifter.agreement.step(doing, self._step, self._settings, epoch)
        return doing is not Doing.ENDS

    def _end_with_others(self, taken: int, held: deque[Drawn]) -> None:
        if not taken and not held:
            return
        warnings.warn(
            f"the epoch ends here because another rank has no more batches; {taken + _rows(held)} rows that this "
            f"rank has drawn are dropped, and those that it did not draw: give all ranks as many",
            stacklevel=5,
        )
        self._sifter.counts.tail_dropped += taken
        self._drop(held)

    def _drop(self, held: deque[Drawn]) -> None:
        self._sifter.counts.tail_dropped += _rows(held)
        held.clear()

    @functools.cached_property
    def _settings(self) -> int:
        scorer = self._scorer
        kinds = (type(each).__qualname__ for each in (scorer.criterion, self._sifter.selection))
        return number_of(
            self._schedule,
            self._sizes.split,
            scorer.exit_layer,
            self._sifter.scope,
            self._audits.every,
            settings_of(self._gate) if self._trials is None else self._trials.told,
            *kinds,
        )

    def _passed_over(self, taken: Taken) -> tuple[Batch, Taken]:
        # A pool of before a restart that nobody looks at again: not scored, counted as it was then.
        self._sifter.pools += 1
        self._sifter.counts.samples += self._sizes.batch or 0
        return _PASSED, taken

    def _sifted(self, taken: Taken, keep: int, held: deque[Drawn]) -> tuple[Batch, Taken] | None:
        counts, pools = copy.copy(self._sifter.counts), self._sifter.pools
        try:
            # Ragged ones are padded with the mark that the test hears; on several ranks all must test alike.
            goes_on = True
            if self._prescored is not None and not self._tested:
                self._scorer.check_overlap()
            if not self._tested and (taken.ragged or self._sifter.agreement.ranks > 1):
                goes_on = self._test(taken.first)
            drawn = taken.rows
            merged = None if self._prescored is None else self._prescored.take(taken)
            candidates, labels, fields, ends, known = merged or Merged.of(
                taken, self._sifter, self._pad_id
            )
            if self._prescored is not None and known is None:
                known = self._prescored.restored(drawn)
            # Asked when nothing is left to fail on one rank alone: scoring may communicate.
            if not (goes_on and self._agreed(Doing.SIFTS)):
                self._end_with_others(drawn, held)
                return None
            pool = self._sifter.pool(candidates, fields, ends)
            won = self._sifter.winners(candidates, labels, keep, fields, ends, known)
            self._tested = True
            if self._trials is not None:
                self._trials.check(candidates)
            self._audits.rehearse(pool, labels, self._sifter.counts.auditing)
            if self._audits.due(self._sifter.counts.steps):
                self._audit(pool, labels, won.kept)
            self._report(labels, fields, won)
            self._sifter.counts.samples += keep
            batch = self._sifter.handed(candidates, won, self._pad_id)
            self._agreed(Doing.HANDS_OUT)  # last: what fails on one rank alone fails before it
            return batch, taken
        except BaseException:
            # Not handed out, so a restart draws and counts them again, under the same number.
            self._sifter.counts, self._sifter.pools = counts, pools
            raise

    def _test(self, taken: Taken) -> bool:
        # Whether other ranks had something to test, too.
        pool = self._sifter.pool(taken.parts[0], taken.fields())
        labels = taken.labels(self._scorer.labels_of)
        if not self._agreed(Doing.SIFTS):
            return False
        self._scorer.score(pool, labels)
        self._tested = True
        if self._trials is not None:
            self._trials.check(pool.batch)
        self._audits.rehearse(pool, labels, self._sifter.counts.auditing)
        return True

    def _draw(self, pieces: Iterator[Piece], held: deque[Drawn]) -> bool:
        piece = next(pieces, None)
        if piece is None:
            return False
        if not piece.rows and self._schedule.ever_sifts:
            rows(piece.batch)  # says what is wrong with it
        if self._sizes.inner is None and piece.rows:
            self._sizes.learn(piece.rows)
        held.append(Drawn(self._copies.to(piece.batch, self._scorer.device), piece))
        return True

    def _handed(self, batch: Batch, piece: Piece) -> Batch:
        if not self._gives_back:
            return batch
        tensors = (leaf for leaf in leaves(piece.batch) if isinstance(leaf, Tensor))
        first = next(tensors, None)
        return move(batch, "cpu" if first is None else first.device)

    @property
    def _step(self) -> int:
        # What the schedule counts in.
        return self._sifter.counts.steps if self._updates is None else self._updates.steps

    @property
    def _resumes(self) -> bool:
        # Whether the next iter() continues an epoch.
        return bool(self._cursor) and not self._begun

    @property
    def _joins(self) -> bool:
        # Whether accelerate wants to hear of the batches.
        return self._joined or self._source.ended is not None

    @property
    def _scorer(self) -> Scorer:
        return self._sifter.scorer

    def _sifts(self) -> bool:
        return self._open and self._schedule.sifts(self._step) and self._scorer.model.training

    def _report(self, labels: Tensor | None, fields: Mapping[str, Tensor], won: Winners) -> None:
        if self._on_select is None and self._log is None:
            return
        counts, (index, scores, *_) = self._sifter.counts, won
        ids, numbered = fields.get("id"), "candidates"
        if ids is None:
            ids = torch.arange(counts.candidates - len(scores), counts.candidates)
        else:
            numbered = self._source.ids
        if self._on_select is not None:
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[index] = True
            self._on_select(to_device(ids, scores.device), scores, kept)
        if self._log is not None:
            labelled = None
            if labels is not None and not labels.is_floating_point():
                counted = (labels != IGNORED) & (labels != self._scorer.ignored)
                labelled = counted.reshape(len(scores), -1).sum(1)
            pool, source = self._sifter.pools - 1, fields.get("source")
            self._log.ids = numbered
            self._log.add(counts.steps, pool, ids, scores, index, labelled, source)

    def _upcoming(self) -> tuple[int, Cursor]:
        # Where the next iter() begins.
        over = self._begun and not self._moved
        return (self._epoch + 1, {}) if over else (self._epoch, self._cursor)

    def _announced(self, epoch: int) -> None:
        # By whoever iterates, through `sampler`. A state weighs more where they count from a restart (Fabric).
        if self._restored and epoch < self._epoch:
            self._ahead = self._epoch - epoch
        if epoch and self._idle and not self._loads and not self._sifter.counts.steps:
            self._concerns.anew(epoch)
        self.set_epoch(epoch + self._ahead)

    def _drawn_anew(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        # The epoch was announced after iter(), as Lightning does, and is another one than was begun.
        self._moved = False
        if not self._resumed and isinstance(self._source, LoaderCandidates):
            return pieces  # its samplers were told, and are asked at the first next(), as in the plain loader
        if hasattr(pieces, "close"):
            pieces.close()
        here = torch.get_rng_state()
        self._cursor, pieces = self._source.draw(self._epoch, {})
        if not self._resumed:
            torch.set_rng_state(here)  # iter() drew its share
        self._epoch_step, self._resumed = self._step, False
        self._covered, self._before = Coverage(), None
        return pieces

    def _is_over(self, cursor: Cursor) -> bool:
        # Whether too few rows are left in an epoch that is taken up again.
        batch, inner = self._sizes.batch, self._sizes.inner
        total = None if inner is None else self._source.epoch_rows(inner)
        if batch is None or inner is None or total is None:
            return False
        if (position := cursor.get("position")) is not None:
            used = position // World.detect().ranks
        else:
            used = cursor["batches"] * inner + cursor["offset"]
        return bool(total - used < (batch if self._sifts() else 1))

    def _end_epoch(self, handed: int, resumed: bool) -> None:
        if self._prescored is not None:
            self._prescored.drop()
            self._prescored.close()
        self._epoch, self._cursor, self._begun = self._epoch + 1, {}, False
        self._idle = False
        if self._log is not None:
            self._log.flush()
        if not handed and not resumed:
            raise EmptyEpoch(self._nothing())
        self._concerns.epoch(self._sifter.counts, self._step, self._scorer.model.training)

    def _refuse_empty_epoch(self) -> None:
        try:
            planned = self._plan(self._step).batches
        except TypeError:
            return  # known at its end
        if not planned and self._scorer.model.training:
            raise EmptyEpoch(self._nothing())

    def _nothing(self) -> str:
        if (
            isinstance(getattr(self._source, "loader", None), Iterator)
            and self._sifter.counts.samples
        ):
            return (
                "the iterator that was wrapped has no more batches: it gives one epoch only; wrap what it is the "
                "iterator of"
            )
        drawn = self._source.epoch_rows(self._sizes.inner) if self._sizes.inner else 0
        return (
            f"an epoch would hand out nothing: {'?' if drawn is None else drawn} rows are drawn, a "
            f"pool needs at least batch_size = {self._sizes.batch} (of {self._sizes.pool(self._step)} wanted); use more "
            f"data, a smaller batch_size, or a sampler that is not empty"
        )

    def _plan(self, step: int) -> Epoch:
        inner = self._sizes.inner
        drawn = None if inner is None else self._source.epoch_rows(inner)
        ranks = self._source.undivided if self._schedule.ever_sifts else 1
        return self._sizes.epoch(step, drawn, ranks, self._open)

    @property
    def _pad_id(self) -> int:
        pad = getattr(getattr(self._scorer.model, "config", None), "pad_token_id", None)
        return pad if isinstance(pad, int) else 0

    def _check_vocabulary(self) -> None:
        # Once for every model: a callable may have none to show before the first batch.
        if self._fits:
            return
        if isinstance(self._vocabulary, TokenShards):
            self._vocabulary.check_model(self._scorer.model)
        else:
            check_vocabulary(self._scorer.model, self._vocabulary.vocab_size)
        self._fits = True


def _checked_count(count: str, accumulation: int) -> str:
    if count not in ("batches", "optimizer"):
        raise ValueError(f'count must be "batches" or "optimizer", got {count!r}')
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(f"accumulation must be an int of at least 1, got {accumulation!r}")
    if accumulation > 1 and count == "batches":
        raise ValueError(
            f"accumulation={accumulation} says how many batches make an optimizer step, which counts only with "
            f'count="optimizer"'
        )
    return count


def _as_json(keep: Keep) -> Any:
    return sorted([*pair] for pair in keep.items()) if isinstance(keep, Mapping) else keep


def _raising(error: BaseException) -> Iterator[Piece]:
    raise error
    yield


def _unchanged(batch: Batch) -> Batch:
    return batch


def _rows(held: deque[Drawn]) -> int:
    return sum(one.rows for one in held)
