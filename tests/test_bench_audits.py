"""tools/bench_audits.py: pytest tests/test_bench_audits.py"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_audits


@pytest.mark.slow
def test_it_says_what_an_audit_and_a_trial_cost(capsys):
    sizes = "--layers 2 --hidden 32 --batch-size 2 --steps 2 --audits 2 --trial-steps 1"
    found = bench_audits.main(sizes.split())
    assert found["floor"] == 1.0 and found["audit"] > 0
    assert found["told"] > 2 * 2 and found["trial"] > 0
    told = capsys.readouterr().out
    assert "siftloader" in told and "every 500" in told
