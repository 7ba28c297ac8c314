"""Contestants that are no versions of the hub: adapters in memory, and the base asked otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.adapters import publish, random_adapter

from atoll.config import DataConfig, EvalConfig, GenerationConfig
from atoll.data.task import TaskData, load_task
from atoll.eval.arena import Arena, Entrant
from atoll.hub.store import Hub
from atoll.model.base import Base, load_base


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), dtype="float32")


@pytest.fixture(scope="module")
def data() -> TaskData:
    return load_task(DataConfig(path="builtin:unit_conversion", max_train_rows=8, max_validation_rows=1, max_test_rows=5))


def silent(stage: str, done: int, total: int) -> None: ...


def test_an_adapter_in_memory_scores_as_its_version_does(base: Base, data: TaskData, tmp_path: Path) -> None:
    """Same rows, same prompts, one batch; only the version's score enters the ledger, and scores on disk are read again."""
    hub, adapter = Hub(), random_adapter(base.decoder, 4)
    version = publish(hub, adapter, "units", tmp_path / "made", base=base.describe(), prompt=data.task.prompt_format().to_json())
    arena, generation = Arena(base, hub, EvalConfig(), tmp_path / "scores"), GenerationConfig(max_new_tokens=4)
    entrant = Entrant("in memory", "composed", "f" * 64, adapter)
    plain, chat, mine, other = arena.measure(data, [version], generation, silent, entrants=[entrant])
    assert (plain.prompt_style, chat.prompt_style, mine.model, other.model) == ("plain", "chat", "units@1", "in memory")
    assert (other.values, other.prompt_hash, other.rows_hash) == (mine.values, mine.prompt_hash, mine.rows_hash)
    assert {score.digest for score in hub.scores()} == {version.digest, base.fingerprint.digest}
    asked: list[str] = []
    again = arena.measure(data, [], generation, lambda stage, *_: asked.append(stage), entrants=[entrant])
    assert again == [plain, chat, other] and asked == []


def test_the_base_with_other_prompts_is_another_contestant(base: Base, data: TaskData, tmp_path: Path) -> None:
    """In both of the base's styles, on all the rows it brings, and never taken for the base itself."""
    hub = Hub()
    shown = tuple(replace(example, prompt=f"5 km in m: 5000\n\n{example.prompt}") for example in data.test[:3])
    arena = Arena(base, hub, EvalConfig(test_rows=3), tmp_path / "scores", record=False)
    entrant = Entrant("in-context", "base", base.fingerprint.digest, data=replace(data, test=shown))
    scores = arena.measure(data, [], GenerationConfig(max_new_tokens=4), silent, entrants=[entrant])
    assert [(score.model, score.prompt_style, score.n) for score in scores] == [
        (base.name, "plain", 3),
        (base.name, "chat", 3),
        ("in-context", "plain", 3),
        ("in-context", "chat", 3),
    ]
    assert scores[0].prompt_hash != scores[2].prompt_hash and hub.scores() == ()
