"""`atoll schema`: the JSON Schema of the files, for editors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.output import write, write_json


class Kind(StrEnum):
    """The files that have a schema."""

    train = "train"
    land = "land"
    compose = "compose"


def schema(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="train, land or compose.")] = Kind.train,
    folder: Annotated[Path | None, typer.Option("--write", metavar="DIR", help="Write all as DIR/KIND.schema.json.", show_default=False)] = None,
) -> None:
    """Print the JSON Schema of a training, land or compose file.

    Every key with its type, limits, default and meaning.
    An editor with a YAML language server checks and completes a file that begins with the line: # yaml-language-server: $schema=train.schema.json

    \b
    Examples:
      atoll schema train
      atoll schema land > land.schema.json
      atoll schema --write schemas
    """
    from atoll.config_file import json_schemas, write_schemas

    if folder is None:
        write_json(json_schemas()[kind.value])
        return
    for path in write_schemas(folder):
        write(str(path))
