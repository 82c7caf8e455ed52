"""Recovery tests: stacks at past times, opened, watched, closed.

A test's id is its stack's name, so a manager that restarted finds its stacks again, and a task that is stepped twice
opens nothing twice. Tests of one VPG run side by side and end one by one; replication goes on. A test whose stack could
not be opened has failed, and it alone. Once a stack is open, the task that runs its probes (`probing`) begins in the
same transaction. How tests end is in `ending`, what ends them unasked in `tending`.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.checkpoints import Checkpoints
from dr_cloud.manager.ending import OPEN, begin_end, counters, end, is_sound, note_results, tell
from dr_cloud.manager.fabric import ServedStack
from dr_cloud.manager.operations import Change, decided, missing
from dr_cloud.manager.paging import paged
from dr_cloud.manager.protect import only_target
from dr_cloud.manager.questions import about_target, by_person, operator_of, place_of_target, subject_of
from dr_cloud.manager.tasks import Done, Later, TaskFailedError, TaskType, new_task, view
from dr_cloud.manager.vpgs import Vpgs
from dr_cloud.model.cloud import Page, PageRequest, Route
from dr_cloud.model.errors import ConflictError, DeniedError, DrCloudError, InvalidError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.probe import ProbeResult
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest
from dr_cloud.model.rights import Action, Question
from dr_cloud.model.task import Task
from dr_cloud.model.units import SECOND_NS, format_time
from dr_cloud.model.vpg import VpgEvent, VpgStatus, next_status
from dr_cloud.recovery.probes.probe import make_probe
from dr_cloud.recovery.probes.spec import with_names
from dr_cloud.recovery.servers import RecoveredProgress

CLOSE_ATTEMPTS: Final = 20
"""How often a task tries to close a stack that does not answer, in half a minute."""
log = structlog.get_logger(__name__)


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
        """Ask whether they may be, make their rows and the task that opens their stacks; return the task.

        Raises:
            InvalidError: A probe is not known, or its parameters are wrong.
        """
        for spec in request.probes:
            make_probe(spec)
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
            row.verdict, row.verdict_note = how.verdict or row.verdict, how.note or row.verdict_note
            task = begin_end(change.session, row, change.now_ns, f"stopped by {who.name}", who.name)
            change.event("task", task.id, type=task.type, status=task.status, vpg=row.vpg)
            change.event("test", test, vpg=row.vpg, status=row.status)
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
            left: dict[str, list[str]] = {}
            for row in rows:
                if any(result["artefacts"] for result in row.results):
                    left.setdefault(row.target, []).append(row.id)
                change.session.delete(row)
            for target, stacks in left.items():
                scope = Scope(enterprise, vpg, target)
                change.after.append(functools.partial(self._forget_artefacts, scope, stacks))
            change.registry = True
            return len(rows)

    def _forget_artefacts(self, scope: Scope, stacks: Sequence[str]) -> None:
        self._context.fabric.forget_artefacts(self.route_to(scope), stacks)

    def tests(
        self, who: Principal, enterprise: str, vpg: str | None = None, page: PageRequest = PageRequest()
    ) -> Page[RecoveryTest]:
        """List tests and failovers, newest first; without what their probes printed and left, which can be much."""
        with self._read(who, "test.read", enterprise) as session:
            table = tables.RecoveryTest
            wanted = select(table)
            if vpg is not None:
                self._row(session, enterprise, vpg)
                wanted = wanted.where(table.vpg == vpg)
            now_ns = self._context.clock_ns()
            keys = [table.started_ns, table.id]
            found = paged(session, wanted, keys, page, lambda row: test_view(row, now_ns), newest_first=True)
            items = [_without_outputs(test) for test in found.items]
            reading = self._reading(session, who, [test for test in items if test.uris])
        return found.model_copy(update={"items": self._readable(enterprise, items, reading)})

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
            if row.kind == "failover":
                progress = self._context.fabric.recovered(test)
                return found.model_copy(update={"statistics": recovered_counters(progress)}) if progress else found
            statistics = self._context.fabric.stack_statistics(test)
        except DrCloudError as error:
            return found.model_copy(update={"problem": str(error)})
        return found.model_copy(update={"statistics": counters(statistics)}) if statistics is not None else found

    def _reading(self, session: Session, who: Principal, tests: Sequence[RecoveryTest]) -> dict[str, Question]:
        """Return by test the question whether the caller may read its image, where something of it would be shown."""
        asked = {}
        for test in tests if who.place is not None else ():
            target = session.get(tables.VpgTarget, (test.enterprise, test.vpg, test.target))
            place = place_of_target(target) if target is not None else None
            if test.uris or test.results:
                asked[test.id] = by_person(who, Action.READ, test.enterprise, place, test.vpg)
        return asked

    def _readable(
        self, enterprise: str, tests: Sequence[RecoveryTest], reading: Mapping[str, Question]
    ) -> list[RecoveryTest]:
        """Return the tests as the caller may see them: without URIs and what probes printed where it may not read."""
        found = []
        for test in tests:
            if test.id in reading:
                try:
                    self._permit(enterprise, "read", f"test/{test.id}", [reading[test.id]])
                except DeniedError as error:
                    shown = {"uris": {}, "denied": test.denied or str(error)}
                    test = _without_outputs(test).model_copy(update=shown)
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
        problems = self._open(task, times, rows[0].quota_bytes if rows else None, any(row.remote for row in rows))
        wanted = {row.id for row in self._tests_of(task) if row.status == "running"}
        for id_ in times.keys() - wanted - problems.keys():  # stopped, or forgotten with its VPG, while it opened
            self._context.fabric.close_stack(id_)
        if times and len(problems) == len(times):
            error = next(iter(problems.values()))
            raise TaskFailedError(f"no test could be started: {error}", error.remedy)
        return Done({"tests": list(task.state["tests"]), "failed": {id_: str(e) for id_, e in problems.items()}})

    def _step_stop_test(self, task: tables.Task) -> Later | Done:
        (test,) = task.state["tests"]
        fabric, results = self._context.fabric, []
        statistics, progress = None, None
        rows = self._tests_of(task)
        try:
            if any(row.probes for row in rows) and (progress := fabric.probe_progress(test)) is not None:
                results = progress.results
            statistics = fabric.close_stack(test)
        except DrCloudError as error:
            attempts = int(task.state.get("attempts", 0)) + 1
            task.state = {**task.state, "attempts": attempts}
            log.info("test.close", test=test, attempts=attempts, error=str(error))
            if attempts < CLOSE_ATTEMPTS:
                return Later(min(0.25 * attempts, 2.0))
            # Its row ends; a stack that is still there then has no row, and is closed for that.
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.RecoveryTest, (task.enterprise, test))
            if row is not None and row.stopped_ns is None:
                note_results(row, results, sound=statistics is not None and is_sound(statistics))
                end(self._context, session, row, statistics)
        tell(self._context, task.enterprise, [test])
        return Done({"test": test})

    def _open(
        self, task: tables.Task, times_ns: Mapping[str, int], quota_bytes: int | None, remote: bool = False
    ) -> dict[str, DrCloudError]:
        """Open stacks and note what became of each; return those that failed, with why."""
        if not times_ns:
            return {}
        opened: Mapping[str, ServedStack | DrCloudError]
        try:
            route = self.route_to(Scope(task.enterprise, task.vpg or "", str(task.inputs["target"])))
            opened = self._context.fabric.open_stacks(route, times_ns, quota_bytes, remote)
        except DrCloudError as error:
            opened = dict.fromkeys(times_ns, error)
        problems = {}
        with self._database.write(task.enterprise) as session:
            for id_ in times_ns:
                outcome = opened.get(id_) or UnavailableError("nothing is known of its stack", "Start another test.")
                if isinstance(outcome, DrCloudError):
                    problems[id_] = outcome
                row = session.get(tables.RecoveryTest, (task.enterprise, id_))
                if row is not None and row.stopped_ns is None:
                    row.asked_ns = times_ns[id_]
                    self._note_outcome(session, row, outcome)
            self._context.registry.touch(session, task.enterprise)
        tell(self._context, task.enterprise, times_ns)
        return problems

    def _note_outcome(self, session: Session, row: tables.RecoveryTest, outcome: ServedStack | DrCloudError) -> None:
        now_ns = self._context.clock_ns()
        if isinstance(outcome, DrCloudError):
            row.problem, row.ended = str(outcome), row.ended or "it could not be opened"
            end(self._context, session, row, None)
            return
        row.at_ns, row.uris = outcome.at_ns, outcome.uris
        row.running_ns = row.running_ns or now_ns
        row.statistics = {"open_seconds": outcome.open_seconds}
        if outcome.note and outcome.note not in row.note:
            row.note = f"{row.note}; {outcome.note}" if row.note else outcome.note
        if row.status == "opening":
            row.status = "running"
            if row.probes:
                task = new_task(row.enterprise, "test.probe", {"test": row.id}, row.vpg, None, now_ns, row.started_by)
                task.state = {"tests": [row.id]}
                session.add(task)

    def route_to(self, scope: Scope) -> Route:
        """Return where a scope's journal is, with the grant for it. Raises `DeniedError`."""
        with self._database.read(scope.enterprise) as session:
            way = self._way(session, *self._find(session, scope))
        return self._granted([way])[0]

    def _tests_of(self, task: tables.Task) -> list[tables.RecoveryTest]:
        table = tables.RecoveryTest
        with self._database.read(task.enterprise) as session:
            return list(session.scalars(select(table).where(table.id.in_(task.state["tests"]))))


def recovered_counters(progress: RecoveredProgress) -> dict[str, float | int | None]:
    """Return how recovered servers stand, as it is kept."""
    return {name: getattr(progress, name) for name in ("size_bytes", "missing_bytes", "promoting", "promoted")}


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
            "then": row.then,
            "rto_seconds": _rto_seconds(row),
        }
    )


def _without_outputs(test: RecoveryTest) -> RecoveryTest:
    """Return a test without what its probes printed and left: that is content of its image."""
    blank = [result.model_copy(update={"output": "", "artefacts": []}) for result in test.results]
    return test.model_copy(update={"results": blank})


def _rto_seconds(row: tables.RecoveryTest) -> float | None:
    if row.running_ns is None or len(row.results) < len(row.probes):
        return None
    results = [ProbeResult.model_validate(result) for result in row.results]
    if not all(result.passed for result in results):
        return None
    ready_ns = max([row.running_ns, *(result.started_ns + int(result.seconds * SECOND_NS) for result in results)])
    return (ready_ns - row.started_ns) / SECOND_NS
