"""An exit head of its own: for models whose head does not fit their middle (ResNets), and for any other.

    probe = ProbeExit(resnet, exit_layer=2)
    for logits in probe.logits_at(batch, targets): ...     # [m, V], by the head's weights of now
    probe.learn(batch, targets)                            # one step of the head, none of the model

The head sees detached features of the candidates, all of them and not only the kept ones, so that it
learns the population. That has a price: what the head finds easy is not trained on, and the head does
not notice when the model forgets it; scored by the whole model its loss would rise. Finish with plain
steps (``cooldown_steps``), and look at what is kept by class. A head belongs to one exit of one model.
This is the way to stage networks that the SIFT paper leaves for later.

Letters: P samples, T positions, M positions with a prediction, m those of a chunk, C features, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from siftloader.batches import Batch
from siftloader.errors import ScoringError, StateError
from siftloader.exits import EarlyExit, Task
from siftloader.features import Features
from siftloader.learners import Learner, State, check_rate, learning
from siftloader.targets import Targets
from siftloader.twin import rows_at_a_time


class _Linear(nn.Module):
    """Zeros at first: nothing is drawn, and every class is as likely as the other."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        host, dtype = torch.device("cpu"), torch.float32  # not the defaults of the moment
        self.weight = nn.Parameter(torch.zeros(classes, width, device=host, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(classes, device=host, dtype=dtype))
        self.width, self.classes = width, classes

    def forward(self, features: Tensor) -> Tensor:
        normed = functional.layer_norm(features.float(), (self.width,))
        return functional.linear(normed, self.weight, self.bias)


@final
class ExitHead:
    """Layer norm and a linear layer on features, trained by siftloader with an AdamW of its own.

    ExitHead(lr=3e-2)                # V is asked of the model
    ExitHead(classes=10)             # or given

    Computes in float32 whatever the features are. Built, of zeros, from the first features, or from a
    state: nothing is drawn.
    """

    def __init__(self, classes: int | None = None, lr: float = 1e-2) -> None:
        if classes is not None and (
            isinstance(classes, bool) or not isinstance(classes, int) or classes < 2
        ):
            raise ValueError(f"classes must be an int of at least 2, got {classes!r}")
        check_rate(lr)
        self.classes = classes
        self.lr = lr
        self._learner: Learner | None = None

    def logits_at(self, features: Tensor) -> Tensor:
        """Predictions [M, V], float32, for features [M, C]."""
        module = self._module(features)
        with torch.autocast(features.device.type, enabled=False):
            return module(features)  # type: ignore[no-any-return]

    def step(self, features: Tensor, targets: Targets) -> None:
        """One step on the mean cross-entropy of ``features`` [M, C] at ``targets``, soft ones too.

        Positions that do not count, and features that are not finite, are left out.
        """
        module = self._module(features)
        if not len(features) or self._learner is None:
            return
        hard = not targets.labels.is_floating_point()
        size = rows_at_a_time(module.classes)

        def losses() -> Iterator[Tensor]:
            counts = features.isfinite().all(1)
            if targets.real is not None:
                counts = counts & targets.real
            total = counts.sum().clamp_min(1)
            for first in range(0, len(features), size):
                part = slice(first, first + size)
                labels = targets.labels[part]
                labels = labels.clamp_min(0) if hard else labels.clone()
                # New tensors all of them: autograd keeps none that was made in inference mode.
                seen = torch.where(counts[part, None], features[part], 0)
                lost = functional.cross_entropy(module(seen), labels, reduction="none")
                yield torch.where(counts[part], lost, 0).sum() / total

        self._learner.step(losses)

    def state_dict(self) -> State:
        """Tensors in dicts, on the host; {} before there is a head."""
        return self._learner.state_dict() if self._learner else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, also before the first features; StateError where it cannot be."""
        if not state:
            self._learner = None
            return
        try:
            classes, width = state["module"]["weight"].shape
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            raise StateError(
                "the state is not that of an exit head; load what its state_dict() gave"
            ) from error
        if self.classes not in (None, classes):
            raise StateError(
                f"the state is of a head for {classes} classes, this one has {self.classes}"
            )
        learner = Learner(_Linear(width, classes), self.lr)
        learner.load_state_dict(state)
        self.classes, self._learner = classes, learner

    def digest(self) -> str:
        """The sha256 of the head and its optimizer, "" before there is a head."""
        return self._learner.digest() if self._learner else ""

    def _module(self, features: Tensor) -> _Linear:
        width = features.shape[1]
        if self._learner is None:
            if self.classes is None:
                raise ScoringError(
                    "how many classes are there to predict? pass ExitHead(classes=...)"
                )
            with learning(features.device):
                self._learner = Learner(_Linear(width, self.classes), self.lr)
        self._learner.to(features.device)
        module = self._learner.module
        assert isinstance(module, _Linear)
        if module.width != width:
            raise ScoringError(
                f"the exit head was built for features of width {module.width}, found {width}; "
                f"a head belongs to one exit of one model: begin with a new one"
            )
        return module


@final
class ProbeExit:
    """Predict from the features at ``exit_layer`` of a live model with a head trained on the side.

    ProbeExit(resnet, 2)                                  # stage 2: layer2
    ProbeExit(bert, 1, ExitHead(lr=3e-2))                 # a transformer's layer, another head than its own

    ``exit_layer`` is what ``Features`` takes. Used like EarlyExit, and told to ``learn`` after every pool.
    Nothing of the model is touched.
    """

    def __init__(
        self, model: nn.Module, exit_layer: int | str = 1, head: ExitHead | None = None
    ) -> None:
        self._features = Features(model, exit_layer)
        self._whole = EarlyExit(model, "full")
        self.head = head or ExitHead()
        self._seen: tuple[Batch, Targets, Tensor] | None = None

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is an exit of that very module."""
        return self._features.is_of(model)

    def logits_at(self, batch: Batch, targets: Targets) -> Iterator[Tensor]:
        """Predictions at the targets, in chunks [m, V] that add up to [M, V]; the features are kept.

        At most 2**26 logits are alive at a time. Call it under ``torch.no_grad()``.
        """
        if self.head.classes is None:
            self.classes(batch, targets.length)
        features = self._of(batch, targets)
        assert self.head.classes is not None
        size = rows_at_a_time(self.head.classes)
        for first in range(0, len(features), size):
            yield self.head.logits_at(features[first : first + size])

    def learn(self, batch: Batch, targets: Targets) -> None:
        """One step of the head on all candidates; features of this very batch are not computed twice."""
        with torch.no_grad():
            if self.head.classes is None:
                self.classes(batch, targets.length)
            features = self._of(batch, targets)
        self.forget()
        self.head.step(features, targets)

    def forget(self) -> None:
        """Let go of the batch that was scored last."""
        self._seen = None

    def classes(self, batch: Batch, length: int) -> int:
        """V, as given, or else seen in what the whole model predicts for two samples."""
        if self.head.classes is None:
            try:
                with torch.no_grad():
                    self.head.classes = self._whole.classes(batch, length)
            except ScoringError as error:
                raise ScoringError(
                    f"the number of classes cannot be read from the model's own predictions ({error}); "
                    f"pass ExitHead(classes=...)"
                ) from error
        return self.head.classes

    def task(self, batch: Batch, name: str, labels: Tensor) -> Task:
        """How the model's own loss reads ``labels``."""
        return self._whole.task(batch, name, labels)

    def takes_labels(self, batch: Batch) -> bool:
        """No: this exit has no loss of its own that one could listen to."""
        return False

    def _of(self, batch: Batch, targets: Targets) -> Tensor:
        if self._seen is not None and self._seen[0] is batch and self._seen[1] is targets:
            return self._seen[2]
        features = self._features(batch, targets)
        # A criterion may look at parts of the pool after the whole of it.
        if self._seen is None or targets.samples >= self._seen[1].samples:
            self._seen = batch, targets, features
        return features
