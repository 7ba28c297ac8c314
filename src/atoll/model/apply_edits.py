"""Edit hidden states of chosen tokens of one packed batch, in place: the plain version of ReFT in the shared forward.

Index lists are built once a batch and shared by all layers; a batch without edits has none and pays nothing. A site costs two thin products for each
group of tokens that share their tensors. Where several edits name one token, each reads the state as it was before all, so stacking is exact.

Used by decoder.py at six places of every block; `edit_rows` builds the index lists for train and for the engine's runner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.model.batch import EditRows
from atoll.model.positions import Positions
from atoll.model.reft import Edit

if TYPE_CHECKING:
    from atoll.model.batch import EditWeights


class Edited(Protocol):
    """One part of an adapter as a batch needs it: where it edits, and the weights of its prefix and suffix side."""

    @property
    def positions(self) -> Positions: ...

    @property
    def sides(self) -> tuple[EditWeights, EditWeights]: ...


def edit_rows(rows: Iterable[tuple[int, int, int, int, Sequence[Edited]]], device: torch.device | str = "cpu") -> tuple[EditRows, ...]:
    """Index lists for a packed batch; () where nothing is edited. A row is (start, context, count, num_prompt, its adapter's edited parts):

    its tokens stand at start to start + count of the batch and at context to context + count of its sequence, whose first num_prompt are the prompt.
    """
    tokens: dict[int, list[int]] = {}
    weights: dict[int, EditWeights] = {}
    for start, context, count, num_prompt, parts in rows:
        if context >= num_prompt:
            continue
        for part in parts:
            for places, side in zip(part.positions.resolve(num_prompt), part.sides, strict=True):
                here = [start + place - context for place in places if context <= place < context + count]
                if here:
                    tokens.setdefault(id(side), []).extend(here)
                    weights[id(side)] = side
    return tuple(EditRows(torch.tensor(found, dtype=torch.int64, device=device), weights[key]) for key, found in tokens.items())


def apply_edits(hidden: Tensor, layer: int, component: int, edits: Sequence[EditRows]) -> Tensor:
    """Add every edit of (layer, component) to its tokens of hidden [T, D]; other tokens keep their bits. component: an index into reft.COMPONENTS.

    Writes into `hidden`, which must be a fresh tensor that no operation has saved for its backward pass. Returns it.
    """
    found = [(rows.tokens, edit) for rows in edits if (edit := rows.weights.edit(layer, component)) is not None]
    deltas = [delta(hidden.index_select(0, tokens), edit) for tokens, edit in found]
    for (tokens, _), change in zip(found, deltas, strict=True):
        hidden = hidden.index_add_(0, tokens, change.to(hidden.dtype))
    return hidden


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
