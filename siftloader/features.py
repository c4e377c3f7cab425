"""``Features``: what a live model computes up to a layer or a stage, as vectors; the rest never runs.

    features = Features(resnet, 2)             # the second stage: layer2
    features = Features(resnet, "layer2")      # any module, by its path
    features = Features(bert, "bert.encoder.layer:3")
    vectors = features(batch, targets)         # [M, C]

The model's own code runs, through the live twin (twin.py), until the exit has returned: where the model's
width changes on the way, its head does not fit there, but a head of its own does (heads.py).

Letters: P samples, T positions, M wanted positions, C features of each, j exit layer, N layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from siftloader.batches import Batch
from siftloader.errors import ScoringError
from siftloader.exits import model_inputs
from siftloader.stack import Exit, find_stages, unwrap
from siftloader.targets import Targets
from siftloader.twin import Twin


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
class Features:
    """Read what a live model computes at ``exit_layer``, in eval mode and without gradients.

    ``exit_layer`` is j in 1..N (the layers of a stack, or the stages of a stage network), the path of any
    module, or ``"path:j"`` for the j-th child of a container. ScoringError where there is no such place.
    As with EarlyExit nothing of the model is touched; forward hooks within what runs do fire.
    """

    def __init__(self, model: nn.Module, exit_layer: int | str) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._root = unwrap(model)
        self.path = _path_of(self._root, exit_layer)
        self._twin: Twin | None = None
        self._run: Callable[..., Any] = self._root.forward

    def is_of(self, model: nn.Module) -> bool:
        """Whether these are features of that very module."""
        return self._root is unwrap(model)

    def __call__(self, batch: Batch, targets: Targets) -> Tensor:
        """One vector per target, [M, C]; call it under ``torch.no_grad()``.

        Images and other maps [P, C, H, W] are averaged over their area. Sequences [P, T, C] are taken at
        the targets' positions, or averaged over T where a sample has one label (where the batch has an
        ``attention_mask``, without the padding).
        """
        samples, length = targets.samples, targets.length
        args, kwargs = model_inputs(self._root, batch)
        found = _first_tensor(self._live_twin().run(args, kwargs))
        if found is None or found.dim() < 2 or found.size(0) != samples:
            shape = "no tensor" if found is None or found.is_nested else tuple(found.shape)
            raise ScoringError(
                f"need features of {samples} samples at {self.path!r}, samples first, got {shape}; name "
                f"another module as exit_layer"
            )
        found, mask = _padded(found, length) if found.is_nested else (found, _mask(batch, found))
        if _channels_first(self._root.get_submodule(self.path), found.ndim):
            found = found.movedim(1, -1)
        vectors = found.flatten(1, -2) if found.ndim > 2 else found[:, None]  # [P, T, C]
        if length == 1:
            vectors = _mean(vectors, mask)
        elif found.ndim != 3 or vectors.shape[1] != length:
            raise ScoringError(
                f"features {tuple(found.shape)} at {self.path!r} do not have one vector for each of "
                f"{length} labels; name another module as exit_layer"
            )
        return vectors.reshape(-1, vectors.shape[-1]).index_select(0, targets.positions)

    def _live_twin(self) -> Twin:
        # Rebuilt when a module was replaced, as EarlyExit's.
        if self._twin is None or not self._twin.is_of(self._root):
            self._twin = Twin(self._root, Exit(1, 1))
            self._end_at_exit(self._twin)
        self._twin.refresh()
        return self._twin

    def _end_at_exit(self, twin: Twin) -> None:
        whole, exit_shell = (
            twin.shell_of(each) for each in (self._root, self._root.get_submodule(self.path))
        )
        assert whole is not None and exit_shell is not None
        forward, path = whole.forward, self.path

        def reached(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(output)

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                forward(*args, **kwargs)
            except _Reached as end:
                return end.output
            raise ScoringError(
                f"the model's forward ended without calling {path!r} as a module; name another one as "
                f"exit_layer"
            )

        # The exit's own hooks run before this one; those of the whole model expect what it returns.
        exit_shell.register_forward_hook(reached)
        whole.__dict__["forward"] = run
        whole.__dict__["_forward_hooks"] = OrderedDict()


class _Reached(BaseException):
    # Not an Exception: a model may catch those.
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _path_of(root: nn.Module, exit_layer: int | str) -> str:
    if isinstance(exit_layer, bool) or not isinstance(exit_layer, (int, str)):
        raise TypeError(f"exit_layer must be an int or a str, got {type(exit_layer).__name__}")
    if isinstance(exit_layer, int):
        return _numbered(find_stages(root), exit_layer, type(root).__name__)
    path, colon, digits = exit_layer.rpartition(":")
    if colon and not (path and digits.isdigit()):
        raise ValueError(f'exit_layer must be a number, a path or "path:j", got {exit_layer!r}')
    path = path or exit_layer
    if path in ("", "full"):
        raise ValueError(
            f"a head of its own needs a place within the model, got exit_layer={exit_layer!r}; name a "
            f"layer, 1..N, or a module"
        )
    try:
        module = root.get_submodule(path)
    except AttributeError as error:
        raise ScoringError(
            f"exit_layer: the model has no module {path!r} ({error}); it begins with "
            f"{', '.join(name for name, _ in root.named_children())}"
        ) from error
    if not colon:
        return path
    return _numbered([f"{path}.{name}" for name in module._modules], int(digits), path)


def _numbered(paths: list[str], number: int, of: str) -> str:
    if not 1 <= number <= len(paths):
        raise ScoringError(
            f"exit_layer must be in 1..{len(paths)} for the {len(paths)} parts of {of!r}, got {number}"
        )
    return paths[number - 1]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, (Mapping, tuple, list)):
        return None
    found = (_first_tensor(each) for each in parts)
    return next((each for each in found if each is not None), None)


def _channels_first(module: nn.Module, ndim: int) -> bool:
    # [P, C, H, W] or [P, H, W, C]? Convolutions write the first; what has linear layers and none of
    # those (Swin) the second. In three dimensions [P, T, C] is the rule: a Mamba layer has both.
    convolves = any(isinstance(each, CONVOLUTIONS) for each in module.modules())
    linear = any(isinstance(each, nn.Linear) for each in module.modules())
    return (convolves or not linear) if ndim > 3 else ndim == 3 and convolves and not linear


def _padded(found: Tensor, length: int) -> tuple[Tensor, Tensor]:
    # torch's own encoder drops the padding of a batch until its last layer.
    mask = torch.nested.to_padded_tensor(torch.ones_like(found), 0.0)[..., 0]
    full = torch.nested.to_padded_tensor(found, 0.0)
    missing = max(length - full.shape[1], 0) if length > 1 else 0
    return torch.nn.functional.pad(full, (0, 0, 0, missing)), mask


def _mask(batch: Batch, found: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = isinstance(mask, Tensor) and found.ndim == 3 and mask.shape == found.shape[:2]
    return mask if fits else None


def _mean(vectors: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return vectors.mean(1)
    weight = mask.to(vectors.dtype)[..., None]
    return (vectors * weight).sum(1) / weight.sum(1).clamp_min(1)
