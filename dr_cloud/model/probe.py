"""What a probe is to do, what it may use, and what it found: records that cross process boundaries."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

TIMEOUT_SECONDS: Final = 120.0
OUTPUT_BYTES_MAX: Final = 64 << 10
PROBE_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class ProbeSpec(BaseModel):
    """One probe to run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[str, Field(pattern=rf"^{PROBE_NAME}$")]
    """Which probe: `fsck`, `sqlite`, … or one that a plug-in brings."""
    name: Annotated[str, Field(pattern=rf"^({PROBE_NAME})?$")] = ""
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


class Artefact(BaseModel):
    """A file that a probe left: a screenshot, a console."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """`<probe's name>/<file>`, below where artefacts are kept."""
    size_bytes: int
    sha256: str
    """Of its content, in hexadecimal."""


class ProbeResult(BaseModel):
    """What one probe found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe: str
    """The probe's name."""
    verdict: Literal["pass", "fail"]
    reason: str
    """One sentence: what was found, or why it failed."""
    conclusive: bool = True
    """Whether the verdict is about the disks. Not where it ran out of time, was stopped or could not run."""
    output: str = ""
    """What it and its programs printed, beginning and end where it was too much."""
    output_cut: bool = False
    started_ns: int
    seconds: float
    artefacts: list[Artefact] = []
    """Files that it left for people to look at."""

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"
