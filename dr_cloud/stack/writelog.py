"""The write log of one recovery test: where its writes go, apart from everything else, until the test ends.

Layout: slots of 4096 bytes in a file that has no name. A block that is written gets a slot and keeps it for as long
as the log lives, so the log is never larger than the blocks its test wrote, and the bytes of one block never turn
up in an answer about another one.

Space is reserved with `posix_fallocate` before it is mapped and used, in steps of 5 % (at least 64 KiB). So a full
disk or a spent quota is `OSError(ENOSPC)` for the one write that asked, never a signal in the middle of a copy.
(True of file systems that reserve for good: ext4, XFS, tmpfs.) Where the log lies in memory (tmpfs), what is reserved
is mapped in the same step: one call for many pages costs half of what a fault for each would. On a disk it would cost
more, and is left to the faults.

The file has no name from the start (`O_TMPFILE`; where that is missing, it is unlinked at once): it vanishes with
`close()`, and with the process however it ends. Nothing is recovered after a crash: a test's writes are thrown away.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from pathlib import Path
from typing import Final

from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE

STEP_BYTES_MIN: Final = 64 << 10
STEP_FRACTION: Final = 20
WINDOW_BYTES_MIN: Final = 1 << 30
"""Of address space and of a sparse file: what a mapping that is made anew would lose is its pages' entries."""
_MADV_POPULATE_WRITE: Final = 23
"""Since Linux 5.14; Python has no name for it."""
_MOUNTS: Final = Path("/proc/self/mountinfo")


class WriteLog:
    """Slots for written blocks. Not thread-safe: it belongs to its stack's event loop.

    Attributes:
        view: The mapped log; slot n lies at n * 4096. Read it anew after each `take`: the mapping may have grown.
        slots: How many slots are taken.
        stored_bytes: Space reserved on the file system.
    """

    def __init__(self, directory: Path, quota_bytes: int | None = None) -> None:
        """Create an empty log in `directory` that never stores more than `quota_bytes` (None: no limit but the disk).

        Raises:
            OSError: The directory cannot be written.
        """
        self._quota_bytes = quota_bytes
        self._fd = _open_unnamed(directory)
        self._in_memory = _is_tmpfs(self._fd)
        self._slots_reserved = 0
        self.slots = 0
        self.stored_bytes = 0
        self.refused = 0
        """Writes that found the disk full, or the quota spent."""
        self._map: mmap.mmap | None = None
        self.view = memoryview(bytearray())

    def take(self, count: int) -> int:
        """Return the first of `count` adjacent new slots, whose space is reserved.

        Raises:
            OSError: ENOSPC, the disk is full or the quota spent; the log is as it was.
        """
        first = self.slots
        if first + count > self._slots_reserved:
            self._reserve((first + count) << BLOCK_SHIFT)
        self.slots = first + count
        return first

    def close(self) -> None:
        """Drop every byte. Views that are still being sent keep their mapping until they are done."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._map = None
            self.view = memoryview(bytearray())
            self._slots_reserved = self.stored_bytes = 0

    def _reserve(self, needed_bytes: int) -> None:
        """Reserve and map at least `needed_bytes` in all; a whole step more where there is room for it."""
        if self._fd < 0:
            raise OSError(errno.ESHUTDOWN, "the write log is closed")
        step_bytes = max(STEP_BYTES_MIN, self.stored_bytes // STEP_FRACTION)
        wanted_bytes = max(self.stored_bytes + step_bytes, needed_bytes)
        if self._quota_bytes is not None:
            if needed_bytes > self._quota_bytes:
                self.refused += 1
                raise OSError(errno.ENOSPC, f"the test's quota of {self._quota_bytes} bytes is spent")
            wanted_bytes = min(wanted_bytes, self._quota_bytes)
        wanted_bytes &= -BLOCK_SIZE
        try:
            self._extend(wanted_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # No room for a whole step: the last free blocks are still worth having.
            try:
                self._extend(needed_bytes)
            except OSError as again:
                self.refused += 1
                raise OSError(errno.ENOSPC, "no space for the test's writes") from again

    def _extend(self, size_bytes: int) -> None:
        os.posix_fallocate(self._fd, self.stored_bytes, size_bytes - self.stored_bytes)
        if size_bytes > len(self.view):
            # The mapping reaches past what is reserved (the file is sparse there), so that it is seldom made anew.
            window_bytes = max(WINDOW_BYTES_MIN, 2 * size_bytes)
            try:
                os.ftruncate(self._fd, window_bytes)
            except OSError:
                window_bytes = size_bytes
            self._map = mmap.mmap(self._fd, window_bytes)
            self.view = memoryview(self._map)
        if self._in_memory and self._map is not None:
            # Only a hint: an older kernel does not know it.
            with contextlib.suppress(OSError):
                self._map.madvise(_MADV_POPULATE_WRITE, self.stored_bytes, size_bytes - self.stored_bytes)
        self.stored_bytes = size_bytes
        self._slots_reserved = size_bytes >> BLOCK_SHIFT


def _is_tmpfs(fd: int) -> bool:
    """Return whether a file lies in memory."""
    device = os.fstat(fd).st_dev
    place = f" {os.major(device)}:{os.minor(device)} "
    try:
        return any(place in line and " - tmpfs " in line for line in _MOUNTS.read_text().splitlines())
    except OSError:
        return False


def _open_unnamed(directory: Path) -> int:
    """Return a new file in `directory` that has no name."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    fd, name = tempfile.mkstemp(prefix=".write-log-", dir=directory)
    os.unlink(name)
    return fd
