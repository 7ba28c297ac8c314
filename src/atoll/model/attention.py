"""Causal attention over packed rows: with gradients, over a prompt, and over a KV cache.

Rows of a packed batch must not see each other. Without a cache the rows are laid into one padded block (training batches are sorted by length, so it
is nearly full) and attention runs once for all. With a cache, decode rows (one new token) are one call over the cache in place, and each prefill row
is a call.

Used by decoder.py, once a layer. Grouped heads: H query heads share num_kv_heads key heads. A window limits how far back a token sees (Mistral,
Qwen2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.model.batch import PackedBatch
from atoll.model.kv_cache import KvCache

_STORED_SCORES_LIMIT = 512  # tokens; up to here the training version keeps the [L, L] weights, beyond it torch's memory-efficient kernel is used


@dataclass(frozen=True)
class _Padded:
    """Where packed tokens stand in a [B, L] block and back. Rows start at column 0, so a causal mask also hides the padding behind them."""

    take: Tensor  # [B * L] packed index of each place (0 where there is none)
    back: Tensor  # [T] place of each packed token
    longest: int


def _padded(batch: PackedBatch) -> _Padded:
    longest, device = max(batch.lengths), batch.token_ids.device
    starts = torch.tensor(batch.row_starts[:-1], device=device).unsqueeze(1)
    columns = torch.arange(longest, device=device)
    inside = columns < torch.tensor(batch.lengths, device=device).unsqueeze(1)
    take = torch.where(inside, starts + columns, 0)
    back = torch.nonzero(inside.view(-1)).squeeze(1)
    return _Padded(take.view(-1), back, longest)


def _mask(num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num_queries, num_keys]: 0 where a query (the last num_queries of num_keys places) may look, -inf elsewhere."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    key = torch.arange(num_keys, device=device)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.zeros(num_queries, num_keys, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


class Attention:
    """The attention of one forward: prepared once for a batch, then called for every layer."""

    def __init__(self, batch: PackedBatch, cache: KvCache | None) -> None:
        self.batch, self.cache = batch, cache
        self._masks: dict[tuple[object, ...], Tensor] = {}
        if cache is None:
            same = len(set(batch.lengths)) == 1
            self._block = None if same else _padded(batch)
            return
        assert batch.kv_rows is not None
        device = batch.token_ids.device
        if batch.store:
            self._row = torch.tensor(batch.kv_rows, device=device)[batch.row_of_token]
        self._decode = [row for row, new in enumerate(batch.lengths) if new == 1 and batch.context[row] > 0 and batch.store]
        chosen = set(self._decode)
        self._prefill = [row for row in range(batch.num_rows) if row not in chosen]
        if self._decode:
            held = [batch.kv_rows[row] for row in self._decode]
            self._span = max(held) + 1
            self._reach = max(batch.context[row] for row in self._decode) + 1
            self._decode_tokens = torch.tensor([batch.row_starts[row] for row in self._decode], device=device)
            self._decode_rows = torch.tensor(held, device=device)
            lengths = torch.ones(self._span, dtype=torch.int64, device=device)  # an idle row looks at its first place only: finite, and thrown away
            lengths[self._decode_rows] = torch.tensor([batch.context[row] + 1 for row in self._decode], device=device)
            self._decode_lengths = lengths

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [T, H, K], k and v [T, num_kv_heads, K], all rotated; returns [T, H * K]."""
        if self.cache is None:
            return self._fresh(q, k, v, window)
        return self._cached(layer, q, k, v, window)

    def _mask_of(self, num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor:
        key = (num_queries, num_keys, window, like.dtype)
        if key not in self._masks:
            self._masks[key] = _mask(num_queries, num_keys, window, like.dtype, like.device)
        return self._masks[key]

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """No cache: every row attends to itself only, all rows in one block."""
        num_tokens, heads, size = q.shape
        rows = self.batch.num_rows
        if self._block is not None:
            q, k, v = (t.index_select(0, self._block.take) for t in (q, k, v))
            longest = self._block.longest
        else:
            longest = num_tokens // rows
        q, k, v = (t.view(rows, longest, t.shape[1], size).transpose(1, 2) for t in (q, k, v))
        if torch.is_grad_enabled() and q.requires_grad and longest <= _STORED_SCORES_LIMIT:
            mask = self._mask_of(longest, longest, window, q)
            out: Tensor = _BlockAttention.apply(q, k, v, mask)
        elif window is None or window >= longest:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask_of(longest, longest, window, q), enable_gqa=True)
        out = out.transpose(1, 2).reshape(rows * longest, heads * size)
        return out if self._block is None else out.index_select(0, self._block.back)

    def _cached(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        assert self.cache is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.batch.store:
            keys[self._row, :, self.batch.positions] = k
            values[self._row, :, self.batch.positions] = v
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        if self._decode:
            out[self._decode_tokens] = self._decode_step(q, keys, values, window)
        for row in self._prefill:
            start, stop = self.batch.row_starts[row], self.batch.row_starts[row + 1]
            out[start:stop] = self._prefill_row(row, q[start:stop], k[start:stop], v[start:stop], keys, values, window)
        return out

    def _decode_step(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """One new token a row, all rows at once, reading rows 0 to span of the cache where they lie. Returns [n, H * K]."""
        key = ("decode", window, q.dtype)
        if key not in self._masks:
            places = torch.arange(self._reach, device=q.device)
            hidden = places >= self._decode_lengths.unsqueeze(1)
            if window is not None:
                hidden |= places < (self._decode_lengths - window).unsqueeze(1)
            mask = torch.zeros(self._span, self._reach, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask.view(self._span, 1, 1, self._reach)
        queries = q.new_zeros(self._span, q.shape[1], 1, q.shape[2])
        queries[self._decode_rows, :, 0] = q[self._decode_tokens]
        out = F.scaled_dot_product_attention(
            queries, keys[: self._span, :, : self._reach], values[: self._span, :, : self._reach], attn_mask=self._masks[key], enable_gqa=True
        )
        return out[self._decode_rows, :, 0].flatten(1)

    def _prefill_row(self, row: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """All new tokens of one row over what the cache has of it. q [t, H, K]; returns [t, H * K]."""
        assert self.batch.kv_rows is not None
        context, place = self.batch.context[row], self.batch.kv_rows[row]
        new_keys, new_values = k.transpose(0, 1), v.transpose(0, 1)
        if context:
            new_keys = torch.cat((keys[place, :, :context], new_keys), 1)
            new_values = torch.cat((values[place, :, :context], new_values), 1)
        plain = context == 0 and (window is None or window >= q.shape[0])
        mask = None if plain else self._mask_of(q.shape[0], context + q.shape[0], window, q)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), new_keys.unsqueeze(0), new_values.unsqueeze(0), attn_mask=mask, is_causal=plain, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)


class _BlockAttention(torch.autograd.Function):
    """softmax(Q Kᵀ / sqrt(K) + mask) V over [B, H, L, K] with the backward by hand.

    Written out because torch's fused CPU kernel is slow backwards in bfloat16 (see docs/notebook.md). The H / num_kv_heads query heads that share a
    key head are laid behind one another, so grouped heads cost no copy of keys. The weights P [B * num_kv_heads, G * L, L] are kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        rows, heads, length, size = q.shape
        kv_heads = k.shape[1]
        shared = heads // kv_heads
        scale = size**-0.5
        q3 = q.reshape(rows * kv_heads, shared * length, size)
        k3, v3 = k.reshape(rows * kv_heads, length, size), v.reshape(rows * kv_heads, length, size)
        scores = torch.baddbmm(mask.repeat(shared, 1), q3, k3.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q3, k3, v3, weights)
        ctx.shape, ctx.scale = (rows, heads, kv_heads, length, size), scale
        return torch.bmm(weights, v3).view(rows, heads, length, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q3, k3, v3, weights = ctx.saved_tensors
        rows, heads, kv_heads, length, size = ctx.shape
        dout = grads[0].reshape(rows * kv_heads, (heads // kv_heads) * length, size)
        dv = torch.bmm(weights.transpose(1, 2), dout)
        dscores = torch._softmax_backward_data(torch.bmm(dout, v3.transpose(1, 2)), weights, -1, weights.dtype)
        dq = torch.bmm(dscores, k3).mul_(ctx.scale)
        dk = torch.bmm(dscores.transpose(1, 2), q3).mul_(ctx.scale)
        return dq.view(rows, heads, length, size), dk.view(rows, kv_heads, length, size), dv.view(rows, kv_heads, length, size), None
