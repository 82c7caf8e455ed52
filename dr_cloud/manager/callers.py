"""Whose tokens were proven a moment ago, so that a client that asks again and again costs no look into the database.

Consistency: whoever changes a token in this process has everything forgotten once that is committed, and before it
answers: a token that was revoked here is refused at once. What another process has changed is seen within
`KNOWN_NS`. A look into the database that began before such a change leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from dr_cloud.model.principal import Principal
from dr_cloud.model.units import SECOND_NS

KNOWN_NS: Final = SECOND_NS
_KEPT_MAX: Final = 10_000


class Callers:
    """See the module's docstring. May be used from any thread."""

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        """Know nobody."""
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, int, Principal]] = {}
        self.age = 0
        """How often everything was forgotten."""

    def get(self, digest: str) -> Principal | None:
        """Return whose token it is, by the hash of its secret, if that is known."""
        since_ns, until_ns, who = self._known.get(digest, (0, 0, None))
        return who if since_ns <= self._clock_ns() < until_ns else None

    def put(self, digest: str, who: Principal, expires_ns: int, age: int) -> None:
        """Know a caller.

        Args:
            digest: Of its token's secret.
            who: Whose token it is.
            expires_ns: When the token ends.
            age: As it was before the database was asked.
        """
        now_ns = self._clock_ns()
        with self._lock:
            if age != self.age:
                return
            if len(self._known) >= _KEPT_MAX:
                self._known.clear()
            self._known[digest] = now_ns, min(now_ns + KNOWN_NS, expires_ns), who

    def forget(self) -> None:
        """Know nobody any more."""
        with self._lock:
            self.age += 1
            self._known.clear()
