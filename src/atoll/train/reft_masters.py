"""The ReFT tensors of a training job: float32 masters, stacked over layers, R's rows kept orthonormal.

All sites of a part that have equal rank lie stacked, R [n, r, d] and so on, so that what would be a few small operations a layer is one operation a
forward (fusing W and R into what forwards read) or one a step (bringing the R's back to orthonormal rows after the optimizer moved them).

Used by weights.py. Formulas: model.reft.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from atoll.model.adapter import Adapter
from atoll.model.apply_edits import EditedPart, FixedEdits
from atoll.model.positions import PREFIX, SUFFIX
from atoll.model.reft import COMPONENTS, ORTHONORMAL, Edit, EditSite, Intervention, ReftSpec, retract, side_of
from atoll.train.flat import FlatVector


class _Stack:
    """The sites of one part and one rank, and their leaves by tensor name, each with the sites as its first dimension."""

    def __init__(self, spec: ReftSpec, sites: list[EditSite]) -> None:
        self.spec, self.sites = spec, sites
        self.tensors: dict[str, Tensor] = {}

    def take(self, names: tuple[str, ...], adapter: Adapter, flat: FlatVector) -> None:
        """Make leaves of the tensors called so, those that the method has, and copy the adapter's into them."""
        for name in names:
            found = [adapter.edits[site].tensors.get(name) for site in self.sites]
            given = [tensor for tensor in found if tensor is not None]
            if not given:
                continue
            leaf = flat.leaf(len(given), *given[0].shape)
            with torch.no_grad():
                leaf.copy_(torch.stack([tensor.float() for tensor in given]))
            self.tensors[name] = leaf

    def edits(self) -> Iterator[tuple[EditSite, Edit]]:
        """Every site's edit as it is now; differentiable in the leaves, whose gradients arrive stacked too."""
        fused = Intervention(**self.tensors).edit(self.spec)
        for site, a, b, u in zip(self.sites, fused.a.unbind(0), fused.b.unbind(0), fused.u.unbind(0), strict=True):
            yield site, fused._replace(a=a, b=b, u=u)


class ReftMasters:
    """An adapter's ReFT tensors as leaves of a flat vector: first all W, then everything that is never decayed (R, b, c), from `first_kept` on."""

    def __init__(self, adapter: Adapter, flat: FlatVector) -> None:
        self._flat, self._specs = flat, adapter.spec.reft
        by_rank: dict[tuple[int, int], list[EditSite]] = {}
        for site, found in sorted(adapter.edits.items()):
            by_rank.setdefault((site.part, found.rank), []).append(site)
        self._stacks = [_Stack(self._specs[part], sites) for (part, _), sites in by_rank.items()]
        for stack in self._stacks:
            stack.take(("w",), adapter, flat)
        self.first_kept = flat.taken
        for stack in self._stacks:
            stack.take(("r", "b", "c"), adapter, flat)

    def parts(self, seed: int | None) -> tuple[EditedPart, ...]:
        """The parts for one forward (and its backward), fused from the masters as they are now, with the dropout masks of a step's `seed`."""
        sides: list[list[dict[tuple[int, int], Edit]]] = [[{}, {}] for _ in self._specs]
        for stack in self._stacks:
            for site, edit in stack.edits():
                if stack.spec.dropout and seed is not None:
                    mask = zlib.crc32(f"{seed} reft {site.part} {site.layer} {site.side}".encode())
                    edit = edit._replace(dropout=stack.spec.dropout, dropout_seed=mask)
                sides[site.part][site.side][site.layer, COMPONENTS.index(site.component)] = edit
        parts = []
        for spec, (prefix, suffix) in zip(self._specs, sides, strict=True):
            own = (FixedEdits(prefix), FixedEdits(suffix))
            parts.append(EditedPart(spec.positions, (own[side_of(spec, PREFIX)], own[side_of(spec, SUFFIX)])))
        return tuple(parts)

    @torch.no_grad()
    def retract(self) -> None:
        """Bring every R that must be so back to orthonormal rows: one batched polar factor for all layers of a rank."""
        for stack in self._stacks:
            if stack.spec.method in ORTHONORMAL:
                stack.tensors["r"].copy_(retract(stack.tensors["r"]))

    def tensors(self) -> list[Tensor]:
        """Views of the adapter's own tensors, each site's."""
        return [part for stack in self._stacks for leaf in stack.tensors.values() for part in leaf.detach().unbind(0)]

    def edits(self, values: Tensor | None = None) -> dict[EditSite, Intervention]:
        """A copy of the tensors as they are now, or as they were in `values`."""
        return {
            site: Intervention(**{name: self._flat.copy_of(leaf.detach()[index], values) for name, leaf in stack.tensors.items()})
            for stack in self._stacks
            for index, site in enumerate(stack.sites)
        }
