"""Causal attention over packed rows: with gradients, over a prompt, and over a KV cache.

Rows of a packed batch must not see each other. Without a cache it is fresh_attention.py's. With a cache, new keys and values are stored first; then
rows of few new tokens (decode, options) gather their pages into one padded call, and each longer row (a prompt's chunk) is a call of its own.

Used by decoder.py, once a layer. Grouped heads: H query heads share num_kv_heads key heads. A window limits how far back a token sees (Mistral,
Qwen2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.model.batch import PackedBatch
from atoll.model.fresh_attention import FreshAttention, attend, causal_mask
from atoll.model.kv_cache import PAGE_TOKENS, KvCache

_SHORT_ROW = 16  # new tokens up to which rows are padded to one another: a call of its own costs more than the padding


class _ShortRows:
    """Rows of few new tokens that one call can do: n rows, each padded to L new tokens and to the pages of the longest.

    A row is padded with its own first token and its own first page, so whatever stands there it does to itself, and the mask hides it.
    """

    def __init__(self, rows: Sequence[int], batch: PackedBatch, table: Tensor) -> None:
        device = batch.token_ids.device
        new = [batch.lengths[row] for row in rows]
        self.num_rows, self.length = len(rows), max(new)
        self.reach = max(batch.context[row] + count for row, count in zip(rows, new, strict=True))
        starts = torch.tensor([batch.row_starts[row] for row in rows], device=device).unsqueeze(1)
        columns = torch.arange(self.length, device=device)
        inside = columns < torch.tensor(new, device=device).unsqueeze(1)
        self.take = torch.where(inside, starts + columns, starts).view(-1)  # [n * L] packed index of each place
        self.back = torch.nonzero(inside.view(-1)).squeeze(1)  # places that hold a token
        self.tokens = self.take[self.back]  # and which
        self.pages = table[torch.tensor(list(rows), device=device), : _pages_for(self.reach)].reshape(-1)
        self._context = torch.tensor([batch.context[row] for row in rows], device=device).unsqueeze(1)

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """[n, 1, groups * L, reach] for query heads that share a key head, standing behind one another as queries."""
        places = self._context + torch.arange(self.length, device=self.take.device)
        return causal_mask(places, self.reach, window, dtype).repeat(1, groups, 1).unsqueeze(1)


def _blocks(batch: PackedBatch) -> tuple[list[list[int]], list[int]]:
    """Rows of few new tokens, grouped so that padding at most about doubles the work, and the longer rows, which run one by one."""
    short = [row for row, new in enumerate(batch.lengths) if new <= _SHORT_ROW]
    sizes = {row: (batch.lengths[row] > 1, _pages_for(batch.context[row] + batch.lengths[row])) for row in short}
    groups: list[list[int]] = []
    for row in sorted(short, key=sizes.__getitem__):
        least = sizes[groups[-1][0]] if groups else (False, 0)
        if sizes[row][0] == least[0] and sizes[row][1] <= 2 * least[1]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups, [row for row, new in enumerate(batch.lengths) if new > _SHORT_ROW]


def _pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


class Attention:
    """The attention of one forward: prepared once for a batch, then called for every layer. softcap: see attend."""

    def __init__(self, batch: PackedBatch, cache: KvCache | None, softcap: float | None = None) -> None:
        self.batch, self.cache, self.softcap = batch, cache, softcap
        self._masks: dict[tuple[object, ...], Tensor] = {}
        self.fresh = FreshAttention(batch, softcap) if cache is None else None
        if cache is None:
            return
        assert batch.pages is not None
        needed = [_pages_for(context + new) for context, new in zip(batch.context, batch.lengths, strict=True)]
        assert all(len(pages) >= count for pages, count in zip(batch.pages, needed, strict=True)), "a row has more tokens than its pages hold"
        widest = max(needed)
        padded = [pages[:count] + pages[:1] * (widest - count) for pages, count in zip(batch.pages, needed, strict=True)]
        table = torch.tensor(padded, dtype=torch.int64, device=batch.token_ids.device)
        pages = table[batch.row_of_token, batch.positions // PAGE_TOKENS]
        self._places = pages * PAGE_TOKENS + batch.positions % PAGE_TOKENS  # [T] where each new token's key and value are stored
        groups, self._long = _blocks(batch)
        self._short = [_ShortRows(rows, batch, table) for rows in groups]
        self._tables = {row: table[row, : needed[row]] for row in self._long}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [T, H, K], k and v [T, num_kv_heads, K], all rotated; returns [T, H * K]."""
        if self.fresh is not None:
            return self.fresh(q, k, v, window)
        return self._cached(layer, q, k, v, window)

    def _mask_of(self, context: int, new: int, window: int | None, like: Tensor) -> Tensor:
        key = (context, new, window, like.dtype)
        if key not in self._masks:
            places = torch.arange(context, context + new, device=like.device)
            self._masks[key] = causal_mask(places, context + new, window, like.dtype)
        return self._masks[key]

    def _cached(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        assert self.cache is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.view(-1, *k.shape[1:]).index_copy_(0, self._places, k)
        values.view(-1, *v.shape[1:]).index_copy_(0, self._places, v)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        for number, block in enumerate(self._short):
            out[block.tokens] = self._short_rows(number, block, q, keys, values, window)
        for row in self._long:
            start, stop = self.batch.row_starts[row], self.batch.row_starts[row + 1]
            out[start:stop] = self._long_row(row, q[start:stop], k[start:stop], v[start:stop], keys, values, window)
        return out

    def _short_rows(self, number: int, block: _ShortRows, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """All rows of a block at once over their gathered pages. Returns [tokens of the block, H * K]."""
        kv_heads, size = keys.shape[2:]
        shared = q.shape[1] // kv_heads
        key = ("block", number, window, q.dtype)
        if key not in self._masks:
            self._masks[key] = block.mask(window, shared, q.dtype)
        rows, length = block.num_rows, block.length
        queries = q.index_select(0, block.take).view(rows, length, kv_heads, shared, size)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, shared * length, size)  # heads that share a key head stand as queries
        seen_keys, seen_values = (
            t.index_select(0, block.pages).view(rows, -1, kv_heads, size)[:, : block.reach].transpose(1, 2) for t in (keys, values)
        )
        out = attend(queries, seen_keys, seen_values, self._masks[key], self.softcap)
        out = out.view(rows, kv_heads, shared, length, size).permute(0, 3, 1, 2, 4).reshape(rows * length, -1)
        return out if len(block.back) == rows * length else out.index_select(0, block.back)

    def _long_row(self, row: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """The new tokens of one row. q [t, H, K]; returns [t, H * K]."""
        context = self.batch.context[row]
        tokens, heads, size = q.shape
        queries = q.transpose(0, 1)
        if context == 0 and (window is None or window >= tokens) and self.softcap is None:
            out = F.scaled_dot_product_attention(queries[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, enable_gqa=True)[0]
            return out.transpose(0, 1).flatten(1)
        kv_heads = k.shape[1]
        table, total = self._tables[row], context + tokens
        seen_keys, seen_values = (t.index_select(0, table).view(-1, kv_heads, size)[:total].transpose(0, 1)[None] for t in (keys, values))
        mask = self._mask_of(context, tokens, window, q).repeat(heads // kv_heads, 1)
        out = attend(queries.reshape(kv_heads, -1, size)[None], seen_keys, seen_values, mask, self.softcap)[0]
        return out.reshape(heads, tokens, size).transpose(0, 1).flatten(1)
