"""The intent bitmap's bits and file: what it keeps over crashes, growth, damage and lost hosts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.journal import Disk
from dr_cloud.tap import bits as bits_module
from dr_cloud.tap import head as head_module
from dr_cloud.tap.bitmap import SEQUENCE_MARGIN, IntentBitmap, copy_path, open_bitmaps
from dr_cloud.tap.bits import EPOCH_A, EPOCH_B, TO_SEND, DiskBits

BOOT = b"this boot of it."
OTHER_BOOT = b"another boot....."[:16]
KIB = 1 << 10
PAGES = 3
BLOCKS = PAGES * 4096 * 8


def make_bits() -> DiskBits:
    planes = [memoryview(bytearray(PAGES * 4096)) for _ in range(3)]
    return DiskBits(Disk(index=0, name="d", size_bytes=BLOCKS * 4096), planes)


RANGES = st.tuples(st.integers(0, BLOCKS - 1), st.one_of(st.integers(1, 40), st.integers(1, BLOCKS))).map(
    lambda pair: (pair[0], min(pair[1], BLOCKS - pair[0]))
)


@given(st.lists(st.tuples(st.sampled_from(["set", "clear"]), RANGES), max_size=12))
def test_bits_are_a_set_of_blocks(steps: list[tuple[str, tuple[int, int]]]) -> None:
    bits = make_bits()
    model: set[int] = set()
    for step, (first, count) in steps:
        if step == "set":
            bits.set(first, count)
            model.update(range(first, first + count))
        else:
            bits.clear_range(TO_SEND, first, count)
            model.difference_update(range(first, first + count))
        assert bits.dirty_blocks() == len(model)
        assert bits.touched[TO_SEND] == {block >> 15 for block in model}
    walked = [block for first, stop in bits.runs(TO_SEND) for block in range(first, stop)]
    assert walked == sorted(model)


def test_runs_cross_pages_and_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = make_bits()
    bits.set(100, 40_000)
    assert list(bits.runs(TO_SEND)) == [(100, 40_100)]
    bits.set(0, BLOCKS)
    monkeypatch.setattr(bits_module, "RUN_BLOCKS_MAX", 1 << 15)
    assert list(bits.runs(TO_SEND)) == [(at << 15, (at + 1) << 15) for at in range(PAGES)]


def test_planes_take_turns_and_merge() -> None:
    bits = make_bits()
    bits.activate(EPOCH_A)
    bits.set(5, 2)
    bits.activate(EPOCH_B)
    bits.set(6, 4)
    bits.merge_epochs()
    assert list(bits.runs(TO_SEND)) == [(5, 10)]
    bits.clear(EPOCH_A)
    assert [bits.test(block) for block in (4, 5, 9, 10)] == [False, True, True, False]
    bits.clear(TO_SEND)
    assert list(bits.runs(EPOCH_B)) == [(6, 10)]
    assert bits.dirty_blocks() == 4


def clear_all(bitmap: IntentBitmap) -> None:
    for bits in bitmap.disks:
        for plane in (TO_SEND, EPOCH_A, EPOCH_B):
            bits.clear(plane)


def runs_of(bitmap: IntentBitmap, place: int = 0) -> list[tuple[int, int]]:
    return list(bitmap.disks[place].runs(TO_SEND))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def open_one(path: Path, size: int = 100 * KIB, boot: bytes = BOOT, name: str = "d") -> IntentBitmap:
    return IntentBitmap(path, [(name, size)], boot=boot)


def test_new_file_is_all_dirty(path: Path) -> None:
    """A first synchronisation sends the whole disk, its partial last block too."""
    bitmap = open_one(path, 100 * KIB + 512)
    assert runs_of(bitmap) == [(0, 26)]
    assert bitmap.sequence == 0
    bitmap.close()


def test_kill_keeps_every_bit_and_time_goes_on(path: Path) -> None:
    """Invariant 2: a killed tap knows its bits, and sequence and time do not go back."""
    bitmap = open_one(path)
    clear_all(bitmap)
    bits = bitmap.disks[0]
    bits.activate(EPOCH_A)
    bits.set(3, 1)
    bits.activate(EPOCH_B)
    bits.set(9, 2)
    bitmap.hot[0], bitmap.hot[1] = 70, 7000
    tap_id = bitmap.tap_id
    bitmap.abandon()
    again = open_one(path)
    assert again.tap_id == tap_id
    assert (again.sequence, again.time_ns) == (70 + SEQUENCE_MARGIN, 7000)
    assert [block for block in range(25) if again.disks[0].test(block)] == [3, 9, 10]
    again.close()


def test_host_lost_makes_all_dirty(path: Path) -> None:
    """Invariant 2: after a lost host a write may be on the disk ahead of its bit, so all is sent again."""
    bitmap = open_one(path)
    clear_all(bitmap)
    bitmap.hot[0], bitmap.hot[1] = 70, 7000
    tap_id = bitmap.tap_id
    bitmap.abandon()
    again = open_one(path, boot=OTHER_BOOT)
    assert runs_of(again) == [(0, 25)]
    assert again.tap_id == tap_id
    assert (again.sequence, again.time_ns) == (70 + SEQUENCE_MARGIN, 7000)
    again.close()


def test_clean_end_trusts_the_bits_after_a_boot(path: Path) -> None:
    bitmap = open_one(path)
    clear_all(bitmap)
    bitmap.disks[0].set(4, 1)
    bitmap.close()
    again = open_one(path, boot=OTHER_BOOT)
    assert runs_of(again) == [(4, 5)]
    again.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"X" + data[1:],
        lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
        lambda data: data[:60] + bytes([data[60] ^ 0x40]) + data[61:],
        lambda data: data[:-4096],
        lambda data: data[:12] + struct.pack("<I", 1 << 30) + data[16:],
    ],
)
def test_damage_makes_all_dirty(path: Path, damage: Callable[[bytes], bytes]) -> None:
    bitmap = open_one(path)
    clear_all(bitmap)
    tap_id = bitmap.tap_id
    bitmap.close()
    path.write_bytes(damage(path.read_bytes()))
    again = open_one(path)
    assert runs_of(again) == [(0, 25)]
    if path.stat().st_size and tap_id == again.tap_id:
        pytest.fail("a damaged head gave its tap id")
    again.close()


@pytest.mark.parametrize(
    ("size", "runs"),
    [
        (100 * KIB, [(4, 5)]),
        (100 * KIB + 1, [(4, 5), (25, 26)]),
        (400 * KIB, [(4, 5), (25, 100)]),
        (96 * KIB, [(4, 5)]),
        (97 * KIB, [(4, 5), (24, 25)]),
        (16 * KIB, []),
        (128 << 21, [(4, 5), (25, 65536)]),
    ],
)
def test_resized_disk(path: Path, size: int, runs: list[tuple[int, int]]) -> None:
    """A disk that has grown keeps its bits and its new part is dirty; one that has shrunk keeps what is left."""
    bitmap = open_one(path)
    clear_all(bitmap)
    bitmap.disks[0].set(4, 1)
    bitmap.hot[0] = 5
    bitmap.close()
    again = open_one(path, size)
    assert runs_of(again) == runs
    assert again.sequence == 5 + SEQUENCE_MARGIN
    again.close()
    assert runs_of(open_one(path, size)) == runs


def test_grown_disk_marks_its_partial_block(path: Path) -> None:
    bitmap = open_one(path, 100 * KIB + 512)
    clear_all(bitmap)
    bitmap.close()
    again = open_one(path, 104 * KIB)
    assert runs_of(again) == [(25, 26)]
    again.close()


def test_disks_come_and_go(path: Path) -> None:
    """A disk keeps its index and bits in any order; an index is never given to another disk."""
    bitmap = IntentBitmap(path, [("a", 40 * KIB), ("b", 80 * KIB)], boot=BOOT)
    clear_all(bitmap)
    bitmap.disks[1].set(7, 1)
    bitmap.close()
    swapped = IntentBitmap(path, [("b", 80 * KIB), ("a", 40 * KIB)], boot=BOOT)
    assert [(bits.disk.name, bits.disk.index) for bits in swapped.disks] == [("b", 1), ("a", 0)]
    assert (runs_of(swapped, 0), runs_of(swapped, 1)) == ([(7, 8)], [])
    swapped.close()
    IntentBitmap(path, [("a", 40 * KIB)], boot=BOOT).close()
    more = IntentBitmap(path, [("a", 40 * KIB), ("b", 80 * KIB)], boot=BOOT)
    assert [bits.disk.index for bits in more.disks] == [0, 2]
    assert (runs_of(more, 0), runs_of(more, 1)) == ([], [(0, 20)])
    more.close()


def test_indexes_come_to_an_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "DISK_INDEX_MAX", 1)
    IntentBitmap(path, [("a", 40 * KIB)], boot=BOOT).close()
    IntentBitmap(path, [("b", 40 * KIB)], boot=BOOT).close()
    with pytest.raises(DrCloudError, match="index over 1"):
        IntentBitmap(path, [("b", 40 * KIB), ("c", 40 * KIB)], boot=BOOT)
    IntentBitmap(path, [("b", 40 * KIB)], boot=BOOT).close()


def test_many_disks_need_more_than_a_page_of_head(path: Path) -> None:
    disks = [(f"disk-{number}", 8 * KIB) for number in range(100)]
    bitmap = IntentBitmap(path, disks, boot=BOOT)
    clear_all(bitmap)
    bitmap.disks[99].set(1, 1)
    bitmap.abandon()
    again = IntentBitmap(path, disks, boot=BOOT)
    assert again.dirty_blocks() == 1
    assert runs_of(again, 99) == [(1, 2)]
    again.close()


def test_one_tap_at_a_time(path: Path) -> None:
    bitmap = open_one(path)
    with pytest.raises(DrCloudError, match="another tap"):
        open_one(path)
    bitmap.close()
    open_one(path).close()


def test_what_cannot_be_is_told(path: Path) -> None:
    with pytest.raises(DrCloudError, match="same name"):
        IntentBitmap(path, [("a", 4096), ("a", 4096)])
    with pytest.raises(DrCloudError, match="cannot be used"):
        IntentBitmap(path, [("../a", 4096)])
    with pytest.raises(DrCloudError, match="cannot be made"):
        IntentBitmap(path / "x" / "y", [("a", 4096)])


def test_copies_share_identity_and_nothing_else(path: Path) -> None:
    """R6: each target has bits of its own; id and indexes are the tap's."""
    disks = [("a", 40 * KIB), ("b", 80 * KIB)]
    bitmaps = open_bitmaps(path, disks, 3, boot=BOOT)
    assert len({bitmap.tap_id for bitmap in bitmaps}) == 1
    for bitmap in bitmaps:
        clear_all(bitmap)
    bitmaps[1].disks[1].set(7, 1)
    for bitmap in bitmaps:
        bitmap.abandon()
    again = open_bitmaps(path, [disks[1], disks[0]], 3, boot=BOOT)
    assert [[bits.disk.index for bits in bitmap.disks] for bitmap in again] == [[1, 0]] * 3
    assert [runs_of(bitmap) for bitmap in again] == [[], [(7, 8)], []]
    for bitmap in again:
        bitmap.close()


def test_a_copy_that_was_not_kept_is_not_trusted(path: Path) -> None:
    """Invariant 2: while the tap kept fewer copies, nobody set the bits of the others."""
    for copies in (2, 1, 2):
        bitmaps = open_bitmaps(path, [("a", 40 * KIB)], copies, boot=BOOT)
        assert copy_path(path, 1).exists() == (copies == 2)
        dirty = [bitmap.dirty_blocks() for bitmap in bitmaps]
        for bitmap in bitmaps:
            clear_all(bitmap)
            bitmap.close()
    assert dirty == [0, 10]


def test_a_file_that_disagrees_with_the_first_is_not_trusted(path: Path) -> None:
    """Invariant 2: another tap's file, or another index for the name, says nothing about this tap's disks."""
    others = path.with_name("others")
    for first in (path, others):
        bitmaps = open_bitmaps(first, [("a", 40 * KIB)], 2, boot=BOOT)
        for bitmap in bitmaps:
            clear_all(bitmap)
            bitmap.close()
    copy_path(path, 1).write_bytes(others.read_bytes())
    bitmaps = open_bitmaps(path, [("a", 40 * KIB)], 2, boot=BOOT)
    assert [bitmap.dirty_blocks() for bitmap in bitmaps] == [0, 10]
    assert bitmaps[0].tap_id == bitmaps[1].tap_id
    for bitmap in bitmaps:
        clear_all(bitmap)
        bitmap.close()
    # The first file forgot the disk and has it again under a new index; the second never heard of it.
    IntentBitmap(path, [("b", 40 * KIB)], boot=BOOT).close()
    IntentBitmap(path, [("a", 40 * KIB)], boot=BOOT).close()
    bitmaps = open_bitmaps(path, [("a", 40 * KIB)], 2, boot=BOOT)
    assert [bitmap.disks[0].disk.index for bitmap in bitmaps] == [2, 2]
    assert bitmaps[1].dirty_blocks() == 10
    for bitmap in bitmaps:
        bitmap.close()


def test_a_copy_in_use_opens_none(path: Path) -> None:
    second = IntentBitmap(copy_path(path, 1), [("a", 40 * KIB)], boot=BOOT)
    with pytest.raises(DrCloudError, match="another tap"):
        open_bitmaps(path, [("a", 40 * KIB)], 2, boot=BOOT)
    IntentBitmap(path, [("a", 40 * KIB)], boot=BOOT).close()
    second.close()
