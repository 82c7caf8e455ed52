"""When was written: the times between which a search for the last clean one chooses.

Every change row has a position in the journal: how many rows come before it, by time. A checkpoint says how many rows
were before it, so a position, or a time, is looked up by reading the rows of one checkpoint's objects and no other's.

Rows of one time are one write. Where the order of writes is not known (a synchronisation; several hosts that are
ordered at checkpoints only) all that was written until there is an image again is one: it can be had as a whole only.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.journal import Checkpoint, PlacedImage, PlacedWrite, Write

_READ_THREADS: Final = 8


def list_writes(catalogue: Catalogue, reader: JournalReader, since_ns: int, until_ns: int, limit: int) -> list[Write]:
    """Return the first `limit` writes with `since_ns` ≤ time ≤ `until_ns`, ascending, each time once.

    Raises:
        DamagedError: An object is not what its checkpoint says.
    """
    found: list[Write] = []
    for checkpoint in catalogue.from_time(since_ns):
        times, blocks = np.unique(_times(reader, checkpoint), return_counts=True)
        wanted = (times >= since_ns) & (times <= until_ns)
        found += [
            Write(time_ns=time_ns, blocks=count, exact=catalogue.exact(time_ns))
            for time_ns, count in zip(times[wanted].tolist(), blocks[wanted].tolist(), strict=True)
        ]
        if len(found) >= limit or checkpoint.time_ns >= until_ns:
            break
    return found[:limit]


def images_at(catalogue: Catalogue, reader: JournalReader, times_ns: Sequence[int]) -> list[PlacedImage]:
    """Return for each time the image that is served for it, and how many rows of the journal that holds.

    Raises:
        TimeOutOfRangeError: The journal does not hold one of the times.
        DamagedError: An object is not what its checkpoint says.
    """
    served = [catalogue.plan(at_ns).at_ns for at_ns in times_ns]
    places = _Places(catalogue, reader)
    places.read(places.checkpoint_at(at_ns) for at_ns in served)
    return [PlacedImage(time_ns=at_ns, rows=places.rows_until(at_ns)) for at_ns in served]


def writes_at(catalogue: Catalogue, reader: JournalReader, positions: Sequence[int]) -> list[PlacedWrite]:
    """Return for each position the write that it is in.

    Raises:
        InvalidError: There is no such position, or no image that holds it yet.
        DamagedError: An object is not what its checkpoint says.
    """
    places = _Places(catalogue, reader)
    places.read(places.checkpoint_of(position) for position in positions)
    return [places.write_at(position) for position in positions]


def _times(reader: JournalReader, checkpoint: Checkpoint) -> NDArray[np.uint64]:
    """Fetch when the rows of a checkpoint were written, ascending."""
    found = [reader.rows(ref)["time_ns"] for ref in checkpoint.objects if ref.rows]
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.uint64)


class _Places:
    """Looks up positions and times; what was read of a checkpoint is kept."""

    def __init__(self, catalogue: Catalogue, reader: JournalReader) -> None:
        self._checkpoints = catalogue.checkpoints
        self._testable = [checkpoint for checkpoint in catalogue.checkpoints if checkpoint.testable]
        self._reader = reader
        self._known: dict[int, NDArray[np.uint64]] = {}

    def checkpoint_of(self, position: int) -> Checkpoint:
        """Return the checkpoint that holds the row at `position`."""
        newest = self._checkpoints[-1] if self._checkpoints else None
        if newest is None or not 0 <= position < newest.rows_before + newest.rows:
            raise InvalidError(f"the journal has no position {position}", "Ask which it has.")
        # Of checkpoints with as many rows before them, the last is the one that has any itself.
        return self._checkpoints[bisect_right(self._checkpoints, position, key=lambda c: c.rows_before) - 1]

    def checkpoint_at(self, at_ns: int) -> Checkpoint:
        """Return the first checkpoint that holds all rows up to `at_ns`."""
        return self._checkpoints[bisect_left(self._checkpoints, at_ns, key=lambda c: c.time_ns)]

    def read(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Fetch what these checkpoints hold, many at a time."""
        wanted = {checkpoint.number: checkpoint for checkpoint in checkpoints if checkpoint.number not in self._known}
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            found = pool.map(lambda checkpoint: _times(self._reader, checkpoint), wanted.values())
            self._known |= dict(zip(wanted, found, strict=True))

    def _rows(self, checkpoint: Checkpoint) -> NDArray[np.uint64]:
        if checkpoint.number not in self._known:
            self._known[checkpoint.number] = _times(self._reader, checkpoint)
        return self._known[checkpoint.number]

    def rows_until(self, at_ns: int) -> int:
        """Return how many rows have a time up to `at_ns`."""
        cover = self.checkpoint_at(at_ns)
        if at_ns == cover.time_ns:
            return cover.rows_before + cover.rows
        return cover.rows_before + int(np.searchsorted(self._rows(cover), np.uint64(at_ns), "right"))

    def write_at(self, position: int) -> PlacedWrite:
        """Return the write that `position` is in."""
        checkpoint = self.checkpoint_of(position)
        time_ns = int(self._rows(checkpoint)[position - checkpoint.rows_before])
        place = bisect_left(self._testable, time_ns, key=lambda c: c.time_ns)
        if place == len(self._testable):
            raise InvalidError(f"no image holds position {position} yet", "Choose one before the newest checkpoint.")
        cover = self._testable[place]
        exact = time_ns > cover.exact_from_ns
        if exact:
            first = self.rows_until(time_ns - 1)
        else:
            time_ns = cover.exact_from_ns
            first = self.rows_until(self._testable[place - 1].time_ns) if place else 0
        return PlacedWrite(time_ns=time_ns, first=first, last=self.rows_until(time_ns) - 1, exact=exact)
