"""For the tests of searches: a journal by its real writer, with writes at exact times."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from dr_cloud.journal.frame import COLUMN_DTYPE, seal_frame
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writer import JournalWriter
from dr_cloud.model.blocks import BLOCK_SIZE, LOCAL_BIT
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import CheckpointKind, Disk
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.store import Store

TAP = "a" * 32
BLOCKS = 1 << 18


class WrittenJournal:
    """A journal, and the time of every block that was written to it."""

    def __init__(self, store: Store, scope: Scope, begun_ns: int) -> None:
        self.keys = VpgKeys(bytes(range(32)), scope)
        self.scope = scope
        self._store = store
        self.writer = JournalWriter.open(store, self.keys, scope, clock_ns=lambda: 5)
        self.writer.set_disks([Disk(index=0, name="sda", size_bytes=BLOCKS * BLOCK_SIZE)])
        self.times: list[int] = []
        self._stream, self._number, self._sequence = secrets.token_bytes(16), 0, 0
        self.cut(begun_ns, exact=False)

    def write(self, times_ns: Sequence[int]) -> None:
        """Write one block at each time; times that are told twice are one write of two blocks."""
        content = bytes([self._number % 255 + 1]) * BLOCK_SIZE
        columns = np.zeros(len(times_ns), COLUMN_DTYPE)
        columns["time_ns"] = times_ns
        columns["sequence"] = np.arange(self._sequence + 1, self._sequence + len(times_ns) + 1)
        columns["block"] = columns["sequence"] % BLOCKS
        columns["count"] = 1
        columns["ref"] = LOCAL_BIT
        self._sequence += len(times_ns)
        self._number += 1
        frame = seal_frame(self.keys, self._stream, self._number, columns, [content], self.keys.digest(content))
        self.writer.append(b"".join(frame), [TAP])
        self.times += times_ns

    def cut(self, at_ns: int, kind: CheckpointKind = "auto", *, exact: bool = True, tag: str = "") -> None:
        """Make everything up to a time durable."""
        self.writer.commit(self.writer.cut(at_ns, kind, {}, exact=exact, tag=tag))

    def reader(self) -> JournalReader:
        return JournalReader(self._store, self.keys, self.scope, self.writer.newest.generations)
