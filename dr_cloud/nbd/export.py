"""What the NBD server asks of a disk. A tap and a stack are two implementations; tests add a plain one in memory.

Every call may answer at once or return an awaitable: the server takes the fast way (no task, no await) when the
answer is there. Calls of one export come from one event loop, in the order in which requests arrived.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol

Buffer = bytes | bytearray | memoryview


class Extent(NamedTuple):
    """One run of a block-status answer."""

    length: int
    hole: bool
    """Nothing is stored here and it reads as zeroes (NBD: STATE_HOLE | STATE_ZERO)."""


class Export(Protocol):
    """One disk served over NBD. Offsets and lengths are bytes, already checked to lie inside the disk.

    Errors: raise `OSError` with an errno (EIO, ENOSPC, EPERM, EINVAL, ESHUTDOWN reach the client as such; any other
    becomes EIO). Any other exception is logged and answered with EIO; the server goes on.

    An export may also have an attribute `fast_zeroes`: True says that write_zeroes is never slower than writing, and
    has FAST_ZERO offered to clients.
    """

    name: str
    description: str
    size_bytes: int
    read_only: bool
    block_size_minimum: int
    """Requests that are not multiples of it are refused with EINVAL (1 if any is taken)."""
    block_size_preferred: int

    def pread(self, offset: int, length: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """Return a list or tuple of byte buffers that together hold the `length` bytes at `offset`.

        They are sent without a copy, perhaps after the call: what they show when they are sent is what is read.
        """
        ...

    def pwrite(self, offset: int, data: memoryview, fua: bool) -> Awaitable[None] | None:
        """Write. `data` is valid until the call returns or, where it returns an awaitable, until that is done."""
        ...

    def flush(self) -> Awaitable[None] | None:
        """Make every write answered before this call durable."""
        ...

    def trim(self, offset: int, length: int, fua: bool) -> Awaitable[None] | None:
        """Discard; here it always reads as zeroes afterwards."""
        ...

    def write_zeroes(self, offset: int, length: int, fua: bool, may_trim: bool) -> Awaitable[None] | None:
        """Write zeroes, leaving a hole if `may_trim`."""
        ...

    def block_status(self, offset: int, length: int) -> Sequence[Extent] | Awaitable[Sequence[Extent]]:
        """Return a list or tuple of extents from `offset` on, covering at least one byte and at most `length`."""
        ...
