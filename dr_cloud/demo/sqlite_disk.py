"""SQLite straight on a block device: an `apsw` VFS whose files are areas of an NBD export. No root, no file system.

Layout of the disk::

    sector 0 (512 bytes)   length of the database   magic "DRSQLITE" | u64 length + 1, 0 if the file is not there
    sector 1               length of the journal    the same
    1 MiB …                the database
    last quarter …         its rollback journal, or its WAL

A length is written after the bytes that it covers, and a sector is written whole or not at all; so the disk as it was
at any moment is one that a machine could have left when its power failed, and SQLite recovers it as it does then.
"""

from __future__ import annotations

import struct
from typing import Any, Final, Protocol

import apsw

SECTOR: Final = 512
_MAGIC: Final = b"DRSQLITE"
_LENGTH: Final = struct.Struct("<8sQ")
_DATABASE_AT: Final = 1 << 20
JOURNAL_SUFFIXES: Final = ("-journal", "-wal")


class Disk(Protocol):
    """What the VFS needs: any bytes at any offset."""

    size_bytes: int

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`."""
        ...

    def pwrite(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        ...

    def flush(self) -> None:
        """Make what was written durable."""
        ...


class DiskVfs(apsw.VFS):
    """A VFS with one database, named as one likes, on one export."""

    def __init__(self, name: str, disk: Disk) -> None:
        """Register the VFS under `name`; it is there until `unregister`."""
        self.vfs_name = name
        self.disk = disk
        self.journal_at = disk.size_bytes // 4 * 3 // 4096 * 4096
        super().__init__(name, "")

    def slot(self, path: str) -> int:
        """Return which of the two files a path names."""
        return 1 if path.endswith(JOURNAL_SUFFIXES) else 0

    def length(self, slot: int) -> int | None:
        """Return a file's length, None if it is not there."""
        magic, stored = _LENGTH.unpack_from(self.disk.pread(slot * SECTOR, SECTOR))
        return stored - 1 if magic == _MAGIC and stored else None

    def set_length(self, slot: int, length: int | None) -> None:
        """Store a file's length."""
        stored = 0 if length is None else length + 1
        self.disk.pwrite(slot * SECTOR, _LENGTH.pack(_MAGIC, stored).ljust(SECTOR, b"\0"))

    def area(self, slot: int) -> tuple[int, int]:
        """Return where a file begins on the disk and where its area ends."""
        return (self.journal_at, self.disk.size_bytes) if slot else (_DATABASE_AT, self.journal_at)

    def xOpen(self, name: Any, flags: list[int]) -> DiskFile:  # type: ignore[override]  # noqa: N802, D102
        path = name.filename() if isinstance(name, apsw.URIFilename) else (name or "")
        flags[1] = flags[0]
        return DiskFile(self, self.slot(path))

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802, D102
        return self.length(self.slot(pathname)) is not None

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802, D102
        self.set_length(self.slot(filename), None)

    def xFullPathname(self, name: str) -> str:  # noqa: N802, D102
        return name


class DiskFile:
    """One of the two files."""

    def __init__(self, vfs: DiskVfs, slot: int) -> None:
        """Open the file, empty if it is not there."""
        self._vfs = vfs
        self._slot = slot
        self._start, self._end = vfs.area(slot)
        length = vfs.length(slot)
        self._length = length or 0
        if length is None:
            vfs.set_length(slot, 0)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802, D102
        amount = max(0, min(amount, self._length - offset))
        return self._vfs.disk.pread(self._start + offset, amount) if amount else b""

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802, D102
        if self._start + offset + len(data) > self._end:
            raise apsw.FullError("the disk's area for this file is full")
        self._vfs.disk.pwrite(self._start + offset, data)
        if offset + len(data) > self._length:
            self._length = offset + len(data)
            self._vfs.set_length(self._slot, self._length)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802, D102
        self._length = newsize
        self._vfs.set_length(self._slot, newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802, D102
        self._vfs.disk.flush()

    def xFileSize(self) -> int:  # noqa: N802, D102
        return self._length

    def xSectorSize(self) -> int:  # noqa: N802, D102
        return 4096

    def xDeviceCharacteristics(self) -> int:  # noqa: N802, D102
        return 0

    def xFileControl(self, op: int, pointer: int) -> bool:  # noqa: N802, D102
        return False

    def xLock(self, level: int) -> None:  # noqa: N802, D102
        return None

    def xUnlock(self, level: int) -> None:  # noqa: N802, D102
        return None

    def xCheckReservedLock(self) -> bool:  # noqa: N802, D102
        return False

    def xClose(self) -> None:  # noqa: N802, D102
        return None


def open_database(vfs: DiskVfs) -> apsw.Connection:
    """Open the database of `vfs` in WAL mode (the locks are ours alone, so the WAL needs no shared memory)."""
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    connection = apsw.Connection("orders.db", flags=flags, vfs=vfs.vfs_name)
    connection.execute("pragma locking_mode=exclusive")
    connection.execute("pragma journal_mode=wal")
    connection.execute("pragma synchronous=full")
    connection.execute("pragma temp_store=memory")
    return connection
