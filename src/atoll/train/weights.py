"""The tensors of one training job: float32 masters in one flat buffer, seen by the forward as fused LoRA factors.

Every A and B is a leaf whose storage is a slice of one vector, and its gradient a slice of another, so the optimizer, clipping and checkpoints are
single operations on two vectors instead of a walk over hundreds of small tensors. Factors of linears that share an input are stored fused (see
model.apply).

Used by train.loop; `Adapter` in, `Adapter` out.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from atoll.model.adapter import Adapter, LoraModule
from atoll.model.apply import Part, Update
from atoll.model.sites import GROUPS, TARGETS, Site


class TrainableLora:
    """One adapter's masters. Implements model.apply.AdapterWeights.

    values and grads are flat float32 vectors [P]; `values.grad` is `grads`, so an optimizer over `[values]` trains the adapter.
    """

    def __init__(self, adapter: Adapter, linears: Mapping[str, tuple[int, int]], device: torch.device | str = "cpu") -> None:
        self.spec, self._manifest = adapter.spec, adapter.manifest
        self.values = torch.nn.Parameter(torch.zeros(adapter.num_parameters, dtype=torch.float32, device=device))
        self.grads = torch.zeros_like(self.values)
        self.values.grad = self.grads
        self.dropout_seed: int | None = None  # set by the loop before each training forward; None: no dropout (evaluation)
        self._sites = sorted(adapter.modules, key=lambda site: (site.layer, TARGETS.index(site.target)))
        self._updates: dict[tuple[int, int], Update] = {}
        self._slices: dict[Site, tuple[Tensor, Tensor, float]] = {}
        self._offset = 0
        for layer in sorted({site.layer for site in self._sites}):
            for group, targets in enumerate(GROUPS):
                self._fuse(adapter, linears, layer, group, [t for t in targets if Site(layer, t) in adapter.modules])

    def _leaf(self, *shape: int) -> Tensor:
        """The next `shape` elements of the flat vectors, as a leaf that accumulates into its slice of `grads`."""
        start, self._offset = self._offset, self._offset + int(torch.Size(shape).numel())
        leaf = self.values.detach()[start : self._offset].view(shape).requires_grad_()
        leaf.grad = self.grads[start : self._offset].view(shape)
        return leaf

    def _fuse(self, adapter: Adapter, linears: Mapping[str, tuple[int, int]], layer: int, group: int, members: list[str]) -> None:
        if not members:
            return
        modules = [adapter.modules[Site(layer, target)] for target in members]
        a = self._leaf(sum(module.rank for module in modules), modules[0].a.shape[1])
        starts, column = {}, 0
        for target in GROUPS[group]:
            starts[target] = column
            column += linears[target][0]
        parts, row = [], 0
        for target, module in zip(members, modules, strict=True):
            d_out = module.b.shape[0]
            b = self._leaf(module.rank, d_out)
            with torch.no_grad():
                a[row : row + module.rank].copy_(module.a)
                b.copy_(module.b.T)
            parts.append(Part(row, row + module.rank, starts[target], starts[target] + d_out, b, module.scaling))
            self._slices[Site(layer, target)] = (a.detach()[row : row + module.rank], b.detach(), module.scaling)
            row += module.rank
        self._updates[layer, group] = Update(a, tuple(parts))

    def update(self, layer: int, group: int) -> Update | None:
        found = self._updates.get((layer, group))
        if found is None or self.dropout_seed is None or not self.spec.dropout:
            return found
        # Mixed down to 32 bits here, because torch's CPU generator ignores the higher bits of a seed: steps 1024 apart would share their masks.
        seed = zlib.crc32(f"{self.dropout_seed} {layer} {group}".encode())
        return found._replace(dropout=self.spec.dropout, dropout_seed=seed)

    def adapter(self, values: Tensor | None = None) -> Adapter:
        """A copy of the factors as they are now, or as they were in `values` [P] (the best step's)."""
        shift = self.values.detach() if values is None else values
        base = self.values.detach().storage_offset()

        def copy(leaf: Tensor) -> Tensor:
            start = leaf.storage_offset() - base
            return shift[start : start + leaf.numel()].view(leaf.shape).clone()

        modules = {site: LoraModule(copy(a), copy(b).T.contiguous(), scaling) for site in self._sites for a, b, scaling in [self._slices[site]]}
        return Adapter(self.spec, modules, self._manifest)
