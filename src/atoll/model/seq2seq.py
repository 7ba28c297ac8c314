"""Encoder-decoder bases, T5 and Flan-T5: a row's prompt is what the encoder reads, its answer what the decoder writes.

The one idea: in a row of prompt and answer the last prompt token stands for the decoder's start. So the state there predicts the answer's first
token, as everywhere, and training, generating, scoring options and serving need not know that two stacks ran. Layers are transformers' modules,
called with packed tokens; attention is computed here, row by row: simple, and slower for batches of many short rows than padded blocks would be.

In the cache a token's page place holds, for a prompt's token, the keys and values that the decoder's cross-attention reads, and for a written token
(the start included) those of the decoder itself; the two are apart, so that the last prompt token may have both. A prompt is computed at once.

Edits of a ReFT adapter act on prompt tokens, hence in the encoder's blocks. Used by generic_decoder.load_generic_decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.config_quantization import QuantizationConfig
from atoll.errors import BaseFormatError
from atoll.model.apply_edits import apply_edits
from atoll.model.bank import LoraBank
from atoll.model.batch import BASE_ONLY, AdapterBatch, EditRows, PackedBatch, Segment
from atoll.model.families import Family
from atoll.model.generic_decoder import GenericDecoder
from atoll.model.kv_cache import PAGE_TOKENS, KvCache
from atoll.model.reft import ATTENTION_INPUT, ATTENTION_OUTPUT, BLOCK_INPUT, BLOCK_OUTPUT, MLP_INPUT, MLP_OUTPUT


class Seq2SeqCache(KvCache):
    """Pages for both attentions of the decoder: keys and values of written tokens, and `cross` of prompt tokens."""

    def __init__(self, num_layers: int, num_pages: int, num_heads: int, head_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(num_layers, num_pages, num_heads, head_size, dtype, device)
        self.cross = KvCache(num_layers, num_pages, num_heads, head_size, dtype, device)
        self.token_bytes += self.cross.token_bytes

    def copy_page(self, source: int, target: int) -> None:
        super().copy_page(source, target)
        self.cross.copy_page(source, target)

    def zero_pages(self, pages: Sequence[int]) -> None:
        super().zero_pages(pages)
        self.cross.zero_pages(pages)


@dataclass(frozen=True)
class _Row:
    """One row: its prompt among the encoder's tokens (none where it was read before), its tokens among the decoder's, the place of the first of these

    in what the decoder writes, and where the cache has the sequence's tokens (None without a cache).
    """

    read: slice
    written: slice
    first: int
    num_prompt: int
    places: Tensor | None


class Seq2SeqDecoder(GenericDecoder):
    """A transformers T5 as a Decoder: see the module's header."""

    kind = "seq2seq"
    task_type = "SEQ_2_SEQ_LM"
    whole_prompts = True

    def __init__(self, model: Any, quantization: QuantizationConfig | None = None) -> None:
        """Raises BaseFormatError for a family or an option that is not computed."""
        config = model.config
        if config.num_layers != config.num_decoder_layers:
            raise BaseFormatError(
                f"the base has {config.num_layers} blocks that read and {config.num_decoder_layers} that write, expected as many of both",
                hint="choose another base",
            )
        self._start = int(config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id)
        tied = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self._output_scale = config.d_model**-0.5 if tied else 1.0
        super().__init__(model, quantization)

    def new_cache(self, num_pages: int) -> Seq2SeqCache:
        shape = self.shape
        return Seq2SeqCache(shape.num_layers, num_pages, shape.num_heads, shape.head_size, self.dtype, self.device)

    def new_bank(self) -> LoraBank:
        bank = super().new_bank()
        bank.gathers = False  # a token's place differs between the two stacks: every row's adapter is a segment
        return bank

    def forward(
        self,
        batch: PackedBatch,
        adapters: AdapterBatch = BASE_ONLY,
        cache: KvCache | None = None,
        *,
        entering: tuple[int, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The hidden states [N, D] of the tokens in output_index: the decoder's at written tokens and at a prompt's last, the encoder's elsewhere."""
        assert entering is None and batch.num_prompts is not None, "prompts must be told from answers"
        assert cache is None or isinstance(cache, Seq2SeqCache)
        rows, read, written = self._split(batch, cache)
        reading, writing = _part_of(adapters, read, batch.num_tokens), _part_of(adapters, written, batch.num_tokens)
        embedded = [F.embedding(tokens, self.embedding) for tokens in (batch.token_ids[read], self._written(batch, written))]
        if noise is not None:
            embedded = [states + noise[part].to(states.dtype) for states, part in zip(embedded, (read, written), strict=True)]
        encoded = self._encode(embedded[0], rows, reading)
        decoded = self._decode(embedded[1], rows, encoded, reading, writing, cache)
        states = encoded.new_zeros(batch.num_tokens, self.shape.hidden).index_copy(0, read, encoded)
        states = states.index_copy(0, written, decoded * self._output_scale)
        return states if batch.output_index is None else states.index_select(0, batch.output_index)

    def _split(self, batch: PackedBatch, cache: Seq2SeqCache | None) -> tuple[list[_Row], Tensor, Tensor]:
        """The rows, and which packed tokens are read and which are written; a prompt's last token is both."""
        assert batch.num_prompts is not None
        rows: list[_Row] = []
        read: list[int] = []
        written: list[int] = []
        for row, (start, context, count, num_prompt) in enumerate(
            zip(batch.row_starts, batch.context, batch.lengths, batch.num_prompts, strict=False)
        ):
            assert context >= num_prompt or (context == 0 and count >= num_prompt), "a prompt is computed at once"
            reads = num_prompt if context == 0 else 0
            first = max(context, num_prompt - 1)
            places = None
            if cache is not None:
                assert batch.pages is not None
                tokens = torch.arange(context + count)
                places = (torch.tensor(batch.pages[row])[tokens // PAGE_TOKENS] * PAGE_TOKENS + tokens % PAGE_TOKENS).to(self.device)
            writes = context + count - first
            rows.append(
                _Row(slice(len(read), len(read) + reads), slice(len(written), len(written) + writes), first - num_prompt + 1, num_prompt, places)
            )
            read.extend(range(start, start + reads))
            written.extend(range(start + first - context, start + count))
        return rows, torch.tensor(read, dtype=torch.int64, device=self.device), torch.tensor(written, dtype=torch.int64, device=self.device)

    def _written(self, batch: PackedBatch, written: Tensor) -> Tensor:
        """The decoder's tokens: the start where a prompt ends, the answer's behind it."""
        assert batch.num_prompts is not None
        last = torch.tensor(batch.num_prompts, device=self.device)[batch.row_of_token[written]] - 1
        return torch.where(batch.positions[written] == last, self._start, batch.token_ids[written])

    def _encode(self, hidden: Tensor, rows: Sequence[_Row], adapters: AdapterBatch) -> Tensor:
        stack, edits = self.model.encoder, adapters.edits
        if not len(hidden):
            return hidden
        biases: dict[tuple[int, int], Tensor] = {}
        own = stack.block[0].layer[0].SelfAttention
        for layer, block in enumerate(stack.block):
            attention, mlp = block.layer[0], block.layer[1]
            hidden = _edited(hidden, layer, BLOCK_INPUT, edits)
            normed = _edited(attention.layer_norm(hidden), layer, ATTENTION_INPUT, edits)
            with self._running(None, adapters):
                q, k, v = (
                    self._heads(linear(normed)) for linear in (attention.SelfAttention.q, attention.SelfAttention.k, attention.SelfAttention.v)
                )
                found = [_attend(q[row.read], k[row.read], v[row.read], self._bias(own, row.num_prompt, 0, biases)) for row in rows if _any(row.read)]
                out = attention.SelfAttention.o(torch.cat(found))
                hidden = hidden + _edited(out, layer, ATTENTION_OUTPUT, edits)
                out = mlp.DenseReluDense(_edited(mlp.layer_norm(hidden), layer, MLP_INPUT, edits))
            hidden = _edited(hidden + _edited(out, layer, MLP_OUTPUT, edits), layer, BLOCK_OUTPUT, edits)
        encoded: Tensor = stack.final_layer_norm(hidden)
        return encoded

    def _decode(
        self, hidden: Tensor, rows: Sequence[_Row], encoded: Tensor, reading: AdapterBatch, writing: AdapterBatch, cache: Seq2SeqCache | None
    ) -> Tensor:
        stack = self.model.decoder
        biases: dict[tuple[int, int], Tensor] = {}
        own = stack.block[0].layer[0].SelfAttention
        for layer, block in enumerate(stack.block):
            attention, cross, mlp = block.layer[0], block.layer[1], block.layer[2]
            normed = attention.layer_norm(hidden)
            with self._running(None, writing):
                q, k, v = (
                    self._heads(linear(normed)) for linear in (attention.SelfAttention.q, attention.SelfAttention.k, attention.SelfAttention.v)
                )
                found = []
                for row in rows:
                    keys, values = k[row.written], v[row.written]
                    if cache is not None:
                        keys, values = _through(cache, layer, row, keys, values)
                    found.append(_attend(q[row.written], keys, values, self._bias(own, len(keys), row.first, biases)))
                hidden = hidden + attention.SelfAttention.o(torch.cat(found))
                q = self._heads(cross.EncDecAttention.q(cross.layer_norm(hidden)))
            with self._running(None, reading):
                k, v = (self._heads(linear(encoded)) for linear in (cross.EncDecAttention.k, cross.EncDecAttention.v))
            found = []
            for row in rows:
                keys, values = k[row.read], v[row.read]
                if cache is not None:
                    keys, values = _across(cache, layer, row, keys, values)
                found.append(_attend(q[row.written], keys, values, None))
            with self._running(None, writing):
                hidden = hidden + cross.EncDecAttention.o(torch.cat(found))
                hidden = hidden + mlp.DenseReluDense(mlp.layer_norm(hidden))
        decoded: Tensor = stack.final_layer_norm(hidden)
        return decoded

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.shape.num_heads, self.shape.head_size)

    def _bias(self, attention: Any, num_keys: int, first: int, known: dict[tuple[int, int], Tensor]) -> Tensor:
        """[1, H, L, num_keys]: T5's bias by distance, for queries at places first to num_keys; the decoder's hides what comes after a token."""
        key = (num_keys, first)
        if key not in known:
            bias = attention.compute_bias(num_keys - first, num_keys, device=self.device, past_seen_tokens=first)
            if attention.is_decoder:
                places = torch.arange(num_keys, device=self.device)
                bias = bias.masked_fill(places > places[first:].unsqueeze(1), float("-inf"))
            known[key] = bias.to(self.dtype)
        return known[key]

    def _place_edits(self, blocks: Any, family: Family) -> None:
        """None: edits are made in the forward."""

    def _head_of(self, model: Any) -> Tensor:
        weight: Tensor = model.get_output_embeddings().weight
        return weight


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(Q Kᵀ + bias) V of one row, without a scale, as T5 has it. q [L, H, K], k and v [P, H, K]; returns [L, H * K]."""
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
    return out[0].transpose(0, 1).flatten(1)


def _through(cache: Seq2SeqCache, layer: int, row: _Row, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Store a row's new keys and values of the decoder; returns those of all that the row has written. Writing begins at the prompt's last place."""
    assert row.places is not None
    places = row.places[row.num_prompt - 1 :]
    kept = [store[layer].view(-1, *keys.shape[1:]) for store in (cache.keys, cache.values)]
    for store, new in zip(kept, (keys, values), strict=True):
        store.index_copy_(0, places[row.first :], new)
    return kept[0][places], kept[1][places]


def _across(cache: Seq2SeqCache, layer: int, row: _Row, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Store what cross-attention reads of a prompt, or fetch it where the prompt was read before."""
    assert row.places is not None
    places = row.places[: row.num_prompt]
    kept = [store[layer].view(-1, *keys.shape[1:]) for store in (cache.cross.keys, cache.cross.values)]
    if not _any(row.read):
        return kept[0][places], kept[1][places]
    for store, new in zip(kept, (keys, values), strict=True):
        store.index_copy_(0, places, new)
    return keys, values


def _any(part: slice) -> bool:
    return bool(part.stop > part.start)


def _edited(hidden: Tensor, layer: int, component: int, edits: Sequence[EditRows]) -> Tensor:
    if not any(rows.weights.edit(layer, component) is not None for rows in edits):
        return hidden
    return apply_edits(hidden.clone(), layer, component, edits)


def _part_of(adapters: AdapterBatch, tokens: Tensor, num_tokens: int) -> AdapterBatch:
    """The adapters of some packed tokens (ascending), by their places among these."""
    assert adapters.bank_rows is None and adapters.blocks is None, "rows of two stacks are given as segments"
    if not adapters.segments and not adapters.edits:
        return adapters
    inside = torch.zeros(num_tokens, dtype=torch.int64)
    inside[tokens.cpu()] = 1
    before = [0, *accumulate(inside.tolist())]
    segments = tuple(Segment(before[start], before[stop], weights) for start, stop, weights in adapters.segments)
    edits = []
    for rows in adapters.edits:
        here = [token for token in rows.tokens.tolist() if inside[token]]
        edits.append(rows._replace(tokens=torch.tensor([before[token] for token in here], dtype=torch.int64, device=tokens.device)))
    return replace(adapters, segments=segments, edits=tuple(edits))
