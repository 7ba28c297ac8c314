"""train/log.py: the curve of a run reads as if it had never stopped."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from atoll.train.log import LOG_FILE, RunLog, follow_log


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / LOG_FILE).read_text().splitlines()]


def test_each_call_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    """A run is watched while it runs, and a kill must not take lines that stood in a buffer."""
    with RunLog(tmp_path, 0, log_to=()) as log:
        log.write(1, loss=2.5, learning_rate=0.1)
        assert json.loads((tmp_path / LOG_FILE).read_text()) == {"step": 1, "loss": 2.5, "learning_rate": 0.1}
        log.write(1, validation_loss=2.25)
    assert steps_of(tmp_path) == [1, 1]


def test_a_log_that_cannot_be_opened_closes_its_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold files and threads of their own."""
    closed: list[bool] = []

    class Told:
        def close(self, whole: bool) -> None:
            closed.append(whole)

    monkeypatch.setattr("atoll.train.log.open_loggers", lambda *_: [Told()])
    with pytest.raises(FileNotFoundError):
        RunLog(tmp_path / "missing", 0)
    assert closed == [False]


def test_lines_of_steps_that_are_taken_again_are_cut(tmp_path: Path) -> None:
    """The checkpoint is of step 2, the log went on to 4: steps 3 and 4 come again and must not stand there twice."""
    with RunLog(tmp_path, 0, log_to=()) as log:
        for step in (1, 2, 3, 4):
            log.write(step, loss=float(step))
    with RunLog(tmp_path, 2, log_to=()) as log:
        log.write(3, loss=30.0)
    assert [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]


def test_a_line_torn_by_a_kill_is_cut(tmp_path: Path) -> None:
    """Otherwise the next line would be glued to it, and no reader could parse either."""
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with RunLog(tmp_path, 2, log_to=()) as log:
        log.write(3, loss=3.0)
    assert steps_of(tmp_path) == [1, 3]


def test_a_run_from_the_start_begins_a_new_log(tmp_path: Path) -> None:
    """Without a checkpoint nothing of the earlier run counts."""
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n')
    with RunLog(tmp_path, 0, log_to=()):
        pass
    assert steps_of(tmp_path) == []


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    """The curve that people look at is the one in the JSON lines, also over a resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write(step, loss=float(step), learning_rate=0.5)
    time.sleep(1.0)  # a later run's file has a later second in its name, by which they are read
    with RunLog(tmp_path, 2) as log:
        log.write(3, loss=30.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.value for event in events.Scalars("learning_rate")] == [0.5, 0.5]


def test_who_follows_a_log_sees_each_step_once_over_a_resumption(tmp_path: Path) -> None:
    """A resumed run begins before the last step that was seen; its lines there come again, and more than one poll later."""
    seen: list[float] = []
    writes = [lambda: rewrite((5,)), lambda: append(6), lambda: append(7), lambda: append(8)]

    def rewrite(steps: tuple[int, ...]) -> None:
        new = tmp_path / "new"
        new.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
        new.replace(tmp_path / LOG_FILE)

    def append(step: int) -> None:
        with (tmp_path / LOG_FILE).open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")

    rewrite((1, 2, 3, 4, 5, 6, 7))
    for numbers in follow_log(tmp_path, lambda: not writes, sleep=lambda _: writes.pop(0)()):
        seen.append(numbers["step"])
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8]
