"""Training and publishing on a tiny base: what is reported, refused and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.config import TrainConfig
from atoll.data.task import load_task
from atoll.errors import ConfigError, TrainingError
from atoll.model.adapter_files import read_adapter
from atoll.model.base import load_base
from atoll.workflows import make_plan, prompt_ids, train_and_publish

ROWS = {"max_train_rows": 8, "max_validation_rows": 4, "max_test_rows": 6}
QUICK = {"epochs": 1, "batch_size": 4, "dtype": "float32"}


def test_rows_that_lost_the_beginning_of_their_prompt_are_reported(tiny_base_dir: Path, tmp_path: Path) -> None:
    """A cut prompt may lack what the answer is about; the user hears of it, with the first row's place."""
    data = {"path": "builtin:support_intents", **ROWS}
    trainer = {**QUICK, "max_length": 96}
    config = TrainConfig.model_validate({"base": str(tiny_base_dir), "name": "cut", "data": data, "trainer": trainer, "adapter": {"r": 2}})
    outcome = train_and_publish(config, out=tmp_path / "run")
    assert len(outcome.warnings) == 2 and "8 of 8 training rows lost the beginning" in outcome.warnings[0]


def test_a_pattern_that_names_no_module_is_refused(tiny_base_dir: Path) -> None:
    """It was ignored, and the adapter had another rank than its author thought."""
    adapter = {"r": 2, "rank_pattern": {"layers.99.self_attn.q_proj": 4}}
    config = TrainConfig.model_validate(
        {"base": str(tiny_base_dir), "name": "units", "data": {"path": "builtin:unit_conversion", **ROWS}, "trainer": QUICK, "adapter": adapter}
    )
    with pytest.raises(ConfigError, match=r"layers\.99"):
        make_plan(config)


def test_an_adapter_is_asked_in_its_own_words(tiny_base_dir: Path, tmp_path: Path) -> None:
    """The prompt travels with the adapter: the library's user fills its template and needs to know nothing of it."""
    data = {"path": "builtin:support_intents", **ROWS}
    config = TrainConfig.model_validate({"base": str(tiny_base_dir), "name": "intents", "data": data, "trainer": QUICK, "adapter": {"r": 2}})
    outcome = train_and_publish(config, out=tmp_path / "run")
    base, adapter = load_base(str(tiny_base_dir), dtype="float32"), read_adapter(outcome.adapter_folder)
    row = load_task(config.require_data()).test[0]
    assert base.tokenizer.decode(prompt_ids(base, adapter, **row.row)) == row.prompt


def test_training_twice_into_one_folder_reuses_the_finished_run(tiny_base_dir: Path, tmp_path: Path) -> None:
    """The same job again is found finished; published once more it is the same version."""
    config = TrainConfig.model_validate(
        {"base": str(tiny_base_dir), "name": "units", "data": {"path": "builtin:unit_conversion", **ROWS}, "trainer": QUICK, "adapter": {"r": 2}}
    )
    first = train_and_publish(config, out=tmp_path / "run")
    second = train_and_publish(config, out=tmp_path / "run")
    assert not first.reused and second.reused and first.version is not None
    assert second.version is not None and second.version.digest == first.version.digest
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("content", ["", '{"job": ', "[1]", "7"])
def test_a_damaged_result_is_refused_and_nothing_is_trained_over_it(tiny_base_dir: Path, tmp_path: Path, content: str) -> None:
    """Whose run it was cannot be told, and the adapter beside it may be another job's."""
    data = {"path": "builtin:unit_conversion", **ROWS}
    config = TrainConfig.model_validate({"base": str(tiny_base_dir), "name": "units", "data": data, "trainer": QUICK, "adapter": {"r": 2}})
    before = train_and_publish(config, out=tmp_path / "run").adapter_folder / "adapter_model.safetensors"
    kept = before.read_bytes()
    (tmp_path / "run" / "result.json").write_text(content)
    with pytest.raises(TrainingError, match=r"result\.json is damaged"):
        train_and_publish(config, out=tmp_path / "run")
    assert before.read_bytes() == kept
