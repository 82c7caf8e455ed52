"""The one place that every query passes: a session is bound to an enterprise, and sees and changes nothing else.

`Database.read` and `Database.write` give sessions. One bound to an enterprise has the condition `enterprise = …` added
to each statement, for every entity in it, in joins, sub-queries and relationships too; statements that are not
made of owned entities (plain tables, text) are refused; so is a row of another enterprise at the flush. On PostgreSQL
the same is said once more by row-level security: the transaction carries `dr_cloud.enterprise`, and the policies of all
owned tables compare with it.

What is asked hundreds of times a second is asked with plain statements, which cost a tenth (`plain`); each names the
enterprise itself, and there are few.

A session that is bound to `EVERYONE` is the provider's own work: it sees all. A statement outside of any bound session
sees nothing on PostgreSQL, as the setting is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction, with_loader_criteria
from sqlalchemy.orm.unitofwork import UOWTransaction

from dr_cloud.manager.db import WRITES
from dr_cloud.manager.tables import Owned

EVERYONE: Final = "*"
"""No enterprise can have this name."""
PROVIDER: Final = ""
"""Whose the provider's own rows are."""


class TenancyError(RuntimeError):
    """A bug of the manager: a statement would have crossed from one enterprise to another."""


class BoundSession(Session):
    """A session that is bound to one enterprise (`info["enterprise"]`)."""


class Database:
    """Gives bound sessions."""

    def __init__(self, engine: Engine) -> None:
        """Use an engine whose schema is up to date."""
        self.engine = engine
        self._writes = engine.execution_options(**{WRITES: True})

    @contextmanager
    def read(self, enterprise: str) -> Iterator[Session]:
        """Give a session for reading; nothing of it is kept."""
        with BoundSession(self.engine, info={"enterprise": enterprise}, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self, enterprise: str) -> Iterator[Session]:
        """Give a session whose transaction is committed at the end, and rolled back by any error."""
        with BoundSession(self._writes, info={"enterprise": enterprise}, expire_on_commit=False) as session:
            yield session
            session.commit()


def plain(session: Session, enterprise: str) -> Connection:
    """Return a session's connection, for plain statements that name `enterprise` in each condition and row.

    Nobody adds it to them. Raises `TenancyError` if the session is another enterprise's.
    """
    if session.info["enterprise"] not in (EVERYONE, enterprise):
        raise TenancyError(f"a statement about {enterprise!r}, in a session of {session.info['enterprise']!r}")
    session.flush()
    return session.connection()


@event.listens_for(BoundSession, "after_begin")
def _tell_database(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(
            text("SELECT set_config('dr_cloud.enterprise', :enterprise, true)"),
            {"enterprise": session.info["enterprise"]},
        )


@event.listens_for(BoundSession, "do_orm_execute")
def _restrict(state: ORMExecuteState) -> None:
    enterprise: str = state.session.info["enterprise"]
    if enterprise == EVERYONE or state.is_column_load or state.is_relationship_load:
        return  # the criteria of the query that loaded the parent go with its relationships
    if not state.all_mappers or state.is_insert:
        raise TenancyError(f"a statement that is not made of owned entities, in a session of {enterprise!r}")
    for mapper in state.all_mappers:
        if not issubclass(mapper.class_, Owned):
            raise TenancyError(f"{mapper.class_.__name__} is the provider's alone, not for {enterprise!r}")
    state.statement = state.statement.options(
        with_loader_criteria(Owned, lambda entity: entity.enterprise == enterprise, include_aliases=True)
    )


@event.listens_for(BoundSession, "before_flush")
def _check_rows(session: Session, _context: UOWTransaction, _instances: Any) -> None:
    enterprise: str = session.info["enterprise"]
    if enterprise == EVERYONE:
        return
    for row in (*session.new, *session.dirty, *session.deleted):
        if not isinstance(row, Owned) or row.enterprise != enterprise:
            raise TenancyError(f"a row of {type(row).__name__} that is not of {enterprise!r}")
