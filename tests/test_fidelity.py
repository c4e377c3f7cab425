"""What the arithmetic of an audit says, against plain counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from siftloader.fidelity import PAIRED, SUMS, Fidelity, measured


def of(early, full, early_losses=None, losses=None, kept=()):
    losses = full if losses is None else losses
    early_losses = early if early_losses is None else early_losses
    won = np.zeros(len(full), bool)
    won[[*kept]] = True
    return measured(early, full, early_losses, losses, won)


def drawn(rows=40, seed=0):
    rng = np.random.default_rng(seed)
    losses = rng.gamma(3.0, size=rows)
    early = losses * np.exp(0.3 + 0.4 * rng.normal(size=rows))
    return early, losses, np.argsort(-early)[: rows // 2]


def test_rho_is_the_mean_loss_of_the_kept_over_that_of_all():
    found = Fidelity.of(of([1, 2, 3, 4], [2.0, 1.0, 4.0, 1.0], kept=[2, 3]))
    assert found.rho == pytest.approx((4 + 1) / 2 / (8 / 4))
    assert found.rho_full == pytest.approx((4 + 2) / 2 / 2)
    assert found.population_loss == 2.0
    assert found.population_error == pytest.approx(np.std([2, 1, 4, 1], ddof=1) / 2)


def test_overlap_is_of_as_many_as_are_kept():
    # The exit would keep 2 and 3, the model 0 and 2.
    assert Fidelity.of(of([1, 2, 3, 4], [5.0, 1.0, 4.0, 2.0], kept=[0, 1])).overlap == 0.5


def test_equal_scores_go_to_the_lower_position():
    assert Fidelity.of(of([1, 1, 1, 1], [9.0, 8.0, 1.0, 1.0], kept=[0, 1])).overlap == 1.0
    assert Fidelity.of(of([1, 1, 1, 1], [1.0, 1.0, 8.0, 9.0], kept=[0, 1])).overlap == 0.0


def test_spearman_and_agreement_against_counting_pairs():
    early, losses, kept = drawn()
    found = Fidelity.of(of(early, losses, kept=kept))
    ranks = np.argsort(np.argsort(early)), np.argsort(np.argsort(losses))
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    pairs = [*itertools.combinations(range(len(early)), 2)]
    alike = sum((early[a] < early[b]) == (losses[a] < losses[b]) for a, b in pairs)
    assert found.agreement == pytest.approx(alike / len(pairs))


def test_ties_share_their_rank_and_are_half_of_an_agreement():
    found = Fidelity.of(of([1, 1, 2], [1.0, 2.0, 3.0]))
    assert found.spearman == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])
    assert found.agreement == pytest.approx((0.5 + 1 + 1) / 3)


def test_sigma_is_the_noise_that_was_planted_and_no_scaling():
    rng = np.random.default_rng(1)
    losses = rng.gamma(3.0, size=20_000)
    noise = 0.25 * rng.standard_t(30, size=len(losses)) / math.sqrt(30 / 28)
    for scaling in (0.1, 1.0, 7.0):
        found = Fidelity.of(of(losses * scaling * np.exp(noise), losses))
        assert found.sigma == pytest.approx(0.25, rel=0.02)


def test_sums_of_pools_add_up():
    early, losses, _ = drawn(64)
    both = [
        of(early[part], losses[part], kept=np.argsort(-early[part])[:16])
        for part in (slice(0, 32), slice(32, 64))
    ]
    found, (first, second) = Fidelity.of(both[0] + both[1]), map(Fidelity.of, both)
    assert found.rows == 64 and len(both[0]) == SUMS
    assert found.population_loss == pytest.approx(losses.mean())
    assert found.population_error == pytest.approx(losses.std(ddof=1) / 8)
    assert found.sigma == pytest.approx(np.std(np.log(early / losses), ddof=1))
    for name in ("overlap", "spearman", "agreement"):
        assert getattr(found, name) == pytest.approx(
            (getattr(first, name) + getattr(second, name)) / 2
        )


def test_what_is_not_finite_does_not_count():
    early, losses = [1.0, -math.inf, 3.0, 4.0, 5.0], [1.0, 2.0, math.nan, 3.0, 5.0]
    found = Fidelity.of(of(early, losses, kept=[3, 4]))
    assert found.rows == 3 and found.population_loss == 3.0
    assert found.rho == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("early", "losses", "nothing"),
    [
        ([], [], ("population_loss", "population_error", "rho", "spearman", "agreement", "sigma")),
        ([2.0], [2.0], ("population_error", "rho", "overlap", "spearman", "agreement", "sigma")),
        ([1.0, 1.0], [2.0, 3.0], ("spearman", "rho", "overlap")),
        ([1.0, 2.0], [0.0, 0.0], ("sigma", "rho", "spearman", "agreement")),
    ],
)
def test_a_figure_without_a_value_is_nan(early, losses, nothing):
    found = Fidelity.of(of(early, losses))
    for name in nothing:
        assert math.isnan(getattr(found, name)), name


def test_a_pool_of_any_size_is_compared_in_bounded_memory():
    early, losses, kept = drawn(20 * PAIRED)
    found = Fidelity.of(of(early, losses, kept=kept))
    few = Fidelity.of(of(early[:PAIRED], losses[:PAIRED]))
    assert found.agreement == few.agreement
