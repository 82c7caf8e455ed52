"""(6) Bytes stored per open stack: its write log on the file system and its map in memory, over what was written.

The log is counted by the file system: the blocks of the stack's open files that have no name.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import numpy as np

from bench import content
from bench.figures import Figure, Figures
from bench.provider import Provider, uri_of
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.nbd.client import NbdClient

DISK_BYTES: Final = 8 << 30
REGION_BYTES: Final = 1 << 30
WRITTEN_FACTOR: Final = 1.1
TOUCHED_FACTOR: Final = 0.003
PATTERNS: Final = {
    "64 KiB in one place": (16, 1),
    "16 MiB in 1 GiB": (4096, 1),
    "128 MiB in 8 GiB": (32768, 8),
}
"""Blocks written, each alone and at random; GiB of the disk in which they lie."""


def measure(provider: Provider, rounds: int) -> Figures:
    """Return the figures. Nothing in them depends on the machine's speed: one round is enough."""
    del rounds
    history = provider.history("stored", DISK_BYTES)
    draw = np.random.default_rng(11)
    history.write(draw.integers(0, DISK_BYTES // BLOCK_SIZE, 20_000, np.uint64), content.realistic(1 << 20))
    history.close()
    pids = provider.renew_pool()
    figures: Figures = {}
    for name, (count, gibibytes) in PATTERNS.items():
        (stack,) = provider.local.open_stacks(history.scope, [history.time_ns - 1])
        area = gibibytes * REGION_BYTES if count > 16 else count * BLOCK_SIZE
        blocks = random.Random(count).sample(range(area // BLOCK_SIZE), count)
        with NbdClient.connect(uri_of(stack)) as client:
            for block in blocks:
                client.pwrite(block * BLOCK_SIZE, bytes([block % 255 + 1]) * BLOCK_SIZE)
            log = _unnamed_bytes(pids[0], provider.settings.work_dir / "writelogs")
            map_bytes = stack.statistics().map_bytes
        stack.close()  # And kept: the next one is served by the same process.
        figures[f"stored per stack, {name} / allowed"] = _figure(log + map_bytes, count * BLOCK_SIZE, gibibytes)
        figures[f"stored per stack, {name} / written"] = _over_written(log + map_bytes, count * BLOCK_SIZE)
    return figures


def _figure(stored_bytes: int, written_bytes: int, gibibytes: int) -> Figure:
    """Compare with 1.1 of what was written and 0.3 % of what was touched: whole gibibytes, the unit of the map."""
    allowed = WRITTEN_FACTOR * written_bytes + TOUCHED_FACTOR * gibibytes * REGION_BYTES
    ratio = stored_bytes / allowed
    return Figure(ours=stored_bytes, peer=allowed, ratio=ratio, unit="bytes", target="≤ 1", met=ratio <= 1)


def _over_written(stored_bytes: int, written_bytes: int) -> Figure:
    ratio = stored_bytes / written_bytes
    return Figure(ours=stored_bytes, peer=written_bytes, ratio=ratio, unit="bytes", target="", met=None)


def _unnamed_bytes(pid: int, directory: Path) -> int:
    """Return the space taken by a process's open files that were made in `directory` and have no name there."""
    taken = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = str(link.readlink()) if link.is_symlink() else ""
        if target.startswith(f"{directory}/") and target.endswith("(deleted)"):
            found = link.stat()
            taken[found.st_ino] = found.st_blocks * 512  # A mapping holds its file open a second time.
    return sum(taken.values())
