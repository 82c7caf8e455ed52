"""The geometry that every stage shares: blocks, regions, and what a `loc` is.

A virtual disk is an array of 4096-byte blocks. A replica map holds one `loc` per block and is cut into regions of
1 GiB of disk, so that a sparse disk of any size costs only the regions that were written.

A `loc` (u64) says where the bytes of one version of one block are::

    0                       a hole: the block reads as zeroes
    object << 32 | index    block `index` of journal object `object` (object numbers start at 1)
    1 << 63 | n             never stored: inside one process, a place of its own (a frame's n-th new block while the
                            frame is under way; a stack's write log slot n)
"""

from __future__ import annotations

from typing import Final

BLOCK_SIZE: Final = 4096
BLOCK_SHIFT: Final = 12
REGION_SHIFT: Final = 18
REGION_BLOCKS: Final = 1 << REGION_SHIFT
REGION_MASK: Final = REGION_BLOCKS - 1
HOLE: Final = 0
LOCAL_BIT: Final = 1 << 63
INDEX_MASK: Final = 0xFFFF_FFFF
GROUP_BLOCKS: Final = 16
"""A sealed group holds at most this many blocks: the unit of compression, encryption and of a cold read."""

SECTOR_SIZE: Final = 512
DISK_SIZE_BYTES_MAX: Final = 1 << 50
DISK_INDEX_MAX: Final = 0xFFFF


def make_loc(object_number: int, index: int) -> int:
    """Return the loc of block `index` in journal object `object_number`."""
    return object_number << 32 | index


def blocks_of(size_bytes: int) -> int:
    """Return how many blocks a disk of `size_bytes` has (the last one may be partial)."""
    return (size_bytes + BLOCK_SIZE - 1) >> BLOCK_SHIFT
