"""The fixed part of an intent bitmap's file: which tap, which disks, and where their planes lie.

The layout is told in `dr_cloud.tap.bitmap`. Here it is packed, parsed and made for a list of disks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence, Set
from typing import Final, NamedTuple

import google_crc32c

from dr_cloud.model.blocks import DISK_INDEX_MAX, DISK_SIZE_BYTES_MAX, blocks_of
from dr_cloud.model.errors import DamagedError, DrCloudError
from dr_cloud.model.ids import check_name
from dr_cloud.model.journal import Disk
from dr_cloud.tap.bits import PAGE_BYTES, PLANES

MAGIC: Final = b"DRCTAP\r\n"
VERSION: Final = 1

_FIXED: Final = struct.Struct("<8sII16sII")
_ENTRY: Final = struct.Struct("<IIQQ64s")
_CRC: Final = struct.Struct("<I")


class Entry(NamedTuple):
    """One disk, and the offset of its planes."""

    disk: Disk
    offset: int


class Head(NamedTuple):
    """What the fixed part says."""

    tap_id: bytes
    next_index: int
    entries: list[Entry]


def plane_bytes(size_bytes: int) -> int:
    """Return the length of one plane of a disk."""
    return _round_up((blocks_of(size_bytes) + 7) >> 3)


def _round_up(length: int) -> int:
    return (length + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def head_bytes(disks: int) -> int:
    """Return the length of the fixed part for so many disks; the hot page begins there."""
    return _round_up(_FIXED.size + disks * _ENTRY.size + _CRC.size)


def lay_out(disks: Sequence[tuple[str, int]], known: Head, anew: Set[str] = frozenset()) -> Head:
    """Return the fixed part of a file for `disks`, each a name and a size in bytes.

    Disks in `known` keep their indexes, unless their name is in `anew`. Others get indexes that were never given out.
    Raises `DrCloudError` if there is none left.
    """
    indexes = {entry.disk.name: entry.disk.index for entry in known.entries if entry.disk.name not in anew}
    next_index = known.next_index
    entries = []
    offset = head_bytes(len(disks)) + PAGE_BYTES
    for name, size_bytes in disks:
        index = indexes.get(name, next_index)
        next_index += name not in indexes
        if index > DISK_INDEX_MAX:
            raise DrCloudError(f"disk {name} would have an index over {DISK_INDEX_MAX}", "Begin with a new --state.")
        entries.append(Entry(Disk(index=index, name=name, size_bytes=size_bytes), offset))
        offset += len(PLANES) * plane_bytes(size_bytes)
    return Head(known.tap_id, next_index, entries)


def file_bytes(head: Head) -> int:
    """Return the length of the whole file."""
    planes = sum(len(PLANES) * plane_bytes(entry.disk.size_bytes) for entry in head.entries)
    return head_bytes(len(head.entries)) + PAGE_BYTES + planes


def pack_head(head: Head) -> bytes:
    """Return the fixed part."""
    parts = [_FIXED.pack(MAGIC, VERSION, len(head.entries), head.tap_id, head.next_index, 0)]
    parts += [_ENTRY.pack(disk.index, 0, disk.size_bytes, offset, disk.name.encode()) for disk, offset in head.entries]
    body = b"".join(parts)
    return body + _CRC.pack(google_crc32c.value(body))


def parse_head(data: bytes) -> Head:
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
        if offset + len(PLANES) * plane_bytes(size_bytes) > len(data):
            raise DamagedError("it is shorter than its head says")
        entries.append(Entry(Disk(index=index, name=name.rstrip(b"\0").decode(), size_bytes=size_bytes), offset))
    return Head(tap_id, next_index, entries)


def check_disks(disks: Sequence[tuple[str, int]]) -> None:
    """Raise `DrCloudError` if a name or a size cannot be used."""
    for name, size_bytes in disks:
        check_name(name, "disk")
        if not 0 < size_bytes <= DISK_SIZE_BYTES_MAX:
            raise DrCloudError(f"disk {name} has {size_bytes} bytes", "Give a disk of 1 byte to 1 PiB.")
    if len({name for name, _ in disks}) != len(disks):
        raise DrCloudError("two disks have the same name", "Give every disk a name of its own.")
