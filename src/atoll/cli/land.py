"""`atoll land`: the main job, from a land file to a leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.job_table import job_table
from atoll.cli.leaderboard import show_outcome
from atoll.cli.options import AtOnceOption, BaseOption, JsonOption, OutOption, SetOption, overrides, stopped
from atoll.cli.output import messages, say, warn
from atoll.cli.processes import refuse_processes
from atoll.cli.progress import progress_bar
from atoll.errors import Interrupted


def land(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The land file (YAML).", show_default=False)],
    out: OutOption = None,
    base: BaseOption = None,
    settings: SetOption = None,
    at_once: AtOnceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, publish and measure an adapter for each task.

    The adapters train together over one base in memory, each as it would alone.

    Prints the leaderboard. Everything goes to --out (default runs/FILE's name): checkpoints, raw outputs, scores, leaderboard.json and
    leaderboard.md. The same command again does only what is missing or whose inputs have changed. A task that fails is reported at the end, with exit
    code 1; the others go on.

    \b
    Examples:
      atoll land examples/land.yaml
      atoll land examples/land.yaml --out runs/small --set defaults.data.max_train_rows=100 --set tasks.dates.adapter.r=4
      atoll land examples/land.yaml --json > leaderboard.json
    """
    from atoll.config_file import load_config

    refuse_processes("a land")
    from atoll.workflows import land as land_workflow

    loaded = load_config(file, "land", overrides(settings, base=base))
    for warning in loaded.warnings:
        warn(warning)
    try:
        console = messages()  # one for both, or each would draw over the other
        with progress_bar(console) as progress, job_table(console) as table:
            folder = out or Path("runs") / file.stem
            outcome = land_workflow(loaded.config, folder, root=loaded.root, at_once=at_once, progress=progress, table=table)
    except KeyboardInterrupt:
        raise stopped() from None
    show_outcome(outcome, as_json)
    say(f"written: {outcome.json_path} and {outcome.markdown_path}")
    for name, error in outcome.failures.items():
        what = "was cancelled" if isinstance(error, Interrupted) else "failed"
        warn(f"task {name} {what}: {error.message}" + (f" (hint: {error.hint})" if error.hint else ""))
    if outcome.failures:
        raise typer.Exit(1)
