"""The frame: what a source VDSA seals and the target appends to a journal object unchanged.

Layout, version 1, little-endian::

    offset  size  field
         0     4  magic "DRCF"
         4     2  version (1)
         6     2  flags (0)
         8    16  stream     random id of the source's stream
        24     8  number     1, 2, 3 … within the stream
        32     4  columns    bytes of the sealed columns section
        36     4  data       bytes of all sealed groups
        40     4  writes     entries of the columns
        44     4  blocks     new blocks in the groups
        48     4  groups
        52     4  packed     bytes of the packed entries inside the columns section
        56     4  reserved (0)
        60     4  CRC-32C of the 60 bytes before
        64        columns section: AES-256-GCM of
                      packed entries (zstd of the fields one after another, sequence and time as differences)
                      16-byte digest of each new block
                      u32 sealed length of each group
                  groups: AES-256-GCM each of ≤ 16 blocks, zstd level 1, or as they are where that is not shorter
                      (told by the length: blocks × 4096 + 16)

Key: the stream's (`VpgKeys.frame_cipher`). Nonce: number (u64) | group (u32), 0xFFFFFFFF for the columns. Associated
data: the scope, and for the columns the whole head; for a group its count of blocks. So a frame or group opens only in
its own enterprise, VPG, target, stream and place. The columns, and each group, can be read alone.

An entry (`COLUMN_DTYPE`) is one block of one write, or `count` blocks of zeroes. A guest write of many blocks is many
entries of one sequence and time. Version history: 1 first.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
import zstandard
from cryptography.exceptions import InvalidTag
from numpy.typing import NDArray

from dr_cloud.model.blocks import BLOCK_SIZE, GROUP_BLOCKS, LOCAL_BIT
from dr_cloud.model.errors import DamagedError
from dr_cloud.seal.keys import DIGEST_BYTES, TAG_BYTES, VpgKeys

COLUMN_DTYPE: Final = np.dtype(
    [
        ("sequence", "<u8"),
        ("time_ns", "<u8"),
        ("block", "<u8"),
        ("ref", "<u8"),
        ("count", "<u4"),
        ("disk", "<u2"),
        ("tap", "<u2"),
    ]
)
Columns = NDArray[Any]
Buffer = bytes | bytearray | memoryview

HEAD: Final = struct.Struct("<4sHH16sQIIIIIII")
HEAD_BYTES: Final = HEAD.size + 4
MAGIC: Final = b"DRCF"
VERSION: Final = 1
FRAME_WRITES_MAX: Final = 1 << 16
FRAME_BLOCKS_MAX: Final = 1 << 12
FRAME_BYTES_MAX: Final = 32 << 20
_COLUMNS_NONCE: Final = 0xFFFF_FFFF
_NONCE: Final = struct.Struct("<QI")
LEVEL: Final = 1
"""The usual level of zstd. A frame may be sealed with any; a reader need not know which."""


class _Contexts(threading.local):
    """A thread's own contexts: they are not safe to share, and costly to make per call."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(data: Buffer, level: int = LEVEL) -> bytes:
    """Return zstd of `data`, with its length in the head."""
    compressor = _contexts.compressors.get(level)
    if compressor is None:
        compressor = _contexts.compressors[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
    return compressor.compress(data)


def decompress(data: Buffer, size_bytes: int) -> bytes:
    """Return the `size_bytes` bytes that `data` expands to; `DamagedError` if it is anything else."""
    try:
        if zstandard.frame_content_size(data) != size_bytes:
            raise DamagedError("compressed data of another length than told")
        return _contexts.decompressor.decompress(data, max_output_size=size_bytes)
    except zstandard.ZstdError as error:
        raise DamagedError(f"compressed data cannot be read: {error}") from error


def pack_fields(array: Columns, differences: Sequence[str]) -> bytes:
    """Return the fields of a structured array one after another, those of `differences` as differences."""
    parts = []
    for name in array.dtype.names or ():
        field = np.ascontiguousarray(array[name])
        if name in differences and len(field):
            field = np.diff(field, prepend=field.dtype.type(0))
        parts.append(field.tobytes())
    return compress(b"".join(parts))


def unpack_fields(data: Buffer, count: int, dtype: np.dtype[Any], differences: Sequence[str]) -> Columns:
    """Turn `pack_fields` back into `count` entries of `dtype`."""
    sizes = {name: dtype[name].itemsize for name in dtype.names or ()}
    raw = decompress(data, count * sum(sizes.values()))
    array = np.empty(count, dtype)
    offset = 0
    for name, size in sizes.items():
        field = np.frombuffer(raw, dtype[name], count, offset)
        array[name] = np.cumsum(field, dtype=dtype[name]) if name in differences else field
        offset += count * size
    return array


class Frame(NamedTuple):
    """An opened frame: its columns in the clear, its groups still sealed in `data`."""

    data: Buffer
    stream: bytes
    number: int
    columns: Columns
    digests: bytes
    group_lengths: NDArray[np.uint32]
    groups_offset: int
    block_count: int


def _scope_data(keys: VpgKeys, part: bytes) -> bytes:
    return keys.scope.prefix.encode() + b"\0" + part


def group_sizes(block_count: int) -> list[int]:
    """Return how many blocks each group of a frame with `block_count` new blocks holds."""
    full, rest = divmod(block_count, GROUP_BLOCKS)
    return [GROUP_BLOCKS] * full + ([rest] if rest else [])


def seal_frame(
    keys: VpgKeys,
    stream: bytes,
    number: int,
    columns: Columns,
    blocks: Sequence[Buffer],
    digests: bytes,
    level: int = LEVEL,
) -> list[bytes]:
    """Seal one frame; its parts, to be sent one after another, are returned.

    Args:
        keys: The scope's keys.
        stream: 16 random bytes, new for every start of a source.
        number: The frame's number in the stream; never used twice in one stream.
        columns: `COLUMN_DTYPE`, in stream order; `ref` is 0, `LOCAL_BIT | k` for `blocks[k]`, or a loc.
        blocks: The new blocks, 4096 bytes each.
        digests: 16 bytes for each of `blocks`.
        level: Of zstd, for the blocks.
    """
    if len(digests) != DIGEST_BYTES * len(blocks):
        raise ValueError("one digest per new block")
    cipher = keys.frame_cipher(stream)
    groups = []
    for group, size in enumerate(group_sizes(len(blocks))):
        plain = b"".join(blocks[group * GROUP_BLOCKS : group * GROUP_BLOCKS + size])
        if len(plain) != size * BLOCK_SIZE:
            raise ValueError(f"a block has {BLOCK_SIZE} bytes")
        packed = compress(plain, level)
        body = packed if len(packed) < len(plain) else plain
        groups.append(cipher.encrypt(_NONCE.pack(number, group), body, _scope_data(keys, bytes([size]))))
    entries = pack_fields(columns, ("sequence", "time_ns", "block"))
    lengths = np.array([len(group) for group in groups], "<u4").tobytes()
    section = entries + digests + lengths
    head = HEAD.pack(
        MAGIC,
        VERSION,
        0,
        stream,
        number,
        len(section) + TAG_BYTES,
        sum(map(len, groups)),
        len(columns),
        len(blocks),
        len(groups),
        len(entries),
        0,
    )
    sealed = cipher.encrypt(_NONCE.pack(number, _COLUMNS_NONCE), section, _scope_data(keys, head))
    crc = google_crc32c.value(head).to_bytes(4, "little")
    return [head + crc + sealed, *groups]


def open_frame(keys: VpgKeys, data: Buffer, *, partial: bool = False) -> Frame:
    """Check and open a frame's columns; `DamagedError` says what is wrong. The groups stay sealed.

    Args:
        keys: The scope's keys.
        data: The frame.
        partial: Other bytes may follow the frame; `Frame.data` is then the frame alone.
    """
    view = memoryview(data)
    if len(view) < HEAD_BYTES:
        raise DamagedError("frame is shorter than its head")
    head = bytes(view[: HEAD.size])
    magic, version, _, stream, number, section_bytes, data_bytes, writes, blocks, groups, packed, _ = HEAD.unpack(head)
    if magic != MAGIC or google_crc32c.value(head) != int.from_bytes(view[HEAD.size : HEAD_BYTES], "little"):
        raise DamagedError("frame head is damaged")
    if version != VERSION:
        raise DamagedError(f"frame has version {version}, known is {VERSION}", "Use a newer dr_cloud.")
    size_bytes = HEAD_BYTES + section_bytes + data_bytes
    if (
        len(view) < size_bytes
        or (len(view) > size_bytes and not partial)
        or writes > FRAME_WRITES_MAX
        or blocks > FRAME_BLOCKS_MAX
        or groups != len(group_sizes(blocks))
        or section_bytes != packed + blocks * DIGEST_BYTES + groups * 4 + TAG_BYTES
    ):
        raise DamagedError(f"frame {number} has lengths that do not fit")
    groups_offset = HEAD_BYTES + section_bytes
    try:
        section = keys.frame_cipher(stream).decrypt(
            _NONCE.pack(number, _COLUMNS_NONCE), view[HEAD_BYTES:groups_offset], _scope_data(keys, head)
        )
    except InvalidTag:
        raise DamagedError(f"frame {number} is not of {keys.scope.prefix}, or damaged") from None
    columns = unpack_fields(section[:packed], writes, COLUMN_DTYPE, ("sequence", "time_ns", "block"))
    lengths = np.frombuffer(section, "<u4", groups, packed + blocks * DIGEST_BYTES)
    local = columns["ref"] >= LOCAL_BIT
    if int(lengths.sum(dtype=np.uint64)) != data_bytes or (
        local.any() and int((columns["ref"][local] ^ np.uint64(LOCAL_BIT)).max()) >= blocks
    ):
        raise DamagedError(f"frame {number} has entries that do not fit")
    digests = section[packed : packed + blocks * DIGEST_BYTES]
    whole = view[:size_bytes] if partial else data
    return Frame(whole, stream, number, columns, digests, lengths, groups_offset, blocks)


def check_groups(keys: VpgKeys, frame: Frame) -> None:
    """Authenticate every group of an opened frame; `DamagedError` names the first that is not its own, whole."""
    view, at = memoryview(frame.data), frame.groups_offset
    sizes = group_sizes(frame.block_count)
    for group, (length, size) in enumerate(zip(frame.group_lengths.tolist(), sizes, strict=True)):
        _decrypt_group(keys, frame.stream, frame.number, group, size, view[at : at + length])
        at += length


def open_group(keys: VpgKeys, stream: bytes, number: int, group: int, block_count: int, sealed: Buffer) -> bytes:
    """Return the `block_count` blocks of one sealed group; `DamagedError` if it is not that group, whole."""
    body = _decrypt_group(keys, stream, number, group, block_count, sealed)
    size = block_count * BLOCK_SIZE
    return body if len(body) == size else decompress(body, size)


def _decrypt_group(keys: VpgKeys, stream: bytes, number: int, group: int, block_count: int, sealed: Buffer) -> bytes:
    try:
        return keys.frame_cipher(stream).decrypt(
            _NONCE.pack(number, group), sealed, _scope_data(keys, bytes([block_count]))
        )
    except InvalidTag:
        raise DamagedError(f"group {group} of frame {number} fails its authentication") from None
