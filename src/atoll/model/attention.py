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


def _mask(context: int, lengths: tuple[int, ...], window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[t, context + t] for t = sum(lengths): 0 where a new token may look, -inf elsewhere.

    The new tokens are one or more branches of the same context, `lengths` long, which see the context and themselves but not one another.
    """
    branch = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    place = torch.cat([torch.arange(context, context + length, device=device) for length in lengths])
    keys = torch.cat((torch.arange(context, device=device), place))
    seen = keys <= place.unsqueeze(1)
    seen[:, context:] &= branch == branch.unsqueeze(1)
    if window is not None:
        seen &= keys > place.unsqueeze(1) - window
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _groups(rows: list[int], batch: PackedBatch) -> list[list[int]]:
    """Prefill rows that one call can do: neighbours that only read the same cached context (options of one prompt); else each alone."""
    assert batch.kv_rows is not None
    groups: list[list[int]] = []
    for row in rows:
        last = groups[-1][-1] if groups else -1
        same = (
            not batch.store
            and last == row - 1
            and last >= 0
            and batch.kv_rows[last] == batch.kv_rows[row]
            and batch.context[last] == batch.context[row]
        )
        if same:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


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
        self._prefill = _groups([row for row in range(batch.num_rows) if row not in chosen], batch)
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

    def _mask_of(self, context: int, lengths: tuple[int, ...], window: int | None, like: Tensor) -> Tensor:
        key = (context, lengths, window, like.dtype)
        if key not in self._masks:
            self._masks[key] = _mask(context, lengths, window, like.dtype, like.device)
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
            mask = self._mask_of(0, (longest,), window, q)
            out: Tensor = _BlockAttention.apply(q, k, v, mask)
        elif window is None or window >= longest:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask_of(0, (longest,), window, q), enable_gqa=True)
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
        for rows in self._prefill:
            start, stop = self.batch.row_starts[rows[0]], self.batch.row_starts[rows[-1] + 1]
            out[start:stop] = self._prefill_rows(rows, q[start:stop], k[start:stop], v[start:stop], keys, values, window)
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
        kv_heads = keys.shape[1]
        queries = q.new_zeros(
            self._span, kv_heads, q.shape[1] // kv_heads, q.shape[2]
        )  # heads that share a key head stand as queries: 6 times faster
        queries[self._decode_rows] = q[self._decode_tokens].view(-1, *queries.shape[1:])
        reach = self._reach
        out = F.scaled_dot_product_attention(queries, keys[: self._span, :, :reach], values[: self._span, :, :reach], attn_mask=self._masks[key])
        return out[self._decode_rows].flatten(1)

    def _prefill_rows(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """All new tokens of one row, or of rows that branch off one cached context. q [t, H, K]; returns [t, H * K]."""
        assert self.batch.kv_rows is not None
        context, place = self.batch.context[rows[0]], self.batch.kv_rows[rows[0]]
        tokens, heads, size = q.shape
        new_keys, new_values = k.transpose(0, 1), v.transpose(0, 1)
        if context:
            new_keys = torch.cat((keys[place, :, :context], new_keys), 1)
            new_values = torch.cat((values[place, :, :context], new_values), 1)
        queries = q.transpose(0, 1)
        if context == 0 and len(rows) == 1 and (window is None or window >= tokens):
            out = F.scaled_dot_product_attention(queries[None], new_keys[None], new_values[None], is_causal=True, enable_gqa=True)[0]
            return out.transpose(0, 1).flatten(1)
        kv_heads = k.shape[1]
        mask = self._mask_of(context, tuple(self.batch.lengths[row] for row in rows), window, q).repeat(heads // kv_heads, 1)
        grouped = queries.reshape(kv_heads, -1, size)
        out = F.scaled_dot_product_attention(grouped[None], new_keys[None], new_values[None], attn_mask=mask)[0]
        return out.reshape(heads, tokens, size).transpose(0, 1).flatten(1)


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
