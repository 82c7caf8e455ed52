"""Where the manager asks the rights manager: it remembers what was allowed, and keeps grants while they are fresh.

A yes to what stands (no person asks) is remembered for `GRACE_SECONDS`. It counts for what stands only, and only while
no engine answers: a link that was cut may come back, a stream may be opened again. What is new needs an answer.

A grant is used for a third of its life and then made anew, as well as under another revision, so that orders cost
nothing most of the time. Where none can be had, the old one is given out until it ends.

Nothing here raises: whatever goes wrong with the rights manager is an answer that is a no.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import structlog

from dr_cloud.model.rights import GRACE_SECONDS, Answer, Question, RightsState
from dr_cloud.model.units import SECOND_NS, format_time
from dr_cloud.rights.rights import GrantRequest, Rights

GRACE_NS: Final = GRACE_SECONDS * SECOND_NS
RENEWED_NS: Final = GRACE_NS // 3
_ASKED_AT_ONCE: Final = 256
"""A question takes an engine about a millisecond, and whoever asks waits for two seconds."""
_KEPT_MAX: Final = 10_000
"""Above so many, what has run out is looked for and forgotten."""
log = structlog.get_logger(__name__)


class _Grant(NamedTuple):
    text: str
    revision: str
    made_ns: int
    until_ns: int
    """It ends with its life, or with the mechanism that it rests on."""


class Desk:
    """See the module's docstring. May be used from any thread."""

    def __init__(self, rights: Rights, clock_ns: Callable[[], int]) -> None:
        """Ask `rights`."""
        self.rights = rights
        self._clock_ns = clock_ns
        self._revision = ""
        """That the engine answers by, as far as is known."""
        self._allowed: dict[str, tuple[Answer, int]] = {}
        self._grants: dict[str, _Grant] = {}
        self._lock = threading.Lock()

    def state(self) -> RightsState | None:
        """Return how the rights manager stands, and note its revision; None if it cannot be asked."""
        try:
            state = self.rights.state()
        except Exception:
            log.exception("desk.state")
            return None
        self._revision = state.revision or self._revision
        return state

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question."""
        if not questions:
            return []
        try:
            parts = [questions[at : at + _ASKED_AT_ONCE] for at in range(0, len(questions), _ASKED_AT_ONCE)]
            told = [zip(part, self.rights.decide(part), strict=True) for part in parts]
            answers = [_whole(answer) for part in told for _, answer in part]
        except Exception as error:
            log.exception("desk.decide")
            answers = [Answer(reasons=[f"the rights manager does not answer: {type(error).__name__}"])] * len(questions)
        now_ns = self._clock_ns()
        with self._lock:
            for question, answer in zip(questions, answers, strict=True):
                if question.operator is None and answer.answered:
                    if answer.allow:
                        self._allowed[_key(question)] = answer, now_ns
                    else:
                        self._allowed.pop(_key(question), None)
            self._forget(now_ns)
        return answers

    def ask_standing(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each; where no engine answers, what was allowed a short while ago still is."""
        return [
            answer if answer.answered else self._remembered(question, answer)
            for question, answer in zip(questions, self.ask(questions), strict=True)
        ]

    def _remembered(self, question: Question, answer: Answer) -> Answer:
        now_ns = self._clock_ns()
        with self._lock:
            before, at_ns = self._allowed.get(_key(question), (answer, 0))
        if not before.allow or now_ns >= _end_ns(before, at_ns):
            return answer
        reason = f"no engine answers; allowed at {format_time(at_ns)}, which holds for {GRACE_SECONDS} s"
        return before.model_copy(update={"reasons": [*before.reasons, reason]})

    def grants(self, requests: Sequence[GrantRequest]) -> list[tuple[Answer, str]]:
        """Return (answer, grant) for each; the grant is empty if it is a no, or if none is to be had."""
        now_ns = self._clock_ns()
        keys = [request.model_dump_json() for request in requests]
        with self._lock:
            held = {key: self._grants[key] for key in keys if key in self._grants}
        wanted = [n for n, key in enumerate(keys) if key not in held or not self._fresh(held[key], now_ns)]
        made: dict[str, tuple[Answer, str]] = {}
        if wanted:
            try:
                for part in (wanted[at : at + _ASKED_AT_ONCE] for at in range(0, len(wanted), _ASKED_AT_ONCE)):
                    found = self.rights.grant([requests[n] for n in part])
                    made |= {keys[n]: (_whole(answer), text) for n, (answer, text) in zip(part, found, strict=True)}
            except Exception:
                log.exception("desk.grant")
        with self._lock:
            for key, (answer, text) in made.items():
                if answer.allow and text:
                    held[key] = self._grants[key] = _Grant(text, answer.revision, now_ns, _end_ns(answer, now_ns))
                elif answer.answered:
                    held.pop(key, None)
                    self._grants.pop(key, None)
            self._forget(now_ns)
        return [_given(held.get(key), made.get(key, (Answer(), ""))[0], now_ns) for key in keys]

    def _fresh(self, grant: _Grant, now_ns: int) -> bool:
        young = now_ns < min(grant.made_ns + RENEWED_NS, grant.until_ns)
        return young and grant.revision == (self._revision or grant.revision)

    def _forget(self, now_ns: int) -> None:
        if len(self._allowed) > _KEPT_MAX:
            self._allowed = {key: kept for key, kept in self._allowed.items() if now_ns - kept[1] < GRACE_NS}
        if len(self._grants) > _KEPT_MAX:
            self._grants = {key: kept for key, kept in self._grants.items() if now_ns < kept.until_ns}


def _end_ns(answer: Answer, now_ns: int) -> int:
    end_ns = now_ns + GRACE_NS
    return end_ns if answer.until_s is None else min(end_ns, answer.until_s * SECOND_NS)


def _key(question: Question) -> str:
    return question.model_dump_json()


def _whole(answer: Answer) -> Answer:
    """A yes without a revision is nobody's."""
    return answer if answer.answered or not answer.allow else Answer()


def _given(grant: _Grant | None, answer: Answer, now_ns: int) -> tuple[Answer, str]:
    if grant is None or now_ns >= grant.until_ns:
        return answer, ""
    return Answer(allow=True, reasons=[], revision=grant.revision), grant.text
