"""Where an adapter may come from: our hub, a folder of this machine, the Hugging Face hub, an object store.

A source does two things, both in a worker thread. `locate` says what a reference means now: a canonical name (what allow-lists are matched against),
an identity (equal identities have equal content), and a size, looked at before anything is read. `fetch` gives a folder that nobody changes, and the
digest of its content. Files from elsewhere are copied before they are checked, so what was checked is what is served.

Used by lookups.py, which finds, and registry.py, which fetches. The far sources are in far_sources.py.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atoll.errors import AdapterFormatError, AdapterNotFound, AtollError, ConfigError, EngineError, HubError, IntegrityError
from atoll.model.adapter_files import CONFIG_FILE, MANIFEST_FILE, PICKLE_SUFFIXES, WEIGHTS_FILE
from atoll.serving.entries import SourceRefused

if TYPE_CHECKING:
    from atoll.hub.store import Hub

FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)
MAX_TEXT_BYTES = 1 << 20  # of adapter_config.json and manifest.json
MAX_ID_CHARS = 512
_PLAIN = re.compile(r"[A-Za-z0-9_@+=,~ .-]+")  # of a folder's name: it comes back in headers and logs


@dataclass(frozen=True)
class Reference:
    """What a request named: an id, perhaps a revision, and the token to use for this one download."""

    adapter_id: str
    revision: str | None = None
    token: str | None = None

    @property
    def shown(self) -> str:
        """The id as an error message may hold it."""
        return self.adapter_id if len(self.adapter_id) <= 120 else self.adapter_id[:117] + "..."


@dataclass(frozen=True)
class Located:
    """What a reference means now. digest is None while only reading can tell it; detail is the source's own. version: for people, such as dates@2."""

    source: str
    name: str
    version: str
    identity: str
    digest: str | None
    num_bytes: int
    detail: Any


class Source(Protocol):
    """One kind of place. `far`: reaching it may take long. `ttl_s`: how long a location may be believed while `stamp` stays the same."""

    name: str
    far: bool
    ttl_s: float

    def stamp(self, reference: Reference) -> object:
        """Something cheap that changes when a location may have changed; called on the event loop."""
        ...

    def name_of(self, reference: Reference) -> str | None:
        """The canonical name, as far as the text alone tells it: nothing is looked up, so it takes the same time whether the adapter exists."""
        ...

    def locate(self, reference: Reference) -> Located:
        """Raises AdapterNotFound, or what the place says."""
        ...

    def fetch(self, located: Located, scratch: Path, token: str | None) -> tuple[Path, str]:
        """(folder, digest of its content); whatever is copied goes into the empty folder `scratch`. token: the request's, for this fetch only."""
        ...


class HubSource:
    """Our hub. A version is its digest, and its folder never changes: nothing is copied, but it is hashed at each load, for disks forget."""

    name, far, ttl_s = "hub", False, 1.0

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        index = hub.root / "hub.db"
        self._files = (index, index.with_name("hub.db-wal"))

    def stamp(self, reference: Reference) -> object:
        """Size and time of the index and its log: whoever publishes, here or in another process, changes them."""
        return tuple(_stamp_of(path) for path in self._files)

    def name_of(self, reference: Reference) -> str | None:
        from atoll.hub.names import parse_reference

        try:
            return parse_reference(self._text(reference)).name
        except HubError as error:
            raise AdapterNotFound(error.message, hint=error.hint) from None

    def locate(self, reference: Reference) -> Located:
        version = self._hub.resolve(self._text(reference))
        return Located(self.name, version.name, version.ref, version.digest, version.digest, version.size_bytes, version)

    def fetch(self, located: Located, scratch: Path, token: str | None) -> tuple[Path, str]:
        folder = self._hub.path(located.detail)
        if folder_digest(folder) != located.identity:  # 14 ms for 20 MB; a flipped bit would be a wrong answer that nobody sees
            raise IntegrityError(
                f"{located.version}: what the hub has stored is not what was published",
                hint="`atoll hub verify` says more; publish it again to repair it",
            )
        return folder, located.identity

    @staticmethod
    def _text(reference: Reference) -> str:
        """The reference in the hub's words; a revision is a number or a tag."""
        if not reference.revision:
            return reference.adapter_id
        return (
            f"{reference.adapter_id}{'@' if reference.revision.isdecimal() or reference.revision.startswith('sha256:') else ':'}{reference.revision}"
        )


class LocalSource:
    """Folders below one root. Their content is their identity: a folder whose files changed is another adapter."""

    name, far, ttl_s = "local", False, 0.5

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        if not self.root.is_dir():
            raise ConfigError(f"local_root is {str(root)!r}, which is no folder", hint="give a folder that is there, or leave it out")

    def stamp(self, reference: Reference) -> object:
        return None

    def name_of(self, reference: Reference) -> str | None:
        return "local:" + self._relative(reference).as_posix()

    def locate(self, reference: Reference) -> Located:
        relative = self._relative(reference)
        folder = self.folder(reference)
        sizes = {name: found for name in FILES if (found := self._plain_file(folder / name, f"local:{relative.as_posix()}")) is not None}
        name = f"local:{relative.as_posix()}"
        check_files({file: found.st_size for file, found in sizes.items()}, [path.name for path in folder.iterdir()], name)
        signature = ";".join(f"{file}:{found.st_size}:{found.st_mtime_ns}:{found.st_ino}" for file, found in sizes.items())
        return Located("local", name, name, f"{name};{signature}", None, sum(found.st_size for found in sizes.values()), folder)

    def fetch(self, located: Located, scratch: Path, token: str | None) -> tuple[Path, str]:
        for name in FILES:
            if self._plain_file(located.detail / name, located.name) is not None:
                handle = os.open(located.detail / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
                with os.fdopen(handle, "rb") as reader:
                    copy_capped(reader, scratch / name, located.num_bytes)
        return scratch, folder_digest(scratch)

    def folder(self, reference: Reference) -> Path:
        """The folder itself, no link on the way to it. Raises AdapterNotFound."""
        folder = self.root
        for part in self._relative(reference).parts:
            folder = folder / part
            if folder.is_symlink() or not folder.is_dir():
                raise self._missing(reference)
        return folder

    def _relative(self, reference: Reference) -> Path:
        """The path below the root, from the text alone. Raises AdapterNotFound for one that leads elsewhere."""
        path = Path(reference.adapter_id.removeprefix("local:"))
        if path.is_absolute():
            if not path.is_relative_to(self.root):
                raise self._missing(reference)
            path = path.relative_to(self.root)
        if not path.parts or any(not _PLAIN.fullmatch(part) or part.startswith(".") for part in path.parts):
            raise self._missing(reference)
        return path

    @staticmethod
    def _plain_file(path: Path, name: str) -> os.stat_result | None:
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise AdapterFormatError(f"{name}: {path.name} is not a regular file", hint="links are not followed: copy the file into the folder")
        return found

    @staticmethod
    def _missing(reference: Reference) -> AdapterNotFound:
        return AdapterNotFound(f"no adapter folder {reference.shown!r} below the server's local root", hint="name a folder relative to it")


# ---- shared by all but the hub ----


def check_files(sizes: dict[str, int], names: list[str], where: str) -> None:
    """Raise AdapterFormatError unless these are the files of an adapter, none oversized. `names`: whatever else is there."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if file not in sizes:
            pickles = sorted(name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES)
            if pickles and file == WEIGHTS_FILE:
                raise AdapterFormatError(
                    f"{where} holds its weights as a pickle ({pickles[0]}), which can run code when it is read",
                    hint=f"save the adapter as {WEIGHTS_FILE} (PEFT: save_pretrained(..., safe_serialization=True))",
                )
            raise AdapterFormatError(f"{where} has no {file}", hint=f"an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}")
    for file in (CONFIG_FILE, MANIFEST_FILE):
        if sizes.get(file, 0) > MAX_TEXT_BYTES:
            raise AdapterFormatError(f"{where}: {file} has {sizes[file]} bytes; the limit is {MAX_TEXT_BYTES}")


def check_size(located: Located, limit: int) -> None:
    """Raise AdapterFormatError if an adapter is larger than the server takes."""
    if located.num_bytes > limit:
        raise AdapterFormatError(
            f"{located.name} has {located.num_bytes:,} bytes; this server takes adapters of {limit:,}",
            hint="the operator can raise the limit",
        )


def copy_capped(reader: Any, target: Path, limit: int) -> None:
    """Copy a stream to a new file; EngineError if it grew beyond what was announced."""
    written = 0
    with target.open("xb") as writer:
        while chunk := reader.read(1 << 20):
            written += len(chunk)
            if written > limit:
                raise EngineError(f"{target.name} grew while it was read", hint="ask again when whoever writes it is done")
            writer.write(chunk)


def folder_digest(folder: Path) -> str:
    """The digest of an adapter's files, as the hub computes a version's."""
    from atoll.hub.blobs import sha256_of
    from atoll.hub.intake import StoredFile, version_digest

    return version_digest(StoredFile(path.name, sha256_of(path), path.stat().st_size) for path in sorted(folder.iterdir()))


def refused(source: str, adapter_id: str) -> AtollError:
    """The error for a source that does not exist, in the words that LoRAX's clients know."""
    return SourceRefused(
        f"Invalid source '{source[:40]}' when downloading adapter '{adapter_id[:120]}'", hint="sources are hub, local, hf, s3 and pbase"
    )


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size) if found.st_size else None  # an empty log is as good as none
