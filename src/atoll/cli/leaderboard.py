"""`atoll leaderboard`: show one, or several merged; also draws the one that land and eval print."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.options import JsonOption
from atoll.cli.output import Column, duration, say, size, warn, write, write_json, write_table
from atoll.errors import DataError

if TYPE_CHECKING:
    from atoll.eval.leaderboard import Leaderboard, LeaderboardEntry, LeaderboardRow, RowNote
    from atoll.train.cost import Cost
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
    Column("cost", right=True, spare=10),
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
    cost is what training took: a price where a rate was given (cost: in the training file, or ATOLL_PRICE_PER_CPU_HOUR), else CPU time.
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
        merged = reduce(merge_leaderboards, boards)
        write_json(board_json(merged, _notes(merged)))
        return
    by_base: dict[str, list[Leaderboard]] = {}
    for board in boards:
        by_base.setdefault(board.base_fingerprint, []).append(board)
    for group in by_base.values():
        board = reduce(merge_leaderboards, group)
        show_board(board, _notes(board))


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
        write_json(board_json(outcome.leaderboard, outcome.notes))
    else:
        show_board(outcome.leaderboard, outcome.notes)
    for warning in outcome.warnings:
        warn(warning)


def _is_mixed(board: Leaderboard) -> bool:
    return any(entry.kind not in ("base", PLAIN) for row in board.rows for entry in row.entries)


def board_json(board: Leaderboard, notes: Mapping[str, RowNote]) -> dict[str, Any]:
    """The object of leaderboard.json, and beside it "costs": by digest, what is known of what adapters cost."""
    costs = {digest: cost.to_json() for note in notes.values() for digest, cost in note.costs.items()}
    return {**board.to_json(), **({"costs": costs} if costs else {})}


def _notes(board: Leaderboard) -> dict[str, RowNote]:
    """What the hub of this machine knows of a board's adapters, if there is one: what they cost, and where kinds differ, how large they are."""
    from atoll.config import atoll_home

    if not (atoll_home() / "hub" / "hub.db").exists():
        return {}
    from atoll.eval.arena import costs_of, sizes_of
    from atoll.eval.leaderboard import RowNote
    from atoll.hub import Hub

    hub = Hub()
    sizes = sizes_of(hub.list(all_versions=True)) if _is_mixed(board) else {}
    costs = costs_of(hub, (entry.digest for row in board.rows for entry in row.entries if entry.kind != "base"))
    of_task = {row.task: {entry.digest: costs[entry.digest] for entry in row.entries if entry.digest in costs} for row in board.rows}
    return {task: RowNote(sizes=sizes, costs=found) for task, found in of_task.items()}


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
        return [[*start, *[None] * 8, _figure(base.options_value) if base else None, _failures(base), "base only"]]
    return [[*start, *_result(entry, base, note)] for entry in others]


def _result(entry: LeaderboardEntry, base: LeaderboardEntry | None, note: RowNote | None) -> list[str | None]:
    from atoll.eval.leaderboard import beats

    gain = f"{entry.value - base.value:+.3f}" if base is not None else None
    verdict = "no base" if base is None else "better" if beats(entry, base) else "worse" if beats(base, entry) else "no difference"
    p = None if entry.p_vs_base is None else "<0.001" if entry.p_vs_base < 0.001 else f"{entry.p_vs_base:.3f}"
    known = note.sizes.get(entry.digest) if note is not None else None
    parameters = f"{known.num_parameters:,}" if known is not None and known.num_parameters is not None else None
    cost = note.costs.get(entry.digest) if note is not None else None
    about = [entry.model, entry.kind, parameters, size(known.num_bytes) if known is not None else None, cost_text(cost)]
    return [*about, _measured(entry), gain, p, _figure(entry.options_value), _failures(entry), verdict]


def cost_text(cost: Cost | None) -> str | None:
    """A price, or where no rate is known the time of all processors."""
    from atoll.train.cost import price_text

    if cost is None:
        return None
    return price_text(cost) or (f"{duration(cost.cpu_seconds)} CPU" if cost.cpu_seconds is not None else None)


def _measured(entry: LeaderboardEntry) -> str:
    return f"{entry.value:.3f}" + (f" ± {entry.stderr:.3f}" if entry.stderr is not None else "")


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _failures(entry: LeaderboardEntry | None) -> str | None:
    return str(entry.failures) if entry is not None and entry.failures else None
