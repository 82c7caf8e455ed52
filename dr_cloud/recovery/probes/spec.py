"""What a probe is to do, what it may use, and what it found: records that cross process boundaries.

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
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dr_cloud.model.errors import InvalidError

TIMEOUT_SECONDS: Final = 120.0
OUTPUT_BYTES_MAX: Final = 64 << 10
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_FIELD_BREAK: Final = re.compile(r",(?=[a-z][a-z0-9_]*=)")
_COMMON: Final = {"name": "name", "disk": "disk", "timeout": "timeout_seconds", "output": "output_bytes_max"}
"""Fields of every probe, as they are called in a short text."""


class ProbeSpec(BaseModel):
    """One probe to run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[str, Field(pattern=rf"^{_NAME}$")]
    """Which probe: `fsck`, `sqlite`, … or one that a plug-in brings."""
    name: Annotated[str, Field(pattern=rf"^({_NAME})?$")] = ""
    """By which its result is known; the kind if empty."""
    disk: str = "*"
    """Which of the stack's disks: a name, or a pattern with `*` and `?`."""
    parameters: dict[str, Any] = {}
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = TIMEOUT_SECONDS
    output_bytes_max: Annotated[int, Field(ge=0, le=16 << 20)] = OUTPUT_BYTES_MAX


class ProbeLimits(BaseModel):
    """What one probe may use, beside its own time-out and output limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: Annotated[int, Field(ge=512 << 20)] = 4 << 30
    """Address space of each of its processes."""
    scratch_bytes: Annotated[int, Field(ge=1 << 20)] = 4 << 30
    """The largest file it may write; what it changes on a disk is one file."""
    processes: Annotated[int, Field(ge=1)] = 256
    """Processes and threads at once, of all that handle the disk's data."""
    kernel_mounts: bool = True
    """Whether this machine's kernel may mount file systems of the stack. It is a matter of trust: docs/probes.md."""


class ProbeResult(BaseModel):
    """What one probe found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe: str
    """The probe's name."""
    verdict: Literal["pass", "fail"]
    reason: str
    """One sentence: what was found, or why it failed."""
    output: str = ""
    """What it and its programs printed, beginning and end where it was too much."""
    output_cut: bool = False
    started_ns: int
    seconds: float
    artefacts: list[Path] = []
    """Files that it left for people to look at."""

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"


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
