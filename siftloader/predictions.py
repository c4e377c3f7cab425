"""Early predictions of a pool at its targets, made when a criterion asks for them.

Letters: P samples, T positions, V vocabulary (or classes), M positions with a prediction, m those of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from siftloader.batches import Batch
from siftloader.errors import ScoringError
from siftloader.pool import Pool
from siftloader.targets import Targets


Reduction: TypeAlias = Literal["mean", "sum"]
# From logits [m, V] and labels [m] (or [m, V], soft ones) to one value each, [m].
Value: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# Of a batch that begins with sample number `first` of the pool: logits at the targets, in chunks.
Run: TypeAlias = Callable[[Batch, Targets, int], Iterator[Tensor]]
# Values at the targets, [M] each, where they can be had without logits: of those that were asked for, or None.
Quick: TypeAlias = Callable[[Batch, Targets, tuple[Value, ...]], Mapping[Value, Tensor] | None]


@final
class Predictions:
    """What a criterion sees: predictions and labels at the targets, and the pool they belong to."""

    def __init__(
        self,
        targets: Targets,
        run: Run,
        pool: Pool | None = None,
        first: int = 0,
        known: Mapping[Value, Tensor] | None = None,
        learn: bool = True,
        quick: Quick | None = None,
    ) -> None:
        self.pool = Pool() if pool is None else pool
        self.learn = learn  # whether criteria that learn from what they see should
        self._targets, self._run, self._quick, self._first = targets, run, quick, first
        self._known: dict[Value, Tensor] = dict(known or {})  # [M] each

    @property
    def samples(self) -> int:
        """P, the number of candidates."""
        return self._targets.samples

    @property
    def targets(self) -> Targets:
        """Where the predictions stand: flat positions ``row * T + t``, and the labels there."""
        return self._targets

    @property
    def labels(self) -> Tensor:
        """The labels at the targets, [M] (soft ones [M, V]), those of a sample side by side."""
        return self._targets.labels

    @property
    def device(self) -> torch.device:
        """Where scores are wanted."""
        return self.labels.device

    def each(self, value: Value) -> Tensor:
        """Apply ``value`` to logits [m, V] and labels [m], chunk by chunk; returns [M].

        Low-precision logits come as float32.
        """
        if value not in self._known:
            self.ahead(value)
        return self._known[value]

    def ahead(self, *values: Value) -> None:
        """Find several values in one pass over the predictions; ``each`` then returns them at once.

        No logits are made where all of them can be had without.
        """
        found: dict[Value, list[Tensor]] = {v: [] for v in values if v not in self._known}
        if found and self._quick is not None:
            self._known |= self._quick(self.pool.batch, self._targets, tuple(found)) or {}
            found = {v: parts for v, parts in found.items() if v not in self._known}
        if not found:  # or a sum within a sum asks again
            return
        done = 0
        for logits in self._run(self.pool.batch, self._targets, self._first):
            if logits.shape[-1] < 2:
                raise ScoringError(
                    "the model predicts a single number per position, which has no cross-entropy; "
                    "pass score_fn= with the loss of your loop"
                )
            labels = self.labels[done : done + len(logits)]
            dense = self._targets.real is not None
            for value, parts in found.items():
                parts.append(value_of(value, logits, labels, wrong_allowed=dense))
            done += len(logits)
        none = torch.zeros(0, device=self.device)
        self._known |= {v: torch.cat(parts) if parts else none for v, parts in found.items()}

    def reduce(self, values: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Mean (or sum) of ``values`` [M] over the labelled positions of each sample: [P].

        Where only some positions are scored, the mean (or sum) over all of them is estimated. A sample
        without labels gets NaN, which never wins.
        """
        targets = self._targets
        count = self._per_row(torch.ones_like(values)).sum(1)
        means = self._per_row(values).sum(1) / count
        if targets.correction is not None:
            control = self._per_row(targets.correction.values)
            mean = control.sum(1) / count
            inside = self._per_row(torch.ones_like(values))
            off = (control - mean[:, None]) * inside
            off_value = (self._per_row(values) - means[:, None]) * inside
            # A sample whose values are not finite must not decide the slope of the others.
            fit = (off + off_value).isfinite().all(1, keepdim=True)
            off, off_value = torch.where(fit, off, 0), torch.where(fit, off_value, 0)
            spread = off.square().sum()
            # Of a control that does not vary there is nothing but rounding to fit.
            found = spread > 1e-9 * torch.where(fit, control, 0).square().sum()
            slope = torch.where(found, (off * off_value).sum() / spread, 0)
            means = means + slope * (targets.correction.means - mean)
        found = means if reduction == "mean" else means * targets.counts
        return torch.where(targets.counts > 0, found, torch.nan)

    def part(self, first: int, last: int) -> Predictions:
        """Of the samples ``first`` to ``last`` alone."""
        targets, pool = self._targets.part(first, last), self.pool.part(first, last)
        begin, end = self._targets.starts[first], self._targets.starts[last]
        known = {value: found[begin:end] for value, found in self._known.items()}
        first += self._first
        return Predictions(targets, self._run, pool, first, known, self.learn, self._quick)

    def _per_row(self, values: Tensor) -> Tensor:
        # Dense [P, T]: index_put without repeats is deterministic on a GPU, index_add is not.
        targets = self._targets
        if targets.real is not None:
            values = torch.where(targets.real, values, 0)
        dense = values.new_zeros(targets.samples * targets.length)
        dense[targets.positions] = values
        return dense.view(targets.samples, targets.length)


def value_of(value: Value, logits: Tensor, labels: Tensor, wrong_allowed: bool) -> Tensor:
    """``value`` of logits [m, V], as float32 where they are less, and labels [m] (or [m, V]): [m].

    ``wrong_allowed`` says that labels may be negative, unlabelled ones among them: those get NaN.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if not wrong_allowed or labels.is_floating_point():
        return _one_each(value(wide, labels), len(logits))
    found = _one_each(value(wide, labels.clamp_min(0)), len(logits))
    return found.masked_fill(labels < 0, torch.nan)


def _one_each(values: object, count: int) -> Tensor:
    if isinstance(values, Tensor) and values.shape == (count,):
        return values if values.is_floating_point() else values.float()
    found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    raise ScoringError(
        f"a function for each(...) must give one number per position, [{count}], got {found}"
    )
