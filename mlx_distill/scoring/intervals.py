"""All statistics: how sure a share, a difference or a ratio is.

In: outcomes of problems, of one model or of the students of several training seeds. Out:
`Estimate`s with 95 % intervals. Decided here: every interval. Those of one model cover the choice
of problems and the sampling of answers. The crossed ones cover another training seed *and* other
problems: each seed's student answers the same problems. Axes: `S` seeds, `P` problems.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist, fmean

import numpy as np

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of a difference: "better", "worse" or "no clear difference"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no clear difference"


def student_t(degrees: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit  # half a second, and only scores need it

    return float(stdtrit(degrees, 0.975))


def wilson(p: float, n: float, z: float = Z) -> tuple[float, float]:
    """The score interval of a share `p` seen in `n` independent trials (Wilson 1927).

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). It stays inside [0, 1] and has a width at
    p = 0 and p = 1. `n` may be an effective number of trials, which scipy's version refuses.
    """
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / scale, (middle + half) / scale
    return low if p > 0 else 0.0, high if p < 1 else 1.0  # exact where rounding would leave 1e-17


# one model, or two


def interval(correct: Iterable[list[float]]) -> tuple[float, float]:
    """The 95 % interval of a model's accuracy: over n problems, of k samples each.

    It is that of the mean of p_i, the share of right answers to a problem. One sample a problem:
    `wilson(p, n)`. More: samples of one problem are not independent, so problems are the clusters:
    SE² = Σ(p_i − p)² / (n(n−1)), the effective number of trials is n* = p(1−p)/SE² kept within [n,
    nk], and the interval is `wilson(p, n*)` with Student's t of n−1 degrees of freedom in the place
    of z. (Effective sample size: Korn and Graubard, Survey Methodology 24, 1998; in Wilson's
    interval: Franco, Little, Louis and Slud, J. Surv. Stat. Methodol. 7, 2019.)
    """
    rows = list(correct)
    shares = [fmean(samples) for samples in rows]
    n, k, p = len(rows), len(rows[0]), fmean(shares)
    if k == 1 or n == 1:
        return wilson(p, n)
    squared_error = sum((share - p) ** 2 for share in shares) / (n * (n - 1))
    spread = p * (1 - p)
    trials = spread / squared_error if squared_error > 0 else (n * k if spread > 0 else n)
    return wilson(p, min(max(trials, n), n * k), student_t(n - 1))


def pass_at(correct: Iterable[list[float]], k: int) -> Estimate:
    """pass@k over problems of n ≥ k samples each: the chance that one of k samples is right.

    Of a problem with c right samples it is 1 − C(n−c, k) / C(n, k), which has no bias (Chen et al.
    2021, arXiv 2107.03374). The problems are the trials of `wilson`; a problem's own chance is at
    most as uncertain as a single outcome, so the interval covers problems and samples.
    """
    chances = [_chance(len(samples), round(sum(samples)), k) for samples in correct]
    mean = fmean(chances)
    return Estimate(mean, *wilson(mean, len(chances)))


def _chance(n: int, c: int, k: int) -> float:
    return 1.0 - comb(n - c, k) / comb(n, k)


def paired(differences: Sequence[float]) -> Estimate:
    """The mean of the differences d between two models' shares of right answers, one a problem.

    The interval is that of d with two pseudo-problems added, one of +1 and one of −1:
    m ± z·√(v/(n+2)), where m = Σd/(n+2) and v = (Σd² + 2)/(n+2) − m². With one sample a problem
    this is the interval of Bonett and Price (J. Educ. Behav. Stat. 37, 2012) for paired
    proportions; it keeps a width where the plain paired interval collapses.
    """
    padded = len(differences) + 2
    middle = sum(differences) / padded
    variance = (sum(d * d for d in differences) + 2) / padded - middle**2
    half = Z * sqrt(variance / padded)
    return Estimate(fmean(differences), max(-1.0, middle - half), min(1.0, middle + half))


# students of several seeds


def crossed_variance(x: np.ndarray) -> tuple[float, float]:
    """The variance of the mean of x [S, P] over new seeds and problems, and its degrees of freedom.

    With MS_S, MS_P and MS_E the mean squares of seeds, problems and their interaction in a two-way
    layout with one value a cell, the variance is (MS_P + max(MS_S − MS_E, 0)) / (S·P); its degrees
    of freedom are Satterthwaite's. (Both factors random, as in Obuchowski and Rockette, Commun.
    Stat. Simul. 24, 1995, with the bound of Hillis, Stat. Med. 26, 2007.) One seed says nothing
    about seeds: then it is var(x) / P over problems alone. One problem likewise.
    """
    seeds, problems = x.shape
    if seeds == 1 or problems == 1:
        values = x.ravel()
        return (
            (float(values.var(ddof=1)) / values.size, values.size - 1.0)
            if values.size > 1
            else (0.0, 1.0)
        )
    mean, by_seed, by_problem = x.mean(), x.mean(1, keepdims=True), x.mean(0, keepdims=True)
    crossed = (seeds - 1) * (problems - 1)
    ms_seed = problems * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    ms_problem = seeds * float(((by_problem - mean) ** 2).sum()) / (problems - 1)
    ms_error = float(((x - by_seed - by_problem + mean) ** 2).sum()) / crossed
    total, spread = ms_problem, ms_problem**2 / (problems - 1)
    if ms_seed > ms_error:
        total += ms_seed - ms_error
        spread += ms_seed**2 / (seeds - 1) + ms_error**2 / crossed
    return total / (seeds * problems), total**2 / spread if spread else problems - 1.0


def crossed_mean(right: np.ndarray) -> Estimate:
    """The mean of shares [S, P] in [0, 1].

    Wilson's interval at the effective number of trials mean(1 − mean) / variance.
    """
    mean = float(right.mean())
    variance, degrees = crossed_variance(right)
    trials = right.shape[1] if variance == 0 else max(1.0, mean * (1 - mean) / variance)
    return Estimate(mean, *wilson(mean, trials, student_t(degrees)))


def crossed_difference(differences: np.ndarray) -> Estimate:
    """The mean of differences [S, P] between two students of each seed.

    They are padded with two problems as in `paired`.
    """
    padded = _padded(differences)
    variance, degrees = crossed_variance(padded)
    half, middle = student_t(degrees) * np.sqrt(variance), padded.mean()
    return Estimate(
        float(differences.mean()), float(max(-1, middle - half)), float(min(1, middle + half))
    )


def crossed_ratio(a: np.ndarray, b: np.ndarray) -> Estimate | None:
    """mean(a) / mean(b) of paired [S, P]; None where mean(b) is not positive.

    Its variance is that of the linearised ratio (a − R·b) / mean(b), padded with two problems as in
    `paired`.
    """
    below = float(b.mean())
    if below <= 0:
        return None
    ratio = float(a.mean()) / below
    variance, degrees = crossed_variance(_padded(a - ratio * b) / below)
    half = student_t(degrees) * np.sqrt(variance)
    return Estimate(ratio, float(ratio - half), float(ratio + half))


def _padded(d: np.ndarray) -> np.ndarray:
    """Differences [S, P] with one problem of +1 and one of −1 added."""
    ones = np.ones((len(d), 1))
    return np.concatenate([d, ones, -ones], axis=1)
