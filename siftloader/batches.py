"""What a batch is made of: count its rows, cut, merge, select and move them.

A batch is any nest of mappings, tuples, named tuples, lists and dataclasses. Its *fields* are the leaves
that hold one entry per sample: tensors and arrays whose first dimension is the number of rows, and lists
and tuples of that length (strings, say, or tensors of different lengths). Everything else passes as it
is. Structure and types come out as they went in.

Letters: P rows (samples) of a batch, T positions of a row.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from siftloader.errors import BatchError


Batch: TypeAlias = Any
IGNORED = -100  # the label that losses skip, as torch's cross_entropy has it


def rows(batch: Batch) -> int:
    """Count the samples of a batch: the first dimension that most of its tensors share.

    rows({"input_ids": zeros(32, 512), "scale": tensor(2.0)}) == 32

    Raises BatchError where no tensor has a first dimension.
    """
    sizes = list(_sizes(batch, inside=False)) or list(_sizes(batch, inside=True))
    if not sizes:
        raise BatchError(
            f"no tensor with a sample dimension in a batch of type {type(batch).__name__}; a batch "
            f"needs at least one tensor whose first dimension counts the samples"
        )
    return max(dict.fromkeys(sizes), key=sizes.count)


def _sizes(batch: Batch, inside: bool, depth: int = 0) -> Iterator[int]:
    # A list of tensors inside a batch may be one tensor per sample: it counts only if nothing else does.
    if _is_array(batch):
        if batch.ndim > 0:
            yield int(batch.shape[0])
    elif inside or not (depth and isinstance(batch, list)):
        for child in _children(batch) or ():
            yield from _sizes(child, inside, depth + 1)


def leaves(batch: Batch, count: int | None = None) -> Iterator[Any]:
    """Yield every leaf of the nest, in order; with ``count`` rows, per-sample lists are leaves."""
    children = _children(batch, count)
    if children is None:
        yield batch
        return
    for child in children:
        yield from leaves(child, count)


def select(batch: Batch, index: Tensor) -> Batch:
    """The rows named by ``index`` [K], in that order; lists are selected too.

    A list, an array or a tensor on the CPU costs a synchronisation if ``index`` is on a GPU.
    """
    count = rows(batch)
    return _map(batch, lambda leaf: _take(leaf, index) if _is_field(leaf, count) else leaf, count)


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop``, as views where the fields allow it."""
    count = rows(batch)
    return _map(batch, lambda leaf: leaf[start:stop] if _is_field(leaf, count) else leaf, count)


def move(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on ``device``, copied without waiting where that is safe.

    The very same batch where they all are there.
    """
    target = torch.device(device)
    if all(leaf.device == target for leaf in leaves(batch) if isinstance(leaf, Tensor)):
        return batch
    # Device to host must wait: nobody could tell when the host may read.
    asynchronous = target.type != "cpu"
    if target.type == "cuda":
        batch = pin(batch)
    return _map_tensors(batch, lambda tensor: tensor.to(target, non_blocking=asynchronous))


def pin(batch: Batch) -> Batch:
    """The same batch in page-locked memory, from which a GPU copies without waiting.

    From other memory CUDA copies when the stream has come to it, and the host waits for that.
    """
    return _map_tensors(batch, _pinned)


def _pinned(tensor: Tensor) -> Tensor:
    can_be = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return tensor.pin_memory() if can_be else tensor


@final
class Copies:
    """Batches on their way to a GPU, beside what it is doing.

    copies = Copies()
    batch = copies.to(batch, torch.device("cuda"))

    ``move`` copies in the order of the loop's stream: after the training step that is still running. Here
    the copy has a stream of its own, and what is put on the loop's stream from now on waits for it.
    Elsewhere than on CUDA it is ``move``.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # Kept until they are copied: torch sees to that for memory that it pinned itself only.
        self._sources: deque[tuple[torch.cuda.Event, Batch]] = deque()

    def to(self, batch: Batch, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``; the very same batch where they all are there."""
        tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
        places, kinds = {each.device for each in tensors}, {each.layout for each in tensors}
        host = torch.device("cpu")
        ours = host in places and places <= {host, device} and kinds == {torch.strided}
        if device.type != "cuda" or not ours:
            return move(batch, device)
        while self._sources and self._sources[0][0].query():  # type: ignore[no-untyped-call]
            self._sources.popleft()
        source, loop, own = pin(batch), torch.cuda.current_stream(device), self._stream(device)
        with torch.cuda.stream(own):
            moved = move(source, device)
            copied = own.record_event()
        self._sources.append((copied, source))
        loop.wait_event(copied)
        for leaf in leaves(moved):
            if isinstance(leaf, Tensor):  # whose memory is that of `own`, which would use it again
                leaf.record_stream(loop)
        return moved

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


def clone(batch: Batch) -> Batch:
    """The same batch with tensors and arrays of its own, safe from a loader that reuses buffers."""
    cloned = _map_tensors(batch, lambda tensor: tensor.clone())
    return _map(cloned, lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf)


def map_leaves(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with ``change`` of every leaf; the nest and its types stay."""
    return _map(batch, change)


def _map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return _map(batch, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def tensor_fields(batch: Batch) -> list[Tensor]:
    """The fields of a batch, all of them tensors; BatchError where one is a list or an array."""
    count = rows(batch)
    fields = [leaf for leaf in leaves(batch, count) if _is_field(leaf, count)]
    for each in fields:
        if not isinstance(each, Tensor):
            raise BatchError(
                f"a field of the batch is a {type(each).__name__} with one entry per sample; only tensors "
                f"move between ranks: leave it out, or number what it says"
            )
    return fields


def replaced(batch: Batch, fields: Sequence[Tensor]) -> Batch:
    """The batch with these tensors in the place of its ``tensor_fields``."""
    count, new = rows(batch), iter(fields)
    return _map(batch, lambda leaf: next(new) if _is_field(leaf, count) else leaf, count)


def stretched(
    batch: Batch, shapes: Sequence[Sequence[int]], pad_id: int, label: str, ignored: int
) -> Batch:
    """The batch with its ``tensor_fields`` padded to these shapes of a row, as ``merge`` pads them.

    Only a batch that ``has_mask`` may be.
    """
    count = rows(batch)
    named = zip(_names(batch, count), leaves(batch, count), strict=True)
    names = [name for name, leaf in named if _is_field(leaf, count)]
    padded = [
        _pad(tensor, shape, _padding(name, pad_id, label, ignored))
        for name, tensor, shape in zip(names, tensor_fields(batch), shapes, strict=True)
    ]
    return replaced(batch, padded)


def has_mask(batch: Batch) -> bool:
    """Whether padding can be told from text."""
    return isinstance(batch, Mapping) and "attention_mask" in batch


def merge(
    batches: Sequence[Batch], pad_id: int = 0, label: str = "labels", ignored: int = IGNORED
) -> Batch:
    """One batch of all rows, in order; leaves that are no fields come from the last batch.

    Rows of different lengths are padded on the right to the longest: ids with ``pad_id``, the field
    ``label`` and any other whose name says label with ``ignored``, everything else with 0. That needs an
    ``attention_mask`` in the batch, or the padding would be read as text: BatchError otherwise, and
    where batches differ in structure.
    """
    if len(batches) == 1:
        return batches[0]
    counts = [rows(batch) for batch in batches]
    names = [_names(batch, count) for batch, count in zip(batches, counts, strict=True)]
    if any(each != names[0] for each in names):
        raise BatchError(
            f"batches of one pool differ in structure ({[len(each) for each in names]} leaves, "
            f"{sorted(set(names[0]) ^ set(names[-1]))} not in all); every batch of the inner loader "
            f"needs the same fields in the same order"
        )
    flat = [list(leaves(batch, count)) for batch, count in zip(batches, counts, strict=True)]
    masked = has_mask(batches[0])
    merged = iter(
        [
            _concatenate(
                list(column), counts, name, masked, _padding(name, pad_id, label, ignored)
            )
            for name, column in zip(names[0], zip(*flat, strict=True), strict=True)
        ]
    )
    return _map(batches[-1], lambda _: next(merged), counts[-1])


def _padding(name: str, pad_id: int, label: str, ignored: int) -> int:
    if "label" in name or name == label:
        return ignored
    return pad_id if name == "input_ids" else 0


def merge_labels(labels: Sequence[Tensor | None]) -> Tensor | None:
    """The labels of merged rows, [P] or [P, T], padded with -100; None if unknown."""
    found = [each for each in labels if each is not None]
    if not found or len(found) == 1:
        return found[0] if found else None
    length = max(each.shape[-1] for each in found)
    if found[0].ndim == 2:
        found = [
            torch.nn.functional.pad(e, (0, length - e.shape[-1]), value=IGNORED) for e in found
        ]
    return torch.cat(found)


def _concatenate(
    column: list[Any], counts: list[int], name: str, masked: bool, padding: int
) -> Any:
    if not all(_is_field(leaf, count) for leaf, count in zip(column, counts, strict=True)):
        return column[-1]
    if isinstance(column[0], (list, tuple)):
        return type(column[0])(entry for leaf in column for entry in leaf)
    if isinstance(column[0], np.ndarray):
        return np.concatenate(column)
    if len({leaf.shape[1:] for leaf in column}) > 1:
        if not masked:
            raise BatchError(
                f"rows of different shapes {[tuple(leaf.shape[1:]) for leaf in column]} in field "
                f"{name!r} and no attention_mask to tell padding from text; pad to one length in "
                f'collate_fn, or use pool="split", which never mixes inner batches'
            )
        shape = [max(sizes) for sizes in zip(*(leaf.shape[1:] for leaf in column), strict=True)]
        column = [_pad(leaf, shape, padding) for leaf in column]
    return torch.cat(column)


def _pad(tensor: Tensor, shape: Sequence[int], value: int) -> Tensor:
    # torch pads from the last dimension backwards: (0, missing) for each
    missing = [
        amount
        for have, want in zip(reversed(tensor.shape[1:]), reversed(shape), strict=True)
        for amount in (0, want - have)
    ]
    return torch.nn.functional.pad(tensor, missing, value=value)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray))


def _is_field(leaf: Any, count: int) -> bool:
    if _is_array(leaf):
        return bool(leaf.ndim > 0 and leaf.shape[0] == count)
    return isinstance(leaf, (list, tuple)) and len(leaf) == count


def _take(leaf: Any, index: Tensor) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, index.to(leaf.device, non_blocking=True))
    if isinstance(leaf, np.ndarray):
        return leaf[index.cpu().numpy()]
    return type(leaf)(leaf[position] for position in index.tolist())


def _children(batch: Batch, count: int | None = None) -> Sequence[Any] | None:
    # The parts of a container, None for a leaf. A list without any tensor is a leaf, and so is one of
    # ``count`` entries that do not all hold ``count`` rows: one entry per sample.
    if _is_array(batch):
        return None  # the rule, so asked first
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (tuple, list)):
        if hasattr(batch, "_fields"):
            return batch
        if not any(holds_tensor(child) for child in batch):
            return None
        fields = [each for each in batch if holds_tensor(each)]
        per_sample = len(batch) == count and not all(
            count in _sizes(each, True) for each in fields
        )
        return None if per_sample else batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return None


def holds_tensor(batch: Batch) -> bool:
    """Whether there is a tensor or an array anywhere in it."""
    if _is_array(batch):
        return True
    return any(holds_tensor(child) for child in _children(batch) or ())


def _names(batch: Batch, count: int, name: str = "") -> list[str]:
    # The innermost key or index above every leaf, in the order of `leaves`.
    children = _children(batch, count)
    if children is None:
        return [name]
    if isinstance(batch, Mapping):
        keys = [str(key) for key in batch]
    elif dataclasses.is_dataclass(batch):
        keys = [field.name for field in dataclasses.fields(batch)]
    else:
        keys = [str(number) for number in range(len(children))]
    pairs = zip(keys, children, strict=True)
    return [leaf for key, child in pairs for leaf in _names(child, count, key)]


def _map(batch: Batch, change: Callable[[Any], Any], count: int | None = None) -> Batch:
    children = _children(batch, count)
    if children is None:
        return change(batch)
    changed = [_map(child, change, count) for child in children]
    if isinstance(batch, MutableMapping):
        out = copy.copy(batch)  # keeps the type: BatchEncoding, defaultdict, OrderedDict
        for key, value in zip(list(batch), changed, strict=True):
            out[key] = value
        return out
    if isinstance(batch, Mapping):
        return dict(zip(batch, changed, strict=True))
    if isinstance(batch, (tuple, list)):
        return type(batch)(*changed) if hasattr(batch, "_fields") else type(batch)(changed)
    out = copy.copy(batch)
    for field, value in zip(dataclasses.fields(batch), changed, strict=True):
        object.__setattr__(out, field.name, value)  # frozen dataclasses too
    return out
