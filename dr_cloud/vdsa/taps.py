"""What a source VDSA knows of the taps of its VPG: who is connected, up to what time, and who is whole. No I/O.

A watermark of a tap is a time up to which all its writes were received: that of its MARKED, or the last received
write's time less one (later pieces of one guest write share its time).

A tap is whole once it answered the MARK sent after its HELLO (or after a RESYNC), and each SYNC_BEGIN got its SYNC_END.
The MARK proves that the tap has seen what was sent before: it answers only after the SYNC_BEGIN, if there is one.

An absent tap stays known: what its host wrote meanwhile is missing, so the VPG is not whole without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dr_cloud.link.messages import TapDisks
from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.journal import Disk
from dr_cloud.tap import wire
from dr_cloud.vdsa.actions import Action, CloseTap, SendTap
from dr_cloud.vdsa.feed import Record

_NO_TAP = "0" * 32


@dataclass(eq=False)
class TapState:
    """One tap of the VPG, as long as the source lives."""

    id: str
    disks: list[Disk]
    place: int
    """Its place in the stream's list of taps."""
    connection: int | None = None
    proof: int = 0
    """The MARK that must be answered before the tap can be whole."""
    asked: int = 0
    """The last MARK sent to it."""
    marked: int = 0
    """The last MARK it answered."""
    waiting_since_ns: int | None = None
    """Since when (monotonic) a MARK waits for its answer."""
    syncing: bool = False
    whole_from_ns: int | None = None
    """The image is right from this time of the tap on; None while it is not."""
    watermark_ns: int = 0
    last_ns: int = 0
    """The last write's time."""
    entries: deque[tuple[int, int]] = field(default_factory=deque)
    """Ascending (time, sequence): every write up to that sequence has at most that time."""
    cut_sequence: int | None = None

    def advance(self, time_ns: int, sequence: int) -> None:
        """Every write up to `time_ns` was received; every one up to `sequence` has at most that time."""
        if time_ns > self.watermark_ns:
            self.watermark_ns = time_ns
            self.entries.append((time_ns, sequence))
        elif self.entries and time_ns == self.watermark_ns and sequence > self.entries[-1][1]:
            self.entries[-1] = (time_ns, sequence)


class TapBook:
    """All taps of a VPG that have connected since the source started. Appends its actions to `out`."""

    def __init__(self, out: list[Action]) -> None:
        self._out = out
        self._taps: dict[str, TapState] = {}
        self._marks = 0
        self.disturbed = True
        """Whether a tap came, went or synchronised since this was last set to False."""

    def __iter__(self) -> Iterator[TapState]:
        return iter(self._taps.values())

    def get(self, tap_id: str) -> TapState | None:
        """Return a tap by its id."""
        return self._taps.get(tap_id)

    @property
    def connected(self) -> list[TapState]:
        """The taps that are connected now."""
        return [tap for tap in self._taps.values() if tap.connection is not None]

    @property
    def all_whole(self) -> bool:
        """Whether every known tap is connected and synchronised."""
        return all(tap.whole_from_ns is not None for tap in self._taps.values())

    def whole_at(self, time_ns: int) -> bool:
        """Whether the image at `time_ns` is right on every known tap."""
        return all(tap.whole_from_ns is not None and tap.whole_from_ns <= time_ns for tap in self._taps.values())

    def watermark_ns(self) -> int:
        """Return the least watermark of the connected taps; 0 if there is none."""
        return min((tap.watermark_ns for tap in self.connected), default=0)

    def greet(self, connection: int, hello: wire.Hello, now_ns: int) -> TapState:
        """A tap said HELLO. Raises `ProtocolError` if one of its disks has the index of another tap's."""
        indexes = {disk.index for disk in hello.disks}
        for other in self._taps.values():
            if other.id != hello.tap and (shared := indexes & {disk.index for disk in other.disks}):
                raise ProtocolError(f"disk {min(shared)} of tap {hello.tap} is the index of a disk of tap {other.id}")
        tap = self._taps.get(hello.tap)
        if tap is None:
            place = 1 + max((other.place for other in self._taps.values()), default=-1)
            tap = self._taps[hello.tap] = TapState(hello.tap, hello.disks, place)
        elif tap.connection is not None:
            self._out.append(CloseTap(tap.connection, "the tap has connected anew"))
        tap.disks = hello.disks
        tap.connection = connection
        self._distrust(tap, now_ns)
        return tap

    def leave(self, tap: TapState) -> None:
        """The tap's connection is gone. The tap goes on by its bitmap."""
        tap.connection = None
        tap.whole_from_ns = None
        tap.waiting_since_ns = None
        self.disturbed = True

    def forget(self, tap: TapState) -> None:
        """The tap left the VPG for good."""
        del self._taps[tap.id]
        self.disturbed = True

    def resync(self, now_ns: int) -> None:
        """Something after the last DURABLE is lost: have every tap send what is not durable."""
        for tap in self._taps.values():
            tap.entries.clear()
            tap.cut_sequence = None
            if tap.connection is not None:
                self._out.append(SendTap(tap.connection, wire.HEAD.pack(wire.RESYNC, 0, 0, 0, 0, 0, 0, 0)))
                self._distrust(tap, now_ns)

    def _distrust(self, tap: TapState, now_ns: int) -> None:
        self.disturbed = True
        tap.whole_from_ns = None
        tap.syncing = False
        tap.waiting_since_ns = None
        tap.marked = 0
        tap.proof = self.mark([tap], now_ns)

    def mark(self, taps: Iterable[TapState], now_ns: int) -> int:
        """Send a MARK to `taps` and return its id."""
        self._marks += 1
        data = wire.HEAD.pack(wire.MARK, 0, 0, 0, 0, 0, 0, self._marks)
        for tap in taps:
            if tap.connection is not None:
                self._out.append(SendTap(tap.connection, data))
                tap.asked = self._marks
                tap.waiting_since_ns = tap.waiting_since_ns or now_ns
        return self._marks

    def told(self, tap: TapState, record: Record) -> None:
        """A tap sent SYNC_BEGIN, SYNC_END or MARKED. Raises `ProtocolError`."""
        if record.type == wire.SYNC_BEGIN:
            self.disturbed = True
            tap.syncing = True
            tap.whole_from_ns = None
            return
        if record.type == wire.SYNC_END:
            tap.syncing = False
        elif not tap.marked <= record.id <= tap.asked:
            raise ProtocolError(f"tap {tap.id} answers MARK {record.id}, which was not asked")
        else:
            tap.marked = record.id
            tap.advance(record.time_ns, record.sequence)
            if record.id == tap.asked:
                tap.waiting_since_ns = None
        if not tap.syncing and tap.whole_from_ns is None and tap.marked >= tap.proof:
            tap.whole_from_ns = record.time_ns

    def cuts(self, time_ns: int) -> dict[str, int]:
        """Return the last sequence of each tap that a checkpoint at `time_ns` holds."""
        cuts = {}
        for tap in self._taps.values():
            while tap.entries and tap.entries[0][0] <= time_ns:
                tap.cut_sequence = tap.entries.popleft()[1]
            if tap.cut_sequence is not None:
                cuts[tap.id] = tap.cut_sequence
        return cuts

    def listing(self) -> list[TapDisks]:
        """Return the stream's list of taps, each in its place."""
        listing = [TapDisks(tap=_NO_TAP, disks=[])] * (1 + max((tap.place for tap in self._taps.values()), default=-1))
        for tap in self._taps.values():
            listing[tap.place] = TapDisks(tap=tap.id, disks=tap.disks)
        return listing
