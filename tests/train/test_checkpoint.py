"""train/checkpoint.py: a job's whole state in one file that is either the old one or the new one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from atoll.errors import StorageError, TrainingError
from atoll.train.checkpoint import FILE, Progress, read_checkpoint, save_checkpoint


def restored_from(folder: Path, job: str, values: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """(progress, best values) of a checkpoint, restored as a job does; None where there is none."""
    found = read_checkpoint(folder, job, values.numel())
    return None if found is None else found.restore(values, optimizer)


def state(num_steps: int = 3, size: int = 10, seed: int = 0) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    """A vector and its AdamW after some steps."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.nn.Parameter(torch.randn(size, generator=generator))
    optimizer = torch.optim.AdamW([values], lr=0.1, fused=True)
    for _ in range(num_steps):
        values.grad = torch.randn(size, generator=generator)
        optimizer.step()
    return values, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    """The next step after a resume must be the step that would have come, which needs values, both moments and the step count."""
    values, optimizer = state()
    progress = Progress(3, 100, 40, 1.5, 2, 0.25, 1, False, 0.5, [(1, 0.5), (2, 0.25)])
    best = torch.arange(10.0)
    save_checkpoint(tmp_path, "job", progress, values, optimizer, best)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    fresh, fresh_optimizer = state(0, seed=1)
    restored = restored_from(tmp_path, "job", fresh, fresh_optimizer)
    assert restored is not None
    assert restored[0] == progress
    assert restored[1] is not None and torch.equal(restored[1], best)
    assert torch.equal(fresh, values)
    for parameter, one in ((values, optimizer), (fresh, fresh_optimizer)):
        parameter.grad = torch.linspace(-1, 1, 10)
        one.step()
    assert torch.equal(fresh, values)


def test_no_checkpoint_is_a_start(tmp_path: Path) -> None:
    """A first run, and a run that was killed before its first checkpoint."""
    values, optimizer = state(0)
    assert restored_from(tmp_path, "job", values, optimizer) is None


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    """The same folder with a changed config or other data: going on from there would give an adapter that no config describes."""
    values, optimizer = state()
    save_checkpoint(tmp_path, "job", Progress(), values, optimizer, None)
    untouched = values.detach().clone()
    with pytest.raises(TrainingError, match="holds a checkpoint of another job: its config, data or base differ") as found:
        restored_from(tmp_path, "other", values, optimizer)
    assert str(tmp_path) in found.value.message
    assert "--out" in found.value.hint
    assert torch.equal(values, untouched)


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    """Equal digests and other shapes mean a changed program; the sentence must say so before torch does."""
    save_checkpoint(tmp_path, "job", Progress(), *state(size=10), None)
    with pytest.raises(TrainingError, match="holds 10 parameters, but the job trains 12"):
        restored_from(tmp_path, "job", *state(0, size=12))


@pytest.mark.parametrize("size", [0, 5, 100, -1], ids=["empty", "no header", "half a header", "a byte short"])
def test_a_damaged_checkpoint_is_named(size: int, tmp_path: Path) -> None:
    """A disk error, or a copy that stopped: starting again silently would throw hours away, going on would train on garbage."""
    save_checkpoint(tmp_path, "job", Progress(), *state(), None)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:size])
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is damaged") as found:
        restored_from(tmp_path, "job", *state(0))
    assert "delete" in found.value.hint


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends the run with a sentence; the steps before it are still there."""
    values, optimizer = state()
    save_checkpoint(tmp_path, "job", Progress(step=3), values, optimizer, None)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            save_checkpoint(tmp_path, "job", Progress(step=4), values, optimizer, None)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    restored = restored_from(tmp_path, "job", *state(0))
    assert restored is not None
    assert restored[0].step == 3


def test_a_full_disk_while_writing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that writes has an error of its own."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_checkpoint(tmp_path, "job", Progress(step=4), *state(), None)
    assert not list(tmp_path.iterdir())


def test_what_is_synced_is_what_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may put another file under the name that it was given; a power cut would leave that one empty."""
    synced, sync = list[tuple[int, int]](), os.fsync

    def watched(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    save_checkpoint(tmp_path, "job", Progress(step=3), *state(), None)
    found = (tmp_path / FILE).stat()
    assert synced == [(found.st_ino, found.st_size)]
    assert found.st_mode & 0o777 == 0o644


def test_what_a_kill_left_of_a_write_is_removed(tmp_path: Path) -> None:
    """A machine that is taken away every hour would fill the disk with halves of checkpoints."""
    save_checkpoint(tmp_path, "job", Progress(step=3), *state(), None)
    (tmp_path / f".{FILE}.x1y2z3").mkdir()
    (tmp_path / f".{FILE}.x1y2z3" / "new").write_bytes(b"half")
    (tmp_path / f".{FILE}.a4b5c6").write_bytes(b"half")
    assert restored_from(tmp_path, "job", *state(0)) is not None
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fused_optimizer_goes_on_where_its_parameters_are(tmp_path: Path) -> None:
    """On CUDA a fused AdamW refuses a step count that lies in main memory."""
    values = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = torch.optim.AdamW([values], fused=True)
    values.grad = torch.ones_like(values)
    optimizer.step()
    save_checkpoint(tmp_path, "job", Progress(step=1), values, optimizer, None)
    fresh = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    other = torch.optim.AdamW([fresh], fused=True)
    assert restored_from(tmp_path, "job", fresh, other) is not None
    fresh.grad = torch.ones_like(fresh)
    other.step()
    assert int(other.state[fresh]["step"]) == 2


def test_a_checkpoint_from_before_optimizers_could_be_chosen_is_read(tmp_path: Path) -> None:
    """Its header says nothing of the optimizer: it is AdamW's, both moments of the values' shape."""
    values, optimizer = state()
    moments = {name: optimizer.state[values][name] for name in ("exp_avg", "exp_avg_sq")}
    header = {"job": "job", "progress": json.dumps(asdict(Progress(step=3)))}
    save_file({"values": values.detach(), **moments}, tmp_path / FILE, metadata=header)
    fresh, fresh_optimizer = state(0, seed=1)
    assert restored_from(tmp_path, "job", fresh, fresh_optimizer) is not None
    for parameter, one in ((values, optimizer), (fresh, fresh_optimizer)):
        parameter.grad = torch.linspace(-1, 1, 10)
        one.step()
    assert torch.equal(fresh, values)
