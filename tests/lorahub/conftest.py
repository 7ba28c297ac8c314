"""Two toy bases with a few modules each, as folders: an encoder-decoder and a decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.adapters import decoder_of, random_adapter
from tests.conftest import tiny_model
from tests.tiny_t5 import linear_shapes, random_t5_adapter, tiny_t5, write_tiny_t5

from atoll.model.adapter import Adapter, LoraModule
from atoll.model.adapter_files import write_adapter
from atoll.model.generic_adapter import write_generic_adapter


@pytest.fixture(scope="session")
def t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 base on disk; do not write into it."""
    return write_tiny_t5(tmp_path_factory.mktemp("bases") / "tiny-t5")


@pytest.fixture(scope="session")
def t5_modules(t5_dir: Path) -> list[str]:
    """Four modules of rank 4 with different alphas."""
    shapes, folders = linear_shapes(tiny_t5()), []
    for number in range(4):
        folder = t5_dir.parent / f"module{number}"
        write_generic_adapter(folder, random_t5_adapter(shapes, number, base=str(t5_dir), alpha=6.0 + 2 * number))
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="session")
def llama_modules(tiny_base_dir: Path) -> list[str]:
    """Three modules of rank 4 over the tiny Llama of conftest.py, strong enough to move losses."""
    decoder, folders = decoder_of(tiny_model("llama")), []
    for number in range(3):
        drawn = random_adapter(decoder, 4, seed=number, base=str(tiny_base_dir))
        strong = {site: LoraModule(module.a, module.b * 4, module.scaling) for site, module in drawn.modules.items()}
        folder = tiny_base_dir.parent / f"llama-module{number}"
        write_adapter(folder, replace(Adapter(drawn.spec, strong), manifest={"format": 1, "kind": "lora", "base": {}}))
        folders.append(str(folder))
    return folders
