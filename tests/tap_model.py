"""What a tap is tried against: a disk that answers when it is told to, and a VDSA that loses what is not durable."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence

from dr_cloud.model.blocks import BLOCK_SIZE, blocks_of
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.tap import wire
from dr_cloud.tap.bits import DiskBits
from dr_cloud.tap.copy import Copy, State, Watch

SLOW_SIZE = 16 * BLOCK_SIZE


class SlowDisk:
    """A disk in memory whose writes happen when the test says so, in any order."""

    size_bytes = SLOW_SIZE
    block_size_minimum = 1

    def __init__(self) -> None:
        self.content = bytearray(SLOW_SIZE)
        self.waiting: list[tuple[int, bytes, asyncio.Future[None]]] = []

    def pread(self, offset: int, length: int) -> Sequence[Buffer]:
        return (bytes(self.content[offset : offset + length]),)

    def pwrite(self, offset: int, data: memoryview) -> Awaitable[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((offset, bytes(data), done))
        return done

    def zero(self, offset: int, length: int, may_trim: bool) -> Awaitable[None]:
        return self.pwrite(offset, memoryview(bytes(length)))

    async def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int, count_max: int) -> Sequence[Extent]:
        return (Extent(length, False),)

    async def close(self) -> None:
        pass

    def land(self, place: int, fails: bool) -> None:
        """Let a write reach the disk; one that fails does so half."""
        offset, data, done = self.waiting.pop(place)
        self.content[offset : offset + len(data)] = (
            data[: len(data) // 2] + bytes(self.content[offset + len(data) // 2 : offset + len(data)])
            if fails
            else data
        )
        if fails:
            done.set_exception(OSError(5, "injected"))
        else:
            done.set_result(None)


class Vdsa:
    """Applies the feed of one copy. What is not yet called durable is gone when the connection is."""

    def __init__(self) -> None:
        self.durable: dict[int, bytearray] = {}
        self.taken: list[tuple[int, int, int, bytes]] = []
        self.newest = 0
        self.syncing = False
        self.synced: set[tuple[int, int]] = set()
        self.last_sequence = 0
        self.last_time_ns = 0
        self.marked: list[int] = []

    def take(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            kind, flags, disk, count, sequence, time_ns, block, mark = wire.HEAD.unpack_from(message)
            body = message[wire.HEAD_BYTES :]
            if kind in (wire.WRITE, wire.ZERO):
                assert sequence > self.last_sequence or (sequence, time_ns) == (self.last_sequence, self.last_time_ns)
                assert time_ns > self.last_time_ns or sequence == self.last_sequence
                data = body if kind == wire.WRITE else bytes(count * BLOCK_SIZE)
                assert len(data) == count * BLOCK_SIZE
                self.taken.append((sequence, disk, block * BLOCK_SIZE, data))
                self.last_time_ns = time_ns
                if flags & wire.FLAG_SYNC:
                    assert self.syncing
                    self.synced.update((disk, at) for at in range(block, block + count))
            elif kind == wire.SYNC_BEGIN:
                self.syncing = True
            elif kind == wire.SYNC_END:
                self.syncing = False
            elif kind in (wire.MARKED, wire.HELD, wire.RELEASED):
                assert time_ns >= self.last_time_ns
                assert sequence >= self.last_sequence
                self.last_time_ns = time_ns
                if kind == wire.MARKED:
                    self.marked.append(mark)
            elif kind == wire.HELLO:
                self.greet(wire.Hello.model_validate(json.loads(body)), sequence)
            self.last_sequence = max(self.last_sequence, sequence)
            self.newest = self.last_sequence

    def greet(self, hello: wire.Hello, sequence: int) -> None:
        """Have the disks that the tap has: a new one empty, one that has another size cut or filled up."""
        assert hello.sequence == sequence
        found = {}
        for disk in hello.disks:
            length = blocks_of(disk.size_bytes) * BLOCK_SIZE
            found[disk.index] = bytearray(self.durable.get(disk.index, b"")[:length].ljust(length, b"\0"))
        self.durable = found

    def make_durable(self, sequence: int) -> None:
        while self.taken and self.taken[0][0] <= sequence:
            _, disk, offset, data = self.taken.pop(0)
            self.durable[disk][offset : offset + len(data)] = data

    def lose(self) -> None:
        self.taken.clear()
        self.synced.clear()
        self.syncing = False


class Half:
    """One copy, its VDSA, and the synchronisation under way."""

    def __init__(self, copy: Copy, vdsa: Vdsa) -> None:
        self.copy = copy
        self.vdsa = vdsa
        self.piece: tuple[Watch, memoryview] | None = None
        self.runs: list[tuple[DiskBits, int, int]] = []
        self.dirty_at_begin: set[tuple[int, int]] = set()

    def dirty(self) -> set[tuple[int, int]]:
        return {
            (bits.disk.index, block)
            for bits in self.copy.bitmap.disks
            for block in range(blocks_of(bits.disk.size_bytes))
            if bits.test(block)
        }

    def deliver(self) -> None:
        while (batch := self.copy.take()) is not None:
            self.vdsa.take(batch)

    def cut(self) -> None:
        if self.copy.state is not State.CONNECTING:
            self.copy.lost()
        self.vdsa.lose()
