"""(3) The journal rate: from the first tapped write to the durable checkpoint that holds the last one.

Beside it, one thread that does to the same bytes what cannot be left out: zstd level 1 and AES-256-GCM by groups of 16
blocks. The tap may queue all it is given, so that what is measured is the chain and not its catching up by bitmap.
"""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from bench import chain, content
from bench.figures import Figure, Figures, Target, against, beside, interleaved
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError

LARGE_BYTES: Final = 640 << 20
SMALL_BYTES: Final = 256 << 20
CHECKPOINT_SECONDS: Final = 0.5
QUEUE: Final = "4GiB"
CHAIN, LIMIT = "chain", "one thread"


class _Load:
    """Data in a file that both contestants use; renewed before each run, so that nothing is known from before."""

    def __init__(self, directory: Path, name: str, data: content.Bytes, sizes: str) -> None:
        self.path = directory / f"{name}.data"
        self.path.write_bytes(data.data)
        self.data: content.Bytes = np.memmap(self.path, np.uint8, "r+")
        self.sizes = sizes
        self.first_round = zlib.crc32(name.encode()) & 0xFFFF00
        """Far from those of other loads: what they share would be stored once, and sealed by nobody."""
        self.rounds = 0
        self.stored: list[float] = []
        """Of each run: what was stored for a byte that was written. More where compression gave way."""

    def chain(self, behind: chain.Chain, uri: str) -> float:
        """Return the MiB/s of the whole chain."""
        self.rounds += 1
        content.renew(self.data, self.first_round + self.rounds)
        before_bytes = behind.stored_bytes()
        command = [sys.executable, "-m", "bench.pump", uri, str(self.path), self.sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DrCloudError(f"the writes failed: {done.stderr.strip()[-500:]}")
        begun_ns, answered_ns = map(int, done.stdout.split())
        durable_ns = behind.wait_durable(answered_ns)
        self.stored.append((behind.stored_bytes() - before_bytes) / len(self.data))
        return len(self.data) / (1 << 20) / ((durable_ns - begun_ns) / 1e9)

    def limit(self) -> float:
        """Return the MiB/s of the one thread."""
        begun = time.perf_counter()
        content.seal_in_one_thread(self.data)
        return len(self.data) / (1 << 20) / (time.perf_counter() - begun)


def measure(rounds: int) -> Figures:
    """Return the figures."""
    figures: Figures = {}
    with chain.folder() as directory:
        data = content.realistic(LARGE_BYTES)
        sample = data[: 32 << 20]
        ratio = len(sample) / content.seal_in_one_thread(sample)
        disk = directory / "disk.raw"
        with open(disk, "wb") as file:
            file.truncate(LARGE_BYTES)
        with (
            chain.running_chain(directory, CHECKPOINT_SECONDS) as (behind, _),
            chain.tap(directory, "tap", disk, behind.source_socket, QUEUE) as uri,
        ):
            behind.wait_in_sync()
            loads = {
                f"64 KiB to 1 MiB, {ratio:.1f}:1": _Load(directory, "large", data, "large"),
                f"4 KiB, {ratio:.1f}:1": _Load(directory, "small", data[:SMALL_BYTES], "small"),
                "64 KiB to 1 MiB, incompressible": _Load(directory, "random", content.random(LARGE_BYTES), "large"),
            }
            del data, sample
            for name, load in loads.items():
                runs = interleaved({CHAIN: partial(load.chain, behind, uri), LIMIT: load.limit}, rounds)
                small = load.sizes == "small"
                if small:
                    runs = {key: [value * (1 << 20) / BLOCK_SIZE for value in values] for key, values in runs.items()}
                incompressible = name.endswith("incompressible")
                target = None if incompressible else Target("≥", 0.5)
                unit = "writes/s" if small else "MiB/s"
                figures[f"journal, writes of {name} / one thread"] = beside(runs, CHAIN, LIMIT, unit, target)
                if not small:
                    figures[f"journal, writes of {name}"] = _rate(runs, incompressible)
                figures[f"journal, writes of {name}: stored for a byte written"] = against(load.stored, "bytes")
    return figures


def _rate(runs: dict[str, list[float]], incompressible: bool) -> Figure:
    return against(runs[CHAIN], "MiB/s", None if incompressible else Target("≥", 100, "MiB/s"))
