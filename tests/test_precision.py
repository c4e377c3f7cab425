"""Who learns in which precision the loop trains, and what that leaves behind: pytest tests/test_precision.py"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from models import classifier
from test_loader import Rows, make
from torch import nn

from siftloader.precision import Precision


CPU = torch.device("cpu")
X = torch.zeros(2, 8)


def hooks(model: nn.Module) -> int:
    return len(model._forward_pre_hooks)


def in_bfloat16(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(X)


def first_of(loader) -> None:
    next(iter(loader))


def broken_off(loader) -> None:
    for _ in loader:
        break


def failing(loader) -> None:
    with pytest.raises(RuntimeError, match="of the loop"):
        for _ in loader:
            raise RuntimeError("of the loop")


def closed(loader) -> None:
    source = iter(loader)
    next(source)
    source.close()


def dropped_in_a_cycle(loader) -> None:
    cycle = [iter(loader)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()


def unreadable(loader) -> None:
    class Failing(Rows):
        def __getitem__(self, index):
            if index >= 8:
                raise OSError("of the disk")
            return super().__getitem__(index)

    source = iter(make(Failing(64), 4, model=loader._scorer.model))
    next(source)
    with pytest.raises(OSError, match="of the disk"):
        next(source)


def two_at_once(loader) -> None:
    older, newer = iter(loader), iter(loader)
    next(newer)
    with pytest.warns(UserWarning, match="another iterator of this loader was begun"):
        next(older)
    older.close()


def to_the_end(loader) -> None:
    for _ in loader:
        pass


LEFT = [
    first_of,
    broken_off,
    failing,
    closed,
    dropped_in_a_cycle,
    unreadable,
    two_at_once,
    to_the_end,
]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("leave", LEFT)
@pytest.mark.filterwarnings("ignore:the epoch ended inside")
def test_however_an_iterator_is_left_no_hook_stays(leave, warmup):
    model = classifier()
    leave(make(Rows(64), 4, model=model, warmup_steps=warmup))
    if leave is dropped_in_a_cycle:
        model.eval()(X)  # the collector itself takes none off
    assert hooks(model) == 0
    pickle.dumps(model)


@pytest.mark.parametrize("held", [True, False], ids=["the loader lives", "all goes"])
def test_an_iterator_that_is_collected_while_somebody_walks_the_hooks_does_no_harm(held):
    """As torch does in every forward, and whoever copies the model."""

    class Hook:
        def __call__(self, *_):
            pass

        def __deepcopy__(self, memo):
            gc.collect()
            return self

    model = classifier()
    for _ in range(3):
        model.register_forward_pre_hook(Hook())
    loaders = [make(Rows(64), 4, model=model)]
    cycle = [iter(loaders[0])]
    next(cycle[0])
    cycle.append(cycle)
    gone = weakref.ref(cycle[0])
    gc.disable()
    try:
        if not held:
            loaders.clear()
        del cycle
        copied = copy.deepcopy(model)
    finally:
        gc.enable()
    assert gone() is None
    in_bfloat16(model)
    assert hooks(model) == 3
    copied(X)
    for loader in loaders:
        assert loader.state_dict()["precision"] is None, "no batch was out"


def test_the_hook_is_there_while_a_batch_is_out_and_until_a_forward_in_training_mode():
    model = classifier()
    loader = make(Rows(64), 4, model=model)
    source = iter(loader)
    assert hooks(model) == 0
    next(source)
    assert hooks(model) == 1
    model.eval()
    in_bfloat16(model)
    assert hooks(model) == 1 and loader.state_dict()["precision"] is None
    model.train()
    in_bfloat16(model)
    assert hooks(model) == 0 and loader.state_dict()["precision"] == "bfloat16"
    next(source)
    assert hooks(model) == 0


def test_the_loops_own_precision_is_learned_too_and_asked_for_once():
    model = classifier()
    loader = make(Rows(64), 4, model=model)
    source = iter(loader)
    next(source)
    model(X)
    next(source)
    assert hooks(model) == 0 and loader.state_dict()["precision"] is None


def test_nothing_is_learned_while_no_batch_is_out():
    model = classifier()
    loader = make(Rows(64), 4, model=model)
    in_bfloat16(model)
    source = iter(loader)
    in_bfloat16(model)
    assert loader.state_dict()["precision"] is None
    next(source)
    source.close()
    in_bfloat16(model)
    assert loader.state_dict()["precision"] is None


def test_a_cool_down_has_nothing_to_score_and_watches_for_nothing():
    model = classifier()
    loader = make(Rows(64), 4, model=model, total_steps=3, cooldown_steps=1)
    source = iter(loader)
    seen = [hooks(model) for _ in range(3) if next(source)]
    assert seen == [1, 0, 0]


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copied, pickled, saved])
def test_a_copy_of_a_watched_model_tells_nobody_and_holds_nobody(way):
    model = classifier()
    precision = Precision()
    precision.watch(model, CPU)
    twice = way(way(model))
    in_bfloat16(twice)
    assert precision.name is None and hooks(model) == 1
    with torch.no_grad():
        assert torch.equal(twice.eval()(X), copied(model).eval()(X))
    in_bfloat16(model)
    assert precision.name == "bfloat16" and hooks(model) == 0
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_hook_whose_loader_is_gone_does_nothing():
    model = classifier()
    Precision().watch(model, CPU)
    in_bfloat16(model)


def test_a_module_that_shares_the_models_hooks_is_not_the_model():
    model = classifier()
    precision = Precision()
    precision.watch(model, CPU)
    in_bfloat16(copy.copy(model))
    assert precision.name is None and hooks(model) == 1
