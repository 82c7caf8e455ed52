"""The source VDSA's core: what a tap's record, an answer of the target or the clock makes it do. No I/O, no threads.

Purpose
    Gathers the records of all taps of one VPG into batches, numbers them (with tap lists and checkpoints) as the items
    of one stream (`dr_cloud.vdsa.outbox`), and keeps every item until the target says that it is durable.
    `dr_cloud.vdsa.source_io` carries out the actions that each event returns.

Consistency
    A checkpoint at T is an item: it comes after every write with time ≤ T of every tap. T is the least watermark of the
    connected taps (`dr_cloud.vdsa.taps`), or what a barrier agreed on (`dr_cloud.vdsa.rounds`). If every server's tap
    is whole at T, and the order of writes on several hosts is known there, it is a checkpoint to recover to; else its
    kind is "sync": durable progress only.

Bounds
    At most `batches_max` batches under way and `kept_bytes_max` of frames kept; beyond that no tap is read, and the
    taps' own queues and bitmaps take over. At `cut_bytes` an early checkpoint is made. If a silent tap holds T back,
    the others are read no further than `cut_bytes_max`, so that a checkpoint always fits into the target's credit. A
    tap that does not answer for `hung_seconds` is disconnected; when it comes back it synchronises.

Retries
    After a break of the link the same stream goes on: what the target has not received is sent again, unanswered
    offers too. A target of another generation has forgotten what was not durable, and "same as" locs made for it may
    lead nowhere: everything kept is thrown away, a new stream begins and the taps get RESYNC. Their set bits are
    exactly what is not durable.

Crash recovery
    None here: a restarted source begins a new stream, the taps connect to it and synchronise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from dr_cloud.link.messages import CheckpointItem, Durable, Taps, Welcome, encode_control
from dr_cloud.model.blocks import BLOCK_SIZE, HOLE
from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.journal import CheckpointKind
from dr_cloud.model.units import SECOND_NS
from dr_cloud.tap import wire
from dr_cloud.vdsa.actions import (
    Action,
    Answer,
    CloseTap,
    NewStream,
    ReadTap,
    SourceLimits,
)
from dr_cloud.vdsa.batch import Prepared
from dr_cloud.vdsa.feed import Record
from dr_cloud.vdsa.gear import Gear
from dr_cloud.vdsa.outbox import Outbox
from dr_cloud.vdsa.rounds import Finished, Request, Rounds
from dr_cloud.vdsa.taps import Announced, Members, TapBook, TapState

TapCondition = Literal["whole", "synchronising", "absent"]
_AGAIN_NS: Final = SECOND_NS // 10
"""So long after a round that failed, or a tenth of the interval, the next one is tried."""


class _Connection:
    __slots__ = ("announced", "reading", "tap")

    def __init__(self, announced: Announced) -> None:
        self.announced = announced
        self.tap: TapState | None = None
        self.reading = False


class SourceCore:
    """See the module's docstring. Every event method returns the actions to carry out, in their order.

    Attributes:
        durable_ns: Time of the newest checkpoint to recover to that is durable; 0 if there is none.
        checkpoints: How many checkpoints it has made.
        resyncs: How often a stream was given up.
    """

    def __init__(
        self,
        limits: SourceLimits,
        members: Members,
        new_stream: Callable[[], bytes],
        now_ns: int,
        wall_ns: Callable[[], int],
    ) -> None:
        """Begin a stream.

        Args:
            limits: Bounds and rhythm.
            members: The servers of the VPG and their disks.
            new_stream: Draws 16 random bytes.
            now_ns: A monotonic clock's.
            wall_ns: The time of day.
        """
        self.limits = limits
        self._new_stream = new_stream
        self.durable_ns = 0
        self.checkpoints = 0
        self.resyncs = 0
        self._late = 0
        self._out: list[Action] = []
        self._taps = TapBook(self._out, members)
        self._rounds = Rounds(self._taps, self._out, limits, wall_ns)
        self._gear = Gear()
        self._connections: dict[int, _Connection] = {}
        self._requests: deque[Request] = deque()
        self._now_ns = now_ns
        self._due_ns = now_ns + self._interval_ns
        self._early_ns = now_ns
        self._begin_stream()

    def _begin_stream(self) -> None:
        self._outbox = Outbox(self._out, self._gear, self._new_stream())
        self._floor_ns = 0
        self._taps.disturbed = True
        self._rounds.forget()
        self._generation: int | None = None
        self._asked: dict[str, Request] = {}
        self.last_cut: tuple[int, bool] = (0, False)
        """Time of the last cut, and whether it is a time to recover to."""
        self.sealed_bytes = (0, 0)
        """All that was sealed so far: bytes that guests wrote (zeroes apart), and the bytes that they became."""

    @property
    def stream(self) -> bytes:
        """16 random bytes; the items' numbers count within it."""
        return self._outbox.stream

    @property
    def linked(self) -> bool:
        """Whether the target is connected."""
        return self._outbox.linked

    @property
    def kept_bytes(self) -> int:
        """Sealed bytes that are not durable."""
        return self._outbox.kept_bytes

    @property
    def cut_sent(self) -> bool:
        """Whether the last cut has been sent: `sealed_bytes` then counts all before it."""
        return self._outbox.cut_sent

    @property
    def _interval_ns(self) -> int:
        return int(self.limits.checkpoint_seconds * SECOND_NS)

    @property
    def skipped(self) -> int:
        """Checkpoints that were due and not made: a tap did not answer in time, or a barrier was given up."""
        return self._late + self._rounds.skipped

    def tap_states(self) -> dict[str, TapCondition]:
        """Return how the tap of each server is."""
        states: dict[str, TapCondition] = dict.fromkeys(self._taps.members, "absent")
        for tap in self._taps:
            if tap.connection is not None:
                states[tap.announced.server] = "synchronising" if tap.whole_from_ns is None else "whole"
        return states

    def configure(self, limits: SourceLimits, members: Members) -> list[Action]:
        """Follow other orders. Servers that are out of the VPG are forgotten; their connections are closed."""
        self.limits = self._rounds.limits = limits
        self._due_ns = min(self._due_ns, self._now_ns + self._interval_ns)
        if members != self._taps.members:
            self._taps.members = members
            self._taps.disturbed = True
            for tap in list(self._taps):
                if tap.announced.server not in members:
                    self._forget(tap)
            if self._generation is not None:
                self._list_taps()
        return self._finish()

    def send_everything(self) -> list[Action]:
        """Have the taps send every block again."""
        self._taps.ask_everything(self._now_ns)
        if self._generation is not None:
            self._list_taps()
        return self._finish()

    def _finish(self) -> list[Action]:
        """Do what has become possible, and return all actions of this event."""
        self._outbox.pump()
        self._cut_early()
        wait = self.limits.order == "commit-wait" and self._taps.many_hosts
        self._taps.order(self.limits.uncertainty_ns if wait else 0)
        self._steer_reading()
        out = self._out.copy()
        self._out.clear()
        return out

    # Taps.

    def tap_connected(self, connection: int, announced: Announced) -> list[Action]:
        """A tap has said HELLO. Raises `ProtocolError`: close the connection."""
        known = self._connections[connection] = _Connection(announced)
        # Before the first welcome it is not known what the journal holds.
        if self._generation is not None:
            self._greet(connection, known)
            self._list_taps()
        return self._finish()

    def _greet(self, connection: int, known: _Connection) -> None:
        try:
            known.tap = self._taps.greet(connection, known.announced, self._now_ns)
        except ProtocolError as error:
            del self._connections[connection]
            self._out.append(CloseTap(connection, str(error)))

    def tap_closed(self, connection: int) -> list[Action]:
        """The connection is gone. What came whole before is still made a checkpoint."""
        known = self._connections.pop(connection, None)
        tap = known.tap if known else None
        if tap is not None and tap.connection == connection:
            time_ns = self._taps.watermark_ns()
            if time_ns > self._floor_ns and self._taps.whole_at(time_ns) and self._rounds.by_watermark:
                self._cut(time_ns, True, None)
            self._taps.leave(tap)
            self._end_round()
        return self._finish()

    def _forget(self, tap: TapState) -> None:
        if tap.connection is not None:
            self._connections.pop(tap.connection, None)
        self._taps.forget(tap, "the server was taken out of the VPG")
        self._end_round()

    def received(self, connection: int, records: Iterable[Record]) -> list[Action]:
        """A tap sent `records`. Raises `ProtocolError`: close the connection."""
        known = self._connections.get(connection)
        if known is None or known.tap is None or known.tap.connection != connection:
            return self._finish()
        tap, outbox = known.tap, self._outbox
        last: Record | None = None
        for record in records:
            if record.type in (wire.WRITE, wire.ZERO):
                outbox.add(tap.place, record)
                last = record
            else:
                self._taps.told(tap, record)
                self._end_round()
        if last is not None:
            tap.advance(last.time_ns - 1, last.sequence - 1)
            tap.last_ns = last.time_ns
            self._rounds.wrote(tap, last.time_ns)
        return self._finish()

    def flush(self) -> list[Action]:
        """The batch has been open long enough."""
        self._outbox.close_batch()
        return self._finish()

    def _list_taps(self) -> None:
        """Tell the target all taps, by an item of the stream."""
        taps, gone = self._taps.listing()
        self._outbox.put(encode_control(Taps(number=self._outbox.next_number(), taps=taps, gone=gone)))

    # Threads.

    def prepared(self, stream: bytes, number: int, prepared: Prepared) -> list[Action]:
        """A `Prepare` is done."""
        raw, became = self.sealed_bytes
        self.sealed_bytes = raw + int(np.count_nonzero(prepared.columns["ref"] != HOLE)) * BLOCK_SIZE, became
        self._outbox.prepared(stream, number, prepared)
        return self._finish()

    def sealed(self, stream: bytes, number: int, message: list[bytes]) -> list[Action]:
        """A `Seal` is done."""
        raw, became = self.sealed_bytes
        self.sealed_bytes = raw, became + sum(map(len, message))
        self._outbox.sealed(stream, number, message)
        return self._finish()

    # The link.

    def welcomed(self, welcome: Welcome) -> list[Action]:
        """The target is connected and knows this stream up to item `welcome.received`."""
        if self._generation not in (None, welcome.generation) or not self._outbox.link(welcome):
            return self.lost_stream()
        self.durable_ns = max(self.durable_ns, welcome.testable_ns)
        self._floor_ns = max(self._floor_ns, welcome.time_ns)
        if self._generation is None:
            self._generation = welcome.generation
            self._taps.rebase(welcome.cuts, welcome.disks, self._now_ns)
            for number, known in list(self._connections.items()):
                if known.tap is None:
                    self._greet(number, known)
            self._list_taps()
        return self._finish()

    def known(self, number: int, locs: NDArray[np.uint64]) -> list[Action]:
        """The target answered an offer. Raises `ProtocolError`."""
        self._outbox.known(number, locs)
        return self._finish()

    def unlinked(self) -> list[Action]:
        """The link broke. What it carried may or may not have arrived."""
        self._outbox.linked = False
        return self._finish()

    def lost_stream(self) -> list[Action]:
        """The target cannot go on with this stream: begin a new one, and let the taps send what is not durable."""
        asked = [*self._asked.values(), self._rounds.forget()]
        self._requests.extendleft(request for request in reversed(asked) if request is not None)
        self._begin_stream()
        self.resyncs += 1
        self._out.append(NewStream())
        self._taps.resync(self._now_ns)
        return self._finish()

    def durable(self, durable: Durable) -> list[Action]:
        """The target made a checkpoint durable."""
        self.durable_ns = max(self.durable_ns, self._outbox.durable(durable.number))
        for tap_id, sequence in durable.cuts.items():
            self._taps.durable(tap_id, sequence, durable.time_ns)
        if durable.request and self._asked.pop(durable.request, None) is not None:
            self._out.append(Answer(durable))
        return self._finish()

    # Checkpoints.

    def request_checkpoint(self, request_id: str, tag: str, description: str) -> list[Action]:
        """Make a checkpoint by hand as soon as the VPG is whole; `Answer` tells when it is durable."""
        self._requests.append(Request(request_id, tag, description))
        self._ask_for_request()
        return self._finish()

    def withdraw(self, request_id: str) -> list[Action]:
        """Nobody waits for this request any more; if it was not made yet it never is."""
        self._requests = deque(request for request in self._requests if request.id != request_id)
        return self._finish()

    def tick(self, now_ns: int, link_has_room: bool) -> list[Action]:
        """The (monotonic) clock moved on. Call it several times in each interval.

        Args:
            now_ns: What it says.
            link_has_room: Whether what was sent has left.
        """
        self._now_ns = now_ns
        behind = self._outbox.in_threads >= self.limits.batches_max // 2
        self._gear.look(behind and link_has_room and self._outbox.has_room, now_ns)
        for number, connection in list(self._connections.items()):
            tap = connection.tap
            if tap is None or tap.waiting_since_ns is None:
                continue
            if not connection.reading:
                tap.waiting_since_ns = now_ns
            elif now_ns - tap.waiting_since_ns > self.limits.hung_seconds * SECOND_NS:
                self._out.append(CloseTap(number, f"the tap did not answer for {self.limits.hung_seconds:g} s"))
                del self._connections[number]
                self._taps.leave(tap)
                self._end_round()
        self._ask_for_request()
        if now_ns >= self._due_ns:
            ready = self._rounds.by_watermark or self._flows
            if self.linked and ready and not self._rounds.running:
                self._due_ns = max(self._due_ns, now_ns - self._interval_ns + 1) + self._interval_ns
                self._ask(None)
            elif now_ns >= self._due_ns + self._interval_ns:
                self._due_ns = now_ns
                self._late += self.linked
        return self._finish()

    def quiet_seconds(self, now_ns: int) -> float:
        """Return for how long the clock brings nothing: until a checkpoint is due; 0 while something is under way."""
        if not self.linked or self._requests or self._rounds.running or self._outbox.under_way:
            return 0.0
        return max(0, self._due_ns - now_ns) / SECOND_NS

    def end_hold(self, question: int) -> list[Action]:
        """`SourceLimits.hold_seconds` have passed since `EndHold`."""
        self._end_round(self._rounds.end_hold(question, self._now_ns))
        return self._finish()

    def _ask(self, request: Request | None) -> None:
        """Ask all taps for a cut; a checkpoint follows when all have answered.

        With no tap connected, what came last is made durable; some of it may be half a guest's write.
        """
        if self._taps.connected:
            self._rounds.begin(request, self._floor_ns, self._now_ns)
        elif self._outbox.numbered > self._outbox.cut_number:
            self._cut(max([self._floor_ns + 1, *(tap.last_ns for tap in self._taps)]), False, None)

    def _ask_for_request(self) -> None:
        if (
            self._requests
            and not self._rounds.running
            and self.linked
            and self._taps.connected
            and self._taps.all_whole
        ):
            self._ask(self._requests.popleft())

    def _end_round(self, finished: Finished | None = None) -> None:
        """If the round has ended, cut where it says."""
        finished = finished or self._rounds.step(self._floor_ns, self._now_ns)
        if finished is None:
            return
        if finished.time_ns is not None:
            self._cut(finished.time_ns, finished.ordered, finished.request)
            return
        self._early_ns = self._now_ns + max(_AGAIN_NS, self._interval_ns // 10)
        self._due_ns = min(self._due_ns, self._early_ns)
        if finished.request is not None:
            self._requests.appendleft(finished.request)

    def _cut_early(self) -> None:
        """Make a checkpoint as soon as much has gathered: by the watermark where that is a cut, or where it must be."""
        outbox, limits = self._outbox, self.limits
        if outbox.bytes_since_cut < limits.cut_bytes:
            return
        time_ns = self._taps.watermark_ns()
        by_watermark = self._rounds.by_watermark
        if time_ns > self._floor_ns and (by_watermark or outbox.bytes_since_cut >= limits.cut_bytes_max):
            self._cut(time_ns, by_watermark, None)
            outbox.pump()
        elif not self._rounds.running and self._flows and self._now_ns >= self._early_ns:
            self._ask(None)

    def _cut(self, time_ns: int, ordered: bool, request: Request | None) -> None:
        """Cut at `time_ns`; `ordered` tells whether the order of writes of different hosts is known there."""
        number = self._outbox.next_number()
        kind: CheckpointKind = "sync"
        if ordered and self._taps.whole_at(time_ns):
            kind = "tag" if request else "auto"
        elif request is not None:
            self._requests.appendleft(request)
            request = None
        item = CheckpointItem(
            number=number,
            kind=kind,
            time_ns=time_ns,
            exact=kind != "sync" and not self._taps.disturbed and self._exact_between,
            cuts=self._taps.cuts(time_ns),
            tag=request.tag if request else "",
            description=request.description if request else "",
            request=request.id if request else "",
        )
        self._outbox.put(encode_control(item), 0 if kind == "sync" else time_ns)
        self._outbox.cut()
        if request is not None:
            self._asked[request.id] = request
        self._taps.disturbed = kind == "sync"
        self._floor_ns = time_ns
        self.last_cut = time_ns, kind != "sync"
        self.checkpoints += 1

    @property
    def _exact_between(self) -> bool:
        """Whether times between two checkpoints hold all writes in their order."""
        return self.limits.order == "commit-wait" or not self._taps.many_hosts

    # Back-pressure.

    @property
    def _flows(self) -> bool:
        """Whether more can be taken in."""
        return (
            self._generation is not None
            and self._outbox.under_way < self.limits.batches_max
            and self._outbox.kept_bytes < self.limits.kept_bytes_max
        )

    def _steer_reading(self) -> None:
        flows = self._flows
        brimming = self._outbox.bytes_since_cut >= self.limits.cut_bytes_max
        for number, connection in self._connections.items():
            tap = connection.tap
            reading = (
                flows
                and tap is not None
                and (not brimming or tap.watermark_ns <= self._floor_ns or self._rounds.waits_for(tap))
            )
            if reading != connection.reading:
                connection.reading = reading
                self._out.append(ReadTap(number, reading))
