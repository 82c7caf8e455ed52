"""What an engine is: something that holds a bundle and decides by it. There are two, and they must agree.

An engine's word counts only if it is whole: `read_answer` takes a decision apart, and whatever is not exactly a
decision is no answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from dr_cloud.model.rights import Answer

ENTRY: Final = "dr_cloud.rights.decision"
"""The rule that is asked; below `data`."""
BATCH_FILE: Final = "batch.rego"
BATCH: Final = f"""# Many questions at once, answered by their position: for an engine that is asked over a network.
package dr_cloud.batch

answers := {{"revision": data.revision, "decisions": decisions}}

decisions[i] := answer if {{
	some i, question in input.questions
	answer := data.{ENTRY} with input as question
}}
"""
"""Part of every bundle, and of no policy."""


class Engine(Protocol):
    """It may be asked from any thread."""

    @property
    def kind(self) -> Literal["embedded", "opa"]:
        """Which of the two it is."""
        ...

    @property
    def revision(self) -> str:
        """The revision that it decides by; empty while it does not answer."""
        ...

    @property
    def problem(self) -> str:
        """Why it does not answer, or why it did not take the last bundle; empty if all is well."""
        ...

    def load(self, bundle: bytes, public: str) -> None:
        """Decide by this bundle from now on, if the key `public` (PEM) has signed it.

        An engine that fetches bundles by itself does so a moment later. One that is refused changes nothing, and
        `problem` says why.

        Raises:
            DrCloudError: It was refused.
        """
        ...

    def answer(self, inputs: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answer each input (`regulation.question_input`). Never raises: what is not decided is `Answer()`."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...


class _Decision(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    allow: bool
    reasons: list[str]
    until_s: int | None
    jurisdictions: list[str]
    revision: str


def read_answer(decision: object) -> Answer:
    """Return a decision as an answer; `Answer()`, with why, if it is not exactly one."""
    try:
        read = _Decision.model_validate(decision)
    except ValidationError:
        return no_answer("the policies gave no whole decision")
    if not read.revision or not (read.allow or read.reasons):
        return no_answer("the policies gave no whole decision")
    return Answer(**read.model_dump())


def no_answer(why: str) -> Answer:
    """Return the answer that is none."""
    return Answer(reasons=[f"no answer: {why}"])
