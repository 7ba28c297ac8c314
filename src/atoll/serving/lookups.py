"""From what a request wrote to one adapter: sources in order, allow-lists, and answers kept while they are true.

The one idea: whether a caller may use a name is decided before anything is looked up, from the text alone where the text tells it. What exists and is
forbidden is answered in the same words, and after the same work, as what does not exist, so a key learns nothing of adapters that are not its own.

Used by registry.py. Looking up happens in worker threads; answers are kept while the source's stamp is unchanged, for a second or so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import AdapterNotFound, AtollError, EngineError, QueueFull, RequestRefused
from atoll.serving.entries import AdapterRef, SourceRefused, fresh
from atoll.serving.far_sources import HuggingFaceSource, StoreSource
from atoll.serving.keys import Caller
from atoll.serving.sources import MAX_ID_CHARS, HubSource, LocalSource, Located, Reference, Source, refused
from atoll.serving.workers import Workers

if TYPE_CHECKING:
    from atoll.hub.store import Hub
    from atoll.serving.config import ServeConfig

MAX_LOOKUPS = 8192  # names whose meaning is kept
SOURCES = ("hub", "local", "s3", "hf", "pbase")

_log = logging.getLogger(__name__)


@dataclass
class _Lookup:
    """What a reference meant, or why it meant nothing, and as of when."""

    stamp: object
    at: float
    located: Located | None
    error: AtollError | None


@dataclass(frozen=True)
class Alias:
    """A name that the operator gave to an adapter of another source."""

    name: str
    ref: AdapterRef


class Lookups:
    """The sources of one server. aliases: by casefolded name, for names are one whatever their case."""

    def __init__(self, config: ServeConfig, hub: Hub | None) -> None:
        self._config = config
        self._sources: dict[str, Source] = {}
        if hub is not None:
            self._sources["hub"] = HubSource(hub)
        if config.local_root is not None:
            self._sources["local"] = LocalSource(config.local_root)
        if config.s3_prefixes:
            self._sources["s3"] = StoreSource(config.s3_prefixes)
        if config.allow_hf:
            self._sources["hf"] = HuggingFaceSource()
        self.aliases: dict[str, Alias] = {}
        self.meant: dict[str, str] = {}  # by casefolded alias, the identity that it meant when it was last looked up
        self._kept: dict[tuple[str, Reference], _Lookup] = {}
        self._looking: dict[object, asyncio.Task[_Lookup]] = {}
        self._generation = 0  # of what is believed; a lookup of an older one is not joined
        self._near = Workers(4, "atoll-lookup")
        self._far = Workers(4, "atoll-lookup-far")

    def source(self, name: str) -> Source:
        """The source that something was located in."""
        return self._sources[name]

    def forget(self) -> None:
        """Look every name up again at its next request, also those that are being looked up just now."""
        self._generation += 1
        self._kept.clear()

    def alias(self, name: str) -> Alias | None:
        """What the operator gave this name to."""
        return self.aliases.get(name.casefold())

    async def locate(self, ref: AdapterRef, caller: Caller) -> tuple[Located, str]:
        """What `ref` means now, and its canonical name; nothing is loaded. Raises AdapterNotFound as `open` does.

        A caller with an allow-list is refused by name before anything is looked up: what exists but is forbidden is answered in the same words, and
        after the same work, as what does not exist.
        """
        asked = ref.adapter_id or ""
        alias = self.alias(asked) if (ref.source or "hub").casefold() in ("hub", "pbase") else None
        if alias is not None:
            if not caller.allows(alias.name):
                raise _missing(asked)
            if ref.revision is not None:
                raise RequestRefused(f"{asked!r} is a name that was given to one adapter; it has no revisions", hint="leave revision out")
            located, _ = await self.locate(replace(alias.ref, token=ref.token), Caller())
            self.meant[asked.casefold()] = located.identity
            return located, alias.name
        missing: AdapterNotFound | None = None
        for source in self._sources_of(ref):
            try:
                located = await self._locate_in(source, Reference(asked, ref.revision, ref.token if source.name == "hf" else None), caller)
                return located, located.name
            except AdapterNotFound as error:
                missing = missing or error
        assert missing is not None
        raise missing if caller.adapters is None else _missing(asked)

    def local_folder(self, path: str, caller: Caller) -> Path:
        """The folder of an adapter of the local source. Raises AdapterNotFound, or SourceRefused while that source is off."""
        [source] = self._sources_of(AdapterRef(path, "local"))
        assert isinstance(source, LocalSource)
        reference = Reference(path)
        if not caller.allows(str(source.name_of(reference))):
            raise _missing(path)
        return source.folder(reference)

    # ---- inside ----

    def _sources_of(self, ref: AdapterRef) -> list[Source]:
        """Where to look, in order. Raises SourceRefused for a source that does not exist or is off."""
        asked = ref.adapter_id or ""
        if len(asked) > MAX_ID_CHARS:
            raise _missing(asked)
        name = (ref.source or "hub").casefold()
        if name not in SOURCES:
            raise refused(ref.source or "", asked)
        names = {"hub": ["hub", "hf"], "pbase": ["hub"]}.get(name, [name])
        if name == "hub":  # names as lists show them say where they are from
            if asked.startswith("hf:"):
                names = ["hf"]
            elif "://" in asked:
                names = ["s3"]
            elif asked.startswith("local:"):  # a hub's adapter may be called local, and have tags
                names = ["local", "hub"]
        found = [self._sources[name] for name in names if name in self._sources]
        if not found:
            raise SourceRefused(
                f"adapter source {names[0]!r} is off on this server", hint="the operator turns it on: --local-root, --allow-hf, --s3-prefix"
            )
        return found

    async def _locate_in(self, source: Source, reference: Reference, caller: Caller) -> Located:
        name = source.name_of(reference)
        if name is not None and not caller.allows(name):
            raise _missing(reference.adapter_id)
        lookup = await self._look_up(source, reference)
        if lookup.located is not None and caller.allows(lookup.located.name):
            return lookup.located
        if lookup.error is not None and caller.allows(name or " "):
            raise fresh(lookup.error)
        raise _missing(reference.adapter_id)

    async def _look_up(self, source: Source, reference: Reference) -> _Lookup:
        key = (source.name, _keyed(reference))
        stamp, now = source.stamp(reference), time.monotonic()
        kept = self._kept.get(key)
        if kept is not None and kept.stamp == stamp:
            ttl_s = source.ttl_s if kept.error is None else min(source.ttl_s, self._config.negative_cache_s)
            if now - kept.at < ttl_s:
                return kept
        generation = self._generation
        running = (key, stamp, generation)
        task = self._looking.get(running)
        if task is None:
            if len(self._looking) >= self._config.max_loading:
                raise QueueFull(f"{len(self._looking)} adapters are being looked up already", hint="try again later")
            task = self._looking[running] = asyncio.create_task(self._ask(source, reference, stamp))
            task.add_done_callback(lambda _: self._looking.pop(running, None))
        lookup = await asyncio.shield(task)
        if generation != self._generation:
            return lookup  # true for this request, which began before; not for those to come
        self._kept.pop(key, None)
        self._kept[key] = lookup
        while len(self._kept) > MAX_LOOKUPS:
            self._kept.pop(next(iter(self._kept)))
        return lookup

    async def _ask(self, source: Source, reference: Reference, stamp: object) -> _Lookup:
        """One lookup. What does not exist is an answer too, and kept like one."""
        at = time.monotonic()
        workers = self._far if source.far else self._near
        try:
            located = await workers.run(partial(source.locate, reference), self._config.load_timeout_s, f"looking up {reference.shown!r}")
        except AtollError as error:
            return _Lookup(stamp, at, None, error)
        except Exception as error:
            _log.exception("looking up %s in %s", reference.shown, source.name)
            return _Lookup(stamp, at, None, EngineError(f"{reference.shown!r} could not be looked up: {type(error).__name__}"))
        return _Lookup(stamp, at, located, None)


def _keyed(reference: Reference) -> Reference:
    """The reference as a key: the token's hash stands for the token, so that whoever has another one is checked again."""
    return replace(reference, token=hashlib.sha256(reference.token.encode("utf-8", "surrogatepass")).hexdigest() if reference.token else None)


def _missing(asked: str) -> AdapterNotFound:
    """The one answer for what is not there and for what a caller may not see."""
    shown = asked if len(asked) <= 120 else asked[:117] + "..."
    return AdapterNotFound(f"no adapter {shown!r} here", hint="GET /adapters lists those that you may use")
