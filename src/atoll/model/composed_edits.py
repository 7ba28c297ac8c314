"""ReFT's half of the adapter algebra: Σ wᵢ Δᵢ(h) of several adapters' edits as one adapter's parts, exactly.

All edits of a token read the state before any of them, so Δs add up. Parts that edit the same tokens of the same component with the same f become one
part, their fused rows end to end (`Edit`: Uᵀ f(A h + b), with the weight in U): one pair of products instead of several. Such rows are no longer
orthonormal, so the part's method is direft. Parts that cannot be one stay parts of their own, with ReftSpec.weight. Averaging R and W entry by entry,
as the other methods do with LoRA's factors, has no meaning: (Q R, Q W, Q b) is the same edit for every rotation Q.

Used by composed.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from atoll.errors import BaseMismatch
from atoll.model.adapter import Adapter
from atoll.model.positions import Positions
from atoll.model.reft import SUBTRACTS, EditSite, Intervention, ReftSpec


class _Member(NamedTuple):
    """One part of one parent: its spec, with the parent's weight in it, and its tensors by (layer, side)."""

    spec: ReftSpec
    edits: dict[tuple[int, int], Intervention]


class _Likeness(NamedTuple):
    """What parts must share to be one; `alone` is a number of its own for a part that can join no other."""

    positions: Positions
    sides: int
    component: str
    activation: str | None
    alone: int


@torch.no_grad()
def cat_edits(parents: Sequence[Adapter], weights: Sequence[float]) -> tuple[tuple[ReftSpec, ...], dict[EditSite, Intervention]]:
    """The parts and float32 tensors of Σ wᵢ Δᵢ; empty where no parent has edits. Raises BaseMismatch for parents of different hidden sizes."""
    specs: list[ReftSpec] = []
    edits: dict[EditSite, Intervention] = {}
    for members in _groups(parents, weights).values():
        spec, tensors = _one(members[0]) if len(members) == 1 else _stacked(members)
        edits.update({EditSite(len(specs), layer, spec.component, side): found for (layer, side), found in sorted(tensors.items())})
        specs.append(spec)
    return tuple(specs), edits


def stacked_edits(parents: Sequence[Adapter]) -> tuple[int, int]:
    """The number of parts that `cat_edits` of these parents has, and the largest rank of any of them at any layer, without making it."""
    groups = _groups(parents, [1.0] * len(parents)).values()
    ranks = [0]
    for members in groups:
        total: Counter[tuple[int, int]] = Counter()
        for member in members:
            total.update({place: found.rank for place, found in member.edits.items()})
        ranks.extend(total.values())
    return len(groups), max(ranks)


def _groups(parents: Sequence[Adapter], weights: Sequence[float]) -> dict[_Likeness, list[_Member]]:
    """The parents' parts by what makes them one part, in the order in which they come."""
    groups: dict[_Likeness, list[_Member]] = {}
    hidden: dict[int, int] = {}  # hidden size -> the first parent that has it
    for index, (parent, weight) in enumerate(zip(parents, weights, strict=True)):
        for part, spec in enumerate(parent.spec.reft):
            found = {(site.layer, site.side): edit for site, edit in parent.edits.items() if site.part == part}
            hidden.setdefault(int(next(iter(found.values())).r.shape[1]), index)
            # f(W h + b) and - R h scale differently: with a nonlinear f they are not rows of one Uᵀ f(A h + b)
            alone = -1 if spec.activation is None or spec.method not in SUBTRACTS else sum(map(len, groups.values()))
            likeness = _Likeness(spec.positions, spec.sides, spec.component, spec.activation, alone)
            groups.setdefault(likeness, []).append(_Member(replace(spec, weight=spec.weight * float(weight), dropout=0.0), found))
    if len(hidden) > 1:
        (first, _), (second, index) = list(hidden.items())[:2]
        raise BaseMismatch(
            f"adapter {index + 1} cannot be merged with those before it: it edits hidden states of {second} dimensions, they edit {first}",
            hint="merge adapters of one base",
        )
    return groups


def _one(member: _Member) -> tuple[ReftSpec, dict[tuple[int, int], Intervention]]:
    """A part as it is, in float32, with tensors of its own."""

    def copied(found: Intervention) -> Intervention:
        return Intervention(**{name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in found.tensors.items()})

    return member.spec, {place: copied(found) for place, found in member.edits.items()}


def _stacked(members: Sequence[_Member]) -> tuple[ReftSpec, dict[tuple[int, int], Intervention]]:
    """Several parts as one: R = [w₁ R₁; w₂ R₂; …], W the rows of A likewise, as a direft."""
    tensors: dict[tuple[int, int], Intervention] = {}
    for place in sorted({place for member in members for place in member.edits}):
        fused = [found.edit(member.spec) for member in members if (found := member.edits.get(place)) is not None]
        tensors[place] = Intervention(*(torch.cat([getattr(edit, name) for edit in fused]) for name in ("u", "a", "b")))
    ranks = {layer: found.rank for (layer, _), found in tensors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    first = members[0].spec
    spec = ReftSpec(
        method="direft",
        rank=rank,
        layers=None if any(member.spec.layers is None for member in members) else tuple(sorted(ranks)),
        component=first.component,
        positions=first.positions,
        tied=first.sides == 1,
        activation=first.activation,
        rank_pattern={layer: found for layer, found in ranks.items() if found != rank},
    )
    return spec, tensors
