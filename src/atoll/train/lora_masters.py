"""The LoRA factors of a training job: float32 masters, seen by the forward as fused factors.

Factors of linears that share an input are stored fused, as model.apply reads them. Used by weights.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from atoll.model.adapter import Adapter, LoraModule
from atoll.model.apply import Part, Update
from atoll.model.sites import Site, in_file_order
from atoll.train.flat import FlatVector

Groups: TypeAlias = Sequence[Sequence[str]]  # the targets of each fused linear


class LoraMasters:
    """An adapter's A and B as leaves of a flat vector."""

    def __init__(self, adapter: Adapter, linears: Mapping[str, tuple[int, int]], flat: FlatVector, groups: Groups) -> None:
        self._flat, self._groups = flat, groups
        self._sites = in_file_order(adapter.modules)
        self._updates: dict[tuple[int, int], Update] = {}
        self._slices: dict[Site, tuple[Tensor, Tensor, float]] = {}
        for layer in sorted({site.layer for site in self._sites}):
            for group, targets in enumerate(groups):
                self._fuse(adapter, linears, layer, group, [t for t in targets if Site(layer, t) in adapter.modules])

    def _fuse(self, adapter: Adapter, linears: Mapping[str, tuple[int, int]], layer: int, group: int, members: list[str]) -> None:
        if not members:
            return
        modules = [adapter.modules[Site(layer, target)] for target in members]
        a = self._flat.leaf(sum(module.rank for module in modules), modules[0].a.shape[1])
        starts, column = {}, 0
        for target in self._groups[group]:
            starts[target] = column
            column += linears[target][0]
        parts, row = [], 0
        for target, module in zip(members, modules, strict=True):
            d_out = module.b.shape[0]
            b = self._flat.leaf(module.rank, d_out)
            with torch.no_grad():
                a[row : row + module.rank].copy_(module.a)
                b.copy_(module.b.T)
            parts.append(Part(row, row + module.rank, starts[target], starts[target] + d_out, b, module.scaling))
            self._slices[Site(layer, target)] = (a.detach()[row : row + module.rank], b.detach(), module.scaling)
            row += module.rank
        self._updates[layer, group] = Update(a, tuple(parts))

    def update(self, layer: int, group: int, dropout: float = 0.0, seed: int | None = None) -> Update | None:
        """The factors at (layer, group), with the dropout mask of a step's `seed` (None: no dropout)."""
        found = self._updates.get((layer, group))
        if found is None or seed is None or not dropout:
            return found
        # Mixed down to 32 bits here, because torch's CPU generator ignores the higher bits of a seed: steps 1024 apart would share their masks.
        return found._replace(dropout=dropout, dropout_seed=zlib.crc32(f"{seed} {layer} {group}".encode()))

    def modules(self, values: Tensor | None = None) -> dict[Site, LoraModule]:
        """A copy of the factors as they are now, or as they were in `values`."""
        copy = self._flat.copy_of
        return {
            site: LoraModule(copy(a, values), copy(b, values).T.contiguous(), scaling)
            for site in self._sites
            for a, b, scaling in [self._slices[site]]
        }
