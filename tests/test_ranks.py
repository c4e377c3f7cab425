"""Two real processes under DistributedDataParallel: pytest tests/test_ranks.py -m slow"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import classifier
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from siftloader import SiftingDataLoader, TokenShards


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        x = torch.randn(8, generator=draw)
        return {"x": x, "labels": torch.tensor(index % 10), "id": torch.tensor(index)}


def train(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(classifier())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sampler = DistributedSampler(Rows(), seed=3)
    loader = SiftingDataLoader(Rows(), 4, sampler=sampler, model=model, warmup_steps=3)
    seen, drawn = [], [[], []]
    for epoch in range(2):
        loader._on_select = lambda ids, scores, kept, e=epoch: drawn[e].extend(ids.tolist())
        loader.set_epoch(epoch)
        for batch in loader:
            loss = torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(batch["id"].tolist())
    shards = SiftingDataLoader(
        TokenShards("shards/demo", with_ids=True),
        64,
        model=model,
        criterion="random",
        warmup_steps=0,
    )
    shard_ids = [i for batch in shards for i in batch["id"].tolist()]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = {"seen": seen, "drawn": drawn, "shards": shard_ids, "weights": weights}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_take_equal_steps_on_samples_of_their_own(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(one["seen"]) == len(two["seen"])
    assert torch.equal(one["weights"], two["weights"])
    for mine, yours in zip(one["drawn"], two["drawn"], strict=True):
        assert mine and not set(mine) & set(yours)
    assert not set(one["shards"]) & set(two["shards"])
    assert len(one["shards"]) == len(two["shards"]) > 500
