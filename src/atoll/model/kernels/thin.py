"""A training step's fused linear with many adapters' updates, where the thin products of all segments are one compiled call each way.

The arithmetic is model/apply.py's `linear`: bfloat16 factors, activations and results, sums in float32. z and dz are rounded once; gradients of
factors not at all, since they are summed straight into float32. Optional: what does not fit (see `fits`) takes the plain way. thin.h says how it is
done.

Used by apply.py. tests/model/test_thin.py holds both ways equal.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from atoll.model.kernels.training import TrainingOps
from atoll.model.quant import Weight, dense

if TYPE_CHECKING:
    from atoll.model.apply import Update

_LANES = 16  # simd.h's
_MOST_TOKENS, _MOST_RANKS = 2048, 64  # of a segment, of a member


def fits(x: Tensor, updates: Sequence[tuple[int, int, Update]]) -> bool:
    """Whether these updates (start, stop, factors) of bfloat16 x [T, d_in] are what is compiled: LoRA as most know it, over short segments.

    That is float32 factors whose members cover A in order, of even widths; no DoRA, no mix, none beside another. One that is not takes all updates of
    the forward the plain way. Beyond the bounds torch's own products are as fast (docs/notebook.md).
    """
    return (
        x.dtype == torch.bfloat16
        and x.shape[1] % 2 == 0
        and x.is_contiguous()
        and all(
            stop - start <= _MOST_TOKENS
            and update.mix is None
            and update.beside is None
            and _is_master(update.a)
            and [*(part.rank_start for part in update.parts), len(update.a)] == [0, *(part.rank_stop for part in update.parts)]
            and all(part.magnitude is None and (part.out_stop - part.out_start) % 2 == 0 and _is_master(part.b) for part in update.parts)
            and all(len(part.b) <= _MOST_RANKS for part in update.parts)
            for start, stop, update in updates
        )
    )


def _is_master(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


class ThinLinear(torch.autograd.Function):
    """(x, weight, bias, ops, layout, *factors) to y.

    layout: of each segment (start, stop, members, dropout, its seed), a member being (rank, out_start, width, scaling); factors: A and the members' B
    of each segment in order. No two segments have a token in common.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, ops: TrainingOps, layout: Sequence[Any], *factors: Tensor) -> Tensor:
        y = F.linear(x, dense(weight), bias)
        z = x.new_empty(sum((stop - start) * _lanes(members) for start, stop, members, _, _ in layout))
        ops.thin(_Call(x, None, z, y, layout, factors, ()), y)
        ctx.weight = None if isinstance(weight, Tensor) else weight  # its blocks or its part, not what they expand to
        ctx.save_for_backward(x, weight if isinstance(weight, Tensor) else None, z, *factors)
        ctx.ops, ctx.layout = ops, layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, weight, z, *factors = ctx.saved_tensors
        dx = dy @ dense(ctx.weight if ctx.weight is not None else weight) if ctx.needs_input_grad[0] else None
        found = [torch.empty_like(factor) if needed else None for factor, needed in zip(factors, ctx.needs_input_grad[5:], strict=True)]
        call = _Call(x, dx, z, dy, ctx.layout, factors, found)
        ctx.ops.thin_backward(call, dy)
        call.add_dropped(dx)
        return (dx, None, None, None, None, *found)


class _Call:
    """What the library is told of a call (thin.h), and the tensors that must outlive it."""

    def __init__(
        self, x: Tensor, dx: Tensor | None, z: Tensor, y: Tensor, layout: Sequence[Any], factors: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> None:
        d_in, size = x.shape[1], x.element_size()
        self.numbers, self.scalings = array("q", (d_in, y.shape[1], len(layout))), array("f")
        self._dropped: list[tuple[int, int, Tensor | None, Tensor | None, float, int]] = []
        x_at, z_at, dx_at = x.data_ptr(), z.data_ptr(), 0 if dx is None else dx.data_ptr()
        factor, gradient = iter(factors), iter(found or [None] * len(factors))
        for start, stop, members, dropout, seed in layout:
            a = next(factor)
            assert stop <= len(x), "a segment ends beyond the tokens"
            assert a.shape == (sum(rank for rank, *_ in members), d_in), "A is not its members' ranks by d_in"
            here, there = x_at + start * d_in * size, dx_at and dx_at + start * d_in * size
            if dropout:
                hidden, summed = dropped(x[start:stop], dropout, seed), None if dx is None else dx.new_zeros(stop - start, d_in)
                self._dropped.append((start, stop, hidden, summed, dropout, seed))
                here, there = hidden.data_ptr(), 0 if summed is None else summed.data_ptr()
            self.numbers.extend((start, stop - start, a.data_ptr(), here, z_at, there, _at(gradient), len(members)))
            for rank, out_start, width, scaling in members:
                b = next(factor)
                assert b.shape == (rank, width) and out_start + width <= y.shape[1], "B is not its member's ranks by columns"
                self.numbers.extend((rank, out_start, width, b.data_ptr(), _at(gradient)))
                self.scalings.append(scaling)
            z_at += (stop - start) * _lanes(members) * size

    def add_dropped(self, dx: Tensor | None) -> None:
        """What reached x through dropout, which hides the same elements on the way back."""
        for start, stop, _, summed, dropout, seed in self._dropped:
            if dx is not None and summed is not None:
                dx[start:stop] += dropped(summed, dropout, seed)


def dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """x with a share `dropout` of its elements zeroed and the rest scaled by 1 / (1 - dropout).

    The mask comes from the seed, so the backward draws it again.
    """
    if not dropout:
        return x
    kept = torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device) >= dropout
    return x * kept.to(x.dtype).div_(1 - dropout)


def _lanes(members: Sequence[tuple[int, int, int, float]]) -> int:
    """The width of a segment's z: each member's ranks from a multiple of 16 on."""
    return sum(-(-rank // _LANES) * _LANES for rank, *_ in members)


def _at(tensors: Iterator[Tensor | None]) -> int:
    tensor = next(tensors)
    return 0 if tensor is None else tensor.data_ptr()
