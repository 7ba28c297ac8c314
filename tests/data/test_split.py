"""Splitting: every row in one part, the same part everywhere, and equal inputs together."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from atoll.data.rows import Row
from atoll.data.split import PARTS, split_by_column, split_by_ratios
from atoll.errors import ConfigError, DataError


def rows_of(*values: Any, name: str = "x") -> list[Row]:
    return [Row({name: value}, f"f.jsonl:{number}") for number, value in enumerate(values, start=1)]


def by_ratio(rows: list[Row], ratios: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 17) -> dict[str, list[str]]:
    parts = split_by_ratios(rows, ratios, seed, lambda row: str(row.values["x"]))
    return {part: [row.values["x"] for row in parts[part]] for part in PARTS}


def test_a_split_column_takes_numbers_and_names() -> None:
    """The field writes 0/1/2 (Ludwig), evaluation (Predibase), dev and val; as numbers, and as text in CSV files."""
    rows = rows_of(0, 1, 2, "0", "1.0", "train", " Test ", "validation", "val", "dev", "EVAL", "evaluation", 2.0, name="split")
    parts = split_by_column(rows, "split")
    assert [row.values["split"] for row in parts["train"]] == [0, "0", "train"]
    assert [row.values["split"] for row in parts["test"]] == [2, " Test ", 2.0]
    assert len(parts["validation"]) == 7


@pytest.mark.parametrize("value", [3, "holdout", None, "", True, [0]])
def test_an_unknown_part_is_named_by_file_and_line(value: Any) -> None:
    """A row that fell out of all parts, or into train by default, would go unnoticed."""
    with pytest.raises(DataError, match=r"f\.jsonl:2: .* in column 'split' names no part"):
        split_by_column(rows_of(0, value, name="split"), "split")


def test_a_row_without_the_split_column_is_named() -> None:
    """JSONL rows may differ; the one that lacks its part must be found by its line."""
    with pytest.raises(DataError, match=r"f\.jsonl:2: no column 'split'"):
        split_by_column([Row({"split": 0}, "f.jsonl:1"), Row({"y": 0}, "f.jsonl:2")], "split")


def test_ratios_put_every_row_in_exactly_one_part_of_the_right_size() -> None:
    """Rows lost or doubled would make the sizes lie; the order of the file is kept within a part."""
    values = [f"input {number}" for number in range(100)]
    parts = by_ratio(rows_of(*values))
    assert [len(parts[part]) for part in PARTS] == [80, 10, 10]
    assert sorted(value for part in parts.values() for value in part) == sorted(values)
    assert all(part == sorted(part, key=values.index) for part in parts.values())


def test_equal_inputs_never_straddle_parts() -> None:
    """A test input that also stands in train, up to case and spacing, measures memory."""
    values = [f"{'  ' * (number % 2)}Input  {number // 3}".replace("Input", "INPUT" if number % 3 else "input") for number in range(300)]
    parts = by_ratio(rows_of(*values), ratios=(0.5, 0.2, 0.3))
    inputs = {part: {" ".join(value.lower().split()) for value in parts[part]} for part in PARTS}
    assert not inputs["train"] & inputs["validation"]
    assert not inputs["train"] & inputs["test"]
    assert not inputs["validation"] & inputs["test"]
    assert all(inputs.values())


def test_the_split_follows_from_the_seed_and_not_from_the_order_of_the_file() -> None:
    """Sorting a file must not move rows between train and test; another seed must."""
    values = [f"input {number}" for number in range(50)]
    assert {part: set(its) for part, its in by_ratio(rows_of(*values)).items()} == {
        part: set(its) for part, its in by_ratio(rows_of(*values[::-1])).items()
    }
    assert by_ratio(rows_of(*values)) != by_ratio(rows_of(*values), seed=18)


def test_another_process_splits_alike() -> None:
    """Python's hash() differs between processes; a split made with it would leak test rows into train on resume."""
    program = (
        "from atoll.data.rows import Row; from atoll.data.split import split_by_ratios\n"
        "rows = [Row({'x': f'input {n}'}, '') for n in range(40)]\n"
        "print(*[r.values['x'] for r in split_by_ratios(rows, (0.8, 0.1, 0.1), 17, lambda r: r.values['x'])['test']], sep=',')"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].strip().split(",") == by_ratio(rows_of(*[f"input {n}" for n in range(40)]))["test"]


def test_a_single_row_trains() -> None:
    """The smallest data set has a training row rather than a test row."""
    assert by_ratio(rows_of("only"))["train"] == ["only"]
    assert by_ratio(rows_of("only"), ratios=(0.1, 0.1, 0.8))["train"] == ["only"]


@pytest.mark.parametrize("ratios", [(0.5, 0.5, 0.5), (-0.1, 0.6, 0.5), (0.0, 0.5, 0.5)])
def test_ratios_that_are_no_shares_are_refused(ratios: tuple[float, float, float]) -> None:
    """Shares over 1, below 0, or without training are mistakes, not settings."""
    with pytest.raises(ConfigError):
        by_ratio(rows_of("a", "b"), ratios=ratios)


def test_a_part_may_be_empty_by_its_share() -> None:
    """An empty part is legal: all rows may train."""
    assert by_ratio(rows_of("a", "b"), ratios=(1.0, 0.0, 0.0)) == {"train": ["a", "b"], "validation": [], "test": []}
