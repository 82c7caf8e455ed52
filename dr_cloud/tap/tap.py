"""The tap's core: what a guest write, a message of the VDSA or a broken connection does. No I/O, no event loop.

Purpose
    One `Tap` gives every write of its disks a sequence and a time, keeps the intent bitmap right, and fills a bounded
    queue of messages (`dr_cloud.tap.wire`) for the VDSA. `dr_cloud.tap.export` calls it for the guest,
    `dr_cloud.tap.feed` for the VDSA. Nothing the VDSA does or fails to do makes a call for the guest wait or fail.

States
    CONNECTING  no VDSA                     guest writes set bits in TO_SEND, nothing is queued
    TRACKING    VDSA there, copies missing  the same; a synchronisation begins once the socket has drained
    SYNCING     TO_SEND is being sent       guest writes set bits in the active epoch and are queued
    STREAMING   nothing to send again       the same

Why a bit may be cleared
    An epoch: every copy whose bit is in it was queued with a sequence ≤ the one at which it was closed, and the VDSA
    called that one durable on a connection that lost nothing in between (a loss moves all bits to TO_SEND first).
    A bit of TO_SEND: its block was sent by this synchronisation, or the guest wrote it meanwhile (that copy is queued,
    its bit is in an epoch), and the sequence after that is durable.
    Writes whose disk I/O is under way are flights: each change of the active plane sets their bits in the new one, for
    their copies will carry later sequences than the change.

Concurrency
    All calls come from one thread. The sync reads blocks while guests write: `watch` notes what they wrote since the
    read began, and `send_sync` leaves those blocks out, because their own copies are queued already.

Crash recovery: `dr_cloud.tap.bitmap`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import StrEnum
from itertools import pairwise
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import ProtocolError
from dr_cloud.nbd.export import Buffer
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.bits import EPOCH_A, EPOCH_B, TO_SEND, DiskBits

BATCH_BYTES: Final = 256 << 10
"""A batch is handed to the socket when it holds this much, or after a millisecond."""
_PENDING_MAX: Final = 4096

_log = structlog.get_logger(__name__)


class State(StrEnum):
    """What the tap does with copies."""

    CONNECTING = "connecting"
    TRACKING = "tracking"
    SYNCING = "syncing"
    STREAMING = "streaming"


class Event(StrEnum):
    """What changes the state."""

    CONNECTED = "connected"
    SYNC_BEGUN = "sync begun"
    SYNC_NEEDLESS = "sync needless"
    SYNC_DONE = "sync done"
    DROPPED = "dropped"
    LOST = "lost"


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.CONNECTING, Event.CONNECTED): State.TRACKING,
    (State.TRACKING, Event.SYNC_BEGUN): State.SYNCING,
    (State.TRACKING, Event.SYNC_NEEDLESS): State.STREAMING,
    (State.SYNCING, Event.SYNC_DONE): State.STREAMING,
    (State.TRACKING, Event.DROPPED): State.TRACKING,
    (State.SYNCING, Event.DROPPED): State.TRACKING,
    (State.STREAMING, Event.DROPPED): State.TRACKING,
    (State.CONNECTING, Event.DROPPED): State.CONNECTING,
    (State.CONNECTING, Event.LOST): State.CONNECTING,
    (State.TRACKING, Event.LOST): State.CONNECTING,
    (State.SYNCING, Event.LOST): State.CONNECTING,
    (State.STREAMING, Event.LOST): State.CONNECTING,
}
"""Any other pair is a bug and raises `KeyError`."""


class Flight:
    """A guest write whose disk I/O is under way. Its bits stay set until its copy is durable."""

    __slots__ = ("bits", "count", "first")

    def __init__(self, bits: DiskBits, first: int, count: int) -> None:
        self.bits = bits
        self.first = first
        self.count = count

    def overlaps(self, first: int, stop: int) -> bool:
        """Return whether it touches a block of [first, stop)."""
        return self.first < stop and first < self.first + self.count


class Watch:
    """What guests wrote to the blocks of one piece of a synchronisation since its read began."""

    __slots__ = ("bits", "count", "first", "written")

    def __init__(self, bits: DiskBits, first: int, count: int) -> None:
        self.bits = bits
        self.first = first
        self.count = count
        self.written: list[tuple[int, int]] = []

    def untouched(self) -> Iterator[tuple[int, int]]:
        """Yield (first, stop) of what guests left alone, ascending."""
        at, end = self.first, self.first + self.count
        for first, stop in sorted(self.written):
            if first > at:
                yield at, min(first, end)
            at = max(at, stop)
            if at >= end:
                return
        yield at, end


def _ignore() -> None:
    pass


class Tap:
    """The state machine of one tap process. See the module's docstring.

    Attributes:
        state: Changed only here.
        on_batch: Called when a first message waits (the owner then calls `take` within a millisecond).
        on_full: Called when a batch is full (the owner then calls `take` soon, not from within the call).
        on_change: Called after each change of the state.
        sync_number: Changes whenever a synchronisation begins or is broken off.
    """

    def __init__(
        self,
        bitmap: IntentBitmap,
        queue_bytes_max: int = 64 << 20,
        clock: Callable[[], int] = time.time_ns,
        server: str = "server",
    ) -> None:
        self.bitmap = bitmap
        self.server = server
        self.queue_bytes_max = queue_bytes_max
        self.sequence = bitmap.sequence
        self.time_ns = bitmap.time_ns
        self.state = State.CONNECTING
        self.on_batch: Callable[[], None] = _ignore
        self.on_full: Callable[[], None] = _ignore
        self.on_change: Callable[[], None] = _ignore
        self.queued_bytes = 0
        self.drops = 0
        self.sync_number = 0
        self._clock = clock
        self._hot = bitmap.hot
        self._queueing = False
        self._batches: deque[list[bytes]] = deque()
        self._open: list[bytes] = []
        self._open_bytes = 0
        self._flights: list[Flight] = []
        self._watch: Watch | None = None
        self._pending: deque[tuple[DiskBits, int, int, int]] = deque()
        self._closed = EPOCH_B
        self._active = TO_SEND
        self._closed_last = 0
        self._mark: int | None = None
        self._marked: int | None = None
        for bits in bitmap.disks:
            bits.merge_epochs()
        self._activate(TO_SEND)

    # The guest's side. The caller has set the bits (`bits.set` or `begin`) before the disk write began.

    def stamp(self) -> None:
        """Give out the next sequence and time. Called when the disk write is done, just before the answer."""
        now = self._clock()
        if now <= self.time_ns:
            now = self.time_ns + 1
        hot = self._hot
        hot[1] = self.time_ns = now
        self.sequence += 1
        hot[0] = self.sequence

    def wrote(self, bits: DiskBits, first: int, data: Buffer, flags: int = 0) -> None:
        """Queue a copy of whole blocks under the sequence and time just given out."""
        if self._watch is not None:
            self._note(bits, first, len(data) // BLOCK_SIZE)
        if not self._queueing:
            return
        count = len(data) // BLOCK_SIZE
        if count <= wire.WRITE_BLOCKS_MAX:
            head = wire.HEAD.pack(wire.WRITE, flags, bits.disk.index, count, self.sequence, self.time_ns, first, 0)
            self._put(head + data)
            return
        view = memoryview(data)
        for at in range(0, count, wire.WRITE_BLOCKS_MAX):
            if not self._queueing:
                return
            piece = view[at * BLOCK_SIZE : (at + wire.WRITE_BLOCKS_MAX) * BLOCK_SIZE]
            blocks = len(piece) // BLOCK_SIZE
            head = wire.HEAD.pack(
                wire.WRITE, flags, bits.disk.index, blocks, self.sequence, self.time_ns, first + at, 0
            )
            self._put(head + piece)

    def zeroed(self, bits: DiskBits, first: int, count: int, flags: int = 0) -> None:
        """Queue that whole blocks are zeroes now, under the sequence and time just given out."""
        if self._watch is not None:
            self._note(bits, first, count)
        if self._queueing:
            self._put(wire.HEAD.pack(wire.ZERO, flags, bits.disk.index, count, self.sequence, self.time_ns, first, 0))

    def begin(self, bits: DiskBits, first: int, count: int) -> Flight:
        """Set the bits of a write whose disk I/O does not end at once."""
        flight = Flight(bits, first, count)
        self._flights.append(flight)
        bits.set(first, count)
        return flight

    def end(self, flight: Flight) -> None:
        """The disk I/O has ended and its copy, if any, was handed to `wrote` or `zeroed`."""
        self._flights.remove(flight)

    def drop(self, reason: str) -> None:
        """Give up the queue: from here on bits only, until a synchronisation sends them.

        Used when the queue is full, when the VDSA lost something (RESYNC), and when a copy could not be made.
        """
        if self.state in (State.SYNCING, State.STREAMING):
            self.drops += 1
            _log.warning("tap.dropped", reason=reason, queued_bytes=self.queued_bytes)
        self._change(Event.DROPPED)

    # The VDSA's side.

    def connected(self) -> None:
        """A connection stands: say HELLO."""
        hello = wire.Hello(
            tap=self.bitmap.tap_id,
            server=self.server,
            sequence=self.sequence,
            disks=[bits.disk for bits in self.bitmap.disks],
        )
        body = hello.model_dump_json().encode()
        self._change(Event.CONNECTED)
        self._put(wire.HEAD.pack(wire.HELLO, 0, 0, len(body), self.sequence, 0, 0, 0) + body)

    def lost(self) -> None:
        """The connection is gone, with whatever was under way in it."""
        self._change(Event.LOST)
        self._mark = self._marked = None

    def mark(self, mark_id: int) -> None:
        """Answer a MARK in its place in the stream; while copies are missing, after the next SYNC_BEGIN."""
        if not self._queueing:
            self._mark = mark_id
            return
        self.time_ns = self._hot[1] = max(self._clock(), self.time_ns)
        self._marked = mark_id
        self._put(wire.HEAD.pack(wire.MARKED, 0, 0, 0, self.sequence, self.time_ns, 0, mark_id))

    def durable(self, sequence: int) -> None:
        """Everything up to `sequence` is durable at the target: clear what that covers.

        Raises:
            ProtocolError: No such sequence was given out.
        """
        if sequence > self.sequence:
            raise ProtocolError(f"DURABLE names sequence {sequence}, but the last one given out is {self.sequence}")
        if not self._queueing:
            return
        pending = self._pending
        while pending and pending[0][3] <= sequence:
            bits, first, count, _ = pending.popleft()
            if count:
                bits.clear_range(TO_SEND, first, count)
        # Twice: when all is durable, the epoch that was active until now may go as well.
        for _ in range(2):
            if sequence < self._closed_last:
                break
            for bits in self.bitmap.disks:
                bits.clear(self._closed)
            self._closed, active = self._active, self._closed
            self._closed_last = self.sequence
            self._activate(active)

    def begin_sync(self) -> bool:
        """Begin to send TO_SEND. The owner flushed the bitmap since the state became TRACKING.

        Returns:
            Whether there is something to send; if not, the state is STREAMING already.
        """
        for bits in self.bitmap.disks:
            # Their bits are in TO_SEND, and TO_SEND is flushed: no crash can lose them now.
            bits.clear(EPOCH_A)
            bits.clear(EPOCH_B)
        self._closed = EPOCH_B
        self._closed_last = self.sequence
        self._activate(EPOCH_A)
        needed = any(bits.touched[TO_SEND] for bits in self.bitmap.disks)
        self._change(Event.SYNC_BEGUN if needed else Event.SYNC_NEEDLESS)
        if needed:
            self._put_sync(wire.SYNC_BEGIN)
        if self._mark is not None:
            mark_id, self._mark = self._mark, None
            self.mark(mark_id)
        return needed

    def sync_runs(self) -> Iterator[tuple[DiskBits, int, int]]:
        """Yield (disk, first, stop) of what this synchronisation has to send."""
        for bits in self.bitmap.disks:
            for first, stop in bits.runs(TO_SEND):
                yield bits, first, stop

    def watch(self, bits: DiskBits, first: int, count: int) -> Watch:
        """Note from now on what guests write to these blocks; one piece at a time."""
        self._watch = Watch(bits, first, count)
        return self._watch

    def send_sync(self, watch: Watch, data: memoryview | None) -> None:
        """Queue a piece that was read while `watch` stood: `data` are its blocks, None means that all are zeroes."""
        self._watch = None
        bits = watch.bits
        for first, stop in watch.untouched():
            if data is None:
                self.stamp()
                self.zeroed(bits, first, stop - first, wire.FLAG_SYNC)
                continue
            part = data[(first - watch.first) * BLOCK_SIZE : (stop - watch.first) * BLOCK_SIZE]
            for at, end, filled in _filled_runs(part):
                self.stamp()
                if filled:
                    self.wrote(bits, first + at, part[at * BLOCK_SIZE : end * BLOCK_SIZE], wire.FLAG_SYNC)
                else:
                    self.zeroed(bits, first + at, end - at, wire.FLAG_SYNC)
        if not self._queueing:
            return
        first = watch.first
        if len(self._pending) >= _PENDING_MAX and self._pending[-1][0] is bits and self._pending[-1][2]:
            # A VDSA that is slow to call things durable: one longer entry, cleared with its last part.
            first = self._pending.pop()[1]
        self._pending.append((bits, first, watch.first + watch.count - first, self.sequence))

    def skip_sync(self, watch: Watch) -> None:
        """A piece could not be read: its bits stay set. After the last piece, `drop` begins another round."""
        self._watch = None
        # An entry of no blocks: the entries before and after it are never made one.
        self._pending.append((watch.bits, watch.first, 0, self.sequence))

    def end_sync(self) -> None:
        """Everything was queued."""
        self._put_sync(wire.SYNC_END)
        self._change(Event.SYNC_DONE)

    def take(self) -> list[bytes] | None:
        """Return the next messages to hand to the socket, oldest first, or None."""
        if self._batches:
            batch = self._batches.popleft()
        elif self._open:
            batch, self._open, self._open_bytes = self._open, [], 0
        else:
            return None
        self.queued_bytes -= sum(map(len, batch))
        if not self.queued_bytes:
            self._marked = None
        return batch

    def status(self) -> dict[str, str | int]:
        """Return the state in figures."""
        return {
            "state": str(self.state),
            "queued_bytes": self.queued_bytes,
            "dirty_blocks": self.bitmap.dirty_blocks(),
            "sequence": self.sequence,
            "time_ns": self.time_ns,
            "drops": self.drops,
        }

    def _note(self, bits: DiskBits, first: int, count: int) -> None:
        watch = self._watch
        if watch is not None and watch.bits is bits:
            start, stop = max(first, watch.first), min(first + count, watch.first + watch.count)
            if start < stop:
                watch.written.append((start, stop))

    def _put_sync(self, kind: int) -> None:
        self._put(wire.HEAD.pack(kind, 0, 0, 0, self.sequence, self.time_ns, 0, 0))

    def _put(self, message: bytes) -> None:
        batch = self._open
        batch.append(message)
        length = len(message)
        self.queued_bytes += length
        self._open_bytes += length
        if self._open_bytes >= BATCH_BYTES:
            self._batches.append(batch)
            self._open = []
            self._open_bytes = 0
            self.on_full()
        elif len(batch) == 1:
            self.on_batch()
        if self.queued_bytes > self.queue_bytes_max:
            self.drop("the queue to the VDSA is full")

    def _change(self, event: Event) -> None:
        before = self.state
        self.state = TRANSITIONS[before, event]
        self._queueing = self.state in (State.SYNCING, State.STREAMING)
        if event in (Event.DROPPED, Event.LOST):
            self._watch = None
            if before in (State.SYNCING, State.STREAMING):
                for bits in self.bitmap.disks:
                    bits.merge_epochs()
                self._activate(TO_SEND)
                self._pending.clear()
                self._mark = self._mark if self._marked is None else self._marked
                self._empty()
            elif event is Event.LOST:
                self._empty()
        if event is not Event.SYNC_DONE:
            self.sync_number += 1
        if self.state is not before:
            _log.info("tap.state", state=str(self.state), cause=str(event), sequence=self.sequence)
        self.on_change()

    def _empty(self) -> None:
        self._batches.clear()
        self._open = []
        self._open_bytes = self.queued_bytes = 0
        self._marked = None

    def _activate(self, plane: int) -> None:
        self._active = plane
        for bits in self.bitmap.disks:
            bits.activate(plane)
        for flight in self._flights:
            flight.bits.set(flight.first, flight.count)


def _filled_runs(data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, stop, has a byte that is not zero) of runs of blocks of `data`."""
    words = np.frombuffer(data, np.uint64).reshape(-1, BLOCK_SIZE // 8)
    filled: NDArray[np.bool] = np.bitwise_or.reduce(words, axis=1) != 0
    edges = [0, *(np.flatnonzero(filled[1:] != filled[:-1]) + 1).tolist(), len(filled)]
    for first, stop in pairwise(edges):
        yield first, stop, bool(filled[first])
