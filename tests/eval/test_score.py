"""Scores and raw outputs as files, and the comparison of two scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from atoll.errors import DataError, StorageError, TaskError
from atoll.eval.evaluate import Contestant, evaluate
from atoll.eval.score import RowOutput, Score, better_base, p_value, read_outputs, read_score, write_outputs, write_score
from atoll.eval.stats import mcnemar_p

BASE = Contestant("tiny", "base", "b" * 64)


@pytest.fixture
def run(make_data, tokenizer, scripted):
    """Evaluate answers by question number on a task of 12 rows; returns (score, outputs)."""

    def evaluate_answers(answer, contestant=BASE, rows=12, **fields):
        data = make_data([(f"{number}", f"{number % 5}") for number in range(rows)], **fields)
        return evaluate(scripted(lambda prompt, adapter: answer(int(prompt.split()[0]))), data, contestant, tokenizer)

    return evaluate_answers


@pytest.mark.parametrize("metric", ["accuracy", "pearson", "rouge_l"])
def test_a_score_survives_its_file(run, tmp_path, metric):
    """Every field, and evidence with NaN, which JSON has no word for."""
    score, outputs = run(lambda number: "" if number == 3 else str(number % 4), metric=metric)
    assert score.failures == 1 and (metric != "pearson" or math.isnan(score.evidence[3][0]))
    write_score(tmp_path / "deep" / "score.json", score)
    again = read_score(tmp_path / "deep" / "score.json")
    assert again.to_json() == score.to_json() and repr(again) == repr(score)
    assert "NaN" not in (tmp_path / "deep" / "score.json").read_text()
    write_outputs(tmp_path / "outputs.jsonl", outputs)
    assert read_outputs(tmp_path / "outputs.jsonl") == outputs


def test_any_text_a_model_writes_can_be_stored(tmp_path):
    """Half a surrogate pair, NUL and line separators come out of byte-level tokens; a store that failed on them would lose the run."""
    output = RowOutput(0, "t:1", "00", "a\ud800b\x00\u2028\n", "gold", None, True, "stop", 4)
    write_outputs(tmp_path / "o.jsonl", [output, output])
    assert read_outputs(tmp_path / "o.jsonl") == [output, output]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("n"), "differ in: \\['n'\\]"),
        (lambda value: value.update(extra=1), "extra"),
        (lambda value: value.update(n=3), "contradicts itself"),
        (lambda value: value.update(kind="magic"), "contradicts itself"),
        (lambda value: value.update(evidence=[["x"]]), "wrong type"),
        (lambda value: value.update(value="high"), "wrong type"),
    ],
)
def test_a_damaged_score_is_refused(run, change, message):
    """A score that was edited or cut must not reach a leaderboard."""
    value = run(lambda number: "1")[0].to_json()
    change(value)
    with pytest.raises(DataError, match=message):
        Score.from_json(value)


def test_files_that_are_no_json_are_named(tmp_path):
    """With many files in a run, an error without its file is no help."""
    (tmp_path / "o.jsonl").write_text('{"index": 0}\n{broken\n')
    for path, message in ((tmp_path / "missing.json", "missing.json"), (tmp_path / "o.jsonl", "o.jsonl is not JSON")):
        with pytest.raises(DataError, match=message):
            read_score(path)
    with pytest.raises(DataError, match="an output does not have"):
        read_outputs(tmp_path / "o.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(run, tmp_path, monkeypatch):
    """A full disk in the middle of a write must not cost the scores that were there."""
    score, _ = run(lambda number: "1")
    path = tmp_path / "score.json"
    write_score(path, score)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_score(path, replace(score, model="other"))
    assert read_score(path).model == "tiny" and [file.name for file in tmp_path.iterdir()] == ["score.json"]


def test_the_base_counts_with_its_better_style(run):
    """An adapter that beats only the worse way of asking the base has shown nothing."""
    low, high = run(lambda number: "0")[0], replace(run(lambda number: str(number % 5))[0], prompt_style="chat")
    assert better_base([low, high]) is high
    assert better_base([low, replace(low, prompt_style="chat")]) is low
    with pytest.raises(TaskError, match="no score of the base"):
        better_base([])


def test_p_is_that_of_the_paired_rows(run):
    """From stored evidence alone, without the task: leaderboards are built from files."""
    base, adapter = run(lambda number: "0")[0], run(lambda number: str(number % 5))[0]
    again = Score.from_json(json.loads(json.dumps(adapter.to_json())))
    assert p_value(again, base) == mcnemar_p(adapter.matrix()[:, 0], base.matrix()[:, 0]) < 0.01
    correlated = run(lambda number: str(number % 5), metric="pearson")[0], run(lambda number: str((number * 7) % 4), metric="pearson")[0]
    assert 0 < p_value(*correlated) < 0.2


def test_scores_of_other_rows_are_not_compared(run):
    """Pairing row 5 of one test set with row 5 of another gives a p-value that means nothing."""
    score = run(lambda number: "0")[0]
    for other in (run(lambda number: "0", rows=11)[0], replace(score, rows_hash="0"), replace(score, metric_version=2)):
        with pytest.raises(TaskError, match="cannot be compared"):
            p_value(score, other)
    assert p_value(score, json_round(score)) == 1.0


def json_round(score):
    return Score.from_json(json.loads(json.dumps(score.to_json())))


def test_one_row_has_a_null_error(run):
    """0 would claim certainty."""
    score = run(lambda number: "0", rows=1)[0]
    assert score.stderr is None and json.loads(json.dumps(score.to_json()))["stderr"] is None
