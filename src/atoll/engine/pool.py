"""Which adapters the engine knows (registered) and which stand in the bank (resident).

Identity is the key an adapter is registered under, a digest. Being used is counted twice: a use for every unfinished request, and while it is used an
adapter stays registered; a hold for every running sequence, and nothing that is held or pinned leaves the bank. When room is needed, idle adapters
leave, least recently used first, and only if that makes enough room.

    register ──► registered ──hold / pin──► resident (holds > 0 or pinned) ──release──► resident, idle ──evict──► registered ──unregister──► gone

Used by engine.py, the scheduler and jobs.py; the tensors are the bank's.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.errors import EngineError, PoolFull, RequestRefused
from atoll.model.adapter import Adapter
from atoll.model.apply import AdapterWeights, BankRows
from atoll.model.apply_edits import Edited
from atoll.model.reft import ReftSpec

_MOST_PACKED = 8  # packed forms that may wait for their first load: adapters registered by the hundred are packed when they are used


class Place(AdapterWeights, Protocol):
    """Where a resident adapter stands: a slot of the bank that gave it."""

    @property
    def bucket(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def gathers(self) -> bool:
        """Whether its single-token rows may be given as the bank's `rows`, where that gathers at all."""
        ...

    @property
    def parts(self) -> Sequence[Edited]:
        """Its ReFT edits; none for an adapter without."""
        ...


class Bank(Protocol):
    """The tensors of the resident adapters: model.bank.LoraBank, or the compiled forward's own."""

    gathers: bool
    shapes: dict[str, tuple[int, int]]
    num_layers: int

    def slot_bytes(self, adapter: Adapter) -> int: ...

    def pack(self, adapter: Adapter) -> Any | None:
        """What `load` would make of an adapter, ahead and on any thread; None where nothing is gained by that."""
        ...

    def load(self, adapter: Adapter, packed: Any = None) -> Any: ...

    def unload(self, slot: Any) -> None: ...

    def rows(self, tokens: Sequence[int], slots: Sequence[Any]) -> BankRows: ...


@dataclass
class _Entry:
    """One registered adapter. slot is None while it is not resident. holds: running sequences that use it; uses: unfinished requests that name it.

    packed: the bank's own form, until its first load takes it or later ones push it out: it lies outside the budget.

    serial: the number of its registration, so that a key registered again is known to be another; loads: how often it came in; leaving: it goes when
    nobody uses it.
    """

    adapter: Adapter
    num_bytes: int
    serial: int
    slot: Place | None = None
    holds: int = 0
    uses: int = 0
    pinned: bool = False
    loads: int = 0
    leaving: bool = False
    packed: Any = None

    @property
    def busy(self) -> bool:
        return self.holds > 0 or self.pinned


class AdapterPool:
    """Registered adapters, and the resident ones within `budget_bytes` of the bank.

    epoch changes whenever an adapter comes, leaves or becomes idle: whoever found no place may find one then.
    """

    def __init__(self, bank: Bank, budget_bytes: int) -> None:
        self._bank, self._budget_bytes = bank, budget_bytes
        self._entries: dict[str, _Entry] = {}
        self._serials = itertools.count(1)
        self._packed: deque[str] = deque()  # keys whose packed form may still wait for its first load
        self._resident: dict[str, _Entry] = {}  # least recently used first
        self.resident_bytes = 0
        self._busy_bytes = 0  # of adapters that are held or pinned
        self._pinned_bytes = 0
        self._epoch = 0
        self.num_loads = 0
        self.num_evictions = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def resident(self) -> tuple[str, ...]:
        """The keys of the resident adapters, least recently used first."""
        return tuple(self._resident)

    def pack(self, adapter: Adapter) -> Any | None:
        """The adapter in the form that the bank loads at once, for `register`. May be called from any thread. Raises what `register` raises of it."""
        with torch.no_grad():
            return self._bank.pack(adapter)

    def register(self, key: str, adapter: Adapter, packed: Any = None) -> None:
        """Make an adapter known under `key`. Registering the same content again changes nothing, but that it stays if it was leaving.

        packed: what `pack` made of it. Raises RequestRefused if the key means another adapter already, BaseMismatch where the factors do not fit the
        base, PoolFull if it alone is larger than the budget.
        """
        known = self._entries.get(key)
        if known is not None:
            if not _same(known.adapter, adapter):
                raise RequestRefused(
                    f"adapter key {key!r} is registered for another adapter already",
                    hint="a key names one content for good: register a changed adapter under its own digest, or unregister the old one",
                )
            known.leaving = False
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
        self._entries[key] = _Entry(adapter, num_bytes, next(self._serials), packed=packed)
        self._packed.append(key)
        while len(self._packed) > _MOST_PACKED:
            left_over = self._entries.get(self._packed.popleft())
            if left_over is not None:
                left_over.packed = None

    def unregister(self, key: str, *, wait: bool = False) -> bool:
        """Forget an adapter and free its place; True when that is done. wait: while requests use it, take no new ones, and forget it with the last.

        Raises RequestRefused if it is unknown, and EngineError if requests use it and wait is False.
        """
        entry = self._known(key)
        if entry.uses or entry.holds:
            if not wait:
                raise EngineError(
                    f"adapter {key!r} is in use by {max(entry.uses, entry.holds)} waiting or running request(s)",
                    hint="cancel them or wait until they end",
                )
            entry.leaving = True
            return False
        if entry.slot is not None:
            self._evict(key)
        del self._entries[key]
        self._epoch += 1
        return True

    def check_known(self, key: str) -> None:
        """Raise RequestRefused unless new requests may name this adapter."""
        if self._known(key).leaving:
            raise RequestRefused(f"adapter {key!r} is being unregistered", hint="register it again")

    def serial(self, key: str) -> int:
        """The number of the registration that `key` means now."""
        return self._known(key).serial

    def reft(self, key: str) -> tuple[ReftSpec, ...]:
        """The ReFT parts of a registered adapter."""
        return self._known(key).adapter.spec.reft

    def changes_linears(self, key: str) -> bool:
        """Whether a registered adapter has LoRA modules: one without gives the base's keys and values wherever it edits nothing."""
        return bool(self._entries[key].adapter.modules)

    def use(self, key: str) -> None:
        """One more unfinished request that names the adapter, which stays registered until it has ended."""
        self._known(key).uses += 1

    def unuse(self, key: str) -> bool:
        """One unfinished request less. True if the adapter was leaving and is gone now."""
        entry = self._entries[key]
        if entry.uses < 1:
            raise AssertionError(f"a request for adapter {key!r} ended that was not counted")
        entry.uses -= 1
        return entry.leaving and not entry.uses and self.unregister(key)

    def pin(self, key: str) -> None:
        """Load an adapter now and keep it whether used or not. Raises PoolFull if there is no room beside those in use and pinned."""
        entry = self._known(key)
        if not self._load(key, entry):
            raise PoolFull(f"adapter {key!r} cannot be pinned now: the other resident adapters are in use", hint="wait, or raise adapter_bytes")
        if not entry.pinned:
            self._busy_bytes += 0 if entry.busy else entry.num_bytes
            self._pinned_bytes += entry.num_bytes
            entry.pinned = True

    def unpin(self, key: str) -> None:
        """Let a pinned adapter leave when room is needed."""
        entry = self._known(key)
        if entry.pinned:
            entry.pinned = False
            self._pinned_bytes -= entry.num_bytes
            self._busy_bytes -= 0 if entry.busy else entry.num_bytes
            self._epoch += 1

    def is_pinned(self, key: str) -> bool:
        return self._known(key).pinned

    def hold(self, key: str) -> bool:
        """One more user of the adapter, loading it if there is room; False if the places it needs are in use now.

        Raises PoolFull if pinned adapters leave too little room for good, RequestRefused if the key is unknown.
        """
        entry = self._known(key)
        if not self._load(key, entry):
            return False
        self._busy_bytes += 0 if entry.busy else entry.num_bytes
        entry.holds += 1
        self._resident[key] = self._resident.pop(key)  # most recently used
        return True

    def release(self, key: str) -> None:
        """One user less."""
        entry = self._entries[key]
        if entry.holds < 1:
            raise AssertionError(f"adapter {key!r} is released but nobody holds it")
        entry.holds -= 1
        if not entry.busy:
            self._busy_bytes -= entry.num_bytes
            self._epoch += 1

    def slot(self, key: str) -> Place:
        """Where a held adapter stands."""
        slot = self._entries[key].slot
        if slot is None:
            raise AssertionError(f"adapter {key!r} runs but is not resident")
        return slot

    @property
    def gathers(self) -> bool:
        """Whether single-token rows of several adapters are best given as `bank_rows`; else every group of neighbours wants a segment."""
        return self._bank.gathers

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

    def adapter_stats(self) -> dict[str, dict[str, int | bool]]:
        """Of every registered adapter: resident, pinned, unfinished requests that name it (in_use), bytes, how often it was loaded."""
        return {
            key: {
                "resident": entry.slot is not None,
                "pinned": entry.pinned,
                "in_use": entry.uses,
                "bytes": entry.num_bytes,
                "loads": entry.loads,
            }
            for key, entry in self._entries.items()
        }

    def check(self, held: Mapping[str, int], used: Mapping[str, int] | None = None) -> None:
        """Raise AssertionError unless holds, uses, bytes and residency add up. held: running sequences of each adapter; used: unfinished requests."""
        for what, truth, counts in (
            ("holds", held, {key: entry.holds for key, entry in self._entries.items() if entry.holds}),
            ("uses", used or {}, {key: entry.uses for key, entry in self._entries.items() if entry.uses}),
        ):
            if dict(truth) != counts:
                raise AssertionError(f"adapter {what} leak: sequences have {dict(truth)}, the pool counts {counts}")
        resident = {key for key, entry in self._entries.items() if entry.slot is not None}
        if resident != set(self._resident) or any(entry.busy and entry.slot is None for entry in self._entries.values()):
            raise AssertionError(f"adapters {sorted(resident)} have slots, but the pool lists {sorted(self._resident)} as resident")
        places = [(slot.bucket, slot.index) for entry in self._resident.values() if (slot := entry.slot) is not None]
        if len(set(places)) != len(places):
            raise AssertionError("two adapters share a slot of the bank")
        busy = sum(entry.num_bytes for entry in self._resident.values() if entry.busy)
        pinned = sum(entry.num_bytes for entry in self._resident.values() if entry.pinned)
        if (busy, pinned) != (self._busy_bytes, self._pinned_bytes):
            raise AssertionError(
                f"busy and pinned adapters are counted as {self._busy_bytes} and {self._pinned_bytes} bytes, but take {busy} and {pinned}"
            )
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
        if entry.num_bytes > self._budget_bytes - self._pinned_bytes:
            left = _mb(self._budget_bytes - self._pinned_bytes)
            raise PoolFull(
                f"adapter {key!r} takes {_mb(entry.num_bytes)}, but pinned adapters leave {left} of {_mb(self._budget_bytes)}",
                hint="unpin one, or raise adapter_bytes",
            )
        if entry.num_bytes > self._budget_bytes - self._busy_bytes:
            return False
        missing = self.resident_bytes + entry.num_bytes - self._budget_bytes
        leaving: list[str] = []
        for other_key, other in self._resident.items():
            if missing <= 0:
                break
            if not other.busy:
                leaving.append(other_key)
                missing -= other.num_bytes
        for other_key in leaving:
            self._evict(other_key)
        with torch.no_grad():  # adapters in training are copied too; the bank itself never takes part in a gradient
            entry.slot = self._bank.load(entry.adapter, entry.packed)
        entry.packed = None
        self._resident[key] = entry
        self.resident_bytes += entry.num_bytes
        entry.loads += 1
        self.num_loads += 1
        self._epoch += 1
        return True

    def _evict(self, key: str) -> None:
        entry = self._resident.pop(key)
        assert entry.slot is not None and not entry.holds
        if entry.pinned:
            self.unpin(key)
        self._bank.unload(entry.slot)
        entry.slot = None
        self.resident_bytes -= entry.num_bytes
        self._epoch += 1
        self.num_evictions += 1


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters do the same to the bit; what their files say beside that does not matter."""
    if one is other:
        return True
    if one.modules.keys() != other.modules.keys() or one.edits.keys() != other.edits.keys():
        return False
    pairs = [(module, other.modules[site]) for site, module in one.modules.items()]
    if any(a.scaling != b.scaling or len(a.tensors) != len(b.tensors) or not all(map(_equal_bits, a.tensors, b.tensors)) for a, b in pairs):
        return False
    if [_formula(part) for part in one.spec.reft] != [_formula(part) for part in other.spec.reft]:
        return False
    tensors = [(found.tensors, other.edits[site].tensors) for site, found in one.edits.items()]
    return all(a.keys() == b.keys() and all(_equal_bits(a[name], b[name]) for name in a) for a, b in tensors)


def _formula(part: ReftSpec) -> tuple[object, ...]:
    """What a ReFT part does with its tensors, and to which tokens; layers, ranks and sides are the tensors' own."""
    return part.method, part.activation, part.weight, part.positions


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one is other or torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (one, other)))  # as numbers, NaN would equal nothing


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
