"""`atoll runs …`: what was trained and composed here, what came of it, what it cost, and how one that is going gets on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.leaderboard import cost_text
from atoll.cli.options import JsonOption
from atoll.cli.output import Column, duration, say, size, write, write_json, write_table

if TYPE_CHECKING:
    from atoll.hub.ledger import Run
    from atoll.hub.store import Hub

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's number, or a name for its newest run.", show_default=False)]
COLUMNS = (
    Column("run", right=True),
    Column("kind", spare=3),
    Column("name"),
    Column("status"),
    Column("started", spare=4),
    Column("steps", right=True, spare=2),
    Column("loss", right=True),
    Column("validation", right=True),
    Column("took", right=True, spare=1),
    Column("cost", right=True),
    Column("message", spare=5),
)


@app.callback()
def runs() -> None:
    """List, show, compare and follow trainings and compositions.

    A run is named by its number, or by its adapter's name, which means the newest.

    \b
    Examples:
      atoll runs list
      atoll runs show dates
      atoll runs compare 3 4
    """


def _open() -> Hub:
    from atoll.hub import Hub

    return Hub()


@app.command("list")
def list_runs(
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Only runs of this name.", show_default=False)] = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help="Only this kind: train or compose.", show_default=False)] = None,
    status: Annotated[
        str | None,
        typer.Option("--status", metavar="STATUS", help="Only with this status: running, finished, failed or interrupted.", show_default=False),
    ] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, metavar="N", help="Only the newest N.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List runs, newest first, finished or not.

    One whose process was killed counts as interrupted.

    \b
    Examples:
      atoll runs list
      atoll runs list --status failed
      atoll runs list --name dates --kind train --last 5 --json
    """
    from atoll.workflows.comparing import as_it_is, losses_of

    _check_known(kind, status)
    hub = _open()
    every = [as_it_is(hub, run) for run in hub.runs(name=name, kind=kind)]
    found = [run for run in every if status in (None, run.status)][:last]
    if as_json:
        write_json([_as_json(run) for run in found])
    elif not found:
        say("no such run; `atoll train`, `atoll land` and `atoll compose` record theirs")
    else:
        write_table(COLUMNS, [_cells(run, losses_of(run)) for run in found])


@app.command()
def show(run: RunArgument, as_json: JsonOption = False) -> None:
    """Show all that is known of a run.

    Settings, losses, scores, cost with its formula, and where its files are.

    \b
    Examples:
      atoll runs show dates
      atoll runs show 12 --json
    """
    from atoll.hub.card import cost_rows
    from atoll.workflows.comparing import cost_of, find_run, losses_of
    from atoll.yaml_file import dump_yaml

    hub = _open()
    found = find_run(hub, run)
    scores = hub.scores(found.digest) if found.digest is not None else ()
    if as_json:
        write_json({**_as_json(found), "scores": [score.to_json() for score in scores]})
        return
    cost = cost_of(found)
    finished = f"{found.finished:%Y-%m-%d %H:%M:%S} UTC" if found.finished is not None else None
    facts = [
        ("run", found.id),
        ("kind", found.kind),
        ("name", found.name),
        ("status", found.status),
        ("message", found.message),
        ("started", f"{found.started:%Y-%m-%d %H:%M:%S} UTC"),
        ("finished", finished),
        ("took", duration(found.seconds) if found.seconds is not None else None),
        ("adapter", f"sha256:{found.digest}" if found.digest is not None else None),
        ("folder", found.folder),
        *((_words(key), _figure(value)) for key, value in losses_of(found).items()),
        *(cost_rows(cost) if cost is not None else ()),
        *((f"{score.task} {score.metric}", _figure(score.value)) for score in scores),
    ]
    write_table([Column(""), Column("")], [fact for fact in facts if fact[1] not in (None, "")])
    write(f"\n# settings\n{dump_yaml(found.config).rstrip()}")


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Two runs or more, by number or name.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Set runs side by side.

    Settings that differ, losses, scores, cost.

    \b
    Examples:
      atoll runs compare 3 4
      atoll runs compare tickets-r_8 tickets-r_16 --json
    """
    from atoll.cli.options import usage
    from atoll.workflows.comparing import compare_runs, find_run

    if len(names) < 2:
        raise usage("comparing takes two runs or more")
    hub = _open()
    compared = compare_runs(hub, [find_run(hub, name) for name in names])
    if as_json:
        write_json(compared.to_json())
        return
    columns = [Column(""), *(Column(f"{run.id} {run.name or ''}".strip(), right=True) for run in compared.runs)]
    rows: list[list[Any]] = [["status", *(run.status for run in compared.runs)]]
    rows += [[key, *map(_setting, values)] for key, values in compared.settings.items()]
    rows += [[_words(key), *map(_figure, values)] for key, values in {**compared.losses, **compared.scores}.items()]
    rows += [[_words(key), *(_spent(key, value) for value in values)] for key, values in compared.cost.items()]
    write_table(columns, rows)


@app.command()
def tail(
    run: RunArgument,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, metavar="N", help="Lines to begin with.")] = 10,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", "-f", help="Wait for more until the run is over.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Follow a training's losses, as tail -f does.

    Ends when the run does, or with Ctrl-C.

    \b
    Examples:
      atoll runs tail dates
      atoll runs tail 12 -n 3 --no-follow --json
    """
    from atoll.train.log import follow_log, read_log
    from atoll.workflows.comparing import find_run, folder_of

    hub = _open()
    found = find_run(hub, run)
    folder = folder_of(found)
    there = read_log(folder)
    for line in there[len(there) - min(lines, len(there)) :]:
        _tell(line, as_json)
    if not follow or found.status != "running":
        return
    waiting = (line for place, line in enumerate(follow_log(folder, lambda: _now(hub, found.id).status != "running")) if place >= len(there))
    for line in waiting:
        _tell(line, as_json)
    say(f"run {found.id} is {_now(hub, found.id).status}")


def _now(hub: Hub, run_id: int) -> Run:
    from atoll.workflows.comparing import as_it_is

    return as_it_is(hub, hub.runs(run_id=run_id)[0])


def _tell(line: dict[str, Any], as_json: bool) -> None:
    """One line of a log; as JSON one object a line."""
    if as_json:
        write_json(line, indent=None)
        return
    write("  ".join(f"{_words(key)} {_figure(value)}" for key, value in line.items()))


def _check_known(kind: str | None, status: str | None) -> None:
    """A filter that nothing can match would find nothing, and say nothing."""
    from atoll.cli.options import usage
    from atoll.hub.ledger import RUN_KINDS, RUN_STATUSES

    for what, value, known in (("kind", kind, RUN_KINDS), ("status", status, RUN_STATUSES)):
        if value is not None and value not in known:
            raise usage(f"there is no {what} {value!r} of runs; known are {', '.join(known)}")


def _as_json(run: Run) -> dict[str, Any]:
    from atoll.workflows.comparing import losses_of

    return {**run.to_json(), "folder": run.folder, "progress": losses_of(run) or None}


def _cells(run: Run, losses: dict[str, Any]) -> Sequence[Any]:
    from atoll.workflows.comparing import cost_of

    steps = f"{losses['step']}/{losses['total_steps']}" if losses.get("total_steps") else losses.get("step")
    took = duration(run.seconds) if run.seconds is not None else None
    figures = (steps, _figure(losses.get("train_loss")), _figure(losses.get("best_loss")), took, cost_text(cost_of(run)))
    return (run.id, run.kind, run.name, run.status, f"{run.started:%Y-%m-%d %H:%M}", *figures, run.message)


def _words(key: str) -> str:
    named = {"best_loss": "validation loss", "cpu_seconds": "CPU-seconds", "tokens_per_s": "tokens/s", "peak_memory_bytes": "peak memory"}
    return named.get(key) or key.replace("_", " ")


def _figure(value: Any) -> str | None:
    return None if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _setting(value: Any) -> str:
    return "null" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _spent(key: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if key == "peak_memory_bytes":
        return size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
