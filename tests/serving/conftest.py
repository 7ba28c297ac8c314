"""What the tests of serving share: the tiny base, and a hub of random adapters over it. Running services are in scenes.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import random_adapter
from atoll.hub import Hub
from atoll.model.adapter_files import write_adapter
from atoll.model.base import Base, load_base


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tiny base is faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny Llama in float32."""
    return load_base(str(tiny_base_dir), dtype="float32", home=tmp_path_factory.mktemp("serving-home"))


@pytest.fixture
def write(base: Base, tmp_path: Path) -> Callable[..., Path]:
    """write(name, seed) makes a PEFT folder with a manifest that names the base; keywords join the manifest."""

    def make(name: str, seed: int = 0, *, where: Path | None = None, **manifest: Any) -> Path:
        made = random_adapter(base.decoder, rank=4, seed=seed)
        folder = (where or tmp_path / "folders") / name
        write_adapter(folder, replace(made, manifest={"format": 1, "kind": "lora", "base": base.describe(), "prompt": None, **manifest}))
        return folder

    return make


@pytest.fixture
def hub(write: Callable[..., Path], tmp_path: Path) -> Hub:
    """Three adapters: red, green, blue."""
    hub = Hub(tmp_path / "hub")
    for seed, name in enumerate(("red", "green", "blue")):
        hub.publish(write(name, seed + 1), name)
    return hub
