"""The `Vdsa` actor: a target VDSA on a provider's host.

Ray restarts it when it dies. It then comes up at the same address, with nothing: each scope is opened again by its
source's next hello, recovers from the store, and claims a new generation. Nothing that was acknowledged is lost, and a
former self that still ran somewhere would be fenced.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from dr_cloud.actors.node import LoopThread, NodeSettings
from dr_cloud.journal.reader import JournalReader
from dr_cloud.link.stream import address_of, listen, split_address
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, ImagePlan
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.tap.memory import keep_freed_memory
from dr_cloud.vdsa.scope import ScopeStatus
from dr_cloud.vdsa.target_io import TargetVdsa


@ray.remote(max_restarts=-1, max_task_retries=3, num_cpus=0)
class Vdsa:
    """One target VDSA. Methods may be tried again after a restart: each is safe to repeat."""

    def __init__(self, settings: NodeSettings, name: str, address: str) -> None:
        """Serve sources.

        Args:
            settings: The node.
            name: The target's name, the third part of a scope.
            address: Where sources connect (`dr_cloud.link.stream`); the same after a restart.
        """
        keep_freed_memory()
        self._store = open_store(settings.store_url)
        self._keyring = Keyring.open(settings.keyring)
        self._loop = LoopThread("vdsa")
        self._vdsa, self._server = self._loop.call(self._start(settings, name, address))

    async def _start(self, settings: NodeSettings, name: str, address: str) -> tuple[TargetVdsa, asyncio.Server]:
        scheme, path, _ = split_address(address)
        if scheme == "unix":  # of a former self: its actor's name makes sure that there is one at a time
            Path(path).unlink(missing_ok=True)

        def admit(scope: Scope) -> Store:
            if scope.target != name:
                raise DrCloudError(f"this is target {name!r}, not {scope.target!r}", "Connect to the other target.")
            return self._store

        vdsa = TargetVdsa(self._keyring, settings.work_dir / "digests", admit)
        return vdsa, await listen(address, vdsa.serve)

    def address(self) -> str:
        """Return where sources connect."""
        return address_of(self._server)

    def plan(self, scope: Scope, at_ns: int) -> ImagePlan:
        """Return the plan of an image. Raises `TimeOutOfRangeError`."""
        return self._loop.call(self._vdsa.plan(Scope(*scope), at_ns))

    def plans(self, scope: Scope, times_ns: list[int]) -> list[ImagePlan]:
        """Return the plans of many images of one scope."""
        catalogue = self._loop.call(self._vdsa.catalogue(Scope(*scope)))
        return [catalogue.plan(at_ns) for at_ns in times_ns]

    def checkpoints(self, scope: Scope) -> list[Checkpoint]:
        """Return every checkpoint of a scope, ascending."""
        return list(self._loop.call(self._vdsa.catalogue(Scope(*scope))).checkpoints)

    def checkpoint(self, scope: Scope, tag: str, description: str = "", wait_seconds: float | None = 30.0) -> str:
        """Make a checkpoint by hand; return the request's id once it is durable (at once if `wait_seconds` is None)."""
        return self._loop.call(self._vdsa.checkpoint(Scope(*scope), tag, description, wait_seconds))

    def status(self, scope: Scope) -> ScopeStatus:
        """Return the state of a scope."""

        async def status() -> ScopeStatus:
            return self._vdsa.status(Scope(*scope))

        return self._loop.call(status())

    def write_times(self, scope: Scope, after_ns: int, until_ns: int) -> NDArray[np.uint64]:
        """Return the times, ascending and each once, of all writes with `after_ns` < time ≤ `until_ns`."""
        catalogue = self._loop.call(self._vdsa.catalogue(Scope(*scope)))
        spans = zip([None, *catalogue.checkpoints], catalogue.checkpoints, strict=False)
        refs = [
            ref
            for before, checkpoint in spans
            if checkpoint.time_ns > after_ns and (before is None or before.time_ns < until_ns)
            for ref in checkpoint.objects
        ]
        keys = self._keyring.vpg_keys(Scope(*scope))
        reader = JournalReader(self._store, keys, Scope(*scope), catalogue.checkpoints[-1].generations)
        times = [reader.rows(ref)["time_ns"] for ref in refs if ref.rows]
        found = np.unique(np.concatenate(times)) if times else np.empty(0, np.uint64)
        return found[(found > after_ns) & (found <= until_ns)]

    def stop(self) -> None:
        """Finish what is under way and close; the actor is of no use afterwards."""

        async def stop() -> None:
            self._server.close()
            await asyncio.wait_for(self._vdsa.close(), 30.0)

        self._loop.call(stop())
