"""`atoll`: the entry point, its commands, and what becomes of errors.

The one idea: commands raise, and only `run` decides what the user sees. An AtollError is one sentence and a hint, never a traceback; whatever else
goes wrong is a mistake of ours and keeps its traceback. Exit codes: 0 done, 1 an error or a failed task, 2 wrong usage, 130 stopped by Ctrl-C
(training also by SIGTERM).

Commands import torch, the database and the like only when they run, so that `atoll --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from atoll.cli import cancel, chat, classify, compose, evaluate, generate, hub, keys, land, leaderboard, pull, runs, schema, serve, tasks, train
from atoll.cli.environment import prepare
from atoll.cli.output import print_error
from atoll.cli.processes import is_spokesman
from atoll.errors import AtollError, Interrupted

app = typer.Typer(
    name="atoll",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command()(land.land)
app.command()(train.train)
app.command()(cancel.cancel)
app.command("eval")(evaluate.evaluate)
app.command()(compose.compose)
app.command()(leaderboard.leaderboard)
app.command()(generate.generate)
app.command()(classify.classify)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(pull.pull)
app.command()(tasks.tasks)
app.command()(schema.schema)
app.add_typer(hub.app, name="hub")
app.add_typer(keys.app, name="keys")
app.add_typer(runs.app, name="runs")

# What a user's disk, paths and permissions can do to any command; other OSErrors are ours.
USERS_ERRNOS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
)
EXTRAS = {
    **dict.fromkeys(("sqlalchemy", "alembic", "fsspec"), "hub"),
    **dict.fromkeys(("rouge_score", "scipy"), "eval"),
    **dict.fromkeys(("cma", "nevergrad"), "compose"),
    "tensorboard": "train",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "python_multipart", "prometheus_client", "llguidance"), "serve"),
}


def main() -> None:
    """The `atoll` program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an answer with a character that the terminal lacks is no reason to stop
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_pipe()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line and return its exit code; errors are printed. With ATOLL_DEBUG set they are raised instead."""
    try:
        typer.main.get_command(app).main(args=list(arguments), prog_name="atoll")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, `atoll … | head`
        _leave_pipe()
        return 0
    except (AtollError, OSError, ModuleNotFoundError) as problem:
        error = _as_atoll_error(problem)
        if error is None or os.environ.get("ATOLL_DEBUG"):
            raise
        if is_spokesman():
            print_error(error)
        return 130 if isinstance(error, Interrupted) else 1
    return 0


def _as_atoll_error(problem: Exception) -> AtollError | None:
    """The error as one of ours when a user can do something about it, else None: then it is a bug."""
    if isinstance(problem, AtollError):
        return problem
    if isinstance(problem, ModuleNotFoundError):
        package = (problem.name or "").partition(".")[0]
        if package in EXTRAS:
            return AtollError(f"this needs {package}, which is not installed", hint=f'pip install "atoll[{EXTRAS[package]}]"')
    elif isinstance(problem, OSError) and problem.errno in USERS_ERRNOS:
        named = f"{problem.filename}: " if problem.filename is not None else ""
        return AtollError(f"{named}{(problem.strerror or str(problem)).lower()}", hint="check the path, its permissions and the free space")
    return None


def _leave_pipe() -> None:
    """Let Python's own flush at exit go nowhere: the pipe is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _show_version(wanted: bool) -> None:
    if wanted:
        from atoll import __version__

        typer.echo(f"atoll {__version__}")
        raise typer.Exit


@app.callback()
def root(
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, metavar="N", help="Compute threads; without it, every usable core.", show_default=False)
    ] = None,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """One base language model, hundreds of small adapters.

    Train them from YAML files, keep them in a hub, ask them, and measure them against the base.

    Bases and the hub are kept in ~/.atoll, or in the folder that ATOLL_HOME names. Data goes to stdout, everything else to stderr. With ATOLL_DEBUG=1
    an error shows where it came from.

    \b
    Examples:
      atoll land examples/land.yaml --out runs/land
      atoll train examples/train.yaml --dry-run
      atoll generate --adapter support_intents "where is my parcel?"
      atoll compose --examples few.jsonl --publish my_task
      atoll runs list
      atoll hub list
      atoll serve --adapter support_intents
      atoll --threads 4 eval builtin:dates --model dates
    """
    prepare(threads)


if __name__ == "__main__":
    main()
