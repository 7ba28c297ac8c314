"""A run that is killed at any moment, or stopped with Ctrl-C, ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.train.jobs import INTERRUPTED, NUM_KILLS, log_lines, toy_job, toy_rows

from atoll.errors import Interrupted
from atoll.model.adapter_files import WEIGHTS_FILE
from atoll.train.checkpoint import FILE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    """The runs of tests/train/jobs.py and how they ended, by kind; one process for all tests here."""
    out = tmp_path_factory.mktemp("runs")
    done = subprocess.run([sys.executable, "-m", "tests.train.jobs", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def assert_same_end(folder: Path, truth: Path) -> None:
    """Adapter and whole optimizer state, bit for bit, and the same log."""
    assert (folder / "adapter" / WEIGHTS_FILE).read_bytes() == (truth / "adapter" / WEIGHTS_FILE).read_bytes()
    with safe_open(folder / FILE, "pt") as mine, safe_open(truth / FILE, "pt") as theirs:
        assert set(mine.keys()) == set(theirs.keys()) == {"values", "exp_avg", "exp_avg_sq", "best"}
        for name in theirs.keys():  # noqa: SIM118 (not a dict)
            assert torch.equal(mine.get_tensor(name), theirs.get_tensor(name)), name
        ends = [json.loads(file.metadata()["progress"]) for file in (mine, theirs)]
    for end in ends:
        assert end.pop("seconds") > 0 and end.pop("cpu_seconds") > 0 and end.pop("peak_memory_bytes") > 0
        end.pop("energy_joules", None)
    assert ends[0] == ends[1]
    assert log_lines(folder) == log_lines(truth)


@pytest.mark.parametrize("kind", NUM_KILLS)
def test_a_run_killed_many_times_ends_with_the_same_bits(kind: str, runs: tuple[Path, dict[str, dict[str, int]]]) -> None:
    """Machines are taken away in the middle of a night; what is left must be the adapter of an uninterrupted run, not one near it."""
    out, ends = runs[0] / kind, runs[1][kind]
    assert ends["killed"] >= NUM_KILLS[kind] - 2, "the kills came too late to test anything"
    assert ends["last"] == 0
    assert_same_end(out / "killed", out / "peace")


@pytest.mark.parametrize("kind", NUM_KILLS)
def test_a_run_stopped_with_ctrl_c_goes_on_from_there(kind: str, runs: tuple[Path, dict[str, dict[str, int]]]) -> None:
    """Ctrl-C is an answer to 'how long will this take'; it must cost nothing."""
    out, ends = runs[0] / kind, runs[1][kind]
    assert ends["stopped"] == INTERRUPTED
    message, hint = (out / "stopped" / "interrupted.txt").read_text().splitlines()
    assert message.startswith("training stopped after step ")
    assert message.endswith(" of 100")
    assert "same command" in hint
    assert ends["resumed"] == 0
    assert_same_end(out / "stopped", out / "peace")


class Signals:
    """A progress report that presses Ctrl-C (or sends another signal) `times` times at step `at`."""

    def __init__(self, at: int, times: int = 1, number: signal.Signals = signal.SIGINT) -> None:
        self.at, self.times, self.number, self.steps = at, times, number, list[int]()

    def __call__(self, headline: str, step: int, total: int) -> None:
        self.steps.append(step)
        if step == self.at:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_ends_the_step_and_keeps_it(number: signal.Signals, tmp_path: Path) -> None:
    """The step at hand is not lost even where no checkpoint was due."""
    before = signal.getsignal(number)
    report = Signals(at=3, number=number)
    with pytest.raises(Interrupted, match="training stopped after step 3 of 8") as found:
        toy_job(tmp_path / "a", checkpoint_every=None).run(report)
    assert "run the same command again" in found.value.hint
    assert report.steps == [1, 2, 3]
    assert signal.getsignal(number) is before, "Ctrl-C must work as before outside of training"
    report = Signals(at=-1)
    resumed = toy_job(tmp_path / "a", checkpoint_every=None).run(report)
    assert report.steps == [4, 5, 6, 7, 8]
    whole = toy_job(tmp_path / "b").run()
    for site, module in whole.adapter.modules.items():
        assert torch.equal(module.a, resumed.adapter.modules[site].a)
        assert torch.equal(module.b, resumed.adapter.modules[site].b)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    """A step of a large base takes a minute; who presses twice means it."""
    with pytest.raises(KeyboardInterrupt):
        toy_job(tmp_path).run(Signals(at=2, times=2))


def test_training_runs_in_a_thread_too(tmp_path: Path) -> None:
    """A server trains beside its loop, and only the main thread may touch signals."""
    ends: list[Any] = []
    thread = threading.Thread(target=lambda: ends.append(toy_job(tmp_path, max_steps=2).run()))
    thread.start()
    thread.join(60)
    assert ends[0].progress.step == 2


def test_a_finished_job_is_not_trained_again(tmp_path: Path) -> None:
    """`atoll land` run twice must cost nothing the second time, and give the same adapter: the best one, not the last."""
    validation = toy_rows(6, shift=80)  # another rule: learning the training rows makes it worse
    first = toy_job(tmp_path, validation=validation, epochs=20).run()
    assert first.progress.best_step < first.progress.step
    report = Signals(at=-1)
    again = toy_job(tmp_path, validation=validation, epochs=20).run(report)
    assert report.steps == []
    spent = ("seconds", "cpu_seconds", "energy_joules", "peak_memory_bytes")  # the round's end is charged after the last checkpoint
    assert {**vars(again.progress), **dict.fromkeys(spent)} == {**vars(first.progress), **dict.fromkeys(spent)}
    for site, module in first.adapter.modules.items():
        assert torch.equal(module.b, again.adapter.modules[site].b)
