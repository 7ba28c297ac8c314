"""`atoll runs`: what was trained is found, told, compared and followed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from atoll.hub import Hub
from atoll.train.log import LOG_FILE, RunLog, follow_log, read_log
from atoll.workflows.comparing import losses_of
from atoll.workflows.runs import recorded_run
from atoll.workflows.start import locked

STARTED = datetime(2030, 1, 2, 3, 4, tzinfo=UTC)


def record(name: str, r: int, status: str = "finished", **facts: Any) -> int:
    """A training's record, as workflows writes it."""
    config = {"base": "tiny", "name": name, "adapter": {"r": r, "target_modules": ["q_proj"]}, "trainer": {"epochs": 3.0}}
    return Hub().record_run("train", config, status=status, started=STARTED, name=name, **facts).id


@pytest.fixture
def two(tmp_path: Path) -> tuple[int, int]:
    """A run of rank 4 and one of rank 8 with scores, costs and losses, and a failed one."""
    losses = {"step": 6, "total_steps": 9, "train_loss": 0.5, "best_loss": 0.75, "best_step": 4, "stopped_early": True}
    cost = {"tokens": 1000, "seconds": 60.0, "cpu_seconds": 100.0, "peak_memory_bytes": 5_000_000, "price": 0.25, "currency": "EUR"}
    first = record("small", 4, digest="a" * 64, seconds=60.0, cost=cost, progress=losses, folder=str(tmp_path))
    second = record("large", 8, digest="b" * 64, seconds=90.0, cost={**cost, "price": 0.5}, progress={**losses, "best_loss": 0.7})
    record("broken", 8, "failed", message="the loss at step 3 is nan")
    Hub().record_score("a" * 64, "dates", "v1", "accuracy", 0.5, n=10)
    Hub().record_score("b" * 64, "dates", "v1", "accuracy", 0.625, n=10)
    return first, second


def test_runs_are_listed_newest_first_and_filtered(atoll: Any, two: tuple[int, int]) -> None:
    """What is asked for, and a word where nothing is found."""
    every = atoll("runs", "list", "--json").json()
    assert [run["name"] for run in every] == ["broken", "large", "small"] and every[1]["cost"]["price"] == 0.5
    assert [run["name"] for run in atoll("runs", "list", "--status", "failed", "--kind", "train", "--json").json()] == ["broken"]
    assert [run["name"] for run in atoll("runs", "list", "--last", "1", "--json").json()] == ["broken"]
    shown = atoll("runs", "list", "--name", "large").out
    assert "0.5 EUR" in shown.replace("0.50 EUR", "0.5 EUR") and "6/9" in shown and "0.7" in shown and "small" not in shown
    assert "no such run" in atoll("runs", "list", "--kind", "compose").err
    assert atoll("runs", "list", "--status", "done").code == 2


def test_a_run_is_shown_by_number_or_name_with_its_price_explained(atoll: Any, two: tuple[int, int]) -> None:
    """The newest of a name; everything that the record holds."""
    shown = atoll("runs", "show", "small").out
    for text in ("finished", "0.75", "dates accuracy", "0.25 EUR", "5 MB", "target_modules", "sha256:" + "a" * 64):
        assert text in shown
    told = atoll("runs", "show", str(two[1]), "--json").json()
    assert told["name"] == "large" and told["scores"][0]["value"] == 0.625 and told["progress"]["best_loss"] == 0.7
    missing = atoll("runs", "show", "smal")
    assert missing.code == 1 and "there is no run 'smal'" in missing.err and "did you mean small?" in missing.err


def test_comparing_shows_what_differs_and_nothing_else(atoll: Any, two: tuple[int, int]) -> None:
    """Equal settings are noise."""
    told = atoll("runs", "compare", "small", str(two[1]), "--json").json()
    assert told["settings"] == {"name": ["small", "large"], "adapter.r": [4, 8]}
    assert told["losses"]["best_loss"] == [0.75, 0.7] and told["scores"] == {"dates accuracy": [0.5, 0.625]}
    assert told["cost"]["price"] == [0.25, 0.5] and "energy_joules" not in told["cost"]
    shown = atoll("runs", "compare", "small", "large", "broken").out
    assert "adapter.r" in shown and "epochs" not in shown and "validation loss" in shown
    assert atoll("runs", "compare", "small").code == 2


def test_the_log_of_a_run_is_printed_and_one_that_is_not_there_is_a_sentence(atoll: Any, two: tuple[int, int], tmp_path: Path) -> None:
    """`--json` is a line of the log as it stands there."""
    with RunLog(tmp_path, 0, log_to=()) as log:
        for step in (1, 2, 3):
            log.write(step, loss=1.0 / step, learning_rate=0.5)
    lines = atoll("runs", "tail", "small", "-n", "2", "--json").out.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    assert "step 3  loss 0.3333  learning rate 0.5" in atoll("runs", "tail", "small").out
    assert "no folder on record" in atoll("runs", "tail", "large").err


def test_a_killed_run_counts_as_interrupted(atoll: Any, tmp_path: Path) -> None:
    """Nobody records its end: that nobody holds its folder tells it, also a folder above it, as a sweep's. One that is held goes on."""
    folder = tmp_path / "sweep/point"
    folder.mkdir(parents=True)
    with RunLog(folder, 0, log_to=()) as log:
        log.write(7, loss=0.25)
    number = str(record("killed", 4, "running", folder=str(folder)))
    record("elsewhere", 4, "running", folder=str(tmp_path / "not here"))
    with locked(tmp_path / "sweep"):
        assert atoll("runs", "show", number, "--json").json()["status"] == "running"
        assert len(atoll("runs", "list", "--status", "running", "--json").json()) == 2
    told = atoll("runs", "show", number, "--json").json()
    assert told["status"] == "interrupted" and told["progress"]["step"] == 7 and told["message"]
    assert [run["name"] for run in atoll("runs", "list", "--status", "interrupted", "--json").json()] == ["killed"]
    tailed = atoll("runs", "tail", number)  # it would wait for ever
    assert tailed.code == 0 and "step 7" in tailed.out


def test_a_tail_ends_when_the_process_of_its_run_does(atoll: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was alive when the tail began."""
    number = record("killed", 4, "running", folder=str(tmp_path))
    lock = locked(tmp_path)
    lock.__enter__()
    monkeypatch.setattr(follow_log, "__kwdefaults__", {"sleep": lambda seconds: lock.__exit__(None, None, None)})
    assert f"run {number} is interrupted" in atoll("runs", "tail", number).err


def test_a_run_that_goes_on_leaves_the_killed_one_its_figures(tmp_path: Path) -> None:
    """The log in the folder is the second's from then on, and so is its start; the killed one keeps its own, whatever its settings were."""
    with RunLog(tmp_path, 0, log_to=()) as log:
        log.write(3, loss=0.75)
    number = record("killed", 4, "running", folder=str(tmp_path))
    hub = Hub()
    with recorded_run(hub, "train", "another", {"base": "tiny"}, tmp_path), RunLog(tmp_path, 3, log_to=()) as log:
        log.write(9, loss=0.5)
    second, first = hub.runs()
    assert (first.id, first.status, first.started, first.name) == (number, "interrupted", STARTED, "killed")
    assert losses_of(first)["step"] == 3 and losses_of(first)["train_loss"] == 0.75
    assert second.status == "finished" and second.id != number


def test_a_running_job_is_followed_over_a_resumption_until_its_end(tmp_path: Path) -> None:
    """Lines are told once, also where a resumption wrote the log anew; and the end is the run's, not the log's."""
    log = RunLog(tmp_path, 0, log_to=())
    for step in (1, 2):
        log.write(step, loss=float(step))
    rounds = list[int]()

    def waited(seconds: float) -> None:
        rounds.append(len(rounds))
        if len(rounds) == 1:
            log.close()
            with RunLog(tmp_path, 1, log_to=()) as resumed:  # step 2 is taken again
                resumed.write(2, loss=20.0)
                resumed.write(3, loss=3.0)
        elif len(rounds) == 2:
            with (tmp_path / LOG_FILE).open("a") as file:
                file.write('{"step": 4, "lo')  # half a line
        elif len(rounds) == 3:
            with (tmp_path / LOG_FILE).open("a") as file:
                file.write('ss": 4.0}\n')

    told = list(follow_log(tmp_path, lambda: len(rounds) == 3, sleep=waited))
    assert [line["step"] for line in told] == [1, 2, 3, 4] and read_log(tmp_path)[-1] == {"step": 4, "loss": 4.0}


def test_a_log_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    """The hub says that a run runs before its first step is taken."""
    assert read_log(tmp_path) == []
    told = follow_log(tmp_path, lambda: (tmp_path / LOG_FILE).exists(), sleep=lambda seconds: _write(tmp_path))
    assert [line["step"] for line in told] == [1]


def _write(folder: Path) -> None:
    (folder / LOG_FILE).write_text('{"step": 1, "loss": 1.0}\n')
