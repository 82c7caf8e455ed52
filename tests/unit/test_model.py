"""Times, sizes and names as people write them."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.model.errors import DrCloudError, TimeOutOfRangeError
from dr_cloud.model.ids import Scope, check_name
from dr_cloud.model.units import format_size, format_time, parse_size, parse_time


@given(st.integers(0, 4_000_000_000 * 10**9))
def test_a_time_survives_its_text(time_ns: int) -> None:
    assert parse_time(format_time(time_ns)) == time_ns


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01T01:00:01.5+01:00", 1_500_000_000),
        ("1970-01-01t00:00:00.000000001z", 1),
    ],
)
def test_times(text: str, time_ns: int) -> None:
    """R14.1: a time is named to a fraction of a second, with its zone."""
    assert parse_time(text) == time_ns


@pytest.mark.parametrize("text", ["", "now", "2026-03-01", "2026-03-01T12:00:00", "2026-02-30T12:00:00Z", "1"])
def test_what_is_no_time_is_told_so(text: str) -> None:
    with pytest.raises(DrCloudError) as error:
        parse_time(text)
    assert error.value.remedy


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("64KiB", 65536), ("20 MiB", 20 << 20), ("2TiB", 2 << 40)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1.5GiB", "10GB", "-1", "KiB"])
def test_what_is_no_size_is_told_so(text: str) -> None:
    with pytest.raises(DrCloudError, match="not a size"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (0, 4096, 3 << 29, 5 << 41)] == ["0 B", "4.0 KiB", "1.5 GiB", "10.0 TiB"]


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "a..b", "-a", "a-", "a" * 64, "é", "a b", ".a"])
def test_names_that_cannot_be_a_part_of_a_key(name: str) -> None:
    """Invariant 7: a name can never reach into another's keys."""
    with pytest.raises(DrCloudError, match="cannot be used"):
        check_name(name, "VPG")
    with pytest.raises(DrCloudError):
        Scope("acme", name, "dc1").checked()


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(TimeOutOfRangeError("too late", "ask earlier")))
    assert (type(error), str(error), error.remedy) == (TimeOutOfRangeError, "too late", "ask earlier")
