"""A base that is ready in a second: a random Llama of three layers and a tokenizer of one token a byte, written as a Hugging Face folder.

It runs the same code as a real base, hundreds of steps a second, so a short soak meets many of the rare orders of events.

Used by world.py for `--base tiny`.
"""

from __future__ import annotations

from pathlib import Path

SHAPE = {
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
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = "tiny-base"  # the name of its folder
WEIGHT_SPREAD = 0.08  # large enough that logits differ, and that adapters move them


def write_tiny_base(folder: Path) -> Path:
    """Write the base into `folder`; always the same one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=True)).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                tensor.normal_(0.0, WEIGHT_SPREAD)
    model.save_pretrained(folder)

    vocabulary = {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL[1], SPECIAL[2], SPECIAL[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=pad, additional_special_tokens=SPECIAL[3:])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
