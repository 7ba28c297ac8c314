"""What the evidence on composing says of its figures: scores of a text, means, spreads, gains, and tables of what is missing. Nothing is run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/evidence_tables.py, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    import evidence_tables

    yield evidence_tables
    sys.modules.pop("evidence_tables", None)


def entry(tables: Any, task: str, **strict: list[float]) -> Any:
    """One task's strict scores, a value a seed."""
    return tables.Entry(task, 5, {name: {"strict": values} for name, values in strict.items()})


def test_the_help_text_works_without_a_base() -> None:
    result = subprocess.run([sys.executable, str(BENCH / "compose_evidence.py"), "--help"], capture_output=True, text=True, check=True)
    assert "--family" in result.stdout and "--bbh" in result.stdout


def test_an_entry_is_read_back_as_it_was_written(tables: Any) -> None:
    one = entry(tables, "dates", composed=[0.5, 0.25], base=[0.0, 0.0])
    assert tables.Entry.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_text_counts_as_lorahub_counts_it(tables: Any) -> None:
    assert tables.plain(" Yes. ") == tables.plain("yes") and tables.plain("(A)") != tables.plain("A")


def test_the_first_line_is_the_first_that_is_not_empty(tables: Any) -> None:
    assert tables.first_line("\n  \n yes\nno") == " yes" and tables.first_line("\n") == ""


def test_the_spread_is_over_seeds_of_the_mean_over_tasks(tables: Any) -> None:
    """Else a hard task beside an easy one would look like an uncertain result."""
    entries = [entry(tables, "easy", composed=[0.9, 1.0]), entry(tables, "hard", composed=[0.1, 0.0])]
    mean, spread = tables.over_seeds(entries, "composed", "strict")
    assert mean == pytest.approx(0.5) and spread == pytest.approx(0.0)


def test_a_contestant_that_was_not_measured_everywhere_has_no_mean_in_the_table_of_tasks(tables: Any) -> None:
    entries = [entry(tables, "one", composed=[0.5], majority=[0.4]), entry(tables, "two", composed=[0.7])]
    lines = tables.task_table(entries, "strict").splitlines()
    assert lines[0] == "| task | composed | majority |"
    assert lines[3] == "| two | **70** | - |" and lines[4] == "| **mean** | **60** | - |"


def test_gains_are_paired_by_task_and_errors_are_over_tasks(tables: Any) -> None:
    entries = [entry(tables, "one", composed=[0.5, 0.7], base=[0.1, 0.1]), entry(tables, "two", composed=[0.3, 0.3], base=[0.4, 0.4])]
    assert tables.paired(entries, "composed", "base") == pytest.approx([0.5, -0.1])
    row = next(line for line in tables.summary_table(entries).splitlines() if line.startswith("| base"))
    assert "+20.0 ± 30.0" in row and "1 of 2" in row


def test_measures_that_are_missing_are_dashes(tables: Any) -> None:
    row = tables.summary_table([entry(tables, "one", composed=[0.5])]).splitlines()[2]
    assert row == "| composed | 50.0 | - | - |  |  |  |"
