"""What is told of adapters: the list of those that a caller may see, and single ones.

Every name in the list can be asked for as it stands there: an older version that is still loaded is name@version, an adapter of another source
carries its source. Where a composed adapter names its parents, those that the caller may not see are left out.

Used by operator.py, /v1/models and /info. Reading the hub happens in a thread, and again only when its index has changed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from atoll.errors import HubError
from atoll.serving.entries import AdapterInfo, AdapterRef, Entry
from atoll.serving.keys import Caller
from atoll.serving.sources import Located, Reference

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.serving.service import Service

MAX_AGE_S = 5.0  # of what was read of an index that looks unchanged: file times are coarse


class Listing:
    """Describes what the service's registry and hub hold."""

    def __init__(self, service: Service) -> None:
        self._service, self._registry, self._lookups = service, service.registry, service.registry.lookups
        self._fitting: dict[str, bool] = {}  # by digest
        self._parents: dict[str, tuple[Mapping[str, Any], ...]] = {}  # by digest, of composed adapters of the hub
        self._read: tuple[object, float, list[Version], frozenset[str]] | None = None  # stamp and time of reading; newest versions; all refs

    async def adapters(self, caller: Caller, *, with_engine: bool = True) -> tuple[AdapterInfo, ...]:
        """Every adapter that the caller may see: the newest of each name of the hub that this base can run, names given here, and what was loaded.

        with_engine: ask the engine too, between two of its steps.
        """
        versions, refs = await self._hub()
        engine = await self._engine_stats() if with_engine else {}
        found = [self._of_version(version, engine) for version in versions if caller.allows(version.name)]
        listed = {(info.name, info.digest) for info in found}
        others: dict[str, AdapterInfo] = {}  # of two contents of one name, the one that was used last
        for entry in self._registry.entries.values():
            if entry.source == "merged" or (entry.name, entry.key) in listed or not caller.allows(entry.name):
                continue
            if entry.source != "hub":
                others[entry.name] = self._of_entry(entry, engine)
            elif entry.loaded is not None and entry.version in refs:
                others[entry.version] = replace(self._of_entry(entry, engine), name=entry.version)
        named = [self._of_name(key, engine) for key, alias in self._lookups.aliases.items() if caller.allows(alias.name)]
        ordered = sorted([*found, *others.values()], key=lambda info: (info.name.casefold(), -info.created))
        return tuple(_shown(info, caller) for info in (*ordered, *named))

    async def count(self, caller: Caller) -> int:
        """How many names of the hub and of the operator the caller may use."""
        return sum((await self.kinds(caller)).values()) + sum(caller.allows(alias.name) for alias in self._lookups.aliases.values())

    async def kinds(self, caller: Caller) -> Mapping[str, int]:
        """How many names of the hub the caller may use, by kind."""
        versions, _ = await self._hub()
        return Counter(version.kind for version in versions if caller.allows(version.name))

    async def of(self, located: Located, name: str, caller: Caller) -> AdapterInfo:
        """One adapter, under the name that it was asked for by."""
        return _shown(replace(await self._info(located), name=name), caller)

    def gone(self, ref: AdapterRef) -> AdapterInfo:
        """What was named once and is no more."""
        return AdapterInfo(ref.adapter_id or "", ref.adapter_id or "", None, ref.source or "hub", "known")

    async def _hub(self) -> tuple[list[Version], frozenset[str]]:
        if self._service.hub is None:
            return [], frozenset()
        stamp, now = self._lookups.source("hub").stamp(Reference("")), time.monotonic()
        if self._read is None or self._read[0] != stamp or now - self._read[1] > MAX_AGE_S:
            self._read = (stamp, now, *await asyncio.to_thread(self._versions))
        return self._read[2], self._read[3]

    def _versions(self) -> tuple[list[Version], frozenset[str]]:
        """In a thread: the hub's adapters that may run on this base, by what they record of theirs; and the references of all versions."""
        hub, base = self._service.hub, self._service.base
        assert hub is not None
        own = {version.digest for version in hub.list(base=base.fingerprint.weights)}
        found = [version for version in hub.list() if version.digest in own or self._fits(version)]
        for version in found:
            self._read_parents(version)
        return found, frozenset(version.ref for version in hub.list(all_versions=True))

    def _read_parents(self, version: Version) -> None:
        """In a thread: of a composed adapter, what the hub knows of its parents."""
        if version.kind == "composed" and version.digest not in self._parents and self._service.hub is not None:
            self._parents[version.digest] = tuple(parent.to_json() for parent in self._service.hub.show(version.ref).parents)

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
            await asyncio.to_thread(self._read_parents, located.detail)
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
            num_parameters=version.num_parameters,
            num_bytes=version.size_bytes,
            created=version.created.timestamp(),
            task=version.task,
            description=version.description,
            parents=self._parents.get(version.digest) or (loaded.parents if loaded else ()),
        )
        known = known if entry is None else self._used(known, entry, engine)
        return known if loaded else replace(known, **self._trouble(version.digest))

    def _of_entry(self, entry: Entry, engine: Mapping[str, Any]) -> AdapterInfo:
        if entry.source == "hub":
            return self._of_version(entry.located.detail, engine)
        loaded, traits = entry.loaded, entry.traits
        info = AdapterInfo(
            name=entry.name,
            version=entry.version,
            digest=entry.key,
            source=entry.source,
            state="ready" if loaded else "known",
            base=traits.base or None,
            kind=traits.kind,
            rank=traits.rank,
            num_parameters=traits.num_parameters,
            num_bytes=entry.located.num_bytes or entry.num_bytes,
            parents=loaded.parents if loaded else (),
        )
        return self._used(info, entry, engine)

    def _of_name(self, key: str, engine: Mapping[str, Any]) -> AdapterInfo:
        """A given name (key: casefolded), without looking anything up."""
        alias, identity = self._lookups.aliases[key], self._lookups.meant.get(key, "")
        target, name = alias.ref, alias.name
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


def _shown(info: AdapterInfo, caller: Caller) -> AdapterInfo:
    """Without the parents that the caller may not see."""
    if caller.adapters is None or not info.parents:
        return info
    return replace(info, parents=tuple(parent for parent in info.parents if caller.allows(_name_in(parent.get("name")))))


def _name_in(reference: Any) -> str:
    """The name of an adapter in a reference to one of its versions. What has none is nobody's: no pattern but * matches it."""
    from atoll.hub.names import parse_reference

    try:
        return parse_reference(str(reference)).name or " "
    except HubError:
        return str(reference)
