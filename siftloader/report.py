"""What a comparison found, for people: a table for the terminal, a page to look at.

    results = read_results("runs/compare")
    print(table(results, control="plain"))
    write_page(results, "runs/compare/report.html", selection_logs=[Selections("runs/x.parquet")])

The page is one HTML file with its figures inside: nothing is fetched, no script runs, the same results give
the same bytes. Needs numpy and, for the page, matplotlib; pyarrow for selection logs.

The figures and tables are those of the paper (Das et al., ICML 2024) in the runs' own numbers: held-out
accuracy and loss against samples and against time, accuracy and scoring time by criterion and exit layer.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siftloader.comparison import (
    LEVEL,
    RANDOM,
    Difference,
    Measure,
    Name,
    Worth,
    control_of,
    differences,
    direction,
    ends,
    noise,
    signed,
    worth,
)
from siftloader.errors import SiftError
from siftloader.figures import (
    BANDED,
    audits,
    colors,
    curves,
    escaped,
    forest,
    histograms,
    population,
)
from siftloader.intervals import interval
from siftloader.results import Results, Run
from siftloader.selection_report import (
    Group,
    by_length,
    by_sample,
    by_source,
    extremes,
    read_log,
)
from siftloader.shards import write_atomically


@dataclass(frozen=True)
class Selections:
    """A selection log to show, and maybe how to find what stands behind its ids.

    ``texts`` turns ids into texts, ``sources`` are the names of the sources by number; ``note`` is what the
    reader should know of them.
    """

    folder: str | os.PathLike[str]
    texts: Callable[[list[int]], dict[int, str]] | None = None
    sources: Sequence[str] = ()
    note: str = ""


# ---- what is told of an arm


@dataclass(frozen=True)
class _Line:
    # An arm in the table: means over its finished seeds, and its differences.
    arm: str
    seeds: int
    samples: float
    seconds: float
    loss: float
    accuracy: float
    control: Difference | None
    random: Difference | None
    worth: Worth


def _lines(results: Results, experiment: str, control: str) -> list[_Line]:
    """The control and its random twin first, then arms from the best to the worst, other budgets last."""
    found = ends(results.of(experiment))
    against = differences(results, experiment, control)
    random = differences(results, experiment, RANDOM) if control != RANDOM else {}
    lines = []
    for arm, runs in found.items():
        finals = [run.end for run in runs.values() if run.end is not None]
        lines.append(
            _Line(
                arm,
                len(finals),
                float(np.mean([end.samples for end in finals])),
                float(np.mean([end.seconds for end in finals])),
                float(np.mean([end.loss for end in finals])),
                float(np.mean([end.accuracy for end in finals])),
                against.get(arm),
                random.get(arm) if Name.of(arm).base != control else None,
                worth(results, experiment, arm, control),
            )
        )

    def place(line: _Line) -> tuple[Any, ...]:
        name = Name.of(line.arm)
        if name.budget != 1:
            return (3, name.budget, name.base != control, line.arm)
        if line.arm in (control, RANDOM):
            return (0, line.arm != control)
        # By the difference, not the mean: that depends on which seeds are finished.
        apart = line.control.mean if line.control else math.nan
        return (2, math.isnan(apart), 0 if math.isnan(apart) else apart, line.arm)

    return sorted(lines, key=place)


def _rows(lines: Sequence[_Line], control: str) -> list[list[str]]:
    """The table as text, headings first; columns that no arm fills are left out."""
    rows = [
        [
            *("arm", "seeds", "samples", "seconds", "loss", f"minus {control}", f"minus {RANDOM}"),
            *("accuracy", "speed-up", "verdict"),
        ]
    ]
    for line in lines:
        one = line.control
        told = "" if one is None else one.verdict + "†" * (not one.holds)
        own = Name.of(line.arm).base == control
        rows.append(
            [
                line.arm,
                str(line.seeds),
                f"{line.samples:,.0f}",
                _count(line.seconds),
                _figure(line.loss),
                signed(one, line.seeds),
                signed(line.random, line.seeds),
                "" if math.isnan(line.accuracy) else f"{line.accuracy:.2%}",
                "" if own else _speed(line.worth),
                told,
            ]
        )
    filled = [any(row[column] for row in rows[1:]) for column in range(len(rows[0]))]
    return [[cell for cell, keep in zip(row, filled, strict=True) if keep] for row in rows]


def _speed(found: Worth) -> str:
    if found.bound == "?":
        return ""
    return f"{'' if found.bound == '=' else found.bound + ' '}{found.factor:.2f}"


def _figure(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _summary(results: Results, experiment: str, control: str, lines: Sequence[_Line]) -> str:
    """One or two sentences: how the arms ended."""
    found = [line.control for line in lines if line.control is not None]
    if not found:
        return f"Nothing here can be compared with {control}."
    count = {said: sum(one.verdict == said for one in found) for said in _VERDICTS}
    told = ", ".join(f"{number} {_VERDICTS[said]}" for said, number in count.items() if number)
    arms = f"{len(found)} arm{'s' * (len(found) > 1)}"
    best = min(found, key=lambda one: one.mean if math.isfinite(one.mean) else math.inf)
    sentence = f"Of {arms} compared with {control}: {told}."
    if math.isfinite(best.mean):
        sentence += f" The lowest: “{best.arm}”, {signed(best, len(best.seeds))} nats."
    return sentence


_VERDICTS = {
    "better": "better",
    "better, by little": "better by little",
    "level": "level",
    "inconclusive": "inconclusive",
    "worse, by little": "worse by little",
    "worse": "worse",
    "one seed": "with one seed only",
    "no seed": "without a seed in common",
    "diverged": "diverged",
    "control diverged": "without a control that converged",
}


def _notes(results: Results, experiment: str, control: str, lines: Sequence[_Line]) -> list[str]:
    """What a reader must know to read the table, in plain words; only what applies."""
    found = [line.control for line in lines if line.control is not None]
    notes = ["loss: held out, nats, mean over seeds at the end of training."]
    if found:
        notes.append(
            f"minus {control}: the same seed in both arms, the mean of those differences and the half-width "
            f"of its 95 % interval (Student's t); below 0 is better. better, worse: the interval leaves "
            f"out 0; level: it lies within {LEVEL['loss']} nats of 0; by little: both; inconclusive: more "
            f"seeds would tell."
        )
    if sum(one.p is not None for one in found) > 1:
        notes.append(
            f"{len(found)} arms were compared with {control}: by chance alone, about one in twenty equal arms "
            f"is called better or worse. Marked †: a verdict that does not survive Holm's correction for that."
        )
    if any(line.random for line in lines):
        notes.append(
            f"minus {RANDOM}: the same against a random choice from the same candidates, which shows what "
            f"the score adds."
        )
    if any(_speed(line.worth) for line in lines):
        budgets = sorted(
            Name.of(line.arm).budget for line in lines if Name.of(line.arm).base == control
        )
        notes.append(
            f"speed-up: how much more time {control} needs for the same loss, scoring charged; {control} was "
            f"run at {', '.join(f'{budget:g}' for budget in budgets)} of its budget, its learning rate "
            f"decayed at each, with straight lines in log time between; > and <: beyond those. The "
            f"paper's is 57 h / 43 h = 1.33."
        )
    if told := noise(results, experiment):
        notes.append(
            f"repeats: the same arm under the same seed ends {told.deviation:.4f} nats apart (one standard "
            f"deviation, {told.runs} runs): what the machine alone does."
        )
    if unfinished := [run for run in results.unfinished if run.experiment == experiment]:
        names = ", ".join(f"{run.arm} (seed {run.seed})" for run in unfinished[:6])
        more = f" and {len(unfinished) - 6} more" * (len(unfinished) > 6)
        notes.append(f"not finished, and left out: {names}{more}.")
    return notes


# ---- what audits say of it


def _audit_rows(
    results: Results, experiment: str, control: str, lines: Sequence[_Line]
) -> list[list[str]]:
    """Why an arm won or lost, headings first; [] where no run was audited."""
    found = ends(results.of(experiment))
    losses = {
        arm: {seed: _population(run) for seed, run in runs.items() if run.audits}
        for arm, runs in found.items()
    }
    rows = []
    for line in lines:
        own, other = losses[line.arm], control_of(line.arm, control, found)
        if not own:
            continue
        theirs = losses.get(other or "", {})
        apart = [own[seed] - theirs[seed] for seed in sorted(own.keys() & theirs.keys())]
        mean, half_width = interval(apart)
        told = f"{mean:+.4f}" if math.isfinite(mean) else ""
        told += f" ± {half_width:.4f}" if half_width is not None else ""
        runs = [run for run in found[line.arm].values() if run.audits]
        means = [_figure_of(runs, name) for name in _AUDITED]
        cells = [
            f"{mean:{form}}" if math.isfinite(mean) else ""
            for mean, form in zip(means, _AUDITED.values(), strict=True)
        ]
        rows.append([line.arm, _figure(float(np.mean([*own.values()]))), told, *cells])
    if not rows:
        return []
    names = ["rho", "at most", "overlap", "rank correlation", "sigma", "scoring"]
    return [["arm", "population loss", f"minus {control}", *names], *rows]


# Of an audit: its figures, and how each is told.
_AUDITED = {
    "rho": ".3f",
    "rho_full": ".3f",
    "overlap": ".1%",
    "spearman": ".2f",
    "sigma": ".3f",
    "scoring_cost": ".1%",
}


def _population(run: Run) -> float:
    """Mean loss of all candidates in the last quarter of a run's audits, nats."""
    found = _numbers(run.audits, "population_loss")
    return float(np.mean(found[-max(1, len(found) // 4) :])) if found else math.nan


def _figure_of(runs: Iterable[Run], name: str) -> float:
    """Mean over runs of a figure's mean over the audits of sifted steps; over all where none was sifted."""
    means = []
    for run in runs:
        sifted = [audit for audit in run.audits if audit.get("sifting")]
        if found := _numbers(sifted or run.audits, name):
            means.append(float(np.mean(found)))
    return float(np.mean(means)) if means else math.nan


def _numbers(audits: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    found = (audit.get(name) for audit in audits)
    return [float(one) for one in found if isinstance(one, int | float)]


def _audit_note(control: str) -> str:
    return (
        f"audits: every so often the candidates of a step are also scored by the whole model. population loss: "
        f"mean loss of all of them, before any is chosen, over the last quarter of a run: the training curve that "
        f"may be compared across arms (that of a sifted run's own loss is biased upward by its choice), with its "
        f"paired difference from {control} (on the same samples where an arm draws as many candidates a step; "
        f"elsewhere on others, which adds noise). rho: mean loss of the kept over that of all (Theorem 1), beside the most "
        f"that as many rows reach; overlap, rank correlation: with the whole model's choice and scores; sigma: "
        f"deviation of the log of loss at the exit over loss (Theorem 4); scoring: its time in that of a step "
        f"without it, as the run itself saw it. All but the first over sifted steps; of an arm that never sifts, "
        f"what an exit at layer 1 would have kept."
    )


def table(results: Results, control: str = "plain") -> str:
    """Every experiment as a table of its arms, with footnotes; and one of their audits, where there are any.

    Raises SiftError where no experiment has the control among its finished runs.
    """
    _check_control(results, control)
    blocks = []
    for experiment in results.experiments:
        lines = _lines(results, experiment, control)
        if not lines:
            blocks.append(f"{experiment}\nNo run has finished.")
            continue
        notes = "\n".join(
            textwrap.fill(note, 100, initial_indent="  ", subsequent_indent="      ")
            for note in _notes(results, experiment, control, lines)
        )
        said = _summary(results, experiment, control, lines)
        block = f"{experiment}\n{said}\n\n{_aligned(_rows(lines, control))}\n\n{notes}"
        if rows := _audit_rows(results, experiment, control, lines):
            note = textwrap.fill(
                _audit_note(control), 100, initial_indent="  ", subsequent_indent="      "
            )
            block += f"\n\n{_aligned(rows)}\n\n{note}"
        blocks.append(block)
    return "\n\n\n".join(blocks)


def _check_control(results: Results, control: str) -> None:
    arms = {arm for name in results.experiments for arm in ends(results.of(name))}
    if not arms:
        raise SiftError(
            f"{len(results.runs)} runs, and none has finished; there is nothing to compare until one has"
        )
    base = Name.of(control).base
    if base != control and base in arms:
        raise SiftError(
            f"the control {control!r} is {base!r} at another budget, or again: name {base!r}, and every arm "
            f"is compared with it at the arm's own budget"
        )
    if not any(Name.of(arm).base == control for arm in arms):
        raise SiftError(
            f"no finished run of an arm {control!r} to compare with, only {', '.join(sorted(arms))}; name "
            f"one of them as the control"
        )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    # Names to the left, figures to the right, the verdict (last) to the left again.
    last = len(rows[0]) - 1 if rows[0][-1] == "verdict" else len(rows[0])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column in (0, last) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


# ---- the page


def write_page(
    results: Results,
    path: str | os.PathLike[str],
    *,
    control: str = "plain",
    selection_logs: Sequence[Selections] = (),
) -> None:
    """Write one self-contained HTML file: tables, figures, settings, and what was selected.

    Raises SiftError where no experiment has the control, a selection log cannot be read, or matplotlib is
    missing.
    """
    _check_control(results, control)
    selected = [_selections(log, number) for number, log in enumerate(selection_logs)]  # may fail
    found = [_experiment(results, name, control, n) for n, name in enumerate(results.experiments)]
    page = _PAGE.replace("CONTENT", "\n".join(found + selected))
    write_atomically(Path(path), page.encode("utf-8"))


def _experiment(results: Results, experiment: str, control: str, number: int) -> str:
    lines = _lines(results, experiment, control)
    name = f"e{number}"
    parts = [f"<h2>{escaped(experiment)}</h2>"]
    if not lines:
        return _section([*parts, '<p class="lead">No run has finished.</p>'])
    parts.append(f'<p class="lead">{escaped(_summary(results, experiment, control, lines))}</p>')
    measured = any(not math.isnan(line.accuracy) for line in lines)
    measures: list[Measure] = ["loss", "accuracy"] if measured else ["loss"]
    for measure in measures:
        found = [*differences(results, experiment, control, measure).values()]
        if any(math.isfinite(one.mean) for one in found):
            words = f"Each arm minus {control}: held-out {measure}"
            picture = forest(found, control, f"{name}-{measure}")
            caption = (
                "Large dot and bar: mean over seeds and its 95 % interval; small dots: one seed each, the "
                "same in both arms. Grey: too small to care for."
            )
            parts.append(_figure_html(words, picture, caption))
    parts.append(_table_html("How each arm ended", _rows(lines, control)))
    notes = _notes(results, experiment, control, lines)
    parts.append("<ul class='notes'>" + "".join(f"<li>{escaped(n)}</li>" for n in notes) + "</ul>")
    arms = [line.arm for line in lines]
    grey = sum(Name.of(arm).budget == 1 for arm in arms) > len(colors(arms, control))
    for time, words in (
        (False, "Figure 1. Against samples backpropagated"),
        (True, "Figure 2. Against the time charged"),
    ):
        picture = curves(
            results, experiment, control, arms, f"{name}-{'time' if time else 'samples'}", time
        )
        caption = (
            f"Means over seeds; an arm of fewer seeds is drawn as far from {control} as it is by those. The "
            f"beginning leaves the picture, so that the end can be seen."
        )
        if any(line.control and len(line.control.seeds) >= BANDED for line in lines):
            caption += (
                f" Where an arm's band ({BANDED} seeds or more) leaves {control}'s line out, the two differ: it is the 95 % interval "
                f"of their difference, paired by seed."
            )
        caption += " Grey: the other arms." * grey
        if time and any(Name.of(line.arm).budget != 1 for line in lines):
            caption += f" Dots on a dashed line: where {control} ends at other budgets."
        if picture:
            parts.append(_figure_html(words, picture, caption))
    parts += _paper_tables(results, experiment, control)
    if picture := population(results, experiment, control, arms, f"{name}-population"):
        words = "Figure 3. Population loss: all candidates, before any is chosen"
        caption = (
            "Means over seeds, of a pool every so often: few samples, so the lines are rough. Candidates were not trained "
            "on yet (in the first epoch), so this estimates the loss on unseen text, in every arm alike. The table of "
            "audits has paired differences."
        )
        parts.append(_figure_html(words, picture, caption))
    if picture := audits(results, experiment, control, arms, f"{name}-audit"):
        words = "Figure 4. Audits: the exit against the whole model"
        parts.append(
            _figure_html(words, picture, "Means over seeds; notes below the table of audits.")
        )
    if rows := _audit_rows(results, experiment, control, lines):
        parts.append(_table_html("Why: what audits say of each arm", rows))
        parts.append(f'<p class="notes">{escaped(_audit_note(control))}</p>')
    parts += _settings_html(results.of(experiment))
    return _section(parts)


def _paper_tables(results: Results, experiment: str, control: str) -> list[str]:
    """Accuracy and scoring seconds by criterion and exit layer, of arms whose settings name both."""
    found = ends(results.of(experiment))
    against = differences(results, experiment, control, "accuracy")
    cells: dict[tuple[str, str], list[tuple[str, list[Run]]]] = {}
    for arm, runs in found.items():
        settings = next(iter(runs.values())).settings
        criterion, layer = settings.get("criterion"), settings.get("exit_layer")
        if Name.of(arm) == Name(arm) and arm != control and criterion and layer is not None:
            cells.setdefault((str(criterion), str(layer)), []).append((arm, [*runs.values()]))
    if not cells:
        return []
    criteria = sorted({criterion for criterion, _ in cells})
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (len(layer), layer))
    plain = [*found.get(control, {}).values()]

    def accuracy(runs: Sequence[Run]) -> str:
        mean = float(np.mean([run.end.accuracy for run in runs if run.end is not None]))
        if math.isnan(mean):
            return ""
        paired = against.get(Name.of(runs[0].arm).base)
        return f"{mean:.2%}" + (f" ({signed(paired, len(runs))})" if paired else "")

    def told(say: Callable[[Sequence[Run]], str]) -> list[list[str]]:
        rows = [["criterion", *(f"exit layer {layer}" for layer in layers)]]
        if said := say(plain) if plain else "":
            rows.append([f"{control} (nothing is scored)", said, *[""] * (len(layers) - 1)])
        for criterion in criteria:
            first, others = [], []
            for column, layer in enumerate(layers):
                # The plainest name stands for the criterion; its variants have rows of their own.
                arms = sorted(cells.get((criterion, layer), []), key=lambda cell: len(cell[0]))
                first.append(say(arms[0][1]) if arms else "")
                for arm, runs in arms[1:]:
                    row = ["", *[""] * len(layers)]
                    row[0], row[1 + column] = arm, say(runs)
                    others.append(row)
            rows += [[criterion, *first], *others]
        return rows

    tables = []
    for title, say in (
        (
            f"Table 1. Held-out accuracy (and minus {control}) by criterion and exit layer",
            accuracy,
        ),
        ("Table 2. Seconds of scoring by criterion and exit layer", _scoring),
    ):
        rows = told(say)
        if any(cell for row in rows[1:] for cell in row[1:]):
            tables.append(_table_html(title, rows))
    return tables


def _scoring(runs: Sequence[Run]) -> str:
    found = []
    for run in runs:
        if run.end is not None:
            seconds = run.settings.get("seconds_scoring", run.end.fields.get("seconds_scoring"))
            if isinstance(seconds, int | float) and math.isfinite(seconds):
                found.append((float(seconds), run.end.seconds))
    scoring, all_of_it = map(sum, zip(*found, strict=True)) if found else (0.0, 0.0)
    if scoring <= 0:  # charges that were measured may lie below 0 by chance
        return "too little to measure" if scoring else ""
    share = f" ({scoring / all_of_it:.1%} of all)" if all_of_it > 0 else ""
    return f"{_count(scoring / len(found))} s{share}"


def _settings_html(runs: Sequence[Run]) -> list[str]:
    """What all runs share, once; what differs, arm by arm."""
    by_run = [(run.arm, _flat(run.settings)) for run in runs]
    names = sorted({name for _, settings in by_run for name in settings})
    if not names:
        return []
    shared: list[str] = []
    differing: list[str] = []
    for name in names:
        values = {settings.get(name) for _, settings in by_run}
        (shared if len(values) == 1 else differing).append(name)
    parts = ["<details><summary>Settings, machine and versions of the runs</summary>"]
    if shared:
        rows = [["setting", "value"], *([name, by_run[0][1][name]] for name in shared)]
        parts.append(_table_html("The same in all runs", rows, figures=False))
    if differing:
        rows = [["arm", *differing]]
        for arm in sorted({arm for arm, _ in by_run}):
            row = []
            for name in differing:
                own = sorted(
                    {settings.get(name, "") for other, settings in by_run if other == arm}
                )
                row.append(", ".join(own[:3]) + f", … ({len(own)})" * (len(own) > 3))
            rows.append([arm, *row])
        parts.append(_table_html("What differs", rows, figures=False))
    return [*parts, "</details>"]


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        else:
            told = value if isinstance(value, str) else json.dumps(value)
            found[above + name] = "none" if value is None else told
    return found


def _selections(log: Selections, number: int) -> str:
    rows = read_log(log.folder)
    name = Path(log.folder).name
    parts = [f"<h2>What was selected: {escaped(name)}</h2>"]
    kept = float(rows["kept"].to_numpy().mean())
    samples = by_sample(rows)
    parts.append(
        f'<p class="lead">{len(rows):,} candidates scored, {kept:.1%} of them kept; {len(samples):,} '
        f"different samples.</p>"
    )
    if picture := histograms(rows, f"s{number}", name):
        caption = "Each panel a third of the steps; areas are shares of the candidates."
        parts.append(_figure_html("Scores of the kept and the dropped", picture, caption))
    for words, found in zip(("Kept most", "Kept least"), extremes(samples, 12), strict=True):
        said = log.texts([row["id"] for row in found]) if log.texts else {}
        cells = [["id", "seen", "kept", "mean score", *["text"] * bool(said)]]
        for row in found:
            score = "-" if row["score"] is None else f"{row['score']:.3f}"
            cells.append([str(row["id"]), str(row["seen"]), str(row["kept"]), score])
            if said:
                cells[-1].append(said.get(row["id"], ""))
        parts.append(_table_html(words, cells))
    groups = (
        ("Kept by length (labelled positions)", by_length(rows)),
        ("Kept by source", by_source(rows, names=log.sources)),
    )
    for words, group in groups:
        if len(group) > 1:
            parts.append(_table_html(words, _group_rows(group)))
    if log.note:
        parts.append(f'<p class="notes">{escaped(log.note)}</p>')
    return _section(parts)


def _group_rows(groups: Iterable[Group]) -> list[list[str]]:
    rows = [["", "candidates", "kept", "mean score"]]
    for group in groups:
        score = f"{group.score:.3f}" if math.isfinite(group.score) else "-"
        rows.append([group.name, f"{group.rows:,}", f"{group.share:.1%}", score])
    return rows


def _section(parts: Iterable[str]) -> str:
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _figure_html(title: str, picture: str, caption: str) -> str:
    return (
        f'<figure><h3>{escaped(title)}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escaped(title)}">{picture}</div><figcaption>{escaped(caption)}</figcaption></figure>'
    )


def _table_html(title: str, rows: Sequence[Sequence[str]], figures: bool = True) -> str:
    head = "".join(
        f'<th scope="col"{_WORDS.get(cell, "")}>{escaped(cell)}</th>' for cell in rows[0]
    )
    body = []
    for row in rows[1:]:
        cells = [_cell(cell, rows[0][column]) for column, cell in enumerate(row) if column]
        body.append(f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(cells)}</tr>')
    return (
        f'<h3>{escaped(title)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{escaped(title)}">'
        f"<table{' class=figures' * figures}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}"
        f"</tbody></table></div>"
    )


_WORDS = {"verdict": ' class="word"', "text": ' class="word text"'}  # these stand to the left


def _cell(text: str, heading: str) -> str:
    if heading == "verdict" and (word := direction(text.rstrip("†"))):
        return f'<td class="word {word}">{escaped(text)}</td>'
    return f"<td{_WORDS.get(heading, '')}>{escaped(text)}</td>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What the runs found</title>
<style>
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --page: #ffffff; --ink: #1b1f24; --muted: #5c6670; --grid: #d9dee3; --stripe: #f6f7f9;
  --better: #0a6b3d; --worse: #b3261e;
  --series0: #0b6e99; --series1: #c2571b; --series2: #7a3e9d; --series3: #4d7c0f; --series4: #b8326f;
  --series5: #806000; --series6: #00776c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e8eaed; --muted: #a2abb4; --grid: #363d44; --stripe: #1b1f24;
    --better: #6fd39b; --worse: #ff8f85;
    --series0: #5ab7e3; --series1: #f2965c; --series2: #c79be3; --series3: #a5d063; --series4: #f78fbb;
    --series5: #dcbb55; --series6: #4fc9bb;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; margin: 0 0 0.25rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 0.4rem; }
section { border-top: 1px solid var(--grid); padding-top: 1.5rem; margin-top: 2rem; }
.lead { font-size: 1.1rem; margin: 0.25rem 0 0; max-width: 48rem; }
figure { margin: 0; }
figcaption, .notes { color: var(--muted); font-size: 0.875rem; max-width: 52rem; }
ul.notes { padding-left: 1.1rem; }
ul.notes li { margin: 0.2rem 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--series0); }
svg { display: block; width: 100%; min-width: 38rem; height: auto; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.35; min-width: 50%; }
th, td { padding: 0.35rem 0.7rem 0.35rem 0; text-align: left; vertical-align: top; }
td, tbody th { border-top: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
table.figures td, table.figures thead th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.figures thead th { white-space: normal; }
table.figures thead th:first-child { text-align: left; }
table.figures .word, table.figures thead .word { text-align: left; }
table.figures td.text { white-space: normal; overflow-wrap: anywhere; min-width: 18rem; }
td.better { color: var(--better); font-weight: 700; }
td.worse { color: var(--worse); font-weight: 700; }
details { margin-top: 2rem; }
summary { cursor: pointer; font-weight: 600; }
@media print { .scroll { overflow: visible; } svg { min-width: 0; } details > * { display: block; } }
</style>
</head>
<body>
<main>
<h1>What the runs found</h1>
CONTENT
</main>
</body>
</html>
"""
