"""The paper's theorems as functions: when greedy selection converges sooner, how far, and what an exit may lose.

    theorem_1(D_0=1, rho_star=1.5, eta=0.5, L=1, K=100, Delta_R=0.2)    # greedy SGD: 0.280
    theorem_2(D_0=1, eta=0.5, L=1, K=100, F_star=0.1)                   # SGD: 0.220, so greedy is past its time:
    corollary_1(D_0=1, rho_star=1.5, eta=0.5, L=1, Delta_R=0.2, F_star=0.1)    # (10 iterations, 0.4)
    p_j(beta_j(theta, weights, j=3))            # how often an exit at layer 3 picks the harder of two samples
    rho(losses, R=2)                            # measured: mean loss of the harder of two, over mean loss

Source of everything: Das et al., "Training Speedup from Sampling with Approximate Losses" (ICML 2024); equation
numbers are theirs. A function raises ValueError outside the domain in which its theorem is stated or its proof
holds. "Slip" marks where the paper's text is not right as printed; "sharper" what its proofs give for nothing.

Symbols. w parameters; f(w, x) >= 0 loss of one sample, F its mean over the data, F* = ``F_star`` the least F; all
of one unit, such as nats. R candidates per step, of which greedy SGD (GSGD) takes the one of highest loss.
F_hat_R the expected highest loss of R samples, rho_R = F_hat_R / F (no unit, 1 to R), ``rho_star`` its infimum
over w, ``Delta_R`` at least F_hat_R at a minimiser of F. eta step size; L smoothness, 1 / eta in units; K
iterations; D_0 distance from start to the nearest minimiser. sigma the noise of log f as the exit sees it.
epsilon, delta mean and standard deviation of a prediction's error. theta the head, W_1 ... W_k the layers of a
linear network, beta_j a correlation, p_j a probability, tau_j = 1 - beta_j.

Assumptions 1 to 4: f continuous, convex and L-smooth in w, its minimum 0 for every sample. What the proofs use
is f >= 0, as in logistic regression, whose infimum 0 is never reached; and a convex f that is finite everywhere
is continuous.

Slip: eq. 5 says rho* > 1 unless all samples are alike. It is an infimum, and may be 1: f = (w - y)^2 / 2 with
y = 1 in a third and y = -1 in two thirds of the data has equal losses at w = 0, which is not the minimiser, and
almost equal ones at any w far away. The proofs use rho_R at the iterates only, so its least value on a run's way,
and for eq. 5 at the minimiser, may stand for rho*. Slip: eq. 5 divides by F*, which may be 0; then read rho* F* <= Delta_R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


SIGMA_LIMIT = 1 / (2 * math.sqrt(2))  # of Theorem 4, 0.354
LEAST_R = 9  # of Theorem 5: the first R with R / (4 ln R) >= 1
NODES = 64  # of the quadrature of eq. 13, on an integrand that is entire
ROUNDING = 1e-14  # of Delta_R, within which rho* F* counts as equal to it
PAIRS = 1 << 14  # drawn at a time while counting

Vector = NDArray[np.float64]


# ---- section 5: convergence


def theorem_1(
    D_0: float, rho_star: float, eta: float, L: float, K: float, Delta_R: float
) -> float:
    """Bound the loss E F of GSGD's mean iterate (w_0 + ... + w_{K-1}) / K.

        D_0^2 / (2 rho* eta (1 - eta L) K) + Delta_R / (rho* (1 - eta L))

    >>> round(theorem_1(D_0=1, rho_star=1.5, eta=0.5, L=1, K=100, Delta_R=0.2), 4)
    0.28

    ``K=math.inf`` gives the floor, which no step size brings below Delta_R / rho* >= F* (Remark 1).
    Domain: assumptions 1 to 5, 0 < eta < 1/L, K >= 1, rho* >= 1, D_0 and Delta_R >= 0; else ValueError.
    Slip: eqs. 21 and 22 say "=" where eqs. 19 and 20 give "<=". Source: Theorem 1, appendix B.
    """
    _need(
        1 <= rho_star < math.inf,
        f"rho* = {rho_star}",
        "a finite rho* >= 1: a maximum is no less than a mean; measure both on the same samples",
    )
    _need(Delta_R >= 0, f"Delta_R = {Delta_R}", "Delta_R >= 0, as losses are")
    shrink = _shrink(D_0, eta, L, K)
    return (D_0**2 / (2 * eta * K) + Delta_R) / (rho_star * shrink)


def theorem_2(D_0: float, eta: float, L: float, K: float, F_star: float) -> float:
    """Bound the loss E F of SGD's mean iterate (w_0 + ... + w_{K-1}) / K.

        D_0^2 / (2 eta (1 - eta L) K) + eta L F* / (1 - eta L) + F*

    >>> round(theorem_2(D_0=1, eta=0.5, L=1, K=100, F_star=0.1), 4)
    0.22

    Domain: assumptions 2 to 4, 0 < eta < 1/L, K >= 1, D_0 and F* >= 0; else ValueError.
    Slip: the paper goes to F* by "eta = 1 / (eta L sqrt K)"; eta = 1 / (L sqrt K), for K > 1, does.
    Source: Theorem 2.
    """
    _need(F_star >= 0, f"F* = {F_star}", "F* >= 0, as losses are")
    shrink = _shrink(D_0, eta, L, K)
    return D_0**2 / (2 * eta * shrink * K) + eta * L * F_star / shrink + F_star


def corollary_1(
    D_0: float, rho_star: float, eta: float, L: float, Delta_R: float, F_star: float
) -> tuple[float, float]:
    """Find the K up to which Theorem 1's bound is below Theorem 2's, and the loss where they meet.

        K = D_0^2 (rho* - 1) / (2 eta (Delta_R - rho* F*)),   (Delta_R - F*) / ((1 - eta L) (rho* - 1))

    >>> K, loss = corollary_1(D_0=1, rho_star=1.5, eta=0.5, L=1, Delta_R=0.2, F_star=0.1)
    >>> round(K, 9), round(loss, 9)
    (10.0, 0.4)

    If Delta_R = rho* F* (to rounding: a measured rho* is a quotient), both have one floor, the loss returned, and K
    is inf: GSGD's bound is always below.
    Domain: that of both theorems, rho* > 1 and rho* F* <= Delta_R (eq. 5); else ValueError.
    It compares bounds under one eta, not the algorithms. Source: Corollary 1.
    """
    _need(
        1 < rho_star < math.inf,
        f"rho* = {rho_star}",
        "a finite rho* > 1: at 1, GSGD's bound is nowhere better",
    )
    _need(F_star >= 0, f"F* = {F_star}", "F* >= 0, as losses are")
    above = Delta_R - rho_star * F_star
    if abs(above) <= ROUNDING * Delta_R:
        above = 0.0
    _need(
        above >= 0,
        f"rho* F* = {rho_star * F_star} and Delta_R = {Delta_R}",
        "rho* F* <= Delta_R (eq. 5); measure all three on the same samples, rho_R at w*, too",
    )
    shrink = _shrink(D_0, eta, L, 1)
    K = D_0**2 * (rho_star - 1) / (2 * eta * above) if above else math.inf
    return K, (Delta_R - F_star) / (shrink * (rho_star - 1))


def theorem_3(
    D_0: float, rho_star_approx: float, eta: float, L: float, K: float, Delta_R: float
) -> float:
    """Bound the loss of GSGD that chooses by approximate losses: Theorem 1 with rho*_approx for rho*.

    >>> round(theorem_3(D_0=1, rho_star_approx=1.25, eta=0.5, L=1, K=100, Delta_R=0.2), 4)
    0.336

    Domain: Theorem 1's, with assumption 6 in the place of 5; else ValueError. Under assumption 6, whose noise is
    independent of the losses, rho*_approx >= 1: a sample of higher loss is never less likely to be chosen. A
    measured value below 1 says that the assumption does not hold.
    Slip: the proof is not Theorem 1's "by replacing F_hat_R with F_hat_R,approx", for which of the samples is
    chosen depends on w, and so E grad f(w, x_hat) is not the gradient of F_hat_R,approx. Convexity of the chosen
    f alone, and f(w*, x_hat) <= max f(w*, .), give the same bound; Delta_R must then bound F_hat_R(w*), as the
    paper has it, and not only F_hat_R,approx(w*). Source: Theorem 3.
    """
    _need(
        rho_star_approx >= 1,
        f"rho*_approx = {rho_star_approx}",
        "at least 1, as noise that is independent of the losses (assumption 6) gives",
    )
    return theorem_1(D_0, rho_star_approx, eta, L, K, Delta_R)


# ---- section 5.1: noise, R = 2


def theorem_4(sigma: float) -> float:
    """Return p(sigma), the share of F_hat_2 that a choice by noisy losses keeps at least.

        p(sigma) = 1 - 0.72 (1 - exp(-sqrt(2) sigma));   rho_2,approx >= p(sigma) rho_2

    >>> round(theorem_4(0.2), 4), theorem_4(0.0)
    (0.8226, 1.0)

    Domain: assumption 6 and 0 <= sigma <= 1 / (2 sqrt 2) = 0.354; else ValueError. ``sharper_4`` needs no limit.
    Slip: Lemma 1 says 1 / (1 + 0.62^2) <= 0.72; it is 0.7223. The lemma holds all the same: the 0.62 should be
    1 / sqrt(4 sqrt(e) - 5) = 0.79 (0.627 is that without its root), which gives 0.615; at the limit of sigma
    0.512 would do. Source: Theorem 4, appendix C.
    """
    _need(
        0 <= sigma <= SIGMA_LIMIT,
        f"sigma = {sigma}",
        f"0 <= sigma <= 1 / (2 sqrt 2) = {SIGMA_LIMIT}; sharper_4(sigma) holds for any",
    )
    return 1 - 0.72 * -math.expm1(-math.sqrt(2) * sigma)


def sharper_4(sigma: float) -> float:
    """Return a better p(sigma) than Theorem 4's, for any noise level.

        (1 + exp(-sqrt(2) sigma)) / 2

    >>> round(sharper_4(0.2), 4), round(sharper_4(5.0), 4)
    (0.8768, 0.5004)

    Domain: assumption 6, sigma >= 0; else ValueError. Not in the paper: its proof bounds P(Z >= t) by Cantelli's
    2 / (2 + t^2), though Z = zeta_2 - zeta_1 is symmetric, so that Chebyshev's min(1/2, 1/t^2) holds. Then
    sup_t (1 - exp(-sigma t)) min(1/2, 1/t^2) is at t = sqrt 2.
    """
    _need(0 <= sigma < math.inf, f"sigma = {sigma}", "a standard deviation, sigma >= 0")
    return (1 + math.exp(-math.sqrt(2) * sigma)) / 2


def corollary_2(rho_star_2: float) -> float:
    """Return the noise level below which p(sigma) rho*_2 > 1: GSGD by approximate losses can be faster.

        min(sigma_max, 1 / (2 sqrt 2)),   sigma_max = log(18 rho*_2 / (25 - 7 rho*_2)) / sqrt 2

    >>> round(corollary_2(1.2), 4), round(corollary_2(1.6), 4)
    (0.1862, 0.3536)

    Domain: 1 < rho*_2 <= 2; else ValueError: losses >= 0 have F_hat_2 <= 2 F, so 25 - 7 rho*_2 is never near 0.
    Slip: the paper's sigma_max alone leaves Theorem 4's domain from rho*_2 = 1.395 on, hence the minimum.
    (By ``sharper_4`` the conclusion holds up to sigma_max as printed.) Source: Corollary 2.
    """
    _need(
        1 < rho_star_2 <= 2,
        f"rho*_2 = {rho_star_2}",
        "1 < rho*_2 <= 2, as the higher of two losses >= 0 is at most their sum",
    )
    return min(math.log(18 * rho_star_2 / (25 - 7 * rho_star_2)) / math.sqrt(2), SIGMA_LIMIT)


# ---- section 5.2: the squared loss


def theorem_5(R: int, epsilon: float, delta: float) -> float:
    """Bound rho_R from below for squared errors of predictions that are off by N(epsilon, delta^2).

        (|epsilon| + delta sqrt(pi/2 log(R / (4 log R))))^2 (1 - 1/R) / (epsilon^2 + delta^2)

    >>> round(theorem_5(64, epsilon=0.0, delta=1.0), 3), round(theorem_5(9, 0.0, 1.0), 3)
    (2.083, 0.033)

    Domain: assumption 7; a whole R >= 9, for the proof takes the root of log(R / (4 log R)), which is negative
    from R = 2 to 8 (SIFT's R is 2); delta >= 0, not both 0; else ValueError. log is natural. The bound says
    something from R = 25 on if epsilon = 0, and at R = 9 never: rho_R >= 1 anyway.
    Slip: with epsilon + t < 0, t being the root's term, max Z_i >= epsilon + t does not give eq. 56. Z^2 and
    (-Z)^2 are distributed alike, though, so |epsilon| may stand there, which is what this returns; for a
    negative epsilon that is more than the paper's. Source: Theorem 5, appendix D.
    """
    _need_whole(R, LEAST_R, "R / (4 ln R) >= 1 for the proof's square root")
    _need(0 <= delta < math.inf, f"delta = {delta}", "a standard deviation, delta >= 0")
    _need(
        0 < math.hypot(epsilon, delta) < math.inf,
        f"epsilon = {epsilon}, delta = {delta}",
        "finite errors, not all of them 0",
    )
    root = math.sqrt(math.pi / 2 * math.log(R / (4 * math.log(R))))
    mean, spread = (each / math.hypot(epsilon, delta) for each in (abs(epsilon), delta))
    return (mean + spread * root) ** 2 * (1 - 1 / R)


def corollary_3(R: int) -> float:
    """Return how rho*_R grows with R, up to an unknown constant: log(R / log R) + sqrt(log(R / log R)).

        rho*_R >= (1 + Omega(corollary_3(R))) (1 - 1/R)

    >>> round(corollary_3(9), 3), round(corollary_3(1000), 3)
    (2.597, 7.206)

    An order for R to infinity, no bound: at R = 9 Theorem 5 leaves a negative constant. Domain: Theorem 5's, with
    |epsilon| at most a constant times delta (the paper writes epsilon); R >= 9, else ValueError. The square root
    is below the first term, and changes the constant only. Source: Corollary 3.
    """
    _need_whole(R, LEAST_R, "the setting of Theorem 5, R / (4 ln R) >= 1")
    grown = math.log(R / math.log(R))
    return grown + math.sqrt(grown)


# ---- section 6.1: early exits of a linear network, R = 2


def p_j(beta_j: float) -> float:
    """Return the probability that the exit at layer j picks the harder of two samples, in closed form.

        p_j = 1/2 + arcsin(beta_j) / pi

    >>> p_j(0.0), round(p_j(0.9), 4), p_j(1.0)
    (0.5, 0.8564, 1.0)

    Equal to eq. 13 (``p_j_integral``): Sheppard's formula for two correlated normal numbers. Holds for negative
    beta_j, too. Domain: -1 <= beta_j <= 1, else ValueError; x ~ N(0, I) and labels that do not depend on x.
    Slip: the last of these is not said, but z = y_1 x_1 - y_2 x_2 is normal (eq. 62) only then. For labels by
    the sign of the network's own output, p_j is less: 0.77, not 0.86, at beta_j = 0.9.
    Slips of notation: the layers are {W_i} for i to k, not to d; sig(z) = 1 / (1 + e^z) falls with z, and eq. 62
    is right for that one: under the usual sigmoid both of its inequalities turn, and p_j stays.
    """
    _need_correlation(beta_j, -1)
    return 0.5 + math.asin(beta_j) / math.pi


def p_j_integral(beta_j: float) -> float:
    """Return p_j by quadrature of eq. 13, to 1e-12.

        1 - 1 / (2 sqrt pi) int_0^inf exp(-y^2 / 4) erfc(beta_j y / (2 sqrt(1 - beta_j^2))) dy

    >>> round(p_j_integral(0.9), 9) == round(p_j(0.9), 9)
    True

    y = 2 sqrt(1 - beta^2) u takes the pole at beta = 1 out of the argument: 64 Gauss-Legendre nodes do.
    Negative beta_j by erfc(-t) = 2 - erfc(t). Domain as in ``p_j``. Source: Theorem 6, eq. 13.
    """
    _need_correlation(beta_j, -1)
    if beta_j < 0:
        return 1 - p_j_integral(-beta_j)
    free = (1 - beta_j) * (1 + beta_j)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    reach = 6.5  # the integrand is below exp(-u^2): 5e-19 there
    terms = [
        weight * math.exp(-free * u * u) * math.erfc(beta_j * u)
        for u, weight in zip(reach / 2 * (nodes + 1), reach / 2 * weights, strict=True)
    ]
    return 1 - math.sqrt(free / math.pi) * math.fsum(terms)


def theorem_6(beta_j: float) -> float:
    """Bound p_j from below, eq. 14.

        1 - sqrt((2 - 2 beta_j^2) / (2 - beta_j^2))

    >>> theorem_6(0.0), round(theorem_6(0.9), 4), theorem_6(1.0)
    (0.0, 0.4349, 1.0)

    Domain: 0 <= beta_j <= 1, else ValueError: eq. 14 rests on Fact 4, which needs t >= 0, and says 1 where p_j is
    0, at beta_j = -1. Below beta_j = sqrt(6/7) = 0.926 a coin, p_j >= 1/2, says more; ``sharper_6`` always does.
    Slip: Fact 4's proof has erf(t) = 2 P(0 < Z < t) for a standard normal Z, eq. 15; it is P(0 < Z < sqrt(2) t).
    Its erfc(t) <= 2 exp(-t^2 / 2) is true for t >= 0, with much to spare: erfc(t) <= exp(-t^2).
    Source: Theorem 6, appendix E.
    """
    _need_correlation(beta_j, 0)
    free = (1 - beta_j) * (1 + beta_j)
    return 1 - math.sqrt(2 * free / (1 + free))


def sharper_6(beta_j: float) -> float:
    """Bound p_j from below by 1 - sqrt(1 - beta_j^2) / 2: exact at beta_j = 0 and 1.

    >>> sharper_6(0.0), round(sharper_6(0.9), 4), sharper_6(1.0)
    (0.5, 0.7821, 1.0)

    Domain: 0 <= beta_j <= 1, else ValueError. Not in the paper: eq. 80 with erfc(t) <= exp(-t^2).
    """
    _need_correlation(beta_j, 0)
    return 1 - math.sqrt((1 - beta_j) * (1 + beta_j)) / 2


def corollary_4(tau_j: float) -> float:
    """Return the order of 1 - p_j for a layer that is almost the last, beta_j = 1 - tau_j: sqrt(tau_j).

    >>> corollary_4(0.01)
    0.1

    An order for tau_j to 0, no bound: the paper gives no constant. Eq. 14 has 2; by ``p_j`` it is sqrt(2) / pi =
    0.45. Domain: 0 <= tau_j <= 1, else ValueError. Source: Corollary 4.
    """
    _need(0 <= tau_j <= 1, f"tau_j = {tau_j}", "0 <= tau_j = 1 - beta_j <= 1")
    return math.sqrt(tau_j)


# ---- the same quantities, measured


def F_hat(losses: ArrayLike, R: int) -> Vector:
    """Return the expected highest loss of R draws, with replacement, from the samples: exact, O(n log n).

    >>> float(F_hat([0.0, 1.0], R=2))
    0.75

    Losses [..., n], every row a set of samples, to [...]. With replacement the law of the data is the samples'
    own. Raises ValueError unless losses are finite, >= 0 and at least one, R whole and >= 2. Source: Definition 2.
    """
    values = np.sort(_losses(losses), axis=-1)
    _need_whole(R, 2, "the paper's R > 1 candidates")
    n = values.shape[-1]
    # The highest, less each gap times the chance that no draw is above it: nothing cancels.
    none_above = (np.arange(1, n) / n) ** R
    return np.asarray(values[..., -1] - (none_above * np.diff(values, axis=-1)).sum(axis=-1))


def rho(losses: ArrayLike, R: int) -> Vector:
    """Return rho_R: the expected highest loss of R draws over the mean loss, 1 to R.

    >>> float(rho([0.0, 1.0], R=2)), float(rho([1.0, 1.0], R=2))
    (1.5, 1.0)

    Losses [..., n] to [...], as ``F_hat``, all at one w. Raises ValueError as that, and where all are 0.
    Source: Definition 2.
    """
    mean = _losses(losses).mean(axis=-1)
    _need(bool((mean > 0).all()), "samples whose losses are all 0", "F(w) > 0; rho is 0 / 0 there")
    # Where all are alike, rounding may fall below.
    return np.asarray(np.maximum(F_hat(losses, R) / mean, 1))


def rho_approx(losses: ArrayLike, approximate: ArrayLike, R: int) -> float:
    """Return rho_R,approx: the mean loss of the draw that looks highest of R, over the mean loss.

    >>> rho_approx([0.0, 1.0], approximate=[5.0, 5.1], R=2), rho_approx([0.0, 1.0], [5.1, 5.0], R=2)
    (1.5, 0.5)

    Losses and approximate losses [n], in the same order; draws that look alike are equally likely to be taken. Any
    score will do for ``approximate``, as only its order counts. Raises ValueError as ``rho``, and where lengths
    differ or an approximate loss is nan. Source: Definition 3.
    """
    values, seen = _losses(losses), np.asarray(approximate, dtype=np.float64)
    _need_whole(R, 2, "the paper's R > 1 candidates")
    _need(
        values.ndim == 1 and values.shape == seen.shape,
        f"losses {values.shape} and approximate losses {seen.shape}",
        "one of each per sample, [n]",
    )
    _need(not bool(np.isnan(seen).any()), "approximate losses that are nan", "numbers: drop them")
    _need(bool(values.any()), "samples whose losses are all 0", "F(w) > 0; rho is 0 / 0 there")
    _, level, sizes = np.unique(seen, return_inverse=True, return_counts=True)
    below = np.concatenate([[0.0], np.cumsum(sizes) / len(values)]) ** R
    means = np.bincount(level.ravel(), weights=values) / sizes
    return float((np.diff(below) * means).sum() / values.mean())


def beta_j(theta: ArrayLike, weights: Sequence[ArrayLike], j: int) -> float:
    """Return beta_j of a linear network: the cosine of A_j^T theta and A_j^T B_j^T theta (Theorem 6).

    >>> round(beta_j([1.0, 0.0], [np.eye(2), [[1.0, 1.0], [0.0, 1.0]]], j=1), 4)
    0.7071

    theta [d] the head, weights [d, d] each, the first applied first; A_j = W_j ... W_1, B_j = W_k ... W_{j+1}.
    Raises ValueError where shapes do not fit, j is not in 1..k, or a product is 0 or not finite.
    """
    early, late = _directions(theta, weights, j)
    return 1.0 if j == len(weights) else float(np.clip(early @ late, -1, 1))


def p_j_counted(
    theta: ArrayLike,
    weights: Sequence[ArrayLike],
    j: int,
    pairs: int,
    rng: np.random.Generator,
    *,
    teacher: ArrayLike | None = None,
) -> float:
    """Count p_j: the share of pairs whose harder sample is the same at layer j and at the last, eq. 12.

    >>> p_j_counted([1.0, 0.0], [np.eye(2), np.eye(2)], j=1, pairs=100, rng=np.random.default_rng(0))
    1.0

    Samples x ~ N(0, I), labels by coin as the proof needs; with ``teacher`` [d] a label is whether teacher . x > 0,
    which breaks the theorem. Standard error sqrt(p (1 - p) / pairs). Theta and weights as in ``beta_j``; raises
    ValueError as that, for pairs < 1, and for a teacher of another length.
    """
    _need_whole(pairs, 1, "pairs to count", name="pairs")
    exits = np.stack(_directions(theta, weights, j), axis=-1)  # [d, 2]
    width = len(exits)
    judge = None if teacher is None else _vector(teacher, "teacher", width)
    alike = 0
    for start in range(0, pairs, PAIRS):
        n = min(PAIRS, pairs - start)
        x = rng.standard_normal((n, 2, width))
        label = rng.integers(0, 2, (n, 2)) if judge is None else (x @ judge > 0).astype(np.int64)
        # The loss log(1 + exp(-margin)) falls with the margin: the lower one is the harder sample.
        margin = (2 * label - 1)[..., None] * (x @ exits)  # [n, 2 samples, 2 exits]
        harder = margin[:, 0] < margin[:, 1]  # [n, 2 exits]
        alike += int((harder[:, 0] == harder[:, 1]).sum())
    return alike / pairs


# ---- helpers


def _shrink(D_0: float, eta: float, L: float, K: float) -> float:
    """Return 1 - eta L, in the domain that both convergence theorems share."""
    _need(0 < L < math.inf, f"L = {L}", "a finite smoothness L > 0")
    _need(
        0 < eta < 1 / L,  # not eta * L < 1: 49 * (1 / 49) is below 1
        f"eta = {eta}",
        f"0 < eta < 1/L = {1 / L}; take a smaller step size",
    )
    _need(K >= 1, f"K = {K}", "at least one iteration")
    _need(0 <= D_0 < math.inf, f"D_0 = {D_0}", "a finite distance, D_0 >= 0")
    return 1 - eta * L


def _losses(losses: ArrayLike) -> Vector:
    values = np.asarray(losses, dtype=np.float64)
    _need(values.ndim > 0 and values.shape[-1] > 0, f"losses of shape {values.shape}", "a sample")
    _need(
        bool(np.isfinite(values).all()), "losses that are not finite", "numbers: drop those rows"
    )
    _need(bool((values >= 0).all()), f"a loss of {values.min()}", "losses >= 0 (assumption 4)")
    return values


def _directions(theta: ArrayLike, weights: Sequence[ArrayLike], j: int) -> tuple[Vector, Vector]:
    """Return A_j^T theta and A_j^T B_j^T theta, of length 1: nothing else of them matters."""
    head = _vector(theta, "theta", None)
    width = len(head)
    layers = [np.asarray(each, dtype=np.float64) for each in weights]
    for number, each in enumerate(layers, 1):
        _need(
            each.shape == (width, width),
            f"W_{number} of shape {each.shape}",
            f"[{width}, {width}], as theta has {width} entries",
        )
    _need_whole(j, 1, f"a layer, 1 to {len(layers)}", name="j")
    _need(j <= len(layers), f"j = {j}", f"a layer, 1 to {len(layers)}")
    return _back(head, layers[:j]), _back(head, layers)


def _back(head: Vector, layers: Sequence[Vector]) -> Vector:
    for each in reversed(layers):
        head = _unit(each.T @ head)
    return _unit(head)


def _unit(vector: Vector) -> Vector:
    largest = float(np.abs(vector).max())
    _need(
        0 < largest < math.inf,
        f"a product of head and layers whose largest entry is {largest}",
        "one that is finite and not 0; else no loss depends on the sample",
    )
    scaled = vector / largest  # so that no square overflows
    return np.asarray(scaled / np.sqrt((scaled * scaled).sum()))


def _vector(values: ArrayLike, name: str, width: int | None) -> Vector:
    vector = np.asarray(values, dtype=np.float64)
    wanted = len(vector) if width is None and vector.ndim == 1 else width
    _need(
        vector.ndim == 1 and len(vector) == wanted and wanted > 0,
        f"{name} of shape {vector.shape}",
        "one entry per dimension, [d]",
    )
    return vector


def _need_correlation(beta: float, least: int) -> None:
    _need(least <= beta <= 1, f"beta_j = {beta}", f"{least} <= beta_j <= 1")


def _need_whole(number: int, least: int, why: str, name: str = "R") -> None:
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    _need(whole and number >= least, f"{name} = {number}", f"a whole number >= {least}: {why}")


def _need(holds: bool, found: str, needed: str) -> None:
    """Raise ValueError unless ``holds``; a comparison with nan does not hold."""
    if not holds:
        raise ValueError(f"{found}: need {needed}")
