"""Logits and labels as a loss sees them, whoever computes it: the model itself, or the loop.

    result, taps = listen(lambda: model(x, y))      # taps[0].logits [n, V], taps[0].labels [n]

Calls of ``cross_entropy`` (and ``nll_loss``) are listened to, not changed: no module is patched, and the
caller's result is the real one.

Letters: P samples, T positions, V vocabulary (or classes), n positions of one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from siftloader.batches import IGNORED, Batch, cut, leaves
from siftloader.compiled import Listening
from siftloader.twin import rows_at_a_time


class Tap(NamedTuple):
    """One call of a loss: logits [n, V], labels [n] (-100 where ignored; or [n, V], soft ones)."""

    logits: Tensor
    labels: Tensor
    ignored: int


class SampleTaps(NamedTuple):
    """What a loss saw of the samples ``first`` to ``last``: logits [rows, T, V], labels [rows, T]."""

    first: int
    last: int
    logits: Tensor
    labels: Tensor


_LISTENED = {
    each: inspect.signature(each) for each in (functional.cross_entropy, functional.nll_loss)
}


class _Listening(Listening):
    def __init__(self) -> None:
        super().__init__()
        self.taps: list[Tap] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LISTENED:
            given = _LISTENED[func].bind(*args, **kwargs)
            given.apply_defaults()
            self.taps.append(_tap(**given.arguments))
        return func(*args, **kwargs)


def _tap(input: Tensor, target: Tensor, ignore_index: int, **_: Any) -> Tap:  # noqa: A002
    classes = input.shape[-1] if input.ndim < 2 else input.shape[1]
    logits = input.movedim(1, -1) if input.ndim > 2 else input
    if target.is_floating_point():
        labels = target.movedim(1, -1) if target.ndim > 2 else target
        return Tap(logits.reshape(-1, classes), labels.reshape(-1, classes), ignore_index)
    labels = target.reshape(-1).masked_fill(target.reshape(-1) == ignore_index, IGNORED)
    return Tap(logits.reshape(-1, classes), labels, ignore_index)


def listen(call: Callable[[], Any]) -> tuple[Any, list[Tap]]:
    """What ``call`` returns, and the losses of its main task: the one with the most labels."""
    with _Listening() as mode:
        result = call()
    # Losses with other numbers of classes are other tasks (BERT's next sentence, a domain head).
    labelled: dict[int, int] = {}
    for tap in mode.taps:
        classes = tap.logits.shape[1]
        labelled[classes] = labelled.get(classes, 0) + len(tap.labels)
    main = max(labelled, key=lambda classes: (labelled[classes], classes), default=0)
    return result, [tap for tap in mode.taps if tap.logits.shape[1] == main]


@dataclass(frozen=True)
class Reading:
    """How the losses of a call belong to its samples, found out once.

    ``whole``: all calls together hold the samples one after the other. ``parts``: each call holds a
    part of every sample. ``alone``: neither, so that samples are run one at a time.
    """

    order: Literal["whole", "parts", "alone"]
    width: int  # logits of a sample
    # Positions of a sample beyond the length of the batch, -1 where labels are shifted; None where a
    # sample has one prediction.
    more: int | None = 0
    differs: bool = False  # whether the caller's own number is not the mean of the losses heard

    @classmethod
    def of(
        cls, call: Callable[[Batch], Any], batch: Batch, samples: int, single: bool | None = None
    ) -> Reading | None:
        """Compare the losses of two samples together with those of each; None if there are none.

        ``single`` says whether a sample has one label, where that is known.
        """
        few = min(2, samples)
        found = [listen(lambda at=at: call(cut(batch, at, at + 1))) for at in range(few)]  # type: ignore[misc]
        alone = [taps for _, taps in found]
        if not all(alone):
            return None
        differs = any(_differs(result, taps) for result, taps in found)
        rows = [_together([tap.logits for tap in taps], 1, "whole")[0] for taps in alone]
        labels = [_together([tap.labels for tap in taps], 1, "whole")[0] for taps in alone]
        width, length = max(1, *(row.numel() for row in rows)), len(rows[0])
        one = length == 1 and single is not False
        more = None if one else length - _length(batch)
        # Fewer positions than there are: a loss that drops the unlabelled ones, other numbers each time.
        if more not in (None, 0, -1):
            return cls("alone", width, 0, differs)
        _, both = listen(lambda: call(cut(batch, 0, few)))
        orders: tuple[Literal["whole", "parts"], ...] = ("whole", "parts")
        for order in orders:
            logits = _together([tap.logits for tap in both], few, order)
            wanted = _together([tap.labels for tap in both], few, order)
            # Labels too: a head of zeros predicts the same everywhere.
            if logits is not None and all(
                one.shape == row.shape
                and torch.allclose(one, row, rtol=1e-2, atol=1e-2)
                and torch.equal(label, own)
                for one, row, label, own in zip(logits, rows, wanted, labels, strict=True)
            ):
                return cls(order, width, more, differs)
        return cls("alone", width, 0, differs)

    def samples(
        self, call: Callable[[Batch], Any], batch: Batch, samples: int
    ) -> Iterator[SampleTaps]:
        """What the loss sees of every sample, as many samples at a time as fit."""
        step = 1 if self.order == "alone" else rows_at_a_time(self.width)
        for first in range(0, samples, step):
            last = min(first + step, samples)
            part = batch if last - first == samples else cut(batch, first, last)
            _, taps = listen(lambda part=part: call(part))  # type: ignore[misc]
            seen, rows = sum(len(tap.labels) for tap in taps), last - first
            each = 1 if self.more is None else _length(batch) + self.more
            if rows > 1 and seen != rows * each:
                yield from Reading("alone", self.width)._rows(call, batch, first, last)
            elif not taps:  # nothing to predict, no loss
                nothing = torch.zeros(rows, 0, 2)
                yield SampleTaps(first, last, nothing, nothing[..., 0].long())
            else:
                order = "whole" if self.order == "alone" else self.order
                yield SampleTaps(
                    first,
                    last,
                    _together([tap.logits for tap in taps], rows, order),
                    _together([tap.labels for tap in taps], rows, order),
                )

    def _rows(
        self, call: Callable[[Batch], Any], batch: Batch, first: int, last: int
    ) -> Iterator[SampleTaps]:
        for found in self.samples(call, cut(batch, first, last), last - first):
            yield found._replace(first=found.first + first, last=found.last + first)


def _differs(result: Any, taps: list[Tap]) -> bool:
    # The one number a loop or model returns for a sample, beside the mean of what was heard.
    if isinstance(result, Mapping):
        result = result.get("loss")
    result = getattr(result, "loss", result)
    parts = result if isinstance(result, (tuple, list)) else [result]
    own = next((each for each in parts if isinstance(each, Tensor) and each.numel() == 1), None)
    if own is None or any(tap.labels.is_floating_point() for tap in taps):
        return False
    logits, labels = (
        torch.cat([tap.logits for tap in taps]),
        torch.cat([tap.labels for tap in taps]),
    )
    each = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    count = (labels != IGNORED).sum()
    alike = [
        (own.float() - heard).abs() <= 0.01 * heard.abs() + 1e-3
        for heard in (each.sum() / count, each.sum())
    ]
    return bool(count > 0) and not any(alike)


def _length(batch: Batch) -> int:
    # Of a sample, as the first field of several dimensions tells it.
    shapes = (leaf.shape for leaf in leaves(batch) if isinstance(leaf, Tensor))
    return next((int(shape[1]) for shape in shapes if len(shape) > 1), 1)


def _together(parts: list[Tensor], rows: int, order: str) -> Any:
    # [rows, T, ...], None where they do not divide among the rows
    if order == "whole":
        parts = [torch.cat(parts)]
    if any(len(part) % rows for part in parts):
        return None
    return torch.cat([part.view(rows, -1, *part.shape[1:]) for part in parts], 1)
