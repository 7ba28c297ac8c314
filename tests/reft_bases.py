"""Toy transformers models of the families that atoll.reft meets, each 3 blocks, 32 wide, float32, seeded; and what their tests ask of them.

Used by tests/reft.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.reft import LoreftIntervention, ReftConfig, ReftModel, get_reft_model

WIDTH, BLOCKS, VOCABULARY = 32, 3, 96
DECODERS = ("llama", "qwen2", "gpt2", "gpt_neox", "opt")
ENCODERS = ("bert", "roberta")
Places = list[list[int]]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,  # toy text goes on to its full length
    "pad_token_id": 0,
}


def toy(family: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of one of DECODERS, or a classifier with three labels of one of ENCODERS, in eval mode with visible weights."""
    import transformers

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
        "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
        "gpt2": ("GPT2LMHeadModel", {"n_inner": 48}),
        "gpt_neox": ("GPTNeoXForCausalLM", {}),
        "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
        "bloom": ("BloomForCausalLM", {}),
        "falcon": ("FalconForCausalLM", {}),
        "mixtral": ("MixtralForCausalLM", {"num_key_value_heads": 2, "num_local_experts": BLOCKS}),
        "gemma2": ("Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
        "bert": ("BertForSequenceClassification", {"num_labels": 3}),
        "roberta": ("RobertaForSequenceClassification", {"num_labels": 3}),
        "distilbert": ("DistilBertForSequenceClassification", {"num_labels": 3, "hidden_dim": 48}),
        "t5": ("T5ForConditionalGeneration", {"d_ff": 48, "d_kv": 8, "num_decoder_layers": BLOCKS, "decoder_start_token_id": 0}),
    }
    name, more = kinds[family]
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**{**_SIZES, **more, **changes})).float().eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.add_(0.1 * torch.randn_like(tensor)) if "norm" in key.lower() or "ln_" in key else tensor.normal_(0.0, 0.15)
    return model


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Token ids [rows, length], none of them a special one."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A batch without padding."""
    ids = tokens(rows, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_lora(model: Any, seed: int = 0) -> Any:
    """The model wrapped by PEFT, with LoRA factors that change it. Skips the test where PEFT is not installed."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that transformers has deprecated
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return wrapped.eval()


def block(model: Any, layer: int) -> nn.Module:
    """A block by the path that its family gives it."""
    paths = {
        "LlamaForCausalLM": "model.layers",
        "Qwen2ForCausalLM": "model.layers",
        "GPT2LMHeadModel": "transformer.h",
        "GPTNeoXForCausalLM": "gpt_neox.layers",
        "OPTForCausalLM": "model.decoder.layers",
        "BertForSequenceClassification": "bert.encoder.layer",
        "RobertaForSequenceClassification": "roberta.encoder.layer",
    }
    found: nn.Module = model.get_submodule(f"{paths[type(model).__name__]}.{layer}")
    return found


def by_hand(model: Any, base: dict[str, Tensor], edits: list[tuple[nn.Module, nn.Module, list[list[int]]]]) -> Any:
    """The output of a model where plain hooks on modules apply interventions, row by row and place by place: (module, intervention, places)."""

    def hook_of(intervention: nn.Module, places: list[list[int]]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for row, named in enumerate(places):
                for place in named:
                    hidden[row, place] = intervention(hidden[row : row + 1, place : place + 1])[0, 0]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    handles = [module.register_forward_hook(hook_of(intervention, places)) for module, intervention, places in edits]
    try:
        with torch.no_grad():
            return model(**base)
    finally:
        for handle in handles:
            handle.remove()


def loreft(seed: int = 0, cls: Any = LoreftIntervention, **kwargs: Any) -> Any:
    """An intervention of rank 4 in float32, seeded."""
    torch.manual_seed(seed)
    return cls(**{"embed_dim": WIDTH, "low_rank_dimension": 4, "dtype": torch.float32, **kwargs})


def reft_of(model: Any, *layers: int, component: str = "block_output", cls: Any = LoreftIntervention, **kwargs: Any) -> ReftModel:
    """A ReftModel with one intervention a layer (0 and 2 where none is named), each of its own seed."""
    entries = [
        {"layer": layer, "component": component, "intervention": loreft(number, cls, **kwargs)} for number, layer in enumerate(layers or (0, 2))
    ]
    return get_reft_model(model, ReftConfig(representations=entries))


def at(*places: Places) -> dict[str, Any]:
    """unit_locations of places[intervention][row]."""
    return {"sources->base": (None, [*places])}


def logits(reft_model: ReftModel, base: dict[str, Tensor], unit_locations: Any, **kwargs: Any) -> Tensor:
    """What the edited model says, without gradients."""
    with torch.no_grad():
        _, outputs = reft_model(base, unit_locations=unit_locations, **kwargs)
    found: Tensor = outputs.logits
    return found


def plain(model: Any, base: dict[str, Tensor]) -> Tensor:
    """What a model says as it is."""
    with torch.no_grad():
        found: Tensor = model(**base).logits
    return found
