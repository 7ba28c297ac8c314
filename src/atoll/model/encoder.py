"""Encoders as classifiers: BERT and RoBERTa by transformers' blocks, with a classifier head that belongs to the adapter.

The one idea: a class is one number. A row is a text, its answer is the number of its class, and the states that a forward gives are log-odds of the
classes. So an encoder trains by the training loop, in steps that many jobs share, and is asked by the engine's scoring, like every other base. The
head is trained and saved with the adapter, as PEFT does for the task type SEQ_CLS; without one, all classes are equally likely.

BERT: W tanh(P h + p) + b of the first token's state h, with the base's own pooler P. RoBERTa: W tanh(V h + v) + b, all of it the adapter's.
Used by generic_decoder.load_generic_decoder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.config_quantization import QuantizationConfig
from atoll.errors import BaseFormatError
from atoll.model.adapter import CLASSIFIES
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.families import HEADS
from atoll.model.fresh_attention import blocks_of
from atoll.model.generic_decoder import GenericDecoder
from atoll.model.kv_cache import KvCache
from atoll.model.masked_encoder import MaskedEncoder, load_masked

MAX_CLASSES = 1024


class EncoderClassifier(GenericDecoder):
    """A transformers model for sequence classification as a Decoder: whole rows in, log-odds of classes out."""

    kind = "encoder"
    classifies = True
    whole_prompts = True
    task_type = CLASSIFIES

    def __init__(self, model: Any, quantization: QuantizationConfig | None = None) -> None:
        """Raises BaseFormatError for a family or an option that is not computed."""
        super().__init__(model, quantization)
        config = model.config
        self._first_position = int(config.pad_token_id) + 1 if config.model_type == "roberta" else 0
        self._pooler = getattr(self._inner, "pooler", None)
        self._deviation = float(config.initializer_range)
        self._masked: MaskedEncoder | None = None

    def forward(
        self,
        batch: PackedBatch,
        adapters: AdapterBatch = BASE_ONLY,
        cache: KvCache | None = None,
        *,
        entering: tuple[int, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """[N, C] float32: for each token of output_index (all, if None), the log-odds of its row's classes, -inf beyond those of its adapter.

        C is the largest number of classes in the batch. Rows are whole: nothing is read from or written into the cache.
        """
        assert entering is None, "an encoder reads whole rows"
        states = self.states(batch, adapters, noise)
        wanted = torch.arange(batch.num_tokens, device=self.device) if batch.output_index is None else batch.output_index
        rows = batch.row_of_token[wanted]
        firsts = torch.tensor(batch.row_starts[:-1], device=self.device)[rows]
        odds = [(start, stop, head) for start, stop, weights in adapters.segments if (head := getattr(weights, "head", None))]
        width = max([_num_classes(head) for _, _, head in odds], default=0)
        if not all(any(start <= token < stop for start, stop, _ in odds) for token in wanted.tolist()):
            width = max(width, min(MAX_CLASSES, self.shape.vocabulary))  # the base alone: no class is likelier, however many are asked for
        out = states.new_zeros(len(wanted), width, dtype=torch.float32)
        for start, stop, head in odds:
            here = ((wanted >= start) & (wanted < stop)).nonzero().flatten()
            found = self._classify(states.index_select(0, firsts[here]), head)
            out = out.index_copy(0, here, F.pad(found.float(), (0, width - found.shape[1]), value=float("-inf")))
        return out

    def states(self, batch: PackedBatch, adapters: AdapterBatch, noise: Tensor | None = None) -> Tensor:
        """[T, D]: every token's state behind the last block."""
        assert not any(batch.context), "an encoder reads whole rows"
        with self._running(_BothWays(batch), adapters, noise):
            found: Tensor = self._inner(
                input_ids=batch.token_ids.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0) + self._first_position,
                packed_attention=self._now.attention,
            ).last_hidden_state[0]
        return found

    def masked_lm(self) -> Decoder:
        if self._masked is None:
            self._masked = load_masked(self)
        return self._masked

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, C] log-odds as [N, V] logits, token c being class c."""
        logits = hidden.new_full((len(hidden), self.shape.vocabulary), float("-inf"))
        logits[:, : hidden.shape[1]] = hidden
        return logits

    def label_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden, labels, reduction="none")

    def head_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        if any(".pooler." in name for name in self.lacks):
            raise BaseFormatError("the base was saved without its pooler, which BERT's classifiers read", hint="choose a base that has one")
        size = self.shape.hidden
        shapes: dict[str, tuple[int, ...]] = {}
        for name in HEADS[self.model.config.model_type]:
            rows = size if ".dense." in name else num_classes
            shapes[name] = (rows, size) if name.endswith("weight") else (rows,)
        return shapes

    def new_head(self, num_classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        head = {name: torch.zeros(shape) for name, shape in self.head_shapes(num_classes).items()}
        for name, tensor in head.items():
            if name.endswith("weight"):
                tensor.normal_(0.0, self._deviation, generator=generator)
        return head

    def _classify(self, states: Tensor, head: dict[str, Tensor]) -> Tensor:
        """[N, C] of first tokens' states [N, D]. The head's products are float32 while it is trained."""
        if self._pooler is not None:
            pooled = self._pooler(states.unsqueeze(1))
            return _product(pooled, head["classifier.weight"], head["classifier.bias"])
        inner = torch.tanh(_product(states, head["classifier.dense.weight"], head["classifier.dense.bias"]))
        return _product(inner, head["classifier.out_proj.weight"], head["classifier.out_proj.bias"])

    def _head_of(self, model: Any) -> Tensor:
        weight: Tensor = model.get_input_embeddings().weight
        return weight


class _BothWays:
    """Attention of whole rows, each token seeing all of its row. Made once for a batch, then called for every layer, as attention.Attention is."""

    def __init__(self, batch: PackedBatch) -> None:
        self._blocks = blocks_of(batch)
        lengths = torch.tensor(batch.lengths, device=batch.token_ids.device)
        rows = batch.row_of_token
        self._masks: list[Tensor | None] = []
        for block in self._blocks:
            own = lengths[rows[block.take.view(block.num_rows, block.length)[:, 0]]]
            seen = torch.arange(block.length, device=lengths.device) < own.unsqueeze(1)
            self._masks.append(None if block.is_dense else seen[:, None, None, :])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q, k and v [T, H, K]; returns [T, H * K]."""
        found = []
        for block, mask in zip(self._blocks, self._masks, strict=True):
            queries, keys, values = (block.spread(x).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            found.append(block.gather(out.transpose(1, 2).reshape(block.num_rows * block.length, -1)))
        if len(found) == 1 and self._blocks[0].full:
            return found[0]
        tokens = torch.cat([block.tokens for block in self._blocks])
        return q.new_empty(q.shape[0], q.shape[1] * q.shape[2]).index_copy(0, tokens, torch.cat(found))


def _num_classes(head: dict[str, Tensor]) -> int:
    return int(head["classifier.weight" if "classifier.weight" in head else "classifier.out_proj.weight"].shape[0])


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)
