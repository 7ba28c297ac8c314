"""Log lines of a server on stderr: for people, or one JSON object a line for programs.

Warnings of every library and the notices of our own; a line a request only where it is asked for. Prompts and answers are never logged.

Used by serve.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from atoll.cli.output import clean

ACCESS = "uvicorn.access"


@contextmanager
def logging_to_stderr(*, as_json: bool = False, access: bool = False) -> Iterator[None]:
    """Log to stderr until the block ends."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if as_json else _Lines())
    root, requests = logging.getLogger(), logging.getLogger(ACCESS)
    levels = root.level, requests.level
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    requests.setLevel(logging.INFO if access else logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(levels[0])
        requests.setLevel(levels[1])


class _Lines(logging.Formatter):
    """`12:30:01 warning atoll.serving.registry: text`; control characters are written out."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        text = f"{at} {record.levelname.lower()} {record.name}: {clean(record.getMessage())}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False)
