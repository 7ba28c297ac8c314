"""What every verb begins with: a way to say how far it is, the packages it needs, the hub, and a folder that is its own while the process lives.

Used by all of workflows.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import AtollError, Busy, ConfigError, StorageError

if TYPE_CHECKING:
    from atoll.hub.store import Hub

Progress = Callable[[str, int, int], None]

_LOCK = ".lock"
_LOOK_S = 0.2  # is_held takes a lock for a moment, which is not to be taken for work


def silent(stage: str, done: int, total: int) -> None:
    """The default progress."""


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Progress whose stages begin with `prefix`."""
    return lambda stage, done, total: progress(f"{prefix} {stage}", done, total)


@contextlib.contextmanager
def about(what: str, *, also: str = "") -> Iterator[None]:
    """Errors from inside begin with what they are about, where several things are at hand; also: a second hint."""
    try:
        yield
    except AtollError as error:
        raise type(error)(f"{what}: {error.message}", hint="; ".join(hint for hint in (error.hint, also) if hint)) from error


def require(*modules: str) -> None:
    """Say before the work, not after it, that an extra is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"measuring needs the package {module}, which is not installed", hint='install Atoll with its extras: pip install "atoll[all]"'
            )


def open_hub() -> Hub:
    """The hub in the Atoll home. Raises ConfigError where its packages are not installed."""
    require("sqlalchemy", "alembic", "fsspec")
    from atoll.hub.store import Hub

    return Hub()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process (made if absent); the lock ends with the process, however it ends. Raises Busy or StorageError."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, timeout=_LOOK_S)
        lock.acquire()
    except Timeout:
        raise Busy(f"{folder} is in use by another Atoll process", hint="wait for it, or choose another --out folder") from None
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}", hint="choose another --out folder") from error
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder, or one above it (a land's, a sweep's)."""
    return any(_is_locked(each / _LOCK) for each in (folder, *folder.absolute().parents) if (each / _LOCK).exists())


def _is_locked(lock: Path) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to lock: somebody else's, so it may well be held
        return True
