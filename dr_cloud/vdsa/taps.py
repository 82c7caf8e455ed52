"""What a source VDSA knows of the taps of its VPG: who is connected, up to what time, and who is whole. No I/O.

A watermark of a tap is a time up to which all its writes were received: that of its MARKED, or the last received
write's time less one (later pieces of one guest write share its time).

A tap is whole once it answered the MARK sent after its HELLO (or after a RESYNC), and each SYNC_BEGIN got its SYNC_END.
The MARK proves that the tap has seen what was sent before: it answers only after the SYNC_BEGIN, if there is one.

An absent tap stays known, and a server of the VPG whose tap was not seen yet counts as absent: what its host wrote
meanwhile is missing, so the VPG is not whole without it. One tap speaks for a server: a new one (the server has moved)
takes the place of the old one, which is forgotten.

A tap's bitmap says what is missing in the journal for which its bits were cleared, and in no other. Whoever comes with
bits that rest on more than this journal holds of it (the server, the disk or the copy was somewhere else meanwhile, or
the journal was lost) is told to send its disks whole. Until the MARK after that is answered, the tap counts as gone in
what the journal keeps: should the word be lost with a connection or with this source, it is given again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dr_cloud.link.messages import TAPS_MAX, TapDisks
from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.journal import Disk
from dr_cloud.tap import wire
from dr_cloud.vdsa.actions import Action, CloseTap, SendTap
from dr_cloud.vdsa.feed import Record

_NO_TAP = "0" * 32
Members = Mapping[str, Mapping[str, int]]
"""By server: the index in the VPG of each of its disks, by the disk's name."""


class Announced(NamedTuple):
    """A tap that has said HELLO, as its VPG sees it."""

    id: str
    server: str
    host: str
    durable: int
    """The greatest sequence that was ever called durable to it."""
    disks: dict[int, Disk]
    """Its protected disks, with their indexes in the VPG, by its own indexes."""


@dataclass(eq=False)
class TapState:
    """One tap of the VPG, as long as the source lives."""

    announced: Announced
    place: int
    """Its place in the stream's list of taps."""
    connection: int | None = None
    proof: int = 0
    """The MARK that must be answered before the tap can be whole."""
    asked: int = 0
    """The last MARK, HOLD or RELEASE sent to it."""
    marked: int = 0
    """The last one it answered."""
    held: int = 0
    """The last HOLD it answered, so that it is holding."""
    released: int = 0
    """The last RELEASE it answered in time."""
    expired: int = 0
    """The last HOLD or RELEASE that it says held nothing."""
    answer_ns: int = 0
    """The time of its last answer."""
    ahead_ns: int = 0
    """How far its clock is ahead of the source's, as far as is known."""
    uncertainty_ns: int = 0
    """By its last ORDER."""
    ordered_from: int | None = None
    """The first MARK whose answer can prove that it follows that ORDER; None once it has."""
    waiting_since_ns: int | None = None
    """Since when (monotonic) a question waits for its answer."""
    syncing: bool = False
    whole_from_ns: int | None = None
    """The image is right from this time of the tap on; None while it is not."""
    watermark_ns: int = 0
    last_ns: int = 0
    """The last write's time."""
    entries: deque[tuple[int, int]] = field(default_factory=deque)
    """Ascending (time, sequence): every write up to that sequence has at most that time."""
    cut_sequence: int | None = None
    durable: int = 0
    """The greatest sequence that was ever called durable to it."""
    asked_whole: set[int] = field(default_factory=set)
    """Disks that it was asked to send whole; it may not know yet."""

    @property
    def id(self) -> str:
        """The tap's id, in this copy."""
        return self.announced.id

    @property
    def disks(self) -> list[Disk]:
        """Its protected disks."""
        return list(self.announced.disks.values())

    def advance(self, time_ns: int, sequence: int) -> None:
        """Every write up to `time_ns` was received; every one up to `sequence` has at most that time."""
        if time_ns > self.watermark_ns:
            self.watermark_ns = time_ns
            self.entries.append((time_ns, sequence))
        elif self.entries and time_ns == self.watermark_ns and sequence > self.entries[-1][1]:
            self.entries[-1] = (time_ns, sequence)


class TapBook:
    """All taps of a VPG that have connected since the source started. Appends its actions to `out`.

    Attributes:
        members: The servers of the VPG, and their disks.
        disturbed: Whether a tap came, went or synchronised since this was last set to False.
        many_hosts: Whether the taps are on more than one host: their clocks differ.
    """

    def __init__(self, out: list[Action], members: Members) -> None:
        self.members = members
        self.many_hosts = False
        self.disturbed = True
        self._out = out
        self._taps: dict[str, TapState] = {}
        self._questions = 0
        self._journal_cuts: dict[str, int] = {}
        self._journal_disks: dict[int, Disk] = {}
        self._gone: dict[str, None] = {}

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
    def all_here(self) -> bool:
        """Whether every server of the VPG has a tap."""
        return self.members.keys() <= {tap.announced.server for tap in self._taps.values()}

    @property
    def all_whole(self) -> bool:
        """Whether every tap is here, connected and synchronised."""
        return self.all_here and all(tap.whole_from_ns is not None for tap in self._taps.values())

    def whole_at(self, time_ns: int) -> bool:
        """Whether the image at `time_ns` is right on every tap."""
        return self.all_here and all(
            tap.whole_from_ns is not None and tap.whole_from_ns <= time_ns for tap in self._taps.values()
        )

    def watermark_ns(self) -> int:
        """Return the least watermark of the connected taps; 0 if there is none."""
        return min((tap.watermark_ns for tap in self.connected), default=0)

    # Who comes and goes.

    def greet(self, connection: int, announced: Announced, now_ns: int) -> TapState:
        """A tap said HELLO. Raises `ProtocolError` if one of its disks has the index of another tap's."""
        indexes = {disk.index for disk in announced.disks.values()}
        for other in list(self._taps.values()):
            if other.id == announced.id:
                continue
            if other.announced.server == announced.server:
                self.forget(other, f"a tap on {announced.host} speaks for {announced.server} now")
            elif shared := indexes & {disk.index for disk in other.disks}:
                raise ProtocolError(f"disk {min(shared)} of {announced.server} is one of {other.announced.server}")
        tap = self._taps.get(announced.id)
        if tap is None:
            taken = {other.place for other in self._taps.values()}
            place = next(place for place in range(len(taken) + 1) if place not in taken)
            tap = self._taps[announced.id] = TapState(announced, place)
            self._gone.pop(announced.id, None)
        elif tap.connection is not None:
            self._out.append(CloseTap(tap.connection, "the tap has connected anew"))
        tap.announced = announced
        tap.connection = connection
        self._count_hosts()
        tap.durable = max(tap.durable, announced.durable)
        tap.uncertainty_ns, tap.ordered_from = 0, None
        self._ask_whole(tap)
        self._distrust(tap, now_ns)
        return tap

    def leave(self, tap: TapState) -> None:
        """The tap's connection is gone. The tap goes on by its bitmap."""
        tap.connection = None
        tap.whole_from_ns = None
        tap.waiting_since_ns = None
        self.disturbed = True

    def forget(self, tap: TapState, reason: str) -> None:
        """The tap left the VPG for good. If it ever comes back, it comes from somewhere else."""
        if tap.connection is not None:
            self._out.append(CloseTap(tap.connection, reason))
        del self._taps[tap.id]
        self._count_hosts()
        self._journal_cuts.pop(tap.id, None)
        self._gone[tap.id] = None
        self.disturbed = True

    def _count_hosts(self) -> None:
        self.many_hosts = len({tap.announced.host for tap in self._taps.values()}) > 1

    def rebase(self, cuts: Mapping[str, int], disks: Sequence[Disk], now_ns: int) -> None:
        """A new stream begins, on a journal that holds this."""
        self._journal_cuts = {tap: sequence for tap, sequence in cuts.items() if tap not in self._gone}
        self._journal_disks = {disk.index: disk for disk in disks}
        for tap in self.connected:
            if self._ask_whole(tap):
                self._distrust(tap, now_ns)

    def _ask_whole(self, tap: TapState, every: bool = False) -> bool:
        """Have the tap send the disks whole for which its bits mean nothing here; return whether there are any."""
        elsewhere = every or tap.durable > self._journal_cuts.get(tap.id, 0)
        asked = [
            own
            for own, disk in tap.announced.disks.items()
            if elsewhere or disk.index in tap.asked_whole or (tap.durable and disk.index not in self._journal_disks)
        ]
        tap.asked_whole = {tap.announced.disks[own].index for own in asked}
        if tap.connection is not None:
            for own in asked:
                data = wire.HEAD.pack(wire.RESYNC, wire.FLAG_WHOLE, own, 0, 0, 0, 0, 0)
                self._out.append(SendTap(tap.connection, data))
        return bool(asked)

    def ask_everything(self, now_ns: int) -> None:
        """Have every connected tap send everything again."""
        for tap in self.connected:
            self._ask_whole(tap, every=True)
            self._distrust(tap, now_ns)

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
        tap.proof = self.ask(wire.MARK, [tap], now_ns)

    # Questions and answers.

    def ask(self, kind: int, taps: Iterable[TapState], now_ns: int, time_ns: int = 0, question: int = 0) -> int:
        """Send a MARK, HOLD or RELEASE to `taps` and return its id: `question`, or a new one."""
        if not question:
            self._questions += 1
            question = self._questions
        data = wire.HEAD.pack(kind, 0, 0, 0, 0, time_ns, 0, question)
        for tap in taps:
            if tap.connection is not None:
                self._out.append(SendTap(tap.connection, data))
                tap.asked = max(tap.asked, question)
                tap.waiting_since_ns = tap.waiting_since_ns or now_ns
        return question

    def order(self, uncertainty_ns: int) -> None:
        """Have every connected tap wait for its clock before it acknowledges; 0 ends it."""
        for tap in self._taps.values():
            if tap.connection is not None and tap.uncertainty_ns != uncertainty_ns:
                tap.uncertainty_ns = uncertainty_ns
                tap.ordered_from = self._questions + 1
                data = wire.HEAD.pack(wire.ORDER, 0, 0, 0, 0, uncertainty_ns, 0, 0)
                self._out.append(SendTap(tap.connection, data))

    def told(self, tap: TapState, record: Record) -> None:
        """A tap sent SYNC_BEGIN, SYNC_END, or an answer. Raises `ProtocolError`."""
        if record.type == wire.SYNC_BEGIN:
            self.disturbed = True
            tap.syncing = True
            tap.whole_from_ns = None
            return
        if record.type == wire.SYNC_END:
            tap.syncing = False
        elif not tap.marked <= record.id <= tap.asked:
            raise ProtocolError(f"tap {tap.id} answers question {record.id}, which was not asked")
        else:
            self._answered(tap, record)
        if not tap.syncing and tap.whole_from_ns is None and tap.marked >= tap.proof:
            tap.whole_from_ns = record.time_ns

    def _answered(self, tap: TapState, record: Record) -> None:
        tap.marked = record.id
        if record.id >= tap.proof:
            tap.asked_whole.clear()
        tap.answer_ns = record.time_ns
        if record.flags & wire.FLAG_EXPIRED:
            tap.expired = record.id
        elif record.type == wire.HELD:
            tap.held = record.id
        elif record.type == wire.RELEASED:
            tap.released = record.id
        tap.advance(record.time_ns, record.sequence)
        if record.id == tap.asked:
            tap.waiting_since_ns = None
        unordered = tap.ordered_from is not None or record.flags & wire.FLAG_UNORDERED
        if tap.ordered_from is not None and record.id >= tap.ordered_from:
            tap.ordered_from = None
        if tap.uncertainty_ns and unordered and tap.whole_from_ns is not None:
            # Acknowledged before its time was sure to have passed everywhere; so far the order is not known.
            tap.whole_from_ns = record.time_ns
            self.disturbed = True

    # What the target is told.

    def cuts(self, time_ns: int) -> dict[str, int]:
        """Return the last sequence of each tap that a checkpoint at `time_ns` holds."""
        cuts = {}
        for tap in self._taps.values():
            while tap.entries and tap.entries[0][0] <= time_ns:
                tap.cut_sequence = tap.entries.popleft()[1]
            if tap.cut_sequence is not None and not tap.asked_whole:
                cuts[tap.id] = tap.cut_sequence
        return cuts

    def durable(self, tap_id: str, sequence: int, time_ns: int) -> None:
        """A checkpoint that holds the tap's writes up to `sequence` is durable."""
        tap = self._taps.get(tap_id)
        if tap is None:
            return
        self._journal_cuts[tap_id] = max(sequence, self._journal_cuts.get(tap_id, 0))
        if tap.connection is not None:
            tap.durable = max(tap.durable, sequence)
            self._out.append(SendTap(tap.connection, wire.HEAD.pack(wire.DURABLE, 0, 0, 0, sequence, time_ns, 0, 0)))

    def listing(self) -> tuple[list[TapDisks], list[str]]:
        """Return the stream's list of taps, each in its place, and who is gone.

        The disks of servers whose tap was not seen yet stand at its end, as the journal has them.
        """
        here = {tap.announced.server for tap in self._taps.values()}
        absent = {index for server, disks in self.members.items() if server not in here for index in disks.values()}
        carried = [disk for index, disk in self._journal_disks.items() if index in absent]
        places = 1 + max((tap.place for tap in self._taps.values()), default=-1)
        listing = [TapDisks(tap=_NO_TAP, disks=[]) for _ in range(places)]
        for tap in self._taps.values():
            protected = set(self.members.get(tap.announced.server, {}).values())
            disks = [disk for disk in tap.disks if disk.index in protected]
            listing[tap.place] = TapDisks(tap=tap.id, disks=disks)
        if carried:
            listing.append(TapDisks(tap=_NO_TAP, disks=carried))
        self._journal_disks = {disk.index: disk for entry in listing for disk in entry.disks}
        gone = [*self._gone, *(tap.id for tap in self._taps.values() if tap.asked_whole)]
        return listing, gone[-TAPS_MAX:]
