"""The body of POST /adapters: an adapter's files as a form, or JSON that names a folder of the server.

Only the four files of an adapter are taken, by name; a pickle is refused by name. What was uploaded lies in a folder of its own until the hub has
taken it whole, or not at all.

Used by manage.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from atoll.errors import RequestRefused
from atoll.http.auth import caller_of
from atoll.model.adapter_files import CONFIG_FILE, MANIFEST_FILE, PICKLE_SUFFIXES, WEIGHTS_FILE

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

    from atoll.serving.service import Service

FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, "README.md")
MAX_JSON_BYTES = 1 << 16


class Facts(BaseModel):
    """What is said beside the files."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=193, description="name or owner/name.")
    folder: str | None = Field(default=None, min_length=1, max_length=512, description="A folder below the server's local root (JSON only).")
    tags: tuple[str, ...] = Field(default=(), max_length=16, description="Movable labels for the version.")
    message: str = Field(default="", max_length=10_000, description="What is new in this version.")
    bind_base: bool = Field(default=False, description="Record this server's base for an adapter that does not say what it was trained on.")


@dataclass(frozen=True)
class Publication:
    """A folder to publish, and as what."""

    folder: Path
    name: str
    tags: tuple[str, ...]
    message: str
    bind_base: bool

    @staticmethod
    def document() -> dict[str, Any]:
        """The body for the OpenAPI document: the route reads it by hand, since it comes in two forms."""
        facts = Facts.model_json_schema()
        form = {key: value for key, value in facts["properties"].items() if key != "folder"}
        form["files"] = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": ", ".join(FILES)}
        return {
            "required": True,
            "content": {
                "application/json": {"schema": {**facts, "required": ["name", "folder"]}},
                "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": ["name", "files"]}},
            },
        }


async def publication(http: HttpRequest, scratch: Path, service: Service) -> Publication:
    """Read the body; files go into the empty folder `scratch`. Raises RequestRefused, and EngineError for a folder while the local source is off."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().casefold()
    if kind == "application/json":
        facts = await _read_json(http)
        return _made(facts, service.operator.local_folder(facts.folder or "", caller_of(http)))
    if kind != "multipart/form-data":
        raise RequestRefused(
            f"the body is {kind or 'of no content-type'}, expected multipart/form-data or application/json",
            hint=f"curl -F name=NAME -F files=@{CONFIG_FILE} -F files=@{WEIGHTS_FILE} ...",
        )
    facts = await _read_form(http, scratch)
    return _made(facts, scratch)


def _made(facts: Facts, folder: Path) -> Publication:
    return Publication(folder, facts.name, facts.tags, facts.message, facts.bind_base)


async def _read_json(http: HttpRequest) -> Facts:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise RequestRefused(f"the body is larger than {MAX_JSON_BYTES} bytes", hint="send files as multipart/form-data")
    try:
        found = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"the body is not JSON: {error}") from error
    facts = _facts(found)
    if facts.folder is None:
        raise RequestRefused("`folder` is missing", hint="name a folder below the server's local root, or send the files as multipart/form-data")
    return facts


async def _read_form(http: HttpRequest, scratch: Path) -> Facts:
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException

    try:
        async with http.form(max_files=len(FILES), max_fields=24, max_part_size=MAX_JSON_BYTES) as form:
            facts = _facts(_fields(list(form.multi_items())))
            uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            for upload in uploads:
                await run_in_threadpool(_keep, upload, scratch)
    except (MultiPartException, HTTPException) as error:
        if isinstance(error, HTTPException) and error.status_code != 400:
            raise
        raise RequestRefused(f"the form cannot be read: {error.message if isinstance(error, MultiPartException) else error.detail}") from error
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (scratch / name).is_file()]
    if missing:
        raise RequestRefused(f"the upload lacks {' and '.join(missing)}", hint=f"-F files=@{missing[0]}")
    return facts


def _fields(items: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {key: value for key, value in items if isinstance(value, str) and key != "tags"}
    found.pop("folder", None)
    tags = [value for key, value in items if key == "tags" and isinstance(value, str)]
    return {**found, **({"tags": tags} if tags else {})}


def _facts(found: Any) -> Facts:
    try:
        return Facts.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RequestRefused(f"`{place}`: {first['msg'][:1].lower()}{first['msg'][1:]}" if place else "the body must be a JSON object") from None


def _keep(upload: UploadFile, scratch: Path) -> None:
    """In a thread: one file into the folder, under the name that it must have."""
    name = Path((upload.filename or "").replace("\\", "/")).name
    if name not in FILES:
        if Path(name).suffix.lower() in PICKLE_SUFFIXES:
            raise RequestRefused(f"{name[:80]!r} is a pickle, which can run code when it is read", hint=f"save the adapter as {WEIGHTS_FILE}")
        raise RequestRefused(f"{name[:80]!r} is not a file of an adapter", hint=f"send {', '.join(FILES)}")
    if (scratch / name).exists():
        raise RequestRefused(f"{name} was sent twice")
    with (scratch / name).open("xb") as writer:
        while chunk := upload.file.read(1 << 20):
            writer.write(chunk)
