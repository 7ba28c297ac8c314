"""What answering without reading gets: the most common training answer, given to every test row.

A model that does not beat this has learned how often each answer comes, and nothing about the question. Used by workflows for the leaderboard page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from atoll.eval.metrics import metric_for
from atoll.eval.stats import bootstrap_stderr, mean_stderr

if TYPE_CHECKING:
    from atoll.data.task import Example, TaskData


@dataclass(frozen=True)
class Baseline:
    """One answer for every row. answer: the text; share: how many of the training rows have it; value, stderr, n: its score on the test rows."""

    answer: str
    share: float
    value: float
    stderr: float | None
    n: int


def constant_answer(data: TaskData) -> tuple[str, float] | None:
    """The most common training answer and its share, None when no answer occurs twice. Of equally common ones the first by label set, then text."""
    answers = Counter(example.completion.strip() for example in data.train)
    if not answers or max(answers.values()) < 2:
        return None
    places = {label: place for place, label in enumerate(data.task.label_set or ())}
    answer = min(answers, key=lambda text: (-answers[text], places.get(text, len(places)), text))
    return answer, answers[answer] / answers.total()


def majority_baseline(data: TaskData, examples: Sequence[Example] | None = None, *, metric: str | None = None) -> Baseline | None:
    """The score of the constant answer on `examples` (all test rows by default) by the task's metric: on a classification task, the majority class.

    None when no training answer occurs twice, when there is no test row, and for metrics that run a model's code.
    """
    rows = data.test if examples is None else examples
    found = constant_answer(data)
    if found is None or not rows or (metric or data.task.metric) == "pass_at_1":
        return None
    measure = metric_for(data.task, metric)
    answer, share = found
    evidence = []
    for example in rows:
        read = measure.read(answer, example)
        evidence.append(measure.failure(example) if read is None else read)
    matrix = np.array(evidence, dtype=np.float64)
    stderr = mean_stderr(matrix[:, 0]) if measure.is_mean else bootstrap_stderr(measure.aggregate, matrix)
    return Baseline(answer, share, measure.aggregate(matrix), stderr, len(rows))
