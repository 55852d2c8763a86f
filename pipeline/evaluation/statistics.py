"""The arithmetic of scores: pure functions of numbers.

The unit is the problem. Where a problem has several samples, its value is made of them first, and intervals, standard
errors and tests are over problems. Left out: corrections for many comparisons, and clusters of related problems.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
RESAMPLES = 10_000
_CHUNK = 2_000_000

IntervalMethod = Literal["wilson", "normal", "none"]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval."""

    score: float
    stderr: float | None
    """None for a single problem."""
    low: float
    high: float
    method: IntervalMethod
    n: int


def estimate(values: Sequence[float], *, share: bool = True) -> Estimate:
    """The mean of one value a problem. `share` says that values lie within 0 and 1, and so does the interval.

    Wilson's interval where every value is 0 or 1, or where a share doesn't vary; else the normal one. A single value
    that is no share has no interval: low and high are the value itself. `ValueError` for no values.
    """
    if not values:
        raise ValueError("no values: a mean needs at least one problem")
    score, stderr, n = math.fsum(values) / len(values), standard_error(values), len(values)
    if share and (not stderr or all(value in (0, 1) for value in values)):
        return Estimate(score, stderr, *wilson_interval(score, n), "wilson", n)
    if stderr is None:
        return Estimate(score, None, score, score, "none", n)
    low, high = score - Z * stderr, score + Z * stderr
    bounds = (max(low, 0.0), min(high, 1.0)) if share else (low, high)
    return Estimate(score, stderr, *bounds, "normal", n)


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1) over the root of n, as lm-eval has it; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def wilson_interval(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a share observed on n problems; never of zero width at 0 and 1."""
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"expected a share within 0 and 1 of n >= 1 problems, got {share!r} of {n}")
    spread = z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # At 0 and 1 the bound is exactly there; rounding must not move it past.
    return (0.0 if share == 0 else max(centre - half, 0.0)), (1.0 if share == 1 else min(centre + half, 1.0))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of "one of k samples passes" from n of which `correct` did (arXiv:2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k). `ValueError` for n < k: fewer samples than k don't tell.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n} samples")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples a problem, got {n}; raise samples or lower k")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(votes: Sequence[Hashable | None]) -> int | None:
    """The position of the first vote for the most frequent answer; a tie goes to the answer that came first.

    `None` is no vote. None where nobody voted.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    return votes.index(counts.most_common(1)[0][0]) if counts else None


def maj_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """1 where the majority of the first k answers is right (self-consistency, arXiv:2203.11171), else 0.

    `ValueError` for fewer than k samples.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} needs at least {max(k, 1)} samples a problem, got {len(votes)}")
    winner = majority(votes[:k])
    return float(winner is not None and correct[winner])


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value that problems change either way with equal chance (McNemar, binomial form).

    Of the problems that one of two models solves: `gained` only by the second, `lost` only by the first.
    """
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of mean(second - first), problems resampled in pairs (Efron and Tibshirani 1993)."""
    if len(first) != len(second) or not first:
        raise ValueError(f"expected as many values in both, at least one; got {len(first)} and {len(second)}")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(differences))
    means = [
        differences[random.integers(len(differences), size=(min(rows, resamples - start), len(differences)))].mean(
            axis=1
        )
        for start in range(0, resamples, rows)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
