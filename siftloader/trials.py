"""Trials in the loop: every so often copies of model and optimizer are trained both ways, and who wins decides.

    SiftingDataLoader(shards, 32, model=model, gate="trial")
    SiftingDataLoader(..., gate=TrialGate(held_out=batches, steps=64, share=0.02))

A trial looks at the pools that come next, which are handed out afterwards as if nothing had been. What it costs
is counted in steps, and the next one waits until that is no more than ``share`` of all steps.

Letters: b rows kept of the P of a pool.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from siftloader.agreement import Agreement
from siftloader.batches import Batch, cut, move, rows
from siftloader.errors import ScoringError, StateError
from siftloader.exits import EarlyExit
from siftloader.forks import (
    LossOf,
    Step,
    arm,
    at_random,
    check_whole,
    fork,
    held_out_loss,
    model_loss,
    streams_kept,
)
from siftloader.intervals import interval
from siftloader.prescored import Merged
from siftloader.sifter import Sifter
from siftloader.stream import TokenShards
from siftloader.updates import Updates, owns


FORWARD = 1 / 3  # of a training step
ROWS_AT_ONCE = 16  # of a val split


@final
@dataclass(frozen=True)
class TrialGate:
    """Sift from when a trial has shown that it pays, until one shows no gain any more.

    SiftingDataLoader(shards, 32, model=model, gate=TrialGate())                # the shards' own val split
    SiftingDataLoader(dataset, 32, model=model, gate=TrialGate(held_out=[...])) # batches that are never trained on

    A trial makes ``repeats`` pairs of copies of the model and its optimizer (found by the steps that it takes, unless
    given), and trains one of each pair for ``steps`` plain steps, the other one sifted for as long: fewer steps, as
    scoring costs ``cost`` plain steps (None: what the audits measured). Closed at first, the gate opens where the gain in
    held-out loss is at least ``least`` nats and its 95 % interval lies above zero, and closes where the gain is less
    than half of ``least``. Where several ranks run, each makes its own pairs, and all decide by those of all.

    A step of a copy is tried as soon as the optimizer is known: what fails does so then. The first trial comes with
    the first step that would be sifted, the next ones so that all of them together take ``share`` of the steps (0.01:
    about 220 steps' worth, by the defaults, every 22,000). While one runs, memory holds a copy of model and
    optimizer more, and ``steps * repeats`` pools, which are handed out afterwards. ``loss(model, batch)`` is the
    loop's (``model(**batch).loss``), ``clip`` its largest norm of gradients; accumulation and a scaler are not
    imitated, hooks of your own fire on copies, too. ``held_out_rows`` of the held-out rows are measured.

    Raises TypeError or ValueError where an argument is none of these.
    """

    held_out: Iterable[Batch] | None = None
    steps: int = 24
    repeats: int = 4
    share: float = 0.01
    held_out_rows: int = 256
    optimizer: Optimizer | None = None
    loss: LossOf | None = None
    clip: float | None = 1.0
    cost: float | None = None
    least: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("repeats", 2), ("held_out_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if not _number(self.share) or not 0 < self.share <= 1:
            raise ValueError(f"share must be a number above 0 and at most 1, got {self.share!r}")
        if not _number(self.least) or not 0 <= self.least < math.inf:
            raise ValueError(f"least must be a gain in nats, 0 or more, got {self.least!r}")
        if self.cost is not None and (not _number(self.cost) or not 0 <= self.cost < math.inf):
            raise ValueError(
                f"cost must be what scoring a pool takes, in plain steps (0.06, say), got {self.cost!r}"
            )
        if isinstance(self.held_out, str) or not (
            self.held_out is None or isinstance(self.held_out, Iterable)
        ):
            raise TypeError(f"held_out must be batches, got {type(self.held_out).__name__}")


@final
class Trials:
    """What a ``TrialGate`` asks for, done: when, with what, and what came of it."""

    def __init__(
        self, gate: TrialGate, sifter: Sifter, held_out: Callable[[], Iterable[Batch]]
    ) -> None:
        self.gate = gate
        self.is_open = False
        self.history: list[dict[str, Any]] = []  # of each trial, JSON-able
        self.spent = 0.0  # steps' worth
        self.seconds = 0.0
        self._sifter, self._find_held_out = sifter, held_out
        self._held_out: list[Batch] | None = None
        self._next = 0  # the step from which one is due
        self._updates = (
            None if gate.optimizer is not None else Updates(lambda: sifter.scorer.given_model)
        )
        if self._updates is not None:
            self._updates.counts = False  # before the first batch there may be no model to find
        self._checked = self._rehearsed = False
        self._short: int | None = None  # the epoch that has too few pools left
        self._told = False

    @property
    def pools(self) -> int:
        """How many a trial needs."""
        return self.gate.steps * self.gate.repeats

    @property
    def told(self) -> tuple[Any, ...]:
        """What all ranks must have alike."""
        gate = self.gate
        return (
            gate.steps,
            gate.repeats,
            gate.share,
            gate.held_out_rows,
            gate.cost,
            gate.least,
            gate.clip,
            gate.seed,
        )

    def due(self, step: int, epoch: int) -> bool:
        """Whether there is to be one at this step."""
        return step >= self._next and epoch != self._short

    def cost(self, audits: Sequence[Mapping[str, Any]]) -> float | None:
        """What scoring a pool takes, in plain steps, as far as the audits know."""
        if self.gate.cost is not None:
            return self.gate.cost
        known = [x for each in audits if (x := each.get("scoring_cost")) is not None]
        return known[-1] if known else None

    def forget_model(self) -> None:
        """Look anew: the model was replaced."""
        self._checked = self._rehearsed = False

    def check(self, batch: Batch) -> None:
        """Raise what would keep a trial from being made, given the first candidates; later ones are not looked at."""
        if self._checked:
            return
        self._checked, scorer = True, self._sifter.scorer
        if self._updates is not None:
            self._updates.counts = True
        model = scorer.model
        check_whole(model)
        if scorer.replica_groups:
            raise ScoringError(
                "a gate by trials trains copies of the model, and this one lies on several ranks; use a gate by audits"
            )
        self._held()
        if self.gate.loss is not None:
            return
        early, few = EarlyExit(model, "full"), cut(batch, 0, 1)
        found = None
        if isinstance(few, Mapping) and early.takes_labels(few):
            with torch.no_grad(), scorer.precision.context(scorer.device):
                found = getattr(early.with_labels(few), "loss", None)
        if not isinstance(found, Tensor):
            raise ScoringError(
                f"a gate by trials trains copies of {type(model).__name__} on model(**batch).loss, and a "
                f"{type(batch).__name__} gives none; pass the loss of your loop: TrialGate(loss=...), a function of "
                f"model and batch that returns a scalar"
            )

    def rehearse(self, batch: Batch) -> None:
        """Take one step of a copy on what the loop is about to get: what fails does so now, and not after the warm-up.

        Once, as soon as the optimizer is known.
        """
        if self._rehearsed or (optimizer := self.optimizer()) is None:
            return
        self._rehearsed, begun = True, time.perf_counter()
        forked, its_optimizer = fork(self._sifter.scorer.model, optimizer)
        step = self._step()
        arm(forked, its_optimizer, [_unweighted(batch)], _as_it_is, step, self.gate.seed)
        held_out_loss(forked, self._held()[:1], step)
        self.seconds += time.perf_counter() - begun

    def optimizer(self) -> Optimizer | None:
        """The one that trains the model; None before it was seen. ScoringError where there are several."""
        if self.gate.optimizer is not None:
            return self.gate.optimizer
        assert self._updates is not None
        model = self._sifter.scorer.given_model
        found = [each for each in self._updates.optimizers if owns(model, each)]
        if len(found) > 1:
            raise ScoringError(
                f"{len(found)} optimizers train the model ({', '.join(sorted(type(x).__name__ for x in found))}): a "
                f"trial copies one; name it, TrialGate(optimizer=...), if the others do not matter, or use another gate"
            )
        return found[0] if found else None

    def wait_for_epoch(self, epoch: int, pools: int) -> None:
        """Not in this epoch any more: only so many pools are left of it."""
        if self._short not in (None, epoch) and not self._told:
            self._told = True
            warnings.warn(
                f"a trial needs {self.pools} pools (steps {self.gate.steps} x repeats {self.gate.repeats}), and "
                f"{pools} were left in two epochs, so there is none yet and the gate stays "
                f"{'open' if self.is_open else 'closed'}; give TrialGate fewer of them, or longer epochs",
                stacklevel=6,
            )
        self._short = epoch

    def postpone(self, step: int, steps: int) -> None:
        """Not now: so many steps later."""
        self._next = step + max(1, steps)

    def run(
        self, step: int, pools: Sequence[Merged], keep: int, cost: float, agreement: Agreement
    ) -> bool:
        """Make a trial and decide; whether the gate is open. All ranks of ``agreement`` must call it."""
        begun = time.perf_counter()
        gate, optimizer = self.gate, self.optimizer()
        assert optimizer is not None
        sifted_steps = max(1, round(gate.steps / (1 + cost)))
        gains = []
        for repeat in range(gate.repeats):
            own = pools[repeat * gate.steps : (repeat + 1) * gate.steps]
            key = self._key(step, repeat)
            plain = self._end(optimizer, own, None, keep, key)
            gains.append(plain - self._end(optimizer, own[:sifted_steps], keep, keep, key))
        ranks = agreement.gathered(torch.tensor(gains, dtype=torch.float64)[None])
        gain, half_width = interval(torch.cat(ranks).flatten().tolist())
        was, self.is_open = self.is_open, False
        if half_width is not None:
            least = gate.least
            self.is_open = gain >= least / 2 if was else gain > half_width and gain >= least
        batch = rows(pools[0].candidates) if pools else 1
        looks = 2 * gate.repeats * sum(map(rows, self._held())) / keep * FORWARD
        spent = gate.repeats * (gate.steps + sifted_steps * (1 + cost)) + looks
        self.spent += spent
        self.seconds += time.perf_counter() - begun
        self._next = step + math.ceil(spent / gate.share)
        self.history.append(
            {
                "step": step,
                "gain": gain if math.isfinite(gain) else None,
                "half_width": half_width,
                "cost": cost,
                "open": self.is_open,
                "steps_spent": spent,
                "scored": gate.repeats * sifted_steps * batch,
            }
        )
        return self.is_open

    def figures(self) -> dict[str, Any]:
        """For ``stats``."""
        last = self.history[-1] if self.history else {}
        return {
            "trials": len(self.history),
            "trial_gain": last.get("gain"),
            "trial_half_width": last.get("half_width"),
            "trial_steps_spent": self.spent,
            "seconds_trials": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """What a restart needs, JSON-able."""
        return {
            "history": list(self.history),
            "open": self.is_open,
            "next": self._next,
            "short": self._short,
            "spent": self.spent,
            "seconds": self.seconds,
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take up what ``state`` returned; None, of a run without trials, begins anew."""
        self.history, self.is_open, self._next, self._short = [], False, 0, None
        self.spent, self.seconds = 0.0, 0.0
        if state is None:
            return
        try:
            self.history = [dict(each) for each in state["history"]]
            self.is_open, self._next = bool(state["open"]), int(state["next"])
            self._short = state["short"]
            self.spent, self.seconds = float(state["spent"]), float(state["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state is damaged: its trials {error!r}") from error

    def _end(
        self,
        optimizer: Optimizer,
        pools: Sequence[Merged],
        sifted: int | None,
        keep: int,
        key: int,
    ) -> float:
        # Held-out loss of a copy that was trained on these pools: sifted, or on a random part of each.
        forked, its_optimizer = fork(self._sifter.scorer.model, optimizer)
        share = keep / rows(pools[0].candidates)
        choose: Callable[[Any], Batch]
        if sifted is None:
            drawn = at_random(share, key)

            def choose(pool: Merged) -> Batch:
                return drawn(pool.candidates)
        else:
            sifter = self._sifter.of(forked, share)

            def choose(pool: Merged) -> Batch:
                won = sifter.winners(pool.candidates, pool.labels, keep, pool.fields, pool.ends)
                return sifter.handed(pool.candidates, won)

        step = self._step()
        arm(forked, its_optimizer, pools, choose, step, key)
        return held_out_loss(forked, self._held(), step)

    def _step(self) -> Step:
        scorer = self._sifter.scorer
        dtype = scorer.precision.dtype(scorer.device)
        # Gradients in float16 need a scaler, which copies do not have.
        autocast = None if dtype in (None, torch.float32, torch.float16) else dtype
        return Step(self.gate.loss or model_loss, self.gate.clip, autocast)

    def _held(self) -> list[Batch]:
        if self._held_out is None:
            left, found = self.gate.held_out_rows, []
            with streams_kept():  # a DataLoader draws a seed for its workers
                for batch in self._find_held_out():
                    found.append(cut(batch, 0, min(left, rows(batch))))
                    left -= rows(found[-1])
                    if left <= 0:
                        break
            if not found:
                raise ValueError(
                    "a gate by trials measures held-out loss, and held_out has no batches; give some that are not "
                    "trained on: TrialGate(held_out=[...])"
                )
            self._held_out = [move(each, "cpu") for each in found]
        return self._held_out

    def _key(self, step: int, repeat: int) -> int:
        words = (self.gate.seed, self._sifter.scorer.data_rank, step, repeat)
        found = np.random.SeedSequence(words).generate_state(1, np.uint64)
        return int(found[0] >> np.uint64(1))


def held_out_of(gate: TrialGate, dataset: Any) -> Callable[[], Iterable[Batch]]:
    """Where held-out batches come from: the gate, or the val split of shards. ValueError where there is none."""
    if (given := gate.held_out) is not None:
        return lambda: given
    data = getattr(getattr(dataset, "loader", None), "dataset", dataset)
    if not isinstance(data, TokenShards):
        raise ValueError(
            "a gate by trials measures held-out loss: give batches that are not trained on, "
            "TrialGate(held_out=[...]); only TokenShards have a val split of their own"
        )
    shards, at_once = data, min(gate.held_out_rows, ROWS_AT_ONCE)
    shards.held_out(at_once)  # that there is such a split shows now
    return lambda: shards.held_out(at_once)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _unweighted(batch: Batch) -> Batch:
    # Trials hand out no weights.
    if not isinstance(batch, Mapping) or "sift_weight" not in batch:
        return batch
    return {name: value for name, value in batch.items() if name != "sift_weight"}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
