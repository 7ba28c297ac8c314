"""Rotary position embeddings with every scaling that transformers has for Llama-like models.

The frequencies come from transformers itself (`ROPE_INIT_FUNCTIONS`), so linear, dynamic, yarn, longrope and llama3 mean here what they mean there.
Two of them depend on how long a sequence is; transformers decides by the longest row of a batch, so there a row's answer depends on its neighbours.
Here every row decides for itself, and a row gives the same logits alone and in a batch.

Used by decoder.py, once a forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atoll.errors import BaseFormatError
from atoll.model.batch import PackedBatch

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class RotaryTable:
    """Turns positions into cos and sin.

    Frequencies are float32; `cos_sin` gives [T, K/2] each, scaled by the attention factor of yarn and longrope.
    """

    def __init__(self, config: Any, device: torch.device | str) -> None:
        parameters = dict(config.rope_parameters or {})
        self.kind = str(parameters.get("rope_type", "default"))
        if self.kind not in KINDS:
            raise BaseFormatError(f"the base's config has rope_type {self.kind!r}, but Atoll knows {', '.join(KINDS)}")
        if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
            raise BaseFormatError("the base rotates only a part of each head (partial_rotary_factor), which the native forward does not do")
        self._config, self._device = config, device
        self._trained_length = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
        self._short, self.attention_scaling = self._frequencies(None)
        self._long = self._frequencies(self._trained_length + 1)[0] if self.kind == "longrope" else None

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        """Inverse frequencies [K/2] and the attention factor for a sequence of `length` tokens (None: the trained length)."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self.kind == "default":
            head = getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
            exponent = torch.arange(0, head, 2, dtype=torch.float32) / head
            return (1.0 / (float(self._config.rope_parameters["rope_theta"]) ** exponent)).to(self._device), 1.0
        frequencies, factor = ROPE_INIT_FUNCTIONS[self.kind](self._config, torch.device("cpu"), seq_len=length)
        return frequencies.float().to(self._device), float(factor)

    def _for_length(self, length: int) -> Tensor:
        """The frequencies of a row that is `length` tokens long: only dynamic NTK and longrope differ by length."""
        if self.kind == "longrope" and length > self._trained_length:
            assert self._long is not None
            return self._long
        if self.kind == "dynamic" and length > int(self._config.max_position_embeddings):
            return self._frequencies(length)[0]
        return self._short

    @property
    def by_length(self) -> bool:
        """Whether a token's angles depend on how long its row is, and not only on its place."""
        return self.kind in ("dynamic", "longrope")

    def regime(self, length: int) -> int:
        """Rows whose lengths have the same number have the same frequencies."""
        if self.kind == "longrope":
            return int(length > self._trained_length)
        if self.kind == "dynamic":
            return length if length > int(self._config.max_position_embeddings) else 0
        return 0

    def cos_sin(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, K/2] float32, for every token of the batch."""
        positions = batch.positions.to(torch.float32)
        if self.by_length:
            totals = batch.final_lengths or [context + new for context, new in zip(batch.context, batch.lengths, strict=True)]
            table = torch.stack([self._for_length(total) for total in totals])
            angles = positions.unsqueeze(1) * table[batch.row_of_token]
        else:
            angles = positions.unsqueeze(1) * self._short
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by its angle: (x1 cos - x2 sin, x2 cos + x1 sin), computed in float32 (Su et al. 2021, arXiv 2104.09864).

    x [T, H, K], cos and sin [T, K/2] float32; returns [T, H, K] in x's dtype.
    """
    wide = x.float()
    (first, second), (cos, sin) = wide.chunk(2, -1), (cos.unsqueeze(1), sin.unsqueeze(1))
    return torch.cat([(first * cos).sub_(second * sin), (second * cos).add_(first * sin)], -1).to(x.dtype)
