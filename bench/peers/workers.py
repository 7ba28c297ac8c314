"""The bench's side of its workers: start them, ask one at a time, stop them for certain.

An idle worker must not take the processor from the one that is measured (engines spin while they wait), so every worker is a process group of its own
that is stopped by SIGSTOP and only continued for its own orders.

Used by serve.py; the other end is protocol.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .load import Watch

_ENVIRONMENT = dict(os.environ)  # as it was before the bench itself loaded a base, which settles what torch keeps (atoll.model.memory)
START_S, ORDER_S, END_S = 900.0, 900.0, 10.0  # seconds to load, to obey one order, to end by itself


class WorkerFailed(Exception):
    """A worker did not start, died or took too long: nothing more is to be had from it."""


class OrderFailed(Exception):
    """A worker answered an order with an error, and lives."""


@dataclass(frozen=True)
class Contestant:
    """How to start one: the program and its interpreter, what it adds to the environment, and the options that are its first line."""

    name: str
    command: list[str]
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """One running contestant. Made loaded and paused."""

    def __init__(self, contestant: Contestant, log: Path) -> None:
        self.name, self._log, self._unread = contestant.name, log, b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                contestant.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**_ENVIRONMENT, **contestant.environment},
                start_new_session=True,  # a process group of its own, children included
            )
        try:
            self.details: dict[str, Any] = self._exchange(contestant.options, START_S)["ready"]
        except BaseException:
            self.end()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Continue the worker, have it obey, pause it again: its answer, and "foreign_cores", what others took. Raises WorkerFailed, OrderFailed."""
        watch = Watch(self._process.pid)
        self._signal(signal.SIGCONT)
        answer = self._exchange(order, ORDER_S)
        self._signal(signal.SIGSTOP)
        answer["foreign_cores"] = watch.foreign_cores()
        if "error" in answer:
            raise OrderFailed(f"{self.name}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Close its stdin, wait a little, kill whatever is left of its group."""
        try:
            self._signal(signal.SIGCONT)
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait(END_S)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            pass  # the kill below is the answer
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def _exchange(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._read_line(time.monotonic() + seconds))
        except (BrokenPipeError, TimeoutError, EOFError) as error:
            reason = str(error) or "it has ended"
            raise WorkerFailed(f"{self.name}: {reason}; the end of its log:\n{self._tail()}") from error
        return answer

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError("no answer in time")
            piece = os.read(pipe, 1 << 20)
            if not piece:
                raise EOFError
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # ended already
            os.killpg(self._process.pid, number)

    def _tail(self) -> str:
        return "\n".join("    " + line[:300] for line in self._log.read_text(errors="replace").splitlines()[-12:])


class Workers:
    """All running workers; leaving the `with` block ends them, whatever happened inside."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, dict[str, Worker]()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.end(name)

    def __contains__(self, name: str) -> bool:
        return name in self._running

    def __getitem__(self, name: str) -> Worker:
        return self._running[name]

    def start(self, contestant: Contestant) -> Worker:
        """Start and load one. Raises WorkerFailed."""
        self._running[contestant.name] = Worker(contestant, self._folder / f"{contestant.name}.log")
        return self._running[contestant.name]

    def end(self, name: str) -> None:
        """End one; no error if it is gone."""
        worker = self._running.pop(name, None)
        if worker is not None:
            worker.end()
