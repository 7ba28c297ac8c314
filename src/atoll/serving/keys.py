"""API keys: who asks, and what they may do.

A key is 256 random bits, so its plain sha256 is as good as a slow hash: there is nothing to guess. The file keeps hashes only; a key is shown once,
when it is made. The file is read again when it changes, so a key is revoked without a restart.

Used by the service (scopes, allow-lists, limits a key), http/auth.py and `atoll keys`. Imports no torch.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock
from pydantic import Field, field_validator

from atoll.config import Section
from atoll.errors import ConfigError, KeyRefused, NotAllowed
from atoll.files import write_file

Scope = Literal["infer", "publish", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "atoll_"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request. key_id "" is nobody in particular; adapters None allows every adapter, else only names that match a pattern."""

    key_id: str = ""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    adapters: tuple[str, ...] | None = None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes

    def require(self, scope: Scope) -> None:
        """Raise NotAllowed unless the key has the scope."""
        if scope not in self.scopes:
            raise NotAllowed(f"this key may not do this: it lacks the scope {scope!r}", hint="ask the operator for a key with it (atoll keys add)")

    def allows(self, adapter_name: str) -> bool:
        """Whether the caller may use and see the adapter of that canonical name. The base, "", is everybody's."""
        if self.adapters is None or adapter_name == "":
            return True
        name = adapter_name.casefold()  # the hub's names are one whatever their case
        return any(fnmatchcase(name, pattern.casefold()) for pattern in self.adapters)


EVERYBODY = Caller()  # a server of this machine alone, without a keys file


class KeyRecord(Section):
    """One key of the file."""

    id: str = Field(min_length=1, max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="What the key is called in logs and metrics.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the key, in hex.")
    scopes: tuple[Scope, ...] = Field(default=("infer",), min_length=1, description="What it may do: infer, publish, admin.")
    adapters: tuple[str, ...] | None = Field(default=None, description="Names or patterns (org_*) of the adapters it may use. null: all.")
    created: str = Field(default="", description="When it was made.")
    note: str = Field(default="", description="For people.")

    @field_validator("adapters")
    @classmethod
    def _no_empty_pattern(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not all(value):
            raise ValueError("a pattern is empty")
        return value

    @property
    def caller(self) -> Caller:
        return Caller(self.id, frozenset(self.scopes), self.adapters)


class KeyFile(Section):
    """The whole file."""

    keys: tuple[KeyRecord, ...] = Field(default=(), description="All keys.")

    @field_validator("keys")
    @classmethod
    def _one_of_a_name(cls, value: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        for what in ("id", "sha256"):
            found = [getattr(record, what) for record in value]
            if len(set(found)) < len(found):
                raise ValueError(f"two keys have the same {what}")
        return value


class Keys:
    """Tells callers by their keys. Without a file everybody is EVERYBODY."""

    def __init__(self, path: Path | None = None, *, allow_anonymous: bool = False) -> None:
        """Raises ConfigError if the file cannot be read or is not one of keys."""
        self._path, self._allow_anonymous = path, allow_anonymous
        self._seen: tuple[int, ...] | None = None
        self._records: tuple[tuple[bytes, Caller], ...] = ()
        if path is not None:
            self._seen = _signature(path)
            self._records = _compiled(read_keys(path))

    @property
    def required(self) -> bool:
        """Whether a request without a key is refused."""
        return self._path is not None and not self._allow_anonymous

    def caller(self, key: str | None) -> Caller:
        """Who has this key. Raises KeyRefused for an unknown one, and for none where one is required."""
        if self._path is None:
            return EVERYBODY
        self._reload(self._path)
        if key is None:
            if self._allow_anonymous:
                return Caller(scopes=frozenset({"infer"}))
            raise KeyRefused("this server asks for an API key, and the request has none", hint="send Authorization: Bearer KEY")
        digest = hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()
        found = None
        for known, caller in self._records:  # all of them, whichever matches
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise KeyRefused("this API key is not known here", hint="check it, or ask the operator for one (atoll keys add)")
        return found

    def again(self, caller: Caller) -> Caller:
        """What a caller of before may do now, for work that goes on after its request was answered. Raises KeyRefused if the key is gone."""
        if self._path is None:
            return EVERYBODY
        self._reload(self._path)
        for _, known in self._records:
            if known.key_id == caller.key_id:
                return known
        raise KeyRefused("the API key that asked for this is no longer known here", hint="ask again with a key of now")

    def _reload(self, path: Path) -> None:
        """Read the file again if it has changed. A file that is broken or gone changes nothing: the keys of before stay, and the log says so."""
        signature = _signature(path)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._records = _compiled(read_keys(path))
        except ConfigError as error:
            _log.error("the keys stay as they were: %s", error.message)


def read_keys(path: Path) -> KeyFile:
    """The keys of a JSON or YAML file. Raises ConfigError."""
    from atoll.yaml_file import read_yaml

    try:
        found = read_yaml(path).data  # JSON is YAML
    except ConfigError as error:
        raise ConfigError(f"the keys file cannot be read: {error.message}", hint="make one with `atoll keys add NAME`") from None
    try:
        return KeyFile(**found)
    except ConfigError as error:
        raise ConfigError(f"the keys file {path}: {error.message}", hint=error.hint) from None


def add_key(path: Path, key_id: str, scopes: Iterable[Scope] = ("infer",), adapters: Iterable[str] | None = None, note: str = "") -> str:
    """Make a key, enter its hash in the file (made if need be), and return the key: the only time that it is seen. Raises ConfigError."""
    key = PREFIX + secrets.token_urlsafe(32)
    record = KeyRecord(
        id=key_id,
        sha256=hashlib.sha256(key.encode()).hexdigest(),
        scopes=tuple(dict.fromkeys(scopes)),
        adapters=None if adapters is None else tuple(dict.fromkeys(adapters)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        note=note,
    )
    with _locked(path):
        known = read_keys(path).keys if path.exists() else ()
        if any(other.id == key_id for other in known):
            raise ConfigError(f"{path} has a key {key_id!r} already", hint=f"choose another name, or `atoll keys remove {key_id}` first")
        _write(path, (*known, record))
    return key


def remove_key(path: Path, key_id: str) -> None:
    """Take a key out; running servers refuse it from their next request on. Raises ConfigError if it is not there."""
    with _locked(path):
        known = read_keys(path).keys
        left = tuple(record for record in known if record.id != key_id)
        if len(left) == len(known):
            names = ", ".join(record.id for record in known) or "none"
            raise ConfigError(f"{path} has no key {key_id!r}", hint=f"there is: {names}")
        _write(path, left)


def _write(path: Path, records: Iterable[KeyRecord]) -> None:
    whole: Mapping[str, Any] = {"keys": [record.model_dump(mode="json") for record in records]}
    write_file(path, json.dumps(whole, indent=2) + "\n")
    path.chmod(0o600)


def _locked(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def _compiled(file: KeyFile) -> tuple[tuple[bytes, Caller], ...]:
    return tuple((bytes.fromhex(record.sha256), record.caller) for record in file.keys)


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)
