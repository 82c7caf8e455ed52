"""image(T): for each block of each disk, where the version with the greatest (time, sequence) up to T lies.

How it is made:

1. Opening loads the change rows of the plan's objects (mapped, shared by the node's stacks) and the keyframe's
   directory, side by side in threads. Rows ascend in time, so those between the keyframe and T are one slice of each.
2. One stable sort puts them in order of (disk, region), within a region still by time.
3. A region is made when it is first touched. Where no row changes it, it is the keyframe's, mapped and shared, or one
   region of holes that serves every disk. Else it is a copy with the rows applied, the last assignment winning: redo
   assigns `loc` forward, undo assigns `previous` backward.

So opening costs what lies between T and the nearest keyframe, whatever the size of the disks and of the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dr_cloud.journal.keyframe import Keyframe
from dr_cloud.model.blocks import REGION_BLOCKS, REGION_MASK, REGION_SHIFT, blocks_of
from dr_cloud.model.journal import Disk, ImagePlan
from dr_cloud.stack.cache import Locs, ObjectCache, Rows


def _holes() -> Locs:
    locs = np.zeros(REGION_BLOCKS, np.uint64)
    locs.flags.writeable = False
    return locs


HOLES: Final = _holes()
"""A region of holes, for every disk that has one."""


class _Partition(NamedTuple):
    """The plan's rows in the order in which they are applied, by region."""

    position: NDArray[np.uint32]
    """Of the row's block, within its region."""
    loc: Locs
    bounds: dict[int, tuple[int, int]]
    """Region's key → its rows."""


class Image:
    """The disks of a VPG as they were at one time, as locs. Its calls may come from any thread."""

    def __init__(self, plan: ImagePlan, keyframe: Keyframe | None, tables: Sequence[Rows], cache: ObjectCache) -> None:
        """Make it from a plan, the directory of its keyframe, and the change rows of its objects in order."""
        self.plan = plan
        self._keyframe = keyframe
        self._cache = cache
        self._first_key: dict[int, int] = {}
        keys = 0
        for disk in plan.disks:
            self._first_key[disk.index] = keys
            keys += region_count(disk)
        self._rows = _partition(plan, tables, self._first_key, keys)

    @classmethod
    def open(cls, plan: ImagePlan, cache: ObjectCache) -> Image:
        """Load what `plan` names and make the image. Blocks; not to be called in a thread of the cache's pool.

        Raises:
            DamagedError: A stored object is damaged.
            StoreUnavailableError: The store does not answer.
            ValueError: The cache is that of another journal.
        """
        if (plan.scope, plan.journal) != (cache.folder.scope, cache.folder.journal):
            raise ValueError(f"the plan of {plan.scope.prefix} needs its own cache, this is that of another journal")
        keyframe = cache.pool.submit(cache.keyframe, plan.base) if plan.base else None
        tables = [cache.pool.submit(cache.rows, ref) for ref in plan.objects if ref.rows]
        return cls(plan, keyframe.result() if keyframe else None, [table.result() for table in tables], cache)

    def is_hole(self, disk: int, region: int) -> bool:
        """Is the region known, without a fetch, to be all holes?"""
        return self._first_key[disk] + region not in self._rows.bounds and (
            self._keyframe is None or (disk, region) not in self._keyframe.homes
        )

    def region(self, disk: int, region: int) -> Locs:
        """Return a region's 262,144 locs: a new writable array where rows change it, else a shared read-only one.

        Blocks while the keyframe's region is fetched.

        Raises:
            DamagedError: A stored object is damaged.
            StoreUnavailableError: The store does not answer; ask again later.
        """
        base = self._cache.region(self._keyframe, disk, region) if self._keyframe else None
        bounds = self._rows.bounds.get(self._first_key[disk] + region)
        if bounds is None:
            return HOLES if base is None else base
        locs = np.zeros(REGION_BLOCKS, np.uint64) if base is None else base.copy()
        rows = slice(*bounds)
        locs[self._rows.position[rows]] = self._rows.loc[rows]
        return locs


def region_count(disk: Disk) -> int:
    """Return how many regions a disk has."""
    return (blocks_of(disk.size_bytes) + REGION_BLOCKS - 1) >> REGION_SHIFT


def _partition(plan: ImagePlan, tables: Sequence[Rows], first_key: dict[int, int], keys: int) -> _Partition:
    """Take the rows between the keyframe and T, in the order of applying them, and sort them by region."""
    base_ns = plan.base.time_ns if plan.base else None
    undo = plan.direction == "undo"
    low_ns, high_ns = (plan.at_ns, base_ns) if undo else (base_ns, plan.at_ns)
    pieces = []
    for rows in tables:
        times = rows["time_ns"]
        first = int(np.searchsorted(times, np.uint64(low_ns), "right")) if low_ns is not None else 0
        end = int(np.searchsorted(times, np.uint64(high_ns), "right")) if high_ns is not None else len(rows)
        pieces.append(rows[first:end])
    if undo:
        pieces = [piece[::-1] for piece in reversed(pieces)]
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        return _Partition(np.empty(0, np.uint32), np.empty(0, np.uint64), {})
    block = np.concatenate([piece["block"] for piece in pieces])
    disk = np.concatenate([piece["disk"] for piece in pieces])
    loc = np.concatenate([piece["previous" if undo else "loc"] for piece in pieces])
    # Rows of a disk, or of a part of one, that does not exist at T are left out.
    first_of = np.zeros(1 << 16, np.uint64)
    regions_of = np.zeros(1 << 16, np.uint64)
    for wanted in plan.disks:
        first_of[wanted.index] = first_key[wanted.index]
        regions_of[wanted.index] = region_count(wanted)
    region = block >> np.uint64(REGION_SHIFT)
    exists = region < regions_of[disk]
    # A key of 16 bits is sorted in linear time.
    key = (first_of[disk] + region).astype(np.uint16 if keys < 1 << 16 else np.uint64)
    position = (block & np.uint64(REGION_MASK)).astype(np.uint32)
    if not exists.all():
        key, position, loc = key[exists], position[exists], loc[exists]
    order = np.argsort(key, kind="stable")
    key, position, loc = key[order], position[order], loc[order]
    # The first of each run of equal keys; the key put before them all is none of theirs.
    starts = np.flatnonzero(np.diff(key, prepend=key[:1] + key.dtype.type(1))).tolist()
    bounds = dict(zip(key[starts].tolist(), pairwise([*starts, len(key)]), strict=True))
    return _Partition(position, loc, bounds)
