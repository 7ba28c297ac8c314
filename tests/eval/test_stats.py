"""Standard errors and paired tests, against scipy and against what they must do under the null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from atoll.eval.corpus_metrics import Pearson, SpanF1
from atoll.eval.row_metrics import Accuracy
from atoll.eval.stats import bootstrap_difference_p, bootstrap_stderr, mcnemar_p, mean_stderr, paired_p, sign_flip_p


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_the_standard_error_of_a_mean_is_closed_form(rng):
    """It must equal scipy's, and the bootstrap must come near it."""
    values = rng.random((200, 1))
    assert mean_stderr(values[:, 0]) == pytest.approx(stats.sem(values[:, 0]))
    assert bootstrap_stderr(Accuracy.aggregate, values) == pytest.approx(stats.sem(values[:, 0]), rel=0.1)


def test_one_row_has_no_standard_error():
    """A spread of 0 from a single row would make any difference look certain."""
    assert mean_stderr(np.array([1.0])) is None
    assert bootstrap_stderr(Accuracy.aggregate, np.array([[1.0]])) is None


def test_a_bootstrap_gives_the_same_number_twice(rng):
    """Scores are stored and compared; a second run over the same outputs must not move them."""
    evidence = np.column_stack([rng.integers(0, 2, 50), rng.integers(1, 3, 50), rng.integers(1, 3, 50)]).astype(float)
    assert bootstrap_stderr(SpanF1.aggregate, evidence) == bootstrap_stderr(SpanF1.aggregate, evidence)


def test_the_bootstrap_of_a_correlation_is_near_its_formula(rng):
    """For normal pairs the standard error of r is about (1 - r²) / sqrt(n)."""
    x = rng.normal(size=400)
    evidence = np.column_stack([x + rng.normal(size=400), x])
    r = Pearson.aggregate(evidence)
    assert bootstrap_stderr(Pearson.aggregate, evidence) == pytest.approx((1 - r * r) / math.sqrt(400), rel=0.2)


def test_mcnemar_is_the_exact_binomial_test(rng):
    """Against scipy's binomial test on the rows where the two differ, for many tables."""
    for _ in range(20):
        first, second = rng.integers(0, 2, (2, 40)).astype(float)
        wins, losses = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
        assert mcnemar_p(first, second) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
        assert mcnemar_p(first, second) == mcnemar_p(second, first)
    assert mcnemar_p(first, first) == 1.0


def test_sign_flips_equal_scipys_permutation_test(rng):
    """The exact branch must agree to rounding, the drawn one within its error."""
    for n, tolerance in ((10, 1e-9), (60, 0.02)):
        first = rng.random(n)
        second = first + rng.normal(0.03, 0.2, n)
        expected = stats.permutation_test(
            (first - second,), np.mean, permutation_type="samples", n_resamples=20_000, vectorized=False, rng=np.random.default_rng(1)
        )
        assert sign_flip_p(first, second) == pytest.approx(expected.pvalue, abs=tolerance)
    assert sign_flip_p(first, first) == 1.0


@pytest.mark.parametrize("test", [mcnemar_p, sign_flip_p])
def test_a_paired_test_keeps_its_level_under_the_null(test, rng):
    """When both models are equally good, p below 0.05 may come about one time in twenty, not more."""
    found = [test(*rng.integers(0, 2, (2, 60)).astype(float)) for _ in range(150)]
    assert np.mean(np.array(found) < 0.05) < 0.11


def test_a_clear_difference_has_a_small_p_in_every_test(rng):
    """A test that cannot see 0.9 against 0.5 on 200 rows would be useless."""
    good, bad = (rng.random(200) < 0.9).astype(float), (rng.random(200) < 0.5).astype(float)
    assert mcnemar_p(good, bad) < 1e-6
    assert sign_flip_p(good * 0.9, bad * 0.9) < 1e-3
    x = rng.normal(size=200)
    close, far = np.column_stack([x + 0.2 * rng.normal(size=200), x]), np.column_stack([rng.normal(size=200), x])
    assert bootstrap_difference_p(Pearson.aggregate, close, far) < 0.01
    assert bootstrap_difference_p(Pearson.aggregate, far, close) < 0.01
    assert bootstrap_difference_p(Pearson.aggregate, close, close) == 1.0


def test_the_fitting_test_is_chosen(rng):
    """Zeros and ones get the exact test, other means sign flips, corpus metrics the bootstrap."""
    first, second = rng.integers(0, 2, (2, 30, 1)).astype(float)
    assert paired_p(Accuracy.aggregate, True, first, second) == mcnemar_p(first[:, 0], second[:, 0])
    assert paired_p(Accuracy.aggregate, True, first * 0.5, second) == sign_flip_p(first[:, 0] * 0.5, second[:, 0])
    assert paired_p(Accuracy.aggregate, False, first, second) == bootstrap_difference_p(Accuracy.aggregate, first, second)
