"""Volumes of Windows: FAT, exFAT, NTFS, BitLocker. Pure functions over the blocks where they lie.

Each takes a reader of one volume (offsets count from its start) and returns None if it is something else.
The labels are not in the boot sector but in the root folder (FAT, exFAT) or in the file $Volume (NTFS), so that these
are read too: the root folder's first `_ROOT_BYTES`, and one record of the master file table.
"""

from __future__ import annotations

from typing import Final

from dr_cloud.model.analysis import FileSystem
from dr_cloud.vdsa.analysis.fields import Read, dos_time_ns, filetime_ns, text, u16, u32, u64

_ROOT_BYTES: Final = 4096
_JUMPS: Final = (0xEB, 0xE9)


def _power_of_two(number: int, low: int, high: int) -> bool:
    return low <= number <= high and number & (number - 1) == 0


def fat(read: Read) -> FileSystem | None:
    """FAT12, FAT16 or FAT32, told apart by the number of clusters."""
    boot = read(0, 512)
    if boot is None or boot[510:512] != b"\x55\xaa" or boot[0] not in _JUMPS:
        return None
    sector_bytes, cluster_sectors, reserved, fats = u16(boot, 11), boot[13], u16(boot, 14), boot[16]
    if not _power_of_two(sector_bytes, 512, 4096) or not _power_of_two(cluster_sectors, 1, 128):
        return None
    if not reserved or fats not in (1, 2) or not (boot[21] == 0xF0 or boot[21] >= 0xF8):
        return None
    sectors = u16(boot, 19) or u32(boot, 32)
    fat_sectors = u16(boot, 22) or u32(boot, 36)
    root_entries = u16(boot, 17)
    root_sectors = (root_entries * 32 + sector_bytes - 1) // sector_bytes
    data = reserved + fats * fat_sectors
    clusters = (sectors - data - root_sectors) // cluster_sectors
    if not fat_sectors or clusters <= 0:
        return None
    big = not u16(boot, 22)
    if big:
        root = data + (u32(boot, 44) - 2) * cluster_sectors
        root_bytes = min(_ROOT_BYTES, cluster_sectors * sector_bytes)
    else:
        root, root_bytes = data, min(_ROOT_BYTES, root_sectors * sector_bytes)
    signature, serial, own = (66, 67, 71) if big else (38, 39, 43)
    label, created_ns = _fat_label(read(root * sector_bytes, root_bytes) or b"")
    if not label and boot[signature] == 0x29 and boot[own : own + 11] != b"NO NAME    ":
        label = text(boot[own : own + 11], "cp437")
    number = u32(boot, serial)
    return FileSystem(
        type="vfat",
        version="FAT32" if big else "FAT16" if clusters >= 4085 else "FAT12",
        label=label,
        uuid=f"{number >> 16:04X}-{number & 0xFFFF:04X}" if boot[signature] in (0x28, 0x29) else "",
        size_bytes=sectors * sector_bytes,
        created_ns=created_ns,
    )


def _fat_label(root: bytes) -> tuple[str, int | None]:
    """Return the label of the root folder's volume entry, and when that was written."""
    for at in range(0, len(root) - 31, 32):
        entry = root[at : at + 32]
        if not entry[0]:
            break
        # A long file name's part has the volume's bit set as well.
        if entry[0] != 0xE5 and entry[11] & 0x0F != 0x0F and entry[11] & 0x18 == 0x08:
            return text(entry[:11], "cp437"), dos_time_ns(u16(entry, 24), u16(entry, 22))
    return "", None


def exfat(read: Read) -> FileSystem | None:
    """ExFAT. It tells no times."""
    boot = read(0, 512)
    if boot is None or boot[3:11] != b"EXFAT   " or boot[510:512] != b"\x55\xaa":
        return None
    sector_shift, cluster_shift = boot[108], boot[109]
    if not 9 <= sector_shift <= 12 or sector_shift + cluster_shift > 25:
        return None
    heap, root_cluster = u32(boot, 88), u32(boot, 96)
    root = (heap + ((root_cluster - 2) << cluster_shift)) << sector_shift
    label = ""
    entries = read(root, min(_ROOT_BYTES, 1 << sector_shift + cluster_shift)) or b""
    for at in range(0, len(entries) - 31, 32):
        if not entries[at]:
            break
        if entries[at] == 0x83:
            label = text(entries[at + 2 : at + 2 + 2 * min(entries[at + 1], 11)], "utf-16-le")
            break
    number = u32(boot, 100)
    return FileSystem(
        type="exfat",
        version=f"{boot[105]}.{boot[104]}",
        label=label,
        uuid=f"{number >> 16:04X}-{number & 0xFFFF:04X}",
        size_bytes=u64(boot, 72) << sector_shift,
    )


def ntfs(read: Read) -> FileSystem | None:
    """NTFS, or a volume that BitLocker has encrypted."""
    boot = read(0, 512)
    if boot is None or boot[510:512] != b"\x55\xaa":
        return None
    if boot[3:11] == b"-FVE-FS-":
        return FileSystem(type="BitLocker")
    sector_bytes = u16(boot, 11)
    if boot[3:11] != b"NTFS    " or not _power_of_two(sector_bytes, 256, 4096):
        return None
    # Above 128 it is a negative power of two.
    cluster_sectors = boot[13] if boot[13] <= 128 else 1 << min(256 - boot[13], 16)
    cluster_bytes = cluster_sectors * sector_bytes
    record_bytes = boot[64] * cluster_bytes if boot[64] < 128 else 1 << min(256 - boot[64], 16)
    if not cluster_bytes or not 256 <= record_bytes <= 65536:
        return None
    record = read(u64(boot, 48) * cluster_bytes + 3 * record_bytes, record_bytes)
    label, version, created_ns = _ntfs_volume(record, sector_bytes) if record is not None else ("", "", None)
    return FileSystem(
        type="ntfs",
        version=version,
        label=label,
        uuid=f"{u64(boot, 72):016X}",
        size_bytes=u64(boot, 40) * sector_bytes,
        created_ns=created_ns,
    )


def _ntfs_volume(record: bytes, sector_bytes: int) -> tuple[str, str, int | None]:
    """Return label, version and creation time from the file record of $Volume."""
    label, version, created_ns = "", "", None
    if record[:4] != b"FILE":
        return label, version, created_ns
    fixed = bytearray(record)
    array, count = u16(record, 4), u16(record, 6)
    for number in range(1, count):
        # The last two bytes of each sector were put aside and replaced by a mark.
        at, saved = number * sector_bytes - 2, array + 2 * number
        if at + 2 <= len(record) and saved + 2 <= len(record):
            fixed[at : at + 2] = record[saved : saved + 2]
    record = bytes(fixed)
    at = u16(record, 20)
    while at + 24 <= len(record):
        kind, size = u32(record, at), u32(record, at + 4)
        if kind == 0xFFFF_FFFF or size < 24 or at + size > len(record):
            break
        # A resident attribute's value: its length and where it is.
        value_at = at + u16(record, at + 20)
        value = record[value_at : min(value_at + u32(record, at + 16), at + size)] if not record[at + 8] else b""
        if kind == 0x10:
            created_ns = filetime_ns(u64(value, 0))
        elif kind == 0x60:
            label = text(value, "utf-16-le")
        elif kind == 0x70 and len(value) >= 10:
            version = f"{value[8]}.{value[9]}"
        at += size
    return label, version, created_ns
