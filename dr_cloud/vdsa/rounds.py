"""A round asks all taps of a VPG for one cut: up to what time is everything here, on all hosts in one order. No I/O.

Taps of one host share its clock, so a MARK to each is enough: the least of the answers is a cut. So it is under
commit-wait, where no write is acknowledged before its time has passed on every host.

Else taps on several hosts need a barrier (`dr_cloud.tap.wire`): HOLD with a time ahead of every clock, RELEASE when all
hold, and the cut is that time if all say that nothing was acknowledged in between. A barrier that is late, or that a
tap does not follow, is given up: no checkpoint is made, and the guests have waited for 20 ms at most.

The time of a HOLD has to be later than any that a tap has given out when the HOLD arrives: the source's own clock,
plus how far the foremost tap's clock is ahead of it, plus a lead for the way there, which grows when it was too short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dr_cloud.model.units import SECOND_NS
from dr_cloud.tap import wire
from dr_cloud.vdsa.actions import Action, EndHold, SourceLimits
from dr_cloud.vdsa.taps import TapBook, TapState

LEAD_NS_MIN: Final = 5_000_000
LEAD_NS_MAX: Final = 160_000_000
_LIFTED_NS: Final = 1_000_000
"""A write so much later than the last HOLD's time carries the time of its host's clock."""
_FORGET_NS: Final = 100_000
"""By so much an estimate of a clock sinks with each look at it."""


class Request(NamedTuple):
    """A checkpoint to be made by hand."""

    id: str
    tag: str
    description: str


@dataclass(eq=False)
class _Round:
    question: int
    request: Request | None
    hold_ns: int = 0
    """The time of a barrier's HOLD; 0 where MARKs do."""
    taps: list[TapState] = field(default_factory=list)
    """Who takes part in a barrier."""
    releasing: bool = False


class Finished(NamedTuple):
    """A round that has ended; `time_ns` is None if it led to no cut."""

    time_ns: int | None
    ordered: bool
    """Whether the cut holds all writes in their order, also those of different hosts."""
    request: Request | None


class Rounds:
    """The rounds of one source, one at a time.

    Attributes:
        limits: The source's.
        skipped: Barriers that were given up.
    """

    def __init__(self, taps: TapBook, out: list[Action], limits: SourceLimits, wall_ns: Callable[[], int]) -> None:
        """Ask `taps`, by actions appended to `out`; `wall_ns` is the time of day."""
        self.limits = limits
        self.skipped = 0
        self._taps = taps
        self._out = out
        self._wall_ns = wall_ns
        self._round: _Round | None = None
        self._lead_ns = LEAD_NS_MIN
        self._lifted_ns = 0

    @property
    def running(self) -> bool:
        """Whether a round is under way."""
        return self._round is not None

    @property
    def by_watermark(self) -> bool:
        """Whether the least watermark of the taps is a cut by itself, without a round."""
        return not self._taps.many_hosts

    def waits_for(self, tap: TapState) -> bool:
        """Whether the round under way cannot end without this tap."""
        one = self._round
        return one is not None and (tap.marked < one.question or (one.releasing and tap.released < one.question))

    def forget(self) -> Request | None:
        """Give the round up, if there is one, and return its request."""
        one, self._round = self._round, None
        return one.request if one else None

    def begin(self, request: Request | None, floor_ns: int, now_ns: int) -> None:
        """Ask all connected taps. A cut is to be after `floor_ns`."""
        taps = self._taps.connected
        if self.by_watermark or self.limits.order == "commit-wait" or not self._taps.all_whole:
            self._round = _Round(self._taps.ask(wire.MARK, taps, now_ns), request)
            return
        ahead_ns = max(tap.ahead_ns for tap in taps)
        hold_ns = max(self._wall_ns() + max(ahead_ns, 0) + self._lead_ns, floor_ns + 1)
        question = self._taps.ask(wire.HOLD, taps, now_ns, hold_ns)
        self._round = _Round(question, request, hold_ns, taps)
        self._lifted_ns = hold_ns
        self._out.append(EndHold(question))

    def wrote(self, tap: TapState, time_ns: int) -> None:
        """A write of `tap` came that carries this time: learn from it how far its clock is ahead."""
        if self._taps.many_hosts and time_ns > self._lifted_ns + _LIFTED_NS:
            tap.ahead_ns = max(time_ns - self._wall_ns(), tap.ahead_ns - _FORGET_NS)

    def step(self, floor_ns: int, now_ns: int) -> Finished | None:
        """Go on as far as the answers allow; return the round if it has ended."""
        one = self._round
        if one is None:
            return None
        taps = self._taps.connected
        if not one.hold_ns:
            if any(tap.marked < one.question for tap in taps):
                return None
            self._round = None
            time_ns = max(self._taps.watermark_ns(), floor_ns + 1) if taps else None
            return Finished(time_ns, self.by_watermark or self.limits.order == "commit-wait", one.request)
        if taps != one.taps or one.hold_ns <= floor_ns or any(tap.expired >= one.question for tap in taps):
            return self._give_up(one, now_ns)
        if any(tap.held < one.question for tap in taps):
            return None
        if not one.releasing:
            one.releasing = True
            self._taps.ask(wire.RELEASE, taps, now_ns, question=one.question)
        if any(tap.released < one.question for tap in taps):
            return None
        self._round = None
        self._lead_ns = max(self._lead_ns * 9 // 10, LEAD_NS_MIN)
        return Finished(one.hold_ns, True, one.request)

    def end_hold(self, question: int, now_ns: int) -> Finished | None:
        """The time for all to hold is over: give the barrier up unless all do."""
        one = self._round
        if one is None or one.question != question or one.releasing:
            return None
        return self._give_up(one, now_ns)

    def _give_up(self, one: _Round, now_ns: int) -> Finished:
        self._round = None
        self.skipped += 1
        for tap in one.taps if not one.releasing else ():
            if tap.expired >= one.question and tap.answer_ns > one.hold_ns:
                # It had given out a later time before the HOLD came.
                tap.ahead_ns = max(tap.ahead_ns, min(tap.answer_ns - self._wall_ns(), SECOND_NS))
                self._lead_ns = min(self._lead_ns * 2, LEAD_NS_MAX)
        if not one.releasing:
            self._taps.ask(wire.RELEASE, one.taps, now_ns, question=one.question)
        return Finished(None, False, one.request)
