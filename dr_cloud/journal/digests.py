"""The digest index: keyed digest of a block → loc of a durable copy in this scope's journal (LMDB, beside the target).

It is a cache: losing it costs space, never data. It must never be wrong, so an entry is made only after the checkpoint
that makes its loc durable, and the whole index is dropped on opening if it may not belong to the journal as it is now:

- the checkpoint that it last followed is not in the store as it knew it (another bucket, or one from a backup);
- the machine restarted without a clean close (pages are not forced to disk, so they may be torn).

Layout: key = 16-byte digest, value = u64 little-endian loc; key `NUL meta` (5 bytes, so never a digest) holds JSON
`{"number", "created_ns", "boot"}`. Bounded by LMDB's map size: when full, new entries are left out.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np
from numpy.typing import NDArray

from dr_cloud.model.journal import Checkpoint
from dr_cloud.seal.keys import DIGEST_BYTES

_log = logging.getLogger(__name__)

_META: Final = b"\0meta"
_MAP_BYTES: Final = 64 << 30
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class DigestIndex:
    """The index of one scope's journal, in a directory of its own. Look-ups may come from any thread."""

    def __init__(self, directory: Path, newest: Checkpoint | None) -> None:
        """Open the index in `directory` for a journal whose checkpoint record `newest` was just read, or begin anew."""
        self._directory = directory
        self._boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        self._env = self._open()
        meta = self._meta()
        fits = newest is not None and meta.get("number") == newest.number and meta["created_ns"] == newest.created_ns
        if meta and not (fits and meta.get("boot") in ("clean", self._boot)):
            self._env.close()
            shutil.rmtree(directory)
            self._env = self._open()
        self._last: Checkpoint | None = newest if fits else None

    def _open(self) -> Any:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return lmdb.open(str(self._directory), map_size=_MAP_BYTES, sync=False, metasync=False, max_readers=64)

    def _meta(self) -> dict[str, Any]:
        with self._env.begin() as txn:
            return json.loads(txn.get(_META) or b"{}")  # type: ignore[no-any-return]

    @staticmethod
    def followed(directory: Path) -> int | None:
        """Return the number of the checkpoint that the index in `directory` last followed, if there is one."""
        if not (directory / "data.mdb").exists():
            return None
        env = lmdb.open(str(directory), map_size=_MAP_BYTES, readonly=True, lock=False)
        try:
            with env.begin() as txn:
                number = json.loads(txn.get(_META) or b"{}").get("number")
                return int(number) if number is not None else None
        finally:
            env.close()

    def known(self, digests: bytes) -> NDArray[np.uint64]:
        """Return the loc of each 16-byte digest, 0 where none is known."""
        with self._env.begin(buffers=False) as txn:
            get = txn.get
            nothing = bytes(8)
            found = [get(digests[i : i + DIGEST_BYTES], nothing) for i in range(0, len(digests), DIGEST_BYTES)]
        return np.frombuffer(b"".join(found), "<u8")

    def add(self, digests: Sequence[bytes], first_locs: Sequence[int], checkpoint: Checkpoint) -> None:
        """Note the blocks that `checkpoint` made durable.

        Args:
            digests: Per frame its new blocks' digests, joined.
            first_locs: Per frame the loc of its first new block; the others follow one by one.
            checkpoint: The checkpoint, durable by now.
        """
        meta = json.dumps(
            {"number": checkpoint.number, "created_ns": checkpoint.created_ns, "boot": self._boot}
        ).encode()
        counts = [len(joined) // DIGEST_BYTES for joined in digests]
        keys = np.frombuffer(b"".join(digests), f"V{DIGEST_BYTES}")
        runs = [np.arange(first, first + count, dtype="<u8") for count, first in zip(counts, first_locs, strict=True)]
        locs = np.concatenate([np.empty(0, "<u8"), *runs])
        # In the order of the tree, so that each of its pages is visited once.
        order = np.lexsort(keys.view(">u8").reshape(-1, 2).T[::-1])
        pairs = zip(keys[order].tolist(), locs[order].view("V8").tolist(), strict=True)
        try:
            with self._env.begin(write=True) as txn:
                txn.cursor().putmulti(pairs, overwrite=False)
                txn.put(_META, meta)
        except lmdb.Error as error:
            # Its bounds or its disk are full. The checkpoint is durable all the same; these blocks stay unknown, and
            # what is known still follows the checkpoint before.
            _log.warning("digests of checkpoint %d are left out: %s", checkpoint.number, error)
            return
        self._last = checkpoint

    def close(self) -> None:
        """Close cleanly: the index will be there after a restart of the machine too."""
        if self._last is not None:
            meta = {"number": self._last.number, "created_ns": self._last.created_ns, "boot": "clean"}
            self._env.sync(True)
            with self._env.begin(write=True) as txn:
                txn.put(_META, json.dumps(meta).encode())
            self._env.sync(True)
        self._env.close()
