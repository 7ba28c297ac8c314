"""The LoRA factors of a training job: float32 masters, seen by the forward as fused factors.

Factors of linears that share an input are stored fused, as model.apply reads them. Under DoRA the rows' lengths follow from the factors and the base,
and are made again after each optimizer step. Used by weights.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from atoll.model.adapter import Adapter, LoraModule
from atoll.model.apply import Part, Update
from atoll.model.dora import BaseWeight, NormsOfJob
from atoll.model.sites import Site, in_file_order
from atoll.train.flat import FlatVector

Groups: TypeAlias = Sequence[Sequence[str]]  # the targets of each fused linear


class LoraMasters:
    """An adapter's A and B as leaves of a flat vector: site by site, or all A's before all B's (`apart`); DoRA's magnitudes come last.

    groups are the targets of each fused linear. weight gives the base's linears, which DoRA needs. removed: a start that is taken out of the base
    (train.start), not trained.
    """

    def __init__(
        self,
        adapter: Adapter,
        linears: Mapping[str, tuple[int, int]],
        flat: FlatVector,
        groups: Groups,
        *,
        apart: bool = False,
        weight: BaseWeight | None = None,
        removed: Mapping[Site, LoraModule] | None = None,
    ) -> None:
        self._flat, self._groups, self._weight, self._stale = flat, groups, weight, True
        self._norms: dict[Site, NormsOfJob] = {}
        self._magnitudes: dict[Site, Tensor] = {}
        self._removed = _constant(adapter, removed, linears, groups) if removed is not None else None
        self._sites = in_file_order(adapter.modules)
        self._updates: dict[tuple[int, int], Update] = {}
        self._slices: dict[Site, tuple[Tensor, Tensor, float]] = {}
        places = _places(adapter, groups)
        first_a = {place: self._leaf_a(adapter, place, members) for place, members in places.items()} if apart else {}
        self.first_b = flat.taken  # where B's begin, if they stand apart
        for place, members in places.items():
            self._fuse(adapter, linears, place, members, first_a[place] if apart else self._leaf_a(adapter, place, members))
        self.first_magnitude = flat.taken
        for site in self._sites if adapter.spec.use_dora else ():
            self._add_magnitude(adapter.modules[site], site)

    def _leaf_a(self, adapter: Adapter, place: tuple[int, int], members: list[str]) -> Tensor:
        modules = [adapter.modules[Site(place[0], target)] for target in members]
        a = self._flat.leaf(sum(module.rank for module in modules), modules[0].a.shape[1])
        with torch.no_grad():
            a.copy_(torch.cat([module.a for module in modules]))
        return a

    def _fuse(self, adapter: Adapter, linears: Mapping[str, tuple[int, int]], place: tuple[int, int], members: list[str], a: Tensor) -> None:
        layer, starts = place[0], _starts(linears, self._groups[place[1]])
        parts, row = [], 0
        for target in members:
            module = adapter.modules[Site(layer, target)]
            d_out = module.b.shape[0]
            b = self._flat.leaf(module.rank, d_out)
            with torch.no_grad():
                b.copy_(module.b.T)
            parts.append(Part(row, row + module.rank, starts[target], starts[target] + d_out, b, module.scaling))
            self._slices[Site(layer, target)] = (a.detach()[row : row + module.rank], b.detach(), module.scaling)
            row += module.rank
        self._updates[place] = Update(a, tuple(parts), beside=self._removed.get(place) if self._removed is not None else None)

    def _add_magnitude(self, module: LoraModule, site: Site) -> None:
        assert module.magnitude is not None and self._weight is not None, "DoRA starts with magnitudes, over a base that is known"
        leaf = self._magnitudes[site] = self._flat.leaf(module.magnitude.numel())
        with torch.no_grad():
            leaf.copy_(module.magnitude)
        self._norms[site] = NormsOfJob(self._weight(site))

    def changed(self) -> None:
        """To be called when the values have been moved: what follows from them is made again before it is next used."""
        self._stale = True

    def _measure(self) -> None:
        """The rows' lengths under the factors of now."""
        self._stale = False
        assert self._weight is not None or not self._norms
        norms = {site: of_job.of(self._weight(site), *self._slices[site]) for site, of_job in self._norms.items() if self._weight is not None}
        for (layer, group), update in self._updates.items() if norms else ():
            sites = [site for site in (Site(layer, target) for target in self._groups[group]) if site in self._slices]
            parts = [part._replace(magnitude=self._magnitudes[site], norm=norms[site]) for site, part in zip(sites, update.parts, strict=True)]
            self._updates[layer, group] = update._replace(parts=tuple(parts))

    def update(self, layer: int, group: int, dropout: float = 0.0, seed: int | None = None) -> Update | None:
        """The factors at (layer, group), with the dropout mask of a step's `seed` (None: no dropout)."""
        if self._stale:
            self._measure()
        found = self._updates.get((layer, group))
        if found is None or seed is None or not dropout:
            return found
        # Mixed down to 32 bits here, because torch's CPU generator ignores the higher bits of a seed: steps 1024 apart would share their masks.
        return found._replace(dropout=dropout, dropout_seed=zlib.crc32(f"{seed} {layer} {group}".encode()))

    def tensors(self) -> list[Tensor]:
        """Views of the adapter's own tensors: A [r, d_in] and B transposed [r, d_out] of each site, and its magnitude [d_out]."""
        return [tensor for a, b, _ in self._slices.values() for tensor in (a, b)] + [leaf.detach() for leaf in self._magnitudes.values()]

    def modules(self, values: Tensor | None = None) -> dict[Site, LoraModule]:
        """A copy of the factors as they are now, or as they were in `values`."""
        copy, magnitudes = self._flat.copy_of, self._magnitudes
        return {
            site: LoraModule(copy(a, values), copy(b, values).T.contiguous(), scaling, copy(magnitudes[site], values) if site in magnitudes else None)
            for site in self._sites
            for a, b, scaling in [self._slices[site]]
        }


def _places(adapter: Adapter, groups: Groups) -> dict[tuple[int, int], list[str]]:
    """The members of each (layer, group) that an adapter changes, in order."""
    found = {}
    for layer in sorted({site.layer for site in adapter.modules}):
        for group, targets in enumerate(groups):
            if members := [target for target in targets if Site(layer, target) in adapter.modules]:
                found[layer, group] = members
    return found


def _starts(linears: Mapping[str, tuple[int, int]], targets: Sequence[str]) -> dict[str, int]:
    """The first column of each of a group's targets in its fused output."""
    widths = [linears[target][0] for target in targets]
    return {target: sum(widths[:place]) for place, target in enumerate(targets)}


def _constant(
    adapter: Adapter, modules: Mapping[Site, LoraModule], linears: Mapping[str, tuple[int, int]], groups: Groups
) -> dict[tuple[int, int], Update]:
    """Updates that nobody trains, by (layer, group)."""
    found = {}
    for (layer, group), members in _places(adapter, groups).items():
        here, starts, row, parts = [modules[Site(layer, target)] for target in members], _starts(linears, groups[group]), 0, []
        for target, module in zip(members, here, strict=True):
            b = module.b.detach().T.contiguous()
            parts.append(Part(row, row + module.rank, starts[target], starts[target] + b.shape[1], b, module.scaling))
            row += module.rank
        found[layer, group] = Update(torch.cat([module.a.detach() for module in here]), tuple(parts))
    return found
