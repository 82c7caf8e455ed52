"""How many bytes a second may leave: a token bucket that follows a `Throttle` through the day.

Tokens come at the limit that applies now and are kept for a quarter of a second at most. Whoever finds any may send,
whatever the size, and the debt is paid by waiting, so the mean is exact and a burst is one fragment above it. Control
messages are counted (`spend`) but are never made to wait.
"""

from __future__ import annotations

from typing import Final

from dr_cloud.model.replication import Throttle, ThrottleWindow
from dr_cloud.model.units import SECOND_NS

_KEPT_SECONDS: Final = 0.25
_MINUTES_A_DAY: Final = 24 * 60


def limit_at(throttle: Throttle, now_ns: int) -> int:
    """Return the limit in bytes per second at a time (nanoseconds since the epoch); 0 is no limit.

    Of several windows that apply, the lowest counts.
    """
    minute = now_ns // (60 * SECOND_NS) % _MINUTES_A_DAY
    limits = [window.bytes_per_second for window in throttle.windows if _covers(window, minute)]
    return min(limits, default=throttle.bytes_per_second)


def _covers(window: ThrottleWindow, minute: int) -> bool:
    since, until = _minute(window.since), _minute(window.until)
    if since < until:
        return since <= minute < until
    return minute >= since or minute < until


def _minute(text: str) -> int:
    return int(text[:2]) * 60 + int(text[3:])


class Bucket:
    """A token bucket. The clock is the caller's: nanoseconds since the epoch; one that steps back gives nothing."""

    def __init__(self, throttle: Throttle | None = None) -> None:
        """Follow `throttle`, which may be replaced at any time; None is no limit."""
        self.throttle = throttle or Throttle()
        self._tokens = 0.0
        self._at_ns: int | None = None

    def wait_seconds(self, now_ns: int) -> float:
        """Return 0 if something may be sent now, else how long to wait if nothing changes."""
        limit = self._refill(now_ns)
        return 0.0 if not limit or self._tokens > 0 else (1 - self._tokens) / limit

    def spend(self, size_bytes: int, now_ns: int) -> None:
        """Count what was sent."""
        if self._refill(now_ns):
            self._tokens -= size_bytes

    def _refill(self, now_ns: int) -> int:
        limit = limit_at(self.throttle, now_ns) if self.throttle.windows else self.throttle.bytes_per_second
        kept = max(limit * _KEPT_SECONDS, 1.0)
        if self._at_ns is None or not limit:
            self._tokens = kept
        else:
            self._tokens = min(self._tokens + max(now_ns - self._at_ns, 0) * limit / SECOND_NS, kept)
        self._at_ns = now_ns
        return limit
