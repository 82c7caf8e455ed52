"""The source VDSA's core: what a tap's record, an answer of the target or the clock makes it do. No I/O, no threads.

Purpose
    Gathers the records of all taps of one VPG into batches, numbers them (with tap lists and checkpoints) as the items
    of one stream, and keeps every item until the target says that it is durable. `dr_cloud.vdsa.source_io` carries out
    the actions that each event returns.

The way of a batch
    open ▸ closed and numbered ▸ prepared (hashed, in a thread) ▸ offered ▸ known ▸ sealed (in a thread) ▸ sent, in
    order of numbers ▸ durable, forgotten.

Consistency
    A checkpoint at T is an item: it comes after every write with time ≤ T of every tap. T is the least watermark of the
    connected taps (`dr_cloud.vdsa.taps`). If all known taps are whole at T it is a checkpoint to recover to; else its
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
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dr_cloud.link.messages import (
    HEAD_BYTES,
    OFFER,
    CheckpointItem,
    Durable,
    Taps,
    Welcome,
    encode_control,
    encode_data,
)
from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.journal import CheckpointKind
from dr_cloud.model.units import SECOND_NS
from dr_cloud.tap import wire
from dr_cloud.vdsa.actions import (
    Action,
    Answer,
    CloseTap,
    FlushSoon,
    NewStream,
    Prepare,
    ReadTap,
    Seal,
    Send,
    SendTap,
    SourceLimits,
)
from dr_cloud.vdsa.batch import Batch, Prepared
from dr_cloud.vdsa.feed import Record
from dr_cloud.vdsa.taps import TapBook, TapState


@dataclass(eq=False)
class _Item:
    """One numbered item, kept until it is durable."""

    prepared: Prepared | None = None
    offered: bool = False
    message: str | list[bytes] = ""
    """Empty until it can be sent."""
    bytes_sealed: int = 0


class _Request(NamedTuple):
    id: str
    tag: str
    description: str


class _Round(NamedTuple):
    """A question to all taps, to be followed by a checkpoint when all have answered `mark`."""

    mark: int
    request: _Request | None


class _Connection:
    __slots__ = ("reading", "tap")

    def __init__(self) -> None:
        self.tap: TapState | None = None
        self.reading = True


class SourceCore:
    """See the module's docstring. Every event method returns the actions to carry out, in their order.

    Attributes:
        stream: 16 random bytes; the items' numbers count within it.
        checkpoints: How many checkpoints it has made.
        skipped: Checkpoints that were due and not made, because a tap did not answer in time.
        resyncs: How often a stream was given up.
    """

    def __init__(self, limits: SourceLimits, new_stream: Callable[[], bytes], now_ns: int) -> None:
        """Begin a stream. `new_stream` draws 16 random bytes; `now_ns` is a monotonic clock's."""
        self.limits = limits
        self._new_stream = new_stream
        self.checkpoints = 0
        self.skipped = 0
        self.resyncs = 0
        self._out: list[Action] = []
        self._taps = TapBook(self._out)
        self._connections: dict[int, _Connection] = {}
        self._requests: deque[_Request] = deque()
        self._now_ns = now_ns
        self._due_ns = now_ns + self._interval_ns
        self._begin_stream()

    def _begin_stream(self) -> None:
        self.stream = self._new_stream()
        self._items: dict[int, _Item] = {}
        self._numbered = 0
        self._sent = 0
        self._durable = 0
        self._batch: Batch | None = None
        self._under_way = 0
        self.kept_bytes = 0
        self._unacknowledged_bytes = 0
        self._bytes_since_cut = 0
        self._cut_number = 0
        self._floor_ns = 0
        self._taps.disturbed = True
        self._round: _Round | None = None
        self.linked = False
        self._generation: int | None = None
        self._credit_bytes = 0
        self._asked: dict[str, _Request] = {}

    @property
    def _interval_ns(self) -> int:
        return int(self.limits.checkpoint_seconds * SECOND_NS)

    def tap_states(self) -> dict[str, str]:
        """Return for each tap `whole`, `synchronising` or `absent`."""
        return {
            tap.id: "absent" if tap.connection is None else "synchronising" if tap.whole_from_ns is None else "whole"
            for tap in self._taps
        }

    def _finish(self) -> list[Action]:
        """Do what has become possible, and return all actions of this event."""
        self._pump()
        self._cut_early()
        self._steer_reading()
        out = self._out.copy()
        self._out.clear()
        return out

    # Taps.

    def tap_connected(self, connection: int) -> list[Action]:
        """A tap has connected; it says HELLO next."""
        self._connections[connection] = _Connection()
        return self._finish()

    def tap_closed(self, connection: int) -> list[Action]:
        """The connection is gone. What came whole before is still made a checkpoint."""
        known = self._connections.pop(connection, None)
        tap = known.tap if known else None
        if tap is not None and tap.connection == connection:
            time_ns = self._taps.watermark_ns()
            if time_ns > self._floor_ns and self._taps.whole_at(time_ns):
                self._cut(time_ns, None)
            self._taps.leave(tap)
            self._end_round()
        return self._finish()

    def forget_tap(self, tap_id: str) -> list[Action]:
        """A tap left the VPG for good: checkpoints no longer wait for it to come back."""
        tap = self._taps.get(tap_id)
        if tap is not None:
            if tap.connection is not None:
                self._out.append(CloseTap(tap.connection, "the tap was taken out of the VPG"))
                del self._connections[tap.connection]
            self._taps.forget(tap)
            self._end_round()
        return self._finish()

    def received(self, connection: int, records: Iterable[Record], hello: wire.Hello | None) -> list[Action]:
        """A tap sent `records`; `hello` is what it said first. Raises `ProtocolError`: close the connection."""
        known = self._connections.get(connection)
        if known is None:
            return self._finish()
        last: Record | None = None
        for record in records:
            kind = record.type
            if kind in (wire.WRITE, wire.ZERO):
                assert known.tap is not None, "the parser lets nothing through before HELLO"
                batch = self._batch
                if batch is None or not batch.fits(record):
                    batch = self._open_batch()
                batch.add(known.tap.place, record)
                last = record
            elif kind == wire.HELLO:
                assert hello is not None
                known.tap = self._taps.greet(connection, hello, self._now_ns)
                self._list_taps()
            else:
                assert known.tap is not None, "the parser lets nothing through before HELLO"
                self._taps.told(known.tap, record)
                self._end_round()
        if last is not None and known.tap is not None:
            known.tap.advance(last.time_ns - 1, last.sequence - 1)
            known.tap.last_ns = last.time_ns
        return self._finish()

    def flush(self) -> list[Action]:
        """The batch has been open long enough."""
        self._close_batch()
        return self._finish()

    def _list_taps(self) -> None:
        """Tell the target all taps, by an item of the stream."""
        self._close_batch()
        self._numbered += 1
        message = Taps(number=self._numbered, taps=self._taps.listing())
        self._items[self._numbered] = _Item(message=encode_control(message))

    # Batches.

    def _open_batch(self) -> Batch:
        self._close_batch()
        self._batch = Batch()
        self._out.append(FlushSoon())
        return self._batch

    def _close_batch(self) -> None:
        batch, self._batch = self._batch, None
        if batch is None:
            return
        self._numbered += 1
        self._items[self._numbered] = _Item()
        self._under_way += 1
        self._out.append(Prepare(self.stream, self._numbered, batch))

    def prepared(self, stream: bytes, number: int, prepared: Prepared) -> list[Action]:
        """A `Prepare` is done."""
        if stream == self.stream:
            item = self._items[number]
            item.prepared = prepared
            if prepared.digests:
                self._offer(number, item)
            else:
                self._out.append(Seal(stream, number, prepared, np.zeros(0, np.uint64)))
        return self._finish()

    def _offer(self, number: int, item: _Item) -> None:
        item.offered = True
        if self.linked and item.prepared is not None:
            self._out.append(Send(encode_data(OFFER, number, item.prepared.digests)))

    def known(self, number: int, locs: NDArray[np.uint64]) -> list[Action]:
        """The target answered an offer. A second answer (after a break both offers may be answered) is left alone."""
        item = self._items.get(number)
        if item is not None and item.offered and item.prepared is not None:
            if len(locs) != len(item.prepared.blocks):
                raise ProtocolError(f"the answer to offer {number} has {len(locs)} locs")
            item.offered = False
            self._out.append(Seal(self.stream, number, item.prepared, locs))
        return self._finish()

    def sealed(self, stream: bytes, number: int, message: list[bytes]) -> list[Action]:
        """A `Seal` is done. `message` (in parts, the head first) is sent as it is, however often."""
        if stream == self.stream:
            item = self._items[number]
            item.prepared = None
            item.message = message
            item.bytes_sealed = sum(map(len, message)) - HEAD_BYTES
            self._under_way -= 1
            self.kept_bytes += item.bytes_sealed
            if number > self._cut_number:
                self._bytes_since_cut += item.bytes_sealed
        return self._finish()

    # The link.

    def welcomed(self, welcome: Welcome) -> list[Action]:
        """The target is connected and knows this stream up to item `welcome.received`."""
        if self._generation not in (None, welcome.generation) or welcome.received < self._durable:
            return self.lost_stream()
        self._generation = welcome.generation
        self._credit_bytes = welcome.credit_bytes
        self.linked = True
        self._floor_ns = max(self._floor_ns, welcome.time_ns)
        self._sent = welcome.received
        self._unacknowledged_bytes = sum(item.bytes_sealed for n, item in self._items.items() if n <= self._sent)
        for number, item in self._items.items():
            if item.offered:
                self._offer(number, item)
        return self._finish()

    def unlinked(self) -> list[Action]:
        """The link broke. What it carried may or may not have arrived."""
        self.linked = False
        return self._finish()

    def lost_stream(self) -> list[Action]:
        """The target cannot go on with this stream: begin a new one, and let the taps send what is not durable."""
        asked = list(self._asked.values())
        if self._round is not None and self._round.request is not None:
            asked.append(self._round.request)
        self._requests.extendleft(reversed(asked))
        self._begin_stream()
        self.resyncs += 1
        self._out.append(NewStream())
        if list(self._taps):
            self._list_taps()
        self._taps.resync(self._now_ns)
        return self._finish()

    def _pump(self) -> None:
        """Send items in order, as far as they are ready and the credit goes."""
        while self.linked and (item := self._items.get(self._sent + 1)) is not None and item.message:
            if self._unacknowledged_bytes + item.bytes_sealed > self._credit_bytes:
                return
            self._sent += 1
            self._unacknowledged_bytes += item.bytes_sealed
            self._out.append(Send(item.message))

    def durable(self, durable: Durable) -> list[Action]:
        """The target made a checkpoint durable."""
        if durable.number > self._sent:
            raise ProtocolError(f"item {durable.number} cannot be durable: it was not sent")
        while self._durable < durable.number:
            self._durable += 1
            freed = self._items.pop(self._durable).bytes_sealed
            self.kept_bytes -= freed
            self._unacknowledged_bytes -= freed
        for tap_id, sequence in durable.cuts.items():
            tap = self._taps.get(tap_id)
            if tap is not None and tap.connection is not None:
                self._out.append(
                    SendTap(tap.connection, wire.HEAD.pack(wire.DURABLE, 0, 0, 0, sequence, durable.time_ns, 0, 0))
                )
        if durable.request and self._asked.pop(durable.request, None) is not None:
            self._out.append(Answer(durable))
        return self._finish()

    # Checkpoints.

    def request_checkpoint(self, request_id: str, tag: str, description: str) -> list[Action]:
        """Make a checkpoint by hand as soon as the VPG is whole; `Answer` tells when it is durable."""
        self._requests.append(_Request(request_id, tag, description))
        self._ask_for_request()
        return self._finish()

    def withdraw(self, request_id: str) -> list[Action]:
        """Nobody waits for this request any more; if it was not made yet it never is."""
        self._requests = deque(request for request in self._requests if request.id != request_id)
        return self._finish()

    def tick(self, now_ns: int) -> list[Action]:
        """The (monotonic) clock moved on. Call it several times in each interval."""
        self._now_ns = now_ns
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
            self._due_ns = max(self._due_ns, now_ns - self._interval_ns + 1) + self._interval_ns
            if self._round is not None:
                self.skipped += 1
            elif self.linked:
                self._ask(None)
        return self._finish()

    def _ask(self, request: _Request | None) -> None:
        """Ask all taps for their watermark; a checkpoint follows when all have answered.

        With no tap connected, what came last is made durable; some of it may be half a guest's write.
        """
        taps = self._taps.connected
        if taps:
            self._round = _Round(self._taps.mark(taps, self._now_ns), request)
        elif self._numbered > self._cut_number:
            self._cut(max([self._floor_ns + 1, *(tap.last_ns for tap in self._taps)]), None)

    def _ask_for_request(self) -> None:
        if self._requests and self._round is None and self.linked and self._taps.connected and self._taps.all_whole:
            self._ask(self._requests.popleft())

    def _end_round(self) -> None:
        """If all connected taps have answered, cut at the least of their watermarks."""
        if self._round is None or any(tap.marked < self._round.mark for tap in self._taps.connected):
            return
        request, self._round = self._round.request, None
        if self._taps.connected:
            self._cut(max(self._taps.watermark_ns(), self._floor_ns + 1), request)
        elif request is not None:
            self._requests.appendleft(request)

    def _cut_early(self) -> None:
        if self._bytes_since_cut < self.limits.cut_bytes:
            return
        time_ns = self._taps.watermark_ns()
        if time_ns > self._floor_ns:
            self._cut(time_ns, None)
            self._pump()
        elif self._round is None:
            self._ask(None)

    def _cut(self, time_ns: int, request: _Request | None) -> None:
        self._close_batch()
        kind: CheckpointKind = "sync"
        if self._taps.whole_at(time_ns):
            kind = "tag" if request else "auto"
        elif request is not None:
            self._requests.appendleft(request)
            request = None
        self._numbered += 1
        item = CheckpointItem(
            number=self._numbered,
            kind=kind,
            time_ns=time_ns,
            exact=kind != "sync" and not self._taps.disturbed,
            cuts=self._taps.cuts(time_ns),
            tag=request.tag if request else "",
            description=request.description if request else "",
            request=request.id if request else "",
        )
        self._items[self._numbered] = _Item(message=encode_control(item))
        if request is not None:
            self._asked[request.id] = request
        self._taps.disturbed = kind == "sync"
        self._floor_ns = time_ns
        self._cut_number = self._numbered
        self._bytes_since_cut = 0
        self.checkpoints += 1

    # Back-pressure.

    def _steer_reading(self) -> None:
        flow = (
            self._generation is not None
            and self._under_way < self.limits.batches_max
            and self.kept_bytes < self.limits.kept_bytes_max
        )
        brimming = self._bytes_since_cut >= self.limits.cut_bytes_max
        for number, connection in self._connections.items():
            tap = connection.tap
            holds_back = tap is not None and (
                tap.watermark_ns <= self._floor_ns or (self._round is not None and tap.marked < self._round.mark)
            )
            reading = flow and (not brimming or holds_back or tap is None)
            if reading != connection.reading:
                connection.reading = reading
                self._out.append(ReadTap(number, reading))
