"""Processes of a test, forked from one that has imported torch and transformers: spawned ones would each import them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing


# What is missing is left out; the environment is that of the first call, so functions set their own.
multiprocessing.set_forkserver_preload(
    [
        "hypothesis",
        "pytest",
        "torch.distributed",
        "torch.nn.parallel",
        "transformers.models.bert.modeling_bert",
        "transformers.models.gpt2.modeling_gpt2",
    ]
)


def on_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """function(rank, *arguments) in processes of their own; an error in one ends all and is raised here."""
    torch.multiprocessing.start_processes(
        function, arguments, nprocs=ranks, start_method="forkserver"
    )
