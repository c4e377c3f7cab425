"""Models that lie on several ranks: FSDP, DDP, tensor parallel. Real processes over gloo, which run this very file.

pytest tests/test_sharded.py; those on four ranks: pytest tests/test_sharded.py -m slow
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import siftloader.twin
from siftloader import (
    EarlyExit,
    ExitHead,
    Random,
    RankSample,
    RanksDisagree,
    ScoringError,
    Sifter,
    SiftingDataLoader,
)


WORDS, WIDTH, LENGTH, STEPS = 50, 16, 12, 5
PATIENCE = 100  # seconds for a collective
Batch = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(x))))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Net(nn.Module):
    """Shaped like those of transformers: its head can be run at single positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Body(), nn.Linear(WIDTH, WORDS, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(input_ids))
        if labels is None:
            return {"logits": logits}
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return {"logits": logits, "loss": loss}


class Dropping(Net):
    """Its loss sees labelled positions only: samples are scored one at a time."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(input_ids))
        if labels is None:
            return {}
        wanted = labels != -100
        return {"loss": functional.cross_entropy(logits[wanted], labels[wanted])}


def sharded(
    net: nn.Module, wrap: Callable[[nn.Module], nn.Module] | None = None, **options: Any
) -> Any:
    """FSDP2 as its tutorial has it: every block, then the rest."""
    layers = net.get_submodule("body.layers")
    for name, layer in list(layers.named_children()):
        if wrap is not None:
            layer = wrap(layer)
            setattr(layers, name, layer)
        fully_shard(layer, **options)
    fully_shard(net, **options)
    return net


def pool_of(seed: int, rows: int = 8) -> Batch:
    drawn = torch.Generator().manual_seed(
        1000 * seed + (dist.get_rank() if dist.is_initialized() else 0)
    )
    ids = torch.randint(0, WORDS, (rows, LENGTH), generator=drawn)
    labels = torch.where(torch.rand(ids.shape, generator=drawn) < 0.5, ids, -100)
    labels[:, 0] = ids[:, 0]
    return {"input_ids": ids, "labels": labels}


def full_copy(net: nn.Module) -> Net:
    """The same weights in one piece, by torch's own means."""
    found = type(net).__mro__[2]() if isinstance(net, FSDPModule) else Net()
    found.load_state_dict(
        {
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): (
                value.full_tensor() if isinstance(value, DTensor) else value
            )
            for name, value in net.state_dict().items()
        }
    )
    return found.train()


def reference(net: Net, batch: Batch, layer: int | str = 1) -> Tensor:
    """The mean loss of every sample, written out."""
    logits, labels = EarlyExit(net, layer).logits(batch), batch["labels"]
    losses = functional.cross_entropy(logits.float().movedim(-1, 1), labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def assert_right(net: nn.Module, layer: int | str = 1, seed: int = 1, **options: Any) -> Tensor:
    batch = pool_of(seed)
    found = Sifter(net, exit_layer=layer, **options).score(batch)
    torch.testing.assert_close(
        found, reference(full_copy(net), batch, layer), rtol=1e-5, atol=1e-6
    )
    return found


class Collectives(TorchDispatchMode):
    """The names of all collectives of this rank, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """A handful of positions at a time."""
    usual = siftloader.twin.CHUNK_ELEMENTS
    siftloader.twin.CHUNK_ELEMENTS = 4 * WORDS
    try:
        yield
    finally:
        siftloader.twin.CHUNK_ELEMENTS = usual


def gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


# --- what the ranks run: every function is a claim ---


def scores_are_those_of_the_unsharded_model() -> None:
    net = sharded(Net())
    for layer in (1, 2, "full"):
        assert_right(net, layer)  # also before the first training forward
    net(**pool_of(2))["loss"].backward()
    torch.optim.SGD(net.parameters(), 0.5).step()
    assert_right(net, seed=3)


def scores_are_cast_as_the_policy_says() -> None:
    net: Any = Net()
    for layer in net.body.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    fully_shard(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32))
    batch = pool_of(1)
    low = full_copy(net).bfloat16()
    assert torch.equal(EarlyExit(net).logits(batch), EarlyExit(low).logits(batch).float())
    assert torch.equal(Sifter(net).score(batch), Sifter(low).score(batch))
    # Inputs and outputs of a part are cast, too; the whole of it is the model's own forward.
    part: Any = Net().eval()
    for layer in part.body.layers:
        fully_shard(
            layer, mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)
        )
    found = EarlyExit(part, "full").logits(batch)
    with torch.no_grad():
        assert torch.equal(found, part(batch["input_ids"])["logits"])


def checkpointed_and_compiled_blocks_are_scored() -> None:
    for kind in (CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT):
        net = sharded(Net(), lambda layer: checkpoint_wrapper(layer, checkpoint_impl=kind))  # noqa: B023
        net(**pool_of(2))["loss"].backward()
        assert_right(net)
    net = Net()
    for layer in net.body.layers:
        checkpoint(layer)  # as torchtitan's predecessors had it: by hooks
    sharded(net)
    net(**pool_of(2))["loss"].backward()
    assert_right(net)
    net = Net()
    for layer in net.body.layers:
        layer.compile(backend="eager")
    sharded(net)
    net(**pool_of(2))["loss"].backward()
    assert_right(net)
    compiled: Any = torch.compile(sharded(Net()), backend="eager")
    compiled(**pool_of(2))["loss"].backward()
    assert torch.equal(Sifter(compiled).score(pool_of(1)), assert_right(compiled._orig_mod))


def a_mesh_of_copies_and_a_bare_root_are_scored() -> None:
    assert_right(
        sharded(Net(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts")))
    )
    assert_right(
        sharded(Net(), mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts")))
    )
    net = Net()
    for layer in net.body.layers:
        fully_shard(layer)
    assert_right(net)


class Encoding(Net):
    """Calls a part of it by another method than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body.encode = MethodType(Body.forward, self.body)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.body.encode(input_ids)  # type: ignore[operator]
        return {"logits": self.head(hidden)}


def methods_that_fsdp_knows_as_forward_are_scored() -> None:
    batch = pool_of(1)
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16)):
        net: Any = Encoding().eval()
        fully_shard(net.body, mp_policy=policy)
        register_fsdp_forward_method(net.body, "encode")
        fully_shard(net, mp_policy=policy)
        found = EarlyExit(net, "full").logits(batch)
        with torch.no_grad():
            assert torch.equal(found, net(batch["input_ids"])["logits"])
        assert net(batch["input_ids"])["logits"].requires_grad


def a_model_that_is_sharded_after_the_loader_was_built_is_scored() -> None:
    net = Net()
    sifter, batch = Sifter(net), pool_of(1)
    before = sifter.score(batch)
    sharded(net)
    torch.testing.assert_close(sifter.score(batch), before)


def scoring_leaves_weights_as_it_found_them() -> None:
    net = sharded(Net())
    sifter = Sifter(net)
    sifter.score(pool_of(1))
    assert all(isinstance(each, DTensor) for each in net.parameters())
    loss = net(**pool_of(2))["loss"]
    kept = [name for name, each in net.named_parameters() if not isinstance(each, DTensor)]
    assert kept, "the root keeps its weights for the backward pass"
    sifter.score(pool_of(1))
    assert kept == [n for n, each in net.named_parameters() if not isinstance(each, DTensor)]
    loss.backward()
    bad = {"input_ids": torch.full((8, LENGTH), WORDS + 1), "labels": torch.ones(8, LENGTH).long()}
    with pytest.raises(IndexError):
        sifter.score(bad)
    assert all(isinstance(each, DTensor) for each in net.parameters())
    assert_right(net)


def collectives_do_not_depend_on_the_data() -> None:
    rank = dist.get_rank()
    for build, group_head in ((Net, False), (Net, True), (Dropping, True)):
        net = build()
        for layer in net.body.layers:
            fully_shard(layer)
        if group_head:  # as torchtitan has it
            fully_shard([net.body.norm, net.head])
        fully_shard(net)
        sifter = Sifter(net, shift_labels=False)
        for step in range(4):
            batch = pool_of(step)
            batch["labels"] = batch["input_ids"].clone()
            if rank == 0:
                batch["labels"][:] = -100
                batch["labels"][3, 1 : step + 1] = 3  # none at all in the first pool
            with small_chunks(), Collectives() as seen, quiet():
                scores = sifter.score(batch)
            assert int(scores.isfinite().sum()) == (min(1, step) if rank == 0 else 8)
            one, other = gather(seen.names)
            assert one == other == ["c10d::_allgather_base_"] * (2 + group_head)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rows(count: int) -> list[Batch]:
    drawn = torch.Generator().manual_seed(5)
    ids = torch.randint(0, WORDS, (count, LENGTH), generator=drawn)
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def train(model: Any, source: Iterable[Batch], window: str, accumulate: int) -> list[float]:
    """A training loop; ``window`` says where the next batch is drawn."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    batches = iter(source)
    batch, losses = next(batches), []
    torch.manual_seed(100 + dist.get_rank())
    for step in range(1, STEPS + 1):
        synced = step % accumulate == 0
        with syncing(model, synced):
            loss = model(**batch)["loss"]
            if window == "between forward and backward":
                batch = next(batches)
            loss.backward()
        losses.append(loss.item())
        if window == "before the step":
            batch = next(batches)
        if synced:
            optimizer.step()
            optimizer.zero_grad()
        if window == "after the step":
            batch = next(batches)
    return losses


def syncing(model: Any, synced: bool) -> AbstractContextManager[None]:
    if not isinstance(model, FSDPModule):
        return nullcontext() if synced else model.no_sync()
    model.set_requires_gradient_sync(synced)
    return nullcontext()


def ahead(net: Any) -> Any:
    """Every block asks for the next one's weights before it runs."""
    layers = list(net.body.layers)
    for one, other in itertools.pairwise(layers):
        one.set_modules_to_forward_prefetch([other])
    return net


def training_is_bit_for_bit_that_of_a_plain_loader(build: Callable[[], Any]) -> None:
    windows = ("after the step", "between forward and backward", "before the step")
    for layer, window, accumulate in (
        *((1, each, 1) for each in windows),
        (2, "before the step", 2),
    ):
        model, kept = build(), []
        data = rows(2 * 2 * 4 * (STEPS + 1))
        sampler = DistributedSampler(data, shuffle=True, seed=3)  # type: ignore[arg-type]
        loader = SiftingDataLoader(
            data, 4, sampler=sampler, model=model, exit_layer=layer, warmup_steps=1, audit_every=1
        )

        def watched(loader: Any = loader, kept: list[Batch] = kept) -> Iterator[Batch]:
            for batch in loader:
                kept.append(copy.deepcopy(batch))
                yield batch

        sifted = train(model, watched(), window, accumulate)
        assert loader.stats["candidates"] == 8 * STEPS
        audits = [{**each, "scoring_cost": None} for each in loader.audits]
        one, other = gather(audits)
        assert one == other and [each["rows"] for each in one] == [2 * 8] * STEPS
        assert (
            len(
                {
                    tuple(row)
                    for each in gather(kept)
                    for b in each
                    for row in b["input_ids"].tolist()
                }
            )
            == 48
        )
        plain = train(build(), DataLoader(kept, batch_size=None), window, accumulate)  # type: ignore[arg-type]
        assert sifted == plain, (layer, window, accumulate)


def training_with_fsdp2_is_that_of_a_plain_loader() -> None:
    training_is_bit_for_bit_that_of_a_plain_loader(lambda: ahead(sharded(Net())))


def training_with_ddp_is_that_of_a_plain_loader() -> None:
    training_is_bit_for_bit_that_of_a_plain_loader(lambda: DistributedDataParallel(Net()))


def ddp_is_scored_without_collectives() -> None:
    model = DistributedDataParallel(Net())
    if dist.get_rank() == 0:
        with Collectives() as seen:
            assert_right(model.module)
            Sifter(model).score(pool_of(1))
        assert seen.names == []


def flat(by_block: bool = True, low: bool = False, use_orig_params: bool = True) -> Any:
    """FSDP1."""
    return FullyShardedDataParallel(
        Net(),
        auto_wrap_policy=ModuleWrapPolicy({Block}) if by_block else None,
        mixed_precision=MixedPrecision(torch.bfloat16) if low else None,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def fsdp1_is_scored_through_its_root() -> None:
    batch, whole = pool_of(1), Net()
    for by_block, low, use_orig_params in (
        (True, False, True),
        (True, True, False),
        (False, False, True),
        (True, False, False),
    ):
        model = flat(by_block, low, use_orig_params)
        expected, sifter, early = reference(whole, batch), Sifter(model), EarlyExit(model)
        for _ in range(2):  # also after the first training forward
            torch.testing.assert_close(early.logits(batch), EarlyExit(whole).logits(batch))
            with small_chunks(), Collectives() as seen:
                torch.testing.assert_close(sifter.score(batch), expected, rtol=1e-5, atol=1e-6)
            one, other = gather(seen.names)
            assert one == other
            model(**batch)["loss"].backward()
        inner = model.module
        with pytest.raises(
            ScoringError, match=r"FullyShardedDataParallel around it.*attach_model\(wrapped\)"
        ):
            Sifter(inner, exit_layer="full").score(batch)
        sifter = Sifter(inner, exit_layer="full")
        sifter.attach_model(model)
        torch.testing.assert_close(
            sifter.score(batch), reference(whole, batch, "full"), rtol=1e-5, atol=1e-6
        )


def training_with_fsdp1_is_that_of_a_plain_loader() -> None:
    training_is_bit_for_bit_that_of_a_plain_loader(flat)


def split(net: Any, mesh: Any, logits: str = "whole") -> Any:
    """Tensor parallel, as its tutorial has it; the logits may stay in parts, one on each rank."""
    plan: dict[str, Any] = {"body.embed": RowwiseParallel(input_layouts=Replicate())}
    for number in range(len(net.body.layers)):
        plan[f"body.layers.{number}.up"] = ColwiseParallel()
        plan[f"body.layers.{number}.down"] = RowwiseParallel()
    plan["head"] = (
        ColwiseParallel(output_layouts=Replicate())
        if logits == "whole"
        else ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    )
    return parallelize_module(net, mesh, plan)


def same_pool(seed: int) -> Batch:
    batch = pool_of(seed)
    dist.broadcast(batch["input_ids"], 0)
    dist.broadcast(batch["labels"], 0)
    return batch


def tensor_parallel_members_get_identical_scores() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    batch = same_pool(1)
    for logits in ("whole", "parts"):
        net = split(Net(), mesh, logits)
        expected = reference(full_copy(net), batch)
        with loss_parallel() if logits == "parts" else nullcontext(), small_chunks(), quiet():
            found = Sifter(net).score(batch)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert len({tuple(each) for each in gather(found.tolist())}) == 1
            torch.testing.assert_close(
                EarlyExit(net).logits(batch), EarlyExit(full_copy(net)).logits(batch)
            )


def tensor_parallel_members_train_on_the_same_samples() -> None:
    net = split(Net(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    batch = same_pool(1)
    for options in (
        {"criterion": "entropy"},
        {"criterion": Random(3)},
        {"selection": RankSample()},
    ):
        kept = Sifter(net, **options)(batch)["input_ids"]  # type: ignore[arg-type]
        one, other = gather(kept)
        assert torch.equal(one, other), options


def tensor_parallel_members_with_other_candidates_are_refused() -> None:
    net = split(Net(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    for criterion in ("loss", "random"):
        with pytest.raises(
            ScoringError, match=r'ranks 0, 1 hold one replica.*mesh\["dp"\].get_local_rank'
        ):
            Sifter(net, criterion=Random(1) if criterion == "random" else "loss").score(pool_of(1))


def tensor_parallel_loaders_read_by_replica() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    net, data = split(Net(), mesh["tp"]), rows(48)
    dealt = {"num_replicas": mesh["dp"].size(), "rank": mesh["dp"].get_local_rank()}
    for options, alike in ((dealt, True), ({}, False)):
        sampler: Any = DistributedSampler(data, **options)  # type: ignore[arg-type]
        loader = SiftingDataLoader(data, 4, sampler=sampler, model=net, warmup_steps=1)
        told = nullcontext() if alike else pytest.raises(ScoringError, match="hold one replica")
        with told:
            handed = [batch["input_ids"].tolist() for batch in loader]
    one, other = gather(handed)
    assert one == other
    assert len(one) == 7  # a batch of 4, five pools of 8, and one of the 4 that are left


class Holed(list[Batch]):
    """Rank 1 cannot read one of its samples as a model of these words."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if dist.get_rank() == 1 and index in (20, 21):
            return {**found, "input_ids": found["input_ids"] + WORDS}
        return found


def an_error_on_one_rank_stops_both() -> None:
    data = Holed(rows(48))
    sampler = DistributedSampler(data, shuffle=False)  # type: ignore[arg-type]
    net = sharded(Net())
    loader = SiftingDataLoader(data, 4, sampler=sampler, model=net, warmup_steps=0)
    expected = RanksDisagree if dist.get_rank() == 0 else IndexError
    began = time.perf_counter()
    with pytest.raises(expected):
        train(net, loader, "after the step", 1)
    assert time.perf_counter() - began < PATIENCE / 2
    assert all(isinstance(each, DTensor) for each in net.parameters())


def exit_heads_communicate_alike_too() -> None:
    net = sharded(Net())
    sifter = Sifter(net, exit_head=ExitHead(classes=WORDS))
    for step in range(3):
        batch = pool_of(step)
        if dist.get_rank() == 0:
            batch["labels"][:, 2:] = -100
        with small_chunks(), Collectives() as seen:
            sifter(batch)
        one, other = gather(seen.names)
        assert one == other != []


def data_parallel_of_torch_is_scored_by_its_module() -> None:
    net = Net()
    batch = pool_of(1)
    assert torch.equal(Sifter(nn.DataParallel(net)).score(batch), Sifter(net).score(batch))


ON_TWO: list[Callable[[], None]] = [
    scores_are_those_of_the_unsharded_model,
    scores_are_cast_as_the_policy_says,
    methods_that_fsdp_knows_as_forward_are_scored,
    a_model_that_is_sharded_after_the_loader_was_built_is_scored,
    scoring_leaves_weights_as_it_found_them,
    collectives_do_not_depend_on_the_data,
    ddp_is_scored_without_collectives,
    training_with_ddp_is_that_of_a_plain_loader,
    training_with_fsdp2_is_that_of_a_plain_loader,
    fsdp1_is_scored_through_its_root,
    tensor_parallel_members_get_identical_scores,
    tensor_parallel_members_train_on_the_same_samples,
    tensor_parallel_members_with_other_candidates_are_refused,
    tensor_parallel_loaders_read_by_replica,
    exit_heads_communicate_alike_too,
    data_parallel_of_torch_is_scored_by_its_module,
    an_error_on_one_rank_stops_both,
]
LONGER: list[Callable[[], None]] = [
    checkpointed_and_compiled_blocks_are_scored,
    a_mesh_of_copies_and_a_bare_root_are_scored,
    training_with_fsdp1_is_that_of_a_plain_loader,
]


def replicas_in_parts_are_scored_alike_within_and_apart_from_each_other() -> None:
    """FSDP2 over two replicas of two ranks each, whose labels are few here and many there."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh["dp"].get_local_rank()
    for logits in ("whole", "parts"):
        net = split(Net(), mesh["tp"], logits)
        for layer in net.body.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard([net.body.norm, net.head], mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        sifter = Sifter(net)
        with loss_parallel() if logits == "parts" else nullcontext():
            for step in range(3):
                batch = gather(pool_of(step))[2 * replica]
                if replica == 0:
                    batch["labels"][:, 2:] = -100
                expected = reference(full_copy(net), batch)
                with small_chunks():
                    found = sifter.score(batch)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
                every = [tuple(each) for each in gather(found.tolist())]
                assert every[0] == every[1] != every[2] == every[3]
                net(**batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
    with pytest.raises(ScoringError, match="hold one replica"):
        Sifter(net).score(pool_of(1))


# --- and how they are run ---


def run_rank(rank: int, ranks: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/met",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    outcome: dict[str, str] = {}
    for name in names:
        began = time.perf_counter()
        try:
            globals()[name]()
            outcome[name] = ""
        except BaseException:
            outcome[name] = traceback.format_exc()
        outcome["seconds " + name] = f"{time.perf_counter() - began:.1f}"
        torch.save(outcome, folder / f"{rank}.pt")
        try:
            dist.monitored_barrier()
        except RuntimeError:
            return  # the others are somewhere else: they find the connection closed
    dist.destroy_process_group()


def outcomes(folder: Path, ranks: int, claims: list[Callable[[], None]]) -> list[dict[str, str]]:
    names = [claim.__name__ for claim in claims]
    mp.spawn(run_rank, (ranks, folder, names), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return outcomes(tmp_path_factory.mktemp("two"), 2, ON_TWO)


@pytest.mark.parametrize("claim", [each.__name__ for each in ON_TWO])
def test_on_two_ranks(two: list[dict[str, str]], claim: str) -> None:
    assert_holds(two, claim)


def assert_holds(found: list[dict[str, str]], claim: str) -> None:
    told = [each.get(claim, "did not get there") for each in found]
    assert not any(told), "\n".join(
        f"rank {rank}: {each}" for rank, each in enumerate(told) if each
    )


@pytest.mark.slow
def test_on_two_ranks_for_longer(tmp_path: Path) -> None:
    found = outcomes(tmp_path, 2, LONGER)
    for claim in LONGER:
        assert_holds(found, claim.__name__)


@pytest.mark.slow
def test_on_four_ranks(tmp_path: Path) -> None:
    claim = replicas_in_parts_are_scored_alike_within_and_apart_from_each_other
    found = outcomes(tmp_path, 4, [claim])
    assert_holds(found, claim.__name__)
