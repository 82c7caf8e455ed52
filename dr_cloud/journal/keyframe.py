"""The keyframe: the replica map just after a checkpoint, from which images are reached by redo or undo.

An envelope, magic "DRCK", version 1, at `<enterprise>/<vpg>/<target>/replica/<number>-<generation>.map`, where number
is the checkpoint's::

    section 0   directory: u32 regions, then per region (_ENTRY_DTYPE)
                    disk, region, home number and generation (the keyframe whose body holds it), part, offset, length
    section 1   JSON: {"previous": KeyframeRef or null, "this": KeyframeRef, "checkpoints": [Checkpoint …]}
                    every checkpoint after the previous keyframe's up to this one's: the catalogue, a page per keyframe
    body        the regions that changed since the previous keyframe, each sealed as a part of its own

A region is zstd of its 262,144 loc as differences, or, where at most an eighth of it is in use, of u32 positions and
u64 loc of those in use (flag in the first byte). The directory is whole: an unchanged region names its older home. A
keyframe is made beside the stream of checkpoints and named by a later one; one that nobody names (a crash) is true all
the same, for it shows the state after a checkpoint that can never change.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from dr_cloud.journal.envelope import Opened, Sealer, pack_json, unpack_json
from dr_cloud.journal.frame import Buffer, compress, decompress
from dr_cloud.journal.replica import Locs, RegionKey
from dr_cloud.model.blocks import REGION_BLOCKS
from dr_cloud.model.errors import DamagedError
from dr_cloud.model.journal import Checkpoint, KeyframeRef
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.store import Store

MAGIC: Final = b"DRCK"
VERSION: Final = 1
_COUNT: Final = struct.Struct("<I")
_ENTRY_DTYPE: Final = np.dtype(
    [
        ("disk", "<u2"),
        ("pad", "V2"),
        ("region", "<u4"),
        ("home_number", "<u8"),
        ("home_generation", "<u4"),
        ("part", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
    ]
)
_SPARSE_MAX: Final = REGION_BLOCKS // 8


class RegionHome(NamedTuple):
    """Where a region's bytes are: which keyframe's body, which part, where."""

    number: int
    generation: int
    part: int
    offset: int
    length: int


class Keyframe(NamedTuple):
    """An opened keyframe: its directory and its page of the catalogue."""

    ref: KeyframeRef
    homes: dict[RegionKey, RegionHome]
    previous: KeyframeRef | None
    checkpoints: list[Checkpoint]


def _pack_region(locs: Locs) -> bytes:
    used = np.flatnonzero(locs)
    if len(used) <= _SPARSE_MAX:
        plain = used.astype("<u4").tobytes() + np.diff(locs[used], prepend=np.uint64(0)).tobytes()
        return b"\1" + _COUNT.pack(len(used)) + compress(plain)
    return b"\0" + _COUNT.pack(REGION_BLOCKS) + compress(np.diff(locs, prepend=np.uint64(0)).tobytes())


def _unpack_region(data: bytes) -> Locs:
    (count,) = _COUNT.unpack_from(data, 1)
    if count > REGION_BLOCKS or data[0] > 1:
        raise DamagedError("a region of the map has a wrong head")
    if data[0] == 0:
        return np.cumsum(np.frombuffer(decompress(data[5:], REGION_BLOCKS * 8), "<u8"), dtype=np.uint64)
    locs = np.zeros(REGION_BLOCKS, np.uint64)
    if count:
        plain = decompress(data[5:], count * 12)
        used = np.frombuffer(plain, "<u4", count)
        if int(used[-1]) >= REGION_BLOCKS:
            raise DamagedError("a region of the map has a wrong position")
        locs[used] = np.cumsum(np.frombuffer(plain, "<u8", count, count * 4), dtype=np.uint64)
    return locs


def _place(key: RegionKey) -> bytes:
    return b"region %d %d" % key


def seal_keyframe(
    keys: VpgKeys,
    ref: KeyframeRef,
    previous: Keyframe | None,
    changed: Mapping[RegionKey, Locs],
    checkpoints: Sequence[Checkpoint],
) -> tuple[str, list[Buffer], Keyframe]:
    """Return (key in the store, bytes in parts, the keyframe as it will be read) of the map after `ref`'s checkpoint.

    Args:
        keys: The scope's keys.
        ref: What the keyframe is of.
        previous: The keyframe before, whose regions stand where `changed` has none.
        changed: The regions that changed since `previous`.
        checkpoints: The checkpoints since `previous`, up to `ref`'s.
    """
    key = layout.keyframe_key(keys.scope, ref.number, ref.generation)
    sealer = Sealer(keys, key, MAGIC, VERSION)
    homes = dict(previous.homes) if previous else {}
    body: list[Buffer] = []
    offset = 0
    for part, region in enumerate(sorted(changed)):
        sealed = sealer.part(part, _pack_region(changed[region]), _place(region))
        homes[region] = RegionHome(ref.number, ref.generation, part, offset, len(sealed))
        body.append(sealed)
        offset += len(sealed)
    table = np.zeros(len(homes), _ENTRY_DTYPE)
    for entry, (region, home) in zip(table, sorted(homes.items()), strict=True):
        entry["disk"], entry["region"] = region
        entry["home_number"], entry["home_generation"], entry["part"], entry["offset"], entry["length"] = home
    page: dict[str, Any] = {
        "this": ref.model_dump(),
        "previous": previous.ref.model_dump() if previous else None,
        "checkpoints": [checkpoint.model_dump() for checkpoint in checkpoints],
    }
    data = sealer.finish([_COUNT.pack(len(homes)) + compress(table.tobytes()), pack_json(page)], body)
    return key, data, Keyframe(ref, homes, previous.ref if previous else None, list(checkpoints))


def read_keyframe(store: Store, keys: VpgKeys, number: int, generation: int, *, page: bool) -> Keyframe:
    """Fetch and check a keyframe's directory and, if `page`, its page of the catalogue."""
    opened = open_keyframe(store, keys, number, generation)
    section = opened.section(0)
    (count,) = _COUNT.unpack_from(section)
    table = np.frombuffer(decompress(section[_COUNT.size :], count * _ENTRY_DTYPE.itemsize), _ENTRY_DTYPE, count)
    homes = {
        (int(e["disk"]), int(e["region"])): RegionHome(
            int(e["home_number"]), int(e["home_generation"]), int(e["part"]), int(e["offset"]), int(e["length"])
        )
        for e in table
    }
    if not page:
        ref = KeyframeRef(number=number, generation=generation, time_ns=0, rows_before=0)
        return Keyframe(ref, homes, None, [])
    document = unpack_json(opened.section(1))
    previous = document["previous"]
    return Keyframe(
        KeyframeRef.model_validate(document["this"]),
        homes,
        KeyframeRef.model_validate(previous) if previous else None,
        [Checkpoint.model_validate(entry) for entry in document["checkpoints"]],
    )


def open_keyframe(store: Store, keys: VpgKeys, number: int, generation: int) -> Opened:
    """Return the keyframe's object, its head checked: `read_region` reads from it."""
    return Opened(store, keys, layout.keyframe_key(keys.scope, number, generation), MAGIC, VERSION)


def read_region(opened: Opened, region: RegionKey, home: RegionHome) -> Locs:
    """Fetch and check one region of the map from its home's object."""
    data = opened.part(home.part, home.offset, home.length, _place(region))
    try:
        return _unpack_region(data)
    except DamagedError as error:
        raise opened.damaged(str(error)) from error
