"""Read everything of one object and check every byte: the ground of scrubbing and of the tests that flip bits."""

from __future__ import annotations

from dr_cloud.journal import checkpoint, keyframe, objects
from dr_cloud.journal.checkpoint import read_checkpoint
from dr_cloud.journal.envelope import Opened
from dr_cloud.journal.frame import open_frame
from dr_cloud.journal.keyframe import open_keyframe, read_keyframe, read_region
from dr_cloud.journal.objects import read_groups, read_index, read_rows
from dr_cloud.model.errors import DamagedError
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.store import Store


def verify_object(store: Store, keys: VpgKeys, key: str) -> None:
    """Read all of the object at `key`, of whatever kind; `DamagedError` names it if one byte is wrong."""
    scope = keys.scope
    if key.startswith(layout.checkpoint_prefix(scope)):
        read_checkpoint(store, keys, layout.parse_checkpoint_key(key))
        _whole(store, key, keys, checkpoint.MAGIC, checkpoint.VERSION)
    elif key.startswith(layout.writer_prefix(scope)):
        _whole(store, key, keys, checkpoint.CLAIM_MAGIC, checkpoint.VERSION).section(0)
    elif key.startswith(layout.keyframe_prefix(scope)):
        _verify_keyframe(store, keys, key)
    elif key.startswith(layout.journal_prefix(scope)):
        _verify_journal(store, keys, key)
    else:
        raise DamagedError(f"object {key} is none of {scope.prefix}")


def _whole(store: Store, key: str, keys: VpgKeys, magic: bytes, version: int) -> Opened:
    opened = Opened(store, keys, key, magic, version)
    if store.size(key) != opened.body_offset + opened.body_bytes:
        raise opened.damaged("it has another length than its head says")
    return opened


def _verify_keyframe(store: Store, keys: VpgKeys, key: str) -> None:
    number, generation = layout.parse_keyframe_key(key)
    _whole(store, key, keys, keyframe.MAGIC, keyframe.VERSION)
    opened = open_keyframe(store, keys, number, generation)
    whole = read_keyframe(store, keys, number, generation, page=True)
    covered = 0
    for region, home in whole.homes.items():
        if (home.number, home.generation) == (number, generation):
            read_region(opened, region, home)
            covered += home.length
    if covered != opened.body_bytes:
        raise opened.damaged("its directory does not cover its body")


def _verify_journal(store: Store, keys: VpgKeys, key: str) -> None:
    opened = _whole(store, key, keys, objects.MAGIC, objects.VERSION)
    index = read_index(store, keys, key)
    read_rows(store, keys, key)
    for group in range(len(index.length)):
        read_groups(store, keys, key, index, group, 1)
    body = opened.read(opened.body_offset, opened.body_bytes) if opened.body_bytes else memoryview(b"")
    try:
        for stream, number in zip(index.streams, index.numbers, strict=True):
            frame = open_frame(keys, body, partial=True)
            if (frame.stream, frame.number) != (stream, number):
                raise DamagedError(f"frame {number} is not where the index says")
            body = body[len(frame.data) :]
        if len(body):
            raise DamagedError("there are bytes after the last frame")
    except DamagedError as error:
        raise opened.damaged(str(error)) from error
