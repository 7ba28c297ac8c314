"""A hub with adapters of a tiny base, and rows of a task that none of them was made for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.adapters import publish, random_adapter, random_reft
from tests.workflows.scenes import rows, write_rows

from atoll.compose import few_shot_lora
from atoll.hub.store import Hub
from atoll.model.base import Base, load_base
from atoll.model.positions import Positions


@pytest.fixture(scope="session")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), dtype="float32")


@pytest.fixture(scope="session")
def made_hub(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four LoRAs of different ranks, a composed adapter and a ReFT one; to be copied."""
    root, made = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("made")
    hub = Hub(root)
    for number, name in enumerate(("colours", "shapes", "sizes", "sounds")):
        adapter = random_adapter(base.decoder, 2 + number, seed=number)
        publish(hub, adapter, name, made, base=base.describe(), description=f"names of {name}", task=name)
    publish(hub, random_adapter(base.decoder, 2, seed=9), "mixture", made, base=base.describe(), kind="composed")
    publish(hub, random_reft(base.decoder, rank=2, layers=(0,), positions=Positions.parse("f1")), "edits", made, base=base.describe())
    return root


@pytest.fixture
def hub(made_hub: Path, atoll_home: Path) -> Hub:
    """The made hub as the one in this test's home."""
    shutil.copytree(made_hub, atoll_home / "hub")
    return Hub()


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A file of four examples."""
    return write_rows(tmp_path / "few.jsonl", rows(4))


@pytest.fixture
def tests_file(tmp_path: Path) -> Path:
    """A file of ten test rows, so that the two labels are told."""
    return write_rows(tmp_path / "test.jsonl", rows(10, start=100))


@pytest.fixture(autouse=True)
def brief_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-shot control takes two steps: what it learns is tested where it is made."""
    original = few_shot_lora.few_shot_trainer
    monkeypatch.setattr(few_shot_lora, "few_shot_trainer", lambda *given: original(*given).model_copy(update={"max_steps": 2}))
