"""The layout of one disk: its partition table, and the file system of each partition or of the whole disk."""

from __future__ import annotations

from typing import Final, NamedTuple

from dr_cloud.model.analysis import FileSystem, Partition
from dr_cloud.model.blocks import DISK_SIZE_BYTES_MAX
from dr_cloud.vdsa.analysis import linux, windows
from dr_cloud.vdsa.analysis.fields import Probe, Read
from dr_cloud.vdsa.analysis.kept import Kept
from dr_cloud.vdsa.analysis.partitions import NO_TABLE, Table, read_table

_PROBES: Final = (
    linux.luks,
    linux.xfs,
    linux.lvm,
    linux.ext,
    windows.ntfs,
    windows.exfat,
    windows.fat,
    linux.swap,
    linux.btrfs,
)
"""Formatting wipes what other kinds look for, so the order decides only what is asked for first."""
_WHOLE_DISK_BOOT_SECTORS: Final = (windows.ntfs, windows.exfat, windows.fat)
_LOADERS: Final = (
    (b"GRUB", "GRUB"),
    (b"SYSLINUX", "SYSLINUX"),
    (b"EXTLINUX", "EXTLINUX"),
    (b"LILO", "LILO"),
    (b"Missing operating system", "Windows MBR"),
)
_EFI_TYPES: Final = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef")
_CONTAINERS: Final = ("extended",)


class Layout(NamedTuple):
    """What is known of one disk's layout."""

    table: Table = NO_TABLE
    file_system: FileSystem | None = None
    boot_loader: str = ""


def read_layout(kept: Kept) -> Layout:
    """Read the layout from the blocks kept; what it asks for is wanted from now on."""
    kept.begin()
    layout = layout_of(kept.read, kept.size_bytes)
    kept.end()
    return layout


def layout_of(read: Read, size_bytes: int) -> Layout:
    """Return the layout of a disk of `size_bytes` whose bytes `read` gives."""
    table = read_table(read, size_bytes)
    whole = None
    if table.kind != "gpt":
        probes = _WHOLE_DISK_BOOT_SECTORS if table.kind else _PROBES
        whole = _file_system(read, 0, size_bytes, probes)
        if whole is not None:
            table = NO_TABLE
    partitions = [
        partition
        if partition.type_name in _CONTAINERS
        else partition.model_copy(
            update={"file_system": _file_system(read, partition.start_bytes, partition.size_bytes, _PROBES)}
        )
        for partition in table.partitions
    ]
    return Layout(table._replace(partitions=partitions), whole, _boot_loader(read, partitions))


def _file_system(read: Read, start: int, size_bytes: int, probes: tuple[Probe, ...]) -> FileSystem | None:
    def volume(offset: int, size: int) -> bytes | None:
        return read(start + offset, size) if offset >= 0 and offset + size <= size_bytes else None

    for probe in probes:
        found = probe(volume)
        if found is not None:
            if found.size_bytes is not None and found.size_bytes > DISK_SIZE_BYTES_MAX:
                return found.model_copy(update={"size_bytes": None})
            return found
    return None


def _boot_loader(read: Read, partitions: list[Partition]) -> str:
    code = read(0, 440) or b""
    for mark, name in _LOADERS:
        if mark in code:
            return name
    return "EFI" if any(partition.type in _EFI_TYPES for partition in partitions) else ""
