"""`atoll train` with a sweep: the grid before, the table after; and several files' dry run as one document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def file(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"base: {tiny_base_dir}\nname: dated\n"
        "data: {path: 'builtin:dates', max_train_rows: 8, max_validation_rows: 2, max_test_rows: 1}\n"
        "trainer: {max_steps: 2, batch_size: 4, dtype: float32}\n"
        "sweep:\n  adapter.r: [2, 4]\n"
    )
    return path


def test_the_dry_run_shows_the_grid_and_writes_nothing(atoll: Any, file: Path, tmp_path: Path) -> None:
    """What it would be called, how large it is, how long all of it takes."""
    shown = atoll("train", file, "--dry-run")
    assert shown.code == 0 and "dated-r_2" in shown.out and "dated-r_4" in shown.out and "2 trainings, 2 at once" in shown.out
    told = atoll("train", file, "--dry-run", "--json").json()
    assert [each["values"] for each in told["trainings"]] == [{"adapter.r": 2}, {"adapter.r": 4}] and told["estimate"]["seconds"] > 0
    assert told["trainings"][1]["parameters"] == 2 * told["trainings"][0]["parameters"] and not (tmp_path / "runs").exists()


def test_a_sweep_ends_with_a_table_and_the_best_under_its_name(atoll: Any, file: Path) -> None:
    """And what it recorded can be compared."""
    ended = atoll("train", file)
    assert ended.code == 0 and "| best" in ended.out and "adapter.r" in ended.out and "score" not in ended.out
    assert "published as dated@1" in ended.err
    again = atoll("train", file, "--json").json()
    assert all(line["reused"] for line in again["trainings"]) and again["published"] == "dated@1"
    compared = atoll("runs", "compare", "dated-r_2", "dated-r_4", "--json").json()
    assert compared["settings"] == {"name": ["dated-r_2", "dated-r_4"], "adapter.r": [2, 4]} and len(compared["losses"]["best_loss"]) == 2
    assert compared["cost"]["cpu_seconds"][0] > 0


def test_a_sweep_stands_alone_and_a_bad_key_is_a_sentence(atoll: Any, file: Path) -> None:
    """Nothing is trained."""
    both = atoll("train", file, file)
    assert both.code == 1 and "trained by itself" in both.err
    wrong = atoll("train", file, "--set", "sweep.adapter.rank=[2]")
    assert wrong.code == 1 and len([line for line in wrong.err.splitlines() if line.startswith("error:")]) == 1


def test_several_files_dry_run_as_one_document(atoll: Any, file: Path, tmp_path: Path) -> None:
    """A program that reads it parses once."""
    text = file.read_text().partition("sweep:")[0]
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(text.replace("dated", name))
    told = atoll("train", "one.yaml", "two.yaml", "--dry-run", "--json").json()
    assert [each["config"]["name"] for each in told] == ["one", "two"]
    assert atoll("train", "one.yaml", "--dry-run", "--json").json()["config"]["name"] == "one"
