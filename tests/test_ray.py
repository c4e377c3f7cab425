"""The same results from a Ray cluster: a real one, of two nodes, on this machine."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from siftloader.engines import WorkerTraceback, run_here, run_ray
from siftloader.errors import CorpusError, CorruptShard
from siftloader.prepare import Preparation, prepare


ray = pytest.importorskip("ray")
pytest.importorskip("psutil")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what Ray itself uses and opens
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


# ---- what the workers run: they import this file


def located(job: int, task: int) -> tuple[int, str, str | None]:
    time.sleep(0.05)
    node = ray.get_runtime_context().get_node_id()
    return job * task, node, os.environ.get("RAYON_NUM_THREADS")


def scaled(job: int, task: int) -> int:
    time.sleep(0.1)
    return job * task


def failing(job: dict[int, float], task: int) -> int:
    if task in job:
        time.sleep(job[task])
        raise CorruptShard(f"task {task}")
    return task


def touching(job: str, task: int) -> int:
    Path(job, str(task)).touch()
    time.sleep(0.3)
    return task


def slow_first(job: float, task: int) -> int:
    time.sleep(job if task == 0 else 0)
    return task


def dying(job: object, task: int) -> int:
    os._exit(3)


# ---- a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # one rule for all clusters of this machine
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Cluster(initialize_head=True, head_node_args=small)
        made.add_node(num_cpus=1, object_store_memory=100 << 20)
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def test_both_nodes_work_and_the_results_are_those_of_one_process(cluster):
    found = list(run_ray(located, 7, iter(range(60))))
    assert [result for result, _, _ in found] == list(
        run_here(lambda job, task: job * task, 7, range(60))
    )
    assert len({node for _, node, _ in found}) == 2
    assert {threads for _, _, threads in found} == {"1"}
    assert not ray.is_initialized()


def test_never_more_tasks_drawn_than_agreed(cluster):
    drawn = most = 0

    def tasks() -> Iterator[int]:
        nonlocal drawn
        for task in range(20):
            drawn += 1
            yield task

    for taken, result in enumerate(run_ray(slow_first, 0.5, tasks(), ahead=3)):
        assert result == taken
        most = max(most, drawn - taken)
    assert (drawn, most) == (20, 3 * 2)  # the cluster has two cores


def test_the_lowest_task_that_fails_is_heard_after_the_results_before_it(cluster):
    given: list[int] = []
    with pytest.raises(CorruptShard, match=r"^task 3$") as raised:
        given += run_ray(failing, {3: 0.5, 4: 0.0}, range(10))
    assert given == [0, 1, 2]
    assert type(raised.value) is CorruptShard
    assert isinstance(raised.value.__cause__, WorkerTraceback)


def test_a_source_that_fails_is_heard_in_its_turn(cluster):
    def tasks() -> Iterator[int]:
        yield from range(3)
        raise CorpusError("half a file")

    given: list[int] = []
    with pytest.raises(CorpusError, match="half a file"):
        given += run_ray(scaled, 2, tasks())
    assert given == [0, 2, 4]


def test_closing_early_cancels_what_has_not_begun(cluster, tmp_path):
    with closing(run_ray(touching, str(tmp_path), range(1000), ahead=8)) as results:
        next(results)
    before = len(list(tmp_path.iterdir()))
    assert before < 10  # of the 16 that were drawn
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == before


def test_a_task_that_kills_its_workers_is_an_error(cluster):
    with pytest.raises(CorpusError, match="lost a task and gave it up"):
        list(run_ray(dying, None, [1]))


def test_a_node_lost_half_way_changes_nothing(cluster):
    lost = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    given = []
    with closing(run_ray(located, 5, range(80))) as results:
        for result, node, _ in results:
            given.append((result, node))
            if lost is not None and node == lost.node_id and len(given) > 5:
                cluster.remove_node(lost, allow_graceful=False)
                lost = None
    assert [result for result, _ in given] == [5 * task for task in range(80)]
    assert lost is None


def test_a_connection_of_the_caller_is_used_and_kept(cluster):
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert list(run_ray(scaled, 2, range(3))) == [0, 2, 4]
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_an_address_nobody_answers_at_is_an_error(monkeypatch):
    def init(**options: object) -> None:  # the real one tries for minutes
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(CorpusError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        list(run_ray(scaled, 2, range(3)))


ALONE = """
import psutil
from siftloader.engines import run_ray
from test_ray import scaled

results = run_ray(scaled, 3, range(6), workers=1)
assert next(results) == 0
during = psutil.Process().children(recursive=True)
assert during
assert list(results) == [3, 6, 9, 12, 15]
assert not any(child.is_running() for child in during), during
"""


def test_without_a_cluster_one_is_started_and_stopped():
    """In a process of its own: one that has used two clusters loses the objects of the first."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Where no cluster of the other tests has left its address; sockets want short paths.
        environment["RAY_TMPDIR"] = folder
        done = subprocess.run(
            [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CorpusError, match=r"pip install 'siftloader\[ray\]'"):
        list(run_ray(scaled, 2, range(3)))


@pytest.mark.parametrize("options", [{"workers": 0}, {"ahead": 0}], ids=str)
def test_options_are_checked_at_once(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        run_ray(scaled, 1, [1], **options)


# The whole job.

DEMO = Path(__file__).parents[1] / "shards" / "demo"


@pytest.mark.parametrize("objective", ["mlm", "mlm-nsp", "clm"])
def test_a_corpus_prepared_on_ray_has_the_bytes_of_one_prepared_here(cluster, tmp_path, objective):
    """Law 7, across engines: eight blocks, two nodes."""
    text = lzma.decompress((DEMO / "embedded_pd.txt.xz").read_bytes()).decode()[: 1 << 20]
    (tmp_path / "t.txt").write_text(text)
    found = {}
    for engine, workers in (("local", 1), ("ray", None), ("ray", 3)):
        out = tmp_path / f"{engine}-{workers}" / "set"
        options = Preparation(
            out=out,
            tokenizer=DEMO / "tokenizer.json",
            objective=objective,
            seq_len=64,
            val_fraction=0.1,
            samples_per_shard=500,
            block_bytes=1 << 17,
            engine=engine,
            workers=workers,
        )
        prepare([str(tmp_path / "t.txt")], options)
        found[engine, workers] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(found["local", 1]) > 8
    assert found["ray", None] == found["ray", 3] == found["local", 1]


def test_bad_text_met_on_ray_is_told_as_it_is_here(cluster, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"good\n\nbad \xff\n")
    options = Preparation(
        out=tmp_path / "out", tokenizer=DEMO / "tokenizer.json", engine="ray", workers=None
    )
    with pytest.raises(CorpusError, match=r"t\.txt: line 3, byte 10: not UTF-8"):
        prepare([str(tmp_path / "t.txt")], options)
