"""Disks as the demonstration sees them: a raw file or an NBD export at any byte offset, and one that records.

The record is the demonstration's own oracle: every version of every block with the time before its write was begun and
the time after it was acknowledged, noted by the client, apart from everything that dr_cloud does. At a time T a block
must hold the last version acknowledged by T, or one whose write was under way at T.
"""

from __future__ import annotations

import hashlib
import os
import time
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import numpy as np

from dr_cloud.model.blocks import BLOCK_SIZE, SECTOR_SIZE

VERSION_DTYPE: Final = np.dtype([("block", "<u8"), ("begun_ns", "<u8"), ("acked_ns", "<u8"), ("digest", "V16")])


class SectorDevice(Protocol):
    """A disk that takes whole sectors."""

    size_bytes: int

    def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Return `length` bytes at `offset`."""
        ...

    def pwrite(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        ...

    def flush(self) -> None:
        """Make what was written durable."""
        ...


class RawFile:
    """A raw disk image."""

    def __init__(self, path: Path) -> None:
        """Open the image at `path`."""
        self._fd = os.open(path, os.O_RDWR)
        self.size_bytes = os.fstat(self._fd).st_size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`."""
        return os.pread(self._fd, length, offset)

    def pwrite(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        os.pwrite(self._fd, data, offset)

    def flush(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the image."""
        os.close(self._fd)


class ByteDisk:
    """Any bytes at any offset of a disk that takes whole sectors; records what it writes if given a file for it."""

    def __init__(self, device: SectorDevice, record: BinaryIO | None = None) -> None:
        """Use `device`; append a `VERSION_DTYPE` entry to `record` for each block of each write."""
        self._device = device
        self._record = record
        self.size_bytes = device.size_bytes

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`."""
        start = offset // SECTOR_SIZE * SECTOR_SIZE
        end = -(-(offset + length) // SECTOR_SIZE) * SECTOR_SIZE
        data = self._device.pread(start, end - start)
        return bytes(data[offset - start : offset - start + length])

    def pwrite(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        unit = BLOCK_SIZE if self._record else SECTOR_SIZE
        start, end = offset // unit * unit, -(-(offset + len(data)) // unit) * unit
        if (start, end) != (offset, offset + len(data)):
            around = self.pread(start, end - start)
            data = around[: offset - start] + data + around[offset - start + len(data) :]
        begun_ns = time.time_ns()
        self._device.pwrite(start, data)
        if self._record:
            self._note(start, data, begun_ns, time.time_ns())

    def flush(self) -> None:
        """Make what was written durable."""
        self._device.flush()

    def _note(self, start: int, data: bytes, begun_ns: int, acked_ns: int) -> None:
        assert self._record is not None
        for at in range(0, len(data), BLOCK_SIZE):
            digest = digest_of(data[at : at + BLOCK_SIZE])
            entry = np.array([((start + at) // BLOCK_SIZE, begun_ns, acked_ns, digest)], VERSION_DTYPE)
            self._record.write(entry.tobytes())


def digest_of(block: bytes | bytearray | memoryview) -> bytes:
    """Return the digest by which the record knows a block's content."""
    return hashlib.blake2b(block, digest_size=16).digest()


class Checked(NamedTuple):
    """How many blocks of an image were compared with the record, and how many were wrong."""

    blocks: int
    wrong: int


class Record:
    """The oracle: every version of every block."""

    def __init__(self, base: Path, versions: Path) -> None:
        """Read the disk as it was at first from the raw image `base`, and the versions noted since."""
        self._base = base.read_bytes()
        entries = np.fromfile(versions, VERSION_DTYPE)
        self._versions: dict[int, list[tuple[int, int, bytes]]] = defaultdict(list)
        for block, begun_ns, acked_ns, digest in entries.tolist():
            self._versions[block].append((acked_ns, begun_ns, bytes(digest)))

    def allowed(self, block: int, at_ns: int) -> set[bytes]:
        """Return the digests that `block` may have at `at_ns`."""
        versions = self._versions.get(block, [])
        place = bisect_right(versions, at_ns, key=lambda version: version[0])
        start = block * BLOCK_SIZE
        before = versions[place - 1][2] if place else digest_of(self._base[start : start + BLOCK_SIZE])
        return {before, *(digest for _, begun_ns, digest in versions[place:] if begun_ns <= at_ns)}

    def check(self, device: Any, at_ns: int) -> Checked:
        """Compare every block of a disk, as it is said to have been at `at_ns`, with the record."""
        wrong = 0
        piece = 1 << 20
        for start in range(0, device.size_bytes, piece):
            data = memoryview(device.pread(start, min(piece, device.size_bytes - start)))
            for at in range(0, len(data), BLOCK_SIZE):
                block = (start + at) // BLOCK_SIZE
                wrong += digest_of(data[at : at + BLOCK_SIZE]) not in self.allowed(block, at_ns)
        return Checked(device.size_bytes // BLOCK_SIZE, wrong)
