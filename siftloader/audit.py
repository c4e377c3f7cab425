"""Audits: every so often a pool is also scored by the whole model, to see what early scores are worth.

    audits = Audits(scorer, every=500)
    if audits.due(step):
        audits.look(step, pool, labels, kept, device)       # queues work, waits for nothing
    audits.settle(step, pace, agreement, stats)             # a few steps later: the figures, of all ranks

Scores are taken twice, at the exit and by the whole model, with the same weights, by scorers of their own:
nothing that the loader's scorer learned, and no random stream, is touched. What goes to the host is copied
beside the GPU's work and read ``LATER`` steps later, when it has long arrived.

Letters: P candidates.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from siftloader.agreement import Agreement
from siftloader.batches import rows
from siftloader.errors import RanksDisagree, StateError
from siftloader.fidelity import SUMS, Fidelity, Sums, measured
from siftloader.pool import Pool
from siftloader.predicted import Predicted
from siftloader.predictions import Predictions, Value
from siftloader.scorer import Scorer, terms
from siftloader.scores import Criterion, Random, Rarity, ScoreOf, token_loss
from siftloader.stats import Stopwatch, done, event
from siftloader.targets import LATER


Audit: TypeAlias = dict[str, Any]  # one audit's figures, JSON-able: None where there is no value
HISTORY = 1000  # audits that are remembered
PACES = 64  # steps of which the median is what a step takes
FIGURES = (
    *("population_loss", "population_error", "rho", "rho_full"),
    *("overlap", "spearman", "agreement", "sigma", "scoring_cost"),
)


@final
class Witness(Criterion):
    """Scores by another criterion, and remembers the losses of the same predictions.

    seen = Witness(Entropy())
    scores = Sifter(model, criterion=seen).score(batch)
    seen.losses                        # [P], mean over the labelled positions, nats; None if nothing asked it
    """

    def __init__(self, criterion: ScoreOf) -> None:
        self.criterion = criterion
        self.losses: Tensor | None = None

    @property
    def values(self) -> tuple[Value, ...]:  # type: ignore[override]
        """Those of the criterion, and the loss."""
        return tuple(dict.fromkeys((*getattr(self.criterion, "values", ()), token_loss)))

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the criterion's scores."""
        early.ahead(*self.values)
        self.losses = early.reduce(early.each(token_loss))
        return self.criterion(early)


@final
class Pace:
    """What a step takes, in seconds of the host's clock: the median of the last ones of one kind."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._sifting: bool | None = None
        self._periods: deque[float] = deque(maxlen=PACES)

    def tick(self, now: float, sifting: bool) -> None:
        """A batch was handed out; by sifting, or as it came."""
        if sifting is not self._sifting:
            self._periods.clear()
        elif self._last is not None:
            self._periods.append(now - self._last)
        self._last, self._sifting = now, sifting

    def rest(self) -> None:
        """What happens until the next batch belongs to no step: the end of an epoch, say."""
        self._last = None

    @property
    def period(self) -> float:
        """Seconds from batch to batch; nan where none is known."""
        return median(self._periods) if self._periods else math.nan


@dataclass
class _Look:
    """One audit under way: its arrays [5, P] on their way to the host."""

    step: int
    sifting: bool
    arrays: Tensor
    copied: torch.cuda.Event | None
    share: float  # rows that were scored for it, in those of a pool
    spent: float  # seconds that the loader's own scoring had taken when it began, and pools
    pools: int
    own: Stopwatch  # of the scoring at the exit that it did itself


@final
class Audits:
    """Look at a pool every ``every`` steps (0: never), and remember what was found.

    Where several ranks run, the figures are those of all of them, the same on every rank; of timings the
    slowest rank's. ``beside`` says that scoring runs beside a step, not before it.
    """

    def __init__(self, scorer: Scorer, every: int, beside: bool = False) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(
                f"audit_every must be an int of 0 (never) or more steps, got {every!r}"
            )
        self.every = every
        self.needed = False  # a gate needs them: what cannot be audited raises
        self.history: list[Audit] = []
        self._scorer, self._beside = scorer, beside
        self._pair: tuple[Scorer, Scorer] | None = None  # at the exit, and the whole model
        self._look: _Look | None = None
        self._saved: dict[str, Any] | None = None  # of a look that a state told of
        self._asked: int | None = None  # the step of the audit that is to be settled, on all ranks
        self._fails = self._rehearsed = False

    def forget_model(self) -> None:
        """Look through new eyes: the model was replaced."""
        self._pair, self._fails, self._rehearsed = None, False, False

    def rehearse(self, pool: Pool, labels: Tensor | None, auditing: Stopwatch) -> None:
        """Audit two rows of the first pool, for nothing: what fails does so now, and later ones wait for nothing."""
        if self.every and not self._rehearsed:
            self._rehearsed = True
            few = None if labels is None else labels[:2]
            self._tried(pool.part(0, min(2, rows(pool.batch))), few, _first, Stopwatch(), auditing)

    def due(self, step: int) -> bool:
        """Whether this step, counted from 0, is audited."""
        return bool(self.every) and step > 0 and step % self.every == 0

    def look(
        self,
        step: int,
        pool: Pool,
        labels: Tensor | None,
        kept: Callable[[Tensor], Tensor],
        sifting: bool,
        share: float,
        scoring: Stopwatch,
        auditing: Stopwatch,
    ) -> bool:
        """Score the rows of ``pool``, on the model's device, at the exit and by the whole model.

        ``kept`` gives the indices of those that win, given the scores at the exit. ``share`` is how many rows they
        are, in those of a whole pool. Returns whether it could; what cannot be audited is warned of once, and
        trained on all the same.
        """
        self._asked = step
        spent, pools = scoring.known()
        own = Stopwatch()
        arrays = self._tried(pool, labels, kept, own, auditing)
        if arrays is None:
            return False
        host, copied = arrays, None
        if arrays.is_cuda:
            host, copied = torch.empty(arrays.shape, pin_memory=True), event()
            host.copy_(arrays, non_blocking=True)
            copied.record()
        self._look = _Look(step, sifting, host, copied, share, spent, pools, own)
        return True

    def settle(
        self, step: int, pace: Pace, agreement: Agreement, scoring: Stopwatch
    ) -> Audit | None:
        """The figures of the audit that is old enough, on all ranks at the same step; None where there is none.

        All ranks of ``agreement`` must call it.
        """
        if self._asked is None or step < self._asked + min(LATER, self.every):
            return None
        asked, self._asked = self._asked, None
        found = self._own(pace, scoring)
        self._look = self._saved = None
        told = np.array([0.0] * (SUMS + 4) if found is None else found)
        ranks = [each.numpy() for each in agreement.gathered(torch.from_numpy(told)[None])]
        return self._remembered(asked, [each[0] for each in ranks if each[0][0]])

    def latest(self, pace: Pace, scoring: Stopwatch, alone: bool) -> list[Audit]:
        """All audits so far; the one under way, too, where this rank is ``alone``. Waits for the GPU."""
        if self._asked is None or not alone:
            return self.history
        found = self._own(pace, scoring)
        if found is None:
            return self.history
        return [*self.history, _audit(self._asked, [np.array(found)])]

    def state(self, pace: Pace, scoring: Stopwatch, rank: int) -> dict[str, Any]:
        """What a restart needs, JSON-able; waits for the audit under way."""
        found = None if self._asked is None else self._own(pace, scoring)
        under_way = None
        if self._asked is not None:
            numbers = None if found is None else [_json(each) for each in found]
            under_way = {"step": self._asked, "rank": rank, "found": numbers}
        return {"history": list(self.history), "under_way": under_way}

    def load(self, state: Mapping[str, Any], rank: int) -> None:
        """Take up what ``state`` returned; of an audit under way on the rank that it was saved on."""
        self.history, self._look, self._saved, self._asked = [], None, None, None
        try:
            self.history = [dict(each) for each in state["history"]]
            if (under_way := state["under_way"]) is not None:
                self._asked = under_way["step"]
                self._saved = under_way if under_way["rank"] == rank else None
                _check_found(under_way["found"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state is damaged: its audits {error!r}") from error

    def _tried(
        self,
        pool: Pool,
        labels: Tensor | None,
        kept: Callable[[Tensor], Tensor],
        own: Stopwatch,
        auditing: Stopwatch,
    ) -> Tensor | None:
        if self._fails or (labels is None and not self._scorer.by_function):
            return None
        device = self._scorer.device
        try:
            with auditing.timing(device):
                return self._arrays(pool, labels, kept, own.timing(device))
        except RanksDisagree:
            raise
        except Exception as error:
            if self.needed or self._scorer.is_spread:  # whose other ranks would wait for this one
                raise
            self._fails = True
            if not self._scorer.looks_at_model:
                return None  # which need not be one that can be scored
            warnings.warn(
                f"a pool cannot be scored by the whole model, so there are no audits: {error}; audit_every=0 says "
                f"that none are wanted",
                stacklevel=7,
            )
            return None

    def _arrays(
        self,
        pool: Pool,
        labels: Tensor | None,
        kept: Callable[[Tensor], Tensor],
        timed: AbstractContextManager[None],
    ) -> Tensor:
        at_exit, whole = self._scorers()
        with timed:
            early, early_losses = _scored(at_exit, pool, labels)
        full, losses = _scored(whole, pool, labels)
        if _is_free(self._scorer.criterion):
            full = losses  # such scores do not look at the model: does the model agree with them?
        won = torch.zeros_like(early)
        won[kept(early)] = 1
        return torch.stack((early, full, early_losses, losses, won))

    def _scorers(self) -> tuple[Scorer, Scorer]:
        if self._pair is None:
            criterion = self._scorer.criterion
            seen = Witness(criterion) if self._scorer.looks_at_model else criterion
            self._pair = (
                self._scorer.beside(seen),
                self._scorer.beside(Witness(_truth(criterion)), exit_layer="full"),
            )
        for each in self._pair:
            each.follow(self._scorer)
        return self._pair

    def _own(self, pace: Pace, scoring: Stopwatch) -> list[float] | None:
        # Of this rank: 1, the sums, what scoring a pool took, what a step takes without that, whether it sifted.
        look = self._look
        if look is None:
            saved = None if self._saved is None else self._saved["found"]
            return None if saved is None else [math.nan if x is None else float(x) for x in saved]
        if look.copied is not None and not done(look.copied):
            look.copied.synchronize()
        arrays = look.arrays.double().numpy()
        early, full, early_losses, losses, won = arrays
        sums: Sums = measured(early, full, early_losses, losses, won > 0)
        seconds, pools = scoring.known()
        if look.sifting and pools > look.pools:
            scored = (seconds - look.spent) / (pools - look.pools)
        else:  # nothing else was scored: the audit's own pass, stretched to a pool
            scored = look.own.known()[0] / look.share
        step = pace.period - (scored if look.sifting and not self._beside else 0.0)
        return [1.0, *sums.tolist(), scored, step, float(look.sifting)]

    def _remembered(self, step: int, ranks: list[Any]) -> Audit | None:
        if not ranks:
            return None
        audit = _audit(step, ranks)
        self.history = [*self.history, audit][-HISTORY:]
        return audit


def _scored(scorer: Scorer, pool: Pool, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    # Scores and losses, [P] each.
    scores = scorer.score(pool, labels).values
    if not scorer.looks_at_model:
        return scores, torch.full_like(scores, torch.nan)
    witness = scorer.criterion
    assert isinstance(witness, Witness)
    losses, witness.losses = witness.losses, None
    # A function of the loop that scores is its own loss.
    return scores, scores if losses is None else scorer.agreed(losses.to(scores))


def _is_free(criterion: ScoreOf) -> bool:
    return all(isinstance(each, (Random, Rarity)) for each in terms(criterion))


def _truth(criterion: ScoreOf) -> ScoreOf:
    # What a small model predicts of the whole one, where it does.
    return criterion.of if isinstance(criterion, Predicted) else criterion


def _check_found(found: list[float] | None) -> None:
    # 1, the sums, of which the first counts rows, and three figures more.
    if found is not None and (len(found) != SUMS + 4 or found[0] != 1 or found[1] < 0):
        raise ValueError(f"of the one under way {found!r}")


def _first(scores: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.long, device=scores.device)


def figures(audits: Sequence[Audit]) -> Audit:
    """Those of the last audit, for ``stats``: "audit_step", "rho", ...; all None before the first."""
    last = audits[-1] if audits else {}
    return {"audit_step": last.get("step"), **{name: last.get(name) for name in FIGURES}}


def _audit(step: int, ranks: list[Any]) -> Audit:
    found = Fidelity.of(np.sum([each[1 : SUMS + 1] for each in ranks], axis=0))
    scored, took = (float(max(each[at] for each in ranks)) for at in (SUMS + 1, SUMS + 2))
    cost = scored / took if took > 0 else math.nan
    figures = {name: _json(value) for name, value in asdict(found).items()}
    return {
        "step": step,
        "sifting": bool(ranks[0][SUMS + 3]),
        **figures,
        "scoring_cost": _json(cost),
    }


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
