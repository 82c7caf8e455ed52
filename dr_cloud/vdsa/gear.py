"""How hard frames are compressed: less, while the processor is what everything waits for. Pure: no clock of its own.

Compression gives way when batches pile up before they are sealed although the link and the target's credit have room.
It comes back when they no longer do. Both need some time of the same, and a return that did not hold makes the next one
wait twice as long, so that the level does not swing.
"""

from __future__ import annotations

from typing import Final

from dr_cloud.journal.frame import LEVEL
from dr_cloud.model.units import SECOND_NS

FAST_LEVEL: Final = -5
"""Of zstd: 1.7 to 2.4 times as fast as the usual level, for about a third to twice the bytes of text."""
PRESSED_NS: Final = SECOND_NS // 2
"""So long the processor must be behind."""
EASY_NS: Final = 5 * SECOND_NS
"""So long it must have been ahead, at first."""
EASY_NS_MAX: Final = 60 * SECOND_NS


class Gear:
    """The level for frames that are sealed now.

    Attributes:
        level: Of zstd.
    """

    def __init__(self) -> None:
        self.level = LEVEL
        self._since_ns: int | None = None
        """Since when everything has spoken for the other level."""
        self._easy_ns = EASY_NS
        self._returned_ns: int | None = None

    def look(self, pressed: bool, now_ns: int) -> None:
        """Note how it is now: `pressed` if the processor is behind and nothing else is. `now_ns` is monotonic."""
        fast = self.level != LEVEL
        if pressed == fast:
            self._since_ns = None
            return
        if self._since_ns is None:
            self._since_ns = now_ns
        if now_ns - self._since_ns < (self._easy_ns if fast else PRESSED_NS):
            return
        self._since_ns = None
        if fast:
            self.level = LEVEL
            self._returned_ns = now_ns
            return
        self.level = FAST_LEVEL
        soon = self._returned_ns is not None and now_ns - self._returned_ns < 2 * self._easy_ns
        self._easy_ns = min(2 * self._easy_ns, EASY_NS_MAX) if soon else EASY_NS
