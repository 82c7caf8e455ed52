"""Policies on a disk, and the data that engines decide by.

A folder of policies holds Rego (`*.rego`; `*_test.rego` are its tests and are left out) and `regulation.yaml`. Engines
get the modules, and one document of data made here from the regulation and the facts: names to be looked up, times as
whole seconds, mechanisms by where they lead, so that a policy needs no search.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dr_cloud.model.errors import DrCloudError, InvalidError
from dr_cloud.model.provider import load_yaml
from dr_cloud.model.rights import Facts, Mechanism, PolicySources, Question, Regulation
from dr_cloud.rights.engine import BATCH_FILE

POLICIES: Final = Path(__file__).resolve().parents[2] / "policies"
"""Those that come with the product."""
REGULATION: Final = "regulation.yaml"
ROOTS: Final = ("data_centers", "dr_cloud", "enterprises", "regulation", "revision")
"""What a bundle owns of an engine's data."""

_FILE_NAME = re.compile(r"[a-z0-9_-]{1,63}\.rego")
_PACKAGE = re.compile(r"^package[ \t]+(?:dr_cloud)((?:\.[a-z_]+)*)[ \t]*$", re.MULTILINE)
_MODULE_LENGTH_MAX: Final = 262_144


def load_policies(folder: Path = POLICIES) -> PolicySources:
    """Read a folder of policies.

    Raises:
        InvalidError: A file is missing or cannot be used; the message names it.
    """
    paths = sorted(path for path in folder.glob("*.rego") if not path.name.endswith("_test.rego"))
    if not paths:
        raise InvalidError(f"{folder} holds no policies", "Name a folder with *.rego files and regulation.yaml.")
    try:
        modules = {path.name: path.read_text() for path in paths}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"{folder} cannot be read: {error}", "Make its files readable text.") from None
    return check_modules(PolicySources(modules=modules, regulation=load_regulation(folder / REGULATION)))


def load_regulation(path: Path) -> Regulation:
    """Read a regulation. Raises `InvalidError` that names the file and the field."""
    try:
        return load_yaml(path, Regulation)
    except DrCloudError as error:
        raise InvalidError(str(error), error.remedy) from None


def check_modules(sources: PolicySources) -> PolicySources:
    """Return what was given, if every module may be part of a bundle. Raises `InvalidError`."""
    for name, text in sources.modules.items():
        if not _FILE_NAME.fullmatch(name) or name.endswith("_test.rego") or name == BATCH_FILE:
            raise InvalidError(f"a policy cannot be called {name!r}", "Use a-z, 0-9, _ and -, then .rego; no tests.")
        if len(text) > _MODULE_LENGTH_MAX:
            raise InvalidError(f"{name} has more than {_MODULE_LENGTH_MAX} letters", "Divide it.")
        if not _PACKAGE.search(text):
            raise InvalidError(f"{name} is in no package dr_cloud.…", "Begin it with: package dr_cloud.<word>")
    return sources


def revision_of(sources: PolicySources, facts: Facts) -> str:
    """Return the name of exactly this content: 16 hexadecimal digits."""
    content = {"sources": sources.model_dump(mode="json", by_alias=True), "facts": facts.model_dump(mode="json")}
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


def canonical_json(value: object) -> bytes:
    """Return the one way to write a value: keys in order, no spaces. Numbers must be whole."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def data_document(regulation: Regulation, facts: Facts, revision: str) -> dict[str, Any]:
    """Return the data that policies look things up in."""
    ways: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for mechanism in regulation.mechanisms:
        ways.setdefault(mechanism.from_, {}).setdefault(mechanism.to, []).append(_mechanism(mechanism))
    return {
        "regulation": {"wholes": regulation.wholes, "mechanisms": ways},
        **facts.model_dump(mode="json"),
        "revision": revision,
    }


def _mechanism(mechanism: Mechanism) -> dict[str, Any]:
    return {
        "kind": mechanism.kind,
        "reference": mechanism.reference,
        "assessment": mechanism.assessment,
        "enterprises": mechanism.enterprises,
        "actions": list(mechanism.actions),
        "valid_from_s": mechanism.valid_from_s,
        "valid_until_s": mechanism.valid_until_s,
        "valid_until": mechanism.valid_until,
    }


def question_input(question: Question, now_s: int) -> dict[str, Any]:
    """Return what an engine is given for a question that is asked now."""
    return {**question.model_dump(mode="json"), "now_s": now_s}


def boundaries_s(mechanisms: Sequence[Mechanism]) -> list[int]:
    """Return when mechanisms begin or end, in seconds since the epoch and in order."""
    return sorted({time_s for mechanism in mechanisms for time_s in (mechanism.valid_from_s, mechanism.valid_until_s)})


def documents(sources: PolicySources, facts: Facts) -> tuple[str, Mapping[str, Any]]:
    """Return (revision, data document) of what is to decide."""
    revision = revision_of(sources, facts)
    return revision, data_document(sources.regulation, facts, revision)
