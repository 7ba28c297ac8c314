"""`atoll hub …`: publish, find, trust, label and delete adapters. Each command is one method of Hub, and what it returned, shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.import_pyreft import base_record, check_fit, import_pyreft
from atoll.cli.options import BaseOption, JsonOption, LicenceOption, MessageOption, TagOption, usage
from atoll.cli.output import Column, clean, say, size, to_terminal, warn, write, write_json, write_table
from atoll.cli.progress import progress_bar

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.hub.store import Hub

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

RefArgument = Annotated[str, typer.Argument(metavar="REF", help="name, name@3, name@sha256:…, name:tag or sha256:…", show_default=False)]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="name or owner/name.", show_default=False)]

KIND_HELP = "Only this kind: lora, reft, lora+reft or composed."
VERSION_COLUMNS = (
    Column("adapter"),
    Column("kind", spare=2),
    Column("base"),
    Column("rank", right=True, spare=1),
    Column("parameters", right=True, spare=5),
    Column("size", right=True, spare=3),
    Column("task", spare=4),
    Column("tags"),
    Column("created"),
)


@app.callback()
def hub() -> None:
    """Keep, find and share adapters.

    A version is its content. It is named by name (the newest), name@3, name:tag, name@sha256:… or sha256:…

    \b
    Examples:
      atoll hub list
      atoll hub show dates@1
    """


def _open() -> Hub:
    from atoll.hub import Hub

    return Hub()


# ---- in and out ----


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The adapter's folder, Atoll's or PEFT's.", show_default=False)],
    name: NameArgument,
    tag: TagOption = None,
    message: MessageOption = "",
    licence: LicenceOption = None,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a folder's adapter as the next version of a name.

    The same content again is the same version. --base binds an adapter that does not say what it was trained on; one that cannot fit that base is
    refused.

    \b
    Examples:
      atoll hub publish runs/ticket-router/adapter acme/ticket-router --tag stable
      atoll hub publish ./my-lora my-lora --base smollm2-135m-instruct -m "first try"
    """
    record = None
    if base is not None:
        from atoll.model.adapter_files import WEIGHTS_FILE

        with progress_bar() as progress:
            record, base_path = base_record(base, progress)
        if (folder / WEIGHTS_FILE).is_file():  # publishing says what is wrong with another folder
            check_fit(folder, folder, record, base_path)
    version = _open().publish(folder, name, tags=tag or (), message=message, licence=licence, base=record)
    if base is not None:
        _warn_of_another_base(folder, base)
    show_published(version, as_json)


def _warn_of_another_base(folder: Path, base: str) -> None:
    """Names prove nothing, and one base has many; but bases of one shape are easily mistaken for each other."""
    from atoll.hub.intake import read_json_object
    from atoll.model.adapter_files import CONFIG_FILE

    config = folder / CONFIG_FILE
    told = read_json_object(config).get("base_model_name_or_path") if config.is_file() else None
    if isinstance(told, str) and told and Path(told).name.casefold() != Path(base).name.casefold():
        warn(f"{config} says that the adapter was trained on {told!r}; it is published as one of {base!r}, whose shapes it fits")


@app.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="An adapter's folder, or hf:owner/name[@revision].", show_default=False)],
    name: NameArgument,
    tag: TagOption = None,
    message: MessageOption = "",
    licence: LicenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring somebody's adapter into the hub, bit for bit.

    \b
    Examples:
      atoll hub pull ./downloads/their-lora their-lora
      atoll hub pull hf:acme/sql-lora acme/sql-lora
    """
    show_published(_open().pull(source, name, tags=tag or (), message=message, licence=licence), as_json)


app.command("import-pyreft")(import_pyreft)


@app.command()
def export(
    ref: RefArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Copy a version out as a folder, bit for bit.

    A LoRA's folder is PEFT's own.

    \b
    Examples:
      atoll hub export dates@1 ./dates-lora
    """
    hub = _open()
    version = hub.resolve(ref)
    folder = hub.export(version.ref, out)
    write_json({"folder": str(folder), "version": version.to_json()}) if as_json else write(str(folder))


# ---- find ----


@app.command("list")
def list_versions(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A name, for all its versions, or owner/.", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Only of this base: its name or weights fingerprint.", show_default=False)
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help=KIND_HELP, show_default=False)] = None,
    tag: Annotated[str | None, typer.Option("--tag", metavar="TAG", help="Only versions with this tag.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="All versions, yanked ones too, not only the newest of each name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the newest version of each name, or all of one.

    \b
    Examples:
      atoll hub list
      atoll hub list dates
      atoll hub list --kind reft
      atoll hub list --base smollm2-135m-instruct --json
    """
    _show_versions(_open().list(name, base=base, kind=kind, tag=tag, all_versions=every), as_json)


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(metavar="WORD...", help="All of these.", show_default=False)],
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help=KIND_HELP, show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Find adapters by words.

    They may stand in name, description, task, licence, base, message or tags.

    \b
    Examples:
      atoll hub search support
      atoll hub search sql smollm2 --json
    """
    _show_versions(_open().search(" ".join(words), kind=kind), as_json)


@app.command()
def show(ref: RefArgument, as_json: JsonOption = False) -> None:
    """Show a version's card: spec, base, training, scores, files.

    \b
    Examples:
      atoll hub show dates
      atoll hub show dates@1 --json
    """
    card = _open().show(ref)
    if as_json:
        write_json(card.to_json())
    elif to_terminal():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(clean(card.markdown()), hyperlinks=False))
    else:
        write(card.markdown(), end="")


# ---- label and trust ----


@app.command()
def tag(
    ref: RefArgument, label: Annotated[str, typer.Argument(metavar="TAG", help="The label.", show_default=False)], as_json: JsonOption = False
) -> None:
    """Point a label of a name to a version.

    It may be moved later.

    \b
    Examples:
      atoll hub tag dates@2 stable
    """
    _show_changed(_open().tag(ref, label), as_json)


@app.command()
def untag(ref: Annotated[str, typer.Argument(metavar="NAME:TAG", help="The label.", show_default=False)], as_json: JsonOption = False) -> None:
    """Remove a label; the version stays.

    \b
    Examples:
      atoll hub untag dates:stable
    """
    _show_changed(_open().untag(ref), as_json)


@app.command()
def yank(ref: RefArgument, undo: Annotated[bool, typer.Option("--undo", help="Put it back.")] = False, as_json: JsonOption = False) -> None:
    """Take a version out of names, lists and search.

    Its number and digest still work.

    \b
    Examples:
      atoll hub yank dates@2
      atoll hub yank dates@2 --undo
    """
    _show_changed(_open().yank(ref, undo=undo), as_json)


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(metavar="REF", help="A version; default: all of them.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every stored byte, and say what has changed.

    It is compared with what was published. The exit code is 1 if anything differs.

    \b
    Examples:
      atoll hub verify
      atoll hub verify dates@1 --json
    """
    hub = _open()
    num_versions = 1 if ref is not None else len(hub.list(all_versions=True))
    problems = hub.verify(ref)
    if as_json:
        write_json([{"ref": each.ref, "file": each.file, "expected": each.expected, "found": each.found} for each in problems])
    elif problems:
        write_table(
            [Column("version"), Column("file"), Column("expected"), Column("found")], [(p.ref, p.file, p.expected, p.found) for p in problems]
        )
    say(f"{num_versions} version{'s' if num_versions != 1 else ''} read, {len(problems)} problem{'s' if len(problems) != 1 else ''} found")
    if problems:
        raise typer.Exit(1)


# ---- remove ----


@app.command()
def delete(
    ref: RefArgument,
    every: Annotated[bool, typer.Option("--all", help="All versions of the name.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a version out of the hub, or all of a name.

    The bytes stay until `atoll hub gc`, scores for good.

    \b
    Examples:
      atoll hub delete dates@1
      atoll hub delete dates --all --yes
    """
    hub = _open()
    named = hub.resolve(ref)
    if not yes:
        if not sys.stdin.isatty():
            raise usage("deleting asks first, but stdin is no terminal: add --yes")
        typer.confirm(f"Delete {f'all versions of {named.name}' if every else named.ref}?", abort=True, err=True)
    gone = hub.delete(ref, all_versions=every)
    if as_json:
        write_json([version.to_json() for version in gone])
        return
    for version in gone:
        write(version.ref)
    say(f"deleted {len(gone)} version{'s' if len(gone) != 1 else ''}; atoll hub gc frees their space")


@app.command()
def gc(as_json: JsonOption = False) -> None:
    """Free the space of what no version uses.

    \b
    Examples:
      atoll hub gc
    """
    report = _open().gc()
    if as_json:
        write_json({"num_blobs": report.num_blobs, "num_folders": report.num_folders, "freed_bytes": report.freed_bytes})
    else:
        write(f"removed {report.num_blobs} files and {report.num_folders} folders, {size(report.freed_bytes)}")


# ---- showing ----


def show_published(version: Version, as_json: bool) -> None:
    """What came in: its reference to stdout, what was left out to stderr."""
    for name in version.left_out:
        say(f"left out: {name}")
    _show_changed(version, as_json)


def _show_changed(version: Version, as_json: bool) -> None:
    """The version's reference to stdout, the rest to stderr."""
    if as_json:
        write_json(version.to_json())
        return
    write(version.ref)
    state = f"{', tags ' + ', '.join(version.tags) if version.tags else ''}{', yanked' if version.yanked else ''}"
    say(f"sha256:{version.digest}{state}")


def _show_versions(versions: Sequence[Version], as_json: bool) -> None:
    if as_json:
        write_json([version.to_json() for version in versions])
        return
    if not versions:
        say("nothing found; `atoll land` and `atoll train` publish what they train")
        return
    write_table(VERSION_COLUMNS, [_version_cells(version) for version in versions])


def _version_cells(version: Version) -> tuple[Any, ...]:
    ref = f"{version.ref} (yanked)" if version.yanked else version.ref
    parameters = None if version.num_parameters is None else f"{version.num_parameters:,}"
    facts = (ref, version.kind, version.base, version.rank, parameters, size(version.size_bytes), version.task)
    return (*facts, ", ".join(version.tags), f"{version.created:%Y-%m-%d %H:%M}")
