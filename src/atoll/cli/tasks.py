"""`atoll tasks`: the built-in tasks, their examples, and a folder of files to look at or copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.options import JsonOption, usage
from atoll.cli.output import Column, say, write, write_json, write_table
from atoll.errors import DataError

if TYPE_CHECKING:
    from atoll.data.task import Example

SHOWN = ("title", "family", "metric", "match", "label_set", "entity_types", "instruction", "notes")


def tasks(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this task.", show_default=False)] = None,
    rows: Annotated[int, typer.Option("--rows", min=0, metavar="N", help="How many examples to show.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option("--write", metavar="DIR", help="Write a folder of task.json and three .jsonl files.", show_default=False),
    ] = None,
    train: Annotated[int, typer.Option("--train", min=1, metavar="N", help="Training rows to write.")] = 600,
    validation: Annotated[int, typer.Option("--validation", min=0, metavar="N", help="Validation rows to write.")] = 100,
    test: Annotated[int, typer.Option("--test", min=0, metavar="N", help="Test rows to write.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the rows.")] = 17,
    as_json: JsonOption = False,
) -> None:
    """List the built-in tasks, show one, or write one as files.

    A written folder has the format that your own tasks may have.

    \b
    Examples:
      atoll tasks
      atoll tasks dates --rows 2
      atoll tasks support_intents --write my-task --train 100
    """
    if name is None:
        if folder is not None:
            raise usage("--write needs the NAME of a task")
        _list(as_json)
    elif folder is not None:
        _write(name, folder, {"train": train, "validation": validation, "test": test}, seed)
    else:
        _show(name, rows, seed, as_json)


def _list(as_json: bool) -> None:
    from atoll.tasks.generators import builtin_names, describe

    descriptions = [describe(name) for name in builtin_names()]
    facts = [{key: description.get(key) for key in ("name", "family", "metric", "title")} for description in descriptions]
    if as_json:
        write_json(facts)
        return
    columns = (Column("task"), Column("family", spare=2), Column("metric", spare=1), Column("what it asks for"))
    write_table(columns, [[f"builtin:{fact['name']}", fact["family"], fact["metric"], fact["title"]] for fact in facts])


def _show(name: str, rows: int, seed: int, as_json: bool) -> None:
    from atoll.config import DataConfig
    from atoll.data.task import load_task
    from atoll.tasks.generators import describe

    description = describe(name)
    data = DataConfig(path=f"builtin:{name}", max_train_rows=max(rows, 1), max_validation_rows=1, max_test_rows=1, seed=seed)
    examples = load_task(data).train[:rows]
    if as_json:
        shown = {key: value for key, value in description.items() if key != "databases"}
        write_json({**shown, "examples": [_as_json(example) for example in examples]})
        return
    for key in SHOWN:
        value = description.get(key)
        if value:
            write(f"{key + ':':14}{', '.join(value) if isinstance(value, tuple | list) else value}")
    for number, example in enumerate(examples, start=1):
        write(f"\n--- example {number} ---\n{example.prompt}⟦{example.completion}⟧")


def _as_json(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt, "completion": example.completion, "row": dict(example.row)}


def _write(name: str, folder: Path, sizes: dict[str, int], seed: int) -> None:
    from atoll.files import write_file
    from atoll.tasks.generators import generate

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder", hint="choose a new folder")
    description, parts = generate(name, **sizes, seed=seed)
    for part, part_rows in parts.items():
        write_file(folder / f"{part}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part_rows))
    write_file(folder / "task.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    write(str(folder))
    say(f"wrote task.json and {', '.join(f'{len(part_rows)} rows of {part}' for part, part_rows in parts.items())}; use it as data.path: {folder}")
