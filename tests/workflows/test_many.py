"""workflows/many.py: several adapters trained together are each published, recorded and resumed as if alone."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atoll.config import TrainConfig
from atoll.errors import ConfigError, Interrupted, TrainingError
from atoll.hub.store import Hub
from atoll.train.job import TrainingJob
from atoll.workflows import JobLine, TrainOutcome, train_and_publish, train_many

TASKS = ("dates", "date_format", "unit_conversion")
DATA = {"max_train_rows": 8, "max_validation_rows": 2, "max_test_rows": 1}

Job = tuple[TrainConfig, Path | None]


@pytest.fixture
def configs(tiny_base_dir: Path) -> list[Job]:
    trainer = {"max_steps": 3, "batch_size": 4, "dtype": "float32"}
    return [
        (
            TrainConfig.model_validate(
                {"base": str(tiny_base_dir), "data": {"path": f"builtin:{task}", **DATA}, "adapter": {"r": 2}, "trainer": trainer}
            ),
            None,
        )
        for task in TASKS
    ]


def statuses(hub: Hub) -> list[str]:
    return sorted(run.status for run in hub.runs(kind="train"))


def test_each_is_what_it_would_be_alone(configs: list[Job], tmp_path: Path) -> None:
    """The same tensors in float32 here, so the same versions; found again the second time."""
    outcomes = train_many(configs, out=tmp_path / "together")
    alone = [train_and_publish(config, out=tmp_path / "alone" / task, publish=False) for (config, _), task in zip(configs, TASKS, strict=True)]
    for outcome, truth, task in zip(outcomes, alone, TASKS, strict=True):
        assert isinstance(outcome, TrainOutcome) and outcome.version is not None
        assert outcome.version.ref == f"{task}@1" and outcome.adapter_folder == tmp_path / "together" / task / "adapter"
        assert outcome.training["train_loss"] == pytest.approx(truth.training["train_loss"], rel=1e-4)
    assert statuses(Hub()) == ["finished"] * 3
    for outcome in outcomes:
        assert isinstance(outcome, TrainOutcome) and outcome.version is not None and outcome.cost is not None
        [run] = Hub().runs(digest=outcome.version.digest)
        assert run.cost == outcome.cost.to_json() and run.cost["tokens"] == outcome.training["tokens"] and run.cost["price"] is None
        assert run.cost["cpu_seconds"] > 0 and run.cost["peak_memory_bytes"] > 0 and run.seconds == pytest.approx(run.cost["seconds"], abs=1e-3)
        assert run.progress is not None and run.progress["step"] == 3 and run.folder == str(outcome.adapter_folder.parent)
    again = train_many(configs, out=tmp_path / "together")
    assert all(isinstance(outcome, TrainOutcome) and outcome.reused for outcome in again)


def test_one_that_fails_is_an_error_in_its_place(configs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its run is in the hub's records as failed, with the reason."""
    original = TrainingJob.finish_step

    def finish_step(job: TrainingJob) -> None:
        if "date_format" in job.folder.parts:
            raise TrainingError("the loss at step 1 is nan")
        original(job)

    monkeypatch.setattr(TrainingJob, "finish_step", finish_step)
    lines: list[Sequence[JobLine]] = []
    outcomes = train_many(configs, out=tmp_path, table=lines.append)
    assert [type(outcome) for outcome in outcomes] == [TrainOutcome, TrainingError, TrainOutcome]
    assert [(line.name, line.state) for line in lines[-1]] == [("dates", "done"), ("date_format", "failed"), ("unit_conversion", "done")]
    [failed] = [run for run in Hub().runs(name="date_format") if run.status == "failed"]
    assert "nan" in (failed.message or "")


def test_ctrl_c_leaves_no_run_that_says_it_is_running(configs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has begun is interrupted, what waited has no record; the same call goes on."""
    original, steps = TrainingJob.finish_step, list[Any]()

    def finish_step(job: TrainingJob) -> None:
        original(job)
        steps.append(job)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingJob, "finish_step", finish_step)
    with pytest.raises(Interrupted):
        train_many(configs, out=tmp_path, at_once=2)
    assert statuses(Hub()) == ["interrupted", "interrupted"]
    spent = {run.name: run.cost for run in Hub().runs()}
    monkeypatch.setenv("ATOLL_PRICE_PER_CPU_HOUR", "3600")
    outcomes = train_many(configs, out=tmp_path, at_once=2)
    assert all(isinstance(outcome, TrainOutcome) and outcome.training["steps"] == 3 for outcome in outcomes)
    for run in Hub().runs(status="finished"):
        before = spent.get(run.name, {"tokens": 0, "cpu_seconds": 0.0})
        assert run.cost is not None and before is not None
        assert run.cost["tokens"] > before["tokens"] and run.cost["cpu_seconds"] > before["cpu_seconds"]
        assert run.cost["price"] == pytest.approx(run.cost["cpu_seconds"], abs=2e-3) and run.cost["currency"] == "USD"
        assert "price" in Hub().show(f"sha256:{run.digest}").markdown()


def test_two_files_of_one_name_are_refused_before_anything_is_trained(configs: list[Job], tmp_path: Path) -> None:
    """They would write into one folder."""
    with pytest.raises(ConfigError, match="two of the files train an adapter named 'dates'"):
        train_many([configs[0], configs[0]], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
