"""A stack: every disk of a VPG as it was at one past time, for one recovery test.

Purpose: serve an `ImagePlan` through exports that can be read and written, without a copy of any disk. Writes go to a
log of this stack alone. Nothing here starts a server, a task or an actor, and the clock is given.

Life: `open` loads the image (no disk data); exports answer requests; `close` removes every trace of the test. What is
shared (the object cache) is only ever read through; production, the replica and other stacks cannot be reached.

Crash recovery: there is none to do. The write log has no name, memory goes with the process, and the cache is right
after any crash (`dr_cloud.stack.folder`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import ImagePlan
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.export import StackExport
from dr_cloud.stack.image import Image
from dr_cloud.stack.writelog import WriteLog


class StackStatistics(BaseModel):
    """What a stack did and takes, so far."""

    model_config = ConfigDict(frozen=True)

    at_ns: int
    """The time whose image it serves."""
    open_seconds: float
    """From the request to when exports could be used."""
    first_byte_seconds: float | None
    """From the request to the first answered read; None before there is one."""
    blocks_read: int
    blocks_written: int
    written_bytes: int
    """Blocks that the test holds in its log: each counts once, however often it was written."""
    stored_bytes: int
    """Space that the log takes."""
    map_bytes: int
    """Memory that the stack's own regions of the map take."""
    fetched_bytes: int
    """Sealed bytes of blocks that this process fetched from the store for its cache."""
    failures: int
    """Requests that failed because what they need could not be fetched or is damaged, or while it was paused."""
    writes_refused: int
    """Writes for which there was no space, or no quota."""


class Stack:
    """The disks of one VPG at one time. Calls come from the thread of the event loop that serves its exports.

    Attributes:
        plan: What it serves.
        exports: One per disk of the plan, in its order. Export names are `<prefix><disk name>`.
    """

    def __init__(
        self,
        image: Image,
        cache: ObjectCache,
        writes: WriteLog,
        prefix: str,
        started_ns: int,
        clock_ns: Callable[[], int],
    ) -> None:
        """Use `open`."""
        self.plan = image.plan
        self._cache = cache
        self._writes = writes
        self._clock_ns = clock_ns
        self._started_ns = started_ns
        self._first_byte_ns: int | None = None
        self.exports = [StackExport(prefix + disk.name, disk, image, cache, writes) for disk in image.plan.disks]
        for export in self.exports:
            export.on_served = self._served
        self._opened_ns = clock_ns()

    @classmethod
    def open(
        cls,
        plan: ImagePlan,
        cache: ObjectCache,
        work_dir: Path,
        *,
        clock_ns: Callable[[], int],
        quota_bytes: int | None = None,
        prefix: str = "",
        started_ns: int | None = None,
    ) -> Stack:
        """Open the stack of `plan`. Blocks while change rows and the keyframe's directory are fetched.

        Args:
            plan: What to serve, from the journal's catalogue.
            cache: The cache of the plan's scope.
            work_dir: Where the write log takes its space.
            clock_ns: A clock that never goes back, for durations.
            quota_bytes: How much the test may write; beyond it, writes give ENOSPC.
            prefix: Put before disk names in the names of exports.
            started_ns: When the stack was asked for, by that clock, if that was before this call.

        Raises:
            DamagedError: A stored object is damaged.
            StoreUnavailableError: The store does not answer.
            OSError: `work_dir` cannot be used.
        """
        started_ns = clock_ns() if started_ns is None else started_ns
        image = Image.open(plan, cache)
        return cls(image, cache, WriteLog(work_dir, quota_bytes), prefix, started_ns, clock_ns)

    def statistics(self) -> StackStatistics:
        """Return counters and times so far."""
        first_ns = self._first_byte_ns
        return StackStatistics(
            at_ns=self.plan.at_ns,
            open_seconds=(self._opened_ns - self._started_ns) / 1e9,
            first_byte_seconds=None if first_ns is None else (first_ns - self._started_ns) / 1e9,
            blocks_read=sum(export.blocks_read for export in self.exports),
            blocks_written=sum(export.blocks_written for export in self.exports),
            written_bytes=self._writes.slots * BLOCK_SIZE,
            stored_bytes=self._writes.stored_bytes,
            map_bytes=sum(export.own_map_bytes for export in self.exports),
            fetched_bytes=self._cache.fetched_bytes,
            failures=sum(export.failures for export in self.exports),
            writes_refused=self._writes.refused,
        )

    def pause(self, reason: str) -> None:
        """Give EPERM for every request, also for those under way, until `resume`: policy forbids the test now."""
        for export in self.exports:
            export.pause(reason)

    def resume(self) -> None:
        """Go on as before `pause`."""
        for export in self.exports:
            export.resume()

    def close(self) -> None:
        """Remove every trace of the test. Requests that come later give ESHUTDOWN. The cache stays open."""
        for export in self.exports:
            export.close()
        self._writes.close()

    def _served(self) -> None:
        if self._first_byte_ns is None:
            self._first_byte_ns = self._clock_ns()
