"""Names of adapters, tags, and references to a version.

A name is `name` or `owner/name`; a reference is a name with an optional `@number`, `@sha256:prefix` or `:tag`, or a digest alone. Names never become
paths: files live under their digest, so a hostile name has nothing to climb. The pattern is the one of the Hugging Face hub, plus reserved words.

Used by store.py and by whoever takes a reference from a user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.errors import HubError, NameRefused

if TYPE_CHECKING:
    from atoll.hub.records import Version

# `base` and `__base_model__` mean "no adapter" in requests; `latest` is every name's newest version; `sha256` starts a digest reference.
RESERVED = frozenset({"base", "default", "latest", "__base_model__", "sha256"})

_PART = re.compile(r"[A-Za-z0-9._-]{1,96}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIKE_A_VERSION = re.compile(r"v?[0-9]+(\.[0-9]+)*|[0-9a-f]{8,}", re.IGNORECASE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}")


def check_name(name: str) -> str:
    """Return `name` if it may be published; NameRefused names the first rule it breaks."""
    parts = name.split("/")
    if len(parts) > 2:
        raise _refused(name, f"it has {len(parts)} parts")
    for part in parts:
        if not part:
            raise _refused(name, "it is empty" if not name else "a part of it is empty")
        if not _PART.fullmatch(part):
            raise _refused(name, "a part is longer than 96 characters" if len(part) > 96 else "it has a character outside A-Z a-z 0-9 . _ -")
        if part[0] in "-." or part[-1] in "-.":
            raise _refused(name, "a part starts or ends with '-' or '.'")
        if "--" in part or ".." in part:
            raise _refused(name, "it contains '--' or '..'")
        if part.casefold().endswith(".git"):
            raise _refused(name, "it ends in '.git'")
        if part.casefold() in RESERVED:
            raise _refused(name, f"{part!r} is a reserved word")
    return name


def _refused(name: str, why: str) -> NameRefused:
    shown = name if len(name) <= 120 else name[:117] + "..."
    return NameRefused(
        f"{shown!r} cannot be the name of an adapter: {why}",
        hint="use 'name' or 'owner/name', each part 1 to 96 of A-Z a-z 0-9 . _ -, for example 'acme/support-intents'",
    )


def name_key(name: str) -> str:
    """What must be unique: two names that differ only in case are one name."""
    return name.casefold()


def check_tag(tag: str) -> str:
    """Return `tag` if it may be a movable label. It must not look like a version number or a digest, which never move."""
    if not _TAG.fullmatch(tag):
        raise NameRefused(f"{tag[:80]!r} cannot be a tag: 1 to 64 of A-Z a-z 0-9 . _ -, starting with a letter or digit", hint="for example 'stable'")
    if _LIKE_A_VERSION.fullmatch(tag) or tag.casefold() in RESERVED:
        raise NameRefused(f"{tag!r} cannot be a tag: it looks like a version, which never moves, or is reserved", hint="for example 'stable'")
    return tag


@dataclass(frozen=True)
class Reference:
    """What a user wrote: at most one of number, digest (hex prefix) and tag is set; without a name, the digest is."""

    name: str | None
    number: int | None = None
    digest: str | None = None
    tag: str | None = None

    @property
    def is_bare_name(self) -> bool:
        """Only a name, so it means the newest version."""
        return self.number is None and self.digest is None and self.tag is None

    def means(self, version: Version) -> bool:
        """Whether a version is one that the text could name; a bare name is every version of it."""
        if self.name is not None and name_key(self.name) != name_key(version.name):
            return False
        if self.tag is not None:
            return self.tag in version.tags
        return self.is_bare_name or self.number == version.number or (self.digest is not None and version.digest.startswith(self.digest))


def parse_reference(text: str) -> Reference:
    """Read `name`, `name@3`, `name@latest`, `name@sha256:0123abcd`, `name:tag`, `sha256:0123abcd`; NameRefused if it is none of them."""
    if _DIGEST.fullmatch(text):
        return Reference(None, digest=text.removeprefix("sha256:"))
    name, at, version = text.partition("@")
    if at and _DIGEST.fullmatch(version):
        return Reference(check_name(name), digest=version.removeprefix("sha256:"))
    if at and version == "latest":
        return Reference(check_name(name))
    if at and re.fullmatch(r"[1-9][0-9]{0,8}", version):
        return Reference(check_name(name), number=int(version))
    if not at:
        name, colon, tag = text.partition(":")
        if not colon or tag == "latest":
            return Reference(check_name(name))
        if name.casefold() != "sha256":
            return Reference(check_name(name), tag=check_tag(tag))
    raise HubError(
        f"{text[:120]!r} does not name a version",
        hint="write name, name@3, name@sha256:<8 or more hex digits>, name:tag or sha256:<8 or more hex digits>",
    )


def nearest(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Up to three existing names that `name` may have meant, the closest first."""
    import difflib

    by_key = {name_key(each): each for each in names}
    close = difflib.get_close_matches(name_key(name), by_key, n=3, cutoff=0.5)
    inside = [key for key in by_key if name_key(name) in key and key not in close]
    return tuple(by_key[key] for key in [*close, *sorted(inside)][:3])
