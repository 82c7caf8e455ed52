"""The `Vdsa` actor: the VDSA of one of the provider's hosts.

Purpose
    As a target it takes in the streams of the scopes it was told to serve, each into its own store. Who tells it is
    whoever opens a connection to it or asks for a plan (`admit`), and the manager's orders.

Crash recovery
    Ray restarts it when it dies. It then comes up with nothing: each scope is admitted and opened again by its source's
    next hello, recovers from the store, and claims a new generation. Nothing that was acknowledged is lost, and a
    former self that still ran somewhere would be fenced.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from dr_cloud.actors.inner import Inner
from dr_cloud.actors.node import LoopThread, NodeSettings, Stores
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.errors import NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, ImagePlan
from dr_cloud.model.replication import TargetOrders
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.store import Store
from dr_cloud.tap.memory import keep_freed_memory
from dr_cloud.vdsa.scope import ScopeStatus
from dr_cloud.vdsa.target_io import TargetVdsa


@ray.remote(max_restarts=-1, max_task_retries=3, num_cpus=0)
class Vdsa:
    """One VDSA. Methods may be tried again after a restart: each is safe to repeat."""

    def __init__(
        self, settings: NodeSettings, name: str, targets: Sequence[TargetOrders] = (), socket: Path | None = None
    ) -> None:
        """Serve sources.

        Args:
            settings: The node.
            name: The actor's name, unique in the provider.
            targets: What to serve from the start, also after a restart.
            socket: Where sources connect, if not where the name leads; the same after a restart.
        """
        keep_freed_memory()
        settings.make_folders()
        self._stores = Stores()
        self._keyring = Keyring.open(settings.keyring)
        self._inner = Inner()
        self._targets = {target.scope: target for target in targets}
        self._loop = LoopThread("vdsa")
        work_dir = settings.work_dir / "digests"
        self._vdsa, self._server, self._address = self._loop.call(
            self._start(work_dir, socket or settings.socket(name))
        )

    async def _start(self, work_dir: Path, socket: Path) -> tuple[TargetVdsa, asyncio.Server, str]:
        vdsa = TargetVdsa(self._keyring, work_dir, self._store)
        return vdsa, *await self._inner.listen(socket, vdsa.serve)

    def _store(self, scope: Scope) -> Store:
        target = self._targets.get(scope)
        if target is None:
            raise NotFoundError(f"{scope.prefix} is not served here", "Ask the manager where its target is.")
        return self._stores.at(target.store)

    def process(self) -> int:
        """Return the process id."""
        return os.getpid()

    def admit(self, targets: Sequence[TargetOrders]) -> str:
        """Serve these scopes too; return where sources connect (`dr_cloud.actors.inner`)."""

        async def admit() -> str:
            self._targets.update((target.scope, target) for target in targets)
            return self._address

        return self._loop.call(admit())

    def plans(self, target: TargetOrders, times_ns: Sequence[int]) -> list[ImagePlan]:
        """Return the plans of many images of one scope. Raises `TimeOutOfRangeError`."""
        self.admit([target])
        catalogue = self._loop.call(self._vdsa.catalogue(target.scope))
        return [catalogue.plan(at_ns) for at_ns in times_ns]

    def checkpoints(self, target: TargetOrders) -> list[Checkpoint]:
        """Return every checkpoint of a scope, ascending."""
        self.admit([target])
        return list(self._loop.call(self._vdsa.catalogue(target.scope)).checkpoints)

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

    def write_times(self, target: TargetOrders, after_ns: int, until_ns: int) -> NDArray[np.uint64]:
        """Return the times, ascending and each once, of all writes with `after_ns` < time ≤ `until_ns`."""
        checkpoints = self.checkpoints(target)
        spans = zip([None, *checkpoints], checkpoints, strict=False)
        refs = [
            ref
            for before, checkpoint in spans
            if checkpoint.time_ns > after_ns and (before is None or before.time_ns < until_ns)
            for ref in checkpoint.objects
        ]
        scope = target.scope
        store = self._stores.at(target.store)
        reader = JournalReader(store, self._keyring.vpg_keys(scope), scope, checkpoints[-1].generations)
        times = [reader.rows(ref)["time_ns"] for ref in refs if ref.rows]
        found = np.unique(np.concatenate(times)) if times else np.empty(0, np.uint64)
        return found[(found > after_ns) & (found <= until_ns)]

    def stop(self) -> None:
        """Finish what is under way and close; the actor is of no use afterwards."""

        async def stop() -> None:
            self._server.close()
            await asyncio.wait_for(self._vdsa.close(), 30.0)

        self._loop.call(stop())
