"""Where a model can be cut: its stack of equal layers; and the stages of a network without one.

    find_stack(model) == "bert.encoder.layer"
    exit_at(model, 2) == Exit(layer=2, layers=12, cuts={"bert.encoder.layer": 2})
    find_stages(resnet) == ["layer1", "layer2", "layer3", "layer4"]

Letters: j exit layer, N layers, G groups of layers that share their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, final

from torch import nn

from siftloader.errors import ScoringError


DEPTH_NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
SIDES = ("encoder", "decoder")
LISTS = {nn.ModuleList, nn.ModuleDict}  # not called themselves, so they are no layers


@final
@dataclass(frozen=True)
class Exit:
    """Layer ``layer`` of ``layers`` as a small set of cuts.

    ``cuts`` says how many children each container keeps, the one nearest the head first; empty for the
    whole model. ``settings`` has what the config of a module must say for that, by the module's path
    (ALBERT asks its config how often to run a layer).
    """

    layer: int
    layers: int
    cuts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that holds the layers: compiled and data-parallel wrappers removed."""
    while True:
        if type(model).__name__ == "OptimizedModule":  # torch.compile(model)
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def exit_at(root: nn.Module, layer: int | str) -> Exit:
    """Where to cut ``root`` so that it ends at ``layer``: 1..N, ``"path.to.stack:j"`` or ``"full"``.

    An encoder-decoder model is cut on both sides: j of N in the decoder and the same share, rounded up,
    in the encoder. A path cuts that stack alone. Raises ScoringError where there is nothing to cut.
    """
    if layer == "full":
        # Nothing is cut off; the stacks tell trunk from head, so that the head runs at the labels only.
        try:
            return Exit(1, 1, {path: _length(root, path) for path in _stacks(root)})
        except ScoringError:
            return Exit(1, 1)
    paths, number = None, layer
    if isinstance(layer, str):
        path, _, digits = layer.rpartition(":")
        if not path or not digits.isdigit():
            raise ValueError(
                f'exit_layer must be a number, "full" or "path.to.stack:j", got {layer!r}'
            )
        paths, number = [path], int(digits)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"exit_layer must be an int or a str, got {type(number).__name__}")
    path, *encoders = _stacks(root) if paths is None else paths
    shared = _shared_layers(root, path)
    layers = shared or _length(root, path)
    if not 1 <= number <= layers:
        raise ScoringError(
            f"exit_layer must be in 1..{layers} for the {layers} layers of {path!r}, got {number}"
        )
    if shared:
        # Layer i is of group int(i / (N / G)): a share of the groups, even a broken one, keeps that so.
        groups = _length(root, path)
        settings = {"num_hidden_layers": number, "num_hidden_groups": number * groups / layers}
        return Exit(number, layers, {path: groups}, {path.rpartition(".")[0]: settings})
    cuts = {each: math.ceil(number * _length(root, each) / layers) for each in encoders}
    return Exit(number, layers, {path: number, **cuts})


def find_stack(model: nn.Module) -> str:
    """The path of the stack of equal layers: the one as deep as the config says, else the largest.

    Of an encoder-decoder model the decoder's. Raises ScoringError where there is none, or where stages
    follow each other (ResNet, Swin): cutting one of them would not shorten the model as meant.
    """
    return _stacks(model)[0]


def find_stages(model: nn.Module) -> list[str]:
    """Paths of the parts of a model that run one after the other: places to read features from.

    They are the layers of a stack of equal ones, or the stages of a stage network: ``layer1`` to
    ``layer4`` of a ResNet, the children of ``encoder.layers`` of a Swin. Raises ScoringError where
    neither is found.
    """
    try:
        path = find_stack(model)
    except ScoringError:
        return _stages(model)
    if _shared_layers(model, path):
        raise ScoringError(
            f"the layers of {type(model).__name__} share their weights: there is no module for each "
            f"of them; use exit_layer=1..N"
        )
    return [f"{path}.{name}" for name in model.get_submodule(path)._modules]


@dataclass(frozen=True)
class _Container:
    # Children of one class, or as many as the config has layers.
    path: str
    module: nn.Module
    kinds: frozenset[type]
    layers: list[nn.Module]
    told: bool
    shared: bool
    size: int

    def is_stack(self) -> bool:
        if self.shared:
            return True
        if len(self.layers) < 2 or not self.kinds.isdisjoint(LISTS):
            return False
        if self.told:  # hybrids have layers of several classes; a head of as many parts is no list
            return type(self.module) in LISTS if len(self.kinds) > 1 else _same_width(self.layers)
        # A plain sequence of linear layers is no stack: its layers lead from one width to another, and
        # a model that is nothing but the sequence has its head inside.
        return bool(self.path) and _alike(self.layers)

    def side(self) -> str | None:
        return next((part for part in self.path.split(".") if part in SIDES), None)


def _containers(model: nn.Module) -> Iterator[_Container]:
    depths = _depths(model)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            continue
        layers = [child for child in module._modules.values() if child is not None]
        kinds = frozenset(type(child) for child in layers)
        size = sum(parameter.numel() for parameter in module.parameters())
        shared = bool(_shared_layers(model, path))
        told = shared or len(layers) in depths
        if size and (len(kinds) == 1 or told):
            yield _Container(path, module, kinds, layers, told, shared, size)


def _stacks(model: nn.Module) -> list[str]:
    # The stack nearest the head, then the encoder's if there is one.
    found = list(_containers(model))
    stacks = [each for each in found if each.is_stack()]
    if not stacks:
        raise ScoringError(
            f"no stack of equal layers in {type(model).__name__} to exit from; name one with "
            f'exit_layer="path.to.stack:j", train an exit head beside the model with '
            f'exit_head="probe", or score at full depth with exit_layer="full"'
        )
    sides = [_deepest([s for s in stacks if s.side() == side]) for side in reversed(SIDES)]
    best = [_deepest(stacks)]
    if None not in sides and _has_two_sides(model, sides[0]):
        best = sides
    chosen = [each for each in best if each is not None]
    first = chosen[0]
    others = [
        each.path
        for each in found
        if each.kinds == first.kinds and all(_apart(each.path, own.path) for own in chosen)
    ]
    if others:
        kind = "/".join(sorted(kind.__name__ for kind in first.kinds))
        named = sorted([first.path, *others])
        more = "" if len(named) <= 4 else f" and {len(named) - 4} more"
        raise ScoringError(
            f"{type(model).__name__} has several stacks of {kind} "
            f"({', '.join(named[:4])}{more}); name the one to cut with "
            f'exit_layer="{first.path}:j", train an exit head beside the model with '
            f'exit_head="probe", or score at full depth with exit_layer="full"'
        )
    return [each.path for each in chosen]


def _deepest(stacks: list[_Container]) -> _Container | None:
    return max(stacks, key=lambda s: (s.told, s.size, -s.path.count(".")), default=None)


def _has_two_sides(model: nn.Module, decoder: _Container | None) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    parts = decoder.path.split(".") if decoder else []
    parent = ".".join(parts[: parts.index("decoder")]) if "decoder" in parts else ""
    return isinstance(model.get_submodule(parent), nn.Transformer)


def _stages(model: nn.Module) -> list[str]:
    for paths in (_in_containers(model), _siblings(model)):
        if len(paths) >= 2 and _hold_much(model, paths):
            return paths
    raise ScoringError(
        f"no stages found in {type(model).__name__}: neither a stack of equal layers nor several "
        f"parts of one class that follow each other and hold much of the model"
    )


def _in_containers(model: nn.Module) -> list[str]:
    # The outermost containers of one class of blocks: a single one holds the stages themselves
    # (`encoder.stages`), several are one stage each (`layer1`), or one within each (`stages.0.blocks`).
    outer: list[_Container] = []
    for each in _containers(model):
        if each.path and len(each.kinds) == 1 and all(_apart(each.path, o.path) for o in outer):
            outer.append(each)
    sizes: dict[frozenset[type], int] = {}
    for each in outer:
        sizes[each.kinds] = sizes.get(each.kinds, 0) + each.size
    kinds = max(sizes, key=lambda kinds: sizes[kinds], default=None)
    paths = [each.path for each in outer if each.kinds == kinds]
    if len(paths) == 1:
        return [f"{paths[0]}.{name}" for name in model.get_submodule(paths[0])._modules]
    parts = [path.split(".") for path in paths]
    shared = next((n for n, same in enumerate(zip(*parts, strict=False)) if len({*same}) > 1), 0)
    return list(dict.fromkeys(".".join(path[: shared + 1]) for path in parts))


def _siblings(model: nn.Module) -> list[str]:
    # Parts of one class under one parent (timm's RegNet: s1 to s4; the blocks of a MobileNet).
    groups: dict[tuple[str, type], list[str]] = {}
    for path, module in model.named_modules():
        if path and module._modules and type(module) not in {*LISTS, nn.Sequential}:
            groups.setdefault((path.rpartition(".")[0], type(module)), []).append(path)
    several = [paths for paths in groups.values() if len(paths) >= 2]
    return max(several, key=lambda paths: _size(model, paths), default=[])


def _size(model: nn.Module, paths: list[str]) -> int:
    return sum(p.numel() for path in paths for p in model.get_submodule(path).parameters())


def _hold_much(model: nn.Module, paths: list[str]) -> bool:
    # A quarter of what is neither a head nor a table: those may be of any size.
    outside = sum(
        parameter.numel()
        for path, module in model.named_modules()
        if not isinstance(module, (nn.Linear, nn.Embedding))
        and not any(f"{path}.".startswith(f"{each}.") for each in paths)
        for parameter in module.parameters(recurse=False)
    )
    return bool(3 * _size(model, paths) > outside)


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    # Where a part of one layer is compiled, its names say so.
    return {
        name.replace("_orig_mod.", ""): tuple(parameter.shape)
        for name, parameter in layer.named_parameters()
    }


def _alike(layers: list[nn.Module]) -> bool:
    first, *rest = (_shapes(layer) for layer in layers)
    return all(shapes == first for shapes in rest)


def _same_width(layers: list[nn.Module]) -> bool:
    # Layers of one stack may differ (experts here, none there; Mamba or attention), the stages of a
    # Swin differ in nearly every shape that they have in common.
    shapes = [_shapes(layer) for layer in layers]
    common = set(shapes[0]).intersection(*shapes[1:])
    equal = sum(len({each[name] for each in shapes}) == 1 for name in common)
    return 2 * equal >= len(common) > 0


def _apart(one: str, other: str) -> bool:
    return not (f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."))


def _length(root: nn.Module, path: str) -> int:
    try:
        return len(root.get_submodule(path)._modules)
    except AttributeError as error:
        raise ScoringError(f"exit_layer: the model has no module {path!r} ({error})") from error


def _shared_layers(root: nn.Module, path: str) -> int | None:
    # N where the container holds G groups that its owner runs N times in all, as its config says.
    groups = _length(root, path)
    config: Any = getattr(root.get_submodule(path.rpartition(".")[0]), "config", None)
    if not path or groups != getattr(config, "num_hidden_groups", None):
        return None
    return int(config.num_hidden_layers)


def _depths(model: nn.Module) -> set[int]:
    config = getattr(unwrap(model), "config", None)
    holders = [config, *(getattr(config, name, None) for name in ("text_config", *SIDES))]
    found = (getattr(holder, name, None) for holder in holders for name in DEPTH_NAMES)
    return {depth for depth in found if isinstance(depth, int) and not isinstance(depth, bool)}
