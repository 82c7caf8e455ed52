from __future__ import annotations

import os

import numpy as np

from dr_cloud.journal.frame import COLUMN_DTYPE, LEVEL, open_frame, open_group, seal_frame
from dr_cloud.model.blocks import LOCAL_BIT
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.vdsa.gear import EASY_NS, FAST_LEVEL, PRESSED_NS, Gear

SECOND_NS = 10**9


def after(gear: Gear, pressed: bool, since_ns: int, span_ns: int) -> int:
    """Look every 50 ms for a while; return the time after it."""
    for now_ns in range(since_ns, since_ns + span_ns, SECOND_NS // 20):
        gear.look(pressed, now_ns)
    return since_ns + span_ns


def test_compression_gives_way_and_comes_back() -> None:
    """The processor behind for a while: faster; ahead for longer: as usual. A moment of either changes nothing."""
    gear = Gear()
    now_ns = after(gear, True, 0, PRESSED_NS - 1)
    gear.look(False, now_ns)
    now_ns = after(gear, True, now_ns, PRESSED_NS - 1)
    assert gear.level == LEVEL
    now_ns = after(gear, True, now_ns, SECOND_NS)
    assert gear.level == FAST_LEVEL
    now_ns = after(gear, False, now_ns, EASY_NS - 1)
    gear.look(True, now_ns)
    now_ns = after(gear, False, now_ns, EASY_NS - 1)
    assert gear.level == FAST_LEVEL
    after(gear, False, now_ns, SECOND_NS)
    assert gear.level == LEVEL


def test_a_level_that_does_not_hold_is_tried_ever_less_often() -> None:
    """A load that needs the faster level for good swings less and less."""
    gear = Gear()
    now_ns, changes, level = 0, [], gear.level
    while now_ns < 300 * SECOND_NS:
        # At the usual level the processor is behind, at the faster one it is not.
        gear.look(gear.level == LEVEL, now_ns)
        now_ns += SECOND_NS // 20
        if gear.level != level:
            level = gear.level
            changes.append(now_ns)
    assert len([at for at in changes if at > 150 * SECOND_NS]) <= 6 < len(changes)


def test_a_frame_of_any_level_is_read_alike() -> None:
    keys = VpgKeys(bytes(32), Scope("acme", "shop", "dc1"))
    blocks = [(b"%08d " % number * 500)[:4096] for number in range(15)] + [os.urandom(4096)]
    columns = np.zeros(16, COLUMN_DTYPE)
    columns["count"], columns["ref"] = 1, np.arange(16, dtype=np.uint64) | np.uint64(LOCAL_BIT)
    digests = b"".join(keys.digest(block) for block in blocks)
    sizes = []
    for level in (LEVEL, FAST_LEVEL):
        data = b"".join(seal_frame(keys, bytes(16), 1, columns, blocks, digests, level))
        frame = open_frame(keys, data)
        assert open_group(keys, bytes(16), 1, 0, 16, memoryview(data)[frame.groups_offset :]) == b"".join(blocks)
        sizes.append(len(data))
    assert sizes[0] != sizes[1], "the level was used"
