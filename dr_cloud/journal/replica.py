"""The replica map: where the current version of every block lies, moved forward checkpoint by checkpoint.

Per disk and region of 1 GiB an array of loc; a region is absent (all holes) until a write touches it. Moving forward
over an interval yields its change rows: for each version of a block also the loc that it replaces. Pure: no I/O.

A keyframe is encoded in another thread while the map moves on: `freeze` hands out the changed regions, and a frozen
region is copied before it changes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dr_cloud.journal.frame import Columns
from dr_cloud.journal.objects import ROW_DTYPE, Rows
from dr_cloud.model.blocks import REGION_BLOCKS, REGION_MASK, REGION_SHIFT

Locs = NDArray[np.uint64]
RegionKey = tuple[int, int]
"""(disk index, region number)."""

_RANGE_ROWS_MAX: Final = 1024
"""A range of zeroes up to this many blocks becomes a row per block, as any write; of a longer one (a trim of a disk)
only blocks that held data do, or a terabyte of holes would cost a row for each."""
_DISK_SHIFT: Final = np.uint64(48)


class ReplicaMap:
    """The map of all disks of one scope."""

    def __init__(self) -> None:
        """Begin with every block a hole."""
        self.regions: dict[RegionKey, Locs] = {}
        self.changed: set[RegionKey] = set()
        self._frozen: set[RegionKey] = set()

    def load(self, key: RegionKey, locs: Locs) -> None:
        """Put a region in place, as read from a keyframe."""
        self.regions[key] = locs

    def freeze(self) -> dict[RegionKey, Locs]:
        """Return the regions that changed since the last call. They will not change any more."""
        frozen = {key: self.regions[key] for key in self.changed}
        self._frozen |= self.changed
        self.changed = set()
        return frozen

    def thaw(self) -> None:
        """Let frozen regions change in place again: whoever held them is done."""
        self._frozen.clear()

    def _writable(self, key: RegionKey) -> Locs:
        region = self.regions.get(key)
        if region is None:
            region = self.regions[key] = np.zeros(REGION_BLOCKS, np.uint64)
        elif key in self._frozen or not region.flags.writeable:
            region = self.regions[key] = region.copy()
            self._frozen.discard(key)
        self.changed.add(key)
        return region

    def replay(self, rows: Rows) -> None:
        """Move forward over rows that were made before (recovery)."""
        for (disk, region), part in _by_region(rows["disk"], rows["block"]):
            self._writable((disk, region))[rows["block"][part] & np.uint64(REGION_MASK)] = rows["loc"][part]

    def promote(self, columns: Columns) -> Rows:
        """Move forward over entries in (time, sequence) order and return their change rows.

        Args:
            columns: `COLUMN_DTYPE` with every `ref` a loc.
        """
        long_ranges = np.flatnonzero(columns["count"] > _RANGE_ROWS_MAX)
        pieces = []
        start = 0
        for position in long_ranges.tolist():
            pieces.append(self._promote_blocks(columns[start:position]))
            pieces.extend(self._promote_range(columns[position]))
            start = position + 1
        pieces.append(self._promote_blocks(columns[start:]))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _promote_blocks(self, columns: Columns) -> Rows:
        counts = columns["count"]
        if (counts > 1).any():
            entry = np.repeat(np.arange(len(columns)), counts)
            within = np.arange(len(entry)) - np.repeat(np.cumsum(counts, dtype=np.int64) - counts, counts)
            columns = columns[entry]
            columns["block"] += within.astype(np.uint64)
        rows = np.zeros(len(columns), ROW_DTYPE)
        for name in ("time_ns", "sequence", "block", "disk"):
            rows[name] = columns[name]
        rows["loc"] = columns["ref"]
        if not len(rows):
            return rows
        place = rows["disk"].astype(np.uint64) << _DISK_SHIFT | rows["block"]
        order = np.argsort(place, kind="stable")
        sorted_place = place[order]
        again = np.concatenate(([False], sorted_place[1:] == sorted_place[:-1]))
        previous = np.empty(len(rows), np.uint64)
        previous[1:] = rows["loc"][order][:-1]
        last = np.concatenate((~again[1:], [True]))
        region_of = sorted_place >> np.uint64(REGION_SHIFT)
        bounds = np.flatnonzero(np.concatenate(([True], region_of[1:] != region_of[:-1], [True])))
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            number = int(region_of[low])
            shift = int(_DISK_SHIFT) - REGION_SHIFT
            region = self._writable((number >> shift, number & (1 << shift) - 1))
            inside = (sorted_place[low:high] & np.uint64(REGION_MASK)).astype(np.int64)
            first = ~again[low:high]
            previous[low:high][first] = region[inside[first]]
            final = last[low:high]
            region[inside[final]] = rows["loc"][order[low:high][final]]
        rows["previous"][order] = previous
        return rows

    def _promote_range(self, entry: Any) -> Iterator[Rows]:
        """Turn blocks of a long range that hold data into holes; regions that are absent cost nothing."""
        disk, first, count = int(entry["disk"]), int(entry["block"]), int(entry["count"])
        low_region, high_region = first >> REGION_SHIFT, (first + count - 1) >> REGION_SHIFT
        for key in sorted(k for k in self.regions if k[0] == disk and low_region <= k[1] <= high_region):
            base = key[1] << REGION_SHIFT
            low, high = max(first - base, 0), min(first + count - base, REGION_BLOCKS)
            held = np.flatnonzero(self.regions[key][low:high]) + low
            if not len(held):
                continue
            rows = np.zeros(len(held), ROW_DTYPE)
            rows["time_ns"], rows["sequence"], rows["disk"] = entry["time_ns"], entry["sequence"], disk
            rows["block"] = held.astype(np.uint64) + np.uint64(base)
            region = self._writable(key)
            rows["previous"] = region[held]
            region[held] = 0
            yield rows


def _by_region(disk: NDArray[Any], block: NDArray[Any]) -> Iterator[tuple[RegionKey, NDArray[np.intp]]]:
    """Yield each region with the positions that lie in it, in their order."""
    if not len(block):
        return
    place = disk.astype(np.uint64) << np.uint64(int(_DISK_SHIFT) - REGION_SHIFT) | block >> np.uint64(REGION_SHIFT)
    order = np.argsort(place, kind="stable")
    bounds = np.flatnonzero(np.concatenate(([True], np.diff(place[order]) != 0, [True])))
    shift = int(_DISK_SHIFT) - REGION_SHIFT
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        number = int(place[order[low]])
        yield (number >> shift, number & (1 << shift) - 1), order[low:high]
