"""Resident adapters for the compiled forward: each in one block of memory, in the order in which its sites are read.

Each side of a ReFT part has a block of its own. Ranks stay what they are (padded to pairs, and to 16 where linears share an input), so a small
adapter takes little. Nothing is gathered: the forward takes a pointer a row, and one for each group of edited tokens.

Used by the engine's pool through `CompiledDecoder.new_bank`; the plain version is model/bank.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from atoll.errors import EngineError
from atoll.model.adapter import Adapter
from atoll.model.apply_edits import edited_parts
from atoll.model.dora import BaseWeight, gains
from atoll.model.positions import Positions
from atoll.model.reft import ACTIVATIONS, COMPONENTS, fused_bytes
from atoll.model.sites import GROUPS, TARGETS, Site

if TYPE_CHECKING:
    from atoll.model.apply import BankRows, Update
    from atoll.model.batch import EditWeights
    from atoll.model.reft import Edit


class CompiledEdits:
    """One side's edits in the library's memory, which goes with them. Never asked for an Edit: the compiled forward reads its memory."""

    def __init__(self, library: Any, handle: int) -> None:
        self._library, self.handle = library, handle

    def __del__(self) -> None:
        self._library.atoll_edits_free(ctypes.c_void_p(self.handle))

    def edit(self, layer: int, component: int) -> Edit | None:
        raise AssertionError("compiled edits were given to the plain forward")


class CompiledPart(NamedTuple):
    """One ReFT part of a resident adapter, for apply_edits.edit_rows; `sides` holds the same object twice where they share their tensors."""

    positions: Positions
    sides: tuple[CompiledEdits, CompiledEdits]


class Packed:
    """An adapter in the library's memory, which goes with it. handle: its LoRA factors, None without any."""

    def __init__(self, library: Any, handle: int | None, parts: tuple[CompiledPart, ...] = ()) -> None:
        self._library, self.handle, self.parts = library, handle, parts

    def __del__(self) -> None:
        if self.handle is not None:
            self._library.atoll_adapter_free(ctypes.c_void_p(self.handle))


@dataclass(frozen=True)
class CompiledSlot:
    """One resident adapter. Never asked for an Update: the compiled forward reads its memory."""

    index: int
    packed: Packed
    bucket: int = 0  # a bank of this kind has no rank buckets

    gathers = False

    @property
    def parts(self) -> tuple[CompiledPart, ...]:
        """Its ReFT edits."""
        return self.packed.parts

    def update(self, layer: int, group: int) -> Update | None:
        raise AssertionError("a compiled adapter was given to the plain forward")


class CompiledBank:
    """Adapters in the library's memory. shapes maps a target to its linear's (d_out, d_in)."""

    gathers = False

    def __init__(self, library: Any, model: int, shapes: Mapping[str, tuple[int, int]], num_layers: int, owner: object, weight: BaseWeight) -> None:
        self._weight = weight
        self.shapes, self.num_layers = dict(shapes), num_layers
        self._library, self._model = library, model
        self._owner = owner  # whoever frees the model, which must not go before its adapters
        self._slots: dict[int, CompiledSlot] = {}
        self._next = 0

    def slot_bytes(self, adapter: Adapter) -> int:
        """Bytes that an adapter takes here."""
        edits = sum(fused_bytes(adapter.spec.reft[site.part], found) for site, found in adapter.edits.items())
        edits += sum(4 * module.b.shape[0] for module in adapter.modules.values() if module.magnitude is not None)
        return edits + int(self._library.atoll_adapter_size(ctypes.c_void_p(self._model), self._ranks(adapter)))

    def pack(self, adapter: Adapter) -> Packed:
        """Bring an adapter into the library's layout: the slow part of `load`, which any thread may do beside a running forward.

        Raises BaseMismatch where it does not fit the base, EngineError where there is no room.
        """
        adapter.check_fits(self.shapes, self.num_layers)
        parts = self._pack_edits(adapter)
        if not adapter.modules:
            return Packed(self._library, None, parts)
        handle = self._library.atoll_adapter(ctypes.c_void_p(self._model), self._ranks(adapter))
        if not handle:
            raise EngineError("no memory for an adapter's factors", hint="lower adapter_bytes")
        packed = Packed(self._library, handle, parts)
        for site, module in adapter.modules.items():
            group = next(i for i, targets in enumerate(GROUPS) if site.target in targets)
            a, b = (t.detach().to("cpu", torch.float32).contiguous() for t in (module.a, module.b))
            self._library.atoll_adapter_set(
                ctypes.c_void_p(self._model),
                ctypes.c_void_p(handle),
                site.layer,
                group,
                GROUPS[group].index(site.target),
                ctypes.c_void_p(a.data_ptr()),
                ctypes.c_void_p(b.data_ptr()),
                module.rank,
                ctypes.c_float(module.scaling),
            )
        for site, gain in gains(adapter, self._weight).items():
            group = next(i for i, targets in enumerate(GROUPS) if site.target in targets)
            self._library.atoll_adapter_gain(
                ctypes.c_void_p(self._model),
                ctypes.c_void_p(handle),
                site.layer,
                group,
                GROUPS[group].index(site.target),
                ctypes.c_void_p(gain.contiguous().data_ptr()),
            )
        return packed

    def _pack_edits(self, adapter: Adapter) -> tuple[CompiledPart, ...]:
        parts = []
        for part in edited_parts(adapter):
            prefix, suffix = part.sides
            packed = self._pack_side(prefix)
            parts.append(CompiledPart(part.positions, (packed, packed if suffix is prefix else self._pack_side(suffix))))
        return tuple(parts)

    def _pack_side(self, weights: EditWeights) -> CompiledEdits:
        places = [(layer, component) for layer in range(self.num_layers) for component in range(len(COMPONENTS))]
        edits = {place: edit for place in places if (edit := weights.edit(*place)) is not None}
        ranks = (ctypes.c_int32 * len(places))(*(len(edits[place].b) if place in edits else 0 for place in places))
        handle = self._library.atoll_edits(ctypes.c_void_p(self._model), ranks)
        if not handle:
            raise EngineError("no memory for an adapter's edits", hint="lower adapter_bytes")
        packed = CompiledEdits(self._library, handle)
        for (layer, component), edit in edits.items():
            self._library.atoll_edits_set(
                ctypes.c_void_p(self._model),
                ctypes.c_void_p(handle),
                layer,
                component,
                *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (edit.a, edit.b, edit.u)),
                ACTIVATIONS.index(edit.activation) + 1 if edit.activation is not None else 0,
                edit.activated,
            )
        return packed

    def load(self, adapter: Adapter, packed: Packed | None = None) -> CompiledSlot:
        """Make an adapter resident, packing it unless that was done. Raises what `pack` raises."""
        self._next += 1
        slot = self._slots[self._next] = CompiledSlot(self._next, packed or self.pack(adapter))
        return slot

    def unload(self, slot: CompiledSlot) -> None:
        """Give a slot's memory back. The caller makes sure that no running row uses it."""
        if self._slots.pop(slot.index, None) is None:
            raise AssertionError(f"adapter slot {slot.index} is freed twice")

    def rows(self, tokens: Sequence[int], slots: Sequence[CompiledSlot]) -> BankRows:
        raise AssertionError("the compiled bank gathers no rows")

    def _ranks(self, adapter: Adapter) -> ctypes.Array[ctypes.c_int32]:
        """Every linear's rank, in the order in which the library counts them; 0 where the adapter has none."""
        sites = [Site(layer, target) for layer in range(self.num_layers) for target in TARGETS]
        return (ctypes.c_int32 * len(sites))(*(adapter.modules[site].rank if site in adapter.modules else 0 for site in sites))
