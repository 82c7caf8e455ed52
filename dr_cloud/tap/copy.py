"""One copy of a tap: what a guest write, a message of its VDSA or a broken connection does. No I/O, no event loop.

Purpose
    A tap gives a copy of every write to each of its replication targets. One `Copy` stands for one of them: it keeps
    that target's intent bitmap right and fills a bounded queue of messages (`dr_cloud.tap.wire`) for its VDSA.
    `dr_cloud.tap.tap` calls it for the guest, `dr_cloud.tap.feed` for the VDSA. Nothing the VDSA does or fails to do
    makes a call for the guest wait or fail, or touches another copy.

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

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from dr_cloud.model.blocks import BLOCK_SIZE, blocks_of
from dr_cloud.model.errors import ProtocolError
from dr_cloud.nbd.export import Buffer
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.bits import EPOCH_A, EPOCH_B, TO_SEND, DiskBits, TapDisk
from dr_cloud.tap.clock import Clock
from dr_cloud.tap.gate import Gate

BATCH_BYTES: Final = 512 << 10
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

    __slots__ = ("count", "disk", "first")

    def __init__(self, disk: TapDisk, first: int, count: int) -> None:
        self.disk = disk
        self.first = first
        self.count = count

    def overlaps(self, first: int, stop: int) -> bool:
        """Return whether it touches a block of [first, stop)."""
        return self.first < stop and first < self.first + self.count

    def clip(self) -> None:
        """The disk may have become shorter."""
        self.count = max(0, min(self.count, blocks_of(self.disk.disk.size_bytes) - self.first))


class Watch:
    """What guests wrote to the blocks of one piece of a synchronisation since its read began."""

    __slots__ = ("bits", "count", "first", "written")

    def __init__(self, bits: DiskBits, first: int, count: int) -> None:
        self.bits = bits
        self.first = first
        self.count = count
        self.written: list[tuple[int, int]] = []

    def note(self, bits: DiskBits, first: int, count: int) -> None:
        """A guest wrote."""
        if self.bits is bits:
            start, stop = max(first, self.first), min(first + count, self.first + self.count)
            if start < stop:
                self.written.append((start, stop))

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


class Copy:
    """The state machine of one copy. See the module's docstring.

    Attributes:
        number: Which of the tap's copies it is.
        state: Changed only here.
        queueing: Whether guests' copies are to be put into the queue.
        watching: What a synchronisation is reading, if it is.
        on_batch: Called when a first message waits (the owner then calls `take` within a millisecond).
        on_full: Called when a batch is full (the owner then calls `take` soon, not from within the call).
        on_change: Called after each change of the state.
        on_needs: Called after `queueing` or `watching` has changed.
        sync_number: Changes whenever a synchronisation begins or is broken off.
    """

    def __init__(
        self,
        number: int,
        server: str,
        bitmap: IntentBitmap,
        clock: Clock,
        gate: Gate,
        flights: Sequence[Flight],
        queue_bytes_max: int,
    ) -> None:
        self.number = number
        self.bitmap = bitmap
        self.queue_bytes_max = queue_bytes_max
        self.state = State.CONNECTING
        self.queueing = False
        self.watching: Watch | None = None
        self.on_batch: Callable[[], None] = _ignore
        self.on_full: Callable[[], None] = _ignore
        self.on_change: Callable[[], None] = _ignore
        self.on_needs: Callable[[], None] = _ignore
        self.drops = 0
        self.sync_number = 0
        self._server = server
        self._clock = clock
        self._gate = gate
        self._flights = flights
        self._early = -1
        self._batches: deque[list[bytes]] = deque()
        self._batches_bytes = 0
        self._open: list[bytes] = []
        self._open_bytes = 0
        self._open_bytes_max = 0
        """The open batch is closed when it holds this much: it is full then, or the queue is over its limit."""
        self._fit_batch()
        self._pending: deque[tuple[DiskBits, int, int, int]] = deque()
        self._closed = EPOCH_B
        self._closed_last = 0
        self._waiting: dict[int, int] = {}
        """Answers to be given after the next SYNC_BEGIN: their ids by type."""
        self._answered: dict[int, int] = {}
        """Answers in the queue."""
        for bits in bitmap.disks:
            bits.merge_epochs()
        self._activate(TO_SEND)

    def drop(self, reason: str) -> None:
        """Give up the queue: from here on bits only, until a synchronisation sends them.

        Used when the queue is full, when the VDSA lost something (RESYNC), and when a copy could not be made.
        """
        if self.state in (State.SYNCING, State.STREAMING):
            self.drops += 1
            _log.warning("tap.dropped", copy=self.number, reason=reason, queued_bytes=self.queued_bytes)
        self._change(Event.DROPPED)

    def send_whole(self, disk: int) -> None:
        """The target has nothing that this copy's bits rest on: every block of the disk with this index is missing."""
        self.drop("the VDSA asked for a whole disk")
        for bits in self.bitmap.disks:
            if bits.disk.index == disk:
                bits.set(0, blocks_of(bits.disk.size_bytes))

    @property
    def queued_bytes(self) -> int:
        """How much waits for the VDSA."""
        return self._batches_bytes + self._open_bytes

    # The VDSA's side.

    def connected(self) -> None:
        """A connection stands: say HELLO."""
        hello = wire.Hello(
            tap=self.bitmap.tap_id,
            server=self._server,
            copy_number=self.number,
            sequence=self._clock.sequence,
            durable=self.bitmap.durable,
            disks=[bits.disk for bits in self.bitmap.disks],
        )
        body = hello.model_dump_json().encode()
        self._change(Event.CONNECTED)
        self.put(wire.HEAD.pack(wire.HELLO, 0, 0, len(body), self._clock.sequence, 0, 0, 0) + body)

    def lost(self) -> None:
        """The connection is gone, with whatever was under way in it."""
        self._change(Event.LOST)
        self._gate.lost(self.number)
        self._waiting.clear()
        self._answered.clear()

    def mark(self, mark_id: int) -> None:
        """Answer a MARK."""
        self._answer(wire.MARKED, mark_id)

    def hold(self, hold_id: int, time_ns: int) -> None:
        """Hold acknowledgements and lift the clock to `time_ns`, or neither; answer a HOLD."""
        clock = self._clock
        fits = clock.time_ns <= time_ns <= clock.now() + wire.LIFT_NS_MAX
        if not self.queueing or not fits or not self._gate.hold(self.number, hold_id):
            self._answer(wire.HELD, hold_id, wire.FLAG_EXPIRED)
            return
        clock.lift(time_ns)
        self._answer(wire.HELD, hold_id, time_ns=time_ns)

    def release(self, hold_id: int) -> None:
        """Let acknowledgements go; answer a RELEASE."""
        stood = self._gate.release(self.number, hold_id)
        self._answer(wire.RELEASED, hold_id, 0 if stood else wire.FLAG_EXPIRED)

    def order(self, uncertainty_ns: int) -> None:
        """Obey an ORDER. Raises `ProtocolError` if it asks for too much."""
        self._gate.order(self.number, uncertainty_ns)

    def _answer(self, kind: int, asked_id: int, flags: int = 0, time_ns: int = 0) -> None:
        """Answer in its place in the stream; while copies are missing, after the next SYNC_BEGIN."""
        if not self.queueing:
            self._waiting[kind] = asked_id
            return
        clock = self._clock
        clock.lift(time_ns or clock.now())
        if not self._gate.ordered(self.number) or self._early != self._gate.early:
            flags |= wire.FLAG_UNORDERED
        self._early = self._gate.early
        self._answered[kind] = asked_id
        self.put(wire.HEAD.pack(kind, flags, 0, 0, clock.sequence, clock.time_ns, 0, asked_id))

    def durable(self, sequence: int) -> None:
        """Everything up to `sequence` is durable at the target: clear what that covers.

        Raises:
            ProtocolError: No such sequence was given out.
        """
        if sequence > self._clock.sequence:
            raise ProtocolError(
                f"DURABLE names sequence {sequence}, but the last one given out is {self._clock.sequence}"
            )
        if not self.queueing:
            return
        # Before a bit is cleared: whoever reads the bits later must know on which target's word they were.
        self.bitmap.durable = max(sequence, self.bitmap.durable)
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
            self._closed_last = self._clock.sequence
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
        self._closed_last = self._clock.sequence
        self._activate(EPOCH_A)
        needed = any(bits.touched[TO_SEND] for bits in self.bitmap.disks)
        self._change(Event.SYNC_BEGUN if needed else Event.SYNC_NEEDLESS)
        if needed:
            self._put_sync(wire.SYNC_BEGIN)
        waiting, self._waiting = self._waiting, {}
        for kind, asked_id in sorted(waiting.items()):
            self._answer(kind, asked_id, 0 if kind == wire.MARKED else wire.FLAG_EXPIRED)
        return needed

    def sync_runs(self) -> Iterator[tuple[DiskBits, int, int]]:
        """Yield (disk, first, stop) of what this synchronisation has to send."""
        for bits in self.bitmap.disks:
            for first, stop in bits.runs(TO_SEND):
                yield bits, first, stop

    def watch(self, bits: DiskBits, first: int, count: int) -> Watch:
        """Note from now on what guests write to these blocks; one piece at a time."""
        watch = self.watching = Watch(bits, first, count)
        self.on_needs()
        return watch

    def send_sync(self, watch: Watch, data: memoryview | None) -> None:
        """Queue a piece that was read while `watch` stood: `data` are its blocks, None means that all are zeroes."""
        self._unwatch()
        bits = watch.bits
        for first, stop in watch.untouched():
            if data is None:
                self._put_again(wire.ZERO, bits, first, stop - first)
                continue
            part = data[(first - watch.first) * BLOCK_SIZE : (stop - watch.first) * BLOCK_SIZE]
            for at, end, filled in _filled_runs(part):
                if filled:
                    self._put_again(wire.WRITE, bits, first + at, end - at, part[at * BLOCK_SIZE : end * BLOCK_SIZE])
                else:
                    self._put_again(wire.ZERO, bits, first + at, end - at)
        if not self.queueing:
            return
        first = watch.first
        if len(self._pending) >= _PENDING_MAX and self._pending[-1][0] is bits and self._pending[-1][2]:
            # A VDSA that is slow to call things durable: one longer entry, cleared with its last part.
            first = self._pending.pop()[1]
        self._pending.append((bits, first, watch.first + watch.count - first, self._clock.sequence))

    def skip_sync(self, watch: Watch) -> None:
        """A piece could not be read: its bits stay set. After the last piece, `drop` begins another round."""
        self._unwatch()
        # An entry of no blocks: the entries before and after it are never made one.
        self._pending.append((watch.bits, watch.first, 0, self._clock.sequence))

    def end_sync(self) -> None:
        """Everything was queued."""
        self._put_sync(wire.SYNC_END)
        self._change(Event.SYNC_DONE)

    def take(self) -> list[bytes] | None:
        """Return the next messages to hand to the socket, oldest first, or None."""
        if not self._batches:
            if not self._open:
                return None
            self._close_batch()
        batch = self._batches.popleft()
        self._batches_bytes -= sum(map(len, batch))
        self._fit_batch()
        if not self.queued_bytes:
            self._answered.clear()
        return batch

    def status(self) -> dict[str, str | int]:
        """Return the state in figures."""
        return {
            "state": str(self.state),
            "queued_bytes": self.queued_bytes,
            "dirty_blocks": self.bitmap.dirty_blocks(),
            "drops": self.drops,
        }

    def put(self, message: bytes) -> None:
        """Queue a message. Only HELLO and, while `queueing`, whatever there is."""
        batch = self._open
        batch.append(message)
        self._open_bytes += len(message)
        if self._open_bytes >= self._open_bytes_max:
            self._close_batch()
            self.on_full()
            if self._batches_bytes > self.queue_bytes_max:
                self.drop("the queue to the VDSA is full")
        elif len(batch) == 1:
            self.on_batch()

    def _close_batch(self) -> None:
        self._batches.append(self._open)
        self._batches_bytes += self._open_bytes
        self._open, self._open_bytes = [], 0
        self._fit_batch()

    def _fit_batch(self) -> None:
        self._open_bytes_max = min(BATCH_BYTES, self.queue_bytes_max - self._batches_bytes + 1)

    def _put_sync(self, kind: int) -> None:
        self.put(wire.HEAD.pack(kind, 0, 0, 0, self._clock.sequence, self._clock.time_ns, 0, 0))

    def _put_again(self, kind: int, bits: DiskBits, first: int, count: int, data: Buffer = b"") -> None:
        """Queue blocks that were read again, under a sequence and time of their own."""
        clock = self._clock
        clock.stamp()
        if self.queueing:
            head = wire.HEAD.pack(kind, wire.FLAG_SYNC, bits.disk.index, count, clock.sequence, clock.time_ns, first, 0)
            self.put(head + data)

    def _unwatch(self) -> None:
        if self.watching is not None:
            self.watching = None
            self.on_needs()

    def _change(self, event: Event) -> None:
        before = self.state
        self.state = TRANSITIONS[before, event]
        self.queueing = self.state in (State.SYNCING, State.STREAMING)
        self.on_needs()
        if event in (Event.DROPPED, Event.LOST):
            self._unwatch()
            if before in (State.SYNCING, State.STREAMING):
                for bits in self.bitmap.disks:
                    bits.merge_epochs()
                self._activate(TO_SEND)
                self._pending.clear()
                self._waiting |= self._answered
                self._gate.forget(self.number)
                self._empty()
            elif event is Event.LOST:
                self._empty()
        if event is not Event.SYNC_DONE:
            self.sync_number += 1
        if self.state is not before:
            _log.info(
                "tap.state", copy=self.number, state=str(self.state), cause=str(event), sequence=self._clock.sequence
            )
        self.on_change()

    def _empty(self) -> None:
        self._batches.clear()
        self._open = []
        self._batches_bytes = self._open_bytes = 0
        self._fit_batch()
        self._answered.clear()

    def _activate(self, plane: int) -> None:
        self._active = plane
        for bits in self.bitmap.disks:
            bits.activate(plane)
        for flight in self._flights:
            if flight.count:
                flight.disk.bits[self.number].set(flight.first, flight.count)


def _filled_runs(data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, stop, has a byte that is not zero) of runs of blocks of `data`."""
    words = np.frombuffer(data, np.uint64).reshape(-1, BLOCK_SIZE // 8)
    filled: NDArray[np.bool] = np.bitwise_or.reduce(words, axis=1) != 0
    edges = [0, *(np.flatnonzero(filled[1:] != filled[:-1]) + 1).tolist(), len(filled)]
    for first, stop in pairwise(edges):
        yield first, stop, bool(filled[first])
