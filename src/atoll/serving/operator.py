"""What an operator does with adapters while requests run: list, load, unload, pin, reload, name, publish.

None of it stops a request: unloading waits for those that use the adapter, a newer version stands beside the older one until nobody uses that, and
what was pinned by a movable name follows the name. Who may do what is checked by the routes (scopes) and here (allow-lists).

Used by server/manage.py, /v1/models and the service itself (preload, restore).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import AdapterNotFound, AtollError, EngineError, HubError, NotAllowed, PoolFull, RequestRefused
from atoll.serving.entries import AdapterInfo, AdapterRef, Entry, InUse
from atoll.serving.keys import Caller
from atoll.serving.observer import Observer
from atoll.serving.state import StateFile

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.hub.records import Version
    from atoll.serving.service import Service
    from atoll.serving.sources import Located

POLL_S = 0.02
PIN_RETRY_S = 0.2

_log = logging.getLogger(__name__)


@dataclass
class _Pin:
    """What was pinned, and the content that it meant then. lasting: it survives a restart (what the command line preloads does not need to)."""

    ref: AdapterRef
    name: str
    key: str
    lasting: bool


class Operator(Observer):
    """Works on the service's registry."""

    def __init__(self, service: Service) -> None:
        self._service, self._registry = service, service.registry
        self._lookups = service.registry.lookups
        self._state = StateFile(service.base)
        self._pins: list[_Pin] = []
        self._fitting: dict[str, bool] = {}  # by digest
        self._parents: dict[str, tuple[Mapping[str, Any], ...]] = {}  # by digest, of composed adapters of the hub
        service.observers.append(self)

    # ---- what is there ----

    async def adapters(self, caller: Caller) -> tuple[AdapterInfo, ...]:
        """Every adapter that the caller may see: the newest of each name of the hub that this base can run, names given here, and what was loaded."""
        versions = await asyncio.to_thread(self._versions) if self._service.hub is not None else []
        engine = await self._engine_stats()
        found = [self._of_version(version, engine) for version in versions if caller.allows(version.name)]
        listed = {(info.name, info.digest) for info in found}
        for entry in self._registry.entries.values():
            if entry.source != "merged" and (entry.name, entry.key) not in listed and caller.allows(entry.name):
                found.append(self._of_entry(entry, engine))
        named = [self._of_name(name, engine) for name in self._lookups.aliases if caller.allows(name)]
        return (*sorted(found, key=lambda info: (info.name.casefold(), -info.created)), *named)

    async def adapter(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """One adapter, by any reference. Raises AdapterNotFound."""
        located, name = await self._lookups.locate(ref, caller)
        return replace(await self._info(located), name=name)

    # ---- loading ----

    async def load(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """Load now, also what failed a moment ago. Raises what loading raises."""
        self._registry.forget()
        located, name = await self._lookups.locate(ref, caller)
        self._registry.forget(located)
        await self._registry.ready(located, ref.token)
        return replace(await self._info(located), name=name)

    async def unload(self, ref: AdapterRef, caller: Caller, wait_s: float = 0.0) -> AdapterInfo:
        """Take an adapter (of a bare name: every version) out of memory; the next request for it loads it again.

        Waits up to wait_s for requests that use it, then raises InUse; also if it is pinned.
        """
        located, name = await self._lookups.locate(ref, caller)
        bare = located.source == "hub" and ref.revision is None and (ref.adapter_id or "").casefold() == located.name.casefold()
        entries = [entry for entry in self._registry.entries.values() if self._means(entry, located, bare) and entry.loaded is not None]
        for entry in entries:
            if entry.pinned:
                raise InUse(f"{entry.version} is pinned", hint="unpin it first")
            until = time.monotonic() + wait_s
            while entry.holds and time.monotonic() < until:
                await asyncio.sleep(POLL_S)
            await self._registry.unload(entry)
        return replace(await self._info(located), name=name)

    async def reload(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """Look the name up again and load what it means now; requests in flight keep what they began with."""
        info = await self.load(ref, caller)
        await self._follow(info.name)
        return info

    # ---- pinning ----

    async def pin(self, ref: AdapterRef, caller: Caller, *, lasting: bool = True) -> AdapterInfo:
        """Load an adapter and keep it resident, also after a restart. Raises PoolFull if there is no room beside those in use and pinned."""
        located, name = await self._lookups.locate(ref, caller)
        entry = await self._registry.ready(located, ref.token)
        await self._keep(entry)
        kept = replace(ref, token=None, merged=None)
        self._pins = [pin for pin in self._pins if pin.ref != kept] + [_Pin(kept, name, entry.key, lasting)]
        if lasting:
            await asyncio.to_thread(self._state.pin, kept)
        return replace(await self._info(located), name=name)

    async def unpin(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """Let a pinned adapter leave when room is needed, and forget that it was pinned. Unpinning what is not pinned changes nothing."""
        located, name = await self._lookups.locate(ref, caller)
        kept = replace(ref, token=None, merged=None)
        going = [pin for pin in self._pins if pin.ref == kept or (pin.name == name and pin.key == self._key_of(located))]
        for pin in going:
            self._pins.remove(pin)
            await self._let_go(pin.key)
        for gone in {pin.ref for pin in going} | {kept}:
            await asyncio.to_thread(self._state.unpin, gone)
        return replace(await self._info(located), name=name)

    # ---- names ----

    async def name(self, name: str, path: str, caller: Caller, *, replace_old: bool = False) -> AdapterInfo:
        """Let requests call an adapter by `name`, also after a restart, and load it. Raises RequestRefused for a name that is taken.

        path: a folder below the server's local root, or else a reference to the hub.
        """
        from atoll.hub.names import check_name

        try:
            check_name(name)
        except HubError as error:
            raise RequestRefused(error.message, hint=error.hint) from None
        if not caller.allows(name):
            raise NotAllowed(f"this key may not use the name {name!r}", hint="its allow-list does not have it")
        kept, located = await self._folder_or_hub(path, caller)
        if name not in self._lookups.aliases:
            if await self._hub_has(name, located):
                raise RequestRefused(f"{name!r} is the name of another adapter in the hub", hint="choose another name")
        elif self._lookups.aliases[name] != kept and not replace_old:
            raise RequestRefused(f"the name {name!r} is in use for another adapter", hint="unload it first, or send load_inplace: true")
        self._registry.forget(located)
        await self._registry.ready(located)
        if located.name != name:  # a hub adapter under its own name needs no other
            self._lookups.aliases[name], self._lookups.meant[name] = kept, located.identity
            await asyncio.to_thread(self._state.name, name, kept)
        return replace(await self._info(located), name=name)

    async def unname(self, name: str, caller: Caller, wait_s: float = 0.0) -> None:
        """Take a given name away and unload what it meant, if nothing else keeps it. Raises AdapterNotFound, or InUse."""
        if name in self._lookups.aliases and caller.allows(name):
            await self.unload(AdapterRef(name), caller, wait_s)
            self._lookups.aliases.pop(name, None)
            self._lookups.meant.pop(name, None)
            await asyncio.to_thread(self._state.name, name, None)
        else:
            await self.unload(AdapterRef(name), caller, wait_s)

    async def _folder_or_hub(self, path: str, caller: Caller) -> tuple[AdapterRef, Located]:
        missing: AtollError | None = None
        for source in ("local", "pbase") if self._service.config.local_root is not None else ("pbase",):
            ref = AdapterRef(path, source)
            try:
                return ref, (await self._lookups.locate(ref, caller))[0]
            except AdapterNotFound as error:
                missing = missing or error
        assert missing is not None
        raise missing

    # ---- publishing ----

    def local_folder(self, path: str, caller: Caller) -> Path:
        """A folder below the server's local root, which a publisher may name. Raises AdapterNotFound, or EngineError while that source is off."""
        return self._lookups.local_folder(path, caller)

    async def publish(
        self, folder: Path, name: str, caller: Caller, *, tags: Sequence[str] = (), message: str = "", bind_base: bool = False
    ) -> Version:
        """Put an adapter's folder into the hub, servable at once. It is read against the base first: what could not be served is not published.

        bind_base: record this server's base for a folder that does not say what it was trained on. Raises what the hub and reading raise.
        """
        hub = self._service.hub
        if hub is None:
            raise EngineError("this server has no hub to publish to", hint='install it: pip install "atoll[hub]"')
        if not caller.allows(name):
            raise NotAllowed(f"this key may not publish as {name!r}", hint="its allow-list does not have the name")
        base = self._service.base

        def work() -> Version:
            self._registry.loader.load(folder, "", name)
            return hub.publish(folder, name, tags=tags, message=message, base=base.describe() if bind_base else None)

        version = await asyncio.to_thread(work)
        self._registry.forget()
        self._service.spawn(self._follow(version.name))
        return version

    # ---- the service's own ----

    async def preload(self) -> None:
        """Load and pin what the config names, before the first request. Raises what loading raises."""
        for name in self._service.config.preload:
            await self.pin(AdapterRef(name), Caller(), lasting=False)

    async def restore(self) -> None:
        """In the background of the start: names first, then what was pinned. What fails is logged and stays remembered."""
        try:
            state = await asyncio.to_thread(self._state.read)
        except AtollError as error:
            _log.error("nothing was restored: %s", error.message)
            return
        for name, kept in state.names.items():
            self._lookups.aliases.setdefault(name, kept.ref)
        for one in state.pinned:
            try:
                await self.pin(one.ref, Caller())
            except AtollError as error:
                _log.error("%s, which was pinned, could not be loaded: %s", one.adapter_id, error.message)

    def loaded(self, adapter: str, source: str, seconds: float) -> None:
        """New content was loaded for a name: what was pinned by that name follows."""
        if any(pin.name == adapter for pin in self._pins):
            self._service.spawn(self._follow(adapter))

    async def _follow(self, name: str) -> None:
        """Move pins of `name` to what it means now."""
        for pin in [pin for pin in self._pins if pin.name == name]:
            located, _ = await self._lookups.locate(pin.ref, Caller())
            entry = await self._registry.ready(located)
            if entry.key != pin.key and pin in self._pins:
                old, pin.key = pin.key, entry.key
                entry.pinned = True  # at once, so that nothing unloads it meanwhile
                await self._let_go(old)
                try:
                    await self._keep(entry)
                except PoolFull:
                    self._service.spawn(self._keep_later(pin, entry))

    async def _keep(self, entry: Entry) -> None:
        """Pin content in the engine; nothing unloads it from now on. Raises PoolFull."""
        entry.pinned = True
        try:
            await self._service.run(partial(_pin, entry.key))
        except AtollError:
            entry.pinned = any(pin.key == entry.key for pin in self._pins)
            raise

    async def _keep_later(self, pin: _Pin, entry: Entry) -> None:
        """Pin content as soon as running requests leave room for it, while the pin still means it."""
        while pin in self._pins and pin.key == entry.key:
            await asyncio.sleep(PIN_RETRY_S)
            with contextlib.suppress(PoolFull):
                return await self._keep(entry)

    async def _let_go(self, key: str) -> None:
        """Unpin content unless another pin means it too."""
        entry = self._registry.entries.get(key)
        if entry is None or any(pin.key == key for pin in self._pins):
            return
        entry.pinned = False
        await self._service.run(partial(_unpin, key))

    # ---- what it says ----

    def _versions(self) -> list[Version]:
        """In a thread: the hub's adapters that may run on this base, by what they record of theirs."""
        hub, base = self._service.hub, self._service.base
        assert hub is not None
        own = {version.digest for version in hub.list(base=base.fingerprint.weights)}
        found = [version for version in hub.list() if version.digest in own or self._fits(version)]
        for version in found:
            if version.kind == "composed" and version.digest not in self._parents:
                self._parents[version.digest] = tuple(asdict(parent) for parent in hub.show(version.ref).parents)
        return found

    def _fits(self, version: Version) -> bool:
        """Whether the shapes of an adapter that records no such base fit ours; asked once a version. Files that are elsewhere stay there."""
        if version.digest not in self._fitting:
            there = version.path.is_dir()
            named = version.base is None or version.base.casefold() == self._service.base.name.casefold()
            self._fitting[version.digest] = self._registry.loader.fits(version.path) if there else named
        return self._fitting[version.digest]

    async def _info(self, located: Located) -> AdapterInfo:
        engine = await self._engine_stats()
        if located.source == "hub":
            return self._of_version(located.detail, engine)
        entry = self._registry.entries.get(self._key_of(located))
        if entry is not None:
            return self._of_entry(entry, engine)
        return AdapterInfo(
            located.name, located.version, None, located.source, "known", num_bytes=located.num_bytes, **self._trouble(located.identity)
        )

    def _of_version(self, version: Version, engine: Mapping[str, Any]) -> AdapterInfo:
        entry = self._registry.entries.get(version.digest)
        loaded = entry.loaded if entry is not None else None
        known = AdapterInfo(
            name=version.name,
            version=version.ref,
            digest=version.digest,
            source="hub",
            state="ready" if loaded else "loading" if self._registry.is_loading(version.digest) else "known",
            base=version.base,
            kind=version.kind,
            rank=version.rank,
            num_bytes=version.size_bytes,
            created=version.created.timestamp(),
            task=version.task,
            description=version.description,
            parents=loaded.parents if loaded else self._parents.get(version.digest, ()),
        )
        known = known if entry is None else self._used(known, entry, engine)
        return known if loaded else replace(known, **self._trouble(version.digest))

    def _of_entry(self, entry: Entry, engine: Mapping[str, Any]) -> AdapterInfo:
        if entry.source == "hub":
            return self._of_version(entry.located.detail, engine)
        loaded = entry.loaded
        info = AdapterInfo(
            name=entry.name,
            version=entry.version,
            digest=entry.key,
            source=entry.source,
            state="ready" if loaded else "known",
            base=loaded.adapter.spec.base if loaded else None,
            kind=loaded.adapter.spec.kind if loaded else "lora",
            rank=loaded.adapter.max_rank if loaded else None,
            num_bytes=entry.located.num_bytes or entry.num_bytes,
            parents=loaded.parents if loaded else (),
        )
        return self._used(info, entry, engine)

    def _of_name(self, name: str, engine: Mapping[str, Any]) -> AdapterInfo:
        """A given name, without looking anything up."""
        target, identity = self._lookups.aliases[name], self._lookups.meant.get(name, "")
        entry = self._registry.entries.get(self._registry.key_of(identity) or "")
        if entry is not None:
            return replace(self._of_entry(entry, engine), name=name)
        return AdapterInfo(name, target.adapter_id or "", None, target.source or "hub", "known")

    @staticmethod
    def _used(info: AdapterInfo, entry: Entry, engine: Mapping[str, Any]) -> AdapterInfo:
        return replace(
            info,
            pinned=entry.pinned,
            holds=entry.holds,
            last_used=entry.last_used,
            labels=entry.loaded.labels if entry.loaded else None,
            counters=asdict(entry.counters),
            engine=engine.get(entry.key, {}),
        )

    def _trouble(self, identity: str) -> dict[str, Any]:
        failure = self._registry.failures.get(identity)
        return {"state": "failed", "error": failure.error.message} if failure is not None and failure.until > time.monotonic() else {}

    async def _engine_stats(self) -> Mapping[str, Any]:
        return await self._service.run(lambda engine: engine.adapter_stats())

    def _key_of(self, located: Located) -> str:
        return located.digest or self._registry.key_of(located.identity) or ""

    def _means(self, entry: Entry, located: Located, bare: bool) -> bool:
        return entry.key == self._key_of(located) or (bare and entry.name == located.name)

    async def _hub_has(self, name: str, wanted: Located) -> bool:
        """Whether the hub has an adapter of that name that is not the one wanted."""
        try:
            found, _ = await self._lookups.locate(AdapterRef(name, "pbase"), Caller())
        except (AdapterNotFound, EngineError):
            return False
        return found.identity != wanted.identity


def _pin(key: str, engine: Engine) -> None:
    engine.pin(key)


def _unpin(key: str, engine: Engine) -> None:
    if engine.is_registered(key):
        engine.unpin(key)
