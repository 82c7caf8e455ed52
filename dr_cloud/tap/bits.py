"""The bits of one disk: three planes of one bit per 4 KiB block, and how they are set, cleared, walked and moved.

What the planes mean and how they lie in the file is told in `dr_cloud.tap.bitmap`; when they change, in
`dr_cloud.tap.tap`. Nothing here does I/O: a plane is any writable memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from dr_cloud.model.journal import Disk

TO_SEND: Final = 0
EPOCH_A: Final = 1
EPOCH_B: Final = 2
PLANES: Final = (TO_SEND, EPOCH_A, EPOCH_B)
PAGE_BYTES: Final = 4096
"""The unit in which set bits are looked for: one page of a plane stands for 128 MiB of disk."""
RUN_BLOCKS_MAX: Final = 1 << 22
"""Runs of set bits are cut near this length (16 GiB), so that finding one does not hold the event loop."""
BIT: Final = tuple(1 << bit for bit in range(8))

_PAGE_BLOCKS: Final = PAGE_BYTES * 8
_EMPTY: Final = bytes(PAGE_BYTES)
_FULL: Final = b"\xff" * PAGE_BYTES


class DiskBits:
    """The three planes of one disk. `touched` names, per plane, the 4 KiB pages of it that have a bit set."""

    def __init__(self, disk: Disk, planes: Sequence[memoryview]) -> None:
        self.disk = disk
        self.planes = tuple(planes)
        self.touched: tuple[set[int], ...] = tuple(
            {
                page
                for page in range(len(plane) // PAGE_BYTES)
                if bytes(plane[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]) != _EMPTY
            }
            for plane in self.planes
        )
        self.activate(TO_SEND)

    def activate(self, plane: int) -> None:
        """Let guest writes set their bits in `plane` from now on."""
        self.active = self.planes[plane]
        self.active_touched = self.touched[plane]

    def set(self, first: int, count: int) -> None:
        """Set the bits of `count` blocks from block `first` on in the active plane."""
        active = self.active
        start, stop = first >> 3, (first + count - 1) >> 3
        head = 0xFF << (first & 7) & 0xFF
        tail = 0xFF >> (7 - ((first + count - 1) & 7))
        if start == stop:
            active[start] |= head & tail
        else:
            active[start] |= head
            active[stop] |= tail
            if stop > start + 1:
                active[start + 1 : stop] = b"\xff" * (stop - start - 1)
        pages = range(start >> 12, (stop >> 12) + 1)
        self.active_touched.update(pages)

    def begin_move(self) -> None:
        """Begin to tell the pages in which bits are set from now on. TO_SEND is active, and only it changes."""
        self.active_touched = set()

    def carry(self, new: DiskBits) -> None:
        """Set in `new`, which was made from these bits since `begin_move`, what was set meanwhile."""
        since = self.active_touched
        old, target = (np.frombuffer(bits.planes[TO_SEND], np.uint8) for bits in (self, new))
        # A disk that shrinks has no guest meanwhile, so no page lies behind its new end.
        for page in since:
            part = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
            target[part] |= old[part]
        new.touched[TO_SEND].update(since)

    def adopt(self, new: DiskBits) -> DiskBits:
        """Become `new`; whoever holds this one goes on with it. Returns itself."""
        self.disk, self.planes, self.touched = new.disk, new.planes, new.touched
        self.activate(TO_SEND)
        return self

    def stay(self) -> None:
        """End what `begin_move` began, in the same planes."""
        self.touched[TO_SEND].update(self.active_touched)
        self.activate(TO_SEND)

    def clear_range(self, plane: int, first: int, count: int) -> None:
        """Clear the bits of `count` blocks from block `first` on in `plane`."""
        bits, touched = self.planes[plane], self.touched[plane]
        start, stop = first >> 3, (first + count - 1) >> 3
        keep_head = 0xFF >> (8 - (first & 7))
        keep_tail = 0xFF << (((first + count - 1) & 7) + 1) & 0xFF
        if start == stop:
            bits[start] &= keep_head | keep_tail
        else:
            bits[start] &= keep_head
            bits[stop] &= keep_tail
            if stop > start + 1:
                bits[start + 1 : stop] = bytes(stop - start - 1)
        for page in range(start >> 12, (stop >> 12) + 1):
            if page in touched and bytes(bits[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]) == _EMPTY:
                touched.discard(page)

    def clear(self, plane: int) -> None:
        """Clear a whole plane. Costs what was set, not what the disk's size is."""
        bits, touched = self.planes[plane], self.touched[plane]
        for page in touched:
            bits[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = _EMPTY
        touched.clear()

    def merge_epochs(self) -> None:
        """Add the bits of both epochs to TO_SEND. The epochs keep theirs."""
        target = np.frombuffer(self.planes[TO_SEND], np.uint8)
        for plane in (EPOCH_A, EPOCH_B):
            source = np.frombuffer(self.planes[plane], np.uint8)
            for page in self.touched[plane]:
                part = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
                target[part] |= source[part]
            self.touched[TO_SEND].update(self.touched[plane])

    def runs(self, plane: int) -> Iterator[tuple[int, int]]:
        """Yield (first, stop) of the runs of set bits, ascending. Bits behind the last one yielded may change."""
        bits = self.planes[plane]
        open_first = open_stop = 0
        for page in sorted(self.touched[plane]):
            base = page * _PAGE_BLOCKS
            data = bytes(bits[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
            for first, stop in _page_runs(data):
                if base + first == open_stop and open_stop - open_first < RUN_BLOCKS_MAX:
                    open_stop = base + stop
                    continue
                if open_stop > open_first:
                    yield open_first, open_stop
                open_first, open_stop = base + first, base + stop
        if open_stop > open_first:
            yield open_first, open_stop

    def test(self, block: int) -> bool:
        """Return whether the block's bit is set in any plane."""
        return any(plane[block >> 3] & BIT[block & 7] for plane in self.planes)

    def dirty_blocks(self) -> int:
        """Return how many blocks have a bit set."""
        total = 0
        for page in set().union(*self.touched):
            part = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
            pages = [np.frombuffer(plane[part], np.uint64) for plane in self.planes]
            total += int(np.bitwise_count(pages[0] | pages[1] | pages[2]).sum())
        return total


class TapDisk:
    """One disk of a tap: its bits in the bitmap of each copy."""

    __slots__ = ("bits", "index")

    def __init__(self, bits: tuple[DiskBits, ...]) -> None:
        self.bits = bits
        self.index = bits[0].disk.index

    @property
    def disk(self) -> Disk:
        """Its name and size."""
        return self.bits[0].disk

    def set(self, first: int, count: int) -> None:
        """Set the bits of `count` blocks from block `first` on, for every copy."""
        for bits in self.bits:
            bits.set(first, count)


def _page_runs(data: bytes) -> list[tuple[int, int]]:
    """Return (first, stop) of the runs of set bits of one page."""
    if data == _FULL:
        return [(0, _PAGE_BLOCKS)]
    flags = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(flags, prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
