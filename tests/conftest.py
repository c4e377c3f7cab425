"""Two test processes on two cores: one torch thread each."""

import os

import pytest
import torch
from effort import FACTOR
from hypothesis import settings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("here", max_examples=100 * FACTOR, deadline=None)
settings.load_profile("here")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
