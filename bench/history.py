"""Histories to open stacks on: written by the journal's real writer, from sealed frames, faster than guests would."""

from __future__ import annotations

import secrets
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.content import Bytes
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.frame import COLUMN_DTYPE, seal_frame
from dr_cloud.journal.writer import JournalWriter
from dr_cloud.model.blocks import BLOCK_SIZE, LOCAL_BIT
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.store import Store

TAP: Final = "b" * 32
STEP_NS: Final = 200_000
"""Between two writes: 5,000 a second."""
FRAME_WRITES: Final = 1024
DAY_NS: Final = 86_400 * 10**9


class History:
    """Writes to one disk, at times of the past day."""

    def __init__(self, store: Store, keyring: Keyring, scope: Scope, size_bytes: int, step_ns: int = STEP_NS) -> None:
        """Begin the journal of `scope` with one empty disk; `step_ns` is the time between two writes."""
        self._step_ns = step_ns
        keyring.create(scope.enterprise)
        self.keys = keyring.vpg_keys(scope)
        self.scope = scope
        self.disk = Disk(index=0, name="disk", size_bytes=size_bytes)
        self._writer = JournalWriter.open(store, self.keys, scope, clock_ns=time.time_ns)
        self._writer.set_disks([self.disk])
        self._stream, self._number, self._sequence = secrets.token_bytes(16), 0, 0
        self.time_ns = time.time_ns() - DAY_NS
        self.checkpoint(exact=False)

    def write(self, blocks: NDArray[np.uint64], content: Bytes) -> None:
        """Write 4 KiB to each of `blocks`, one after the other; their bytes are those of `content`, again and again."""
        held = content.data
        pages = len(held) // BLOCK_SIZE
        for first in range(0, len(blocks), FRAME_WRITES):
            part = blocks[first : first + FRAME_WRITES]
            count = len(part)
            new = min(count, pages)
            columns = np.zeros(count, COLUMN_DTYPE)
            steps = np.arange(1, count + 1, dtype=np.uint64)
            columns["sequence"] = np.uint64(self._sequence) + steps
            columns["time_ns"] = np.uint64(self.time_ns) + steps * np.uint64(self._step_ns)
            columns["block"] = part
            columns["count"] = 1
            columns["ref"] = (steps - np.uint64(1)) % np.uint64(new) | np.uint64(LOCAL_BIT)
            data = []
            for page in range(first, first + new):
                at = page % pages * BLOCK_SIZE
                data.append(held[at : at + BLOCK_SIZE])
            digests = b"".join(self.keys.digest(block) for block in data)
            self._number += 1
            frame = b"".join(seal_frame(self.keys, self._stream, self._number, columns, data, digests))
            self._writer.append(frame, [TAP])
            self._sequence += count
            self.time_ns += count * self._step_ns
            if self._writer.pending_bytes > 32 << 20:
                self.checkpoint()

    @property
    def catalogue(self) -> Catalogue:
        """What the journal holds."""
        return self._writer.catalogue

    def checkpoint(self, *, exact: bool = True) -> None:
        """Make what was written durable."""
        cut = self._writer.cut(self.time_ns, "auto", {TAP: self._sequence}, exact=exact)
        self._writer.commit(cut)

    def close(self) -> None:
        """Let the journal go."""
        self.checkpoint()
        self._writer.close()
