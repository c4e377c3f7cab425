"""Two test processes on two cores: one torch thread each."""

import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

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


@pytest.fixture(autouse=True, scope="session")
def _swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers that tests kill leave folders behind; their names stay short, for there are sockets in them."""
    tmp_path_factory.getbasetemp()  # not in here: it is kept
    folder = tempfile.mkdtemp(prefix="sift-")
    # After multiprocessing has removed its own, at -100.
    gone = {"ignore_errors": True}
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), gone, exitpriority=-101)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
