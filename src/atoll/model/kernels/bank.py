"""Resident adapters for the compiled forward: each in one block of memory, in the order in which its sites are read.

Ranks stay what they are (padded to pairs, and to 16 where linears share an input), so a small adapter takes little. Nothing is gathered: the forward
takes a pointer a row.

Used by the engine's pool through `CompiledDecoder.new_bank`; the plain version is model/bank.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from atoll.model.adapter import Adapter
from atoll.model.sites import GROUPS, TARGETS, Site

if TYPE_CHECKING:
    from atoll.model.apply import BankRows, Update


@dataclass(frozen=True)
class CompiledSlot:
    """One resident adapter. Never asked for an Update: the compiled forward reads its memory."""

    index: int
    handle: int  # address of the library's Adapter

    @property
    def bucket(self) -> int:
        return 0

    def update(self, layer: int, group: int) -> Update | None:
        raise AssertionError("a compiled adapter was given to the plain forward")


class CompiledBank:
    """Adapters in the library's memory. shapes maps a target to its linear's (d_out, d_in)."""

    gathers = False

    def __init__(self, library: Any, model: int, shapes: Mapping[str, tuple[int, int]], num_layers: int, owner: object) -> None:
        self.shapes, self.num_layers = dict(shapes), num_layers
        self._library, self._model = library, model
        self._owner = owner  # whoever frees the model, which must not go before its adapters
        self._handles: dict[int, int] = {}
        self._next = 0

    def __del__(self) -> None:
        for handle in self._handles.values():
            self._library.atoll_adapter_free(ctypes.c_void_p(handle))

    def slot_bytes(self, adapter: Adapter) -> int:
        """Bytes that an adapter takes here."""
        total = 0
        for layer in range(self.num_layers):
            for targets in GROUPS:
                ranks = {t: (module.rank + 1) // 2 * 2 for t in targets if (module := adapter.modules.get(Site(layer, t))) is not None}
                if ranks:
                    shared = (sum(ranks.values()) + 15) // 16 * 16
                    total += shared * self.shapes[targets[0]][1] + sum(rank * self.shapes[t][0] for t, rank in ranks.items())
        return 2 * total

    def load(self, adapter: Adapter) -> CompiledSlot:
        """Pack an adapter. Raises BaseMismatch where it does not fit the base, MemoryError where there is no room."""
        adapter.check_fits(self.shapes, self.num_layers)
        ranks = [adapter.modules[site].rank if site in adapter.modules else 0 for layer in range(self.num_layers) for site in _sites(layer)]
        handle = self._library.atoll_adapter(ctypes.c_void_p(self._model), (ctypes.c_int32 * len(ranks))(*ranks))
        if not handle:
            raise MemoryError("no memory for an adapter's factors")
        for site, module in adapter.modules.items():
            group = next(i for i, targets in enumerate(GROUPS) if site.target in targets)
            member = GROUPS[group].index(site.target)
            a, b = (t.detach().to("cpu", torch.float32).contiguous() for t in (module.a, module.b))
            self._library.atoll_adapter_set(
                ctypes.c_void_p(self._model),
                ctypes.c_void_p(handle),
                site.layer,
                group,
                member,
                ctypes.c_void_p(a.data_ptr()),
                ctypes.c_void_p(b.data_ptr()),
                module.rank,
                ctypes.c_float(module.scaling),
            )
        self._next += 1
        self._handles[self._next] = handle
        return CompiledSlot(self._next, handle)

    def unload(self, slot: CompiledSlot) -> None:
        """Give a slot's memory back. The caller makes sure that no running row uses it."""
        handle = self._handles.pop(slot.index, None)
        if handle is None:
            raise AssertionError(f"adapter slot {slot.index} is freed twice")
        self._library.atoll_adapter_free(ctypes.c_void_p(handle))

    def rows(self, tokens: Sequence[int], slots: Sequence[CompiledSlot]) -> BankRows:
        raise AssertionError("the compiled bank gathers no rows")


def _sites(layer: int) -> list[Site]:
    """The order in which the library counts linears: q k v o gate up down."""
    return [Site(layer, target) for target in TARGETS]
