"""The table and the page say what the runs say, and nothing that they hold can break out of the page."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from synthetic import LADDER, few, realistic, runs_of, without

from siftloader.comparison import Name, difference, ends, worth
from siftloader.errors import SiftError
from siftloader.intervals import interval
from siftloader.report import Selections, table, write_page
from siftloader.results import Results
from siftloader.selection_log import SelectionLog


EVIL = "<script>alert('1')</script> \"onload=\" & $x_1$"
VOID = {"meta", "br", "path", "use", "rect", "circle", "img", "hr", "link"}


class Page(HTMLParser):
    """Tags with their attributes, ids, texts; every tag that opens must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- the table -------------------------------------------------------------------------------------


def rows_of(told: str, which: int = 0) -> dict[str, list[str]]:
    """The rows of a table by their first cells: that of the arms, or (1) that of their audits."""
    told = "arm  " + told.split("\narm  ")[1 + which]
    lines = [re.split(r"  +", line.strip()) for line in told.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 4}


def test_the_table_says_what_the_comparison_found():
    results = realistic()
    rows = rows_of(table(results))
    assert list(rows)[:3] == ["arm", "plain", "random"], "controls first"
    assert list(rows)[-4:] == list(LADDER), "other budgets last, in order"
    losses = {arm: float(cells[3]) for arm, cells in rows.items() if arm != "arm"}
    middle = [losses[arm] for arm in list(rows)[3:-4]]
    assert middle == sorted(middle)
    for against, column in (("plain", 4), ("random", 5)):
        found = difference(results, "gpt", "loss", against)
        assert rows["loss"][column] == f"{found.mean:+.4f} ± {found.half_width:.4f}"
    run_ends = [run.end for run in ends(results.runs)["loss"].values()]
    assert losses["loss"] == round(float(np.mean([end.loss for end in run_ends])), 4)
    assert rows["loss"][0] == "5" and rows["loss"][1] == "64,000"
    factor = worth(results, "gpt", "loss", "plain").factor
    assert rows["loss"][-2:] == [f"{factor:.2f}", "better"]
    assert rows["rarity"][-1] == "worse"
    told = table(results)
    for words in (
        "2 better",
        "57 h / 43 h",
        "repeats: the same arm",
        "0.5, 0.71, 1, 1.41, 2 of its",
    ):
        assert words in " ".join(told.split())
    assert max(map(len, told.splitlines()[5:])) <= 130


def test_audits_tell_why_beside_it():
    results = realistic(3)
    rows = rows_of(table(results), 1)
    heads = ["rho", "at most", "overlap", "rank correlation", "sigma", "scoring"]
    assert rows["arm"] == ["population loss", "minus plain", *heads]
    assert list(rows)[1:5] == ["plain", "loss", "loss, exit 3", "entropy"], "in the order of arms"
    assert "random" not in rows and "rarity" not in rows, "nobody audited them"
    found = ends(results.runs)

    def last_quarter(arm: str) -> np.ndarray:
        # 19 audits each, at 0.05, 0.1, ..., 0.95 of a run.
        losses = [
            [audit["population_loss"] for audit in run.audits] for run in found[arm].values()
        ]
        return np.array(losses)[:, -4:].mean(1)

    apart = last_quarter("loss") - last_quarter("plain")
    mean, half_width = interval(apart)
    assert rows["loss"][0] == f"{last_quarter('loss').mean():.4f}"
    assert rows["loss"][1] == f"{mean:+.4f} ± {half_width:.4f}"
    # Over sifted steps alone: 1.3 - 0.1 * done for done = 0.05, 0.1, ..., 0.75.
    assert rows["loss"][2:] == ["1.260", "1.400", "92.0%", "0.80", "0.100", "17.0%"]
    assert rows["plain"][1] == "1.250", "never sifted: over all; and no difference from itself"
    assert "minus plain" in rows["arm"] and "4 seeds" not in table(results)


def test_runs_that_nobody_audited_have_no_table_of_audits():
    runs = tuple(replace(run, audits=()) for run in realistic(2).runs)
    assert table(Results(runs)).count("\narm  ") == 1
    some = [replace(run, audits=run.audits * (run.seed == 1)) for run in realistic(2).runs]
    rows = rows_of(table(Results(tuple(some))), 1)
    assert "±" not in rows["loss"][1] and rows["loss"][1] != "", "one pair has no interval"
    lost = [replace(run, audits=run.audits * (run.arm == "loss")) for run in realistic(2).runs]
    assert rows_of(table(Results(tuple(lost))), 1)["loss"][1] == "1.260", "nothing to subtract"


def test_notes_are_only_those_that_apply():
    told = table(few())
    for words in ("speed-up", "repeats", "not finished", "Holm", "random"):
        assert words not in told
    assert "minus plain" in told
    alone = table(Results(tuple(runs_of("plain", 0, 1, 2, None, 1))))
    assert "Nothing here can be compared with plain" in alone and "interval" not in alone


def test_a_verdict_that_does_not_survive_many_arms_is_marked():
    results = few(*(run for k in range(30) for run in runs_of(f"arm {k}", 0, 1, 2, "loss", 1)))
    marked = [row for row in rows_of(table(results)).values() if row[-1].endswith("†")]
    assert marked and all(re.fullmatch("(better|worse)(, by little)?†", row[-1]) for row in marked)


def test_unfinished_runs_are_told_and_left_out():
    late = runs_of("loss", -0.02, 1.2, 3, "loss", 1)[2]
    results = few(replace(late, evaluations=late.evaluations[:-1]))
    assert "not finished, and left out: loss (seed 2)" in table(results)
    assert rows_of(table(results))["loss"][0] == "2"
    many = [replace(late, seed=seed, evaluations=()) for seed in range(2, 12)]
    assert "and 4 more" in table(few(*many))


def test_fewer_pairs_than_seeds_are_told():
    results = few(*runs_of("loss", -0.02, 1.2, 4, "loss", 1)[2:])
    assert "(2 seeds)" in rows_of(table(results))["loss"][4]


def test_without_the_control_it_says_which_arms_there_are(tmp_path):
    for call in (
        table,
        lambda *given: write_page(given[0], tmp_path / "x.html", control=given[1]),
    ):
        with pytest.raises(
            SiftError, match=r"no finished run of an arm 'bert' .*only loss, plain;"
        ):
            call(few(), "bert")
    with pytest.raises(SiftError, match="none has finished"):
        table(Results(tuple(replace(run, evaluations=()) for run in few().runs)))
    assert not (tmp_path / "x.html").exists()


def test_an_experiment_without_the_control_is_shown_without_differences():
    other = [replace(run, experiment="other") for run in runs_of("loss", 0, 1, 2, "loss", 1)]
    assert "Nothing here can be compared with plain" in table(few(*other))


# --- the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def selected(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("selections") / f"{EVIL.replace('/', '')}.parquet"
    log = SelectionLog(folder)
    generator = torch.Generator().manual_seed(0)
    for pool in range(30):
        ids = torch.randint(0, 30, (8,), generator=generator)
        scores = torch.rand(8, generator=generator)
        log.add(10 * pool, pool, ids, scores, scores.topk(4).indices, labels=ids + 1)
    log.flush()
    return folder


@pytest.fixture(scope="module")
def evil(selected, tmp_path_factory) -> str:
    """A page on which whatever comes from outside would like to be more than text."""
    runs = [
        replace(run, arm=f"{run.arm} {EVIL} 中文" * (run.arm == "loss") or run.arm)
        for run in few().runs
    ]
    runs += [
        replace(run, settings={EVIL: EVIL, "lr": 1}) for run in runs_of("x", 0, 1, 2, EVIL, 1)
    ]
    runs += [replace(run, arm="$x_1$ is no sum") for run in runs_of("y", 0.1, 1, 2, None, 1)]
    runs = [replace(run, experiment=EVIL) for run in runs]
    path = tmp_path_factory.mktemp("page") / "report.html"
    texts = Selections(selected, lambda ids: dict.fromkeys(ids, f"text {EVIL}"), note=EVIL)
    write_page(Results(tuple(runs)), path, selection_logs=[texts])
    return path.read_text(encoding="utf-8")


def test_nothing_from_outside_is_more_than_text(evil):
    page = Page(evil)
    assert {"script", "img", "iframe", "object", "link"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    assert page.text.count(EVIL) > 8, "but it is all there to read"
    assert f"text {EVIL}" in page.text and "中文" in page.text
    assert ">$x_1$ is no sum</text>" in evil, "nor a formula"


def test_the_page_fetches_nothing(evil):
    assert "http-equiv" in evil and "default-src 'none'" in evil
    addresses = set(re.findall(r"https?://[^\"'\s<]+", evil))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for _, attributes in Page(evil).tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "@import" not in evil and not re.search(r"url\((?!#)", evil)


def test_ids_are_used_once_and_references_lead_somewhere(evil):
    attributes = [attributes for _, attributes in Page(evil).tags]
    ids = [one["id"] for one in attributes if "id" in one]
    assert len(ids) == len(set(ids)) > 20
    pointed = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", evil))
    assert {one or other for one, other in pointed} <= set(ids) and pointed
    assert {one["aria-labelledby"] for one in attributes if "aria-labelledby" in one} <= set(ids)


def test_figures_are_svg_with_titles_and_the_colours_of_the_page(evil):
    pictures = re.findall(r"<svg.*?</svg>", evil, flags=re.DOTALL)
    assert len(pictures) == 7, "loss, accuracy, samples, time, population, audits, histograms"
    for picture in pictures:
        tree = ElementTree.fromstring(picture)
        assert tree.get("viewBox") and tree.get("width") is None
        assert tree[0].tag.endswith("title") and len(tree[0].text) > 20
        assert "#0102" not in picture and "#0103" not in picture, "numbers that stand for names"
        assert "var(--ink)" in picture
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", evil))
    assert used <= set(re.findall(r"(--[a-z0-9]+):", evil)), "every colour is given"


def test_the_page_is_in_order_for_those_who_do_not_see_it(evil):
    page = Page(evil)
    assert page.named("html")[0]["lang"] == "en" and len(page.named("h1")) == 1
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(one.get("scope") in ("col", "row") for one in page.named("th"))
    for one in page.named("div"):
        assert one["aria-label"] and one["tabindex"] == "0", (
            "what scrolls can be reached by keyboard"
        )


def test_the_same_results_are_the_same_bytes(tmp_path):
    results = few()
    write_page(results, tmp_path / "one.html")
    write_page(Results(results.runs[::-1]), tmp_path / "other.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "other.html"]


def test_the_papers_tables_and_the_settings_are_there(tmp_path):
    results = few(*runs_of("loss, exit 3", -0.01, 1.4, 2, "loss", 3))
    write_page(results, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    one, three = (
        np.mean([run.end.accuracy for run in ends(results.runs)[arm].values()])
        for arm in ("loss", "loss, exit 3")
    )
    told = difference(results, "gpt", "loss", "plain", measure="accuracy")
    assert (
        f"<td>{one:.2%} ({100 * told.mean:+.2f} ± {100 * told.half_width:.2f} points)</td>" in text
    )
    assert f"<td>{three:.2%} (" in text
    assert "<td>160 s (16.7% of all)</td>" in text, (
        "0.4 s for each of 2000 steps, 0.2 of it scoring"
    )
    assert "<td>AMD EPYC, 2 cores</td>" in text and "<td>2.13.0</td>" in text
    assert "<h3>Figure 3. Population loss" in text and "<h3>Figure 4. Audits" in text
    assert "<h3>Why: what audits say of each arm" in text


def test_variants_of_a_criterion_have_rows_of_their_own(tmp_path):
    more = (
        *runs_of("loss, rank sampled", 0.1, 1.2, 2, "loss", 1),
        *runs_of("loss, exit 3", -0.01, 1.4, 2, "loss", 3),
    )
    write_page(few(*more), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    table = text[text.index("Table 1.") : text.index("Table 2.")]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', table)
    assert [name for name, _, _ in rows] == [
        "plain (nothing is scored)",
        "loss",
        "loss, rank sampled",
    ]
    assert all(cell.count("%") == 1 for cell in rows[1][1:]), "both exit layers"
    assert [cell.count("%") for cell in rows[2][1:]] == [1, 0]


def test_arms_stand_in_the_order_of_their_differences_whichever_seeds_they_have():
    """Seed 1 ends lower whatever the arm: finished alone, a worse arm has the lower mean."""
    every = [*runs_of("worse", 0.01, 1, 2, "loss", 1), *few().runs]
    mean = {seed: np.mean([run.end.loss for run in every if run.seed == seed]) for seed in (0, 1)}
    low = min(mean, key=mean.get)
    results = Results(tuple(run for run in every if run.arm != "worse" or run.seed == low))
    rows = rows_of(table(results))
    assert float(rows["worse"][3]) < float(rows["loss"][3])
    assert list(rows) == ["arm", "plain", "loss", "worse"]


def test_a_difference_that_is_little_is_told_and_coloured(tmp_path):
    small = [without(run, loss=run.end.loss + 0.001 + 1e-6 * run.seed) for run in few().runs]
    small = [replace(run, arm="small") for run in small if run.arm == "plain"]
    plain = [without(run, loss=run.end.loss) for run in few().runs if run.arm == "plain"]
    results = Results((*small, *plain))
    assert rows_of(table(results))["small"][-1] == "worse, by little"
    assert "1 worse by little." in table(results) and "by little: both" in table(results)
    write_page(results, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert '<td class="word worse">worse, by little</td>' in text
    assert "var(--worse)" in text[text.index("<svg") : text.index("</svg>")]


def test_a_control_at_one_of_its_budgets_is_explained():
    with pytest.raises(SiftError, match=r"'plain@0.5' is 'plain' at another budget.*name 'plain'"):
        table(realistic(2), "plain@0.5")


def test_only_some_budgets_of_the_control_and_no_accuracy_of_it_make_a_page(tmp_path):
    early = [run for run in realistic(2).runs if run.arm != "plain" and run.arm != "plain#1"]
    mute = [
        without(run, accuracy=math.nan) if Name.of(run.arm).base == "plain" else run
        for run in realistic(2).runs
    ]
    for number, runs in enumerate((early, mute)):
        write_page(Results(tuple(runs)), tmp_path / f"{number}.html")


def test_scoring_that_costs_less_than_can_be_measured_is_not_told_in_negative_seconds(tmp_path):
    free = runs_of("loss", -0.02, 0.99, 2, "loss", 1)
    write_page(Results((*runs_of("plain", 0, 1, 2, None, 1), *free)), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "<td>too little to measure</td>" in text[text.index("Table 2") :]


def test_without_accuracy_audits_or_settings_their_parts_are_left_out(tmp_path):
    bare = [replace(without(run, accuracy=math.nan, fields={}), settings={}) for run in few().runs]
    write_page(Results(tuple(bare)), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    for words in ("accuracy", "Audits", "Table 1", "Table 2", "Settings"):
        assert words not in text.split("</style>")[1], words


def test_odd_results_make_a_page_too(tmp_path):
    """One evaluation, a run that diverged, an arm like its control, an experiment under way, one seed."""
    short = [
        replace(run, evaluations=run.evaluations[-1:])
        for run in runs_of("short", 0, 1, 2, None, 1)
    ]
    wild = [without(run, loss=math.nan) for run in runs_of("wild", 0, 1, 2, None, 1)]
    plain = runs_of("plain", 0, 1, 2, None, 1)
    level = [replace(run, arm="level") for run in plain]
    begun = [replace(run, experiment="begun", evaluations=()) for run in short]
    single = [replace(run, experiment="single") for run in (plain[0], short[0], wild[0])]
    results = Results((*plain, *short, *wild, *level, *begun, *single))
    told = table(results)
    assert "1 level" in told and "1 diverged" in told and "1 with one seed only" in told
    write_page(results, tmp_path / "x.html")
    assert "No run has finished" in (tmp_path / "x.html").read_text()


def test_without_matplotlib_the_table_is_there_and_the_page_says_what_to_install(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "better" in table(few())
    with pytest.raises(SiftError, match=r"matplotlib.*siftloader\[log\]"):
        write_page(few(), tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_report_needs_no_torch():
    code = """
        import sys
        import siftloader.report, siftloader.comparison, siftloader.results
        assert "torch" not in sys.modules and "matplotlib" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
