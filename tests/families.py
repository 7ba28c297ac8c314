"""Toy bases of the families that run by transformers' own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.conftest import TINY, tiny_tokenizer

from atoll.model.families import ENCODERS, GENERIC, SEQ2SEQ

ALIKE = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
_CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": ALIKE,
    "gemma": {**TINY, "head_dim": 24},
    "gemma2": {
        **TINY,
        "head_dim": 24,
        "query_pre_attn_scalar": 30,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **TINY,
        "head_dim": 24,
        "query_pre_attn_scalar": 30,
        "sliding_window": 6,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "phi3": {**TINY, "sliding_window": 6},
    "olmo": {**TINY, "clip_qkv": 0.5},
    "starcoder2": {**TINY, "sliding_window": 6},
    "smollm3": {**TINY, "no_rope_layers": [1, 0, 1]},
    "olmo3": {**TINY, "sliding_window": 6, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
}


def family_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_CHANGES.get(family, TINY), **changes})


def family_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' own model at toy size, float32, in eval mode, with weights large enough that logits differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            else:
                tensor.normal_(0.0, 0.08)
    return model


def write_family_base(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A base folder as a user's is."""
    folder.mkdir(parents=True, exist_ok=True)
    family_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


FAMILIES = tuple(name for name in GENERIC if name not in (*ENCODERS, *SEQ2SEQ))


def encoder_model(family: str, seed: int = 0, num_labels: int = 3, **changes: Any) -> Any:
    """transformers' own model for sequence classification at toy size, float32, in eval mode."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(family, **{**ALIKE, "num_labels": num_labels, **changes})
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float().eval()
    torch.manual_seed(seed)  # however many draws the classifier took
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.add_(0.1 * torch.randn_like(tensor)) if "LayerNorm" in name else tensor.normal_(0.0, 0.15)
    return model


def encoder_tokenizer() -> Any:
    """One token a byte between <s> and </s>."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return tokenizer


def write_encoder_base(folder: Path, family: str, seed: int = 0) -> Path:
    """A base folder as a user's is: an encoder without a classifier."""
    folder.mkdir(parents=True, exist_ok=True)
    model = encoder_model(family, seed)
    getattr(model, family).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder
