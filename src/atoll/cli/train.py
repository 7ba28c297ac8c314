"""`atoll train`: one adapter from one YAML file, or with --dry-run only what would happen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.options import BaseOption, JsonOption, OutOption, SetOption, overrides, stopped
from atoll.cli.output import duration, say, warn, write, write_json
from atoll.cli.progress import progress_bar

if TYPE_CHECKING:
    from atoll.workflows import TrainOutcome


def train(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The training file (YAML).", show_default=False)],
    data: Annotated[str | None, typer.Option("--data", metavar="ROWS", help="Rows to learn from, instead of the file's.", show_default=False)] = None,
    base: BaseOption = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the adapter in the hub.", show_default=False)] = None,
    out: OutOption = None,
    settings: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what it would cost; train and write nothing.")] = False,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Put the adapter into the hub.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Train one adapter and publish it to the hub.

    The run's folder (--out, default runs/NAME) keeps checkpoints, the log and the adapter; the same command goes on where a stopped one ended.
    `atoll schema train` describes every key of the file. Files in Ludwig's form are read as they are.

    \b
    Examples:
      atoll train examples/train.yaml
      atoll train examples/train.yaml --dry-run
      atoll train examples/train.yaml --set adapter.r=32 --set trainer.epochs=2 --name tickets-r32
      atoll train examples/train_reft.yaml --set adapter.rank=8 --set adapter.positions=f3+l3
      atoll train examples/lora_land_article.yaml --data news.csv --base smollm2-135m-instruct
    """
    from atoll.config_file import load_config

    loaded = load_config(file, "train", overrides(settings, data__path=data, base=base, name=name))
    if dry_run:
        from atoll.cli.dry_run import show_plan

        show_plan(loaded, as_json)
        return
    for warning in loaded.warnings:
        warn(warning)
    from atoll.workflows import train_and_publish

    try:
        with progress_bar() as progress:
            outcome = train_and_publish(loaded.config, root=loaded.root, out=out, publish=publish, progress=progress)
    except KeyboardInterrupt:
        raise stopped() from None
    if as_json:
        write_json(to_json(outcome))
    else:
        _show(outcome)


def to_json(outcome: TrainOutcome) -> dict[str, object]:
    """The outcome as one JSON object."""
    version = outcome.version.to_json() if outcome.version is not None else None
    return {"adapter_folder": str(outcome.adapter_folder), "version": version, "reused": outcome.reused, "training": dict(outcome.training)}


def _show(outcome: TrainOutcome) -> None:
    """The reference of the new version (or the folder) to stdout; how it went, and what to do with it, to stderr."""
    training, version = outcome.training, outcome.version
    for warning in outcome.warnings:
        warn(warning)
    if outcome.reused:
        say("this job had been trained already; its adapter was found and kept")
    else:
        ended = ", stopped early: the validation loss no longer fell" if training["stopped_early"] else ""
        say(f"trained {training['steps']} steps in {duration(training['seconds'])}, loss {training['train_loss']:.3f}{ended}")
    write(version.ref if version is not None else str(outcome.adapter_folder))
    if version is not None:
        say(f'sha256:{version.digest}\ntry it: atoll generate --adapter {version.name} "..."')
