"""Toy adapters over the toy bases of conftest.py, and the two references that the forward is held to: transformers and PEFT.

Used by tests of everything that has to do with adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atoll.model.adapter import Adapter, AdapterSpec, LoraModule, new_adapter
from atoll.model.adapter_files import write_adapter
from atoll.model.apply import AdapterWeights
from atoll.model.apply_edits import edit_rows
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.model.decoder import Decoder
from atoll.model.dora import row_norms
from atoll.model.reft import Intervention, ReftSpec

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.hub.store import Hub

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
    """A LoRA whose B is not zero, so that it moves logits by a good part of their spread; with reft=(ReftSpec(...),) its edits do too."""
    generator = torch.Generator().manual_seed(seed)
    asked = AdapterSpec(**{"base": "tiny", "rank": rank, "alpha": 2.0 * rank, **spec})
    fresh = new_adapter(asked, decoder.shape.linears, decoder.shape.num_layers, generator)
    modules = {
        site: LoraModule(module.a, torch.randn(module.b.shape, generator=generator) * 0.05, module.scaling) for site, module in fresh.modules.items()
    }
    if asked.use_dora:  # other lengths than the base's own
        lengths = {site: row_norms(decoder.weight(site), module.a, module.b, module.scaling) for site, module in modules.items()}
        modules = {
            site: replace(module, magnitude=lengths[site] * (1 + 0.2 * torch.randn(lengths[site].shape, generator=generator)))
            for site, module in modules.items()
        }
    return Adapter(asked, modules, edits={site: _moved(found, generator) for site, found in fresh.edits.items()})


def random_reft(decoder: Decoder, seed: int = 1, *, lora: int = 0, **part: Any) -> Adapter:
    """A ReFT adapter of one part, ReftSpec(**part), that moves logits; lora: the rank of a LoRA trained beside it."""
    reft = ReftSpec(**part)
    rank = lora or max(reft.rank, *reft.rank_pattern.values(), 1)
    only = {} if lora else {"alpha": float(rank), "target_modules": ()}
    return random_adapter(decoder, rank, seed, reft=(reft,), **only)


def publish(hub: Hub, adapter: Adapter, name: str, within: Path, **manifest: Any) -> Version:
    """Write an adapter with a manifest of its kind into a folder `within`, and publish it."""
    folder = within / name.replace("/", "-")
    write_adapter(folder, replace(adapter, manifest={"format": 1, "kind": adapter.spec.kind, "base": {}, **manifest}))
    return hub.publish(folder, name)


def _moved(found: Intervention, generator: torch.Generator) -> Intervention:
    """Away from where training starts, where most methods change nothing; R keeps its rows, which some methods need orthonormal."""

    def drawn(tensor: Tensor | None, scale: float) -> Tensor | None:
        return None if tensor is None else tensor + torch.randn(tensor.shape, generator=generator) * scale

    return Intervention(found.r, drawn(found.w, 0.3), drawn(found.b, 1.0), drawn(found.c, 1.0))


def packed_logits(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    weights: Sequence[AdapterWeights | None] | None = None,
    prompts: Sequence[int] | None = None,
) -> list[Tensor]:
    """Logits of each row of one packed batch, row i under weights[i] (None: the base), its first prompts[i] tokens (all) being the prompt."""
    batch = PackedBatch.of(rows)
    given = weights or [None] * len(rows)
    bounds = list(zip(batch.row_starts, batch.row_starts[1:], strict=False))
    segments = tuple(Segment(*bound, weight) for bound, weight in zip(bounds, given, strict=True) if weight is not None)
    starts, lengths = batch.row_starts[:-1], prompts or batch.lengths
    edited = [(start, 0, len(row), n, getattr(w, "parts", ())) for start, row, n, w in zip(starts, rows, lengths, given, strict=True)]
    return list(decoder.logits(decoder.forward(batch, AdapterBatch(segments, edits=edit_rows(edited)))).split(batch.lengths))


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
