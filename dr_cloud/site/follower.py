"""Makes the site what its orders say, and tells what it is.

Purpose
    `follow` takes whole orders: hosts are listened on or closed, sources go to the hub, targets are let in or let go.
    It may be called as often as one likes, with the same orders or others; only differences cause anything.

Failures
    What cannot be done (an address in use, a store that cannot be opened) is told in the report, and tried again by
    `tend`. It never stands in the way of the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import Final, Literal

import structlog

from dr_cloud.model.analysis import ServerAnalysis
from dr_cloud.model.errors import DrCloudError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import HostReport, SeenServer, SiteOrders, SiteReport
from dr_cloud.model.units import SECOND_NS
from dr_cloud.site.config import SiteSettings, TapHost
from dr_cloud.site.orders import Accepted, refused_source, refused_target
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.vdsa.analysis.analyzers import Analyzers
from dr_cloud.vdsa.hub import SourceHub
from dr_cloud.vdsa.target_io import TargetVdsa

VERSION: Final = version("dr-cloud")
ANALYSIS_SECONDS: Final = 30
"""So often the analysis of each server is told,"""
FIRST_ANALYSIS_SECONDS: Final = 5
"""first when something has been seen,"""
ANALYSES_MAX: Final = 8
"""so many in one report."""
_RELEASE_SECONDS: Final = 5.0
_VdsaState = Literal["installed", "not installed", "installing", "removing", "failed"]

_log = structlog.get_logger(__name__)


class Follower:
    """See the module's docstring. All methods belong to one event loop."""

    def __init__(self, settings: SiteSettings, clock_ns: Callable[[], int]) -> None:
        """Prepare; `analyzers`, `hub` and `target` are given before anything else is called.

        Args:
            settings: The site's configuration.
            clock_ns: Nanoseconds since the epoch.
        """
        self.accepted = Accepted(SiteOrders(revision=0, hosts=[]), {}, {}, [])
        self.followed_revision = 0
        """Of the orders that have been carried out."""
        self.analyzers: Analyzers
        self.hub: SourceHub
        self.target: TargetVdsa
        self._hosts = {host.name: host for host in settings.hosts}
        self._vdsas: dict[str, tuple[_VdsaState, str]] = dict.fromkeys(self._hosts, ("not installed", ""))
        self._datastores = {datastore.name: datastore.store for datastore in settings.datastores}
        self._stores: dict[str, Store] = {}
        self._seen: dict[str, SeenServer] = {}
        """By tap. One that has gone is kept, as not connected, until its server shows up elsewhere."""
        self._clock_ns = clock_ns
        self._following = asyncio.Lock()
        self._due_ns: dict[str, int] = {}
        """By server: when its analysis is to be told."""

    @property
    def datastores(self) -> list[str]:
        """The names of the site's datastores."""
        return list(self._datastores)

    async def follow(self, accepted: Accepted) -> None:
        """Make the site so."""
        async with self._following:
            before, self.accepted = self.accepted, accepted
            gone = {order.scope for order in before.orders.targets} - {o.scope for o in accepted.orders.targets}
            await self._hosts_as_ordered()
            await self.hub.configure(accepted.orders.sources)
            if gone:
                # A store that is away must not hold up the next orders.
                await asyncio.wait(
                    [asyncio.create_task(self.target.release(scope)) for scope in gone], timeout=_RELEASE_SECONDS
                )
            self.followed_revision = accepted.orders.revision
        _log.info(
            "site.orders",
            revision=accepted.orders.revision,
            sources=len(accepted.orders.sources),
            targets=len(accepted.orders.targets),
            hosts=accepted.orders.hosts,
            refused=[f"{scope.prefix}: {why}" for scope, why in {**accepted.sources, **accepted.targets}.items()],
        )

    async def tend(self) -> None:
        """Try again what failed."""
        async with self._following:
            await self._hosts_as_ordered()

    async def _hosts_as_ordered(self) -> None:
        for name, host in self._hosts.items():
            wanted = name in self.accepted.orders.hosts
            state, problem = self._vdsas[name]
            if wanted and state != "installed":
                self._vdsas[name] = "installing", problem
                self._vdsas[name] = await self._install(host)
            elif not wanted and state != "not installed":
                self._vdsas[name] = "removing", ""
                await self.hub.unlisten(name)
                self._vdsas[name] = "not installed", ""
            if self._vdsas[name] != (state, problem):
                _log.info("site.vdsa", host=name, state=self._vdsas[name][0], problem=self._vdsas[name][1])

    async def _install(self, host: TapHost) -> tuple[_VdsaState, str]:
        try:
            await self.hub.listen(host.name, host.listen, host.tls())
        except (DrCloudError, OSError) as error:
            return "failed", f"taps cannot be listened for on {host.listen}: {error}"
        return "installed", ""

    def admit(self, scope: Scope) -> Store:
        """Return the store of a scope that is to be replicated to here. Raises `DrCloudError`."""
        order = next((order for order in self.accepted.orders.targets if order.scope == scope), None)
        if order is None:
            raise NotFoundError(f"{scope.prefix} is not replicated to this site", "Name this site as its target.")
        store = self._stores.get(order.store)
        if store is None:
            store = self._stores[order.store] = open_store(self._datastores[order.store])
        return store

    def report(self) -> SiteReport:
        """Return all that the site tells of itself."""
        orders = self.accepted.orders
        self._look()
        hosts = [
            HostReport(
                host=name,
                vdsa=state,
                problem=problem,
                servers=[server for server in self._seen.values() if server.host == name],
            )
            for name, (state, problem) in self._vdsas.items()
        ]
        hosts += [
            HostReport(host=name, vdsa="failed", problem="the site's configuration file names no such host")
            for name in orders.hosts
            if name not in self._hosts
        ]
        return SiteReport(
            revision=self.followed_revision,
            time_ns=self._clock_ns(),
            version=VERSION,
            hosts=hosts,
            sources=[*self.hub.reports(), *(refused_source(*item) for item in self.accepted.sources.items())],
            targets=[*self.target.reports(), *(refused_target(*item) for item in self.accepted.targets.items())],
            datastores=self.datastores,
            problems=self.accepted.problems,
        )

    def analyses(self) -> list[ServerAnalysis]:
        """Return what the analyzers find, of servers that were not told of for a while, a few at a time."""
        now_ns = self._clock_ns()
        servers = self.analyzers.servers()
        first_ns = now_ns + FIRST_ANALYSIS_SECONDS * SECOND_NS
        self._due_ns = {server: self._due_ns.get(server, first_ns) for server in servers}
        due = sorted((server for server in servers if self._due_ns[server] <= now_ns), key=self._due_ns.__getitem__)
        del due[ANALYSES_MAX:]
        self._due_ns |= dict.fromkeys(due, now_ns + ANALYSIS_SECONDS * SECOND_NS)
        return [report for server in due if (report := self.analyzers.report(server)) is not None]

    def _look(self) -> None:
        """Bring the list of servers up to date."""
        now = {server.tap: server for server in self.hub.seen()}
        names = {server.name for server in now.values()}
        for tap, server in list(self._seen.items()):
            if server.name in names and tap not in now:
                del self._seen[tap]
            elif tap not in now:
                self._seen[tap] = server.model_copy(update={"connected": False})
        self._seen.update(now)


def essence(report: SiteReport) -> object:
    """Return a report without its figures, but with whether anything is durable.

    When it changes, that is worth telling at once.
    """
    return (
        report.revision,
        [
            (host.host, host.vdsa, host.problem, [(s.name, s.tap, s.connected, s.disks) for s in host.servers])
            for host in report.hosts
        ],
        [(one.scope, one.linked, one.problem, one.paused, one.taps, one.durable_ns > 0) for one in report.sources],
        [(one.scope, one.generation, one.connections, one.problem, one.newest_ns is None) for one in report.targets],
        report.problems,
    )
