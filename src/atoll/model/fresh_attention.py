"""Causal attention without a cache: over whole rows of a packed batch, with gradients or without. What training and composing run.

Rows are laid into padded blocks (training batches are sorted by length, so they are nearly full). Rows that follow a shared beginning
(PackedBatch.follows) form a block with it: its keys and values stand before each row's own, and their gradients are the sum over the rows, exactly
as if every row had computed the beginning itself.

Used by attention.py and kernels/training.py, once a layer; the blocks by encoder.py too.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.model.batch import PackedBatch

_STORED_SCORES_LIMIT = 512  # tokens; up to here the training version keeps the [L, L] weights, beyond it torch's memory-efficient kernel is used
_MOST_PADDING = 1.25  # places for each token of a block before its shorter rows get a block of their own


class Block:
    """n rows padded to L new tokens each, all behind the same P tokens (0: none). Rows start at column 0, so a causal mask hides the padding."""

    def __init__(self, batch: PackedBatch, rows: list[int], shared: int) -> None:
        device = batch.token_ids.device
        lengths = [batch.lengths[row] for row in rows]
        self.num_rows, self.length = len(rows), max(lengths)
        self.before = batch.lengths[shared] if shared >= 0 else 0
        self.shared = slice(batch.row_starts[shared], batch.row_starts[shared + 1]) if shared >= 0 else slice(0, 0)
        starts = torch.tensor([batch.row_starts[row] for row in rows], device=device).unsqueeze(1)
        columns = torch.arange(self.length, device=device)
        inside = columns < torch.tensor(lengths, device=device).unsqueeze(1)
        self.take = torch.where(inside, starts + columns, starts).view(-1)  # [n * L] packed index of each place; padding: the row's own first token
        self.back = torch.nonzero(inside.view(-1)).squeeze(1)  # the places that hold a token
        self.tokens = self.take[self.back]  # and which
        self.is_dense = min(lengths) == self.length  # no padding
        self.full = self.is_dense and rows == list(range(rows[0], rows[0] + len(rows)))

    def spread(self, x: Tensor, *, zeros: bool = False) -> Tensor:
        """Packed [T, …] to [n, L, …]: a view where the rows are neighbours of one length. In padding stands anything, or zeros."""
        if self.full:
            start = int(self.take[0])
            return x[start : start + self.num_rows * self.length].view(self.num_rows, self.length, *x.shape[1:])
        if zeros:
            places = x.new_zeros(self.num_rows * self.length, *x.shape[1:]).index_copy_(0, self.back, x.index_select(0, self.tokens))
        else:
            places = x.index_select(0, self.take)
        return places.view(self.num_rows, self.length, *x.shape[1:])

    def gather(self, places: Tensor) -> Tensor:
        """[n * L, …] to the tokens of the block alone."""
        return places if self.full else places.index_select(0, self.back)


def blocks_of(batch: PackedBatch) -> list[Block]:
    """The batch's rows in blocks: those behind one shared beginning together, and so that padding stays small."""
    follows = batch.follows or (-1,) * batch.num_rows
    blocks = []
    for shared, group in groupby(sorted(range(batch.num_rows), key=follows.__getitem__), key=follows.__getitem__):
        rows: list[int] = []
        tokens = 0
        for row in sorted(group, key=batch.lengths.__getitem__):
            if rows and (len(rows) + 1) * batch.lengths[row] > _MOST_PADDING * (tokens + batch.lengths[row]):
                blocks.append(Block(batch, sorted(rows), shared))
                rows, tokens = [], 0
            rows.append(row)
            tokens += batch.lengths[row]
        blocks.append(Block(batch, sorted(rows), shared))
    return blocks


class FreshAttention:
    """The attention of one forward without a cache: prepared once for a batch, then called for every layer."""

    def __init__(self, batch: PackedBatch, softcap: float | None = None) -> None:
        self.blocks, self._softcap = blocks_of(batch), softcap
        longest = max(block.before + block.length for block in self.blocks)
        self.stores_scores = longest <= _STORED_SCORES_LIMIT  # for a backward pass
        self._masks: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [T, H, K], k and v [T, num_kv_heads, K], all rotated; returns [T, H * K]."""
        if torch.is_grad_enabled() and q.requires_grad and self.stores_scores and self._softcap is None:
            out: Tensor = _StoredScores.apply(q, k, v, self.blocks, [self._mask(block, window, q) for block in self.blocks])
            return out
        return self._fused(q, k, v, window)

    def _mask(self, block: Block, window: int | None, like: Tensor) -> Tensor:
        key = (block.before, block.length, window, like.dtype)
        if key not in self._masks:
            places = torch.arange(block.before, block.before + block.length, device=like.device)
            self._masks[key] = causal_mask(places, block.before + block.length, window, like.dtype)
        return self._masks[key]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """torch's own kernel, block by block."""
        found = []
        for block in self.blocks:
            queries, keys, values = (block.spread(x).transpose(1, 2) for x in (q, k, v))
            if block.before:
                first_keys, first_values = (x[block.shared].transpose(0, 1).expand(block.num_rows, -1, -1, -1) for x in (k, v))
                keys, values = torch.cat([first_keys, keys], 2), torch.cat([first_values, values], 2)
            if not block.before and (window is None or window >= block.length) and self._softcap is None:
                out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            else:
                out = attend(queries, keys, values, self._mask(block, window, q), self._softcap)
            found.append(block.gather(out.transpose(1, 2).reshape(block.num_rows * block.length, -1)))
        if len(found) == 1:
            return found[0]
        return q.new_empty(q.shape[0], q.shape[1] * q.shape[2]).index_copy(0, torch.cat([block.tokens for block in self.blocks]), torch.cat(found))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    """softmax(cap(Q Kᵀ / sqrt(K)) + mask) V with cap(z) = softcap * tanh(z / softcap), or z without one (Gemma 2, arXiv 2408.00118).

    q [n, H, L, K], k and v [n, num_kv_heads, P, K]; query heads share key heads in order. Returns [n, H, L, K].
    """
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) if q.shape[1] != x.shape[1] else x for x in (k, v))
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 / softcap)) + mask.float()
    return torch.softmax(scores, -1).to(q.dtype) @ v


def causal_mask(places: Tensor, total: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[..., t, total] for tokens at places [..., t] of sequences of at most `total` tokens: 0 where a token may look, -inf elsewhere."""
    keys = torch.arange(total, device=places.device)
    places = places.unsqueeze(-1)
    hidden = keys > places
    if window is not None:
        hidden |= keys <= places - window
    return torch.zeros(hidden.shape, dtype=dtype, device=places.device).masked_fill_(hidden, float("-inf"))


class _StoredScores(torch.autograd.Function):
    """softmax(Q Kᵀ / sqrt(K) + mask) V of every block, with the backward by hand.

    Written out because torch's fused CPU kernel is slow backwards in bfloat16 (see docs/notebook.md). The query heads that share a key head are laid
    behind one another, so grouped heads cost no copy of keys. A block's weights [n * num_kv_heads, G * L, P + L] are kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], masks: list[Tensor]) -> Tensor:
        heads, size = q.shape[1:]
        out = q.new_empty(q.shape[0], heads * size)
        saved: list[Tensor] = []
        for block, mask in zip(blocks, masks, strict=True):
            q3, k3, v3 = _as_queries(q, block, k.shape[1]), _as_keys(k, block), _as_keys(v, block)
            scores = torch.baddbmm(mask.repeat(heads // k.shape[1], 1), q3, k3.transpose(1, 2), alpha=size**-0.5)
            weights = torch.softmax(scores, -1)
            _put(out, block, torch.bmm(weights, v3), k.shape[1])
            saved += [q3, k3, v3, weights]
        ctx.save_for_backward(*saved)
        ctx.blocks, ctx.shapes = blocks, (q.shape, k.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_shape, k_shape = ctx.shapes
        kv_heads, scale = k_shape[1], q_shape[2] ** -0.5
        grad = grads[0].view(q_shape)
        dq, dk, dv = grad.new_empty(q_shape), grad.new_empty(k_shape), grad.new_empty(k_shape)
        shared: list[tuple[slice, Tensor, Tensor]] = []
        saved = iter(ctx.saved_tensors)
        for block in ctx.blocks:
            q3, k3, v3, weights = next(saved), next(saved), next(saved), next(saved)
            dout = _as_queries(grad, block, kv_heads, zeros=True)  # a place in padding has an output that nobody reads
            dv3 = torch.bmm(weights.transpose(1, 2), dout)
            dscores = torch._softmax_backward_data(torch.bmm(dout, v3.transpose(1, 2)), weights, -1, weights.dtype)
            _put(dq.flatten(1), block, torch.bmm(dscores, k3).mul_(scale), kv_heads)
            dk3 = torch.bmm(dscores.transpose(1, 2), q3).mul_(scale)
            for target, found in ((dk, dk3), (dv, dv3)):
                found = found.view(block.num_rows, kv_heads, -1, q_shape[2])
                own = found[:, :, block.before :].transpose(1, 2).reshape(-1, kv_heads, q_shape[2])
                target[block.tokens] = block.gather(own)
            if block.before:
                first = [x.view(block.num_rows, kv_heads, -1, q_shape[2])[:, :, : block.before].sum(0).transpose(0, 1) for x in (dk3, dv3)]
                shared.append((block.shared, first[0], first[1]))
        for tokens, first_dk, first_dv in shared:  # after all rows' own: a beginning is a row of some block too
            dk[tokens] += first_dk
            dv[tokens] += first_dv
        return dq, dk, dv, None, None


def _as_queries(x: Tensor, block: Block, kv_heads: int, *, zeros: bool = False) -> Tensor:
    """[T, H, K] to [n * num_kv_heads, G * L, K]: the heads that share a key head stand behind one another as queries."""
    spread = block.spread(x, zeros=zeros)
    return spread.transpose(1, 2).reshape(block.num_rows * kv_heads, -1, x.shape[2])


def _as_keys(x: Tensor, block: Block) -> Tensor:
    """[T, num_kv_heads, K] to [n * num_kv_heads, P + L, K]."""
    own = block.spread(x).transpose(1, 2)
    if block.before:
        own = torch.cat([x[block.shared].transpose(0, 1).expand(block.num_rows, -1, -1, -1), own], 2)
    return own.reshape(block.num_rows * x.shape[1], -1, x.shape[2])


def _put(out: Tensor, block: Block, found: Tensor, kv_heads: int) -> None:
    """[n * num_kv_heads, G * L, K] into the rows of out [T, H * K] that are the block's tokens."""
    size = found.shape[2]
    places = found.view(block.num_rows, -1, block.length, size).transpose(1, 2).reshape(block.num_rows * block.length, -1)
    out.index_copy_(0, block.tokens, block.gather(places))
