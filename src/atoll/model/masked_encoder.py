"""An encoder that tells hidden tokens: the base's own head for them over the blocks that its classifiers use too.

The head is frozen, so an adapter is LoRA (and ReFT) alone, and PEFT puts it on transformers' masked-language model as it is. Training takes it;
nothing is served with it.

Used by encoder.py, which makes it when a job asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.errors import BaseFormatError
from atoll.model.batch import BASE_ONLY, AdapterBatch, PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.kv_cache import KvCache
from atoll.model.pretrained import loaded
from atoll.model.sites import Site

if TYPE_CHECKING:
    from atoll.model.encoder import EncoderClassifier

HEADLESS = "FEATURE_EXTRACTION"  # PEFT's word for an adapter of an encoder that brings no head


class MaskedEncoder(Decoder):
    """Whole rows in, states [N, D] out; label_losses has the head's -log softmax at them. head: [N, D] to [N, V], frozen."""

    can_enter = False
    whole_prompts = True
    task_type = HEADLESS

    def __init__(self, encoder: EncoderClassifier, head: Any) -> None:
        super().__init__(encoder.shape, encoder.embedding, (), torch.empty(0), encoder.embedding, encoder.rotary)
        self._encoder, self._tell = encoder, head.eval().requires_grad_(False)

    def forward(
        self,
        batch: PackedBatch,
        adapters: AdapterBatch = BASE_ONLY,
        cache: KvCache | None = None,
        *,
        entering: tuple[int, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        assert entering is None and cache is None, "an encoder reads whole rows"
        states = self._encoder.states(batch, adapters, noise)
        return states if batch.output_index is None else states.index_select(0, batch.output_index)

    def logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self._tell(hidden)
        return found.float()

    def label_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden), labels, reduction="none")

    def weight(self, site: Site) -> Tensor:
        return self._encoder.weight(site)

    @property
    def holds_blocks(self) -> bool:
        return self._encoder.holds_blocks

    @property
    def linear_bytes(self) -> int:
        return self._encoder.linear_bytes


def load_masked(encoder: EncoderClassifier) -> MaskedEncoder:
    """With the head of the base's folder. Raises BaseFormatError where the files have none."""
    from transformers import AutoModelForMaskedLM

    path = Path(encoder.model.name_or_path)
    model, lacking = loaded(AutoModelForMaskedLM, path, encoder.dtype)
    if lacking:
        raise BaseFormatError(
            f"{path} has no {lacking[0]}, so the base cannot tell hidden tokens",
            hint="choose a base that was saved with its masked-language head, or train classes (leave trainer.mlm_probability out)",
        )
    head = model.cls if hasattr(model, "cls") else model.lm_head
    output = model.get_output_embeddings()
    if torch.equal(output.weight.to(encoder.device), encoder.embedding):
        output.weight = encoder.model.get_input_embeddings().weight  # one copy of it
    return MaskedEncoder(encoder, head.to(encoder.device))
