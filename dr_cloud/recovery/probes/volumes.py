"""What lies on a stack's disk: the file systems in its partitions or on the whole of it, read over NBD."""

from __future__ import annotations

from typing import NamedTuple

from dr_cloud.nbd.client import NbdClient
from dr_cloud.vdsa.analysis.layout import layout_of


class Volume(NamedTuple):
    """One place of a disk."""

    disk: str
    partition: int
    """Its number; 0 is the whole disk."""
    start_bytes: int
    size_bytes: int
    kind: str
    """Of its file system, in blkid's words: ext4, xfs, vfat, crypto_LUKS, …; empty if it is not known."""

    def __str__(self) -> str:
        return f"{self.kind or 'unknown'} on {self.disk}" + (f" partition {self.partition}" if self.partition else "")


def read_volumes(name: str, client: NbdClient) -> list[Volume]:
    """Return the disk's volumes; one of kind "" if nothing on it is recognised."""
    size = client.size_bytes
    unit = max(client.info.block_size_minimum, 512)

    def read(offset: int, length: int) -> bytes | None:
        if offset < 0 or offset + length > size:
            return None
        first, last = offset // unit * unit, min(-(-(offset + length) // unit) * unit, size)
        return bytes(client.pread(first, last - first)[offset - first : offset - first + length])

    layout = layout_of(read, size)
    if not layout.table.partitions:
        return [Volume(name, 0, 0, size, layout.file_system.type if layout.file_system else "")]
    return [
        Volume(name, part.number, part.start_bytes, part.size_bytes, part.file_system.type if part.file_system else "")
        for part in layout.table.partitions
        if part.type_name != "extended" and part.start_bytes + part.size_bytes <= size
    ]
