"""Superblocks of Linux: ext2/3/4, XFS, btrfs, swap, LVM2 and LUKS. Pure functions over the blocks where they lie.

Each takes a reader of one volume (offsets count from its start) and returns None if it is something else.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from dr_cloud.model.analysis import FileSystem
from dr_cloud.vdsa.analysis.fields import Read, text, u16, u32, u64, unix_ns, uuid_of

_EXT_JOURNAL: Final = 0x4
_EXT_ONLY_2: Final = 0x2
"""Incompatible features that ext3 knows: file types; and recovery, meta groups."""
_EXT_3_INCOMPATIBLE: Final = 0x2 | 0x4 | 0x10
_EXT_3_READ_ONLY: Final = 0x1 | 0x2 | 0x4
_EXT_JOURNAL_DEVICE: Final = 0x8
_EXT_64_BIT: Final = 0x80


def ext(read: Read) -> FileSystem | None:
    """Ext2, ext3 or ext4, told apart by their features as blkid does."""
    block = read(1024, 1024)
    if block is None or u16(block, 56) != 0xEF53:
        return None
    shift = u32(block, 24)
    incompatible, read_only = u32(block, 96), u32(block, 100)
    if shift > 6 or not u32(block, 32) or incompatible & _EXT_JOURNAL_DEVICE:
        return None
    kind = "ext4"
    if not incompatible & ~_EXT_3_INCOMPATIBLE and not read_only & ~_EXT_3_READ_ONLY:
        kind = "ext3" if u32(block, 92) & _EXT_JOURNAL else "ext2"
    blocks = u32(block, 4) | (u32(block, 336) << 32 if incompatible & _EXT_64_BIT else 0)
    return FileSystem(
        type=kind,
        version=f"{u32(block, 76)}.{u16(block, 62)}",
        label=text(block[120:136]),
        uuid=uuid_of(block[104:120]),
        size_bytes=blocks << (10 + shift),
        # The fifth byte of each time is at the end of the superblock.
        created_ns=unix_ns(u32(block, 264) | block[0x276] << 32),
        mounted_ns=unix_ns(u32(block, 44) | block[0x275] << 32),
        written_ns=unix_ns(u32(block, 48) | block[0x274] << 32),
        mounted_on=text(block[136:200]),
    )


def xfs(read: Read) -> FileSystem | None:
    """XFS. Its superblock has no times."""
    block = read(0, 512)
    if block is None or block[:4] != b"XFSB":
        return None
    block_bytes = int.from_bytes(block[4:8])
    if block_bytes not in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        return None
    return FileSystem(
        type="xfs",
        version=str(int.from_bytes(block[100:102]) & 15),
        label=text(block[108:120]),
        uuid=uuid_of(block[32:48]),
        size_bytes=int.from_bytes(block[8:16]) * block_bytes,
    )


def btrfs(read: Read) -> FileSystem | None:
    """Btrfs. Its superblock has no times."""
    block = read(0x10000, 4096)
    if block is None or block[64:72] != b"_BHRfS_M":
        return None
    return FileSystem(
        type="btrfs",
        version=f"generation {u64(block, 72)}",
        label=text(block[299:555]),
        uuid=uuid_of(block[32:48]),
        size_bytes=u64(block, 112),
    )


def swap(read: Read) -> FileSystem | None:
    """Swap space; its mark is at the end of the first page, whose size is the machine's."""
    for page_bytes in (4096, 65536):
        mark = read(page_bytes - 10, 10)
        if mark != b"SWAPSPACE2":
            continue
        head = read(1024, 512)
        if head is None:
            return None
        # Written by the machine itself, in its own byte order.
        pages = 1 + (u32(head, 4) if u32(head, 0) == 1 else int.from_bytes(head[4:8]))
        return FileSystem(
            type="swap",
            version="1",
            label=text(head[28:44]),
            uuid=uuid_of(head[12:28]),
            size_bytes=pages * page_bytes,
        )
    return None


def lvm(read: Read) -> FileSystem | None:
    """A physical volume of LVM2; its label is in one of the first four sectors."""
    head = read(0, 2048)
    if head is None:
        return None
    for at in range(0, 2048, 512):
        label = head[at : at + 512]
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001" and u64(label, 8) == at // 512:
            start = u32(label, 20)
            identity = text(label[start : start + 32], "ascii")
            if len(identity) != 32 or not identity.isalnum():
                return None
            cuts = (0, 6, 10, 14, 18, 22, 26, 32)
            parts = [identity[a:b] for a, b in pairwise(cuts)]
            return FileSystem(
                type="LVM2_member", version="LVM2 001", uuid="-".join(parts), size_bytes=u64(label, start + 32)
            )
    return None


def luks(read: Read) -> FileSystem | None:
    """A volume encrypted by LUKS: nothing more of it is seen, and all its writes look random."""
    head = read(0, 512)
    if head is None or head[:6] != b"LUKS\xba\xbe":
        return None
    version = int.from_bytes(head[6:8])
    if version not in (1, 2):
        return None
    return FileSystem(
        type="crypto_LUKS",
        version=str(version),
        label=text(head[24:72]) if version == 2 else "",
        uuid=text(head[168:208], "ascii"),
    )
