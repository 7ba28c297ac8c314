"""Toy jobs trained by several processes; run as a program (`python -m tests.train.teams OUT`) it does all and prints how each ended.

Used by test_team.py. One process imports torch and makes the base; its forks form the teams. A fork's outcome:
{"steps": …} or {"error": …, "hint": …}.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.conftest import tiny_model
from tests.train.jobs import toy_decoder, toy_job, toy_reft, toy_rows

from atoll.errors import AtollError
from atoll.model.adapter_files import write_adapter
from atoll.model.decoder import Decoder
from atoll.model.sharded import ShardedBlocks
from atoll.train import loop
from atoll.train.flat import FlatVector
from atoll.train.job import TrainingJob
from atoll.train.loop import train
from atoll.train.team import Team, launched_team

KINDS = ("lora", "reft", "both")
DECODER = toy_decoder()
Fault = Callable[[TrainingJob], None]


def job(kind: str, folder: Path, team: Team, *, fsdp: bool = False, **changes: Any) -> TrainingJob:
    """24 rows in batches of 5, which 2 and 3 do not divide, in forwards of at most 16 tokens, clipped in most steps, with validation.

    "both" starts its forwards above block 0 and keeps what enters there.
    """
    settings = {"batch_size": 5, "micro_batch_tokens": 16, "max_grad_norm": 0.1, "max_steps": 12, "eval_every": 3, "checkpoint_every": 4, **changes}
    adapter = None if kind == "lora" else toy_reft() if kind == "reft" else toy_reft(lora=2, layers_to_transform=(1, 2), layers=(1, 2))
    decoder = sharded_decoder(team) if fsdp else DECODER
    made = toy_job(folder, decoder=decoder, adapter=adapter, validation=toy_rows(7, shift=31), **settings)
    made.team = team
    return made


def sharded_decoder(team: Team) -> Decoder:
    """DECODER's weights, held together."""
    model = tiny_model("llama")
    decoder = Decoder.from_state_dict(model.config, model.state_dict(), torch.float32, share=team.base_share)
    assert team.count == 1 or team.count * decoder.linear_bytes == DECODER.linear_bytes
    return decoder


def run(count: int, out: Path, kind: str, fault: Callable[[Team], Fault | None] = lambda team: None, **changes: Any) -> list[Any]:
    """Train in `count` processes; `fault` gives what a process does after each of its steps, `changes` go to `job`.

    Returns each one's outcome, None for a killed one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    forks = []
    for index in range(count):
        process_id = os.fork()
        if not process_id:
            os.environ.update(RANK=str(index), WORLD_SIZE=str(count), LOCAL_RANK=str(index), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            _train(out, kind, fault, changes)
        forks.append(process_id)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) for process_id in forks]
    files = [out / f"outcome{index}.json" for index in range(count)]
    return [json.loads(file.read_text()) if code == 0 else None for file, code in zip(files, codes, strict=True)]


def _train(out: Path, kind: str, fault: Callable[[Team], Fault | None], changes: dict[str, Any]) -> None:
    found: dict[str, Any] = {}
    try:
        with launched_team() as team:
            after = fault(team)
            if after is not None:
                original = loop._after_gradients

                def wrapped(done: TrainingJob) -> None:
                    original(done)
                    after(done)

                loop._after_gradients = wrapped
            try:
                result = train(job(kind, out, team, **changes))
                found = {"steps": result.progress.step, "best": result.progress.best_step, "stopped_early": result.progress.stopped_early}
                if team.is_first:
                    write_adapter(out / "adapter", result.adapter)
            except AtollError as error:
                found = {"error": error.message, "hint": error.hint}
            (out / f"outcome{team.index}.json").write_text(json.dumps(found))
        os._exit(0)
    finally:
        os._exit(1)


def at_step(step: int, index: int, what: Callable[[], None]) -> Callable[[Team], Fault | None]:
    """A fault of process `index` after a step."""
    return lambda team: (lambda done: what() if done.progress.step == step else None) if team.index == index else None


def failing_forward(team: Team) -> None:
    """The second process runs out of memory in its third step."""
    if team.index == 1:
        original = loop._forward_backward

        def forward(items: Any) -> None:
            if items and items[0].job.progress.step == 2:
                raise RuntimeError("no memory left")
            original(items)

        loop._forward_backward = forward


def killed_in_a_gather(team: Team) -> None:
    """The second process is gone in the middle of its seventh step's walk."""
    if team.index == 1:
        _before_call(25, ShardedBlocks, "_step", lambda: os.kill(os.getpid(), signal.SIGKILL))


def full_log(team: Team) -> None:
    """The first process alone writes, and at the third step, where validation is due, it cannot."""
    if team.is_first:
        _before_call(3, TrainingJob, "_write", lambda: _fail(OSError(28, "No space left on device")))


def _before_call(number: int, owner: type, name: str, what: Callable[[], object]) -> None:
    """`what` happens before a method's call of that number."""
    original, calls = getattr(owner, name), itertools.count(1)

    def method(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            what()
        return original(*arguments, **named)

    setattr(owner, name, method)


def _fail(error: Exception) -> None:
    raise error


def failing_validation(team: Team) -> None:
    """The second process runs out of memory in its first validation."""
    if team.index == 1:
        original = loop._losses

        def losses(items: Any, *, training: bool) -> Any:
            if not training:
                raise RuntimeError("no memory left")
            return original(items, training=training)

        loop._losses = losses


def without_room(team: Team) -> None:
    """The second process has no rows of its steps, and at the third no memory for their gradients either."""
    if team.index == 1:
        _before_call(3, FlatVector, "zero_grads", lambda: _fail(RuntimeError("no memory left")))


def _main(out: Path) -> None:
    torch.set_num_threads(1)  # no OpenMP threads before a fork
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[f"{kind} 1"] = run(1, out / kind / "1", kind)
        found[f"{kind} 2"] = run(2, out / kind / "2", kind)
        found[f"{kind} shared out"] = run(2, out / kind / "shared out", kind, fsdp=True)
    interrupt = at_step(5, 1, lambda: signal.raise_signal(signal.SIGINT))  # in one of them only
    for count in (1, 3):
        folder = out / "lora" / f"resumed by {count}"
        found[f"stopped {count}"] = run(2, folder, "lora", interrupt)
        found[f"resumed {count}"] = run(count, folder, "lora")
    found["failed"] = run(2, out / "failed", "lora", failing_forward)
    found["no room"] = run(2, out / "no room", "lora", without_room, batch_size=1, max_steps=5)
    for fault, begun in (("failed", failing_forward), ("no validation", failing_validation)):
        found[f"{fault}, shared out"] = run(2, out / f"{fault}, shared out", "lora", begun, fsdp=True)
    killed = at_step(6, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    found["killed, shared out"] = run(2, out / "killed, shared out", "lora", killed_in_a_gather, fsdp=True)
    found["full log"] = run(2, out / "full log", "lora", full_log)
    found["after the kill, shared out"] = run(2, out / "killed, shared out", "lora", fsdp=True)
    found["single rows, shared out"] = run(2, out / "single rows" / "shared out", "lora", batch_size=1, max_steps=3, fsdp=True)
    found["killed"] = run(2, out / "killed", "lora", killed)
    found["after the kill"] = run(2, out / "killed", "lora")
    found["full disk"] = run(2, out / "full disk", "lora", lambda team: _full(team))
    found["single rows 1"] = run(1, out / "single rows" / "1", "lora", batch_size=1, max_steps=3)
    found["single rows 2"] = run(2, out / "single rows" / "2", "lora", batch_size=1, max_steps=3)
    found["early 1"] = run(1, out / "early" / "1", "lora", max_steps=40, early_stop_patience=1, eval_every=1, learning_rate=0.05)
    found["early 2"] = run(2, out / "early" / "2", "lora", max_steps=40, early_stop_patience=1, eval_every=1, learning_rate=0.05)
    print(json.dumps(found))  # noqa: T201 (the program's answer)


def _full(team: Team) -> None:
    def refuse(done: TrainingJob) -> None:
        from atoll.errors import StorageError

        raise StorageError("the disk is full")

    if team.is_first:
        TrainingJob.checkpoint = refuse  # type: ignore[method-assign]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
