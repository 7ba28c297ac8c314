"""Metrics of the whole test set: what counts is summed, ranked or correlated over all rows, not averaged a row.

Each keeps per row only what its sum needs, so a resample of rows (eval.stats) is a resample of a small matrix.

Used through eval.metrics.metric_for.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atoll.errors import TaskError
from atoll.eval.matching import normalise_label, read_first_number, read_spans
from atoll.eval.metrics import Evidence, Matrix, Metric, closed_labels

if TYPE_CHECKING:
    from atoll.data.task import Example

_NO_LABEL = -1.0


class SpanF1(Metric):
    """Micro-averaged F1 of (type, text) pairs over the test set: 2 shared / (predicted + gold), pairs of a row counted as a multiset.

    Forms: see eval.matching.read_spans. Evidence: (shared, predicted, gold). An unusable answer counts as one wrong pair, so that on a row without
    entities it is worse than the right "none". With no pair anywhere, on either side, the value is 1.
    """

    name = "span_f1"
    is_mean = False

    def read(self, prediction: str, example: Example) -> Evidence | None:
        """(shared, predicted, gold) numbers of pairs; None when the answer has neither form."""
        predicted = read_spans(prediction)
        if predicted is None:
            return None
        gold = self._gold_spans(example)
        return float((predicted & gold).total()), float(predicted.total()), float(gold.total())

    def failure(self, example: Example) -> Evidence:
        """No pair shared, one wrong pair predicted."""
        return 0.0, 1.0, float(self._gold_spans(example).total())

    @classmethod
    def aggregate(cls, evidence: Matrix) -> float:
        """2 * shared / (predicted + gold)."""
        shared, predicted, gold = evidence.sum(axis=0)
        return float(2 * shared / (predicted + gold)) if predicted + gold else 1.0

    def row_value(self, evidence: Evidence) -> float | None:
        """The row's own F1."""
        return self.aggregate(np.array([evidence]))

    def _gold_spans(self, example: Example) -> Counter[tuple[str, str]]:
        text = self.gold(example)
        spans = read_spans(text)
        if spans is None:
            raise TaskError(
                f"task {self.task.name!r} is scored by spans, but the gold answer of {example.where} is {text[:80]!r}",
                hint="write `type: text | type: text`, `none`, or a JSON object of type to texts",
            )
        return spans


class Pearson(Metric):
    """Pearson's correlation between the first number of the answer and the gold number, over the test set.

    A failure is set to the mean of the usable predictions: it then adds nothing to the covariance but its gold value still counts in the variance
    below the line, so every failure pulls the correlation towards 0 and none can help. Predictions that are all equal have correlation 0.
    Evidence: (prediction or NaN, gold).
    """

    name = "pearson"
    is_mean = False

    def read(self, prediction: str, example: Example) -> Evidence | None:
        """(prediction, gold); None without a number."""
        number = read_first_number(prediction)
        return None if number is None else (number, self._gold_number(example))

    def failure(self, example: Example) -> Evidence:
        """(NaN, gold)."""
        return math.nan, self._gold_number(example)

    @classmethod
    def aggregate(cls, evidence: Matrix) -> float:
        """Correlation of the two columns."""
        return _correlation(_fill(evidence[:, 0]), evidence[:, 1])

    def row_value(self, evidence: Evidence) -> float | None:
        """None: one pair has no correlation."""
        return None

    def _gold_number(self, example: Example) -> float:
        text = self.gold(example)
        number = read_first_number(text)
        if number is None:
            raise TaskError(
                f"task {self.task.name!r} is scored by correlation, but the gold answer of {example.where} is {text[:80]!r}",
                hint="name a gold_field that holds a number",
            )
        return number


class Spearman(Pearson):
    """Spearman's rank correlation, ties at their mean rank; failures stand at the mean rank of the usable predictions (see Pearson)."""

    name = "spearman"

    @classmethod
    def aggregate(cls, evidence: Matrix) -> float:
        """Correlation of the two columns' ranks."""
        predicted = evidence[:, 0].copy()
        usable = ~np.isnan(predicted)
        predicted[usable] = _ranks(predicted[usable])
        return _correlation(_fill(predicted), _ranks(evidence[:, 1]))


def _fill(predicted: Matrix) -> Matrix:
    usable = ~np.isnan(predicted)
    return np.where(usable, predicted, predicted[usable].mean()) if usable.any() else np.zeros_like(predicted)


def _ranks(values: Matrix) -> Matrix:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def _correlation(first: Matrix, second: Matrix) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:  # asked of the values: the rounded deviations of equal values need not be 0
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    return float(np.clip(first @ second / math.sqrt((first @ first) * (second @ second)), -1.0, 1.0))


class ClassMetric(Metric):
    """Common to metrics over classes. Evidence: (predicted class, gold class) as places in the label set, -1 for an answer that is no label."""

    is_mean = False

    @cached_property
    def _places(self) -> dict[str, float]:
        labels = closed_labels(self.task, self.name, exactly=2 if self.name == "f1" else None)
        return {normalise_label(label): float(place) for place, label in enumerate(labels)}

    def read(self, prediction: str, example: Example) -> Evidence | None:
        """(predicted place, gold place); None when the answer is none of the labels."""
        place = self._places.get(normalise_label(prediction))
        return None if place is None else (place, self._gold_place(example))

    def failure(self, example: Example) -> Evidence:
        """(-1, gold place)."""
        return _NO_LABEL, self._gold_place(example)

    def row_value(self, evidence: Evidence) -> float | None:
        """1 if the classes agree."""
        return float(evidence[0] == evidence[1])

    def _gold_place(self, example: Example) -> float:
        gold = self.gold(example)
        if normalise_label(gold) not in self._places:
            raise TaskError(
                f"the gold answer of {example.where} is {gold[:80]!r}, which is not in the label_set of task {self.task.name!r}",
                hint="add it to label_set or correct the row",
            )
        return self._places[normalise_label(gold)]


class MacroF1(ClassMetric):
    """Mean over classes of 2 TP / (predicted + gold), over the labels that occur as gold or as prediction. An answer that is no label only misses."""

    name = "macro_f1"

    @classmethod
    def aggregate(cls, evidence: Matrix) -> float:
        """Mean F1 over the classes that occur."""
        predicted, gold = evidence[:, 0], evidence[:, 1]
        classes = [place for place in np.unique(evidence) if place != _NO_LABEL]
        return float(np.mean([_class_f1(predicted == place, gold == place) for place in classes]))


class BinaryF1(ClassMetric):
    """F1 of the positive class, which is the last of the two labels. An answer that is no label is a miss where gold is positive.

    On a row whose gold is negative, a failure counts as a false alarm: it must not be as good as the right answer.
    """

    name = "f1"

    @classmethod
    def aggregate(cls, evidence: Matrix) -> float:
        """2 TP / (predicted positive + gold positive); 0 when neither occurs."""
        predicted, gold = evidence[:, 0], evidence[:, 1]
        wrong_way = (predicted == _NO_LABEL) & (gold == 0.0)
        return _class_f1((predicted == 1.0) | wrong_way, gold == 1.0)


def _class_f1(predicted: NDArray[np.bool_], gold: NDArray[np.bool_]) -> float:
    total = predicted.sum() + gold.sum()
    return float(2 * (predicted & gold).sum() / total) if total else 0.0


class MatthewsCorrelation(ClassMetric):
    """Matthews' correlation for any number of classes (Gorodkin 2004); answers that are no label are a class of their own, never right.

    (c n - Σ p_k g_k) / sqrt((n² - Σ p_k²)(n² - Σ g_k²)) with c right rows, p_k and g_k how often class k is predicted and gold; 0 when one side is
    constant.
    """

    name = "matthews_corrcoef"

    @classmethod
    def aggregate(cls, evidence: Matrix) -> float:
        """The formula above."""
        predicted, gold = evidence[:, 0], evidence[:, 1]
        classes = np.unique(evidence)
        p = np.array([(predicted == place).sum() for place in classes], dtype=np.float64)
        g = np.array([(gold == place).sum() for place in classes], dtype=np.float64)
        n, right = float(len(evidence)), float((predicted == gold).sum())
        below = (n * n - p @ p) * (n * n - g @ g)
        return float((right * n - p @ g) / math.sqrt(below)) if below > 0 else 0.0


CORPUS_METRICS: tuple[type[Metric], ...] = (SpanF1, Pearson, Spearman, MacroF1, BinaryF1, MatthewsCorrelation)
