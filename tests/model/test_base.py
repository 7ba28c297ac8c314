"""model/base.py: a loaded base says who it is, what ends its texts and how long they may be, and refuses what would go wrong later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.errors import BaseFormatError, BaseNotFound, ConfigError
from atoll.model.base import describe_base, find_eos_ids, load_base, read_tensors
from atoll.model.sharded import Share
from atoll.model.sites import Site


@pytest.fixture
def folder(tiny_base_dir: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny base, to change."""
    return Path(shutil.copytree(tiny_base_dir, tmp_path / "copy"))


def set_keys(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text()) if file.is_file() else {}
    data.update(changes)
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_local_folder_loads_with_its_identity(tiny_base_dir: Path, dtype: str, expected: torch.dtype) -> None:
    """Everything downstream (manifest, KV keys, stop rules) takes these values from here."""
    base = load_base(str(tiny_base_dir), dtype=dtype)
    assert base.path == tiny_base_dir.resolve()
    assert base.dtype == base.decoder.dtype == expected
    assert base.context_length == 512
    assert base.eos_ids == (2,)
    assert base.fingerprint == describe_base(tiny_base_dir)
    assert base.describe() == {"name": str(tiny_base_dir), **base.fingerprint.to_json()}
    assert base.tokenizer.decode(base.tokenizer("two words").input_ids) == "two words"


def test_a_loaded_base_computes_what_transformers_computes(tiny_base_dir: Path) -> None:
    """Between file and decoder a tensor can be cast, fused or mapped wrongly; the answer to real text is the proof."""
    from transformers import AutoModelForCausalLM

    from atoll.model.batch import PackedBatch

    base = load_base(str(tiny_base_dir), dtype="float32")
    ids = base.tokenizer("the same words").input_ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)(torch.tensor([ids])).logits[0]
        found = base.decoder.logits(base.decoder.forward(PackedBatch.of([ids])))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32; summation order differs


def test_loading_writes_nothing_on_the_terminal(tiny_base_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A library that draws bars or prints advice breaks pipes and displays; progress goes through the callback."""
    steps: list[tuple[str, int, int]] = []
    load_base(str(tiny_base_dir), progress=lambda *step: steps.append(step))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert steps[-1][1:] == (1, 1)


def test_weights_of_another_dtype_are_cast_once(folder: Path) -> None:
    """A float16 base must run in bfloat16 without anybody downstream knowing."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        read = read_tensors(folder, dtype)
        assert read.keys() == tensors.keys()
        assert {tensor.dtype for tensor in read.values()} == {dtype}
    torch.testing.assert_close(read["model.norm.weight"], tensors["model.norm.weight"], rtol=1e-3, atol=1e-3)


def test_a_share_of_a_base_is_of_the_cast_and_rounded_weights(folder: Path) -> None:
    """What is gathered is what a whole base holds, in its dtype, whatever the files were stored in."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    whole = load_base(str(folder)).decoder

    def gather(out: torch.Tensor, part: torch.Tensor) -> Callable[[], None]:
        out[: len(part)] = part  # of two; the other's half stays what it was
        return lambda: None

    shared = load_base(str(folder), share=Share(0, 2, gather)).decoder
    assert shared.dtype == whole.dtype == torch.bfloat16
    assert 2 * shared.linear_bytes == whole.linear_bytes
    assert torch.equal(shared.weight(Site(1, "q_proj")), whole.weight(Site(1, "q_proj")))


def test_packed_integers_are_not_weights(folder: Path) -> None:
    """Casting packed 4-bit integers to floats gives numbers, and nonsense; the tensor is named instead."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BaseFormatError, match=r"model\.norm\.weight' is stored as I8"):
        load_base(str(folder))


def test_old_stored_rotary_frequencies_are_ignored(folder: Path) -> None:
    """Savers of some years ago stored them; they follow from the config and must neither fail the load nor change the identity."""
    before = describe_base(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    assert load_base(str(folder)).fingerprint == before


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([4, 2], 2, (2, 4)),  # the tokenizer's own (2) first: training ends its completions with it
        (4, 2, (2, 4)),
        (None, [3, 4], (2, 3, 4)),  # no generation_config entry: the config's
        (None, None, (2,)),
    ],
)
def test_every_id_that_ends_a_text_is_found(folder: Path, tiny_base_dir: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    """Chat models end turns with another id than texts; missing one, an answer runs on to the token limit."""
    set_keys(folder / "generation_config.json", eos_token_id=generation)
    set_keys(folder / "config.json", eos_token_id=config)
    assert load_base(str(folder)).eos_ids == expected


def test_a_base_without_an_end_token_is_refused(folder: Path) -> None:
    """Training would write no end and generation would never stop."""

    class Nothing:
        model_type = "llama"
        eos_token_id = None

    (folder / "generation_config.json").unlink()
    with pytest.raises(BaseFormatError, match="no end-of-text token"):
        find_eos_ids(folder, Nothing(), Nothing())


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    """An id beyond the embedding would crash in the middle of a batch, or read another row on some devices."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"].update({f"extra{index}": 261 + index for index in range(80)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BaseFormatError, match="341 tokens, but the embedding holds 320"):
        load_base(str(folder))


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    """The reader of tokenizer.json raises a bare exception; the user needs the file's name."""
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(BaseFormatError, match="the tokenizer cannot be loaded"):
        load_base(str(folder))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    """A lost tensor must not be filled with random numbers."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.clone() for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}, folder / "model.safetensors")
    with pytest.raises(BaseFormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(folder))


def test_a_wrong_dtype_device_or_name_is_refused_before_anything_is_read(tiny_base_dir: Path) -> None:
    """These are typos; they must not cost a download first."""
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of bfloat16, float32"):
        load_base(str(tiny_base_dir), dtype="int8")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used here"):
        load_base(str(tiny_base_dir), device="gpu")
    with pytest.raises(BaseNotFound):
        load_base("./nowhere")
