"""A tap against model VDSAs that lose everything not yet durable: no block differs at a target without its bit.

Two copies, each with a target of its own that connects, breaks, asks and calls durable as it likes; disks that come,
go, grow and shrink while guests write; a tap that is killed at any of these points.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tap_model import SLOW_SIZE, Half, SlowDisk, Vdsa

from dr_cloud.model.blocks import BLOCK_SIZE, blocks_of
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import copy_path, open_bitmaps
from dr_cloud.tap.copy import State
from dr_cloud.tap.disk import FileDisk
from dr_cloud.tap.export import TapExport
from dr_cloud.tap.tap import Tap

SECTOR = 512
FILE_SECTORS = 21 * 8 + 3
COPIES = 2
QUEUE_BYTES_MAX = 24 * BLOCK_SIZE


HALF = st.integers(0, COPIES - 1)
QUESTIONS = st.sampled_from(["mark", "hold", "release", "order"])
MEMORY = Path("/dev/shm")
"""Where it is there, nothing waits for a disk."""


class TapMachine(RuleBasedStateMachine):
    """Guest writes of any alignment, trims, failures, floods, cuts, crashes, barriers, synchronisations, new disks."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="tap-model-", dir=MEMORY if MEMORY.is_dir() else None))
        self.sectors = {"file": FILE_SECTORS}
        self.files: dict[str, FileDisk] = {}
        self.slow = SlowDisk()
        self.now_ns = 1000
        self.opened = 0
        self.given = 0
        """Disks made so far."""
        self.tasks: list[asyncio.Task[None]] = []
        self.make("file")
        self.open_tap(self.folder / "state0", [Vdsa() for _ in range(COPIES)])

    def make(self, name: str) -> None:
        """Make a file and open it."""
        path = self.folder / name
        path.write_bytes((bytes(range(256)) * self.sectors[name] * 2)[: self.sectors[name] * SECTOR])
        self.files[name] = FileDisk(path)

    def wanted(self) -> list[tuple[str, int]]:
        return [*[(name, sectors * SECTOR) for name, sectors in self.sectors.items()], ("slow", SLOW_SIZE)]

    def open_tap(self, state: Path, vdsas: Sequence[Vdsa]) -> None:
        bitmaps = open_bitmaps(state, self.wanted(), COPIES, boot=b"b" * 16)
        self.tap = Tap("db", bitmaps, QUEUE_BYTES_MAX, now=self.tick, monotonic=self.tick)
        self.halves = [Half(copy, vdsa) for copy, vdsa in zip(self.tap.copies, vdsas, strict=True)]
        self.exports: dict[str, TapExport] = {}
        self.export()

    def tick(self) -> int:
        """The clock moves on when it is read, so that every wait has an end."""
        self.now_ns += 1
        return self.now_ns

    def export(self) -> None:
        for entry in self.tap.disks:
            name = entry.disk.name
            if name not in self.exports:
                self.exports[name] = TapExport(self.tap, entry, self.files.get(name, self.slow))

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for task in self.tasks:
            task.cancel()
        self.turn()
        for disk in self.files.values():
            self.loop.run_until_complete(disk.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        for copy in self.tap.copies:
            copy.bitmap.abandon()
        shutil.rmtree(self.folder)
        # Each bitmap is a mapping with a descriptor of its own, and waits in a cycle for the collector.
        gc.collect()

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def content(self, name: str) -> bytes:
        return bytes(self.slow.content) if name == "slow" else (self.folder / name).read_bytes()

    # The guest.

    def place(self, data: st.DataObject, size: int) -> tuple[int, int]:
        offset = data.draw(st.integers(0, size // SECTOR - 1))
        count = data.draw(st.integers(1, min(size // SECTOR - offset, 40)))
        return offset * SECTOR, count * SECTOR

    def write(self, name: str, offset: int, content: bytes) -> None:
        done = self.exports[name].pwrite(offset, memoryview(content), False)
        assert (done is not None) == self.tap.gate.shut
        if done is not None:
            done.close()
        assert self.content(name)[offset : offset + len(content)] == content

    @rule(data=st.data(), fill=st.integers(0, 255), step=st.integers(0, 2))
    def write_file(self, data: st.DataObject, fill: int, step: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.sectors)))
        offset, length = self.place(data, self.sectors[name] * SECTOR)
        self.now_ns += step
        self.write(name, offset, bytes([fill]) * length)

    @rule(block=st.integers(0, 5), fill=st.integers(0, 255))
    def write_block(self, block: int, fill: int) -> None:
        self.write("file", block * BLOCK_SIZE, bytes([fill]) * BLOCK_SIZE)

    @rule(data=st.data(), fua=st.booleans())
    def trim_file(self, data: st.DataObject, fua: bool) -> None:
        self.now_ns += wire.HOLD_NS_MAX
        offset, length = self.place(data, self.sectors["file"] * SECTOR)
        self.loop.run_until_complete(self.exports["file"].trim(offset, length, fua))
        assert not any(self.content("file")[offset : offset + length])

    @rule(data=st.data(), fill=st.integers(0, 255), zero=st.booleans())
    def write_slow(self, data: st.DataObject, fill: int, zero: bool) -> None:
        offset, length = self.place(data, SLOW_SIZE)

        async def write() -> None:
            try:
                if zero:
                    await self.exports["slow"].write_zeroes(offset, length, False, True)
                else:
                    done = self.exports["slow"].pwrite(offset, memoryview(bytes([fill]) * length), False)
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

    # The connections and the VDSAs.

    @rule(at=HALF)
    def connect(self, at: int) -> None:
        if self.halves[at].copy.state is State.CONNECTING:
            self.halves[at].copy.connected()

    @rule(at=HALF)
    def cut(self, at: int) -> None:
        self.halves[at].cut()

    @rule(at=HALF)
    def resync(self, at: int) -> None:
        """R1: the VDSA lost what was on its way and says so."""
        half = self.halves[at]
        if half.copy.state is not State.CONNECTING:
            half.vdsa.lose()
            half.copy.drop("asked for")

    @rule(at=HALF)
    def deliver(self, at: int) -> None:
        half = self.halves[at]
        if (batch := half.copy.take()) is not None:
            half.vdsa.take(batch)

    @rule(at=HALF, share=st.floats(0, 1))
    def say_durable(self, at: int, share: float) -> None:
        half = self.halves[at]
        if half.copy.state is not State.CONNECTING:
            sequences = [record[0] for record in half.vdsa.taken]
            sequence = sequences[int(share * (len(sequences) - 1))] if sequences else half.vdsa.newest
            half.vdsa.make_durable(sequence)
            half.copy.durable(sequence)

    @rule(
        at=HALF,
        number=st.integers(1, 3),
        kind=st.sampled_from(["mark", "hold", "release", "order"]),
        ns=st.integers(0, 9),
    )
    def ask(self, at: int, number: int, kind: str, ns: int) -> None:
        copy = self.halves[at].copy
        if copy.state is State.CONNECTING:
            return
        if kind == "mark":
            copy.mark(number)
        elif kind == "hold":
            copy.hold(number, self.tap.clock.time_ns + ns - 1)
        elif kind == "release":
            copy.release(number)
        else:
            copy.order(max(0, ns - 7))

    # Synchronisations, step by step.

    def begin_sync(self, half: Half) -> None:
        if half.copy.state is State.TRACKING and not half.copy.queued_bytes:
            half.vdsa.synced.clear()
            half.dirty_at_begin = half.dirty()
            half.piece = None
            half.runs = list(half.copy.sync_runs()) if half.copy.begin_sync() else []

    def sync_step(self, half: Half, count: int) -> None:
        if half.copy.state is not State.SYNCING:
            return
        if half.piece is not None:
            (watch, data), half.piece = half.piece, None
            half.copy.send_sync(watch, data if any(data) else None)
        elif half.runs:
            bits, first, stop = half.runs.pop(0)
            count = min(count, stop - first)
            if first + count < stop:
                half.runs.insert(0, (bits, first + count, stop))
            part = self.content(bits.disk.name)[first * BLOCK_SIZE : (first + count) * BLOCK_SIZE]
            half.piece = (half.copy.watch(bits, first, count), memoryview(part.ljust(count * BLOCK_SIZE, b"\0")))
        else:
            half.copy.end_sync()

    @rule(at=HALF, count=st.integers(1, 9))
    def synchronise(self, at: int, count: int) -> None:
        self.begin_sync(self.halves[at])
        self.sync_step(self.halves[at], count)

    @rule(at=HALF, pieces=st.integers(0, 6))
    def advance(self, at: int, pieces: int) -> None:
        """Go some way towards streaming, which single rules in a row rarely do."""
        half = self.halves[at]
        self.connect(at)
        half.deliver()
        self.begin_sync(half)
        for _ in range(pieces):
            self.sync_step(half, 9)
        half.deliver()

    # Disks that change.

    def alter(self, data: st.DataObject) -> set[str]:
        """Let disks come, go, or have another size; return the names of those that are no longer the same."""
        name = data.draw(st.sampled_from(["file", "more", "other"]))
        known = name in self.sectors
        sectors = data.draw(st.integers(6 * 8, FILE_SECTORS + 20))
        if known and name != "file" and data.draw(st.booleans()):
            del self.sectors[name]
            self.exports.pop(name, None)
            self.loop.run_until_complete(self.files.pop(name).close())
            if data.draw(st.booleans()):
                # Another disk under the same name.
                self.sectors[name] = sectors
                self.make(name)
            return {name}
        self.sectors[name] = sectors
        if known:
            with (self.folder / name).open("r+b") as file:
                file.truncate(sectors * SECTOR)
        else:
            self.make(name)
        return set()

    def resize(self) -> None:
        for name, sectors in self.sectors.items():
            self.files[name].size_bytes = sectors * SECTOR
            if name in self.exports:
                self.exports[name].size_bytes = sectors * SECTOR

    @rule(data=st.data(), ends=st.sampled_from(["switched", "given up", "killed before", "killed after"]))
    def change_disks(self, data: st.DataObject, ends: str) -> None:
        """R5, invariant 2: the bitmaps move while guests write; the tap may be killed in between."""
        for half in self.halves:
            half.cut()
        before = dict(self.sectors)
        anew = self.alter(data)
        smaller = any(self.sectors.get(name, 0) < sectors for name, sectors in before.items())
        if ends == "given up" and (smaller or anew):
            ends = "switched"
        bitmaps = [half.copy.bitmap for half in self.halves]
        for bitmap in bitmaps:
            for bits in bitmap.disks:
                bits.begin_move()
        besides = []
        for bitmap in bitmaps:
            self.write_some(data, before)
            besides.append(bitmap.prepare(self.wanted(), anew, besides[0] if besides else None))
        self.write_some(data, before)
        if ends == "given up":
            for bitmap, beside in zip(bitmaps, besides, strict=True):
                bitmap.give_up(beside)
            ends = "killed before"
        if ends == "killed before":
            if anew & self.sectors.keys():
                # A file that is made before the name is free would pass for the disk that has it.
                ends = "switched"
            else:
                self.restart()
                return
        for bitmap, beside in zip(bitmaps, besides, strict=True):
            bitmap.switch(beside)
        self.tap.rebuild()
        self.resize()
        self.export()
        self.write_some(data, self.sectors)
        if ends == "killed after":
            self.restart()

    def write_some(self, data: st.DataObject, sectors: dict[str, int]) -> None:
        """Guests write to disks that stay; the export of one that shrinks is closed meanwhile."""
        for name in sorted(self.sectors.keys() & sectors.keys() & self.exports.keys()):
            end = sectors[name]
            if end <= self.sectors[name] and data.draw(st.booleans()):
                at = data.draw(st.integers(0, end - 1))
                self.write(name, at * SECTOR, bytes([data.draw(st.integers(0, 255))]) * SECTOR)

    # Crashes.

    def restart(self) -> None:
        """Kill the tap and start another from what its files hold."""
        for half in self.halves:
            half.copy.bitmap.abandon()
            half.cut()
        for task in self.tasks:
            task.cancel()
        self.turn()
        self.tasks.clear()
        old, self.opened = self.opened, self.opened + 1
        state = self.folder / f"state{self.opened}"
        for number in range(COPIES):
            shutil.copyfile(copy_path(self.folder / f"state{old}", number), copy_path(state, number))
        self.slow.waiting.clear()
        self.resize()
        self.open_tap(state, [half.vdsa for half in self.halves])

    @rule(reached=st.booleans())
    def crash(self, reached: bool) -> None:
        """The tap is killed; writes under way reach the disk or do not."""
        before = [half.dirty() for half in self.halves]
        sequence, time_ns = self.tap.clock.sequence, self.tap.clock.time_ns
        for offset, data, _ in self.slow.waiting if reached else ():
            self.slow.content[offset : offset + len(data)] = data
        self.restart()
        assert [half.dirty() for half in self.halves] == before
        assert self.tap.clock.sequence >= sequence
        assert self.tap.clock.time_ns >= time_ns

    @precondition(lambda self: not self.slow.waiting)
    @rule(at=HALF)
    def settle(self, at: int) -> None:
        """R1, invariant 2: once all is sent and durable, the replica is the disk and nothing is dirty."""
        half = self.halves[at]
        self.connect(at)
        for _ in range(3):
            half.deliver()
            self.begin_sync(half)
            while half.copy.state is State.SYNCING:
                self.sync_step(half, 9)
                half.deliver()
        assert half.copy.state is State.STREAMING
        # As before each checkpoint: the answer tells the sequences that went to the other copy alone, too.
        half.copy.mark(7)
        half.deliver()
        assert half.vdsa.marked[-1] == 7
        half.vdsa.make_durable(half.vdsa.newest)
        half.copy.durable(half.vdsa.newest)
        for entry in self.tap.disks:
            content = self.content(entry.disk.name)
            assert bytes(half.vdsa.durable[entry.index][: len(content)]) == content
        assert not half.dirty()
        assert not half.copy.bitmap.dirty
        assert half.copy.bitmap.dirty_blocks() == 0

    # What always holds.

    @invariant()
    def no_silent_difference(self) -> None:
        """Invariant 2: a block that differs from what is durable at a target has its bit set for that target."""
        for half in getattr(self, "halves", ()):
            dirty = half.dirty()
            assert half.copy.bitmap.dirty_blocks() == len(dirty)
            for entry in self.tap.disks:
                content = self.content(entry.disk.name)
                assert len(content) == entry.disk.size_bytes
                replica = half.vdsa.durable.get(entry.index, b"")
                for block in range(blocks_of(len(content))):
                    if (entry.index, block) not in dirty:
                        part = slice(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, len(content)))
                        assert replica[part] == content[part], (half.copy.number, entry.disk.name, block)

    @invariant()
    def bounded_and_only_dirty(self) -> None:
        """Memory is bounded, and a synchronisation sends only blocks whose bit was set."""
        for half in getattr(self, "halves", ()):
            assert half.copy.queued_bytes <= QUEUE_BYTES_MAX
            assert half.vdsa.synced <= half.dirty_at_begin


TestTapMachine = TapMachine.TestCase
TestTapMachine.settings = settings(
    max_examples=50, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
