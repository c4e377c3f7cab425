"""Gates: whether to go on sifting, given what the audits found so far.

    SiftingDataLoader(..., gate=Threshold("rho", opens=1.2, closes=1.1))

A gate is a function of the audits, oldest first, and of whether it is open, to whether it is from now on. It
is asked after every audit, on all ranks with the same figures, and once before the first with none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final


class Gate(Protocol):
    """Whether the loader sifts until the next audit."""

    def __call__(self, audits: Sequence[Mapping[str, Any]], is_open: bool) -> bool:
        """``audits`` as in ``loader.audits``; ``is_open`` is what the gate said last."""
        ...


@final
@dataclass(frozen=True)
class Threshold:
    """Open once a figure of the audits has risen to ``opens``, until it has fallen below ``closes``.

    Threshold("rho", opens=1.2, closes=1.1)
    Threshold("overlap", opens=0.8, closes=0.7, over=3, begins_open=True)

    The figure is the mean over the last ``over`` audits that have it; before there are as many nothing
    changes. ``closes`` below ``opens`` keeps noise from opening and closing it in turn.
    """

    figure: str
    opens: float
    closes: float
    over: int = 1
    begins_open: bool = False

    def __post_init__(self) -> None:
        for name in ("opens", "closes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        if self.closes > self.opens:
            raise ValueError(
                f"closes must not lie above opens, or the gate would open and close in turn; got closes "
                f"{self.closes} and opens {self.opens}"
            )
        if isinstance(self.over, bool) or not isinstance(self.over, int) or self.over < 1:
            raise ValueError(f"over must be an int of at least 1 audit, got {self.over!r}")

    def __call__(self, audits: Sequence[Mapping[str, Any]], is_open: bool) -> bool:
        """Whether it is open."""
        if not audits:
            return self.begins_open
        values: list[float] = [
            each[self.figure] for each in audits if each.get(self.figure) is not None
        ]
        if len(values) < self.over:
            return is_open
        mean = sum(values[-self.over :]) / self.over
        return mean >= (self.closes if is_open else self.opens)


def settings_of(gate: Gate | None) -> str:
    """What all ranks must have alike: a function, or an object of one's own, by the name of its kind."""
    if gate is None or isinstance(gate, Threshold):
        return repr(gate)
    return str(getattr(gate, "__qualname__", type(gate).__qualname__))


def replayed(gate: Gate, audits: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a gate is open that was asked after each of these audits."""
    is_open = bool(gate((), True))
    for seen in range(1, len(audits) + 1):
        is_open = bool(gate(audits[:seen], is_open))
    return is_open


def gate_named(gate: Gate | str | None) -> Gate | None:
    """The gate of that name; ValueError where there is none."""
    if isinstance(gate, type):
        raise TypeError(f"gate must be an object: {gate.__name__}(...), with its arguments")
    if isinstance(gate, str):
        raise ValueError(f'gate must be "trial", "auto", a gate, or None, got {gate!r}')
    if gate is not None and not callable(gate):
        raise TypeError(f"gate must be a function of audits, or None, got {gate!r}")
    return gate
