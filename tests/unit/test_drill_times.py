"""When a drill is due, which times it tests, what is alarming about it."""

from __future__ import annotations

import pytest

from dr_cloud.manager.drills import chosen_times, last_due_ns, next_due_ns
from dr_cloud.manager.health import judge_drill, judge_untested
from dr_cloud.model.errors import DrCloudError, InvalidError
from dr_cloud.model.units import SECOND_NS, format_time, parse_duration, parse_time

NOW_NS = parse_time("2026-03-29T00:59:59.5Z")
DAY_NS = 86400 * SECOND_NS


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        ("* * * * *", "2026-03-29T01:00:00"),
        ("0 3 * * 1", "2026-03-30T03:00:00"),
        ("30 2 29 3 *", "2026-03-29T02:30:00"),  # in many places this hour is not there; in UTC it is
        ("0 0 29 2 *", "2028-02-29T00:00:00"),
        ("*/20 22-23 * * MON-FRI", "2026-03-30T22:00:00"),
    ],
)
def test_when_it_is_due(schedule: str, due: str) -> None:
    assert format_time(next_due_ns(schedule, NOW_NS)) == f"{due}.000000000Z"


def test_a_due_time_is_not_due_again() -> None:
    due = next_due_ns("0 * * * *", NOW_NS)
    assert next_due_ns("0 * * * *", due) == due + 3600 * SECOND_NS
    assert next_due_ns("0 * * * *", due - 1) == due


@pytest.mark.parametrize("schedule", ["", "0 3 * *", "0 3 * * * *", "@daily", "0 24 * * *", "0 0 31 2 *", "x y z a b"])
def test_what_is_no_schedule(schedule: str) -> None:
    with pytest.raises(InvalidError, match="no schedule"):
        next_due_ns(schedule, NOW_NS)


def test_the_last_of_several() -> None:
    since = parse_time("2026-03-29T00:00:00Z")
    assert last_due_ns("*/10 * * * *", since, NOW_NS) == parse_time("2026-03-29T00:50:00Z")
    assert last_due_ns("0 * * * *", since, NOW_NS) == since
    assert last_due_ns("0 * * * *", since + 1, NOW_NS) is None


def test_which_times_are_tested() -> None:
    """What the journal does not hold is moved to its beginning, once, and said."""
    assert chosen_times([0, 5, 5], 10 * SECOND_NS, 20 * SECOND_NS) == ([15 * SECOND_NS, 20 * SECOND_NS], "")
    times, said = chosen_times([0, 11, 3600.5], 10 * SECOND_NS, 20 * SECOND_NS)
    assert times == [10 * SECOND_NS, 20 * SECOND_NS]
    assert said == "the journal does not hold 11, 3600.5 s ago: its first time is tested"
    assert chosen_times([10], 10 * SECOND_NS, 20 * SECOND_NS) == ([10 * SECOND_NS], "")


@pytest.mark.parametrize(
    ("verdict", "problem", "stood", "stands"),
    [
        (None, "", False, False),
        ("pass", "", True, False),
        ("fail", "", False, True),
        (None, "", True, True),
        (None, "denied", False, True),
        ("pass", "missed", False, True),
    ],
)
def test_an_alert_stands_until_a_run_has_passed(verdict, problem, stood, stands) -> None:
    assert judge_drill("vpg/erp/drill/d", verdict, problem, stood).raised is stands


def test_a_group_is_overdue_from_its_creation_or_its_last_passed_test() -> None:
    assert not judge_untested("vpg/erp", 0, None, 30, 30 * DAY_NS).raised
    assert judge_untested("vpg/erp", 0, None, 30, 31 * DAY_NS).raised
    assert not judge_untested("vpg/erp", 0, 2 * DAY_NS, 30, 31 * DAY_NS).raised


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10m", 600), ("1.5h", 5400), ("2d", 172800), ("0", 0)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "-1s", "1h30m", "s", "1y"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(DrCloudError, match="duration"):
        parse_duration(text)
