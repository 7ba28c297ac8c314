"""`atoll train` by several processes: the launcher, who speaks, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.cli.conftest import write_train_yaml
from torch.testing import assert_close

from atoll.cli import processes
from atoll.hub.store import Hub
from atoll.model.adapter_files import WEIGHTS_FILE

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", "-m", "atoll")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of its own, in the working directory."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )


@pytest.mark.slow
def test_processes_and_torchrun_train_what_one_process_trains(job: Path, tiny_base_dir: Path, atoll) -> None:
    """One reference on stdout, one version in the hub, the same adapter to rounding; the second launcher finds the first one's.

    The first two hold the base together, which is no other job.
    """
    assert atoll("train", job, "--out", "one", "--no-publish").code == 0
    write_train_yaml(job.with_name("fsdp.yaml"), tiny_base_dir, trainer={"dtype": "float32", "max_steps": 2, "batch_size": 4, "fsdp": True})
    first = call("-m", "atoll", "train", "fsdp.yaml", "--out", "two", "--processes", 2)
    assert (first.returncode, first.stdout) == (0, "colours@1\n"), first.stderr
    assert first.stderr.count("trained 2 steps") == 1
    again = call(*TORCHRUN, "train", job, "--out", "two", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["reused"]
    assert [run.status for run in Hub().runs(kind="train")] == ["finished"]
    one, two = (load_file(f"{name}/adapter/{WEIGHTS_FILE}") for name in ("one", "two"))
    for name, tensor in one.items():
        assert_close(two[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_an_error_of_all_is_said_once(job: Path, tmp_path: Path, tiny_base_dir: Path) -> None:
    """And the launcher's own report of dead children stays away."""
    write_train_yaml(job, tiny_base_dir, data={"path": "gone.jsonl", "template": "{text}", "target": "colour"})
    failed = call("-m", "atoll", "train", job, "--processes", 2)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.count("error:") == 1, failed.stderr
    assert "gone.jsonl" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process sees that torchrun has started as the first of two."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("under_torchrun")
def test_a_land_and_several_files_are_refused_under_torchrun(job: Path, tmp_path: Path, atoll) -> None:
    """One process trains many over one base; two would do all of it twice."""
    land = tmp_path / "land.yaml"
    land.write_text("base: x\ntasks: [builtin:dates]\n")
    found = atoll("land", land)
    assert found.code == 1
    assert "torchrun has started 2 for a land" in found.err
    found = atoll("train", job, job)
    assert found.code == 1
    assert "several processes train one adapter together, but 2 files are given" in found.err
    found = atoll("train", job, "--processes", 3)
    assert "--processes is 3, but 2 processes have been started already" in found.err


def test_processes_are_for_one_file(job: Path, atoll) -> None:
    """The same without torchrun."""
    assert "but 2 files are given" in atoll("train", job, job, "--processes", 2).err


@pytest.mark.usefixtures("under_torchrun")
def test_the_first_process_of_a_machine_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine has its own disk and its own errors; results come from the first of all."""
    assert processes.is_first() and processes.is_spokesman()
    monkeypatch.setenv("RANK", "1")
    assert processes.is_spokesman() and not processes.is_first()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not processes.is_spokesman()
