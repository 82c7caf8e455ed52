"""`entropy`: does a disk look encrypted? Blocks are sampled from evenly over the disk; nothing is parsed.

Encrypted data fills a disk with blocks that look random, file systems included. Compressed media look nearly the same,
so it is the share of such blocks that counts: a disk fails with more than `share_max` of its blocks that are not empty.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.nbd.export import Extent
from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import FailedError
from dr_cloud.vdsa.analysis.ground import sample

_SAMPLES_MIN: Final = 32
"""Fewer that are not empty say nothing."""


class EntropyProbe(BaseModel):
    """Disks do not look encrypted (sampled)."""

    model_config = ConfigDict(extra="forbid")

    samples: Annotated[int, Field(ge=_SAMPLES_MIN, le=1_000_000)] = 2048
    """Blocks to read of each disk, at most."""
    share_max: Annotated[float, Field(ge=0, le=1)] = 0.8
    """The share of random-looking blocks among those that are not empty, above which a disk fails."""

    def run(self, bench: Bench) -> str:
        """Sample each disk."""
        told = []
        for disk in bench.disks:
            random, full = self._sample(bench, disk)
            if full < _SAMPLES_MIN:
                told.append(f"{disk} is all but empty")
                continue
            said = f"{disk}: {random} of {full} blocks look random ({random / full:.0%})"
            print(said)
            if random / full > self.share_max:
                raise FailedError(f"{said}, at most {self.share_max:.0%} expected: it looks encrypted")
            told.append(said)
        return "; ".join(told)

    def _sample(self, bench: Bench, disk: str) -> tuple[int, int]:
        """Return how many samples look random, and how many are not empty. Holes are passed over."""
        random = full = 0
        with bench.connect(disk) as client:
            data = _data_blocks(client.block_status(0, client.size_bytes))
            blocks = sum(last - first for first, last in data)
            step = max(1, -(-blocks // self.samples))
            skip = step // 2
            for first, last in data:
                block = first + skip
                while block < last:
                    seen = sample(bytes(client.pread(block * BLOCK_SIZE, BLOCK_SIZE)))
                    random += seen.random
                    full += not seen.empty
                    block += step
                skip = block - last
        return random, full


def _data_blocks(runs: list[Extent]) -> list[tuple[int, int]]:
    """Return the whole blocks that are no holes, as (first, one after the last)."""
    found = []
    at = 0
    for run in runs:
        first, last = -(-at // BLOCK_SIZE), (at + run.length) // BLOCK_SIZE
        if not run.hole and first < last:
            found.append((first, last))
        at += run.length
    return found
