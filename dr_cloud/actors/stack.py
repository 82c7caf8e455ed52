"""The `Stack` actor: one recovery test's disks, served from a process of its own.

A stack actor that dies takes its own test with it and nothing else: it is not restarted, for its write log is gone by
design. It serves one test at a time. Between tests it may be kept for its own enterprise, never for another: a process
that held one tenant's data or keys is not given to the next.
"""

from __future__ import annotations

import threading
import time

import ray
from pydantic import BaseModel, ConfigDict

from dr_cloud.actors.cluster import Where, whereabouts
from dr_cloud.actors.node import LoopThread, NodeSettings, Stores
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.errors import ConflictError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import ImagePlan
from dr_cloud.seal.keyring import Keyring
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.stack.serve import StackServer, serve_stack
from dr_cloud.stack.stack import Stack, StackStatistics


class OpenedStack(BaseModel):
    """What whoever asked for a stack gets back."""

    model_config = ConfigDict(frozen=True)

    test: str
    enterprise: str
    at_ns: int
    note: str
    uris: dict[str, list[str]]
    """The NBD URIs of each disk, by the disk's name."""
    open_seconds: float


@ray.remote(max_restarts=0, num_cpus=0)
class StackActor:
    """Serves one stack at a time."""

    def __init__(self, settings: NodeSettings) -> None:
        """Make ready: what takes time and needs no plan is done here.

        Args:
            settings: The node.
        """
        self._settings = settings
        self._stores = Stores()
        self._keyring = Keyring.open(settings.keyring)
        self._loop = LoopThread("stack")
        self._caches: dict[tuple[Scope, str, int], ObjectCache] = {}
        self._turn = threading.Lock()
        self._server: StackServer | None = None
        self._opened: OpenedStack | None = None
        settings.make_folders()
        self._writelogs = settings.work_dir / "writelogs"
        self._writelogs.mkdir(exist_ok=True, mode=0o700)

    def where(self) -> Where:
        """Return where it runs."""
        return whereabouts()

    def opened(self) -> OpenedStack | None:
        """Return the test that is served; None if none is."""
        return self._opened

    def open(
        self, test: str, plan: ImagePlan, store_url: str, quota_bytes: int | None = None, asked_ns: int | None = None
    ) -> OpenedStack:
        """Open the stack of `plan` and serve it.

        Args:
            test: The id of the test, unique. Asked again for the one it serves, it says the same again.
            plan: What to serve.
            store_url: Where the journal is.
            quota_bytes: How much the test may write.
            asked_ns: When it was asked for (monotonic clock of this machine), for the time to first byte.
        """
        with self._turn:
            if self._opened is not None and self._opened.test == test:
                return self._opened
            if self._opened is not None:
                raise ConflictError(f"the stack serves test {self._opened.test}", "Close that test first.")
            cache = self._cache(plan, store_url)
            stack = Stack.open(
                plan,
                cache,
                self._writelogs,
                clock_ns=time.monotonic_ns,
                quota_bytes=quota_bytes,
                started_ns=asked_ns,
            )
            path = self._settings.socket(f"stack/{test}")
            self._server = self._loop.call(serve_stack(stack, cache, unix_path=str(path)))
            self._opened = OpenedStack(
                test=test,
                enterprise=Scope(*plan.scope).enterprise,
                at_ns=plan.at_ns,
                note=plan.note,
                uris=self._server.uris,
                open_seconds=stack.statistics().open_seconds,
            )
            return self._opened

    def _cache(self, plan: ImagePlan, store_url: str) -> ObjectCache:
        # A reader knows the writers up to its plan's: after a take-over, another is needed.
        place = (Scope(*plan.scope), plan.journal, len(plan.generations))
        if place not in self._caches:
            scope = place[0]
            reader = JournalReader(self._stores.at(store_url), self._keyring.vpg_keys(scope), scope, plan.generations)
            folder = CacheFolder(
                self._settings.cache_dir, scope, plan.journal, limit_bytes=self._settings.cache_limit_bytes
            )
            self._caches[place] = ObjectCache(folder, reader)
        return self._caches[place]

    def statistics(self) -> StackStatistics:
        """Return the counters of the test under way. Raises `NotFoundError` if there is none."""
        stack = self._stack()

        async def statistics() -> StackStatistics:
            return stack.statistics()

        return self._loop.call(statistics())

    def _stack(self) -> Stack:
        server = self._server
        if server is None:
            raise NotFoundError("the stack serves no test", "Open one first.")
        return server.stack

    def pause(self, reason: str) -> None:
        """Give EPERM for every request until `resume`; may be repeated. Raises `NotFoundError` if there is no test."""
        stack = self._stack()

        async def pause() -> None:
            stack.pause(reason)

        self._loop.call(pause())

    def resume(self) -> None:
        """Go on as before `pause`. Raises `NotFoundError` if there is no test."""
        stack = self._stack()

        async def resume() -> None:
            stack.resume()

        self._loop.call(resume())

    def close(self) -> StackStatistics:
        """End the test: close its exports, remove its write log, return its last counters."""
        with self._turn:
            statistics = self.statistics()
            server, self._server, self._opened = self._server, None, None
            assert server is not None
            self._loop.call(server.close())
            return statistics
