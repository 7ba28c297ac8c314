"""Content-addressed files: every file is stored once, under the sha256 of its bytes, and never changes.

The interface is five verbs, so that a local directory and any fsspec store (S3, memory, ...) are equals behind it. A blob appears by one rename,
after its bytes are on disk: whoever sees it sees all of it.

Used by store.py; it knows nothing of adapters.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from atoll.errors import HubError, StorageError

CHUNK_BYTES = 1 << 20


class Blobs(Protocol):
    """A store of immutable files, keyed by 64 hex digits of sha256."""

    near: bool  # whether fetch makes a hard link, which costs nothing, or a download

    def has(self, sha256: str, size_bytes: int) -> bool:
        """Whether a blob of that key and size is there. Cheap: the bytes are not read."""
        ...

    def put(self, source: Path, sha256: str) -> None:
        """Store the bytes of `source`, whose sha256 the caller has computed. `source` stays where it is. Putting twice is harmless."""
        ...

    def fetch(self, sha256: str, target: Path) -> None:
        """Make `target` a read-only file of the blob's bytes (a hard link where possible)."""
        ...

    def digest(self, sha256: str) -> str | None:
        """Read the blob again and return the sha256 of what is there; None if it is gone."""
        ...

    def delete(self, sha256: str) -> None:
        """Remove the blob; nothing happens if it is gone already."""
        ...

    def all(self) -> Iterator[tuple[str, int]]:
        """(sha256, size in bytes) of every blob."""
        ...


class LocalBlobs:
    """Blobs in a directory: <root>/ab/abcdef..., read-only. Sources must lie on the same file system."""

    near = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def has(self, sha256: str, size_bytes: int) -> bool:
        path = self._path(sha256)
        return path.is_file() and path.stat().st_size == size_bytes

    def put(self, source: Path, sha256: str) -> None:
        """Link or copy beside `source`, then rename into place. An existing blob is read again, and replaced if the disk has changed it."""
        target = self._path(sha256)
        if self.digest(sha256) == sha256:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        passing = source.with_name(source.name + ".put")
        link_or_copy(source, passing)
        passing.replace(target)
        sync_folder(target.parent)

    def fetch(self, sha256: str, target: Path) -> None:
        link_or_copy(self._path(sha256), target)

    def digest(self, sha256: str) -> str | None:
        path = self._path(sha256)
        return sha256_of(path) if path.is_file() else None

    def delete(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)

    def all(self) -> Iterator[tuple[str, int]]:
        for path in sorted(self.root.glob("??/*")):
            if len(path.name) == 64:
                yield path.name, path.stat().st_size


class FsspecBlobs:
    """Blobs in any store that fsspec reaches by URL, such as s3://bucket/prefix. Writes there are whole objects, so no rename is needed."""

    near = False

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise HubError(
                f"cannot open the blob store {url!r}: {error}", hint="use a directory, or install the fsspec package of that protocol"
            ) from error

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"

    def has(self, sha256: str, size_bytes: int) -> bool:
        path = self._path(sha256)
        return bool(self._fs.exists(path)) and int(self._fs.size(path)) == size_bytes

    def put(self, source: Path, sha256: str) -> None:
        """An object of the right size is taken as whole; one of another size is an upload that was cut, and is sent again."""
        if not self.has(sha256, source.stat().st_size):
            self._fs.makedirs(f"{self._root}/{sha256[:2]}", exist_ok=True)
            self._fs.put_file(str(source), self._path(sha256))

    def fetch(self, sha256: str, target: Path) -> None:
        self._fs.get_file(self._path(sha256), str(target))
        seal(target)

    def digest(self, sha256: str) -> str | None:
        path = self._path(sha256)
        if not self._fs.exists(path):
            return None
        with self._fs.open(path, "rb") as file:
            return _sha256_of_stream(file)

    def delete(self, sha256: str) -> None:
        if self._fs.exists(self._path(sha256)):
            self._fs.rm_file(self._path(sha256))

    def all(self) -> Iterator[tuple[str, int]]:
        if not self._fs.exists(self._root):
            return
        for path, details in sorted(self._fs.find(self._root, detail=True).items()):
            name = path.rpartition("/")[2]
            if len(name) == 64:
                yield name, int(details["size"])


def open_blobs(root: Path, url: str | None) -> Blobs:
    """The blob store of a hub at `root`: its own directory, or what `url` names."""
    return LocalBlobs(root / "blobs" / "sha256") if url is None else FsspecBlobs(url)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return _sha256_of_stream(file)


def _sha256_of_stream(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def copy_and_hash(source: Path, target: Path, halfway: Callable[[], None] = lambda: None) -> tuple[str, int]:
    """Copy to a new read-only file, hash on the way, fsync; returns (sha256, bytes). One read, so the hash is of exactly what was stored.

    `halfway` is called with the last chunk not yet written: tests fail there.
    """
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if len(chunk) < CHUNK_BYTES:
                writer.flush()
                halfway()
            writer.write(chunk)
    seal(target)
    return digest.hexdigest(), size


def seal(path: Path) -> None:
    """fsync a finished file and make it read-only."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(0o444)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link, or copy where the file system has no links; `target` must not exist."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)
        seal(target)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Systems that cannot open a directory have no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn a refused write into StorageError; every other OSError passes as it is."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: ("the disk is full", "free some space (atoll hub gc removes what no version uses) and run the command again"),
            errno.EDQUOT: ("the disk quota is used up", "free some space (atoll hub gc removes what no version uses) and run the command again"),
            errno.EROFS: ("the file system is read-only", "choose a writable place with ATOLL_HOME"),
            errno.EACCES: ("permission denied", "check who owns the folder, or choose another place with ATOLL_HOME"),
            errno.EPERM: ("operation not permitted", "check who owns the folder, or choose another place with ATOLL_HOME"),
            errno.EFBIG: ("the file would be larger than this system allows", "raise the limit (ulimit -f)"),
        }
        if error.errno not in reasons:
            raise
        why, hint = reasons[error.errno]
        where = f" ({error.filename})" if error.filename else ""
        raise StorageError(f"{action}: {why}{where}; nothing was changed", hint=hint) from error
