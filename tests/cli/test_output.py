"""Tables, texts and figures as they are printed."""

from __future__ import annotations

import sys

import pytest

from atoll.cli import output
from atoll.cli.output import Column, clean, duration, size, write, write_table

COLUMNS = [Column("task"), Column("n", right=True), Column("metric", spare=1)]


def test_a_table_in_a_pipe_is_aligned_markdown_and_never_cut(capsys, monkeypatch):
    """A log of 80 columns must not lose the end of a name, and a pipe in a name must not make a cell."""
    monkeypatch.setenv("COLUMNS", "40")
    write_table(COLUMNS, [("x" * 60, 5, None), ("a|b", 12, "exact\nmatch")])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].count("|") == 4
    assert "x" * 60 in lines[2]
    assert "a\\|b" in lines[3]
    assert "exact match" in lines[3]


def test_a_narrow_terminal_loses_spare_columns_and_keeps_the_others(capsys, monkeypatch):
    """A table folded to three letters a column cannot be read; one without its metric can."""
    monkeypatch.setattr(output, "to_terminal", lambda: True)
    rows = [("t" * 30, 5, "m" * 20)]
    for width, shown in (("45", False), ("90", True)):
        monkeypatch.setenv("COLUMNS", width)
        write_table(COLUMNS, rows)
        found = capsys.readouterr().out
        assert "t" * 30 in found
        assert ("m" * 20 in found) == shown


def test_text_is_cleaned_on_a_terminal_and_left_alone_in_a_pipe(capsys, monkeypatch):
    """A model can write an escape sequence: it must not reach a terminal, and a pipe must get the model's very words."""
    write("a\x1b[31mb", end="")
    assert capsys.readouterr().out == "a\x1b[31mb"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write("a\x1b[31mb\u202e\tc\nπ", end="")
    assert capsys.readouterr().out == "a\\x1b[31mb\\u202e\tc\nπ"


@pytest.mark.parametrize("text", ["plain", "naïve 日本語 עברית فارسی‌ها", "👩‍👩‍👧", "tab\tand\nline"])
def test_ordinary_text_of_any_script_is_left_alone(text):
    """Joiners and right-to-left letters are text, not attacks."""
    assert clean(text) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (8.2, "8 s"), (59.7, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_are_for_people(seconds, text):
    """An estimate of 7500.2 s says nothing."""
    assert duration(seconds) == text


@pytest.mark.parametrize(("num_bytes", "text"), [(12, "12 bytes"), (4_900_000, "4.9 MB"), (2.5e9, "2.5 GB"), (7e12, "7000.0 GB")])
def test_sizes_are_for_people(num_bytes, text):
    """As above."""
    assert size(num_bytes) == text
