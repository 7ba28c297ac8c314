"""The hub's database: one engine, short transactions, one writer at a time, and a schema that brings itself up to date.

SQLite by default (write-ahead log; a writer takes the lock when it begins, so two publishers queue instead of failing half-way), PostgreSQL by URL
(an advisory lock does the same). Connections are opened for each transaction on SQLite: cheap, and safe across threads and processes.

Used by store.py and ledger.py.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event, exc
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from atoll.errors import AtollError, Busy, HubError, StorageError

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

BUSY_TIMEOUT_S = 60.0
_ADVISORY_KEY = 0x41746F6C  # "Atol": any constant; every Atoll process must use the same one


class Database:
    """Transactions on the hub's index. Opening it creates or migrates the schema."""

    def __init__(self, url: str, lock: Path) -> None:
        """`lock` is a file that serialises the first opening on this machine (switching SQLite to its write-ahead log cannot wait for itself)."""
        self._engine = _engine(url)
        self._writing = self._engine.execution_options(atoll_write=True)
        with FileLock(lock), database_errors():
            if self._engine.dialect.name == "sqlite":
                with self._engine.connect() as connection:
                    connection.connection.execute("PRAGMA journal_mode=WAL")  # stays with the file
            self._migrate()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent snapshot; never waits for a writer."""
        with database_errors(), Session(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """The only writer until the block ends: commits there, or rolls back on any exception."""
        with database_errors(), Session(self._writing) as session, session.begin():
            session.connection()  # take the lock now, not at the first statement
            yield session

    def _migrate(self) -> None:
        """Bring the schema up to date inside a writer's transaction: another process sees the old schema or the new one, nothing between."""
        from alembic.operations import Operations
        from alembic.runtime.migration import MigrationContext

        scripts = migrations()
        numbers = [script.revision for script in reversed(list(scripts.walk_revisions()))]
        with self._engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in numbers:
            raise HubError(
                f"the hub's database has schema {current}, which is newer than this Atoll knows ({numbers[-1]})",
                hint="upgrade Atoll (pip install -U atoll), or use another hub with ATOLL_HOME",
            )
        if current == numbers[-1]:
            return
        with self._writing.begin() as connection:
            context = MigrationContext.configure(connection, opts={"transactional_ddl": True})
            current = context.get_current_revision()  # again, now that nobody else can write
            with Operations.context(context):
                for number in numbers[numbers.index(current) + 1 if current else 0 :]:
                    scripts.get_revision(number).module.upgrade()
                    context.stamp(scripts, number)


def migrations() -> ScriptDirectory:
    """The numbered migrations. Their folder is data to Alembic: plain files and no env.py, since only the hub runs them."""
    from alembic.script import ScriptDirectory

    folder = Path(__file__).with_name("migrations")
    return ScriptDirectory(folder, version_locations=[folder])


def _engine(url: str) -> Engine:
    to_json = partial(json.dumps, allow_nan=False, ensure_ascii=False, sort_keys=True)
    try:
        if not url.startswith("sqlite"):
            return _with_write_lock(create_engine(url, json_serializer=to_json, pool_pre_ping=True))
        engine = create_engine(url, json_serializer=to_json, poolclass=NullPool, connect_args={"timeout": BUSY_TIMEOUT_S})
    except (exc.ArgumentError, exc.NoSuchModuleError, ModuleNotFoundError) as error:
        raise HubError(
            f"cannot use the database URL {_without_password(url)!r}: {error}",
            hint="for example sqlite:///hub.db or postgresql+psycopg://user@host/atoll",
        ) from error

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions by itself: we say which kind
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")  # a published version survives a power cut

    return _with_write_lock(engine)


def _with_write_lock(engine: Engine) -> Engine:
    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("atoll_write", False)
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
        elif writes and connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_KEY})")

    return engine


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    try:
        return make_url(url).render_as_string(hide_password=True)
    except exc.ArgumentError:
        return "..." if "@" in url else url


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn the driver's errors into ours. The sentences are SQLite's own; PostgreSQL's pass in the last case with theirs."""
    try:
        yield
    except AtollError:
        raise
    except (exc.DBAPIError, sqlite3.Error) as error:
        said = str(error.orig if isinstance(error, exc.DBAPIError) else error)
        if "disk is full" in said or "disk I/O error" in said:
            raise StorageError(
                f"the hub's database could not be written: {said}; nothing was changed", hint="free some space and try again"
            ) from error
        if "readonly" in said or "unable to open" in said:
            raise StorageError(
                f"the hub's database cannot be opened for writing: {said}", hint="check the folder, or choose another with ATOLL_HOME"
            ) from error
        if "locked" in said:
            raise Busy(f"another process held the hub's database for {BUSY_TIMEOUT_S:.0f} s", hint="wait for it to finish and try again") from error
        raise HubError(f"the hub's database refused: {said}", hint="if its file is damaged, restore it from a backup") from error


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return "sqlite:///" + os.fspath(path.absolute())
