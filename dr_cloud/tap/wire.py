"""The feed: what a tap and its source VDSA say to each other over a unix stream socket.

Every message is a 40-byte little-endian head, then a body::

    offset  size  field
         0     1  type       (the constants below)
         1     1  flags      bit 0: SYNC, the block is sent again by a synchronisation
         2     2  disk       index of the disk
         4     4  count      blocks of WRITE and ZERO; bytes of the body otherwise
         8     8  sequence
        16     8  time_ns
        24     8  block      first block
        32     8  id         of a MARK: answered with the same id

    WRITE   tap → VDSA  body: count * 4096 bytes. One guest write is one sequence and one time (its partial blocks
                        completed from the disk); a write over 1 MiB goes in pieces that share both.
    ZERO    tap → VDSA  no body: trim and write-zeroes; blocks at the edges come as WRITE if partly covered.
    HELLO   tap → VDSA  body: JSON `Hello`; first message of a connection.
    SYNC_BEGIN, SYNC_END  tap → VDSA  between them no checkpoint is made. `sequence` is the last one given out.
    MARKED  tap → VDSA  answer to MARK: every write with time ≤ time_ns was sent before this message, and no later
                        one will carry such a time. `sequence` is the last one given out.
    MARK    VDSA → tap  please answer MARKED.
    DURABLE VDSA → tap  every write with a sequence ≤ `sequence` is durable at the target: its intent may be cleared.
                        It may name a write only when that is whole: after a greater sequence, a MARKED or a SYNC_END.
    RESYNC  VDSA → tap  something after the last DURABLE was lost on the way: send every set bit again.

A MARK is answered in its place in the stream. While copies are missing (after a connection or a drop) it waits for the
SYNC_BEGIN; only the newest one is answered then. So a MARKED that is not inside of a synchronisation means that nothing
is missing. A tap that dropped its queue says nothing of it but the next SYNC_BEGIN: that may come without a SYNC_END
before it, and begins anew.

The tap connects and speaks first. Neither side waits for the other: a tap that cannot send keeps at most its queue
limit, then drops the queue, goes on by intent bitmap alone, and synchronises once the socket drains or reconnects.
"""

from __future__ import annotations

import struct
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.journal import Disk

HEAD: Final = struct.Struct("<BBHIQQQQ")
HEAD_BYTES: Final = HEAD.size

WRITE: Final = 1
ZERO: Final = 2
HELLO: Final = 3
SYNC_BEGIN: Final = 4
SYNC_END: Final = 5
MARKED: Final = 6
MARK: Final = 16
DURABLE: Final = 17
RESYNC: Final = 18

FLAG_SYNC: Final = 1
WRITE_BLOCKS_MAX: Final = 256
FEED_VERSION: Final = 1


class Hello(BaseModel):
    """Who the tap is and which disks it has."""

    model_config = ConfigDict(frozen=True)

    version: int = FEED_VERSION
    tap: str = Field(pattern=r"^[0-9a-f]{32}$")
    """The tap's id: random, kept in the head of its bitmap file."""
    sequence: int
    disks: list[Disk]
