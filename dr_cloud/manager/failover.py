"""Failover before its commit: one stack, writable, until it is rolled back (its commit is not here yet)."""

from __future__ import annotations

from dr_cloud.manager import tables
from dr_cloud.manager.ending import end
from dr_cloud.manager.operations import decided
from dr_cloud.manager.questions import about_target, operator_of, subject_of
from dr_cloud.manager.recovery_tests import RecoveryTests, new_test, open_tests
from dr_cloud.manager.tasks import Done, Later, TaskFailedError, TaskType, view
from dr_cloud.manager.vpgs import judge
from dr_cloud.model.errors import DrCloudError, InvalidError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.recovery import FailoverRequest
from dr_cloud.model.rights import Action
from dr_cloud.model.task import Task
from dr_cloud.model.vpg import VpgEvent, VpgStatus, next_status


class Failover(RecoveryTests):
    """Operations on failovers."""

    @decided
    def failover(self, who: Principal, enterprise: str, vpg: str, request: FailoverRequest) -> Task:
        """Serve the VPG's disks, writable, as they were at a checkpoint, at a time, or at the latest."""
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
            test = new_test(change, vpg, target.name, task.id, request.at_ns or 0, kind="failover")
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
            stacks = list(change.session.scalars(open_tests(vpg, "failover").with_only_columns(tables.RecoveryTest.id)))
            task = change.task("failover.rollback", {}, vpg=vpg)
            task.state = {"tests": stacks}
            return change.done(view(task))

    # Tasks.

    def _register_failover_tasks(self) -> None:
        register = self._context.tasks.register
        register("failover.start", TaskType(self._step_failover))
        register("failover.rollback", TaskType(self._step_rollback))

    def _step_failover(self, task: tables.Task) -> Later | Done:
        (test,) = task.state["tests"]
        try:
            at_ns = self._failover_time(task)
            problems = self._open(task, {test: at_ns}, None)
            if problems:
                raise problems[test]
        except DrCloudError as error:
            with self._database.write(task.enterprise) as session:
                row = session.get(tables.RecoveryTest, (task.enterprise, test))
                if row is not None and row.stopped_ns is None:
                    row.problem, row.ended = str(error), "it could not be opened"
                    end(self._context, session, row, None)
            self._roll_back(task)
            raise
        return Done({"test": test, "at_ns": at_ns})

    def _failover_time(self, task: tables.Task) -> int:
        if task.inputs["at_ns"] is not None:
            return int(task.inputs["at_ns"])
        found = [
            c
            for c in self._context.fabric.checkpoints(
                self._route_to(Scope(task.enterprise, task.vpg or "", str(task.inputs["target"])))
            )
            if c.testable
        ]
        if task.inputs["checkpoint"] is not None:
            found = [c for c in found if c.number == task.inputs["checkpoint"]]
        if not found:
            raise TaskFailedError("there is no such checkpoint to fail over to", "List the checkpoints, choose one.")
        return found[-1].time_ns

    def _step_rollback(self, task: tables.Task) -> Later | Done:
        for test in task.state["tests"]:
            statistics = self._context.fabric.close_stack(test)
            with self._database.write(task.enterprise) as session:
                row = session.get(tables.RecoveryTest, (task.enterprise, test))
                if row is not None and row.stopped_ns is None:
                    row.ended = f"rolled back by {task.created_by}"
                    end(self._context, session, row, statistics)
        self._roll_back(task)
        return Done()

    def _roll_back(self, task: tables.Task) -> None:
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.Vpg, (task.enterprise, task.vpg))
            if row is not None and row.status == VpgStatus.FAILOVER:
                row.status = next_status(VpgStatus(row.status), VpgEvent.FAILOVER_ROLLED_BACK).value
                if session.scalars(open_tests(row.name, "test").limit(1)).first() is not None:
                    row.status = next_status(VpgStatus(row.status), VpgEvent.TEST_STARTED).value
                judge(session, self._context.config, row, self._context.clock_ns())
                self._context.registry.touch(session, task.enterprise)
