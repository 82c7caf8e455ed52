"""Checkpoints: the list of each target's journal, and those that are made by hand.

The journal is the catalogue: nothing about checkpoints is kept here but what was asked for by hand. Each target gives
the request an id of its own, which its checkpoint then carries; so whether it has arrived is read from the journal
itself.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

from sqlalchemy.orm import Session, joinedload

from dr_cloud.manager import tables
from dr_cloud.manager.dispatch import Way
from dr_cloud.manager.operations import missing
from dr_cloud.manager.orders import replicates
from dr_cloud.manager.paging import decode_cursor, encode_cursor
from dr_cloud.manager.protect import only_target
from dr_cloud.manager.watch import Watch
from dr_cloud.model.cloud import (
    CheckpointFilter,
    CheckpointOrder,
    CheckpointView,
    InsertedCheckpoint,
    Page,
    PageRequest,
    Route,
)
from dr_cloud.model.errors import ConflictError, DrCloudError
from dr_cloud.model.journal import Checkpoint, Write
from dr_cloud.model.principal import Principal
from dr_cloud.model.units import SECOND_NS, TIME_NS_MAX

_CLOCKS_APART_NS = 86400 * SECOND_NS
"""A checkpoint by hand has the time of its guest's host, whose clock may be wrong by so much."""


class Checkpoints(Watch):
    """Operations on checkpoints."""

    def checkpoints(
        self,
        who: Principal,
        enterprise: str,
        vpg: str,
        target: str | None = None,
        which: CheckpointFilter = CheckpointFilter(),
        page: PageRequest = PageRequest(),
    ) -> Page[CheckpointView]:
        """List the checkpoints of a VPG at one target, newest first."""
        with self._read(who, "checkpoint.read", enterprise) as session:
            row = _row(session, enterprise, vpg)
            chosen = only_target(row, target)
            way = self._way(session, row, chosen)
        self._permit_reading(who, vpg, [chosen])
        (route,) = self._granted([way])
        before = decode_cursor(page.cursor, [int])[0] if page.cursor is not None else None
        found = self._context.fabric.checkpoints(route, which, before, page.limit + 1)[::-1]
        shown = [checkpoint_view(route.scope.target, checkpoint) for checkpoint in found[: page.limit]]
        more = len(found) > page.limit
        return Page(items=shown, next_cursor=encode_cursor([shown[-1].number]) if more else None)

    def writes(
        self,
        who: Principal,
        enterprise: str,
        vpg: str,
        target: str | None = None,
        since_ns: int = 0,
        until_ns: int = TIME_NS_MAX,
        page: PageRequest = PageRequest(),
    ) -> Page[Write]:
        """List when was written, as the journal at one target tells it, oldest first."""
        with self._read(who, "checkpoint.read", enterprise) as session:
            row = _row(session, enterprise, vpg)
            chosen = only_target(row, target)
            way = self._way(session, row, chosen)
        self._permit_reading(who, vpg, [chosen])
        (route,) = self._granted([way])
        if page.cursor is not None:
            since_ns = max(since_ns, decode_cursor(page.cursor, [int])[0] + 1)
        found = self._context.fabric.writes(route, since_ns, until_ns, page.limit + 1)
        more = len(found) > page.limit
        items = list(found[: page.limit])
        return Page(items=items, next_cursor=encode_cursor([items[-1].time_ns]) if more else None)

    def insert_checkpoint(
        self, who: Principal, enterprise: str, vpg: str, order: CheckpointOrder
    ) -> InsertedCheckpoint:
        """Ask for a checkpoint at every target, and return at once. Raises `ConflictError` if none could be asked."""
        with self._change(who, "checkpoint.insert", enterprise, f"vpg {vpg}") as change:
            row = _row(change.session, enterprise, vpg)
            if row.paused or not replicates(row):
                raise ConflictError(f"{vpg} does not replicate now", "Resume it, or look at its status.")
            ways = {target.name: self._way(change.session, row, target) for target in row.targets}
            asked = tables.InsertedCheckpoint(
                enterprise=enterprise,
                id=uuid.uuid4().hex,
                vpg=vpg,
                tag=order.tag,
                description=order.description,
                inserted_ns=change.now_ns,
                requests=dict.fromkeys(ways, ""),
                arrived={},
            )
            change.session.add(asked)
            change.event("checkpoint", vpg, tag=order.tag, id=asked.id, arrived=False)
            answer = change.done(_inserted(asked))
        self._ask(answer, ways)
        return answer

    def _ask(self, asked: InsertedCheckpoint, ways: Mapping[str, Way]) -> None:
        requests, problems = {}, []
        for target, way in ways.items():
            try:
                (route,) = self._granted([way])
                requests[target] = self._context.fabric.insert_checkpoint(route, asked.tag, asked.description)
            except DrCloudError as error:
                problems.append(f"{target}: {error}")
        if not requests:
            raise ConflictError(
                f"no target of {asked.vpg} could be asked: {'; '.join(problems)}", "Look at its status."
            )
        with self._database.write(asked.enterprise) as session:
            stored = session.get(tables.InsertedCheckpoint, (asked.enterprise, asked.id))
            if stored is not None:
                stored.requests = {**stored.requests, **requests}

    def inserted_checkpoint(self, who: Principal, enterprise: str, vpg: str, id: str) -> InsertedCheckpoint:
        """Return how a checkpoint that was asked for stands."""
        with self._read(who, "checkpoint.read", enterprise) as session:
            asked = session.get(tables.InsertedCheckpoint, (enterprise, id))
            if asked is None or asked.vpg != vpg:
                raise missing("inserted checkpoint", id)
            row = _row(session, enterprise, vpg)
            targets = {target.name: target for target in row.targets}
            ways = {
                name: self._way(session, row, target)
                for name, target in targets.items()
                if asked.requests.get(name) and name not in asked.arrived
            }
        found = {}
        for target, way in ways.items():
            arrived = self._arrived(self._granted([way])[0], asked.requests[target], asked.inserted_ns)
            if arrived is not None:
                found[target] = checkpoint_view(target, arrived).model_dump()
        # What has not arrived tells nothing of anybody's data.
        self._permit_reading(who, vpg, [targets[name] for name in {*asked.arrived, *found} if name in targets])
        if not found:
            return _inserted(asked)
        with self._database.write(enterprise) as session:
            stored = session.get(tables.InsertedCheckpoint, (enterprise, id))
            if stored is None:
                raise missing("inserted checkpoint", id)
            stored.arrived = {**stored.arrived, **found}
            answer = _inserted(stored)
        told = ("checkpoint", vpg, {"tag": asked.tag, "id": id, "arrived": answer.complete})
        self._context.events.emit(enterprise, self._context.clock_ns(), [told])
        return answer

    def _arrived(self, route: Route, request: str, inserted_ns: int) -> Checkpoint | None:
        """Return the checkpoint that carries `request`. Those that are older, by a day, are not looked at."""
        recent = CheckpointFilter(since_ns=max(0, inserted_ns - _CLOCKS_APART_NS))
        made = self._context.fabric.checkpoints(route, recent)
        return next((checkpoint for checkpoint in made if checkpoint.request == request), None)

    def wait_checkpoint(
        self,
        who: Principal,
        enterprise: str,
        vpg: str,
        id: str,
        timeout_seconds: float = 60.0,
        poll_seconds: float = 0.5,
    ) -> InsertedCheckpoint:
        """Wait until a checkpoint is in the journal of every target; return as it stands then, or at the time-out."""
        until = time.monotonic() + timeout_seconds
        while True:
            found = self.inserted_checkpoint(who, enterprise, vpg, id)
            left = until - time.monotonic()
            if found.complete or left <= 0:
                return found
            time.sleep(min(max(poll_seconds, 0.02), left))


def _row(session: Session, enterprise: str, vpg: str) -> tables.Vpg:
    row = session.get(tables.Vpg, (enterprise, vpg), options=[joinedload(tables.Vpg.targets)])
    if row is None:
        raise missing("VPG", vpg)
    return row


def checkpoint_view(target: str, checkpoint: Checkpoint) -> CheckpointView:
    """Return a checkpoint as it is shown."""
    return CheckpointView(
        target=target,
        number=checkpoint.number,
        kind=checkpoint.kind,
        time_ns=checkpoint.time_ns,
        exact_from_ns=checkpoint.exact_from_ns,
        created_ns=checkpoint.created_ns,
        tag=checkpoint.tag,
        description=checkpoint.description,
        testable=checkpoint.testable,
        request=checkpoint.request,
    )


def _inserted(row: tables.InsertedCheckpoint) -> InsertedCheckpoint:
    return InsertedCheckpoint(
        id=row.id,
        enterprise=row.enterprise,
        vpg=row.vpg,
        tag=row.tag,
        description=row.description,
        inserted_ns=row.inserted_ns,
        targets=sorted(row.requests),
        arrived={target: CheckpointView.model_validate(told) for target, told in row.arrived.items()},
    )
