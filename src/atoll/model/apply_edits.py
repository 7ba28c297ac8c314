"""Edit hidden states of chosen tokens of one packed batch, in place: the plain version of ReFT in the shared forward.

Index lists are built once a batch and shared by all layers; a batch without edits has none and pays nothing. A site costs two thin products for each
group of tokens that share their tensors. Where several edits name one token, each reads the state as it was before all, so stacking is exact.

Used by decoder.py at six places of every block; `edit_rows` builds the index lists for train and for the engine's runner; bank.py fuses a resident
adapter's edits with `edited_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.model.adapter import Adapter
from atoll.model.batch import EditRows
from atoll.model.positions import PREFIX, SUFFIX, Positions
from atoll.model.reft import COMPONENTS, Edit, side_of

if TYPE_CHECKING:
    from atoll.model.batch import EditWeights


class Edited(Protocol):
    """One part of an adapter as a batch needs it: where it edits, and the weights of its prefix and suffix side."""

    @property
    def positions(self) -> Positions: ...

    @property
    def sides(self) -> tuple[EditWeights, EditWeights]: ...


class FixedEdits:
    """EditWeights that are fused already: one edit a (layer, component)."""

    def __init__(self, edits: Mapping[tuple[int, int], Edit]) -> None:
        self._edits = edits

    def edit(self, layer: int, component: int) -> Edit | None:
        return self._edits.get((layer, component))


class EditedPart(NamedTuple):
    """One part of an adapter with its edits fused; `sides` holds the same object twice where prefix and suffix share their tensors."""

    positions: Positions
    sides: tuple[FixedEdits, FixedEdits]


@torch.no_grad()
def edited_parts(adapter: Adapter, device: torch.device | str = "cpu") -> tuple[EditedPart, ...]:
    """An adapter's ReFT parts for `edit_rows`, in float32 on `device`, sharing no memory with the adapter; () where it has none."""
    parts: list[EditedPart] = []
    for index, spec in enumerate(adapter.spec.reft):
        sides: list[dict[tuple[int, int], Edit]] = [{}, {}]
        for site, found in adapter.edits.items():
            if site.part == index:
                fused = found.edit(spec)
                a, b, u = (tensor.detach().to(device, torch.float32, copy=True).contiguous() for tensor in fused[:3])
                sides[site.side][site.layer, COMPONENTS.index(site.component)] = fused._replace(a=a, b=b, u=u)
        fixed = [FixedEdits(edits) for edits in sides]
        parts.append(EditedPart(spec.positions, (fixed[side_of(spec, PREFIX)], fixed[side_of(spec, SUFFIX)])))
    return tuple(parts)


def edit_rows(rows: Iterable[tuple[int, int, int, int, Sequence[Edited]]], device: torch.device | str = "cpu") -> tuple[EditRows, ...]:
    """Index lists for a packed batch; () where nothing is edited. A row is (start, context, count, num_prompt, its adapter's edited parts):

    its tokens stand at start to start + count of the batch and at context to context + count of its sequence, whose first num_prompt are the prompt.
    """
    tokens: dict[int, list[int]] = {}
    weights: dict[int, tuple[int, EditWeights]] = {}
    for start, context, count, num_prompt, parts in rows:
        if context >= num_prompt:
            continue
        for order, part in enumerate(parts):
            for places, side in zip(part.positions.resolve(num_prompt), part.sides, strict=True):
                here = _between(places, context, context + count)
                if here:
                    tokens.setdefault(id(side), []).extend(start + place - context for place in here)
                    weights[id(side)] = order, side
    # By part, so that a token's edits are summed in one order whatever rows stand beside it.
    keys = sorted(tokens, key=lambda key: weights[key][0])
    return tuple(EditRows(torch.tensor(tokens[key], dtype=torch.int64, device=device), weights[key][1]) for key in keys)


def _between(places: range | tuple[int, ...], start: int, stop: int) -> range | list[int]:
    """Those of ascending places that are from start up to stop."""
    if isinstance(places, range):
        return range(max(places.start, start), min(places.stop, stop))
    return [place for place in places if start <= place < stop]


def apply_edits(hidden: Tensor, layer: int, component: int, edits: Sequence[EditRows]) -> Tensor:
    """Add every edit of (layer, component) to its tokens of hidden [T, D]; other tokens keep their bits. component: an index into reft.COMPONENTS.

    The sum is float32 and rounded to hidden's dtype once. Writes into `hidden`, which must be a fresh tensor that no operation has saved for its
    backward pass. Returns it.
    """
    found = [(rows.tokens, edit) for rows in edits if (edit := rows.weights.edit(layer, component)) is not None]
    if hidden.dtype != torch.float32 and found:
        return _apply_wide(hidden, found)
    deltas = [delta(hidden.index_select(0, tokens), edit) for tokens, edit in found]
    for (tokens, _), change in zip(found, deltas, strict=True):
        hidden = hidden.index_add_(0, tokens, change)
    return hidden


def _apply_wide(hidden: Tensor, found: Sequence[tuple[Tensor, Edit]]) -> Tensor:
    """The same for a narrower dtype: the edited tokens alone are taken out, summed in float32 and put back."""
    tokens, places = torch.unique(torch.cat([tokens for tokens, _ in found]), return_inverse=True)
    before = hidden.index_select(0, tokens).float()
    after, start = before, 0
    for rows, edit in found:
        mine = places[start : start + len(rows)]
        after = after.index_add(0, mine, delta(before.index_select(0, mine), edit))
        start += len(rows)
    return hidden.index_copy_(0, tokens, after.to(hidden.dtype))


def delta(hidden: Tensor, edit: Edit) -> Tensor:
    """Δ [n, D] float32 of hidden states [n, D]: Uᵀ f(A h + b), dropped out where training asks for it."""
    z = torch.addmm(edit.b, hidden.float(), edit.a.T)
    if edit.activation is not None:
        active = activate(z[:, : edit.activated], edit.activation)
        z = torch.cat([active, z[:, edit.activated :]], 1) if edit.activated < z.shape[1] else active
    change = z @ edit.u
    if not edit.dropout:
        return change
    generator = torch.Generator(device=change.device).manual_seed(edit.dropout_seed)
    kept = torch.rand(change.shape, generator=generator, device=change.device) >= edit.dropout
    return change * kept / (1 - edit.dropout)


def activate(z: Tensor, activation: str) -> Tensor:
    """One of reft.ACTIVATIONS, elementwise; gelu is the exact one."""
    function: Any = getattr(torch, activation) if activation in ("relu", "tanh", "sigmoid") else getattr(F, activation)
    result: Tensor = function(z)
    return result
