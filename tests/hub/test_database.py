"""The database: migrations and models agree, newer schemas are refused, errors are sentences."""

from __future__ import annotations

import sqlite3

import pytest
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from atoll.errors import HubError, StorageError
from atoll.hub import Hub
from atoll.hub.database import database_errors, migrations
from atoll.hub.records import Record


def test_the_migrated_schema_is_the_models_schema(hub):
    """Two descriptions of one schema drift apart unless somebody compares them."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    engine = create_engine(f"sqlite:///{hub.root}/hub.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Record.metadata) == []
        assert context.get_current_revision() == migrations().get_current_head()
    engine.dispose()


def test_every_table_has_a_form_for_postgresql():
    """PostgreSQL by URL is promised: no column may need SQLite."""
    for table in Record.metadata.tables.values():
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))


def test_every_migration_is_numbered_in_order_and_says_why():
    """Migrations are read by whoever repairs a database at night."""
    scripts = list(migrations().walk_revisions())
    assert [script.revision for script in reversed(scripts)] == [f"{number:04}" for number in range(1, len(scripts) + 1)]
    assert all(script.module.__doc__ and script.module.upgrade.__doc__ for script in scripts)


def test_opening_again_keeps_everything_and_uses_the_write_ahead_log(hub, make):
    """A hub is opened by every command; readers must not wait for a publisher."""
    hub.publish(make(1), "a")
    assert Hub(hub.root).resolve("a").number == 1
    connection = sqlite3.connect(hub.root / "hub.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_readers_go_on_while_a_writer_writes(hub, make):
    """Serving resolves names while training publishes."""
    hub.publish(make(1), "a")
    with hub._database.write():
        assert Hub(hub.root).resolve("a").number == 1


def test_a_database_of_a_newer_atoll_is_left_alone(hub):
    """An old program that writes into a schema it does not know destroys it."""
    connection = sqlite3.connect(hub.root / "hub.db")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    with pytest.raises(HubError, match="newer") as caught:
        Hub(hub.root)
    assert "upgrade" in caught.value.hint


def test_a_failing_migration_changes_nothing(hub, monkeypatch):
    """Half a schema is worse than the old one."""
    import types

    connection = sqlite3.connect(hub.root / "hub.db")
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        connection.execute(f"DROP TABLE {name}")
    connection.commit()
    first = migrations()

    def upgrade() -> None:
        first.get_revision("0001").module.upgrade()
        raise RuntimeError("power cut")

    broken = types.SimpleNamespace(
        walk_revisions=first.walk_revisions, get_revision=lambda number: types.SimpleNamespace(module=types.SimpleNamespace(upgrade=upgrade))
    )
    monkeypatch.setattr("atoll.hub.database.migrations", lambda: broken)
    with pytest.raises(RuntimeError):
        Hub(hub.root)
    assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == []
    connection.close()
    monkeypatch.undo()
    assert Hub(hub.root).list() == ()


def test_a_file_that_is_no_database_and_a_url_that_is_none_are_sentences(tmp_path):
    """Not tracebacks; and a password in a URL is not printed."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hub.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(HubError, match="not a database"):
        Hub(tmp_path / "hub")
    for url in ("nonsense", "nosuch://user:secret@host/x"):
        with pytest.raises(HubError) as caught:
            Hub(tmp_path / "other", url)
        assert "secret" not in caught.value.message


def test_a_full_disk_in_the_database_is_a_storage_error():
    """SQLite says it in words of its own."""
    with pytest.raises(StorageError), database_errors():
        raise sqlite3.OperationalError("database or disk is full")


def test_importing_the_hub_loads_no_database_library_and_no_torch():
    """`atoll --help` must be quick, and the hub is an extra."""
    import subprocess
    import sys

    code = "import sys, atoll.hub, atoll.hub.names; print([m for m in ('torch', 'sqlalchemy', 'alembic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
