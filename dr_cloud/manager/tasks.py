"""Tasks: rows, and the pool of workers that takes their steps.

A task is a sequence of steps of one function: each call looks at what is, does a little, and says `Later` (call me
again) or `Done`; what it must remember between steps is in the row. So a task that waits for a site holds no thread,
and a manager that restarts goes on: a task that was running is stepped again if its type is safe to repeat, else it
ends as HadException with that reason.

One enterprise never has more than half of the workers at once. A step that raises `DrCloudError` ends its task as
Failed, with the remedy; any other exception as HadException. Abort is asked for in the row and seen before each step.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from sqlalchemy import select

from dr_cloud.manager import tables
from dr_cloud.manager.events import Events
from dr_cloud.manager.tenancy import EVERYONE, Database
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.task import CompletionCode, Task, TaskStatus
from dr_cloud.model.units import SECOND_NS

WORKERS: Final = 8
_IDLE_SECONDS: Final = 1.0
"""How often the table is looked at when nobody wakes the dispatcher."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Later:
    """The task goes on: call its step again."""

    seconds: float = 0.25
    progress: float | None = None
    result: dict[str, Any] | None = None
    """What it has found so far, if that is of use already; kept if the task does not end well."""


@dataclass(frozen=True)
class Done:
    """The task has ended well."""

    result: dict[str, Any] = field(default_factory=dict)


class TaskFailedError(DrCloudError):
    """The task has found that it cannot be done, and has tidied up."""


Step = Callable[[tables.Task], Later | Done]
"""Takes the task's row (a copy: only what it puts into `state` is kept) and takes one step."""
Abort = Callable[[tables.Task], None]


@dataclass(frozen=True)
class TaskType:
    """How tasks of one type are run."""

    step: Step
    repeatable: bool = True
    """Whether a step that was cut short may be taken again."""
    abort: Abort | None = None
    """Tidies up after an abort; None: such a task cannot be aborted."""


def new_task(
    enterprise: str,
    type_: str,
    inputs: dict[str, Any],
    vpg: str | None,
    site: str | None,
    now_ns: int,
    created_by: str,
) -> tables.Task:
    """Return the row of a task that is to begin."""
    return tables.Task(
        enterprise=enterprise,
        id=uuid.uuid4().hex,
        type=type_,
        vpg=vpg,
        site=site,
        inputs=inputs,
        state={},
        status=TaskStatus.ACTIVE.value,
        completion=CompletionCode.NOT_AVAILABLE.value,
        progress=0.0,
        exception="",
        remedy="",
        created_ns=now_ns,
        due_ns=0,
        abort=False,
        created_by=created_by,
    )


def view(row: tables.Task) -> Task:
    """Return a task as it is shown."""
    return Task(
        id=row.id,
        enterprise=row.enterprise,
        type=row.type,
        vpg=row.vpg,
        site=row.site,
        inputs=row.inputs,
        status=TaskStatus(row.status),
        completion=CompletionCode(row.completion),
        progress=row.progress,
        result=row.result,
        exception=row.exception,
        remedy=row.remedy,
        created_ns=row.created_ns,
        started_ns=row.started_ns,
        ended_ns=row.ended_ns,
        created_by=row.created_by,
    )


class Tasks:
    """Runs the tasks of those enterprises that this process answers for."""

    def __init__(
        self,
        database: Database,
        events: Events,
        clock_ns: Callable[[], int],
        answers_for: Callable[[str], bool] = lambda enterprise: True,
    ) -> None:
        self._database = database
        self._events = events
        self._clock_ns = clock_ns
        self._answers_for = answers_for
        self._types: dict[str, TaskType] = {}
        self._under_way: dict[str, str] = {}
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(WORKERS, "task")
        self._thread = threading.Thread(target=self._dispatch, name="tasks", daemon=True)

    def register(self, type_: str, task_type: TaskType) -> None:
        """Say how tasks of this type are run."""
        self._types[type_] = task_type

    def start(self) -> None:
        """Take up what a former self left, and begin."""
        with self._database.write(EVERYONE) as session:
            for row in session.scalars(select(tables.Task).where(tables.Task.status == TaskStatus.RUNNING.value)):
                known = self._types.get(row.type)
                if self._answers_for(row.enterprise) and (known is None or not known.repeatable):
                    text = "the manager restarted while the task was running, and it is not safe to repeat"
                    self._end(row, TaskStatus.COMPLETED, CompletionCode.HAD_EXCEPTION, text)
        self._thread.start()

    def close(self) -> None:
        """Take no further steps; wait for those that are being taken."""
        self._stopping.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown(wait=True)

    def wake(self) -> None:
        """Look at the table now."""
        self._woken.set()

    def _dispatch(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                pause_seconds = self._hand_out()
            except Exception:
                log.exception("tasks.dispatch")
                pause_seconds = _IDLE_SECONDS
            self._woken.wait(pause_seconds)

    def _hand_out(self) -> float:
        """Give every due task to a worker; return the seconds until the next one is due."""
        open_ = (TaskStatus.ACTIVE.value, TaskStatus.RUNNING.value)
        wanted = (
            select(tables.Task.id, tables.Task.enterprise, tables.Task.due_ns)
            .where(tables.Task.status.in_(open_))
            .order_by(tables.Task.due_ns, tables.Task.created_ns)
        )
        with self._database.read(EVERYONE) as session:
            waiting = session.execute(wanted).all()
        now_ns = self._clock_ns()
        pause_seconds = _IDLE_SECONDS
        with self._lock:
            busy = Counter(self._under_way.values())
            for id_, enterprise, due_ns in waiting:
                if id_ in self._under_way or not self._answers_for(enterprise):
                    continue
                if due_ns > now_ns:
                    pause_seconds = min(pause_seconds, (due_ns - now_ns) / SECOND_NS)
                elif busy[enterprise] < WORKERS // 2 and len(self._under_way) < WORKERS:
                    busy[enterprise] += 1
                    self._under_way[id_] = enterprise
                    self._pool.submit(self._take_step, id_, enterprise)
        return max(pause_seconds, 0.005)

    def _take_step(self, id_: str, enterprise: str) -> None:
        try:
            self._step(id_, enterprise)
        except Exception:
            # The database failed: the step is taken again, but not at once.
            log.exception("tasks.step", task=id_)
            self._stopping.wait(_IDLE_SECONDS)
        finally:
            with self._lock:
                self._under_way.pop(id_, None)
            self._woken.set()

    def _step(self, id_: str, enterprise: str) -> None:
        with self._database.write(EVERYONE) as session:
            row = session.get(tables.Task, (enterprise, id_))
            if row is None or row.status not in (TaskStatus.ACTIVE.value, TaskStatus.RUNNING.value):
                return
            task_type = self._types.get(row.type)
            if row.started_ns is None:
                row.started_ns = self._clock_ns()
            row.status = TaskStatus.RUNNING.value
            aborted = row.abort
        try:
            if task_type is None:
                raise TaskFailedError(f"this version knows no task of type {row.type}", "Use the version that made it.")
            if aborted and task_type.abort is not None:
                task_type.abort(row)
                self._finish(row, TaskStatus.ABORTED, CompletionCode.ABORTED, "aborted by hand")
                return
            outcome = task_type.step(row)
        except DrCloudError as error:
            self._finish(row, TaskStatus.COMPLETED, CompletionCode.FAILED, str(error), error.remedy)
        except Exception as error:
            log.exception("tasks.broke", task=id_, type=row.type)
            text = f"{type(error).__name__}: {error}"
            self._finish(row, TaskStatus.COMPLETED, CompletionCode.HAD_EXCEPTION, text)
        else:
            if isinstance(outcome, Done):
                self._finish(row, TaskStatus.COMPLETED, CompletionCode.SUCCESS, result=outcome.result)
            else:
                self._put_off(row, outcome)

    def _put_off(self, row: tables.Task, later: Later) -> None:
        with self._database.write(row.enterprise or EVERYONE) as session:
            # Locked: an abort that comes just now is seen, or comes after this and sets the time itself.
            stored = session.get(tables.Task, (row.enterprise, row.id), with_for_update=True)
            if stored is not None:
                stored.state = dict(row.state)
                if not stored.abort:  # who aborts does not wait
                    stored.due_ns = self._clock_ns() + int(later.seconds * SECOND_NS)
                if later.progress is not None:
                    stored.progress = later.progress
                if later.result is not None:
                    stored.result = later.result

    def _finish(
        self,
        row: tables.Task,
        status: TaskStatus,
        completion: CompletionCode,
        exception: str = "",
        remedy: str = "",
        result: dict[str, Any] | None = None,
    ) -> None:
        with self._database.write(row.enterprise or EVERYONE) as session:
            stored = session.get(tables.Task, (row.enterprise, row.id))
            if stored is None:
                return
            stored.state = dict(row.state)
            self._end(stored, status, completion, exception, remedy, result)
        data = {"type": row.type, "status": status.value, "completion": completion.value, "vpg": row.vpg}
        self._events.emit(row.enterprise, self._clock_ns(), [("task", row.id, data)])

    def _end(
        self,
        row: tables.Task,
        status: TaskStatus,
        completion: CompletionCode,
        exception: str = "",
        remedy: str = "",
        result: dict[str, Any] | None = None,
    ) -> None:
        row.status = status.value
        row.completion = completion.value
        row.exception = exception
        row.remedy = remedy
        if result is not None:
            row.result = result
        row.ended_ns = self._clock_ns()
        if completion is CompletionCode.SUCCESS:
            row.progress = 1.0

    def can_abort(self, type_: str) -> bool:
        """Return whether tasks of this type can be aborted."""
        known = self._types.get(type_)
        return known is not None and known.abort is not None
