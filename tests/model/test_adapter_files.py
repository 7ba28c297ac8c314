"""model/adapter_files.py: PEFT's files bit-exact in and out, and writes that are whole or not there. Refusals are in test_adapter_refusals.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters import CLOSE, ROWS, decoder_of, new_peft_model, packed_logits, peft_model, random_adapter, reference
from tests.conftest import tiny_model

from atoll.errors import StorageError
from atoll.files import write_file
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.adapter_files import MANIFEST_FILE, WEIGHTS_FILE, read_adapter, read_manifest, write_adapter
from atoll.model.bank import LoraBank
from atoll.model.sites import peft_key


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    """Rank 2 on q and v of three layers."""
    return random_adapter(decoder_of(tiny_model("llama")), 2, target_modules=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {
            "r": 4,
            "target_modules": ["v_proj", "k_proj"],
            "rank_pattern": {"k_proj": 2, "layers.1.self_attn.k_proj": 3},
            "alpha_pattern": {"layers.2.self_attn.v_proj": 1.5, "v_proj": 6},
        },
        {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [0, 2], "init_lora_weights": "gaussian"},
        {"r": 2, "target_modules": ["up_proj"], "layers_to_transform": 1},
    ],
    ids=["all-linear", "rsLoRA", "patterns", "layers", "one layer"],
)
def test_what_peft_writes_we_read_bit_exact(options: dict[str, Any], tmp_path: Path) -> None:
    """Adapters of the world come as PEFT saves them; the same bits must give the same logits here."""
    theirs = new_peft_model(tiny_model("llama"), **options)
    theirs.save_pretrained(tmp_path / "peft")
    ours = read_adapter(tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / WEIGHTS_FILE)
    read = {peft_key(site, f): tensor for site, m in ours.modules.items() for f, tensor in (("A", m.a), ("B", m.b))}
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) and read[name].dtype == stored[name].dtype for name in stored)
    assert ours.manifest == {}
    decoder = decoder_of(tiny_model("llama"))
    slot = LoraBank(decoder.shape.linears, 3, torch.float32).load(ours)
    with torch.no_grad():
        for row, logits in zip(ROWS, packed_logits(decoder, ROWS, [slot] * len(ROWS)), strict=True):
            torch.testing.assert_close(logits, reference(theirs, row), **CLOSE)
    write_adapter(tmp_path / "again", ours)
    assert read_adapter(tmp_path / "again").spec == ours.spec
    again = load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_stored_dtype_comes_back_as_it_was(dtype: torch.dtype, adapter: Adapter, tmp_path: Path) -> None:
    """A published digest is over bytes; a cast on the way through would make another adapter."""
    modules = {site: LoraModule(module.a.to(dtype), module.b.to(dtype), module.scaling) for site, module in adapter.modules.items()}
    write_adapter(tmp_path / "one", Adapter(adapter.spec, modules))
    back = read_adapter(tmp_path / "one")
    assert all(torch.equal(back.modules[site].a, module.a) and back.modules[site].b.dtype == dtype for site, module in modules.items())
    write_adapter(tmp_path / "two", back)
    assert (tmp_path / "one" / WEIGHTS_FILE).read_bytes() == (tmp_path / "two" / WEIGHTS_FILE).read_bytes()


def test_the_order_of_patterns_survives_writing(tmp_path: Path) -> None:
    """PEFT takes the first entry that names a module: sorting the keys would change a rank (an error) or an alpha (silently)."""
    decoder = decoder_of(tiny_model("llama"))
    adapter = random_adapter(decoder, 4, target_modules=("q_proj",), alpha_pattern={"q_proj": 3.0, "layers.1.self_attn.q_proj": 9.0})
    theirs = peft_model(tiny_model("llama"), adapter, tmp_path)
    back = read_adapter(tmp_path)
    for site, module in adapter.modules.items():
        layer = theirs.base_model.model.model.layers[site.layer].self_attn.q_proj
        assert back.modules[site].scaling == module.scaling == layer.scaling["default"]


def test_the_manifest_travels_beside_the_two_files(adapter: Adapter, tmp_path: Path) -> None:
    """Prompt template and base fingerprint are part of an adapter; PEFT ignores the file, we need it."""
    manifest = {"format": 1, "kind": "lora", "prompt": {"template": "Größe: {q}"}, "parents": []}
    write_adapter(tmp_path, Adapter(adapter.spec, adapter.modules, manifest))
    assert read_manifest(tmp_path) == read_adapter(tmp_path).manifest == manifest
    assert "Größe" in (tmp_path / MANIFEST_FILE).read_text(encoding="utf-8")


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter of an hour ago must survive a failed save, and the message must say what to do."""
    write_file(tmp_path / "file", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="file could not be written: No space left on device") as found:
        write_file(tmp_path / "file", b"new")
    assert "free some space" in found.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A folder that cannot be made ends in a sentence, not a traceback; one that is only missing is made."""
    write_file(tmp_path / "new" / "file", b"x")
    with pytest.raises(StorageError, match="could not be written"):
        write_file(tmp_path / "new" / "file" / "below", b"x")
