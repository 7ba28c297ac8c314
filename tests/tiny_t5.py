"""A toy encoder-decoder base and adapters over it, for the tests of the generic forward and of lorahub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoll.model.adapter import AdapterSpec, LoraModule
from atoll.model.generic import GenericModel, linears_of
from atoll.model.generic_adapter import GenericAdapter

PAIRS = [("add 2 and 3", "5"), ("what is red", "a colour"), ("the opposite of hot", "cold"), ("spell cat", "c a t"), ("capital of france", "paris")]
INPUTS, OUTPUTS = [given for given, _ in PAIRS], [wanted for _, wanted in PAIRS]


def tiny_t5(seed: int = 0, **changes: Any) -> Any:
    """transformers' T5 at toy size, float32, in eval mode, with weights large enough that losses differ."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        **{"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
        **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    }
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**{**settings, **changes})).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                tensor.normal_(0.0, 0.15)
    return model


def t5_tokenizer() -> Any:
    """One token a byte, and </s> behind every text, as T5's own tokenizer puts it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def write_tiny_t5(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A base folder as a user's is."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_t5(seed, **changes).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return folder


def generic_model(seed: int = 0, **changes: Any) -> GenericModel:
    return GenericModel("tiny-t5", Path("tiny-t5"), tiny_t5(seed, **changes), t5_tokenizer())


def linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    return {place: (linear.out_features, linear.in_features) for place, linear in linears_of(model).items() if isinstance(linear, nn.Linear)}


def random_t5_adapter(
    shapes: dict[str, tuple[int, int]], seed: int, rank: int = 4, targets: Sequence[str] = ("q", "v"), base: str = "tiny-t5", **spec: Any
) -> GenericAdapter:
    """Factors at every linear whose path ends in one of the targets, strong enough to move losses."""
    generator = torch.Generator().manual_seed(seed)
    asked = AdapterSpec(**{"base": base, "rank": rank, "alpha": 2.0 * rank, "target_modules": tuple(targets), **spec})
    modules = {}
    for place, (d_out, d_in) in shapes.items():
        if any(place == target or place.endswith("." + target) for target in targets):
            own = asked.rank_at(place)
            a, b = torch.randn(own, d_in, generator=generator) * 0.2, torch.randn(d_out, own, generator=generator) * 0.1
            modules[place] = LoraModule(a, b, asked.scaling_at(place))
    return GenericAdapter(asked, modules)
