"""Who is reading: the rank of this process, and the loader worker inside it.

The only file that looks at ``torch.distributed``, environment variables and worker information.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class World:
    """One reader among ``ranks * workers``; found with ``World.detect()``, or given to simulate.

    World(rank=3, ranks=8)   # the fourth of eight training processes

    ``machines`` of them hold ``ranks / machines`` ranks each, one after the other, as torchrun deals them.
    """

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1
    machines: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank must be in 0..ranks-1, got rank {self.rank} of {self.ranks}")
        if self.workers < 1 or not 0 <= self.worker < self.workers:
            raise ValueError(
                f"worker must be in 0..workers-1, got worker {self.worker} of {self.workers}"
            )

        if self.machines < 1 or self.ranks % self.machines:
            raise ValueError(
                f"machines must divide the ranks, got {self.ranks} ranks on {self.machines} machines"
            )

    @classmethod
    def detect(cls, home: World | None = None) -> World:
        """This process, as ``torch.distributed``, else torchrun's environment, tells it.

        ``home`` is the process that the data came from: a loader worker that was spawned has no process group.
        """
        rank, ranks = _rank()
        worker, workers = _worker()
        if home is not None and ranks == 1 and _worker_info() is not None:
            return cls(home.rank, home.ranks, worker, workers, home.machines)
        return cls(rank, ranks, worker, workers, _machines(ranks))

    @property
    def slot(self) -> int:
        """Of ``ranks`` slots the one of this rank, so that all slots of a machine are equal modulo machines."""
        rank_here, machine = self.rank % self._local, self.rank // self._local
        return rank_here * self.machines + machine

    @property
    def _local(self) -> int:
        return self.ranks // self.machines


def first_word(topic: str, word: str) -> str:
    """What the first rank to speak on a topic said, which may be our own word; nobody waits for anybody.

    Our own word where no process group runs, and in loader workers: a forked one holds the very connection to
    the store that its parent uses. One question to the store of the group, however many ranks.
    """
    store = None if _worker_info() is not None else _store()
    if store is None:
        return word
    said: bytes = store.compare_set(f"siftloader/{topic}", "", word)
    return said.decode()


def iteration() -> int:
    """31 bits that the workers of one iteration of a loader share, and no others; 0 outside of workers."""
    info = _worker_info()
    if info is None:
        return 0
    # torch draws a seed for every iteration. It may come again for a loader of another size, if seeded alike.
    return int((info.seed - info.id) ^ info.num_workers << 1) & (1 << 31) - 1 | 1


def _store() -> Any:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    # Not public, so not relied on: without it nothing is compared.
    find = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


def _rank() -> tuple[int, int]:
    # Looked up rather than imported: a process that never imported torch runs no process group.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    # A loader worker inherits the environment of its rank, so torchrun's variables hold there too.
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _machines(ranks: int) -> int:
    # Known where the launcher says how many ranks a machine has, else all count as on one.
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        here = os.environ.get(name, "")
        if here.isdigit() and int(here) and ranks % int(here) == 0:
            return ranks // int(here)
    return 1


def _worker() -> tuple[int, int]:
    info = _worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)


def _worker_info() -> Any:
    data = sys.modules.get("torch.utils.data")
    return data.get_worker_info() if data is not None else None
