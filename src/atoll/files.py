"""The one way a file is written: whole or not at all.

The bytes go to a file in a temporary folder beside it, are synced, and take the name in one rename: a reader sees the old file or the new
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
    """The same with what `write` puts under the name that it is given: for what is too large to stand in memory twice."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:  # whatever a library leaves beside its file goes too
            temporary = Path(folder) / "new"
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # some writers give 0600; these are files for others to read
            temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}", hint="free some space or check permissions, and run again"
        ) from error
