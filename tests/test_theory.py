"""The paper's theorems against what they are about: pytest tests/test_theory.py

Expectations are exact wherever they can be: a run of few steps on three samples is a tree of few paths, noise is
drawn from a few hundred atoms of mean 0 and variance 1, and integrals are summed. Where something is counted, the
margin is five standard errors.
"""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from siftloader import theory
from siftloader.theory import (
    SIGMA_LIMIT,
    F_hat,
    beta_j,
    corollary_1,
    corollary_2,
    corollary_3,
    corollary_4,
    p_j,
    p_j_counted,
    p_j_integral,
    rho,
    rho_approx,
    sharper_4,
    sharper_6,
    theorem_1,
    theorem_2,
    theorem_3,
    theorem_4,
    theorem_5,
    theorem_6,
)


Vector = NDArray[np.float64]
DRAWS = 10_000
ROOM = 1 + 1e-9  # for rounding, where an expectation is exact
JUST = 1e-9


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng((9, seed))


def test_the_examples_of_the_docstrings_say_what_comes_out() -> None:
    found = doctest.testmod(theory)
    assert found.attempted >= 20 and not found.failed


# ---- formulas and domains


def test_the_formulas_are_those_of_the_paper() -> None:
    """By fractions, where the paper has no root."""
    D, rho_star, eta, L, K = (Fraction(x) for x in ("3", "5/4", "1/8", "2", "7"))
    Delta, F = Fraction("1/2"), Fraction("1/5")
    first = D**2 / (2 * rho_star * eta * (1 - eta * L) * K) + Delta / (rho_star * (1 - eta * L))
    second = D**2 / (2 * eta * (1 - eta * L) * K) + eta * L * F / (1 - eta * L) + F
    crossing = D**2 * (rho_star - 1) / (2 * eta * (Delta - rho_star * F))
    meet = (Delta - F) / ((1 - eta * L) * (rho_star - 1))
    floats = [float(x) for x in (D, rho_star, eta, L, K, Delta)]
    assert theorem_1(*floats) == pytest.approx(float(first), rel=1e-14)
    assert theorem_3(*floats) == theorem_1(*floats)
    assert theorem_2(3, 0.125, 2, 7, 0.2) == pytest.approx(float(second), rel=1e-14)
    assert corollary_1(3, 1.25, 0.125, 2, 0.5, 0.2) == pytest.approx(
        (float(crossing), float(meet)), rel=1e-14
    )
    for sigma in (0.0, 0.1, SIGMA_LIMIT):
        assert theorem_4(sigma) == pytest.approx(1 - 0.72 * (1 - math.exp(-(2**0.5) * sigma)))
    t = math.log(50 / (4 * math.log(50)))
    plain = 0.3**2 + math.pi / 2 * t * 0.7**2 + math.sqrt(2 * math.pi * t) * 0.3 * 0.7
    assert theorem_5(50, 0.3, 0.7) == pytest.approx(plain * (1 - 1 / 50) / (0.3**2 + 0.7**2))
    assert theorem_6(0.6) == pytest.approx(1 - math.sqrt((2 - 2 * 0.36) / (2 - 0.36)))


RUN = {"D_0": 1.0, "eta": 0.25, "L": 2.0, "K": 10}
GREEDY = {**RUN, "rho_star": 1.5, "Delta_R": 0.4}
CROSS = {"D_0": 1.0, "eta": 0.25, "L": 2.0, "rho_star": 1.5, "Delta_R": 0.4, "F_star": 0.2}


@pytest.mark.parametrize(
    ("function", "good", "name", "inside", "outside", "message"),
    [  # the last value inside a domain, and the first one outside
        (theorem_1, GREEDY, "eta", 0.5 - JUST, 0.5, r"eta = 0.5: need 0 < eta < 1/L = 0.5"),
        (theorem_1, GREEDY, "eta", JUST, 0.0, "eta = 0.0"),
        (theorem_1, GREEDY, "eta", JUST, math.nan, "eta = nan"),
        (theorem_1, GREEDY, "L", JUST, 0.0, "L = 0.0: need a finite smoothness"),
        (theorem_1, GREEDY, "K", 1, 0, "K = 0: need at least one iteration"),
        (theorem_1, GREEDY, "K", math.inf, math.nan, "K = nan"),
        (theorem_1, GREEDY, "D_0", 0.0, -JUST, "D_0 = -1e-09: need a finite distance"),
        (theorem_1, GREEDY, "rho_star", 1.0, 1 - JUST, "a maximum is no less than a mean"),
        (theorem_1, GREEDY, "Delta_R", 0.0, -JUST, "Delta_R >= 0, as losses are"),
        (theorem_2, {**RUN, "F_star": 0.2}, "eta", 0.5 - JUST, 0.5, "smaller step size"),
        (theorem_2, {**RUN, "F_star": 0.2}, "F_star", 0.0, -JUST, "as losses are"),
        (corollary_1, CROSS, "rho_star", 1 + JUST, 1.0, "nowhere better"),
        (corollary_1, CROSS, "Delta_R", 1.5 * 0.2, 0.3 - JUST, r"<= Delta_R \(eq. 5\)"),
        (corollary_1, CROSS, "F_star", 0.0, -JUST, "as losses are"),
        (corollary_1, CROSS, "eta", 0.5 - JUST, 0.5, "smaller step size"),
        (theorem_4, {}, "sigma", SIGMA_LIMIT, SIGMA_LIMIT + JUST, "sharper_4.* holds for any"),
        (theorem_4, {}, "sigma", 0.0, -JUST, "sigma = -1e-09"),
        (sharper_4, {}, "sigma", 0.0, -JUST, "a standard deviation"),
        (sharper_4, {}, "sigma", 1e9, math.inf, "a standard deviation"),
        (corollary_2, {}, "rho_star_2", 1 + JUST, 1.0, "1 < rho"),
        (corollary_2, {}, "rho_star_2", 2.0, 2 + JUST, "at most their sum"),
        (theorem_5, {"epsilon": 0, "delta": 1}, "R", 9, 8, "a whole number >= 9: R / "),
        (theorem_5, {"epsilon": 0, "delta": 1}, "R", 9, 9.5, "a whole number"),
        (theorem_5, {"epsilon": 1, "R": 9}, "delta", 0.0, -JUST, "a standard deviation"),
        (theorem_5, {"delta": 0, "R": 9}, "epsilon", JUST, 0.0, "not all of them 0"),
        (theorem_5, {"delta": 1, "R": 9}, "epsilon", -1e9, math.nan, "finite errors"),
        (corollary_3, {}, "R", 9, 8, "a whole number >= 9: the setting of Theorem 5"),
        (p_j, {}, "beta_j", -1.0, -1 - JUST, "-1 <= beta_j <= 1"),
        (p_j_integral, {}, "beta_j", 1.0, 1 + JUST, "-1 <= beta_j <= 1"),
        (theorem_6, {}, "beta_j", 0.0, -JUST, "0 <= beta_j <= 1"),
        (theorem_6, {}, "beta_j", 1.0, 1 + JUST, "0 <= beta_j <= 1"),
        (sharper_6, {}, "beta_j", 0.0, -JUST, "0 <= beta_j <= 1"),
        (corollary_4, {}, "tau_j", 0.0, -JUST, "0 <= tau_j"),
        (corollary_4, {}, "tau_j", 1.0, 1 + JUST, "0 <= tau_j"),
        (F_hat, {"losses": [0.0, 1.0]}, "R", 2, 1, "R > 1 candidates"),
        (F_hat, {"losses": [0.0, 1.0]}, "R", 2, True, "a whole number"),
        (rho, {"R": 2}, "losses", [0.0, 1.0], [0.0, -JUST], "a loss of -1e-09"),
        (rho, {"R": 2}, "losses", [0.0, 1.0], [0.0, math.nan], "not finite: .* drop those rows"),
        (rho, {"R": 2}, "losses", [[0.0, JUST]], [[1.0, 1.0], [0.0, 0.0]], "rho is 0 / 0"),
        (rho, {"R": 2}, "losses", [1.0], [], "need a sample"),
        (rho_approx, {"losses": [0.0, 1.0], "R": 2}, "approximate", [1, 2], [1], "one of each"),
        (rho_approx, {"losses": [0.0, 1.0], "R": 2}, "approximate", [1, 2], [1, math.nan], "nan"),
        (rho_approx, {"approximate": [1, 2], "R": 2}, "losses", [0, JUST], [0, 0], "0 / 0"),
        (rho_approx, {"losses": [0, 1], "approximate": [1, 2]}, "R", 2, 1, "candidates"),
        (beta_j, {"theta": [1.0], "weights": [[[2.0]]]}, "j", 1, 0, "a layer, 1 to 1"),
        (beta_j, {"theta": [1.0], "weights": [[[2.0]]]}, "j", 1, 2, "a layer, 1 to 1"),
        (beta_j, {"theta": [1.0], "weights": [[[2.0]]]}, "j", 1, 1.0, "a layer, 1 to 1"),
        (beta_j, {"theta": [1.0], "j": 1}, "weights", [[[2.0]]], [[[0.0]]], "not 0"),
        (beta_j, {"theta": [1.0], "j": 1}, "weights", [[[2.0]]], [[2.0]], r"W_1 of shape \(1,\)"),
        (beta_j, {"weights": [[[2.0]]], "j": 1}, "theta", [1.0], 1.0, r"theta of shape \(\)"),
    ],
)
def test_outside_its_domain_a_theorem_raises(
    function: Callable[..., object],
    good: dict[str, object],
    name: str,
    inside: object,
    outside: object,
    message: str,
) -> None:
    function(**good, **{name: inside}) if name not in good else function(**{**good, name: inside})
    with pytest.raises(ValueError, match=message):
        function(**{**good, name: outside})


def test_the_step_size_is_below_one_over_L_however_that_is_rounded() -> None:
    for L in [*range(1, 200), *random(8).uniform(1, 2, 200)]:  # 49 * (1 / 49) < 1
        with pytest.raises(ValueError, match="smaller step size"):
            theorem_2(1.0, 1 / L, L, 1, 0.0)
        assert theorem_2(1.0, math.nextafter(1 / L, 0), L, 1, 0.0) > 0


def test_counting_refuses_what_cannot_be_counted() -> None:
    one: list[list[list[float]]] = [[[1.0]]]
    with pytest.raises(ValueError, match="pairs = 0: need a whole number >= 1"):
        p_j_counted([1.0], one, 1, 0, random(0))
    with pytest.raises(ValueError, match=r"teacher of shape \(2,\)"):
        p_j_counted([1.0], one, 1, 5, random(0), teacher=[1.0, 2.0])


# ---- rho, measured


def test_the_expected_maximum_is_that_of_all_draws() -> None:
    rng = random(1)
    for n, R in itertools.product((1, 2, 3, 5), (2, 3, 4)):
        losses = rng.integers(0, 4, n) + 0.5  # with ties
        every = [losses[list(draw)].max() for draw in itertools.product(range(n), repeat=R)]
        assert F_hat(losses, R) == pytest.approx(np.mean(every), rel=1e-13)
        assert rho(losses, R) == pytest.approx(np.mean(every) / losses.mean(), rel=1e-13)
        assert rho_approx(losses, losses**3 - 7, R) == pytest.approx(float(rho(losses, R)))


def test_the_expected_loss_of_the_choice_is_that_of_all_draws() -> None:
    rng = random(2)
    for n, R in itertools.product((1, 3, 5), (2, 3)):
        losses, seen = rng.random(n) + 0.1, rng.integers(-2, 2, n)
        every = []
        for draw in itertools.product(range(n), repeat=R):
            chosen = seen[list(draw)] == seen[list(draw)].max()
            every.append(losses[list(draw)][chosen].mean())
        assert rho_approx(losses, seen, R) == pytest.approx(np.mean(every) / losses.mean())


def test_sets_of_samples_may_be_stacked_and_large() -> None:
    stacked = random(3).exponential(size=(2, 3, 50))
    assert rho(stacked, 4).shape == (2, 3)
    assert rho(stacked, 4)[1, 2] == pytest.approx(float(rho(stacked[1, 2], 4)), rel=1e-14)
    # The maximum of R exponential numbers is their mean times 1 + 1/2 + ... + 1/R.
    many = random(4).exponential(size=400_000)
    assert rho(many, 4) == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4, rel=0.01)
    assert F_hat(many, 10**12) == pytest.approx(many.max(), rel=1e-5)


def test_rho_is_between_one_and_R_and_a_noisy_choice_is_no_better() -> None:
    rng = random(5)
    losses = rng.gamma(rng.uniform(0.02, 3, (DRAWS, 1)), size=(DRAWS, 6)) + 1e-300
    for R in (2, 5):
        found = rho(losses, R)
        assert found.min() >= 1 / ROOM and found.max() <= R * ROOM
        assert found.max() > 0.99 * 6 * (1 - (5 / 6) ** R)  # all that six samples can have
    for row, each in zip(losses[:500], rho(losses, 5), strict=False):
        assert rho_approx(row, rng.random(6), 5) <= each * ROOM


def test_rho_of_equal_losses_is_one_and_no_less() -> None:
    for loss in random(7).random(500):
        assert 1 <= rho(np.full(1000, loss), 2) < ROOM


def test_rho_star_may_be_one_though_samples_differ() -> None:
    """The counterexample to eq. 5's strictness: equal losses where F is not least."""
    y = np.array([1.0, -1.0, -1.0])
    assert rho((0.0 - y) ** 2 / 2, 2) == 1.0 and y.mean() != 0
    assert 1 < rho((1e6 - y) ** 2 / 2, 2) < 1 + 1e-5
    assert rho((y.mean() - y) ** 2 / 2, 2) > 1.2


# ---- theorems 1 to 3: runs, exactly


def greedy(losses: Vector, R: int) -> Vector:
    """The chance of every sample [..., n] to be the highest of R draws."""
    n = losses.shape[-1]
    rank = losses.argsort(axis=-1, kind="stable").argsort(axis=-1)
    return ((rank + 1) / n) ** R - (rank / n) ** R


def noisy(losses: Vector, sigma: Vector) -> Vector:
    """The chance [..., n] to look higher of two draws, under noise exp(+-sigma), each sign in half of the cases."""
    n = losses.shape[-1]
    gap = np.log(losses)[..., :, None] - np.log(losses)[..., None, :]  # of sample i over j
    wins = np.zeros_like(gap)
    for z, chance in ((-2, 0.25), (0, 0.5), (2, 0.25)):
        wins += chance * (np.sign(gap + z * sigma[..., None]) + 1) / 2
    return wins.sum(axis=-1) * 2 / n**2  # a draw of two equal ones wins half as often, of either


class Problems:
    """DRAWS problems at once: three samples each, in d dimensions, of least squares or of its soft absolute value.

    Squares have targets that contradict each other, so F* > 0; soft absolute values sqrt(1 + z^2) - 1 agree on
    w*, so F* = 0. Both are convex with minimum 0 per sample, and |a|^2-smooth.
    """

    def __init__(self, seed: int, soft: bool) -> None:
        self.rng, self.soft = random(seed), soft
        rng, n = self.rng, 3
        d = 2 if seed % 2 else 1
        self.a = rng.standard_normal((DRAWS, n, d)) * rng.lognormal(0, 1, (DRAWS, 1, 1))
        self.b = rng.standard_normal((DRAWS, n)) * rng.lognormal(-1, 1, (DRAWS, 1))
        self.L = (self.a**2).sum(-1).max(-1)
        if soft:
            self.best = rng.standard_normal((DRAWS, d))
            self.b = np.einsum("rnd,rd->rn", self.a, self.best)
        else:
            gram = np.einsum("rnd,rne->rde", self.a, self.a)
            self.best = np.linalg.solve(gram, np.einsum("rnd,rn->rd", self.a, self.b)[..., None])[
                ..., 0
            ]
        # Far away, where the soft loss is as straight as a convex one may be.
        self.start = self.best + rng.standard_normal((DRAWS, d)) * rng.lognormal(
            1, 1.5, (DRAWS, 1)
        )
        self.eta = rng.uniform(0.02, 0.98, DRAWS) / self.L
        self.D_0 = np.sqrt(((self.start - self.best) ** 2).sum(-1))
        self.F_star = self.losses(self.best[:, None])[:, 0].mean(-1)

    def losses(self, w: Vector) -> Vector:
        """Losses [DRAWS, paths, n] at w [DRAWS, paths, d]."""
        z = np.einsum("rnd,rpd->rpn", self.a, w) - self.b[:, None]
        return np.sqrt(1 + z**2) - 1 if self.soft else z**2 / 2

    def steps(self, w: Vector) -> Vector:
        """Where a step on every sample leads: [DRAWS, paths, n, d]."""
        z = np.einsum("rnd,rpd->rpn", self.a, w) - self.b[:, None]
        slope = z / np.sqrt(1 + z**2) if self.soft else z
        gradient = slope[..., None] * self.a[:, None]
        return w[:, :, None] - self.eta[:, None, None, None] * gradient

    def run(
        self, K: int, choice: Callable[[Vector], Vector]
    ) -> tuple[Vector, list[tuple[Vector, Vector]]]:
        """E F of the mean of w_0 ... w_{K-1} [DRAWS], and losses and chances at all iterates that may occur."""
        w, total = self.start[:, None], self.start[:, None]
        reached, seen = np.ones((DRAWS, 1)), []
        for k in range(K):
            losses = self.losses(w)
            chances = choice(losses)
            seen.append((losses, chances))
            if k == K - 1:
                break
            w = self.steps(w).reshape(DRAWS, -1, w.shape[-1])
            total = np.repeat(total, chances.shape[-1], axis=1) + w
            reached = (reached[..., None] * chances).reshape(DRAWS, -1)
        assert np.allclose(reached.sum(1), 1)
        return (reached * self.losses(total / K).mean(-1)).sum(1), seen


def test_the_choice_of_runs_is_that_of_the_definitions() -> None:
    losses = random(6).random((5, 3))
    assert (greedy(losses, 4) * losses).sum(-1) == pytest.approx(F_hat(losses, 4))
    assert noisy(losses, np.zeros((5, 1))) == pytest.approx(greedy(losses, 2))
    assert noisy(losses, np.full((5, 1), 50.0)).sum(-1) == pytest.approx(1)


@pytest.mark.parametrize(("seed", "soft"), [(10, False), (11, False), (12, True), (13, True)])
def test_no_run_of_greedy_sgd_is_above_theorem_1(seed: int, soft: bool) -> None:
    """rho* is the least rho_R of all iterates that may occur, which is what the proof needs."""
    problems = Problems(seed, soft)
    R, K = 2 + seed % 3, 4
    loss, seen = problems.run(K, lambda losses: greedy(losses, R))
    rho_star = np.min([rho(losses, R).min(-1) for losses, _ in seen], axis=0)
    Delta = F_hat(problems.losses(problems.best[:, None])[:, 0], R)
    rows = zip(problems.D_0, rho_star, problems.eta, problems.L, [K] * DRAWS, Delta, strict=True)
    bound = np.array([theorem_1(*row) for row in rows])
    assert (loss <= bound * ROOM).all(), (loss / bound).max()
    assert (loss / bound).max() > 0.3  # and a third of it would not do
    if not soft:  # eq. 5, for which the minimiser counts, too
        there = rho(problems.losses(problems.best[:, None])[:, 0], R)
        assert (np.minimum(rho_star, there) * problems.F_star <= Delta * ROOM).all()


@pytest.mark.parametrize(("seed", "soft"), [(14, False), (15, False), (16, True), (17, True)])
def test_no_run_of_sgd_is_above_theorem_2(seed: int, soft: bool) -> None:
    problems = Problems(seed, soft)
    K = 4
    loss, _ = problems.run(K, lambda losses: np.full_like(losses, 1 / 3))
    rows = zip(problems.D_0, problems.eta, problems.L, [K] * DRAWS, problems.F_star, strict=True)
    bound = np.array([theorem_2(*row) for row in rows])
    assert (loss <= bound * ROOM).all(), (loss / bound).max()
    assert (loss / bound).max() > 0.3


@pytest.mark.parametrize(("seed", "soft"), [(18, False), (19, True)])
def test_no_run_by_noisy_losses_is_above_theorem_3_nor_rho_below_theorem_4(
    seed: int, soft: bool
) -> None:
    problems = Problems(seed, soft)
    sigma = problems.rng.uniform(0, SIGMA_LIMIT, (DRAWS, 1, 1))
    loss, seen = problems.run(4, lambda losses: noisy(losses + 1e-300, sigma))
    approx = [(chances * losses).sum(-1) / losses.mean(-1) for losses, chances in seen]
    rho_star = np.maximum(1, np.min([each.min(-1) for each in approx], axis=0))
    Delta = F_hat(problems.losses(problems.best[:, None])[:, 0], 2)
    rows = zip(problems.D_0, rho_star, problems.eta, problems.L, [4] * DRAWS, Delta, strict=True)
    bound = np.array([theorem_3(*row) for row in rows])
    assert (loss <= bound * ROOM).all(), (loss / bound).max()
    kept = np.array([theorem_4(each) for each in sigma.ravel()])[:, None]
    for each, (losses, _) in zip(approx, seen, strict=True):
        assert (each * ROOM >= 1).all()  # of noise that is independent of the losses
        assert (each * ROOM >= kept * rho(losses, 2)).all()


def test_the_gradient_of_a_noisy_choice_is_not_that_of_its_expected_loss() -> None:
    """Why Theorem 3's proof is not Theorem 1's with other letters."""
    y, sigma = np.array([1.0, -1.0]), 0.3

    def chosen(w: float) -> tuple[float, float]:
        losses = (w - y) ** 2 / 2
        gap = math.log(losses[0] / losses[1])
        first = 0.25 + 0.5 * (1 + math.erf(gap / (2 * sigma))) / 2  # normal noise
        chances = np.array([first, 1 - first])
        return float(chances @ losses), float(chances @ (w - y))

    (low, _), (high, _), (_, step) = chosen(0.1999), chosen(0.2001), chosen(0.2)
    assert abs((high - low) / 0.0002 - step) > 0.1


def test_greedy_wins_early_and_loses_late_and_both_stay_below_their_bounds() -> None:
    """Least squares of one number; a tenth of the rows is off to one side, and greedy ends nearer to those."""
    rng = random(20)
    a, n, R = rng.uniform(0.1, 1, 200), 200, 8
    b = 0.1 * rng.standard_normal(n) + (np.arange(n) % 10 == 0)
    best, L = (a @ b) / (a @ a), float((a**2).max())
    runs, K, eta, start = 200, 4000, 0.1 / L, -4.0

    def losses(w: Vector) -> Vector:
        return (w[..., None] * a - b) ** 2 / 2

    F_star, Delta = float(losses(best).mean()), float(F_hat(losses(best), R))
    w = np.full((2, runs), start)  # greedy, plain
    total, means = np.zeros((2, runs)), {}
    rho_star = float(rho(losses(np.linspace(start, 2, 601)), R).min())  # of all places they go to
    for k in range(1, K + 1):
        total += w
        if k in (10, 30, 100, 1000, K):
            loss = losses(total / k).mean(2)
            means[k], error = loss.mean(1), loss.std(1) / math.sqrt(runs)
            assert start <= w.min() and w.max() <= 2
            assert (
                means[k][0] <= theorem_1(best - start, rho_star, eta, L, k, Delta) + 5 * error[0]
            )
            assert means[k][1] <= theorem_2(best - start, eta, L, k, F_star) + 5 * error[1]
        drawn = rng.integers(0, n, (runs, R))
        hardest = abs(w[0][:, None] * a[drawn] - b[drawn]).argmax(1)
        row = np.stack([drawn[np.arange(runs), hardest], drawn[:, 0]])
        w = w - eta * (w * a[row] - b[row]) * a[row]
    assert means[10][0] < 0.8 * means[10][1] and means[30][0] < 0.6 * means[30][1]
    assert means[K][0] > 1.2 * means[K][1] > 1.2 * F_star  # Remark 1
    crossing, _ = corollary_1(best - start, rho_star, eta, L, Delta, F_star)
    assert 1 < crossing < math.inf


def test_the_bounds_cross_where_corollary_1_says() -> None:
    rng = random(21)
    for _ in range(DRAWS):
        D_0, L, F_star = rng.lognormal(0, 2, 3)
        eta = rng.uniform(0.01, 0.99) / L
        rho_star = 1 + rng.exponential()
        Delta = rho_star * F_star * (1 + rng.exponential())
        K, loss = corollary_1(D_0, rho_star, eta, L, Delta, F_star)
        if K * 0.99 > 1:
            before, after = K * 0.99, K * 1.01
            assert theorem_1(D_0, rho_star, eta, L, before, Delta) < theorem_2(
                D_0, eta, L, before, F_star
            )
            assert theorem_1(D_0, rho_star, eta, L, after, Delta) > theorem_2(
                D_0, eta, L, after, F_star
            )
            assert theorem_1(D_0, rho_star, eta, L, K, Delta) == pytest.approx(loss, rel=1e-9)


def test_without_a_gap_the_bounds_never_cross() -> None:
    K, floor = corollary_1(1.0, 2.0, 0.25, 2.0, Delta_R=0.5, F_star=0.25)
    assert math.inf == K
    assert floor == theorem_1(1.0, 2.0, 0.25, 2.0, K, 0.5) == theorem_2(1.0, 0.25, 2.0, K, 0.25)
    assert theorem_1(1.0, 2.0, 0.25, 2.0, 1e9, 0.5) < theorem_2(1.0, 0.25, 2.0, 1e9, 0.25)
    assert corollary_1(1.0, 2.0, 0.25, 2.0, Delta_R=0.0, F_star=0.0) == (math.inf, 0.0)
    rng = random(23)
    for F_star in rng.uniform(0.01, 5, 1000):
        Delta_R = F_star * rng.uniform(
            1.01, 2
        )  # rho* F* may fall on either side of Delta_R by rounding
        assert corollary_1(1.0, Delta_R / F_star, 0.25, 2.0, Delta_R, F_star)[0] == math.inf


def test_sgd_gets_to_the_minimum_by_the_step_size_that_the_docstring_has() -> None:
    for K in (1e4, 1e8, 1e12):
        above = theorem_2(3.0, 1 / (2.0 * math.sqrt(K)), 2.0, K, 0.7) - 0.7
        assert 0 < above < 30 / math.sqrt(K)
    assert theorem_1(3.0, 1.5, 1e-6, 2.0, math.inf, 1.2) > 1.2 / 1.5  # Remark 1


# ---- theorem 4


def atoms(values: Vector) -> Vector:
    """Noise that is one of these, moved and scaled to mean 0 and variance 1: sorted differences of two draws."""
    values = (values - values.mean()) / values.std()
    return np.sort((values[:, None] - values[None]).ravel())


def quantiles(n: int) -> Vector:
    return (np.arange(n) + 0.5) / n


NOISES: dict[str, Callable[[], Vector]] = {
    "normal": lambda: (2**0.5) * torch.erfinv(2 * torch.from_numpy(quantiles(500)) - 1).numpy(),
    "two points": lambda: np.array([-1.0, 1.0]),
    "rarely, by far": lambda: np.array([0.0] * 49 + [1.0]),
    "student, 3 degrees": lambda: random(30).standard_t(3, 500),
    "exponential": lambda: -np.log(quantiles(500)),
    "uniform": lambda: quantiles(500),
}


def kept_by_noise(noise: str, sigma: Vector, seed: int) -> Vector:
    """F_hat_2,approx / F_hat_2 of one random set of five samples per sigma, exactly."""
    differences = atoms(NOISES[noise]())
    rng = random(seed)
    losses = np.exp(rng.standard_normal((len(sigma), 5)) * rng.uniform(0.01, 2, (len(sigma), 1)))
    high, low = (
        pick(losses[:, :, None], losses[:, None, :]).reshape(len(sigma), -1)
        for pick in (np.maximum, np.minimum)
    )
    gap = np.log(high / low) / sigma[:, None]
    wrong = 1 - np.searchsorted(differences, gap - 1e-12, side="right") / len(differences)
    wrong[high == low] = 0
    return ((high - (high - low) * wrong).mean(1)) / high.mean(1)


@pytest.mark.parametrize("noise", NOISES)
def test_no_noise_keeps_less_than_theorem_4(noise: str) -> None:
    sigma = random(31).uniform(1e-6, SIGMA_LIMIT, DRAWS // 5)
    kept = kept_by_noise(noise, sigma, 32)
    assert (kept * ROOM >= [theorem_4(each) for each in sigma]).all()
    any_sigma = random(33).lognormal(0, 1, DRAWS // 5)
    kept = kept_by_noise(noise, any_sigma, 34)
    assert (kept * ROOM >= [sharper_4(each) for each in any_sigma]).all()
    lost = (1 - kept) / (1 - np.array([sharper_4(each) for each in any_sigma]))
    assert lost.max() > {"rarely, by far": 0.02}.get(noise, 0.4)  # so it could not be much better


def test_the_sharper_share_is_above_theorem_4_and_takes_half_at_worst() -> None:
    sigmas = np.linspace(1e-6, SIGMA_LIMIT, 1000)
    assert all(sharper_4(each) > theorem_4(each) for each in sigmas)
    assert sharper_4(0.0) == theorem_4(0.0) == 1 and sharper_4(1e9) == 0.5


def test_lemma_1_holds_though_a_step_of_its_proof_does_not() -> None:
    assert 1 / (1 + 0.62**2) > 0.72  # the step
    assert 0.79 < 1 / math.sqrt(4 * math.exp(0.5) - 5) < 0.792  # what it should say
    t = np.logspace(-6, 3, 20_000)
    for sigma, constant in ((0.001, 0.5001), (0.2, 0.51), (SIGMA_LIMIT, 0.512), (2.9, 0.72)):
        h = 2 * (1 - np.exp(-t)) / (2 + t**2 / sigma**2)
        assert h.max() <= constant * (1 - math.exp(-math.sqrt(2) * sigma))
    assert h.max() > 0.7 * (1 - math.exp(-math.sqrt(2) * sigma))


def test_below_corollary_2s_noise_rho_is_above_one() -> None:
    for rho_2, part in zip(random(35).uniform(1, 2, DRAWS), random(36).random(DRAWS), strict=True):
        most = corollary_2(rho_2)
        assert 0 < most <= SIGMA_LIMIT
        assert theorem_4(part * most) * rho_2 > 1
        if most < SIGMA_LIMIT:
            assert theorem_4(most) * rho_2 == pytest.approx(1)
    assert corollary_2(1.39527) < SIGMA_LIMIT == corollary_2(1.39529) == corollary_2(2.0)


# ---- theorem 5


def test_rho_of_normal_errors_is_never_below_theorem_5() -> None:
    """By E max Z^2 = int 2 u (1 - G(u)^R) du, G the law of |Z|."""
    rng = random(40)
    R = np.exp(rng.uniform(math.log(9), math.log(1e12), DRAWS)).astype(np.int64)
    R[:2000] = rng.integers(9, 60, 2000)
    epsilon, delta = rng.standard_normal(DRAWS) * rng.lognormal(0, 1, DRAWS), rng.random(DRAWS)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    reach = np.abs(epsilon) + 10 * delta
    u = reach[:, None] / 2 * (nodes + 1)
    spread = math.sqrt(2) * delta[:, None]
    tails = sum(
        torch.erfc(torch.from_numpy((u + side * epsilon[:, None]) / spread)).numpy() / 2
        for side in (-1, 1)
    )
    with np.errstate(divide="ignore"):
        below = -np.expm1(R[:, None] * np.log1p(-np.minimum(tails, 1)))
    found = (2 * u * below * weights * reach[:, None] / 2).sum(1) / (epsilon**2 + delta**2)
    bound = [theorem_5(*row) for row in zip(R.tolist(), epsilon, delta, strict=True)]
    assert (found * 1.0001 >= bound).all()
    assert (found / bound).min() < 1.15  # at large R the bound is near
    assert theorem_5(12, -0.5, 1.0) == theorem_5(12, 0.5, 1.0)


def test_theorem_5_says_something_from_25_candidates_on() -> None:
    assert theorem_5(24, 0.0, 1.0) < 1 < theorem_5(25, 0.0, 1.0)
    assert max(theorem_5(9, c, 1.0) for c in np.linspace(0, 30, 3001)) < 1
    assert max(theorem_5(10, c, 1.0) for c in np.linspace(0, 30, 3001)) > 1


@pytest.mark.parametrize("c", [-2.0, 0.0, 0.5, 3.0])
def test_corollary_3_is_the_order_of_theorem_5(c: float) -> None:
    """With |epsilon| = |c| delta the quotient of the two gains climbs to a constant above zero."""
    quotients = [
        (theorem_5(R, c, 1.0) / (1 - 1 / R) - 1) / corollary_3(R)
        for R in (10**4, 10**20, 10**60, 10**150, 10**300)
    ]
    limit = math.pi / 2 / (1 + c * c)
    assert all(each > 0 for each in quotients)
    assert abs(quotients[-1] / limit - 1) < abs(quotients[0] / limit - 1)
    assert quotients[-1] == pytest.approx(limit, rel=0.35)


# ---- theorem 6


EDGES = [0.0, 1e-12, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-12, math.nextafter(1, 0), 1.0]


def test_quadrature_and_closed_form_of_equation_13_agree() -> None:
    for beta in [*np.linspace(-1, 1, 201), *EDGES, *(-each for each in EDGES)]:
        assert p_j_integral(beta) == pytest.approx(p_j(beta), abs=1e-12)


@pytest.mark.parametrize("beta", [-0.9, -0.3, 0.0, 0.4, 0.95])
def test_equation_13_as_it_is_printed(beta: float) -> None:
    y = torch.linspace(0, 13, 20_001, dtype=torch.float64)
    inside = torch.exp(-y * y / 4) * torch.erfc(beta * y / (2 * math.sqrt(1 - beta**2)))
    whole = torch.trapezoid(inside, y).item()
    assert 1 - whole / (2 * math.sqrt(math.pi)) == pytest.approx(p_j(beta), abs=2e-8)


def test_no_exit_agrees_less_often_than_equation_14() -> None:
    for beta in [*random(50).random(DRAWS), *EDGES]:
        assert theorem_6(beta) <= sharper_6(beta) <= p_j(beta) * (1 + 1e-15)
    assert theorem_6(1.0) == sharper_6(1.0) == p_j(1.0) == 1
    assert p_j(-1.0) == 0  # where eq. 14's formula would say 1


def test_a_coin_says_more_than_equation_14_below_the_root_of_six_sevenths() -> None:
    turn = math.sqrt(6 / 7)
    assert theorem_6(turn - 1e-6) < 0.5 < theorem_6(turn + 1e-6)


def test_fact_4_and_what_it_could_be() -> None:
    t = torch.linspace(0, 6, 601, dtype=torch.float64)
    assert (torch.erfc(t) <= torch.exp(-t * t)).all()
    assert (torch.exp(-t * t) <= 2 * torch.exp(-t * t / 2)).all()
    assert math.erfc(-3) > 2 * math.exp(-9 / 2)  # and where it does not hold
    below = torch.sqrt(-torch.expm1(-4 * t * t / math.pi))
    assert (torch.erf(t) <= below + 1e-15).all()  # Fact 3
    assert math.erf(1.0) == pytest.approx(2 * (0.5 * math.erfc(-(2**0.5) / 2**0.5) - 0.5))


def test_corollary_4_is_the_order_of_what_an_exit_misses() -> None:
    for tau in np.logspace(-9, 0, 100):
        assert 1 - p_j(1 - tau) <= 1 - theorem_6(1 - tau) <= 2 * corollary_4(tau) * (1 + 1e-6)
    assert (1 - p_j(1 - 1e-10)) / corollary_4(1e-10) == pytest.approx(2**0.5 / math.pi, rel=1e-4)
    assert (1 - theorem_6(1 - 1e-10)) / corollary_4(1e-10) == pytest.approx(2, rel=1e-4)


def network(rng: np.random.Generator) -> tuple[Vector, list[Vector], int]:
    k, d = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    mix = rng.uniform(0, 1)  # between layers at random and layers that do nothing
    weights = [mix * rng.standard_normal((d, d)) + (1 - mix) * np.eye(d) for _ in range(k)]
    return rng.standard_normal(d), weights, int(rng.integers(1, k + 1))


def test_beta_is_the_cosine_of_theorem_6_at_any_scale() -> None:
    rng = random(51)
    for _ in range(300):
        theta, weights, j = network(rng)
        A = np.linalg.multi_dot([*weights[:j][::-1], np.eye(len(theta))])
        B = np.linalg.multi_dot([*weights[j:][::-1], np.eye(len(theta)), np.eye(len(theta))])
        early, late = A.T @ theta, A.T @ B.T @ theta
        cosine = early @ late / np.linalg.norm(early) / np.linalg.norm(late)
        assert beta_j(theta, weights, j) == pytest.approx(cosine, abs=1e-12)
        huge = [1e200 * each for each in weights]
        assert beta_j(1e-200 * theta, huge, j) == pytest.approx(cosine, abs=1e-12)
        assert beta_j(theta, weights, len(weights)) == 1


def test_counted_agreement_is_theorem_6s_in_ten_thousand_networks() -> None:
    rng = random(52)
    pairs, z = 100, []
    for _ in range(DRAWS):
        theta, weights, j = network(rng)
        beta = beta_j(theta, weights, j)
        counted, p = p_j_counted(theta, weights, j, pairs, rng), p_j(beta)
        error = math.sqrt(p * (1 - p) / pairs)
        if beta >= 0:
            assert counted >= theorem_6(beta) - 5 * error - 1e-12
        if error > 0.01:
            z.append((counted - p) / error)
    assert len(z) > DRAWS / 4
    assert abs(np.mean(z)) < 5 / math.sqrt(len(z))
    assert np.mean(np.square(z)) == pytest.approx(1, abs=5 * math.sqrt(2 / len(z)))


@pytest.mark.parametrize("sign", [-1, 1])
def test_counting_by_the_losses_of_equations_7_to_12_comes_to_the_same(sign: int) -> None:
    """With the usual sigmoid (-1) and with the one of section 3 as printed (1)."""
    rng, pairs = random(53), 40_000
    for _ in range(10):
        theta, weights, j = network(rng)
        x, y = rng.standard_normal((pairs, 2, len(theta))), rng.integers(0, 2, (pairs, 2))
        harder = []
        for depth in (j, len(weights)):
            h = x
            for each in weights[:depth]:
                h = h @ each.T
            guess = 1 / (1 + np.exp(sign * np.clip(h @ theta, -30, 30)))
            harder.append((-y * np.log(guess) - (1 - y) * np.log(1 - guess)).argmax(1))
        p = p_j(beta_j(theta, weights, j))
        error = math.sqrt(p * (1 - p) / pairs)
        assert np.mean(harder[0] == harder[1]) == pytest.approx(p, abs=5 * error + 2e-3)


def test_labels_that_depend_on_the_sample_break_theorem_6() -> None:
    """Of a network that its labels agree with, an early exit keeps less than the theorem says."""
    beta = 0.9
    turn = np.array([[beta, math.sqrt(1 - beta**2)], [-math.sqrt(1 - beta**2), beta]])
    theta, weights = np.array([1.0, 0.0]), [np.eye(2), turn]
    assert beta_j(theta, weights, 1) == pytest.approx(beta)
    pairs = 200_000
    free = p_j_counted(theta, weights, 1, pairs, random(54))
    bound = p_j_counted(theta, weights, 1, pairs, random(55), teacher=turn.T @ theta)
    assert free == pytest.approx(p_j(beta), abs=5 * 0.5 / math.sqrt(pairs))
    assert bound == pytest.approx(0.7735, abs=0.006)
