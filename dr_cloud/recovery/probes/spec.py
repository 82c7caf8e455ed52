"""How probes are written down: in short texts, in YAML and JSON.

A probe is named in a short text, or in YAML or JSON with the same fields:

    fsck
    fsck:disk=db/*,timeout=600
    sqlite:name=orders,disk=db/root,path=/var/app.db,query=select count(*) from orders,expect=5
    command:/usr/local/bin/check --deep

A comma parts two fields only where a name and `=` follow, so that a value may hold commas. After `command:` the whole
rest is the command line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from dr_cloud.model.errors import InvalidError
from dr_cloud.model.probe import ProbeSpec

_FIELD_BREAK: Final = re.compile(r",(?=[a-z][a-z0-9_]*=)")
_COMMON: Final = {"name": "name", "disk": "disk", "timeout": "timeout_seconds", "output": "output_bytes_max"}
"""Fields of every probe, as they are called in a short text."""


def parse_spec(text: str) -> ProbeSpec:
    """Return the probe that a short text names.

    Raises:
        InvalidError: It names none; the message says why.
    """
    kind, _, rest = text.strip().partition(":")
    if kind == "command":
        return _checked({"kind": kind, "parameters": {"argv": _words(rest)}}, text)
    fields: dict[str, Any] = {"kind": kind, "parameters": {}}
    for field in _FIELD_BREAK.split(rest) if rest else []:
        key, equals, value = field.partition("=")
        if not equals:
            raise InvalidError(f"{field!r} in {text!r} is not name=value", "Write kind:name=value,name=value.")
        if key in _COMMON:
            fields[_COMMON[key]] = value
        else:
            fields["parameters"][key] = value
    return _checked(fields, text)


def read_specs(path: Path) -> list[ProbeSpec]:
    """Return the probes that a YAML or JSON file lists, each a short text or a mapping of `ProbeSpec`'s fields.

    Raises:
        InvalidError: The file is missing, or not such a list.
    """
    try:
        listed = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidError(f"{path} cannot be read: {error}", "Name a YAML or JSON file.") from None
    if not isinstance(listed, list):
        raise InvalidError(f"{path} is not a list of probes", "Write one probe per line: - fsck")
    return [parse_spec(item) if isinstance(item, str) else _checked(item, str(path)) for item in listed]


def with_names(specs: Sequence[ProbeSpec]) -> list[ProbeSpec]:
    """Return the probes with a name each: its own, or its kind with a number where that is taken.

    Raises:
        InvalidError: Two were given the same name.
    """
    given = [spec.name for spec in specs if spec.name]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise InvalidError(f"two probes are called {twice[0]!r}", "Give each a name of its own.")
    taken = set(given)
    named = []
    for spec in specs:
        name, number = spec.name or spec.kind, 1
        while not spec.name and name in taken:
            number += 1
            name = f"{spec.kind}-{number}"
        taken.add(name)
        named.append(spec.model_copy(update={"name": name}))
    return named


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidError(f"{text!r} is not a command line: {error}", "Close every quotation mark.") from None


def _checked(fields: Any, where: str) -> ProbeSpec:
    try:
        return ProbeSpec.model_validate(fields)
    except ValidationError as error:
        raise InvalidError(f"{where!r} is not a probe: {why(error)}", "See docs/probes.md.") from None


def why(error: ValidationError) -> str:
    """Return a validation's complaints in one line."""
    return "; ".join(
        f"{'.'.join(map(str, complaint['loc'])) or 'it'}: {complaint['msg']}" for complaint in error.errors()
    )
