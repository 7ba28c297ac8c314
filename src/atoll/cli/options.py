"""Options that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from atoll.errors import AtollError

DEFAULT_BASE = "smollm2-135m-instruct"  # the embedded one, which every machine can get

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of text.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; KEY is its sections and name, with dots. May be given several times."),
]
AtOnceOption = Annotated[
    int | None,
    typer.Option("--at-once", min=1, metavar="N", help="Most adapters that train together (default 8); the others follow.", show_default=False),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for everything that is written.", show_default=False)]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="BASE", help="Base model: an alias, a folder, a .gguf file or a Hugging Face id.", show_default=False)
]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="Number format of the base: bfloat16 or float32.")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="A movable label for the version; may be given several times.")]
MessageOption = Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="What is new in this version.", show_default=False)]
LicenceOption = Annotated[
    str | None, typer.Option("--licence", "--license", help="Licence of the adapter, for example Apache-2.0.", show_default=False)
]


def usage(message: str) -> typer.BadParameter:
    """An error of usage (exit code 2), to be raised: options that are missing or contradict each other."""
    return typer.BadParameter(message)


def overrides(settings: list[str] | None, **flags: Any) -> dict[str, Any]:
    """`--set` values by dotted key, and over them the flags that were given (data__path becomes data.path). Raises ConfigError."""
    from atoll.config_file import parse_overrides

    return {**parse_overrides(settings or ()), **{key.replace("__", "."): value for key, value in flags.items() if value is not None}}


def stopped() -> AtollError:
    """What a Ctrl-C in the middle of a resumable command becomes."""
    from atoll.errors import Interrupted

    return Interrupted("stopped by Ctrl-C", hint="what was finished is kept: run the same command again to go on")
