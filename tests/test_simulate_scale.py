from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


PATH = Path(__file__).parents[1] / "tools" / "simulate_scale.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("simulate_scale", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_scale"] = module
    spec.loader.exec_module(module)
    return module


def test_a_machine_opens_its_share_with_lanes_and_everything_without(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SAMPLES", 64)
    tool.write_manifest(tmp_path, 512)
    rows = [
        tool.measured(tmp_path, lanes, machines, 2) for lanes, machines in ((1, 4), (4, 4), (4, 2))
    ]
    alone, laned, half = rows
    assert alone["share"] == 100
    assert 25 <= laned["share"] < 30 and 50 <= half["share"] < 55
    assert laned["mapped"] == 9 and half["cached"] == 32
    text = tool.table(rows)
    assert text.count("\n") == 4 and "100.0" in text
