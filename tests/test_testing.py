"""What assert_resumes_exactly accepts, and each bug that it must name: pytest tests/test_testing.py"""

from __future__ import annotations

import collections
import copy
import importlib.metadata
import random
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from effort import FACTOR
from models import classifier
from test_loader import DEMO, Rows, make, planted
from test_tars import numbered as tars
from torch.utils.data import DistributedSampler

from siftloader import SiftingDataLoader, TokenShards, World
from siftloader.tars import webdataset
from siftloader.testing import _difference, assert_resumes_exactly


SHARDS: dict[str, dict[str, Any]] = {
    "bare": {},
    "with ids": {"with_ids": True, "with_source": True},
    "clm": {"masking": None},
    "masked half": {"masking": 0.5},
    "validation": {"split": "val", "with_ids": True},
    "third of four ranks": {"world": World(2, 4)},
    "lanes, epochs of 700": {"lanes": 3, "epoch_samples": 700, "with_ids": True},
}


class Batches:
    """TokenShards in batches, as a loop without a DataLoader has them."""

    def __init__(self, n: int, **options: Any) -> None:
        self.shards, self.n = TokenShards(DEMO, verify=False, **options), n

    def __iter__(self) -> Iterator[Any]:
        return self.shards.batches(self.n)

    def state_dict(self) -> Any:
        return self.shards.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.shards.load_state_dict(state)


@pytest.mark.parametrize("options", SHARDS.values(), ids=SHARDS)
def test_shards_resume(options):
    assert_resumes_exactly(lambda: Batches(200, **options), epochs=3, positions=7)


def test_single_samples_resume():
    shards = {"world": World(1, 300), "with_ids": True}
    assert_resumes_exactly(lambda: TokenShards(DEMO, **shards), positions=None)
    assert_resumes_exactly(lambda: TokenShards(DEMO), batches=40, positions=8)


def test_announced_epochs_resume():
    assert_resumes_exactly(
        lambda: TokenShards(DEMO, world=World(1, 300)), positions=None, set_epoch=True
    )
    model = classifier()

    def distributed() -> SiftingDataLoader:
        sampler = DistributedSampler(Rows(64), num_replicas=2, rank=1)
        options = {"model": model, "score_fn": planted, "warmup_steps": 2}
        return SiftingDataLoader(Rows(64), 4, sampler=sampler, **options)

    assert_resumes_exactly(distributed, positions=None, set_epoch=True)


MODEL = classifier()
PLACES = 3 if FACTOR == 1 else 6  # of each epoch
SIFTING: dict[str, Callable[[], SiftingDataLoader]] = {
    "shards": lambda: over_shards(criterion="rarity", warmup_steps=3),
    "shards, pools cut anywhere": lambda: over_shards(
        criterion="rarity", keep=2 / 3, warmup_steps=2
    ),
    "shards, at random": lambda: over_shards(criterion="random", warmup_steps=0),
    "shards, through and through": lambda: over_shards(keep=1.0),
    "shards, cool-down": lambda: over_shards(
        criterion="rarity", warmup_steps=1, total_steps=9, cooldown_steps=4
    ),
    "map-style": lambda: make(Rows(40), 4, model=MODEL, warmup_steps=3),
    "map-style, shuffled": lambda: make(Rows(40), 4, True, model=MODEL, warmup_steps=3),
    "map-style, ragged": lambda: make(Rows(37), 4, True, model=MODEL, keep=2 / 3, warmup_steps=3),
    "split pools": lambda: make(Rows(40), 8, True, model=MODEL, pool="split", warmup_steps=2),
}


def over_shards(**options: Any) -> SiftingDataLoader:
    shards = TokenShards(DEMO, with_ids=True, verify=False)
    return SiftingDataLoader(shards, 128, model=MODEL, **options)


@pytest.mark.filterwarnings("ignore:the epoch ended inside")
@pytest.mark.parametrize("build", SIFTING.values(), ids=SIFTING)
def test_the_sifting_loader_resumes(build):
    assert_resumes_exactly(build, positions=PLACES)


def stateful(workers: int, dataset: Any, size: int, **options: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it calls a deprecated function of torch
        return torchdata.StatefulDataLoader(dataset, size, num_workers=workers, **options)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings(
    "ignore:.set_vital. is deprecated", "ignore:loader workers begin epoch"
)
def test_shards_in_torchdatas_loader_resume(workers):
    assert_resumes_exactly(
        lambda: stateful(workers, TokenShards(DEMO, world=World(2, 5)), 80), positions=6
    )


class Announced:
    """A loop that announces its epochs to the shards, as it must where workers read copies of them."""

    def __init__(self, workers: int, **options: Any) -> None:
        self.shards = TokenShards(DEMO, verify=False, with_ids=True, **options)
        self.loader = stateful(workers, self.shards, 80)
        self.set_epoch = self.shards.set_epoch
        self.state_dict, self.load_state_dict = (
            self.loader.state_dict,
            self.loader.load_state_dict,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_shards_in_torchdatas_loader_resume_in_later_epochs(workers):
    assert_resumes_exactly(
        lambda: Announced(workers, lanes=3, world=World(1, 5)),
        epochs=3,
        positions=6,
        set_epoch=True,
    )
    loader, firsts = Announced(workers, world=World(1, 5)), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        firsts += [next(iter(loader))["id"][0].item()]
    assert len(set(firsts)) == 3, "these were three epochs"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdatas_loader_inside_ours_resumes(workers):
    def wrapped() -> SiftingDataLoader:
        inner = stateful(workers, Rows(32), 4)
        return SiftingDataLoader.wrap(inner, model=MODEL, score_fn=planted, warmup_steps=2)

    assert_resumes_exactly(wrapped, positions=8)


@pytest.mark.parametrize("announced", [False, True])
def test_tars_of_others_resume(tmp_path, announced):
    pytest.importorskip("webdataset")
    urls = tars(tmp_path / "tars", [7, 5, 9, 3])
    assert_resumes_exactly(
        lambda: webdataset(urls, batch_size=4, seed=1), positions=None, set_epoch=announced
    )


def numbered() -> Any:
    nodes = pytest.importorskip("torchdata.nodes")
    return nodes.Loader(nodes.Batcher(nodes.IterableWrapper(range(20)), 3))


def test_torchdata_nodes_resume_in_an_epoch():
    assert_resumes_exactly(numbered, epochs=1, positions=None)


def test_a_bug_of_torchdata_nodes_is_found():
    """Restored at an epoch's end, it saves after the next batch what it looked ahead for: the old end."""
    if importlib.metadata.version("torchdata") != "0.11.0":
        pytest.skip("seen in torchdata 0.11.0")
    with pytest.raises(AssertionError, match="in a row, twice after batch 1 of epoch 1: batch 2"):
        assert_resumes_exactly(numbered, positions=None)


# The bugs. A stream of numbered batches that is right, and the same with one thing wrong.


class Stream:
    """Batches of 4 of 24 shuffled ids, masked with noise; order and noise are keyed by the epoch."""

    def __init__(self) -> None:
        self.epoch, self.handed, self.pending = 0, 0, True

    def __iter__(self) -> Iterator[Any]:
        if not self.pending:
            self.epoch, self.handed = self.epoch + 1, 0
        self.pending = False
        order = self.order()
        while self.handed < 6:
            rows = order[4 * self.handed : 4 * self.handed + 4]
            self.handed += 1
            yield {"id": torch.from_numpy(rows), "noise": self.noise(rows)}
        self.epoch, self.handed, self.pending = self.epoch + 1, 0, True

    def order(self) -> Any:
        return np.random.default_rng([7, self.epoch]).permutation(24)

    def noise(self, rows: Any) -> Any:
        return [np.random.default_rng([int(row), self.epoch]).random() for row in rows]

    def state_dict(self) -> Any:
        return {"epoch": self.epoch, "handed": self.handed}

    def load_state_dict(self, state: Any) -> None:
        self.epoch, self.handed, self.pending = state["epoch"], state["handed"], True


def test_the_stream_without_a_bug_passes():
    assert_resumes_exactly(Stream, epochs=3, positions=None)
    assert_resumes_exactly(Stream, batches=9)
    assert_resumes_exactly(Stream, positions=1)


class OneLate(Stream):
    """Saved before the batch is counted."""

    def state_dict(self):
        return {**super().state_dict(), "handed": max(self.handed - 1, 0)}


class OneEarly(Stream):
    """Counts a batch that is still to come."""

    def state_dict(self):
        return {**super().state_dict(), "handed": min(self.handed + (self.handed > 0), 6)}


class NoEpoch(Stream):
    def load_state_dict(self, state):
        super().load_state_dict({**state, "epoch": 0})


class NoPlace(Stream):
    """Begins the epoch again."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, "handed": 0})


class DrawnNoise(Stream):
    """Drawn from a generator of its own, one after the other."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def noise(self, rows):
        return self.generator.random(len(rows)).tolist()


class Ahead(Stream):
    """Reads two batches ahead, and its state counts what was read."""

    def __iter__(self):
        held = collections.deque()
        for batch in super().__iter__():
            held.append(batch)
            if len(held) == 3:
                yield held.popleft()
        yield from held


class Buffer(Stream):
    """Shuffles through a buffer of rows, filled anew by a restored one."""

    def __iter__(self):
        rng, buffer = random.Random(self.epoch), []
        for batch in super().__iter__():
            buffer.append(batch["id"])
            if len(buffer) > 3:
                yield buffer.pop(rng.randrange(len(buffer)))
        yield from buffer


class Longer(Stream):
    """A restored one hands out a batch more."""

    more = ()

    def __iter__(self):
        yield from super().__iter__()
        yield from self.more

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.more = ["more"]


class Shorter(Stream):
    """The last batches, read ahead, are dropped when the reader ends."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.restored = True

    def __iter__(self):
        for batch in super().__iter__():
            if not hasattr(self, "restored") or self.handed < 5:
                yield batch


class EmptyAfterTheEnd(Stream):
    """A state of the end of an epoch stands at its end, still."""

    def state_dict(self):
        state = super().state_dict()
        between = self.pending and not self.handed and self.epoch
        return {"epoch": self.epoch - 1, "handed": 6} if between else state


class Relative(Stream):
    """Counts from where it was restored: right once, wrong the second time."""

    base = 0

    def state_dict(self):
        return {"epoch": self.epoch, "handed": self.handed - self.base}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base = self.handed


class Moved(Stream):
    """Another state than that of an unbroken run, for the same place."""

    restored = 0

    def state_dict(self):
        return {**super().state_dict(), "restored": self.restored}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.restored = state["restored"] + 1


class Unseeded(Stream):
    def order(self):
        return np.random.default_rng().permutation(24)


class Swallowed(Stream):
    """Taking the state takes a batch."""

    def state_dict(self):
        self.handed += self.handed in (1, 2)
        return super().state_dict()


class Integers(Stream):
    """Keys that JSON turns into text, in a state that is no JSON."""

    def state_dict(self):
        return {0: self.epoch, 1: (self.handed,)}

    def load_state_dict(self, state):
        super().load_state_dict({"epoch": state[0], "handed": state[1][0]})


class Picky(Stream):
    def load_state_dict(self, state):
        if state["handed"] == 2:
            raise ValueError("not two")
        super().load_state_dict(state)


class Breaks(Stream):
    def order(self):
        if self.handed == 3:
            raise OSError("the disk is gone")
        return super().order()


BUGS: dict[type[Stream], str] = {
    OneLate: r"restored after batch 1 of epoch 0: batch 2 of epoch 0 differs .*: batch\['id'\]\[0\] is "
    r"\d+, not \d+ .* What came is batch 1 of epoch 0: 1 too few were skipped",
    OneEarly: r"restored after batch 1 of epoch 0: batch 2 of .* What came is batch 3 of epoch 0: 1 too "
    r"far. Does the state count batches that were read ahead",
    NoEpoch: r"restored after the end of epoch 0: batch 1 of epoch 1 differs .* What came is batch 1 of "
    r"epoch 0: is the epoch in the state\?",
    NoPlace: r"restored after batch 1 of epoch 0: batch 2 of .* batch 1 of epoch 0: 1 too few",
    DrawnNoise: r"restored after batch 1 of epoch 0: batch 2 of epoch 0 .*: batch\['noise'\]\[0\] is "
    r"[\d.]+, not [\d.]+. Equal: id. .* key it by seed, epoch and sample",
    Ahead: r"restored after batch 1 of epoch 0: batch 2 of .* batch 4 of epoch 0: 2 too far. Does the "
    r"state count batches that were read ahead",
    Buffer: r"restored after batch 1 of epoch 0: batch [23] of epoch 0 differs",
    Longer: r"restored before the first batch: a batch came where the end of epoch 0 should. No batch",
    Shorter: r"restored before the first batch: epoch 0 ended before batch 5 of epoch 0, 2 batches too "
    r"early. Does the state count batches that were read ahead",
    EmptyAfterTheEnd: r"restored after the end of epoch 0: epoch 1 is empty. A loop that counts",
    Relative: r"restored 4 times in a row, twice after batch 1 of epoch 0: batch 2 of epoch 0 differs .* "
    r"What came is batch 1 of epoch 0: 1 too few",
    Moved: r"restored before the first batch: every .* the state at batch 1 of epoch 0 is .*: "
    r"state\['restored'\] is 1, not 0.* uncompared=",
    Unseeded: r"a second loader.*: batch 1 of epoch 0 differs .* seed it",
    Swallowed: r"a second loader, .*: batch 2 of epoch 0 differs .* state_dict\(\) move",
    Picky: r"load_state_dict refused a state taken after batch 2 of epoch 0, after it went through "
    r"JSON: ValueError: not two",
    Breaks: r"restored after batch 3 of epoch 0: batch 4 of epoch 0 should have come, but the loader "
    r"raised OSError: the disk is gone",
}


@pytest.mark.parametrize("stream", BUGS, ids=lambda stream: stream.__name__)
def test_a_bug_is_found_and_its_place_named(stream):
    with pytest.raises(AssertionError, match=BUGS[stream]):
        assert_resumes_exactly(stream, positions=None)


def test_states_that_may_differ_are_named():
    assert_resumes_exactly(Moved, uncompared=["restored"])


def test_states_that_json_would_change_go_through_pickle():
    assert_resumes_exactly(Integers)


class Endless:
    """Never ends, and hands out one buffer again and again."""

    at = 0

    def __iter__(self):
        buffer = torch.zeros(3)
        while True:
            self.at += 1
            yield buffer.fill_(self.at)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_what_never_ends_is_checked_as_far_as_asked():
    assert_resumes_exactly(Endless, batches=30)


class Drawing(Stream):
    """From the global streams, which a checkpoint saves beside the loader."""

    def noise(self, rows):
        return torch.rand(1), np.random.random(), random.random()  # noqa: NPY002


def test_the_global_streams_are_restored_and_yours_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()  # noqa: NPY002
    assert_resumes_exactly(Drawing, positions=None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]  # noqa: NPY002


def test_nearly_equal_may_be_enough():
    class Rounded(Stream):
        jitter = 0.0

        def noise(self, rows):
            return torch.tensor(super().noise(rows)) + self.jitter

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.jitter = 1e-6

    def close(found, expected):
        return torch.equal(found["id"], expected["id"]) and torch.allclose(
            found["noise"], expected["noise"], atol=1e-4
        )

    with pytest.raises(AssertionError, match="Equal: id"):
        assert_resumes_exactly(Rounded)
    assert_resumes_exactly(Rounded, same=close)


def test_a_comparison_that_fails_on_other_shapes_does_not_hide_the_bug():
    class Ragged(OneEarly):
        def noise(self, rows):
            return torch.ones(4 + self.handed % 2)

    def close(found, expected):
        return torch.allclose(
            found["noise"] * found["id"][0], expected["noise"] * expected["id"][0]
        )

    with pytest.raises(AssertionError, match="restored after batch 1 of epoch 0: batch 2 of"):
        assert_resumes_exactly(Ragged, same=close, batches=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "at least 1 epoch"),
        ({"batches": 0}, "at least 1 epoch and 1 batch"),
        ({"positions": 0}, "positions must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        assert_resumes_exactly(Stream, **options)


def test_a_loader_without_batches_proves_nothing():
    class Empty(Stream):
        def __iter__(self):
            yield from ()

    with pytest.raises(AssertionError, match="no batch in 2 epochs"):
        assert_resumes_exactly(Empty)


def test_a_long_loader_costs_a_few_runs():
    class Long(Stream):
        drawn = 0

        def __iter__(self):
            for batch in range(self.handed, 2000):
                self.handed = batch + 1
                Long.drawn += 1
                yield batch
            self.handed, self.pending = 0, True

    assert_resumes_exactly(Long, epochs=1)
    assert Long.drawn < 18 * 2000


@dataclass
class Made:
    x: Any


Pair = collections.namedtuple("Pair", "a b")
NAN = float("nan")
SAME = [
    torch.tensor([1.0, NAN]),
    torch.zeros(0, 3),
    torch.tensor(3, dtype=torch.bfloat16),
    torch.ones(2, 3).T,
    torch.tensor([True, False]),
    torch.eye(2).to_sparse(),
    np.array([NAN, -0.0]),
    np.array(["a", "bc"]),
    np.array([None, "x"], object),
    np.zeros((2, 0)),
    [1, (2, {"x": NAN})],
    Made(torch.ones(2)),
    Pair(1, "b"),
    None,
    b"bytes",
    {1, 2},
]


@pytest.mark.parametrize("value", SAME, ids=repr)
def test_a_value_is_itself(value):
    assert _difference(copy.deepcopy(value), value) is None


DIFFERENT = [
    (torch.tensor([1, 2]), torch.tensor([1, 3]), r"x\[1\] is 2, not 3 \(1 of 2"),
    (torch.zeros(2, 3), torch.eye(2, 3), r"x\[0, 0\] is 0.0, not 1.0 \(2 of 6"),
    (torch.tensor(0.0), torch.tensor(-0.0), r"x is 0.0, not -0.0$"),
    (torch.zeros(2), torch.zeros(3), r"\[2\], not .*\[3\]"),
    (torch.zeros(2), torch.zeros(2).double(), r"float32 \[2\], not torch.float64"),
    (torch.zeros(2), np.zeros(2), "Tensor, not .* ndarray"),
    (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), r"x\[0\] is 0.0"),
    (np.array([[1, 2]]), np.array([[1, 3]]), r"x\[0, 1\] is 2, not 3"),
    (np.array(["a"]), np.array(["b"]), "'a', not 'b'"),
    (np.zeros(1, "<i4"), np.zeros(1, "<i8"), "int32 .* int64"),
    ({"a": 1}, {"b": 1}, r"has the fields \['a'\], not \['b'\]"),
    ({"a": [1, 2]}, {"a": [1, 3]}, r"x\['a'\]\[1\] is 2, not 3"),
    ([1], [1, 2], "has 1 entries, not 2"),
    (Made(1), Made(2), r"x\.x is 1, not 2"),
    (Pair(1, 2), (1, 2), "Pair, not .* tuple"),
    (True, 1, "bool, not 1 of type int"),
    (0.0, -0.0, "0.0, not -0.0"),
    ("a" * 99, "b", r"aaa\.\.\., not 'b'"),
    (None, 0, "NoneType"),
]


@pytest.mark.parametrize(("found", "expected", "message"), DIFFERENT)
def test_a_difference_is_located(found, expected, message):
    assert re.search(message, _difference(found, expected, "x"))


@pytest.mark.slow
def test_the_check_needs_no_pytest():
    code = """
        import sys
        from siftloader import TokenShards
        from siftloader.testing import assert_resumes_exactly
        assert_resumes_exactly(lambda: TokenShards("shards/demo"), batches=5)
        assert not {"pytest", "hypothesis", "torchdata"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
