"""A disk of a recovered server: it begins as the image at one time and becomes a disk of its own.

Purpose
    A failover must serve within seconds, and what is written to it must last. So the disk is a sparse file over an
    image: a block that the file does not hold yet is read from the image; what is written goes to the file. When the
    failover is to stay, every other block is brought over as well (`bring_over`), and the image is no longer needed.

Layout
    `<name>.raw` the file, `<name>.map` which of its blocks count (`dr_cloud.recovery.blockmap`). It is a `Disk` for a
    tap: from the first write on, the tap knows what differs, for replication back.

Consistency
    A block changes from the image's to the file's once, in one step of the event loop: its bytes are written and its
    bit is set with nothing in between. What a write of a part of a block needs of the rest is read before, and put
    in place only if nobody else has done so meanwhile. The same holds for what is brought over.

Retries
    What cannot be read from the image is EIO for that request. Bringing over waits and tries again; `problem` says why.

Crash recovery
    That of the map: nothing that was flushed is lost, and an image block is never taken for a written one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol, TypeVar

import structlog

from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.recovery.blockmap import BlockMap
from dr_cloud.tap.disk import FileDisk

_CHUNK_BLOCKS: Final = 256
"""How much is brought over at once."""
_PART_BLOCKS: Final = 1 << 14
"""How much is brought over between two flushes: 64 MiB."""
_LOOK_BYTES: Final = 1 << 30
"""The largest part of which extents are told at once."""
_AGAIN_SECONDS: Final = 5.0
_T = TypeVar("_T")
log = structlog.get_logger(__name__)


class Image(Protocol):
    """The disk as it was at one time: an export of a stack that nobody writes to."""

    size_bytes: int

    def pread(self, offset: int, length: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """Return buffers that together hold the bytes."""
        ...

    def block_status(self, offset: int, length: int) -> Sequence[Extent] | Awaitable[Sequence[Extent]]:
        """Return extents from `offset` on."""
        ...


class RecoveredDisk:
    """See the module's docstring. All calls come from one event loop; they are those of `dr_cloud.tap.disk.Disk`."""

    block_size_minimum = 1

    def __init__(self, path: Path, image: Image | None, size_bytes: int, boot: bytes | None = None) -> None:
        """Open the disk, or make one that is all image.

        Args:
            path: Of its file; the map lies beside.
            image: What it begins as; None once everything has been brought over.
            size_bytes: Its size.
            boot: Id of this run of the host.

        Raises:
            DamagedError: The map is damaged.
            ValueError: It needs its image, and none is given.
            OSError: The files cannot be made.
        """
        self.path = path
        self.size_bytes = size_bytes
        self._image = image
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size_bytes)
                os.fsync(file.fileno())
        self.map = BlockMap(path.with_suffix(".map"), size_bytes, boot)
        if image is None and not self.map.complete:
            self.map.close()
            raise ValueError(f"{path} still needs its image")
        self._file = FileDisk(path)
        self._clear_strays()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"recovered-{path.name}")
        self.problem = ""

    def _clear_strays(self) -> None:
        """Make holes of what the map does not say to be the file's: a write that was cut short may have left bytes."""
        block = 0
        for count, own in list(self.map.runs(0, self.map.count)):
            if not own:
                start, stop = block << BLOCK_SHIFT, min((block + count) << BLOCK_SHIFT, self.size_bytes)
                self._file.zero_blocking(start, stop - start, True)
            block += count

    # Reading.

    def pread(self, offset: int, length: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """Read each block from where it is."""
        if self._image is None or not length:
            return self._file.pread(offset, length)
        pieces = self._pieces(offset, length)
        if len(pieces) == 1:
            return (self._file if pieces[0][2] else self._image).pread(offset, length)
        return self._read_pieces(pieces)

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Return (offset, length, whether the file holds it) of the parts of a range."""
        first, end = offset >> BLOCK_SHIFT, (offset + length + BLOCK_SIZE - 1) >> BLOCK_SHIFT
        pieces, at = [], offset
        block = first
        for count, own in self.map.runs(first, end - first):
            block += count
            stop = min(block << BLOCK_SHIFT, offset + length)
            pieces.append((at, stop - at, own))
            at = stop
        return pieces

    async def _read_pieces(self, pieces: Sequence[tuple[int, int, bool]]) -> Sequence[Buffer]:
        found: list[Buffer] = []
        for offset, length, own in pieces:
            source = self._file if own or self._image is None else self._image
            found += await _told(source.pread(offset, length))
        return found

    # Writing.

    def pwrite(self, offset: int, data: memoryview) -> Awaitable[None] | None:
        """Write to the file: at once, but where the rest of a block must be read from the image first."""
        if edges := self._edges(offset, len(data)):
            return self._write_later(edges, offset, data)
        self._write(offset, data)
        return None

    def _write(self, offset: int, data: memoryview) -> None:
        self._file.pwrite(offset, data)
        first = offset >> BLOCK_SHIFT
        self.map.set(first, ((offset + len(data) - 1) >> BLOCK_SHIFT) - first + 1)

    async def _write_later(self, edges: Sequence[int], offset: int, data: memoryview) -> None:
        await self._bring(edges)
        self._write(offset, data)

    def _edges(self, offset: int, length: int) -> list[int]:
        """Return the blocks that a range covers in part and that are still the image's."""
        if self.map.complete or not length:
            return []
        first, last = offset >> BLOCK_SHIFT, (offset + length - 1) >> BLOCK_SHIFT
        edges = []
        if offset & (BLOCK_SIZE - 1) and not self.map.has(first):
            edges.append(first)
        end = offset + length
        if end & (BLOCK_SIZE - 1) and end < self.size_bytes and not self.map.has(last) and last not in edges:
            edges.append(last)
        return edges

    async def _bring(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            await self._bring_run(block, 1)

    async def _bring_run(self, first: int, count: int) -> None:
        """Have the file hold what the image has in these blocks, but for those that it holds by then."""
        assert self._image is not None
        start = first << BLOCK_SHIFT
        length = min((first + count) << BLOCK_SHIFT, self.size_bytes) - start
        data = memoryview(b"".join(await _told(self._image.pread(start, length))))
        block = first
        for run, own in list(self.map.runs(first, count)):
            if not own:
                at = (block - first) << BLOCK_SHIFT
                self._file.pwrite(block << BLOCK_SHIFT, data[at : at + (run << BLOCK_SHIFT)])
                self.map.set(block, run)
            block += run

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Let it read as zeroes."""
        await self._bring(self._edges(offset, length))
        # Where a block was the image's the file holds a hole: it reads as zeroes already, also if the host is lost now.
        first = offset >> BLOCK_SHIFT
        self.map.set(first, ((offset + length - 1) >> BLOCK_SHIFT) - first + 1)
        await self._file.zero(offset, length, may_trim)

    async def flush(self) -> None:
        """Make every write answered before this call durable, and that the blocks are the file's."""
        pages = self.map.begin_flush()
        try:
            await self._file.flush()
            await asyncio.get_running_loop().run_in_executor(self._thread, self.map.settle, pages)
        except BaseException:
            self.map.give_back(pages)
            raise

    # What there is.

    def extents(self, offset: int, length: int, count_max: int) -> Sequence[Extent] | Awaitable[Sequence[Extent]]:
        """Return holes of file and image."""
        if self._image is None:
            return self._file.extents(offset, length, count_max)
        return self._find_extents(offset, length, count_max)

    async def _find_extents(self, offset: int, length: int, count_max: int) -> Sequence[Extent]:
        found: list[Extent] = []
        for start, size, own in self._pieces(offset, min(length, _LOOK_BYTES)):
            stop = start + size
            while start < stop and len(found) < count_max:
                if own or self._image is None:
                    extents: Sequence[Extent] = self._file.extents(start, stop - start, count_max - len(found))
                else:
                    extents = await _told(self._image.block_status(start, stop - start))
                for extent in extents[: count_max - len(found)]:
                    found.append(extent)
                    start += extent.length
        return found

    async def measure(self) -> int:
        """Return its size, which does not change while it has an image."""
        return self.size_bytes

    # Becoming a disk of its own.

    async def bring_over(self) -> None:
        """Bring every block over, however long that takes; then the image is no longer needed.

        Cancelled, it goes on later where it stood.
        """
        while (block := self.map.next_missing(0)) is not None:
            try:
                while block is not None:
                    await self._bring_part(block)
                    await self.flush()
                    self.problem = ""
                    block = self.map.next_missing(block)
            except OSError as error:
                self.problem = f"{self.path.name}: {error}"
                log.warning("recovered.not_brought_over", disk=str(self.path), error=str(error))
                await asyncio.sleep(_AGAIN_SECONDS)
        if not self.map.complete:
            await self.flush()
            self.map.finish()
        self._image = None

    async def _bring_part(self, first: int) -> None:
        """Bring over what is missing of some blocks from `first` on."""
        assert self._image is not None
        stop = min((first + _PART_BLOCKS) << BLOCK_SHIFT, self.size_bytes)
        at = first << BLOCK_SHIFT
        while at < stop:
            for extent in await _told(self._image.block_status(at, stop - at)):
                block, end = at >> BLOCK_SHIFT, (at + extent.length + BLOCK_SIZE - 1) >> BLOCK_SHIFT
                at += extent.length
                if extent.hole:
                    self.map.set(block, end - block)  # the file is a hole there, too, but for what was written to it
                    continue
                for chunk in range(block, end, _CHUNK_BLOCKS):
                    count = min(_CHUNK_BLOCKS, end - chunk)
                    if not self.map.has_all(chunk, count):
                        await self._bring_run(chunk, count)
                        await asyncio.sleep(0)  # guests first

    @property
    def missing_bytes(self) -> int:
        """What has not been brought over yet, holes of the image counted too."""
        return self.map.missing() << BLOCK_SHIFT

    async def close(self) -> None:
        """Let go of the files. Nothing is under way any more."""
        self._thread.shutdown()
        await self._file.close()
        self.map.close()


async def _told(answer: Sequence[_T] | Awaitable[Sequence[_T]]) -> Sequence[_T]:
    return answer if isinstance(answer, Sequence) else await answer
