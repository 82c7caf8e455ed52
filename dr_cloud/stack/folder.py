"""The cache on disk: one folder per journal, shared by every stack (every process) of a node.

Purpose: what one stack fetched and decoded, no other stack of the node fetches or decodes again.

Layout, below a root on a local file system (tmpfs or NVMe), every directory of mode 0700::

    boot-<boot id>/<enterprise>/<vpg>/<target>/<journal's id>/
        lock                 empty; its bytes are locked, one for each name that is being made
        <name>               a table: an index, change rows, a keyframe's directory or one of its regions; made whole
                             in `<name>.part` and renamed
        <name>.blocks        a journal object of n blocks, 4097 n bytes: block i, decoded, at 4096 i, then one
                             presence byte per block at 4096 n + i, set once the block is in place

Example: `boot-9a…/acme/sales/dc1/5d41…/object-00000001-00000007.blocks`.

Consistency: a table is seen whole or not at all. Blocks are written with `pwrite` before their presence bytes are, and
never again, so a mapping shows a block that is right, or a presence byte of 0. Files are not truncated once they have
their name. Space is never taken through a mapping: a full file system is ENOSPC, and the caller goes on without the
cache. A group is filled under a lock on its presence bytes, a table made under a lock on a byte of `lock`: processes
wait for each other and then find it done. These locks belong to open files (`F_OFD_SETLKW`) and end with them.

Crash recovery: of a process: what it had finished stays, a lock ends with its holder, a `.part` is begun again. Of the
machine: pages may reach a disk in any order, so the folder of another boot is never used; it is removed.

Eviction: whoever maps a file holds a shared `flock` on it for as long as the mapping lives. The files longest unused
go first, each only if the exclusive lock can be had at once. The limit is per enterprise, and so are the victims.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope, check_name

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_BOOT_FOLDER: Final = re.compile(r"boot-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BLOCKS_SUFFIX: Final = ".blocks"
_PART_SUFFIX: Final = ".part"
_EVICT_TO: Final = 0.9
"""Eviction goes on below the limit, so that it is not due again at once."""


class BlockFile:
    """A journal object's blocks, mapped read-only, with the shared lock that keeps them from eviction.

    Attributes:
        blocks: How many blocks the object has.
        data: Block i at 4096 i; true only where `have[i]`.
        have: One byte per block: not 0 once the block is in place.
    """

    __slots__ = ("_mapping", "_path", "blocks", "data", "have")

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self._path = path
        self._mapping = mapping
        self.blocks = len(mapping) // (BLOCK_SIZE + 1)
        view = memoryview(mapping)
        self.data = view[: self.blocks << BLOCK_SHIFT]
        self.have = view[self.blocks << BLOCK_SHIFT :]

    def has(self, first: int, count: int) -> bool:
        """Are `count` blocks from `first` on all in place?"""
        start = (self.blocks << BLOCK_SHIFT) + first
        return first + count <= self.blocks and self._mapping.find(b"\0", start, start + count) < 0

    def filling(self, first: int, count: int) -> Filling:
        """Wait for the right to fill `count` blocks from `first` on, against every thread and process.

        Raises:
            OSError: The file cannot be opened any more.
        """
        return Filling(self._path, self.blocks, first, count)

    def touch(self) -> None:
        """Note that it is in use, for eviction's order."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path)


class Filling:
    """The right to put some blocks in place, and no other; a context."""

    def __init__(self, path: Path, blocks: int, first: int, count: int) -> None:
        # A file opened anew: the lock belongs to it, so threads of one process exclude each other too.
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._have = blocks << BLOCK_SHIFT
        try:
            _lock_bytes(self._fd, self._have + first, count)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def put(self, first: int, data: bytes | memoryview) -> None:
        """Put decoded blocks in place.

        Raises:
            OSError: ENOSPC and the like; the blocks are then absent.
        """
        _write_all(self._fd, data, first << BLOCK_SHIFT)
        _write_all(self._fd, b"\1" * (len(data) >> BLOCK_SHIFT), self._have + first)


class CacheFolder:
    """The files of one journal's cache, and the limit on those of its enterprise. Thread-safe."""

    def __init__(self, root: Path, scope: Scope, journal: str, limit_bytes: int) -> None:
        """Open the folder of `scope` below `root`, making what is missing.

        Args:
            root: A directory on a local file system, one for all stacks of a node.
            scope: Whose journal it is.
            journal: The journal's own id, which tells it from any other that ever had the same names.
            limit_bytes: How much the enterprise's files may take.

        Raises:
            DrCloudError: A folder on the way belongs to someone else or is open to others.
        """
        enterprise, vpg, target = scope.checked()
        boot = root / f"boot-{_BOOT_ID.read_text().strip()}"
        root.mkdir(parents=True, exist_ok=True)
        for other in root.iterdir():
            if other != boot and _BOOT_FOLDER.fullmatch(other.name):
                shutil.rmtree(other, ignore_errors=True)
        self._enterprise_path = boot / enterprise
        self.path = self._enterprise_path / vpg / target / check_name(journal, "journal")
        for folder in (boot, self._enterprise_path, self.path.parent.parent, self.path.parent, self.path):
            _make_private(folder)
        self.scope = scope
        self.journal = journal
        self.limit_bytes = limit_bytes

    def table(self, name: str, build: Callable[[], bytes | memoryview]) -> memoryview:
        """Return the table `name`, mapped; where it is missing, one caller on this node builds it.

        Where the file system is full, the caller gets what it built, from its own memory.
        """
        path = self.path / name
        mapping = _map(path)
        if mapping is None:
            with self._making(name):
                mapping = _map(path)
                if mapping is None:
                    data = build()
                    if not len(data):
                        return memoryview(b"")
                    try:
                        self._make(path, len(data), data, 0)
                    except OSError:
                        return memoryview(data).toreadonly().cast("B")
                    mapping = _map(path)
                    if mapping is None:  # evicted at once
                        return memoryview(data).toreadonly().cast("B")
        return memoryview(mapping)

    def blocks(self, name: str, blocks: int) -> BlockFile:
        """Return the file of journal object `name`, which has `blocks` blocks, making an empty one where it is missing.

        Raises:
            OSError: There is no space even for that.
        """
        path = self.path / f"{name}{_BLOCKS_SUFFIX}"
        while (mapping := _map(path)) is None:
            with self._making(path.name):
                if not path.exists():
                    # The presence bytes are written, not left a hole: reading a hole of tmpfs takes space.
                    self._make(path, blocks * (BLOCK_SIZE + 1), bytes(blocks), blocks << BLOCK_SHIFT)
        return BlockFile(path, mapping)

    def used_bytes(self) -> int:
        """Return how much the enterprise's files take on the file system."""
        return sum(status.st_blocks * 512 for _, status in self._files())

    def evict(self) -> int:
        """Bring the enterprise's files below the limit, as far as they are not in use; return the bytes freed."""
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns)
        used_bytes = before_bytes = sum(status.st_blocks * 512 for _, status in files)
        if used_bytes <= self.limit_bytes:
            return 0
        for path, status in files:
            if used_bytes <= self.limit_bytes * _EVICT_TO:
                break
            if _remove_unused(path):
                used_bytes -= status.st_blocks * 512
        return before_bytes - used_bytes

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder, _, names in os.walk(self._enterprise_path):
            for name in names:
                if name != "lock":
                    with contextlib.suppress(FileNotFoundError):
                        yield (path := Path(folder, name)), path.stat()

    @contextlib.contextmanager
    def _making(self, name: str) -> Iterator[None]:
        """Hold the right to make `name`. Names that share a byte wait for each other without need."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock_bytes(fd, zlib.crc32(name.encode()), 1)
            yield
        finally:
            os.close(fd)

    def _make(self, path: Path, size_bytes: int, data: bytes | memoryview, offset: int) -> None:
        part = path.with_name(path.name + _PART_SUFFIX)
        try:
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                os.ftruncate(fd, size_bytes)
                _write_all(fd, memoryview(data).cast("B"), offset)
                os.rename(part, path)
            finally:
                os.close(fd)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def _map(path: Path) -> mmap.mmap | None:
    """Map a file read-only under a shared lock (the mapping keeps both), or return None where there is none."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:  # else it was evicted between the two calls
                os.utime(fd)
                return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        finally:
            os.close(fd)


def _remove_unused(path: Path) -> bool:
    """Remove a file if nobody maps it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another may have removed it, and a third made it anew, since it was opened.
        if os.stat(path).st_ino != os.fstat(fd).st_ino:
            return False
        path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(fd)
    return True


def _lock_bytes(fd: int, start: int, length: int) -> None:
    """Wait for the write lock on a range of an open file; it ends when the file is closed."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise DrCloudError(
            f"the cache folder {folder} is not private to this user",
            "Remove it, or name another directory for the cache.",
        )
