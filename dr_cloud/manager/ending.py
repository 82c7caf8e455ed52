"""How recovery tests end: one way for all of them.

A test that is to end is `closing`; the task that closes its stack is added in the same transaction, so a manager that
is killed goes on with it. Once the stack is gone, the row gets its last counters, its end and the verdict of its
probes, and the VPG's status Test ends with its last test: all in one transaction.

Whatever ends a test says why in `ended`. If that is a fault, `problem` says it, and the test is `failed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.operations import Context
from dr_cloud.manager.tasks import new_task
from dr_cloud.manager.vpgs import judge
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.vpg import VpgEvent, VpgStatus, next_status
from dr_cloud.recovery.verdicts import data_verdict, probes_digest, verdict_of_test
from dr_cloud.stack.stack import StackStatistics

OPEN: Final = ("opening", "running", "closing")
BY_ITSELF: Final = "the manager"
"""Who acts where no person does."""


def begin_end(session: Session, row: tables.RecoveryTest, now_ns: int, ended: str, by: str = BY_ITSELF) -> tables.Task:
    """Have a test end: close its row, and add the task that closes its stack.

    Args:
        session: Of the change that this is a part of.
        row: The test, open.
        now_ns: The time.
        ended: Why.
        by: Who wants it.
    """
    row.status, row.ended = "closing", ended
    task = new_task(row.enterprise, "test.stop", {"test": row.id}, row.vpg, None, now_ns, by)
    task.state = {"tests": [row.id]}
    session.add(task)
    return task


def end(context: Context, session: Session, row: tables.RecoveryTest, statistics: StackStatistics | None) -> None:
    """Note that the stack of a test is gone. What it did last is kept, its probes give their verdict.

    Args:
        context: The manager's.
        session: A transaction.
        row: The test, open.
        statistics: The stack's last counters; None: those that are known stay.
    """
    vpg = lock_vpg(session, row)
    now_ns = context.clock_ns()
    row.status, row.stopped_ns, row.uris = "failed" if row.problem else "stopped", now_ns, {}
    row.statistics = counters(statistics) or row.statistics
    give_verdict(session, row)
    if vpg is not None and row.kind == "test":
        end_tests(session, vpg)
        judge(session, context.config, vpg, now_ns)
    context.registry.touch(session, row.enterprise)


def give_verdict(session: Session, row: tables.RecoveryTest) -> None:
    """Give a test the verdict of its probes unless it has one; keep what they say of the data. The VPG is locked."""
    if not row.probes:
        return
    results = [ProbeResult.model_validate(result) for result in row.results]
    if row.verdict is None:
        passed, reason = verdict_of_test(len(row.probes), results)
        row.verdict = "pass" if passed else "fail"
        if not passed and not row.verdict_note:
            row.verdict_note = reason or row.problem or "stopped before its probes had ended"
    known = data_verdict(len(row.probes), results)
    if known is None or row.at_ns is None:
        return
    digest = probes_digest([ProbeSpec.model_validate(spec) for spec in row.probes])
    key = (row.enterprise, row.vpg, row.target, digest, row.at_ns)
    if session.get(tables.ProbeVerdict, key) is None:
        session.add(
            tables.ProbeVerdict(
                enterprise=row.enterprise,
                vpg=row.vpg,
                target=row.target,
                probes=digest,
                at_ns=row.at_ns,
                clean=known[0],
                reason=known[1],
                test=row.id,
            )
        )


def lock_vpg(session: Session, row: tables.RecoveryTest) -> tables.Vpg | None:
    """Lock a test's VPG until the transaction ends: its tests end one after another, and none is judged twice."""
    return session.get(tables.Vpg, (row.enterprise, row.vpg), with_for_update=True)


def end_tests(session: Session, row: tables.Vpg) -> None:
    """Set the status of a VPG in tests to what it is without, if its last test has ended."""
    table = tables.RecoveryTest
    session.flush()
    wanted = select(func.count(table.id)).where(
        table.enterprise == row.enterprise, table.vpg == row.name, table.kind == "test", table.status.in_(OPEN)
    )
    if row.status == VpgStatus.TEST and not session.scalar(wanted):
        row.status = next_status(VpgStatus.TEST, VpgEvent.TESTS_ENDED).value


def tell(context: Context, enterprise: str, tests: Iterable[str]) -> None:
    """Tell those who watch how these tests and their VPGs stand now."""
    told: list[tuple[str, str, dict[str, Any]]] = []
    with context.database.read(enterprise) as session:
        table = tables.RecoveryTest
        rows = session.scalars(select(table).where(table.id.in_(list(tests)))).all()
        for row in rows:
            data = {"vpg": row.vpg, "status": row.status, "results": len(row.results), "verdict": row.verdict}
            told.append(("test", row.id, data))
        for name in dict.fromkeys(row.vpg for row in rows):
            vpg = session.get(tables.Vpg, (enterprise, name))
            told += [("vpg", name, {"status": vpg.status})] if vpg is not None else []
    context.events.emit(enterprise, context.clock_ns(), told)
    context.registry.wake()


def note_results(row: tables.RecoveryTest, results: Sequence[ProbeResult], sound: bool) -> bool:
    """Write what probes have found into a test's row; return whether there is something new.

    Args:
        row: The test.
        results: Of all its probes that have ended, in their order.
        sound: Whether its stack answered every request; if not, a probe that failed says nothing about the data.
    """
    new = results[len(row.results) :]
    if not new:
        return False
    told = [result if sound or result.passed else result.model_copy(update={"conclusive": False}) for result in new]
    row.results = [*row.results, *(result.model_dump(mode="json") for result in told)]
    return True


def is_sound(statistics: StackStatistics) -> bool:
    """Return whether a stack has answered every request, so that what was read from it is what it holds."""
    return statistics.failures == 0


def counters(statistics: StackStatistics | None) -> dict[str, Any]:
    """Return a stack's counters as they are kept."""
    return statistics.model_dump(mode="json", exclude={"at_ns"}) if statistics is not None else {}
