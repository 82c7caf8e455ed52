"""The `Recovered` actor: the servers of one failover, at their target.

Purpose
    It serves their disks (`dr_cloud.recovery.servers`) from the moment of the failover on, promotes them once the
    failover is committed, and forgets them when it is rolled back.

Where
    On a node of the data center that policy allows. What it writes lies in the node's work folder, so it must come back
    to the same node, or to one that shares that folder: elsewhere it says so, and waits to be started again.

Crash recovery
    Ray starts it again, with what it was given at first; the folder tells how far it was. After the end of the whole
    Ray the manager starts it anew, by the same name.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

import ray

from dr_cloud.actors.cluster import Where, whereabouts
from dr_cloud.actors.node import LoopThread, NodeSettings, Stores
from dr_cloud.journal.reader import JournalReader
from dr_cloud.manager.fabric import ServedStack
from dr_cloud.model.errors import UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.recovery.servers import RecoveredProgress, RecoveredRecord, RecoveredServers, read_record
from dr_cloud.seal.keyring import Keyring
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.stack.serve import keep_tidy
from dr_cloud.stack.stack import Stack

_SOON_SECONDS: Final = 60.0


def recovered_name(failover: str) -> str:
    """Return the name of the actor of a failover."""
    return f"recovered/{failover}"


class RecoveredProcess:
    """The servers of one failover: all of the actor but Ray."""

    def __init__(
        self, settings: NodeSettings, failover: str, vdsa: Path, record: RecoveredRecord | None = None
    ) -> None:
        """Recover the servers, or go on with them.

        Args:
            settings: The node.
            failover: The id of their failover.
            vdsa: Where taps find their VDSA.
            record: What they are to be; None: they were here before, and if they are not, nothing is begun.

        Raises:
            UnavailableError: They are on another node.
            DrCloudError: They cannot be served.
        """
        settings.make_folders()
        self._loop = LoopThread("recovered")
        folder = settings.work_dir / "recovered" / failover
        record = read_record(folder) or record
        if record is None:
            raise UnavailableError(
                f"the recovered disks of {failover} are not on this node", "Start the node that holds them."
            )
        folder.parent.mkdir(exist_ok=True, mode=0o700)
        started_ns = time.monotonic_ns()
        self._stack: Stack | None = None
        if not record.promoted:
            cache = _cache(settings, record)
            self._stack = Stack.open(record.plan, cache, settings.work_dir, clock_ns=time.monotonic_ns)
            self._tidying = asyncio.run_coroutine_threadsafe(keep_tidy(cache), self._loop.loop)
        images = self._stack.exports if self._stack is not None else []
        self._servers = self._loop.call(
            RecoveredServers.open(
                folder,
                record,
                images,
                lambda server: settings.socket(f"{recovered_name(failover)}/{server}"),
                vdsa,
            )
        )
        self._opened = ServedStack(
            at_ns=record.plan.at_ns,
            note=record.plan.note,
            uris=self._servers.uris,
            open_seconds=(time.monotonic_ns() - started_ns) / 1e9,
        )

    def opened(self) -> ServedStack:
        """Return where they are served."""
        return self._opened

    def progress(self) -> RecoveredProgress:
        """Return how they stand."""

        async def progress() -> RecoveredProgress:
            return self._servers.progress()

        return self._loop.call(progress())

    def promote(self) -> None:
        """Begin to make their disks their own. May be repeated."""

        async def promote() -> None:
            self._servers.promote()

        self._loop.call(promote())

    def pause(self, reason: str) -> None:
        """Serve nobody until `resume`; may be repeated."""
        self._loop.call(self._servers.pause(reason))

    def resume(self) -> None:
        """Serve again; may be repeated."""
        self._loop.call(self._servers.resume())

    def discard(self) -> None:
        """End them; what was written to them is gone."""
        self._loop.call(self._servers.discard(), _SOON_SECONDS)

    def stop(self) -> None:
        """Finish what is under way; the folder stays."""
        self._loop.call(self._servers.close(), _SOON_SECONDS)


def _cache(settings: NodeSettings, record: RecoveredRecord) -> ObjectCache:
    scope, plan = Scope(*record.plan.scope), record.plan
    keys = Keyring.open(settings.keyring).vpg_keys(scope)
    reader = JournalReader(Stores().at(record.store), keys, scope, plan.generations)
    folder = CacheFolder(settings.cache_dir, scope, plan.journal, limit_bytes=settings.cache_limit_bytes)
    return ObjectCache(folder, reader)


@ray.remote(max_restarts=-1, max_task_retries=3, num_cpus=0)
class Recovered(RecoveredProcess):
    """See the module's docstring. Methods may be tried again after a restart: each is safe to repeat."""

    def __init__(
        self, settings: NodeSettings, failover: str, vdsa: Path, record: RecoveredRecord | None = None
    ) -> None:
        """See `RecoveredProcess`. Started again by Ray, it goes on with what is on the node, and begins nothing."""
        again = ray.get_runtime_context().was_current_actor_reconstructed
        super().__init__(settings, failover, vdsa, None if again else record)

    def where(self) -> Where:
        """Return where it runs."""
        return whereabouts()
