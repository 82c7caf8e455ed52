"""The search for the last clean point against the plain answer."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.recovery.search import CleanSearch


@given(count=st.integers(2, 10**7), edge=st.floats(0, 1, exclude_max=True), parallel=st.integers(1, 64))
def test_finds_the_edge_in_few_rounds(count: int, edge: float, parallel: int) -> None:
    """R14.2: N stacks a round find the last clean of any number of writes in ⌈log_(N+1)⌉ rounds."""
    last_clean = int(edge * (count - 1))
    search = CleanSearch(count)
    while not search.done:
        candidates = search.next_candidates(parallel)
        assert len(set(candidates)) == len(candidates) <= parallel
        assert all(search.clean < candidate < search.dirty for candidate in candidates)
        search.answer({candidate: candidate <= last_clean for candidate in candidates})
    assert (search.clean, search.dirty) == (last_clean, last_clean + 1)
    assert search.monotone
    assert search.rounds <= math.ceil(math.log(count - 1, parallel + 1) - 1e-9)
    assert search.next_candidates(parallel) == []


def test_says_when_answers_are_not_monotone() -> None:
    search = CleanSearch(10)
    search.answer({2: True, 5: False, 7: True})
    assert not search.monotone
    assert (search.clean, search.dirty) == (2, 5)
