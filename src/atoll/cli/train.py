"""`atoll train`: one adapter from one YAML file, several at once from several, or with --dry-run only what would happen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.classify import trial_of
from atoll.cli.job_table import job_table
from atoll.cli.leaderboard import cost_text
from atoll.cli.options import AtOnceOption, BaseOption, JsonOption, OutOption, SetOption, overrides, stopped
from atoll.cli.output import duration, say, warn, write, write_json
from atoll.cli.processes import is_first, is_spokesman, launched_processes, run_processes
from atoll.cli.progress import progress_bar
from atoll.errors import AtollError, ConfigError, Interrupted

if TYPE_CHECKING:
    from atoll.config import TrainConfig
    from atoll.config_file import LoadedConfig
    from atoll.workflows import TrainOutcome


def train(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="The training file (YAML), or several.", show_default=False)],
    data: Annotated[str | None, typer.Option("--data", metavar="ROWS", help="Rows to learn from, instead of the file's.", show_default=False)] = None,
    base: BaseOption = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the adapter in the hub.", show_default=False)] = None,
    out: OutOption = None,
    settings: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what it would cost; train and write nothing.")] = False,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Put the adapter into the hub.")] = True,
    at_once: AtOnceOption = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, metavar="N", help="Train one adapter in N processes, each with a share of every batch.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter, or several at once, and publish to the hub.

    The run's folder (--out, default runs/NAME) keeps checkpoints, the log and the adapter. Ctrl-C and SIGTERM end the step at hand and keep it, with
    exit code 130; the same command goes on from there.

    With several files every adapter has a folder of its name in --out (default runs); they share one base in memory and train together, each as it
    would alone, and one that fails does not stop the others. Files, rows and base are checked before the first step of any.

    A file with a `sweep:` section is many trainings: every combination of the values there, or random draws; the best is published under the file's
    name. Where the values change what losses are of (base, rows, template, train_on_prompt), they cannot be compared: the table shows all, and none
    is named best.

    --processes N trains one adapter in N processes of this machine, `torchrun … -m atoll train FILE` on several machines: the same adapter, to
    rounding. Each process holds the base, or with `trainer.fsdp` its share.

    `atoll schema train` describes every key of the file. Files in Ludwig's form are read as they are.

    \b
    Examples:
      atoll train examples/train.yaml
      atoll train examples/train.yaml --dry-run
      atoll train examples/train.yaml examples/train_reft.yaml --out runs/both
      atoll train examples/sweep.yaml --dry-run
      atoll train examples/train.yaml --processes 2
      atoll train examples/train.yaml --set adapter.r=32 --set trainer.epochs=2 --name tickets-r32
      atoll train examples/train_reft.yaml --set adapter.rank=8 --set adapter.positions=f3+l3
      atoll train examples/lora_land_article.yaml --data news.csv --base smollm2-135m-instruct
    """
    from atoll.config_file import load_config
    from atoll.config_sweep import is_sweep

    if len(files) > 1 and name is not None:
        raise ConfigError("--name is for one file", hint="give each file its own name")
    given = overrides(settings, data__path=data, base=base, name=name)
    started = launched_processes()
    in_several = started > 1 or processes not in (None, 1)
    if len(files) > 1 and in_several:
        raise ConfigError(
            f"several processes train one adapter together, but {len(files)} files are given",
            hint="give one file, or leave the processes out: one process trains all of them over one base",
        )
    if any(map(is_sweep, files)):
        if in_several:
            raise ConfigError(
                "several processes train one adapter together, but a sweep is many trainings",
                hint="leave the processes out: one process trains all of them over one base",
            )
        _sweep(files, given, out, dry_run, publish, at_once, as_json)
        return
    every = [load_config(file, "train", given) for file in files]
    if dry_run:
        if not is_spokesman():
            return
        from atoll.cli.dry_run import show_plans

        show_plans(every, as_json)
        return
    if processes not in (None, started):
        if started > 1:
            raise ConfigError(f"--processes is {processes}, but {started} processes have been started already", hint="leave --processes out")
        raise typer.Exit(run_processes(processes))
    for loaded in every if is_spokesman() else ():
        for warning in loaded.warnings:
            warn(warning)
    if len(every) > 1:
        _train_many(every, out, publish, at_once, as_json)
        return
    from atoll.workflows import train_and_publish
    from atoll.workflows.start import silent

    try:
        with progress_bar() if is_spokesman() else nullcontext(silent) as progress:
            outcome = train_and_publish(every[0].config, root=every[0].root, out=out, publish=publish, progress=progress)
    except KeyboardInterrupt:
        raise stopped() from None
    if not is_first():
        return
    if as_json:
        write_json(to_json(outcome))
    else:
        _show(outcome)


def _sweep(files: Sequence[Path], given: dict[str, Any], out: Path | None, dry_run: bool, publish: bool, at_once: int | None, as_json: bool) -> None:
    """A file with a sweep stands alone: its table is of its own trainings."""
    from atoll.cli.sweep import run_sweep, show_grid
    from atoll.config_sweep import load_sweep

    if len(files) > 1:
        raise ConfigError("a file with a sweep is trained by itself", hint="start each in a command of its own")
    loaded = load_sweep(files[0], given)
    show_grid(loaded, at_once, as_json) if dry_run else run_sweep(loaded, out, publish, at_once, as_json)


def _train_many(every: Sequence[LoadedConfig[TrainConfig]], out: Path | None, publish: bool, at_once: int | None, as_json: bool) -> None:
    """Train several files' adapters at once; exit code 1 if one of them failed."""
    from atoll.workflows import train_many

    try:
        with job_table() as table:
            configs, named = [(loaded.config, loaded.root) for loaded in every], [loaded.path.name for loaded in every]
            outcomes = train_many(configs, out=out, publish=publish, at_once=at_once, named=named, table=table)
    except KeyboardInterrupt:
        raise stopped() from None
    failures = [(loaded, outcome) for loaded, outcome in zip(every, outcomes, strict=True) if isinstance(outcome, AtollError)]
    if as_json:
        write_json(
            [{"error": outcome.message, "hint": outcome.hint} if isinstance(outcome, AtollError) else to_json(outcome) for outcome in outcomes]
        )
    else:
        for outcome in outcomes:
            if not isinstance(outcome, AtollError):
                _show(outcome)
    for loaded, error in failures:
        what = "was cancelled" if isinstance(error, Interrupted) else "failed"
        warn(f"{loaded.path.name} {what}: {error.message}" + (f" (hint: {error.hint})" if error.hint else ""))
    if failures:
        raise typer.Exit(1)


def to_json(outcome: TrainOutcome) -> dict[str, object]:
    """The outcome as one JSON object."""
    version = outcome.version.to_json() if outcome.version is not None else None
    cost = outcome.cost.to_json() if outcome.cost is not None else None
    return {
        "adapter_folder": str(outcome.adapter_folder),
        "version": version,
        "reused": outcome.reused,
        "training": dict(outcome.training),
        "cost": cost,
    }


def _show(outcome: TrainOutcome) -> None:
    """The reference of the new version (or the folder) to stdout; how it went, and what to do with it, to stderr."""
    training, version = outcome.training, outcome.version
    for warning in outcome.warnings:
        warn(warning)
    if outcome.reused:
        say("this job had been trained already; its adapter was found and kept")
    else:
        ended = ", stopped early: the validation loss no longer fell" if training["stopped_early"] else ""
        took = f" ({cost})" if (cost := cost_text(outcome.cost)) else ""
        say(f"trained {training['steps']} steps in {duration(training['seconds'])}{took}, loss {training['train_loss']:.3f}{ended}")
    write(version.ref if version is not None else str(outcome.adapter_folder))
    if version is not None:
        say("\n".join(line for line in (f"sha256:{version.digest}", trial_of(version)) if line))
