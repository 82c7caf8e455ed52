"""Runs: blocks that lie one after the other on the disk and where they are stored, so that one slice serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dr_cloud.model.blocks import REGION_MASK, REGION_SHIFT

FEW: Final = 32
"""Up to so many blocks a plain loop is quicker than numpy's calls."""


def by_region(first: int, end: int) -> Sequence[tuple[int, int, int]]:
    """Return (region, start, stop within it) for blocks `first` … `end - 1`."""
    if first >> REGION_SHIFT == (end - 1) >> REGION_SHIFT:
        return ((first >> REGION_SHIFT, first & REGION_MASK, ((end - 1) & REGION_MASK) + 1),)
    pieces = []
    while first < end:
        stop = min(end, ((first >> REGION_SHIFT) + 1) << REGION_SHIFT)
        pieces.append((first >> REGION_SHIFT, first & REGION_MASK, ((stop - 1) & REGION_MASK) + 1))
        first = stop
    return pieces


def table_runs(table: memoryview, start: int, stop: int) -> Sequence[tuple[int, int]]:
    """Return (loc, count) of the runs of adjacent locs, or of holes, in a part of a region."""
    count = stop - start
    if count == 1:
        return ((table[start], 1),)
    if count > FEW:
        return adjacent_runs(np.asarray(table[start:stop]))
    found = []
    first = following = table[start]
    length = 0
    for loc in table[start:stop].tolist():
        if loc != following and (loc or first):
            found.append((first, length))
            first, length = loc, 0
        length += 1
        following = loc + 1
    found.append((first, length))
    return found


def adjacent_runs(locs: NDArray[np.uint64]) -> Sequence[tuple[int, int]]:
    """Return (loc, count) of the runs of adjacent locs, or of holes; `locs` is not empty."""
    apart = locs[1:] - locs[:-1] != 1
    if not locs.all():
        apart &= (locs[1:] | locs[:-1]) != 0
    cuts = apart.nonzero()[0]
    if not len(cuts):
        return ((int(locs[0]), len(locs)),)
    starts = [0, *(cuts + 1).tolist()]
    ends = [*starts[1:], len(locs)]
    return [(loc, end - start) for loc, start, end in zip(locs[starts].tolist(), starts, ends, strict=True)]
