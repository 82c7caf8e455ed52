"""`dr_cloud.manager.fabric.Fabric` over Ray: connectors, VDSAs and stacks by their actors' names.

Everything is found by name, so that a manager that restarts finds what runs. An actor that is dead, restarts or has no
node is an `UnavailableError` after a while, never a wait without end.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import ray
import structlog

from dr_cloud.actors.cluster import START_SECONDS, UNHEARD_SECONDS, ask, ask_again
from dr_cloud.actors.gate import LOGS_SECONDS, Target
from dr_cloud.actors.logs import provider_archive
from dr_cloud.actors.placing import Labels, Placing
from dr_cloud.actors.pool import StackPool
from dr_cloud.actors.ports import Ports
from dr_cloud.actors.recovering import RecoveredActors
from dr_cloud.actors.settings import ProviderSettings
from dr_cloud.actors.stack import OpenedStack
from dr_cloud.actors.vdsa import Vdsa
from dr_cloud.manager.cloud import SYSTEM, Cloud
from dr_cloud.manager.fabric import ProbeProgress, ServedStack
from dr_cloud.model.cloud import PAGE_LIMIT_MAX, CheckpointFilter, LogRequest, PageRequest, Route
from dr_cloud.model.errors import DrCloudError, InvalidError, NotFoundError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, ImagePlan, PlacedImage, PlacedWrite, Write
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.recovery import TestCredential
from dr_cloud.model.replication import LogRequest as SiteLogRequest
from dr_cloud.model.replication import TargetOrders
from dr_cloud.model.rights import Action
from dr_cloud.rights.rights import Rights
from dr_cloud.stack.stack import StackStatistics

PLAN_SECONDS: Final = 60.0

_log = structlog.get_logger(__name__)


class RayFabric:
    """See the module's docstring and the protocol."""

    def __init__(
        self,
        settings: ProviderSettings,
        door: Any,
        cloud: Callable[[], Cloud],
        idle_stacks: Mapping[str, int],
        rights: Rights,
        owner: str = "",
    ) -> None:
        """Prepare.

        Args:
            settings: The provider.
            door: The actor class of an enterprise's door.
            cloud: Returns the manager that uses this.
            idle_stacks: How many stack actors to keep at hand, by data center; none where it is not named.
            rights: Says where actors may run.
            owner: The enterprise whose manager uses this; empty for the provider's.
        """
        self._settings = settings
        self._placement = settings.placement
        self._door = door
        self._cloud = cloud
        self._placing = Placing(settings.config, rights)
        self._ports = Ports(settings)
        self._recovered = RecoveredActors(settings)
        self.recovered, self.promote = self._recovered.progress, self._recovered.promote
        self._lock = threading.Lock()
        self._stacks: dict[str, tuple[OpenedStack, Any, StackPool]] = {}
        self._pools = {
            center.name: StackPool(
                self._placement,
                settings.node,
                f"{center.name}/{owner}",
                idle_stacks.get(center.name, 0),
                self._placing.at_center(center.name),
            )
            for center in settings.config.data_centers
        }

    def take_over(self) -> None:
        """Find the stacks of a former manager."""
        for pool in self._pools.values():
            for test, (opened, actor) in pool.adopt().items():
                self._stacks[test] = (opened, actor, pool)

    def refill(self) -> None:
        """Start the stacks that are to be at hand; they become ready on their own."""
        for pool in self._pools.values():
            pool.refill()

    # Connectors.

    def connector(self, enterprise: str) -> Any:
        """Return the actor of an enterprise's door. Raises `UnavailableError`."""
        return self._placement.find(self._settings.connector_name(enterprise))

    def start_connector(self, enterprise: str) -> str:
        """Make sure that the enterprise's connector runs; return where its sites dial."""
        port = self._ports.of(enterprise)
        cloud = self._cloud()
        home = cloud.enterprise(SYSTEM, enterprise).jurisdiction
        sites = [site.name for site in cloud.sites(SYSTEM, enterprise, PageRequest(limit=PAGE_LIMIT_MAX)).items]
        labels = self._placing.for_door(enterprise, home, sites)
        options = self._placement.options(self._settings.connector_name(enterprise), labels)
        settings = self._settings if self._settings.manager_per_enterprise else self._settings.without_database
        self._door.options(**options).remote(settings, enterprise, port)
        return f"wss://{self._settings.config.link_host}:{port}/link"

    def wait_connector(self, enterprise: str) -> str:
        """Wait until an enterprise's connector is open; return its inner address."""
        address: str = ask_again(
            lambda: self.connector(enterprise).ready.remote(), f"the connector of {enterprise}", START_SECONDS
        )
        return address

    def stop_connector(self, enterprise: str) -> None:
        """End the enterprise's connector, with all its links."""
        with contextlib.suppress(DrCloudError):
            ask(self.connector(enterprise).stop.remote(), "the connector", UNHEARD_SECONDS)
        self._placement.end(self._settings.connector_name(enterprise))
        self._ports.give_back(enterprise)
        for pool in self._pools.values():
            pool.forget(enterprise)

    def disconnect(self, enterprise: str, site: str) -> None:
        """Close the links of this site at once."""
        ask_again(lambda: self.connector(enterprise).disconnect.remote(site), "the connector", UNHEARD_SECONDS)

    def orders_changed(self, enterprise: str, site: str) -> None:
        """Tell the site's connector to fetch and send on its orders."""
        self.connector(enterprise).orders_changed.remote(site)

    # VDSAs.

    def start_vdsa(self, data_center: str, host: str, enterprise: str = "") -> Any:
        """Return the VDSA of a host for an enterprise, started if it does not run.

        Where each enterprise has its own, the one of no enterprise stands for the host itself and serves nobody.
        """
        return self._vdsa(data_center, host, enterprise, self._placing.at_center(data_center))

    def _target_vdsa(self, route: Route) -> Any:
        """Return the VDSA of a target, started where policy lets it run if it does not run. Raises `DeniedError`."""
        enterprise = route.scope.enterprise
        if not self._settings.vdsa_per_enterprise:
            return self.start_vdsa(route.site, route.host, enterprise)
        try:
            return self._placement.find(self._settings.vdsa_name(route.site, route.host, enterprise))
        except UnavailableError:
            labels = self._placing.for_data(Action.REPLICATE, enterprise, route.site)
            return self._vdsa(route.site, route.host, enterprise, labels)

    def _vdsa(self, data_center: str, host: str, enterprise: str, labels: Labels) -> Any:
        name = self._settings.vdsa_name(data_center, host, enterprise)
        options = self._placement.options(name, labels)
        whose = enterprise if self._settings.vdsa_per_enterprise else None
        return Vdsa.options(**options).remote(  # type: ignore[attr-defined]
            self._settings.node,
            name,
            provider=self._settings.without_database,
            place=(data_center, host, whose),
        )

    def target(self, route: Route) -> Target:
        """Make the target of a scope ready to serve; return where it is."""
        scope = route.scope
        if route.kind == "site":
            address = self.wait_connector(scope.enterprise)
        else:
            vdsa = self._target_vdsa(route)
            address = ask_again(lambda: vdsa.admit.remote([_orders(route)]), "the VDSA")
        return Target(route=route, address=address)

    def _names(self, data_center: str, host: str) -> list[str]:
        prefix = f"vdsa/{data_center}/{host}/"
        return [name for name in self._placement.names() if name.startswith(prefix)]

    def host_orders_changed(self, data_center: str, host: str) -> None:
        """Tell the VDSAs of a data center's host to fetch their orders."""
        if self._settings.vdsa_per_enterprise:
            orders = self._cloud().host_orders(data_center, host)
            for enterprise in {source.scope.enterprise for source in orders.sources}:
                self.start_vdsa(data_center, host, enterprise)
        for name in self._names(data_center, host):
            with contextlib.suppress(UnavailableError):
                self._placement.find(name).orders_changed.remote()

    def deploy_vdsa(self, data_center: str, host: str) -> None:
        """Make sure that a VDSA runs on a host. One that is an enterprise's own is started when it is needed."""
        vdsa = self.start_vdsa(data_center, host)
        ask_again(lambda: vdsa.where.remote(), f"the VDSA of {host}", START_SECONDS)

    def undeploy_vdsa(self, data_center: str, host: str) -> None:
        """Make sure that none does."""
        for name in self._names(data_center, host):
            with contextlib.suppress(DrCloudError):
                ask(self._placement.find(name).stop.remote(), name, START_SECONDS)
            self._placement.end(name)

    def _vdsa_of(self, route: Route) -> Any:
        if route.kind == "site":
            raise UnavailableError(
                f"the journal of {route.scope.vpg} is at site {route.site}, not with the provider",
                "Look at it, and recover from it, at that site.",
            )
        return self._target_vdsa(route)

    def checkpoints(
        self,
        route: Route,
        which: CheckpointFilter = CheckpointFilter(),
        before: int | None = None,
        limit: int | None = None,
    ) -> Sequence[Checkpoint]:
        """Return the newest `limit` wanted checkpoints of a scope, ascending; see `CheckpointFilter.newest`."""
        vdsa = self._vdsa_of(route)
        found: list[Checkpoint] = ask_again(
            lambda: vdsa.checkpoints.remote(_orders(route), which, before, limit), "the VDSA", PLAN_SECONDS
        )
        return found

    def writes(self, route: Route, since_ns: int, until_ns: int, limit: int) -> Sequence[Write]:
        """Return the first `limit` writes of a scope with `since_ns` ≤ time ≤ `until_ns`, ascending."""
        vdsa = self._vdsa_of(route)
        found: list[Write] = ask_again(
            lambda: vdsa.writes.remote(_orders(route), since_ns, until_ns, limit), "the VDSA", PLAN_SECONDS
        )
        return found

    def images_at(self, route: Route, times_ns: Sequence[int]) -> Sequence[PlacedImage]:
        """Return for each time which image is served for it, and how much of the journal that holds."""
        vdsa, times = self._vdsa_of(route), list(times_ns)
        found: list[PlacedImage] = ask_again(
            lambda: vdsa.images_at.remote(_orders(route), times), "the VDSA", PLAN_SECONDS
        )
        return found

    def writes_at(self, route: Route, positions: Sequence[int]) -> Sequence[PlacedWrite]:
        """Return for each position in the journal the write that it is in. Reads their checkpoints' objects only."""
        vdsa, wanted = self._vdsa_of(route), list(positions)
        found: list[PlacedWrite] = ask_again(
            lambda: vdsa.writes_at.remote(_orders(route), wanted), "the VDSA", PLAN_SECONDS
        )
        return found

    def insert_checkpoint(self, route: Route, tag: str, description: str) -> str:
        """Ask the source of a scope for a checkpoint by hand; return the id that the checkpoint will carry."""
        vdsa, scope, request = self._vdsa_of(route), route.scope, uuid.uuid4().hex
        ask_again(lambda: vdsa.checkpoint.remote(scope, tag, description, None, request), "the VDSA", UNHEARD_SECONDS)
        return request

    def free_bytes(self, data_center: str, datastore: str) -> int | None:
        """Return the room of a datastore that is a folder of this machine; of others nothing is known."""
        center = self._settings.config.data_center(data_center)
        stores = [store.store for store in center.datastores if store.name == datastore] if center is not None else []
        with contextlib.suppress(OSError):
            if stores and (path := urlsplit(stores[0])).scheme == "file":
                room = os.statvfs(unquote(path.path))
                return room.f_bavail * room.f_frsize
        return None

    # Stacks.

    def open_stacks(
        self, route: Route, times_ns: Mapping[str, int], quota_bytes: int | None, remote: bool = False
    ) -> Mapping[str, ServedStack | DrCloudError]:
        """Open a stack at each time, in parallel, in the data center of the scope."""
        vdsa, pool, enterprise = self._vdsa_of(route), self._pools[route.site], route.scope.enterprise
        wanted = {test: at_ns for test, at_ns in times_ns.items() if test not in self._stacks}
        found: dict[str, ServedStack | DrCloudError] = {
            test: _served(self._stacks[test][0]) for test in times_ns if test in self._stacks
        }
        center = self._settings.config.data_center(route.site)
        host = center.stacks if center is not None and remote else ""
        if remote and not host:
            return found | dict.fromkeys(wanted, _not_remote(route.site))
        labels = self._placing.for_data(Action.TEST, enterprise, route.site) if wanted else {}
        plans: list[ImagePlan | DrCloudError] = ask_again(
            lambda: vdsa.plans_or_errors.remote(_orders(route), list(wanted.values())), "the VDSA", PLAN_SECONDS
        )
        opening = {}
        for test, plan in zip(wanted, plans, strict=True):
            if isinstance(plan, DrCloudError):
                found[test] = plan
            else:
                arguments = (test, plan, route.store, quota_bytes, None, host)
                actor = pool.take(enterprise, labels)
                opening[test] = (arguments, actor, actor.open.remote(*arguments))
        for test, (arguments, actor, reference) in opening.items():
            try:
                opened, actor = self._opened(pool, labels, actor, reference, arguments)
            except DrCloudError as error:
                found[test] = error
            else:
                with self._lock:
                    self._stacks[test] = (opened, actor, pool)
                found[test] = _served(opened)
        pool.refill_soon()
        return found

    @staticmethod
    def _opened(
        pool: StackPool, labels: Labels, actor: Any, reference: Any, wanted: tuple[Any, ...]
    ) -> tuple[OpenedStack, Any]:
        """Wait until a stack serves. One that died while it was idle costs no test: a new one takes its place."""
        try:
            try:
                return ask(reference, "the stack", START_SECONDS), actor
            except UnavailableError as error:
                if not isinstance(error.__cause__, ray.exceptions.RayActorError):
                    raise
                actor = pool.start(labels)
                return ask(actor.open.remote(*wanted), "the stack", START_SECONDS), actor
        except DrCloudError:
            pool.end(actor)
            raise

    def _ask_stack(self, stack: str, method: str, *arguments: Any) -> Any:
        """Have an open stack do something. Raises `NotFoundError` if there is no such stack (any more)."""
        with self._lock:
            entry = self._stacks.get(stack)
        if entry is not None:
            try:
                return ask(getattr(entry[1], method).remote(*arguments), "the stack", UNHEARD_SECONDS)
            except UnavailableError as error:
                if not isinstance(error.__cause__, ray.exceptions.RayActorError):
                    raise
                with self._lock:
                    self._stacks.pop(stack, None)
        raise NotFoundError(f"there is no stack {stack}", "Its test has ended.")

    def stack_statistics(self, stack: str) -> StackStatistics | None:
        """Return the counters of an open stack; None if there is no such stack (any more)."""
        statistics: StackStatistics | None = None
        with contextlib.suppress(NotFoundError):
            statistics = self._ask_stack(stack, "statistics")
        return statistics

    def stacks(self) -> Mapping[str, str]:
        """Return the stacks that are open as far as this process knows: by the stack's id, whose it is."""
        with self._lock:
            return {stack: opened.enterprise for stack, (opened, _, _) in self._stacks.items()}

    def credential(self, stack: str) -> TestCredential | None:
        """Return what opens the disks of a stack that is served remotely; None if it is gone, or is not."""
        credential: TestCredential | None = None
        with contextlib.suppress(NotFoundError):
            credential = self._ask_stack(stack, "credential", stack)
        return credential

    def start_probes(self, route: Route, stack: str, probes: Sequence[ProbeSpec]) -> None:
        """Begin to run probes on an open stack, where it is; asked again, nothing happens."""
        self._ask_stack(stack, "start_probes", stack, probes)

    def probe_progress(self, stack: str) -> ProbeProgress | None:
        """Return how the probes of a stack go; None if there is no such stack (any more)."""
        progress: ProbeProgress | None = None
        with contextlib.suppress(NotFoundError):
            progress = self._ask_stack(stack, "probe_progress", stack)
        return progress

    def pause_stack(self, stack: str, reason: str) -> None:
        """Have an open stack answer every request with EPERM; one that is gone is left alone."""
        if not self._is_open(stack):
            self._recovered.tell(stack, "pause", reason)
            return
        with contextlib.suppress(NotFoundError):
            self._ask_stack(stack, "pause", reason)

    def resume_stack(self, stack: str) -> None:
        """Have a paused stack go on as before; one that is gone is left alone."""
        if not self._is_open(stack):
            self._recovered.tell(stack, "resume")
            return
        with contextlib.suppress(NotFoundError):
            self._ask_stack(stack, "resume")

    def _is_open(self, stack: str) -> bool:
        with self._lock:
            return stack in self._stacks

    def close_stack(self, stack: str) -> StackStatistics | None:
        """End a stack; return its last counters, None if it was gone already."""
        with self._lock:
            entry = self._stacks.pop(stack, None)
        if entry is None:
            return None
        opened, actor, pool = entry
        try:
            statistics: StackStatistics = ask(actor.close.remote(), "the stack")
        except DrCloudError:
            pool.end(actor)
            return None
        pool.give_back(opened.enterprise, actor)
        return statistics

    def artefact(self, route: Route, stack: str, path: str) -> bytes:
        """Return a file that a probe of this stack left. Raises `NotFoundError`."""
        vdsa = self._vdsa_of(route)
        content: bytes = ask_again(lambda: vdsa.artefact.remote(_orders(route), stack, path), "the VDSA", PLAN_SECONDS)
        return content

    def forget_artefacts(self, route: Route, stacks: Sequence[str]) -> None:
        """Remove what the probes of these stacks left."""
        vdsa = self._vdsa_of(route)
        ask_again(lambda: vdsa.forget_artefacts.remote(_orders(route), list(stacks)), "the VDSA", PLAN_SECONDS)

    # Recovered servers.

    def recover(self, route: Route, failover: str, at_ns: int | None) -> ServedStack:
        """Serve the servers of a failover in the data center of the scope, or go on serving them."""
        labels = self._placing.for_data(Action.FAIL_OVER, route.scope.enterprise, route.site)
        plan: ImagePlan | None = None
        if at_ns is not None:
            vdsa = self._vdsa_of(route)
            (found,) = ask_again(lambda: vdsa.plans_or_errors.remote(_orders(route), [at_ns]), "the VDSA", PLAN_SECONDS)
            if isinstance(found, DrCloudError):
                raise found
            plan = found
        return self._recovered.start(route, failover, plan, labels)

    def discard_recovered(self, route: Route, failover: str) -> None:
        """End the servers of a failover, with all that was written to their disks."""
        if self._recovered.progress(failover) is None:
            try:
                self.recover(route, failover, None)  # only an actor on their node can remove them
            except DrCloudError as error:
                _log.warning("recovered.not_discarded", failover=failover, error=str(error))
        self._recovered.discard(failover)

    # Logs.

    def collect_logs(self, enterprise: str, site: str, request: LogRequest) -> bytes:
        """Return an archive of the logs of a site; both empty: of the provider's processes."""
        wanted = SiteLogRequest(
            id=uuid.uuid4().hex,
            level=request.level,
            since_ns=request.since_ns or 0,
            until_ns=request.until_ns if request.until_ns is not None else 1 << 62,
            vdsa=request.vdsa,
            core=request.core,
        )
        if not enterprise:
            return provider_archive(self._settings, wanted)
        call = self.connector(enterprise).collect_logs.remote(site, wanted)
        packed: bytes = ask(call, "the connector", LOGS_SECONDS)
        return packed

    def close(self) -> None:
        """End idle stacks. What else runs is ended by name."""
        for pool in self._pools.values():
            pool.close()


def _orders(route: Route) -> TargetOrders:
    return TargetOrders(scope=Scope(*route.scope), store=route.store, grant=route.grant)


def _not_remote(data_center: str) -> DrCloudError:
    return InvalidError(
        f"data center {data_center} serves no disks to other machines",
        "Test without it, or have the provider name a host for `stacks` in that data center's configuration.",
    )


def _served(opened: OpenedStack) -> ServedStack:
    return ServedStack(at_ns=opened.at_ns, note=opened.note, uris=opened.uris, open_seconds=opened.open_seconds)
