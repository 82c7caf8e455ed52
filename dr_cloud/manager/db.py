"""Opening the manager's database: SQLite by default, PostgreSQL by URL.

SQLite: write-ahead log, foreign keys, every commit synced. Transactions that will write say so when they begin (BEGIN
IMMEDIATE), so two of them wait for each other instead of failing half-way.

PostgreSQL: the role must be an ordinary one. A superuser, or one that bypasses row-level security, is refused: the
policies that keep tenants apart would not hold for it.

Schema: Alembic migrations (`dr_cloud/manager/migrations`), run at each start. On PostgreSQL one process at a time runs
them (an advisory lock); on SQLite the first writer does.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, OperationalError

from dr_cloud.model.errors import DrCloudError, UnavailableError

MIGRATIONS: Final = Path(__file__).parent / "migrations"
_BUSY_SECONDS: Final = 30
_MIGRATION_LOCK: Final = 0x44524C31
WRITES: Final = "dr_cloud_writes"
"""Execution option of a connection whose transaction will write."""


def open_engine(url: str) -> Engine:
    """Return an engine for `url`; nothing is created yet. Raises `DrCloudError` for a URL that cannot be used."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise DrCloudError(
            "the database's URL cannot be read", "Write sqlite:////path/file.db or postgresql://user@host/name."
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": _BUSY_SECONDS}, pool_size=16, max_overflow=48)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if backend == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(parsed, pool_pre_ping=True, pool_size=16, max_overflow=48)
    raise DrCloudError(f"a database of kind {backend} cannot be used", "Use sqlite or postgresql.")


def migrate(engine: Engine) -> None:
    """Bring the schema to this version. Raises `DrCloudError` if the database cannot be reached or must not be used."""
    try:
        with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                _refuse_mighty_role(connection)
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            command.upgrade(alembic_config(connection), "head")
    except OperationalError as error:
        raise UnavailableError(
            f"the database cannot be opened: {str(error.orig).splitlines()[0]}", "Check its URL, and that it runs."
        ) from error


def alembic_config(connection: Connection) -> Config:
    """Return Alembic's configuration for an open connection, whose transaction it uses."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _refuse_mighty_role(connection: Connection) -> None:
    role = connection.execute(
        text("SELECT rolname, rolsuper OR rolbypassrls AS mighty FROM pg_roles WHERE rolname = current_user")
    ).one()
    if role.mighty:
        raise DrCloudError(
            f"database role {role.rolname} bypasses row-level security",
            "Give the manager an ordinary role that owns its database: CREATE ROLE … LOGIN NOSUPERUSER NOBYPASSRLS.",
        )


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by the listener below, never by the driver
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", f"busy_timeout={_BUSY_SECONDS * 1000}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
