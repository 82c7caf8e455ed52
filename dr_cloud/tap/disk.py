"""The disks behind a tap: a raw file or block device here, an upstream NBD server in `dr_cloud.tap.upstream`.

A disk answers at once or returns an awaitable, as `dr_cloud.nbd.export` does. A file answers writes at once: the page
cache takes them. It answers reads at once where they are cached (RWF_NOWAIT), else from a thread, so that a cold read
holds no other request. Trims and zeroes run in a thread: their cost has no bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd.export import Buffer, Extent

EXTENTS_MAX: Final = 256
"""How many extents one answer holds at most."""

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10
_ZEROES: Final = bytes(1 << 20)
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_THREADS: Final = 16

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Disk(Protocol):
    """What the tap asks of a disk. Offsets and lengths are bytes inside the disk. Errors are `OSError`."""

    size_bytes: int
    block_size_minimum: int

    def pread(self, offset: int, length: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """Return buffers that together hold the bytes."""
        ...

    def pwrite(self, offset: int, data: memoryview) -> Awaitable[None] | None:
        """Write all of `data`."""
        ...

    def zero(self, offset: int, length: int, may_trim: bool) -> Awaitable[None] | None:
        """Let it read as zeroes, leaving a hole if `may_trim`."""
        ...

    def flush(self) -> Awaitable[None]:
        """Make every write answered before this call durable."""
        ...

    def extents(self, offset: int, length: int, count_max: int) -> Sequence[Extent] | Awaitable[Sequence[Extent]]:
        """Return at least one and at most `count_max` extents from `offset` on, none beyond `length`."""
        ...

    async def measure(self) -> int:
        """Return the size in bytes that it has now; `size_bytes` stays until the owner sets it."""
        ...

    async def close(self) -> None:
        """Let go of the disk. Nothing is under way any more."""
        ...


class FileDisk:
    """A raw file or a block device.

    Raises:
        DrCloudError: It does not exist, is neither file nor block device, is empty, or may not be written.
    """

    block_size_minimum = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DrCloudError(
                f"disk {path} cannot be opened: {error.strerror}",
                "Make it first (truncate -s 20G FILE) or check its name and permissions.",
            ) from error
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            os.close(self._fd)
            raise DrCloudError(f"disk {path} is neither a file nor a block device", "Give a raw image or a device.")
        self.size_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        if not self.size_bytes:
            os.close(self._fd)
            raise DrCloudError(f"disk {path} is empty", "Give it a size first: truncate -s 20G FILE.")
        self._nowait = self._try_nowait()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"disk-{path.name}")

    def _try_nowait(self) -> bool:
        """Return whether the file system can say that a read would block."""
        try:
            os.preadv(self._fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def pread(self, offset: int, length: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        """Read: at once from the page cache, else in a thread."""
        buffer = bytearray(length)
        done = 0
        if self._nowait:
            with contextlib.suppress(BlockingIOError):
                done = os.preadv(self._fd, (buffer,), offset, os.RWF_NOWAIT)
            if done == length:
                return (buffer,)
        return asyncio.get_running_loop().run_in_executor(self._threads, self._read_rest, buffer, offset, done)

    def _read_rest(self, buffer: bytearray, offset: int, done: int) -> Sequence[Buffer]:
        self.read_into(memoryview(buffer)[done:], offset + done)
        return (buffer,)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`, blocking. What lies beyond the end is left as it is."""
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, (view[done:],), offset + done)
            if not count:
                return
            done += count

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write into the page cache."""
        done = os.pwrite(self._fd, data, offset)
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def zero(self, offset: int, length: int, may_trim: bool) -> Awaitable[None]:
        """Punch a hole or zero a range, in a thread; where the file system cannot, write zeroes."""
        return asyncio.get_running_loop().run_in_executor(self._threads, self.zero_blocking, offset, length, may_trim)

    def zero_blocking(self, offset: int, length: int, may_trim: bool) -> None:
        """Do what `zero` does, in this thread."""
        # A punched hole reads as zeroes on files and on block devices; BLKDISCARD promises no such thing.
        mode = _PUNCH_HOLE if may_trim else _ZERO_RANGE
        if not _fallocate(self._fd, mode | _KEEP_SIZE, offset, length):
            return
        number = ctypes.get_errno()
        if number not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number))
        stop = offset + length
        while offset < stop:
            offset += os.pwrite(self._fd, _ZEROES[: stop - offset], offset)

    def flush(self) -> Awaitable[None]:
        """Make all writes durable, in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._threads, os.fdatasync, self._fd)

    def extents(self, offset: int, length: int, count_max: int) -> Sequence[Extent]:
        """Return what the file system says is data and what is a hole; all is data where it cannot say."""
        stop = offset + length
        found: list[Extent] = []
        while offset < stop and len(found) < count_max:
            end, hole = self._extent_at(offset)
            end = min(end, stop)
            found.append(Extent(end - offset, hole))
            offset = end
        return found

    def _extent_at(self, offset: int) -> tuple[int, bool]:
        """Return (end, is a hole) of the extent at `offset`."""
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
            if data > offset:
                return data, True
            return os.lseek(self._fd, offset, os.SEEK_HOLE), False
        except OSError as error:
            # ENXIO: no data from here on. Anything else: it cannot say.
            return self.size_bytes, error.errno == errno.ENXIO

    async def measure(self) -> int:
        """Ask the file system or the device."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    async def close(self) -> None:
        """Wait for the threads and close the file."""
        await asyncio.to_thread(self._threads.shutdown)
        os.close(self._fd)
