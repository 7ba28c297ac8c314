"""Read JSONL, CSV, TSV and small JSON files as rows that remember where they stood.

The one idea: a row carries `file:line` from the moment it is read, so whatever is wrong with it later can be said with its place. Files are read
line by line; nothing malformed is skipped or repaired, except that blank lines and a byte order mark are passed over.

Used by data.task.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF8_HINT = "save the file as UTF-8, for example: iconv -f ISO-8859-1 -t UTF-8 IN > OUT"


@dataclass(frozen=True)
class Row:
    """One record: its columns by name, and `where` it stood ("file:line") for messages."""

    values: Mapping[str, Any]
    where: str


def read_rows(path: Path) -> list[Row]:
    """Every row of a .jsonl, .ndjson, .csv, .tsv or .json file, in the file's order.

    A .json file holds a list of objects, or one object whose `examples` is that list (the form of BIG-Bench Hard).

    Raises DataError for a file that is missing, empty, of another kind, not UTF-8 (naming line and byte), or has a malformed line (naming it).
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": iter_jsonl,
        ".ndjson": iter_jsonl,
        ".csv": iter_csv,
        ".tsv": iter_csv,
        ".json": iter_json,
    }
    if not path.exists():
        hint = "check the spelling; a relative path starts at the folder of the YAML file that names it, or else where the command runs"
        raise DataError(f"data file {path} does not exist", hint=hint)
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected a file of rows", hint="a task folder holds task.json; give files as train, validation, test")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} ends in {path.suffix or 'no suffix'!r}, expected one of {', '.join(readers)}",
            hint="convert it to JSONL: one JSON object a line",
        )
    try:
        rows = list(reader(path))
    except OSError as error:
        raise DataError(f"{path} could not be read: {error.strerror or error}", hint="check the file's permissions") from error
    if not rows:
        raise DataError(f"{path} holds no rows", hint="a JSONL file has one object a line, a CSV file a header and at least one line below it")
    return rows


def iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, with its line end and without the byte order mark. Raises DataError where it is not UTF-8."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw
            if number == 1:
                if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{path} is UTF-16, expected UTF-8", hint="save it as UTF-8: iconv -f UTF-16 -t UTF-8 IN > OUT")
                line = raw.removeprefix(BYTE_ORDER_MARK)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = error.start + len(raw) - len(line)
                message = f"byte {place + 1} of the line (byte {offset + place + 1} of the file) is 0x{line[error.start]:02x}, which is not UTF-8"
                raise DataError(f"{path}:{number}: {message}", hint=UTF8_HINT) from error
            offset += len(raw)


def iter_jsonl(path: Path) -> Iterator[Row]:
    """Rows of a file with one JSON object a line; blank lines are passed over but counted."""
    for number, line in iter_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(_object(_parse(line.rstrip("\r\n"), path, number), where), where)


def iter_json(path: Path) -> Iterator[Row]:
    """Rows of a JSON file that is a list of objects or {"examples": [...]}; `where` counts the examples from 1, since lines mean nothing there."""
    content = _parse("".join(line for _, line in iter_lines(path)) or "[]", path)
    examples = content.get("examples") if isinstance(content, dict) else content
    if not isinstance(examples, list):
        raise DataError(f"{path} is neither a list of objects nor an object with a list `examples`", hint="or save it as JSONL, one object a line")
    for number, example in enumerate(examples, start=1):
        where = f"{path}:example {number}"
        yield Row(_object(example, where), where)


def iter_csv(path: Path) -> Iterator[Row]:
    """Rows of a comma (.csv) or tab (.tsv) separated file with a header; quoted fields may hold line ends. `where` is the line a row starts on."""
    reader = csv.reader((line for _, line in iter_lines(path)), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{start}: malformed CSV: {error}", hint='write a quote inside a quoted field twice (""), or use JSONL') from error
        if fields is None:
            return
        if not fields or (len(fields) == 1 and not fields[0].strip()):
            continue
        if header is None:
            header = fields
            _check_header(header, f"{path}:{start}")
        elif len(fields) != len(header):
            raise DataError(
                f"{path}:{start}: {len(fields)} fields, but the header names {len(header)} ({', '.join(header)})",
                hint="put a field that holds the separator, a quote or a line end into double quotes",
            )
        else:
            yield Row(dict(zip(header, fields, strict=True)), f"{path}:{start}")


def _check_header(header: list[str], where: str) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: the header names {', '.join(map(repr, repeated))} more than once", hint="give every column a name of its own")
    if any(not name.strip() for name in header):
        raise DataError(
            f"{where}: column {[bool(name.strip()) for name in header].index(False) + 1} of the header has no name", hint="name every column"
        )
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{where}: the header is the single field {header[0]!r}; the file seems to use another separator", hint="separate with commas"
        )


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """json.loads that refuses what would pass silently: a repeated key, NaN and Infinity, half a surrogate pair. `line` is None for a whole file."""
    where = f"{path}:{line}" if line else str(path)
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        if "\\u" in text:  # only an escape can smuggle in half a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        message = f"{path}:{line or error.lineno}: not JSON: {error.msg} at column {error.colno}"
        raise DataError(message, hint="a JSONL file holds one complete JSON object a line") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character", hint="remove that escape"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON: {error}", hint="a JSONL file holds one complete JSON object a line") from error
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise DataError(f"{where}: {kind}, expected a JSON object with named columns", hint='for example {"prompt": "...", "completion": "..."}')
    return value
