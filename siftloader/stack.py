"""Where a model can be cut: its stack of equal layers.

    find_stack(model) == "bert.encoder.layer"

Letters: j exit layer, N layers.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from siftloader.errors import ScoringError


DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")


def unwrap(model: nn.Module) -> nn.Module:
    """The module that holds the layers: compiled and data-parallel wrappers removed."""
    while True:
        if type(model).__name__ == "OptimizedModule":  # torch.compile(model)
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def exit_at(root: nn.Module, layer: int | str) -> tuple[str | None, int, int]:
    """Path of the stack to cut (None for the whole model), j and N."""
    if layer == "full":
        return None, 1, 1
    path, number = None, layer
    if isinstance(layer, str):
        path, _, digits = layer.rpartition(":")
        if not path or not digits.isdigit():
            raise ValueError(
                f'exit_layer must be a number, "full" or "path.to.stack:j", got {layer!r}'
            )
        number = int(digits)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"exit_layer must be an int or a str, got {type(number).__name__}")
    if path is None:
        path = find_stack(root)
    try:
        layers = len(root.get_submodule(path)._modules)
    except AttributeError as error:
        raise ScoringError(f"exit_layer: the model has no module {path!r} ({error})") from error
    if not 1 <= number <= layers:
        raise ScoringError(
            f"exit_layer must be in 1..{layers} for the {layers} layers of {path!r}, got {number}"
        )
    return path, number, layers


def find_stack(model: nn.Module) -> str:
    """The path of the stack of equal layers: the one as deep as the config says, else the largest.

    Raises ScoringError where there is none, or where stages of the same kind follow each other
    (ResNet): cutting one of them would not shorten the model as meant.
    """
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            continue
        kinds = {type(child) for child in module.children()}
        size = sum(p.numel() for p in module.parameters())
        told = len(module) == _depth(model)
        # A plain sequence of linear layers is no stack: its layers lead from one width to another, and
        # a model that is nothing but the sequence has its head inside.
        if len(module) >= 2 and len(kinds) == 1 and size and (told or (path and _alike(module))):
            found.append((told, size, -path.count("."), path, kinds.pop()))
    if not found:
        raise ScoringError(
            f"no stack of equal layers in {type(model).__name__} to exit from; name one with "
            f'exit_layer="path.to.stack:j", or score at full depth with exit_layer="full"'
        )
    best = max(found, key=lambda entry: entry[:3])
    path, kind = str(best[3]), best[4]
    others = [e[3] for e in found if e is not best and e[4] is kind and _apart(e[3], path)]
    if others:
        raise ScoringError(
            f"{type(model).__name__} has several stacks of {kind.__name__} "
            f"({', '.join(sorted([path, *others]))}); name the one to cut with "
            f'exit_layer="{path}:j", or score at full depth with exit_layer="full"'
        )
    return path


def _alike(stack: nn.Module) -> bool:
    shapes = [
        {name: parameter.shape for name, parameter in child.named_parameters()}
        for child in stack.children()
    ]
    return all(each == shapes[0] for each in shapes)


def _apart(one: str, other: str) -> bool:
    return not (f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."))


def _depth(model: nn.Module) -> int | None:
    config = getattr(unwrap(model), "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        for name in DEPTH_NAMES:
            if isinstance(depth := getattr(holder, name, None), int):
                return depth
    return None
