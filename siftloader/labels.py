"""Where the labels of a batch are, and how a model reads them.

Letters: P samples, T positions.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from siftloader.batches import IGNORED, Batch, holds_tensor, leaves


Labels: TypeAlias = str | Callable[[Batch], Tensor]


def find_labels(batch: Batch, name: str) -> Tensor | None:
    """The field ``name`` of a batch, else the last of the arguments in a tuple, None where that is no tensor."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch.get(name)
    elif hasattr(batch, name):
        found = getattr(batch, name)
    elif isinstance(batch, (tuple, list)) and len(given := arguments(batch)) > 1:
        found = given[-1]
    return found if isinstance(found, Tensor) else None


def arguments(batch: Sequence[Any]) -> Sequence[Any]:
    """The elements of a tuple without those at its end that hold no tensor, which no model is given.

    arguments((x, y, {"row_group": 7})) == (x, y): some loaders tell there where to resume from, or names.
    """
    count = len(batch)
    while count > 1 and not holds_tensor(batch[count - 1]):
        count -= 1
    return batch[:count]


def without_padding(labels: Tensor, batch: Batch) -> Tensor:
    """The labels where the ``attention_mask`` of the batch, if it has one, is not 0; -100 elsewhere."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return labels if mask is None else labels.masked_fill(mask.to(labels.device) == 0, IGNORED)


def is_causal(model: nn.Module) -> bool | None:
    """Whether the label at t + 1 belongs to the prediction at t; None where nothing tells.

    Hugging Face names the loss on the model, or the task in a class it inherits from.
    """
    names = [kind.__name__ for kind in type(model).__mro__]
    loss = getattr(model, "loss_type", None)
    if isinstance(loss, str) and loss.startswith("For"):
        names = [loss]
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")) for name in names):
        return True
    told = (name for name in names if "ForConditionalGeneration" not in name)
    return False if any(re.search("For[A-Z]", name) for name in told) else None


def skips_padding(model: nn.Module) -> bool:
    """Whether the model's loss leaves out positions without attention, whatever their labels.

    Replaced-token detection (ELECTRA) labels every position.
    """
    return any(
        kind.__name__.startswith("Electra") and kind.__name__.endswith("ForPreTraining")
        for kind in type(model).__mro__
    )


def with_labels(batch: Batch, name: str, labels: Tensor) -> Batch | None:
    """The batch with other labels, where ``find_labels`` finds them; None where it finds none."""
    if find_labels(batch, name) is None:
        return None
    if isinstance(batch, MutableMapping):
        out = copy.copy(batch)
        out[name] = labels
        return out
    if hasattr(batch, "_fields") and hasattr(batch, name):
        return batch._replace(**{name: labels})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{name: labels})
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        last = len(arguments(batch)) - 1
        return type(batch)([*batch[:last], labels, *batch[last + 1 :]])
    return None


def are_inputs(labels: Tensor, batch: Batch, name: str) -> bool:
    """Whether labels [P, T], where there are any, are the ids of some other field of the batch."""
    if labels.ndim != 2 or labels.is_floating_point():
        return False
    if isinstance(batch, Mapping):
        batch = [value for key, value in batch.items() if key != name]
    elif isinstance(batch, (tuple, list)) and len(given := arguments(batch)) > 1:
        batch = given[:-1]
    wanted = labels != IGNORED
    return bool(wanted.any()) and any(
        isinstance(ids, Tensor)
        and ids.shape == labels.shape
        and not ids.is_floating_point()
        and bool(((labels == ids.to(labels.device)) | ~wanted).all())
        for ids in leaves(batch)
    )
