"""When a guest's write may be acknowledged: at once, but for barriers (HOLD) and commit-wait (ORDER).

Purpose
    The VDSA may ask any copy to hold acknowledgements while a checkpoint's time is fixed on all hosts, or to have each
    wait until its time has surely passed everywhere. What these are for is told in `dr_cloud.tap.wire`; here is how
    little they may cost.

Bounds
    A closing of the gate lasts at most `HOLD_NS_MAX` from the HOLD that began it, however many copies hold, and
    ends by itself: the first acknowledgement that has waited so long opens it. Closings take from a budget that
    fills at `HOLD_SHARE` of the time and holds three of them, one per copy; where it lacks one, a HOLD is refused.
    An ORDER delays an acknowledgement by at most `ORDER_NS_MAX`.

Crash recovery: nothing is kept. A new process holds and orders nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from dr_cloud.model.errors import ProtocolError
from dr_cloud.tap.clock import Clock
from dr_cloud.tap.wire import COPIES_MAX, HOLD_NS_MAX, HOLD_SHARE, ORDER_NS_MAX, ORDER_SECONDS

_BUDGET_NS_MAX: Final = COPIES_MAX * HOLD_NS_MAX
_ORDER_KEPT_NS: Final = int(ORDER_SECONDS * 1e9)
_NAP_SECONDS: Final = 0.001
"""The event loop's timers are no finer."""


class Gate:
    """See the module's docstring. Copies are known by their numbers.

    Attributes:
        shut: Whether an acknowledgement may have to wait: then, and only then, `acknowledge` is called.
        early: Changes whenever acknowledgements may have gone sooner than an order in force allows.
    """

    def __init__(self, clock: Clock, monotonic: Callable[[], int] = time.monotonic_ns) -> None:
        self.shut = False
        self.early = 0
        self._clock = clock
        self._monotonic = monotonic
        self._holds: dict[int, int] = {}
        self._closed_ns = 0
        self._open = asyncio.Event()
        self._budget_ns = _BUDGET_NS_MAX
        self._budget_at_ns = monotonic()
        self._orders: dict[int, int] = {}
        self._lapses: dict[int, int] = {}

    # The barrier.

    def hold(self, copy: int, hold_id: int) -> bool:
        """Hold acknowledgements from now on; return False if that would be too much."""
        now = self._monotonic()
        if self._holds and now - self._closed_ns >= HOLD_NS_MAX:
            self._end()
        if not self._holds:
            self._budget_ns = min(_BUDGET_NS_MAX, self._budget_ns + int((now - self._budget_at_ns) * HOLD_SHARE))
            self._budget_at_ns = now
            if self._budget_ns < HOLD_NS_MAX:
                return False
            self._closed_ns = now
            self._open = asyncio.Event()
        self._holds[copy] = hold_id
        self.shut = True
        return True

    def release(self, copy: int, hold_id: int) -> bool:
        """End a copy's hold; return whether acknowledgements were held until now."""
        if self._holds.get(copy) != hold_id:
            return False
        stood = self._monotonic() - self._closed_ns < HOLD_NS_MAX
        self.forget(copy)
        return stood

    def forget(self, copy: int) -> None:
        """End a copy's hold, if it has one: nobody will release it."""
        if self._holds.pop(copy, None) is not None and not self._holds:
            self._end()

    def _end(self) -> None:
        self._holds.clear()
        self._budget_ns -= min(self._monotonic() - self._closed_ns, HOLD_NS_MAX)
        self._budget_at_ns = self._monotonic()
        self._open.set()
        self.shut = bool(self._orders)

    # Commit-wait.

    def order(self, copy: int, uncertainty_ns: int) -> None:
        """Have acknowledgements wait until their write's time is past by `uncertainty_ns`; 0 ends it.

        Raises:
            ProtocolError: It is more than a guest shall wait.
        """
        if uncertainty_ns > ORDER_NS_MAX:
            raise ProtocolError(f"ORDER names an uncertainty of {uncertainty_ns} ns, at most {ORDER_NS_MAX} are borne")
        if self._orders.get(copy, 0) < uncertainty_ns:
            self.early += 1
        self._lapses.pop(copy, None)
        self._orders.pop(copy, None)
        if uncertainty_ns:
            self._orders[copy] = uncertainty_ns
        self.shut = bool(self._holds or self._orders)

    def ordered(self, copy: int) -> bool:
        """Return whether the copy's order is in force."""
        self._let_lapse()
        return copy in self._orders

    def lost(self, copy: int) -> None:
        """The copy's connection is gone: its hold ends now, its order `ORDER_SECONDS` later."""
        self.forget(copy)
        if copy in self._orders:
            self._lapses.setdefault(copy, self._monotonic() + _ORDER_KEPT_NS)

    def _let_lapse(self) -> None:
        now = self._monotonic()
        for copy in [copy for copy, until_ns in self._lapses.items() if until_ns <= now]:
            self.order(copy, 0)

    # The guest's side.

    async def acknowledge(self, time_ns: int = 0) -> None:
        """Return when a write with this time may be acknowledged; 0 for a flush, which no order concerns."""
        if time_ns and self._orders:
            await self._wait_ordered(time_ns)
        if self._holds:
            await self._wait_open()

    async def _wait_ordered(self, time_ns: int) -> None:
        self._let_lapse()
        until_ns = self._monotonic() + ORDER_NS_MAX
        while (wait_ns := time_ns + max(self._orders.values(), default=0) - self._clock.now()) >= 0 and self._orders:
            left_ns = until_ns - self._monotonic()
            if left_ns <= 0:
                self.early += 1
                return
            await asyncio.sleep(max(min(wait_ns, left_ns) / 1e9, _NAP_SECONDS))

    async def _wait_open(self) -> None:
        closed = self._open
        left_ns = self._closed_ns + HOLD_NS_MAX - self._monotonic()
        try:
            async with asyncio.timeout(max(left_ns, 0) / 1e9):
                await closed.wait()
        except TimeoutError:
            if closed is self._open and self._holds:
                self._end()
