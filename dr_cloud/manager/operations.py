"""What all operations share: who may, in whose session, with which record left behind.

`_read` gives a session bound to the enterprise. `_change` does so for a mutating call: the caller is checked (first
whether the enterprise is its own, then its role), and the row of the audit log is written in the change's own
transaction, so there is no change without it. A call that is denied or refused changes nothing and is recorded too.
What is to happen outside (a site is to be told, a task is to begin) happens after the commit.

Idempotency: `once` carries a key to the change that is made inside of it; the answer is stored in that change's
transaction. Two calls with one key at the same time meet at the row's key: one of them is rolled back.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, select, tuple_
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from dr_cloud.manager import tables
from dr_cloud.manager.access import check_owner, check_role, no_enterprise
from dr_cloud.manager.events import Events
from dr_cloud.manager.fabric import Fabric
from dr_cloud.manager.publish import Publisher
from dr_cloud.manager.registry import Registry
from dr_cloud.manager.tasks import Tasks, new_task
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER, Database
from dr_cloud.model.cloud import Page, PageRequest
from dr_cloud.model.errors import ConflictError, DrCloudError, ForbiddenError, InvalidError, NotFoundError
from dr_cloud.model.principal import Principal
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.keyring import Keyring

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")
log = structlog.get_logger(__name__)


Clock = Callable[[], int]
"""Nanoseconds since the epoch."""


@dataclass(frozen=True)
class Context:
    """What the operations stand on."""

    database: Database
    fabric: Fabric
    authority: Authority
    keyring: Keyring
    config: ProviderConfig
    clock_ns: Clock
    work_dir: Path
    api_url: str
    tasks: Tasks
    events: Events
    registry: Registry
    publisher: Publisher
    follow_seconds: float
    """How long a task waits until sites follow their orders."""


@dataclass
class _Once:
    principal: str
    key: str
    digest: str


_audited = itertools.count(1)
"""Orders audit rows of one moment, in one process."""
_once: ContextVar[_Once | None] = ContextVar("once", default=None)


@dataclass
class Change:
    """A mutating call under way."""

    session: Session
    who: Principal
    enterprise: str
    now_ns: int
    subject: str
    registry: bool = False
    """Whether the registry's object is to be written anew."""
    after: list[Callable[[], None]] = field(default_factory=list)
    """What is to be done once it is committed."""
    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    answer: BaseModel | None = None

    def done(self, answer: M) -> M:
        """Note the call's answer, and return it."""
        self.answer = answer
        return answer

    def event(self, kind: str, subject: str, **data: Any) -> None:
        """Tell those who watch, once it is committed."""
        self.events.append((kind, subject, data))

    def task(
        self, type_: str, inputs: dict[str, Any], *, vpg: str | None = None, site: str | None = None
    ) -> tables.Task:
        """Add a task, which begins after the commit."""
        row = new_task(self.enterprise, type_, inputs, vpg, site, self.now_ns, self.who.name)
        self.session.add(row)
        self.event("task", row.id, type=type_, status=row.status, vpg=vpg)
        return row


class Operations:
    """The base of the operations on each noun."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._database = context.database

    @contextmanager
    def _read(self, who: Principal, operation: str, enterprise: str | None) -> Iterator[Session]:
        """Give a session bound to `enterprise` (None: to all that the caller may see)."""
        if enterprise is None:
            bound = EVERYONE if who.enterprise is None else who.enterprise
        else:
            check_owner(who, enterprise)
            bound = enterprise
        check_role(who, operation)
        with self._database.read(bound) as session:
            try:
                if enterprise is not None:
                    _enterprise_row(session, enterprise)
                yield session
            except _UNSTORABLE as error:
                raise _unstorable() from error

    @contextmanager
    def _change(self, who: Principal, operation: str, enterprise: str, subject: str) -> Iterator[Change]:
        """Give the session of a change to things of `enterprise` (the empty string: to the provider's own)."""
        now_ns = self._context.clock_ns()
        change: Change | None = None
        try:
            if enterprise != PROVIDER:
                check_owner(who, enterprise)
            elif who.enterprise is not None:
                raise ForbiddenError("this is the provider's own", "Ask the provider, or name your enterprise.")
            check_role(who, operation)
            bound = enterprise if enterprise != PROVIDER else EVERYONE
            with self._database.write(bound) as session:
                if enterprise != PROVIDER:
                    _enterprise_row(session, enterprise)
                change = Change(session, who, enterprise, now_ns, subject)
                yield change
                session.add(_audit(change.who, operation, change.enterprise, change.subject, now_ns, "done", ""))
                self._remember(change)
                if change.registry:
                    self._context.registry.touch(session, change.enterprise)
        except _UNSTORABLE as error:
            raise _unstorable() from error
        except IntegrityError as error:
            log.info("change.collision", operation=operation, error=str(error.orig))
            refusal = ConflictError(f"{subject} exists already", "Choose another name, or look at what is there.")
            self._record(who, operation, enterprise, subject, now_ns, "refused", str(refusal))
            raise refusal from error
        except DrCloudError as error:
            outcome = "denied" if isinstance(error, ForbiddenError) else "refused"
            self._record(who, operation, enterprise, subject, now_ns, outcome, str(error))
            raise
        self._context.events.emit(change.enterprise, now_ns, change.events)
        for act in change.after:
            try:
                act()
            except DrCloudError as error:  # what was committed stands; the next report or start makes it good
                log.warning("change.after", operation=operation, subject=subject, error=str(error))
        self._context.registry.wake()
        self._context.tasks.wake()

    def _record(
        self, who: Principal, operation: str, enterprise: str, subject: str, now_ns: int, outcome: str, reason: str
    ) -> None:
        """Write the audit row of a call that changed nothing. It is the caller's own where the thing is not."""
        owner = enterprise if who.enterprise is None else who.enterprise
        with self._database.write(EVERYONE) as session:
            if owner != PROVIDER and session.get(tables.Enterprise, owner) is None:
                owner = PROVIDER
            session.add(_audit(who, operation, owner, subject, now_ns, outcome, reason[:4096]))

    def _remember(self, change: Change) -> None:
        once = _once.get()
        if once is None or change.answer is None:
            return
        blank = {name: "" for name, info in type(change.answer).model_fields.items() if info.repr is False}
        change.session.add(
            tables.Idempotency(
                enterprise=change.enterprise,
                principal=once.principal,
                key=once.key,
                digest=once.digest,
                answer=change.answer.model_copy(update=blank).model_dump_json(),
                created_ns=change.now_ns,
            )
        )

    def once(self, who: Principal, key: str, digest: str, kind: type[M], call: Callable[[], M]) -> M:
        """Make the creating `call` at most once for (who, key).

        Args:
            who: The caller.
            key: Chosen by the caller.
            digest: Of the request: the same key for another request is a `ConflictError`.
            kind: What `call` answers with.
            call: One operation of this class. A secret in its answer is blank when the answer is given again.
        """
        if (answer := self._answer(who, key, digest)) is not None:
            return kind.model_validate_json(answer)
        reset = _once.set(_Once(who.id, key, digest))
        try:
            return call()
        except ConflictError:
            # Perhaps another call with this key was faster: then its answer is the answer.
            if (answer := self._answer(who, key, digest)) is not None:
                return kind.model_validate_json(answer)
            raise
        finally:
            _once.reset(reset)

    def _answer(self, who: Principal, key: str, digest: str) -> str | None:
        with self._database.read(EVERYONE if who.enterprise is None else who.enterprise) as session:
            wanted = select(tables.Idempotency).where(
                tables.Idempotency.principal == who.id, tables.Idempotency.key == key
            )
            row = session.scalars(wanted).first()
        if row is None:
            return None
        if row.digest != digest:
            raise ConflictError(
                "this idempotency key was used for another request", "Draw a new key for every new request."
            )
        return row.answer


_UNSTORABLE = (DataError, UnicodeEncodeError, OverflowError)
"""What a driver raises for a value that its database cannot hold: a NUL, half a surrogate pair, a giant number."""


def _unstorable() -> InvalidError:
    return InvalidError("a name or a number can be none of any thing", "Use printable characters and 64-bit numbers.")


def _enterprise_row(session: Session, enterprise: str) -> tables.Enterprise:
    row = session.get(tables.Enterprise, enterprise)
    if row is None:
        raise no_enterprise(enterprise)
    return row


def _audit(
    who: Principal, operation: str, enterprise: str, subject: str, now_ns: int, outcome: str, reason: str
) -> tables.Audit:
    return tables.Audit(
        enterprise=enterprise,
        id=f"{now_ns:020d}-{next(_audited):010d}-{uuid.uuid4().hex[:8]}",
        at_ns=now_ns,
        principal=who.id,
        principal_name=who.name,
        role=who.role.value,
        operation=operation,
        subject=subject[:512],
        outcome=outcome,
        reason=reason,
    )


def missing(what: str, name: str) -> NotFoundError:
    """Return the error for a thing that is not there, or not the caller's."""
    return NotFoundError(f"there is no {what} {name!r}", "Check the name; list what there is.")


def encode_cursor(values: Sequence[Any]) -> str:
    """Return the cursor after an entry with these keys."""
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def decode_cursor(text: str, types: Sequence[type]) -> list[Any]:
    """Return the keys in a cursor. Raises `InvalidError`."""
    try:
        values = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if not isinstance(values, list) or [type(value) for value in values] != list(types):
            raise ValueError
        if any(isinstance(value, int) and not -(1 << 63) <= value < 1 << 63 for value in values):
            raise ValueError
        if any(isinstance(value, str) and "\0" in value.encode().decode() for value in values):
            raise ValueError  # encode() refuses half a surrogate pair
    except (ValueError, binascii.Error, RecursionError):
        raise InvalidError("the cursor is none of this list", "Begin again without one.") from None
    return values


def paged(
    session: Session,
    wanted: Select[R],
    keys: Sequence[InstrumentedAttribute[Any]],
    page: PageRequest,
    view: Callable[[R], M],
    *,
    newest_first: bool = False,
) -> Page[M]:
    """Return one page of `wanted`, ordered by `keys`, each row turned into its view."""
    types = [key.type.python_type for key in keys]
    if page.cursor is not None:
        after = tuple_(*decode_cursor(page.cursor, types))
        here: ColumnElement[Any] = tuple_(*keys)
        wanted = wanted.where(here < after if newest_first else here > after)
    order = [key.desc() if newest_first else key.asc() for key in keys]
    rows = session.scalars(wanted.order_by(*order).limit(page.limit + 1)).all()
    more = len(rows) > page.limit
    last = rows[page.limit - 1] if more else None
    return Page(
        items=[view(row) for row in rows[: page.limit]],
        next_cursor=encode_cursor([getattr(last, key.key) for key in keys]) if last is not None else None,
    )
