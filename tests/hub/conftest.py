"""Adapter folders as PEFT writes them, at toy size, and an empty hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from atoll.hub import Hub

D = 8  # width of the toy base's linears
KEY = "base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{factor}.weight"
BASE = {"name": "toy/base", "config_hash": "c" * 64, "weights_fingerprint": "d" * 64, "tokenizer_hash": "e" * 64, "chat_template_hash": "f" * 64}


def write_adapter_folder(folder: Path, seed: int = 0, *, rank: int = 2, manifest: dict[str, Any] | None = None, rows: int = D) -> Path:
    """A LoRA of q_proj in one layer; `seed` makes the content differ. Without `manifest` it is a stranger's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(seed)
    a = random.normal(size=(rank, D)).astype("float32")
    b = random.normal(size=(rows, rank)).astype("float32")
    save_file(
        {KEY.format(layer=0, factor="A"): a, KEY.format(layer=0, factor="B"): b}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "toy/base",
        "layers_to_transform": [0],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if manifest is not None:
        whole = {
            "format": 1,
            "kind": "lora",
            "name": "toy",
            "base": BASE,
            "prompt": None,
            "training": None,
            "parents": [],
            "licence": None,
            **manifest,
        }
        (folder / "manifest.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make(seed, ...) writes an adapter folder and returns it."""

    def write(seed: int = 0, name: str | None = None, **changes: Any) -> Path:
        return write_adapter_folder(tmp_path / (name or f"adapter-{seed}"), seed, **changes)

    return write


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """An empty hub."""
    return Hub(tmp_path / "hub")
