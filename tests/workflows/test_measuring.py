"""Measuring adapters of the hub on a task."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import write_tiny_base

from atoll.config import DataConfig, EvalConfig, TrainConfig
from atoll.errors import AdapterNotFound, BaseMismatch
from atoll.workflows import evaluate, train_and_publish

ROWS = {"max_train_rows": 8, "max_validation_rows": 4, "max_test_rows": 6}
QUICK = {"epochs": 1, "batch_size": 4, "dtype": "float32"}


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
