"""Metrics that are means over rows: the value is the mean of one number between 0 and 1 a row.

Used through eval.metrics.metric_for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from atoll.errors import TaskError
from atoll.eval.matching import (
    answer_is_marked_and_whole,
    normalise_label,
    normalise_words,
    read_json,
    read_marked_number,
    read_number,
    same_json,
    unfence,
)
from atoll.eval.metrics import Evidence, Metric, chosen, reference_texts
from atoll.eval.sandbox import SandboxLimits, passes_tests
from atoll.eval.sql import QueryFailed, QueryRunner, SqlLimits, normalise_sql, orders_rows, same_result

if TYPE_CHECKING:
    from atoll.data.task import Example, Task


class Accuracy(Metric):
    """Share of rows whose answer is the label: equal after case folding, single spaces, and closing full stops removed. Never a substring.

    With a label set, an answer that is none of its labels is a failure.
    """

    name = "accuracy"

    def read(self, prediction: str, example: Example) -> Evidence | None:
        """(1.0,) if right; None when the task has a label set and the answer is none of them."""
        answer = normalise_label(prediction)
        if self.task.label_set and answer not in {normalise_label(label) for label in self.task.label_set}:
            return None
        return (float(answer == normalise_label(self.gold(example))),)


class ExactMatch(Metric):
    """Share of rows whose answer is the gold answer, as the task's `match` compares: see `MATCHES`.

    `plain` (no match named): the same text but for outer spaces, case counts. `number`: the last number equals the gold number, exactly.
    `number_after_####`: the number after "####" does (GSM8K). `sql`: equal after `normalise_sql`. `json`: equal parsed values, key order ignored.
    """

    name = "exact_match"

    @cached_property
    def _reader(self) -> Callable[[str], Any]:
        reader: Callable[[str], Any] = chosen(MATCHES, self.task.match or "plain", self.task)
        return reader

    def read(self, prediction: str, example: Example) -> Evidence | None:
        """(1.0,) if right; None when there is no number or JSON to compare."""
        answer = self._reader(prediction)
        if answer is None:
            return None
        text = self.gold(example)
        gold = self._reader(text)
        if gold is None:
            raise TaskError(
                f"task {self.task.name!r} compares by {self.task.match!r}, but the gold answer of {example.where} is {text[:80]!r}",
                hint="choose another match, or name the right gold_field",
            )
        return (float(same_json(answer[0], gold[0]) if self.task.match == "json" else answer == gold),)

    def usable_when_cut(self, prediction: str) -> bool:
        """A whole "#### number" line is an answer, whatever was written after it."""
        return self.task.match == "number_after_####" and answer_is_marked_and_whole(prediction)


# How exact_match turns each side into what it compares; None means unusable.
MATCHES: dict[str, Callable[[str], Any]] = {
    "plain": str.strip,
    "number": read_number,
    "number_after_####": read_marked_number,
    "sql": normalise_sql,
    "json": read_json,
}


class RougeL(Metric):
    """Mean ROUGE-L F-measure against the best of the row's references (package rouge-score, no stemmer, its own tokenizer).

    ROUGE-L (Lin 2004): longest common subsequence of words over both lengths, F with equal weights. The package splits at anything but a-z and 0-9,
    so scripts other than Latin have no words and score 0.
    """

    name = "rouge_l"
    reads_cut = True

    @cached_property
    def _score(self) -> Callable[[str, str], float]:
        return rouge_l_scorer()

    def read(self, prediction: str, example: Example) -> Evidence:
        """The F-measure against the best reference."""
        return (max(self._score(reference, prediction) for reference in reference_texts(example, self.task)),)


def rouge_l_scorer() -> Callable[[str, str], float]:
    """A function (reference, prediction) -> ROUGE-L F-measure; raises TaskError when the package is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as problem:
        raise TaskError("ROUGE-L needs the package rouge-score, which is not installed", hint="pip install 'atoll[eval]'") from problem
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return lambda reference, prediction: float(scorer.score(reference, prediction)["rougeL"].fmeasure)


class TokenF1(Metric):
    """Mean overlap of words with the best reference, as in SQuAD: F1 of the multisets of words, without case, punctuation and articles."""

    name = "token_f1"
    reads_cut = True

    def read(self, prediction: str, example: Example) -> Evidence:
        """F1 against the best reference; two texts without any word are equal."""
        words = Counter(normalise_words(prediction))
        return (max(_overlap(words, Counter(normalise_words(reference))) for reference in reference_texts(example, self.task)),)


def _overlap(predicted: Counter[str], gold: Counter[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    return 2 * (predicted & gold).total() / (predicted.total() + gold.total())


class LabelAndExplanation(Metric):
    """LoRA Land's metric for explained labels: both sides are JSON objects with exactly the keys "label" and "explanation".

    A wrong label is 0; a right one (compared as in accuracy) is worth the ROUGE-L of the explanation.
    """

    name = "label_and_explanation"

    @cached_property
    def _score(self) -> Callable[[str, str], float]:
        return rouge_l_scorer()

    def read(self, prediction: str, example: Example) -> Evidence | None:
        """0 for a wrong label, else the explanation's ROUGE-L; None when the answer is not such an object."""
        answer = _labelled(prediction)
        if answer is None:
            return None
        gold = _labelled(self.gold(example))
        if gold is None:
            raise TaskError(
                f"task {self.task.name!r} needs gold answers that are JSON with exactly label and explanation; {example.where} is not",
                hint='{"label": "...", "explanation": "..."}',
            )
        return (self._score(gold[1], answer[1]) if normalise_label(answer[0]) == normalise_label(gold[0]) else 0.0,)


def _labelled(text: str) -> tuple[str, str] | None:
    value = read_json(text)
    if value is None or not isinstance(value[0], dict) or value[0].keys() != {"label", "explanation"}:
        return None
    label, explanation = value[0]["label"], value[0]["explanation"]
    if isinstance(label, dict | list) or not isinstance(explanation, str):
        return None
    return (label if isinstance(label, str) else str(label)), explanation


@dataclass(frozen=True)
class SqlExecution(Metric):
    """Share of rows whose query returns what the gold query returns, on the task's database (see eval.sql for guard and limits).

    Rows are compared as a multiset, or as a list when the gold query orders them. The task's `database` is one script, or one a row.
    A query that does not run is a failure. Two queries that both return nothing agree: data for such a task should not have empty golds.
    """

    name: ClassVar[str] = "sql_execution"
    limits: SqlLimits = field(default_factory=SqlLimits)

    def read(self, prediction: str, example: Example) -> Evidence | None:
        """(1.0,) if both return the same; None when the predicted query does not run within the limits."""
        gold_query = self.gold(example)
        with QueryRunner(self._script(example), self.limits) as database:
            try:
                gold = database.run(gold_query)
            except QueryFailed as problem:
                raise TaskError(
                    f"the gold query of {example.where} does not run on the database of task {self.task.name!r}: {problem}",
                    hint=f"the query: {gold_query[:200]}",
                ) from problem
            try:
                predicted = database.run(unfence(prediction))
            except QueryFailed:
                return None
        return (float(same_result(gold, predicted, ordered=orders_rows(gold_query))),)

    def _script(self, example: Example) -> str:
        database = self.task.database
        if database is None:
            raise TaskError(
                f"task {self.task.name!r} has no database, which the metric {self.name!r} needs",
                hint="use exact_match with match sql, or give the task a database script",
            )
        return database if isinstance(database, str) else database(example.row)


@dataclass(frozen=True)
class PassAt1(Metric):
    """Share of rows whose Python passes the row's tests (`test_list`, or `tests`), one try each (Chen et al. 2021, k = 1).

    It runs code that a model wrote, so it refuses to be made unless `allow_code`. See eval.sandbox for what the child process may do.
    Code inside a Markdown fence is taken out of it.
    """

    name: ClassVar[str] = "pass_at_1"
    allow_code: bool = False
    limits: SandboxLimits = field(default_factory=SandboxLimits)

    def __post_init__(self) -> None:
        if not self.allow_code:
            raise TaskError(
                f"task {self.task.name!r} is scored by running code that a model wrote (pass_at_1), and that is not allowed here",
                hint="pass allow_code=True (--allow-code) on a machine where that is safe, such as a container, or choose another metric",
            )

    def read(self, prediction: str, example: Example) -> Evidence:
        """(1.0,) if every test passes within the limits."""
        return (float(passes_tests(unfence(prediction), _tests(example, self.task), self.limits)),)


def _tests(example: Example, task: Task) -> str:
    tests = example.row.get("test_list") or example.row.get("tests")
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        return "\n".join(tests)
    if isinstance(tests, str) and tests.strip():
        return tests
    raise TaskError(
        f"task {task.name!r} is scored by tests, but {example.where} has none", hint="a row needs test_list (a list of assertions) or tests (a text)"
    )


ROW_METRICS: tuple[type[Metric], ...] = (Accuracy, ExactMatch, RougeL, TokenF1, LabelAndExplanation, SqlExecution, PassAt1)
