"""What the commands print: data to stdout so that it can be piped, everything else to stderr.

A table is drawn with lines where a person looks at it, and is aligned Markdown where a file or a pipe takes it, so nothing is ever cut to the width
of a terminal that is not there. Text that comes from files or models is shown without control characters on a terminal: it cannot move the cursor.

Used by every command.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.errors import AtollError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTHING = "-"  # a cell without a value
HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Column:
    """A column of a table. spare: columns above 0 are left out where the terminal is too narrow, the highest first."""

    name: str
    right: bool = False
    spare: int = 0


def messages() -> Console:
    """The console on stderr; texts are printed as they are, without markup."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def to_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def say(text: str = "") -> None:
    """One message to stderr."""
    messages().print(clean(text))


def warn(text: str) -> None:
    """One warning to stderr, on one line."""
    messages().print(f"[yellow]warning:[/yellow] {_escape(clean(text))}", markup=True)


def print_error(error: AtollError) -> None:
    """`error: sentence`, and after an empty line `hint: the way out`, to stderr."""
    console = messages()
    console.print(f"[bold red]error:[/bold red] {_escape(clean(error.message))}", markup=True)
    if error.hint:
        console.print(f"\n[bold]hint:[/bold] {_escape(clean(error.hint))}", markup=True)


def write(text: str, end: str = "\n") -> None:
    """Data to stdout, at once; on a terminal without control characters."""
    sys.stdout.write((clean(text) if to_terminal() else text) + end)
    sys.stdout.flush()


def write_json(value: Any, *, indent: int | None = 2) -> None:
    """One JSON value to stdout; `indent=None` puts it on one line."""
    write(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False))


def write_table(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """A table to stdout. None becomes a dash."""
    cells = [[NOTHING if cell is None or cell == "" else " ".join(clean(str(cell)).split()) for cell in row] for row in rows]
    if not to_terminal():
        write(markdown_table(columns, cells))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    unlimited = Console(width=100_000)
    shown = list(range(len(columns)))
    for place in sorted((index for index in shown if columns[index].spare), key=lambda index: -columns[index].spare):
        if unlimited.measure(_drawn(columns, cells, shown)).maximum <= console.width:
            break
        shown.remove(place)
    console.print(_drawn(columns, cells, shown))


def markdown_table(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> str:
    """The table as Markdown whose columns stand below each other."""
    lines = [[column.name for column in columns], *([cell.replace("|", "\\|") for cell in row] for row in cells)]
    widths = [max(3, *(len(line[place]) for line in lines)) for place in range(len(columns))]
    rule = ["-" * (width - 1) + (":" if column.right else "-") for column, width in zip(columns, widths, strict=True)]

    def drawn(line: Sequence[str]) -> str:
        padded = (cell.rjust(width) if column.right else cell.ljust(width) for cell, width, column in zip(line, widths, columns, strict=True))
        return "| " + " | ".join(padded) + " |"

    return "\n".join([drawn(lines[0]), drawn(rule), *map(drawn, lines[1:])])


def clean(text: str) -> str:
    """`text` with what could take over a terminal written out as \\x1b: control characters but tab and line end, and changes of reading direction."""
    return HARMFUL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def size(num_bytes: float) -> str:
    """A number of bytes for people: 4.9 MB."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def duration(seconds: float) -> str:
    """A time for people: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _drawn(columns: Sequence[Column], cells: Sequence[Sequence[str]], shown: Sequence[int]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place in shown:
        table.add_column(columns[place].name, justify="right" if columns[place].right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[place]) for place in shown))
    return table


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
