"""workflows/cancelling.py: one training is ended from outside; the others never notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.workflows.test_many import Job, configs, statuses  # noqa: F401 (a fixture)

from atoll.config import LandConfig, TrainConfig
from atoll.errors import ConfigError, Interrupted
from atoll.hub.store import Hub
from atoll.model.adapter_files import WEIGHTS_FILE
from atoll.train.job import TrainingJob
from atoll.workflows import JobLine, TrainOutcome, land, train_and_publish, train_many
from atoll.workflows.cancelling import CANCEL_FILE, announce, cancel, running_jobs
from atoll.workflows.start import locked


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """after_step(n, what) does something once, after the n-th step of any job."""
    original, done = TrainingJob.finish_step, list[Any]()

    def set_up(number: int, what: Callable[[], Any]) -> None:
        def finish_step(job: TrainingJob) -> None:
            original(job)
            done.append(job)
            if len(done) == number:
                what()

        monkeypatch.setattr(TrainingJob, "finish_step", finish_step)

    return set_up


def test_one_of_three_is_cancelled_and_the_others_are_as_ever(
    configs: list[Job],  # noqa: F811
    tmp_path: Path,
    after_step: Callable[[int, Callable[[], Any]], None],
) -> None:
    """It keeps its checkpoint, says so in table and records, and goes on when it is asked for again."""
    whole = train_many(configs, out=tmp_path / "whole", publish=False)
    seen: list[Any] = []

    def ask() -> None:
        seen.append([name for name, _ in running_jobs(tmp_path)])
        cancel("date_format", tmp_path)

    after_step(4, ask)  # in the second round
    lines: list[tuple[JobLine, ...]] = []
    outcomes = train_many(configs, out=tmp_path / "out", table=lambda found: lines.append(tuple(found)))
    assert seen == [["date_format", "dates", "unit_conversion"]]
    assert isinstance(outcomes[1], Interrupted)
    assert outcomes[1].message == "cancelled after step 2 of 3"
    assert [line.state for line in lines[-1]] == ["done", "cancelled", "done"]
    assert statuses(Hub()) == ["finished", "finished", "interrupted"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name in (CANCEL_FILE, ".job.json")]
    again = train_many(configs, out=tmp_path / "out")
    assert isinstance(again[1], TrainOutcome) and again[1].training["steps"] == 3 and not again[1].reused
    for index in (0, 2):
        one, other = whole[index], outcomes[index]
        assert isinstance(one, TrainOutcome) and isinstance(other, TrainOutcome)
        assert (one.adapter_folder / WEIGHTS_FILE).read_bytes() == (other.adapter_folder / WEIGHTS_FILE).read_bytes()


def test_one_that_waits_is_not_begun(
    configs: list[Job],  # noqa: F811
    tmp_path: Path,
    after_step: Callable[[int, Callable[[], Any]], None],
) -> None:
    """The hub has no record of it."""
    after_step(1, lambda: cancel("unit_conversion", tmp_path))
    outcomes = train_many(configs, out=tmp_path, at_once=1)
    assert isinstance(outcomes[2], Interrupted)
    assert "before its first step" in outcomes[2].message
    assert statuses(Hub()) == ["finished", "finished"]


def test_a_task_of_a_land_is_cancelled(tiny_base_dir: Path, tmp_path: Path, after_step: Callable[[int, Callable[[], Any]], None]) -> None:
    """Its folder is below the land's, and so is the lock."""
    defaults = {
        "data": {"max_train_rows": 8, "max_validation_rows": 2, "max_test_rows": 2},
        "trainer": {"max_steps": 3, "batch_size": 4, "dtype": "float32"},
        "adapter": {"r": 2},
        "generation": {"max_new_tokens": 2},
    }
    config = LandConfig.model_validate({"base": str(tiny_base_dir), "defaults": defaults, "tasks": ["builtin:dates", "builtin:date_format"]})
    after_step(2, lambda: cancel("dates", tmp_path))
    outcome = land(config, tmp_path / "out")
    assert list(outcome.failures) == ["dates"]
    assert isinstance(outcome.failures["dates"], Interrupted)
    assert [row.task for row in outcome.leaderboard.rows] == ["date_format"]


def test_a_training_alone_is_cancelled_by_a_file(
    configs: list[Job],  # noqa: F811
    tmp_path: Path,
    after_step: Callable[[int, Callable[[], Any]], None],
) -> None:
    """What the help text promises to those without the command at hand; a file from before the run means nothing."""
    config: TrainConfig = configs[0][0]
    tmp_path.joinpath(CANCEL_FILE).touch()
    after_step(2, tmp_path.joinpath(CANCEL_FILE).touch)
    with pytest.raises(Interrupted, match="cancelled after step 2 of 3"):
        train_and_publish(config, out=tmp_path)
    assert train_and_publish(config, out=tmp_path).training["steps"] == 3


def test_who_does_not_run_cannot_be_cancelled(tmp_path: Path) -> None:
    """A name that is wrong, and the mark that a killed process has left."""
    with pytest.raises(ConfigError, match="no training named 'dates' is running") as found:
        cancel("dates", tmp_path / "nowhere")
    assert "--out" in found.value.hint
    announce(tmp_path / "dates", "dates")
    (tmp_path / "dates" / ".lock").touch()
    with pytest.raises(ConfigError, match="no training named 'dates' is running"):
        cancel("dates", tmp_path)
    assert not (tmp_path / "dates" / CANCEL_FILE).exists()


def test_a_mark_of_a_dead_process_below_a_land_that_runs_is_no_job(tmp_path: Path) -> None:
    """A land that was killed and runs again with one task changed has two folders of that task, one of them dead."""
    for folder in ("old", "new"):
        announce(tmp_path / folder, "dates")
    mark = json.loads((tmp_path / "old" / ".job.json").read_text())
    (tmp_path / "old" / ".job.json").write_text(json.dumps({**mark, "pid": 2**22 + 1}))
    with locked(tmp_path):
        assert cancel("dates", tmp_path) == tmp_path / "new"
