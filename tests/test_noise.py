"""Guards against noisy labels, on problems whose noise is known: pytest tests/test_noise.py"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import noise


SEEDS = range(3)
GUARDS = ("TrimmedTopK(drop_top=0.2)", "Robust()", "RankSample()", "Reducible")


@cache
def trial(seed: int) -> dict[str, noise.Kept]:
    return noise.trial(seed, samples=2048)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_paper_s_rule_loves_noise_and_chance_does_not_see_it(seed: int) -> None:
    assert trial(seed)["TopK"].noisy > 0.55
    assert abs(trial(seed)["Random"].noisy - 0.2) < 0.06


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_guard_keeps_fewer_noisy_samples_and_still_finds_hard_ones(
    seed: int, guard: str
) -> None:
    found = trial(seed)
    assert found[guard].noisy < found["TopK"].noisy - 0.1
    assert found[guard].clean_loss > found["Random"].clean_loss + 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_irreducible_losses_find_the_noise(seed: int) -> None:
    found = trial(seed)
    assert found["Reducible"].noisy < 0.08
    assert found["Reducible"].noisy < min(found[guard].noisy for guard in GUARDS[:-1]) - 0.03


def test_without_noise_there_is_nothing_to_keep_out() -> None:
    assert all(kept.noisy == 0 for kept in noise.trial(0, noise=0.0, samples=512).values())


def test_the_table_names_every_guard(capsys: pytest.CaptureFixture[str]) -> None:
    noise.main(["--seeds=2", "--samples=512"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("TopK", "Random", *GUARDS):
        (row,) = (line for line in lines if line.startswith(f"{name} "))
        assert row.count("%") == 3
