"""The search for the last clean point: rounds of recovery tests, each of which says where the next one looks.

Purpose
    Finds between two times the last write after which all probes pass (`dr_cloud.recovery.search`). A round is recovery
    tests as anybody's, begun in the name of whoever asked for the search: decided, audited and bounded as those.

Consistency
    Only what probes said of a time's data counts (`probe_verdicts`): a test that was stopped, lost its stack or ran out
    of time says nothing of it. What is known of a time already, from whatever test, is not asked again.

Crash recovery
    A search is a task; everything it knows is in the task's row. A round's tests and the note of them are one
    transaction, so a manager that is killed at any moment goes on with the round under way, and begins none twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from pydantic import BaseModel
from sqlalchemy import ColumnElement, select

from dr_cloud.manager import tables
from dr_cloud.manager.ending import OPEN
from dr_cloud.manager.operations import decided
from dr_cloud.manager.questions import about_target, operator_of, subject_of
from dr_cloud.manager.recovery_tests import RecoveryTests
from dr_cloud.manager.tasks import Done, Later, TaskType, view
from dr_cloud.model.cloud import Route
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.recovery import (
    CleanCheckpoint,
    CleanEdge,
    CleanPoint,
    CleanRequest,
    CleanRound,
    StopTest,
    TestsRequest,
)
from dr_cloud.model.rights import Action
from dr_cloud.model.task import Task
from dr_cloud.model.vpg import VpgEvent, VpgStatus, next_status
from dr_cloud.recovery.probes.probe import make_probe
from dr_cloud.recovery.probes.spec import with_names
from dr_cloud.recovery.search import CleanSearch, Known, Span
from dr_cloud.recovery.verdicts import probes_digest

_POLL_SECONDS: Final = 0.5
_AWAY_SECONDS: Final = 5.0
_AWAY_MAX: Final = 60
"""So often a step is taken again, for five minutes in all, while the journal or the rights manager is away."""
_NEARBY: Final = 3
"""Tagged checkpoints that are told on each side."""


class _Round(BaseModel):
    """A round under way."""

    task: str
    """That opens its tests."""
    spans: list[Span]


class _State(BaseModel):
    """What a search remembers between its steps."""

    who: Principal
    """In whose name its tests are begun."""
    search: CleanSearch | None = None
    """None: not begun."""
    since_ns: int = 0
    """The time that is served for the first time asked for: candidate 0."""
    rows_before: int = 0
    """Change rows that its image holds: candidate n is that image and n rows more."""
    known: int = 0
    under_way: _Round | None = None
    rounds: list[CleanRound] = []
    silent: str = ""
    """Why the last test that could not say could not."""
    away: int = 0
    """How many steps in a row did not reach what they needed."""


class CleanSearches(RecoveryTests):
    """Operations on searches."""

    @decided
    def find_clean(self, who: Principal, enterprise: str, vpg: str, request: CleanRequest) -> Task:
        """Search the last time between two at which all probes pass; the task's result is a `CleanPoint`."""
        with self._change(who, "clean.find", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            target = self._servable(row, request.target)
            next_status(VpgStatus(row.status), VpgEvent.TEST_STARTED)
            for spec in with_names(request.probes):
                make_probe(spec)
            asked = about_target(row, target, [Action.TEST], operator_of(who))
            change.decide("stack", subject_of((enterprise, vpg, target.name)), asked)
            inputs = request.model_dump(mode="json") | {"target": target.name}
            task = change.task("clean.find", inputs, vpg=vpg, site=target.site)
            task.state = _State(who=who).model_dump(mode="json")
            return change.done(view(task))

    # Tasks.

    def _register_clean_tasks(self) -> None:
        self._context.tasks.register("clean.find", TaskType(self._step_find_clean, abort=self._abort_find_clean))

    def _step_find_clean(self, task: tables.Task) -> Later | Done:
        state = _State.model_validate(task.state)
        try:
            outcome = self._advance(task, state)
        except UnavailableError:
            state = _State.model_validate(task.state)
            state.away += 1
            if state.away > _AWAY_MAX:
                raise
            outcome = Later(_AWAY_SECONDS)
        else:
            state.away = 0
        task.state = state.model_dump(mode="json")
        return outcome

    def _advance(self, task: tables.Task, state: _State) -> Later | Done:
        request, route = (
            _request(task),
            self.route_to(Scope(task.enterprise, task.vpg or "", str(task.inputs["target"]))),
        )
        if state.search is None:
            state.search = self._prepare(task, state, request, route)
        elif state.under_way is not None and not self._take_round(task, state, state.search, state.under_way):
            return Later(_POLL_SECONDS)
        search = state.search
        while not search.done and state.under_way is None:
            spans = self._spans(state, search.next_candidates(request.parallel), route)
            known = self._verdicts(task, spans)
            search.learn(known)
            state.known += len(known)
            if not known and not self._begin_round(task, state, request, spans):
                break  # it is being aborted
        found = _found(str(task.inputs["target"]), state, search)
        if not search.done:
            return Later(_POLL_SECONDS, search.progress, found.model_dump(mode="json"))
        nearby = self._tagged_near(found.clean_ns if found.clean_ns is not None else state.since_ns, route)
        return Done(found.model_copy(update={"checkpoints": nearby}).model_dump(mode="json"))

    def _prepare(self, task: tables.Task, state: _State, request: CleanRequest, route: Route) -> CleanSearch:
        """Learn how much was written between the two times, and what is known of it."""
        since, until = self._context.fabric.images_at(route, [request.since_ns, request.until_ns])
        state.since_ns, state.rows_before = since.time_ns, since.rows
        search = CleanSearch(candidates=until.rows - since.rows + 1, precision_ns=request.precision_ns)
        table = tables.ProbeVerdict
        with self._database.read(task.enterprise) as session:
            wanted = select(table).where(*_of(task), table.at_ns.between(since.time_ns, until.time_ns))
            rows = session.scalars(wanted.order_by(table.at_ns)).all()
        # In the midst of others that say the same, a verdict narrows nothing.
        ends = [a or b for a, b in pairwise([True, *(a.clean != b.clean for a, b in pairwise(rows)), True])]
        rows = [row for row, end in zip(rows, ends, strict=True) if end] if rows else []
        images = self._context.fabric.images_at(route, [row.at_ns for row in rows]) if rows else []
        spans = self._spans(state, [image.rows - since.rows for image in images], route, once=False)
        search.learn([_known(span, row) for span, row in zip(spans, rows, strict=True)])
        state.known = len(search.known)
        return search

    def _spans(self, state: _State, candidates: Sequence[int], route: Route, *, once: bool = True) -> list[Span]:
        """Return for each candidate those that can be had together with it only; each such span `once`."""
        positions = [state.rows_before + candidate - 1 for candidate in candidates if candidate]
        writes = iter(self._context.fabric.writes_at(route, positions) if positions else ())
        spans: list[Span] = []
        for candidate in candidates:
            if candidate:
                write, before = next(writes), state.rows_before - 1
                span = Span(first=write.first - before, last=write.last - before, time_ns=write.time_ns)
            else:
                span = Span(first=0, last=0, time_ns=state.since_ns)
            if not (once and spans and spans[-1] == span):
                spans.append(span)
        return spans

    def _verdicts(self, task: tables.Task, spans: Sequence[Span]) -> list[Known]:
        """Return what is known of these times."""
        table = tables.ProbeVerdict
        with self._database.read(task.enterprise) as session:
            wanted = select(table).where(*_of(task), table.at_ns.in_([span.time_ns for span in spans]))
            rows = {row.at_ns: row for row in session.scalars(wanted)}
        return [_known(span, rows[span.time_ns]) for span in spans if span.time_ns in rows]

    @decided
    def _begin_round(self, task: tables.Task, state: _State, request: CleanRequest, spans: list[Span]) -> bool:
        """Begin a test of each span, and note that with them; False if the search is to end."""
        with self._change(state.who, "test.start", task.enterprise, f"vpg {task.vpg}") as change:
            stored = change.session.get(tables.Task, (task.enterprise, task.id), with_for_update=True)
            if stored is None or stored.abort:
                return False
            row = self._row(change.session, task.enterprise, task.vpg or "")
            tests = TestsRequest(
                target=request.target,
                times_ns=[span.time_ns for span in spans],
                probes=request.probes,
                note=f"round {len(state.rounds) + 1} of a search for the last clean point",
            )
            target = self._servable(row, request.target)
            begun = self._begin_tests(change, row, target, tests, origin=f"clean/{task.id}")
            now = state.model_copy(update={"under_way": _Round(task=begun.id, spans=spans)})
            stored.state = now.model_dump(mode="json")
        state.under_way, task.state = now.under_way, now.model_dump(mode="json")
        return True

    def _take_round(self, task: tables.Task, state: _State, search: CleanSearch, under_way: _Round) -> bool:
        """Take the answers of the round under way, once all its tests have ended; whether they have."""
        table = tables.RecoveryTest
        with self._database.read(task.enterprise) as session:
            tests = session.scalars(select(table).where(table.task == under_way.task)).all()
        if any(test.status in OPEN for test in tests):
            return False
        known = self._verdicts(task, under_way.spans)
        said = {item.time_ns for item in known}
        mute = [span for span in under_way.spans if span.time_ns not in said]
        for test in tests:
            if test.asked_ns not in said:
                state.silent = test.problem or test.verdict_note or test.ended or "it was discarded"
        search.answer(known, mute)
        state.under_way = None
        clean, dirty = search.edges[0].clean, search.edges[0].dirty
        state.rounds.append(
            CleanRound(
                tests=len(under_way.spans),
                silent=len(mute),
                clean_ns=clean.time_ns if clean else None,
                dirty_ns=dirty.time_ns if dirty else None,
                left=search.left,
            )
        )
        return True

    def _tagged_near(self, at_ns: int, route: Route) -> list[CleanCheckpoint]:
        tagged = [
            CleanCheckpoint(number=checkpoint.number, time_ns=checkpoint.time_ns, tag=checkpoint.tag)
            for checkpoint in self._context.fabric.checkpoints(route)
            if checkpoint.kind == "tag"
        ]
        before = [checkpoint for checkpoint in tagged if checkpoint.time_ns <= at_ns]
        return before[-_NEARBY:] + tagged[len(before) : len(before) + _NEARBY]

    def _abort_find_clean(self, task: tables.Task) -> None:
        """End the tests of the round under way."""
        state = _State.model_validate(task.state)
        if state.under_way is None:
            return
        table = tables.RecoveryTest
        with self._database.read(task.enterprise) as session:
            wanted = select(table.id).where(table.task == state.under_way.task, table.status.in_(OPEN))
            tests = session.scalars(wanted).all()
        for test in tests:
            with contextlib.suppress(DrCloudError):  # it has ended meanwhile
                self.stop_test(state.who, task.enterprise, test, StopTest(note="its search was aborted"))


def _request(task: tables.Task) -> CleanRequest:
    return CleanRequest.model_validate(task.inputs)


def _of(task: tables.Task) -> list[ColumnElement[bool]]:
    """Return the conditions for verdicts of this search's probes on its target."""
    table = tables.ProbeVerdict
    return [
        table.vpg == task.vpg,
        table.target == task.inputs["target"],
        table.probes == probes_digest(_request(task).probes),
    ]


def _known(span: Span, row: tables.ProbeVerdict) -> Known:
    return Known(**span.model_dump(), clean=row.clean, reason=row.reason)


def _found(target: str, state: _State, search: CleanSearch) -> CleanPoint:
    """Return what is found so far."""
    clean, dirty = search.edges[0].clean, search.edges[0].dirty
    edges = [
        CleanEdge(clean_ns=edge.clean.time_ns, dirty_ns=edge.dirty.time_ns, reason=edge.dirty.reason)
        for edge in search.edges
        if edge.clean is not None and edge.dirty is not None
    ]
    return CleanPoint(
        target=target,
        clean_ns=clean.time_ns if clean else None,
        dirty_ns=dirty.time_ns if dirty else None,
        reason=dirty.reason if dirty else "",
        writes=search.candidates - 1,
        known=state.known,
        rounds=state.rounds,
        monotone=search.monotone,
        edges=edges,
        problem=f"tests could not say whether their times are clean: {state.silent}" if search.unsaid else "",
    )
