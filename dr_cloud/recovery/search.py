"""The search for the last clean point: many times a round, in parallel, instead of one after another.

Candidates are numbered by time. Nothing is known of them at first: the search begins between a clean one before the
first and a dirty one after the last, which do not exist. Each round tests N candidates that cut what is left into
N + 1 parts: ⌈log_(N+1) (candidates + 1)⌉ rounds at most where answers are monotone (once dirty, always dirty).

Candidates that can be had together only (one write changed them) have one answer: it names the first and the last of
them. Answers come in any order. Where a clean candidate is seen after a dirty one there is more than one edge from
clean to dirty: every edge that is seen is narrowed, in the same rounds, which then share their N tests.

A test may end without an answer. Another candidate beside it is tried then; an edge for which two rounds in a row have
brought none at all is left as it is.

Pure: it opens no stacks, it only says which candidates to test next. It can be written as JSON and read again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field


class Span(BaseModel):
    """Candidates `first` to `last`, which can be had together only; the image of `time_ns` holds all of them."""

    model_config = ConfigDict(frozen=True)

    first: int
    last: int
    time_ns: int


class Known(Span):
    """What a test said of them."""

    clean: bool
    reason: str = ""
    """Why they are not clean."""


class Edge(BaseModel):
    """Two neighbours among what is known, the earlier clean, the later dirty."""

    model_config = ConfigDict(frozen=True)

    clean: Known | None
    """None: nothing before `dirty` is known to be clean."""
    dirty: Known | None
    """None: nothing is known to be dirty."""


class CleanSearch(BaseModel):
    """The state of one search."""

    candidates: int = Field(ge=1)
    precision_ns: int = 0
    """An edge is narrow enough if its two times are this close; 0: down to one write."""
    known: list[Known] = []
    """Ascending."""
    rounds: int = 0
    mute: list[Span] = []
    """What the last round has asked for in vain."""
    silences: list[tuple[int, int]] = []
    """What lay open, candidates between these two, when a round brought no answer for it at all."""

    @property
    def monotone(self) -> bool:
        """Whether nothing clean is known after something dirty."""
        return not any(not before.clean and after.clean for before, after in pairwise(self.known))

    @property
    def edges(self) -> list[Edge]:
        """Every edge that is seen, ascending; at least one. The first is the answer: nothing dirty is before it."""
        if not self.known:
            return [Edge(clean=None, dirty=None)]
        found = [] if self.known[0].clean else [Edge(clean=None, dirty=self.known[0])]
        found += [Edge(clean=a, dirty=b) for a, b in pairwise(self.known) if a.clean and not b.clean]
        return found or [Edge(clean=self.known[-1], dirty=None)]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to test."""
        return not self._open()

    @property
    def unsaid(self) -> bool:
        """Whether an edge is left wider than was asked for, because no test could say."""
        return any(self.silences.count(gap) > 1 and not self._narrow(edge) for edge, gap in self._gaps())

    @property
    def left(self) -> int:
        """How many candidates lie between the ends of edges that are still to be narrowed."""
        return sum(high - low - 1 for low, high in self._open())

    @property
    def progress(self) -> float:
        """How far it has come, 0 to 1: a round counts as much as any other."""
        return 1 - math.log(1 + self.left) / math.log(1 + self.candidates)

    def _gaps(self) -> list[tuple[Edge, tuple[int, int]]]:
        """Return each edge with the two candidates between which it lies open."""
        return [
            (edge, (edge.clean.last if edge.clean else -1, edge.dirty.first if edge.dirty else self.candidates))
            for edge in self.edges
        ]

    def _narrow(self, edge: Edge) -> bool:
        return (
            edge.clean is not None
            and edge.dirty is not None
            and edge.dirty.time_ns - edge.clean.time_ns <= self.precision_ns
        )

    def _open(self) -> list[tuple[int, int]]:
        return [
            (low, high)
            for edge, (low, high) in self._gaps()
            if high - low > 1 and not self._narrow(edge) and self.silences.count((low, high)) < 2
        ]

    def next_candidates(self, parallel: int) -> list[int]:
        """Return at most `parallel` candidates to test at once, ascending; none when done."""
        if parallel < 1:
            raise ValueError("at least one test a round")
        gaps = self._open()[:parallel]
        shares = [parallel // len(gaps) + (place < parallel % len(gaps)) for place in range(len(gaps))]
        chosen = set()
        for (low, high), share in zip(gaps, shares, strict=True):
            tests = min(share, high - low - 1)
            for place in range(1, tests + 1):
                chosen.add(self._beside_mute(low + place * (high - low) // (tests + 1), low, high))
        return sorted(chosen)

    def _beside_mute(self, candidate: int, low: int, high: int) -> int:
        """Return a candidate that was not asked in vain just now, if there is one beside."""
        span = next((span for span in self.mute if span.first <= candidate <= span.last), None)
        if span is None:
            return candidate
        return next((beside for beside in (span.last + 1, span.first - 1) if low < beside < high), candidate)

    def learn(self, known: Sequence[Known]) -> None:
        """Take what is known without a test."""
        there = {old.first for old in self.known}
        new = {item.first: item for item in known if item.first not in there}
        self.known = sorted([*self.known, *new.values()], key=lambda item: item.first)

    def answer(self, known: Sequence[Known], mute: Sequence[Span] = ()) -> None:
        """Take a round's answers, and what it asked for in vain."""
        for low, high in self._open():
            if any(low < span.first < high for span in mute) and not any(low < item.first < high for item in known):
                self.silences.append((low, high))
        self.learn(known)
        self.mute = list(mute)
        self.rounds += 1
