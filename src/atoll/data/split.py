"""Decide which rows train, which validate and which test.

Three ways, in this order: files of their own (then nothing is decided here), a column that says it, or seeded ratios. The one idea of the last:
rows are ordered by a hash of the seed and their input, so the parts don't depend on the order of the file, the process or the Python version, and
rows with the same input always fall into the same part.

Used by data.task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from atoll.data.prompt import column
from atoll.data.rows import Row
from atoll.errors import ConfigError, DataError

PARTS = ("train", "validation", "test")
PART_NAMES = {
    **{"train": "train", "0": "train", "0.0": "train"},
    **dict.fromkeys(("validation", "val", "dev", "evaluation", "eval", "1", "1.0"), "validation"),
    **{"test": "test", "2": "test", "2.0": "test"},
}


def split_by_column(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """Parts by the values of column `name`: 0, 1, 2 (numbers or text) or train, validation (val, dev, evaluation, eval), test, in any case.

    Raises DataError with file and line for another value or a row without the column.
    """
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    for row in rows:
        value: Any = column(row.values, name, row.where)
        part = None if isinstance(value, bool) else PART_NAMES.get(str(value).strip().lower())
        if part is None:
            raise DataError(
                f"{row.where}: {value!r} in column {name!r} names no part of the data, expected 0, 1, 2 or train, validation, test",
                hint="correct the value, name the right column as split_column, or rename the column if it is not about splitting",
            )
        parts[part].append(row)
    return parts


def split_by_ratios(rows: Sequence[Row], ratios: tuple[float, float, float], seed: int, key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Parts of about `ratios` of the rows each, every row in exactly one, equal `key` (the input; case and spacing don't count) in one part.

    Groups of equal input are ordered by sha256(seed, input); the first ratios[0] of the rows train, the next validate, the rest test. Within a part
    the rows keep the file's order. Raises ConfigError unless the ratios are from 0 to 1 and sum to 1, with something for training.
    """
    if not all(0 <= ratio <= 1 for ratio in ratios) or abs(sum(ratios) - 1) > 1e-6 or ratios[0] == 0:
        raise ConfigError(
            f"ratios {ratios} are not three shares of the data", hint="give shares of train, validation and test that sum to 1: 0.8, 0.1, 0.1"
        )
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(" ".join(key(row).casefold().split()), []).append(index)
    train_end = max(1, round(len(rows) * ratios[0]))
    validation_end = round(len(rows) * (ratios[0] + ratios[1]))
    part_of = [""] * len(rows)
    num_placed = 0
    for text in sorted(groups, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest()):
        part = "train" if num_placed < train_end else "validation" if num_placed < validation_end else "test"
        for index in groups[text]:
            part_of[index] = part
        num_placed += len(groups[text])
    return {part: [row for row, its in zip(rows, part_of, strict=True) if its == part] for part in PARTS}
