"""What the analyzer tells of a virtual server: its disks' layout, its system, its activity, and what looks suspicious.

All of it is inferred from the writes that pass by (`dr_cloud.vdsa.analysis`); the guest and its disks are never asked.
So a fact that is not here was not seen, and reads are not known at all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SuspicionReason = Literal["encrypted in place", "entropy", "change rate"]
"""`encrypted in place`: data that looks random replaces data that did not. `entropy`: far more of such data than is
usual, on ground that was free or not known. `change rate`: far more is written than is usual."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileSystem(_Record):
    """What lies in a partition or on a whole disk. Times are nanoseconds since the epoch; None: its kind tells none."""

    type: str
    """In blkid's words: ext2, ext3, ext4, xfs, btrfs, vfat, exfat, ntfs, swap, LVM2_member, crypto_LUKS, BitLocker."""
    version: str = ""
    label: str = ""
    uuid: str = ""
    size_bytes: int | None = None
    created_ns: int | None = None
    mounted_ns: int | None = None
    """Last mount."""
    written_ns: int | None = None
    """Last write of its superblock, by its own clock."""
    mounted_on: str = ""
    """Where it was last mounted."""


class Partition(_Record):
    """One entry of a partition table."""

    number: int
    start_bytes: int
    size_bytes: int
    type: str
    """MBR: `0x83`; GPT: the type's UUID."""
    type_name: str = ""
    name: str = ""
    uuid: str = ""
    bootable: bool = False
    file_system: FileSystem | None = None


class SeenRange(_Record):
    """A range of a disk and how much of the disk's recent writes went there."""

    start_bytes: int
    size_bytes: int
    share: float = Field(ge=0, le=1)


class DiskAnalysis(_Record):
    """One disk of the server."""

    index: int
    name: str
    size_bytes: int
    table: Literal["", "mbr", "gpt"] = ""
    """Empty: none was seen."""
    table_uuid: str = ""
    partitions: list[Partition] = []
    file_system: FileSystem | None = None
    """Of a disk without partitions."""
    boot_loader: str = ""
    hot: list[SeenRange] = []
    """The busiest ranges of the last hours, busiest first."""
    bytes_written: int = 0
    last_write_ns: int | None = None


class OperatingSystem(_Record):
    """What was seen of the operating system. Empty: nothing yet."""

    family: Literal["", "linux", "windows"] = ""
    name: str = ""
    """For people: `Debian GNU/Linux 12 (bookworm)`."""
    id: str = ""
    """os-release's ID."""
    version: str = ""
    kernel: str = ""
    evidence: list[str] = []


class Period(_Record):
    """A few minutes of a server's life."""

    since_ns: int
    seconds: float
    """Of those minutes that were seen."""
    writes: int
    bytes_raw: int
    sealed_ratio: float | None
    """Sealed bytes per written byte, of the server's whole VPG; None: nothing was sealed."""
    entropy_bits: float | None
    """Mean Shannon entropy of the sampled blocks, bits per byte; None: nothing was sampled."""
    random_share: float | None
    """Share of the sampled blocks that look encrypted or compressed."""


class Activity(_Record):
    """How much the server writes. Reads do not pass by."""

    writes_per_second: float
    """Over the last period."""
    bytes_per_second: float
    busy_hours: list[int] = []
    """Hours of the day (UTC) that saw at least twice the mean."""
    quiet: bool
    """Hardly any writes in the time seen: a server that mostly reads, or rests."""
    periods: list[Period] = []
    """The last day, oldest first."""


class Suspicion(_Record):
    """Checkpoints with `since_ns` < time ≤ `until_ns` hold something suspicious; that at `since_ns` does not yet."""

    since_ns: int
    until_ns: int
    """Grows while it goes on."""
    reason: SuspicionReason
    strength: float = Field(ge=0, le=1)
    """From 0.5: most likely an attack, look at once. Below: unusual."""
    ended: bool = False
    detail: str = ""


class ServerAnalysis(_Record):
    """The report of one virtual server."""

    server: str
    since_ns: int | None
    """The first write seen; None: none yet."""
    until_ns: int | None
    disks: list[DiskAnalysis] = []
    system: OperatingSystem = OperatingSystem()
    activity: Activity
    suspicions: list[Suspicion] = []
    """Newest last."""
    problem: str = ""
    """Why the analysis is not going on, where it is not."""
