"""The one way a file is written: whole or not at all.

The bytes go to a temporary file in the same folder, are synced, and take the name in one rename: a reader sees the old file or the new
one, and a kill or a full disk leaves nothing half-written under the name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from atoll.errors import StorageError


def write_file(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8), making missing folders. Raises StorageError, and then nothing is left behind."""
    write_file_by(path, lambda temporary: temporary.write_bytes(data.encode() if isinstance(data, str) else data))


def write_file_by(path: Path, write: Callable[[Path], object]) -> None:
    """The same with what `write` puts into the file that it is given: for what is too large to stand in memory twice."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(Path(name))
                os.fsync(file.fileno())
            Path(name).chmod(0o644)  # mkstemp gives 0600; these are files for others to read
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}", hint="free some space or check permissions, and run again"
        ) from error
