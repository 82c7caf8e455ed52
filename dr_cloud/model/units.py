"""Times, durations and sizes as people write them: RFC 3339 to the nanosecond; 30s, 2h; KiB, MiB, GiB, TiB."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from dr_cloud.model.errors import DrCloudError

SECOND_NS: Final = 1_000_000_000
TIME_NS_MAX: Final = (1 << 63) - 1
"""What every format and database can hold: in the year 2262."""

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)")
_SIZE = re.compile(r"(\d+)\s*(|B|KiB|MiB|GiB|TiB)")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)|0")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_UNITS: Final = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_time(text: str) -> int:
    """Return nanoseconds since the epoch for an RFC 3339 time with a zone, e.g. `2026-03-01T12:00:00.25Z`."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise DrCloudError(f"{text!r} is not a time", "Write RFC 3339 with a zone, like 2026-03-01T12:00:00.25Z.")
    day, clock, fraction, zone = match.groups()
    try:
        whole = datetime.fromisoformat(f"{day}T{clock}{'+00:00' if zone in 'Zz' else zone}")
    except ValueError as error:
        raise DrCloudError(f"{text!r} is not a time: {error}", "Check the day, the hour and the zone.") from error
    return int(whole.timestamp()) * SECOND_NS + int((fraction or "").ljust(9, "0"))


def format_time(time_ns: int) -> str:
    """Return `time_ns` as RFC 3339 in UTC with nine digits of fraction."""
    seconds, fraction = divmod(time_ns, SECOND_NS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def parse_duration(text: str) -> float:
    """Return seconds for `30s`, `10m`, `2h`, `1d`, `4w`, `0.5s`; and for `0`."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise DrCloudError(f"{text!r} is not a duration", "Write a number with s, m, h, d or w, like 10m.")
    return float(match[1]) * _SECONDS[match[2]] if match[1] else 0.0


def parse_size(text: str) -> int:
    """Return bytes for `512`, `64KiB`, `20 MiB`, `1GiB`, `2TiB`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise DrCloudError(f"{text!r} is not a size", "Write a whole number with KiB, MiB, GiB or TiB, like 20GiB.")
    return int(match[1]) * _UNITS[match[2]]


def format_size(size_bytes: float) -> str:
    """Return a size for people: `4.0 KiB`, `1.5 GiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
