"""What happened, as a plain dict; reading it is the only thing that may wait for the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from siftloader.errors import StateError


@dataclass
class Stats:
    """Counters of a run. Host counts are ints, scores stay on the device until they are read."""

    steps: int = 0  # batches handed out in training mode
    samples: int = 0  # rows handed out
    candidates: int = 0  # rows scored
    kept: int = 0  # of those, handed out
    tail_dropped: int = 0  # rows of short pools at the end of an epoch
    sifting: bool = False
    _nonfinite: int | Tensor = 0
    _unlabelled: int | Tensor = 0
    _capped: int | Tensor = 0
    _scores: Tensor | None = None  # of the last pool, [P]
    _index: Tensor | None = None  # of its winners, [b]
    _seconds: float = 0.0
    _pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        """Charge the block to ``seconds_scoring``: GPU time by events, else the host's clock."""
        if device.type == "cuda":
            begin, end = _event(), _event()
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end))
            if len(self._pending) > 256:  # asks, never waits
                self._collect([pair for pair in self._pending if _done(pair[1])])
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def count_pool(
        self,
        scores: Tensor,
        index: Tensor,
        nonfinite: Tensor,
        unlabelled: Tensor,
        capped: Tensor,
    ) -> None:
        """Record the scores [P] of a pool and the indices [b] of its winners, and how many rows are what."""
        self.candidates += len(scores)
        self.kept += len(index)
        self._unlabelled = self._unlabelled + unlabelled
        self._nonfinite = self._nonfinite + nonfinite
        self._capped = self._capped + capped
        self._scores, self._index = scores, index

    def read(self) -> dict[str, Any]:
        """All figures; ``score_*`` and ``threshold`` (the lowest kept score) are the last pool's."""
        return {**self.state(), "sifting": self.sifting, **self._score_figures()}

    def state(self) -> dict[str, Any]:
        """The counters that outlive a restart, JSON-able."""
        if self._pending:
            torch.cuda.synchronize()
            self._collect(list(self._pending))
        return {
            "steps": self.steps,
            "samples": self.samples,
            "candidates": self.candidates,
            "kept": self.kept,
            "seconds_scoring": self._seconds,
            "nonfinite": int(self._nonfinite),
            "unlabelled": int(self._unlabelled),
            "capped": int(self._capped),
            "tail_dropped": self.tail_dropped,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Stats:
        """Take the counters up where a saved run left them; StateError if some are missing."""
        names = ("steps", "samples", "candidates", "kept", "tail_dropped")
        try:
            return cls(
                **{name: state[name] for name in names},
                _seconds=state["seconds_scoring"],
                _nonfinite=state["nonfinite"],
                _unlabelled=state["unlabelled"],
                _capped=state["capped"],
            )
        except (KeyError, TypeError) as error:
            raise StateError(f"the saved stats are damaged: {error!r}") from error

    def _score_figures(self) -> dict[str, float | None]:
        if self._scores is None or self._index is None:
            return {"score_kept": None, "score_dropped": None, "threshold": None}
        scores = self._scores.double().cpu()
        won = torch.zeros(len(scores), dtype=torch.bool)
        won[self._index.cpu()] = True
        real = scores.isfinite()
        return {
            "score_kept": _mean(scores[won & real]),
            "score_dropped": _mean(scores[~won & real]),
            "threshold": scores[won].min().item() if real[won].any() else None,
        }

    def _collect(self, finished: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        for pair in finished:
            self._seconds += pair[0].elapsed_time(pair[1]) / 1000
            self._pending.remove(pair)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _done(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
