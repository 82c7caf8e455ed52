"""Partition tables: MBR with logical partitions, and GPT. Pure functions over the blocks where they lie.

A table is believed only if it is whole: a GPT's header and entries by their checksums (the backup at the end of the
disk is not looked at), an MBR's entries by flags and bounds. Sectors are 512 bytes, or 4096 where a GPT says so by its
place.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple
from zlib import crc32

from dr_cloud.model.analysis import Partition
from dr_cloud.vdsa.analysis.fields import Read, guid_of, text, u32, u64

SECTOR_BYTES: Final = 512
PARTITIONS_MAX: Final = 128
_LOGICAL_MAX: Final = 60
_EXTENDED: Final = (0x05, 0x0F, 0x85)
_PROTECTIVE: Final = 0xEE
MBR_NAMES: Final = {
    0x05: "extended",
    0x0F: "extended",
    0x85: "extended",
    0x07: "NTFS or exFAT",
    0x0B: "FAT32",
    0x0C: "FAT32",
    0x06: "FAT16",
    0x0E: "FAT16",
    0x27: "Windows recovery",
    0x82: "Linux swap",
    0x83: "Linux",
    0x8E: "Linux LVM",
    0xEF: "EFI system",
    0xFD: "Linux RAID",
}
GPT_NAMES: Final = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux file system",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "ca7d7ccb-63ed-4c53-861c-1742536059cc": "Linux LUKS",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "Linux root (ARM 64)",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux extended boot",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "Microsoft LDM metadata",
    "af9b60a0-1431-4f62-bc68-3311714a69ad": "Microsoft LDM data",
}


class Table(NamedTuple):
    """A partition table as it is on a disk."""

    kind: Literal["", "mbr", "gpt"]
    """Empty: there is none."""
    uuid: str
    partitions: list[Partition]


NO_TABLE: Final = Table("", "", [])


def read_table(read: Read, size_bytes: int) -> Table:
    """Return the disk's partition table, or `NO_TABLE`."""
    sector = read(0, SECTOR_BYTES)
    if sector is None or sector[510:512] != b"\x55\xaa":
        return NO_TABLE
    if any(sector[entry + 4] == _PROTECTIVE for entry in range(446, 510, 16)):
        for sector_bytes in (SECTOR_BYTES, 4096):
            table = _gpt(read, sector_bytes, size_bytes)
            if table is not None:
                return table
        return NO_TABLE
    return _mbr(read, sector, size_bytes)


def _gpt(read: Read, sector_bytes: int, size_bytes: int) -> Table | None:
    header = read(sector_bytes, SECTOR_BYTES)
    if header is None or header[:8] != b"EFI PART":
        return None
    header_bytes = u32(header, 12)
    count, entry_bytes = u32(header, 80), u32(header, 84)
    if not 92 <= header_bytes <= SECTOR_BYTES or not 128 <= entry_bytes <= 1024 or not 1 <= count <= 1024:
        return None
    if crc32(header[:16] + bytes(4) + header[20:header_bytes]) != u32(header, 16):
        return None
    entries = read(u64(header, 72) * sector_bytes, count * entry_bytes)
    if entries is None or crc32(entries) != u32(header, 88):
        return None
    partitions = []
    for number in range(1, count + 1):
        entry = entries[(number - 1) * entry_bytes : number * entry_bytes]
        first, last = u64(entry, 32), u64(entry, 40)
        kind = guid_of(entry[:16])
        if not kind or last < first or (last + 1) * sector_bytes > size_bytes:
            continue
        partitions.append(
            Partition(
                number=number,
                start_bytes=first * sector_bytes,
                size_bytes=(last + 1 - first) * sector_bytes,
                type=kind,
                type_name=GPT_NAMES.get(kind, ""),
                name=text(entry[56:128], "utf-16-le"),
                uuid=guid_of(entry[16:32]),
                bootable=bool(entry[48] & 4),
            )
        )
    return Table("gpt", guid_of(header[56:72]), partitions[:PARTITIONS_MAX])


class _Entry(NamedTuple):
    flag: int
    type: int
    first: int
    sectors: int


def _entries(sector: bytes) -> list[_Entry]:
    return [_Entry(sector[at], sector[at + 4], u32(sector, at + 8), u32(sector, at + 12)) for at in range(446, 510, 16)]


def _mbr(read: Read, sector: bytes, size_bytes: int) -> Table:
    entries = _entries(sector)
    used = [entry for entry in entries if entry.type]
    sectors = size_bytes // SECTOR_BYTES
    # A boot sector of a file system ends with the same two bytes, but has program code where the entries are.
    if not used or any(entry.flag not in (0, 0x80) for entry in entries):
        return NO_TABLE
    if any(not entry.first or not entry.sectors or entry.first >= sectors for entry in used):
        return NO_TABLE
    uuid = f"{u32(sector, 440):08x}"
    partitions = [_partition(number, entry, 0, uuid) for number, entry in enumerate(entries, 1) if entry.type]
    for entry in used:
        if entry.type in _EXTENDED:
            partitions += _logical(read, entry, uuid)
            break
    return Table("mbr", uuid, partitions)


def _partition(number: int, entry: _Entry, base: int, uuid: str) -> Partition:
    return Partition(
        number=number,
        start_bytes=(base + entry.first) * SECTOR_BYTES,
        size_bytes=entry.sectors * SECTOR_BYTES,
        type=f"0x{entry.type:02x}",
        type_name=MBR_NAMES.get(entry.type, ""),
        uuid=f"{uuid}-{number:02x}",
        bootable=entry.flag == 0x80,
    )


def _logical(read: Read, extended: _Entry, uuid: str) -> list[Partition]:
    """Follow the chain of sectors that each describe one logical partition and lead to the next."""
    partitions: list[Partition] = []
    at = extended.first
    seen = set()
    while at not in seen and len(partitions) < _LOGICAL_MAX:
        seen.add(at)
        sector = read(at * SECTOR_BYTES, SECTOR_BYTES)
        if sector is None or sector[510:512] != b"\x55\xaa":
            break
        own, following = _entries(sector)[:2]
        if own.type and own.first and own.sectors:
            partitions.append(_partition(5 + len(partitions), own, at, uuid))
        if following.type not in _EXTENDED:
            break
        at = extended.first + following.first
    return partitions
