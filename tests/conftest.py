"""Two test processes on two cores: one torch thread each."""

import os
import signal

import pytest
import torch
from effort import FACTOR
from hypothesis import settings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("here", max_examples=100 * FACTOR if FACTOR > 1 else 50, deadline=None)
settings.load_profile("here")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # behind a shell's "&"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests of Ctrl-C send real ones


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # what a test changed is not for the next one
