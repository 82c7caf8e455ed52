"""What a probe is, and where probes come from.

A probe is a class whose keyword parameters are the `parameters` of its `ProbeSpec` (a pydantic model is the easy way)
and which has `run(bench)`. It returns one sentence that says what it found, or raises `FailedError` with the reason.
Anything else it raises is a crash, and a failed test too.

Others add probes by an entry point of the group `dr_cloud.probes`: `kind = "package.module:Class"`. Such code is
trusted as this package is: it runs as root of its own namespaces. The disks' data is not trusted: whatever looks
deeply into it belongs into `bench.apart`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any, Final, Protocol, cast

from pydantic import ValidationError

from dr_cloud.model.errors import InvalidError
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.spec import why

GROUP: Final = "dr_cloud.probes"
_OWN: Final = {
    "boot": "BootProbe",
    "command": "CommandProbe",
    "entropy": "EntropyProbe",
    "files": "FilesProbe",
    "fsck": "FsckProbe",
    "mount": "MountProbe",
    "postgres": "PostgresProbe",
    "sqlite": "SqliteProbe",
}


class Probe(Protocol):
    """One probe with its parameters."""

    def run(self, bench: Bench) -> str:
        """Look at the disks of `bench`; return what was found. Raises `FailedError` with the reason if it is bad."""
        ...


def kinds() -> dict[str, str]:
    """Return every kind of probe that is here, and where its class is. The product's own names cannot be taken."""
    others = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    return others | {kind: f"dr_cloud.recovery.probes.{kind}:{name}" for kind, name in _OWN.items()}


def load_kind(kind: str) -> type[Probe]:
    """Return the class of a kind of probe.

    Raises:
        InvalidError: There is no such kind, or its plug-in cannot be loaded.
    """
    known = kinds()
    if kind not in known:
        raise InvalidError(f"there is no probe {kind!r}", f"There are: {', '.join(sorted(known))}.")
    module, _, name = known[kind].partition(":")
    try:
        return cast(type[Probe], getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        raise InvalidError(f"probe {kind!r} cannot be loaded: {error}", "Install its plug-in anew.") from error


def make_probe(spec: ProbeSpec) -> Probe:
    """Return the probe that a spec describes.

    Raises:
        InvalidError: There is no such kind, or its parameters are wrong.
    """
    kind = cast(Any, load_kind(spec.kind))
    try:
        return cast(Probe, kind(**spec.parameters))
    except ValidationError as error:
        raise InvalidError(f"probe {spec.name or spec.kind!r}: {why(error)}", "See docs/probes.md.") from None
    except TypeError as error:
        raise InvalidError(f"probe {spec.name or spec.kind!r}: {error}", "See the plug-in's own page.") from None
