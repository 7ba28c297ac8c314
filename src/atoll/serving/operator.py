"""What an operator does with adapters while requests run: load, unload, pin, reload, name, publish.

None of it stops a request: unloading waits for those that use the adapter, a newer version stands beside the older one until nobody uses that, and
what was pinned by a movable name follows the name. Who may do what is checked by the routes (scopes) and here (allow-lists).

Used by server/manage.py and the service itself (preload, restore).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import AdapterNotFound, AtollError, EngineError, HubError, NotAllowed, PoolFull, RequestRefused
from atoll.serving.base_names import names_of
from atoll.serving.entries import AdapterInfo, AdapterRef, Entry, InUse, SourceRefused
from atoll.serving.keys import Caller
from atoll.serving.listing import Listing
from atoll.serving.lookups import Alias
from atoll.serving.observer import Observer
from atoll.serving.state import Remembered, StateFile

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
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
        self.listing = Listing(service)
        self._base_names = names_of(service.base)
        service.observers.append(self)

    # ---- what is there ----

    async def adapters(self, caller: Caller) -> tuple[AdapterInfo, ...]:
        """Every adapter that the caller may see, see Listing.adapters."""
        return await self.listing.adapters(caller)

    async def adapter(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """One adapter, by any reference. Raises AdapterNotFound."""
        located, name = await self._lookups.locate(ref, caller)
        return await self.listing.of(located, name, caller)

    # ---- loading ----

    async def load(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """Load now, also what failed a moment ago. Raises what loading raises."""
        self._registry.forget()
        located, name = await self._lookups.locate(ref, caller)
        self._registry.forget(located)
        await self._registry.ready(located, ref.token, caller.key_id)
        return await self.listing.of(located, name, caller)

    async def unload(self, ref: AdapterRef, caller: Caller, wait_s: float = 0.0) -> AdapterInfo:
        """Take an adapter (of a bare name: every version) out of memory; the next request for it loads it again.

        Waits up to wait_s for requests that use it, then raises InUse; also if it is pinned.
        """
        located, name = await self._lookups.locate(ref, caller)
        bare = located.source == "hub" and ref.revision is None and (ref.adapter_id or "").casefold() == located.name.casefold()
        entries = [entry for entry in self._registry.entries.values() if self._means(entry, located, bare) and entry.loaded is not None]
        for entry in entries:
            until = time.monotonic() + wait_s
            while entry.holds and not entry.pinned and time.monotonic() < until:
                await asyncio.sleep(POLL_S)
            await self._registry.unload(entry)
        return await self.listing.of(located, name, caller)

    async def reload(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """Look the name up again and load what it means now; requests in flight keep what they began with."""
        info = await self.load(ref, caller)
        await self._follow(info.name)
        return info

    # ---- pinning ----

    async def pin(self, ref: AdapterRef, caller: Caller, *, lasting: bool = True) -> AdapterInfo:
        """Load an adapter and keep it resident, also after a restart. Raises PoolFull if there is no room beside those in use and pinned."""
        located, name = await self._lookups.locate(ref, caller)
        entry = await self._registry.ready(located, ref.token, caller.key_id)
        await self._keep(entry)
        kept = replace(ref, token=None, merged=None)
        self._pins = [pin for pin in self._pins if pin.ref != kept] + [_Pin(kept, name, entry.key, lasting)]
        if lasting:
            await asyncio.to_thread(self._state.pin, kept)
        return await self.listing.of(located, name, caller)

    async def unpin(self, ref: AdapterRef, caller: Caller) -> AdapterInfo:
        """Let a pinned adapter leave when room is needed, and forget that it was pinned. Unpinning what is not pinned changes nothing.

        What was pinned and is gone since is unpinned by the words that pinned it. Raises AdapterNotFound for what neither is nor was there.
        """
        kept = replace(ref, token=None, merged=None)
        own = [pin for pin in self._pins if pin.ref == kept and caller.allows(pin.name)]
        found: tuple[Located, str] | None = None
        try:
            found = await self._lookups.locate(ref, caller)
        except AtollError:
            remembered = caller.adapters is None and Remembered.of(kept) in (await asyncio.to_thread(self._state.read)).pinned
            if not own and not remembered:
                raise
        going = own if found is None else own + [pin for pin in self._pins if pin not in own and self._is_of(pin, *found)]
        for pin in going:
            self._pins.remove(pin)
            await self._let_go(pin.key)
        for gone in {pin.ref for pin in going} | {kept}:
            await asyncio.to_thread(self._state.unpin, gone)
        return self.listing.gone(ref) if found is None else await self.listing.of(*found, caller)

    def _is_of(self, pin: _Pin, located: Located, name: str) -> bool:
        return pin.name == name and pin.key == self._key_of(located)

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
        self._refuse_base_name(name)
        kept, located = await self._folder_or_hub(path, caller)
        alias = self._lookups.alias(name)
        if alias is None:
            if await self._hub_has(name, located):
                raise RequestRefused(f"{name!r} is the name of another adapter in the hub", hint="choose another name")
        elif alias.ref != kept and not replace_old:
            raise RequestRefused(f"the name {name!r} is in use for another adapter", hint="unload it first, or send load_inplace: true")
        self._registry.forget(located)
        await self._registry.ready(located, key_id=caller.key_id)
        if located.name.casefold() != name.casefold():  # a hub adapter under its own name needs no other
            key = name.casefold()
            self._lookups.aliases[key], self._lookups.meant[key] = Alias(name, kept), located.identity
            await asyncio.to_thread(self._state.name, name, kept)
        return await self.listing.of(located, name, caller)

    async def unname(self, name: str, caller: Caller, wait_s: float = 0.0) -> None:
        """Take a given name away and unload what it meant, if nothing else keeps it. Raises AdapterNotFound, or InUse."""
        alias = self._lookups.alias(name)
        if alias is None or not caller.allows(alias.name):
            await self.unload(AdapterRef(name), caller, wait_s)
            return
        try:
            await self.unload(AdapterRef(name), caller, wait_s)
        except InUse:
            raise
        except AtollError as error:  # its folder or version is gone: the name must go all the same
            _log.info("%s, whose name was taken away, could not be found: %s", name, error.message)
        self._lookups.aliases.pop(name.casefold(), None)
        self._lookups.meant.pop(name.casefold(), None)
        await asyncio.to_thread(self._state.name, alias.name, None)

    def _refuse_base_name(self, name: str) -> None:
        """Raise RequestRefused for a name by which clients mean the base."""
        if name.casefold() in self._base_names or self._registry.is_base(name):
            raise RequestRefused(f"{name!r} is the name of the base that this server serves", hint="choose another name")

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

    def may_publish(self, name: str, caller: Caller) -> Hub:
        """The hub, if the caller may publish under a name that requests can then use. Raises SourceRefused, NotAllowed, NameRefused, HubError."""
        from atoll.hub.names import check_name

        hub = self._service.hub
        if hub is None:
            raise SourceRefused("this server has no hub to publish to", hint='install it: pip install "atoll[hub]"')
        if not caller.allows(name):
            raise NotAllowed(f"this key may not publish as {name!r}", hint="its allow-list does not have the name")
        self._refuse_base_name(name)
        check_name(name)
        if self._lookups.alias(name) is not None:
            raise HubError(f"{name!r} is a name that was given to another adapter of this server", hint="take it away first, or choose another name")
        return hub

    async def publish(
        self, folder: Path, name: str, caller: Caller, *, tags: Sequence[str] = (), message: str = "", bind_base: bool = False
    ) -> Version:
        """Put an adapter's folder into the hub, servable at once. It is read against the base first: what could not be served is not published.

        bind_base: record this server's base for a folder that does not say what it was trained on. Raises what the hub and reading raise.
        """
        hub, base = self.may_publish(name, caller), self._service.base

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
            await self._restore_name(name, kept.ref)
        for one in state.pinned:
            try:
                await self.pin(one.ref, Caller())
            except AtollError as error:
                _log.error("%s, which was pinned, could not be loaded: %s", one.adapter_id, error.message)

    async def _restore_name(self, name: str, ref: AdapterRef) -> None:
        """Let a name mean again what it meant, unless something else has that name since."""
        key = name.casefold()
        known, clash = self._lookups.alias(name), "the base" if key in self._base_names or self._registry.is_base(name) else ""
        if known is not None:
            clash = "" if known.ref == ref else f"a name that was given as {known.name}"
        elif not clash and self._service.hub is not None:
            with contextlib.suppress(AtollError):
                found, _ = await self._lookups.locate(AdapterRef(name, "pbase"), Caller())
                clash = f"the adapter {found.version} of the hub"
        if clash:
            _log.error("the name %s, which was given to %s, now is that of %s: it is dropped", name, ref.adapter_id, clash)
        elif known is None:
            self._lookups.aliases[key] = Alias(name, ref)

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
