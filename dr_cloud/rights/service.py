"""The rights manager itself: an engine, what it is to decide by, and the key.

Purpose
    It looks after the bundle (sources and facts together), asks the engine, and signs grants after its own yes.

Consistency
    Sources and facts have one revision, named by their content. Answers are used again for a moment (`cache`),
    never under another revision, nor across the beginning or end of a mechanism. A no that comes from an older revision
    while the engine is about to fetch a newer one is asked again, so what was just registered is not refused for it.

Crash recovery
    Only the key is kept (`state`/rights). Sources and facts are put again by the manager, which has them in its
    database; until then there is no answer, and no answer is a no.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.rights import (
    GRACE_SECONDS,
    Action,
    Answer,
    Facts,
    PolicySources,
    Question,
    RightsState,
)
from dr_cloud.rights.bundle import Signer, build_bundle
from dr_cloud.rights.cache import AnswerCache
from dr_cloud.rights.embedded import EmbeddedEngine
from dr_cloud.rights.engine import Engine, no_answer
from dr_cloud.rights.grant import Grant, issue
from dr_cloud.rights.regulation import POLICIES, boundaries_s, check_modules, load_policies, question_input
from dr_cloud.rights.rights import GrantRequest
from dr_cloud.rights.trial import try_bundle

SETTLE_SECONDS: Final = 3.0
"""How long an engine may take to come to a new revision before that is a problem."""
_WAIT_SECONDS: Final = 1.2
"""How long a question waits for that. Who asks gives up after two seconds."""


class RightsService:
    """`dr_cloud.rights.rights.Rights` over an engine. Every method may be called from any thread."""

    def __init__(self, state_dir: Path, engine: Engine, clock_s: Callable[[], float] = time.time) -> None:
        """Take an engine, which is closed with it.

        Args:
            state_dir: The provider's state; the key is kept in its folder `rights`.
            engine: It decides.
            clock_s: Seconds since the epoch.

        Raises:
            DrCloudError: The key cannot be used.
        """
        self._signer = Signer.open(state_dir)
        self._engine = engine
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._sources: PolicySources | None = None
        self._facts: Facts | None = None
        self._wanted = ""
        self._bundle = b""
        self._put_at = 0.0
        self._cache = AnswerCache()
        self._boundaries: list[int] = []
        self._good = [load_policies().modules] if POLICIES.is_dir() else []
        """Modules that need no trial: the product's own, and those that have had one."""

    @property
    def public_key(self) -> str:
        """The public half of the rights key, PEM: grants and bundles are verified with it."""
        return self._signer.public

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    # -- questions --

    def decide(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question. Never raises."""
        if not self._wanted:
            return [no_answer("the rights manager has no policies or no facts yet") for _ in questions]
        now = self._clock_s()
        keys = [question.model_dump_json() for question in questions]
        with self._lock:
            revision = self._engine.revision
            known = {key: answer for key in keys if (answer := self._cache.get(key, now, revision)) is not None}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        known |= self._asked(missing, now)
        return [known[key] for key in keys]

    def _asked(self, questions: dict[str, Question], now: float) -> dict[str, Answer]:
        answers = self._ask(questions, now)
        outdated = {key: questions[key] for key, a in answers.items() if a.answered and not a.allow and self._old(a)}
        if outdated and self._settle():
            answers |= self._ask(outdated, self._clock_s())
        boundary_s = self._boundary_s(now)
        until = math.inf if boundary_s is None else float(boundary_s)
        with self._lock:
            for key, answer in answers.items():
                self._cache.put(key, now, until, answer)
        return answers

    def _ask(self, questions: dict[str, Question], now: float) -> dict[str, Answer]:
        if not questions:
            return {}
        inputs = [question_input(question, int(now)) for question in questions.values()]
        return dict(zip(questions, self._engine.answer(inputs), strict=True))

    def _old(self, answer: Answer) -> bool:
        return answer.revision != self._wanted

    def _settle(self) -> bool:
        """Wait while the engine may still come to the newest revision; return whether it has."""
        until = min(time.monotonic() + _WAIT_SECONDS, self._put_at + SETTLE_SECONDS)
        while self._engine.revision != self._wanted:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        return True

    def grant(self, requests: Sequence[GrantRequest]) -> list[tuple[Answer, str]]:
        """Answer each, with a grant where the answer is yes. Never raises."""
        answers = self.decide([request.question for request in requests])
        return [self._granted(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _granted(self, request: GrantRequest, answer: Answer) -> tuple[Answer, str]:
        question, place = request.question, request.question.place
        if not answer.allow:
            return answer, ""
        asked = (question.enterprise, question.vpg, question.target)
        if question.action is not Action.KEEP or place is None or place.kind != "data center" or asked != request.scope:
            reasons = ["a grant is for keeping one scope in one data center, and the question is not about that"]
            return Answer(reasons=reasons, revision=answer.revision), ""
        until_s = int(self._clock_s()) + GRACE_SECONDS
        if answer.until_s is not None:
            until_s = min(until_s, answer.until_s)
        grant = Grant(request.scope, place.name, request.store, answer.revision, until_s)
        return answer, issue(grant, self._signer)

    def state(self) -> RightsState:
        """Return how it stands. Never raises."""
        revision, wanted = self._engine.revision, self._wanted
        problem = self._engine.problem
        if not wanted:
            problem = problem or "there are no policies or no facts yet"
        elif not problem and revision != wanted and time.monotonic() - self._put_at > SETTLE_SECONDS:
            problem = f"it decides by revision {revision or 'none'}, and {wanted} is the newest"
        return RightsState(
            engine=self._engine.kind,
            wanted=wanted,
            revision=revision,
            problem=problem,
            boundary_s=self._boundary_s(self._clock_s()),
        )

    # -- what it decides by --

    def put_facts(self, facts: Facts) -> str:
        """Decide by these facts from now on; return the revision that is wanted then, empty without policies."""
        with self._lock:
            self._put(self._sources, facts)
            return self._wanted

    def put_sources(self, sources: PolicySources) -> str:
        """Put policies and regulation in force; return the revision that is wanted then, empty without facts.

        Raises:
            InvalidError: They cannot be used; nothing was changed.
        """
        self._try(sources, self._facts or Facts(data_centers={}, enterprises={}))
        with self._lock:
            self._put(sources, self._facts)
            return self._wanted

    def _put(self, sources: PolicySources | None, facts: Facts | None) -> None:
        if sources is not None and facts is not None:
            revision, bundle = build_bundle(sources, facts, self._signer)
            if revision != self._wanted:
                try:
                    self._engine.load(bundle, self._signer.public)
                except DrCloudError as error:
                    raise UnavailableError(f"the engine did not take the policies: {error}", error.remedy) from None
                self._wanted, self._bundle, self._put_at = revision, bundle, time.monotonic()
        self._sources, self._facts = sources, facts
        self._cache.clear()
        self._boundaries = boundaries_s(sources.regulation.mechanisms) if sources is not None else []

    def _boundary_s(self, now: float) -> int | None:
        """Return when the next mechanism begins or ends."""
        boundaries = self._boundaries
        place = bisect.bisect_right(boundaries, int(now))
        return boundaries[place] if place < len(boundaries) else None

    def _try(self, sources: PolicySources, facts: Facts) -> bytes:
        """Return a bundle of these, tried if its modules are new here. Raises `InvalidError` if it cannot be used."""
        _, bundle = build_bundle(check_modules(sources), facts, self._signer)
        if sources.modules not in self._good:
            try_bundle(bundle, self._signer.public, int(self._clock_s()))
            self._good.append(sources.modules)
        return bundle

    def what_if(self, sources: PolicySources, questions: Sequence[Question]) -> list[Answer]:
        """Answer by other policies, with the facts as they are; nothing is changed.

        Raises:
            InvalidError: The policies cannot be used.
            UnavailableError: There are no facts yet.
        """
        facts = self._facts
        if facts is None:
            raise UnavailableError("the rights manager has no facts yet", "Try again in a moment.")
        engine = EmbeddedEngine()
        engine.load(self._try(sources, facts), self._signer.public)
        try:
            now_s = int(self._clock_s())
            return engine.answer([question_input(question, now_s) for question in questions])
        finally:
            engine.close()

    def bundle(self) -> tuple[str, bytes]:
        """Return (revision, the newest signed bundle). Raises `UnavailableError` if there is none yet."""
        with self._lock:
            if not self._wanted:
                raise UnavailableError("the rights manager has no policies or no facts yet", "Try again in a moment.")
            return self._wanted, self._bundle
