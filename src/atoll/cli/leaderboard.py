"""`atoll leaderboard`: show one, or several merged; also draws the one that land and eval print."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.options import JsonOption
from atoll.cli.output import Column, say, size, warn, write, write_json, write_table
from atoll.errors import DataError

if TYPE_CHECKING:
    from atoll.eval.leaderboard import Leaderboard, LeaderboardEntry, LeaderboardRow, RowNote
    from atoll.workflows import LandOutcome

RUNS = Path("runs")  # where land and eval write unless told otherwise
COLUMNS = (
    Column("task"),
    Column("metric", spare=7),
    Column("n", right=True, spare=3),
    Column("majority", right=True, spare=4),
    Column("base", right=True),
    Column("adapter", spare=2),
    Column("kind"),
    Column("parameters", right=True, spare=8),
    Column("size", right=True, spare=9),
    Column("score", right=True),
    Column("gain", right=True),
    Column("p", right=True, spare=1),
    Column("options", right=True, spare=5),
    Column("failures", right=True, spare=6),
    Column("verdict"),
)
ADAPTER = 5  # the place of the adapter's name among the columns; what it is stands behind it
PLAIN = "lora"  # where all are, kind, parameters and size are left to `atoll hub list`


def leaderboard(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PLACE", help="Folders of land or eval, or leaderboard.json files; default: all in runs/.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a leaderboard, or several merged.

    Of equal entries the later one counts. Where not all adapters are plain LoRA, their kinds are shown, and the sizes that this machine's hub knows.
    Scores are from 0 to 1, higher is better, ± is one standard error; gain is over the base in its better prompt style, p of a paired test. options
    chooses the likeliest label. Boards of different bases are printed one below the other; with --json they have to be asked for apart.

    \b
    Examples:
      atoll leaderboard
      atoll leaderboard runs/land
      atoll leaderboard runs/land runs/eval/dates --json
    """
    from atoll.eval.leaderboard import merge_leaderboards, read_leaderboard

    for place in places or ():
        if not place.exists():
            raise DataError(f"{place} does not exist", hint="name a folder that atoll land or atoll eval wrote to, or its leaderboard.json")
    boards = [read_leaderboard(place) for place in places or _found()]
    if as_json:
        write_json(reduce(merge_leaderboards, boards).to_json())
        return
    by_base: dict[str, list[Leaderboard]] = {}
    for board in boards:
        by_base.setdefault(board.base_fingerprint, []).append(board)
    for group in by_base.values():
        board = reduce(merge_leaderboards, group)
        show_board(board, _sizes(board))


def show_board(board: Leaderboard, notes: Mapping[str, RowNote] | None = None) -> None:
    """The leaderboard as a table on stdout; columns that nobody has a value in are left out."""
    lines = [cells for row in board.rows for cells in _lines(row, (notes or {}).get(row.task))]
    used = [place for place in range(len(COLUMNS)) if any(cells[place] is not None for cells in lines)]
    if not _is_mixed(board):
        used = [place for place in used if not ADAPTER < place <= ADAPTER + 3]
    columns = list(COLUMNS)
    if any(cells[0] != cells[ADAPTER] for cells in lines):
        columns[ADAPTER] = Column("adapter")  # several a task, or named otherwise than their task: then the name is needed
    write(f"{board.base_name}  (fingerprint {board.base_fingerprint[:16]})\n")
    write_table([columns[place] for place in used], [[cells[place] for place in used] for cells in lines])


def show_outcome(outcome: LandOutcome, as_json: bool) -> None:
    """What land and eval measured: the board to stdout, as a table or as leaderboard.json, and what the user should know to stderr."""
    if as_json:
        write_json(outcome.leaderboard.to_json())
    else:
        show_board(outcome.leaderboard, outcome.notes)
    for warning in outcome.warnings:
        warn(warning)


def _is_mixed(board: Leaderboard) -> bool:
    return any(entry.kind not in ("base", PLAIN) for row in board.rows for entry in row.entries)


def _sizes(board: Leaderboard) -> dict[str, RowNote]:
    """Of a mixed board, what the hub of this machine knows of its adapters, if there is one."""
    from atoll.config import atoll_home

    if not _is_mixed(board) or not (atoll_home() / "hub" / "hub.db").exists():
        return {}
    from atoll.eval.arena import sizes_of
    from atoll.eval.leaderboard import RowNote
    from atoll.hub import Hub

    sizes = sizes_of(Hub().list(all_versions=True))
    return {row.task: RowNote(sizes=sizes) for row in board.rows}


def _found() -> list[Path]:
    """Every leaderboard below runs/, the newest last."""
    found = sorted(RUNS.glob("**/leaderboard.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise DataError(f"there is no leaderboard below {RUNS}/", hint="name a folder, or make one: atoll land examples/land.yaml")
    say(f"from {', '.join(str(path.parent) for path in found)}")
    return found


def _lines(row: LeaderboardRow, note: RowNote | None) -> list[list[str | None]]:
    """The cells of a task: one line for each adapter, or one for the base alone."""
    base = row.base
    majority = f"{note.majority.value:.3f}" if note is not None and note.majority is not None else None
    style = f" ({note.base_prompt_style})" if note is not None and note.base_prompt_style else ""
    start = [row.task, row.metric, str(row.n), majority, f"{_measured(base)}{style}" if base is not None else None]
    others = [entry for entry in row.entries if entry.kind != "base"]
    if not others:
        return [[*start, *[None] * 7, _figure(base.options_value) if base else None, _failures(base), "base only"]]
    return [[*start, *_result(entry, base, note)] for entry in others]


def _result(entry: LeaderboardEntry, base: LeaderboardEntry | None, note: RowNote | None) -> list[str | None]:
    from atoll.eval.leaderboard import beats

    gain = f"{entry.value - base.value:+.3f}" if base is not None else None
    verdict = "no base" if base is None else "better" if beats(entry, base) else "worse" if beats(base, entry) else "no difference"
    p = None if entry.p_vs_base is None else "<0.001" if entry.p_vs_base < 0.001 else f"{entry.p_vs_base:.3f}"
    known = note.sizes.get(entry.digest) if note is not None else None
    parameters = f"{known.num_parameters:,}" if known is not None and known.num_parameters is not None else None
    about = [entry.model, entry.kind, parameters, size(known.num_bytes) if known is not None else None]
    return [*about, _measured(entry), gain, p, _figure(entry.options_value), _failures(entry), verdict]


def _measured(entry: LeaderboardEntry) -> str:
    return f"{entry.value:.3f}" + (f" ± {entry.stderr:.3f}" if entry.stderr is not None else "")


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _failures(entry: LeaderboardEntry | None) -> str | None:
    return str(entry.failures) if entry is not None and entry.failures else None
