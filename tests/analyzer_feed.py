"""Gives a disk image to an analyzer as a tap's synchronisation would: written ranges in pieces, zeroes left out."""

from __future__ import annotations

import os
from pathlib import Path

from dr_cloud.model.journal import Disk
from dr_cloud.vdsa.analysis.server import ServerAnalyzer

BLOCK = 4096
START_NS = 1_700_000_000 * 10**9


def make_analyzer(size_bytes: int, seed: int = 1) -> ServerAnalyzer:
    """An analyzer of a server with one disk, whose choice of samples is repeatable."""
    return ServerAnalyzer("server-1", [Disk(index=0, name="sda", size_bytes=size_bytes)], seed)


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """Where a sparse file has data: (offset, end)."""
    ranges = []
    with path.open("rb") as file:
        end, size = 0, path.stat().st_size
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            ranges.append((start, end))
    return ranges


def feed_image(
    analyzer: ServerAnalyzer, path: Path, blocks: int = 256, downwards: bool = False, time_ns: int = START_NS
) -> None:
    """Let every block that is not a hole pass by, `blocks` at a time, a hundred milliseconds apart."""
    pieces = [
        (at, min(at + blocks * BLOCK, end))
        for start, end in data_ranges(path)
        for at in range(start // BLOCK * BLOCK, end, blocks * BLOCK)
    ]
    with path.open("rb") as file:
        for start, end in reversed(pieces) if downwards else pieces:
            file.seek(start)
            data = file.read(end - start)
            data += bytes(-len(data) % BLOCK)
            time_ns += 10**8
            analyzer.observe(0, start // BLOCK, memoryview(data), time_ns)
