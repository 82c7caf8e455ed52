"""Drills: recovery tests of a VPG that come by themselves, by a schedule.

Purpose
    A round every few seconds starts what is due. A drill acts as whoever put it: with their role, from where they sat,
    so each run is decided, recorded and audited as theirs, under the name "drill NAME of MAKER".

Times
    Schedules are five fields as in crontab(5), in UTC. A run tests the newest time that the target has reported, minus
    each of the drill's ages; what its journal does not hold is moved to its beginning, and the tests' note says so.

Consistency
    The tests' rows and the next due time are one transaction, so each due time begins one run at most, whatever is
    killed between. A run begins only after the drill's last one has ended. What keeps it from beginning is its
    `problem`, and the drill waits for its next time.

Crash recovery
    What came due while nobody looked is begun once if the newest such time is no older than an hour; else it is noted
    as missed. While its VPG is in a status in which no test can begin (after a failover), a drill rests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any, Final

import structlog
from cronsim import CronSim, CronSimError
from sqlalchemy import select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.health import Judgement, judge_drill, judge_untested
from dr_cloud.manager.operations import Change, decided, missing
from dr_cloud.manager.paging import paged
from dr_cloud.manager.recovery_tests import RecoveryTests
from dr_cloud.manager.tasks import view
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import Page, PageRequest
from dr_cloud.model.errors import ConflictError, DrCloudError, InvalidError
from dr_cloud.model.principal import Principal
from dr_cloud.model.recovery import Drill, DrillSettings, TestsRequest
from dr_cloud.model.task import Task
from dr_cloud.model.units import SECOND_NS, format_time
from dr_cloud.model.vpg import VpgStatus
from dr_cloud.recovery.probes.spec import with_names

ROUND_SECONDS: Final = 5.0
LATE_NS: Final = 3600 * SECOND_NS
"""A due time that was missed is made good for so long."""
_NOTE_LENGTH: Final = 4096
log = structlog.get_logger(__name__)


def next_due_ns(schedule: str, after_ns: int) -> int:
    """Return the first time of a schedule after a time. Raises `InvalidError` for what is no schedule."""
    try:
        return next(_due(schedule, after_ns))
    except (CronSimError, StopIteration) as error:
        raise InvalidError(
            f"{schedule!r} is no schedule: {error or 'it names no time'}",
            'Write five fields as in crontab(5), in UTC: "0 3 * * 1" is Mondays at three.',
        ) from None


def last_due_ns(schedule: str, since_ns: int, until_ns: int) -> int | None:
    """Return the last time of a schedule from one time up to another; None if there is none."""
    return max(takewhile(lambda due_ns: due_ns <= until_ns, _due(schedule, since_ns - 1)), default=None)


def _due(schedule: str, after_ns: int) -> Iterator[int]:
    """Yield the times of a schedule after a time. Raises `CronSimError`."""
    if len(schedule.split()) != 5:
        raise CronSimError("it has not five fields")
    after = datetime.fromtimestamp(after_ns // SECOND_NS, UTC)
    return (int(due.timestamp()) * SECOND_NS for due in CronSim(schedule, after))


def chosen_times(ages_seconds: Sequence[float], oldest_ns: int, newest_ns: int) -> tuple[list[int], str]:
    """Return the times to test, oldest first, and what is to be said of those that the journal does not hold."""
    asked = {age: newest_ns - int(age * SECOND_NS) for age in ages_seconds}
    before = sorted(age for age, at_ns in asked.items() if at_ns < oldest_ns)
    said = f"the journal does not hold {', '.join(f'{age:g}' for age in before)} s ago: its first time is tested"
    return sorted({max(at_ns, oldest_ns) for at_ns in asked.values()}), said if before else ""


class Drills(RecoveryTests):
    """Operations on drills, and the round that starts them."""

    _answers_for: Callable[[str], bool]

    def put_drill(self, who: Principal, enterprise: str, vpg: str, settings: DrillSettings) -> Drill:
        """Make a drill, or give the one of that name other settings. It acts as the caller from now on."""
        drill = settings.name
        with self._change(who, "drill.put", enterprise, f"drill {vpg}/{drill}") as change:
            owner = self._row(change.session, enterprise, vpg)
            with_names(settings.probes)  # refuses two of one name
            self._servable(owner, settings.target)
            due_ns = next_due_ns(settings.schedule, change.now_ns)
            row = change.session.get(tables.Drill, (enterprise, vpg, drill))
            if row is None:
                row = tables.Drill(enterprise=enterprise, vpg=vpg, name=drill, last_tests=[], problem="")
                change.session.add(row)
            row.settings, row.maker = settings.model_dump(mode="json"), who.model_dump(mode="json")
            row.next_ns = due_ns if settings.enabled else None
            change.registry = True
            change.event("vpg", vpg, drill=drill)
            return change.done(_view(row, owner))

    def remove_drill(self, who: Principal, enterprise: str, vpg: str, drill: str) -> Drill:
        """Remove a drill. Its tests stay, and a run that is under way goes on."""
        with self._change(who, "drill.remove", enterprise, f"drill {vpg}/{drill}") as change:
            owner = self._row(change.session, enterprise, vpg)
            row = _drill(change.session, enterprise, vpg, drill)
            change.session.delete(row)
            change.registry = True
            change.event("vpg", vpg, drill=drill)
            return change.done(_view(row, owner))

    def drills(self, who: Principal, enterprise: str, vpg: str, page: PageRequest = PageRequest()) -> Page[Drill]:
        """List the drills of a VPG."""
        with self._read(who, "test.read", enterprise) as session:
            owner = self._row(session, enterprise, vpg)
            table = tables.Drill
            wanted = select(table).where(table.vpg == vpg)
            return paged(session, wanted, [table.name], page, lambda row: _view(row, owner))

    def drill(self, who: Principal, enterprise: str, vpg: str, drill: str) -> Drill:
        """Return a drill, and how its last run went."""
        with self._read(who, "test.read", enterprise) as session:
            owner = self._row(session, enterprise, vpg)
            return _view(_drill(session, enterprise, vpg, drill), owner)

    @decided
    def run_drill(self, who: Principal, enterprise: str, vpg: str, drill: str) -> Task:
        """Run a drill now, as the caller's. When it is due next stays as it is."""
        with self._change(who, "drill.run", enterprise, f"drill {vpg}/{drill}") as change:
            self._row(change.session, enterprise, vpg)
            return change.done(view(self._begin_run(change, _drill(change.session, enterprise, vpg, drill))))

    # The round.

    def look_at_drills(self) -> None:
        """Note what has ended, and start what is due."""
        now_ns = self._context.clock_ns()
        table = tables.Drill
        with self._database.read(EVERYONE) as session:
            rows = session.scalars(select(table).where((table.next_ns <= now_ns) | table.last_verdict.is_(None))).all()
        for row in rows:
            if not self._answers_for(row.enterprise):
                continue
            try:
                if row.last_tests and row.last_verdict is None:
                    self._note_verdict(row)
                if row.next_ns is not None and row.next_ns <= now_ns:
                    self._run_due(row, now_ns)
            except DrCloudError as error:
                self._note_problem(row, str(error), now_ns)
            except Exception:  # of one enterprise; it does not keep the others back
                log.exception("drill.round", enterprise=row.enterprise, vpg=row.vpg, drill=row.name)

    def _note_verdict(self, row: tables.Drill) -> None:
        """Give a run its verdict once all of its tests have ended: pass only if each is there and has passed."""
        table = tables.RecoveryTest
        with self._database.write(row.enterprise) as session:
            stored = session.get(tables.Drill, (row.enterprise, row.vpg, row.name), with_for_update=True)
            if stored is None or stored.last_tests != row.last_tests or stored.last_verdict is not None:
                return
            tests = session.scalars(select(table).where(table.id.in_(stored.last_tests))).all()
            if any(test.stopped_ns is None for test in tests):
                return
            passed = [test.id for test in tests if test.verdict == "pass"]
            stored.last_verdict = "pass" if len(passed) == len(stored.last_tests) else "fail"
            self._context.registry.touch(session, row.enterprise)
            told = ("vpg", row.vpg, {"drill": row.name, "verdict": stored.last_verdict})
        self._context.events.emit(row.enterprise, self._context.clock_ns(), [told])
        self._context.registry.wake()

    @decided
    def _run_due(self, row: tables.Drill, now_ns: int) -> None:
        """Begin the run of a drill that is due, unless it was begun meanwhile. Raises `DrCloudError`."""
        schedule = str(row.settings["schedule"])
        with self._database.read(row.enterprise) as session:
            owner = session.get(tables.Vpg, (row.enterprise, row.vpg))
        if owner is None:
            return
        if _rests(owner.status):
            self._note_problem(row, None, now_ns)
            return
        due_ns = row.next_ns or 0
        if last_due_ns(schedule, max(due_ns, now_ns - LATE_NS), now_ns) is None:
            self._note_problem(row, f"missed at {format_time(due_ns)}: the manager was away", now_ns)
            return
        maker = Principal.model_validate(row.maker)
        who = maker.model_copy(update={"name": f"drill {row.name} of {maker.name}"})
        with self._change(who, "drill.run", row.enterprise, f"drill {row.vpg}/{row.name}") as change:
            stored = change.session.get(tables.Drill, (row.enterprise, row.vpg, row.name), with_for_update=True)
            if stored is None or stored.next_ns != row.next_ns:
                raise ConflictError("the drill was begun or changed meanwhile", "Nothing is left to do.")
            stored.next_ns = next_due_ns(schedule, now_ns)
            self._begin_run(change, stored)

    def _begin_run(self, change: Change, row: tables.Drill) -> tables.Task:
        """Begin a run, in the change's transaction. Raises `ConflictError` while the one before is under way."""
        settings = DrillSettings.model_validate(row.settings)
        owner = self._row(change.session, row.enterprise, row.vpg)
        table = tables.RecoveryTest
        running = select(table.id).where(table.id.in_(row.last_tests), table.stopped_ns.is_(None)).limit(1)
        if change.session.scalars(running).first() is not None:
            raise ConflictError("the run before is still under way", "Wait for it, or stop its tests.")
        target = self._servable(owner, settings.target)
        if target.newest_ns is None or target.horizon_ns is None:
            raise ConflictError("the journal holds no time yet that can be tested", "Wait for its first checkpoint.")
        times_ns, said = chosen_times(settings.ages_seconds, target.horizon_ns, target.newest_ns)
        request = TestsRequest(
            target=settings.target,
            times_ns=times_ns,
            quota_bytes=settings.quota_bytes,
            lifetime_seconds=settings.lifetime_seconds,
            probes=settings.probes,
            note="; ".join(filter(None, (settings.note, said)))[:_NOTE_LENGTH],
        )
        task = self._begin_tests(change, owner, target, request, f"drill/{row.name}")
        row.last_ns, row.last_tests, row.last_verdict = change.now_ns, list(task.state["tests"]), None
        row.problem = ""
        change.event("vpg", row.vpg, drill=row.name, status=owner.status)
        return task

    def _note_problem(self, row: tables.Drill, problem: str | None, now_ns: int) -> None:
        """Note why a run could not begin (None: it rests), and when the drill is due next."""
        with self._database.write(row.enterprise) as session:
            stored = session.get(tables.Drill, (row.enterprise, row.vpg, row.name), with_for_update=True)
            if stored is None or stored.next_ns != row.next_ns:
                return  # it was begun, changed or removed meanwhile
            stored.next_ns = next_due_ns(str(stored.settings["schedule"]), now_ns)
            if problem is None or stored.problem == problem:
                return
            stored.problem = problem
            self._context.registry.touch(session, row.enterprise)
        log.info("drill.problem", enterprise=row.enterprise, vpg=row.vpg, drill=row.name, problem=problem)
        told = ("vpg", row.vpg, {"drill": row.name, "problem": problem})
        self._context.events.emit(row.enterprise, now_ns, [told])


def judgements(
    session: Session, untested_days: int, now_ns: int, standing: Mapping[tuple[str, str, str], Any]
) -> list[tuple[str, Judgement]]:
    """Judge every drill, and how long ago each VPG has passed a test: (enterprise, judgement). Sees everyone.

    Args:
        session: A session that sees everyone.
        untested_days: After how many days there is an alert; 0: never.
        now_ns: The time.
        standing: The alerts that stand, by enterprise, kind and subject.
    """
    found: list[tuple[str, Judgement]] = []
    drill, vpg = tables.Drill, tables.Vpg
    for row in session.scalars(select(drill).where(drill.next_ns.is_not(None))):
        subject = f"vpg/{row.vpg}/drill/{row.name}"
        raised = (row.enterprise, "drill", subject) in standing
        found.append((row.enterprise, judge_drill(subject, row.last_verdict, row.problem, raised)))
    asked = select(vpg.enterprise, vpg.name, vpg.status, vpg.created_ns, vpg.last_passed_test_ns)
    for enterprise, name, status, created_ns, passed_ns in session.execute(asked) if untested_days else ():
        if not _rests(status):
            found.append((enterprise, judge_untested(f"vpg/{name}", created_ns, passed_ns, untested_days, now_ns)))
    return found


def _rests(status: str) -> bool:
    return VpgStatus(status) not in (VpgStatus.PROTECTING, VpgStatus.TEST, VpgStatus.MISSING_CONFIGURATION)


def _drill(session: Session, enterprise: str, vpg: str, drill: str) -> tables.Drill:
    row = session.get(tables.Drill, (enterprise, vpg, drill))
    if row is None:
        raise missing("drill", drill)
    return row


def _view(row: tables.Drill, owner: tables.Vpg) -> Drill:
    return Drill.model_validate(
        {
            "enterprise": row.enterprise,
            "vpg": row.vpg,
            "settings": row.settings,
            "created_by": Principal.model_validate(row.maker).name,
            "next_ns": row.next_ns,
            "last_ns": row.last_ns,
            "last_tests": row.last_tests,
            "last_verdict": row.last_verdict,
            "problem": row.problem,
            "resting": _rests(owner.status),
        }
    )
