"""The `RightsManager` actor, and how other processes ask it.

Purpose
    One per provider, whatever the architecture: all control that is divided among enterprises asks the same one. Its
    engine is what the configuration says (`dr_cloud.actors.engine`).

Failing closed
    `RightsDesk` never raises where it is asked to decide. Who is not answered in two seconds has no answer, which is
    not a yes (`Answer.answered`).

Consistency
    The process that puts policies and facts knows which revision is in force: it keeps each yes under that revision for
    a moment (`dr_cloud.rights.cache`), so that what is asked again and again costs no call. Putting forgets them all. A
    no is always asked for, and so is everything in a process that puts nothing: it does not know when that changes.

Crash recovery
    Ray starts it again. It has its keys from the state folder, and decides nothing until the manager, which sees that
    its revision is not the one that is wanted, has put policies and facts again.
"""

from __future__ import annotations

import importlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
import structlog

from dr_cloud.actors.cluster import ANSWER_SECONDS, UNHEARD_SECONDS, Placement, Where, ask, whereabouts
from dr_cloud.actors.logs import start_log
from dr_cloud.actors.settings import RIGHTS, ProviderSettings
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.rights import Answer, Facts, PolicySources, Question, RightsState
from dr_cloud.rights.cache import AnswerCache
from dr_cloud.rights.rights import GrantRequest

DECIDE_SECONDS: Final = 2.0
_MODULE: Final = "dr_cloud.actors.engine"
"""Loaded by name where the actor runs: engines are large, and many processes hold its handle."""

_log = structlog.get_logger(__name__)


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)
class RightsManager:
    """See the module's docstring, and `dr_cloud.rights.rights.Rights` for the methods."""

    def __init__(self, settings: ProviderSettings) -> None:
        """Begin with the provider's keys."""
        settings.node.make_folders()
        self._log_files = start_log(settings, RIGHTS)
        self._service = importlib.import_module(_MODULE).open_service(settings)

    def call(self, method: str, *arguments: Any) -> Any:
        """Carry out a method of `Rights`."""
        return getattr(self._service, method)(*arguments)

    def where(self) -> Where:
        """Return where it runs."""
        return whereabouts()

    def stop(self) -> None:
        """End its engine; the actor is of no use afterwards."""
        self._service.close()


class RightsDesk:
    """`dr_cloud.rights.rights.Rights` for another process. Safe to use from many threads."""

    def __init__(self, placement: Placement, engine: str) -> None:
        """Find the actor when it is first asked.

        Args:
            placement: The provider's Ray.
            engine: Which engine it is to have, for when it cannot say so itself.
        """
        self._placement = placement
        self._engine = engine
        self._actor: Any = None
        self._lock = threading.Lock()
        self._revision = ""
        """In force as far as this process has put it; empty if it has not, or does not know how that went."""
        self._known = AnswerCache()

    def _ask(self, timeout_seconds: float, method: str, *arguments: Any) -> Any:
        try:
            actor = self._actor = self._actor or self._placement.find(RIGHTS)
            return ask(actor.call.remote(method, *arguments), "the rights manager", timeout_seconds)
        except UnavailableError:
            self._actor = None
            raise

    def _answers(self, method: str, asked: Sequence[Any]) -> list[Any] | str:
        """Return an answer for each, or why there is none."""
        try:
            answers = self._ask(DECIDE_SECONDS, method, list(asked))
        except DrCloudError as error:
            return str(error)
        except Exception:
            _log.exception("rights.not_answered", method=method)
            return "the rights manager has failed"
        if not isinstance(answers, list) or len(answers) != len(asked):
            return "the rights manager has not answered every question"
        return answers

    def decide(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question; see `Rights`."""
        now = time.time()
        keys = [question.model_dump_json() for question in questions]
        with self._lock:
            known = {key: yes for key in keys if (yes := self._known.get(key, now, self._revision)) is not None}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        if missing:
            answers = self._answers("decide", list(missing.values()))
            if isinstance(answers, str):
                answers = [Answer(reasons=[answers]) for _ in missing]
            known |= zip(missing, answers, strict=True)
            self._keep({key: known[key] for key in missing}, now)
        return [known[key] for key in keys]

    def _keep(self, answers: Mapping[str, Answer], now: float) -> None:
        with self._lock:
            for key, answer in answers.items():
                if answer.allow:
                    self._known.put(key, now, math.inf if answer.until_s is None else float(answer.until_s), answer)

    def grant(self, requests: Sequence[GrantRequest]) -> list[tuple[Answer, str]]:
        """Answer each, with a grant where the answer is yes; see `Rights`."""
        answers = self._answers("grant", requests)
        return [(Answer(reasons=[answers]), "") for _ in requests] if isinstance(answers, str) else answers

    def state(self) -> RightsState:
        """Return how it stands; see `Rights`."""
        try:
            state: RightsState = self._ask(DECIDE_SECONDS, "state")
        except Exception as error:
            return RightsState.model_validate({"engine": self._engine, "wanted": "", "problem": str(error)})
        return state

    def put_facts(self, facts: Facts) -> str:
        """Decide by these facts from now on; see `Rights`."""
        return self._put(UNHEARD_SECONDS, "put_facts", facts)

    def put_sources(self, sources: PolicySources) -> str:
        """Put policies and regulation in force, which are tried first; see `Rights`."""
        return self._put(ANSWER_SECONDS, "put_sources", sources)

    def _put(self, timeout_seconds: float, method: str, what: Facts | PolicySources) -> str:
        self._in_force("")  # whatever becomes of it, what was known before counts no more
        revision: str = self._ask(timeout_seconds, method, what)
        self._in_force(revision)
        return revision

    def _in_force(self, revision: str) -> None:
        with self._lock:
            self._revision = revision
            self._known.clear()

    def what_if(self, sources: PolicySources, questions: Sequence[Question]) -> list[Answer]:
        """Answer by other policies; see `Rights`."""
        answers: list[Answer] = self._ask(ANSWER_SECONDS, "what_if", sources, list(questions))
        return answers

    def bundle(self) -> tuple[str, bytes]:
        """Return the newest signed bundle; see `Rights`."""
        bundle: tuple[str, bytes] = self._ask(UNHEARD_SECONDS, "bundle")
        return bundle
