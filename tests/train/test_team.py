"""train/team.py: several processes train one job as one would, and begin, stop, fail and resume together."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.jobs import log_lines
from tests.train.teams import KINDS

from atoll.model.adapter_files import WEIGHTS_FILE
from atoll.train.checkpoint import FILE
from atoll.train.team import ALONE, Team, launched_team

ROOT = Path(__file__).parents[2]
LEAVE = """
import os, sys, torch
from atoll.errors import TrainingError
from atoll.train.team import launched_team
try:
    with launched_team() as team:
        import torch.distributed.nn  # as transformers does
        team.add_up(torch.ones(1))
        if sys.argv[1] == "lost":
            if not team.is_first:
                os._exit(0)
            team.base_share.gather(torch.empty(8, dtype=torch.uint8), torch.empty(4, dtype=torch.uint8))()
except TrainingError as error:
    lost = error
print(*(open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The runs of tests/train/teams.py, and how each of their processes ended."""
    out = tmp_path_factory.mktemp("teams")
    done = subprocess.run([sys.executable, "-m", "tests.train.teams", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def assert_near(folder: Path, truth: Path) -> None:
    """Losses and gradient norms are equal to the rounding of float32 sums in another order, and weights to a twentieth of one step's size.

    AdamW divides by the gradient's own size, so where that is near zero rounding counts.
    """
    mine, theirs = (load_file(path / "adapter" / WEIGHTS_FILE) for path in (folder, truth))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=2.5e-4, msg=lambda text, name=name: f"{name}: {text}")
    lines, expected = log_lines(folder), log_lines(truth)
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(kind: str, runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """Rows have two or three label tokens, so a mean of the processes' means would be another gradient; clipping sees the whole batch."""
    out, ends = runs[0] / kind, runs[1]
    assert ends[f"{kind} 2"] == ends[f"{kind} 1"] * 2
    assert ends[f"{kind} 1"][0]["steps"] == 12
    assert_near(out / "2", out / "1")
    progress = [json.loads(_header(out / name)["progress"]) for name in ("1", "2")]
    assert progress[0]["tokens"] == progress[1]["tokens"]
    assert progress[0]["label_tokens"] == progress[1]["label_tokens"]
    clipped = [line["grad_norm"] > 0.1 for line in log_lines(out / "1") if "grad_norm" in line]
    assert any(clipped), "the test is to see clipping"


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_share_out_the_base_train_the_same(kind: str, runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """Each holds half of every block, and some have fewer forwards in a step than others."""
    out, ends = runs[0] / kind, runs[1]
    assert ends[f"{kind} shared out"] == ends[f"{kind} 1"] * 2
    assert_near(out / "shared out", out / "1")
    if kind == "lora":  # the others' rows enter above block 0 where the base is whole
        ours, theirs = (load_file(out / name / "adapter" / WEIGHTS_FILE) for name in ("shared out", "2"))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_process_killed_in_a_gather_ends_the_others(runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """The other stands in the same gather, and the next run goes on from the checkpoint."""
    first, second = runs[1]["killed, shared out"]
    assert second is None
    assert first["error"].startswith("another process of this training has ended or cannot be reached")
    assert [end["steps"] for end in runs[1]["after the kill, shared out"]] == [12, 12]
    assert_near(runs[0] / "killed, shared out", runs[0] / "lora" / "1")


def test_a_log_that_cannot_be_written_ends_all(runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """The others are about to measure the validation loss, and would wait for the first for ever."""
    first, second = runs[1]["full log"]
    assert "No space left on device" in first["error"]
    assert second["error"].startswith("process 1 of 2 failed: ")


def _header(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / FILE, "pt") as file:
        return dict(file.metadata())


def test_a_batch_of_fewer_rows_than_processes_is_trained(runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """The last batch of an epoch is often small: who has no row waits."""
    for run in ("2", "shared out"):
        assert_near(runs[0] / "single rows" / run, runs[0] / "single rows" / "1")


@pytest.mark.parametrize("count", [1, 3])
def test_ctrl_c_in_one_stops_all_and_another_number_goes_on(count: int, runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """Machines come and go; how many there are decides nothing but the time."""
    out, ends = runs[0] / "lora", runs[1]
    assert [end["error"] for end in ends[f"stopped {count}"]] == ["training stopped after step 5 of 12"] * 2
    assert [end["steps"] for end in ends[f"resumed {count}"]] == [12] * count
    assert_near(out / f"resumed by {count}", out / "1")


def test_what_one_fails_with_is_said_by_all(runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """A process that waits for ever for another's gradient is the usual end of such a run."""
    for run in ("failed", "no room", "failed, shared out", "no validation, shared out"):  # who shares out the base still serves its part
        first, second = runs[1][run]
        assert first["error"] == "process 2 of 2 failed: training failed: no memory left"
        assert second["error"] == "training failed: no memory left"
    first, second = runs[1]["full disk"]
    assert first["error"] == "the disk is full"
    assert second["error"] == "process 1 of 2 failed: the disk is full"


def test_a_killed_process_ends_the_others_and_costs_the_steps_since_the_checkpoint(runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """The next run begins at step 4 and ends as if nothing had been."""
    first, second = runs[1]["killed"]
    assert second is None
    assert first["error"].startswith("another process of this training has ended or cannot be reached")
    assert "last checkpoint" in first["hint"]
    assert [end["steps"] for end in runs[1]["after the kill"]] == [12, 12]
    assert_near(runs[0] / "killed", runs[0] / "lora" / "1")


def test_early_stopping_is_one_decision(runs: tuple[Path, dict[str, list[Any]]]) -> None:
    """It follows from the loss over all validation rows, which are shared too."""
    assert runs[1]["early 2"] == runs[1]["early 1"] * 2
    assert runs[1]["early 1"][0]["stopped_early"]


def test_shares_are_whole_and_even() -> None:
    """Every row once, and no process with much more than its part of the tokens."""
    lengths = [3, 50, 7, 7, 20, 31, 9, 2]
    indices = [0, 1, 2, 4, 5, 6, 7]
    shares = [Team(index, 3).share(indices, lengths) for index in range(3)]
    assert sorted(index for share in shares for index in share) == indices
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) <= max(math.ceil(sum(loads) / 3), 50)
    assert ALONE.share(indices, lengths) == indices
    assert Team(2, 3).share([4, 1], lengths) == []


def test_without_a_launcher_there_is_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that sets WORLD_SIZE for its own purposes has not started processes for us."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with launched_team() as team:
        assert team is ALONE


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
@pytest.mark.parametrize("end", ["whole", "lost"])
def test_a_team_leaves_no_thread(end: str) -> None:
    """One of gloo's that lives on while the interpreter ends may abort the process; a reference to the group that somebody keeps, keeps them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([sys.executable, "-c", LEAVE, end], env={**given, "RANK": str(index)}, stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    found = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    for names in found if end == "whole" else found[:1]:
        assert "python" in names
        assert "gloo" not in names
