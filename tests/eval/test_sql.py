"""SQL as an answer: normalisation, the guard, and comparing results."""

from __future__ import annotations

import random

import pytest

from atoll.errors import TaskError
from atoll.eval.sql import QueryFailed, QueryRunner, SqlLimits, SqlResult, normalise_sql, orders_rows, same_result

SCRIPT = """
CREATE TABLE books (title TEXT, pages INTEGER, price REAL);
INSERT INTO books VALUES ('Low Tide', 120, 9.5), ('Salt Roads', 300, 12.25), ('Nine Lamps', 300, 7.0);
"""


@pytest.fixture
def books():
    with QueryRunner(SCRIPT) as runner:
        yield runner


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("SELECT  a\nFROM t ;", "select a from T", True),
        ("SELECT a FROM t WHERE b = 'Oslo'", "select A from t where B = 'Oslo' ; ;", True),
        ("SELECT a FROM t WHERE b = 'Oslo'", "SELECT a FROM t WHERE b = 'oslo'", False),
        ("SELECT a FROM t WHERE b = 'a  b'", "SELECT a FROM t WHERE b = 'a b'", False),
        ('SELECT "A" FROM t', 'SELECT "a" FROM t', False),
        ("SELECT 'it''s; ON'", "select 'it''s; ON';", True),
        ("SELECT 'unclosed A", "SELECT 'unclosed a", False),
        ("SELECT a,b", "SELECT a, b", False),
    ],
)
def test_normalisation_ignores_case_and_spaces_outside_quotes_and_closing_semicolons(first, second, same):
    """A value inside quotes is data: changing it changes the answer."""
    assert (normalise_sql(first) == normalise_sql(second)) is same


def test_normalising_twice_changes_nothing():
    """A normal form that is not stable would make equality depend on who normalised first."""
    rng = random.Random(5)
    for _ in range(300):
        text = "".join(rng.choice("aB '\"`;\n\t(),=1") for _ in range(rng.randint(0, 25)))
        assert normalise_sql(normalise_sql(text)) == normalise_sql(text)


def test_only_an_outer_order_by_makes_order_count():
    """Inside a sub-query or a text, ORDER BY says nothing about the order of the result."""
    assert orders_rows("SELECT a FROM t ORDER  BY a")
    assert not orders_rows("SELECT a FROM (SELECT a FROM t ORDER BY a) x")
    assert not orders_rows("SELECT a FROM t WHERE b = 'order by'")


def test_a_query_reads(books):
    """The plain use."""
    result = books.run("WITH long AS (SELECT * FROM books WHERE pages > 200) SELECT title, upper(title) FROM long ORDER BY price;")
    assert result == SqlResult(2, (("Nine Lamps", "NINE LAMPS"), ("Salt Roads", "SALT ROADS")))


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM books",
        "DROP TABLE books",
        "INSERT INTO books VALUES ('x', 1, 1)",
        "UPDATE books SET pages = 0 RETURNING pages",
        "CREATE TABLE t (a)",
        "ATTACH DATABASE '/tmp/atoll-never.db' AS other",
        "PRAGMA writable_schema = 1",
        "VACUUM INTO '/tmp/atoll-never.db'",
        "SELECT load_extension('evil')",
        "SELECT 1; DROP TABLE books",
        "SELECT nothing FROM books",
        "SELEC title",
        "",
        "-- only a comment",
        "SELECT '\x00'",
        "SELECT '\ud800'",
    ],
)
def test_whatever_is_not_one_reading_query_fails_and_changes_nothing(books, query):
    """A model's query is hostile: it may neither write, nor reach files, nor crash the evaluation."""
    with pytest.raises(QueryFailed):
        books.run(query)
    assert books.run("SELECT count(*) FROM books").rows == ((3,),)


def test_endless_and_huge_queries_are_stopped(books):
    """Without limits one bad query would hang or fill the memory of an evaluation of thousands."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "
    for query in (f"{endless} max(i) FROM n", f"{endless} i FROM n", "SELECT zeroblob(2000000)", f"{endless} zeroblob(900000) FROM n"):
        with pytest.raises(QueryFailed):
            books.run(query)
    assert books.run("SELECT 1").rows == ((1,),)


def test_the_instruction_limit_is_for_each_query():
    """A budget that was shared would fail late queries for what earlier ones used."""
    with QueryRunner(SCRIPT, SqlLimits(instructions=200_000)) as runner:
        for _ in range(20):
            runner.run("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) SELECT max(i) FROM n")


def test_a_broken_script_is_the_tasks_fault():
    """A database that cannot be built must not look like a wrong answer."""
    with pytest.raises(TaskError, match="does not run"):
        QueryRunner("CREATE TABLE")


@pytest.mark.parametrize(
    ("query", "ordered", "same"),
    [
        ("SELECT title FROM books WHERE pages = 300 ORDER BY title DESC", False, True),
        ("SELECT title FROM books WHERE pages = 300 ORDER BY title DESC", True, False),
        ("SELECT title AS other FROM books WHERE pages >= 300 ORDER BY title", True, True),
        ("SELECT title, pages FROM books WHERE pages = 300", False, False),
        ("SELECT title FROM books", False, False),
    ],
)
def test_results_are_the_same_as_tables(books, query, ordered, same):
    """Order counts only where it was asked for; names of columns never."""
    gold = books.run("SELECT title FROM books WHERE pages = 300 ORDER BY title")
    assert same_result(gold, books.run(query), ordered=ordered) is same


def test_repeated_rows_count_and_whole_floats_equal_integers(books):
    """A set would call a query with the wrong number of repeats right."""
    gold = books.run("SELECT pages FROM books")
    assert not same_result(gold, books.run("SELECT DISTINCT pages FROM books"), ordered=False)
    assert same_result(gold, books.run("SELECT pages * 1.0 FROM books"), ordered=False)
    assert same_result(books.run("SELECT 0.1 + 0.2"), books.run("SELECT 0.3"), ordered=True)
    assert not same_result(books.run("SELECT 1 WHERE 0"), books.run("SELECT 1, 2 WHERE 0"), ordered=False)
