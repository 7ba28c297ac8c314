"""`atoll hub import-pyreft`: bring in a folder that PyReFT saved, as an adapter that is stored and served like any other.

Used by hub.py, whose command it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.options import JsonOption, LicenceOption, MessageOption, TagOption, usage
from atoll.cli.output import warn
from atoll.cli.progress import progress_bar
from atoll.errors import BaseMismatch

if TYPE_CHECKING:
    from atoll.hub.records import Version

DEFAULT_POSITIONS = "f7+l7"  # the paper's


def import_pyreft(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What PyReFT's save wrote.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="name or owner/name.", show_default=False)],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="The base that it was trained on.", show_default=False)],
    positions: Annotated[
        str | None,
        typer.Option("--positions", metavar="TEXT", help="Prompt tokens that it edits: f7+l7, l1, all_prompt or [0, -1].", show_default=False),
    ] = None,
    act_fn: Annotated[
        str | None, typer.Option("--act-fn", metavar="NAME", help="The act_fn that it was made with, such as relu.", show_default=False)
    ] = None,
    tag: TagOption = None,
    message: MessageOption = "",
    licence: LicenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring in a folder that PyReFT saved.

    Its pickles are opened in a process of their own, as tensors alone. It does not say which base, positions and act_fn it was trained with: give
    them as they were, for other ones are another adapter. Without --positions they are taken to be f7+l7, with a warning.

    \b
    Examples:
      atoll hub import-pyreft ./reft_results my-reft --base HuggingFaceTB/SmolLM2-135M-Instruct --positions f5+l5
    """
    from atoll.cli.hub import show_published

    places = _positions(positions, folder)
    with progress_bar() as progress:
        record, base_path = base_record(base, progress)
        progress("import", 0, 1)
        published = _publish(folder, name, record, base_path, places, act_fn, tag or (), message, licence)
    show_published(published, as_json)


def base_record(name: str, progress: Any) -> tuple[dict[str, Any], Path]:
    """The base record of a manifest (name and hashes) and the folder of a base on this disk, or fetched to it."""
    from atoll.model.fingerprint import describe_base
    from atoll.model.pull import pull

    path = pull(name, progress=progress)
    progress("fingerprint", 0, 1)
    return {"name": name, **describe_base(path).to_json()}, path


def check_fit(source: Path, folder: Path, record: Mapping[str, Any], base_path: Path) -> None:
    """Raises BaseMismatch where the weights in `folder` (what came of `source`) cannot be an adapter of the base of a record."""
    from atoll.hub import verdict
    from atoll.hub.intake import tensor_shapes
    from atoll.model import fingerprint

    claimed = {key: value for key, value in record.items() if key != "name"}  # the base's own name says nothing of what the adapter was made for
    found = verdict(claimed, tensor_shapes(folder), record, fingerprint.tensor_shapes(base_path))
    if not found.usable:
        raise BaseMismatch(f"{source} does not fit the base {record['name']!r}: {found.reason}", hint="name the base that it was trained on")


def _positions(text: str | None, folder: Path) -> str | list[int]:
    """As they would stand in a training file."""
    if text is None:
        warn(f"{folder} does not say which positions were trained; taken to be {DEFAULT_POSITIONS} (--positions says others)")
        return DEFAULT_POSITIONS
    if not text.startswith("["):
        return text
    try:
        return [int(place) for place in text.strip("[]").split(",")]
    except ValueError:
        raise usage(f"--positions {text!r} is not a list of whole numbers such as [0, -1]") from None


def _publish(
    folder: Path,
    name: str,
    record: dict[str, Any],
    base_path: Path,
    positions: str | list[int],
    act_fn: str | None,
    tags: Any,
    message: str,
    licence: str | None,
) -> Version:
    from atoll.hub import Hub
    from atoll.model.adapter_files import write_adapter
    from atoll.reft.convert import import_adapter

    adapter = import_adapter(folder, record["name"], positions, act_fn=act_fn)
    manifest = {"format": 1, "kind": adapter.spec.kind, "name": None, "base": record, "prompt": None, "training": None, "parents": []}
    with tempfile.TemporaryDirectory(prefix="atoll-pyreft-") as scratch:
        place = Path(scratch)
        write_adapter(place, replace(adapter, manifest={**manifest, "origin": {"source": "pyreft"}}))
        check_fit(folder, place, record, base_path)
        return Hub().publish(place, name, tags=tags, message=message, licence=licence)
