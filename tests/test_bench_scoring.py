"""tools/bench_scoring.py and tools/bench_positions.py: pytest tests/test_bench_scoring.py"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from simulated import Gpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_positions
import bench_scoring
from bench_scoring import SHAPES, Row, Shape, Way

from siftloader import Sifter, Stride
from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


# Sizes of which no two are alike, so that no term of a formula can stand for another.
TINY = {
    "bert-base": Shape("bert", 3, 32, 2, 2, 72, 131, 20, 2, 0.15),
    "gpt2": Shape("gpt2", 3, 32, 2, 2, 128, 137, 12, 2, 1.0),
    "llama-1b": Shape("llama", 3, 32, 4, 2, 88, 149, 12, 2, 1.0),
}


def counted(task) -> int:
    # Only products are counted, and of attention only this way of computing it is made of them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TINY)
def test_a_plain_step_takes_the_flops_of_the_formula(name: str) -> None:
    shape = TINY[name]
    model, batch = bench_scoring.build(shape), bench_scoring.make_batch(shape, 4)
    found = counted(lambda: model(**batch).loss.backward())
    assert found == shape.step_flops(4)


@pytest.mark.parametrize("positions", [None, Stride(4)], ids=["all", "stride"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", TINY)
def test_the_floor_is_what_scoring_takes_and_scoring_takes_no_more(
    name: str, layer: int, positions: Stride | None
) -> None:
    shape = TINY[name]
    model, batch = bench_scoring.build(shape), bench_scoring.make_batch(shape, 4)
    sifter = Sifter(model, exit_layer=layer, positions=positions)
    sifter.score(batch)  # the first pool is looked at twice
    assert counted(lambda: sifter.score(batch)) == shape.scoring_flops(4, layer, positions)


def test_floors_are_those_of_the_design() -> None:
    bert, gpt = SHAPES["bert-base"], SHAPES["gpt2"]
    assert bench_scoring.floor(bert, 1, 0.5) == pytest.approx(0.065, abs=5e-4)
    assert bench_scoring.floor(bert, 1, 0.5, sparse=True) == pytest.approx(0.078, abs=5e-4)
    assert bench_scoring.floor(bert, 12, 0.5) == pytest.approx(0.552, abs=5e-4)
    assert bench_scoring.floor(gpt, 1, 0.5) == pytest.approx(0.221, abs=5e-4)
    assert bench_scoring.floor(gpt, 1, 0.25) == pytest.approx(0.442, abs=1e-3)


def test_a_cost_is_what_a_sifted_step_takes_more_than_the_plain_one_of_its_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowness = iter([1.0, 1.0, 3.0, 0.5])  # of the machine, round by round: shares do not see it
    now = 0.0

    def window(self: object, batches: object) -> float:
        nonlocal now
        now = next(slowness) if isinstance(batches, list) else now
        return now if isinstance(batches, list) else 1.25 * now

    monkeypatch.setattr(bench_scoring, "ways", lambda *_: [Way("ours", 1, {})])
    bench = bench_scoring.Bench
    peaks = iter([100.0, 103.0])  # of the plain loop, then of the sifted one
    monkeypatch.setattr(bench, "first_window", lambda *_: (next(peaks), 0.0))
    monkeypatch.setattr(bench, "window", window)
    monkeypatch.setattr(bench, "seconds", lambda *_: 0.2 * now)
    options = bench_scoring.parse(["--device=cpu", "--minutes=0", "--exit-layers", "1"])
    found = bench_scoring.measure("gpt2", TINY["gpt2"], options)
    ours = Row(**found["rows"][0])
    assert ours.cost == [0.25] * 3 and ours.alone == pytest.approx([0.2] * 3)
    assert (ours.peak, ours.peak_share) == (3.0, 0.03)
    assert bench_scoring.told([0.5, 0.6, 0.51]) == "51.0% (50.0 to 60.0)"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("bench")
    arguments = ["--device=cpu", "--minutes=0", "--exit-layers", "1", "2", "N"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scoring, "SMALL", {name: TINY[name] for name in ("bert-base", "gpt2")})
        bench_scoring.main([*arguments, f"--out={out}", "--shape", "bert-base", "gpt2"])
    return out, (out / "bench_scoring.txt").read_text()


def test_one_command_gives_a_table_a_file_and_a_picture(measured: tuple[Path, str]) -> None:
    out, table = measured
    found = json.loads((out / "bench_scoring.json").read_text())
    assert [shape["name"] for shape in found["shapes"]] == ["bert-base", "gpt2"]
    for shape in found["shapes"]:
        rows = [Row(**row) for row in shape["rows"]]
        assert not [row for row in rows if row.failed and "=" not in row.way]
        ours = [row.layer for row in rows if row.way == "ours"]
        assert ours == [1, 2, 3]  # what was asked for, and N
        for row in rows:
            if row.way in ("ours", "j layers, head everywhere", "naive", "full depth"):
                assert len(row.alone) >= bench_scoring.LEAST_ROUNDS
            if row.way == "ours":
                assert len(row.cost) == len(row.alone) and row.floor > 0
        assert {"loader off (keep=1.0)", "random half"} <= {row.way for row in rows}
    strided = [row for row in found["shapes"][1]["rows"] if row["way"].startswith("Stride(8)")]
    dense = next(row for row in found["shapes"][1]["rows"] if row["way"] == "ours")
    assert len(strided) == 2 and all(row["floor"] < dense["floor"] for row in strided)
    assert (out / "bench_scoring.png").read_bytes().startswith(b"\x89PNG")
    assert found["machine"] in table and "plain step" in table and "naive" in table


def test_what_was_measured_elsewhere_is_drawn_here(measured: tuple[Path, str]) -> None:
    picture = measured[0] / "bench_scoring.png"
    picture.unlink()
    bench_scoring.main(["--draw", str(measured[0] / "bench_scoring.json")])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_option_is_measured_where_the_loader_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_scoring.parse(["--device=cpu", "--compile"])
    every = Way.ALL_OPTIONS
    monkeypatch.setattr(bench_scoring, "known_options", lambda: set(every))
    names = [way.name for way in bench_scoring.ways(TINY["gpt2"], 3, options)]
    for name in every:
        assert any(name in each for each in names), name
    monkeypatch.setattr(bench_scoring, "known_options", lambda: {"positions", "criterion", "keep"})
    fewer = [way.name for way in bench_scoring.ways(TINY["gpt2"], 3, options)]
    assert not [each for each in fewer for name in every if name in each]


@pytest.mark.parametrize("when", [0, 2])
def test_a_way_that_fails_is_a_row_that_says_why(
    when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = bench_scoring.parse(["--device=cpu", "--minutes=0", "--exit-layers", "1"])
    windows, calls, loader = (
        bench_scoring.WARM_FIRST + options.steps,
        [],
        bench_scoring.Bench.loader,
    )

    def failing(_: object) -> None:
        calls.append(0)
        if len(calls) > when * windows:  # at once, or in a later window
            raise ValueError("no such thing\nand more")

    def build(self: bench_scoring.Bench, way: Way) -> object:
        found = loader(self, way)
        return found if way.name == "ours" else (failing(batch) or batch for batch in [*found] * 9)

    monkeypatch.setattr(bench_scoring, "ways", lambda *_: [Way("ours", 1, {}), Way("bad", 1, {})])
    monkeypatch.setattr(bench_scoring.Bench, "loader", build)
    rows = bench_scoring.measure("gpt2", TINY["gpt2"], options)["rows"]
    ours, bad = (next(row for row in rows if row["way"] == name) for name in ("ours", "bad"))
    assert bad["failed"] == "ValueError: no such thing"
    assert not ours["failed"] and len(ours["cost"]) == bench_scoring.LEAST_ROUNDS


def test_on_a_gpu_memory_and_waits_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build, used = bench_scoring.build, iter(range(100, 1000))
    few = ["--minutes=0", "--exit-layers", "1", "--only", "ours", "overlap", "naive", "full"]
    options = bench_scoring.parse(["--device=cuda:0", "--dtype=float32", "--no-compile", *few])
    options.steps = 2
    with Gpu() as gpu:
        monkeypatch.setattr(bench_scoring, "build", lambda shape, _: gpu.moved(build(shape)))
        monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, fused: torch.optim.SGD(p, lr))
        for name, value in {
            "memory_allocated": lambda: 50.0,
            "max_memory_allocated": lambda: float(next(used)),
            "reset_peak_memory_stats": lambda: None,
            "set_sync_debug_mode": lambda mode: (
                mode == "warn"
                and warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        found = bench_scoring.measure("gpt2", TINY["gpt2"], options)
    assert not [row["failed"] for row in found["rows"] if row["failed"]]
    assert found["of_plain"] == (100.0, 0.5)
    ours = Row(**found["rows"][0])
    assert (ours.peak, ours.peak_share, ours.syncs) == (1.0, 0.01, 0.5)
    assert "peak 0 MiB, 0.5 syncs" in bench_scoring.table(found)


def test_scores_of_all_ways_must_agree() -> None:
    shape = TINY["gpt2"]
    model, batch = bench_scoring.build(shape), bench_scoring.make_batch(shape, 4)
    bench_scoring.check_equal(model, shape, batch, [1, 2, 3], "entropy", torch.float32)
    wrong = replace(shape, family="bert")  # whose labels are not shifted
    with pytest.raises(AssertionError):
        bench_scoring.check_equal(model, wrong, batch, [1], "loss", torch.float32)


def test_positions_have_a_frontier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, rng = Layout.for_vocabulary(16, 90), np.random.default_rng(0)
    (tmp_path / "clm").mkdir()
    ids, none = rng.integers(0, 90, (64, 16)), np.zeros(64, np.uint8)
    write_dataset(
        tmp_path / "clm",
        [write_shard(tmp_path / "clm", "train-000000", ids, none, layout)],
        layout=layout,
        objective="clm",
        tokenizer=Tokenizer("letters", "0" * 64, 90, {"eos": 0}),
        sources=[Source("a", "0" * 64, 1)],
        unigrams=np.arange(90),
        seed=0,
    )
    out = tmp_path / "out"
    few = ["--steps=2", "--batch-size=4", "--pools=1", "--exit-layers=1", "--device=cpu"]
    bench_positions.main([f"--shards={tmp_path / 'clm'}", f"--out={out}", *few])
    found = json.loads((out / "bench_positions.json").read_text())
    assert [moment["step"] for moment in found["moments"]] == [1, 2]
    rows = [bench_positions.Row(**row) for row in found["moments"][1]["rows"]]
    full, rarity = rows[0], rows[-1]
    assert full.overlap == 1 and rarity.floor is None
    # All positions and six subsets with and without control: the fewer, the lower the floor.
    assert len(rows) == 2 + 13 and sum(row.controlled for row in rows) == 6
    strided = [row.floor for row in rows if row.layer == 1 and not row.way.startswith("First")]
    assert strided == sorted(strided, reverse=True)
    assert "slope there" in (out / "bench_positions.txt").read_text()
    picture = out / "bench_positions.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    bench_positions.main([f"--draw={out / 'bench_positions.json'}"])
    assert picture.exists() and "x floor" in capsys.readouterr().out
