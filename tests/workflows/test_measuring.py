"""Measuring adapters of the hub on a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import write_tiny_base

from atoll.config import DataConfig, EvalConfig, GenerationConfig, TrainConfig
from atoll.errors import AdapterNotFound, BaseMismatch, TaskError
from atoll.workflows import evaluate, train_and_publish

ROWS = {"max_train_rows": 8, "max_validation_rows": 4, "max_test_rows": 6}
QUICK = {"epochs": 1, "batch_size": 4, "dtype": "float32"}


def test_of_a_file_the_test_split_is_scored_or_all_of_it(tiny_base_dir: Path, tmp_path: Path) -> None:
    """A tenth of the rows must not pass for the whole file; and who has new rows wants all of them."""
    rows = tmp_path / "new.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) + "\n" for i in range(20)))
    data, settings = DataConfig(path=str(rows)), {"dtype": "float32", "generation": GenerationConfig(max_new_tokens=2)}
    split = evaluate(str(tiny_base_dir), [], data, out=tmp_path / "split", **settings)
    assert "2 of its 20 rows" in split.warnings[0] and "--all-rows" in split.warnings[0]
    every = evaluate(str(tiny_base_dir), [], data, out=tmp_path / "all", all_rows=True, **settings)
    assert [board.leaderboard.rows[0].n for board in (split, every)] == [2, 20]
    assert any("all 20 rows are scored, also those that training would get" in warning for warning in every.warnings)
    rows.write_text("\n".join(rows.read_text().splitlines()[:3]))
    with pytest.raises(TaskError, match="no test rows to score: all 3") as refused:
        evaluate(str(tiny_base_dir), [], data, out=tmp_path / "none", **settings)
    assert "--all-rows" in refused.value.hint


def test_an_adapter_of_another_base_is_refused_by_evaluation(tiny_base_dir: Path, tmp_path: Path) -> None:
    """A score of an adapter on a base that it does not fit would be a number about nothing."""
    other = write_tiny_base(tmp_path / "other", hidden_size=32)
    data = {"path": "builtin:unit_conversion", **ROWS}
    config = TrainConfig.model_validate({"base": str(other), "name": "units", "data": data, "trainer": QUICK, "adapter": {"r": 2}})
    train_and_publish(config, out=tmp_path / "run")
    with pytest.raises(BaseMismatch, match="units"):
        evaluate(str(tiny_base_dir), ["units"], DataConfig.model_validate(data), dtype="float32", settings=EvalConfig(), out=tmp_path / "eval")
    with pytest.raises(AdapterNotFound):
        evaluate(str(tiny_base_dir), ["unit"], DataConfig.model_validate(data), dtype="float32", out=tmp_path / "eval")
