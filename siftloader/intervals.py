"""How sure a mean of a few values is: Student's t.

    mean, half_width = interval([-0.021, -0.030, -0.018])     # -0.023, 0.016

Needs numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


CONFIDENCE = 0.95


def interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % interval over seeds; nan and None where a value is not finite.

    None, too, from less than two values.
    """
    found = np.asarray(values, np.float64)
    if not len(found):
        return math.nan, None
    if not np.isfinite(found).all():
        return math.nan, None
    if len(found) < 2:
        return float(found.mean()), None
    error = found.std(ddof=1) / math.sqrt(len(found))
    return float(found.mean()), t_quantile(len(found) - 1) * float(error)


@lru_cache(maxsize=1024)
def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = ``confidence``: 12.706 for one degree of freedom, 2.776 for four.

    Raises ValueError unless df >= 1 and 0 < confidence < 1.
    """
    if df < 1 or not 0 < confidence < 1:
        raise ValueError(f"needed are df >= 1 and 0 < confidence < 1, got {df} and {confidence}")
    low, high = 0.0, math.pi / 2  # of the angle, in which P rises evenly
    for _ in range(60):
        middle = (low + high) / 2
        if within(math.tan(middle) * math.sqrt(df), df) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(high) * math.sqrt(df)


def within(t: float, df: int) -> float:
    """P(|T| < t) for Student's t with ``df`` degrees of freedom; the finite sums of A&S 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df == 1:
        return 2 * angle / math.pi
    term = cosine if df % 2 else 1.0
    total = term
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
