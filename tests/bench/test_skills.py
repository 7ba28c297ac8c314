"""The generated families in which skills combine: what the tasks promise, so that a score on a cell that was left out means what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.config import DataConfig
from atoll.data.task import load_task
from atoll.tasks.generators import normalised_input

BENCH = Path(__file__).parents[2] / "bench"
FAMILIES = ("domain_format", "operation_language")


@pytest.fixture
def skills(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/skills.py, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    import skills

    yield skills
    sys.modules.pop("skills", None)


def inputs(task: Any, rows: Any) -> list[str]:
    """What a model is shown of each row, as duplicates are told."""
    columns = tuple(column for column in task["template"].replace("}", "{").split("{")[1::2])
    return [normalised_input({column: str(row[column]).replace("*", "mark") for column in columns}, columns) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(skills: Any, family: str) -> None:
    sizes = skills.Sizes(train=12, validation=3, test=6)
    first, again, other = (skills.make_cells(family, sizes, seed) for seed in (17, 17, 18))
    assert first == again
    assert all(first[cell][1]["test"] != other[cell][1]["test"] for cell in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_training_rows_change_no_test_row(skills: Any, family: str) -> None:
    few, many = (skills.make_cells(family, skills.Sizes(train=train, validation=3, test=6), 17) for train in (6, 24))
    assert all(few[cell][1]["test"] == many[cell][1]["test"] for cell in few)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_test_input_is_a_training_input_of_any_cell_of_its_row_and_no_training_input_is_in_two_cells(skills: Any, family: str) -> None:
    cells = skills.make_cells(family, skills.Sizes(train=30, validation=5, test=20), 17)
    trained: list[tuple[str, str]] = []
    tested: set[tuple[str, str]] = set()
    for task, rows in cells.values():
        trained += [(task["template"], text) for text in inputs(task, rows["train"]) + inputs(task, rows["validation"])]
        tested |= {(task["template"], text) for text in inputs(task, rows["test"])}
    assert len(set(trained)) == len(trained)
    assert not tested & set(trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_of_a_row_of_the_grid_ask_the_same_and_want_it_written_differently(skills: Any, family: str) -> None:
    """Else the format's adapters could be told apart by their inputs, and a gain would not be one of composing."""
    cells, grid = skills.make_cells(family, skills.Sizes(train=6, validation=2, test=8), 17), skills.FAMILIES[family]
    for domain in grid.domains:
        row = [cells[skills.cell_name(domain, column)] for column in grid.columns]
        assert len({json.dumps(inputs(task, rows["test"])) for task, rows in row}) == 1
        assert len({task["template"] for task, _ in row}) == 1
        assert len({json.dumps([line["value"] for line in rows["test"]]) for _, rows in row}) == 1
        assert len({json.dumps([line["answer"] for line in rows["test"]]) for _, rows in row}) == len(row)


def test_an_answer_is_its_value_in_the_cells_form(skills: Any) -> None:
    cells = skills.make_cells("domain_format", skills.Sizes(train=4, validation=2, test=4), 17)
    row = cells["word-json"][1]["test"][0]
    assert json.loads(row["answer"]) == {"answer": row["value"]} and f"*, {row['value']}" in row["words"]
    assert cells["intent-capitals"][1]["test"][0]["answer"].startswith("RESULT: ")
    largest = skills.make_cells("operation_language", skills.Sizes(train=4, validation=2, test=4), 17)["largest-german"][1]["test"][0]
    numbers = [int(number) for number in largest["numbers"].split(", ")]
    assert largest["answer"] == skills.NUMBER_NAMES["german"][max(numbers) - 1]


def test_every_language_has_a_name_for_every_number_and_no_name_twice(skills: Any) -> None:
    assert all(len(set(names)) == skills.MOST for names in skills.NUMBER_NAMES.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folders_are_tasks_that_training_and_evaluation_read(skills: Any, family: str, tmp_path: Path) -> None:
    sizes = skills.Sizes(train=8, validation=2, test=4)
    folders = skills.write_cells(tmp_path, family, sizes, 17)
    assert set(folders) == set(skills.FAMILIES[family].cells)
    for cell, folder in folders.items():
        data = load_task(DataConfig(path=str(folder)))
        assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 4)
        assert data.task.name == cell and data.task.metric == "exact_match"
        assert data.test[0].completion == " " + str(data.test[0].row["answer"])


def test_the_command_writes_the_folders_and_prints_them(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "skills.py"), "--out", str(tmp_path), "--train", "4", "--validation", "1", "--test", "2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 16 and all((Path(line) / "task.json").is_file() for line in printed)
