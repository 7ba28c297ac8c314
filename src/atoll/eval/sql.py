"""SQL as an answer: normalise it, or run it and compare what it returns.

A query written by a model is hostile input. It runs on an in-memory SQLite database made from the task's script, behind an authorizer that lets
only reading through, with limits on instructions, time, rows and bytes. The instruction limit is the one that decides in practice: unlike a clock it
gives the same verdict on a slow machine.

Used by eval.matching (normalise_sql) and eval.row_metrics (SQL execution).
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass

from atoll.errors import TaskError

# A quoted run ends at its own quote, a doubled quote inside stays inside; an unclosed quote reaches to the end of the text.
_PIECES = re.compile(r"""('(?:[^']|'')*(?:'|$)|"(?:[^"]|"")*(?:"|$)|`(?:[^`]|``)*(?:`|$))|([^'"`]+)""", re.DOTALL)
_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_STEP = 1_000  # virtual machine instructions between two looks at the limits


@dataclass(frozen=True)
class SqlLimits:
    """What one query may use; past any of these it has failed.

    instructions: steps of SQLite's virtual machine. seconds: wall-clock backstop. rows, total_bytes: of the result. value_bytes: of any one value.
    """

    instructions: int = 5_000_000
    seconds: float = 5.0
    rows: int = 10_000
    total_bytes: int = 10_000_000
    value_bytes: int = 1_000_000


@dataclass(frozen=True)
class SqlResult:
    """What a query returned: its number of columns and its rows in order, floats rounded to 6 decimals."""

    num_columns: int
    rows: tuple[tuple[object, ...], ...]


class QueryFailed(Exception):
    """A query did not run: syntax, unknown column, more than reading, or past a limit. The message is SQLite's or names the limit."""


def normalise_sql(query: str) -> str:
    """`query` in lower case and with single spaces outside quotes, without outer spaces and closing semicolons.

    Nothing else: spaces around commas and brackets, aliases and the order of conditions count as differences.
    """
    parts = []
    for quoted, plain in _PIECES.findall(query):
        parts.append(quoted or re.sub(r"\s+", " ", plain.lower()))
    return re.sub(r"[\s;]+$", "", "".join(parts)).strip()


def orders_rows(query: str) -> bool:
    """Whether the outermost SELECT has an ORDER BY, so that the order of its rows is part of the answer."""
    depth, outside = 0, []
    for quoted, plain in _PIECES.findall(query):
        for character in "q" if quoted else plain.lower():
            depth += (character == "(") - (character == ")")
            outside.append(character if depth == 0 else " ")
    return re.search(r"\border\s+by\b", "".join(outside)) is not None


class QueryRunner:
    """One in-memory database made from `script`, on which any number of queries run read-only.

    script: SQL statements that create and fill the tables, from the task and therefore trusted. A context manager; use from one thread.
    Raises TaskError when the script itself does not run.
    """

    def __init__(self, script: str, limits: SqlLimits | None = None) -> None:
        self.limits = limits or SqlLimits()
        self._connection = sqlite3.connect(":memory:")
        try:
            self._connection.executescript(script)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as problem:
            self._connection.close()
            raise TaskError(f"the task's database script does not run: {problem}", hint="try the script with the sqlite3 shell") from problem
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, self.limits.value_bytes)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        self._connection.set_authorizer(_only_reading)

    def __enter__(self) -> QueryRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the database."""
        self._connection.close()

    def run(self, query: str) -> SqlResult:
        """The result of one reading statement; raises QueryFailed when it does not run or goes past a limit."""
        self._connection.set_progress_handler(_Budget(self.limits), _STEP)
        try:
            cursor = self._connection.execute(query)
            if cursor.description is None:
                raise QueryFailed("the query returns no table")
            return SqlResult(len(cursor.description), tuple(self._fetch(cursor)))
        except (sqlite3.Error, sqlite3.Warning, ValueError) as problem:  # Warning: several statements; ValueError: NUL or lone surrogate
            raise QueryFailed(str(problem)) from problem
        finally:
            self._connection.set_progress_handler(None, 0)

    def _fetch(self, cursor: sqlite3.Cursor) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        num_bytes = 0
        for row in cursor:
            num_bytes += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) >= self.limits.rows or num_bytes > self.limits.total_bytes:
                raise QueryFailed(f"the result is larger than {self.limits.rows} rows or {self.limits.total_bytes} bytes")
            rows.append(tuple(round(value, 6) if isinstance(value, float) else value for value in row))
        return rows


def same_result(gold: SqlResult, predicted: SqlResult, *, ordered: bool) -> bool:
    """Whether two results are the same table: as many columns, and equal rows, as a list if `ordered`, else as a multiset.

    Column names do not matter, their order does; 1 and 1.0 are equal. Two empty results with the same number of columns are the same.
    """
    if gold.num_columns != predicted.num_columns:
        return False
    return gold.rows == predicted.rows if ordered else Counter(gold.rows) == Counter(predicted.rows)


class _Budget:
    """Counts calls of the progress handler; a true answer makes SQLite stop the query."""

    def __init__(self, limits: SqlLimits) -> None:
        self._left = limits.instructions // _STEP
        self._deadline = time.monotonic() + limits.seconds

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0 or time.monotonic() > self._deadline


def _only_reading(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action not in _READING or (action == sqlite3.SQLITE_FUNCTION and second == "load_extension"):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK
