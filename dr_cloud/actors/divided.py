"""One API over many managers: where each enterprise's control is in a process of its own (R12, two architectures).

The API's process has a `Cloud` for what is the provider's. A call that names an enterprise is carried to that
enterprise's manager and back; rights, tenancy and audit are checked there. Idempotency keys go along with the call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel

from dr_cloud.actors.cluster import ANSWER_SECONDS, ask
from dr_cloud.manager.cloud import Cloud
from dr_cloud.model.principal import Principal

M = TypeVar("M", bound=BaseModel)

CARRIED_SECONDS: Final = 2 * ANSWER_SECONDS
"""For a call: longer than the API lets anyone wait for anything."""
_HERE: Final = frozenset({"remove_enterprise", "create_pairing", "connector_started"})
"""Of the provider, though they name an enterprise: they begin and end its manager."""


class Key(NamedTuple):
    """An idempotency key that a call carries."""

    key: str
    digest: str
    kind: type[BaseModel]


_carried: ContextVar[Key | None] = ContextVar("carried", default=None)


class DividedCloud:
    """Answers as a `Cloud` does."""

    def __init__(self, cloud: Cloud, manager_of: Callable[[str], Any]) -> None:
        """Divide.

        Args:
            cloud: For what is not an enterprise's.
            manager_of: Returns the actor of an enterprise's manager. Raises `UnavailableError`.
        """
        self._cloud = cloud
        self._manager_of = manager_of

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._cloud, name)
        if name in _HERE or not callable(method) or "enterprise" not in (signature := _signature(name)).parameters:
            return method
        return functools.partial(self._call, name, method, signature)

    def _call(self, name: str, method: Any, signature: inspect.Signature, *arguments: Any, **named: Any) -> Any:
        bound = signature.bind(None, *arguments, **named)
        enterprise, who = bound.arguments.get("enterprise"), bound.arguments.get("who")
        if not enterprise or not isinstance(who, Principal) or who.enterprise not in (None, enterprise):
            return method(*arguments, **named)  # its answer is "not found", or a list over all
        key = _carried.get()
        return ask(
            self._manager_of(enterprise).call.remote(name, arguments, named, key),
            f"the manager of {enterprise}",
            CARRIED_SECONDS,
        )

    def once(self, who: Principal, key: str, digest: str, kind: type[M], call: Callable[[], M]) -> M:
        """Make a creating call at most once; see `Cloud.once`."""
        # The call itself says whose it is: it is made here, and takes the key along to where it is carried out.
        reset = _carried.set(Key(key, digest, kind))
        try:
            return self._cloud.once(who, key, digest, kind, call)
        finally:
            _carried.reset(reset)


def carry_out(cloud: Cloud, name: str, arguments: Any, named: Any, key: Key | None) -> Any:
    """Carry out a call in the enterprise's own manager."""
    method = getattr(cloud, name)
    if key is None:
        return method(*arguments, **named)
    return cloud.once(arguments[0], key.key, key.digest, key.kind, lambda: method(*arguments, **named))


@functools.cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(getattr(Cloud, name))
