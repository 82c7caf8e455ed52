"""The journal object: every frame of one interval, the change rows made of it, and where each group lies.

An object is an envelope (`dr_cloud.journal.envelope`), magic "DRCJ", version 1, at
`<enterprise>/<vpg>/<target>/journal/<generation>-<number>.jrn`::

    section 0   index: u32 frames, u32 groups, then
                  per frame   16-byte stream, u64 number, u64 offset of its groups in the body, u32 groups, u32 blocks
                  per group   u32 sealed length
    section 1   rows: u64 count, then the packed fields of ROW_DTYPE (zstd; time, sequence and loc as differences),
                ascending (time, sequence)
    body        the frames, unchanged

Block i of the object is the i-th new block of its frames in order; a loc is (object number, i). Groups hold 16 blocks
but for the last of each frame.

A change row is one version of one block: from `time_ns` on, `block` of `disk` is at `loc`; before, at `previous`.
Read forward the rows are the redo journal, backward the undo journal. Rows of an object may point into earlier objects
(the same data again) or into an earlier one's frames (a write that came after that object's cut).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dr_cloud.journal.envelope import Opened, Sealer
from dr_cloud.journal.frame import Buffer, Frame, group_sizes, open_group, pack_fields, unpack_fields
from dr_cloud.model.blocks import BLOCK_SIZE, GROUP_BLOCKS
from dr_cloud.model.errors import DamagedError
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.store import Store

MAGIC: Final = b"DRCJ"
VERSION: Final = 1
ROW_DTYPE: Final = np.dtype(
    [
        ("time_ns", "<u8"),
        ("sequence", "<u8"),
        ("block", "<u8"),
        ("loc", "<u8"),
        ("previous", "<u8"),
        ("disk", "<u2"),
        ("pad", "V6"),
    ]
)
"""48 bytes, aligned: tables of it are mapped as they are."""
_PACKED_ROW: Final = np.dtype([(name, ROW_DTYPE[name]) for name in ROW_DTYPE.names or () if name != "pad"])
_ROW_DIFFERENCES: Final = ("time_ns", "sequence", "loc")
_COUNTS: Final = struct.Struct("<II")
_ROWS: Final = struct.Struct("<Q")
_FRAME_DTYPE: Final = np.dtype(
    [("stream", "V16"), ("number", "<u8"), ("offset", "<u8"), ("groups", "<u4"), ("blocks", "<u4")]
)
Rows = NDArray[Any]


def seal_object(keys: VpgKeys, key: str, frames: Sequence[Frame], rows: Rows) -> list[Buffer]:
    """Return, in parts, the journal object of `frames` and `rows`, to be stored at `key`."""
    table = np.zeros(len(frames), _FRAME_DTYPE)
    offset = 0
    for entry, frame in zip(table, frames, strict=True):
        entry["stream"] = frame.stream
        entry["number"] = frame.number
        entry["offset"] = offset + frame.groups_offset
        entry["groups"] = len(frame.group_lengths)
        entry["blocks"] = frame.block_count
        offset += len(frame.data)
    lengths = b"".join(frame.group_lengths.tobytes() for frame in frames)
    index = _COUNTS.pack(len(frames), len(lengths) // 4) + table.tobytes() + lengths
    packed = np.empty(len(rows), _PACKED_ROW)
    for name in _PACKED_ROW.names or ():
        packed[name] = rows[name]
    rows_section = _ROWS.pack(len(rows)) + pack_fields(packed, _ROW_DIFFERENCES)
    return Sealer(keys, key, MAGIC, VERSION).finish([index, rows_section], [frame.data for frame in frames])


class ObjectIndex(NamedTuple):
    """Where the groups of one journal object lie. Arrays have one entry per group."""

    first_block: NDArray[np.uint32]
    """The index in the object of each group's first block, ascending."""
    block_count: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    """Bytes from the start of the object."""
    length: NDArray[np.uint32]
    frame: NDArray[np.uint32]
    group_in_frame: NDArray[np.uint32]
    streams: list[bytes]
    numbers: list[int]
    blocks: int


def read_index(store: Store, keys: VpgKeys, key: str) -> ObjectIndex:
    """Fetch and check the index of the object at `key`."""
    opened = Opened(store, keys, key, MAGIC, VERSION)
    section = opened.section(0)
    frame_count, group_count = _COUNTS.unpack_from(section)
    if len(section) != _COUNTS.size + frame_count * _FRAME_DTYPE.itemsize + group_count * 4:
        raise opened.damaged("the index has another length than told")
    frames = np.frombuffer(section, _FRAME_DTYPE, frame_count, _COUNTS.size)
    lengths = np.frombuffer(section, "<u4", group_count, _COUNTS.size + frames.nbytes)
    if int(frames["groups"].sum(dtype=np.uint64)) != group_count:
        raise opened.damaged("the index counts its groups wrongly")
    frame_of = np.repeat(np.arange(frame_count, dtype=np.uint32), frames["groups"])
    first_group = np.concatenate(([0], np.cumsum(frames["groups"])[:-1])).astype(np.uint32) if frame_count else frame_of
    in_frame = np.arange(group_count, dtype=np.uint32) - first_group[frame_of]
    counts = np.array([size for blocks in frames["blocks"].tolist() for size in group_sizes(blocks)], np.uint32)
    before = np.cumsum(lengths, dtype=np.uint64) - lengths
    offset = frames["offset"][frame_of] + before - before[first_group[frame_of]] + np.uint64(opened.body_offset)
    return ObjectIndex(
        first_block=np.cumsum(counts, dtype=np.uint32) - counts,
        block_count=counts,
        offset=offset,
        length=lengths,
        frame=frame_of,
        group_in_frame=in_frame,
        streams=[stream.tobytes() for stream in frames["stream"]],
        numbers=frames["number"].tolist(),
        blocks=int(counts.sum()),
    )


def read_rows(store: Store, keys: VpgKeys, key: str) -> Rows:
    """Fetch and check the change rows of the object at `key`, `ROW_DTYPE`, ascending (time, sequence)."""
    opened = Opened(store, keys, key, MAGIC, VERSION)
    section = opened.section(1)
    (count,) = _ROWS.unpack_from(section)
    try:
        packed = unpack_fields(section[_ROWS.size :], count, _PACKED_ROW, _ROW_DIFFERENCES)
    except DamagedError as error:
        raise opened.damaged(str(error)) from error
    rows = np.zeros(count, ROW_DTYPE)
    for name in _PACKED_ROW.names or ():
        rows[name] = packed[name]
    return rows


def read_groups(store: Store, keys: VpgKeys, key: str, index: ObjectIndex, first: int, count: int) -> list[bytes]:
    """Fetch groups `first` … `first + count - 1` with one request and return each one's blocks.

    Frames' heads and columns between groups of two frames are fetched along; they are about one part in a hundred.
    """
    start = int(index.offset[first])
    last = first + count - 1
    length = int(index.offset[last]) + int(index.length[last]) - start
    data = memoryview(store.get_range(key, start, length))
    if len(data) != length:
        raise DamagedError(f"object {key} is damaged: {length} bytes wanted at {start}, {len(data)} are there")
    groups = []
    for group in range(first, first + count):
        begin = int(index.offset[group]) - start
        frame = int(index.frame[group])
        try:
            groups.append(
                open_group(
                    keys,
                    index.streams[frame],
                    index.numbers[frame],
                    int(index.group_in_frame[group]),
                    int(index.block_count[group]),
                    data[begin : begin + int(index.length[group])],
                )
            )
        except DamagedError as error:
            raise DamagedError(f"object {key} is damaged: {error}") from error
    return groups


def group_of(index: ObjectIndex, block: int) -> int:
    """Return the group that holds block `block` of the object."""
    return int(np.searchsorted(index.first_block, block, "right")) - 1


assert GROUP_BLOCKS * BLOCK_SIZE <= 1 << 16, "a group is read whole for one block: keep it small"
