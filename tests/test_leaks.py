"""Ten thousand steps in constant memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


SCRIPT = textwrap.dedent(
    """
    import gc, sys
    import torch
    from test_overlap import Net, Rows
    from siftloader import SiftingDataLoader

    torch.set_num_threads(1)
    steps, options = int(sys.argv[1]), eval(sys.argv[2])
    model, candidates = Net(), [Rows(8)[row] for row in range(8)]
    pool = torch.utils.data.default_collate(candidates)


    def batches():
        for _ in range(steps):
            yield {name: value.clone() for name, value in pool.items()}


    def resident():
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * 4096


    loader = SiftingDataLoader.wrap(batches(), model=model, warmup_steps=0, **options)
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.01), []
    for number, batch in enumerate(loader, 1):
        torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in (steps // 5, steps):
            tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
            seen.append((resident(), tensors, len(gc.get_objects())))
    assert loader.stats["candidates"] == 8 * steps, loader.stats
    (before, few, some), (after, many, more) = seen
    print(f"{before / 2**20:.1f} MiB, {few} tensors, {some} objects; later {after / 2**20:.1f}, {many}, {more}")
    assert many <= few + 2 and more <= some + 200 and after - before < 3 * 2**20
    """
)
OPTIONS = {
    "plain": 'dict(pool="split", audit_every=50)',
    "overlap": 'dict(pool="split", overlap=True, audit_every=50)',
    "a copy": 'dict(pool="split", overlap=True, scorer_device="cpu", audit_every=50)',
    "entropy, two rows at a time": 'dict(pool="split", criterion="entropy", score_batch_size=2)',
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ten_thousand_steps_take_no_more_memory(options: str) -> None:
    steps(10_000, options)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_steps_take_no_more_memory() -> None:
    steps(1000, OPTIONS["overlap"])


def steps(count: int, options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(count), options],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert not done.returncode, done.stdout + done.stderr[-2000:]
