"""The journal's one writer: frames in, checkpoints out. One per scope; every change of the journal goes through it.

Purpose
    Appends frames in order, moves the replica map forward at each cut, makes cuts durable in the store.

Layout
    One journal object and one checkpoint per interval; a keyframe after `KEYFRAME_ROWS` change rows or
    `KEYFRAME_CHECKPOINTS` intervals, made in a thread beside the stream and named by a later checkpoint.

Consistency
    A cut at time T takes every entry with time ≤ T, in (time, sequence) order; later entries wait for the next cut,
    with their bytes where they already lie. An entry whose time is not after the last cut (a tap that joined with its
    clock behind) is given the first time after it: order within its tap is kept, no image that could be seen changes.

Order of durability
    object → checkpoint that names it; then, and only then, the digests become known for "same as", and the caller may
    acknowledge. A crash before the checkpoint leaves an object that nobody names, under a key that no later writer uses
    (its generation), to be deleted by retention.

One writer
    `open` claims the next generation by creating `writers/<generation>`, then creates an `open` checkpoint in its own
    name. Checkpoint numbers are taken with put-if-absent, so from then on the older writer's next checkpoint fails, it
    raises `FencedError`, and stops. A checkpoint that the older writer got in first is adopted.

Retries
    The store retries what is temporary. If `commit` still fails it may be called again with the same cut; the bytes are
    kept, and an object that is there with the same bytes was ours.

Crash recovery
    `open`: catalogue from the bucket, newest keyframe, the rows since: the map as at the newest checkpoint. What was
    received after it is gone, was never acknowledged, and is sent again by the taps' intent bitmaps.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dr_cloud.journal.catalogue import Catalogue, read_after
from dr_cloud.journal.checkpoint import read_checkpoint, seal_checkpoint, seal_claim
from dr_cloud.journal.digests import DigestIndex
from dr_cloud.journal.frame import COLUMN_DTYPE, Buffer, Columns, Frame, check_groups, open_frame
from dr_cloud.journal.keyframe import Keyframe, read_keyframe, seal_keyframe
from dr_cloud.journal.objects import ROW_DTYPE, seal_object
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.replica import Locs, RegionKey, ReplicaMap
from dr_cloud.model.blocks import LOCAL_BIT, blocks_of, make_loc
from dr_cloud.model.errors import DamagedError, DrCloudError, FencedError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, CheckpointKind, Disk, KeyframeRef, ObjectRef
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.errors import ObjectExistsError
from dr_cloud.store.store import Store

_log = logging.getLogger(__name__)

KEYFRAME_ROWS: Final = 1 << 17
KEYFRAME_CHECKPOINTS: Final = 128
OBJECT_BYTES_MAX: Final = 64 << 20
_ENTRY_BYTES: Final = ROW_DTYPE.itemsize


@dataclass
class Cut:
    """One interval on its way to the store. `commit` may be called with it until it succeeds."""

    checkpoint: Checkpoint
    object_key: str = ""
    object_parts: list[Buffer] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    first_locs: list[int] = field(default_factory=list)
    changed: dict[RegionKey, Locs] | None = None
    """The regions of the keyframe that is due after this checkpoint; None if none is due."""


class JournalWriter:
    """The writer of one scope. `append` and `cut` belong to one thread; `commit` to one at a time; `known` to any."""

    def __init__(
        self, store: Store, keys: VpgKeys, scope: Scope, clock_ns: Callable[[], int], catalogue: Catalogue, claim: int
    ) -> None:
        """Use `JournalWriter.open`."""
        self._store = store
        self._keys = keys
        self._clock_ns = clock_ns
        self.scope = scope
        self.generation = claim
        self.catalogue = catalogue
        self.late_entries = 0
        """Entries whose time was not after the cut before them."""
        self._map = ReplicaMap()
        self._index: DigestIndex | None = None
        self._waiting: list[Columns] = []
        self._waiting_entries = 0
        self._frames: list[Frame] = []
        self._first_locs: list[int] = []
        self._frame_bytes = 0
        self._blocks = 0
        self._keyframe: Keyframe | None = None
        self._keyframe_job: tuple[Future[Keyframe], dict[RegionKey, Locs]] | None = None
        self._keyframe_under_way = False
        self._keyframe_at = (0, 0)

    @classmethod
    def open(
        cls,
        store: Store,
        keys: VpgKeys,
        scope: Scope,
        *,
        clock_ns: Callable[[], int],
        work_dir: Path | None = None,
    ) -> JournalWriter:
        """Claim the journal of `scope` and recover its state from the store. Blocking.

        Args:
            store: The object store.
            keys: The scope's keys.
            scope: Whose journal.
            clock_ns: Nanoseconds since the epoch; for records of creation only.
            work_dir: Where the digest index lies; without one nothing is deduplicated.
        """
        claimed = [layout.parse_writer_key(key) for key, _ in store.list(layout.writer_prefix(scope))]
        generation = max(claimed, default=0) + 1
        while True:
            try:
                store.put_new(*seal_claim(keys, generation, clock_ns()))
                break
            except ObjectExistsError:
                generation += 1
        catalogue = Catalogue.load(store, keys, scope)
        followed = DigestIndex.followed(work_dir) if work_dir else None
        index = None
        if work_dir:
            known = followed is not None and followed < len(catalogue.checkpoints)
            index = DigestIndex(work_dir, catalogue.checkpoints[followed] if known and followed is not None else None)
        writer = cls(store, keys, scope, clock_ns, catalogue, generation)
        writer._index = index
        writer._take_over()
        writer._recover_map()
        return writer

    def _take_over(self) -> None:
        while True:
            before = self.catalogue.newest
            used = max((ref.number for c in self.catalogue.checkpoints for ref in c.objects), default=0)
            opening = Checkpoint(
                number=before.number + 1 if before else 0,
                generation=self.generation,
                journal=before.journal if before else secrets.token_hex(16),
                kind="open",
                time_ns=before.time_ns if before else 0,
                exact_from_ns=before.time_ns if before else 0,
                created_ns=self._clock_ns(),
                cuts=before.cuts if before else {},
                disks=before.disks if before else [],
                rows_before=before.rows_before + before.rows if before else 0,
                generations=[*(before.generations if before else []), (used + 1, self.generation)],
            )
            try:
                self._store.put_new(*seal_checkpoint(self._keys, opening))
                break
            except ObjectExistsError:
                for checkpoint in read_after(self._store, self._keys, opening.number):
                    if checkpoint.generation > self.generation:
                        raise self._fenced(checkpoint) from None
                    self.catalogue.add(checkpoint)
        self.catalogue.add(opening)
        self.cuts: dict[str, int] = dict(opening.cuts)
        self._cuts: dict[str, int] = dict(opening.cuts)
        self.disks: list[Disk] = list(opening.disks)
        self._object_number = used + 1
        self._last = opening
        self._rows_total = opening.rows_before

    def _recover_map(self) -> None:
        reader = JournalReader(self._store, self._keys, self.scope, self._last.generations)
        after = 0
        with ThreadPoolExecutor(8) as pool:
            if self.catalogue.keyframes:
                ref = self.catalogue.keyframes[-1]
                keyframe = self._keyframe = read_keyframe(
                    self._store, self._keys, ref.number, ref.generation, page=True
                )
                regions = pool.map(lambda region: reader.region(keyframe, *region), keyframe.homes)
                for region, locs in zip(keyframe.homes, regions, strict=True):
                    if locs is not None:
                        self._map.load(region, locs)
                after = ref.number + 1
                self._keyframe_at = (ref.number, ref.rows_before)
            since = self.catalogue.checkpoints[after:]
            for rows in pool.map(reader.rows, [ref for c in since for ref in c.objects if ref.rows]):
                self._map.replay(rows)

    @property
    def newest(self) -> Checkpoint:
        """The newest durable checkpoint of any kind."""
        newest = self.catalogue.newest
        assert newest is not None, "a writer opens with a checkpoint"
        return newest

    @property
    def pending_bytes(self) -> int:
        """What the next object will hold, rows included: cut when it nears `OBJECT_BYTES_MAX`."""
        return self._frame_bytes + self._waiting_entries * _ENTRY_BYTES

    def set_disks(self, disks: Sequence[Disk]) -> None:
        """Make `disks` the disks from the next cut on. An index stands for one disk for ever.

        What a disk loses (it shrinks, or is not in the list any more) are holes from then on; earlier times keep it.
        """
        sizes = {disk.index: blocks_of(disk.size_bytes) for disk in disks}
        if len(sizes) != len(disks):
            raise DrCloudError(f"two disks of {self.scope.prefix} have one index", "Give each disk its own index.")
        for disk in self.disks:
            before, after = blocks_of(disk.size_bytes), sizes.get(disk.index, 0)
            if after < before:
                self._truncate(disk.index, after, before - after)
        self.disks = sorted(disks, key=lambda disk: disk.index)

    def _truncate(self, disk: int, first: int, count: int) -> None:
        """Forget entries that wait behind the new end, and make a hole of what was there at the last cut."""
        for at, columns in enumerate(self._waiting):
            here = columns["disk"] == disk
            kept = columns[~here | (columns["block"] < first)].copy()
            inside = kept["disk"] == disk
            kept["count"][inside] = np.minimum(kept["count"][inside], first - kept["block"][inside])
            self._waiting[at] = kept
        hole = np.zeros(1, COLUMN_DTYPE)
        # A time that has passed: the next cut makes it the first time after the last one.
        hole["disk"], hole["block"], hole["count"] = disk, first, count
        self._waiting.append(hole)
        self._waiting_entries = sum(map(len, self._waiting))

    def forget_taps(self, taps: Iterable[str]) -> None:
        """Name these taps in no later checkpoint's `cuts`, unless they come back."""
        for tap in taps:
            self._cuts.pop(tap, None)

    def known(self, digests: bytes) -> NDArray[np.uint64]:
        """Return for each 16-byte digest the loc of a durable copy, or 0."""
        if self._index is None:
            return np.zeros(len(digests) // 16, np.uint64)
        return self._index.known(digests)

    def append(self, data: Buffer, taps: Sequence[str]) -> None:
        """Take the next frame. `DamagedError` if it does not open, or names what cannot be; nothing is changed then.

        Args:
            data: The sealed frame. It is kept, not copied.
            taps: The ids that the column `tap` indexes.
        """
        frame = open_frame(self._keys, data)
        # What becomes durable is forgotten by the tap: nothing may be in it that cannot be read again.
        check_groups(self._keys, frame)
        columns = frame.columns
        if len(columns):
            if int(columns["tap"].max()) >= len(taps):
                raise DamagedError(f"frame {frame.number} names a tap that its stream has not")
            blocks = {disk.index: (disk.size_bytes + 4095) >> 12 for disk in self.disks}
            for disk in np.unique(columns["disk"]).tolist():
                part = columns[columns["disk"] == disk]
                end = part["block"] + part["count"]
                if int(end.max()) > blocks.get(disk, 0) or int(part["block"].max()) >= blocks.get(disk, 0):
                    raise DamagedError(f"frame {frame.number} writes outside disk {disk}")
            ref = columns["ref"]
            local = ref >= np.uint64(LOCAL_BIT)
            other = ref[~local & (ref != 0)]
            if len(other) and int(other.max()) >> 32 >= self._object_number:
                raise DamagedError(f"frame {frame.number} names a block that is not stored yet")
            if (columns["count"][ref != 0] != 1).any() or (columns["count"] == 0).any():
                raise DamagedError(f"frame {frame.number} has an entry with a wrong count")
            base = make_loc(self._object_number, self._blocks)
            ref[local] = (ref[local] ^ np.uint64(LOCAL_BIT)) + np.uint64(base)
            self._waiting.append(columns)
            self._waiting_entries += len(columns)
        self._frames.append(frame)
        self._first_locs.append(make_loc(self._object_number, self._blocks))
        self._frame_bytes += len(frame.data)
        self._blocks += frame.block_count

    def cut(
        self,
        time_ns: int,
        kind: CheckpointKind,
        cuts: Mapping[str, int],
        *,
        exact: bool,
        tag: str = "",
        description: str = "",
        request: str = "",
        stream: str = "",
    ) -> Cut:
        """End the interval at `time_ns`: every entry up to it was appended before this call.

        Args:
            time_ns: The cut's time; one that is not after the cut before it stands for that one's.
            kind: What the checkpoint is.
            cuts: The last sequence of each tap that is in it.
            exact: False where the order of writes since the checkpoint before is not known.
            tag: A name given by hand.
            description: Its description.
            request: The id of the request that it fulfils.
            stream: The id of the stream that it is cut from.
        """
        time_ns = max(time_ns, self._last.time_ns)
        late_ns = np.uint64(self._last.time_ns + 1)
        waiting = np.concatenate(self._waiting) if self._waiting else np.empty(0, COLUMN_DTYPE)
        late = waiting["time_ns"] < late_ns
        if late.any():
            self.late_entries += int(late.sum())
            waiting["time_ns"][late] = late_ns
        taken = waiting["time_ns"] <= np.uint64(time_ns)
        rest = waiting[~taken]
        chosen = waiting[taken]
        rows = self._map.promote(chosen[np.lexsort((chosen["sequence"], chosen["time_ns"]))])
        self._waiting = [rest] if len(rest) else []
        self._waiting_entries = len(rest)
        has_object = bool(self._frames) or len(rows) > 0
        key = layout.journal_key(self.scope, self.generation, self._object_number) if has_object else ""
        data = seal_object(self._keys, key, self._frames, rows) if has_object else []
        ref = ObjectRef(
            number=self._object_number,
            generation=self.generation,
            size_bytes=sum(map(len, data)),
            blocks=self._blocks,
            rows=len(rows),
        )
        before = self._last
        self._cuts.update(cuts)
        exact = exact and before.testable
        checkpoint = Checkpoint(
            number=before.number + 1,
            generation=self.generation,
            journal=before.journal,
            kind=kind,
            time_ns=time_ns,
            exact_from_ns=before.time_ns if exact else time_ns,
            created_ns=self._clock_ns(),
            tag=tag,
            description=description,
            request=request,
            stream=stream,
            cuts=dict(self._cuts),
            disks=self.disks,
            objects=[ref] if has_object else [],
            rows_before=self._rows_total,
            keyframes=self._finished_keyframe(),
            generations=before.generations,
        )
        cut = Cut(checkpoint, key, data, [frame.digests for frame in self._frames], self._first_locs)
        self._last = checkpoint
        self._rows_total += len(rows)
        self._object_number += has_object
        # New lists even when the old ones are empty: the cut holds them, and frames come before its commit.
        self._frames, self._first_locs, self._frame_bytes, self._blocks = [], [], 0, 0
        number, rows_before = self._keyframe_at
        new_rows = self._rows_total - rows_before
        if not self._keyframe_under_way and (
            new_rows >= KEYFRAME_ROWS or (new_rows and checkpoint.number - number >= KEYFRAME_CHECKPOINTS)
        ):
            cut.changed = self._map.freeze()
            self._keyframe_under_way = True
            self._keyframe_at = (checkpoint.number, self._rows_total)
        return cut

    def commit(self, cut: Cut) -> Checkpoint:
        """Make a cut durable: object, then checkpoint. Blocking; cuts in their order, one at a time.

        Errors: `StoreUnavailableError`: call again with the same cut. `FencedError`: another writer has taken over;
        nothing of this cut can be seen, nothing after it may be committed.
        """
        if cut.object_key:
            try:
                self._store.put_new(cut.object_key, cut.object_parts)
            except ObjectExistsError:
                if self._store.get(cut.object_key) != b"".join(cut.object_parts):
                    raise DamagedError(f"object {cut.object_key} is there, with other bytes than ours") from None
        checkpoint = cut.checkpoint
        try:
            self._store.put_new(*seal_checkpoint(self._keys, checkpoint))
        except ObjectExistsError:
            other = read_checkpoint(self._store, self._keys, checkpoint.number)
            if other != checkpoint:
                raise self._fenced(other) from None
        self.catalogue.add(checkpoint)
        self.cuts = dict(checkpoint.cuts)
        if self._index is not None:
            self._index.add(cut.digests, cut.first_locs, checkpoint)
        if cut.changed is not None:
            # A thread for this one: many writers share a process, and none keeps a thread that waits.
            pool = ThreadPoolExecutor(1, "keyframe")
            self._keyframe_job = (pool.submit(self._store_keyframe, checkpoint, cut.changed), cut.changed)
            pool.shutdown(wait=False)
        return checkpoint

    def _fenced(self, other: Checkpoint) -> FencedError:
        return FencedError(
            f"writer generation {self.generation} of {self.scope.prefix} is out: "
            f"generation {other.generation} has checkpoint {other.number}",
            "Stop this writer; the newer one serves the journal.",
        )

    def _store_keyframe(self, checkpoint: Checkpoint, changed: dict[RegionKey, Locs]) -> Keyframe:
        ref = KeyframeRef(
            number=checkpoint.number,
            generation=self.generation,
            time_ns=checkpoint.time_ns,
            rows_before=checkpoint.rows_before + checkpoint.rows,
        )
        first = self._keyframe.ref.number + 1 if self._keyframe else 0
        page = self.catalogue.checkpoints[first : checkpoint.number + 1]
        key, data, keyframe = seal_keyframe(self._keys, ref, self._keyframe, changed, page)
        self._store.put_new(key, data)
        return keyframe

    def _finished_keyframe(self) -> list[KeyframeRef]:
        """Return the keyframe that became durable since the last call, if one did."""
        if self._keyframe_job is None or not self._keyframe_job[0].done():
            return []
        job, changed = self._keyframe_job
        self._keyframe_job = None
        self._keyframe_under_way = False
        self._map.thaw()
        error = job.exception()
        if error is None:
            self._keyframe = job.result()
            return [self._keyframe.ref]
        if not isinstance(error, DrCloudError):
            raise error
        _log.warning("keyframe of %s not stored, next try at the next checkpoint: %s", self.scope.prefix, error)
        self._map.changed |= changed.keys()
        self._keyframe_at = (self._keyframe.ref.number, self._keyframe.ref.rows_before) if self._keyframe else (0, 0)
        return []

    def close(self) -> None:
        """Wait for a keyframe under way and close the digest index. Frames that were not cut are forgotten."""
        if self._keyframe_job is not None:
            wait([self._keyframe_job[0]])
        if self._index is not None:
            self._index.close()
