"""Policies that nobody has run yet are tried in a process of their own.

rego-cpp ends its process on some policies that it cannot compile. The rights manager must outlive them, so new modules
are compiled and asked in a child first; only what the child has survived is loaded.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

from dr_cloud.model.errors import DrCloudError, InvalidError
from dr_cloud.model.rights import Action, Answer, Operator, Place, Question
from dr_cloud.rights.bundle import open_bundle
from dr_cloud.rights.embedded import EmbeddedEngine
from dr_cloud.rights.regulation import question_input

TRIAL_SECONDS: Final = 20.0
_MESSAGE_LENGTH_MAX: Final = 1000
_UNKNOWN: Final = Question(action=Action.OPERATE, enterprise="unknown")


def try_bundle(bundle: bytes, public: str, now_s: int) -> None:
    """Run a bundle's policies once, elsewhere. Raises `InvalidError` that says why they cannot be used."""
    given = json.dumps({"bundle": base64.b64encode(bundle).decode(), "public": public, "now_s": now_s})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dr_cloud.rights.trial"],
            input=given.encode(),
            capture_output=True,
            timeout=TRIAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InvalidError(f"the policies do not decide in {TRIAL_SECONDS:.0f} s", "Make them simpler.") from None
    if done.returncode < 0:
        raise InvalidError(
            "the embedded engine cannot compile the policies and ends on them",
            "Take back the last change to them; policies/README.md says what the engine does not understand.",
        )
    *printed, said = done.stdout.decode(errors="replace").splitlines() or [""]
    try:
        message, remedy = json.loads(said)
    except ValueError:
        raise InvalidError("the policies could not be tried", "Try again.") from None
    if message:
        # The compiler writes where the mistakes are to standard output.
        where = [line for line in printed if line.strip("-~ ")]
        raise InvalidError("; ".join([message, *where])[:_MESSAGE_LENGTH_MAX], remedy)


def probe(bundle: bytes, public: str, now_s: int) -> None:
    """Load a bundle and ask it one question of every kind. Raises `DrCloudError` if that does not give decisions."""
    engine = EmbeddedEngine()
    engine.load(bundle, public)
    questions = [_UNKNOWN, *_questions(open_bundle(bundle, public).data)]
    answers = engine.answer([question_input(question, now_s) for question in questions])
    _check(questions, answers)


def _check(questions: list[Question], answers: list[Answer]) -> None:
    for question, answer in zip(questions, answers, strict=True):
        if not answer.answered:
            raise InvalidError(f"{question.action}: {answer.reasons[0]}", "See policies/README.md for what is asked.")
    if answers[0].allow:
        raise InvalidError("the policies allow what is not known at all", "Allow only what is known.")


def _questions(data: dict[str, Any]) -> Iterator[Question]:
    """Make one question of each action, about the first enterprise, site and data center that there are."""
    enterprises, centers = data["enterprises"], data["data_centers"]
    if not enterprises or not centers:
        return
    enterprise, told = next(iter(enterprises.items()))
    center, facts = next(iter(centers.items()))
    site = next((Place(kind="site", name=name) for name in told["sites"]), None)
    place = Place(kind="data center", name=center, datastore=next(iter(facts["datastores"]), ""))
    for action in Action:
        person = Operator(role="admin", jurisdiction=told["jurisdiction"])
        yield Question(action=action, enterprise=enterprise, source=site, place=place, operator=person)


def _main() -> None:
    given = json.load(sys.stdin)
    problem = ["", ""]
    try:
        probe(base64.b64decode(given["bundle"]), given["public"], given["now_s"])
    except DrCloudError as error:
        problem = [str(error), error.remedy]
    print(json.dumps(problem))


if __name__ == "__main__":
    _main()
