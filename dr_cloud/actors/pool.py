"""Stack actors of one data center: idle ones at hand, so that a test does not wait for a process to start.

A process that held one tenant's data or keys is kept for that tenant's next test, or ended; it never serves another.

Crash recovery
    The actors outlive the pool's owner. A new owner asks each what it serves (`adopt`): tests go on as they were.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections.abc import Mapping
from typing import Any

import ray

from dr_cloud.actors.cluster import Placement, ask
from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.stack import OpenedStack, StackActor
from dr_cloud.model.errors import UnavailableError

_START_SECONDS = 120.0
_REFILL_SECONDS = 5.0


class StackPool:
    """See the module's docstring. Safe to use from many threads."""

    def __init__(
        self,
        placement: Placement,
        settings: NodeSettings,
        prefix: str,
        idle: int,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare; `adopt` and `refill` bring it to life.

        Args:
            placement: The provider's Ray.
            settings: Of the nodes.
            prefix: What the actors' names begin with: no other pool has it.
            idle: How many actors to keep at hand that have served nobody.
            labels: Of the nodes on which they may run.
        """
        self._placement = placement
        self._settings = settings
        self._prefix = f"stack/{prefix}/"
        self._idle_wanted = idle
        self._labels = dict(labels or {})
        self._lock = threading.Lock()
        self._filling = threading.Lock()
        self._closed = False
        self._fresh: list[Any] = []
        self._kept: dict[str, list[Any]] = {}

    def adopt(self) -> dict[str, tuple[OpenedStack, Any]]:
        """Take over the actors of a former owner; return those that serve, by the test's id."""
        serving = {}
        for name in self._placement.names():
            if name.startswith(self._prefix):
                with contextlib.suppress(UnavailableError):
                    actor = self._placement.find(name)
                    opened: OpenedStack | None = ask(actor.opened.remote(), name)
                    if opened is not None:
                        serving[opened.test] = (opened, actor)
                    else:  # Whom it served before is not known any more.
                        self.end(actor)
        return serving

    def refill(self) -> None:
        """Start actors until enough are idle; they become ready on their own."""
        with self._filling:
            while True:
                with self._lock:
                    if self._closed or len(self._fresh) >= self._idle_wanted:
                        return
                # Ray may take a second to note an actor: nobody who takes one waits for that.
                actor = self.start()
                with self._lock:
                    self._fresh.append(actor)

    def refill_soon(self) -> None:
        """Do so in the background, and not at once: processes that start would take their time from tests that open."""
        later = threading.Timer(_REFILL_SECONDS, self.refill)
        later.daemon = True
        later.start()

    def start(self, labels: Mapping[str, str] | None = None) -> Any:
        """Start an actor that is not kept here: for a test whose idle actor turned out to be dead.

        Args:
            labels: Of the nodes on which it may run; None is the pool's.
        """
        name = f"{self._prefix}{uuid.uuid4().hex}"
        options = self._placement.options(name, self._labels if labels is None else labels)
        return StackActor.options(**options).remote(self._settings)  # type: ignore[attr-defined]

    def wait_until_ready(self) -> list[int]:
        """Wait until every idle actor is ready; return their process ids."""
        with self._lock:
            references = [actor.where.remote() for actor in self._fresh]
        return [ask(reference, "an idle stack", _START_SECONDS).pid for reference in references]

    def take(self, enterprise: str, labels: Mapping[str, str] | None = None) -> Any:
        """Return an actor for a test of `enterprise`: an idle one that served it before, or that served nobody.

        Args:
            enterprise: Whose test it is.
            labels: Of the nodes on which it may run; None is the pool's. Where they are others, a new one is started.
        """
        if labels is not None and dict(labels) != self._labels:
            return self.start(labels)
        with self._lock:
            if kept := self._kept.get(enterprise):
                return kept.pop()
            return self._fresh.pop(0) if self._fresh else self.start()

    def give_back(self, enterprise: str, actor: Any) -> None:
        """Keep an actor whose test of `enterprise` was closed, or end it where enough are kept."""
        with self._lock:
            kept = self._kept.setdefault(enterprise, [])
            if len(kept) < self._idle_wanted:
                kept.append(actor)
                return
        self.end(actor)

    def forget(self, enterprise: str) -> None:
        """End the actors that are kept for an enterprise."""
        with self._lock:
            kept = self._kept.pop(enterprise, [])
        for actor in kept:
            self.end(actor)

    def close(self) -> None:
        """End every idle actor."""
        with self._lock:
            self._closed = True
            idle = [*self._fresh, *itertools.chain.from_iterable(self._kept.values())]
            self._fresh.clear()
            self._kept.clear()
        for actor in idle:
            self.end(actor)

    @staticmethod
    def end(actor: Any) -> None:
        """End one actor, whatever it does."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(actor, no_restart=True)
