"""A small provider on local Ray, without a manager: one VDSA and a pool of stacks, called as plain objects.

Whoever uses it needs no word of Ray: calls block and return values; an actor that died is a `DrCloudError`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from dr_cloud.actors.cluster import LOCAL, ask, start_ray
from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.pool import StackPool
from dr_cloud.actors.stack import OpenedStack
from dr_cloud.actors.vdsa import Vdsa
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, ImagePlan
from dr_cloud.model.replication import TargetOrders
from dr_cloud.stack.stack import StackStatistics
from dr_cloud.vdsa.scope import ScopeStatus

_START_SECONDS = 120.0


class RunningStack:
    """One recovery test's stack."""

    def __init__(self, provider: LocalProvider, actor: Any, plan: ImagePlan) -> None:
        """Begin to open `plan` on `actor`."""
        self.plan = plan
        self.actor = actor
        self._provider = provider
        self._test = uuid.uuid4().hex
        self._asked_ns = time.monotonic_ns()
        self._opening = self._open()

    def _open(self) -> Any:
        return self.actor.open.remote(self._test, self.plan, self._provider.store_url, asked_ns=self._asked_ns)

    def wait_open(self) -> OpenedStack:
        """Wait until it serves. An actor that died while it was idle costs no test: a new one takes its place."""
        try:
            opened: OpenedStack = ask(self._opening, "the stack")
        except UnavailableError:
            self.actor = self._provider.pool.start()
            opened = ask(self._open(), "the stack", _START_SECONDS)
        return opened

    def statistics(self) -> StackStatistics:
        """Return its counters."""
        statistics: StackStatistics = ask(self.actor.statistics.remote(), "the stack")
        return statistics

    def close(self) -> StackStatistics:
        """End the test and return its last counters."""
        try:
            statistics: StackStatistics = ask(self.actor.close.remote(), "the stack")
        except DrCloudError:
            self._provider.pool.end(self.actor)
            raise
        self._provider.pool.give_back(self.plan.scope.enterprise, self.actor)
        return statistics


class LocalProvider:
    """The provider's actors on this machine, with one store."""

    def __init__(
        self, settings: NodeSettings, store_url: str, scopes: Sequence[Scope], socket: Path, stacks: int
    ) -> None:
        """Start Ray (unless this process has it), the VDSA and the pool; return when all are ready.

        Args:
            settings: The node.
            store_url: Where the journals lie.
            scopes: What is replicated to here.
            socket: Where source VDSAs connect.
            stacks: How many idle stacks to keep.
        """
        self.store_url = store_url
        self._own_ray = not ray.is_initialized()
        self.placement = start_ray(LOCAL, "small")
        self.vdsa = Vdsa.options(**self.placement.options("vdsa")).remote(  # type: ignore[attr-defined]
            settings, "vdsa", self._targets(scopes), socket
        )
        self.pool = StackPool(self.placement, settings, "small", stacks)
        self.pool.refill()
        self.address = self.admit(scopes)
        self.pool.wait_until_ready()

    def _targets(self, scopes: Sequence[Scope]) -> list[TargetOrders]:
        return [TargetOrders(scope=scope, store=self.store_url) for scope in scopes]

    def admit(self, scopes: Sequence[Scope]) -> str:
        """Let the VDSA serve these too, until it restarts; return where sources connect."""
        address: str = ask(self.vdsa.admit.remote(self._targets(scopes)), "the VDSA", _START_SECONDS)
        return address

    def status(self, scope: Scope) -> ScopeStatus:
        """Return the state of a scope; `DrCloudError` if no source has connected yet."""
        status: ScopeStatus = ask(self.vdsa.status.remote(scope), "the VDSA")
        return status

    def checkpoints(self, scope: Scope) -> list[Checkpoint]:
        """Return every checkpoint of a scope, ascending."""
        (target,) = self._targets([scope])
        checkpoints: list[Checkpoint] = ask(self.vdsa.checkpoints.remote(target), "the VDSA")
        return checkpoints

    def checkpoint(self, scope: Scope, tag: str, description: str = "") -> str:
        """Make a checkpoint by hand and wait until it is durable; return the request's id."""
        request: str = ask(self.vdsa.checkpoint.remote(scope, tag, description), "the VDSA", _START_SECONDS)
        return request

    def open_stacks(self, scope: Scope, times_ns: Sequence[int]) -> list[RunningStack]:
        """Begin to open a stack at each time, all in parallel. `TimeOutOfRangeError` if one cannot be had."""
        (target,) = self._targets([scope])
        plans: list[ImagePlan] = ask(self.vdsa.plans.remote(target, list(times_ns)), "the VDSA")
        return [RunningStack(self, self.pool.take(scope.enterprise), plan) for plan in plans]

    def close(self) -> None:
        """End every actor, and Ray if it was started here."""
        self.pool.close()
        ray.kill(self.vdsa)
        if self._own_ray:
            ray.shutdown()
