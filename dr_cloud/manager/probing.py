"""What reaches into running tests: their probes, what probes left, and credentials for their disks.

A task follows the probes of each test. It looks more seldom the longer nothing happens, keeps every result in the row
as it comes, and ends the test when all have ended, unless it is to be kept. Where the probes run is the stack's matter;
they are begun once however often they are asked for, so a manager that restarts goes on.
"""

from __future__ import annotations

from typing import Final

from dr_cloud.manager import tables
from dr_cloud.manager.ending import begin_end, give_verdict, is_sound, lock_vpg, note_results, tell
from dr_cloud.manager.fabric import ProbeProgress
from dr_cloud.manager.operations import Change, decided, missing
from dr_cloud.manager.questions import by_person, place_of_target
from dr_cloud.manager.recovery_tests import RecoveryTests
from dr_cloud.manager.tasks import Done, Later, TaskType
from dr_cloud.model.errors import ConflictError, DrCloudError, InvalidError, NotFoundError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.recovery import TestCredential
from dr_cloud.model.rights import Action
from dr_cloud.model.units import SECOND_NS

LOOK_SECONDS: Final = 0.3
LOOK_SECONDS_MAX: Final = 3.0
SILENT_SECONDS: Final = 300.0
"""How long a node may leave the question for a test's probes unanswered."""
_SLOWER: Final = 1.25
"""By how much longer it waits after each look that found nothing new."""


class Probing(RecoveryTests):
    """Operations on what runs in tests."""

    @decided
    def test_credential(self, who: Principal, enterprise: str, test: str) -> TestCredential:
        """Return what a client needs to attach the disks of a remote test. It ends with the test.

        Raises:
            DeniedError: The caller may not read what is served.
        """
        with self._change(who, "test.attach", enterprise, f"test {test}") as change:
            row = self._readable_test(change, test)
            if row.status != "running":
                raise ConflictError(f"the test is {row.status}", "Start another.")
            if not row.remote:
                raise InvalidError("the test's disks are not served to other machines", "Start it with --remote.")
        credential = self._context.fabric.credential(test)
        if credential is None:
            raise NotFoundError("the test's stack is gone", "Start another test.")
        return credential

    @decided
    def test_artefact(self, who: Principal, enterprise: str, test: str, path: str) -> bytes:
        """Return a file that a probe of a test left, `<probe>/<file>`.

        Raises:
            DeniedError: The caller may not read what is served.
        """
        with self._change(who, "test.read", enterprise, f"test {test}") as change:
            row = self._readable_test(change, test)
            left = [artefact for result in row.results for artefact in ProbeResult.model_validate(result).artefacts]
            if path not in {artefact.path for artefact in left}:
                raise missing("artefact", path)
            scope = Scope(enterprise, row.vpg, row.target)
        return self._context.fabric.artefact(self.route_to(scope), test, path)

    def _readable_test(self, change: Change, test: str) -> tables.RecoveryTest:
        """Return a test whose image the caller may read. The decision is a part of the change."""
        row = change.session.get(tables.RecoveryTest, (change.enterprise, test))
        if row is None:
            raise missing("test", test)
        target = change.session.get(tables.VpgTarget, (change.enterprise, row.vpg, row.target))
        if change.who.place is not None:
            place = place_of_target(target) if target is not None else None
            asked = by_person(change.who, Action.READ, change.enterprise, place, row.vpg)
            change.decide("read", f"test/{test}", [asked])
        return row

    # The task.

    def _register_probe_tasks(self) -> None:
        self._context.tasks.register("test.probe", TaskType(self._step_probes))

    def _step_probes(self, task: tables.Task) -> Later | Done:
        (test,) = task.state["tests"]
        row = next((row for row in self._tests_of(task) if row.status == "running" and row.verdict is None), None)
        if row is None:
            return self._probed(task, test)
        try:
            progress = self._progress(row)
        except UnavailableError as error:  # perhaps its node is busy
            now_ns = self._context.clock_ns()
            silent_ns = int(task.state.get("silent_ns", now_ns))
            if now_ns - silent_ns > SILENT_SECONDS * SECOND_NS:
                self._fail(task, test, f"its node does not answer: {error}")
                return self._probed(task, test)
            return self._look_later(task, silent_ns=silent_ns)
        except DrCloudError as error:
            problem = "its stack has died" if isinstance(error, NotFoundError) else f"its probes cannot run: {error}"
            self._fail(task, test, problem)
            return self._probed(task, test)
        if row.denied and not row.keep:
            self._fail(task, test, f"policy has stopped it: {row.denied}")
            return self._probed(task, test)
        if not progress.done and len(progress.results) == len(row.results):
            return self._look_later(task)
        self._note(task, row, progress)
        if progress.done:
            return self._probed(task, test)
        task.state = {"tests": [test]}
        return Later(LOOK_SECONDS, len(progress.results) / len(row.probes))

    def _progress(self, row: tables.RecoveryTest) -> ProbeProgress:
        """Return how the probes of a running test go, begun if they are not. Raises `NotFoundError`: it has died."""
        fabric = self._context.fabric
        progress = fabric.probe_progress(row.id)
        if progress is None:
            raise NotFoundError("there is no such stack")
        if not progress.started:
            route = self.route_to(Scope(row.enterprise, row.vpg, row.target))
            fabric.start_probes(route, row.id, [ProbeSpec.model_validate(spec) for spec in row.probes])
        return progress

    def _note(self, task: tables.Task, row: tables.RecoveryTest, progress: ProbeProgress) -> None:
        """Keep what has come of the probes; when all have ended, judge the test, and end it unless it is kept."""
        sound = not row.denied
        if any(not result.passed for result in progress.results[len(row.results) :]):
            try:
                statistics = self._context.fabric.stack_statistics(row.id)
            except DrCloudError:
                statistics = None
            sound = sound and statistics is not None and is_sound(statistics)
        with self._database.write(task.enterprise) as session:
            vpg = lock_vpg(session, row)
            stored = session.get(tables.RecoveryTest, (row.enterprise, row.id))
            if vpg is None or stored is None or stored.status != "running":
                return
            note_results(stored, progress.results, sound)
            if progress.done:
                give_verdict(session, stored)
                if not stored.keep:
                    begin_end(session, stored, self._context.clock_ns(), "its probes have ended")
            self._context.registry.touch(session, task.enterprise)
        tell(self._context, task.enterprise, [row.id])
        self._context.tasks.wake()

    def _fail(self, task: tables.Task, test: str, problem: str) -> None:
        """End a test, and it alone, that cannot be probed any further."""
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.RecoveryTest, (task.enterprise, test))
            if row is None or row.status != "running":
                return
            row.problem = problem
            begin_end(session, row, self._context.clock_ns(), problem)
            self._context.registry.touch(session, task.enterprise)
        tell(self._context, task.enterprise, [test])
        self._context.tasks.wake()

    def _probed(self, task: tables.Task, test: str) -> Done:
        row = next(iter(self._tests_of(task)), None)
        return Done({"test": test, "verdict": row.verdict if row is not None else None})

    @staticmethod
    def _look_later(task: tables.Task, **more: int) -> Later:
        quiet = int(task.state.get("quiet", 0)) + 1
        task.state = {"tests": task.state["tests"], "quiet": quiet, **more}
        return Later(min(LOOK_SECONDS * _SLOWER**quiet, LOOK_SECONDS_MAX))
