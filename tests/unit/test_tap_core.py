"""The tap's core without a loop: transitions, marks, the bound on memory, what a VDSA may not say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import ProtocolError
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.bits import TO_SEND
from dr_cloud.tap.copy import TRANSITIONS, Copy, Event, State
from dr_cloud.tap.tap import Tap

BLOCKS = 2048
BLOCK = memoryview(b"x" * BLOCK_SIZE)


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Tap]:
    """A tap with nothing dirty, whose clock stands still."""
    bitmap = IntentBitmap(tmp_path / "state", [("d", BLOCKS * BLOCK_SIZE)])
    bitmap.disks[0].clear(TO_SEND)
    yield Tap("db", [bitmap], 2 << 20, now=lambda: 1000)
    bitmap.close()


@pytest.fixture
def copy(tap: Tap) -> Copy:
    return tap.copies[0]


def write(tap: Tap, first: int, count: int = 1) -> None:
    tap.disks[0].set(first, count)
    tap.stamp()
    tap.wrote(tap.disks[0], first, memoryview(bytes(BLOCK) * count))


def heads(copy: Copy) -> list[tuple[int, ...]]:
    found = []
    while (batch := copy.take()) is not None:
        found += [wire.HEAD.unpack_from(message) for message in batch]
    return found


def stream(copy: Copy) -> None:
    copy.connected()
    heads(copy)
    assert not copy.begin_sync()
    assert copy.state is State.STREAMING


def test_transitions_are_closed_and_reach_everything() -> None:
    assert set(TRANSITIONS) <= set(product(State, Event))
    assert {TRANSITIONS[state, Event.LOST] for state in State} == {State.CONNECTING}
    reached = {State.CONNECTING}
    for _ in State:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(State)


def test_impossible_event_is_a_bug(copy: Copy) -> None:
    with pytest.raises(KeyError):
        copy.begin_sync()


def test_order_of_sequence_and_time(tap: Tap, copy: Copy) -> None:
    """R3.1: each write has the next sequence and a later time, though the clock stands still."""
    stream(copy)
    for block in range(3):
        write(tap, block)
    found = [(kind, sequence, time_ns, block) for kind, _, _, _, sequence, time_ns, block, _ in heads(copy)]
    assert found == [(wire.WRITE, 1, 1000, 0), (wire.WRITE, 2, 1001, 1), (wire.WRITE, 3, 1002, 2)]


def test_long_write_goes_in_pieces_of_one_sequence(tap: Tap, copy: Copy) -> None:
    stream(copy)
    write(tap, 10, 300)
    found = [(count, sequence, block) for _, _, _, count, sequence, _, block, _ in heads(copy)]
    assert found == [(256, 1, 10), (44, 1, 266)]


def test_mark_promises_later_times(tap: Tap, copy: Copy) -> None:
    """R3.2: after MARKED no write carries a time up to the one it named."""
    stream(copy)
    write(tap, 0)
    copy.mark(5)
    write(tap, 1)
    (_, first, _), (kind, marked, mark), (_, later, _) = [(h[0], h[5], h[7]) for h in heads(copy)]
    assert (kind, mark) == (wire.MARKED, 5)
    assert first <= marked < later


def test_mark_waits_for_the_sync(tap: Tap, copy: Copy) -> None:
    """While copies are missing no MARKED may claim otherwise."""
    write(tap, 0)
    copy.connected()
    heads(copy)
    copy.mark(1)
    copy.mark(2)
    assert heads(copy) == []
    assert copy.begin_sync()
    assert [(head[0], head[7]) for head in heads(copy)] == [(wire.SYNC_BEGIN, 0), (wire.MARKED, 2)]


def test_mark_dropped_with_the_queue_is_answered_later(tap: Tap, copy: Copy) -> None:
    stream(copy)
    write(tap, 0)
    copy.mark(9)
    copy.drop("test")
    assert heads(copy) == []
    assert copy.begin_sync()
    assert [(head[0], head[7]) for head in heads(copy)] == [(wire.SYNC_BEGIN, 0), (wire.MARKED, 9)]


def test_queue_is_bounded(tap: Tap, copy: Copy) -> None:
    """R1: a VDSA that takes nothing costs a bounded queue; bits remember the rest."""
    stream(copy)
    for block in range(BLOCKS):
        write(tap, block)
        assert copy.queued_bytes <= copy.queue_bytes_max
    assert copy.state is State.TRACKING
    status = {"state": "tracking", "queued_bytes": 0, "dirty_blocks": BLOCKS, "drops": 1}
    assert tap.status() == {"sequence": BLOCKS, "time_ns": 1000 + BLOCKS - 1, "copies": [status]}


def test_long_write_that_fills_the_queue_leaves_nothing_behind(tap: Tap, copy: Copy) -> None:
    stream(copy)
    write(tap, 0, 400)
    write(tap, 400, 900)
    assert copy.state is State.TRACKING
    assert heads(copy) == []
    assert copy.bitmap.dirty_blocks() == 1300


def test_durable_clears_by_epoch(tap: Tap, copy: Copy) -> None:
    """Invariant 2: a bit outlives every DURABLE that does not name its write."""
    stream(copy)
    for block in range(4):
        write(tap, block)
    copy.durable(2)
    assert copy.bitmap.dirty_blocks() == 4
    write(tap, 4)
    copy.durable(4)
    assert copy.bitmap.dirty_blocks() == 1
    assert copy.bitmap.disks[0].test(4)
    copy.durable(5)
    assert not copy.bitmap.dirty


def test_late_durable_of_a_drop_clears_nothing(tap: Tap, copy: Copy) -> None:
    stream(copy)
    write(tap, 0)
    copy.drop("test")
    copy.durable(1)
    assert copy.bitmap.dirty_blocks() == 1
    assert copy.begin_sync()
    copy.durable(1)
    assert copy.bitmap.dirty_blocks() == 1


def test_flight_outlives_epochs(tap: Tap, copy: Copy) -> None:
    """Invariant 2: the bit of a write whose disk I/O lasts stays set however much becomes durable meanwhile."""
    stream(copy)
    bits = copy.bitmap.disks[0]
    flight = tap.begin(tap.disks[0], 100, 2)
    for block in range(5):
        write(tap, block)
        copy.durable(copy._clock.sequence)
        assert bits.test(100)
        assert bits.test(101)
    tap.stamp()
    tap.wrote(tap.disks[0], 100, memoryview(bytes(BLOCK) * 2))
    tap.end(flight)
    copy.durable(copy._clock.sequence - 1)
    assert bits.test(100)
    copy.durable(copy._clock.sequence)
    assert not copy.bitmap.dirty


def test_sequence_never_given_out_is_refused(tap: Tap, copy: Copy) -> None:
    stream(copy)
    write(tap, 0)
    with pytest.raises(ProtocolError, match="last one given out is 1"):
        copy.durable(2)
    assert copy.bitmap.dirty


def test_sync_leaves_out_what_guests_wrote(tap: Tap, copy: Copy) -> None:
    """A block written while its piece is read goes out once, as the guest's own copy; zeroes go as ranges."""
    bits = copy.bitmap.disks[0]
    bits.set(0, 8)
    copy.connected()
    heads(copy)
    assert copy.begin_sync()
    heads(copy)
    watch = copy.watch(bits, 0, 8)
    old = memoryview(b"o" * BLOCK_SIZE * 4 + bytes(BLOCK_SIZE * 4))
    write(tap, 2)
    write(tap, 5, 2)
    copy.send_sync(watch, old)
    copy.end_sync()
    found = [(h[0], h[1], h[6], h[3]) for h in heads(copy)]
    assert found == [
        (wire.WRITE, 0, 2, 1),
        (wire.WRITE, 0, 5, 2),
        (wire.WRITE, wire.FLAG_SYNC, 0, 2),
        (wire.WRITE, wire.FLAG_SYNC, 3, 1),
        (wire.ZERO, wire.FLAG_SYNC, 4, 1),
        (wire.ZERO, wire.FLAG_SYNC, 7, 1),
        (wire.SYNC_END, 0, 0, 0),
    ]
    copy.durable(copy._clock.sequence)
    assert not copy.bitmap.dirty


def half_synced(copy: Copy) -> int:
    """Send blocks 0 to 3 of 0 to 7 in a synchronisation; return the sequence that makes them durable."""
    bits = copy.bitmap.disks[0]
    bits.set(0, 8)
    copy.connected()
    assert copy.begin_sync()
    copy.send_sync(copy.watch(bits, 0, 4), None)
    sequence = copy._clock.sequence
    copy.send_sync(copy.watch(bits, 4, 4), None)
    return sequence


def dirty(copy: Copy) -> list[int]:
    return [block for block in range(BLOCKS) if copy.bitmap.disks[0].test(block)]


def test_sync_clears_piece_by_piece(copy: Copy) -> None:
    """Invariant 2: a block sent again keeps its bit until it is durable, and what is durable need not come again."""
    sequence = half_synced(copy)
    copy.durable(sequence - 1)
    assert dirty(copy) == [0, 1, 2, 3, 4, 5, 6, 7]
    copy.durable(sequence)
    assert dirty(copy) == [4, 5, 6, 7]
    copy.lost()
    assert dirty(copy) == [4, 5, 6, 7]


def test_pieces_of_a_sync_broken_off_clear_nothing(tap: Tap, copy: Copy) -> None:
    """Invariant 2: what was on its way when the queue was dropped is not known to have arrived."""
    half_synced(copy)
    copy.drop("test")
    write(tap, 1)
    assert copy.begin_sync()
    copy.durable(copy._clock.sequence)
    assert dirty(copy) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_progress_of_a_sync_outlives_a_drop(tap: Tap, copy: Copy) -> None:
    """Blocks that were in an epoch before a drop, and are durable since, do not come a third time."""
    stream(copy)
    for block in range(8):
        write(tap, block)
    copy.drop("test")
    assert copy.begin_sync()
    bits = copy.bitmap.disks[0]
    copy.send_sync(copy.watch(bits, 0, 4), None)
    copy.durable(copy._clock.sequence)
    copy.send_sync(copy.watch(bits, 4, 4), None)
    copy.drop("test")
    assert dirty(copy) == [4, 5, 6, 7]


def test_slow_vdsa_has_bounded_pending(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces not yet durable are joined when there are many; a piece that could not be read is in none of them."""
    monkeypatch.setattr("dr_cloud.tap.copy._PENDING_MAX", 2)
    bits = copy.bitmap.disks[0]
    bits.set(0, 40)
    copy.connected()
    assert copy.begin_sync()
    for first in range(0, 40, 4):
        watch = copy.watch(bits, first, 4)
        if first == 20:
            copy.skip_sync(watch)
        else:
            copy.send_sync(watch, None)
    assert len(copy._pending) <= 4
    copy.durable(copy._clock.sequence)
    assert [block for block in range(40) if bits.test(block)] == [20, 21, 22, 23]
