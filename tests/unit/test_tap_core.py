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
from dr_cloud.tap.tap import TRANSITIONS, Event, State, Tap

BLOCKS = 2048
BLOCK = memoryview(b"x" * BLOCK_SIZE)


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Tap]:
    """A tap with nothing dirty, whose clock stands still."""
    bitmap = IntentBitmap(tmp_path / "state", [("d", BLOCKS * BLOCK_SIZE)])
    bitmap.disks[0].clear(TO_SEND)
    yield Tap(bitmap, 2 << 20, clock=lambda: 1000)
    bitmap.close()


def write(tap: Tap, first: int, count: int = 1) -> None:
    bits = tap.bitmap.disks[0]
    bits.set(first, count)
    tap.stamp()
    tap.wrote(bits, first, memoryview(bytes(BLOCK) * count))


def heads(tap: Tap) -> list[tuple[int, ...]]:
    found = []
    while (batch := tap.take()) is not None:
        found += [wire.HEAD.unpack_from(message) for message in batch]
    return found


def stream(tap: Tap) -> None:
    tap.connected()
    heads(tap)
    assert not tap.begin_sync()
    assert tap.state is State.STREAMING


def test_transitions_are_closed_and_reach_everything() -> None:
    assert set(TRANSITIONS) <= set(product(State, Event))
    assert {TRANSITIONS[state, Event.LOST] for state in State} == {State.CONNECTING}
    reached = {State.CONNECTING}
    for _ in State:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(State)


def test_impossible_event_is_a_bug(tap: Tap) -> None:
    with pytest.raises(KeyError):
        tap.begin_sync()


def test_order_of_sequence_and_time(tap: Tap) -> None:
    """R3.1: each write has the next sequence and a later time, though the clock stands still."""
    stream(tap)
    for block in range(3):
        write(tap, block)
    found = [(kind, sequence, time_ns, block) for kind, _, _, _, sequence, time_ns, block, _ in heads(tap)]
    assert found == [(wire.WRITE, 1, 1000, 0), (wire.WRITE, 2, 1001, 1), (wire.WRITE, 3, 1002, 2)]


def test_long_write_goes_in_pieces_of_one_sequence(tap: Tap) -> None:
    stream(tap)
    write(tap, 10, 300)
    found = [(count, sequence, block) for _, _, _, count, sequence, _, block, _ in heads(tap)]
    assert found == [(256, 1, 10), (44, 1, 266)]


def test_mark_promises_later_times(tap: Tap) -> None:
    """R3.2: after MARKED no write carries a time up to the one it named."""
    stream(tap)
    write(tap, 0)
    tap.mark(5)
    write(tap, 1)
    (_, first, _), (kind, marked, mark), (_, later, _) = [(h[0], h[5], h[7]) for h in heads(tap)]
    assert (kind, mark) == (wire.MARKED, 5)
    assert first <= marked < later


def test_mark_waits_for_the_sync(tap: Tap) -> None:
    """While copies are missing no MARKED may claim otherwise."""
    write(tap, 0)
    tap.connected()
    heads(tap)
    tap.mark(1)
    tap.mark(2)
    assert heads(tap) == []
    assert tap.begin_sync()
    assert [(head[0], head[7]) for head in heads(tap)] == [(wire.SYNC_BEGIN, 0), (wire.MARKED, 2)]


def test_mark_dropped_with_the_queue_is_answered_later(tap: Tap) -> None:
    stream(tap)
    write(tap, 0)
    tap.mark(9)
    tap.drop("test")
    assert heads(tap) == []
    assert tap.begin_sync()
    assert [(head[0], head[7]) for head in heads(tap)] == [(wire.SYNC_BEGIN, 0), (wire.MARKED, 9)]


def test_queue_is_bounded(tap: Tap) -> None:
    """R1: a VDSA that takes nothing costs a bounded queue; bits remember the rest."""
    stream(tap)
    for block in range(BLOCKS):
        write(tap, block)
        assert tap.queued_bytes <= tap.queue_bytes_max
    assert tap.state is State.TRACKING
    assert tap.status() == {
        "state": "tracking",
        "queued_bytes": 0,
        "dirty_blocks": BLOCKS,
        "sequence": BLOCKS,
        "time_ns": 1000 + BLOCKS - 1,
        "drops": 1,
    }


def test_long_write_that_fills_the_queue_leaves_nothing_behind(tap: Tap) -> None:
    stream(tap)
    write(tap, 0, 400)
    write(tap, 400, 900)
    assert tap.state is State.TRACKING
    assert heads(tap) == []
    assert tap.bitmap.dirty_blocks() == 1300


def test_durable_clears_by_epoch(tap: Tap) -> None:
    """Invariant 2: a bit outlives every DURABLE that does not name its write."""
    stream(tap)
    for block in range(4):
        write(tap, block)
    tap.durable(2)
    assert tap.bitmap.dirty_blocks() == 4
    write(tap, 4)
    tap.durable(4)
    assert tap.bitmap.dirty_blocks() == 1
    assert tap.bitmap.disks[0].test(4)
    tap.durable(5)
    assert not tap.bitmap.dirty


def test_late_durable_of_a_drop_clears_nothing(tap: Tap) -> None:
    stream(tap)
    write(tap, 0)
    tap.drop("test")
    tap.durable(1)
    assert tap.bitmap.dirty_blocks() == 1
    assert tap.begin_sync()
    tap.durable(1)
    assert tap.bitmap.dirty_blocks() == 1


def test_flight_outlives_epochs(tap: Tap) -> None:
    """Invariant 2: the bit of a write whose disk I/O lasts stays set however much becomes durable meanwhile."""
    stream(tap)
    bits = tap.bitmap.disks[0]
    flight = tap.begin(bits, 100, 2)
    for block in range(5):
        write(tap, block)
        tap.durable(tap.sequence)
        assert bits.test(100)
        assert bits.test(101)
    tap.stamp()
    tap.wrote(bits, 100, memoryview(bytes(BLOCK) * 2))
    tap.end(flight)
    tap.durable(tap.sequence - 1)
    assert bits.test(100)
    tap.durable(tap.sequence)
    assert not tap.bitmap.dirty


def test_sequence_never_given_out_is_refused(tap: Tap) -> None:
    stream(tap)
    write(tap, 0)
    with pytest.raises(ProtocolError, match="last one given out is 1"):
        tap.durable(2)
    assert tap.bitmap.dirty


def test_sync_leaves_out_what_guests_wrote(tap: Tap) -> None:
    """A block written while its piece is read goes out once, as the guest's own copy; zeroes go as ranges."""
    bits = tap.bitmap.disks[0]
    bits.set(0, 8)
    tap.connected()
    heads(tap)
    assert tap.begin_sync()
    heads(tap)
    watch = tap.watch(bits, 0, 8)
    old = memoryview(b"o" * BLOCK_SIZE * 4 + bytes(BLOCK_SIZE * 4))
    write(tap, 2)
    write(tap, 5, 2)
    tap.send_sync(watch, old)
    tap.end_sync()
    found = [(h[0], h[1], h[6], h[3]) for h in heads(tap)]
    assert found == [
        (wire.WRITE, 0, 2, 1),
        (wire.WRITE, 0, 5, 2),
        (wire.WRITE, wire.FLAG_SYNC, 0, 2),
        (wire.WRITE, wire.FLAG_SYNC, 3, 1),
        (wire.ZERO, wire.FLAG_SYNC, 4, 1),
        (wire.ZERO, wire.FLAG_SYNC, 7, 1),
        (wire.SYNC_END, 0, 0, 0),
    ]
    tap.durable(tap.sequence)
    assert not tap.bitmap.dirty


def half_synced(tap: Tap) -> int:
    """Send blocks 0 to 3 of 0 to 7 in a synchronisation; return the sequence that makes them durable."""
    bits = tap.bitmap.disks[0]
    bits.set(0, 8)
    tap.connected()
    assert tap.begin_sync()
    tap.send_sync(tap.watch(bits, 0, 4), None)
    sequence = tap.sequence
    tap.send_sync(tap.watch(bits, 4, 4), None)
    return sequence


def dirty(tap: Tap) -> list[int]:
    return [block for block in range(BLOCKS) if tap.bitmap.disks[0].test(block)]


def test_sync_clears_piece_by_piece(tap: Tap) -> None:
    """Invariant 2: a block sent again keeps its bit until it is durable, and what is durable need not come again."""
    sequence = half_synced(tap)
    tap.durable(sequence - 1)
    assert dirty(tap) == [0, 1, 2, 3, 4, 5, 6, 7]
    tap.durable(sequence)
    assert dirty(tap) == [4, 5, 6, 7]
    tap.lost()
    assert dirty(tap) == [4, 5, 6, 7]


def test_pieces_of_a_sync_broken_off_clear_nothing(tap: Tap) -> None:
    """Invariant 2: what was on its way when the queue was dropped is not known to have arrived."""
    half_synced(tap)
    tap.drop("test")
    write(tap, 1)
    assert tap.begin_sync()
    tap.durable(tap.sequence)
    assert dirty(tap) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_progress_of_a_sync_outlives_a_drop(tap: Tap) -> None:
    """Blocks that were in an epoch before a drop, and are durable since, do not come a third time."""
    stream(tap)
    for block in range(8):
        write(tap, block)
    tap.drop("test")
    assert tap.begin_sync()
    bits = tap.bitmap.disks[0]
    tap.send_sync(tap.watch(bits, 0, 4), None)
    tap.durable(tap.sequence)
    tap.send_sync(tap.watch(bits, 4, 4), None)
    tap.drop("test")
    assert dirty(tap) == [4, 5, 6, 7]


def test_slow_vdsa_has_bounded_pending(tap: Tap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces not yet durable are joined when there are many; a piece that could not be read is in none of them."""
    monkeypatch.setattr("dr_cloud.tap.tap._PENDING_MAX", 2)
    bits = tap.bitmap.disks[0]
    bits.set(0, 40)
    tap.connected()
    assert tap.begin_sync()
    for first in range(0, 40, 4):
        watch = tap.watch(bits, first, 4)
        if first == 20:
            tap.skip_sync(watch)
        else:
            tap.send_sync(watch, None)
    assert len(tap._pending) <= 4
    tap.durable(tap.sequence)
    assert [block for block in range(40) if bits.test(block)] == [20, 21, 22, 23]
