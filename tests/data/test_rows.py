"""Reading files: every row with its place, and nothing malformed let through."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.data.rows import read_rows
from atoll.errors import DataError


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path) -> str:
    """The message of the DataError that reading `path` raises; every one comes with a hint."""
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.hint
    return caught.value.message


def test_a_jsonl_row_knows_its_line_and_blank_lines_count(tmp_path: Path) -> None:
    """If blank lines were not counted, every later message would point at the wrong line of the user's file."""
    path = written(tmp_path, "a.jsonl", '{"x": 1}\n\n  \r\n{"x": "two", "y": [1, null]}\r\n')
    first, second = read_rows(path)
    assert (dict(first.values), first.where) == ({"x": 1}, f"{path}:1")
    assert (dict(second.values), second.where) == ({"x": "two", "y": [1, None]}, f"{path}:4")


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    """U+2028 and U+0085 are legal inside JSON texts; str.splitlines would cut the row in two."""
    path = written(tmp_path, "a.jsonl", '{"x": "one\u2028two\u0085three"}\n{"x": "é"}')
    assert [row.values["x"] for row in read_rows(path)] == ["one\u2028two\u0085three", "é"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(name: str, tmp_path: Path) -> None:
    """Windows editors write one; it would break the first JSON line, or name the first CSV column "\\ufeffx"."""
    body = '{"x": "1"}\n' if name.endswith("jsonl") else "x\n1\n"
    assert dict(read_rows(written(tmp_path, name, b"\xef\xbb\xbf" + body.encode()))[0].values) == {"x": "1"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"x": 1', "not JSON: Expecting ',' delimiter at column 8"),
        ("[1, 2]", "a list, expected a JSON object"),
        ("3", "a number, expected a JSON object"),
        ("null", "null, expected a JSON object"),
        ('{"x": 1, "x": 2}', "key 'x' stands twice"),
        ('{"x": NaN}', "NaN is not a JSON value"),
        ('{"x": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "not usable JSON"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(line: str, said: str, tmp_path: Path) -> None:
    """A bad line that were skipped, or half read, would silently change what is trained."""
    path = written(tmp_path, "a.jsonl", '{"x": "\\u00e9"}\n' + line + "\n")
    message = refused(path)
    assert message.startswith(f"{path}:2: ")
    assert said in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_byte(name: str, tmp_path: Path) -> None:
    """Latin-1 files are common; the message must lead to the very byte."""
    start = b'{"x": "fine"}\n{"x": "caf' if name.endswith("jsonl") else b"x\nfine\ncaf"
    path = written(tmp_path, name, start + b"\xe9" + b'"}\n')
    line = start.count(b"\n") + 1
    column = len(start) - start.rindex(b"\n")
    assert refused(path) == f"{path}:{line}: byte {column} of the line (byte {len(start) + 1} of the file) is 0xe9, which is not UTF-8"


def test_utf16_is_recognised(tmp_path: Path) -> None:
    """Excel's "Unicode text" is UTF-16; "byte 1 is not UTF-8" would not help."""
    assert "UTF-16" in refused(written(tmp_path, "a.csv", "x,y\n1,2\n".encode("utf-16")))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "x,y\n"), ("a.json", ""), ("a.json", "[]")]
)
def test_a_file_without_rows_is_refused(name: str, content: str, tmp_path: Path) -> None:
    """Training on nothing must fail before it starts."""
    assert "holds no rows" in refused(written(tmp_path, name, content))


def test_a_missing_file_a_folder_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    """The three ways a path can be wrong each need their own sentence."""
    assert f"{tmp_path / 'no.jsonl'} does not exist" in refused(tmp_path / "no.jsonl")
    assert "is a folder" in refused(tmp_path)
    assert "'.parquet', expected one of .jsonl" in refused(written(tmp_path, "a.parquet", "PAR1"))


def test_csv_fields_may_hold_separators_quotes_and_line_ends(tmp_path: Path) -> None:
    """RFC 4180 quoting; a row's place is the line it starts on, also after a field of several lines."""
    path = written(tmp_path, "a.csv", 'text,label\r\n"a, ""b""\r\nc",1\r\n\r\nplain,\r\n')
    first, second = read_rows(path)
    assert (dict(first.values), first.where) == ({"text": 'a, "b"\r\nc', "label": "1"}, f"{path}:2")
    assert (dict(second.values), second.where) == ({"text": "plain", "label": ""}, f"{path}:5")


def test_tab_separated_files_are_read(tmp_path: Path) -> None:
    """.tsv means tabs, whatever commas the fields hold."""
    assert dict(read_rows(written(tmp_path, "a.tsv", "x\ty\n1,5\t2\n"))[0].values) == {"x": "1,5", "y": "2"}


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("a,b,a\n1,2,3\n", 1, "names 'a' more than once"),
        ("a,,b\n1,2,3\n", 1, "column 2 of the header has no name"),
        ("a;b\n1;2\n", 1, "another separator"),
        ("a,b\n1,2\n1,2,3\n", 3, "3 fields, but the header names 2 (a, b)"),
        ("a,b\n1\n", 2, "1 fields, but the header names 2"),
        ('a,b\n1,"2\n', 2, "malformed CSV"),
        ('a,b\n1,"2"x\n', 2, "malformed CSV"),
    ],
)
def test_malformed_csv_is_named_by_file_and_line(content: str, line: int, said: str, tmp_path: Path) -> None:
    """A row with a field too many is shifted data: no field of it can be trusted."""
    path = written(tmp_path, "a.csv", content)
    message = refused(path)
    assert message.startswith(f"{path}:{line}: ")
    assert said in message


def test_a_json_file_holds_examples_or_a_list(tmp_path: Path) -> None:
    """BIG-Bench Hard's files are one object with a list of examples; others are a bare list."""
    wrapped = read_rows(written(tmp_path, "a.json", '{"canary": "c", "examples": [{"input": "q", "target": "a"}]}'))
    bare = read_rows(written(tmp_path, "b.json", '[{"input": "q", "target": "a"}]'))
    assert dict(wrapped[0].values) == dict(bare[0].values) == {"input": "q", "target": "a"}
    assert wrapped[0].where.endswith("a.json:example 1")
    assert "neither a list" in refused(written(tmp_path, "c.json", '{"rows": []}'))
    assert refused(written(tmp_path, "d.json", '[\n{"a": 1},\n{]')).startswith(f"{tmp_path / 'd.json'}:3: not JSON")
