"""Reading fields of on-disk structures. Whatever the bytes are, nothing here raises; text is made fit to be shown."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from dr_cloud.model.analysis import FileSystem
from dr_cloud.model.units import SECOND_NS

_SECONDS_MAX: Final = 1 << 33
"""So that a time in nanoseconds fits into 63 bits."""
Read = Callable[[int, int], bytes | None]
"""(offset, size) → bytes, or None where they are not known. `size` bytes, never fewer."""
Probe = Callable[[Read], FileSystem | None]
"""Takes the reader of one volume; returns what lies there if it is of the probe's kind."""


def u16(data: bytes, offset: int) -> int:
    """Return the little-endian u16 at `offset`."""
    return int.from_bytes(data[offset : offset + 2], "little")


def u32(data: bytes, offset: int) -> int:
    """Return the little-endian u32 at `offset`."""
    return int.from_bytes(data[offset : offset + 4], "little")


def u64(data: bytes, offset: int) -> int:
    """Return the little-endian u64 at `offset`."""
    return int.from_bytes(data[offset : offset + 8], "little")


def text(raw: bytes, encoding: str = "utf-8") -> str:
    """Return a guest's text up to its first NUL; what cannot be shown becomes the replacement character."""
    decoded = raw.decode(encoding, errors="replace").split("\0", 1)[0].strip()
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in decoded)


def uuid_of(raw: bytes) -> str:
    """Return 16 bytes as a UUID; the empty string if they are all zero."""
    return str(uuid.UUID(bytes=raw)) if len(raw) == 16 and any(raw) else ""


def guid_of(raw: bytes) -> str:
    """Return 16 bytes as a GUID, whose first three fields are little-endian."""
    return str(uuid.UUID(bytes_le=raw)) if len(raw) == 16 and any(raw) else ""


def unix_ns(seconds: int) -> int | None:
    """Return a superblock's time in nanoseconds; None if it was never set."""
    return seconds * SECOND_NS if 0 < seconds < _SECONDS_MAX else None


def filetime_ns(ticks: int) -> int | None:
    """Return a Windows time (100 ns since 1601) in nanoseconds since 1970; None if it is before that."""
    ns = (ticks - 116_444_736_000_000_000) * 100
    return ns if 0 < ns < _SECONDS_MAX * SECOND_NS else None


def dos_time_ns(date: int, time: int) -> int | None:
    """Return a FAT time (taken for UTC) in nanoseconds; None if it is none."""
    try:
        moment = datetime(
            1980 + (date >> 9), date >> 5 & 15, date & 31, time >> 11, time >> 5 & 63, (time & 31) * 2, tzinfo=UTC
        )
    except ValueError:
        return None
    return int(moment.timestamp()) * SECOND_NS
