"""The source's end of the feed from one tap: bytes to records, in large buffers, without copying a block.

The transport fills a buffer; records are cut out of it as views. A full buffer is left to the records that still refer
to it and a new one begun, so a block's bytes stay where the kernel put them until they are sealed. Buffers are small
until much comes at once: a hundred idle taps cost little.

A tap counts its disks by itself. After HELLO the parser stops, until `attach` says which of them are protected and what
their indexes in the VPG are; records of the others are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
from pydantic import ValidationError

from dr_cloud.model.blocks import BLOCK_SHIFT, blocks_of
from dr_cloud.model.errors import ProtocolError
from dr_cloud.tap import wire

BUFFER_BYTES: Final = 2 << 20
_SMALL_BUFFER_BYTES: Final = 64 << 10
_MUCH_BYTES: Final = 48 << 10
"""So much at once makes the next buffer a large one."""
_FREE_BYTES_MIN: Final = 64 << 10
_SMALL_FREE_BYTES_MIN: Final = 8 << 10
HELLO_BYTES_MAX: Final = 256 << 10


class Record(NamedTuple):
    """One message of a tap. `body` is empty but for WRITE; `disk` is the index in the VPG."""

    type: int
    disk: int
    blocks: int
    sequence: int
    time_ns: int
    block: int
    id: int
    body: memoryview
    flags: int = 0


_EMPTY: Final = memoryview(b"")
_ANSWERS: Final = (wire.SYNC_BEGIN, wire.SYNC_END, wire.MARKED, wire.HELD, wire.RELEASED)


def _new_buffer(size_bytes: int) -> memoryview:
    """Return a buffer that was not filled with zeroes first, as a bytearray is: the kernel fills it."""
    return np.empty(size_bytes, np.uint8).data


_make_record = Record._make


class FeedParser:
    """Parser of one connection. Feed it through `buffer` and `advance`.

    Attributes:
        hello: The tap's first message, None until it came.
    """

    def __init__(self) -> None:
        self.hello: wire.Hello | None = None
        self._attached = False
        self._indexes: Mapping[int, int] = {}
        self._blocks: dict[int, int] = {}
        self._view = _new_buffer(_SMALL_BUFFER_BYTES)
        self._start = 0
        self._end = 0
        self._sequence = 0
        self._time_ns = 0
        self._much = False

    def attach(self, indexes: Mapping[int, int]) -> None:
        """Go on after HELLO: `indexes` gives the index in the VPG of each protected disk. Then call `advance(0)`."""
        self._indexes = indexes
        self._attached = True

    def buffer(self) -> memoryview:
        """Return where the next received bytes go; never empty."""
        return self._view[self._end :]

    def advance(self, count: int) -> list[Record]:
        """Take `count` bytes that were put into `buffer()` and return the whole records there are now.

        Raises `ProtocolError` for anything that a tap cannot have sent: the connection must be closed.
        """
        self._end += count
        self._much = count >= _MUCH_BYTES
        view, position, end = self._view, self._start, self._end
        unpack, head_bytes = wire.HEAD.unpack_from, wire.HEAD_BYTES
        index_of = self._indexes.get
        records: list[Record] = []
        append = records.append
        while end - position >= head_bytes and (self._attached or self.hello is None):
            kind, flags, disk, count, sequence, time_ns, block, mark = unpack(view, position)
            body_start = position + head_bytes
            if kind == wire.WRITE:
                position = body_start + (count << BLOCK_SHIFT)
                if count > wire.WRITE_BLOCKS_MAX:
                    raise ProtocolError(f"a write of {count} blocks in one record; at most {wire.WRITE_BLOCKS_MAX}")
                if position > end:
                    position = body_start - head_bytes
                    break
                self._check(disk, block, count, sequence, time_ns)
                if (index := index_of(disk)) is not None:
                    append(
                        _make_record((kind, index, count, sequence, time_ns, block, 0, view[body_start:position], 0))
                    )
            elif kind == wire.HELLO:
                if self.hello is not None or count > HELLO_BYTES_MAX:
                    raise ProtocolError("a second or too long HELLO")
                if body_start + count > end:
                    break
                position = body_start + count
                self._greet(bytes(view[body_start:position]))
            elif self.hello is None:
                raise ProtocolError(f"a message of type {kind} before HELLO")
            elif kind == wire.ZERO:
                self._check(disk, block, count, sequence, time_ns)
                position = body_start
                if (index := index_of(disk)) is not None:
                    append(_make_record((kind, index, count, sequence, time_ns, block, 0, _EMPTY, 0)))
            elif kind in _ANSWERS:
                if count:
                    raise ProtocolError(f"a message of type {kind} with a body")
                position = body_start
                append(_make_record((kind, 0, 0, sequence, time_ns, 0, mark, _EMPTY, flags)))
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
        need = _FREE_BYTES_MIN if len(self._view) == BUFFER_BYTES else _SMALL_FREE_BYTES_MIN
        if rest >= wire.HEAD_BYTES:
            kind, _, _, count, *_ = wire.HEAD.unpack_from(self._view, self._start)
            body = count << BLOCK_SHIFT if kind == wire.WRITE else count if kind == wire.HELLO else 0
            need = max(need, wire.HEAD_BYTES + min(body, BUFFER_BYTES // 2) - rest)
        if len(self._view) - self._end >= need:
            return
        small = not self._much and rest + need <= _SMALL_BUFFER_BYTES
        fresh = _new_buffer(_SMALL_BUFFER_BYTES if small else BUFFER_BYTES)
        fresh[:rest] = self._view[self._start : self._end]
        self._view, self._start, self._end = fresh, 0, rest
