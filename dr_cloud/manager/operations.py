"""What all operations share: who may, in whose session, with which record left behind.

`_read` gives a session bound to the enterprise. `_change` does so for a mutating call: the caller is checked (first
whether the enterprise is its own, then its role), and the row of the audit log is written in the change's own
transaction, so there is no change without it. A call that is denied or refused changes nothing and is recorded too.
What is to happen outside (a site is to be told, a task is to begin) happens after the commit.

Rights: `Change.decide` asks the rights manager; a yes is written in the change's own transaction (`record`), a no rolls
it back and is written in another. An engine may take seconds, and no transaction may wait for it: an operation that is
`decided` is rolled back when it comes to a question, the question is asked, and the operation begins again with the
answer. Reading is decided by `_permit`, whose record is committed before anything is read.

Idempotency: `once` carries a key to the change that is made inside of it; the answer is stored in that change's
transaction. Two calls with one key at the same time meet at the row's key: one of them is rolled back.
"""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import structlog
from pydantic import BaseModel
from sqlalchemy import bindparam, select
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.access import ASKED, OF_OWN_PEOPLE, check_owner, check_role, no_enterprise
from dr_cloud.manager.desk import Desk
from dr_cloud.manager.events import Events
from dr_cloud.manager.fabric import Fabric
from dr_cloud.manager.policies import Policies
from dr_cloud.manager.publish import Publisher
from dr_cloud.manager.questions import by_person, elsewhere
from dr_cloud.manager.record import Entry, Recorder, append
from dr_cloud.manager.registry import Registry
from dr_cloud.manager.tasks import Tasks, new_task
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER, Database, plain
from dr_cloud.model.decision import Point
from dr_cloud.model.errors import (
    ConflictError,
    DeniedError,
    DrCloudError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from dr_cloud.model.principal import Principal
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.model.rights import Action, Answer, Question
from dr_cloud.recovery.report_key import ReportSigner
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.keyring import Keyring

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")
P = ParamSpec("P")
S = TypeVar("S", bound="Operations")
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
    desk: Desk
    policies: Policies
    recorder: Recorder
    report_signer: ReportSigner
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
_known: ContextVar[dict[str, Answer] | None] = ContextVar("known", default=None)
"""What has been answered in the operation under way."""
_ATTEMPTS_MAX: Final = 8


class _UnaskedError(Exception):
    """The operation has come to questions that have not been asked yet."""

    def __init__(self, questions: Sequence[Question]) -> None:
        super().__init__()
        self.questions = questions


def decided(operation: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Have what an operation asks the rights manager asked while it holds no transaction."""

    @functools.wraps(operation)
    def run(self: S, /, *arguments: P.args, **named: P.kwargs) -> R:
        known: dict[str, Answer] = {}
        reset = _known.set(known)
        try:
            for _ in range(_ATTEMPTS_MAX):
                try:
                    return operation(self, *arguments, **named)
                except _UnaskedError as unasked:
                    answers = self._context.desk.ask(unasked.questions)
                    for question, answer in zip(unasked.questions, answers, strict=True):
                        known[question.model_dump_json()] = answer
            raise ConflictError("what this is about changes all the time", "Try again.")
        finally:
            _known.reset(reset)

    return run


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
    decisions: list[Entry] = field(default_factory=list)
    """Every yes that it rests on."""
    refused: list[Entry] = field(default_factory=list)

    def decide(self, point: Point, subject: str, questions: Sequence[Question]) -> list[Answer]:
        """Go on only if all of these are a yes. Raises `DeniedError`. Only in an operation that is `decided`."""
        answers = self.ask(questions)
        entries = [Entry(point, subject, q, a) for q, a in zip(questions, answers, strict=True)]
        self.refused = [entry for entry in entries if not entry.answer.allow]
        if self.refused:
            raise denied(self.refused)
        self.decisions += entries
        return answers

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answers, without going by them. Only in an operation that is `decided`."""
        known = _known.get()
        assert known is not None, "an operation that asks in its transaction is not @decided"
        found = [known.get(question.model_dump_json()) for question in questions]
        if unasked := [question for question, answer in zip(questions, found, strict=True) if answer is None]:
            raise _UnaskedError(unasked)
        return [answer for answer in found if answer is not None]

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
                    _check_enterprise(session, enterprise)
                yield session
            except _UNSTORABLE as error:
                raise _unstorable() from error

    @contextmanager
    def _change(self, who: Principal, operation: str, enterprise: str, subject: str) -> Iterator[Change]:
        """Give the session of a change to things of `enterprise` (the empty string: to the provider's own)."""
        now_ns = self._context.clock_ns()
        change: Change | None = None
        acting: list[Entry] = []
        try:
            if enterprise != PROVIDER:
                check_owner(who, enterprise)
            elif who.enterprise is not None:
                raise ForbiddenError("this is the provider's own", "Ask the provider, or name your enterprise.")
            check_role(who, operation)
            acting = self._acting(who, operation, enterprise, subject)
            if any(not entry.answer.allow for entry in acting):
                raise denied(acting)
            bound = enterprise if enterprise != PROVIDER else EVERYONE
            with self._database.write(bound) as session:
                if enterprise != PROVIDER:
                    _check_enterprise(session, enterprise)
                change = Change(session, who, enterprise, now_ns, subject)
                yield change
                session.add(_audit(change.who, operation, change.enterprise, change.subject, now_ns, "done", ""))
                append(session, change.enterprise, acting + change.decisions, now_ns)
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
            refused: list[Entry] = []
            if isinstance(error, DeniedError):
                refused = change.refused if change is not None else acting
                self._say_where(error, refused)
            self._record(who, operation, enterprise, subject, now_ns, outcome, str(error), refused)
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
        self,
        who: Principal,
        operation: str,
        enterprise: str,
        subject: str,
        now_ns: int,
        outcome: str,
        reason: str,
        refused: Sequence[Entry] = (),
    ) -> None:
        """Write the audit row of a call that changed nothing. It is the caller's own where the thing is not."""
        owner = enterprise if who.enterprise is None else who.enterprise
        with self._database.write(EVERYONE) as session:
            if owner != PROVIDER and session.get(tables.Enterprise, owner) is None:
                owner = PROVIDER
            session.add(_audit(who, operation, owner, subject, now_ns, outcome, reason[:4096]))
            append(session, enterprise, refused, now_ns)

    # Rights.

    def _acting(self, who: Principal, operation: str, enterprise: str, subject: str) -> list[Entry]:
        """Ask whether the caller may act on an enterprise at all, from where it sits."""
        action = ASKED.get(operation)
        if enterprise == PROVIDER or who.place is None or action not in (Action.OPERATE, Action.LOGS):
            return []
        if who.enterprise is None and operation in OF_OWN_PEOPLE:
            return []
        with self._database.read(enterprise) as session:
            _check_enterprise(session, enterprise)
        question = by_person(who, action, enterprise)
        known = _known.get()
        answer = known.get(question.model_dump_json()) if known is not None else None
        if answer is None:
            (answer,) = self._context.desk.ask([question])
            if known is not None:
                known[question.model_dump_json()] = answer
        return [Entry("logs" if action is Action.LOGS else "operator", subject, question, answer)]

    def _permit(self, enterprise: str, point: Point, subject: str, questions: Sequence[Question]) -> list[Answer]:
        """Ask, and write what was answered, before anything is told. Raises `DeniedError`; `UnavailableError`."""
        return self._record_decisions(enterprise, point, subject, questions, self._context.desk.ask(questions))

    def _record_decisions(
        self, enterprise: str, point: Point, subject: str, questions: Sequence[Question], answers: Sequence[Answer]
    ) -> list[Answer]:
        entries = [Entry(point, subject, q, a) for q, a in zip(questions, answers, strict=True)]
        refused = [entry for entry in entries if not entry.answer.allow]
        try:
            self._context.recorder.write(enterprise, refused or entries)
        except SQLAlchemyError as error:
            log.error("record.unwritten", enterprise=enterprise, point=point, error=str(error))
            raise UnavailableError("the decision cannot be recorded, so it is a no", "Try again.") from error
        if refused:
            error_ = denied(refused)
            self._say_where(error_, refused)
            raise error_
        return list(answers)

    def _say_where(self, error: DeniedError, refused: Sequence[Entry]) -> None:
        """Add to a denial about a data center, to which others the same might be done."""
        question = next((e.question for e in refused if e.question is not None and e.question.place is not None), None)
        if question is None or question.action is Action.READ:
            return
        offers = elsewhere(question, self._context.config.data_centers)
        asked = [question for choices in offers.values() for choice in choices for question in choice]
        answers = iter(self._context.desk.ask(asked))
        for name, choices in offers.items():
            if any([all([next(answers).allow for _ in choice]) for choice in choices]):
                error.open.append(name)
        error.remedy = (
            f"Open to {question.enterprise}: {', '.join(sorted(error.open))}."
            if error.open
            else "No data center is open for it."
        )

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


_ENTERPRISES: Final = tables.Base.metadata.tables[tables.Enterprise.__tablename__]
_FIND_ENTERPRISE: Final = select(_ENTERPRISES.c.enterprise).where(_ENTERPRISES.c.enterprise == bindparam("whose"))


def _unstorable() -> InvalidError:
    return InvalidError("a name or a number can be none of any thing", "Use printable characters and 64-bit numbers.")


def _check_enterprise(session: Session, enterprise: str) -> None:
    if plain(session, enterprise).execute(_FIND_ENTERPRISE, {"whose": enterprise}).first() is None:
        raise no_enterprise(enterprise)


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


def denied(refused: Sequence[Entry]) -> DeniedError:
    """Return the error for decisions that are a no."""
    reasons = list(dict.fromkeys(reason for entry in refused for reason in entry.answer.reasons))
    return DeniedError(
        f"policy denies it: {'; '.join(reasons)}",
        "See which data centers are open: dr-cloud rights explain",
        reasons,
        refused[0].answer.revision,
    )


def missing(what: str, name: str) -> NotFoundError:
    """Return the error for a thing that is not there, or not the caller's."""
    return NotFoundError(f"there is no {what} {name!r}", "Check the name; list what there is.")
