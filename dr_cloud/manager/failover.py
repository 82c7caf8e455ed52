"""Failover: the servers of a VPG are recovered at a target, and then stay there or vanish.

Life
    start      servers with disks of their own, as they were at a time (`dr_cloud.recovery.servers`): they are served
               within seconds, and what they write lasts. Replication from the source goes on beside.
    rollback   they are gone, and everything is as if nothing had happened.
    commit     they stay. The VPG is replicated no more; their disks take over what they still have from the journal
               (promotion), while they run. The source is not asked: it may be dead.
    release    the servers of a committed failover end, with their disks.

    Rollback and commit may come by themselves, some time after the start.

Consistency
    A failover is a row of the recovery tests, of kind `failover`; its id is the name of its servers. What changes the
    VPG's status changes the row, or adds the task that does, in the same transaction.

Retries
    Every step may be taken again: the servers are found by their name. The time of "the latest" is chosen once.

Crash recovery
    Tasks go on. Servers that nobody serves any more are started again (`dr_cloud.manager.recovering`).
"""

from __future__ import annotations

import contextlib
from typing import Final

from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.ending import end
from dr_cloud.manager.operations import Change, decided
from dr_cloud.manager.protect import source_party, target_party
from dr_cloud.manager.questions import about_target, operator_of, subject_of
from dr_cloud.manager.recovery_tests import RecoveryTests, new_test, open_tests, recovered_counters
from dr_cloud.manager.tasks import Done, Later, TaskFailedError, TaskType, view
from dr_cloud.manager.vpgs import judge
from dr_cloud.model.errors import ConflictError, DrCloudError, InvalidError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.recovery import FailoverRequest
from dr_cloud.model.rights import Action
from dr_cloud.model.task import Task
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import RECOVERED, VpgEvent, VpgStatus, next_status

_LOOK_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 3.0


class Failover(RecoveryTests):
    """Operations on failovers."""

    @decided
    def failover(self, who: Principal, enterprise: str, vpg: str, request: FailoverRequest) -> Task:
        """Recover the VPG's servers as they were at a checkpoint, at a time, or at the latest."""
        if request.checkpoint is not None and request.at_ns is not None:
            raise InvalidError("a checkpoint and a time were given", "Give one of them, or none for the latest.")
        with self._change(who, "failover.start", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            self._one_at_a_time(change.session, row)
            target = self._servable(row, request.target)
            row.status = next_status(VpgStatus(row.status), VpgEvent.FAILOVER_STARTED).value
            asked = about_target(row, target, [Action.FAIL_OVER], operator_of(who))
            change.decide("failover", subject_of((enterprise, vpg, target.name)), asked)
            inputs = request.model_dump(mode="json") | {"target": target.name}
            task = change.task("failover.start", inputs, vpg=vpg, site=target.site)
            then = "" if request.then == "wait" else request.then
            test = new_test(change, vpg, target.name, task.id, request.at_ns or 0, kind="failover", then=then)
            task.state = {"tests": [test]}
            change.registry = True
            change.event("vpg", vpg, status=row.status)
            return change.done(view(task))

    def rollback_failover(self, who: Principal, enterprise: str, vpg: str) -> Task:
        """End a failover that was not committed: what was written to the recovered disks is gone."""
        with self._change(who, "failover.rollback", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            self._one_at_a_time(change.session, row)
            next_status(VpgStatus(row.status), VpgEvent.FAILOVER_ROLLED_BACK)
            return self._task_for_servers(change, row, "failover.rollback")

    @decided
    def commit_failover(self, who: Principal, enterprise: str, vpg: str) -> Task:
        """Have the recovered servers stay; the task ends when their disks need the journal no more."""
        with self._change(who, "failover.commit", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            self._one_at_a_time(change.session, row)
            status = next_status(VpgStatus(row.status), VpgEvent.FAILOVER_COMMITTED_ALONE)
            failover = self._servers_of(change.session, row)
            if failover.status != "running":
                raise ConflictError(f"the failover is {failover.status}", "Wait until its servers are served.")
            target = next(target for target in row.targets if target.name == failover.target)
            asked = about_target(row, target, [Action.MOVE], operator_of(who))
            change.decide("promote", subject_of((enterprise, vpg, target.name)), asked)
            row.status, failover.then, failover.expires_ns = status.value, "", None
            parties = [source_party(row), *(target_party(target) for target in row.targets)]

            def publish() -> None:
                self._context.publisher.publish(parties)

            change.after.append(publish)
            return self._task_for_servers(change, row, "failover.commit")

    def release_failover(self, who: Principal, enterprise: str, vpg: str) -> Task:
        """End the servers of a committed failover, with their disks: they are needed no more."""
        with self._change(who, "failover.release", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            self._one_at_a_time(change.session, row)
            if VpgStatus(row.status) not in RECOVERED:
                raise ConflictError(f"{vpg} is {row.status}: no failover was committed", "Roll the failover back.")
            return self._task_for_servers(change, row, "failover.release")

    def _task_for_servers(self, change: Change, row: tables.Vpg, type_: str) -> Task:
        task = change.task(type_, {}, vpg=row.name)
        task.state = {"tests": [self._servers_of(change.session, row).id]}
        change.registry = True
        change.event("vpg", row.name, status=row.status)
        return change.done(view(task))

    @staticmethod
    def _servers_of(session: Session, row: tables.Vpg) -> tables.RecoveryTest:
        found = session.scalars(open_tests(row.name, "failover")).first()
        if not isinstance(found, tables.RecoveryTest):
            raise ConflictError(f"no servers of {row.name} are recovered", "Look at its tests and failovers.")
        return found

    # Tasks.

    def _register_failover_tasks(self) -> None:
        register = self._context.tasks.register
        register("failover.start", TaskType(self._step_failover))
        register("failover.commit", TaskType(self._step_commit))
        register("failover.rollback", TaskType(self._step_rollback))
        register("failover.release", TaskType(self._step_release))

    def _step_failover(self, task: tables.Task) -> Later | Done:
        (test,) = task.state["tests"]
        scope = Scope(task.enterprise, task.vpg or "", str(task.inputs["target"]))
        try:
            if "at_ns" not in task.state:
                task.state = {**task.state, "at_ns": self._failover_time(task, scope)}
                return Later(0.0)
            route = self.route_to(scope)
            served = self._context.fabric.recover(route, test, task.state["at_ns"])
        except DrCloudError as error:
            with contextlib.suppress(DrCloudError):
                self._context.fabric.discard_recovered(self.route_to(scope), test)
            with self._database.write(task.enterprise) as session:
                row = session.get(tables.RecoveryTest, (task.enterprise, test))
                if row is not None and row.stopped_ns is None:
                    row.problem, row.ended = str(error), "its servers could not be recovered"
                    end(self._context, session, row, None)
            self._roll_back(task)
            raise
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.RecoveryTest, (task.enterprise, test))
            if row is not None and row.stopped_ns is None:
                row.asked_ns = task.state["at_ns"]
                self._note_outcome(session, row, served)
                if row.then:
                    after_ns = int(task.inputs["after_seconds"]) * SECOND_NS
                    row.expires_ns = row.expires_ns or self._context.clock_ns() + after_ns
                self._context.registry.touch(session, task.enterprise)
        return Done({"test": test, "at_ns": served.at_ns})

    def _failover_time(self, task: tables.Task, scope: Scope) -> int:
        if task.inputs["at_ns"] is not None:
            return int(task.inputs["at_ns"])
        found = [c for c in self._context.fabric.checkpoints(self.route_to(scope)) if c.testable]
        if task.inputs["checkpoint"] is not None:
            found = [c for c in found if c.number == task.inputs["checkpoint"]]
        if not found:
            raise TaskFailedError("there is no such checkpoint to fail over to", "List the checkpoints, choose one.")
        return found[-1].time_ns

    def _step_commit(self, task: tables.Task) -> Later | Done:
        (test,) = task.state["tests"]
        fabric = self._context.fabric
        try:
            fabric.promote(test)
            progress = fabric.recovered(test)
        except DrCloudError:
            return Later(_AGAIN_SECONDS)  # the rounds say what is wrong, and start them again
        if progress is None or not progress.promoted:
            share = 1 - progress.missing_bytes / max(1, progress.size_bytes) if progress is not None else None
            return Later(_LOOK_SECONDS, share)
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.Vpg, (task.enterprise, task.vpg))
            failover = session.get(tables.RecoveryTest, (task.enterprise, test))
            if failover is not None:
                failover.statistics = {**failover.statistics, **recovered_counters(progress)}
            status = VpgStatus(row.status) if row is not None else None
            if row is not None and status is VpgStatus.PROMOTING_AND_NEED_REVERSE_CONFIGURATION:
                row.status = next_status(status, VpgEvent.PROMOTION_ENDED).value
                self._context.registry.touch(session, task.enterprise)
        return Done({"test": test})

    def _step_rollback(self, task: tables.Task) -> Later | Done:
        self._discard(task, f"rolled back by {task.created_by}")
        self._roll_back(task)
        return Done()

    def _step_release(self, task: tables.Task) -> Later | Done:
        self._discard(task, f"released by {task.created_by}")
        return Done()

    def _discard(self, task: tables.Task, ended: str) -> None:
        (test,) = task.state["tests"]
        with self._database.read(task.enterprise) as session:
            row = session.get(tables.RecoveryTest, (task.enterprise, test))
        if row is None or row.stopped_ns is not None:
            return
        self._context.fabric.discard_recovered(self.route_to(Scope(row.enterprise, row.vpg, row.target)), test)
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.RecoveryTest, (task.enterprise, test))
            if row is not None and row.stopped_ns is None:
                row.ended, row.problem = ended, ""
                end(self._context, session, row, None)
                self._context.registry.touch(session, task.enterprise)

    def _roll_back(self, task: tables.Task) -> None:
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.Vpg, (task.enterprise, task.vpg))
            if row is not None and row.status == VpgStatus.FAILOVER:
                row.status = next_status(VpgStatus(row.status), VpgEvent.FAILOVER_ROLLED_BACK).value
                if session.scalars(open_tests(row.name, "test").limit(1)).first() is not None:
                    row.status = next_status(VpgStatus(row.status), VpgEvent.TEST_STARTED).value
                judge(session, self._context.config, row, self._context.clock_ns())
                self._context.registry.touch(session, task.enterprise)
