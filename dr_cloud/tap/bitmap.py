r"""The intent bitmap: which blocks differ, or may differ, between a tap's disks and what is durable at the target.

Purpose
    A file of its own beside the disks, mapped into memory. The bit of a block is set before its disk write begins, so
    that a tap killed at any moment knows afterwards which blocks to send again.

Layout (little-endian; one file per tap; every part begins at a multiple of 4096)::

    fixed part, written once, never in place
        0    8   magic "DRCTAP\r\n"
        8    4   version (1)
       12    4   count of disks
       16   16   tap id, random
       32    4   next disk index (an index is never given to another disk)
       36    4   reserved, 0
       40   88 each, disks: index u32, reserved u32, size_bytes u64, offset of its planes u64, name 64 (UTF-8, 0-padded)
        …    4   crc32c of all of the above
    hot page, changed in place on every write
        0    8   last sequence given out
        8    8   last time given out, ns since the epoch
       16    8   1 if closed cleanly, else 0
       24   16   boot id of the host that has it open
    planes of each disk: TO_SEND, EPOCH_A, EPOCH_B; one bit per 4 KiB block, bit b of byte i is block 8 i + b

    Version 1: first release.

Planes
    TO_SEND holds blocks whose copy was never handed over (no VDSA, queue dropped): a synchronisation sends them, and
    a bit goes out when the target said that the block sent is durable. EPOCH_A and EPOCH_B take turns: guest writes
    whose copy is queued set their bit in the active one; when everything up to the last sequence of the closed one is
    durable, that one is cleared whole and the two change roles.

Crash points (the set bits are the union of the three planes)
    before a bit is set           nothing happened yet
    bit set, disk not written     the block is sent again as it was: harmless
    disk written, no copy sent    the bit is set: sent again
    while planes are merged       TO_SEND gets the bits first; the epochs are cleared only after TO_SEND was flushed
    while an epoch is cleared     every bit in it is durable; a half-cleared one sends too much
    tap killed                    the page cache keeps every store; sequence and time go on where they stood
    host lost (other boot id)     a write that was never flushed may have reached the disk ahead of its bit, so the set
                                  bits are not enough: everything is sent again, and said so in the log. The flush with
                                  the guest's flush keeps sequence and time from going back.
    while the file is made        it is written beside, flushed, then renamed: old or new, never half
    file damaged or missing       everything is sent again, under a new tap id if the old one cannot be read

What is not covered: a disk changed by others while no tap stood in front of it. Delete the file after that.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c
import numpy as np
import structlog

from dr_cloud.model.blocks import BLOCK_SHIFT, DISK_INDEX_MAX, DISK_SIZE_BYTES_MAX, blocks_of
from dr_cloud.model.errors import DamagedError, DrCloudError
from dr_cloud.model.ids import check_name
from dr_cloud.model.journal import Disk
from dr_cloud.tap.bits import BIT, PAGE_BYTES, PLANES, DiskBits

MAGIC: Final = b"DRCTAP\r\n"
VERSION: Final = 1
SEQUENCE_MARGIN: Final = 1 << 32
"""Added to the stored sequence on open: more than could have been given out and not have reached the file."""

_FIXED: Final = struct.Struct("<8sII16sII")
_ENTRY: Final = struct.Struct("<IIQQ64s")
_CRC: Final = struct.Struct("<I")
_HOT_SEQUENCE: Final = 0
_HOT_TIME: Final = 1
_HOT_CLEAN: Final = 2
_HOT_BOOT: Final = slice(24, 40)

_log = structlog.get_logger(__name__)


def boot_id() -> bytes:
    """Return the 16 bytes that the kernel drew when this host started."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


class _Entry(NamedTuple):
    disk: Disk
    offset: int


class _Fixed(NamedTuple):
    tap_id: bytes
    next_index: int
    entries: list[_Entry]


def _plane_bytes(size_bytes: int) -> int:
    return _round_up((blocks_of(size_bytes) + 7) >> 3)


def _round_up(length: int) -> int:
    return (length + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def _fixed_bytes(disks: int) -> int:
    return _round_up(_FIXED.size + disks * _ENTRY.size + _CRC.size)


def _pack_fixed(fixed: _Fixed) -> bytes:
    parts = [_FIXED.pack(MAGIC, VERSION, len(fixed.entries), fixed.tap_id, fixed.next_index, 0)]
    parts += [_ENTRY.pack(disk.index, 0, disk.size_bytes, offset, disk.name.encode()) for disk, offset in fixed.entries]
    body = b"".join(parts)
    return body + _CRC.pack(google_crc32c.value(body))


def _parse_fixed(data: bytes) -> _Fixed:
    """Return the fixed part at the start of `data`, the whole file. Raises `DamagedError`."""
    if len(data) < PAGE_BYTES:
        raise DamagedError("it is shorter than its head")
    magic, version, count, tap_id, next_index, _ = _FIXED.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise DamagedError("it is not an intent bitmap of version 1")
    end = _FIXED.size + count * _ENTRY.size
    if end + _CRC.size > len(data) or _CRC.unpack_from(data, end)[0] != google_crc32c.value(data[:end]):
        raise DamagedError("the checksum of its head is wrong")
    entries = []
    for place in range(count):
        index, _, size_bytes, offset, name = _ENTRY.unpack_from(data, _FIXED.size + place * _ENTRY.size)
        if offset + len(PLANES) * _plane_bytes(size_bytes) > len(data):
            raise DamagedError("it is shorter than its head says")
        entries.append(_Entry(Disk(index=index, name=name.rstrip(b"\0").decode(), size_bytes=size_bytes), offset))
    return _Fixed(tap_id, next_index, entries)


class IntentBitmap:
    """The file, opened. One process at a time has it (a lock sees to that).

    Attributes:
        tap_id: 32 hexadecimal digits.
        disks: The planes of each disk, in the order in which the disks were given.
        sequence: The last sequence that may have been given out, with a margin. Stored by `hot`, not here.
        time_ns: The last time that may have been given out.
        hot: Item 0 is the sequence, item 1 the time; the owner stores both on every write.
    """

    def __init__(
        self, path: Path, disks: Sequence[tuple[str, int]], boot: bytes | None = None, first_index: int = 0
    ) -> None:
        """Open or make the file at `path` for `disks`, each a name and a size in bytes.

        Args:
            path: The file.
            disks: What the tap exports.
            boot: The host's boot id; None reads it.
            first_index: New disks get indexes from here on, so that the taps of one VPG share none. Disks that the
                file knows keep theirs.

        Raises:
            DrCloudError: Another process has the file open, a name cannot be used, or there is no space for it.
        """
        self.path = path
        boot = boot or boot_id()
        for name, size_bytes in disks:
            check_name(name, "disk")
            if not 0 < size_bytes <= DISK_SIZE_BYTES_MAX:
                raise DrCloudError(f"disk {name} has {size_bytes} bytes", "Give a disk of 1 byte to 1 PiB.")
        if len({name for name, _ in disks}) != len(disks):
            raise DrCloudError("two disks have the same name", "Give every disk a name of its own.")
        self._lock = _lock(path)
        try:
            fixed = self._prepare(disks, boot, first_index)
            self._map(fixed, boot)
        except OSError as error:
            os.close(self._lock)
            raise DrCloudError(
                f"the intent bitmap {path} cannot be written: {error.strerror}",
                "Give --state a file on a disk with free space and write permission.",
            ) from error
        except BaseException:
            os.close(self._lock)
            raise

    def _prepare(self, disks: Sequence[tuple[str, int]], boot: bytes, first_index: int) -> _Fixed:
        """Bring the file into the form that `disks` need, and return its fixed part."""
        old, data, everything = self._read_old(boot)
        known = {entry.disk.name: entry for entry in old.entries}
        next_index = max(old.next_index, first_index)
        wanted = []
        offset = _fixed_bytes(len(disks)) + PAGE_BYTES
        for name, size_bytes in disks:
            entry = known.get(name)
            index = entry.disk.index if entry else next_index
            next_index += entry is None
            if index > DISK_INDEX_MAX:
                raise DrCloudError(
                    f"disk {name} would have an index over {DISK_INDEX_MAX}", "Give a smaller one first."
                )
            wanted.append(_Entry(Disk(index=index, name=name, size_bytes=size_bytes), offset))
            offset += len(PLANES) * _plane_bytes(size_bytes)
        if wanted == old.entries and not everything:
            return old
        for gone in known.keys() - {name for name, _ in disks}:
            _log.warning("disk is no longer given to this tap: its intent is forgotten", disk=gone, file=str(self.path))
        fixed = _Fixed(old.tap_id, next_index, wanted)
        self._write_new(fixed, offset, [self._bits_for(entry, known, data, everything) for entry in wanted], data)
        return fixed

    def _read_old(self, boot: bytes) -> tuple[_Fixed, bytes, str]:
        """Return the fixed part and bytes of the file that stands, and why everything is dirty (empty if not)."""
        fresh = _Fixed(uuid.uuid4().bytes, 0, [])
        try:
            data = self.path.read_bytes()
            fixed = _parse_fixed(data)
        except FileNotFoundError:
            return fresh, b"", "there was no intent bitmap"
        except (DamagedError, ValueError) as error:
            return fresh, b"", f"the intent bitmap is damaged: {error}"
        hot = _fixed_bytes(len(fixed.entries))
        clean = memoryview(data)[hot : hot + 24].cast("Q")[_HOT_CLEAN]
        if not clean and data[hot : hot + PAGE_BYTES][_HOT_BOOT] != boot:
            return fixed, data, "this host went down while the tap ran"
        return fixed, data, ""

    def _bits_for(self, entry: _Entry, known: dict[str, _Entry], data: bytes, everything: str) -> bytes:
        """Return the TO_SEND plane that the disk starts with in a new file."""
        name, size_bytes = entry.disk.name, entry.disk.size_bytes
        old = known.get(name)
        blocks = blocks_of(size_bytes)
        flags = np.zeros(_plane_bytes(size_bytes), np.uint8)
        kept = 0
        why = everything or ("the disk is new" if old is None else "")
        if old is not None and not why:
            if old.disk.size_bytes > size_bytes:
                why = f"the disk has shrunk from {old.disk.size_bytes} to {size_bytes} bytes"
            else:
                kept = blocks if old.disk.size_bytes == size_bytes else old.disk.size_bytes >> BLOCK_SHIFT
                length = _plane_bytes(old.disk.size_bytes)
                for plane in PLANES:
                    flags[:length] |= np.frombuffer(data, np.uint8, length, old.offset + plane * length)
                if kept < blocks:
                    _log.warning("disk has grown: the new part is dirty", disk=name, size_bytes=size_bytes)
        if why:
            _log.warning("every block of the disk is dirty and will be sent", disk=name, why=why, file=str(self.path))
        start = (kept + 7) >> 3
        for block in range(kept, min(start * 8, blocks)):
            flags[block >> 3] |= BIT[block & 7]
        if start * 8 < blocks:
            flags[start : blocks >> 3] = 0xFF
            for block in range(max(start * 8, blocks & ~7), blocks):
                flags[block >> 3] |= BIT[block & 7]
        return flags.tobytes()

    def _write_new(self, fixed: _Fixed, size_bytes: int, planes: list[bytes], old: bytes) -> None:
        """Write the file beside, make it durable, rename it. Space is reserved: a store to a hole could kill."""
        beside = self.path.with_name(self.path.name + ".new")
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            os.pwrite(fd, _pack_fixed(fixed), 0)
            if old:
                hot = _fixed_bytes(_FIXED.unpack_from(old)[2])
                os.pwrite(fd, old[hot : hot + 16], _fixed_bytes(len(fixed.entries)))
            for (_, offset), plane in zip(fixed.entries, planes, strict=True):
                os.pwrite(fd, plane, offset)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _map(self, fixed: _Fixed, boot: bytes) -> None:
        self._fd = os.open(self.path, os.O_RDWR)
        self._map_ = mmap.mmap(self._fd, 0)
        view = memoryview(self._map_)
        start = _fixed_bytes(len(fixed.entries))
        self.tap_id = fixed.tap_id.hex()
        self.hot = view[start : start + 24].cast("Q")
        self.hot[_HOT_SEQUENCE] += SEQUENCE_MARGIN if self.hot[_HOT_SEQUENCE] else 0
        self.hot[_HOT_CLEAN] = 0
        view[start:][_HOT_BOOT] = boot
        self.disks = []
        for disk, offset in fixed.entries:
            length = _plane_bytes(disk.size_bytes)
            planes = [view[offset + plane * length : offset + (plane + 1) * length] for plane in PLANES]
            self.disks.append(DiskBits(disk, planes))
        os.fsync(self._fd)

    @property
    def sequence(self) -> int:
        """The sequence to go on from."""
        return self.hot[_HOT_SEQUENCE]

    @property
    def time_ns(self) -> int:
        """The time to go on from."""
        return self.hot[_HOT_TIME]

    @property
    def dirty(self) -> bool:
        """Whether any bit is set."""
        return any(pages for bits in self.disks for pages in bits.touched)

    def dirty_blocks(self) -> int:
        """Return how many blocks of all disks have a bit set."""
        return sum(bits.dirty_blocks() for bits in self.disks)

    def flush(self) -> None:
        """Make every bit set so far durable. Blocks: call it in a thread.

        fdatasync of the file writes a shared mapping's changed pages too, and, other than `mmap.flush`, lets other
        threads run meanwhile.
        """
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Flush, note that it was closed cleanly, and let go of the file."""
        self.flush()
        self.hot[_HOT_CLEAN] = 1
        self.flush()
        self.abandon()

    def abandon(self) -> None:
        """Let go of the file as a killed process would."""
        os.close(self._fd)
        os.close(self._lock)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock beside `path` (the file itself is replaced by renaming)."""
    try:
        fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DrCloudError(
            f"the intent bitmap {path} cannot be made: {error.strerror}", "Give --state a file in a folder that exists."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise DrCloudError(
            f"another tap has the intent bitmap {path} open", "Stop it, or give this one a --state of its own."
        ) from None
    return fd
