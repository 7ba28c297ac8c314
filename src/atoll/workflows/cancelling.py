"""Cancel one training while others go on: a file named `cancel` in its folder, which its loop looks for between steps.

A folder whose job waits or runs has a mark that tells its name; whether the process that wrote it still lives is told by the lock that it holds on
the folder, or on the land above it. So `atoll cancel NAME` finds a job wherever it is, and `touch FOLDER/cancel` does the same by hand.

Used by training.py, many.py and `atoll cancel`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from atoll.errors import ConfigError, StorageError
from atoll.files import write_file
from atoll.workflows.start import is_held
from atoll.yaml_file import nearest

CANCEL_FILE = "cancel"
_MARK = ".job.json"


def announce(folder: Path, name: str) -> None:
    """Say that a job is about to be trained in `folder`, which the caller holds. An older `cancel` is forgotten. Raises StorageError."""
    write_file(folder / _MARK, json.dumps({"name": name, "pid": os.getpid(), "host": socket.gethostname()}))
    (folder / CANCEL_FILE).unlink(missing_ok=True)


def withdraw(folder: Path) -> None:
    """Say that the job is over, however it ended."""
    for name in (_MARK, CANCEL_FILE):
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def is_cancelled(folder: Path) -> bool:
    """Whether somebody has asked for the end of the job in `folder`."""
    return (folder / CANCEL_FILE).exists()


@contextlib.contextmanager
def announced(folder: Path, name: str) -> Iterator[None]:
    """`announce`, and `withdraw` at the end."""
    announce(folder, name)
    try:
        yield
    finally:
        withdraw(folder)


def running_jobs(out: Path) -> list[tuple[str, Path]]:
    """(name, folder) of each job that waits or is trained now, in `out` or anywhere below it."""
    found = []
    for mark in sorted(out.rglob(_MARK)) if out.is_dir() else ():
        try:
            told = json.loads(mark.read_text(encoding="utf-8"))
            name = str(told["name"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # just gone, or not ours
        if _lives(told) and is_held(mark.parent):
            found.append((name, mark.parent))
    return found


def cancel(name: str, out: Path) -> Path:
    """Ask for the end of the one job of that name below `out`; returns its folder. Raises ConfigError where there is not one, StorageError."""
    jobs = running_jobs(out)
    folders = [folder for found, folder in jobs if found == name]
    if not folders:
        names = sorted({found for found, _ in jobs})
        guess = nearest(name, names)
        known = f"did you mean {guess}?" if guess else f"running: {', '.join(names)}" if names else "--out says where, as for the command that trains"
        raise ConfigError(f"no training named {name!r} is running in {out}", hint=known)
    if len(folders) > 1:
        raise ConfigError(f"{len(folders)} trainings named {name!r} are running in {out}", hint=f"choose one: --out {folders[0]}")
    try:
        (folders[0] / CANCEL_FILE).touch()
    except OSError as error:
        raise StorageError(f"{folders[0]} cannot be written: {error.strerror or error}", hint="cancel as the user who trains") from error
    return folders[0]


def _lives(told: dict[str, object]) -> bool:
    """Whether the process that wrote a mark is still there, as far as this machine can tell."""
    pid = told.get("pid")
    if told.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
