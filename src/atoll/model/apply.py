"""Add many adapters' updates to one fused linear of one packed batch.

Each segment of neighbouring tokens has its adapter; its factors for a group of linears that share an input (q, k, v) are fused into one thin A, so a
segment costs one shrink and one expand a member. This plain version serves training (with gradients through the same arithmetic) and prefill.
Decode rows, one token each, take the batched version: gather the rows' factors from the bank and do one batched product a member.
tests/model/test_apply.py holds both equal.

Many weightings of the same adapters (compose) are one more factor: with the adapters stacked to one A, equal blocks of tokens differ in a `mix` of
z = x Aᵀ alone, and its gradient comes out of products that are done anyway. Where merged weights are cheaper, blocks have weights of their own.

Used by decoder.py for every linear. Who owns what: the bank owns the served tensors, a training job owns its own; this file only reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.model.batch import AdapterBatch
from atoll.model.kernels.thin import ThinLinear, dropped, fits
from atoll.model.kernels.training import TrainingOps
from atoll.model.quant import Weight, dense


class Part(NamedTuple):
    """One member of a group: columns out_start to out_stop of the fused output come from rows rank_start to rank_stop of the fused A, times b.

    b [r, d_out] (the file's B transposed); the update is scaling * z[:, ranks] @ b. DoRA (Liu et al. 2024, arXiv 2402.09353): the columns, base and
    update but not the bias, are then multiplied by magnitude / norm [d_out] float32; a norm of None is 1, for a magnitude that was divided before.
    """

    rank_start: int
    rank_stop: int
    out_start: int
    out_stop: int
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None

    @property
    def gain(self) -> Tensor | None:
        """What DoRA multiplies the columns by, [d_out] float32."""
        return self.magnitude if self.magnitude is None or self.norm is None else self.magnitude / self.norm


class Update(NamedTuple):
    """An adapter's factors at one fused linear: a [R, d_in] with R the sum of its members' ranks, and the members.

    dropout is the share of x's elements that training hides from A (the rest scaled up); the members of a group see the same mask, drawn from
    dropout_seed. mix [P, R]: the segment's tokens are P blocks of equal length, and z = x Aᵀ of block p is multiplied by mix[p] before it meets b.
    beside: one more update of the same tokens, which is not trained (PiSSA and OLoRA take their start out of the base by it).
    """

    a: Tensor
    parts: tuple[Part, ...]
    dropout: float = 0.0
    dropout_seed: int = 0
    mix: Tensor | None = None
    beside: Update | None = None


class AdapterWeights(Protocol):
    """Anything that can say what it adds at a fused linear: a slot of the bank, or the tensors of a training job."""

    def update(self, layer: int, group: int) -> Update | None:
        """The factors at (layer, group), in the compute dtype or in float32; None where the adapter changes nothing."""
        ...


@dataclass(frozen=True)
class BankRows:
    """Decode rows that use resident adapters: token i = tokens[k] uses slot slots[k] of one bank bucket. Several buckets, several entries."""

    buckets: tuple[BucketRows, ...]


class BlockWeights(Protocol):
    """Merged weights: the batch's tokens are P blocks of equal length, each with a weight of its own in place of the base's."""

    def merged(self, layer: int, group: int, weight: Tensor) -> Tensor | None:
        """[P, d_out, d_in] for the base's weight [d_out, d_in], good until the next call; None where all blocks use the base's."""
        ...


class BucketRows(Protocol):
    """The rows of one rank bucket: see bank.py."""

    tokens: Tensor

    def gathered(self, layer: int, group: int) -> tuple[Tensor, tuple[tuple[int, int, int, int, Tensor], ...]] | None:
        """(a [n, R, d_in], ((rank_start, rank_stop, out_start, out_stop, b [n, r, d_out]), …)), scaling folded into b; None where no row uses it."""
        ...


def linear(x: Tensor, weight: Weight, bias: Tensor | None, layer: int, group: int, adapters: AdapterBatch, ops: TrainingOps | None = None) -> Tensor:
    """x Wᵀ + bias, plus every segment's update. x [T, d_in], weight [d_out, d_in] frozen, held whole or as blocks; returns [T, d_out].

    With gradients enabled the result is differentiable in x and in every A, B and mix, never in W; ops are the compiled operations for x, if any.
    """
    updates = [(s.start, s.stop, found) for s in adapters.segments if s.stop > s.start and (found := s.weights.update(layer, group)) is not None]
    updates += [(start, stop, u.beside) for start, stop, u in updates if u.beside is not None]
    if torch.is_grad_enabled() and (x.requires_grad or any(_is_trained(u) for _, _, u in updates)):
        assert adapters.bank_rows is None, "decode rows of a bank have no gradients"
        assert adapters.blocks is None, "merged weights have no gradients"
        if ops is not None and updates and fits(x, updates):
            members = [(start, stop, [_member(part) for part in u.parts], u.dropout, u.dropout_seed) for start, stop, u in updates]
            thin: Tensor = ThinLinear.apply(x, weight, bias, ops, members, *(t for _, _, u in updates for t in (u.a, *(part.b for part in u.parts))))
            return thin
        tensors = [t for _, _, u in updates for t in (u.a, u.mix, *(t for part in u.parts for t in (part.b, part.magnitude)))]
        layout = [(start, stop, [(*part[:4], part.scaling, part.norm) for part in u.parts], u.dropout, u.dropout_seed) for start, stop, u in updates]
        late = bias if _has_gains(updates) else None
        out: Tensor = _LoraLinear.apply(x, weight, bias if late is None else None, late, layout, *tensors)
        return out
    late = bias if _has_gains(updates) else None
    y = _base_product(x, dense(weight), bias if late is None else None, layer, group, adapters.blocks)
    for start, stop, update in updates:
        _add_segment(y[start:stop], x[start:stop], update)
    if adapters.bank_rows is not None:
        for bucket in adapters.bank_rows.buckets:
            _add_bucket(y, x, bucket, layer, group)
    return y if late is None else y.add_(late)


def _member(part: Part) -> tuple[int, int, int, float]:
    """(rank, first column, width, scaling)."""
    return part.rank_stop - part.rank_start, part.out_start, part.out_stop - part.out_start, part.scaling


def _has_gains(updates: Sequence[tuple[int, int, Update]]) -> bool:
    """Whether any is DoRA's: then the bias is added last, because the gain leaves it out."""
    return any(part.magnitude is not None for _, _, update in updates for part in update.parts)


def _is_trained(update: Update) -> bool:
    others = (update.mix, *(part.magnitude for part in update.parts))
    return update.a.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in others)


def _base_product(x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, group: int, blocks: BlockWeights | None) -> Tensor:
    """x Wᵀ + bias, with each block's own W where it has one. Returns [T, d_out]."""
    merged = blocks.merged(layer, group, weight) if blocks is not None else None
    if merged is None:
        return F.linear(x, weight, bias)
    y = torch.bmm(x.reshape(len(merged), -1, x.shape[1]), merged.mT).view(len(x), -1)
    return y if bias is None else y.add_(bias)


def _mixed(z: Tensor, mix: Tensor) -> Tensor:
    """z [t, R] with block p of its tokens multiplied by mix[p]; mix [P, R] in z's dtype, t a multiple of P."""
    return (z.view(len(mix), -1, z.shape[1]) * mix.unsqueeze(1)).view_as(z)


def _add_segment(y: Tensor, x: Tensor, update: Update) -> None:
    """y += Σ scaling mix (x Aᵀ) b in place, for one segment, and DoRA's gain on the sum. y [t, d_out], x [t, d_in]."""
    z = x @ update.a.to(x.dtype).T
    if update.mix is not None:
        z.view(len(update.mix), -1, z.shape[1]).mul_(update.mix.to(x.dtype).unsqueeze(1))
    for part in update.parts:
        columns = y[:, part.out_start : part.out_stop].addmm_(z[:, part.rank_start : part.rank_stop], part.b.to(x.dtype), alpha=part.scaling)
        if (gain := part.gain) is not None:
            columns.mul_(gain.to(x.dtype))


def _add_bucket(y: Tensor, x: Tensor, rows: BucketRows, layer: int, group: int) -> None:
    """The batched version for decode: n rows, each with its own factors. The shrink is [n, 1, d_in] x [n, d_in, R]."""
    found = rows.gathered(layer, group)
    if found is None:
        return
    a, parts = found
    z = torch.bmm(x.index_select(0, rows.tokens).unsqueeze(1), a.transpose(1, 2))
    for rank_start, rank_stop, out_start, out_stop, b in parts:
        update = torch.bmm(z[:, :, rank_start:rank_stop], b).squeeze(1)
        y[:, out_start:out_stop].index_add_(0, rows.tokens, update)


class _LoraLinear(torch.autograd.Function):
    """`linear` with the backward by hand: dX = dY W + dZ A, dA = dZᵀ X, dB = s (mix Z)ᵀ dY, nothing for W; with dV = s dY Bᵀ, dZ = mix dV and
    dmix = Σ Z dV over a block's tokens. Under DoRA, Y = gain U + bias: dmagnitude = Σ U dY / norm, and dY is gain dY in all of the above; the norm
    counts as a constant, as in the paper's section 4.3.

    By hand because autograd would keep each slice and cast as a node of its own, and because the cheap association (never form dY Xᵀ) should be
    visible. Factors come in as float32 masters and are rounded to x's dtype once; their gradients leave in the masters' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, late: Tensor | None, layout: Sequence[Any], *tensors: Tensor | None
    ) -> Tensor:
        y = F.linear(x, dense(weight), bias)
        saved: list[Tensor | None] = []
        queue = iter(tensors)
        for start, stop, parts, dropout, seed in layout:
            a, mix = (None if tensor is None else tensor.to(x.dtype) for tensor in (next(queue), next(queue)))
            assert a is not None
            z = dropped(x[start:stop], dropout, seed) @ a.T
            saved += [a, mix, z]
            mixed = z if mix is None else _mixed(z, mix)
            for rank_start, rank_stop, out_start, out_stop, scaling, norm in parts:
                b, magnitude = cast(Tensor, next(queue)).to(x.dtype), next(queue)
                columns, before, gain = y[start:stop, out_start:out_stop], None, None
                columns.addmm_(mixed[:, rank_start:rank_stop], b, alpha=scaling)
                if magnitude is not None:
                    before, gain = columns.clone(), (magnitude if norm is None else magnitude / norm).to(x.dtype)
                    columns.mul_(gain)
                saved += [b, before, gain]
        if late is not None:
            y.add_(late)
        ctx.weight = None if isinstance(weight, Tensor) else weight  # its blocks or its part, not what they expand to
        # without factors, x would only take memory
        ctx.save_for_backward(x if layout else None, weight if isinstance(weight, Tensor) else None, *saved)
        ctx.layout, ctx.dtypes = layout, [None if tensor is None else tensor.dtype for tensor in tensors]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, weight, *saved = ctx.saved_tensors
        need_x, need_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dy, dmagnitudes = _through_gains(ctx.layout, saved, dy)
        dx = dy @ dense(ctx.weight if ctx.weight is not None else weight) if need_x else None
        out: list[Tensor | None] = []
        queue = iter(saved)
        for start, stop, parts, dropout, seed in ctx.layout:
            a, mix, z = next(queue), next(queue), next(queue)
            first = len(out)  # this segment's place among the tensors: A, mix, then each part's B and magnitude
            mixed = z if mix is None or not any(need_factors[first + 2 :]) else _mixed(z, mix)
            dys, dz, dbs = dy[start:stop], torch.empty_like(z), []
            for number, (rank_start, rank_stop, out_start, out_stop, scaling, _) in enumerate(parts):
                place = first + 2 + 2 * number
                b, _, _, dyp = next(queue), next(queue), next(queue), dys[:, out_start:out_stop]
                torch.mul(dyp @ b.T, scaling, out=dz[:, rank_start:rank_stop])
                if need_factors[place]:
                    dbs.append(((mixed[:, rank_start:rank_stop].T @ dyp).float() * scaling).to(ctx.dtypes[place]))
                else:
                    dbs.append(None)
                dbs.append(next(dmagnitudes))
            dmix = None
            if mix is not None:
                if need_factors[first + 1]:
                    dmix = (z * dz).view(len(mix), -1, z.shape[1]).sum(1, dtype=torch.float32).to(ctx.dtypes[first + 1])
                dz = _mixed(dz, mix)
            da = (dz.T @ dropped(x[start:stop], dropout, seed)).to(ctx.dtypes[first]) if need_factors[first] else None
            out += [da, dmix, *dbs]
            if dx is not None and dropout:
                dx[start:stop] += dropped(dz @ a, dropout, seed)
            elif dx is not None:
                dx[start:stop].addmm_(dz, a)
        return (dx, None, None, None, None, *out)


def _through_gains(layout: Sequence[Any], saved: Sequence[Tensor | None], dy: Tensor) -> tuple[Tensor, Iterator[Tensor | None]]:
    """The gradient before DoRA's gains, [T, d_out], and each part's dmagnitude [d_out] float32 in order; without gains, dy itself and nothing."""
    queue, whole = iter(saved), dy
    found: list[Tensor | None] = []
    for start, stop, parts, _, _ in layout:
        for _ in ("a", "mix", "z"):
            next(queue)
        for _, _, out_start, out_stop, _, norm in parts:
            _, before, gain = next(queue), next(queue), next(queue)
            if before is None or gain is None:
                found.append(None)
                continue
            whole = whole.clone() if whole is dy else whole
            columns = whole[start:stop, out_start:out_stop]
            summed = (columns * before).sum(0, dtype=torch.float32)
            found.append(summed if norm is None else summed / norm)
            columns.mul_(gain)
    return whole, iter(found)
