"""Answers of the last moments, under one revision.

There is one in the rights manager, which saves its engine, and one in the process that puts policies and facts, which
saves the way to it. Each keeps an answer for half of `CACHE_SECONDS`, so no answer is ever older than that.
"""

from __future__ import annotations

from typing import Final

from dr_cloud.model.rights import CACHE_SECONDS, Answer

KEPT_SECONDS: Final = CACHE_SECONDS / 2
_ENTRIES_MAX: Final = 20_000


class AnswerCache:
    """See the module's docstring. Not thread-safe."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, float, Answer]] = {}
        self._revision = ""

    def get(self, key: str, now: float, revision: str) -> Answer | None:
        """Return the answer to a question, if it was given a moment ago under this revision.

        Args:
            key: The question.
            now: Seconds.
            revision: In force. If it is another one than before, everything is forgotten.
        """
        if revision != self._revision:
            self._answers.clear()
            self._revision = revision
        at, until, answer = self._answers.get(key, (0.0, 0.0, None))
        return answer if at <= now < until else None

    def put(self, key: str, now: float, until: float, answer: Answer) -> None:
        """Keep an answer that was asked for at `now`, to be used before `until` at most."""
        if not answer.answered or answer.revision != self._revision:
            return
        if len(self._answers) >= _ENTRIES_MAX:
            self._answers.clear()
        self._answers[key] = (now, min(until, now + KEPT_SECONDS), answer)

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()
