"""Toy training jobs: rows that a tiny base can learn in a second, and a way to kill a run at any moment.

Used by the tests of this folder. Run as a program (`python -m tests.train.jobs OUT`), it trains a job of each kind three times: in peace, with many
SIGKILLs, and with a Ctrl-C. What came out is in OUT/KIND/peace, killed and stopped. One process imports torch and makes the base; its forks do the
work.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.adapters import decoder_of
from tests.conftest import tiny_model

from atoll.config import TrainerConfig
from atoll.data.encode import EncodedRow
from atoll.errors import Interrupted
from atoll.model.adapter import Adapter, AdapterSpec, new_adapter
from atoll.model.adapter_files import write_adapter
from atoll.model.decoder import Decoder
from atoll.model.positions import Positions
from atoll.model.reft import ReftSpec
from atoll.train.checkpoint import FILE
from atoll.train.job import TrainingJob

NUM_KILLS = {"lora": 8, "lora+reft": 5}
INTERRUPTED = 3  # exit status of a fork whose run raised Interrupted


def toy_rows(num_rows: int = 24, shift: int = 30) -> list[EncodedRow]:
    """Prompts of 1 to 5 tokens, completions of 2 or 3 that follow from the prompt; `shift` gives another rule."""
    rows = []
    for i in range(num_rows):
        prompt = [10 + i % 7] + [50 + i % 3] * (i % 5)
        rows.append(EncodedRow([*prompt, *[shift + i % 7] * (1 + i % 2), 2], len(prompt), f"toy:{i + 1}"))
    return rows


def toy_decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


def toy_config(**changes: Any) -> TrainerConfig:
    return TrainerConfig(**{"epochs": 2, "batch_size": 6, "dtype": "float32", "learning_rate": 5e-3, **changes})


def toy_job(
    folder: Path,
    *,
    decoder: Decoder | None = None,
    adapter: Adapter | None = None,
    rows: Sequence[EncodedRow] | None = None,
    validation: Sequence[EncodedRow] = (),
    dropout: float = 0.0,
    digest: str = "job",
    **config: Any,
) -> TrainingJob:
    """A LoRA of rank 4 on all linears over `toy_rows`, unless told otherwise; dropout is that LoRA's."""
    decoder = decoder or toy_decoder()
    spec = AdapterSpec("tiny", 4, 8.0, dropout=dropout)
    adapter = adapter or new_adapter(spec, decoder.shape.linears, decoder.shape.num_layers, torch.Generator().manual_seed(0))
    return TrainingJob(decoder, adapter, toy_rows() if rows is None else rows, validation, toy_config(**config), folder, digest)


def toy_reft(*, lora: int = 0, lora_dropout: float = 0.0, layers_to_transform: tuple[int, ...] | None = None, **part: Any) -> Adapter:
    """A fresh ReFT adapter of rank 2 on the first and the last prompt token, ReftSpec(**part); lora: the rank of a LoRA trained beside it."""
    reft = ReftSpec(**{"rank": 2, "positions": Positions(first=1, last=1), **part})
    spec = AdapterSpec.reft_only("tiny", [reft])
    if lora:
        spec = AdapterSpec("tiny", lora, 2.0 * lora, dropout=lora_dropout, layers_to_transform=layers_to_transform, reft=(reft,))
    shape = toy_decoder().shape
    return new_adapter(spec, shape.linears, shape.num_layers, torch.Generator().manual_seed(0))


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The run's log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def _resumable(folder: Path, decoder: Decoder, kind: str) -> TrainingJob:
    """A job of the kill test: dropout, validation, an epoch bound in the middle, and a checkpoint every second step.

    The one with ReFT has three groups of the optimizer, stacks of two ranks, sides of their own, and keeps what enters block 1.
    """
    steps = {"max_steps": 100, "checkpoint_every": 2, "eval_every": 3, "early_stop_patience": None}
    if kind == "lora":
        return toy_job(folder, decoder=decoder, validation=toy_rows(6), dropout=0.2, **steps)
    upper = (1, 2)
    adapter = toy_reft(lora=2, lora_dropout=0.2, layers_to_transform=upper, dropout=0.1, layers=upper, rank_pattern={1: 3}, tied=False)
    decay = {"weight_decay": 0.1, "reft_weight_decay": 0.2, "reft_learning_rate": 1e-2}
    return toy_job(folder, decoder=decoder, adapter=adapter, validation=toy_rows(6), **steps, **decay)


def _start(folder: Path, decoder: Decoder, kind: str) -> int:
    """Fork a run of the job in `folder`; the child's exit status says how it ended. Returns its process id."""
    process_id = os.fork()
    if process_id:
        return process_id
    status = 1
    try:
        write_adapter(folder / "adapter", _resumable(folder, decoder, kind).run().adapter)
        status = 0
    except Interrupted as stopped:
        (folder / "interrupted.txt").write_text(f"{stopped.message}\n{stopped.hint}\n")
        status = INTERRUPTED
    finally:
        os._exit(status)


def _finish(process_id: int) -> int:
    """Wait; returns the exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


def _await_checkpoint(folder: Path, process_id: int) -> None:
    """Return when the run has written a checkpoint that was not there at the call, or has ended."""
    file = folder / FILE

    def stamp() -> int:
        return file.stat().st_mtime_ns if file.exists() else 0

    before, deadline = stamp(), time.monotonic() + 60
    while stamp() == before and time.monotonic() < deadline and os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def _three_times(out: Path, decoder: Decoder, kind: str, num_kills: int) -> dict[str, int]:
    """How many runs were killed, and how the last of them, the interrupted one and the one after it ended."""
    draw = random.Random(0)
    peace, killed, stopped = (out / name for name in ("peace", "killed", "stopped"))
    for folder in (peace, killed, stopped):
        folder.mkdir(parents=True)
    assert _finish(_start(peace, decoder, kind)) == 0
    num_killed = 0
    for number in range(num_kills):
        run = _start(killed, decoder, kind)
        if number % 4:  # every fourth is killed before it gets anywhere
            _await_checkpoint(killed, run)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(run, signal.SIGKILL)
        num_killed += _finish(run) == -signal.SIGKILL
    last = _finish(_start(killed, decoder, kind))
    run = _start(stopped, decoder, kind)
    _await_checkpoint(stopped, run)
    os.kill(run, signal.SIGINT)
    return {"killed": num_killed, "last": last, "stopped": _finish(run), "resumed": _finish(_start(stopped, decoder, kind))}


def _main(out: Path) -> None:
    torch.set_num_threads(1)  # no OpenMP threads before a fork
    importlib.import_module("torch.utils.tensorboard")  # before the forks, so that it is imported once
    decoder = toy_decoder()
    print(json.dumps({kind: _three_times(out / kind, decoder, kind, kills) for kind, kills in NUM_KILLS.items()}))  # noqa: T201 (the program's answer)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
