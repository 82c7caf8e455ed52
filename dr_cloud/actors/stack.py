"""The `Stack` actor: one recovery test's disks, served from a process of its own; and a pool of idle ones.

A stack actor that dies takes its own test with it and nothing else: it is not restarted, for its write log is gone by
design. It serves one test at a time. Between tests it may be kept for its own enterprise, never for another: a process
that held one tenant's data or keys is not given to the next.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterable
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict

from dr_cloud.actors.node import LoopThread, NodeSettings
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import ImagePlan
from dr_cloud.seal.keyring import Keyring
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.stack.serve import StackServer, serve_stack
from dr_cloud.stack.stack import Stack, StackStatistics
from dr_cloud.store.open import open_store


class OpenedStack(BaseModel):
    """What whoever asked for a stack gets back."""

    model_config = ConfigDict(frozen=True)

    at_ns: int
    note: str
    uris: dict[str, list[str]]
    """The NBD URIs of each disk, by the disk's name."""
    open_seconds: float


@ray.remote(max_restarts=0, num_cpus=0)
class StackActor:
    """Serves one stack at a time."""

    def __init__(self, settings: NodeSettings, name: str) -> None:
        """Make ready: what takes time and needs no plan is done here.

        Args:
            settings: The node.
            name: The actor's name, unique on the node: part of its sockets' names.
        """
        self._settings = settings
        self._name = name
        self._store = open_store(settings.store_url)
        self._keyring = Keyring.open(settings.keyring)
        self._loop = LoopThread("stack")
        self._caches: dict[tuple[Scope, str, int], ObjectCache] = {}
        self._server: StackServer | None = None
        self._tests = itertools.count(1)
        for folder in (settings.run_dir, settings.work_dir / "writelogs"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def ready(self) -> int:
        """Answer once the actor is idle, with its process id."""
        return os.getpid()

    def open(self, plan: ImagePlan, quota_bytes: int | None = None, asked_ns: int | None = None) -> OpenedStack:
        """Open the stack of `plan` and serve it.

        Args:
            plan: What to serve.
            quota_bytes: How much the test may write.
            asked_ns: When it was asked for (monotonic clock of this machine), for the time to first byte.
        """
        if self._server is not None:
            raise DrCloudError(f"stack actor {self._name} serves another test", "Close that test first.")
        stack = Stack.open(
            plan,
            self._cache(plan),
            self._settings.work_dir / "writelogs",
            clock_ns=time.monotonic_ns,
            quota_bytes=quota_bytes,
            started_ns=asked_ns,
        )
        path = self._settings.run_dir / f"{self._name}-{next(self._tests)}.sock"
        self._server = self._loop.call(serve_stack(stack, self._cache(plan), unix_path=str(path)))
        return OpenedStack(
            at_ns=plan.at_ns,
            note=plan.note,
            uris=self._server.uris,
            open_seconds=stack.statistics().open_seconds,
        )

    def _cache(self, plan: ImagePlan) -> ObjectCache:
        # A reader knows the writers up to its plan's: after a take-over, another is needed.
        place = (Scope(*plan.scope), plan.journal, len(plan.generations))
        if place not in self._caches:
            scope = place[0]
            reader = JournalReader(self._store, self._keyring.vpg_keys(scope), scope, plan.generations)
            folder = CacheFolder(
                self._settings.cache_dir, scope, plan.journal, limit_bytes=self._settings.cache_limit_bytes
            )
            self._caches[place] = ObjectCache(folder, reader)
        return self._caches[place]

    def statistics(self) -> StackStatistics:
        """Return the counters of the test under way."""
        if self._server is None:
            raise DrCloudError(f"stack actor {self._name} serves no test", "Open one first.")
        stack = self._server.stack

        async def statistics() -> StackStatistics:
            return stack.statistics()

        return self._loop.call(statistics())

    def close(self) -> StackStatistics:
        """End the test: close its exports, remove its write log, return its last counters."""
        statistics = self.statistics()
        server, self._server = self._server, None
        assert server is not None
        self._loop.call(server.close())
        return statistics


class StackPool:
    """Idle stack actors of one node, so that a test does not wait for a process to start.

    Not thread-safe: it belongs to one actor or one program.
    """

    def __init__(self, settings: NodeSettings, idle: int) -> None:
        """Keep `idle` actors at hand that have served nobody."""
        self._settings = settings
        self._idle_wanted = idle
        self._numbers = itertools.count(1)
        self._fresh: list[Any] = []
        self._kept: dict[str, list[Any]] = {}
        self._prefix = f"stack-{os.getpid()}"
        self.refill()

    def refill(self) -> None:
        """Start actors until enough are idle; they become ready on their own."""
        while len(self._fresh) < self._idle_wanted:
            self._fresh.append(self.start())

    def start(self) -> Any:
        """Start an actor that is not kept here: for a test whose idle actor turned out to be dead."""
        return StackActor.remote(self._settings, f"{self._prefix}-{next(self._numbers)}")  # type: ignore[attr-defined]

    def wait_until_ready(self, timeout_seconds: float = 120.0) -> list[int]:
        """Wait until every idle actor is ready; return their process ids."""
        return list(ray.get([actor.ready.remote() for actor in self._fresh], timeout=timeout_seconds))

    def take(self, enterprise: str) -> Any:
        """Return an idle actor for a test of `enterprise`: one that served it before, or one that served nobody."""
        kept = self._kept.get(enterprise)
        if kept:
            return kept.pop()
        if not self._fresh:
            self.refill()
        return self._fresh.pop(0)

    def give_back(self, enterprise: str, actor: Any) -> None:
        """Keep an actor whose test of `enterprise` was closed, or end it where enough are kept."""
        kept = self._kept.setdefault(enterprise, [])
        if len(kept) < self._idle_wanted:
            kept.append(actor)
        else:
            self.end([actor])

    def end(self, actors: Iterable[Any]) -> None:
        """End actors, whatever they do."""
        for actor in actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def close(self) -> None:
        """End every idle actor."""
        self.end([*self._fresh, *itertools.chain.from_iterable(self._kept.values())])
        self._fresh.clear()
        self._kept.clear()
