"""What there is to predict: the labelled positions of the candidates, or some of them.

    Targets.of(labels, device, shift=True)                                  # every labelled position
    Targets.of(labels, device, shift=True, positions=Stride(8))             # every eighth of a sample
    Targets.of(labels, device, shift=True, positions=Stride(8, control=unigrams))

Letters: P samples, T positions, M positions with a prediction, V vocabulary (or classes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siftloader.batches import IGNORED
from siftloader.errors import ScoringError


# From labels [P, T], on their device, to nats [P, T]; counts int64 [V] stand for `Unigrams` of them.
Control: TypeAlias = "Callable[[Tensor], Tensor] | NDArray[np.int64]"
LEAST_ROOM = 8  # labelled positions of a row that there is always room for
LATER = 8  # pools after which a copy to the host is done: no queue of a GPU holds as many steps


@final
class Unigrams:
    """The surprise of a label under fixed counts [V], add-one smoothed: ``-log p``, in nats.

    Unigrams(shards.unigrams)(labels)      # the shape of labels, float32
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        found = np.asarray(counts)
        if found.ndim != 1 or found.size < 2 or (found < 0).any():
            raise ValueError(f"unigrams must be non-negative counts [V], got shape {found.shape}")
        smooth = torch.as_tensor(found.astype(np.float64) + 1)
        self._tables = {torch.device("cpu"): (smooth.sum() / smooth).log().float()}

    def __call__(self, labels: Tensor) -> Tensor:
        """Negative labels count as 0: the caller leaves them out. ScoringError for those above V."""
        if labels.device not in self._tables:
            host = self._tables[torch.device("cpu")]
            self._tables[labels.device] = to_device(host, labels.device)
        table = self._tables[labels.device]
        if labels.device.type == "cpu" and labels.numel() and labels.max() >= len(table):
            raise ScoringError(
                f"found label {int(labels.max())} with counts of {len(table)} ids; are they of the "
                f"tokenizer that made the labels?"
            )
        return table[labels.clamp_min(0)]


class Positions(Protocol):
    """Which of a sample's labelled positions are scored."""

    control: Control | None

    def takes(self, rank: Tensor) -> Tensor:
        """Whether the labelled position number ``rank`` [P, T] of its sample is one of them."""
        ...

    def most(self, length: int) -> int:
        """How many of ``length`` labelled positions are, at most."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Stride:
    """Every ``step``-th labelled position of a sample, the first one always.

    Stride(8, control=shards.unigrams)

    ``control`` is a surprise known at *every* position for free: token counts, or a function of the
    labels. The mean over the scored positions is corrected by how far their mean surprise lies from that
    of all positions, with the slope found within the samples of the pool (a control variate).
    """

    step: int
    control: Control | None = None

    def __post_init__(self) -> None:
        _check_count("step", self.step)
        _as_function(self)

    def takes(self, rank: Tensor) -> Tensor:
        """Ranks 0, step, 2 step, ..."""
        return rank % self.step == 0

    def most(self, length: int) -> int:
        """Rounded up."""
        return -(-length // self.step)


@final
@dataclass(frozen=True, eq=False)
class First:
    """The first ``count`` labelled positions of a sample; ``control`` as for ``Stride``."""

    count: int
    control: Control | None = None

    def __post_init__(self) -> None:
        _check_count("count", self.count)
        _as_function(self)

    def takes(self, rank: Tensor) -> Tensor:
        """Ranks below the count."""
        return rank < self.count

    def most(self, length: int) -> int:
        """The count, or all."""
        return min(self.count, length)


@final
class Capacity:
    """How many labelled positions of a row there is room for, where nobody asks how many it has.

    capacity = Capacity()
    Targets.of(labels, device, False, capacity=capacity)     # the first pool waits once, no other does

    ``most`` is learned from the first pool and leaves room for an eighth more (8 at least), so that a row
    is read in full unless it has more labels than that. One that has is scored at its first ``most``
    labelled positions, from which its mean and sum are estimated as with ``First(most)``, and is counted
    in ``capped``, a tensor on the device. Meanwhile the most labels of any row are copied to the host,
    which looks ``LATER`` pools later, when the copy is long done: from then on there is room for them. A
    fixed number of pools, so that runs repeat and ranks that hold one replica do alike.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self.capped: Tensor | int = 0
        self._largest: Tensor | None = None  # labels of any row so far, on the device
        self._asked: Tensor | None = None  # the same on its way to the host
        self._copied: torch.cuda.Event | None = None
        self._left = 0  # pools until the host looks

    def of(self, counts: Tensor, length: int) -> int:
        """Room for labels in each row of ``length`` positions; ``counts`` [P] is how many they have."""
        if length <= LEAST_ROOM:
            return length
        if self.most is None:
            self.most = _roomy(int(counts.max()))
        self._left -= 1
        if self._asked is not None and self._left <= 0:
            self.most = max(self.most, _roomy(self._heard(self._asked)))
            self._asked = None
        most = min(self.most, length)
        if most < length:
            for kept in (self._largest, self.capped):
                if isinstance(kept, Tensor) and kept.is_cuda:  # pools may be scored on two streams
                    kept.record_stream(torch.cuda.current_stream(kept.device))
            self.capped = self.capped + (counts > most).sum()
            largest = counts.max()
            if self._largest is not None:
                largest = torch.maximum(to_device(self._largest, largest.device), largest)
            self._largest = largest
            if self._asked is None:
                self._ask(largest)
        return most

    def _ask(self, largest: Tensor) -> None:
        self._asked, self._left = largest, LATER
        if largest.device.type == "cuda":
            self._asked = torch.empty((), dtype=largest.dtype, pin_memory=True)
            self._asked.copy_(largest, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def _heard(self, asked: Tensor) -> int:
        if self._copied is not None and not self._copied.query():  # type: ignore[no-untyped-call]
            self._copied.synchronize()  # not met in training: the copy is done since many steps
        return int(asked)

    @property
    def state(self) -> list[int | None] | None:
        """For a restart, JSON-able; waits for the device.

        [room, the most labels of any row, those the host is about to hear of, pools until then]
        """
        if self.most is None:
            return None
        largest = None if self._largest is None else int(self._largest)
        asked = None if self._asked is None else self._heard(self._asked)
        return [self.most, largest, asked, self._left]

    @state.setter
    def state(self, state: list[int | None] | None) -> None:
        self.most, largest, asked, left = state or (None, None, None, 0)
        self._left, self._copied = left or 0, None
        self._largest = None if largest is None else torch.tensor(largest)
        self._asked = None if asked is None else torch.tensor(asked)


def _roomy(labels: int) -> int:
    more = labels + max(LEAST_ROOM, -(-labels // 8))
    return -(-more // 8) * 8  # sizes that repeat, and that matrix products like


@dataclass(frozen=True, eq=False)
class Correction:
    """A control variate: its value at the scored positions [M], and its mean over all of them [P]."""

    values: Tensor
    means: Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """The positions to predict at, of P samples of ``length`` positions each.

    ``positions`` [M] are flat, ``row * length + t`` in rising order, and name where the *prediction*
    stands: for a causal model one position before the label. ``labels`` are classes [M], or
    probabilities [M, V]. ``starts`` [P + 1] lives on the host, so that no one waits for the device to
    learn how many labels a row has. ``real`` [M] is None unless positions had to be taken along that do
    not count. ``counts`` [P] are the labelled positions of each sample, scored or not.
    """

    positions: Tensor
    labels: Tensor
    starts: list[int]
    length: int
    counts: Tensor
    real: Tensor | None = None
    correction: Correction | None = None

    @property
    def samples(self) -> int:
        """P."""
        return len(self.starts) - 1

    def labelled(self) -> Tensor:
        """Which samples have a label at all, bool [P], on the device."""
        return self.counts > 0

    def part(self, first: int, last: int) -> Targets:
        """Those of the samples ``first`` to ``last``."""
        begin, end = self.starts[first], self.starts[last]
        starts = [start - begin for start in self.starts[first : last + 1]]
        correction = self.correction
        if correction is not None:
            correction = Correction(correction.values[begin:end], correction.means[first:last])
        return Targets(
            self.positions[begin:end] - first * self.length,
            self.labels[begin:end],
            starts,
            self.length,
            self.counts[first:last],
            None if self.real is None else self.real[begin:end],
            correction,
        )

    @classmethod
    def of(
        cls,
        labels: Tensor,
        device: torch.device,
        shift: bool,
        positions: Positions | None = None,
        dense: bool = False,
        capacity: Capacity | None = None,
    ) -> Targets:
        """Find the labelled positions of ``labels`` [P, T] or [P]; -100 marks the others.

        Probabilities [P, V] or [P, T, V] are soft labels; a row of zeros is none. With ``shift`` the label
        at ``t + 1`` belongs to the prediction at ``t``.

        Labels on the host cost no synchronisation. Labels on a GPU cost none with a ``capacity`` (but for
        the first pool), nor where as many places are taken as there can be labels (``shift``,
        ``positions``, ``dense``, one label a sample), and one otherwise.
        """
        if labels.is_floating_point():
            return cls._of_soft(labels, device, shift, positions)
        if labels.ndim not in (1, 2):
            raise ScoringError(
                f"labels must be integers of shape [P] or [P, T], or probabilities [P, V] or [P, T, V], "
                f"got {labels.dtype} {tuple(labels.shape)}; for anything else pass score_fn="
            )
        if labels.device.type != "cpu":  # another GPU may score, or the host
            labels = to_device(labels, device)
        labels = labels.long()
        if shift and labels.ndim != 2:
            raise ScoringError(f"a causal model needs labels [P, T], got {tuple(labels.shape)}")
        wanted = labels if labels.ndim == 2 else labels[:, None]
        if shift:  # a last column without label keeps the geometry [P, T]
            wanted = torch.nn.functional.pad(wanted[:, 1:], (0, 1), value=IGNORED)
        if labels.device.type != "cpu":
            capacity = None if dense else capacity
            if capacity or shift or dense or positions is not None or wanted.shape[1] == 1:
                return cls._of_capacity(wanted, positions, capacity)
        wanted = wanted.cpu()
        mask = wanted != IGNORED
        taken = mask if positions is None else mask & positions.takes(mask.cumsum(1) - 1)
        starts = [0, *taken.sum(1).cumsum(0).tolist()]
        flat = taken.reshape(-1).nonzero().squeeze(1)
        chosen = wanted.reshape(-1)[flat]
        if chosen.numel() and chosen.min() < 0:
            raise ScoringError(
                f"found label {int(chosen.min())}; labels must be 0 or more, or {IGNORED} where there "
                f"is nothing to predict (pass labels= with a function that says so)"
            )
        correction = _correction(positions, wanted, mask, flat)
        return cls(
            to_device(flat, device),
            to_device(chosen, device),
            starts,
            wanted.shape[1],
            to_device(mask.sum(1), device),
            correction=None
            if correction is None
            else Correction(
                to_device(correction.values, device), to_device(correction.means, device)
            ),
        )

    @classmethod
    def _of_capacity(
        cls, wanted: Tensor, positions: Positions | None, capacity: Capacity | None = None
    ) -> Targets:
        # On a GPU nobody asks how many there are: as many places a row as there can be labels, or are.
        samples, length = wanted.shape
        mask = wanted != IGNORED
        counts = mask.sum(1)
        column = torch.arange(length, device=wanted.device).expand(samples, length)
        most = room = length if capacity is None else capacity.of(counts, length)
        taken = mask
        if positions is not None:
            most, taken = positions.most(room), mask & positions.takes(mask.cumsum(1) - 1)
        if positions is not None or most < length:
            column = torch.where(taken, column, column + length).sort(1).values[:, :most]
            column = torch.where(column < length, column, column - length).sort(1).values
        real = taken.gather(1, column)
        row = torch.arange(samples, device=wanted.device)[:, None] * length
        flat = (row + column).reshape(-1)
        return cls(
            flat,
            wanted.gather(1, column).reshape(-1),
            list(range(0, (samples + 1) * most, most)),
            length,
            counts,
            real.reshape(-1),
            _correction(positions, wanted, mask, flat),
        )

    @classmethod
    def _of_soft(
        cls, labels: Tensor, device: torch.device, shift: bool, positions: Positions | None
    ) -> Targets:
        if labels.ndim not in (2, 3) or shift or positions is not None:
            raise ScoringError(
                f"labels {labels.dtype} {tuple(labels.shape)} must be probabilities of shape [P, V] or "
                f"[P, T, V], unshifted and without positions=; for anything else pass score_fn="
            )
        if labels.device.type == "cpu":
            check_soft(labels)
        samples, length = labels.shape[0], labels.shape[1] if labels.ndim == 3 else 1
        labels = to_device(labels.reshape(samples * length, -1), device)
        real = labels.sum(1) > 0
        flat = torch.arange(samples * length, device=device)
        starts = list(range(0, (samples + 1) * length, length))
        return cls(flat, labels, starts, length, real.view(samples, length).sum(1), real)


def check_soft(labels: Tensor) -> None:
    """Raise ScoringError unless floating labels [..., V] are probabilities, or all 0 where there are none."""
    sums = labels.float().sum(-1)
    fine = (((sums - 1).abs() < 0.02) | (sums == 0)) & (labels >= 0).all(-1)
    if not bool(fine.all()):
        raise ScoringError(
            f"floating labels {tuple(labels.shape)} are read as probabilities, but rows like "
            f"{labels[~fine][0].tolist()[:4]} are none; for several labels at once or numbers to predict "
            f"pass score_fn= with one loss per candidate, [P]"
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


def _correction(
    positions: Positions | None, wanted: Tensor, mask: Tensor, flat: Tensor
) -> Correction | None:
    if positions is None or positions.control is None:
        return None
    assert callable(positions.control)
    values = positions.control(wanted.clamp_min(0))
    if not isinstance(values, Tensor) or values.shape != wanted.shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ScoringError(
            f"control must give one value per position, {tuple(wanted.shape)}, got {found}"
        )
    values = torch.where(mask, values.float(), 0)
    return Correction(values.reshape(-1)[flat], values.sum(1) / mask.sum(1))


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _as_function(positions: Stride | First) -> None:
    if positions.control is not None and not callable(positions.control):
        object.__setattr__(positions, "control", Unigrams(positions.control))
