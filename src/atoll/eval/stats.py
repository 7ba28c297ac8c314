"""How sure a score is: standard errors, and paired tests of one model against another on the same rows.

Paired, because both models answered the same questions: rows that are hard for both then cancel, and a difference shows with far fewer rows.

Everything random is drawn from a fixed seed, so a score file and its p-value can be made again. Used by eval.evaluate and eval.leaderboard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
SEED = 17
NUM_RESAMPLES = 1_000
NUM_SIGN_FLIPS = 10_000
_EXACT_UP_TO = 13  # 2^13 sign patterns are fewer than NUM_SIGN_FLIPS: then all are tried


def mean_stderr(values: Matrix) -> float | None:
    """Standard error of a mean, sd / sqrt(n) with sd over n - 1; None for fewer than two rows, which say nothing about spread."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def bootstrap_stderr(aggregate: Callable[[Matrix], float], evidence: Matrix, *, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> float | None:
    """Standard deviation of `aggregate` over resamples of the rows `[n, k]` with replacement; None for fewer than two rows."""
    n = len(evidence)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    return float(np.std([aggregate(evidence[rng.integers(0, n, n)]) for _ in range(num_resamples)], ddof=1))


def mcnemar_p(first: Matrix, second: Matrix) -> float:
    """Exact two-sided McNemar test of 0/1 values on the same rows.

    Of the rows where the two differ, each is equally likely to be right under the null: twice the lower binomial tail, at most 1. No such rows: 1.
    """
    from scipy.stats import binom

    only_first, only_second = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(min(1.0, 2 * binom.cdf(min(only_first, only_second), only_first + only_second, 0.5)))


def sign_flip_p(first: Matrix, second: Matrix, *, num_flips: int = NUM_SIGN_FLIPS, seed: int = SEED) -> float:
    """Two-sided paired permutation test of the difference of means: under the null each row's difference has either sign.

    Share of sign patterns whose |sum| reaches the observed one. Up to 13 differing rows all patterns are tried; above, `num_flips` drawn ones and the
    observed one, (1 + hits) / (1 + num_flips), which is never 0.
    """
    differences = (first - second)[first != second]
    if len(differences) == 0:
        return 1.0
    observed = abs(differences.sum()) * (1 - 1e-12)  # equal sums added in another order must still count as reached
    if len(differences) <= _EXACT_UP_TO:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differences))))
        return float((np.abs(signs @ differences) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits, chunk = 0, 500  # chunks bound the sign matrix to chunk * n numbers
    for start in range(0, num_flips, chunk):
        signs = rng.integers(0, 2, (min(chunk, num_flips - start), len(differences)), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ differences) >= observed).sum())
    return (1 + hits) / (1 + num_flips)


def bootstrap_difference_p(
    aggregate: Callable[[Matrix], float], first: Matrix, second: Matrix, *, num_resamples: int = NUM_RESAMPLES, seed: int = SEED
) -> float:
    """Two-sided p of a difference in a metric of the whole test set, by resampling rows of both models together.

    Twice the smaller share of resamples whose difference falls on or beyond 0 on either side, each with one added to count and total, so never 0 and
    at most 1. Rows that agree in everything: 1. first, second: evidence `[n, k]` of the same rows.
    """
    if np.array_equal(first, second, equal_nan=True):
        return 1.0
    n = len(first)
    rng = np.random.default_rng(seed)
    below = above = 0
    for _ in range(num_resamples):
        rows = rng.integers(0, n, n)
        difference = aggregate(first[rows]) - aggregate(second[rows])
        below += difference <= 0
        above += difference >= 0
    return min(1.0, 2 * (1 + min(below, above)) / (1 + num_resamples))


def paired_p(aggregate: Callable[[Matrix], float], is_mean: bool, first: Matrix, second: Matrix) -> float:
    """The fitting test for evidence `[n, k]` of two models on the same rows: McNemar for 0/1, sign flips for other means, else the bootstrap."""
    if not is_mean:
        return bootstrap_difference_p(aggregate, first, second)
    a, b = first[:, 0], second[:, 0]
    if np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all():
        return mcnemar_p(a, b)
    return sign_flip_p(a, b)
