"""`atoll compose`: from a few examples and the hub's adapters, one new adapter, and what it is worth beside simpler things."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.options import DEFAULT_BASE, BaseOption, JsonOption, OutOption, SetOption, overrides, usage
from atoll.cli.output import Column, duration, say, warn, write, write_json, write_table
from atoll.cli.progress import progress_bar
from atoll.cli.rounding import QuantizationOption, Rounding
from atoll.errors import ConfigError

if TYPE_CHECKING:
    from atoll.config_compose import ComposeConfig
    from atoll.config_file import LoadedConfig
    from atoll.workflows import ComposeOutcome
    from atoll.workflows.compose_report import Line, Report

COLUMNS = (
    Column("contestant"),
    Column("what", spare=3),
    Column("held-out loss", right=True),
    Column("score", right=True),
    Column("options", right=True, spare=2),
    Column("gain", right=True),
    Column("made in", right=True, spare=1),
)
PARTS = (
    Column("weight", right=True),
    Column("of its layers", right=True, spare=1),
    Column("adapter"),
    Column("loss alone", right=True),
    Column("slope", right=True),
    Column("likeness", right=True),
)
OPTIONS = {  # how the settings are spelled here, where it is not --set
    "name": "--publish",
    "compose.adapters": "--from",
    "compose.time_s": "--time",
    "data.train": "--examples",
    "data.path": "--examples",
    "data.test": "--test",
    **{f"data.{key}": f"--{key}" for key in ("template", "target")},
    **{key: f"--{key}" for key in ("base", "description", "controls")},
    **{f"compose.{key}": f"--{key.replace('_', '-')}" for key in ("exclude", "dtype", "k", "top_k", "retrieve", "method", "budget")},
    **{f"compose.{key}": f"--{key.replace('_', '-')}" for key in ("hold_out", "form", "rank", "seed", "seeds")},
}


def compose(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A compose file (YAML); options override it.", show_default=False)] = None,
    examples: Annotated[
        str | None,
        typer.Option("--examples", metavar="ROWS", help="The examples: a file of rows, a task folder, or builtin:NAME.", show_default=False),
    ] = None,
    test: Annotated[str | None, typer.Option("--test", metavar="ROWS", help="A file of test rows to measure on.", show_default=False)] = None,
    publish: Annotated[
        str | None, typer.Option("--publish", metavar="NAME", help="Put the result into the hub under this name.", show_default=False)
    ] = None,
    description: Annotated[
        str | None,
        typer.Option("--description", metavar="TEXT", help="What the task is: for its card, and for --retrieve text.", show_default=False),
    ] = None,
    base: BaseOption = None,
    quantization: QuantizationOption = None,
    template: Annotated[str | None, typer.Option("--template", metavar="TEXT", help="The prompt, with {column} in it.", show_default=False)] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="COLUMN", help="The column with the answer.", show_default=False)] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, metavar="K", help="Draw so many of the examples, by the seed.", show_default=False)] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="REF", help="Compose only this adapter and others given so; default: all of the base.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="NAME[@N]", help="Leave this adapter out; may be given several times.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, metavar="N", help="Adapters that are searched over (10).", show_default=False)
    ] = None,
    retrieve: Annotated[
        str | None, typer.Option("--retrieve", metavar="BY", help="How they are ranked: auto, loss, slope or text.", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="gradient_per_layer (the default), gradient, cma, nevergrad:NAME, uniform or best_single.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[int | None, typer.Option("--budget", min=1, metavar="N", help="Evaluations of the search.", show_default=False)] = None,
    time_s: Annotated[
        float | None, typer.Option("--time", metavar="SECONDS", help="Time for each search: of every seed, fold and control.", show_default=False)
    ] = None,
    hold_out: Annotated[
        float | None,
        typer.Option("--hold-out", metavar="SHARE", help="Hold out this share of the examples, to know when to stop.", show_default=False),
    ] = None,
    form: Annotated[
        str | None, typer.Option("--form", metavar="FORM", help="cat (the exact sum) or product (LoraHub's).", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, metavar="R", help="Compress the result to this rank.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="The first seed.", show_default=False)] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, metavar="N", help="Repeat with so many seeds (3 with test rows, if k are drawn).", show_default=False),
    ] = None,
    controls: Annotated[bool | None, typer.Option("--controls/--no-controls", help="Compare with simpler things.", show_default="controls")] = None,
    out: OutOption = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Number format of the base: bfloat16 or float32.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be composed and how long it would take; write nothing.")] = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compose adapters of the hub into one, for a few examples.

    Ranks the hub's adapters by the examples, searches weights for the best of them, and prints what the result is worth: beside the base, the most
    common answer, the best adapter alone, equal weights, random adapters, LoRA trained on the same examples, and the base with the examples in its
    prompt, by held-out loss and, with --test, by the task's metric. Then says what to do. Ctrl-C ends the search with the best so far, or leaves out
    the rest of the controls. Everything goes to --out (default runs/compose/NAME): the adapter, the report, and train.yaml, which trains on the
    examples instead.

    \b
    Examples:
      atoll compose --examples few.jsonl --top-k 10 --publish my_task
      atoll compose --examples few.jsonl --test test.jsonl --template "{text} Label:" --target label --publish my_task
      atoll compose --examples builtin:date_format --k 5 --exclude date_format --no-controls
      atoll compose --examples few.jsonl --from summaries --from legal@2 --method cma --time 60 --rank 16 --publish legal_summaries
      atoll compose examples/compose.yaml --set compose.folds=3 --json
    """
    flags = {
        **_rows(examples, test),
        "data.template": template,
        "data.target": target,
        "base": base,
        "name": publish,
        "description": description,
        "controls": controls,
        "compose.adapters": only or None,
        "compose.exclude": exclude or None,
        "compose.time_s": time_s,
        "compose.dtype": dtype,
    }
    flags |= {f"compose.{key}": value for key, value in (("k", k), ("top_k", top_k), ("retrieve", retrieve), ("method", method), ("budget", budget))}
    flags |= {f"compose.{key}": value for key, value in (("hold_out", hold_out), ("form", form), ("rank", rank), ("seed", seed), ("seeds", seeds))}
    rounding = _rounding(quantization, only) if quantization is not None or (only and file is None) else {}
    given = {key: value for key, value in flags.items() if value is not None}
    loaded = _load(file, {**overrides(settings), **given, **rounding}, {key: OPTIONS[key] for key in given if key in OPTIONS})
    for warning in loaded.warnings:
        warn(warning)
    if dry_run:
        from atoll.cli.compose_dry_run import show_plan

        show_plan(loaded, as_json)
        return
    from atoll.workflows import compose_and_publish

    with progress_bar() as progress:
        outcome = compose_and_publish(loaded.config, root=loaded.root, out=out, publish=loaded.config.name is not None, progress=progress)
    for warning in outcome.warnings:
        warn(warning)
    if as_json:
        write_json(outcome.to_json())
    else:
        _show(outcome)


def _rounding(name: str | None, only: list[str] | None) -> dict[str, Any]:
    """How the base is rounded: as the option says, or as it was for the first adapter that is named."""
    from atoll.hub import Hub

    found = Rounding(name).of(Hub() if only and name is None else None, only)
    return {"quantization": None if found is None else found.model_dump(mode="json", exclude_unset=True)}


def _rows(examples: str | None, test: str | None) -> dict[str, str | None]:
    """Which data settings the two options mean: a file of examples beside one of test rows, or one place that may hold both."""
    if test is None:
        return {"data.path": examples}
    if examples is None or examples.startswith("builtin:") or Path(examples).is_dir():
        raise usage("--test goes with a file of rows as --examples; a task folder and a built-in task bring test rows of their own")
    return {"data.train": examples, "data.test": test}


def _load(file: Path | None, values: dict[str, Any], options: dict[str, str]) -> LoadedConfig[ComposeConfig]:
    """The configuration of the file and the options. Without a base, the one that the adapters were trained on."""
    from atoll.config_file import load_compose, load_config

    if file is not None:
        return load_config(file, "compose", values, options=options)
    if not any(key in values for key in ("data.path", "data.train")):
        raise usage("give the examples with --examples few.jsonl, or a compose file")
    return load_compose({"base": _base_of(values.get("compose.adapters")), **values} if "base" not in values else values, options)


def _base_of(only: list[str] | None) -> str:
    """The one base that the adapters record. Raises ConfigError where there are several."""
    from atoll.hub import Hub

    hub = Hub()
    versions = [hub.resolve(ref) for ref in only] if only else hub.list(kind="lora")
    bases = list(dict.fromkeys(version.base for version in versions if version.base is not None))
    if len(bases) > 1:
        raise ConfigError(f"the adapters are of {len(bases)} bases: {', '.join(bases[:5])}", hint="name the base with --base")
    return bases[0] if bases else DEFAULT_BASE


def _show(outcome: ComposeOutcome) -> None:
    """The table, the parts and the advice to stdout; what it took, and what to do with it, to stderr."""
    report, version = outcome.report, outcome.version
    write(_headline(report) + "\n")
    if report.lines:
        cells = [_cells(line) for line in report.lines]
        used = [place for place in range(len(COLUMNS)) if any(row[place] for row in cells)]
        write_table([COLUMNS[place] for place in used], [[row[place] for place in used] for row in cells])
        write(_legend(report))
        write("")
    from atoll.hub.card_composition import LAYERS_NOTE, range_text, strength

    listed = sorted(report.shortlist, key=lambda one: -strength(one.weight, one.by_layer))
    by_text = any(one.slope is not None or one.loss is None for one in listed)  # else it has decided nothing
    layers = [range_text(one.by_layer) if one.by_layer else None for one in listed]
    figures = [[_figure(one.loss), _figure(one.slope), _figure(one.similarity if by_text else None)] for one in listed]
    cells = [[f"{one.weight:+.3f}", spread, one.name, *rest] for one, spread, rest in zip(listed, layers, figures, strict=True)]
    used = [place for place in range(len(PARTS)) if any(row[place] for row in cells)]
    write_table([PARTS[place] for place in used], [[row[place] for place in used] for row in cells])
    if any(layers):
        write(LAYERS_NOTE)
    for sentence in report.advice:
        write(f"\n{sentence}")
    from atoll.workflows.compose_advice import is_training_as_good
    from atoll.workflows.compose_instead import TRAIN_FILE

    if is_training_as_good(report) and (training := outcome.adapter_folder.with_name(TRAIN_FILE)).exists():
        say(f"to train on the examples instead: atoll train {training}")
    if outcome.reused:
        say("this had been composed already; the result was found and kept")
    elif report.took:
        say("took: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in report.took.items()))
    if report.stopped:
        warn(f"not all was done: {report.stopped}")
    if version is not None:
        say(f'published: {version.ref}  sha256:{version.digest}\ntry it: atoll generate --adapter {version.name} "..."')
    else:
        say(f"written: {outcome.adapter_folder} (put it into the hub with --publish NAME)")


def _headline(report: Report) -> str:
    """What was composed of what, in one line."""
    from atoll.workflows.compose_report import counted

    search = report.search
    ended = {"time": ", ended by --time", "interrupted": ", stopped"}.get(search["stopped_by"], "")
    seeds = f", {len(report.seeds)} seeds, kept {report.seed} by {report.chosen_by}" if len(report.seeds) > 1 else _single(report)
    kept = f", keeping {report.energy_kept:.2%} of the updates' energy" if report.energy_kept < 1 else ""
    tests = f", {counted(report.test_rows, 'test row')} ({report.metric})" if report.test_rows else ""
    examples = counted(report.examples, "example")
    return (
        f"{report.task}: {len(report.shortlist)} of {report.candidates} adapters of {report.base}, {examples}{tests}{seeds}; "
        f"{report.method}, {counted(search['evaluations'], 'evaluation')}{ended}; rank {report.rank}{kept}"
    )


def _single(report: Report) -> str:
    """Why there is one seed, where more are usual."""
    return f", {report.chosen_by}" if report.chosen_by.startswith("one seed:") else ""


def _legend(report: Report) -> str:
    """What stands behind each ±."""
    said = []
    if any(line.loss is not None for line in report.lines):
        said.append("of a loss is its standard error over folds")
    if report.test_rows and len(report.seeds) > 1:
        said.append("of a score its standard deviation over seeds (its standard error over rows, where seeds do not differ)")
    elif report.test_rows:
        said.append("of a score its standard error over rows")
    return "; ".join([*(["± " + "; ".join(said)] if said else []), "gain is over the base, paired"])


def _cells(line: Line) -> list[str | None]:
    gain = None if line.gain is None else f"{line.gain.value:+.3f}" + (f" ± {line.gain.stderr:.3f}" if line.gain.stderr is not None else "")
    spread = line.spread or line.score_stderr  # the base is the same for every seed
    what = f"{line.what} ({line.note})" if line.note and line.what else line.note or line.what
    made = duration(line.seconds) if line.seconds and line.seconds >= 0.05 else None
    return [line.name, what, _with(line.loss, line.loss_stderr), _with(line.score, spread), _figure(line.option), gain, made]


def _with(value: float | None, error: float | None) -> str | None:
    return None if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
