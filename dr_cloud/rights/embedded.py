"""The engine in process: Rego, compiled once per bundle and run by rego-cpp.

Consistency
    A bundle is compiled and tried before it takes the old one's place. One lock: the interpreter serves one question at
    a time.

What is done about the interpreter's ways
    It neither escapes strings that it is given nor those that it gives back, so a quote in a name would change what an
    answer says. Every string goes in with the letters that could do so percent-encoded, on both sides of every
    comparison, and comes back decoded. A plan that did not compile must never be run: it would end the process.
    Some correct Rego is misunderstood; what is known to be is refused (`dr_cloud.rights.dialect`).
"""

from __future__ import annotations

import json
import string
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal
from urllib.parse import quote, unquote

import regopy  # type: ignore[import-untyped]

from dr_cloud.model.errors import InvalidError
from dr_cloud.model.rights import Answer
from dr_cloud.rights.bundle import Bundle, open_bundle
from dr_cloud.rights.dialect import check_dialect
from dr_cloud.rights.engine import ENTRY, no_answer, read_answer

_SAFE: Final = "".join(letter for letter in string.printable if letter.isprintable() and letter not in '"\\%')


class _Plan:
    """One bundle, compiled."""

    def __init__(self, bundle: Bundle) -> None:
        self.revision = bundle.revision
        self._interpreter = regopy.Interpreter()
        try:
            for name, text in bundle.modules.items():
                check_dialect(name, text)
                self._interpreter.add_module(name, text)
            self._interpreter.add_data_json(json.dumps(_encoded(bundle.data)))
            self._plan = self._interpreter.build(f"data.{ENTRY}")
        except regopy.RegoError:
            raise InvalidError("the policies do not compile", "Correct them; test with: opa check --strict") from None
        if not self._plan.ok():
            raise InvalidError("the policies do not compile", "Correct them; test with: opa check --strict")

    def decide(self, question: Mapping[str, Any]) -> Answer:
        try:
            self._interpreter.set_input(regopy.Input(_encoded(question)))
            output = self._interpreter.query_bundle(self._plan)
            found = [expression for result in output.results for expression in result.expressions]
        except (regopy.RegoError, ValueError, TypeError, LookupError):
            return no_answer("the policies failed on this question")
        return read_answer(_decoded(found[0])) if len(found) == 1 else no_answer("the policies leave it undefined")


class EmbeddedEngine:
    """Rego in process."""

    kind: Final[Literal["embedded"]] = "embedded"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plan: _Plan | None = None
        self.problem = "there are no policies yet"

    @property
    def revision(self) -> str:
        """The revision that it decides by; empty before the first bundle."""
        plan = self._plan
        return plan.revision if plan is not None else ""

    def load(self, bundle: bytes, public: str) -> None:
        """Decide by this bundle from now on. Raises `DrCloudError`, and then nothing has changed but `problem`."""
        try:
            plan = _Plan(open_bundle(bundle, public))
        except Exception as error:
            self.problem = f"a bundle was refused: {error}"
            raise
        with self._lock:
            self._plan = plan
        self.problem = ""

    def answer(self, inputs: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answer each input. Never raises."""
        return [self._decide(question) for question in inputs]

    def _decide(self, question: Mapping[str, Any]) -> Answer:
        with self._lock:  # for one question: many of one caller do not keep the others waiting
            return self._plan.decide(question) if self._plan is not None else no_answer(self.problem)

    def close(self) -> None:
        """Give the interpreter back."""
        with self._lock:
            self._plan = None
        self.problem = "the engine is closed"


def _encoded(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isalnum() and value.isascii() else quote(value, safe=_SAFE)
    if isinstance(value, Mapping):
        return {_encoded(key): _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return unquote(value)
    if isinstance(value, dict):
        return {_decoded(key): _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value
