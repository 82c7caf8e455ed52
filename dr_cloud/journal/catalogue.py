"""The catalogue: every checkpoint of a scope in order, and from it the plan of an image at any time.

It is rebuilt from the bucket alone: one LIST of the keyframes (each holds the page of checkpoints before it), then the
checkpoints after the newest keyframe, whose numbers are consecutive. While a journal is written its writer keeps the
catalogue in memory, so that opening a stack needs no LIST.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from dr_cloud.journal.checkpoint import read_checkpoint
from dr_cloud.journal.keyframe import Keyframe, read_keyframe
from dr_cloud.model.errors import DamagedError, TimeOutOfRangeError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, ImagePlan, KeyframeRef
from dr_cloud.model.units import format_time
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.errors import ObjectMissingError
from dr_cloud.store.store import Store

_READ_THREADS: Final = 16


class Catalogue:
    """The checkpoints and keyframes of one scope. Grows only at its end."""

    def __init__(self, scope: Scope) -> None:
        """Begin empty."""
        self.scope = scope
        self.checkpoints: list[Checkpoint] = []
        self.keyframes: list[KeyframeRef] = []
        self._times: list[int] = []
        self._testable: list[int] = []

    @classmethod
    def load(cls, store: Store, keys: VpgKeys, scope: Scope) -> Catalogue:
        """Read the catalogue from the bucket alone; empty if there is no journal."""
        catalogue = cls(scope)
        listed = [key for key, _ in store.list(layout.keyframe_prefix(scope))]
        if listed:
            number, generation = layout.parse_keyframe_key(listed[-1])
            pages: list[Keyframe] = [read_keyframe(store, keys, number, generation, page=True)]
            while (previous := pages[-1].previous) is not None:
                pages.append(read_keyframe(store, keys, previous.number, previous.generation, page=True))
            for page in reversed(pages):
                for checkpoint in page.checkpoints:
                    catalogue.add(checkpoint)
            catalogue.keyframes = [page.ref for page in reversed(pages)]
        for checkpoint in read_after(store, keys, len(catalogue.checkpoints)):
            catalogue.add(checkpoint)
        return catalogue

    def add(self, checkpoint: Checkpoint) -> None:
        """Append the next checkpoint."""
        if checkpoint.number != len(self.checkpoints):
            raise DamagedError(
                f"checkpoint {len(self.checkpoints)} of {self.scope.prefix} is missing: {checkpoint.number} came next"
            )
        self.checkpoints.append(checkpoint)
        self._times.append(checkpoint.time_ns)
        if checkpoint.testable:
            self._testable.append(checkpoint.number)
        newest = self.keyframes[-1].number if self.keyframes else -1
        self.keyframes.extend(ref for ref in checkpoint.keyframes if ref.number > newest)

    @property
    def newest(self) -> Checkpoint | None:
        """The last checkpoint of any kind."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def horizon_ns(self) -> int | None:
        """The earliest time that has an image."""
        return self.checkpoints[self._testable[0]].exact_from_ns if self._testable else None

    @property
    def newest_ns(self) -> int | None:
        """The latest time that has an image."""
        return self.checkpoints[self._testable[-1]].time_ns if self._testable else None

    def from_time(self, at_ns: int) -> Sequence[Checkpoint]:
        """Return the checkpoints that can hold writes of this time or later, ascending."""
        return self.checkpoints[bisect_left(self._times, at_ns) :]

    def exact(self, at_ns: int) -> bool:
        """Return whether this time has an image of its own."""
        first = bisect_left(self._times, at_ns)
        if first == len(self._times):
            return False
        # The rows up to at_ns end in checkpoint `first`; later ones of the same time (a writer took over) add none.
        same_time = self.checkpoints[first : bisect_right(self._times, self._times[first])]
        return any(c.testable and c.exact_from_ns <= at_ns for c in same_time)

    def plan(self, at_ns: int) -> ImagePlan:
        """Return the plan of image(`at_ns`).

        Where the order of writes at that time is not known (a disk was synchronising, or the VPG has several hosts that
        are ordered at checkpoints only) the image is that of the
        testable checkpoint before, and the plan's note says so. `TimeOutOfRangeError` tells the times that can be had.
        """
        if self.horizon_ns is None or self.newest_ns is None:
            raise TimeOutOfRangeError(
                f"{self.scope.prefix} has no checkpoint yet", "Wait until the first synchronisation is complete."
            )
        if not self.horizon_ns <= at_ns <= self.newest_ns:
            raise TimeOutOfRangeError(
                f"the journal of {self.scope.prefix} does not hold {format_time(at_ns)}",
                f"Choose a time from {format_time(self.horizon_ns)} to {format_time(self.newest_ns)}.",
            )
        if self.exact(at_ns):
            return self._plan(self.checkpoints[bisect_left(self._times, at_ns)], at_ns, at_ns, "")
        before = self._testable[bisect_right(self._testable, at_ns, key=self._times.__getitem__) - 1]
        note = (
            f"moved down to the checkpoint before: the order of writes at {format_time(at_ns)} is not known "
            "(a disk was synchronising, or several hosts are ordered at checkpoints only)"
        )
        return self._plan(self.checkpoints[before], at_ns, self._times[before], note)

    def _plan(self, cover: Checkpoint, asked_ns: int, served_ns: int, note: str) -> ImagePlan:
        """Choose the keyframe from which the fewest rows lead to `served_ns`, which lies in the interval of `cover`."""
        place = bisect_left(self.keyframes, cover.number, key=lambda ref: ref.number)
        before = self.keyframes[place - 1] if place else None
        after = self.keyframes[place] if place < len(self.keyframes) else None
        redo_rows = cover.rows_before + cover.rows - (before.rows_before if before else 0)
        undo = after is not None and after.rows_before - cover.rows_before < redo_rows
        if undo and after is not None:
            chosen = self.checkpoints[cover.number : after.number + 1]
        else:
            chosen = self.checkpoints[before.number + 1 if before else 0 : cover.number + 1]
        return ImagePlan(
            scope=self.scope,
            journal=cover.journal,
            asked_ns=asked_ns,
            at_ns=served_ns,
            note=note,
            disks=cover.disks,
            base=after if undo else before,
            direction="undo" if undo else "redo",
            objects=[ref for checkpoint in chosen for ref in checkpoint.objects if ref.rows],
            generations=self.checkpoints[-1].generations,
        )


def read_after(store: Store, keys: VpgKeys, number: int) -> Iterator[Checkpoint]:
    """Yield the checkpoints from `number` on, as far as they go. Numbers are consecutive, so no LIST is needed."""

    def fetch(wanted: int) -> Checkpoint | None:
        try:
            return read_checkpoint(store, keys, wanted)
        except ObjectMissingError:
            return None

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        while True:
            for checkpoint in pool.map(fetch, range(number, number + _READ_THREADS)):
                if checkpoint is None:
                    return
                yield checkpoint
            number += _READ_THREADS
