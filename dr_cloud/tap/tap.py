"""The tap's core: its clock, its copies, and what a guest's write does to all of them. No I/O, no event loop.

One guest write sets a bit in every copy's bitmap, takes one sequence and one time, and is one message, put into the
queue of each copy that is being fed. A copy whose target is slow or away only has its bits set (`dr_cloud.tap.copy`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE
from dr_cloud.nbd.export import Buffer
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.bits import TapDisk
from dr_cloud.tap.clock import Clock
from dr_cloud.tap.copy import Copy, Flight
from dr_cloud.tap.gate import Gate

QUEUE_BYTES_MAX = 64 << 20
"""Of each copy."""

_pack = wire.HEAD.pack
_WRITE: Final = wire.WRITE
_WRITE_BYTES_MAX: Final = wire.WRITE_BLOCKS_MAX * BLOCK_SIZE


class Tap:
    """One tap process, without its disks and sockets.

    Attributes:
        clock: Sequence and time of all writes.
        gate: When writes may be acknowledged.
        copies: One per replication target.
        disks: In the order in which they were given.
    """

    def __init__(
        self,
        server: str,
        bitmaps: Sequence[IntentBitmap],
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        now: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Begin where the bitmaps stand.

        Args:
            server: Name of the virtual server whose disks these are.
            bitmaps: One per copy, with the same disks in the same order. The first one stores the clock.
            queue_bytes_max: What a copy keeps at most for a VDSA that does not take it.
            now: The host's clock, ns since the epoch.
            monotonic: A clock that never goes back, ns.
        """
        self.clock = Clock(bitmaps[0].hot, now)
        self.gate = Gate(self.clock, monotonic)
        self._flights: list[Flight] = []
        self.copies = tuple(
            Copy(number, server, bitmap, self.clock, self.gate, self._flights, queue_bytes_max)
            for number, bitmap in enumerate(bitmaps)
        )
        self.disks: list[TapDisk] = []
        self._queueing: tuple[Copy, ...] = ()
        self._watching: tuple[Copy, ...] = ()
        for copy in self.copies:
            copy.on_needs = self._look
        self.stamp = self.clock.stamp
        self.rebuild()

    # The guest's side. The caller has set the bits (`TapDisk.set` or `begin`) before the disk write began.

    def wrote(self, disk: TapDisk, first: int, data: Buffer) -> None:
        """Queue a copy of whole blocks under the sequence and time just given out."""
        if not self._queueing:
            return
        size_bytes = len(data)
        count = size_bytes >> BLOCK_SHIFT
        if self._watching:
            self._note(disk, first, count)
        clock = self.clock
        if size_bytes <= _WRITE_BYTES_MAX:
            message = _pack(_WRITE, 0, disk.index, count, clock.sequence, clock.time_ns, first, 0) + data
            for copy in self._queueing:
                copy.put(message)
            return
        view = memoryview(data)
        for at in range(0, size_bytes, _WRITE_BYTES_MAX):
            piece = view[at : at + _WRITE_BYTES_MAX]
            start, blocks = first + (at >> BLOCK_SHIFT), len(piece) >> BLOCK_SHIFT
            message = _pack(_WRITE, 0, disk.index, blocks, clock.sequence, clock.time_ns, start, 0) + piece
            # A copy that gives its queue up in between is not among them for the next piece.
            for copy in self._queueing:
                copy.put(message)

    def zeroed(self, disk: TapDisk, first: int, count: int) -> None:
        """Queue that whole blocks are zeroes now, under the sequence and time just given out."""
        self._note(disk, first, count)
        clock = self.clock
        for copy in self._queueing:
            copy.put(_pack(wire.ZERO, 0, disk.index, count, clock.sequence, clock.time_ns, first, 0))

    def begin(self, disk: TapDisk, first: int, count: int) -> Flight:
        """Set the bits of a write whose disk I/O does not end at once."""
        flight = Flight(disk, first, count)
        self._flights.append(flight)
        disk.set(first, count)
        return flight

    def end(self, flight: Flight) -> None:
        """The disk I/O has ended and its copy, if any, was handed to `wrote` or `zeroed`."""
        self._flights.remove(flight)

    def drop(self, reason: str) -> None:
        """A copy of a write could not be made: every queue is given up, and bits tell what is missing."""
        for copy in self.copies:
            copy.drop(reason)

    # Changing disks.

    def rebuild(self) -> None:
        """Take over what the bitmaps have become. At a change of disks, no copy is connected."""
        known = {disk.index: disk for disk in self.disks}
        self.disks[:] = [
            known.get(bits[0].disk.index) or TapDisk(bits)
            for bits in zip(*(copy.bitmap.disks for copy in self.copies), strict=True)
        ]
        # What was broken off may be at work on a disk that is gone; nobody asks for its bits any more.
        self._flights[:] = [flight for flight in self._flights if flight.disk in self.disks]
        for flight in self._flights:
            flight.clip()
        self.clock.move(self.copies[0].bitmap.hot)

    def status(self) -> dict[str, object]:
        """Return the state in figures."""
        return {
            "sequence": self.clock.sequence,
            "time_ns": self.clock.time_ns,
            "copies": [copy.status() for copy in self.copies],
        }

    def _look(self) -> None:
        # New tuples: a loop over the old ones goes on undisturbed. Who watches is queueing, too.
        self._queueing = tuple(copy for copy in self.copies if copy.queueing)
        self._watching = tuple(copy for copy in self.copies if copy.watching is not None)

    def _note(self, disk: TapDisk, first: int, count: int) -> None:
        for copy in self._watching:
            if copy.watching is not None:
                copy.watching.note(disk.bits[copy.number], first, count)
