"""Weights that are spread over ranks, by FSDP or by tensor parallelism: gathered to score, and put back.

    with gathered(model.modules()):                   # one all-gather per FSDP group, whatever runs inside
        ...
    groups = replica_groups(model)                    # ranks that hold one replica together: tensor parallel
    check_alike(batch, groups)                        # they score the same candidates
    scores = agreed(scores, groups)                   # [P], the first member's, to the bit

The price is memory: the layers up to the exit, embedding and head are whole together; at "full" the model is.
What a forward of FSDP communicates depends on how often it runs, and that depends on the data: how many
labels there are, in how many chunks they fit. Ranks that communicate unequally often wait for each other
for ever. So scoring gathers first, once for a pool, and what it runs then communicates nothing.

Letters: P candidates.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from siftloader.batches import Batch, leaves
from siftloader.errors import ScoringError
from siftloader.stack import unwrap
from siftloader.world import World


FSDP = "torch.distributed.fsdp."


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The weights of FSDP's modules among these whole inside; afterwards each as it was found.

    Collectives: one all-gather for each group of ``fully_shard`` that was not whole (for each module of FSDP1), in
    the order of ``modules``. Without putting back, training would go on with these very copies: where scoring
    stands between ``backward()`` and ``step()``, with weights of before the step.
    """
    with ExitStack() as stack:
        for module in modules:
            each: Any = module
            if is_fsdp(module) and not _is_whole(module):
                stack.callback(each.reshard)
                each.unshard()
            # Not within itself: an early exit may be asked for while another is scored with.
            elif is_fsdp1(module) and each.training_state.name != "SUMMON_FULL_PARAMS":
                stack.enter_context(each.summon_full_params(each, recurse=False, writeback=False))
        yield


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this very module."""
    return _is_a(module, "torch.distributed.fsdp", "FSDPModule")


def is_spread(module: nn.Module) -> bool:
    """Whether weights of this very module lie on several ranks, by FSDP or by tensor parallelism."""
    weights = [each for each in module._parameters.values() if each is not None]
    return is_fsdp(module) or is_fsdp1(module) or any(map(_is_dtensor, weights))


def is_fsdp1(module: nn.Module) -> bool:
    """Whether this is a ``FullyShardedDataParallel``."""
    return _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def within(model: nn.Module) -> nn.Module:
    """The module that FSDP1 or Fabric wraps, whose forward has names for what it takes."""
    wrapped: Any = model
    while True:
        if is_fsdp1(wrapped):
            wrapped = wrapped._modules["_fsdp_wrapped_module"]
        elif type(wrapped).__name__ == "_FabricModule":  # its forward holds the precision
            wrapped = unwrap(wrapped._modules["_forward_module"])
        else:
            return wrapped  # type: ignore[no-any-return]


def check_root(model: nn.Module) -> None:
    """Raise ScoringError where weights are parts of an FSDP1 module around this one."""
    inside = {id(each) for fsdp in filter(is_fsdp1, model.modules()) for each in fsdp.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside and _is_flattened(module):
            raise ScoringError(
                f"the weights of {name or type(model).__name__!r} lie in a FullyShardedDataParallel around it, "
                f"which the loader was not given; pass model=wrapped, or after wrapping "
                f"loader.attach_model(wrapped)"
            )


def silence(live: nn.Module, shell: nn.Module) -> None:
    """Take the collectives out of a shell's forward: FSDP's hooks there only cast, as its policy says.

    The weights are to be gathered around it. Nothing where the live module is none of FSDP's. FSDP1 gathers in
    full precision, so there is nothing to cast.
    """
    if is_fsdp1(live):
        shell.__dict__["forward"] = shell._modules["_fsdp_wrapped_module"]
    if not is_fsdp(live):
        return
    policy = _state(live)._mp_policy
    wanted = policy.param_dtype if policy.cast_forward_inputs else None
    casts = {
        "_forward_pre_hooks": partial(_cast_inputs, wanted),
        "_forward_hooks": partial(_cast_output, policy.output_dtype),
    }
    for name, cast in casts.items():
        hooks = shell.__dict__[name]
        for key, hook in hooks.items():
            # A method of its state, or a function around one.
            if getattr(hook, "__module__", "").startswith(FSDP):
                hooks[key] = cast
    for name, value in vars(shell).items():
        # Of `register_fsdp_forward_method`: a function of FSDP's around the model's own method.
        function = value.__func__ if isinstance(value, MethodType) else None
        if getattr(function, "__globals__", {}).get("__name__", "").startswith(FSDP):
            own: MethodType = function.__wrapped__  # type: ignore[union-attr]
            shell.__dict__[name] = partial(_cast, wanted, policy.output_dtype, own.__func__, shell)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in parts on several ranks (a DTensor) in one piece; any other as it is."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def rows_of(hidden: Tensor, positions: Tensor) -> Tensor:
    """The rows ``positions`` [m] of ``hidden`` [P, T, H], as [m, H]; in one piece where that is a DTensor."""
    if _is_dtensor(hidden):
        tensors: Any = sys.modules["torch.distributed.tensor"]
        parts: Any = hidden
        everywhere = [tensors.Replicate()] * parts.device_mesh.ndim
        local = parts.redistribute(placements=everywhere).to_local()
        rows: Tensor = tensors.DTensor.from_local(
            rows_of(local, positions), parts.device_mesh, everywhere, run_check=False
        )
        return rows
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)


def replica_groups(model: nn.Module) -> list[Any]:
    """Process groups of this rank over which parameters are split, and which are not FSDP's: tensor parallel.

    Their ranks are one replica: they must be handed the same batches. No collectives.
    """
    data, found = _data_groups(model), {}
    for parameter in filter(_is_dtensor, model.parameters()):
        split: Any = parameter
        for dimension, placement in enumerate(split.placements):
            group = split.device_mesh.get_group(dimension)
            ranks = _ranks(group)
            if not placement.is_replicate() and len(ranks) > 1 and ranks not in data:
                found[ranks] = group
    return list(found.values())


def check_alike(batch: Batch, groups: list[Any], device: torch.device) -> None:
    """Raise ScoringError, on all ranks of a replica, where they do not hold the same candidates."""
    for group in groups:
        digest = hashlib.sha256()
        for leaf in leaves(batch):
            if isinstance(leaf, Tensor):
                digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
                digest.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            elif isinstance(leaf, str):
                digest.update(leaf.encode())
        own = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
        every = [torch.empty_like(own) for _ in _ranks(group)]
        torch.distributed.all_gather(every, own, group=group)
        if any(not torch.equal(each, own) for each in every):
            raise ScoringError(
                f"ranks {', '.join(map(str, _ranks(group)))} hold one replica of the model (tensor "
                f"parallel) and were given different candidates; they must read the same: number them by "
                f'replica, as in TokenShards(..., world=World(rank=mesh["dp"].get_local_rank(), '
                f'ranks=mesh["dp"].size())), or give a DistributedSampler that rank and num_replicas'
            )


def agreed(values: Tensor, groups: list[Any]) -> Tensor:
    """``values`` of the first rank of each replica, on all of its ranks: winners must not hang on rounding."""
    for group in groups:
        values = values.clone()
        torch.distributed.broadcast(values, src=_ranks(group)[0], group=group)
    return values


def data_rank(groups: list[Any]) -> int:
    """The first rank of the replica that this one belongs to: random draws are keyed by it, so that all draw alike."""
    rank = World.detect().rank
    return rank - sum(rank - _ranks(group)[0] for group in groups)


def _is_whole(module: Any) -> bool:
    return all(group.is_unsharded for group in _param_groups(module))


def _state(module: Any) -> Any:
    return module._get_fsdp_state()


def _param_groups(module: Any) -> list[Any]:
    state = _state(module)
    if (groups := getattr(state, "_fsdp_param_groups", None)) is not None:
        return list(groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch < 2.12


def _data_groups(model: nn.Module) -> set[tuple[int, ...]]:
    # Ranks along which FSDP spreads weights, or copies of them: each of these has data of its own.
    found = set()
    for module in filter(is_fsdp, model.modules()):
        for each in _param_groups(module):
            for name in ("shard_process_group", "replicate_process_group"):
                if (group := getattr(each.mesh_info, name, None)) is not None:
                    found.add(_ranks(group))
    return found


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))


def _is_dtensor(tensor: Tensor) -> bool:
    return _is_a(tensor, "torch.distributed.tensor", "DTensor")


def _is_flattened(module: nn.Module) -> bool:
    # By FSDP1, whose marks these are: into one parameter, which stands in the place of the others or behind them.
    return any(
        getattr(each, mark, False)
        for each in module._parameters.values()
        for mark in ("_is_flat_param", "_fsdp_flattened")
    )


def _is_a(value: object, module: str, kind: str) -> bool:
    # Looked up rather than imported: a process that never imported it has none of the kind.
    found = getattr(sys.modules.get(module), kind, None)
    return found is not None and isinstance(value, found)


def _cast_inputs(
    dtype: torch.dtype | None, module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any] | None:
    return None if dtype is None else (_to(dtype, args), _to(dtype, kwargs))


def _cast_output(dtype: torch.dtype | None, module: nn.Module, args: Any, output: Any) -> Any:
    return output if dtype is None else _to(dtype, output)


def _cast(
    wanted: torch.dtype | None,
    given: torch.dtype | None,
    method: Callable[..., Any],
    shell: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    args, kwargs = _cast_inputs(wanted, shell, args, kwargs) or (args, kwargs)
    return _cast_output(given, shell, args, method(shell, *args, **kwargs))


def _to(dtype: torch.dtype, values: Any) -> Any:
    from torch.distributed.utils import (
        _apply_to_tensors,
    )  # FSDP's own, so that structures come out alike

    apply: Callable[..., Any] = _apply_to_tensors
    return apply(lambda each: each.to(dtype) if each.is_floating_point() else each, values)
