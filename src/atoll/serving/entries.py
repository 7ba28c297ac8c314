"""What the registry knows of one adapter: its content, its state, who uses it, and its counts.

Plain values, changed on the event loop only. Used by registry.py and the service; the management routes and metrics read them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from atoll.errors import AtollError, EngineError

if TYPE_CHECKING:
    from atoll.data.prompt import PromptFormat
    from atoll.engine.request import Completion
    from atoll.model.adapter import Adapter
    from atoll.serving.loading import Loaded
    from atoll.serving.merging import MergeSpec
    from atoll.serving.sources import Located

State = Literal["known", "loading", "ready", "failed"]
MAX_BACKOFF_S = 300.0


class Unavailable(EngineError):
    """The server is starting, stopping or broken: this request may do better elsewhere, or later."""


class InUse(EngineError):
    """An adapter cannot be unloaded now: requests use it, or it is pinned."""


class TimedOut(EngineError):
    """A request took longer than a request may."""


class SourceRefused(EngineError):
    """An adapter's source does not exist or is off on this server: asking again changes nothing."""


@dataclass(frozen=True)
class AdapterRef:
    """What a request says of its adapter: an id (None or "": the base, or the server's default), or several to merge, and where they come from."""

    adapter_id: str | None = None
    source: str | None = None
    merged: MergeSpec | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Served:
    """An adapter that a request may use now, or the base. key: what the engine knows it by (its digest), None for the base.

    name is canonical, ids are those that the client wrote, version is for people (dates@2). labels: the closed set of answers of its task.
    """

    key: str | None
    name: str
    ids: tuple[str, ...] = ()
    source: str = ""
    version: str = ""
    prompt: PromptFormat | None = None
    stop_token_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] | None = None


@dataclass
class Counters:
    """Since the server started."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    errors: int = 0
    first_token_s: float = 0.0  # sum over first_tokens requests
    first_tokens: int = 0
    loads: int = 0
    load_s: float = 0.0
    evictions: int = 0

    def count(self, completion: Completion) -> None:
        """Add a finished request."""
        self.requests += 1
        self.prompt_tokens += completion.num_prompt_tokens
        self.generated_tokens += len(completion.token_ids)
        self.errors += completion.finish_reason == "error"
        if completion.timing.first_token_s is not None:
            self.first_token_s += completion.timing.first_token_s
            self.first_tokens += 1


@dataclass(frozen=True)
class Traits:
    """What can be told of an adapter once it was read, also after it was unloaded. kind: "lora", "reft", "lora+reft" or "composed"."""

    kind: str
    base: str
    rank: int
    num_parameters: int

    @classmethod
    def of(cls, adapter: Adapter) -> Traits:
        """An adapter's, as the hub would record them."""
        kind = "composed" if adapter.manifest.get("kind") == "composed" else adapter.spec.kind
        return cls(kind, adapter.spec.base, adapter.spec.rank, adapter.num_parameters)


@dataclass
class Entry:
    """One content (digest) that was loaded at least once, from where `located` says.

    loaded is None when it was unloaded since; holds counts the requests that use it.
    """

    key: str
    loaded: Loaded | None
    located: Located
    traits: Traits
    holds: int = 0
    pinned: bool = False
    last_used: float = field(default_factory=time.time)
    counters: Counters = field(default_factory=Counters)

    @property
    def name(self) -> str:
        return self.located.name

    @property
    def version(self) -> str:
        return self.located.version

    @property
    def source(self) -> str:
        return self.located.source

    @property
    def num_bytes(self) -> int:
        return 0 if self.loaded is None else self.loaded.num_bytes

    @property
    def is_idle(self) -> bool:
        return self.loaded is not None and self.holds == 0 and not self.pinned

    def served(self, ids: tuple[str, ...], name: str, source: str, version: str) -> Served:
        """The entry as one request sees it: under the name that it used, which may be one of several for this content."""
        loaded = self.loaded
        assert loaded is not None, "only a loaded adapter is served"
        return Served(self.key, name, ids, source, version, loaded.prompt, loaded.stop_token_ids, loaded.labels)


@dataclass
class Failure:
    """Why something could not be loaded, and until when it is not tried again (time.monotonic)."""

    error: AtollError
    until: float
    times: int = 1

    @classmethod
    def after(cls, before: Failure | None, error: AtollError, first_s: float, now: float) -> Failure:
        """Each failure in a row doubles the wait."""
        times = 1 if before is None else before.times + 1
        return cls(error, now + min(first_s * 2 ** min(times - 1, 30), MAX_BACKOFF_S), times)

    def raised(self) -> AtollError:
        """A fresh error of the same words: one exception object must not be raised twice."""
        return fresh(self.error)


@dataclass(frozen=True)
class AdapterInfo:
    """One line of the list of adapters. kind, rank and num_parameters are None while only reading the adapter can tell them.

    engine: what the engine says of it (resident, bytes, in_use, …) when it knows it.
    """

    name: str
    version: str
    digest: str | None
    source: str
    state: State
    base: str | None = None
    kind: str | None = None
    rank: int | None = None
    num_parameters: int | None = None
    num_bytes: int = 0
    pinned: bool = False
    holds: int = 0
    created: float = 0.0
    last_used: float | None = None
    task: str = ""
    description: str = ""
    parents: tuple[Mapping[str, Any], ...] = ()
    labels: tuple[str, ...] | None = None
    error: str = ""
    counters: Mapping[str, float] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for HTTP."""
        return {**asdict(self), "parents": [dict(parent) for parent in self.parents], "labels": None if self.labels is None else list(self.labels)}


def fresh(error: AtollError) -> AtollError:
    """A new exception with the same type and words."""
    copy = type(error)(error.message, hint=error.hint)
    copy.__dict__.update({key: value for key, value in error.__dict__.items() if not key.startswith("__")})
    return copy
