"""Tests are tended: what nobody ends is ended here, and what a crash left is found.

Purpose
    Each second: tests whose time is over end. Every few seconds: counters of running tests are kept; a test whose stack
    has died has failed; so has one that can write no more. A test that no task cares for any more, though one should,
    is ended. A stack that has no open test is closed.

Consistency
    Whatever is looked at is looked at again in the transaction that changes it. A row is older than its stack, and a
    stack is closed before its row ends: so a stack without an open row is nobody's. The task of a row is in the same
    transaction as what it is for: so a row that waits for a task that is not there waits for ever, unless it has gone
    on meanwhile.

Retries
    The next round. Nothing is remembered between rounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from sqlalchemy import select

from dr_cloud.manager import tables
from dr_cloud.manager.ending import OPEN, begin_end, counters, end, lock_vpg, tell
from dr_cloud.manager.operations import Context
from dr_cloud.manager.rounds import Rounds
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.task import TaskStatus
from dr_cloud.stack.stack import StackStatistics

EXPIRE_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 5.0
_WORKING: Final = (TaskStatus.ACTIVE.value, TaskStatus.RUNNING.value)
_Key = tuple[str, str]
"""(enterprise, id) of a test."""
log = structlog.get_logger(__name__)


class Tending:
    """The rounds."""

    def __init__(self, context: Context, answers_for: Callable[[str], bool]) -> None:
        self._context = context
        self._database = context.database
        self._answers_for = answers_for
        # A stack that does not answer keeps the one waiting, and not the other.
        self._rounds = (
            Rounds("test-ends", EXPIRE_SECONDS, (self.expire,)),
            Rounds("tests", LOOK_SECONDS, (self.look, self.mend, self.sweep)),
        )

    def start(self) -> None:
        """Begin with the rounds."""
        for rounds in self._rounds:
            rounds.start()

    def close(self) -> None:
        """End them, after the act that is under way."""
        for rounds in self._rounds:
            rounds.close()

    def expire(self) -> None:
        """End the tests whose time is over."""
        table = tables.RecoveryTest
        over = table.expires_ns <= self._context.clock_ns()
        for key in self._keys(table.kind == "test", table.status.in_(("opening", "running")), over):
            self._end(key, ("opening", "running"), "its time is over")

    def look(self) -> None:
        """Keep the counters of running tests; end those whose stack has died, or has no room for what they write."""
        table = tables.RecoveryTest
        seen: dict[str, dict[str, StackStatistics]] = defaultdict(dict)
        for enterprise, id_ in self._keys(table.kind == "test", table.status == "running"):
            try:
                statistics = self._context.fabric.stack_statistics(id_)
            except DrCloudError:
                continue  # nothing is known now; the next round asks again
            if statistics is None:
                self._end(
                    (enterprise, id_), ("running",), "its stack has died", problem="its stack has died", gone=True
                )
            else:
                seen[enterprise][id_] = statistics
        for enterprise, found in seen.items():
            with self._database.write(enterprise) as session:
                for row in session.scalars(select(table).where(table.id.in_(list(found)), table.status == "running")):
                    row.statistics = counters(found[row.id])
            for id_, statistics in found.items():
                if statistics.writes_refused:
                    problem = (
                        f"{statistics.writes_refused} writes found no room: its quota, or the node's disk, is full"
                    )
                    self._end((enterprise, id_), ("running",), "it can write no more", problem=problem)

    def mend(self) -> None:
        """End the tests that wait for a task that is not there any more: it broke, or its database was lost."""
        table, task = tables.RecoveryTest, tables.Task
        probed = (table.status == "running") & table.verdict.is_(None)
        waiting = {
            key: status
            for key, status, has_probes in self._waiting(table.kind == "test", table.status.in_(OPEN))
            if status != "running" or has_probes
        }
        if not waiting:
            return
        with self._database.read(EVERYONE) as session:
            wanted = select(task.enterprise, task.type, task.state).where(
                task.status.in_(_WORKING), task.type.in_(("test.start", "test.stop", "test.probe"))
            )
            cared = {
                (enterprise, test, _FOR[type_])
                for enterprise, type_, state in session.execute(wanted)
                for test in state.get("tests", ())
            }
        for (enterprise, id_), status in waiting.items():
            if (enterprise, id_, status) not in cared:
                still = probed if status == "running" else table.status == status
                if (enterprise, id_) in self._keys(table.id == id_, still):
                    log.warning("test.left", enterprise=enterprise, test=id_, status=status)
                    problem = f"nothing was left of the task that was {_DOING[status]}"
                    self._end((enterprise, id_), (status,), "the manager lost it", problem=problem)

    def sweep(self) -> None:
        """Close the stacks that belong to no open test."""
        stacks = self._context.fabric.stacks()
        table = tables.RecoveryTest
        with self._database.read(EVERYONE) as session:
            known = set(session.scalars(select(table.id).where(table.id.in_(list(stacks)), table.status.in_(OPEN))))
        for stack, enterprise in stacks.items():
            if stack not in known and self._answers_for(enterprise):
                log.warning("stack.stray", enterprise=enterprise, stack=stack)
                try:
                    self._context.fabric.close_stack(stack)
                except DrCloudError as error:
                    log.info("stack.stray", stack=stack, error=str(error))

    def _waiting(self, *which: object) -> list[tuple[_Key, str, bool]]:
        table = tables.RecoveryTest
        with self._database.read(EVERYONE) as session:
            wanted = select(table.enterprise, table.id, table.status, table.probes, table.verdict).where(*which)  # type: ignore[arg-type]
            return [
                ((enterprise, id_), status, bool(probes) and verdict is None)
                for enterprise, id_, status, probes, verdict in session.execute(wanted)
                if self._answers_for(enterprise)
            ]

    def _keys(self, *which: object) -> Sequence[_Key]:
        return [key for key, _, _ in self._waiting(*which)]

    def _end(self, key: _Key, before: Sequence[str], ended: str, *, problem: str = "", gone: bool = False) -> None:
        """End one test, as a stop does.

        Args:
            key: The test.
            before: Only if its status is still one of these.
            ended: Why.
            problem: What was wrong; empty if nothing was.
            gone: Whether its stack is known to be gone.
        """
        enterprise, id_ = key
        with self._database.write(enterprise) as session:
            row = session.get(tables.RecoveryTest, key)
            if row is None or row.status not in before:
                return
            lock_vpg(session, row)
            row.problem = problem or row.problem
            if gone:
                row.ended = ended
                end(self._context, session, row, None)
            else:
                begin_end(session, row, self._context.clock_ns(), row.ended or ended)
                self._context.registry.touch(session, enterprise)
        tell(self._context, enterprise, [id_])
        self._context.tasks.wake()


_FOR: Final = {"test.start": "opening", "test.probe": "running", "test.stop": "closing"}
"""By the type of a task, the status in which a test waits for it."""
_DOING: Final = {"opening": "opening it", "running": "following its probes", "closing": "closing it"}
