"""What every test shares: a tiny random base in each family, a byte tokenizer, and their folder on disk.

The tiny models have the shape of the real ones (grouped heads, 2 or 3 layers) at a size where a test takes milliseconds. Weights are seeded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # toy sizes: a second thread only waits

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> Any:
    """A transformers config of a Llama-like `family` (llama, mistral, qwen2, qwen3) at toy size."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    settings: dict[str, Any] = {**TINY, "tie_word_embeddings": family == "llama"}
    if family == "qwen3":
        settings["head_dim"] = 24  # Qwen3 sets the head size apart from hidden_size / heads
    return kinds[family](**{**settings, **changes})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' own model of `tiny_config(family)`, float32, in eval mode, with weights large enough that logits differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            else:
                tensor.normal_(0.0, 0.08)
    return model


def tiny_tokenizer() -> Any:
    """One token a byte: ids 0 to 4 are <pad> <s> </s> <|im_start|> <|im_end|>, byte b is 5 + its rank in the byte alphabet; has a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=special[3:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_tiny_base(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Save `tiny_model` and `tiny_tokenizer` as a Hugging Face folder; the way a user's local base looks."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    return folder


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama base of 3 layers on disk, shared by the session; do not write into it."""
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(autouse=True)
def atoll_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache and hub of its own: ATOLL_HOME points into its temporary folder."""
    home = tmp_path / "atoll-home"
    monkeypatch.setenv("ATOLL_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's compiled libraries are built, each once. It is the folder `kernels` of an ATOLL_HOME."""
    folder = tmp_path_factory.mktemp("kernel-home") / "kernels"
    folder.mkdir()
    return folder


@pytest.fixture
def built_kernels(atoll_home: Path, kernel_folder: Path) -> None:
    """This test's own ATOLL_HOME has the session's compiled libraries."""
    atoll_home.mkdir(exist_ok=True)
    (atoll_home / "kernels").symlink_to(kernel_folder, target_is_directory=True)
