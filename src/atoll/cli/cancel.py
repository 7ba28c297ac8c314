"""`atoll cancel`: end one training of many; the others go on untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.output import say, write


def cancel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name, as the table of the training shows it.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to look for it.", show_default=False)] = None,
) -> None:
    """Cancel one training; the others go on.

    It ends after the step at hand and keeps a checkpoint: the same `atoll train` or `atoll land` goes on from there. --out (default runs) is the
    folder of the training command, or any above it. A file named `cancel` in the job's folder does the same.

    \b
    Examples:
      atoll cancel tickets
      atoll cancel dates --out runs/land
    """
    from atoll.workflows.cancelling import cancel as ask

    folder = ask(name, out or Path("runs"))
    write(str(folder))
    say(f"{name} ends after the step at hand and keeps a checkpoint")
