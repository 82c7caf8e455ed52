"""The search for the last clean point: many times a round, in parallel, instead of one after another.

Given candidates in ascending order of time, of which the first is known clean and the last known dirty, each round
tests N times that cut what is left into N + 1 parts: ⌈log_(N+1) candidates⌉ rounds in all. It takes the answers to be
monotone (once dirty, always dirty); if a round's answers are not, it says so and goes on below the first dirty one.
Pure: it opens no stacks, it only says which candidates to test next.
"""

from __future__ import annotations

from collections.abc import Mapping


class CleanSearch:
    """The state of one search over candidates 0 … count - 1.

    Attributes:
        clean: The last candidate known to be clean.
        dirty: The first candidate known to be dirty.
        monotone: False once a candidate was found clean after one found dirty.
        rounds: Rounds answered so far.
    """

    def __init__(self, count: int) -> None:
        """Begin with candidate 0 clean and candidate `count - 1` dirty."""
        if count < 2:
            raise ValueError("a search needs a clean and a dirty candidate")
        self.clean = 0
        self.dirty = count - 1
        self.monotone = True
        self.rounds = 0

    @property
    def done(self) -> bool:
        """Whether the last clean and the first dirty candidate are neighbours."""
        return self.dirty - self.clean == 1

    def next_candidates(self, parallel: int) -> list[int]:
        """Return at most `parallel` candidates to test at once, ascending; none when done."""
        if parallel < 1:
            raise ValueError("at least one test a round")
        between = self.dirty - self.clean - 1
        tests = min(parallel, between)
        return [self.clean + (i + 1) * (between + 1) // (tests + 1) for i in range(tests)]

    def answer(self, verdicts: Mapping[int, bool]) -> None:
        """Take a round's verdicts: candidate → clean."""
        dirty = [candidate for candidate, clean in verdicts.items() if not clean]
        first_dirty = min(dirty, default=self.dirty)
        clean = [candidate for candidate, is_clean in verdicts.items() if is_clean]
        if any(candidate > first_dirty for candidate in clean):
            self.monotone = False
        self.dirty = min(self.dirty, first_dirty)
        self.clean = max([self.clean, *(candidate for candidate in clean if candidate < self.dirty)])
        self.rounds += 1
