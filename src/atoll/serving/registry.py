"""Every adapter that requests may name: from a name to something the engine can run.

    known ──open──► loading (one load a content, in worker threads) ──► ready ──idle longest, beyond the bounds──► known
                        └──► failed until its wait is over; the next failure waits twice as long

The one idea: a name is looked up at every request, content is loaded once. A lookup is cheap (kept while the hub's index is unchanged), so a version
that anybody publishes is served from the next request on, while requests in flight keep the digest they began with. Everything here runs on the event
loop; blocking work is in Workers; the engine is reached through `run`. Nothing waits for anything but its own adapter.

Used by service.py.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.errors import AtollError, EngineError, QueueFull
from atoll.serving.entries import AdapterRef, Entry, Failure, InUse, Served, Traits, fresh
from atoll.serving.keys import Caller
from atoll.serving.loading import Loaded, Loader
from atoll.serving.lookups import Lookups
from atoll.serving.sources import Located, Source, check_size
from atoll.serving.workers import Turns, Workers

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.hub.store import Hub
    from atoll.model.base import Base
    from atoll.serving.config import ServeConfig
    from atoll.serving.merging import MergeSpec
    from atoll.serving.observer import Observer

T = TypeVar("T")
Run = Callable[[Callable[["Engine"], T]], Awaitable[T]]

BASE_IDS = ("base", "__base_model__")  # beside the base's own name, in any case; hub names they cannot be
MAX_KEPT = 8192  # contents and failures that are remembered
JUST_OPENED_S = 2.0  # a request that opened an adapter holds it only once it is queued: until then it must not leave

_log = logging.getLogger(__name__)


class AdapterRegistry:
    """Opens adapters for requests. `run` executes on the engine's thread between two steps."""

    def __init__(self, base: Base, config: ServeConfig, hub: Hub | None, run: Any, observers: Sequence[Observer]) -> None:
        self._base, self._config, self._run, self._observers = base, config, run, observers
        self.loader = Loader(base, ignore_quantization=config.ignore_quantization)
        self.lookups = Lookups(config, hub)
        self._keys: dict[str, str] = {}  # identity of a located adapter -> digest of its content
        self._loading: dict[str, asyncio.Task[Entry]] = {}  # by identity
        self.entries: dict[str, Entry] = {}  # by digest, the one idle longest first
        self.failures: dict[str, Failure] = {}  # by identity
        self._near = Workers(config.load_workers, "atoll-load")
        self._merging = Workers(1, "atoll-merge")  # a merge is arithmetic for seconds: loads must not wait for it
        self._turns, self._merges = Turns(config.loads_per_key), Counter[str]()  # by key
        self._far = Workers(config.load_workers, "atoll-fetch")
        self._base_names = frozenset(name.casefold() for name in (base.name, *BASE_IDS))
        self.base_served = Served(None, base.name, (), "", base.name)

    # ---- for requests ----

    async def open(self, ref: AdapterRef, caller: Caller) -> Served:
        """The adapter that `ref` means, ready for the engine; or the base.

        Raises AdapterNotFound (also for one that the caller may not use), QueueFull, and what loading it raises, see errors.py.
        """
        if ref.merged is not None:
            return await self._open_merged(ref, ref.merged, caller)
        asked = ref.adapter_id or self._config.default_adapter
        if not asked or self.is_base(asked):
            return self.base_served
        located, name = await self.lookups.locate(replace(ref, adapter_id=asked), caller)
        entry = await self.ready(located, ref.token, caller.key_id)
        return entry.served((asked,), name, located.source, located.version)

    def is_base(self, name: str) -> bool:
        """Whether requests mean the base by this name, whatever adapters there are."""
        return name.casefold() in self._base_names

    async def ready(self, located: Located, token: str | None = None, key_id: str = "") -> Entry:
        """The entry of a located adapter, loaded and registered with the engine; several who ask wait for one load.

        token: for fetching it. key_id: whose load it is, if it has to be loaded.
        """
        entry = self.entries.get(self._keys.get(located.identity, ""))
        while entry is None or entry.loaded is None:  # again if it was unloaded between the load's end and our turn
            entry = await self._load_once(located.identity, partial(self._fetch, located, token, key_id), located)
        self._touch(entry)
        return entry

    def is_ready(self, key: str | None) -> bool:
        """Whether a request for this key can be queued. Keys that the registry does not know are the engine's business."""
        entry = self.entries.get(key or "")
        return entry is None or entry.loaded is not None

    async def again(self, key: str) -> None:
        """Load an adapter that was unloaded after a request opened it. Raises what loading raises, EngineError for a merged one."""
        located = self.entries[key].located
        if located.source == "merged":
            raise EngineError(f"{located.name} was unloaded while this request began", hint="ask again")
        await self.ready(located)

    def hold(self, key: str | None) -> None:
        """One more request uses the adapter: it stays registered until `release`. Keys that the registry does not know are the engine's business."""
        entry = self.entries.get(key or "")
        if entry is not None:
            entry.holds += 1
            self._touch(entry)

    def release(self, key: str | None) -> None:
        """One request less."""
        entry = self.entries.get(key or "")
        if entry is not None:
            entry.holds -= 1
            entry.last_used = time.time()

    # ---- for operators ----

    async def unload(self, entry: Entry) -> None:
        """Let the engine forget an adapter; the next request loads it again. Raises InUse while requests use it, or it is pinned."""
        if entry.pinned:  # asked here, behind all waiting, for it may have been pinned meanwhile
            raise InUse(f"{entry.version} is pinned", hint="unpin it first")
        if entry.holds:
            raise InUse(f"{entry.version} is in use by {entry.holds} request(s)", hint="wait until they end, or give wait_s")
        loaded, entry.loaded = entry.loaded, None  # from here on a new request loads it again
        if loaded is None:
            return
        try:
            await self._run(partial(_unregister, entry.key))
        except AtollError:
            if entry.loaded is None:
                entry.loaded = loaded
            raise

    def forget(self, located: Located | None = None) -> None:
        """Look names up again at their next request; and try again what could not be loaded (`located`, or everything)."""
        self.lookups.forget()
        if located is None:
            self.failures.clear()
        else:
            self.failures.pop(located.identity, None)

    def key_of(self, identity: str) -> str | None:
        """The digest of what was loaded for an identity."""
        return self._keys.get(identity)

    def name_of(self, key: str | None) -> str:
        """What the adapter of a key is called; "" for the base."""
        entry = self.entries.get(key or "")
        return "" if key is None else entry.name if entry is not None else key

    def is_loading(self, identity: str) -> bool:
        return identity in self._loading

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    # ---- content ----

    async def _load_once(self, identity: str, load: Callable[[], Awaitable[Loaded]], located: Located, merging_for: str | None = None) -> Entry:
        """merging_for: whose merge it is; a key has few at once."""
        failure = self.failures.get(identity)
        if failure is not None and time.monotonic() < failure.until:
            raise failure.raised()
        task = self._loading.get(identity)
        if task is None:
            if len(self._loading) >= self._config.max_loading:
                raise QueueFull(f"{len(self._loading)} adapters are being loaded already", hint="try again later", retry_after_s=2)
            if merging_for is not None and self._merges[merging_for] >= (most := self._config.loads_per_key):
                raise QueueFull(f"{most} merges of this key are being computed already", hint="wait until some are", retry_after_s=2)
            task = self._loading[identity] = asyncio.create_task(self._load(identity, load, located))
            task.add_done_callback(partial(self._loaded, identity, merging_for))
            self._merges += Counter() if merging_for is None else Counter((merging_for,))
        return await asyncio.shield(task)

    def _loaded(self, identity: str, merging_for: str | None, task: asyncio.Task[Entry]) -> None:
        self._loading.pop(identity, None)
        if merging_for is not None:
            self._merges -= Counter((merging_for,))  # a key that has none left is no longer in it
        if not task.cancelled():
            task.exception()  # seen: whoever asked may have gone

    async def _load(self, identity: str, load: Callable[[], Awaitable[Loaded]], located: Located) -> Entry:
        """Load, register, enter; or remember why not."""
        started = time.monotonic()
        try:
            loaded = await load()
            entry = await self._enter(loaded, located)
        except QueueFull:
            raise
        except Exception as problem:
            error = (
                problem
                if isinstance(problem, AtollError)
                else EngineError(f"{located.name} could not be loaded: {type(problem).__name__}: {problem}")
            )
            if error is not problem:
                _log.exception("loading %s", located.name)
            now = time.monotonic()
            self.failures[identity] = Failure.after(self.failures.get(identity), error, self._config.negative_cache_s, now)
            while len(self.failures) > MAX_KEPT:
                self.failures.pop(next(iter(self.failures)))
            for observer in self._observers:
                observer.load_failed(located.name, located.source, error)
            raise fresh(error) from problem
        self.failures.pop(identity, None)
        self._keys[identity] = loaded.digest
        while len(self._keys) > MAX_KEPT:
            self._keys.pop(next(iter(self._keys)))
        seconds = time.monotonic() - started
        entry.counters.loads += 1
        entry.counters.load_s += seconds
        for observer in self._observers:
            observer.loaded(entry.name, entry.source, seconds)
        await self._make_room()
        return entry

    async def _fetch(self, located: Located, token: str | None, key_id: str) -> Loaded:
        check_size(located, self._config.max_adapter_bytes)
        source = self.lookups.source(located.source)
        workers = self._far if source.far else self._near
        async with self._turns.of(key_id):
            return await workers.run(partial(self._read, source, located, token), self._config.load_timeout_s, f"loading {located.name}")

    def _read(self, source: Source, located: Located, token: str | None) -> Loaded:
        """In a worker thread."""
        with tempfile.TemporaryDirectory(prefix="atoll-adapter-", ignore_cleanup_errors=True) as scratch:
            folder, digest = source.fetch(located, Path(scratch), token)
            return self.loader.load(folder, digest, located.version)  # tensors stay mapped when the files are gone

    async def _enter(self, loaded: Loaded, located: Located) -> Entry:
        entry = self.entries.get(loaded.digest)
        if entry is not None and entry.loaded is not None:
            return entry  # the same content came from another place
        await self._run(partial(_register, loaded))
        entry = self.entries.get(loaded.digest)
        if entry is None:
            entry = self.entries[loaded.digest] = Entry(loaded.digest, loaded, located, Traits.of(loaded.adapter))
        entry.loaded = loaded
        self._touch(entry)
        return entry

    async def _make_room(self) -> None:
        """Unregister adapters, idle longest first, beyond the bounds; and forget what is known of the longest gone."""
        config = self._config
        await self._shrink([entry for entry in self.entries.values() if entry.source == "merged"], config.max_registered, config.merged_bytes)
        await self._shrink(list(self.entries.values()), config.max_registered, config.registered_bytes)
        gone = [entry.key for entry in self.entries.values() if entry.loaded is None and not entry.holds and not entry.pinned]
        for key in gone[: max(0, len(self.entries) - MAX_KEPT)]:
            del self.entries[key]

    async def _shrink(self, entries: Sequence[Entry], limit: int, limit_bytes: int) -> None:
        """Unregister of these, the one idle longest first, until they are within the bounds."""
        present = [entry for entry in entries if entry.loaded is not None]
        count, num_bytes = len(present), sum(entry.num_bytes for entry in present)
        for entry in present[:-1]:  # never the one that has just come
            if count <= limit and num_bytes <= limit_bytes:
                break
            if not entry.is_idle or entry.last_used >= time.time() - JUST_OPENED_S:
                continue
            freed = entry.num_bytes
            try:
                await self.unload(entry)
            except AtollError as error:  # the load that needs the room has succeeded all the same
                _log.warning("%s could not be unloaded to make room: %s", entry.version, error.message)
                continue
            entry.counters.evictions += 1
            count, num_bytes = count - 1, num_bytes - freed
            for observer in self._observers:
                observer.evicted(entry.name)

    def _touch(self, entry: Entry) -> None:
        entry.last_used = time.time()
        self.entries[entry.key] = self.entries.pop(entry.key, entry)  # to the end: idle longest stands first

    # ---- merged ----

    async def _open_merged(self, ref: AdapterRef, spec: MergeSpec, caller: Caller) -> Served:
        """Every parent is authorised and loaded like any adapter; the result is content like any other, under the digest of what made it."""
        from atoll.serving.merging import merge_digest

        found = await asyncio.gather(*(self.lookups.locate(AdapterRef(name, ref.source, token=ref.token), caller) for name in spec.ids))
        parents = await asyncio.gather(*(self.ready(located, ref.token, caller.key_id) for located, _ in found))
        loaded = [parent.loaded for parent in parents]
        if not all(loaded):
            raise EngineError("an adapter to be merged was unloaded meanwhile", hint="ask again")
        digests = [parent.key for parent in parents]
        digest = merge_digest(spec, digests)
        name = "merged:" + digest[:16]
        located = Located("merged", name, name, digest, digest, 0, None)
        entry = self.entries.get(digest)
        if entry is None or entry.loaded is None:
            merge = partial(self._merge, spec, [each for each in loaded if each], digest, name)
            entry = await self._load_once(digest, merge, located, merging_for=caller.key_id)
            if entry.loaded is None:
                raise EngineError(f"{name} was unloaded while this request began", hint="ask again")
        else:
            self._touch(entry)
        return entry.served(spec.ids, name, ref.source or "hub", name)

    async def _merge(self, spec: MergeSpec, parents: Sequence[Loaded], digest: str, name: str) -> Loaded:
        from atoll.serving.merging import merge

        def work() -> Loaded:
            adapter = merge(spec, [parent.adapter for parent in parents], [parent.digest for parent in parents])
            return self.loader.made(adapter, digest, name)

        return await self._merging.run(work, self._config.load_timeout_s, f"merging {', '.join(spec.ids)}")


def _register(loaded: Loaded, engine: Engine) -> None:
    """Registering what is there already keeps it if it was about to leave."""
    engine.register(loaded.digest, loaded.adapter, loaded.packed.pop() if loaded.packed else None)


def _unregister(key: str, engine: Engine) -> None:
    if engine.is_registered(key):
        engine.unregister(key)
