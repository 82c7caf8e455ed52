"""From records to a sealed frame: the work that a source VDSA does in threads, one batch at a time.

`prepare` hashes every block (zero blocks become holes, equal blocks of the batch become one), so that the digests can
be offered to the target; `seal` leaves out the blocks that the target knows, compresses and encrypts the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dr_cloud.journal.frame import COLUMN_DTYPE, LEVEL, seal_frame
from dr_cloud.link.messages import FRAME, data_head
from dr_cloud.model.blocks import BLOCK_SIZE, HOLE, LOCAL_BIT
from dr_cloud.seal.keys import DIGEST_BYTES, VpgKeys
from dr_cloud.tap import wire
from dr_cloud.vdsa.feed import Record

BATCH_BLOCKS_MAX: Final = 512
BATCH_RECORDS_MAX: Final = 1024
_LOCAL: Final = np.uint64(LOCAL_BIT)


class Batch:
    """Records of one frame to be, in stream order, each with its tap's place in the stream's list of taps."""

    __slots__ = ("blocks", "places", "records")

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.places: list[int] = []
        self.blocks = 0

    def fits(self, record: Record) -> bool:
        """Whether `record` may still be added."""
        more = record.blocks if record.type == wire.WRITE else 0
        return self.blocks + more <= BATCH_BLOCKS_MAX and len(self.records) < BATCH_RECORDS_MAX

    def add(self, place: int, record: Record) -> None:
        """Add a WRITE or ZERO record."""
        self.records.append(record)
        self.places.append(place)
        if record.type == wire.WRITE:
            self.blocks += record.blocks


class Prepared(NamedTuple):
    """A hashed batch: in `columns`, `ref` is a hole or LOCAL_BIT | k for `blocks[k]`, whose digest is the k-th."""

    columns: NDArray[Any]
    blocks: Sequence[memoryview]
    digests: bytes


def prepare(keys: VpgKeys, batch: Batch) -> Prepared:
    """Hash the blocks of `batch`."""
    digest_of = keys.digest
    zero = digest_of(bytes(BLOCK_SIZE))
    places: dict[bytes, int] = {zero: HOLE}
    blocks: list[memoryview] = []
    refs: list[int] = []
    for record in batch.records:
        body = record.body
        if record.type == wire.ZERO:
            refs.append(HOLE)
            continue
        for offset in range(0, len(body), BLOCK_SIZE):
            block = body[offset : offset + BLOCK_SIZE]
            digest = digest_of(block)
            ref = places.get(digest)
            if ref is None:
                ref = places[digest] = LOCAL_BIT | len(blocks)
                blocks.append(block)
            refs.append(ref)
    del places[zero]

    records = batch.records
    writes = np.array([record.type == wire.WRITE for record in records], bool)
    counts = np.array([record.blocks for record in records], np.int64)
    entries = np.where(writes, counts, 1)
    first = np.cumsum(entries) - entries
    columns = np.zeros(len(refs), COLUMN_DTYPE)
    columns["sequence"] = np.repeat(np.array([record.sequence for record in records], np.uint64), entries)
    columns["time_ns"] = np.repeat(np.array([record.time_ns for record in records], np.uint64), entries)
    steps = np.arange(len(refs), dtype=np.int64) - np.repeat(first, entries)
    columns["block"] = np.repeat(np.array([record.block for record in records], np.uint64), entries) + steps.astype(
        np.uint64
    )
    columns["ref"] = np.array(refs, np.uint64)
    columns["count"] = np.repeat(np.where(writes, 1, counts), entries)
    columns["disk"] = np.repeat(np.array([record.disk for record in records], np.uint16), entries)
    columns["tap"] = np.repeat(np.array(batch.places, np.uint16), entries)
    return Prepared(columns, blocks, b"".join(places))


def seal(
    keys: VpgKeys, stream: bytes, number: int, prepared: Prepared, locs: NDArray[np.uint64], level: int = LEVEL
) -> list[bytes]:
    """Return, in parts, the frame message of item `number`. `locs` has the target's loc of each block, 0 if unknown."""
    columns, blocks, digests = prepared
    if locs.any():
        new = locs == 0
        refs = np.where(new, _LOCAL | (np.cumsum(new) - 1).astype(np.uint64), locs)
        local = columns["ref"] >= _LOCAL
        columns["ref"][local] = refs[(columns["ref"][local] ^ _LOCAL).astype(np.intp)]
        kept = np.flatnonzero(new).tolist()
        blocks = [blocks[k] for k in kept]
        digests = b"".join(digests[k * DIGEST_BYTES : (k + 1) * DIGEST_BYTES] for k in kept)
    return [data_head(FRAME, number), *seal_frame(keys, stream, number, columns, blocks, digests, level)]
