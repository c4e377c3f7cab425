"""``Learner``: a small module that siftloader trains itself, beside the model.

    learner = Learner(module, lr=1e-3)
    learner.step(lambda: [loss_of(module)])          # inside a caller's no_grad, too

Nothing outside of the module knows of it: its optimizer is its own, it draws no random number, it is
never in training mode (dropout would draw), and a step does not wait for a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from siftloader.errors import StateError


State = dict[str, Any]


@final
class Learner:
    """Train ``module`` with an AdamW of its own; parameters that need no gradient stay as they are.

    Its state is made of tensors, numbers and dicts, so that ``torch.load(weights_only=True)`` reads it.
    """

    def __init__(self, module: nn.Module, lr: float) -> None:
        check_rate(lr)
        self.module = module.eval()
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError(f"{type(module).__name__} has no parameter that could learn")
        self._optimizer = torch.optim.AdamW(self._parameters, lr)

    def to(self, device: torch.device) -> None:
        """Move the module and what the optimizer remembers."""
        if self._parameters[0].device != device:
            self.module.to(device)
            self._optimizer.load_state_dict(self._optimizer.state_dict())  # follows the parameters

    def step(self, losses: Callable[[], Iterable[Tensor]]) -> None:
        """One step on the sum of ``losses``; the graph of each is gone before the next is asked for.

        A gradient with a number that is not finite counts as none: one bad sample must not ruin the
        module for the rest of the run.
        """
        with learning(self._parameters[0].device):
            for loss in losses():
                loss.backward()  # type: ignore[no-untyped-call]
            grads = [p.grad for p in self._parameters if p.grad is not None]
            if grads:
                fine = torch.stack([grad.isfinite().all() for grad in grads]).all()
                for grad in grads:
                    grad.copy_(torch.where(fine, grad, 0))
                # Where a default device is set, older versions count steps there, and wait for it.
                with torch.device("cpu"):
                    self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> State:
        """Copies on the host of all tensors: the module's, and what the optimizer remembers."""
        remembered = self._optimizer.state_dict()[
            "state"
        ]  # not the options: those are ours to set
        return {
            "module": {name: _copy(each) for name, each in self.module.state_dict().items()},
            "optimizer": {
                str(number): {name: _copy(each) for name, each in values.items()}
                for number, values in remembered.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; StateError where it is that of another module."""
        try:
            self.module.load_state_dict(state["module"])
            remembered = {
                int(n): {k: _copy(v) for k, v in values.items()}
                for n, values in state["optimizer"].items()
            }
        except (KeyError, RuntimeError) as error:
            raise StateError(
                f"the state is not that of a {type(self.module).__name__} as it is built here "
                f"({error}); load what state_dict() gave, into the same module"
            ) from error
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": remembered, "param_groups": groups})

    def digest(self) -> str:
        """The sha256 of all that ``state_dict`` has."""
        return digest_of(self.state_dict())


@contextmanager
def learning(device: torch.device) -> Iterator[None]:
    """Gradients and full precision, whatever the caller's contexts say."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def digest_of(state: Mapping[str, Any]) -> str:
    """The sha256 of nested dicts of tensors, in hexadecimal; "" of none."""
    if not state:
        return ""
    digest = hashlib.sha256()
    for name, tensor in _tensors(state, ""):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_rate(lr: object) -> None:
    """Raise ValueError unless ``lr`` is a positive number."""
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
        raise ValueError(f"lr must be a positive number, got {lr!r}")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(value[key], f"{name}/{key}")
    else:
        yield name, torch.as_tensor(value).detach().cpu()


def _copy(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().to("cpu", copy=True)
