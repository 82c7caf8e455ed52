"""The search for the last clean point against the plain answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from dr_cloud.recovery.search import CleanSearch, Known, Span


def search_all(
    search: CleanSearch,
    parallel: int,
    clean: Callable[[int], bool],
    span_of: Callable[[int], Span] = lambda at: Span(first=at, last=at, time_ns=at * 10),
    mute: Callable[[int, Span], bool] = lambda test, span: False,
) -> CleanSearch:
    """Search to the end, the state written and read again between rounds; return it."""
    tests = 0
    while not search.done:
        candidates = search.next_candidates(parallel)
        assert candidates == sorted(set(candidates)) and 0 < len(candidates) <= parallel
        assert not any(known.first <= at <= known.last for at in candidates for known in search.known)
        spans = {span.first: span for span in map(span_of, candidates)}.values()
        silent = []
        known = []
        for span in spans:
            tests += 1
            if mute(tests, span):
                silent.append(span)
            else:
                known.append(Known(**span.model_dump(), clean=clean(span.last), reason="" if clean(span.last) else "x"))
        search.answer(known[::-1], silent)
        search = CleanSearch.model_validate_json(search.model_dump_json())
    assert search.next_candidates(parallel) == []
    return search


def bound(candidates: int, parallel: int) -> int:
    """Return ⌈log_(parallel + 1) (candidates + 1)⌉, in whole numbers."""
    rounds = 0
    while (parallel + 1) ** rounds < candidates + 1:
        rounds += 1
    return rounds


@given(candidates=st.integers(1, 10**7), edge=st.floats(0, 1), parallel=st.integers(1, 64))
@example(candidates=10**6 + 1, edge=0.5, parallel=8)
@example(candidates=1, edge=0.0, parallel=1)
@example(candidates=1, edge=1.0, parallel=64)
def test_finds_the_edge_in_few_rounds(candidates: int, edge: float, parallel: int) -> None:
    """R14.2: N stacks a round find the last clean of any number of writes in ⌈log_(N+1)⌉ rounds, no end being known."""
    last_clean = round(edge * candidates) - 1
    search = search_all(CleanSearch(candidates=candidates), parallel, lambda at: at <= last_clean)
    (found,) = search.edges
    assert (found.clean.last if found.clean else -1) == last_clean
    assert (found.dirty.first if found.dirty else candidates) == last_clean + 1
    assert search.monotone and not search.unsaid
    assert search.rounds <= bound(candidates, parallel)
    assert search.left == 0 and search.progress == 1


def test_a_million_writes_take_seven_rounds_of_eight() -> None:
    """R14.2: ⌈log₉ 10⁶⌉ = 7."""
    assert math.ceil(math.log(10**6, 9)) == bound(10**6 + 1, 8) == 7


@given(pattern=st.lists(st.booleans(), min_size=1, max_size=200), parallel=st.integers(1, 64))
def test_every_edge_that_is_told_is_one(pattern: list[bool], parallel: int) -> None:
    """R14.2: whatever the answers are: neighbours of every edge differ, nothing known is dirty before the first."""
    search = search_all(CleanSearch(candidates=len(pattern)), parallel, pattern.__getitem__)
    seen = {known.first: known.clean for known in search.known}
    assert all(pattern[at] == clean for at, clean in seen.items())
    for edge in search.edges:
        low = edge.clean.last if edge.clean else -1
        high = edge.dirty.first if edge.dirty else len(pattern)
        assert high - low == 1
        assert (low == -1 or pattern[low]) and (high == len(pattern) or not pattern[high])
    answers = [seen[at] for at in sorted(seen)]
    assert search.monotone == (answers == sorted(answers, reverse=True))
    if search.monotone:
        assert len(search.edges) == 1
    else:
        assert len(search.edges) == sum(a and not b for a, b in zip([True, *answers], answers, strict=False))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    edge=st.floats(0, 1),
    parallel=st.integers(1, 16),
)
def test_what_can_be_had_together_only_has_one_answer(sizes: Sequence[int], edge: float, parallel: int) -> None:
    """R14.2: a write of many blocks is one candidate, and so is what was written while the order was not known."""
    spans: list[Span] = []
    for number, size in enumerate(sizes):
        first = spans[-1].last + 1 if spans else 0
        spans.append(Span(first=first, last=first + size - 1, time_ns=number))
    of = [span for span in spans for _ in range(span.first, span.last + 1)]
    last_clean = round(edge * len(spans)) - 1
    search = search_all(
        CleanSearch(candidates=len(of)), parallel, lambda at: of[at].time_ns <= last_clean, of.__getitem__
    )
    (found,) = search.edges
    assert (found.clean.time_ns if found.clean else -1) == last_clean
    assert (found.dirty.time_ns if found.dirty else len(spans)) == last_clean + 1
    assert search.rounds <= bound(len(of), parallel)


@given(
    candidates=st.integers(1, 10**6),
    edge=st.floats(0, 1),
    parallel=st.integers(1, 16),
    precision=st.integers(0, 10**5),
)
def test_it_stops_when_it_is_near_enough(candidates: int, edge: float, parallel: int, precision: int) -> None:
    last_clean = round(edge * candidates) - 1
    search = search_all(
        CleanSearch(candidates=candidates, precision_ns=precision), parallel, lambda at: at <= last_clean
    )
    (found,) = search.edges
    if found.clean is not None and found.dirty is not None:
        assert found.clean.last <= last_clean < found.dirty.first
        assert found.dirty.time_ns - found.clean.time_ns <= max(precision, 10)


@given(
    candidates=st.integers(1, 3000),
    edge=st.floats(0, 1),
    parallel=st.integers(1, 16),
    lost=st.sets(st.integers(1, 60)),
)
def test_tests_that_cannot_say_cost_rounds_but_no_truth(
    candidates: int, edge: float, parallel: int, lost: set[int]
) -> None:
    """R14.2: what a test could not say is never taken for an answer; the search ends, and says what is missing."""
    last_clean = round(edge * candidates) - 1
    search = search_all(
        CleanSearch(candidates=candidates),
        parallel,
        lambda at: at <= last_clean,
        mute=lambda test, span: test in lost,
    )
    (found,) = search.edges
    low = found.clean.last if found.clean else -1
    high = found.dirty.first if found.dirty else candidates
    assert low <= last_clean < high
    assert search.unsaid == (high - low > 1)
    if not lost:
        assert not search.unsaid


def test_what_could_not_say_is_tried_once_more_beside() -> None:
    search = CleanSearch(candidates=9)
    (middle,) = search.next_candidates(1)
    search.answer([], [Span(first=middle, last=middle, time_ns=middle)])
    (beside,) = search.next_candidates(1)
    assert abs(beside - middle) == 1 and not search.unsaid
    search.answer([], [Span(first=beside, last=beside, time_ns=beside)])
    assert search.done and search.unsaid and search.rounds == 2


def test_what_is_known_narrows_before_the_first_round() -> None:
    """R14.2: verdicts of other tests are used: no time is tested twice."""
    search = CleanSearch(candidates=1000)
    search.learn([Known(first=at, last=at, time_ns=at, clean=at < 500) for at in (499, 400, 503)])
    assert search.left == 3 and search.rounds == 0
    assert search.next_candidates(8) == [500, 501, 502]


def test_edges_share_the_tests_of_a_round() -> None:
    search = CleanSearch(candidates=1000)
    search.learn([Known(first=at, last=at, time_ns=at, clean=at % 200 == 0) for at in range(0, 1000, 100)])
    assert len(search.edges) == 5 and not search.monotone
    tests = search.next_candidates(8)
    assert len(tests) == 8
    assert {at // 200 for at in tests} == {0, 1, 2, 3, 4}
    assert [at // 200 for at in search.next_candidates(2)] == [0, 1]
