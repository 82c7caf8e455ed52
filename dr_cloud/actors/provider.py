"""A provider on local Ray: one target VDSA and a pool of stacks, called as plain objects.

Whoever uses it needs no word of Ray: calls block and return values; an actor that died is a `DrCloudError`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.stack import OpenedStack, StackPool
from dr_cloud.actors.vdsa import Vdsa
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, ImagePlan
from dr_cloud.stack.stack import StackStatistics
from dr_cloud.vdsa.scope import ScopeStatus

_OBJECT_STORE_BYTES = 256 << 20
"""Ray carries control only, no disk data."""


def _get(reference: Any) -> Any:
    """Wait for an actor's answer; its own `DrCloudError` comes as such."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DrCloudError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise DrCloudError("the actor has died", "Its test is lost; start another.") from error


class RunningStack:
    """One recovery test's stack."""

    def __init__(self, provider: LocalProvider, enterprise: str, actor: Any, plan: ImagePlan) -> None:
        """Begin to open `plan` on `actor`."""
        self.plan = plan
        self._provider = provider
        self._enterprise = enterprise
        self._actor = actor
        self._asked_ns = time.monotonic_ns()
        self._opening = actor.open.remote(plan, asked_ns=self._asked_ns)

    def wait_open(self) -> OpenedStack:
        """Wait until it serves. An actor that died while it was idle costs no test: a new one takes its place."""
        try:
            opened: OpenedStack = _get(self._opening)
        except DrCloudError as error:
            if not isinstance(error.__cause__, ray.exceptions.RayActorError):
                raise
            self._actor = self._provider.pool.start()
            opened = _get(self._actor.open.remote(self.plan, asked_ns=self._asked_ns))
        return opened

    def statistics(self) -> StackStatistics:
        """Return its counters."""
        statistics: StackStatistics = _get(self._actor.statistics.remote())
        return statistics

    def close(self) -> StackStatistics:
        """End the test and return its last counters."""
        try:
            statistics: StackStatistics = _get(self._actor.close.remote())
        except DrCloudError:
            self._provider.pool.end([self._actor])
            raise
        self._provider.pool.give_back(self._enterprise, self._actor)
        return statistics


class LocalProvider:
    """The provider's actors on this machine."""

    def __init__(self, settings: NodeSettings, target: str, address: str, stacks: int) -> None:
        """Start Ray (unless this process has it), the target VDSA and the pool; return when all are ready.

        Args:
            settings: The node.
            target: The target's name, the third part of a scope.
            address: Where source VDSAs connect.
            stacks: How many idle stacks to keep.
        """
        self._own_ray = not ray.is_initialized()
        if self._own_ray:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
        self.vdsa = Vdsa.remote(settings, target, address)  # type: ignore[attr-defined]
        self.pool = StackPool(settings, stacks)
        self.address: str = _get(self.vdsa.address.remote())
        self.pool.wait_until_ready()

    def status(self, scope: Scope) -> ScopeStatus:
        """Return the state of a scope; `DrCloudError` if no source has connected yet."""
        status: ScopeStatus = _get(self.vdsa.status.remote(scope))
        return status

    def checkpoints(self, scope: Scope) -> list[Checkpoint]:
        """Return every checkpoint of a scope, ascending."""
        checkpoints: list[Checkpoint] = _get(self.vdsa.checkpoints.remote(scope))
        return checkpoints

    def checkpoint(self, scope: Scope, tag: str, description: str = "") -> str:
        """Make a checkpoint by hand and wait until it is durable; return the request's id."""
        request: str = _get(self.vdsa.checkpoint.remote(scope, tag, description))
        return request

    def write_times(self, scope: Scope, after_ns: int, until_ns: int) -> NDArray[np.uint64]:
        """Return the times of all writes with `after_ns` < time ≤ `until_ns`, ascending, each once."""
        times: NDArray[np.uint64] = _get(self.vdsa.write_times.remote(scope, after_ns, until_ns))
        return times

    def open_stacks(self, scope: Scope, times_ns: Sequence[int]) -> list[RunningStack]:
        """Begin to open a stack at each time, all in parallel. `TimeOutOfRangeError` if one cannot be had."""
        plans: list[ImagePlan] = _get(self.vdsa.plans.remote(scope, list(times_ns)))
        return [RunningStack(self, scope.enterprise, self.pool.take(scope.enterprise), plan) for plan in plans]

    def close(self) -> None:
        """End every actor, and Ray if it was started here."""
        self.pool.close()
        ray.kill(self.vdsa)
        if self._own_ray:
            ray.shutdown()
