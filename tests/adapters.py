"""Toy adapters over the toy bases of conftest.py, and the two references that the forward is held to: transformers and PEFT.

Used by tests/model and tests/train.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.model.adapter import Adapter, AdapterSpec, LoraModule, new_adapter
from atoll.model.adapter_files import write_adapter
from atoll.model.apply import AdapterWeights
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.model.decoder import Decoder

# Rows of unequal length: a packed batch of them is neither a full block nor a single row.
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31, 32, 33] * 3, [40]]
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 on CPU; logits have a spread of about 0.6, and summation order differs


def decoder_of(model: Any, dtype: torch.dtype = torch.float32) -> Decoder:
    """The native forward over a transformers model's weights."""
    return Decoder.from_state_dict(model.config, model.state_dict(), dtype)


def reference(model: Any, row: Sequence[int]) -> Tensor:
    """transformers' (or PEFT's) logits [T, V] of one row alone."""
    logits: Tensor = model(torch.tensor([list(row)])).logits[0]
    return logits


def random_adapter(decoder: Decoder, rank: int = 8, seed: int = 1, **spec: Any) -> Adapter:
    """A LoRA whose B is not zero, so that it moves logits by a good part of their spread."""
    generator = torch.Generator().manual_seed(seed)
    asked = AdapterSpec(**{"base": "tiny", "rank": rank, "alpha": 2.0 * rank, **spec})
    fresh = new_adapter(asked, decoder.shape.linears, decoder.shape.num_layers, generator)
    modules = {
        site: LoraModule(module.a, torch.randn(module.b.shape, generator=generator) * 0.05, module.scaling) for site, module in fresh.modules.items()
    }
    return Adapter(asked, modules)


def packed_logits(decoder: Decoder, rows: Sequence[Sequence[int]], weights: Sequence[AdapterWeights | None] | None = None) -> list[Tensor]:
    """Logits of each row of one packed batch, row i under weights[i] (None: the base)."""
    batch = PackedBatch.of(rows)
    bounds = list(zip(batch.row_starts, batch.row_starts[1:], strict=False))
    segments = tuple(Segment(*bound, weight) for bound, weight in zip(bounds, weights or [None] * len(rows), strict=True) if weight is not None)
    return list(decoder.logits(decoder.forward(batch, AdapterBatch(segments))).split(batch.lengths))


def peft_model(model: Any, adapter: Adapter, folder: Path, trainable: bool = True) -> Any:
    """PEFT's model over `model`, reading the adapter from files that we write. It changes `model` in place: give it one of its own."""
    from peft import PeftModel

    write_adapter(folder, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT still uses names that transformers has deprecated
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def new_peft_model(model: Any, seed: int = 5, **options: Any) -> Any:
    """A fresh LoRA by PEFT itself with LoraConfig(**options), its B moved away from zero."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return theirs.eval()
