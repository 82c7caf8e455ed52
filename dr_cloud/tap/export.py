"""One disk of the tap as an NBD export: the path of guest I/O.

Order for a guest write: set the bits, write the disk, give out sequence and time, queue the copies, answer. Nothing in
it waits for a VDSA, but for the few milliseconds that `dr_cloud.tap.gate` may hold an answer. Partial blocks are
completed from the disk after the write: a copy always holds whole blocks.

A write to a file in memory's reach is done in one go, without a task. Where the disk answers later (upstream, trims),
writes that share a block take turns, so that disk and feed end in the same order.

A write that fails on the disk leaves its blocks unknown: what is there now is copied, and the guest gets the error. A
copy that cannot be made (its blocks cannot be read) drops the queue; the bits stay set, and a synchronisation tries
again. The guest never sees that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import structlog

from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE
from dr_cloud.nbd.export import Extent
from dr_cloud.tap.bits import BIT, TapDisk
from dr_cloud.tap.copy import Flight
from dr_cloud.tap.disk import EXTENTS_MAX, Disk, FileDisk
from dr_cloud.tap.tap import Tap

_log = structlog.get_logger(__name__)

_BLOCK_MASK = BLOCK_SIZE - 1


class _UnderWay(NamedTuple):
    """A flight of this disk and what is woken when it has landed."""

    flight: Flight
    landed: asyncio.Future[None]


class TapExport:
    """The export of one disk. See the module's docstring; the calls are those of `dr_cloud.nbd.export.Export`."""

    read_only = False
    block_size_preferred = BLOCK_SIZE

    def __init__(self, tap: Tap, entry: TapDisk, disk: Disk) -> None:
        self.name = entry.disk.name
        self.description = "protected disk"
        self.size_bytes = disk.size_bytes
        self.block_size_minimum = disk.block_size_minimum
        self._tap = tap
        self._gate = tap.gate
        self._entry = entry
        self._disk = disk
        self._file = disk if isinstance(disk, FileDisk) else None
        self._under_way: list[_UnderWay] = []
        self.pread = disk.pread

    def pwrite(self, offset: int, data: memoryview, fua: bool) -> Awaitable[None] | None:
        """Write to the disk, queue the copies."""
        file, entry, tap = self._file, self._entry, self._tap
        length = len(data)
        if file is None or self._under_way:
            return self._write_later(offset, data, fua)
        first = offset >> BLOCK_SHIFT
        if length == BLOCK_SIZE and not offset & _BLOCK_MASK:
            at, bit = first >> 3, BIT[first & 7]
            for bits in entry.bits:
                active = bits.active
                value = active[at]
                if not value & bit:
                    active[at] = value | bit
                    bits.active_touched.add(at >> 12)
        else:
            entry.set(first, ((offset + length - 1) >> BLOCK_SHIFT) - first + 1)
        try:
            file.pwrite(offset, data)
        except OSError:
            self._copy_now(file, offset, length, None)
            raise
        if (offset | length) & _BLOCK_MASK:
            self._copy_now(file, offset, length, data)
        else:
            tap.stamp()
            tap.wrote(entry, first, data)
        if fua:
            return self._flush_and_acknowledge(tap.clock.time_ns)
        return self._gate.acknowledge(tap.clock.time_ns) if self._gate.shut else None

    def flush(self) -> Awaitable[None]:
        """Make the disk's writes and their bits durable, both at the same time."""
        return self._flush_and_acknowledge(0)

    def trim(self, offset: int, length: int, fua: bool) -> Awaitable[None]:
        """Discard; it reads as zeroes afterwards, and so it is copied."""
        return self._zero(offset, length, fua, may_trim=True)

    def write_zeroes(self, offset: int, length: int, fua: bool, may_trim: bool) -> Awaitable[None]:
        """Write zeroes."""
        return self._zero(offset, length, fua, may_trim)

    def block_status(self, offset: int, length: int) -> Sequence[Extent] | Awaitable[Sequence[Extent]]:
        """Return the disk's extents."""
        return self._disk.extents(offset, length, EXTENTS_MAX)

    async def _flush_and_acknowledge(self, time_ns: int) -> None:
        """Flush disk and bitmaps at the same time, then wait until a write with this time may be acknowledged."""
        loop = asyncio.get_running_loop()
        flushes = [(copy.bitmap, loop.run_in_executor(None, copy.bitmap.flush)) for copy in self._tap.copies]
        try:
            await self._disk.flush()
        finally:
            for bitmap, flush in flushes:
                try:
                    await flush
                except OSError as error:
                    # Only a loss of the whole host could lose bits now, and after that everything is sent again.
                    _log.error("tap.bitmap_flush_failed", file=str(bitmap.path), error=str(error))
        await self._acknowledge(time_ns)

    async def _acknowledge(self, time_ns: int) -> None:
        if self._gate.shut:
            await self._gate.acknowledge(time_ns)

    def _copy_now(self, file: FileDisk, offset: int, length: int, data: memoryview | None) -> None:
        """Queue the blocks that a write touched, completed from the file; all of them from it without `data`."""
        first = offset >> BLOCK_SHIFT
        start, stop = first << BLOCK_SHIFT, (offset + length + _BLOCK_MASK) & ~_BLOCK_MASK
        copy = memoryview(bytearray(stop - start))
        try:
            if data is None:
                file.read_into(copy, start)
            else:
                end = offset + length
                file.read_into(copy[: offset - start], start)
                copy[offset - start : end - start] = data
                file.read_into(copy[end - start :], end)
        except OSError as error:
            self._tap.drop(f"blocks written by a guest cannot be read: {error}")
        self._tap.stamp()
        self._tap.wrote(self._entry, first, copy)

    async def _write_later(self, offset: int, data: memoryview, fua: bool) -> None:
        def start() -> Awaitable[None] | None:
            return self._disk.pwrite(offset, data)

        def copy() -> Awaitable[None]:
            return self._copy(offset, len(data), data)

        await self._in_turn(offset, len(data), start, copy)
        time_ns = self._tap.clock.time_ns
        await (self._flush_and_acknowledge(time_ns) if fua else self._acknowledge(time_ns))

    async def _zero(self, offset: int, length: int, fua: bool, may_trim: bool) -> None:
        def start() -> Awaitable[None] | None:
            return self._disk.zero(offset, length, may_trim)

        def copy() -> Awaitable[None]:
            return self._copy_zeroes(offset, length)

        await self._in_turn(offset, length, start, copy)
        time_ns = self._tap.clock.time_ns
        await (self._flush_and_acknowledge(time_ns) if fua else self._acknowledge(time_ns))

    async def _in_turn(
        self,
        offset: int,
        length: int,
        start: Callable[[], Awaitable[None] | None],
        copy: Callable[[], Awaitable[None]],
    ) -> None:
        """Set the bits, `start` the disk's work, `copy` what it left; one at a time for each block."""
        under_way = await self._take_off(offset, length)
        landed = True
        try:
            try:
                done = start()
                if done is not None:
                    await done
            except OSError:
                await self._copy(offset, length, None)
                raise
            await copy()
        except asyncio.CancelledError:
            # The disk may still be at work: for the tap this flight never lands, and its bits stay set.
            landed = False
            self._tap.drop("a guest's write was broken off")
            raise
        finally:
            if landed:
                self._tap.end(under_way.flight)
            self._under_way.remove(under_way)
            under_way.landed.set_result(None)

    async def _take_off(self, offset: int, length: int) -> _UnderWay:
        """Wait for writes that share a block, then set the bits."""
        first, stop = offset >> BLOCK_SHIFT, (offset + length + _BLOCK_MASK) >> BLOCK_SHIFT
        while waiting := [other.landed for other in self._under_way if other.flight.overlaps(first, stop)]:
            await asyncio.wait(waiting)
        under_way = _UnderWay(
            self._tap.begin(self._entry, first, stop - first), asyncio.get_running_loop().create_future()
        )
        self._under_way.append(under_way)
        return under_way

    async def _copy(self, offset: int, length: int, data: memoryview | None) -> None:
        """Queue the blocks that a write touched, completed from the disk; all of them from it without `data`."""
        start, stop = offset & ~_BLOCK_MASK, (offset + length + _BLOCK_MASK) & ~_BLOCK_MASK
        end = offset + length
        try:
            if data is None:
                copy = await self._read(start, stop)
            elif start == offset and stop == end:
                copy = data
            else:
                copy = memoryview(b"".join((await self._read(start, offset), data, await self._read(end, stop))))
        except OSError as error:
            self._tap.drop(f"blocks written by a guest cannot be read: {error}")
            return
        self._tap.stamp()
        self._tap.wrote(self._entry, start >> BLOCK_SHIFT, copy)

    async def _copy_zeroes(self, offset: int, length: int) -> None:
        """Queue zeroes: whole blocks as ZERO, what is partly covered as blocks read from the disk."""
        start, stop = offset & ~_BLOCK_MASK, (offset + length + _BLOCK_MASK) & ~_BLOCK_MASK
        end = offset + length
        inner = (offset + _BLOCK_MASK) & ~_BLOCK_MASK
        outer = stop if end == self.size_bytes else end & ~_BLOCK_MASK
        try:
            if inner > outer:
                head, tail = await self._read(start, stop), memoryview(b"")
            else:
                head, tail = await self._read(start, inner), await self._read(outer, stop)
        except OSError as error:
            self._tap.drop(f"blocks written by a guest cannot be read: {error}")
            return
        self._tap.stamp()
        if head:
            self._tap.wrote(self._entry, start >> BLOCK_SHIFT, head)
        if inner < outer:
            self._tap.zeroed(self._entry, inner >> BLOCK_SHIFT, (outer - inner) >> BLOCK_SHIFT)
        if tail:
            self._tap.wrote(self._entry, outer >> BLOCK_SHIFT, tail)

    async def _read(self, start: int, stop: int) -> memoryview:
        """Return the bytes from `start` to `stop`; those beyond the end of the disk are zeroes."""
        return await read_padded(self._disk, start, stop)


async def read_padded(disk: Disk, start: int, stop: int) -> memoryview:
    """Return the disk's bytes from `start` to `stop`; those beyond its end are zeroes."""
    inside = min(stop, disk.size_bytes) - start
    if inside <= 0:
        return memoryview(bytes(stop - start))
    answer = disk.pread(start, inside)
    parts = answer if isinstance(answer, Sequence) else await answer
    if len(parts) == 1 and inside == stop - start:
        return memoryview(parts[0])
    return memoryview(b"".join((*parts, bytes(stop - start - inside))))
