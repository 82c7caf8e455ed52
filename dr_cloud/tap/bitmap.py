r"""The intent bitmap: which blocks differ, or may differ, between a tap's disks and what is durable at the target.

Purpose
    A file of its own beside the disks, mapped into memory, for each copy that the tap keeps. The bit of a block is set
    before its disk write begins, so that a tap killed at any moment knows afterwards which blocks to send again.

Layout (little-endian; one file per copy; every part begins at a multiple of 4096)::

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
        0    8   last sequence given out      (both are kept in the file of the tap's first copy)
        8    8   last time given out, ns since the epoch
       16    8   1 if closed cleanly, else 0
       24   16   boot id of the host that has it open
       40    8   the greatest sequence that this copy's target has called durable: what cleared bits rest on
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

Several copies
    The first copy's file tells the tap id and the disks' indexes; a file that does not agree with it is not trusted,
    and its target is sent everything again. The file of a copy that is kept no longer is removed before a guest can
    write, for it would lack that guest's bits.

Disks that change while the tap runs
    `prepare` writes a new file beside from the bits of the old, in a thread, while guests write; `switch`, in one step
    of the event loop, adds the pages that they set meanwhile, puts the new file in place by renaming, and goes on in
    it. Killed before that, the old file is whole; after it, the new one. No copy is connected while it happens, so
    only TO_SEND changes. A disk that has grown has its new part set, a shrunk one keeps what is left, a new one is set
    whole; a removed one's index is not given out again.

What is not covered: a disk changed by others while no tap stood in front of it. Delete the files after that.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import uuid
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import structlog

from dr_cloud.model.blocks import BLOCK_SHIFT, blocks_of
from dr_cloud.model.errors import DamagedError, DrCloudError
from dr_cloud.tap.bits import BIT, PAGE_BYTES, PLANES, DiskBits
from dr_cloud.tap.head import (
    Entry,
    Head,
    check_disks,
    file_bytes,
    head_bytes,
    lay_out,
    pack_head,
    parse_head,
    plane_bytes,
)
from dr_cloud.tap.wire import COPIES_MAX

SEQUENCE_MARGIN: Final = 1 << 32
"""Added to the stored sequence on open: more than could have been given out and not have reached the file."""

_HOT_SEQUENCE: Final = 0
_HOT_TIME: Final = 1
_HOT_CLEAN: Final = 2
_HOT_DURABLE: Final = 5
_HOT_BYTES: Final = 48
_HOT_BOOT: Final = slice(24, 40)

_log = structlog.get_logger(__name__)


def boot_id() -> bytes:
    """Return the 16 bytes that the kernel drew when this host started."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def _beside_path(path: Path) -> Path:
    return path.with_name(path.name + ".new")


class _Mapped(NamedTuple):
    """A file in memory."""

    head: Head
    memory: mmap.mmap
    hot: memoryview
    disks: list[DiskBits]


class Beside(NamedTuple):
    """A new file that is not yet in the place of the old one."""

    fd: int
    mapped: _Mapped


def copy_path(path: Path, number: int) -> Path:
    """Return the file of a copy, where `path` is the first one's."""
    return path.with_name(f"{path.name}.{number}") if number else path


def open_bitmaps(
    path: Path, disks: Sequence[tuple[str, int]], copies: int, boot: bytes | None = None
) -> list[IntentBitmap]:
    """Open or make the files of `copies` copies, and remove those of others. See `IntentBitmap`."""
    bitmaps = [IntentBitmap(path, disks, boot)]
    try:
        for number in range(1, copies):
            bitmaps.append(IntentBitmap(copy_path(path, number), disks, boot, like=bitmaps[0]))
        for number in range(copies, COPIES_MAX):
            copy_path(path, number).unlink(missing_ok=True)
    except BaseException:
        for bitmap in bitmaps:
            bitmap.abandon()
        raise
    return bitmaps


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
        self,
        path: Path,
        disks: Sequence[tuple[str, int]],
        boot: bytes | None = None,
        like: IntentBitmap | None = None,
    ) -> None:
        """Open or make the file at `path` for `disks`, each a name and a size in bytes.

        Args:
            path: The file.
            disks: What the tap exports.
            boot: The host's boot id; None reads it.
            like: The file of the tap's first copy, where this is another copy's.

        Raises:
            DrCloudError: Another process has the file open, a name cannot be used, or there is no space for it.
        """
        self.path = path
        self._boot = boot or boot_id()
        self._mapped: _Mapped
        check_disks(disks)
        self._lock = _lock(path)
        try:
            with _told(path):
                old, data, everything = self._read_old(like)
                head = lay_out(disks, old) if like is None else like._mapped.head
                if head != old or everything:
                    os.close(self._write_beside(head, old, data, everything))
                    os.rename(_beside_path(path), path)
                    self.settle()
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                self._mapped = self._map(head, self._fd)
                hot = self._mapped.hot
                hot[_HOT_SEQUENCE] += SEQUENCE_MARGIN if hot[_HOT_SEQUENCE] else 0
                os.fsync(self._fd)
        except BaseException:
            os.close(self._lock)
            raise
        self.tap_id = head.tap_id.hex()
        self.disks = self._mapped.disks

    # Changing disks while guests write.

    def prepare(self, disks: Sequence[tuple[str, int]], anew: Set[str], like: Beside | None = None) -> Beside:
        """Make a new file beside, for other disks. Blocks: call it in a thread, after `begin_move` of every disk.

        Args:
            disks: All disks from now on.
            anew: Names under which there is another disk now, if any.
            like: What `prepare` made for the tap's first copy, where this is another copy's.

        Raises:
            DrCloudError: A name cannot be used, or there is no space.
        """
        check_disks(disks)
        old = self._mapped.head
        head = lay_out(disks, old, anew) if like is None else like.mapped.head
        with _told(self.path):
            fd = self._write_beside(head, old, self._mapped.memory, "")
            try:
                mapped = self._map(head, fd)
                os.fsync(fd)
            except BaseException:
                os.close(fd)
                raise
        return Beside(fd, mapped)

    def switch(self, beside: Beside) -> None:
        """Go on in the new file, with what guests have set since `begin_move`. One step: no guest writes meanwhile."""
        known = {bits.disk.index: bits for bits in self.disks}
        pairs = [(known.get(new.disk.index), new) for new in beside.mapped.disks]
        for bits, new in pairs:
            if bits is not None:
                bits.carry(new)
        for item in (_HOT_SEQUENCE, _HOT_TIME, _HOT_DURABLE):
            beside.mapped.hot[item] = self.hot[item]
        os.rename(_beside_path(self.path), self.path)
        self.disks = [new if bits is None else bits.adopt(new) for bits, new in pairs]
        self._mapped = beside.mapped
        # A flush that a thread has begun keeps its file; the next one gets this.
        os.dup2(beside.fd, self._fd, inheritable=False)
        os.close(beside.fd)

    def give_up(self, beside: Beside | None) -> None:
        """Go on in the old file."""
        for bits in self.disks:
            bits.stay()
        if beside is not None:
            os.close(beside.fd)
        _beside_path(self.path).unlink(missing_ok=True)

    # The file.

    def _read_old(self, like: IntentBitmap | None) -> tuple[Head, bytes, str]:
        """Return the fixed part and bytes of the file that stands, and why everything is dirty (empty if not)."""
        fresh = Head(uuid.uuid4().bytes if like is None else bytes.fromhex(like.tap_id), 0, [])
        try:
            data = self.path.read_bytes()
            old = parse_head(data)
        except FileNotFoundError:
            return fresh, b"", "there was no intent bitmap"
        except (DamagedError, ValueError) as error:
            return fresh, b"", f"the intent bitmap is damaged: {error}"
        if like is not None and old.tap_id != fresh.tap_id:
            return fresh, b"", "the intent bitmap is another tap's"
        hot = head_bytes(len(old.entries))
        clean = memoryview(data)[hot : hot + 24].cast("Q")[_HOT_CLEAN]
        if not clean and data[hot : hot + PAGE_BYTES][_HOT_BOOT] != self._boot:
            return old, data, "this host went down while the tap ran"
        return old, data, ""

    def _bits_for(self, entry: Entry, known: dict[str, Entry], data: bytes | mmap.mmap, everything: str) -> bytes:
        """Return the TO_SEND plane that the disk starts with in a new file."""
        name, size_bytes = entry.disk.name, entry.disk.size_bytes
        old = known.get(name)
        if old is not None and old.disk.index != entry.disk.index:
            old = None
        blocks = blocks_of(size_bytes)
        flags = np.zeros(plane_bytes(size_bytes), np.uint8)
        kept = 0
        why = everything or ("the disk is new" if old is None else "")
        if old is not None and not why:
            # Where the size changes, the block that was or is the partial one changes with it.
            kept = blocks if old.disk.size_bytes == size_bytes else min(old.disk.size_bytes, size_bytes) >> BLOCK_SHIFT
            length = plane_bytes(kept << BLOCK_SHIFT)
            for plane in PLANES:
                flags[:length] |= np.frombuffer(
                    data, np.uint8, length, old.offset + plane * plane_bytes(old.disk.size_bytes)
                )
            flags[(kept + 7) >> 3 :] = 0
            if kept & 7:
                flags[kept >> 3] &= 0xFF >> (8 - (kept & 7))
            if old.disk.size_bytes != size_bytes:
                _log.warning("disk has another size: what is new of it is dirty", disk=name, size_bytes=size_bytes)
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

    def _write_beside(self, head: Head, old: Head, data: bytes | mmap.mmap, everything: str) -> int:
        """Write the file beside and make it durable. Space is reserved: a store to a hole could kill."""
        known = {entry.disk.name: entry for entry in old.entries}
        for gone in known.keys() - {entry.disk.name for entry in head.entries}:
            _log.warning("disk is no longer given to this tap: its intent is forgotten", disk=gone, file=str(self.path))
        fd = os.open(_beside_path(self.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, file_bytes(head))
            os.pwrite(fd, pack_head(head), 0)
            if len(data):
                hot = head_bytes(len(old.entries))
                os.pwrite(fd, data[hot : hot + _HOT_BYTES], head_bytes(len(head.entries)))
            for entry in head.entries:
                os.pwrite(fd, self._bits_for(entry, known, data, everything), entry.offset)
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def settle(self) -> None:
        """Make the renaming durable. Blocks."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _map(self, head: Head, fd: int) -> _Mapped:
        """Map the file and note that it is open."""
        memory = mmap.mmap(fd, 0)
        view = memoryview(memory)
        start = head_bytes(len(head.entries))
        hot = view[start : start + _HOT_BYTES].cast("Q")
        hot[_HOT_CLEAN] = 0
        view[start:][_HOT_BOOT] = self._boot
        disks = []
        for disk, offset in head.entries:
            length = plane_bytes(disk.size_bytes)
            planes = [view[offset + plane * length : offset + (plane + 1) * length] for plane in PLANES]
            disks.append(DiskBits(disk, planes))
        return _Mapped(head, memory, hot, disks)

    @property
    def hot(self) -> memoryview:
        """The items that the owner stores on every write."""
        return self._mapped.hot

    @property
    def sequence(self) -> int:
        """The sequence to go on from."""
        return self.hot[_HOT_SEQUENCE]

    @property
    def time_ns(self) -> int:
        """The time to go on from."""
        return self.hot[_HOT_TIME]

    @property
    def durable(self) -> int:
        """The greatest sequence that the target has called durable; 0 if none."""
        return self.hot[_HOT_DURABLE]

    @durable.setter
    def durable(self, sequence: int) -> None:
        self.hot[_HOT_DURABLE] = sequence

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


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell the user which file it is that cannot be written."""
    try:
        yield
    except OSError as error:
        raise DrCloudError(
            f"the intent bitmap {path} cannot be written: {error.strerror}",
            "Give --state a file on a disk with free space and write permission.",
        ) from error


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
