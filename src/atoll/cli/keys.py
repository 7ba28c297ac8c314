"""`atoll keys …`: make, list and revoke the API keys of a server. The file holds hashes only; a key is shown once, when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.options import JsonOption
from atoll.cli.output import Column, say, write, write_json, write_table
from atoll.config import atoll_home
from atoll.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

FileOption = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="The keys file (default: keys.json in the Atoll home).", show_default=False)
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What the key is called, in logs and here.", show_default=False)]


def default_file() -> Path:
    """Where keys are kept unless somebody says otherwise."""
    return atoll_home() / "keys.json"


@app.callback()
def keys() -> None:
    """Make, list and revoke API keys of a server.

    A server that others can reach needs them: atoll serve --host 0.0.0.0 reads the same file. Changes count from the next request on.

    \b
    Examples:
      atoll keys add alice
      atoll keys list
    """


@app.command()
def add(
    name: NameArgument,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", metavar="SCOPE", help="infer (default), publish or admin; may be given several times.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="PATTERN", help="Only adapters whose name matches, such as 'acme/*'; may be given several times."),
    ] = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="For people.", show_default=False)] = "",
    file: FileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once.

    \b
    Examples:
      atoll keys add alice
      atoll keys add ci --scope infer --scope publish --adapter 'acme/*'
      atoll keys add operator --scope infer --scope publish --scope admin
    """
    from atoll.serving.keys import SCOPES, Scope, add_key

    asked: list[Scope] = []
    for word in scope or ("infer",):
        found = next((known for known in SCOPES if known == word), None)
        if found is None:
            raise ConfigError(f"there is no scope {word!r}", hint=f"scopes are {', '.join(SCOPES)}")
        asked.append(found)
    path = file or default_file()
    key = add_key(path, name, asked, adapter, note)
    write_json({"id": name, "key": key, "scopes": asked, "adapters": adapter, "file": str(path)}) if as_json else write(key)
    say(f"{name} is in {path}; the key itself is kept nowhere: copy it now")


@app.command("list")
def list_keys(file: FileOption = None, as_json: JsonOption = False) -> None:
    """List the keys by name, never the keys themselves.

    \b
    Examples:
      atoll keys list
      atoll keys list --json
    """
    from atoll.serving.keys import read_keys

    path = file or default_file()
    records = read_keys(path).keys if path.exists() else ()
    if as_json:
        write_json([record.model_dump(mode="json", exclude={"sha256"}) for record in records])
        return
    columns = (Column("key"), Column("scopes"), Column("adapters"), Column("created", spare=1), Column("note", spare=2))
    write_table(
        columns,
        [
            (record.id, ", ".join(record.scopes), "all" if record.adapters is None else ", ".join(record.adapters), record.created, record.note)
            for record in records
        ],
    )


@app.command()
def remove(name: NameArgument, file: FileOption = None) -> None:
    """Revoke a key; running servers refuse it at once.

    \b
    Examples:
      atoll keys remove alice
    """
    from atoll.serving.keys import remove_key

    path = file or default_file()
    remove_key(path, name)
    say(f"{name} is gone from {path}")
