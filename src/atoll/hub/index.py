"""Questions to the hub's index, and the one way a version enters it.

Functions over an open session: the caller decides whether it reads or holds the writer's lock. They return rows; store.py turns rows into values.

Used by store.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session

from atoll.errors import AdapterNotFound, HubError, NameRefused
from atoll.hub.intake import KINDS, Intake
from atoll.hub.names import Reference, name_key, nearest, parse_reference
from atoll.hub.records import AdapterRow, FileRow, ParentRow, TagRow, VersionRow


def resolve(session: Session, text: str, *, to_change: bool = False) -> VersionRow:
    """The version that a reference means: for a bare name the newest that is not yanked.

    Raises AdapterNotFound with the nearest names. A digest alone may stand under several names: reading takes the first published, changing refuses.
    """
    reference = parse_reference(text)
    if reference.name is None:
        return _by_digest_alone(session, reference, text, to_change)
    adapter = session.scalars(select(AdapterRow).where(AdapterRow.name_key == name_key(reference.name))).one_or_none()
    rows = [] if adapter is None else list(session.scalars(_versions().where(VersionRow.adapter_id == adapter.id).order_by(VersionRow.number)))
    if not rows:
        close = nearest(reference.name, session.scalars(select(AdapterRow.name).where(AdapterRow.id.in_(select(VersionRow.adapter_id)))))
        raise AdapterNotFound(
            f"no adapter {reference.name!r} in the hub",
            hint=f"did you mean {' or '.join(close)}?" if close else "`atoll hub list` shows what is there",
        )
    found = _of_name(rows, reference)
    if not found:
        there = ", ".join(str(row.number) for row in rows[-10:])
        if reference.is_bare_name:
            raise AdapterNotFound(
                f"every version of {reference.name!r} is yanked", hint=f"name one to use it all the same: {rows[-1].adapter.name}@{rows[-1].number}"
            )
        tags = ", ".join(sorted(tag.tag for row in rows for tag in row.tags))
        raise AdapterNotFound(
            f"{text!r} is not in the hub", hint=f"{rows[0].adapter.name!r} has version {there}" + (f", tags {tags}" if tags else "")
        )
    if len({row.digest for row in found}) > 1:
        raise HubError(f"{text!r} means more than one version: {_shown(found)}", hint="write more digits of the digest")
    return found[-1]


def _of_name(rows: Sequence[VersionRow], reference: Reference) -> list[VersionRow]:
    if reference.number is not None:
        return [row for row in rows if row.number == reference.number]
    if reference.digest is not None:
        return [row for row in rows if row.digest.startswith(reference.digest)]
    if reference.tag is not None:
        return [row for row in rows if reference.tag in {tag.tag for tag in row.tags}]
    return [row for row in rows if row.yanked_at is None][-1:]


def _by_digest_alone(session: Session, reference: Reference, text: str, to_change: bool) -> VersionRow:
    found = list(session.scalars(_versions().where(VersionRow.digest.startswith(reference.digest or "")).order_by(VersionRow.id)))
    if not found:
        raise AdapterNotFound(f"no version with digest {text!r} in the hub", hint="`atoll hub list` shows what is there")
    if len({row.digest for row in found}) > 1:
        raise HubError(f"{text!r} means more than one version: {_shown(found)}", hint="write more digits of the digest")
    if to_change and len(found) > 1:
        raise HubError(f"{text!r} is published under {len(found)} names: {_shown(found)}", hint="say which one to change, by name and number")
    return found[0]


def _shown(rows: Sequence[VersionRow]) -> str:
    return ", ".join(f"{row.adapter.name}@{row.number} (sha256:{row.digest[:16]})" for row in rows[:5])


def _versions() -> Select[VersionRow]:
    return select(VersionRow).join(VersionRow.adapter)


def listing(
    session: Session, *, name: str | None, base: str | None, kind: str | None, tag: str | None, all_versions: bool, words: Sequence[str] = ()
) -> list[VersionRow]:
    """Versions by name and falling number; of each name only the newest that is not yanked, unless a name, a tag or `all_versions` asks for more.

    Raises HubError for a kind that there is not: it would find nothing, and say nothing.
    """
    if kind is not None and kind not in KINDS:
        raise HubError(f"there is no kind {kind[:40]!r} of adapters", hint=f"kinds are {', '.join(KINDS)}")
    query = _versions().order_by(AdapterRow.name_key, VersionRow.number.desc())
    if name is not None and name.endswith("/"):
        query = query.where(AdapterRow.name_key.startswith(name_key(name), autoescape=True))
    elif name is not None:
        query = query.where(AdapterRow.name_key == name_key(name))
        all_versions = True
    if tag is not None:
        query = query.where(VersionRow.tags.any(TagRow.tag == tag))
    elif not all_versions:
        alive = select(VersionRow.adapter_id, func.max(VersionRow.number).label("number")).where(VersionRow.yanked_at.is_(None))
        newest = alive.group_by(VersionRow.adapter_id).subquery()
        query = query.join(newest, (newest.c.adapter_id == VersionRow.adapter_id) & (newest.c.number == VersionRow.number))
    if base is not None:
        query = query.where(or_(func.lower(VersionRow.base_name) == base.lower(), VersionRow.base_weights == base))
    if kind is not None:
        query = query.where(VersionRow.kind == kind)
    for word in words:
        query = query.where(_mentions(word))
    return list(session.scalars(query))


def _mentions(word: str) -> ColumnElement[bool]:
    columns = (AdapterRow.name, VersionRow.description, VersionRow.task, VersionRow.licence, VersionRow.base_name, VersionRow.message)
    return or_(*(column.icontains(word, autoescape=True) for column in columns), VersionRow.tags.any(TagRow.tag.icontains(word, autoescape=True)))


def check_free(session: Session, name: str) -> AdapterRow | None:
    """The row of `name` if it has one. NameRefused if a living name differs only in case."""
    adapter = session.scalars(select(AdapterRow).where(AdapterRow.name_key == name_key(name))).one_or_none()
    if adapter is None or adapter.name == name:
        return adapter
    if session.scalars(select(VersionRow.id).where(VersionRow.adapter_id == adapter.id).limit(1)).first() is not None:
        raise NameRefused(
            f"{name!r} differs only in case from {adapter.name!r}, which is in the hub", hint=f"publish as {adapter.name!r}, or choose another name"
        )
    adapter.name = name
    return adapter


def add_version(session: Session, intake: Intake, name: str, *, tags: Sequence[str], message: str, licence: str | None) -> VersionRow:
    """Enter `intake` as the next number of `name`, or return the version of that name that has this content already (no longer yanked)."""
    adapter, now = check_free(session, name), datetime.now(UTC)
    if adapter is None:
        adapter = AdapterRow(name=name, name_key=name_key(name), next_number=1, created_at=now)
        session.add(adapter)
        session.flush()
    row = session.scalars(select(VersionRow).where(VersionRow.adapter_id == adapter.id, VersionRow.digest == intake.digest)).one_or_none()
    if row is None:
        row = _new_row(adapter, intake, message, licence, now)
        adapter.next_number += 1
        session.add(row)
        _add_content(session, intake)
        session.flush()
    row.yanked_at = None
    for tag in tags:
        move_tag(session, row, tag)
    return row


def _new_row(adapter: AdapterRow, intake: Intake, message: str, licence: str | None, now: datetime) -> VersionRow:
    manifest, base = intake.manifest, intake.manifest["base"]
    stated = intake.readme.get("license")
    return VersionRow(
        adapter=adapter,
        number=adapter.next_number,
        digest=intake.digest,
        kind=manifest["kind"],
        base_name=base.get("name"),
        base_weights=base.get("weights_fingerprint"),
        rank=intake.rank,
        num_parameters=intake.num_parameters,
        size_bytes=sum(file.size_bytes for file in intake.files),
        description=manifest.get("description") or manifest.get("title") or "",
        task=str(manifest.get("task") or (manifest.get("training") or {}).get("task") or ""),
        licence=licence or manifest.get("licence") or (stated if isinstance(stated, str) else None),
        message=message,
        created_at=now,
        yanked_at=None,
        tags=[],
    )


def _add_content(session: Session, intake: Intake) -> None:
    """Rows that belong to the digest: they may be there already, from another name."""
    for file in intake.files:
        session.merge(FileRow(digest=intake.digest, name=file.name, sha256=file.sha256, size_bytes=file.size_bytes))
    for position, parent in enumerate(intake.manifest.get("parents") or []):
        weight = parent.get("weight")
        facts = {"parent_digest": parent.get("digest"), "parent_name": parent.get("name"), "weight": None if weight is None else float(weight)}
        session.merge(ParentRow(digest=intake.digest, position=position, **facts))


def move_tag(session: Session, row: VersionRow, tag: str) -> None:
    """Point `tag` of the row's name to the row, from wherever it pointed before."""
    label = session.get(TagRow, (row.adapter_id, tag))
    if label is None:
        session.add(TagRow(adapter_id=row.adapter_id, tag=tag, version_id=row.id))
    else:
        label.version_id = row.id
    session.flush()
    session.expire_all()  # the loaded lists of tags are the old ones


def remove_version(session: Session, row: VersionRow) -> None:
    """Take a version out of the index with its tags, and what belongs to its content if no other name has it. Its number stays used."""
    digest = row.digest
    session.delete(row)
    session.flush()
    if session.scalars(select(VersionRow.id).where(VersionRow.digest == digest).limit(1)).first() is None:
        for kind in (FileRow, ParentRow):
            for each in session.scalars(select(kind).where(kind.digest == digest)):
                session.delete(each)
        session.flush()
