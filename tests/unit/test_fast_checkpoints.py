"""Which checkpoints are wanted: found by place, and the same as by looking at every one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.model.cloud import CheckpointFilter
from dr_cloud.model.journal import Checkpoint


def journal(times_ns: list[int]) -> list[Checkpoint]:
    """Return checkpoints at these times; every third has a tag, every fourth is none to recover to."""
    return [
        Checkpoint.model_construct(
            number=number,
            time_ns=at_ns,
            tag="x" if number % 3 == 0 else None,
            kind="sync" if number % 4 == 0 else "auto",
        )
        for number, at_ns in enumerate(sorted(times_ns))
    ]


LIMITS = st.none() | st.integers(0, 30)


@given(
    times_ns=st.lists(st.integers(0, 20), max_size=25),
    since_ns=LIMITS,
    until_ns=LIMITS,
    before=LIMITS,
    limit=st.none() | st.integers(1, 30),
    tag=st.sampled_from([None, "x", "y"]),
    testable=st.sampled_from([None, True, False]),
)
def test_the_newest_that_are_wanted(
    times_ns: list[int],
    since_ns: int | None,
    until_ns: int | None,
    before: int | None,
    limit: int | None,
    tag: str | None,
    testable: bool | None,
) -> None:
    made = journal(times_ns)
    wanted = [
        one
        for one in made
        if (since_ns is None or one.time_ns >= since_ns)
        and (until_ns is None or one.time_ns <= until_ns)
        and (before is None or one.number < before)
        and (tag is None or one.tag == tag)
        and (testable is None or one.testable == testable)
    ]
    which = CheckpointFilter(since_ns=since_ns, until_ns=until_ns, tag=tag, testable=testable)
    assert which.newest(made, before, limit) == (wanted if limit is None else wanted[-limit:])


def test_a_long_journal_is_not_walked_through() -> None:
    """What is newer than a time is found by halving, so a list costs the same however long a journal is."""
    made = journal(list(range(4000)))
    looked_at: list[int] = []

    class Watched(list[Checkpoint]):
        def __getitem__(self, at: int) -> Checkpoint:  # type: ignore[override]
            looked_at.append(at)
            return super().__getitem__(at)

    found = CheckpointFilter(since_ns=3990).newest(Watched(made), 3999, 3)
    assert [one.number for one in found] == [3996, 3997, 3998]
    assert len(looked_at) < 60


@pytest.mark.parametrize("limit", [None, 5])
def test_an_empty_journal_has_none(limit: int | None) -> None:
    assert CheckpointFilter().newest([], None, limit) == []
