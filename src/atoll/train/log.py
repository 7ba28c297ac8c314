"""A run's curve: one JSON object a step in log.jsonl, and the same numbers in TensorBoard files where tensorboard is installed.

On resume, lines of steps that will be taken again are cut, so the log reads as if the run had never stopped.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from atoll.files import write_file

LOG_FILE = "log.jsonl"
_log = logging.getLogger(__name__)


class RunLog:
    """Appends to `folder`/log.jsonl, one flushed line a call. Use as a context manager."""

    def __init__(self, folder: Path, from_step: int, tensorboard: bool = True) -> None:
        path = folder / LOG_FILE
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= from_step]
            write_file(path, "".join(f"{line}\n" for line in kept if from_step).encode())
        self._file = path.open("a", encoding="utf-8")
        self._writer = _tensorboard(folder / "tensorboard", from_step) if tensorboard else None

    def write(self, step: int, **numbers: float) -> None:
        """Record numbers (loss in nats a label token, learning rate, tokens per second, …) of one step."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _step_of(line: str) -> float:
    """The step of a log line; a line torn by a kill counts as later than all."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return float("inf")


def _tensorboard(folder: Path, from_step: int) -> Any:
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        _log.warning("tensorboard is not installed, so the curve is in %s only", LOG_FILE)
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)
