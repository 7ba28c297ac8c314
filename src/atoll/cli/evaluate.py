"""`atoll eval`: score the base and some adapters on one task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.leaderboard import RUNS, show_outcome
from atoll.cli.options import DEFAULT_BASE, BaseOption, DtypeOption, JsonOption, OutOption, overrides, stopped
from atoll.cli.output import say
from atoll.cli.progress import progress_bar
from atoll.cli.rounding import BlocksOption, IgnoreOption, QuantizationOption, Rounding
from atoll.errors import ConfigError

if TYPE_CHECKING:
    from atoll.hub.store import Hub

SECTIONS = ("data", "eval", "generation")


def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK", help="builtin:NAME, a task folder, or a file of rows.", show_default=False)],
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="REF", help="An adapter of the hub; may be given several times.", show_default=False)
    ] = None,
    base: BaseOption = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, metavar="N", help="Use at most so many test rows.", show_default=False)] = None,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="Score all rows of the task, also those that training would get.")] = False,
    template: Annotated[
        str | None, typer.Option("--template", metavar="TEXT", help="For a file of rows: the prompt, with {column} in it.", show_default=False)
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="COLUMN", help="For a file of rows: the column with the answer.", show_default=False)
    ] = None,
    out: OutOption = None,
    dtype: DtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    quantized_memory: BlocksOption = False,
    ignore_quantization: IgnoreOption = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting below data, eval or generation, such as data.metric=rouge_l; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score adapters and their base on the test rows of a task.

    Prints the leaderboard. The base is the one that the first adapter was trained on, unless --base says otherwise. Adapters are asked with the
    prompt they were trained with. Raw outputs, scores and the leaderboard go to --out (default runs/eval/TASK); what is there already is not measured
    again.

    Of a file of rows the test split is scored, the one that `atoll train` leaves out. --all-rows scores all of it: right for rows that no adapter has
    learned.

    \b
    Examples:
      atoll eval builtin:dates --model dates
      atoll eval builtin:support_intents --model support_intents@1 --model support_intents:stable --rows 50
      atoll eval tickets.csv --model ticket-router --template "Ticket: {text}" --target team
      atoll eval new_tickets.csv --all-rows --model ticket-router --template "Ticket: {text}" --target team
    """
    from atoll.config import DataConfig, EvalConfig, GenerationConfig
    from atoll.workflows import evaluate as evaluate_workflow

    sections = _sections(overrides(settings, eval__test_rows=rows, data__path=task, data__template=template, data__target=target))
    rounding = Rounding(quantization, quantized_memory, ignore_quantization)
    rounded = rounding.of(_open_hub() if models else None, models)
    try:
        with progress_bar() as progress:
            outcome = evaluate_workflow(
                base or _base_of(models),
                models or (),
                DataConfig(**sections["data"]),
                root=Path.cwd(),
                settings=EvalConfig(**sections["eval"]),
                generation=GenerationConfig(**sections["generation"]),
                dtype=dtype,
                quantization=rounded,
                ignore_quantization=ignore_quantization,
                all_rows=all_rows,
                out=out or RUNS / "eval" / Path(task.removeprefix("builtin:")).stem,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise stopped() from None
    show_outcome(outcome, as_json)
    say(f"written: {outcome.json_path}, {outcome.markdown_path} and the raw outputs in {outcome.json_path.parent / 'scores'}")


def _sections(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by dotted key, by section."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if section not in sections or not dot:
            raise ConfigError(
                f"--set {key}: an evaluation has the sections {', '.join(SECTIONS)}", hint="for example --set generation.max_new_tokens=64"
            )
        sections[section][name] = value
    return sections


def _open_hub() -> Hub:
    from atoll.hub import Hub

    return Hub()


def _base_of(models: list[str] | None) -> str:
    """The base that the first adapter was trained on; the embedded one where no adapter is named."""
    if not models:
        return DEFAULT_BASE
    version = _open_hub().resolve(models[0])
    if version.base is None:
        raise ConfigError(f"{version.ref} does not say what base it was trained on", hint="name it with --base")
    return version.base
