"""The tap's clock: the sequence and the time of every write, shared by all disks and all copies. No I/O.

Times ascend strictly, whatever the host's clock does: `max(now, last + 1)`. Both are stored in the first copy's bitmap
file on every write, so that a killed tap goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Sequence and time.

    Attributes:
        sequence: The last one given out.
        time_ns: The last one given out, or promised: no later write carries it or an earlier one.
    """

    __slots__ = ("hot", "now", "sequence", "time_ns")

    def __init__(self, hot: memoryview, now: Callable[[], int]) -> None:
        """Go on from what `hot` holds.

        Args:
            hot: Item 0 is the sequence, item 1 the time (`dr_cloud.tap.bitmap`).
            now: The host's clock, ns since the epoch.
        """
        self.hot = hot
        self.now = now
        self.sequence: int = hot[0]
        self.time_ns: int = hot[1]

    def stamp(self) -> None:
        """Give out the next sequence and time. Called when the disk write is done, just before the answer."""
        now = self.now()
        if now <= self.time_ns:
            now = self.time_ns + 1
        hot = self.hot
        hot[1] = self.time_ns = now
        self.sequence += 1
        hot[0] = self.sequence

    def lift(self, time_ns: int) -> None:
        """Give out no time up to `time_ns` any more."""
        if time_ns > self.time_ns:
            self.hot[1] = self.time_ns = time_ns

    def move(self, hot: memoryview) -> None:
        """Store in `hot` from now on."""
        hot[0], hot[1] = self.sequence, self.time_ns
        self.hot = hot
