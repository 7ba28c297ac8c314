"""model/fingerprint.py: equal bases hash equal however they are stored, different ones never do, and damaged files are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.errors import BaseFormatError
from atoll.model.fingerprint import BaseFingerprint, chat_template_hash, config_hash, describe_base, load_config, tensor_shapes, weights_hash

FIELDS = ("config_hash", "weights", "tokenizer_hash", "chat_template_hash")


@pytest.fixture
def folder(tiny_base_dir: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny base, to change."""
    return Path(shutil.copytree(tiny_base_dir, tmp_path / "copy"))


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_copy_has_the_fingerprint_of_its_original(tiny_base_dir: Path, folder: Path) -> None:
    """Adapters would be refused on another machine if the place of the base went into its identity."""
    assert describe_base(folder) == describe_base(tiny_base_dir)
    assert describe_base(folder).digest == describe_base(tiny_base_dir).digest


def test_a_sharded_resave_by_transformers_keeps_the_fingerprint(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Sharding, tensor order and the saver's version are not the model; a base saved again must still take its adapters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype="auto").save_pretrained(again, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(again)
    assert len(list(again.glob("*.safetensors"))) > 1
    assert describe_base(again) == describe_base(tiny_base_dir)


def test_an_older_spelling_of_the_config_has_the_same_hash(folder: Path) -> None:
    """transformers 4 wrote rope_theta at the top and torch_dtype; the same architecture must not become another base by an upgrade."""
    before = config_hash(load_config(folder))

    def older(config: dict) -> None:
        config["rope_theta"] = int(config.pop("rope_parameters")["rope_theta"])
        config["torch_dtype"] = config.pop("dtype")
        config.pop("head_dim", None)
        config.update(_name_or_path="/somewhere/else", transformers_version="4.40.0", attention_dropout=0.1, use_cache=False)

    edit_json(folder / "config.json", older)
    assert config_hash(load_config(folder)) == before


def one_weight(folder: Path) -> None:
    def change(tensors: dict) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3

    edit_weights(folder, change)


def swapped_vocabulary(folder: Path) -> None:
    def change(data: dict) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(folder / "tokenizer.json", change)


def other_eos(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda data: data.update(eos_token="<|im_end|>"))


def template_character(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "assistent"))


def rope_base(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data["rope_parameters"].update(rope_theta=20000.0))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (one_weight, "weights"),
        (swapped_vocabulary, "tokenizer_hash"),
        (other_eos, "tokenizer_hash"),
        (template_character, "chat_template_hash"),
        (rope_base, "config_hash"),
    ],
)
def test_one_change_moves_its_own_hash_and_no_other(folder: Path, change: Callable[[Path], None], field: str) -> None:
    """An adapter applied to a silently different base answers wrongly; and the verdict must say which part differs."""
    before = describe_base(folder)
    change(folder)
    after = describe_base(folder)
    assert [name for name in FIELDS if getattr(before, name) != getattr(after, name)] == [field]
    assert before.digest != after.digest


def test_the_stored_dtype_is_part_of_the_weights(folder: Path) -> None:
    """Rounding to bfloat16 changes every answer a little; the two must not share caches."""
    before = weights_hash(folder)
    edit_weights(folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    assert weights_hash(folder) != before


def test_a_tied_head_that_is_also_stored_changes_nothing(folder: Path) -> None:
    """Some hub folders store the tied head a second time and lose it on the first re-save; it is the same model."""
    before = weights_hash(folder)
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert weights_hash(folder) == before
    edit_weights(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert weights_hash(folder) != before


def test_a_template_counts_the_same_wherever_it_is_kept(folder: Path) -> None:
    """Older folders keep the chat template inside tokenizer_config.json."""
    before = chat_template_hash(folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert chat_template_hash(folder) != before
    edit_json(folder / "tokenizer_config.json", lambda data: data.update(chat_template=template))
    assert chat_template_hash(folder) == before


def test_the_cache_notices_a_file_replaced_under_its_old_time(folder: Path) -> None:
    """A cache that lies about weights is the worst silent failure: size and mtime may be equal, the content is not."""
    before = describe_base(folder)
    file = folder / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert describe_base(folder).weights != before.weights


def test_a_damaged_cache_entry_is_computed_again(folder: Path, atoll_home: Path) -> None:
    """A cache is a convenience: half an entry must not become an answer or a crash."""
    before = describe_base(folder)
    (entry,) = (atoll_home / "bases" / ".cache").glob("fingerprint-*.json")
    entry.write_text(entry.read_text()[:40])
    assert describe_base(folder) == before


def test_describing_a_base_writes_nothing_into_its_folder(folder: Path) -> None:
    """A user's folder may be shared or read-only; it is not ours to write."""
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    describe_base(folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_fingerprints_survive_json_and_malformed_ones_are_refused(folder: Path) -> None:
    """The fingerprint travels in manifests; one that lost a hash must not compare as if it had it."""
    fingerprint = describe_base(folder)
    data = fingerprint.to_json()
    assert BaseFingerprint.from_json({**data, "name": "x"}) == fingerprint
    for wrong in ({**data, "tokenizer_hash": "abc"}, {key: data[key] for key in data if key != "weights_fingerprint"}, {**data, "config_hash": None}):
        with pytest.raises(BaseFormatError, match="64 hex digits"):
            BaseFingerprint.from_json(wrong)


def test_shapes_come_from_the_headers(tiny_base_dir: Path) -> None:
    """The hub names the first tensor that differs without loading either model."""
    shapes = tensor_shapes(tiny_base_dir)
    stored = load_file(tiny_base_dir / "model.safetensors")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()} == tensor_shapes(tiny_base_dir / "model.safetensors")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:4], lambda data: b"\xff" * 8 + data[8:], lambda data: b""]
)
def test_a_damaged_weights_file_is_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    """A copy that was cut short must fail by name at once, not give a model with noise in its last layer."""
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BaseFormatError, match=r"model\.safetensors"):
        describe_base(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "same folder"),
        ({"a": "model.bin"}, "same folder"),
        ({"a": "model-00002.safetensors"}, "not in the folder"),
        ({}, "weight_map"),
    ],
)
def test_an_index_may_only_name_files_that_are_there(folder: Path, weight_map: dict, message: str) -> None:
    """An index from a stranger must not reach outside its folder or into a pickle, and a lost shard is named."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BaseFormatError, match=message):
        tensor_shapes(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    """Which of the two would win depends on the order of reading; that is not an identity."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, folder / "b.safetensors")
    with pytest.raises(BaseFormatError, match=r"model\.norm\.weight"):
        tensor_shapes(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    """A base without its tokenizer cannot be told from one with another."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BaseFormatError, match="no tokenizer"):
        describe_base(folder)
