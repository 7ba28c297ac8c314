"""What survives a restart: the adapters that an operator pinned, and the names that were given to adapters of other sources.

One small file a base, under its fingerprint, so that a server of another base never meets it. Changes are read, made and written under a lock:
two servers of one base share the file and lose nothing of each other's.

Used by operator.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from pydantic import Field

from atoll.config import Section, atoll_home
from atoll.errors import ConfigError
from atoll.files import write_file
from atoll.serving.entries import AdapterRef

if TYPE_CHECKING:
    from atoll.model.base import Base

_AGAIN = "delete it; what was pinned has to be pinned again"


class Remembered(Section):
    """An adapter by how it was named: an alias stays one, so that a newer version takes its place. Tokens are never kept."""

    adapter_id: str = Field(min_length=1, description="What the operator wrote.")
    source: str | None = Field(default=None, description="Where it comes from; null is the hub.")
    revision: str | None = Field(default=None, description="Version, tag or commit, if one was named.")

    @classmethod
    def of(cls, ref: AdapterRef) -> Remembered:
        return cls(adapter_id=ref.adapter_id or "", source=ref.source, revision=ref.revision)

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.adapter_id, self.source, revision=self.revision)


class State(Section):
    """The whole file."""

    base: str = Field(default="", description="The base's name, for people.")
    pinned: tuple[Remembered, ...] = Field(default=(), description="Adapters to load and pin when the server starts.")
    names: dict[str, Remembered] = Field(default_factory=dict, description="Names that requests may use for adapters of other sources.")


class StateFile:
    """The state of servers of one base. Its methods block for a moment: call them in a thread."""

    def __init__(self, base: Base, home: Path | None = None) -> None:
        self.path = (home or atoll_home()) / "serving" / f"{base.fingerprint.digest}.json"
        self._base_name = base.name

    def read(self) -> State:
        """What is kept; nothing at first. Raises ConfigError for a file that we did not write so."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State(base=self._base_name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} cannot be read: {error}", hint=_AGAIN) from error
        if not isinstance(found, dict):
            raise ConfigError(f"{self.path} holds a {type(found).__name__}, expected an object", hint=_AGAIN)
        try:
            return State(**found)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error.message}", hint=_AGAIN) from None

    def change(self, how: Callable[[State], State]) -> None:
        """Replace the state by what `how` makes of it. Raises ConfigError as `read` does, StorageError where the disk refuses."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            before = self.read()
            after = how(before)
            if after != before:
                write_file(self.path, json.dumps(after.model_dump(mode="json"), indent=2) + "\n")

    def pin(self, ref: AdapterRef) -> None:
        """Remember a pinned adapter."""
        one = Remembered.of(ref)
        self.change(lambda state: state if one in state.pinned else _with(state, pinned=(*state.pinned, one)))

    def unpin(self, ref: AdapterRef) -> None:
        """Forget it."""
        one = Remembered.of(ref)
        self.change(lambda state: _with(state, pinned=tuple(other for other in state.pinned if other != one)))

    def name(self, name: str, ref: AdapterRef | None) -> None:
        """Remember what a name means, or (None) forget it."""

        def how(state: State) -> State:
            left = {known: other for known, other in state.names.items() if known.casefold() != name.casefold()}
            return _with(state, names=left if ref is None else {**left, name: Remembered.of(ref)})

        self.change(how)


def _with(state: State, **changes: object) -> State:
    return state.model_copy(update=changes)
