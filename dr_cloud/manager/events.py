"""Events: a numbered, bounded list of what changed, for those who watch. A hint, not a record.

They are written after the change they tell of, in a transaction of their own: an event may be lost in a crash, so a
watcher that begins looks at the things themselves first. Numbers ascend in the order in which events become visible
(on PostgreSQL a lock sees to it; SQLite has one writer), so nobody who asks for what comes after misses one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.tenancy import EVERYONE, Database

KEPT_MAX: Final = 2000
"""For each enterprise."""
_PRUNE_EVERY: Final = 256
_LOCK: Final = 0x44524C32


class Events:
    """The writer of the table of events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def emit(self, enterprise: str, at_ns: int, events: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Add events: (kind, subject, data)."""
        if not events:
            return
        with self._database.write(EVERYONE) as session:
            if session.get_bind().dialect.name == "postgresql":
                session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            number = session.scalar(select(func.max(tables.Event.number))) or 0
            for kind, subject, data in events:
                number += 1
                session.add(
                    tables.Event(
                        enterprise=enterprise, number=number, at_ns=at_ns, kind=kind, subject=subject, data=data
                    )
                )
                if number % _PRUNE_EVERY == 0:
                    self._prune(session)

    def _prune(self, session: Session) -> None:
        counted = select(tables.Event.enterprise, func.count(tables.Event.number)).group_by(tables.Event.enterprise)
        for enterprise, count in session.execute(counted).all():
            if count > KEPT_MAX:
                numbers = select(tables.Event.number).where(tables.Event.enterprise == enterprise)
                first_kept = session.scalar(numbers.order_by(tables.Event.number.desc()).offset(KEPT_MAX - 1).limit(1))
                gone = delete(tables.Event).where(
                    tables.Event.enterprise == enterprise, tables.Event.number < first_kept
                )
                session.execute(gone)
