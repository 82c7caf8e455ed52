"""When a guest's write may be acknowledged: barriers and commit-wait, and how little a VDSA can make of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import ProtocolError
from dr_cloud.tap import gate as gate_module
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import open_bitmaps
from dr_cloud.tap.clock import Clock
from dr_cloud.tap.copy import Copy
from dr_cloud.tap.gate import Gate
from dr_cloud.tap.tap import Tap

MS = 1_000_000
HEADROOM_SECONDS = 1
"""Of a machine that does other things too."""


class Times:
    """A host's clock and a monotonic one that go as the test says."""

    def __init__(self) -> None:
        self.now_ns = 10_000 * MS
        self.monotonic_ns = 0

    def go(self, ns: int) -> None:
        self.now_ns += ns
        self.monotonic_ns += ns


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def tap(tmp_path: Path, times: Times) -> Iterator[Tap]:
    """A tap of three copies that all stream."""
    bitmaps = open_bitmaps(tmp_path / "state", [("d", 100 * BLOCK_SIZE)], 3)
    for bitmap in bitmaps:
        bitmap.disks[0].clear(0)
    tap = Tap("db", bitmaps, 1 << 20, now=lambda: times.now_ns, monotonic=lambda: times.monotonic_ns)
    for copy in tap.copies:
        copy.connected()
        copy.begin_sync()
        copy.take()
    yield tap
    for bitmap in bitmaps:
        bitmap.close()


def write(tap: Tap) -> None:
    tap.disks[0].set(0, 1)
    tap.stamp()
    tap.wrote(tap.disks[0], 0, bytes(BLOCK_SIZE))


def told(copy: Copy) -> list[tuple[int, int, int, int, int]]:
    """Return (type, flags but UNORDERED, sequence, time, id) of what was queued."""
    found = []
    while (batch := copy.take()) is not None:
        for message in batch:
            kind, flags, _, _, sequence, time_ns, _, asked_id = wire.HEAD.unpack_from(message)
            found.append((kind, flags & ~wire.FLAG_UNORDERED, sequence, time_ns, asked_id))
    return found


def test_a_hold_is_answered_in_its_place_and_lifts_the_clock(tap: Tap, times: Times) -> None:
    """R5: what was acknowledged before HELD carries a time up to T, all else a later one."""
    copy = tap.copies[0]
    t_ns = times.now_ns + 3 * MS
    write(tap)
    assert not tap.gate.shut
    copy.hold(7, t_ns)
    assert tap.gate.shut
    write(tap)
    copy.release(7)
    assert not tap.gate.shut
    write(tap)
    start = times.now_ns
    assert told(copy) == [
        (wire.WRITE, 0, 1, start, 0),
        (wire.HELD, 0, 1, t_ns, 7),
        (wire.WRITE, 0, 2, t_ns + 1, 0),
        (wire.RELEASED, 0, 2, t_ns + 1, 7),
        (wire.WRITE, 0, 3, t_ns + 2, 0),
    ]
    assert [head[0] for head in told(tap.copies[1])] == [wire.WRITE] * 3


@pytest.mark.parametrize("ahead_ns", [-1, wire.LIFT_NS_MAX + 1])
def test_a_time_that_is_past_or_far_ahead_holds_nothing(tap: Tap, times: Times, ahead_ns: int) -> None:
    """R1, R5: a clock is never turned back, and no VDSA sends it far ahead."""
    write(tap)
    before = tap.clock.time_ns
    tap.copies[0].hold(1, before + ahead_ns)
    assert not tap.gate.shut
    assert tap.clock.time_ns == before
    assert told(tap.copies[0])[1:] == [(wire.HELD, wire.FLAG_EXPIRED, 1, before, 1)]


def test_a_release_that_comes_late_says_so(tap: Tap, times: Times) -> None:
    tap.copies[0].hold(1, times.now_ns)
    times.go(wire.HOLD_NS_MAX)
    tap.copies[0].release(1)
    tap.copies[0].release(1)
    assert [head[:2] for head in told(tap.copies[0])[1:]] == [(wire.RELEASED, wire.FLAG_EXPIRED)] * 2
    assert not tap.gate.shut


def test_copies_hold_at_the_same_time_within_one_bound(tap: Tap, times: Times) -> None:
    """R1: a second HOLD does not make the first one's writes wait longer."""
    first, second, third = tap.copies
    first.hold(1, times.now_ns)
    times.go(15 * MS)
    second.hold(2, times.now_ns)
    first.release(1)
    assert tap.gate.shut
    times.go(5 * MS)
    second.release(2)
    assert [head[1] for head in told(first)] == [0, 0]
    assert [head[1] for head in told(second)] == [0, wire.FLAG_EXPIRED]
    third.hold(3, times.now_ns)
    third.lost()
    assert not tap.gate.shut


def test_a_hostile_vdsa_holds_a_fifth_of_the_time(tap: Tap, times: Times) -> None:
    """R1: however many HOLDs come, acknowledgements flow four fifths of the time."""
    dice = random.Random(5)
    shut_ns = 0
    begun = times.monotonic_ns
    for number in range(20_000):
        copy = dice.choice(tap.copies)
        copy.hold(number, max(times.now_ns, tap.clock.time_ns))
        step = dice.randrange(2 * MS)
        shut_ns += step if tap.gate.shut else 0
        times.go(step)
        if dice.random() < 0.1:
            copy.release(number)
        told(copy)
    whole_ns = times.monotonic_ns - begun
    assert 0.1 * whole_ns < shut_ns <= wire.HOLD_SHARE * whole_ns + 5 * wire.HOLD_NS_MAX


def test_questions_while_copies_are_missing_wait_and_hold_nothing(tap: Tap, times: Times) -> None:
    copy = tap.copies[0]
    copy.hold(1, times.now_ns)
    copy.drop("test")
    assert not tap.gate.shut, "a dropped queue holds nobody"
    copy.hold(2, times.now_ns)
    copy.release(2)
    copy.mark(9)
    assert not tap.gate.shut
    assert told(copy) == []
    copy.begin_sync()
    assert [(head[0], head[1], head[4]) for head in told(copy)] == [
        (wire.MARKED, 0, 9),
        (wire.HELD, wire.FLAG_EXPIRED, 2),
        (wire.RELEASED, wire.FLAG_EXPIRED, 2),
    ]


def unordered(copy: Copy) -> bool:
    copy.mark(1)
    flags = [wire.HEAD.unpack_from(message)[1] for batch in iter(copy.take, None) for message in batch]
    return bool(flags[-1] & wire.FLAG_UNORDERED)


def test_order_is_told_only_where_it_was_kept_throughout(tap: Tap, times: Times) -> None:
    """R5: a MARKED without UNORDERED vouches for every acknowledgement since the one before."""
    first, second, _ = tap.copies
    assert unordered(first)
    first.order(5 * MS)
    assert tap.gate.shut
    assert unordered(first), "some went before the order"
    assert not unordered(first)
    assert unordered(second), "it has given no order"
    first.order(9 * MS)
    assert unordered(first), "some waited for less"
    first.order(2 * MS)
    assert not unordered(first)
    tap.gate.early += 1
    assert unordered(first)
    first.order(0)
    assert unordered(first)
    assert not tap.gate.shut
    with pytest.raises(ProtocolError, match="uncertainty"):
        first.order(wire.ORDER_NS_MAX + 1)


def test_order_outlives_its_connection_for_a_while(tap: Tap, times: Times) -> None:
    """R1: a VDSA that is gone slows no guest for long."""
    copy = tap.copies[1]
    copy.order(MS)
    copy.lost()
    times.go(int(wire.ORDER_SECONDS * 1e9) - 1)
    assert tap.gate.ordered(1)
    times.go(1)
    assert not tap.gate.ordered(1)
    assert not tap.gate.shut


def real_gate() -> Gate:
    hot = memoryview(bytearray(16)).cast("Q")
    return Gate(Clock(hot, time.time_ns))


async def took(gate: Gate, time_ns: int) -> float:
    begun = time.monotonic()
    await gate.acknowledge(time_ns)
    return time.monotonic() - begun


async def test_acknowledgements_go_by_themselves() -> None:
    """R1: nobody releases; everyone waits for the bound, once."""
    gate = real_gate()
    begun = time.monotonic()
    assert gate.hold(0, 1)
    waits = await asyncio.gather(*[took(gate, 0) for _ in range(50)])
    assert time.monotonic() - begun > 0.015
    assert max(waits) < 0.02 + HEADROOM_SECONDS
    assert not gate.shut
    assert not gate.release(0, 1)


async def test_a_release_lets_all_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "HOLD_NS_MAX", 60_000 * MS)
    monkeypatch.setattr(gate_module, "_BUDGET_NS_MAX", 60_000 * MS)
    gate = real_gate()
    assert gate.hold(0, 1)
    waiting = [asyncio.create_task(took(gate, 0)) for _ in range(50)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    assert gate.release(0, 1)
    await asyncio.wait_for(asyncio.gather(*waiting), 10)


async def test_order_waits_for_the_time_to_pass() -> None:
    """R5: an acknowledged write's time is past by the uncertainty on this clock."""
    gate = real_gate()
    gate.order(0, 4 * MS)
    stamped = time.time_ns()
    await gate.acknowledge(stamped)
    assert time.time_ns() > stamped + 4 * MS
    assert gate.early == 1, "the order's begin"
    gate.order(0, 0)
    assert await took(gate, time.time_ns()) < HEADROOM_SECONDS


async def test_a_clock_far_behind_its_stamps_costs_a_bounded_wait_and_is_told() -> None:
    """R1, R5: production first; the order that could not be kept is said."""
    gate = real_gate()
    gate.order(0, 10 * MS)
    wait = await took(gate, time.time_ns() + 500 * MS)
    assert 0.045 < wait < 0.05 + HEADROOM_SECONDS
    assert gate.early == 2
