"""What the manager, connectors and stacks ask of the rights manager, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from dr_cloud.model.ids import Scope
from dr_cloud.model.rights import Answer, Facts, PolicySources, Question, RightsState


class GrantRequest(BaseModel):
    """A grant is wanted: the right of one data center to hold one scope in one store, signed and for a while."""

    model_config = ConfigDict(frozen=True)

    question: Question
    """With the action KEEP; `question.place` is the data center."""
    scope: Scope
    store: str
    """The store's URL."""


class Rights(Protocol):
    """The rights manager. Every method may be called from any thread and answers within a few seconds."""

    def decide(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question. Never raises: where nothing answers in time, the answer is `Answer()` with a reason."""
        ...

    def grant(self, requests: Sequence[GrantRequest]) -> list[tuple[Answer, str]]:
        """Answer each, with a grant (`dr_cloud.rights.grant`) where the answer is yes; an empty string where not."""
        ...

    def state(self) -> RightsState:
        """Return how it stands. Never raises."""
        ...

    def put_facts(self, facts: Facts) -> str:
        """Decide by these facts from now on; return the revision that is wanted then. Raises `UnavailableError`."""
        ...

    def put_sources(self, sources: PolicySources) -> str:
        """Put policies and regulation in force; return the revision that is wanted then.

        Raises:
            InvalidError: They do not compile, or lack what every question needs; nothing was changed.
            UnavailableError: The rights manager is away.
        """
        ...

    def what_if(self, sources: PolicySources, questions: Sequence[Question]) -> list[Answer]:
        """Answer by other policies, with the facts as they are; nothing is changed. Raises as `put_sources` does."""
        ...

    def bundle(self) -> tuple[str, bytes]:
        """Return (revision, the newest signed bundle as a tar.gz). Raises `UnavailableError`."""
        ...
