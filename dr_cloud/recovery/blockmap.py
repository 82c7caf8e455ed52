r"""Which blocks of a recovered disk are its own, and which are still those of the image that it began with.

Layout (little-endian; every part begins at a multiple of 4096)::

    head
        0    8   magic "DRCMAP\r\n"
        8    4   version (1)
       12    4   1 if every block is its own, for good
       16    8   size of the disk in bytes
       24   16   boot id of the host that has it open
        …    4   crc32c of the 40 bytes above
    LIVE      one bit per 4 KiB block, bit b of byte i is block 8 i + b
    FLUSHED   the same, as it was at the last flush

    Version 1: first release.

Order: a block's bytes are written to the disk's file, then its bit is set in LIVE. A flush makes the file durable, and
then sets in FLUSHED what was set in LIVE before it began.

Crash points
    process killed    the page cache keeps file and LIVE as they were
    host lost         LIVE may have reached the disk ahead of the bytes, so it is taken anew from FLUSHED: what was
                      written after the last flush is lost, as on any disk, and reads as the image again
    in between both   the new boot id is written last; what was begun is begun again
    while it is made  it is written beside, flushed, then renamed: it is there whole, or not at all
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np

from dr_cloud.model.blocks import blocks_of
from dr_cloud.model.errors import DamagedError
from dr_cloud.tap.bitmap import boot_id

_PAGE: Final = 4096
_HEAD: Final = struct.Struct("<8sIIQ16s")
_CHECKED: Final = struct.Struct("<I")
_MAGIC: Final = b"DRCMAP\r\n"
_VERSION: Final = 1
_FULL: Final = 0xFF


class BlockMap:
    """See the module's docstring. Not thread-safe, but for `settle`."""

    def __init__(self, path: Path, size_bytes: int, boot: bytes | None = None) -> None:
        """Open the map of a disk, or make one in which no block is the disk's own.

        Args:
            path: Its file.
            size_bytes: Of the disk.
            boot: Id of this run of the host.

        Raises:
            DamagedError: The file is no map of such a disk.
            OSError: It cannot be read or written.
        """
        self.path = path
        self.count = blocks_of(size_bytes)
        self._size_bytes = size_bytes
        self._boot = boot if boot is not None else boot_id()
        self._plane_bytes = -(-self.count // (8 * _PAGE)) * _PAGE
        if not path.exists():
            self._make()
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(self._fd).st_size != _PAGE + 2 * self._plane_bytes:
                raise DamagedError(f"{path} is no map of a disk of {size_bytes} bytes", "Recover the server anew.")
            self._memory = mmap.mmap(self._fd, 0)
            view = memoryview(self._memory)
            self._live = view[_PAGE : _PAGE + self._plane_bytes]
            self._flushed = view[_PAGE + self._plane_bytes :]
            self.complete, boot_before = self._read_head()
        except BaseException:
            os.close(self._fd)
            raise
        self._touched: set[int] = set()
        if boot_before != self._boot:
            self._live[:] = self._flushed
            self._memory.flush()
            self._write_head()

    def _make(self) -> None:
        beside = self.path.with_name(self.path.name + ".new")
        with beside.open("wb") as file:
            file.write(self._head(False))
            file.truncate(_PAGE + 2 * self._plane_bytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _head(self, complete: bool) -> bytes:
        head = _HEAD.pack(_MAGIC, _VERSION, complete, self._size_bytes, self._boot)
        return (head + _CHECKED.pack(google_crc32c.value(head))).ljust(_PAGE, b"\0")

    def _write_head(self) -> None:
        self._memory[:_PAGE] = self._head(self.complete)
        self._memory.flush(0, _PAGE)

    def _read_head(self) -> tuple[bool, bytes]:
        head = self._memory[: _HEAD.size]
        magic, version, complete, size_bytes, boot = _HEAD.unpack(head)
        (checked,) = _CHECKED.unpack(self._memory[_HEAD.size : _HEAD.size + _CHECKED.size])
        if (magic, version, size_bytes) != (_MAGIC, _VERSION, self._size_bytes) or checked != google_crc32c.value(head):
            raise DamagedError(f"{self.path} is damaged", "Recover the server anew, to the same time.")
        return bool(complete), boot

    def has(self, block: int) -> bool:
        """Is the block the disk's own?"""
        return self.complete or bool(self._live[block >> 3] >> (block & 7) & 1)

    def has_all(self, first: int, count: int) -> bool:
        """Are all of `count` blocks?"""
        return self.complete or all(own for _, own in self.runs(first, count))

    def runs(self, first: int, count: int) -> Iterator[tuple[int, bool]]:
        """Yield (how many blocks, whether they are the disk's own) of each run from block `first` on."""
        if self.complete:
            yield count, True
            return
        start = first >> 3
        bits = np.unpackbits(
            np.frombuffer(self._live, np.uint8, ((first + count + 7) >> 3) - start, start), bitorder="little"
        )[first & 7 : (first & 7) + count]
        ends = [*(np.flatnonzero(np.diff(bits)) + 1).tolist(), count]
        at = 0
        for end in ends:
            yield end - at, bool(bits[at])
            at = end

    def set(self, first: int, count: int) -> None:
        """Note that blocks are the disk's own: their bytes have been written."""
        if self.complete:
            return
        live = self._live
        start, stop = first >> 3, (first + count - 1) >> 3
        head, tail = _FULL << (first & 7) & _FULL, _FULL >> (7 - ((first + count - 1) & 7))
        if start == stop:
            live[start] |= head & tail
        else:
            live[start] |= head
            live[start + 1 : stop] = b"\xff" * (stop - start - 1)
            live[stop] |= tail
        self._touched.update(range(start // _PAGE, stop // _PAGE + 1))

    def next_missing(self, first: int) -> int | None:
        """Return the first block from `first` on that is not the disk's own; None if there is none."""
        if self.complete:
            return None
        start = first >> 3
        while start < self._plane_bytes and start << 3 < self.count:
            stop = min(start // _PAGE * _PAGE + _PAGE, self._plane_bytes)
            part = np.frombuffer(self._live, np.uint8, stop - start, start)
            for place in np.flatnonzero(part != _FULL).tolist():
                byte = start + place
                for block in range(max(first, byte << 3), min((byte + 1) << 3, self.count)):
                    if not self.has(block):
                        return block
            start = stop
        return None

    def missing(self) -> int:
        """Return how many blocks are not the disk's own."""
        if self.complete:
            return 0
        return self.count - int(np.bitwise_count(np.frombuffer(self._live, np.uint8)).sum())

    def begin_flush(self) -> dict[int, bytes]:
        """Return what a flush that begins now may settle: pages of LIVE, by number."""
        touched, self._touched = self._touched, set()
        return {page: bytes(self._live[page * _PAGE : (page + 1) * _PAGE]) for page in touched}

    def settle(self, pages: dict[int, bytes]) -> None:
        """The disk's file is durable: make durable that what `begin_flush` told is. May be called in a thread."""
        for page, content in pages.items():
            place = slice(page * _PAGE, (page + 1) * _PAGE)
            # A flush that began later may have been here before.
            before = np.frombuffer(self._flushed, np.uint8)[place]
            self._flushed[place] = (before | np.frombuffer(content, np.uint8)).tobytes()
        if pages:
            self._memory.flush()

    def give_back(self, pages: dict[int, bytes]) -> None:
        """The file could not be made durable: the next flush begins with these pages as well."""
        self._touched |= pages.keys()

    def finish(self) -> None:
        """Every block is the disk's own, and durable: from now on, nothing is asked of the bits."""
        self.complete = True
        self._write_head()

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._live.release()
            self._flushed.release()
