"""The tables of the hub's index, and Version, the frozen value that callers get.

The index holds what is asked for often; the files under a digest stay the truth. Columns that repeat a manifest say so. Schema changes go through
migrations/, one numbered file each; a test compares the migrated schema with these classes.

Used by store.py and ledger.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, DateTime, Float, ForeignKey, Index, MetaData, String, Text, TypeDecorator, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time. SQLite keeps no time zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Record(DeclarativeBase):
    """Base of the tables. Every constraint has a name, so that a later migration can change it on any database."""

    metadata = MetaData(
        naming_convention={"ix": "ix_%(column_0_label)s", "uq": "uq_%(table_name)s_%(column_0_name)s", "fk": "fk_%(table_name)s_%(column_0_name)s"}
    )


class AdapterRow(Record):
    """A name. The row stays when its versions are deleted, so that a number is never given twice."""

    __tablename__ = "adapters"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(193))
    name_key: Mapped[str] = mapped_column(String(193), unique=True)
    next_number: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class VersionRow(Record):
    """A name's number, pointing to a digest. kind to task repeat the manifest, for listing and search."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number", name="uq_versions_number"),
        UniqueConstraint("adapter_id", "digest", name="uq_versions_content"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"))
    number: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64), index=True)
    kind: Mapped[str] = mapped_column(String(32))
    base_name: Mapped[str | None] = mapped_column(String(512), index=True)
    base_weights: Mapped[str | None] = mapped_column(String(64))
    rank: Mapped[int | None]
    num_parameters: Mapped[int | None]
    size_bytes: Mapped[int]
    description: Mapped[str] = mapped_column(Text)
    task: Mapped[str] = mapped_column(String(256))
    licence: Mapped[str | None] = mapped_column(String(256))
    message: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    yanked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    adapter: Mapped[AdapterRow] = relationship(lazy="joined", innerjoin=True)
    tags: Mapped[list[TagRow]] = relationship(lazy="selectin", back_populates="version", cascade="all, delete-orphan")


class TagRow(Record):
    """A movable label of a name: it points to one of that name's versions."""

    __tablename__ = "tags"
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(64), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id"), index=True)
    version: Mapped[VersionRow] = relationship(back_populates="tags")


class FileRow(Record):
    """One file of a digest. What no row names, garbage collection may remove."""

    __tablename__ = "files"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int]


class ParentRow(Record):
    """One adapter that a composed digest was made of; repeats the manifest, so that children can be found from a parent."""

    __tablename__ = "parents"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    parent_digest: Mapped[str | None] = mapped_column(String(64), index=True)
    parent_name: Mapped[str | None] = mapped_column(String(256))
    weight: Mapped[float | None] = mapped_column(Float)


class ScoreRow(Record):
    """One adapter, or a bare base, on one task. Rows are only ever added: the newest counts, the others are its history."""

    __tablename__ = "scores"
    __table_args__ = (Index("ix_scores_task", "task", "task_version"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    task: Mapped[str] = mapped_column(String(256))
    task_version: Mapped[str] = mapped_column(String(64))
    metric: Mapped[str] = mapped_column(String(64))
    value: Mapped[float] = mapped_column(Float)
    stderr: Mapped[float | None] = mapped_column(Float)
    n: Mapped[int]
    failures: Mapped[int]
    options_value: Mapped[float | None] = mapped_column(Float)
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RunRow(Record):
    """One training or composing, finished or not, with the config it ran with."""

    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    name: Mapped[str | None] = mapped_column(String(193), index=True)
    digest: Mapped[str | None] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(16))
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    seconds: Mapped[float | None] = mapped_column(Float)
    message: Mapped[str] = mapped_column(Text)
    cost: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    folder: Mapped[str | None] = mapped_column(Text)


@dataclass(frozen=True)
class Version:
    """One immutable version of an adapter. `path` is its folder; `Hub.path` makes sure that it is there."""

    name: str
    number: int
    digest: str
    kind: str
    base: str | None
    rank: int | None
    num_parameters: int | None
    size_bytes: int
    description: str
    task: str
    licence: str | None
    message: str
    tags: tuple[str, ...]
    created: datetime
    yanked: bool
    path: Path
    left_out: tuple[str, ...] = ()  # what publish or pull found in the folder and did not store

    @property
    def ref(self) -> str:
        """`name@number`, which always means this content."""
        return f"{self.name}@{self.number}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for --json and HTTP. The path is left out: it belongs to this machine."""
        return {
            **{
                key: getattr(self, key) for key in ("name", "number", "digest", "kind", "base", "rank", "num_parameters", "size_bytes", "description")
            },
            **{"task": self.task, "licence": self.licence, "message": self.message, "tags": list(self.tags), "created": self.created.isoformat()},
            **{"yanked": self.yanked, "left_out": list(self.left_out)},
        }


def version_of(row: VersionRow, adapters: Path, left_out: tuple[str, ...] = ()) -> Version:
    """The frozen value of an index row; `adapters` is the folder of materialised versions."""
    return Version(
        name=row.adapter.name,
        number=row.number,
        digest=row.digest,
        kind=row.kind,
        base=row.base_name,
        rank=row.rank,
        num_parameters=row.num_parameters,
        size_bytes=row.size_bytes,
        description=row.description,
        task=row.task,
        licence=row.licence,
        message=row.message,
        tags=tuple(sorted(tag.tag for tag in row.tags)),
        created=row.created_at,
        yanked=row.yanked_at is not None,
        path=adapters / row.digest,
        left_out=left_out,
    )
