"""One disk of a stack as an NBD export: the image at one time, with the test's own writes over it.

The read path is one look-up: the table of a region gives a block's loc, and the loc says where its bytes are::

    0                          zeroes
    object << 32 | index       the object cache
    1 << 63 | slot             the write log
    3 << 62 | slot             zeroes again (trimmed); the slot stays the block's, for when it is written next

A warm read is a slice of a mapping, sent without a copy; adjacent locs become one slice. What is not there is fetched
in threads while the loop serves others, and the request is then tried anew. The same holds for a write that needs the
rest of a partial block, or a region of the map. A request that needs no fetch is done at once, in one step.

A region of the map is shared until this stack writes in it, and then copied (2 MiB for 1 GiB of disk).

Errors: a damaged object, or a store that does not answer, is EIO for the blocks that need it and a log line that names
the object; later requests try again. A full disk or a spent quota is ENOSPC for that write.

A paused stack gives EPERM for every request. Pause and end take the tables away, so that quick paths ask nothing more.

`flush` has nothing to do: a write is seen by every connection when it is answered, and none of it outlives the test.
`write_zeroes` leaves holes whether it may or not: to fill a throw-away log with zeroes would help nobody.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Final, NoReturn, TypeVar

import numpy as np
import structlog

from dr_cloud.model.blocks import (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    INDEX_MASK,
    LOCAL_BIT,
    REGION_BLOCKS,
    REGION_MASK,
    REGION_SHIFT,
)
from dr_cloud.model.errors import DamagedError, DrCloudError
from dr_cloud.model.journal import Disk
from dr_cloud.model.units import format_time
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.stack.cache import CachedObject, Group, Locs, ObjectCache
from dr_cloud.stack.image import HOLES, Image, region_count
from dr_cloud.stack.runs import adjacent_runs, by_region, table_runs
from dr_cloud.stack.writelog import WriteLog

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

_ZERO_BIT: Final = 1 << 62
_LOCAL_ZERO: Final = LOCAL_BIT | _ZERO_BIT
_SLOT_MASK: Final = _ZERO_BIT - 1
_NP_LOCAL: Final = np.uint64(LOCAL_BIT)
_NP_ZERO: Final = np.uint64(_ZERO_BIT)
_NP_LOCAL_ZERO: Final = np.uint64(_LOCAL_ZERO)
_OFFSET_MASK: Final = BLOCK_SIZE - 1
_ZEROES: Final = memoryview(bytes(1 << 20))
_ZERO_BLOCKS: Final = len(_ZEROES) >> BLOCK_SHIFT
_ZERO_BLOCK: Final = (_ZEROES[:BLOCK_SIZE],)
EXTENTS_MAX: Final = 4096
"""Of one answer about block status."""
_HOLES: Final = HOLES.data

Parts = list[memoryview]
_Tables = list[memoryview | None]


class _Brought:
    """What was brought for one request: it is held until the request is answered."""

    __slots__ = ("groups", "objects")

    def __init__(self) -> None:
        self.objects: dict[int, CachedObject] = {}
        """So that nothing it needs is let go, or evicted, in between."""
        self.groups: dict[tuple[int, int], Group] = {}
        """Groups that could not be kept in the cache: (object, group) → the blocks, or the error it gave."""


class StackExport:
    """One disk of one stack, read-write, for any number of connections. All calls come from one event loop.

    Attributes:
        blocks_read, blocks_written: Whole blocks of answered requests.
        failures: Requests that failed for what is not theirs: data is damaged or cannot be fetched; it was paused.
    """

    fast_zeroes = True

    def __init__(self, name: str, disk: Disk, image: Image, cache: ObjectCache, writes: WriteLog) -> None:
        """Serve `disk` of `image` under `name`; writes go to `writes`."""
        self.name = name
        self.description = f"{disk.name} as it was at {format_time(image.plan.at_ns)}"
        self.size_bytes = disk.size_bytes
        self.read_only = False
        self.block_size_minimum, self.block_size_preferred = 1, BLOCK_SIZE
        self.blocks_read = self.blocks_written = self.failures = 0
        self.on_served: Callable[[], None] | None = None
        """Called when the first read is about to be answered."""
        self._disk = disk
        self._image = image
        self._cache = cache
        self._objects = cache.objects
        self._writes = writes
        # Per region: its locs for reading, and the same once they are this stack's own, for writing.
        self._regions: _Tables = [None] * region_count(disk)
        self._own: _Tables = [None] * region_count(disk)
        self._loading: dict[int, Future[Locs]] = {}
        self._refusal: tuple[int, str] | None = None
        """The errno and reason that every request gets now; then no region is loaded."""
        self._paused: tuple[_Tables, _Tables] | None = None

    def close(self) -> None:
        """Let everything go; later requests give ESHUTDOWN."""
        self._refusal, self._paused = (errno.ESHUTDOWN, "the stack is closed"), None
        self._regions, self._own = [None] * len(self._regions), [None] * len(self._own)

    def pause(self, reason: str) -> None:
        """Give EPERM for every request, also for those that wait for a fetch, until `resume`."""
        if self._refusal is None:
            self._paused = self._regions, self._own
            self._regions, self._own = [None] * len(self._regions), [None] * len(self._own)
        if self._paused is not None:
            self._refusal = errno.EPERM, reason

    def resume(self) -> None:
        """Go on as before `pause`."""
        if self._paused is not None:
            (self._regions, self._own), self._paused, self._refusal = self._paused, None, None

    def _check_allowed(self) -> None:
        if self._refusal is not None:
            self.failures += 1
            raise OSError(*self._refusal)

    @property
    def own_map_bytes(self) -> int:
        """What this stack's copies of regions of the map take in memory."""
        return sum(own is not None for own in (self._paused[1] if self._paused else self._own)) * REGION_BLOCKS * 8

    # Reading

    def pread(self, offset: int, length: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """Return the bytes as slices of what is mapped, or an awaitable where something must be fetched."""
        if length == BLOCK_SIZE and not offset & _OFFSET_MASK and self.on_served is None:
            block = offset >> BLOCK_SHIFT
            region = self._regions[block >> REGION_SHIFT]
            if region is not None:
                loc = region[block & REGION_MASK]
                if loc < LOCAL_BIT:
                    if not loc:
                        self.blocks_read += 1
                        return _ZERO_BLOCK
                    cached = self._objects.get(loc >> 32)
                    if cached is not None:
                        index = loc & INDEX_MASK
                        if cached.have[index]:
                            self.blocks_read += 1
                            start = index << BLOCK_SHIFT
                            return (cached.data[start : start + BLOCK_SIZE],)
                elif loc < _LOCAL_ZERO:
                    self.blocks_read += 1
                    start = (loc & _SLOT_MASK) << BLOCK_SHIFT
                    return (self._writes.view[start : start + BLOCK_SIZE],)
        return self._read(offset, length, None) or self._read_cold(offset, length)

    def _read(self, offset: int, length: int, brought: _Brought | None) -> Parts | None:
        """Return the bytes, or None where some are not there yet."""
        if not length:
            return [_ZEROES[:0]]
        first = offset >> BLOCK_SHIFT
        end = (offset + length + _OFFSET_MASK) >> BLOCK_SHIFT
        parts: Parts = []
        for region, start, stop in by_region(first, end):
            table = self._regions[region]
            if table is None or not self._collect(table, start, stop, brought, parts):
                return None
        if offset & _OFFSET_MASK:
            parts[0] = parts[0][offset & _OFFSET_MASK :]
        if surplus := (end << BLOCK_SHIFT) - offset - length:
            parts[-1] = parts[-1][:-surplus]
        self.blocks_read += end - first
        if self.on_served is not None:
            self.on_served()
            self.on_served = None
        return parts

    def _collect(self, table: memoryview, start: int, stop: int, brought: _Brought | None, parts: Parts) -> bool:
        """Append the bytes of blocks `start` … `stop - 1` of a region; False where some are not there yet."""
        for loc, count in table_runs(table, start, stop):
            if LOCAL_BIT <= loc < _LOCAL_ZERO:
                slot = loc & _SLOT_MASK
                parts.append(self._writes.view[slot << BLOCK_SHIFT : (slot + count) << BLOCK_SHIFT])
                continue
            if not loc or loc >= _LOCAL_ZERO:
                whole, rest = divmod(count, _ZERO_BLOCKS)
                parts.extend([_ZEROES] * whole)
                if rest:
                    parts.append(_ZEROES[: rest << BLOCK_SHIFT])
                continue
            number, index = loc >> 32, loc & INDEX_MASK
            cached = self._cache.find(number)
            if cached is None and brought is not None:
                cached = brought.objects.get(number)
            if cached is None:
                return False
            if cached.has(index, count):
                parts.append(cached.data[index << BLOCK_SHIFT : (index + count) << BLOCK_SHIFT])
            elif brought is None:
                return False
            else:
                for at in range(index, index + count):
                    if cached.has(at, 1):
                        parts.append(cached.data[at << BLOCK_SHIFT : (at + 1) << BLOCK_SHIFT])
                        continue
                    group, _ = cached.groups(at, 1)
                    data = brought.groups.get((number, group))
                    if data is None:
                        return False
                    if isinstance(data, Exception):
                        raise data
                    begin = (at - cached.span(group, group)[0]) << BLOCK_SHIFT
                    parts.append(memoryview(data)[begin : begin + BLOCK_SIZE])
        return True

    async def _read_cold(self, offset: int, length: int) -> Sequence[Buffer]:
        brought = _Brought()
        try:
            while (parts := self._read(offset, length, brought)) is None:
                await self._bring(offset, length, brought)
            return parts
        except DrCloudError as error:
            self._refuse(error)

    async def _bring(self, offset: int, length: int, brought: _Brought) -> None:
        """Take one step towards having every byte of a range: regions, then objects, then groups."""
        self._check_allowed()
        pieces = list(by_region(offset >> BLOCK_SHIFT, (offset + length + _OFFSET_MASK) >> BLOCK_SHIFT))
        missing = [region for region, _, _ in pieces if self._regions[region] is None]
        if missing:
            await asyncio.gather(*(self._load(region) for region in missing))
            return
        runs = []
        for region, start, stop in pieces:
            table = self._regions[region]
            if table is not None:
                runs += [run for run in table_runs(table, start, stop) if 0 < run[0] < LOCAL_BIT]
        for number in {loc >> 32 for loc, _ in runs}:
            mapped = self._cache.find(number) or brought.objects.get(number)
            if mapped is None:
                mapped = await _result(self._cache.open(number))
            brought.objects[number] = mapped
        waiting: dict[Future[dict[int, Group]], int] = {}
        for loc, count in runs:
            cached = brought.objects[loc >> 32]
            if not cached.has(loc & INDEX_MASK, count):
                waiting.update(dict.fromkeys(self._cache.fetch(cached, loc & INDEX_MASK, count), cached.number))
        for future, number in waiting.items():
            for group, data in (await _result(future)).items():
                brought.groups[number, group] = data

    async def _load(self, region: int) -> None:
        """Bring one region of the map."""
        coming = self._loading.get(region)
        if coming is None:
            if self._image.is_hole(self._disk.index, region):
                if self._refusal is None:
                    self._regions[region] = _HOLES
                return
            coming = self._cache.pool.submit(self._image.region, self._disk.index, region)
            self._loading[region] = coming
            coming.add_done_callback(lambda _: self._loading.pop(region, None))
        locs = await _result(coming)
        if self._regions[region] is None and self._refusal is None:
            self._regions[region] = locs.data
            if locs.flags.writeable:
                self._own[region] = locs.data

    def _refuse(self, error: DrCloudError) -> NoReturn:
        event = "stack.damaged" if isinstance(error, DamagedError) else "stack.unavailable"
        self.failures += 1
        log.error(event, export=self.name, disk=self._disk.name, error=str(error))
        raise OSError(errno.EIO, str(error)) from error

    # Writing

    def pwrite(self, offset: int, data: memoryview, fua: bool = False) -> Awaitable[None] | None:
        """Write to the log; an awaitable where a region, or the rest of a partial block, must be fetched first."""
        if len(data) == BLOCK_SIZE and not offset & _OFFSET_MASK:
            block = offset >> BLOCK_SHIFT
            own = self._own[block >> REGION_SHIFT]
            if own is not None:
                writes = self._writes
                loc = own[block & REGION_MASK]
                if LOCAL_BIT <= loc < _LOCAL_ZERO:
                    slot = loc & _SLOT_MASK
                else:
                    slot = loc & _SLOT_MASK if loc >= _LOCAL_ZERO else writes.take(1)
                    own[block & REGION_MASK] = LOCAL_BIT | slot
                start = slot << BLOCK_SHIFT
                writes.view[start : start + BLOCK_SIZE] = data
                self.blocks_written += 1
                return None
        return self._write(offset, len(data), data)

    def flush(self) -> None:
        """Nothing to do, unless it is refused."""
        self._check_allowed()

    def trim(self, offset: int, length: int, fua: bool = False) -> Awaitable[None] | None:
        """Make it read as zeroes."""
        return self._write(offset, length, None)

    def write_zeroes(
        self, offset: int, length: int, fua: bool = False, may_trim: bool = True
    ) -> Awaitable[None] | None:
        """Make it read as zeroes, without storing them."""
        return self._write(offset, length, None)

    def _write(self, offset: int, length: int, data: memoryview | None) -> Awaitable[None] | None:
        """Write `data`, or zeroes where it is None."""
        if self._write_now(offset, length, data, None):
            return None
        return self._write_cold(offset, length, data)

    async def _write_cold(self, offset: int, length: int, data: memoryview | None) -> None:
        brought = _Brought()
        try:
            while not self._write_now(offset, length, data, brought):
                end = offset + length
                # Of whole blocks only the map is needed, of a partial one the bytes too.
                for region, _, _ in by_region(offset >> BLOCK_SHIFT, (end + _OFFSET_MASK) >> BLOCK_SHIFT):
                    if self._regions[region] is None:
                        self._check_allowed()
                        await self._load(region)
                for edge in {at >> BLOCK_SHIFT for at in (offset, end) if at & _OFFSET_MASK}:
                    if self._read_block(edge, brought) is None:
                        await self._bring(edge << BLOCK_SHIFT, BLOCK_SIZE, brought)
        except DrCloudError as error:
            self._refuse(error)

    def _write_now(self, offset: int, length: int, data: memoryview | None, brought: _Brought | None) -> bool:
        """Write all of it in one step, or nothing and return False where something must be fetched first."""
        self._check_allowed()
        if not length:
            return True
        end = offset + length
        first, last = offset >> BLOCK_SHIFT, (end - 1) >> BLOCK_SHIFT
        own = self._own[first >> REGION_SHIFT]
        if first == last and data is not None and own is not None:
            loc = own[first & REGION_MASK]
            if LOCAL_BIT <= loc < _LOCAL_ZERO:
                begin = ((loc & _SLOT_MASK) << BLOCK_SHIFT) + (offset & _OFFSET_MASK)
                self._writes.view[begin : begin + length] = data
                self.blocks_written += 1
                return True
        whole_first = (offset + _OFFSET_MASK) >> BLOCK_SHIFT
        whole_end = max(end >> BLOCK_SHIFT, whole_first)
        pieces = list(by_region(whole_first, whole_end)) if whole_end > whole_first else []
        edges = {block for block in (first, last) if not whole_first <= block < whole_end}
        for region, start, stop in pieces:
            if self._regions[region] is None and not (data is None and stop - start == REGION_BLOCKS):
                return False
        completed: list[tuple[int, bytearray]] = []
        for block in edges:
            base = self._read_block(block, brought)
            if base is None:
                return False
            begin = max(offset, block << BLOCK_SHIFT)
            stop_byte = min(end, (block + 1) << BLOCK_SHIFT)
            new = bytearray(base)
            new[begin & _OFFSET_MASK : (begin & _OFFSET_MASK) + stop_byte - begin] = (
                _ZEROES[: stop_byte - begin] if data is None else data[begin - offset : stop_byte - offset]
            )
            completed.append((block, new))
        for block, new in completed:
            self._store(block >> REGION_SHIFT, block & REGION_MASK, (block & REGION_MASK) + 1, memoryview(new))
        at = (whole_first << BLOCK_SHIFT) - offset
        for region, start, stop in pieces:
            if data is None:
                self._clear(region, start, stop)
            else:
                size = (stop - start) << BLOCK_SHIFT
                self._store(region, start, stop, data[at : at + size])
                at += size
        self.blocks_written += last - first + 1
        return True

    def _read_block(self, block: int, brought: _Brought | None) -> memoryview | None:
        table = self._regions[block >> REGION_SHIFT]
        parts: Parts = []
        index = block & REGION_MASK
        if table is None or not self._collect(table, index, index + 1, brought, parts):
            return None
        return parts[0]

    def _writable(self, region: int) -> Locs:
        """Return a loaded region's locs as this stack's own."""
        own = self._own[region]
        if own is None:
            table = self._regions[region]
            assert table is not None, "a region is loaded before it is written"
            own = self._own[region] = self._regions[region] = np.array(table, np.uint64).data
        return np.asarray(own)

    def _store(self, region: int, start: int, stop: int, data: memoryview) -> None:
        """Put whole blocks of a loaded region into the log."""
        locs = self._writable(region)[start:stop]
        fresh = locs < _NP_LOCAL
        count = int(np.count_nonzero(fresh))
        if count:
            slot = self._writes.take(count)
            locs[fresh] = np.arange(LOCAL_BIT | slot, LOCAL_BIT | slot + count, dtype=np.uint64)
        locs &= ~_NP_ZERO
        at = 0
        for loc, length in adjacent_runs(locs):
            begin = (loc & _SLOT_MASK) << BLOCK_SHIFT
            size = length << BLOCK_SHIFT
            self._writes.view[begin : begin + size] = data[at : at + size]
            at += size

    def _clear(self, region: int, start: int, stop: int) -> None:
        """Make whole blocks read as zeroes."""
        if self._own[region] is None:
            table = self._regions[region]
            if stop - start == REGION_BLOCKS:
                self._regions[region] = _HOLES
                return
            if table is not None and not np.asarray(table)[start:stop].any():
                return
        locs = self._writable(region)[start:stop]
        local = locs >= _NP_LOCAL
        locs[local] |= _NP_ZERO
        locs[~local] = 0

    # Block status

    def block_status(self, offset: int, length: int) -> Sequence[Extent] | Awaitable[Sequence[Extent]]:
        """Return runs of data and of holes (loc 0, and what the test trimmed)."""
        return self._status(offset, length) or self._status_cold(offset, length)

    async def _status_cold(self, offset: int, length: int) -> Sequence[Extent]:
        try:
            while not (extents := self._status(offset, length)):
                self._check_allowed()
                await self._load(offset >> BLOCK_SHIFT >> REGION_SHIFT)
            return extents
        except DrCloudError as error:
            self._refuse(error)

    def _status(self, offset: int, length: int) -> list[Extent]:
        """Return extents as far as regions are loaded: none if not even the first is."""
        end = offset + length
        runs: list[tuple[int, bool]] = []
        """(where it ends, in bytes; is it a hole)"""
        for region, start, stop in by_region(offset >> BLOCK_SHIFT, (end + _OFFSET_MASK) >> BLOCK_SHIFT):
            table = self._regions[region]
            if table is None and self._refusal is None and self._image.is_hole(self._disk.index, region):
                table = self._regions[region] = _HOLES
            if table is None or len(runs) >= EXTENTS_MAX:
                break
            base = region << REGION_SHIFT
            if table is _HOLES:
                ends, holes = [stop], [True]
            else:
                locs = np.asarray(table)[start:stop]
                hole = (locs == 0) | (locs >= _NP_LOCAL_ZERO)
                cuts = np.flatnonzero(hole[1:] != hole[:-1])[: EXTENTS_MAX - len(runs)]
                ends = [*(cuts + (start + 1)).tolist(), stop]
                holes = hole[[0, *(cuts + 1).tolist()]].tolist()
                if len(cuts) == EXTENTS_MAX - len(runs):
                    ends.pop()
                    holes.pop()
            for run_end, run_hole in zip(ends, holes, strict=True):
                run = ((base + run_end) << BLOCK_SHIFT, run_hole)
                if runs and runs[-1][1] == run_hole:
                    runs[-1] = run
                else:
                    runs.append(run)
            if len(runs) >= EXTENTS_MAX:
                break
        extents = []
        for run_end, run_hole in runs:
            run_end = min(run_end, end)
            extents.append(Extent(run_end - offset, run_hole))
            offset = run_end
        return extents


async def _result(future: Future[_T]) -> _T:
    """Wait for a job that others may wait for too: a request that is given up does not cancel it."""
    return await asyncio.shield(asyncio.wrap_future(future))
