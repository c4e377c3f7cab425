"""tools/bench_prepare.py: pytest tests/test_bench_prepare.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from effort import examples
from hypothesis import given, strategies as st


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_prepare
from bench_prepare import Row


TOKENIZER = Path(__file__).resolve().parent.parent / "shards" / "demo" / "tokenizer.json"
linux = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc"
)
# A document: lines without blank ones, no white space around it.
line = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1).filter(
    str.strip
)
document = st.lists(line, min_size=1, max_size=3).map("\n".join).map(str.strip)


def write(folder: Path, files: dict[str, list[str]]) -> Path:
    for name, texts in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n\n".join(texts) + "\n")
    return folder


@examples(50)
@given(files=st.lists(st.lists(document, min_size=1, max_size=6), min_size=1, max_size=4))
@pytest.mark.parametrize("parts", [1, 4])
def test_rivals_get_every_document_once_in_order(
    parts: int, files: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    corpus = write(folder / "in", {f"{i}.txt": texts for i, texts in enumerate(files)})
    about = bench_prepare.write_parts(corpus, folder / "out", parts)
    wanted = [text for texts in files for text in texts]
    plain = sorted((folder / "out").glob("*.txt"))
    lines = sorted((folder / "out").glob("*.jsonl"))
    assert [text for file in plain for text in bench_prepare.texts_of(file)] == wanted
    got = [json.loads(line)["text"] for file in lines for line in file.read_text().splitlines()]
    assert got == wanted
    assert about["documents"] == len(wanted)
    assert len(plain) == len(lines) <= parts


def test_parts_are_of_equal_size(tmp_path: Path) -> None:
    corpus = write(tmp_path / "in", {"a.txt": ["x" * 98] * 70, "b.txt": ["y" * 98] * 330})
    bench_prepare.write_parts(corpus, tmp_path / "out", 8)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "out").glob("*.txt"))]
    assert len(sizes) == 8
    assert max(sizes) - min(sizes) <= 200


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no \.txt with text in this folder"):
        bench_prepare.write_parts(tmp_path, tmp_path / "out", 2)


@examples(50)
@given(text=document)
def test_a_changed_document_is_another_of_equal_size(text: str) -> None:
    again = bench_prepare.changed(text)
    assert sum(a != b for a, b in zip(text, again, strict=True)) == 1
    assert bench_prepare.changed(text) == again


def test_doubled_is_the_corpus_and_a_changed_copy(tmp_path: Path) -> None:
    texts = {"a.txt": ["one two", "three\nfour"], "deep/b.txt": ["(five)"]}
    corpus = write(tmp_path / "in", texts)
    bench_prepare.write_doubled(corpus, tmp_path / "out")
    for name, wanted in texts.items():
        file = tmp_path / "out" / name
        assert file.read_bytes() == (corpus / name).read_bytes()
        again = bench_prepare.texts_of(file.with_name(f"again-{file.name}"))
        assert again == [bench_prepare.changed(text) for text in wanted]
        assert not set(again) & set(wanted)


@examples(50)
@given(texts=st.lists(st.text(max_size=9)), size=st.integers(1, 20))
@pytest.mark.parametrize("unit", ["documents", "characters"])
def test_batches_are_as_large_as_asked(unit: str, texts: list[str], size: int) -> None:
    batches = list(bench_prepare.in_batches(texts, unit, size))
    assert [text for batch in batches for text in batch] == texts
    weigh = len if unit == "documents" else lambda batch: sum(map(len, batch))
    assert all(weigh(batch) >= size > weigh(batch[:-1]) for batch in batches[:-1])


# seconds and tokens of a job that starts slowly, then makes 100 tokens a second, then stalls
SLOW_START = [(0.0, 0), (4.0, 10), (6.0, 210), (8.0, 410), (20.0, 1610), (30.0, 1620)]


@pytest.mark.parametrize(
    ("records", "skip", "until", "rate"),
    [
        (SLOW_START, 4, 20, 100.0),
        (SLOW_START, 5, 20, 100.0),
        (SLOW_START, 0, 20, 80.5),  # with the start in it
        (SLOW_START, 5, float("inf"), 58.75),  # with the end in it
        (SLOW_START, 25, float("inf"), None),  # one record is no rate
        (SLOW_START, 31, float("inf"), None),
        ([(7.0, 1), (7.0, 2)], 5, float("inf"), None),
        ([], 0, float("inf"), None),
    ],
)
def test_steady_leaves_the_start_out(
    records: bench_prepare.Records, skip: float, until: float, rate: float | None
) -> None:
    assert bench_prepare.steady(records, skip, until) == pytest.approx(rate)


def test_workers_count_together_only_while_all_work() -> None:
    short = [(second, 10 * second) for second in range(11)]
    # Alone from second 10 on, and faster for it.
    long = [
        (second, 20 * second if second <= 10 else 200 + 99 * (second - 10)) for second in range(31)
    ]
    assert bench_prepare.together([short, long], 5) == pytest.approx(30.0)
    assert bench_prepare.together([short, long], 10) is None


@pytest.mark.parametrize(
    ("peak", "memory"),
    [
        (490_000_000, "500 MB of memory (flat)"),
        (549_000_000, "549 MB of memory (flat)"),
        (551_000_000, "10,649 MB of memory (it grew)"),  # 51 MB for every 100 MB
    ],
)
def test_what_is_extrapolated_lies_on_the_line_and_never_shrinks(peak: int, memory: str) -> None:
    once = Row("mlm", seconds=30, peak=500_000_000, disk=400_000_000, kept=300_000_000, text=10**8)
    twice = Row(
        "mlm-x2", seconds=50, peak=peak, disk=800_000_000, kept=290_000_000, text=2 * 10**8
    )
    # 200 steps of 20 s and 400 MB, after 10 s.
    said = bench_prepare.extrapolated(once, twice, 20e9)
    assert said.startswith("20 GB of text (mlm), on a line through these two: 67 min, ")
    assert "80.0 GB of disk while it runs, 0.3 GB of it the shards" in said
    assert memory in said


@pytest.mark.parametrize(
    ("seconds", "median"), [([3.0], 3.0), ([3.0, 1.0, 2.0], 2.0), ([2.0, 1.0], 2.0)]
)
def test_the_run_of_median_time_stands_for_an_arm(seconds: list[float], median: float) -> None:
    rows = [Row("mlm", seconds=each) for each in seconds]
    assert bench_prepare.middle([Row("mlm", failed="no"), *rows]).seconds == median
    assert bench_prepare.middle([Row("mlm", failed="no")]).failed == "no"


def test_a_rival_that_wins_or_works_less_is_printed() -> None:
    options = bench_prepare.parse(["--arms", "bare,mlm,litdata,mosaic"])
    about = {"versions": "it 1.0", "did": "no shuffle"}
    rows = [
        Row("bare", result={"tokens": 4, "steady": 2e6}),
        Row("mlm", seconds=10, peak=100, result={"tokens": 10**7, "steady": 1.5e6}),
        Row("litdata", seconds=5, peak=50, result={"tokens": 10**7, **about}),
        Row("mosaic", seconds=5, peak=50, result={"tokens": 9 * 10**6, **about}),
    ]
    lines = bench_prepare.report(rows, options).splitlines()
    found = {row.split("|")[1].strip(): row.split("|") for row in lines if row.startswith("| ")}
    assert found["mlm"][7].strip() == "0.75"  # steady against steady
    assert found["litdata"][7].strip() == "1.00"  # no steady rate: the whole run
    said = {row.split(" ")[0]: row for row in lines if "(it 1.0)" in row}
    assert "2.00 x the speed of mlm, 0.5 x its memory" in said["litdata"]
    assert "NOT THE SAME WORK" not in said["litdata"]
    assert "NOT THE SAME WORK" in said["mosaic"]
    widths = {row.count("|") for row in lines if row.startswith("|")}
    assert len(widths) == 1


def test_a_busy_machine_is_said_to_be_one() -> None:
    options = bench_prepare.parse(["--arms", "mlm,clm"])
    about = {"seconds": 1.0, "result": {"tokens": 1}}
    said = bench_prepare.report(
        [Row("mlm", others=0.1, **about), Row("clm", others=1.3, **about)], options
    )
    assert "while clm ran, other programs kept 1.3 cores busy" in said
    assert "while mlm ran" not in said


def test_a_failed_arm_is_a_row_that_says_why() -> None:
    options = bench_prepare.parse(["--arms", "bare,mlm"])
    lines = bench_prepare.report([Row("mlm", failed="no room"), Row("bare", failed="x")], options)
    assert "| mlm | failed: no room |" in lines


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_prepare.parse(["--arms", "bare,nonsense"])
    assert "no such arm: nonsense; there are bare," in capsys.readouterr().err


# A process with a child, so many megabytes held by each: shared memory here, its own there.
HOLDS = """
import mmap, subprocess, sys, time
size = int(sys.argv[1]) << 20
if sys.argv[2] == "start":
    shared = mmap.mmap(-1, size)
    shared.write(b"x" * size)
    subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1], "hold", ""])
else:
    own = bytearray(b"x") * size
print("ready", flush=True)
time.sleep(60)
"""


@linux
def test_the_memory_of_a_process_and_its_children_is_seen() -> None:
    command = [sys.executable, "-c", HOLDS, "64", "start", HOLDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
            members = bench_prepare.family(process.pid)
            assert len(members) == 2
            assert process.pid in members
            assert os.getpid() not in members
            total, anonymous = bench_prepare.memory_of(members)
            assert 128 << 20 < anonymous <= total < 256 << 20
        finally:
            bench_prepare.end(process)
    assert not any(Path(f"/proc/{pid}").exists() and alive(pid) for pid in members)


def alive(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":  # dead; whoever adopts it has not looked yet
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def job(tmp_path: Path) -> dict[str, object]:
    texts = {f"{i}.txt": [f"the cat {i} sat on mat {j}." * 5 for j in range(40)] for i in range(3)}
    corpus = write(tmp_path / "in", texts)
    about = bench_prepare.write_parts(corpus, tmp_path / "parts", 2)
    plain = bench_prepare.plain_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    return {
        "corpus": str(corpus),
        "parts": str(tmp_path / "parts"),
        "documents": about["documents"],
        "tokenizer": str(plain),
        "workers": 1,
        "memory": 128_000_000,
        "way": [1, "encode_batch_fast", "documents", 16],
        "skip": 0.1,
        "seconds": 2.0,
        "work": str(tmp_path / "arm"),
    }


@linux
def test_the_work_of_this_process_is_seen() -> None:
    busy, mine = bench_prepare.busy_seconds(), time.process_time()
    while time.process_time() - mine < 0.5:
        pass
    assert bench_prepare.busy_seconds() - busy > 0.4
    assert bench_prepare.cpu_of(os.getpid()) >= 0.5
    assert bench_prepare.cpu_of(2**22 + 1) == 0.0


@linux
def test_bare_is_measured(job: dict[str, object]) -> None:
    pytest.importorskip("tokenizers")
    row = bench_prepare.measure(sys.executable, "bare", job, 60)
    assert row.failed == ""
    assert row.steady is not None
    assert row.steady > 0
    assert row.tokens > 0
    assert row.seconds > 2
    assert row.cpu > 0.3
    assert 0 <= row.others < (os.cpu_count() or 1)
    assert row.peak >= row.anonymous > 10 << 20
    assert 0 < row.peak_at <= row.seconds
    assert not Path(str(job["work"])).exists()


@linux
def test_an_arm_that_fails_or_hangs_is_a_row(job: dict[str, object]) -> None:
    row = bench_prepare.measure(sys.executable, "bare", dict(job, tokenizer="gone.json"), 60)
    assert "No such file" in row.failed
    assert not row.result
    start = time.perf_counter()
    row = bench_prepare.measure(sys.executable, "bare", dict(job, seconds=1000.0), 2.0)
    assert row.failed == "stopped after 2 s"
    assert time.perf_counter() - start < 100
    assert not Path(str(job["work"])).exists()


@linux
def test_siftloader_is_measured(job: dict[str, object]) -> None:
    pytest.importorskip("tokenizers")
    row = bench_prepare.measure(sys.executable, "mlm", job, 120)
    assert row.failed == ""
    assert row.result["documents"] == job["documents"]
    assert row.kept > 0
    assert row.disk >= 0


@pytest.mark.parametrize("modules", [["json"], ["json", "no_such_module_here"]])
def test_an_interpreter_is_found_only_where_all_imports_work(modules: list[str]) -> None:
    found = bench_prepare.which_python([Path(sys.executable)], modules)
    assert found == (sys.executable if len(modules) == 1 else None)
