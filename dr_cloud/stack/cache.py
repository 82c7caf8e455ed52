"""The object cache as one process sees it: mapped objects, groups on their way, rows and regions of the map.

The files, and how processes agree about them, are `dr_cloud.stack.folder`. Here: each cold group is on its way at most
once (a future per group); neighbouring absent groups are fetched with one request; where access to an object is
sequential, the request grows ahead of it up to 4 MiB.

Errors: a damaged group fails alone, and every time it is asked for; what the store does not answer fails now and is
asked for anew the next time. When the file system is full, groups are decoded and handed over without being kept.

Idle objects: `objects` holds what was used since the last `tidy`. Before that it rests in a second table, from which a
use brings it back, and from which it is dropped when the cache is over its limit or too many files are mapped.
"""

from __future__ import annotations

import io
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from dr_cloud.journal.keyframe import Keyframe, RegionHome
from dr_cloud.journal.objects import ROW_DTYPE, ObjectIndex
from dr_cloud.model.blocks import BLOCK_SHIFT
from dr_cloud.model.errors import DamagedError
from dr_cloud.model.journal import KeyframeRef, ObjectRef
from dr_cloud.stack.folder import BlockFile, CacheFolder, Filling

FETCH_THREADS: Final = 8
AHEAD_GROUPS_MAX: Final = 64
"""Of 64 KiB each: 4 MiB."""
MAPPED_OBJECTS_MAX: Final = 512
"""Each mapping holds an open file."""

Locs = NDArray[np.uint64]
Rows = NDArray[Any]
Group = bytes | memoryview | Exception
"""A group that was not kept: its blocks, or why there are none."""


class JournalSource(Protocol):
    """What the cache asks of the journal: `dr_cloud.journal.reader.JournalReader`."""

    def object_key(self, number: int) -> str: ...  # noqa: D102
    def index(self, number: int) -> ObjectIndex: ...  # noqa: D102
    def read_groups(self, number: int, index: ObjectIndex, first_group: int, group_count: int) -> list[bytes]: ...  # noqa: D102
    def rows(self, ref: ObjectRef) -> Rows: ...  # noqa: D102
    def keyframe(self, ref: KeyframeRef) -> Keyframe: ...  # noqa: D102
    def region(self, keyframe: Keyframe, disk: int, region: int) -> Locs | None: ...  # noqa: D102


class CachedObject:
    """One journal object in the cache.

    Attributes:
        data: Block i, decoded, at 4096 i; true only where `have[i]`.
        have: One byte per block.
        has: Are `count` blocks from `first` on all in place?
    """

    __slots__ = ("ahead", "coming", "data", "file", "has", "have", "index", "next_group", "number")

    def __init__(self, number: int, index: ObjectIndex, file: BlockFile | None) -> None:
        self.number = number
        self.index = index
        self.file = file
        # Without a file (the file system is full) nothing is ever in place.
        self.data = file.data if file else memoryview(b"")
        self.have = file.have if file else memoryview(bytes(index.blocks))
        self.has: Callable[[int, int], bool] = file.has if file else _nothing
        self.coming: dict[int, Future[dict[int, Group]]] = {}
        self.next_group = -1
        self.ahead = 1

    def groups(self, first: int, count: int) -> tuple[int, int]:
        """Return the first and the last group of `count` blocks from `first` on."""
        if first + count > self.index.blocks:
            raise DamagedError(
                f"object {self.number} has {self.index.blocks} blocks, block {first + count} is asked for"
            )
        found = np.searchsorted(self.index.first_block, (first, first + count - 1), "right") - 1
        return int(found[0]), int(found[1])

    def span(self, first_group: int, last_group: int) -> tuple[int, int]:
        """Return (first block, number of blocks) of a run of groups."""
        first = int(self.index.first_block[first_group])
        end = int(self.index.first_block[last_group]) + int(self.index.block_count[last_group])
        return first, end - first


class ObjectCache:
    """One process's view of the cache of one journal. Its public calls are thread-safe.

    Attributes:
        objects: Mapped objects by number, those used since the last `tidy`; for quick look-ups.
        pool: Threads for fetching. A job in it must not wait for another.
        fetched_bytes: Sealed bytes of groups that this process fetched.
    """

    def __init__(self, folder: CacheFolder, source: JournalSource, *, threads: int = FETCH_THREADS) -> None:
        """Serve from `folder`, filling it from `source`. Raises the process's limit of open files as far as it may."""
        _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
        self.folder = folder
        self._source = source
        self.pool = ThreadPoolExecutor(threads, "stack-fetch")
        self.objects: dict[int, CachedObject] = {}
        self._idle: dict[int, CachedObject] = {}
        self._opening: dict[int, Future[CachedObject]] = {}
        self._lock = Lock()
        self._full = False
        self._unswept_bytes = 0
        self.fetched_bytes = 0

    def close(self) -> None:
        """Wait for what is on its way and let every file go. Nothing is deleted: others use it."""
        self.pool.shutdown(cancel_futures=True)
        self.objects.clear()
        self._idle.clear()

    def find(self, number: int) -> CachedObject | None:
        """Return object `number` if it is mapped."""
        found = self.objects.get(number)
        if found is None:
            with self._lock:
                found = self._idle.pop(number, None)
                if found is not None:
                    self.objects[number] = found
        return found

    def open(self, number: int) -> Future[CachedObject]:
        """Map object `number`, fetching its index where no process of this node has it.

        The future raises `DamagedError`, or an error of the store.
        """
        with self._lock:
            coming = self._opening.get(number)
            if coming is None:
                coming = self._opening[number] = self.pool.submit(self._open, number)
        return coming

    def fetch(self, cached: CachedObject, first: int, count: int) -> list[Future[dict[int, Group]]]:
        """Begin to bring `count` blocks of an object, from block `first` on, into place.

        Returns:
            What to wait for. Each gives the groups that could not be kept, by number: their blocks, or an error.
            A future itself raises what the store raises; all is then as if nothing had been asked.
        """
        first_group, last_group = cached.groups(first, count)
        with self._lock:
            wanted = self._with_ahead(cached, first_group, last_group)
            waiting = []
            for begin, end in self._absent_runs(cached, wanted):
                job = self.pool.submit(self._fill, cached, begin, end)
                for group in range(begin, end + 1):
                    cached.coming[group] = job
            for group in range(first_group, last_group + 1):
                coming = cached.coming.get(group)
                if coming is not None and coming not in waiting:
                    waiting.append(coming)
        return waiting

    def rows(self, ref: ObjectRef) -> Rows:
        """Return the change rows of an object, mapped. Blocks while they are fetched."""
        name = f"rows-{ref.generation:08x}-{ref.number:08x}"
        table = self.folder.table(name, lambda: _bytes_of(self._source.rows(ref)))
        return np.frombuffer(table, ROW_DTYPE)

    def keyframe(self, ref: KeyframeRef) -> Keyframe:
        """Return a keyframe's directory. Blocks while it is fetched."""
        name = f"keyframe-{ref.generation:08x}-{ref.number:016x}"
        table = self.folder.table(name, lambda: _pack_homes(self._source.keyframe(ref)))
        return Keyframe(ref, _unpack_homes(table), None, [])

    def region(self, keyframe: Keyframe, disk: int, region: int) -> Locs | None:
        """Return a region of a keyframe's map, mapped and shared (never written), or None where all is holes."""
        home = keyframe.homes.get((disk, region))
        if home is None:
            return None

        def build() -> memoryview:
            locs = self._source.region(keyframe, disk, region)
            if locs is None:
                raise DamagedError(f"keyframe {keyframe.ref.number} has lost region {region} of disk {disk}")
            return _bytes_of(locs)

        table = self.folder.table(f"region-{home.generation:08x}-{home.number:016x}-{home.part:08x}", build)
        return np.frombuffer(table, np.uint64)

    def tidy(self) -> None:
        """Note what is in use, let idle objects go if there is need, and evict.

        To be called every half minute or so, and called here whenever a sixteenth of the limit was filled.
        """
        used_bytes = self.folder.used_bytes()
        with self._lock:
            used = dict(self.objects)
            self._full = False
            self._unswept_bytes = 0
            if used_bytes > self.folder.limit_bytes or len(used) + len(self._idle) > MAPPED_OBJECTS_MAX // 2:
                self._idle.clear()
            self._idle.update(used)
            self.objects.clear()
        for cached in used.values():
            if cached.file is not None:
                cached.file.touch()
        if used_bytes > self.folder.limit_bytes:
            self.folder.evict()

    def _open(self, number: int) -> CachedObject:
        try:
            name = "object-" + self._source.object_key(number).rpartition("/")[2]
            index = _unpack_index(self.folder.table(f"{name}.index", lambda: _pack_index(self._source.index(number))))
            try:
                file = self.folder.blocks(name, index.blocks)
            except OSError:
                file = None
            cached = CachedObject(number, index, file)
        finally:
            with self._lock:
                self._opening.pop(number, None)
        with self._lock:
            if len(self.objects) + len(self._idle) >= MAPPED_OBJECTS_MAX:
                self._idle.clear()
            if len(self.objects) >= MAPPED_OBJECTS_MAX:
                self._idle.update(self.objects)
                self.objects.clear()
            return self.objects.setdefault(number, cached)

    def _with_ahead(self, cached: CachedObject, first_group: int, last_group: int) -> tuple[int, int]:
        """Return the groups to ask for: more and more ahead while each request begins where the last one ended."""
        if first_group == cached.next_group and not self._full:
            cached.ahead = min(2 * cached.ahead, AHEAD_GROUPS_MAX)
            last_group = max(last_group, first_group + cached.ahead - 1)
        elif not cached.next_group - cached.ahead <= first_group < cached.next_group:
            cached.ahead = 1
        last_group = min(last_group, len(cached.index.first_block) - 1)
        cached.next_group = last_group + 1
        return first_group, last_group

    def _absent_runs(self, cached: CachedObject, wanted: tuple[int, int]) -> list[tuple[int, int]]:
        """Return runs (first, last) of groups that are neither in place nor on their way, bounded in length."""
        runs: list[tuple[int, int]] = []
        for group in range(wanted[0], wanted[1] + 1):
            if group in cached.coming or cached.has(*cached.span(group, group)):
                continue
            if runs and runs[-1][1] == group - 1 and group - runs[-1][0] < AHEAD_GROUPS_MAX:
                runs[-1] = (runs[-1][0], group)
            else:
                runs.append((group, group))
        return runs

    def _fill(self, cached: CachedObject, first_group: int, last_group: int) -> dict[int, Group]:
        """Bring a run of groups into place; return those that could not be kept."""
        try:
            lost: dict[int, Group] = {}
            first, count = cached.span(first_group, last_group)
            try:
                filling = cached.file.filling(first, count) if cached.file else None
            except OSError:
                filling = None  # No file could be opened, or someone removed it: serve without it.
            if filling is None:
                return dict(enumerate(self._read(cached, first_group, last_group), first_group))
            with filling:
                # Another process may have brought some of them while this one waited for its turn.
                absent = [g for g in range(first_group, last_group + 1) if not cached.has(*cached.span(g, g))]
                for begin, end in _runs(absent):
                    for group, data in enumerate(self._read(cached, begin, end), begin):
                        if isinstance(data, Exception) or not self._keep(cached, filling, group, data):
                            lost[group] = data
            if self._unswept_bytes > self.folder.limit_bytes >> 4:
                self.tidy()
            return lost
        finally:
            with self._lock:
                for group in range(first_group, last_group + 1):
                    cached.coming.pop(group, None)

    def _read(self, cached: CachedObject, first_group: int, last_group: int) -> Sequence[Group]:
        index = cached.index
        start = int(index.offset[first_group])
        length = int(index.offset[last_group]) + int(index.length[last_group]) - start
        try:
            groups = self._source.read_groups(cached.number, index, first_group, last_group - first_group + 1)
            with self._lock:
                self.fetched_bytes += length
            return groups
        except DamagedError as error:
            if first_group == last_group:
                return [error]
        # One of them is damaged: each alone, so that the others are served.
        return [group for g in range(first_group, last_group + 1) for group in self._read(cached, g, g)]

    def _keep(self, cached: CachedObject, filling: Filling, group: int, data: bytes | memoryview) -> bool:
        try:
            filling.put(cached.span(group, group)[0], data)
        except OSError:
            self._full = True
            return False
        self._unswept_bytes += len(data)
        return True


def _nothing(first: int, count: int) -> bool:
    return False


def _runs(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for group in groups:
        if runs and runs[-1][1] == group - 1:
            runs[-1] = (runs[-1][0], group)
        else:
            runs.append((group, group))
    return runs


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return memoryview(np.ascontiguousarray(array).view(np.uint8).data)


def _pack_index(index: ObjectIndex) -> bytes:
    """Return an index as numpy writes its arrays, one after the other."""
    file = io.BytesIO()
    streams = np.frombuffer(b"".join(index.streams), np.uint8)
    numbers = np.array(index.numbers, np.uint64)
    for array in (*index[:6], streams, numbers):
        np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _unpack_index(table: memoryview) -> ObjectIndex:
    file = io.BytesIO(table)
    first_block, block_count, offset, length, frame, group_in_frame, streams, numbers = (
        np.load(file, allow_pickle=False) for _ in range(8)
    )
    ids = streams.tobytes()
    return ObjectIndex(
        first_block=first_block,
        block_count=block_count,
        offset=offset,
        length=length,
        frame=frame,
        group_in_frame=group_in_frame,
        streams=[ids[i : i + 16] for i in range(0, len(ids), 16)],
        numbers=numbers.tolist(),
        blocks=int(block_count.sum()),
    )


def _pack_homes(keyframe: Keyframe) -> bytes:
    homes = [(disk, region, *home) for (disk, region), home in keyframe.homes.items()]
    return np.array([len(homes), *(n for home in homes for n in home)], np.uint64).tobytes()


def _unpack_homes(table: memoryview) -> dict[tuple[int, int], RegionHome]:
    homes: list[list[int]] = np.frombuffer(table, np.uint64, offset=8).reshape(-1, 7).tolist()
    return {(home[0], home[1]): RegionHome(*home[2:]) for home in homes}


assert BLOCK_SHIFT == 12, "the cache's files are laid out in blocks of 4096 bytes"
