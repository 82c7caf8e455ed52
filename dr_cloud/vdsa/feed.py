"""The source's end of the feed from one tap: bytes to records, in large buffers, without copying a block.

The transport fills a buffer of 2 MiB; records are cut out of it as views. A full buffer is left to the records that
still refer to it and a new one begun, so a block's bytes stay where the kernel put them until they are sealed.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from pydantic import ValidationError

from dr_cloud.model.blocks import BLOCK_SHIFT, blocks_of
from dr_cloud.model.errors import ProtocolError
from dr_cloud.tap import wire

BUFFER_BYTES: Final = 2 << 20
_FREE_BYTES_MIN: Final = 64 << 10
HELLO_BYTES_MAX: Final = 256 << 10


class Record(NamedTuple):
    """One message of a tap. `body` is empty but for WRITE."""

    type: int
    disk: int
    blocks: int
    sequence: int
    time_ns: int
    block: int
    id: int
    body: memoryview


_EMPTY: Final = memoryview(b"")


def _new_buffer() -> memoryview:
    """Return a buffer that was not filled with zeroes first, as a bytearray is: the kernel fills it."""
    return np.empty(BUFFER_BYTES, np.uint8).data


_make_record = Record._make


class FeedParser:
    """Parser of one connection. Feed it through `buffer` and `advance`.

    Attributes:
        hello: The tap's first message, None until it came.
    """

    def __init__(self) -> None:
        self.hello: wire.Hello | None = None
        self._blocks: dict[int, int] = {}
        self._view = _new_buffer()
        self._start = 0
        self._end = 0
        self._sequence = 0
        self._time_ns = 0

    def buffer(self) -> memoryview:
        """Return where the next received bytes go; never empty."""
        return self._view[self._end :]

    def advance(self, count: int) -> list[Record]:
        """Take `count` bytes that were put into `buffer()` and return the whole records there are now.

        Raises `ProtocolError` for anything that a tap cannot have sent: the connection must be closed.
        """
        self._end += count
        view, position, end = self._view, self._start, self._end
        unpack, head_bytes = wire.HEAD.unpack_from, wire.HEAD_BYTES
        records: list[Record] = []
        append = records.append
        while end - position >= head_bytes:
            kind, _flags, disk, count, sequence, time_ns, block, mark = unpack(view, position)
            body_start = position + head_bytes
            if kind == wire.WRITE:
                position = body_start + (count << BLOCK_SHIFT)
                if count > wire.WRITE_BLOCKS_MAX:
                    raise ProtocolError(f"a write of {count} blocks in one record; at most {wire.WRITE_BLOCKS_MAX}")
                if position > end:
                    position = body_start - head_bytes
                    break
                self._check(disk, block, count, sequence, time_ns)
                append(_make_record((kind, disk, count, sequence, time_ns, block, 0, view[body_start:position])))
            elif kind == wire.HELLO:
                if self.hello is not None or count > HELLO_BYTES_MAX:
                    raise ProtocolError("a second or too long HELLO")
                if body_start + count > end:
                    break
                position = body_start + count
                self._greet(bytes(view[body_start:position]))
                append(_make_record((kind, disk, 0, sequence, time_ns, block, mark, _EMPTY)))
            elif kind in (wire.ZERO, wire.SYNC_BEGIN, wire.SYNC_END, wire.MARKED):
                if kind == wire.ZERO:
                    self._check(disk, block, count, sequence, time_ns)
                elif count or self.hello is None:
                    raise ProtocolError(f"a message of type {kind} with a body or before HELLO")
                position = body_start
                append(_make_record((kind, disk, count, sequence, time_ns, block, mark, _EMPTY)))
            else:
                raise ProtocolError(f"unknown message type {kind} from a tap")
        self._start = position
        self._make_room()
        return records

    def _check(self, disk: int, block: int, count: int, sequence: int, time_ns: int) -> None:
        if not count or block + count > self._blocks.get(disk, 0):
            raise ProtocolError(f"a write of {count} blocks at {block} of disk {disk} is outside the disks of HELLO")
        if sequence < self._sequence or time_ns < self._time_ns or time_ns >> 63:
            raise ProtocolError(f"sequence {sequence} or time {time_ns} goes back")
        self._sequence = sequence
        self._time_ns = time_ns

    def _greet(self, body: bytes) -> None:
        try:
            hello = wire.Hello.model_validate_json(body)
        except ValidationError as error:
            raise ProtocolError(f"bad HELLO: {error.errors(include_url=False)[0]['msg']}") from None
        if hello.version != wire.FEED_VERSION:
            raise ProtocolError(f"the tap speaks version {hello.version} of the feed, this is {wire.FEED_VERSION}")
        self.hello = hello
        self._blocks = {disk.index: blocks_of(disk.size_bytes) for disk in hello.disks}

    def _make_room(self) -> None:
        """Begin a new buffer when little is free, or when the record that has begun cannot end in this one."""
        rest = self._end - self._start
        need = _FREE_BYTES_MIN
        if rest >= wire.HEAD_BYTES:
            kind, _, _, count, *_ = wire.HEAD.unpack_from(self._view, self._start)
            body = count << BLOCK_SHIFT if kind == wire.WRITE else count if kind == wire.HELLO else 0
            need = max(need, wire.HEAD_BYTES + min(body, BUFFER_BYTES // 2) - rest)
        if BUFFER_BYTES - self._end >= need:
            return
        fresh = _new_buffer()
        fresh[:rest] = self._view[self._start : self._end]
        self._view, self._start, self._end = fresh, 0, rest
