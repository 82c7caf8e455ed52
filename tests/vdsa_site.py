"""A site in one event loop: real taps over files, the source hub, and target VDSAs over memory; all by real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from vdsa_images import ImageReader

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.link.stream import MessageStream, connect, listen
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import SourceOrders, SourceReport
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.tap.address import VdsaAddress
from dr_cloud.tap.bitmap import open_bitmaps
from dr_cloud.tap.disks import DiskSet, DiskSource, open_disks
from dr_cloud.tap.tap import Tap
from dr_cloud.vdsa.analysis.analyzers import Analyzers
from dr_cloud.vdsa.hub import SourceHub
from dr_cloud.vdsa.target_io import TargetVdsa

ZERO = bytes(BLOCK_SIZE)


def orders(vpg: str, members: Mapping[str, Mapping[str, int]], target: str = "dc1", **more: Any) -> SourceOrders:
    settings = {"copy_number": 0, "checkpoint_seconds": 0.1, **more}
    return SourceOrders(scope=Scope("acme", vpg, target), members=members, **settings)


async def until(what: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.02)


class SiteTap:
    """The tap of a server on a host."""

    def __init__(
        self, site: Site, server: str, host: str, paths: Mapping[str, Path], copies: int, vdsa: VdsaAddress | None
    ) -> None:
        self.paths = dict(paths)
        self._state = site.folder / f"{server}-{host}.state"
        self._server, self._copies = server, copies
        self._vdsa = vdsa or VdsaAddress.parse(f"unix:{site.folder}/{host}.sock")
        self.set: DiskSet

    def _sources(self) -> list[DiskSource]:
        return [DiskSource(name=name, address=str(path)) for name, path in self.paths.items()]

    async def start(self) -> None:
        disks = await open_disks(self._sources())
        bitmaps = open_bitmaps(self._state, [(name, disk.size_bytes) for name, disk in disks.items()], self._copies)
        self.set = DiskSet(Tap(self._server, bitmaps), self._sources(), disks, self._vdsa)
        self.set.start()

    async def change(self) -> None:
        """Look at `paths` and their sizes again, as SIGHUP does."""
        await self.set.change(self._sources())

    async def stop(self) -> None:
        await self.set.stop()
        await self.set.close()

    async def write(self, disk: str, block: int, data: bytes) -> None:
        export = self.set.table.find(disk, None)
        assert export is not None
        waiting = export.pwrite(block * BLOCK_SIZE, memoryview(data), False)
        if waiting is not None:
            await waiting


class Site:
    """See the module's docstring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keyring = Keyring.open(folder / "keyring")
        self.keyring.create("acme")
        self.stores: dict[str, Store] = {}
        self.taps: list[SiteTap] = []
        self.hub: SourceHub
        self.dialled: list[Scope] = []

    async def start(self, hosts: int = 2) -> None:
        self.target = TargetVdsa(self.keyring, None, self.store)
        self.server = await listen(f"unix:{self.folder}/target", self.target.serve)
        self.analyzers = Analyzers()
        self.hub = SourceHub(self.keyring, self.connect, analyzers=self.analyzers)
        for host in range(hosts):
            await self.hub.listen(f"h{host}", f"unix:{self.folder}/h{host}.sock")

    def connect(self, scope: Scope) -> Awaitable[MessageStream]:
        self.dialled.append(scope)
        return connect(f"unix:{self.folder}/target")

    def store(self, scope: Scope) -> Store:
        if scope.target == "nowhere":
            raise DrCloudError("not served")
        return self.stores.setdefault(scope.target, open_store("memory:"))

    async def tap(
        self, server: str, host: str, copies: int = 1, vdsa: VdsaAddress | None = None, **paths: Path
    ) -> SiteTap:
        tap = SiteTap(self, server, host, paths, copies, vdsa)
        await tap.start()
        self.taps.append(tap)
        return tap

    def disk(self, name: str, blocks: int = 32, data: bytes = b"") -> Path:
        path = self.folder / name
        path.write_bytes(data.ljust(blocks * BLOCK_SIZE, b"\0"))
        return path

    async def close(self) -> None:
        for tap in self.taps:
            await tap.stop()
        await self.hub.close()
        self.server.close()
        await self.target.close()

    # What there is.

    def report(self, vpg: str, target: str = "dc1") -> SourceReport:
        return next(report for report in self.hub.reports() if report.scope == Scope("acme", vpg, target))

    def catalogue(self, vpg: str, target: str = "dc1") -> Catalogue:
        scope = Scope("acme", vpg, target)
        return Catalogue.load(self.store(scope), self.keyring.vpg_keys(scope), scope)

    async def newer(self, vpg: str, target: str = "dc1") -> Catalogue:
        """Return the catalogue as soon as it has a checkpoint to recover to that is later than now."""
        now_ns = time.time_ns()
        await until(lambda: self.report(vpg, target).durable_ns > now_ns)
        return self.catalogue(vpg, target)

    def image(self, catalogue: Catalogue, at_ns: int | None = None) -> dict[str, bytes]:
        """Return whole disks at a time (the latest): what the plan's disks hold, to their ends."""
        plan = catalogue.plan(at_ns or catalogue.newest_ns or 0)
        keys = self.keyring.vpg_keys(plan.scope)
        blocks = ImageReader(self.store(plan.scope), keys).image(plan)
        return {
            disk.name: b"".join(blocks.get((disk.index, at), ZERO) for at in range(-(-disk.size_bytes // BLOCK_SIZE)))
            for disk in plan.disks
        }
