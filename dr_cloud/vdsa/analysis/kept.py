"""The few blocks of a disk that tell its layout, and reading in them. The analyzer's whole memory of a disk's content.

A parser reads through `Kept.read`, which notes every block that was asked for. What the last parse asked for is
`wanted` from then on: as soon as one of these blocks is written, it is kept. So a partition table leads to superblocks,
and a superblock to the block that holds its label, without reading the disk. Blocks that look like a superblock are
kept for a while although no one asked yet: the table that points to them may be written later.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from bisect import bisect_left
from collections import OrderedDict
from typing import Final

from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE

BLOCKS_MAX: Final = 256
"""At most this many blocks of one disk: 1 MiB."""
_CANDIDATES_MAX: Final = 64
_ZERO: Final = bytes(BLOCK_SIZE)


class Kept:
    """Blocks of one disk, bounded by `BLOCKS_MAX`."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._blocks: dict[int, bytes] = {}
        self._candidates: OrderedDict[int, bytes] = OrderedDict()
        self._asked: set[int] = set()
        self._wanted: list[int] = [0]
        self.wanted_blocks = frozenset(self._wanted)

    def __len__(self) -> int:
        return len(self._blocks) + len(self._candidates)

    def wanted(self, first: int, count: int) -> list[int]:
        """Return the wanted blocks among `count` blocks from `first` on."""
        wanted = self._wanted
        at = bisect_left(wanted, first)
        if at == len(wanted) or wanted[at] >= first + count:
            return []
        return wanted[at : bisect_left(wanted, first + count, at)]

    def put(self, block: int, data: bytes) -> bool:
        """Keep a wanted block. Returns whether it is another than before."""
        if data == _ZERO:
            data = _ZERO
        if self._blocks.get(block) == data:
            return False
        self._blocks[block] = data
        return True

    def put_candidate(self, block: int, data: bytes) -> None:
        """Keep a block that looks as if it might be asked for later."""
        self._candidates[block] = data
        self._candidates.move_to_end(block)
        if len(self._candidates) > _CANDIDATES_MAX:
            self._candidates.popitem(last=False)

    def zero(self, first: int, count: int) -> bool:
        """`count` blocks from `first` on were zeroed. Returns whether a kept one is another than before."""
        for block in [block for block in self._candidates if first <= block < first + count]:
            del self._candidates[block]
        # No short circuit: each one is to be put.
        return any([self.put(block, _ZERO) for block in self.wanted(first, count)])

    def begin(self) -> None:
        """Begin a parse."""
        self._asked = {0}

    def end(self) -> None:
        """End a parse: keep what it asked for, and nothing else."""
        self._wanted = sorted(self._asked)
        self.wanted_blocks = frozenset(self._wanted)
        self._blocks = {block: self._blocks[block] for block in self._wanted if block in self._blocks}

    def read(self, offset: int, size: int) -> bytes | None:
        """Return `size` bytes at `offset` of the disk; None where they were not seen or lie outside."""
        if offset < 0 or size <= 0 or offset + size > self.size_bytes:
            return None
        parts: list[bytes] = []
        for block in range(offset >> BLOCK_SHIFT, ((offset + size - 1) >> BLOCK_SHIFT) + 1):
            if block not in self._asked:
                if len(self._asked) + _CANDIDATES_MAX >= BLOCKS_MAX:
                    return None
                self._asked.add(block)
            data = self._blocks.get(block)
            if data is None:
                data = self._candidates.pop(block, None)
                if data is not None:
                    self._blocks[block] = data
            parts.append(data if data is not None else b"")
        if not all(parts):
            return None
        start = offset & (BLOCK_SIZE - 1)
        return b"".join(parts)[start : start + size]

    def state(self) -> dict[str, str]:
        """Return the kept blocks, fit for JSON."""
        return {str(block): b64encode(data).decode() for block, data in self._blocks.items()}

    def restore(self, state: dict[str, str]) -> None:
        """Take up what `state` returned. Raises `ValueError` if it cannot have."""
        blocks = {int(block): b64decode(data) for block, data in state.items()}
        if len(blocks) > BLOCKS_MAX or any(len(data) != BLOCK_SIZE for data in blocks.values()):
            raise ValueError("kept blocks of another size")
        self._blocks = blocks
