"""Recovered servers are looked after: started again if nobody serves them, committed or rolled back in time.

Each round asks how the servers of every failover stand. Those that nobody serves (their Ray has ended, their node was
away) are started again from their disks; what keeps them from it is their row's problem. A failover whose time has come
is committed or rolled back, as it was asked for. Nothing is remembered between rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import structlog
from sqlalchemy import select

from dr_cloud.manager import tables
from dr_cloud.manager.ending import BY_ITSELF
from dr_cloud.manager.fabric import ServedStack
from dr_cloud.manager.operations import Context
from dr_cloud.manager.recovery_tests import recovered_counters
from dr_cloud.manager.rounds import Rounds
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import Route
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.vpg import VpgStatus
from dr_cloud.recovery.servers import RecoveredProgress

LOOK_SECONDS: Final = 3.0
_ITSELF: Final = Principal(id="manager", name=BY_ITSELF, role=Role.PROVIDER_ADMIN, place=None)
log = structlog.get_logger(__name__)


class Failovers(Protocol):
    """What of the operations is needed."""

    def route_to(self, scope: Scope) -> Route:
        """Return where a scope's journal is."""
        ...

    def commit_failover(self, who: Principal, enterprise: str, vpg: str) -> object:
        """Have the recovered servers stay."""
        ...

    def rollback_failover(self, who: Principal, enterprise: str, vpg: str) -> object:
        """End them."""
        ...


class Recovering:
    """The rounds."""

    def __init__(self, context: Context, operations: Failovers, answers_for: Callable[[str], bool]) -> None:
        self._context = context
        self._database = context.database
        self._operations = operations
        self._answers_for = answers_for
        self._rounds = Rounds("failovers", LOOK_SECONDS, (self.look,))
        self.start, self.close = self._rounds.start, self._rounds.close

    def look(self) -> None:
        """Take one round."""
        table = tables.RecoveryTest
        with self._database.read(EVERYONE) as session:
            rows = session.scalars(select(table).where(table.kind == "failover", table.status == "running")).all()
        for row in filter(lambda row: self._answers_for(row.enterprise), rows):
            progress, served, problem = self._stand(row)
            self._note(row, progress, served, problem)
            if row.expires_ns is not None and row.expires_ns <= self._context.clock_ns():
                self._end(row)

    def _stand(self, row: tables.RecoveryTest) -> tuple[RecoveredProgress | None, ServedStack | None, str]:
        """Return how the servers of a failover stand, where they are served if that is new, and what is wrong."""
        fabric = self._context.fabric
        try:
            if (progress := fabric.recovered(row.id)) is not None:
                return progress, None, progress.problem
            log.warning("failover.started_again", enterprise=row.enterprise, vpg=row.vpg, failover=row.id)
            route = self._operations.route_to(Scope(row.enterprise, row.vpg, row.target))
            served = fabric.recover(route, row.id, None)
            if row.denied:
                fabric.pause_stack(row.id, row.denied)
        except DrCloudError as error:
            return None, None, f"its servers are not served: {error}"
        return None, served, ""

    def _note(
        self, row: tables.RecoveryTest, progress: RecoveredProgress | None, served: ServedStack | None, problem: str
    ) -> None:
        with self._database.write(row.enterprise) as session:
            stored = session.get(tables.RecoveryTest, (row.enterprise, row.id))
            if stored is None or stored.status != "running":
                return
            stored.problem = problem
            if progress is not None:
                stored.statistics = {**stored.statistics, **recovered_counters(progress)}
            if served is not None:
                stored.uris = served.uris

    def _end(self, row: tables.RecoveryTest) -> None:
        """Do what was asked for at its time; while something else is done with the VPG, the next round tries again."""
        with self._database.read(row.enterprise) as session:
            vpg = session.get(tables.Vpg, (row.enterprise, row.vpg))
        if vpg is None or VpgStatus(vpg.status) is not VpgStatus.FAILOVER:
            return
        act = self._operations.commit_failover if row.then == "commit" else self._operations.rollback_failover
        try:
            act(_ITSELF, row.enterprise, row.vpg)
        except DrCloudError as error:
            log.info("failover.not_ended", vpg=row.vpg, then=row.then, error=str(error))
