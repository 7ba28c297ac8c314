"""Turn a GGUF file into what transformers saves: config.json, bf16 safetensors and tokenizer.

GGUF is llama.cpp's single file of quantised weights, metadata and vocabulary. transformers dequantises it; the one idea here is that nothing the file
says may be lost on the way without a word: what transformers would drop is restored (how text is split) or refused by name (experts, rope scaling).

Used by model.pull.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

from atoll.errors import BaseFormatError
from atoll.model.sites import FAMILIES

# How text was cut before the merges of a byte-level vocabulary were learned, by GGUF's name for it (tokenizer.ggml.pre); others transformers knows.
PLAIN_SPLITS = frozenset({"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion"})
DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})  # every digit alone, then as GPT-2


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the GGUF model `gguf` into the empty folder `out` as config.json, bf16 safetensors and tokenizer with chat template.

    What a GGUF says and transformers would drop (experts, rope scaling, the way text is split) is refused or restored, never lost silently.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    fields = _checked_gguf_fields(gguf)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    with _silent_bars():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        _restore_split(tokenizer, fields, gguf)
        config = AutoConfig.from_pretrained(**source)
        vars(config).pop("_model_name_or_path", None)  # a title out of the metadata, not a place
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.7g}")  # stored as float32: 9.99999975e-06 means 1e-05
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if fields.get("attention.key_length", head_dim) != head_dim:
            config.head_dim = fields["attention.key_length"]  # Qwen3's, which transformers takes from its default
        model, loading = AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
        )
        missing = sorted(loading["missing_keys"])
        if missing:
            raise BaseFormatError(
                f"{gguf} lacks the tensor {missing[0]} ({len(missing)} in all)", hint="fetch the file again, or use its safetensors version"
            )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod((out / "config.json").stat().st_mode & 0o777)  # safetensors writes 0600; the base is as readable as its config


def _checked_gguf_fields(gguf: Path) -> dict[str, Any]:
    """The metadata of a GGUF without its architecture's prefix; refuses by name what a conversion would lose."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        raw = {key: field.contents() for key, field in reader.fields.items() if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")}
        tensor_names = {tensor.name for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise BaseFormatError(f"{gguf} is not a whole GGUF file: {error}", hint="fetch or copy the file again") from error
    architecture = str(raw.get("general.architecture"))
    fields = {key.removeprefix(f"{architecture}."): value for key, value in raw.items()}
    hint = "use the safetensors version of this model"
    if architecture not in FAMILIES:
        raise BaseFormatError(f"{gguf} has architecture {architecture!r}; Atoll runs {', '.join(FAMILIES)}", hint="choose a base of these families")
    if fields.get("expert_count"):
        raise BaseFormatError(f"{gguf} is a mixture of {fields['expert_count']} experts, which Atoll does not run", hint="choose a dense base")
    if fields.get("rope.scaling.type") not in (None, "none") or "rope_freqs.weight" in tensor_names:
        raise BaseFormatError(f"{gguf} scales its rotary positions in a way that is lost on conversion", hint=hint)
    if fields.get("attention.sliding_window"):
        raise BaseFormatError(f"{gguf} uses a sliding attention window, which is lost on conversion", hint=hint)
    return fields


def _restore_split(tokenizer: Any, fields: dict[str, Any], gguf: Path) -> None:
    """Make `tokenizer` split text as the merges of a GGUF were learned.

    transformers splits as GPT-2 does when it does not know tokenizer.ggml.pre. For SmolLM that is wrong wherever a digit follows spaces or newlines
    ("\\n\\n1" becomes three tokens instead of two), and the model has never seen such text.
    """
    from tokenizers import pre_tokenizers

    if fields.get("tokenizer.ggml.model") != "gpt2":
        return
    split = fields.get("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if split in DIGIT_SPLITS:
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif split not in PLAIN_SPLITS and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        raise BaseFormatError(
            f"{gguf} splits text in a way that cannot be rebuilt (tokenizer.ggml.pre is {split!r})", hint="use the safetensors version of this model"
        )


@contextlib.contextmanager
def _silent_bars() -> Iterator[None]:
    """No tqdm bar while transformers converts: a library does not draw on its caller's terminal. Warnings and errors are left alone."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
