"""Recovery tests: stacks at past times, opened, watched, closed.

A test's id is its stack's name, so a manager that restarted finds its stacks again, and a task that is stepped twice
opens nothing twice. Tests of one VPG run side by side and end one by one; replication goes on. A test whose stack has
died is failed, and it alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.checkpoints import Checkpoints
from dr_cloud.manager.fabric import ServedStack
from dr_cloud.manager.operations import Change, decided, missing
from dr_cloud.manager.paging import paged
from dr_cloud.manager.protect import only_target
from dr_cloud.manager.questions import about_target, by_person, operator_of, place_of_target, subject_of
from dr_cloud.manager.tasks import Done, Later, TaskFailedError, TaskType, view
from dr_cloud.manager.vpgs import Vpgs, judge
from dr_cloud.model.cloud import Page, PageRequest, Route
from dr_cloud.model.errors import ConflictError, DeniedError, DrCloudError, InvalidError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.probe import ProbeResult
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest
from dr_cloud.model.rights import Action, Question
from dr_cloud.model.task import Task
from dr_cloud.model.units import SECOND_NS, format_time
from dr_cloud.model.vpg import VpgEvent, VpgStatus, next_status
from dr_cloud.recovery.probes.spec import with_names
from dr_cloud.stack.stack import StackStatistics

OPEN = ("opening", "running", "closing")


class RecoveryTests(Vpgs, Checkpoints):
    """Operations on recovery tests, and on what a failover has in common with them."""

    @decided
    def start_tests(self, who: Principal, enterprise: str, vpg: str, request: TestsRequest) -> Task:
        """Start a test at each time, all in parallel."""
        with self._change(who, "test.start", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            target = self._servable(row, request.target)
            return change.done(view(self._begin_tests(change, row, target, request)))

    def _begin_tests(
        self, change: Change, row: tables.Vpg, target: tables.VpgTarget, request: TestsRequest, origin: str = ""
    ) -> tables.Task:
        """Ask whether they may be, make their rows and the task that opens their stacks; return the task."""
        row.status = next_status(VpgStatus(row.status), VpgEvent.TEST_STARTED).value
        asked = about_target(row, target, [Action.TEST], operator_of(change.who))
        change.decide("stack", subject_of((row.enterprise, row.name, target.name)), asked)
        inputs = request.model_dump(mode="json") | {"target": target.name}
        task = change.task("test.start", inputs, vpg=row.name, site=target.site)
        tests = [
            new_test(
                change,
                row.name,
                target.name,
                task.id,
                at_ns,
                note=request.note,
                origin=origin,
                quota_bytes=request.quota_bytes,
                probes=[spec.model_dump(mode="json") for spec in with_names(request.probes)],
                keep=request.keep,
                remote=request.remote,
                expires_ns=change.now_ns + request.lifetime_seconds * SECOND_NS,
            )
            for at_ns in request.times_ns
        ]
        task.state = {"tests": tests}
        change.registry = True
        return task

    def stop_test(self, who: Principal, enterprise: str, test: str, how: StopTest) -> Task:
        """Stop one test and say how it went."""
        with self._change(who, "test.stop", enterprise, f"test {test}") as change:
            row = change.session.get(tables.RecoveryTest, (enterprise, test))
            if row is None or row.kind != "test":
                raise missing("test", test)
            if row.status not in ("opening", "running"):
                raise ConflictError(f"the test is {row.status} already", "Nothing is left to stop.")
            row.status, row.verdict, row.verdict_note = "closing", how.verdict, how.note
            task = change.task("test.stop", {"test": test, **how.model_dump()}, vpg=row.vpg)
            task.state = {"tests": [test]}
            change.registry = True
            return change.done(view(task))

    def discard_tests(self, who: Principal, enterprise: str, vpg: str, count: int) -> int:
        """Discard what is kept of the oldest `count` tests that have ended; return how many there were."""
        if not 1 <= count <= 1_000_000:
            raise InvalidError("at least one test is to be discarded", "Give a number from 1.")
        with self._change(who, "test.discard", enterprise, f"vpg {vpg}") as change:
            self._row(change.session, enterprise, vpg)
            table = tables.RecoveryTest
            wanted = select(table).where(table.vpg == vpg, table.kind == "test", table.status.not_in(OPEN))
            rows = change.session.scalars(wanted.order_by(table.started_ns, table.id).limit(count)).all()
            for row in rows:
                change.session.delete(row)
            change.registry = True
            return len(rows)

    def tests(
        self, who: Principal, enterprise: str, vpg: str | None = None, page: PageRequest = PageRequest()
    ) -> Page[RecoveryTest]:
        """List tests and failovers, newest first."""
        with self._read(who, "test.read", enterprise) as session:
            table = tables.RecoveryTest
            wanted = select(table)
            if vpg is not None:
                self._row(session, enterprise, vpg)
                wanted = wanted.where(table.vpg == vpg)
            now_ns = self._context.clock_ns()
            keys = [table.started_ns, table.id]
            found = paged(session, wanted, keys, page, lambda row: test_view(row, now_ns), newest_first=True)
            reading = self._reading(session, who, found.items)
        return found.model_copy(update={"items": self._readable(enterprise, found.items, reading)})

    def test(self, who: Principal, enterprise: str, test: str) -> RecoveryTest:
        """Return one test (FailoverTestInfo), with its counters as they are now."""
        with self._read(who, "test.read", enterprise) as session:
            row = session.get(tables.RecoveryTest, (enterprise, test))
            if row is None:
                raise missing("test", test)
            shown = [test_view(row, self._context.clock_ns())]
            reading = self._reading(session, who, shown)
        (found,) = self._readable(enterprise, shown, reading)
        if row.status != "running":
            return found
        try:
            statistics = self._context.fabric.stack_statistics(test)
        except DrCloudError as error:
            return found.model_copy(update={"problem": str(error)})
        return found.model_copy(update={"statistics": counters(statistics)}) if statistics is not None else found

    def _reading(self, session: Session, who: Principal, tests: Sequence[RecoveryTest]) -> dict[str, Question]:
        """Return by test the question whether the caller may read its image, where its disks are served."""
        asked = {}
        for test in tests if who.place is not None else ():
            target = session.get(tables.VpgTarget, (test.enterprise, test.vpg, test.target))
            place = place_of_target(target) if target is not None else None
            if test.uris:
                asked[test.id] = by_person(who, Action.READ, test.enterprise, place, test.vpg)
        return asked

    def _readable(
        self, enterprise: str, tests: Sequence[RecoveryTest], reading: Mapping[str, Question]
    ) -> list[RecoveryTest]:
        """Return the tests as the caller may see them: without their URIs where it may not read."""
        found = []
        for test in tests:
            if test.id in reading:
                try:
                    self._permit(enterprise, "read", f"test/{test.id}", [reading[test.id]])
                except DeniedError as error:
                    test = test.model_copy(update={"uris": {}, "denied": test.denied or str(error)})
            found.append(test)
        return found

    def _servable(self, row: tables.Vpg, name: str | None) -> tables.VpgTarget:
        target = only_target(row, name)
        if not target.in_center:
            raise InvalidError(
                f"target {target.name} is at a site of the enterprise: stacks run in the provider's data centers",
                "Choose a target in a data center.",
            )
        return target

    # Tasks.

    def _register_test_tasks(self) -> None:
        register = self._context.tasks.register
        register("test.start", TaskType(self._step_start_tests))
        register("test.stop", TaskType(self._step_stop_test))

    def _step_start_tests(self, task: tables.Task) -> Later | Done:
        rows = self._tests_of(task)
        times = {row.id: row.asked_ns for row in rows if row.status == "opening"}
        quota_bytes = rows[0].quota_bytes if rows else None
        problems = self._open(task, times, quota_bytes)
        wanted = {row.id for row in self._tests_of(task) if row.status == "running"}
        for id_ in times.keys() - wanted - problems.keys():  # stopped, or forgotten with its VPG, while it opened
            self._context.fabric.close_stack(id_)
        self._settle(task)
        if times and len(problems) == len(times):
            error = next(iter(problems.values()))
            raise TaskFailedError(f"no test could be started: {error}", error.remedy)
        return Done({"tests": list(task.state["tests"]), "failed": {id_: str(e) for id_, e in problems.items()}})

    def _step_stop_test(self, task: tables.Task) -> Later | Done:
        (test,) = task.state["tests"]
        statistics = self._context.fabric.close_stack(test)
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.RecoveryTest, (task.enterprise, test))
            if row is not None and row.stopped_ns is None:
                row.status, row.stopped_ns, row.uris = "stopped", self._context.clock_ns(), {}
                row.statistics = counters(statistics) or row.statistics
                self._context.registry.touch(session, task.enterprise)
        self._settle(task)
        return Done({"test": test})

    def _open(self, task: tables.Task, times_ns: Mapping[str, int], quota_bytes: int | None) -> dict[str, DrCloudError]:
        """Open stacks and note what became of each; return those that failed, with why."""
        if not times_ns:
            return {}
        try:
            opened = self._context.fabric.open_stacks(self._route_of(task), times_ns, quota_bytes)
        except DrCloudError as error:
            opened = dict.fromkeys(times_ns, error)
        problems = {}
        with self._database.write(task.enterprise) as session:
            for id_, outcome in opened.items():
                if isinstance(outcome, DrCloudError):
                    problems[id_] = outcome
                row = session.get(tables.RecoveryTest, (task.enterprise, id_))
                if row is not None:
                    row.asked_ns = times_ns[id_]
                    _note_outcome(row, outcome, self._context.clock_ns())
            self._context.registry.touch(session, task.enterprise)
        return problems

    def _route_of(self, task: tables.Task) -> Route:
        scope = Scope(task.enterprise, task.vpg or "", str(task.inputs["target"]))
        with self._database.read(task.enterprise) as session:
            way = self._way(session, *self._find(session, scope))
        return self._granted([way])[0]

    def _tests_of(self, task: tables.Task) -> list[tables.RecoveryTest]:
        table = tables.RecoveryTest
        with self._database.read(task.enterprise) as session:
            return list(session.scalars(select(table).where(table.id.in_(task.state["tests"]))))

    def _settle(self, task: tables.Task) -> None:
        """End the VPG's status Test with its last test; tell what happened."""
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.Vpg, (task.enterprise, task.vpg), with_for_update=True)
            if row is None:
                return
            end_tests(session, row)
            judge(session, self._context.config, row, self._context.clock_ns())
            status = row.status
        tests = [("test", test, {"vpg": task.vpg}) for test in task.state["tests"]]
        told: list[tuple[str, str, dict[str, Any]]] = [*tests, ("vpg", task.vpg or "", {"status": status})]
        self._context.events.emit(task.enterprise, self._context.clock_ns(), told)
        self._context.registry.wake()


def end_tests(session: Session, row: tables.Vpg) -> None:
    """Set the status of a VPG in tests to what it is without, if its last test has ended."""
    table = tables.RecoveryTest
    session.flush()
    wanted = select(func.count(table.id)).where(
        table.enterprise == row.enterprise, table.vpg == row.name, table.kind == "test", table.status.in_(OPEN)
    )
    if row.status == VpgStatus.TEST and not session.scalar(wanted):
        row.status = next_status(VpgStatus.TEST, VpgEvent.TESTS_ENDED).value


def open_tests(vpg: str, kind: str) -> Any:
    """Select the tests, or failovers, of a VPG that have not ended."""
    table = tables.RecoveryTest
    return select(table).where(table.vpg == vpg, table.kind == kind, table.status.in_(OPEN))


def new_test(
    change: Change, vpg: str, target: str, task: str, at_ns: int, *, kind: str = "test", **more: object
) -> str:
    """Add the row of a test whose stack is to be opened; return its id. `more` are further columns."""
    row = tables.RecoveryTest(
        enterprise=change.enterprise,
        id=uuid.uuid4().hex,
        vpg=vpg,
        target=target,
        kind=kind,
        task=task,
        status="opening",
        asked_ns=at_ns,
        started_ns=change.now_ns,
        started_by=change.who.name,
        **{"note": "", **more},
    )
    change.session.add(row)
    change.event("test", row.id, vpg=vpg, status="opening", asked=format_time(at_ns) if at_ns else "latest")
    return row.id


def _note_outcome(row: tables.RecoveryTest, outcome: ServedStack | DrCloudError, now_ns: int) -> None:
    if isinstance(outcome, DrCloudError):
        row.status, row.problem, row.stopped_ns = "failed", str(outcome), now_ns
        return
    row.at_ns, row.uris = outcome.at_ns, outcome.uris
    row.running_ns = row.running_ns or now_ns
    row.statistics = {"open_seconds": outcome.open_seconds}
    if outcome.note and outcome.note not in row.note:
        row.note = f"{row.note}; {outcome.note}" if row.note else outcome.note
    if row.status == "opening":
        row.status = "running"


def counters(statistics: StackStatistics | None) -> dict[str, Any]:
    """Return a stack's counters as they are kept."""
    return statistics.model_dump(mode="json", exclude={"at_ns"}) if statistics is not None else {}


def test_view(row: tables.RecoveryTest, now_ns: int) -> RecoveryTest:
    """Return a test as it is shown."""
    return RecoveryTest.model_validate(
        {
            "id": row.id,
            "enterprise": row.enterprise,
            "vpg": row.vpg,
            "target": row.target,
            "kind": row.kind,
            "task": row.task,
            "status": row.status,
            "asked_ns": row.asked_ns,
            "at_ns": row.at_ns,
            "note": row.note,
            "uris": row.uris or {},
            "started_ns": row.started_ns,
            "running_ns": row.running_ns,
            "stopped_ns": row.stopped_ns,
            "seconds": ((row.stopped_ns or now_ns) - row.started_ns) / SECOND_NS,
            "verdict": row.verdict,
            "verdict_note": row.verdict_note or "",
            "statistics": row.statistics or {},
            "problem": row.problem or "",
            "denied": row.denied or "",
            "started_by": row.started_by,
            "origin": row.origin,
            "probes": row.probes,
            "results": row.results,
            "keep": row.keep,
            "remote": row.remote,
            "expires_ns": row.expires_ns,
            "ended": row.ended,
            "rto_seconds": _rto_seconds(row),
        }
    )


def _rto_seconds(row: tables.RecoveryTest) -> float | None:
    if row.running_ns is None or len(row.results) < len(row.probes):
        return None
    results = [ProbeResult.model_validate(result) for result in row.results]
    if not all(result.passed for result in results):
        return None
    ready_ns = max([row.running_ns, *(result.started_ns + int(result.seconds * SECOND_NS) for result in results)])
    return (ready_ns - row.started_ns) / SECOND_NS
