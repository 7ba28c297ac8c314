"""A run's curve: one JSON object a step in log.jsonl, and the same numbers wherever trainer.log_to says (loggers.py).

On resume, lines of steps that will be taken again are cut, so the log reads as if the run had never stopped. Used by job.py, and by `atoll runs`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.files import write_file
from atoll.train.loggers import close_all, open_loggers, tell

LOG_FILE = "log.jsonl"
_POLL_S = 0.5


class RunLog:
    """Appends to `folder`/log.jsonl, one flushed line a call. Use as a context manager."""

    def __init__(
        self, folder: Path, from_step: int, log_to: Sequence[str] = ("tensorboard",), *, title: str = "", settings: Mapping[str, Any] | None = None
    ) -> None:
        """log_to: names of loggers; title, settings: what they are told of the run."""
        path = folder / LOG_FILE
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= from_step]
            write_file(path, "".join(f"{line}\n" for line in kept if from_step).encode())
        self._loggers = open_loggers(log_to, folder, from_step, title, settings or {})
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError:
            close_all(self._loggers, False)
            raise

    def write(self, step: int, **numbers: float) -> None:
        """Record numbers (loss in nats a label token, learning rate, tokens per second, …) of one step."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        tell(self._loggers, step, numbers)

    def close(self, whole: bool = True) -> None:
        """whole: whether the run has come to its end."""
        self._file.close()
        close_all(self._loggers, whole)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(whole=kind is None)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; [] where there is none."""
    return list(follow_log(folder, lambda: True))


def follow_log(folder: Path, ended: Callable[[], bool], *, sleep: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """The lines of a run's log as they are written, until ended(); what is there by then is still read.

    A log that begins again, or was cut by a resumption, is read on from the step that was read last.
    """
    path, place, identity, last, rest = folder / LOG_FILE, 0, -1, -1.0, b""
    skip_to = -1.0  # until a step beyond it: these have been read, of the file that stood here before
    while True:
        over = ended()  # asked first: what was written before it said so is read below
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != identity or about.st_size < place:  # another file in its place
                    place, rest, identity = 0, b"", about.st_ino
                    skip_to = last
                file.seek(place)
                read = file.read()
        except FileNotFoundError:
            read = b""
        place += len(read)
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            try:
                numbers = json.loads(line)
                step = float(numbers["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if step > skip_to:
                skip_to = -1.0
                yield numbers
                last = step
        if over:
            return
        sleep(_POLL_S)


def _step_of(line: str) -> float:
    """The step of a log line; a line torn by a kill counts as later than all."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return float("inf")
