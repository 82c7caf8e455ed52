from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dr_cloud.link.throttle import Bucket, limit_at
from dr_cloud.model.replication import Throttle, ThrottleWindow
from dr_cloud.model.units import SECOND_NS, parse_time

NIGHT = ThrottleWindow(since="22:00", until="06:00", bytes_per_second=1000)
NOON = ThrottleWindow(since="11:30", until="12:30", bytes_per_second=50)
LUNCH = ThrottleWindow(since="12:00", until="13:00", bytes_per_second=70)


@pytest.mark.parametrize(
    ("clock", "limit"),
    [
        ("21:59:59.999999999", 200),
        ("22:00:00", 1000),
        ("23:59:59", 1000),
        ("00:00:00", 1000),
        ("05:59:59", 1000),
        ("06:00:00", 200),
        ("11:30:00", 50),
        ("12:10:00", 50),
        ("12:30:00", 70),
        ("13:00:00", 200),
    ],
)
def test_windows_follow_the_day_in_utc_and_over_midnight(clock: str, limit: int) -> None:
    throttle = Throttle(bytes_per_second=200, windows=[NIGHT, LUNCH, NOON])
    assert limit_at(throttle, parse_time(f"2026-03-01T{clock}Z")) == limit
    assert limit_at(Throttle(), parse_time(f"2026-03-01T{clock}Z")) == 0


@pytest.mark.parametrize("bad", ["24:00", "7:00", "07:60", ""])
def test_a_window_that_is_no_time_is_refused(bad: str) -> None:
    with pytest.raises(ValidationError):
        ThrottleWindow(since=bad, until="06:00", bytes_per_second=1)


@given(st.integers(1, 10**9), st.lists(st.integers(1, 65_548), min_size=1, max_size=200))
def test_whoever_waits_as_told_keeps_the_limit_and_uses_it(limit: int, sizes: list[int]) -> None:
    bucket, now_ns, sent = Bucket(Throttle(bytes_per_second=limit)), 10**18, 0
    start_ns = now_ns
    for size in sizes:
        now_ns += int(bucket.wait_seconds(now_ns) * SECOND_NS) + 1
        assert bucket.wait_seconds(now_ns) < 1e-6
        bucket.spend(size, now_ns)
        sent += size
    allowed = limit * (now_ns - start_ns) / SECOND_NS
    kept = max(limit * 0.25, 1)
    assert sent - max(sizes) - kept - 1 <= allowed * 1.000001 + len(sizes)
    assert allowed <= sent + len(sizes) * (1 + limit / SECOND_NS * 2)


def test_a_limit_may_be_lifted_and_set_while_somebody_waits() -> None:
    bucket = Bucket(Throttle(bytes_per_second=10))
    bucket.spend(1000, 0)
    assert bucket.wait_seconds(0) > 50
    bucket.throttle = Throttle()
    assert bucket.wait_seconds(1) == 0
    bucket.throttle = Throttle(bytes_per_second=1000)
    assert bucket.wait_seconds(2) == 0
    bucket.spend(10_000, 2)
    assert 9 < bucket.wait_seconds(2) < 11
    assert 9 < bucket.wait_seconds(1) < 11, "a clock that steps back gives nothing"
    assert bucket.wait_seconds(20 * SECOND_NS) == 0
