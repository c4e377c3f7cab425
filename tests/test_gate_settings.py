"""tools/gate_settings.py: pytest tests/test_gate_settings.py"""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gate_settings
from gate_settings import MIXES, B, Measured, P, Plan, Setting, T

from siftloader import Entropy, Loss, Residual, Sifter


SMALL = Plan(
    stages=(3, 4), forks=1, pools=3, folds=3, looks=2, ahead=1, held=16, layers=2, width=8
)


def text(rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, gate_settings.VOCABULARY, (rows + 200, T))
    return ids[:rows], ids[rows:]


def gram(*gradients: np.ndarray) -> np.ndarray:
    together = np.concatenate(gradients)
    return together @ together.T


def measured(pools: int = 4, **fields: np.ndarray) -> Measured:
    """Of rows whose losses are anything, but for ``fields``."""
    rng = np.random.default_rng(1)
    some = {
        name: rng.uniform(1, 2, (pools, P))
        for name in (
            *("scores", "full_scores", "losses", "early_losses", "entropies"),
            *("unigrams", "bigrams", "before", "within"),
        )
    }
    some |= {"own": np.ones((2, 2, 2)), "ahead": np.ones((2, 2, 2))}
    grams = {"raw": gram(*rng.normal(size=(3, pools, 5)))}
    return Measured(**(some | fields), held=1.5, grams=grams)


# --- data


@pytest.mark.parametrize("name", MIXES)
def test_rows_of_every_mix_are_ids_and_repeat(name: str) -> None:
    drawn = [
        MIXES[name].rows(64, text()[0], np.random.default_rng(3), held=held)
        for held in (False, False, True)
    ]
    assert drawn[0].shape == (64, T)
    assert np.array_equal(drawn[0], drawn[1])
    assert all(each.min() >= 0 and each.max() < gate_settings.VOCABULARY for each in drawn)


def test_kinds_come_in_their_shares_and_prose_comes_once() -> None:
    train = text(2000)[0]
    found = MIXES["repeated-half"].rows(1000, train, np.random.default_rng(0))
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert 440 < counts[counts > 2].sum() < 560
    plain = MIXES["prose"].rows(1000, train, np.random.default_rng(0))
    assert len(np.unique(plain, axis=0)) == 1000


def test_held_out_text_is_clean() -> None:
    _, held = text()
    for name in ("repeated-half", "shuffled-half", "random-quarter", "repeated-noisy"):
        rows = MIXES[name].rows(50, held, np.random.default_rng(0), held=True)
        assert {row.tobytes() for row in rows} <= {row.tobytes() for row in held}, name


def test_a_chain_has_as_many_followers_as_it_says() -> None:
    rows = gate_settings.quick(400, text()[0], np.random.default_rng(0))
    pairs = {(int(a), int(b)) for row in rows for a, b in itertools.pairwise(row)}
    follow = [sum(a == state for a, _ in pairs) for state in range(64)]
    assert max(follow) == 8
    assert min(follow) >= 5  # some are drawn twice


# --- scores


def test_scores_are_those_that_a_sifter_gives() -> None:
    torch.manual_seed(0)
    model, rows = gate_settings.GPT(3, 64), torch.as_tensor(text(8)[0])
    batch = {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
    counts = np.bincount(rows.flatten().numpy(), minlength=gate_settings.VOCABULARY)
    ways = gate_settings.criteria(gate_settings.Counts.of(rows.numpy()))
    for name, criterion, layer in (
        ("loss@1", Loss(), 1),
        ("entropy@1", Entropy(), 1),
        ("loss@N", Loss(), "full"),
        ("residual@1", Residual(counts), 1),
    ):
        sifter = Sifter(
            model, exit_layer=layer, criterion=criterion, labels="labels", shift_labels=False
        )
        with torch.no_grad():
            ours = ways[name](model, rows)
        torch.testing.assert_close(ours, sifter.score(batch), rtol=1e-4, atol=1e-5)


# --- statistics


def test_alignment_is_that_of_the_expected_gradients() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=2000)
    # Noise is ten times as long as what is common: products of rows with themselves would be all noise.
    noise = 10 * rng.normal(size=(3, 200, 2000))
    found = gate_settings.alignment(
        gram(0.5 * common + noise[0], common + noise[1], common / 2 + noise[2])
    )
    assert found["align"] == pytest.approx(0.5, abs=0.05)
    assert found["length"] == pytest.approx(1, abs=0.02)
    assert found["snr"] == pytest.approx(0.25, abs=0.06)
    assert found["angle"] == pytest.approx(1, abs=0.1)
    # Half of what is common is what held-out rows have, too: kept halves go down a whole of it, random ones twice.
    assert found["held-out"] == pytest.approx(1 - 2, abs=0.25)
    assert found["apart"] == pytest.approx(1, abs=0.1)


def test_alignment_with_held_out_rows_that_the_kept_alone_are_like() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2000))
    noise = 5 * rng.normal(size=(3, 100, 2000))
    found = gate_settings.alignment(gram(one + noise[0], one + other + noise[1], one + noise[2]))
    assert found["held-out"] == pytest.approx(0, abs=0.1)
    assert found["apart"] == pytest.approx(math.sqrt(0.5), abs=0.1)
    found = gate_settings.alignment(gram(other + noise[0], one + noise[1], one + noise[2]))
    assert found["held-out"] == pytest.approx(-1, abs=0.1)


def test_steps_along_kept_gradients_are_judged_by_other_pools() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 5000, generator=generator)
    # Nothing is common: a direction that met its own rows would go down their loss, this one goes nowhere.
    nowhere = gate_settings.own_directions(noise, noise, noise, 4)
    assert abs(nowhere[0].mean()) < 0.2 * 5000 / math.sqrt(12)
    kept, held_out = (torch.randn(12, 5000, generator=generator) + 1 for _ in range(2))
    down = gate_settings.own_directions(kept, noise - 0.5, held_out, 4)
    assert (down[0, 0] < 0).all()
    assert (down[0, 1] > 0).all()
    assert (down[1, 0] > 0).all()
    assert (down[1, 1] < 0).all()


def test_equally_hard_rows_spread_by_chance_alone() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.exponential(2, (12, P, T - 1))
    alike = measured(12, losses=tokens.mean(2), within=tokens.var(2, ddof=1))
    assert gate_settings.statistics(alike)["spread over chance"] == pytest.approx(1, abs=0.2)
    hard = tokens + (np.arange(P) % 2)[None, :, None]
    apart = measured(12, losses=hard.mean(2), within=hard.var(2, ddof=1))
    found = gate_settings.statistics(apart)
    assert found["spread over chance"] > 3
    assert found["spread beyond chance"] == pytest.approx(0.5, abs=0.1)


def test_statistics_of_a_planted_pool() -> None:
    losses = np.tile(np.where(np.arange(P) < B, 3.0, 1.0), (4, 1))
    m = measured(
        scores=losses, full_scores=losses[:, ::-1], losses=losses, early_losses=2 * losses
    )
    found = gate_settings.statistics(replace(m, before=losses + (losses > 2)))
    found = {name: round(value, 9) for name, value in found.items()}
    assert found["rho"] == 1.5
    assert found["lift"] == 1
    assert found["overlap"] == 0
    assert found["score ~ full score"] == -1
    assert found["sigma"] == 0
    assert found["progress"] == 0.5
    assert found["lift of progress"] == 0.5
    assert found["score ~ progress"] == 1
    assert found["lowest quarter"] == 0.5
    assert found["held-out gap"] == -0.5


def test_ranks_share_ties_and_the_lower_position_wins() -> None:
    assert gate_settings.ranks(np.array([3.0, 1, 3, 2])).tolist() == [2.5, 0, 2.5, 1]
    assert gate_settings.spearman(np.array([1, 2, 3, 4]), np.array([1, 8, 27, 20])) == 0.8
    assert gate_settings.spearman(np.ones(3), np.arange(3)) == 0
    kept = gate_settings.top_mask(np.zeros((1, P)))
    assert kept[0].nonzero()[0].tolist() == [*range(B)]
    assert gate_settings.top(torch.zeros(P)).tolist() == [*range(B)]


def test_the_jackknife_gives_the_error_of_a_mean() -> None:
    losses = np.random.default_rng(0).normal(5, 1, (12, P))
    value, error = gate_settings.with_noise(measured(12, losses=losses))["loss"]
    means = losses.mean(1)
    assert value == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(12))


# --- which one predicts


def settings(mixes: int = 12, each: int = 5) -> list[Setting]:
    """The gain is what ``right`` says and some noise; ``mix`` knows the mixes only, ``blind`` nothing."""
    rng, found = np.random.default_rng(0), []
    for mix in range(mixes):
        level = rng.normal()
        for stage in range(each):
            right = level + rng.normal()
            values = {"right": right, "wrong way": -right, "mix": rng.normal() * 1e-3 + mix}
            values |= {"blind": rng.normal(), "none": math.nan if stage else 0.0}
            noise = dict.fromkeys(values, 0.1)
            gain = right + 0.2 * rng.normal()
            found.append(
                Setting(
                    f"m{mix}", stage, "w", 2, gain, (gain, gain), 0.1, (0, 0), 0.1, values, noise
                )
            )
    return found


def test_the_planted_statistic_is_found_and_the_others_are_not() -> None:
    judged = {each.name: each for each in gate_settings.judge(settings(), draws=200)}
    for name, sign in (("right", 1), ("wrong way", -1)):
        found = judged[name]
        assert found.all * sign > 0.9
        assert min(end * sign for end in found.by_mix) > 0.8
        assert found.within * sign > 0.8
        assert found.holm < 0.05
        assert found.right > 0.85
        assert found.value > 0.3
    for name in ("blind", "mix", "none"):
        assert judged[name].holm > 0.05, name
        assert judged[name].by_mix[0] <= 0 <= judged[name].by_mix[1], name
    assert judged["right"].noise == pytest.approx(0.1 / 1.4, rel=0.4)
    assert [each.name for each in gate_settings.judge(settings(), draws=20)][:2] == [
        "right",
        "wrong way",
    ]


def test_a_threshold_is_never_set_on_the_mix_that_it_judges() -> None:
    # Good below 0 in one mix, above 0 in the other: what was learned on one is wrong on the other.
    x = np.array([-1.0, -2, 1, 2] * 2)
    gains = np.array([1.0, 1, -1, -1, -1, -1, 1, 1])
    right, value = gate_settings.thresholds(x, gains, [np.arange(4), np.arange(4, 8)])
    assert right == 0
    assert value == -0.5


def test_a_cut_gains_the_most() -> None:
    assert gate_settings.best_cut(np.array([1.0, 2, 3]), np.array([-1.0, 2, 3])) == (1, 1.5)
    assert gate_settings.best_cut(np.array([1.0, 2, 3]), np.array([2.0, -1, -3])) == (-1, -1.5)
    # Equal values cannot be told apart, and where nothing is gained the gate stays closed.
    assert gate_settings.best_cut(np.array([1.0, 1]), np.array([1.0, -2])) == (1, math.inf)


def test_an_untuned_gate_opens_where_kept_halves_do_better_than_random_ones() -> None:
    gains = np.array([1.0, -2.0])
    assert gate_settings.untuned("ahead, held-out", np.array([0.1, -0.1]), gains) == 0.5
    assert gate_settings.untuned("held-out, adam", np.array([-0.1, 0.1]), gains) == -1
    assert gate_settings.untuned("align, raw", np.array([1.1, 0.9]), gains) == 0.5
    assert math.isnan(gate_settings.untuned("rho", np.array([1.1, 0.9]), gains))


def test_holm() -> None:
    assert gate_settings.holm(np.array([0.01, 0.04, 0.03])).tolist() == [0.03, 0.06, 0.06]


def test_whole_mixes_change_places() -> None:
    blocks = [np.arange(3), np.arange(3, 6), np.arange(6, 9)]
    for seed in range(5):
        taken = gate_settings.shuffled_blocks(blocks, np.random.default_rng(seed))
        assert sorted(taken) == [*range(9)]
        assert all(np.diff(taken[each]).tolist() == [1, 1] for each in blocks)


# --- a run


def test_a_run_repeats_resumes_and_is_tabled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(path: Path) -> list[str]:
        gate_settings.run("prose", 0, SMALL, text(), path)
        return path.read_text().splitlines()

    def known(line: str) -> dict[str, object]:
        return {key: value for key, value in json.loads(line).items() if key != "seconds"}

    whole = run(tmp_path / "prose-0.jsonl")
    assert json.loads(whole[0])["machine"]
    assert [json.loads(line)["stage"] for line in whole[1:]] == [3, 4]
    # Cut off in the middle of its last line, as a run is that was killed.
    cut = tmp_path / "again" / "prose-0.jsonl"
    cut.parent.mkdir()
    cut.write_text("\n".join(whole)[:-100])
    again = [line for line in run(cut) if line != whole[2][:-100]]
    assert [known(line) for line in again if json.loads(line).get("stage") == 4] == [
        known(whole[2])
    ]
    assert run(cut) == [*cut.read_text().splitlines()]  # nothing is missing: nothing is run

    other = (tmp_path / "prose-0.jsonl").read_text().replace('"mix":"prose"', '"mix":"identical"')
    (tmp_path / "identical-0.jsonl").write_text(other)
    picture = tmp_path / "gate.png"
    show = ["table", "--out", str(tmp_path), "--draws", "10", "--png", str(picture)]
    gate_settings.main(show)
    shown = capsys.readouterr().out
    assert "16 settings of 2 mixes" in shown
    for name in ("rho", "align, adam", "own steps", "lift of loss - entropy"):
        assert f"\n{name} " in shown
    with pytest.raises(SystemExit, match="no runs in"):
        gate_settings.main([*show, "--held", "cleaner"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measuring_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    course = gate_settings.Course.of("prose", 0, SMALL, text())
    course.step(0)
    model, optimizer = course.model, course.optimizer
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = str(optimizer.state_dict())
    ways = {"loss@1": gate_settings.criteria(course.counts)["loss@1"]}
    rng, rows = np.random.default_rng(0), course.fresh(1)[0]
    gate_settings.measure(course, model, ways, rows, 1.0, rng)
    gate_settings.follow(course, rows.view(-1, P, T), lambda *_: torch.arange(B))
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert str(optimizer.state_dict()) == state
    assert all(each.grad is None for each in model.parameters())


def test_looking_further_ahead_is_compared_with_the_gain(tmp_path: Path) -> None:
    path = tmp_path / "far-prose-0-4.jsonl"
    gate_settings.look_far("prose", 0, SMALL, text(), path)
    lines = gate_settings.lines_of(path)
    assert [line["stage"] for line in lines] == [3, 4]
    assert {*lines[0]["after"]} == {"random", "loss@1", "entropy@1"}
    # After 1 and 2 steps it knows nothing, after 5 all.
    found = []
    with path.open("a") as file:
        for number, each in enumerate(settings(6, 3)):
            ahead = [number % 2, 1 - number % 2, each.gain]
            after = {"random": [0.0] * 3, "loss@1": [-value for value in ahead]}
            line = {
                "mix": each.mix,
                "stage": each.stage,
                "after": after | {"entropy@1": [0, 0, 0]},
            }
            file.write(json.dumps(line) + "\n")
            found.append(replace(each, way="loss@1"))
    rows = gate_settings.horizon_table(found, tmp_path, 50).splitlines()
    assert "18 settings of 6 mixes" in rows[0]
    assert rows[4].split()[:2] == ["5", "+1.00"]
    assert abs(float(rows[2].split()[1])) < 0.5
    assert "100%" in rows[4]
    assert gate_settings.horizon_table(found, tmp_path / "none", 50) == ""
