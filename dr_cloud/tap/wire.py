"""The feed: what a tap and its source VDSA say to each other over a stream: a unix socket, or TLS 1.3 between hosts.

A tap keeps one to three *copies*, one per replication target. Each copy has a connection of its own and says on it
everything below by itself; tap id, sequence, time and disk indexes are the tap's and the same on all of them. What one
copy's target does or fails to do never touches another copy.

Every message is a 40-byte little-endian head, then a body::

    offset  size  field
         0     1  type       (the constants below)
         1     1  flags      bit 0: SYNC, bit 1: EXPIRED, bit 2: UNORDERED, bit 3: WHOLE
         2     2  disk       index of the disk, the tap's own
         4     4  count      blocks of WRITE and ZERO; bytes of the body otherwise
         8     8  sequence
        16     8  time_ns
        24     8  block      first block
        32     8  id         of a MARK, HOLD or RELEASE: answered with the same id

    WRITE   tap → VDSA  body: count * 4096 bytes. One guest write is one sequence and one time (its partial blocks
                        completed from the disk); a write over 1 MiB goes in pieces that share both. SYNC: the block is
                        sent again by a synchronisation.
    ZERO    tap → VDSA  no body: trim and write-zeroes; blocks at the edges come as WRITE if partly covered.
    HELLO   tap → VDSA  body: JSON `Hello`; first message of a connection. A tap whose disks change connects anew.
    SYNC_BEGIN, SYNC_END  tap → VDSA  between them no checkpoint is made. `sequence` is the last one given out.
    MARKED  tap → VDSA  answer to MARK: every write with time ≤ time_ns was sent before this message, and no later
                        one will carry such a time. `sequence` is the last one given out.
                        UNORDERED: since the last answer of this copy a write was, or may have been, acknowledged
                        before its time had passed by the ORDER's uncertainty (see there).
    HELD    tap → VDSA  answer to HOLD: as MARKED, with time_ns as HOLD asked for, and from here on no write and no
                        flush is acknowledged. EXPIRED: nothing is held.
    RELEASED tap → VDSA answer to RELEASE: as MARKED. EXPIRED: acknowledgements had gone on before it came.
    MARK    VDSA → tap  please answer MARKED.
    DURABLE VDSA → tap  every write with a sequence ≤ `sequence` is durable at the target: its intent may be cleared.
                        It may name a write only when that is whole: after a greater sequence, a MARKED or a SYNC_END.
    RESYNC  VDSA → tap  something after the last DURABLE was lost on the way: send every set bit again.
                        WHOLE: first set every bit of `disk`, for this target has never had the disk, or had not what
                        this copy's bits rest on (`Hello.durable`).
    HOLD    VDSA → tap  lift the clock, so that every later write carries a time > time_ns; hold acknowledgements from
                        now on, not the writes themselves; answer HELD.
    RELEASE VDSA → tap  let acknowledgements go; answer RELEASED.
    ORDER   VDSA → tap  time_ns is the uncertainty of the site's clocks: from now on acknowledge a write only when the
                        tap's clock has passed the write's time by it. 0 ends it; more than 50 ms is refused. No answer.

A MARK is answered in its place in the stream. While copies are missing (after a connection or a drop) it waits for the
SYNC_BEGIN; only the newest one is answered then. So a MARKED that is not inside of a synchronisation means that nothing
is missing. A tap that dropped its queue says nothing of it but the next SYNC_BEGIN: that may come without a SYNC_END
before it, and begins anew. HOLD and RELEASE are answered by the same rule; while copies are missing they hold nothing,
and their late answers say EXPIRED.

The barrier over several taps, for one T that the VDSA chooses ahead of every tap's clock: HOLD(id, T) to all; HELD(id)
of all; RELEASE(id) to all; RELEASED(id) of all. If none of the answers says EXPIRED, T is a cut: whatever a tap
acknowledged before its HELD carries a time ≤ T, all else a time > T, and nothing written after one tap's HELD was
acknowledged before every tap had its own. T goes with HOLD and not with RELEASE, because a write on one host that
follows from an acknowledgement on another may come between the two RELEASEs. A tap that had given out a time > T before
answers EXPIRED with that time: the next T must be above it. One over 1 s ahead of the tap's clock holds nothing either.

Production first: acknowledgements go by themselves `HOLD_NS_MAX` after the first HOLD that stopped them, whatever
becomes of the VDSA; a HOLD that would have them held for more than a fifth of the time holds nothing and says EXPIRED.
ORDER outlives its connection by `ORDER_SECONDS` and delays no acknowledgement by more than `ORDER_NS_MAX`; one that
goes sooner than its time allows is told as UNORDERED. Several copies may hold, and order, at the same time; the longest
uncertainty counts.

The tap connects and speaks first. Neither side waits for the other: a tap that cannot send keeps at most its queue
limit, then drops the queue, goes on by intent bitmap alone, and synchronises once the socket drains or reconnects.

Version 2: server, copies, HOLD, RELEASE, ORDER and their answers.
"""

from __future__ import annotations

import struct
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.journal import Disk
from dr_cloud.model.provider import Name

HEAD: Final = struct.Struct("<BBHIQQQQ")
HEAD_BYTES: Final = HEAD.size

WRITE: Final = 1
ZERO: Final = 2
HELLO: Final = 3
SYNC_BEGIN: Final = 4
SYNC_END: Final = 5
MARKED: Final = 6
HELD: Final = 7
RELEASED: Final = 8
MARK: Final = 16
DURABLE: Final = 17
RESYNC: Final = 18
HOLD: Final = 19
RELEASE: Final = 20
ORDER: Final = 21

FLAG_SYNC: Final = 1
FLAG_EXPIRED: Final = 2
FLAG_UNORDERED: Final = 4
FLAG_WHOLE: Final = 8
WRITE_BLOCKS_MAX: Final = 256
FEED_VERSION: Final = 2

COPIES_MAX: Final = 3
HOLD_NS_MAX: Final = 20_000_000
"""No acknowledgement is held longer, however many HOLDs there are."""
HOLD_SHARE: Final = 0.2
"""Acknowledgements are held for at most this share of the time."""
LIFT_NS_MAX: Final = 1_000_000_000
"""A HOLD may lift a clock at most this far ahead of itself."""
ORDER_NS_MAX: Final = 50_000_000
ORDER_SECONDS: Final = 10.0
"""How long an ORDER outlives its connection."""


class Hello(BaseModel):
    """Who the tap is and which disks it has."""

    model_config = ConfigDict(frozen=True)

    version: int = FEED_VERSION
    tap: str = Field(pattern=r"^[0-9a-f]{32}$")
    """The tap's id: random, kept in the head of its bitmap file; the same for all its copies."""
    server: Name
    """The virtual server whose disks these are."""
    copy_number: int = Field(default=0, ge=0, lt=COPIES_MAX)
    sequence: int
    durable: int = 0
    """The greatest sequence that a DURABLE ever named to this copy; 0 if none: what its cleared bits rest on."""
    disks: list[Disk]
