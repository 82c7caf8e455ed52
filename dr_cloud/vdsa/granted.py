"""What a VDSA is to serve, each scope only as long as a grant says that it may lie here. Pure: the check is given.

The manager's orders say what to serve, and where it lies. The rights manager's grants (`dr_cloud.rights.grant`) say
that it may: whoever writes orders without asking it, into the database or on the way, opens nothing.

A grant that is still good is kept when newer orders come without one, or with an older one: then the rights manager
does not answer, and what it has allowed goes on for its time. What orders no longer name is gone at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from dr_cloud.model.errors import DrCloudError, ForbiddenError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import TargetOrders

Check = Callable[[TargetOrders], float]
"""Returns when the grant of these orders ends, in seconds since the epoch. Raises `DrCloudError` if it is not good."""


class _Held(NamedTuple):
    orders: TargetOrders
    until_s: float
    problem: str


class Granted:
    """See the module's docstring. All methods belong to one thread."""

    def __init__(self, check: Check, clock_s: Callable[[], float]) -> None:
        """Begin with nothing.

        Args:
            check: Checks a grant.
            clock_s: Seconds since the epoch.
        """
        self._check = check
        self._clock_s = clock_s
        self._held: dict[Scope, _Held] = {}

    @property
    def orders(self) -> list[TargetOrders]:
        """All that is to be served, with the best grants."""
        return [held.orders for held in self._held.values()]

    def add(self, targets: Iterable[TargetOrders]) -> bool:
        """Serve these too; return whether that changes anything."""
        before = self.orders
        for target in targets:
            self._held[target.scope] = self._better(target)
        return self.orders != before

    def replace(self, targets: Iterable[TargetOrders]) -> tuple[bool, list[Scope]]:
        """Serve these and no others; return whether that changes anything, and the scopes that are gone."""
        before, wanted = self.orders, {target.scope: self._better(target) for target in targets}
        gone = [scope for scope in self._held if scope not in wanted]
        self._held = wanted
        return self.orders != before, gone

    def _better(self, target: TargetOrders) -> _Held:
        held = self._held.get(target.scope)
        if held is not None and held.orders == target and self._problem(held) == "":
            return held
        try:
            fresh = _Held(target, self._check(target), "")
        except DrCloudError as error:
            fresh = _Held(target, 0.0, f"it may not be kept here: {error}")
        return fresh if held is None or held.orders.store != target.store or held.until_s <= fresh.until_s else held

    def _problem(self, held: _Held) -> str:
        if held.problem:
            return held.problem
        return "" if held.until_s > self._clock_s() else "its grant has ended, and the manager has sent no other"

    def admit(self, scope: Scope) -> str:
        """Return the store of a scope. Raises `NotFoundError` or `ForbiddenError`."""
        held = self._held.get(scope)
        if held is None:
            raise NotFoundError(f"{scope.prefix} is not served here", "Ask the manager where its target is.")
        if problem := self._problem(held):
            raise ForbiddenError(f"{scope.prefix}: {problem}", "See what policy says of it: dr-cloud rights explain.")
        return held.orders.store

    def refused(self) -> dict[Scope, str]:
        """Return what is to be served and may not be now, and why."""
        return {scope: problem for scope, held in self._held.items() if (problem := self._problem(held))}
