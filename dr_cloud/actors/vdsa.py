"""The `Vdsa` actor: the VDSA of one of the provider's hosts.

Purpose
    As a target it takes in the streams of the scopes it was told to serve, each into its own store. Who tells it is the
    manager: by its orders, and whenever a door asks where a scope's target is (`admit`).
    As a source it takes the taps of servers that run on its host: recovered ones, or a tenant's servers in the cloud.
    Each enterprise has a hub and a socket of its own there, so that names of servers never meet.

Grants
    What follows a manager's orders serves a scope only with the rights manager's grant for it, its store and its own
    data center (`dr_cloud.vdsa.granted`). It is looked at when a source comes and every second; when it ends, the scope
    is let go, and the report says so.

Orders
    Fetched when they change and every ten seconds; what they no longer name is let go. A report goes to the manager
    every five seconds, and within two after a change. While the manager is away it goes on as it is.

Crash recovery
    Ray restarts it when it dies. It then serves the targets it served before (a small file tells), and opens each at
    its source's next hello: recovered from the store, with a new generation. Nothing that was acknowledged is lost, and
    a former self that still ran somewhere would be fenced.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import ray
import structlog
from pydantic import TypeAdapter, ValidationError

from dr_cloud.actors.cluster import Where, node_address, whereabouts
from dr_cloud.actors.gate import Target
from dr_cloud.actors.inner import Inner
from dr_cloud.actors.logs import start_log
from dr_cloud.actors.node import LoopThread, NodeSettings, Stores
from dr_cloud.actors.settings import ManagerDesk, ProviderSettings
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writes import images_at, list_writes, writes_at
from dr_cloud.link.stream import MessageStream
from dr_cloud.model.cloud import CheckpointFilter
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, ImagePlan, PlacedImage, PlacedWrite, Write
from dr_cloud.model.replication import HostReport, SeenServer, SiteOrders, SiteReport, TargetOrders
from dr_cloud.recovery.artefacts import forget_artefacts, read_artefact
from dr_cloud.rights.grant import verify
from dr_cloud.seal.identity import replace_file
from dr_cloud.seal.keyring import Keyring
from dr_cloud.site.follower import VERSION, essence
from dr_cloud.site.orders import refused_target
from dr_cloud.store.store import Store
from dr_cloud.tap.memory import keep_freed_memory
from dr_cloud.vdsa.granted import Granted
from dr_cloud.vdsa.hub import SourceHub
from dr_cloud.vdsa.scope import ScopeStatus
from dr_cloud.vdsa.target_io import TargetVdsa

REPORT_SECONDS: Final = 5.0
"""So often everything is told, figures too;"""
LOOK_SECONDS: Final = 2.0
"""so often it is looked whether anything else has changed."""
ORDERS_SECONDS: Final = 10.0
GRANTS_SECONDS: Final = 1.0
Place = tuple[str, str, str | None]
"""Data center, host, and the enterprise if it serves one alone."""
_TARGETS: Final = TypeAdapter(list[TargetOrders])

_log = structlog.get_logger(__name__)


@ray.remote(max_restarts=-1, max_task_retries=3, num_cpus=0)
class Vdsa:
    """One VDSA. Methods may be tried again after a restart: each is safe to repeat."""

    def __init__(
        self,
        settings: NodeSettings,
        name: str,
        targets: Sequence[TargetOrders] = (),
        socket: Path | None = None,
        provider: ProviderSettings | None = None,
        place: Place | None = None,
    ) -> None:
        """Serve sources.

        Args:
            settings: The node.
            name: The actor's name, unique in the provider.
            targets: What to serve from the start, also after a restart.
            socket: Where sources connect, if not where the name leads; the same after a restart.
            provider: The provider, if there is a manager whose orders it follows.
            place: Whose orders these are.
        """
        keep_freed_memory()
        settings.make_folders()
        if provider is not None:
            self._log_files = start_log(provider, name)
        self._settings = settings
        self._name = name
        self._provider = provider
        self._place = place
        self._stores = Stores()
        self._keyring = Keyring.open(settings.keyring)
        self._kept = settings.socket(name).with_suffix(".targets")
        self._targets = Granted(self._check_grant, time.time)
        self._targets.add([*self._recalled(), *targets])
        self._orders = SiteOrders(revision=0, hosts=[])
        self._hubs: dict[str, SourceHub] = {}
        self._told: object = None
        self._told_at = 0.0
        self._releasing: dict[Scope, asyncio.Task[None]] = {}
        self._desk = ManagerDesk(provider.placement) if provider is not None else None
        self._loop = LoopThread("vdsa")
        self._loop.call(self._start(socket or settings.socket(name)))

    async def _start(self, socket: Path) -> None:
        self._changed = asyncio.Event()
        self._vdsa = TargetVdsa(self._keyring, self._settings.work_dir / "digests", self._store)
        self._inner = await asyncio.to_thread(self._inner_end)
        self._server, self._address = await self._inner.listen(socket, self._vdsa.serve)
        if self._provider is not None:
            self._following = [
                asyncio.create_task(self._follow_for_ever(), name="follow"),
                asyncio.create_task(self._watch_grants(), name="grants"),
            ]

    def _inner_end(self) -> Inner:
        if self._provider is None or self._desk is None or self._provider.placement.local:
            return Inner()
        address = node_address()
        return Inner(address, self._desk.certified("vdsa", [address]))

    def _store(self, scope: Scope) -> Store:
        return self._stores.at(self._targets.admit(scope))

    def _check_grant(self, target: TargetOrders) -> float:
        if self._provider is None or self._place is None:
            return math.inf
        try:
            public = self._provider.rights_key.read_text()
        except OSError as error:
            raise UnavailableError(
                f"the rights manager's public key cannot be read: {error.strerror}", "Bring it to this node."
            ) from None
        return verify(target.grant, public, target.scope, self._place[0], target.store, int(time.time())).until_s

    async def _watch_grants(self) -> None:
        refused: dict[Scope, str] = {}
        while True:
            before, refused = refused, self._targets.refused()
            for scope, why in refused.items():
                if scope not in before:
                    _log.warning("vdsa.not_granted", scope=scope.prefix, reason=why)
            self._release(refused)
            await asyncio.sleep(GRANTS_SECONDS)

    def _release(self, scopes: Iterable[Scope]) -> None:
        """Let scopes go; one whose store hangs holds up no other."""
        self._releasing = {scope: task for scope, task in self._releasing.items() if not task.done()}
        for scope in scopes:
            if scope not in self._releasing:
                task = asyncio.create_task(self._vdsa.release(scope), name=f"release {scope.prefix}")
                self._releasing[scope] = task

    # What it is to serve.

    def _recalled(self) -> list[TargetOrders]:
        try:
            return _TARGETS.validate_json(self._kept.read_bytes())
        except FileNotFoundError:
            return []
        except ValidationError as error:
            _log.warning("vdsa.targets_forgotten", reason=str(error))
            return []

    def _keep(self) -> None:
        replace_file(self._kept, _TARGETS.dump_json(self._targets.orders).decode(), 0o600)

    def admit(self, targets: Sequence[TargetOrders]) -> str:
        """Serve these scopes too; return where sources connect (`dr_cloud.actors.inner`)."""

        async def admit() -> str:
            if self._targets.add(targets):
                self._keep()
            return self._address

        return self._loop.call(admit())

    def _catalogue(self, target: TargetOrders) -> Catalogue:
        """Return the catalogue of a scope, which is served from now on."""

        async def catalogue() -> Catalogue:
            if self._targets.add([target]):
                self._keep()
            return await self._vdsa.catalogue(target.scope)

        return self._loop.call(catalogue())

    def orders_changed(self) -> None:
        """Fetch the orders now."""
        self._loop.loop.call_soon_threadsafe(self._changed.set)

    async def _follow_for_ever(self) -> None:
        fetched = 0.0
        self._changed.set()
        while True:
            due = time.monotonic() - fetched > ORDERS_SECONDS
            try:
                if due or self._changed.is_set():
                    self._changed.clear()
                    await self._follow()
                    fetched = time.monotonic()
                await self._report()
            except DrCloudError as error:
                _log.info("vdsa.manager_away", reason=str(error))
            except Exception:
                _log.exception("vdsa.follow")
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue

    async def _follow(self) -> None:
        assert self._place is not None and self._desk is not None
        orders: SiteOrders = await self._desk.ask("host_orders", *self._place)
        changed, gone = self._targets.replace(orders.targets)
        if changed:
            self._keep()
        self._release(gone)
        if orders.revision != self._orders.revision:
            _log.info("vdsa.orders", revision=orders.revision, targets=len(orders.targets), released=len(gone))
        present = {target.scope.enterprise for target in orders.targets}
        present |= {source.scope.enterprise for source in orders.sources}
        for enterprise in sorted(present):
            hub = await self._hub(enterprise)
            await hub.configure([order for order in orders.sources if order.scope.enterprise == enterprise])
        for enterprise in set(self._hubs) - present:
            await self._hubs.pop(enterprise).close()
        self._orders = orders

    async def _hub(self, enterprise: str) -> SourceHub:
        """Return the hub of an enterprise's taps on this host, begun if there is none."""
        assert self._place is not None
        if enterprise not in self._hubs:
            data_center, host, _ = self._place
            socket = self._settings.taps_socket(data_center, host, enterprise)
            socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            hub = SourceHub(self._keyring, self._connect)
            await hub.listen(host, f"unix:{socket}")
            self._hubs[enterprise] = hub
        return self._hubs[enterprise]

    async def _connect(self, scope: Scope) -> MessageStream:
        """Open a stream to the target of a scope, in a data center or behind its enterprise's door."""
        assert self._desk is not None
        target: Target = await self._desk.ask("target", scope)
        return await self._inner.connect(target.address)

    async def _report(self) -> None:
        assert self._place is not None and self._desk is not None
        data_center, host, _ = self._place
        report = SiteReport(
            revision=self._orders.revision,
            time_ns=time.time_ns(),
            version=VERSION,
            hosts=[HostReport(host=host, vdsa="installed", servers=self._seen())],
            sources=[report for hub in self._hubs.values() for report in hub.reports()],
            targets=[*self._vdsa.reports(), *(refused_target(*item) for item in self._targets.refused().items())],
        )
        what, now = essence(report), time.monotonic()
        if what == self._told and now - self._told_at < REPORT_SECONDS:
            return
        # If it is lost, the next one tells everything anew.
        self._told = None
        await self._desk.ask("host_report", data_center, host, report)
        self._told, self._told_at = what, now

    def _seen(self) -> list[SeenServer]:
        return [
            server.model_copy(update={"enterprise": enterprise})
            for enterprise, hub in self._hubs.items()
            for server in hub.seen()
        ]

    # What is asked of it.

    def where(self) -> Where:
        """Return where it runs."""
        return whereabouts()

    def plans(self, target: TargetOrders, times_ns: Sequence[int]) -> list[ImagePlan]:
        """Return the plans of many images of one scope. Raises `TimeOutOfRangeError`."""
        catalogue = self._catalogue(target)
        return [catalogue.plan(at_ns) for at_ns in times_ns]

    def plans_or_errors(self, target: TargetOrders, times_ns: Sequence[int]) -> list[ImagePlan | DrCloudError]:
        """Return the plan of each image, or why there is none."""
        catalogue = self._catalogue(target)

        def plan(at_ns: int) -> ImagePlan | DrCloudError:
            try:
                return catalogue.plan(at_ns)
            except DrCloudError as error:
                return error

        return [plan(at_ns) for at_ns in times_ns]

    def checkpoints(
        self,
        target: TargetOrders,
        which: CheckpointFilter = CheckpointFilter(),
        before: int | None = None,
        limit: int | None = None,
    ) -> list[Checkpoint]:
        """Return the newest `limit` wanted checkpoints of a scope, ascending; see `CheckpointFilter.newest`."""
        catalogue = self._catalogue(target)
        return which.newest(catalogue.checkpoints, before, limit)

    def checkpoint(
        self, scope: Scope, tag: str, description: str = "", wait_seconds: float | None = 30.0, request: str = ""
    ) -> str:
        """Make a checkpoint by hand; return the request's id once it is durable (at once if `wait_seconds` is None)."""
        return self._loop.call(self._vdsa.checkpoint(Scope(*scope), tag, description, wait_seconds, request))

    def status(self, scope: Scope) -> ScopeStatus:
        """Return the state of a scope."""

        async def status() -> ScopeStatus:
            return self._vdsa.status(Scope(*scope))

        return self._loop.call(status())

    def writes(self, target: TargetOrders, since_ns: int, until_ns: int, limit: int) -> list[Write]:
        """Return the first `limit` writes of a scope with `since_ns` ≤ time ≤ `until_ns`, ascending."""
        return list_writes(*self._journal(target), since_ns, until_ns, limit)

    def images_at(self, target: TargetOrders, times_ns: Sequence[int]) -> list[PlacedImage]:
        """Return for each time which image is served for it, and how much of the journal that holds."""
        return images_at(*self._journal(target), times_ns)

    def writes_at(self, target: TargetOrders, positions: Sequence[int]) -> list[PlacedWrite]:
        """Return for each position in the journal the write that it is in."""
        return writes_at(*self._journal(target), positions)

    def _journal(self, target: TargetOrders) -> tuple[Catalogue, JournalReader]:
        scope, catalogue = target.scope, self._catalogue(target)
        generations = catalogue.newest.generations if catalogue.newest is not None else []
        keys = self._keyring.vpg_keys(scope)
        return catalogue, JournalReader(self._stores.at(target.store), keys, scope, generations)

    def artefact(self, target: TargetOrders, test: str, path: str) -> bytes:
        """Return a file that a probe of a test left. Raises `NotFoundError`."""
        keys = self._keyring.vpg_keys(target.scope)
        return read_artefact(self._granted_store(target), keys, test, path)

    def forget_artefacts(self, target: TargetOrders, tests: Sequence[str]) -> None:
        """Delete what the probes of these tests left."""
        forget_artefacts(self._granted_store(target), target.scope, tests)

    def _granted_store(self, target: TargetOrders) -> Store:
        """Return the store of a scope to a thread of Ray's. Raises `ForbiddenError` without a grant that holds."""
        self.admit([target])

        async def granted() -> Store:
            return self._store(target.scope)

        return self._loop.call(granted())

    def stop(self) -> None:
        """Finish what is under way and close; the actor is of no use afterwards."""

        async def stop() -> None:
            if self._provider is not None:
                for task in self._following:
                    task.cancel()
            self._server.close()
            for hub in self._hubs.values():
                await hub.close()
            await asyncio.wait_for(self._vdsa.close(), 30.0)

        self._loop.call(stop())
