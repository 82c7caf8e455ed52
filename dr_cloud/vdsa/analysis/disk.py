"""One disk as the analyzer sees it: its few kept blocks and their meaning, its ground, where it is written most."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from dr_cloud.model.analysis import DiskAnalysis, SeenRange
from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE, blocks_of
from dr_cloud.model.journal import Disk
from dr_cloud.vdsa.analysis.ground import Ground
from dr_cloud.vdsa.analysis.kept import Kept
from dr_cloud.vdsa.analysis.layout import Layout, read_layout
from dr_cloud.vdsa.analysis.systems import FILE_BYTES, SystemSeen

_RANGES_MAX: Final = 1024
_HOT_MAX: Final = 8
_HOT_SHARE_MIN: Final = 0.02
_PARSES_MAX: Final = 4
"""Within one write: table, superblock, label. What is deeper comes with the next write."""
_SMALL_BLOCKS: Final = 64
_FILE_HEADS: Final = frozenset({b"PRET", b"NAME", b"regf", b"hbin"})
FIRST_BYTES: Final = frozenset({head[0] for head in _FILE_HEADS} | {ord("M")})
"""What the first block of a file worth a look begins with."""
_HEADS: Final = np.sort(np.array([int.from_bytes(h, "little") for h in (*_FILE_HEADS, b"XFSB", b"LUKS")], np.uint32))
_DOS: Final = int.from_bytes(b"MZ", "little")
_BTRFS: Final = int.from_bytes(b"_BHRfS_M", "little")
_LVM: Final = int.from_bytes(b"LABELONE", "little")
_SWAP: Final = int.from_bytes(b"SWAPSPAC", "little")


class SeenDisk:
    """See the module's docstring. Its memory: at most 1 MiB of blocks, 128 KiB of ground, 8 KiB of ranges."""

    def __init__(self, disk: Disk, system: SystemSeen) -> None:
        self.disk = disk
        self.kept = Kept(disk.size_bytes)
        self.layout = Layout()
        self.ground = Ground(blocks_of(disk.size_bytes))
        self.bytes_written = 0
        self.last_write_ns: int | None = None
        self.stale = False
        """Whether a kept block changed since the layout was read."""
        self._system = system
        self._range_shift = max(0, (blocks_of(disk.size_bytes) // _RANGES_MAX).bit_length())
        self._ranges = array("d", bytes(8 * ((blocks_of(disk.size_bytes) >> self._range_shift) + 1)))

    def wrote(self, first: int, count: int, data: memoryview, may_parse: Callable[[], bool]) -> None:
        """`count` blocks were written from `first` on; `may_parse` says whether the layout may be read at once."""
        if count > _SMALL_BLOCKS:
            self._look(first, count, data)
        else:
            # Small writes are many: numpy costs more than a few slices, and candidates are not looked for.
            for at in range(0, len(data), BLOCK_SIZE):
                if data[at] in FIRST_BYTES:
                    self._file(data, at)
        for _ in range(_PARSES_MAX):
            wanted = self.kept.wanted(first, count)
            if not wanted or not self._keep(wanted, first, data):
                break
            self.stale = True
            if not may_parse():
                break
            self.read()

    def note(self, block: int, stride: int) -> None:
        """A sampled block stands for `stride` blocks that were written thereabouts."""
        self._ranges[block >> self._range_shift] += stride

    def _file(self, data: memoryview, at: int) -> None:
        head = bytes(data[at : at + 4])
        if head in _FILE_HEADS or head[:2] == b"MZ":
            self._system.file(bytes(data[at : at + FILE_BYTES]))

    def _keep(self, wanted: list[int], first: int, data: memoryview) -> bool:
        changed = False
        for block in wanted:
            at = (block - first) << BLOCK_SHIFT
            changed |= self.kept.put(block, bytes(data[at : at + BLOCK_SIZE]))
        return changed

    def zeroed(self, first: int, count: int, may_parse: Callable[[], bool]) -> None:
        """`count` blocks from `first` on are zeroes now."""
        self.ground.emptied(first, count)
        if self.kept.zero(first, count):
            self.stale = True
            if may_parse():
                self.read()

    def read(self) -> None:
        """Read the layout anew."""
        self.layout = read_layout(self.kept)
        self.stale = False

    def _look(self, first: int, count: int, data: memoryview) -> None:
        """Find blocks that look like a superblock, and beginnings of files that tell the system."""
        rows = np.frombuffer(data, np.uint8).reshape(count, BLOCK_SIZE)
        heads = rows[:, :4].view("<u4")[:, 0]
        places = np.minimum(np.searchsorted(_HEADS, heads), len(_HEADS) - 1)
        found = _HEADS[places] == heads
        found |= (heads & 0xFFFF) == _DOS
        found |= rows[:, 510:512].view("<u2")[:, 0] == 0xAA55
        found |= rows[:, 1080:1082].view("<u2")[:, 0] == 0xEF53
        for place, mark in ((64, _BTRFS), (512, _LVM), (4086, _SWAP)):
            found |= rows[:, place : place + 8].view("<u8")[:, 0] == mark
        for row in np.flatnonzero(found).tolist():
            at = row << BLOCK_SHIFT
            if data[at] in FIRST_BYTES:
                self._file(data, at)
            if data[at] != ord("M"):
                self.kept.put_candidate(first + row, bytes(data[at : at + BLOCK_SIZE]))

    def cool(self) -> None:
        """An hour has passed: what was written before counts half."""
        self._ranges = array("d", [count / 2 for count in self._ranges])

    def report(self) -> DiskAnalysis:
        """Return what is known of it."""
        if self.stale:
            self.read()
        table = self.layout.table
        return DiskAnalysis(
            index=self.disk.index,
            name=self.disk.name,
            size_bytes=self.disk.size_bytes,
            table=table.kind,
            table_uuid=table.uuid,
            partitions=table.partitions,
            file_system=self.layout.file_system,
            boot_loader=self.layout.boot_loader,
            hot=self._hot(),
            bytes_written=self.bytes_written,
            last_write_ns=self.last_write_ns,
        )

    def _hot(self) -> list[SeenRange]:
        total = sum(self._ranges)
        busiest = sorted(range(len(self._ranges)), key=self._ranges.__getitem__, reverse=True)[:_HOT_MAX]
        size = 1 << (self._range_shift + BLOCK_SHIFT)
        return [
            SeenRange(
                start_bytes=place * size,
                size_bytes=min(size, self.disk.size_bytes - place * size),
                share=round(self._ranges[place] / total, 4),
            )
            for place in busiest
            if total and self._ranges[place] / total >= _HOT_SHARE_MIN and place * size < self.disk.size_bytes
        ]

    def state(self) -> dict[str, Any]:
        """Return what was learnt, fit for JSON."""
        return {
            "kept": self.kept.state(),
            "ground": self.ground.state(),
            "ranges": [round(count, 1) for count in self._ranges],
            "bytes_written": self.bytes_written,
            "last_write_ns": self.last_write_ns,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned. Raises `ValueError` if it is of another disk."""
        if len(state["ranges"]) != len(self._ranges):
            raise ValueError("ranges of another disk")
        self.ground.restore(state["ground"])
        self.kept.restore(state["kept"])
        self._ranges = array("d", state["ranges"])
        self.bytes_written, self.last_write_ns = int(state["bytes_written"]), state["last_write_ns"]
        self.read()
