"""T5 bases of random weights with a tokenizer of one token a byte, and LoRA modules for them: what needs no download and no licence.

Used by compare_lorahub.py (tiny) and compose.py (of the sizes that people use).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
# T5's published sizes (Raffel et al. 2019, arXiv 1910.10683), by name.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "large": {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}

STEP = 1.0  # norm of a taught module's B: on the small size, such a module lowers the loss of others' examples by 0.8 of 10.8 nats


def write_base(folder: Path, shape: dict[str, Any], spread: float | None = None) -> None:
    """A T5 whose weights are T5's own random start (spread None), or normal with that standard deviation, norms left out; and its tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)).float()
    if spread is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0, spread)
    model.save_pretrained(folder)
    _write_tokenizer(folder)


def write_modules(
    folder: Path, base: Path, names: Sequence[str], *, rank: int, alphas: Sequence[float], targets: Sequence[str] = ("q", "v"), spread: float = 0.2
) -> list[str]:
    """Modules with normal factors, strong enough to move the losses; module i has alphas[i] and is drawn by seed 100 + i. Returns their folders."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from atoll.model.adapter import AdapterSpec, LoraModule
    from atoll.model.generic import linears_of
    from atoll.model.generic_adapter import GenericAdapter, write_generic_adapter

    with torch.device("meta"):
        linears = linears_of(T5ForConditionalGeneration(T5Config.from_pretrained(base)))
    for number, (name, alpha) in enumerate(zip(names, alphas, strict=True)):
        generator = torch.Generator().manual_seed(100 + number)
        spec = AdapterSpec(base=str(base), rank=rank, alpha=alpha, target_modules=tuple(targets), dropout=0.1)
        modules = {}
        for place, linear in linears.items():
            if place.rsplit(".", 1)[-1] in targets:
                a = torch.randn(rank, linear.in_features, generator=generator) * spread
                modules[place] = LoraModule(a, torch.randn(linear.out_features, rank, generator=generator) * spread, alpha / rank)
        write_generic_adapter(folder / name, GenericAdapter(spec, modules))
    return [str(folder / name) for name in names]


def write_taught_modules(
    folder: Path, base: Path, examples: Sequence[tuple[Sequence[str], Sequence[str]]], *, rank: int, alpha: float, targets: Sequence[str]
) -> list[str]:
    """A module for each set of (inputs, outputs), taught by one step: A random, B minus the gradient of the mean loss, with a norm of STEP in all.

    On a random base a module whose factors are noise too helps nothing, and a search among such modules wanders; these lower the losses of their own
    examples and, less so, those of others, as modules of related tasks do. Returns the folders.
    """
    import torch

    from atoll.lorahub.examples import encode_pairs, unpadded
    from atoll.model.adapter import AdapterSpec, LoraModule
    from atoll.model.generic import Pairs, load_encoder_decoder
    from atoll.model.generic_adapter import GenericAdapter, write_generic_adapter

    model, scaling = load_encoder_decoder(str(base)), alpha / rank
    places = {place: shape for place, shape in model.linears.items() if place.rsplit(".", 1)[-1] in targets}
    spec, made = AdapterSpec(base=str(base), rank=rank, alpha=alpha, target_modules=tuple(targets), dropout=0.1), []
    for number, (inputs, outputs) in enumerate(examples):
        generator = torch.Generator().manual_seed(100 + number)
        a = {place: (2 * torch.rand(rank, d_in, generator=generator) - 1) / d_in**0.5 for place, (_, d_in) in places.items()}
        b = {place: torch.zeros(d_out, rank, requires_grad=True) for place, (d_out, _) in places.items()}
        changes = {place: _changer(a[place], b[place], scaling) for place in places}
        pairs = Pairs.of(unpadded(encode_pairs(model.tokenizer, inputs, outputs)), model.tokenizer.pad_token_id)
        model.label_losses(pairs, changes).mean().backward()
        gradients = {place: tensor.grad for place, tensor in b.items() if tensor.grad is not None}
        norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        modules = {place: LoraModule(a[place], gradient * (-STEP / norm), scaling) for place, gradient in gradients.items()}
        made.append(folder / f"module{number:02}")
        write_generic_adapter(made[-1], GenericAdapter(spec, modules))
    return [str(path) for path in made]


def _changer(a: Any, b: Any, scaling: float) -> Any:
    return lambda x, y: y + scaling * ((x @ a.T) @ b.T)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
