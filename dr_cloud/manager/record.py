"""The record of decisions: a chain for each enterprise, written in the transaction of what a decision permits.

Consistency: whoever adds to a chain holds the row of its head, so numbers have no gaps and every row carries the hash
of the one before (`dr_cloud.model.decision`). A decision whose row cannot be written permits nothing: the transaction
fails as a whole. A denial permits nothing and has a transaction of its own. What permits reading is written before
anything is read; those who read at the same time share a transaction (`Recorder`), each waits until it is committed.

Who can write rows can also forge the end of a chain. So heads go into the registry's objects in the store, sealed, with
every change of the registry and at least every minute while decisions are made: a chain that does not contain them, or
ends before them, has been tampered with. What is younger than the newest object has no such witness yet.

Crash recovery: a database that was rebuilt from the store has the heads, not the rows. The first row that is added says
so (point `rebuild`), and is chained to the head: a record begins with number 1 or with such a row.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.tenancy import EVERYONE, Database, plain
from dr_cloud.model.decision import Decision, DecisionCheck, Point
from dr_cloud.model.rights import Answer, Question

_AT_A_TIME = 1000
_ROWS = tables.Base.metadata.tables[tables.Decision.__tablename__]
_HEADS = tables.Base.metadata.tables[tables.DecisionHead.__tablename__]
_FIND_HEAD = select(_HEADS.c.number, _HEADS.c.hash).where(_HEADS.c.enterprise == bindparam("whose")).with_for_update()
_MOVE_HEAD = update(_HEADS).where(_HEADS.c.enterprise == bindparam("whose"))
_ADD_HEAD, _ADD_ROWS = insert(_HEADS), insert(_ROWS)


@dataclass(frozen=True)
class Entry:
    """One decision that is to be written."""

    point: Point
    subject: str
    question: Question | None
    """None: it was no question (`policies`, `rebuild`)."""
    answer: Answer


class Head(NamedTuple):
    """A chain's end, as someone has noted it."""

    number: int
    hash: str


def append(session: Session, enterprise: str, entries: Sequence[Entry], at_ns: int) -> None:
    """Add decisions to an enterprise's chain, in the session's transaction."""
    if not entries:
        return
    connection = plain(session, enterprise)
    found = connection.execute(_FIND_HEAD, {"whose": enterprise}).one_or_none()
    if found is None:
        connection.execute(_ADD_HEAD, {"enterprise": enterprise, "number": 0, "hash": ""})
    head = Head(*found) if found is not None else Head(0, "")
    rows = []
    for entry in entries:
        made = _made(enterprise, head, entry, at_ns)
        head = Head(made.number, made.digest())
        rows.append({**made.model_dump(), "hash": head.hash})
    connection.execute(_ADD_ROWS, rows)
    connection.execute(_MOVE_HEAD, {"whose": enterprise, "number": head.number, "hash": head.hash})


def _made(enterprise: str, head: Head, entry: Entry, at_ns: int) -> Decision:
    question = entry.question
    return Decision(
        enterprise=enterprise,
        number=head.number + 1,
        id=uuid.uuid4().hex,
        at_ns=at_ns,
        point=entry.point,
        action=question.action.value if question is not None else "",
        subject=entry.subject[:512],
        revision=entry.answer.revision,
        input=question.model_dump(mode="json", by_alias=True) if question is not None else {},
        allow=entry.answer.allow,
        reasons=entry.answer.reasons,
        previous=head.hash,
        hash="",
    )


class _Waiting:
    """Decisions of one caller, who waits until they are written."""

    def __init__(self, enterprise: str, entries: Sequence[Entry]) -> None:
        self.enterprise = enterprise
        self.entries = entries
        self.written = False
        self.error: SQLAlchemyError | None = None


class Recorder:
    """Writes decisions in transactions of their own: whoever comes first writes for all who wait behind."""

    def __init__(self, database: Database, clock_ns: Callable[[], int]) -> None:
        """Write into `database`."""
        self._database = database
        self._clock_ns = clock_ns
        self._waiting: list[_Waiting] = []
        self._queue = threading.Lock()
        self._writing = threading.Lock()

    def write(self, enterprise: str, entries: Sequence[Entry]) -> None:
        """Return when they are committed. Raises `SQLAlchemyError`: then they are not."""
        mine = _Waiting(enterprise, entries)
        with self._queue:
            self._waiting.append(mine)
        with self._writing:
            if not mine.written and mine.error is None:
                with self._queue:
                    batch, self._waiting = self._waiting, []
                self._write(batch)
        if mine.error is not None:
            raise mine.error
        assert mine.written

    def _write(self, batch: Sequence[_Waiting]) -> None:
        chains: dict[str, list[Entry]] = {}
        for one in batch:
            chains.setdefault(one.enterprise, []).extend(one.entries)
        try:
            with self._database.write(EVERYONE) as session:
                for enterprise, entries in sorted(chains.items()):  # one order for all, so that no two lock each other
                    append(session, enterprise, entries, self._clock_ns())
        except SQLAlchemyError as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            for one in batch:  # nobody is to be refused for what another has brought
                self._write([one])
        else:
            for one in batch:
                one.written = True


def view(row: tables.Decision) -> Decision:
    """Return a decision as it is shown."""
    values: dict[str, Any] = {name: getattr(row, name) for name in Decision.model_fields}
    return Decision.model_validate(values)


def check(session: Session, enterprise: str, witnesses: Sequence[Head]) -> DecisionCheck:
    """Look whether an enterprise's record is whole, and holds every head that is known."""
    table = tables.Decision
    kept = session.get(tables.DecisionHead, enterprise)
    wanted = {head.number: head.hash for head in witnesses if head.number}
    if kept is not None and kept.number:
        wanted.setdefault(kept.number, kept.hash)
        if wanted[kept.number] != kept.hash:
            wanted[kept.number] = "two heads"
    first, last, problem, note = 0, Head(0, ""), "", ""
    rows = session.scalars(
        select(table).where(table.enterprise == enterprise).order_by(table.number),
        execution_options={"yield_per": _AT_A_TIME},
    )
    for row in rows:
        found = view(row)
        if not first:
            first = found.number
            begins = (first == 1 and not found.previous) or (first > 1 and found.point == "rebuild")
            problem = "" if begins else f"decisions before {first} are missing"
            note = found.reasons[0] if begins and first > 1 else ""
        elif found.number != last.number + 1:
            problem = f"decision {last.number + 1} is missing"
        elif found.previous != last.hash:
            problem = f"decision {found.number} does not follow on {last.number}"
        if not problem and found.digest() != found.hash:
            problem = f"decision {found.number} was changed"
        if not problem and wanted.get(found.number, found.hash) != found.hash:
            problem = f"decision {found.number} is not the one that was witnessed"
        if problem:
            break
        last = Head(found.number, found.hash)
    newest = max(wanted, default=0)
    if not problem and last.number < newest:
        problem = f"the record ends with {last.number}; decision {newest} was made"
    return DecisionCheck(
        enterprise=enterprise,
        whole=not problem,
        first=first,
        last=last.number,
        hash=last.hash,
        witnesses=len(witnesses),
        problem=problem,
        note=note,
    )
