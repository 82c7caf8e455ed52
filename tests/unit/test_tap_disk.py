"""A raw file behind the tap: reads warm and cold, zeroes, extents, refusals; and its export's guest path."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd.export import Extent
from dr_cloud.tap import disk as disk_module
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.bits import TO_SEND
from dr_cloud.tap.copy import State
from dr_cloud.tap.disk import FileDisk
from dr_cloud.tap.export import TapExport, read_padded
from dr_cloud.tap.tap import Tap

SIZE = 40 * BLOCK_SIZE + 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


async def answer(value: Any) -> Any:
    return await value if asyncio.isfuture(value) or asyncio.iscoroutine(value) else value


async def test_reads_warm_cold_and_without_nowait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = path.read_bytes()
    disk = FileDisk(path)
    warm = disk.pread(1000, 9000)
    assert isinstance(warm, Sequence)
    assert bytes(warm[0]) == content[1000:10000]
    real = os.preadv

    def cold(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "cold")
        return real(fd, buffers, offset)

    def half(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return real(fd, [memoryview(buffers[0])[: len(buffers[0]) // 2]] if flags else buffers, offset)

    for fake in (cold, half):
        monkeypatch.setattr(os, "preadv", fake)
        parts = disk.pread(1000, 9000)
        assert not isinstance(parts, Sequence)
        assert bytes((await parts)[0]) == content[1000:10000]
    monkeypatch.undo()
    assert bytes(await read_padded(disk, 40 * BLOCK_SIZE, 42 * BLOCK_SIZE)) == content[40 * BLOCK_SIZE :].ljust(
        2 * BLOCK_SIZE, b"\0"
    )
    await disk.close()


@pytest.mark.parametrize("may_trim", [True, False])
@pytest.mark.parametrize("supported", [True, False])
async def test_zero(path: Path, monkeypatch: pytest.MonkeyPatch, may_trim: bool, supported: bool) -> None:
    """R1: trim and write-zeroes read as zeroes, also where the file system has no such call."""
    content = bytearray(path.read_bytes())
    if not supported:
        monkeypatch.setattr(disk_module, "_fallocate", lambda *_: -1)
        monkeypatch.setattr(disk_module.ctypes, "get_errno", lambda: errno.EOPNOTSUPP)
        monkeypatch.setattr(disk_module, "_ZEROES", bytes(1000))
    disk = FileDisk(path)
    await disk.zero(700, 20_000, may_trim)
    content[700:20_700] = bytes(20_000)
    assert path.read_bytes() == content
    await disk.close()


async def test_zero_that_fails_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_fallocate", lambda *_: -1)
    monkeypatch.setattr(disk_module.ctypes, "get_errno", lambda: errno.ENOSPC)
    disk = FileDisk(path)
    with pytest.raises(OSError, match="No space left"):
        await disk.zero(0, 4096, True)
    await disk.close()


async def test_extents(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(256 << 10)
        file.write(b"x" * (64 << 10))
    disk = FileDisk(path)
    assert disk.extents(0, 1 << 20, 10) == [
        Extent(256 << 10, True),
        Extent(64 << 10, False),
        Extent((1 << 20) - (320 << 10), True),
    ]
    assert disk.extents((256 << 10) + 512, 1024, 10) == [Extent(1024, False)]
    assert disk.extents(0, 1 << 20, 1) == [Extent(256 << 10, True)]
    await disk.close()


def test_refusals(tmp_path: Path) -> None:
    for name, words in (("none", "cannot be opened"), ("empty", "is empty"), ("folder", "cannot be opened")):
        place = tmp_path / name
        if name == "empty":
            place.touch()
        elif name == "folder":
            place.mkdir()
        with pytest.raises(DrCloudError, match=words) as raised:
            FileDisk(place)
        assert raised.value.remedy
    with pytest.raises(DrCloudError, match="neither a file nor a block device"):
        FileDisk(Path("/dev/null"))


class Guest:
    """An export over a file whose tap is streaming; `copies` applies what it queued to a replica."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disk = FileDisk(path)
        self.bitmap = IntentBitmap(path.with_name("state"), [("d", SIZE)])
        self.bitmap.disks[0].clear(TO_SEND)
        self.tap = Tap("db", [self.bitmap])
        self.copy = self.tap.copies[0]
        self.export = TapExport(self.tap, self.tap.disks[0], self.disk)
        self.copy.connected()
        self.copy.begin_sync()
        self.copy.take()
        self.replica = bytearray(path.read_bytes().ljust(41 * BLOCK_SIZE, b"\0"))

    def copies(self) -> list[tuple[int, int, int, int]]:
        """Return (kind, block, count, sequence) of what was queued."""
        found = []
        for message in self.copy.take() or ():
            kind, _, _, count, sequence, _, block, _ = wire.HEAD.unpack_from(message)
            data = message[wire.HEAD_BYTES :] if kind == wire.WRITE else bytes(count * BLOCK_SIZE)
            self.replica[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE] = data
            found.append((kind, block, count, sequence))
        return found

    def same(self) -> bool:
        return bytes(self.replica[:SIZE]) == self.path.read_bytes() and not any(self.replica[SIZE:])

    async def close(self) -> None:
        await self.disk.close()
        self.bitmap.close()


@pytest.mark.parametrize(
    ("offset", "length", "block", "count"),
    [
        (0, 4096, 0, 1),
        (512, 512, 0, 1),
        (4000, 200, 0, 2),
        (8192, 8192, 2, 2),
        (8192, 8193, 2, 3),
        (5, 40_000, 0, 10),
        (SIZE - 3, 3, 40, 1),
        (39 * BLOCK_SIZE, BLOCK_SIZE + 1000, 39, 2),
    ],
)
async def test_copies_hold_whole_blocks(path: Path, offset: int, length: int, block: int, count: int) -> None:
    """R1, R3.1: a write of any alignment is copied in whole blocks, under one sequence."""
    guest = Guest(path)
    assert guest.export.pwrite(offset, memoryview(os.urandom(length)), False) is None
    assert guest.copies() == [(wire.WRITE, block, count, 1)]
    assert guest.same()
    assert guest.bitmap.dirty_blocks() == count
    await guest.close()


async def test_zeroes_are_copied(path: Path) -> None:
    """R1: a trim goes as a range of zeroes, its partial blocks as blocks, under one sequence."""
    guest = Guest(path)
    await guest.export.trim(4096, 8192, False)
    assert guest.copies() == [(wire.ZERO, 1, 2, 1)]
    await guest.export.write_zeroes(4000, 20_000, True, False)
    assert guest.copies() == [(wire.WRITE, 0, 1, 2), (wire.ZERO, 1, 4, 2), (wire.WRITE, 5, 1, 2)]
    await guest.export.trim(30_000, 100, False)
    assert guest.copies() == [(wire.WRITE, 7, 1, 3)]
    await guest.export.trim(39 * BLOCK_SIZE, SIZE - 39 * BLOCK_SIZE, False)
    assert guest.copies() == [(wire.ZERO, 39, 2, 4)]
    assert guest.same()
    await guest.close()


async def test_write_that_fails_is_copied_as_it_left_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: the guest gets its disk's error; the replica gets what the disk holds."""
    guest = Guest(path)

    def half(offset: int, data: memoryview) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(guest.disk, "pwrite", half)
    with pytest.raises(OSError, match="full"):
        guest.export.pwrite(4096, memoryview(b"n" * 8192), False)
    assert guest.copies() == [(wire.WRITE, 1, 2, 1)]
    assert guest.same()
    await guest.close()


async def test_copy_that_cannot_be_read_is_no_error_of_the_guest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: only the feed suffers: the queue is dropped, the bit stays."""
    guest = Guest(path)

    def broken(view: memoryview, offset: int) -> None:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(guest.disk, "read_into", broken)
    assert guest.export.pwrite(100, memoryview(b"n" * 512), False) is None
    assert guest.copy.state is State.TRACKING
    assert guest.bitmap.disks[0].test(0)
    await guest.close()


async def test_flush_makes_disk_and_bits_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2: the guest's flush flushes the bits too, and a state file that cannot be flushed costs it nothing."""
    guest = Guest(path)
    flushed: list[str] = []
    monkeypatch.setattr(guest.bitmap, "flush", lambda: flushed.append("bits"))
    await guest.export.flush()
    done = guest.export.pwrite(0, memoryview(bytes(4096)), True)
    assert done is not None
    await done
    assert flushed == ["bits", "bits"]

    def fail() -> None:
        raise OSError(errno.ENOSPC, "no space for the state")

    monkeypatch.setattr(guest.bitmap, "flush", fail)
    await guest.export.flush()

    async def bad_disk() -> None:
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(guest.disk, "flush", bad_disk)
    with pytest.raises(OSError, match="disk"):
        await guest.export.flush()
    monkeypatch.undo()
    await guest.close()


class LateDisk(FileDisk):
    """A file whose writes are done when the test says so, in the order it likes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.waiting: list[tuple[int, bytes, asyncio.Future[None]]] = []

    def zero(self, offset: int, length: int, may_trim: bool) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((offset, bytes(length), done))
        return done

    def land(self, place: int, error: OSError | None = None) -> None:
        offset, data, done = self.waiting.pop(place)
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data[: len(data) // 2] if error else data)
        if error:
            done.set_exception(error)
        else:
            done.set_result(None)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def late_guest(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Guest, LateDisk]:
    monkeypatch.setattr(f"{__name__}.FileDisk", LateDisk)
    guest = Guest(path)
    assert isinstance(guest.disk, LateDisk)
    return guest, guest.disk


async def test_changes_of_one_block_take_turns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: what shares a block reaches disk and feed in one order; what does not goes on."""
    guest, disk = await late_guest(path, monkeypatch)
    trim = asyncio.ensure_future(guest.export.trim(4096, 8192, False))
    await turns()
    same = guest.export.pwrite(8192, memoryview(b"s" * 512), False)
    other = guest.export.pwrite(20 * BLOCK_SIZE, memoryview(b"o" * 4096), False)
    assert same is not None
    assert other is not None
    waiting, free = asyncio.ensure_future(same), asyncio.ensure_future(other)
    await turns()
    assert free.done()
    assert not waiting.done()
    disk.land(0)
    await asyncio.gather(trim, waiting, free)
    assert [copy[:3] for copy in guest.copies()] == [(wire.WRITE, 20, 1), (wire.ZERO, 1, 2), (wire.WRITE, 2, 1)]
    assert guest.same()
    await guest.close()


async def test_late_failure_is_copied_as_it_left_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, disk = await late_guest(path, monkeypatch)
    trim = asyncio.ensure_future(guest.export.trim(4096, 8192, False))
    await turns()
    disk.land(0, OSError(errno.EIO, "half done"))
    with pytest.raises(OSError, match="half done"):
        await trim
    assert guest.copies() == [(wire.WRITE, 1, 2, 1)]
    assert guest.same()
    await guest.close()


async def test_call_broken_off_keeps_its_bits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2: the disk may finish what nobody waits for any more; its bits outlive every DURABLE."""
    guest, _ = await late_guest(path, monkeypatch)
    trim = asyncio.ensure_future(guest.export.trim(4096, 8192, False))
    await turns()
    trim.cancel()
    await asyncio.wait({trim})
    assert guest.copy.state is State.TRACKING
    guest.copy.begin_sync()
    bits = guest.bitmap.disks[0]
    guest.copy.send_sync(guest.copy.watch(bits, 0, 8), None)
    guest.copy.durable(guest.tap.clock.sequence)
    assert bits.test(1)
    assert bits.test(2)
    assert guest.export.pwrite(4096, memoryview(bytes(4096)), False) is None
    await guest.close()
