"""What happened, as a plain dict; reading it is the only thing that may wait for the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from siftloader.errors import StateError


@final
class Stopwatch:
    """Seconds of blocks that were timed, and how many they were: of the GPU by events, else of the host's clock."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.blocks = 0  # since it was made
        self._seconds = seconds
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        """Charge the block."""
        if device.type == "cuda":
            begin, end = event(), event()
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end))
            if len(self._pending) > 256:  # asks, never waits
                self._collect([pair for pair in self._pending if done(pair[1])])
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        self.blocks += 1

    def seconds(self) -> float:
        """All so far; waits for a GPU."""
        if self._pending:
            torch.cuda.synchronize()
            self._collect(list(self._pending))
        return self._seconds

    def known(self) -> tuple[float, int]:
        """Seconds and blocks, without those that a GPU has not finished."""
        self._collect([pair for pair in self._pending if done(pair[1])])
        return self._seconds, self.blocks - len(self._pending)

    def _collect(self, finished: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        for pair in finished:
            self._seconds += pair[0].elapsed_time(pair[1]) / 1000
            self._pending.remove(pair)


@dataclass
class Stats:
    """Counters of a run. Host counts are ints, scores stay on the device until they are read."""

    steps: int = 0  # batches handed out in training mode
    samples: int = 0  # rows handed out
    candidates: int = 0  # rows scored
    kept: int = 0  # of those, handed out
    tail_dropped: int = 0  # rows of short pools at the end of an epoch
    audited: int = 0  # rows that an audit looked at
    sifting: bool = False
    scoring: Stopwatch = field(default_factory=Stopwatch)
    auditing: Stopwatch = field(default_factory=Stopwatch)
    _nonfinite: int | Tensor = 0
    _unlabelled: int | Tensor = 0
    _capped: int | Tensor = 0
    _scores: Tensor | None = None  # of the last pool, [P]
    _index: Tensor | None = None  # of its winners, [b]

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
        return {
            "steps": self.steps,
            "samples": self.samples,
            "candidates": self.candidates,
            "kept": self.kept,
            "audited": self.audited,
            "seconds_scoring": self.scoring.seconds(),
            "seconds_auditing": self.auditing.seconds(),
            "nonfinite": int(self._nonfinite),
            "unlabelled": int(self._unlabelled),
            "capped": int(self._capped),
            "tail_dropped": self.tail_dropped,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Stats:
        """Take the counters up where a saved run left them; StateError if some are missing."""
        names = ("steps", "samples", "candidates", "kept", "tail_dropped", "audited")
        try:
            return cls(
                **{name: state[name] for name in names},
                scoring=Stopwatch(state["seconds_scoring"]),
                auditing=Stopwatch(state["seconds_auditing"]),
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


def event() -> torch.cuda.Event:
    """One that is timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def done(event: torch.cuda.Event) -> bool:
    """Whether the GPU has come to it; asks, never waits."""
    return bool(event.query())  # type: ignore[no-untyped-call]


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
