"""Which adapters the engine knows (registered) and which stand in the bank (resident).

Identity is the key an adapter is registered under, a digest. Being used is counted: a hold for every running sequence, and nothing that is held or
pinned leaves. When room is needed, idle adapters leave, least recently used first, and only if that makes enough room.

    register ──► registered ──hold / pin──► resident (holds > 0 or pinned) ──release──► resident, idle ──evict──► registered

Used by engine.py and scoring.py; the tensors are model.bank's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from atoll.errors import EngineError, PoolFull, RequestRefused
from atoll.model.adapter import Adapter
from atoll.model.apply import BankRows
from atoll.model.bank import LoraBank, Slot


@dataclass
class _Entry:
    """One registered adapter. slot is None while it is not resident; holds counts the running sequences that use it."""

    adapter: Adapter
    num_bytes: int
    slot: Slot | None = None
    holds: int = 0
    pinned: bool = False

    @property
    def idle(self) -> bool:
        return self.slot is not None and self.holds == 0 and not self.pinned


class AdapterPool:
    """Registered adapters, and the resident ones within `budget_bytes` of the bank."""

    def __init__(self, bank: LoraBank, budget_bytes: int) -> None:
        self._bank, self._budget_bytes = bank, budget_bytes
        self._entries: dict[str, _Entry] = {}
        self._resident: dict[str, _Entry] = {}  # least recently used first
        self.resident_bytes = 0
        self.num_loads = 0
        self.num_evictions = 0

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def resident(self) -> tuple[str, ...]:
        """The keys of the resident adapters, least recently used first."""
        return tuple(self._resident)

    def register(self, key: str, adapter: Adapter) -> None:
        """Make an adapter known under `key`. Registering the same object again changes nothing.

        Raises RequestRefused if the key means another adapter already, BaseMismatch where the factors do not fit the base, PoolFull if it alone is
        larger than the budget.
        """
        known = self._entries.get(key)
        if known is not None:
            if known.adapter is not adapter:
                raise RequestRefused(
                    f"adapter key {key!r} is registered for another adapter already",
                    hint="a key names one content for good: register a changed adapter under its own digest, or unregister the old one",
                )
            return
        if not key:
            raise RequestRefused("an adapter's key is empty", hint="register it under its digest")
        adapter.check_fits(self._bank.shapes, self._bank.num_layers)
        num_bytes = self._bank.slot_bytes(adapter)
        if num_bytes > self._budget_bytes:
            raise PoolFull(
                f"adapter {key!r} takes {_mb(num_bytes)}, but the engine keeps {_mb(self._budget_bytes)} for all adapters",
                hint=f"set adapter_bytes to at least {num_bytes}",
            )
        self._entries[key] = _Entry(adapter, num_bytes)

    def unregister(self, key: str) -> None:
        """Forget an adapter, and free its place. Raises EngineError while it is in use, RequestRefused if it is unknown."""
        entry = self._known(key)
        if entry.holds:
            raise EngineError(f"adapter {key!r} is in use by {entry.holds} running request(s)", hint="cancel them or wait until they end")
        if entry.slot is not None:
            self._evict(key)
        del self._entries[key]

    def pin(self, key: str) -> None:
        """Load an adapter now and keep it whether used or not. Raises PoolFull if there is no room beside those in use and pinned."""
        entry = self._known(key)
        if not self._load(key, entry):
            raise PoolFull(f"adapter {key!r} cannot be pinned now: the other resident adapters are in use", hint="wait, or raise adapter_bytes")
        entry.pinned = True

    def unpin(self, key: str) -> None:
        """Let a pinned adapter leave when room is needed."""
        self._known(key).pinned = False

    def is_pinned(self, key: str) -> bool:
        return self._known(key).pinned

    def hold(self, key: str) -> bool:
        """One more user of the adapter, loading it if there is room; False if the places it needs are in use now.

        Raises PoolFull if pinned adapters leave too little room for good, RequestRefused if the key is unknown.
        """
        entry = self._known(key)
        if not self._load(key, entry):
            return False
        entry.holds += 1
        self._resident[key] = self._resident.pop(key)  # most recently used
        return True

    def release(self, key: str) -> None:
        """One user less."""
        entry = self._entries[key]
        if entry.holds < 1:
            raise AssertionError(f"adapter {key!r} is released but nobody holds it")
        entry.holds -= 1

    def slot(self, key: str) -> Slot:
        """Where a held adapter stands."""
        slot = self._entries[key].slot
        if slot is None:
            raise AssertionError(f"adapter {key!r} runs but is not resident")
        return slot

    def bank_rows(self, tokens: Sequence[int], keys: Sequence[str]) -> BankRows:
        """Single-token rows by adapter: token tokens[i] of the packed batch uses the held adapter keys[i]."""
        return self._bank.rows(tokens, [self.slot(key) for key in keys])

    def stats(self) -> dict[str, int]:
        """How many adapters are known, resident, pinned and in use, their bytes, and how often one came or left."""
        resident = self._resident.values()
        return {
            "adapters_registered": len(self._entries),
            "adapters_resident": len(resident),
            "adapters_pinned": sum(entry.pinned for entry in resident),
            "adapters_in_use": sum(entry.holds > 0 for entry in resident),
            "adapter_bytes": self.resident_bytes,
            "adapter_loads": self.num_loads,
            "adapter_evictions": self.num_evictions,
        }

    def check(self, held: Mapping[str, int]) -> None:
        """Raise AssertionError unless holds, bytes and residency add up. held: how many running sequences use each adapter."""
        counted = Counter({key: entry.holds for key, entry in self._entries.items() if entry.holds})
        if counted != Counter(held):
            raise AssertionError(f"adapter holds leak: sequences use {dict(held)}, the pool counts {dict(counted)}")
        resident = {key for key, entry in self._entries.items() if entry.slot is not None}
        if resident != set(self._resident) or any((entry.holds or entry.pinned) and entry.slot is None for entry in self._entries.values()):
            raise AssertionError(f"adapters {sorted(resident)} have slots, but the pool lists {sorted(self._resident)} as resident")
        places = [(slot.bucket, slot.index) for entry in self._resident.values() if (slot := entry.slot) is not None]
        if len(set(places)) != len(places):
            raise AssertionError("two adapters share a slot of the bank")
        if self.resident_bytes != sum(entry.num_bytes for entry in self._resident.values()) or self.resident_bytes > self._budget_bytes:
            raise AssertionError(
                f"resident adapters are counted as {self.resident_bytes} bytes of {self._budget_bytes}, which is not their sum or too much"
            )

    def _known(self, key: str) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise RequestRefused(
                f"adapter {key!r} is not registered with this engine", hint="register it first; the base is asked for with adapter None"
            )
        return entry

    def _load(self, key: str, entry: _Entry) -> bool:
        """Bring an adapter in if it is not resident; False if too many others are in use now."""
        if entry.slot is not None:
            return True
        pinned = sum(other.num_bytes for other in self._resident.values() if other.pinned)
        if entry.num_bytes > self._budget_bytes - pinned:
            left = _mb(self._budget_bytes - pinned)
            raise PoolFull(
                f"adapter {key!r} takes {_mb(entry.num_bytes)}, but pinned adapters leave {left} of {_mb(self._budget_bytes)}",
                hint="unpin one, or raise adapter_bytes",
            )
        missing = self.resident_bytes + entry.num_bytes - self._budget_bytes
        leaving: list[str] = []
        for other_key, other in self._resident.items():
            if missing <= 0:
                break
            if other.idle:
                leaving.append(other_key)
                missing -= other.num_bytes
        if missing > 0:
            return False
        for other_key in leaving:
            self._evict(other_key)
        with torch.no_grad():  # adapters in training are copied too; the bank itself never takes part in a gradient
            entry.slot = self._bank.load(entry.adapter)
        self._resident[key] = entry
        self.resident_bytes += entry.num_bytes
        self.num_loads += 1
        return True

    def _evict(self, key: str) -> None:
        entry = self._resident.pop(key)
        assert entry.slot is not None and not entry.holds
        self._bank.unload(entry.slot)
        entry.slot = None
        self.resident_bytes -= entry.num_bytes
        self.num_evictions += 1


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
