"""For the tests of stacks: a journal made by its real writer, and beside it a dictionary of versions."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dr_cloud.journal.frame import COLUMN_DTYPE, seal_frame
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writer import JournalWriter
from dr_cloud.model.blocks import BLOCK_SIZE, LOCAL_BIT
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk, ImagePlan
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.store.store import Store

SCOPE = Scope("acme", "shop", "dc1")
KEYS = VpgKeys(bytes(range(32)), SCOPE)
TAP = "a" * 32


class History:
    """A journal of `disks`, and every version of every block that was written to it."""

    def __init__(self, store: Store, disks: Sequence[Disk], work_dir: Path | None = None) -> None:
        self.store = store
        self.disks = list(disks)
        self.writer = JournalWriter.open(store, KEYS, SCOPE, clock_ns=lambda: 1, work_dir=work_dir)
        self.writer.set_disks(self.disks)
        self.time_ns = 1_000
        self.versions: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        self._stream, self._number, self._sequence = secrets.token_bytes(16), 0, 0
        self._columns: list[tuple[int, ...]] = []
        self._blocks: list[bytes] = []
        self.checkpoint(exact=False)

    def write(self, disk: int, block: int, data: bytes | None, count: int = 1) -> int:
        """Write blocks of one content (None: a hole), each at once; return the time."""
        self.time_ns += 1
        self._sequence += 1
        if data is None:
            self._columns.append((self._sequence, self.time_ns, block, 0, count, disk, 0))
        else:
            for at in range(block, block + count):
                self._columns.append((self._sequence, self.time_ns, at, LOCAL_BIT | len(self._blocks), 1, disk, 0))
                self._blocks.append(data)
        for at in range(block, block + count):
            self.versions.setdefault((disk, at), []).append((self.time_ns, data or bytes(BLOCK_SIZE)))
        if len(self._blocks) >= 1024:
            self._send()
        return self.time_ns

    def checkpoint(self, *, exact: bool = True) -> int:
        """Make what was written durable; return its time."""
        self._send()
        checkpoint = self.writer.commit(self.writer.cut(self.time_ns, "auto", {}, exact=exact))
        if self.writer._keyframe_job:
            self.writer._keyframe_job[0].result()
        return checkpoint.time_ns

    def plan(self, at_ns: int) -> ImagePlan:
        return self.writer.catalogue.plan(at_ns)

    def at(self, disk: int, block: int, at_ns: int) -> bytes:
        content = bytes(BLOCK_SIZE)
        for when, data in self.versions.get((disk, block), []):
            if when <= at_ns:
                content = data
        return content

    def disk_at(self, disk: int, at_ns: int) -> bytes:
        size = next(d.size_bytes for d in self.disks if d.index == disk)
        return b"".join(self.at(disk, block, at_ns) for block in range((size + 4095) // 4096))[:size]

    def _send(self) -> None:
        if self._columns:
            self._number += 1
            digests = b"".join(KEYS.digest(data) for data in self._blocks)
            columns = np.array(self._columns, COLUMN_DTYPE)
            self.writer.append(
                b"".join(seal_frame(KEYS, self._stream, self._number, columns, self._blocks, digests)), [TAP]
            )
            self._columns, self._blocks = [], []


def open_cache(
    root: Path, store: Store, plan: ImagePlan, *, limit_bytes: int = 1 << 30, threads: int = 4
) -> ObjectCache:
    reader = JournalReader(store, KEYS, SCOPE, plan.generations)
    return ObjectCache(CacheFolder(root, plan.scope, plan.journal, limit_bytes), reader, threads=threads)


async def answer(result: Awaitable[Any] | Any) -> Any:
    return await result if isinstance(result, Awaitable) else result


async def read(export: Any, offset: int, length: int) -> bytes:
    parts = await answer(export.pread(offset, length))
    return b"".join(map(bytes, parts))
