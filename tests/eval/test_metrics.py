"""Every metric on the cases that have misled other tools."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
from scipy import stats

from atoll.data.task import Example, Task
from atoll.errors import TaskError
from atoll.eval.metrics import metric_for, metrics


def example(gold, **row):
    """A test row whose answer is `gold`."""
    return Example("q", f" {gold}", {"answer": gold, **row}, "test.jsonl:1")


def task(metric, **fields):
    return Task(**{"name": "toy", "metric": metric, "target": "answer", **fields})


def value(metric, rows, **fields):
    """The metric over (prediction, gold) pairs, read as the evaluation reads them."""
    measure = metric_for(task(metric, **fields))
    evidence = []
    for prediction, gold in rows:
        found = measure.read(prediction, example(gold)) if prediction else None
        evidence.append(measure.failure(example(gold)) if found is None else found)
    return measure.aggregate(np.array(evidence, dtype=np.float64))


def read(metric, prediction, row, **fields):
    return metric_for(task(metric, **fields)).read(prediction, row)


def test_every_metric_has_a_name_a_version_and_a_definition():
    """A score names its metric and version; without a definition the number means nothing."""
    assert set(metrics()) == {
        "accuracy", "exact_match", "rouge_l", "token_f1", "label_and_explanation", "sql_execution", "pass_at_1",
        "span_f1", "pearson", "spearman", "macro_f1", "f1", "matthews_corrcoef",
    }  # fmt: skip
    for name, kind in metrics().items():
        assert kind.name == name and kind.version >= 1 and kind.higher_is_better and kind.__doc__


def test_an_unknown_metric_or_match_names_the_nearest():
    """A typing mistake in a task file must be found before an hour of generation."""
    with pytest.raises(TaskError, match="accurracy") as caught:
        metric_for(task("accurracy"))
    assert "accuracy" in caught.value.hint
    with pytest.raises(TaskError, match="numbr") as caught:
        read("exact_match", "1", example("1"), match="numbr")
    assert "number" in caught.value.hint


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [("Positive.", "positive", 1.0), (" Sci/Tech", "sci/tech", 1.0), ("10", "1", 0.0), ("unknown", "no", 0.0), ("positive!", "positive", 0.0)],
)
def test_accuracy_is_equality(prediction, gold, expected):
    """Substring matching counted "10" as true and "unknown" as "no"."""
    assert read("accuracy", prediction, example(gold)) == (expected,)


def test_an_answer_outside_the_label_set_is_a_failure():
    """A wrong label and no label are different troubles: the second says the model did not understand the form."""
    labels = ("negative", "positive")
    assert read("accuracy", "negative", example("positive"), label_set=labels) == (0.0,)
    assert read("accuracy", "great film", example("positive"), label_set=labels) is None


@pytest.mark.parametrize(
    ("match", "prediction", "gold", "expected"),
    [
        (None, "Low Tide", "Low Tide", 1.0),
        (None, "low tide", "Low Tide", 0.0),
        ("number", "The answer is $1,234.00.", "1234", 1.0),
        ("number", "10", "1", 0.0),
        ("number", "0.75", "3/4", 1.0),
        ("number", "twelve", "12", None),
        ("number_after_####", "3 + 4 = 7\n#### 7", "7", 1.0),
        ("number_after_####", "so 7", "7", 1.0),
        ("number_after_####", "7\n#### unknown", "7", None),
        ("sql", "select a FROM t;", "SELECT  a FROM t", 1.0),
        ("sql", "SELECT a FROM t WHERE b = 'x'", "SELECT a FROM t WHERE b = 'X'", 0.0),
        ("json", '```json\n{"b": 2, "a": 1}\n```', '{"a": 1, "b": 2}', 1.0),
        ("json", '{"a": true}', '{"a": 1}', 0.0),
        ("json", "{a: 1}", '{"a": 1}', None),
    ],
)
def test_exact_match_compares_as_the_task_says(match, prediction, gold, expected):
    """The same pair can be right as a number and wrong as a text."""
    assert read("exact_match", prediction, example(gold), match=match) == (None if expected is None else (expected,))


def test_the_gold_field_is_what_counts():
    """GSM8K's target is the reasoning; its answer stands in another column, here as a number and not as text."""
    row = example("2 + 3 = 5\n#### 5", final=5)
    assert read("exact_match", "#### 5", row, match="number_after_####", gold_field="final") == (1.0,)
    with pytest.raises(TaskError, match="'finals'"):
        read("exact_match", "#### 5", row, match="number_after_####", gold_field="finals")
    with pytest.raises(TaskError, match=r"gold answer of test\.jsonl:1"):
        read("exact_match", "5", example("five"), match="number")


def test_rouge_takes_the_best_reference():
    """Several texts describe the same facts; the answer needs to be like one of them, not like the first."""
    row = example("The cat sat.", references=["A dog ran far away.", "The cat sat on the mat."])
    assert read("rouge_l", "the cat sat on the mat", row, references="references") == (1.0,)
    assert read("rouge_l", "the cat sat on a mat", row)[0] == pytest.approx(2 * 3 / (6 + 3))  # against the target alone: 3 shared of 6 and 3
    with pytest.raises(TaskError, match="references"):
        read("rouge_l", "x", example("y", references=[]), references="references")


def test_rouge_of_random_words_is_its_formula():
    """The package's score must be the F-measure of the longest common subsequence, or our description of it is false."""
    rng = random.Random(1)
    for _ in range(50):
        first, second = (rng.choices("abcd", k=rng.randint(1, 9)) for _ in range(2))
        table = np.zeros((len(first) + 1, len(second) + 1))
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        expected = 2 * table[-1, -1] / (len(first) + len(second))
        assert read("rouge_l", " ".join(first), example(" ".join(second)))[0] == pytest.approx(expected)


def test_token_f1_is_squads():
    """Overlap of multisets of words: repeating a right word does not help."""
    assert read("token_f1", "The Rams!", example("rams")) == (1.0,)
    assert read("token_f1", "rams rams", example("rams"))[0] == pytest.approx(2 / 3)
    assert read("token_f1", "the", example("a")) == (1.0,)
    assert read("token_f1", "the", example("rams")) == (0.0,)


def test_span_f1_is_micro_averaged_over_the_test_set():
    """Averaging a row's F1 would give rows without entities as much weight as rows with ten."""
    rows = [("a: x | b: y", "a: x"), ("none", "none"), ("none", "a: z"), ('{"a": ["q", "q"]}', "a: q")]
    assert value("span_f1", rows) == pytest.approx(2 * 2 / (4 + 3))
    assert value("span_f1", [("none", "none")]) == 1.0


def test_an_unreadable_answer_is_never_as_good_as_none():
    """Otherwise a model could refuse to answer, and lose nothing on rows without entities."""
    assert value("span_f1", [("gibberish", "none"), ("a: x", "a: x")]) < value("span_f1", [("none", "none"), ("a: x", "a: x")])
    with pytest.raises(TaskError, match="scored by spans"):
        read("span_f1", "none", example("gibberish"))


def test_correlations_equal_scipys():
    """With ties and without, on many random rows."""
    rng = random.Random(2)
    for _ in range(30):
        rows = [(str(rng.choice([rng.random(), rng.randint(0, 4)])), str(rng.randint(0, 5))) for _ in range(rng.randint(3, 40))]
        first, second = ([float(number) for number in column] for column in zip(*rows, strict=True))
        if len(set(first)) > 1 and len(set(second)) > 1:
            assert value("pearson", rows) == pytest.approx(stats.pearsonr(first, second).statistic)
            assert value("spearman", rows) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_a_failure_pulls_a_correlation_towards_zero():
    """Dropping failed rows would reward a model that answers only the easy ones."""
    rows = [(str(number), str(number)) for number in range(5)]
    for metric in ("pearson", "spearman"):
        assert value(metric, rows) == pytest.approx(1.0)
        for gold in ("0", "2.5", "5"):
            assert value(metric, [*rows, ("", gold)]) <= 1.0
        assert value(metric, [*rows, ("no idea", "5")]) < 1.0
        assert value(metric, [("", gold) for _, gold in rows]) == 0.0
        assert value(metric, [("3", gold) for _, gold in rows]) == 0.0


def test_class_metrics_follow_their_formulas():
    """Checked by hand: 2 true positives, 1 false positive, 1 false negative, 1 true negative."""
    rows = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]
    labels = ("no", "yes")
    assert value("f1", rows, label_set=labels) == pytest.approx(4 / 6)
    assert value("f1", rows, label_set=("yes", "no")) == pytest.approx(2 / 4)  # the positive label is the last one
    assert value("macro_f1", rows, label_set=labels) == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert value("matthews_corrcoef", rows, label_set=labels) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert value("matthews_corrcoef", [("yes", gold) for _, gold in rows], label_set=labels) == 0.0


def test_matthews_of_two_classes_is_pearsons_of_zeros_and_ones():
    """An identity that holds for any confusion matrix."""
    rng = random.Random(4)
    for _ in range(30):
        rows = [(rng.choice(("no", "yes")), rng.choice(("no", "yes"))) for _ in range(20)]
        first, second = ([float(label == "yes") for label in column] for column in zip(*rows, strict=True))
        if len(set(first)) > 1 and len(set(second)) > 1:
            assert value("matthews_corrcoef", rows, label_set=("no", "yes")) == pytest.approx(stats.pearsonr(first, second).statistic)


@pytest.mark.parametrize("metric", ["f1", "macro_f1", "matthews_corrcoef", "accuracy"])
@pytest.mark.parametrize("gold", ["no", "yes"])
def test_no_label_is_never_better_than_the_wrong_label(metric, gold):
    """Whatever the gold label, a model must gain nothing by answering in no usable form."""
    rows = [("yes", "yes"), ("no", "no"), ("yes", "no"), ("no", "yes")]
    wrong = "no" if gold == "yes" else "yes"
    labels = ("no", "yes")
    assert value(metric, [*rows, ("maybe", gold)], label_set=labels) < value(metric, [*rows, (gold, gold)], label_set=labels)
    if metric in ("f1", "accuracy"):
        assert value(metric, [*rows, ("maybe", gold)], label_set=labels) <= value(metric, [*rows, (wrong, gold)], label_set=labels)


def test_class_metrics_need_a_label_set():
    """F1 needs to know which class is the positive one."""
    with pytest.raises(TaskError, match="label_set"):
        read("macro_f1", "yes", example("yes"))
    with pytest.raises(TaskError, match="exactly 2"):
        read("f1", "yes", example("yes"), label_set=("yes", "no", "maybe"))
    with pytest.raises(TaskError, match="not in the label_set"):
        read("macro_f1", "yes", example("other"), label_set=("yes", "no"))


def test_explained_labels_need_the_right_label_and_exactly_two_keys():
    """A fine explanation of the wrong label is worth nothing."""
    gold = example(json.dumps({"label": "World", "explanation": "it is about a treaty"}))
    metric = "label_and_explanation"
    assert read(metric, '{"explanation": "it is about a treaty", "label": "world"}', gold) == (1.0,)
    assert read(metric, '{"label": "Sports", "explanation": "it is about a treaty"}', gold) == (0.0,)
    assert 0 < read(metric, '{"label": "World", "explanation": "about a treaty"}', gold)[0] < 1
    for broken in (
        '{"label": "World"}',
        '{"label": "World", "explanation": "x", "more": 1}',
        "World",
        '["World", "x"]',
        '{"label": [], "explanation": ""}',
    ):
        assert read(metric, broken, gold) is None
    with pytest.raises(TaskError, match="label and explanation"):
        read(metric, '{"label": "a", "explanation": "b"}', example("World"))


SCRIPT = "CREATE TABLE t (a TEXT, b INTEGER); INSERT INTO t VALUES ('x', 1), ('y', 2);"


def test_execution_compares_what_queries_return():
    """Two ways of writing the same question are both right; a query that fails is no answer."""
    row = example("SELECT a FROM t WHERE b > 1")
    assert read("sql_execution", "select t.a from t where not b <= 1", row, database=SCRIPT) == (1.0,)
    assert read("sql_execution", "SELECT a FROM t", row, database=SCRIPT) == (0.0,)
    assert read("sql_execution", "SELECT c FROM t", row, database=SCRIPT) is None
    assert read("sql_execution", "DROP TABLE t", row, database=SCRIPT) is None
    with pytest.raises(TaskError, match="no database"):
        read("sql_execution", "SELECT 1", row)
    with pytest.raises(TaskError, match=r"gold query of test\.jsonl:1"):
        read("sql_execution", "SELECT 1", example("SELECT z FROM t"), database=SCRIPT)


def test_execution_takes_each_rows_own_database():
    """Tasks over many databases name one a row."""
    from atoll.data.task import DatabaseByRow

    scripts = {"one": SCRIPT, "two": SCRIPT.replace("'x', 1", "'x', 7")}
    for name, expected in (("one", 0.0), ("two", 1.0)):
        row = example("SELECT a FROM t WHERE b > 1 ORDER BY a", database=name)
        assert read("sql_execution", "SELECT a FROM t ORDER BY a", row, database=DatabaseByRow(scripts, "database")) == (expected,)


def test_code_is_not_run_unless_that_was_allowed():
    """A model's program can delete files; the default must be to refuse, before anything is generated."""
    with pytest.raises(TaskError, match="not allowed") as caught:
        metric_for(task("pass_at_1"))
    assert "allow_code=True" in caught.value.hint and "--allow-code" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("def double(x):\n    return 2 * x", 1.0),
        ("Sure:\n```python\ndef double(x):\n    return 2 * x\n```", 1.0),
        ("def double(x):\n    return x", 0.0),
        ("def double(x)\n    return 2 * x", 0.0),
        ("raise SystemExit(0)", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("x = bytearray(10**10)\ndef double(x):\n    return 2 * x", 0.0),
        ("print('x' * 10**8)\ndef double(x):\n    return 2 * x", 1.0),
        ("import sys\nsys.__stdout__.write('x' * 10**8)\ndef double(x):\n    return 2 * x", 0.0),
    ],
)
def test_code_passes_only_by_passing_its_tests(code, passes):
    """Leaving early, and filling memory or disk must all count as not passing, and hurt nobody."""
    measure = metric_for(task("pass_at_1"), allow_code=True)
    row = example("-", test_list=["assert double(2) == 4", "assert double(-1) == -2"])
    assert measure.read(code, row) == (passes,)
    with pytest.raises(TaskError, match="has none"):
        measure.read(code, example("-"))


def test_code_that_never_ends_is_stopped():
    """One endless loop must not hold up an evaluation."""
    from atoll.eval.sandbox import SandboxLimits, passes_tests

    assert not passes_tests("import time\ntime.sleep(60)", "", SandboxLimits(wall_s=0.5))


@pytest.mark.skipif(os.geteuid() == 0, reason="the limit on processes does not bind root")
def test_code_cannot_start_processes():
    """A fork bomb would take the machine with it."""
    from atoll.eval.sandbox import passes_tests

    assert not passes_tests("import os\nos.fork()", "")
