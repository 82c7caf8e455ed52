"""A tap against a model VDSA that loses everything not yet durable: no block differs at the target without its bit."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dr_cloud.model.blocks import BLOCK_SIZE, blocks_of
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.bits import DiskBits
from dr_cloud.tap.disk import FileDisk
from dr_cloud.tap.export import TapExport
from dr_cloud.tap.tap import State, Tap, Watch

SECTOR = 512
FILE_SIZE = 21 * BLOCK_SIZE + 3 * SECTOR
SLOW_SIZE = 16 * BLOCK_SIZE
QUEUE_BYTES_MAX = 24 * BLOCK_SIZE


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
    """Applies the feed. What is not yet called durable is gone when the connection is."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.durable = {disk: bytearray(blocks_of(size) * BLOCK_SIZE) for disk, size in sizes.items()}
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
            elif kind == wire.MARKED:
                assert time_ns >= self.last_time_ns
                assert sequence >= self.last_sequence
                self.last_time_ns = time_ns
                self.marked.append(mark)
            elif kind == wire.HELLO:
                assert wire.Hello.model_validate(json.loads(body)).sequence == sequence
            self.last_sequence = max(self.last_sequence, sequence)
            self.newest = self.last_sequence

    def make_durable(self, sequence: int) -> None:
        while self.taken and self.taken[0][0] <= sequence:
            _, disk, offset, data = self.taken.pop(0)
            self.durable[disk][offset : offset + len(data)] = data

    def lose(self) -> None:
        self.taken.clear()
        self.synced.clear()
        self.syncing = False


class TapMachine(RuleBasedStateMachine):
    """Guest writes of any alignment, trims, failures, floods, cuts, crashes, synchronisations step by step."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="tap-model-"))
        self.file_path = self.folder / "disk"
        self.file_path.write_bytes(bytes(range(256)) * (FILE_SIZE // 256))
        self.files = [FileDisk(self.file_path)]
        self.slow = SlowDisk()
        self.now_ns = 1000
        self.opened = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.open_tap(self.folder / "state0")
        self.vdsa = Vdsa({bits.disk.index: bits.disk.size_bytes for bits in self.bitmap.disks})

    def open_tap(self, state: Path) -> None:
        self.bitmap = IntentBitmap(state, [("file", FILE_SIZE), ("slow", SLOW_SIZE)], boot=b"b" * 16)
        self.tap = Tap(self.bitmap, QUEUE_BYTES_MAX, clock=lambda: self.now_ns)
        disks = (self.files[-1], self.slow)
        self.exports = [TapExport(self.tap, bits, disk) for bits, disk in zip(self.bitmap.disks, disks, strict=True)]
        self.piece: tuple[Watch, memoryview] | None = None
        self.runs: list[tuple[DiskBits, int, int]] = []
        self.dirty_at_begin: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for task in self.tasks:
            task.cancel()
        self.turn()
        self.loop.run_until_complete(self.files[0].close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.folder)

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def contents(self) -> list[bytes]:
        return [self.file_path.read_bytes(), bytes(self.slow.content)]

    def dirty(self) -> set[tuple[int, int]]:
        return {
            (bits.disk.index, block)
            for bits in self.bitmap.disks
            for block in range(blocks_of(bits.disk.size_bytes))
            if bits.test(block)
        }

    # The guest.

    def place(self, data: st.DataObject, size: int) -> tuple[int, int]:
        offset = data.draw(st.integers(0, size // SECTOR - 1))
        count = data.draw(st.integers(1, min(size // SECTOR - offset, 40)))
        return offset * SECTOR, count * SECTOR

    @rule(data=st.data(), fill=st.integers(0, 255), step=st.integers(0, 2))
    def write_file(self, data: st.DataObject, fill: int, step: int) -> None:
        offset, length = self.place(data, FILE_SIZE)
        self.now_ns += step
        assert self.exports[0].pwrite(offset, memoryview(bytes([fill]) * length), False) is None
        assert self.file_path.read_bytes()[offset : offset + length] == bytes([fill]) * length

    @rule(block=st.integers(0, 20), fill=st.integers(0, 255))
    def write_block(self, block: int, fill: int) -> None:
        self.exports[0].pwrite(block * BLOCK_SIZE, memoryview(bytes([fill]) * BLOCK_SIZE), False)

    @rule(data=st.data(), fua=st.booleans())
    def trim_file(self, data: st.DataObject, fua: bool) -> None:
        offset, length = self.place(data, FILE_SIZE)
        self.loop.run_until_complete(self.exports[0].trim(offset, length, fua))
        assert not any(self.file_path.read_bytes()[offset : offset + length])

    @rule(data=st.data(), fill=st.integers(0, 255), zero=st.booleans())
    def write_slow(self, data: st.DataObject, fill: int, zero: bool) -> None:
        offset, length = self.place(data, SLOW_SIZE)

        async def write() -> None:
            try:
                if zero:
                    await self.exports[1].write_zeroes(offset, length, False, True)
                else:
                    done = self.exports[1].pwrite(offset, memoryview(bytes([fill]) * length), False)
                    assert done is not None
                    await done
            except OSError as error:
                assert error.strerror == "injected"

        self.tasks.append(self.loop.create_task(write()))
        self.turn()

    @precondition(lambda self: self.slow.waiting)
    @rule(data=st.data(), fails=st.booleans())
    def land(self, data: st.DataObject, fails: bool) -> None:
        self.slow.land(data.draw(st.integers(0, len(self.slow.waiting) - 1)), fails and data.draw(st.booleans()))
        self.turn()

    # The connection and the VDSA.

    @precondition(lambda self: self.tap.state is State.CONNECTING)
    @rule()
    def connect(self) -> None:
        self.tap.connected()

    @precondition(lambda self: self.tap.state is not State.CONNECTING)
    @rule()
    def cut(self) -> None:
        self.tap.lost()
        self.vdsa.lose()

    @precondition(lambda self: self.tap.state is not State.CONNECTING)
    @rule()
    def resync(self) -> None:
        """R1: the VDSA lost what was on its way and says so."""
        self.vdsa.lose()
        self.tap.drop("asked for")

    @rule()
    def deliver(self) -> None:
        if (batch := self.tap.take()) is not None:
            self.vdsa.take(batch)

    @precondition(lambda self: self.tap.state is not State.CONNECTING)
    @rule(share=st.floats(0, 1))
    def say_durable(self, share: float) -> None:
        sequences = [record[0] for record in self.vdsa.taken]
        sequence = sequences[int(share * (len(sequences) - 1))] if sequences else self.vdsa.newest
        self.vdsa.make_durable(sequence)
        self.tap.durable(sequence)

    @precondition(lambda self: self.tap.state is not State.CONNECTING)
    @rule(mark=st.integers(1, 100))
    def mark(self, mark: int) -> None:
        self.tap.mark(mark)

    # A synchronisation, step by step.

    @precondition(lambda self: self.tap.state is State.TRACKING and not self.tap.queued_bytes)
    @rule()
    def begin_sync(self) -> None:
        self.vdsa.synced.clear()
        self.dirty_at_begin = self.dirty()
        self.piece = None
        self.runs = list(self.tap.sync_runs()) if self.tap.begin_sync() else []

    @precondition(lambda self: self.tap.state is State.SYNCING and self.runs and self.piece is None)
    @rule(count=st.integers(1, 9))
    def read_piece(self, count: int) -> None:
        bits, first, stop = self.runs.pop(0)
        count = min(count, stop - first)
        if first + count < stop:
            self.runs.insert(0, (bits, first + count, stop))
        content = self.contents()[bits.disk.index]
        part = content[first * BLOCK_SIZE : (first + count) * BLOCK_SIZE]
        self.piece = (self.tap.watch(bits, first, count), memoryview(part.ljust(count * BLOCK_SIZE, b"\0")))

    @precondition(lambda self: self.tap.state is State.SYNCING and self.piece is not None)
    @rule()
    def send_piece(self) -> None:
        watch, data = self.piece
        self.piece = None
        self.tap.send_sync(watch, data if any(data) else None)

    @precondition(lambda self: self.tap.state is State.SYNCING and not self.runs and self.piece is None)
    @rule()
    def end_sync(self) -> None:
        self.tap.end_sync()

    @rule(pieces=st.integers(0, 6))
    def advance(self, pieces: int) -> None:
        """Go some way towards streaming, which single rules in a row rarely do."""
        if self.tap.state is State.CONNECTING:
            self.connect()
        self.deliver_all()
        if self.tap.state is State.TRACKING:
            self.begin_sync()
        for _ in range(pieces):
            self.sync_step(9)
        self.deliver_all()

    def sync_step(self, count: int) -> None:
        if self.tap.state is State.SYNCING:
            if self.piece is not None:
                self.send_piece()
            elif self.runs:
                self.read_piece(count)
            else:
                self.end_sync()

    # Crashes.

    @rule(reached=st.booleans())
    def crash(self, reached: bool) -> None:
        """The tap is killed; writes under way reach the disk or do not."""
        self.opened += 1
        state = self.folder / f"state{self.opened}"
        shutil.copyfile(self.folder / f"state{self.opened - 1}", state)
        before = self.dirty()
        sequence, time_ns = self.tap.sequence, self.tap.time_ns
        self.bitmap.abandon()
        for task in self.tasks:
            task.cancel()
        self.turn()
        self.tasks.clear()
        for offset, data, _ in self.slow.waiting if reached else ():
            self.slow.content[offset : offset + len(data)] = data
        self.slow.waiting.clear()
        self.vdsa.lose()
        self.open_tap(state)
        assert self.dirty() == before
        assert self.tap.sequence >= sequence
        assert self.tap.time_ns >= time_ns

    @precondition(lambda self: not self.slow.waiting)
    @rule()
    def settle(self) -> None:
        """R1, invariant 2: once all is sent and durable, the replica is the disk and nothing is dirty."""
        if self.tap.state is State.CONNECTING:
            self.connect()
        for _ in range(3):
            self.deliver_all()
            if self.tap.state is State.TRACKING:
                self.begin_sync()
            while self.tap.state is State.SYNCING:
                self.sync_step(9)
                self.deliver_all()
        assert self.tap.state is State.STREAMING
        self.vdsa.make_durable(self.vdsa.newest)
        self.tap.durable(self.vdsa.newest)
        for bits, content in zip(self.bitmap.disks, self.contents(), strict=True):
            assert bytes(self.vdsa.durable[bits.disk.index][: len(content)]) == content
        assert not self.dirty()
        assert not self.bitmap.dirty
        assert self.bitmap.dirty_blocks() == 0
        self.tap.mark(7)
        self.deliver_all()
        assert self.vdsa.marked[-1] == 7

    def deliver_all(self) -> None:
        while (batch := self.tap.take()) is not None:
            self.vdsa.take(batch)

    # What always holds.

    @invariant()
    def no_silent_difference(self) -> None:
        """Invariant 2: a block that differs from what is durable at the target has its bit set."""
        if not hasattr(self, "tap"):
            return
        dirty = self.dirty()
        assert self.bitmap.dirty_blocks() == len(dirty)
        for bits, content in zip(self.bitmap.disks, self.contents(), strict=True):
            replica = self.vdsa.durable[bits.disk.index]
            for block in range(blocks_of(bits.disk.size_bytes)):
                if (bits.disk.index, block) not in dirty:
                    part = slice(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, len(content)))
                    assert replica[part] == content[part], (bits.disk.name, block)

    @invariant()
    def bounded_and_only_dirty(self) -> None:
        """Memory is bounded, and a synchronisation sends only blocks whose bit was set."""
        if hasattr(self, "tap"):
            assert self.tap.queued_bytes <= QUEUE_BYTES_MAX
            assert self.vdsa.synced <= self.dirty_at_begin


TestTapMachine = TapMachine.TestCase
TestTapMachine.settings = settings(
    max_examples=50, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
