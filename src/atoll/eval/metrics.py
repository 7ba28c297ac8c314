"""What a metric is, and the registry of all of them.

A metric is made for one task (`metric_for(task)`), reads one prediction at a time into *evidence*, a short vector of numbers, and folds the evidence
of all rows into the value. `read` returns None when there is no usable answer; the row then gets `failure(...)`, which is never better than a wrong
answer, and is counted. Every metric is better when higher, and has a version that rises when its definition changes.

Used by eval.evaluate and eval.baseline. The metrics themselves are in row_metrics.py and corpus_metrics.py.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from atoll.errors import TaskError

if TYPE_CHECKING:
    from atoll.data.task import Example, Task

Evidence = tuple[float, ...]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Metric(ABC):
    """One versioned metric, bound to one task.

    name, version: identity of the definition. is_mean: the value is the mean of one number a row, so its standard error is closed-form and its
    tests are the ones for paired means. reads_cut: an output that was cut at the token limit is still read (a partial text overlaps partly);
    elsewhere a cut output is no usable answer, since what it would have ended in is unknown.
    """

    task: Task

    name: ClassVar[str]
    version: ClassVar[int] = 1
    is_mean: ClassVar[bool] = True
    reads_cut: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def read(self, prediction: str, example: Example) -> Evidence | None:
        """Evidence of one prediction (outer spaces already removed, not empty), or None when it holds no usable answer.

        Raises TaskError when the row's gold answer is not what the metric needs.
        """

    def failure(self, example: Example) -> Evidence:
        """Evidence of a row without a usable answer: as bad as a wrong one."""
        return (0.0,)

    def usable_when_cut(self, prediction: str) -> bool:
        """Whether an output that hit the token limit already holds its whole answer."""
        return self.reads_cut

    @classmethod
    def aggregate(cls, evidence: Matrix) -> float:
        """The metric's value over rows `[n, k]`, n >= 1. Needs no task, so stored evidence can be folded again."""
        return float(evidence[:, 0].mean())

    def row_value(self, evidence: Evidence) -> float | None:
        """What one row is worth when it is shown alone, in 0..1; None where a row alone has no value (a correlation)."""
        return evidence[0]

    def gold(self, example: Example) -> str:
        """The gold answer as text: see gold_text."""
        return gold_text(example, self.task)


def gold_text(example: Example, task: Task) -> str:
    """The gold answer of a row: its `gold_field` where the task names one, else its target, as text without outer spaces."""
    from atoll.data.prompt import as_text

    field = task.gold_field or task.target
    if field not in example.row:
        raise TaskError(
            f"task {task.name!r} scores against the field {field!r}, which {example.where} does not have",
            hint=f"its fields are: {', '.join(example.row)}",
        )
    return as_text(example.row[field]).strip()


def reference_texts(example: Example, task: Task) -> tuple[str, ...]:
    """All gold texts of a row: `row[references]` (a text or a list of texts) where the task names such a field, else the one gold answer."""
    if task.references is None:
        return (gold_text(example, task),)
    found: Any = example.row.get(task.references)
    texts = (found,) if isinstance(found, str) else tuple(found) if isinstance(found, list | tuple) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TaskError(
            f"task {task.name!r} takes its references from the field {task.references!r}, but {example.where} has {found!r} there",
            hint="a row's references are a text or a non-empty list of texts",
        )
    return texts


def metrics() -> Mapping[str, type[Metric]]:
    """Every metric by name."""
    from atoll.eval import corpus_metrics, row_metrics

    kinds = (*row_metrics.ROW_METRICS, *corpus_metrics.CORPUS_METRICS)
    return {kind.name: kind for kind in kinds}


def metric_for(task: Task, name: str | None = None, *, allow_code: bool = False) -> Metric:
    """The metric `name` of `task` (its main metric by default), ready to read predictions.

    allow_code: run code that a model wrote, which pass_at_1 needs.
    Raises TaskError for an unknown name, for a metric that needs something the task has not, and for pass_at_1 without `allow_code`.
    """
    from atoll.eval.row_metrics import PassAt1

    wanted = name or task.metric
    known = metrics()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        raise TaskError(
            f"task {task.name!r} asks for the metric {wanted!r}, which does not exist",
            hint=f"did you mean {near[0]!r}?" if near else f"metrics: {', '.join(sorted(known))}",
        )
    return PassAt1(task, allow_code=allow_code) if wanted == PassAt1.name else known[wanted](task)


def closed_labels(task: Task, metric: str, *, exactly: int | None = None) -> tuple[str, ...]:
    """The task's label set, for a metric that cannot do without; raises TaskError when it is missing or not of size `exactly`."""
    labels = task.label_set
    if not labels or (exactly is not None and len(labels) != exactly):
        found = f"{len(labels)} labels" if labels else "no label_set"
        raise TaskError(
            f"the metric {metric!r} needs {f'a label_set of exactly {exactly}' if exactly else 'a label_set'}, but task {task.name!r} has {found}",
            hint="give the task a label_set, the positive label last",
        )
    return tuple(labels)


def chosen(options: Mapping[str, Callable[..., Any]], match: str, task: Task) -> Callable[..., Any]:
    """`options[match]`, or a TaskError that names the nearest one."""
    if match not in options:
        near = difflib.get_close_matches(match, options, n=1)
        raise TaskError(
            f"task {task.name!r} has match {match!r}, which exact_match does not know",
            hint=f"did you mean {near[0]!r}?" if near else f"it knows: {', '.join(options)}",
        )
    return options[match]
