"""Runs probes on the disks of one stack, each in a sandbox of its own, one after another.

Layout: `<work_dir>/<probe's name>/…` are the artefacts that probes leave; `<work_dir>/.probe-…` is one probe's folder
while it runs.

Isolation: `inside.py` tells what walls there are. No probe changes a disk: each works on a copy-on-write layer of its
own, which is gone with it. So the order of probes does not matter, and a verdict of one time stays true.

What may happen: a time-out, a stop, a crash, a flood of output are each a failed test with the reason, and the other
probes run. A runner that is killed takes its probe with it; the folder that it leaves is removed by the next run in the
same `work_dir`.

Retries: none. Two runs may share a `work_dir` if their probes have different names.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from dr_cloud.model.errors import InvalidError
from dr_cloud.model.probe import Artefact, ProbeLimits, ProbeResult, ProbeSpec
from dr_cloud.nbd.uri import parse_uri
from dr_cloud.recovery.probes.folders import make_folder, sweep
from dr_cloud.recovery.probes.inside import Verdict
from dr_cloud.recovery.probes.output import Output
from dr_cloud.recovery.probes.probe import make_probe
from dr_cloud.recovery.probes.spec import with_names
from dr_cloud.recovery.probes.watch import watch

_PREFIX: Final = ".probe-"
_ARTEFACTS_MAX: Final = 100


class ChosenProbe(NamedTuple):
    """A probe that is known here, with a name of its own, and the disks that it names."""

    spec: ProbeSpec
    disks: dict[str, str]
    """Name → NBD address."""


def choose_probes(specs: Sequence[ProbeSpec], disks: Mapping[str, str]) -> list[ChosenProbe]:
    """Return what is to be run on which disks, in the order given; nothing has run yet.

    Args:
        specs: What to run.
        disks: The stack's disks: name → NBD address.

    Raises:
        InvalidError: A probe is not known, its parameters are wrong, it names no disk, or this process is not root.
    """
    for name, uri in disks.items():
        try:
            parse_uri(uri)
        except ValueError as error:
            raise InvalidError(f"disk {name}: {error}") from None
    chosen = []
    for spec in with_names(specs):
        make_probe(spec)
        matching = {name: uri for name, uri in sorted(disks.items()) if fnmatch.fnmatchcase(name, spec.disk)}
        if not matching:
            raise InvalidError(
                f"probe {spec.name!r} names disk {spec.disk!r}, which is not here",
                f"There are: {', '.join(sorted(disks)) or 'none'}.",
            )
        chosen.append(ChosenProbe(spec, matching))
    if os.geteuid() != 0:
        raise InvalidError("probes need root, for namespaces and mounts", "Run this as root.")
    return chosen


def run_probes(
    specs: Sequence[ProbeSpec],
    disks: Mapping[str, str],
    work_dir: Path,
    limits: ProbeLimits | None = None,
    stop: threading.Event | None = None,
) -> list[ProbeResult]:
    """Run the probes; return a result for each, in their order. Blocks; call it in a thread of its own.

    Args:
        specs: What to run.
        disks: The stack's disks: name → NBD address.
        work_dir: An existing folder for artefacts and scratch space.
        limits: What each probe may use.
        stop: Once it is set, the probe that runs is ended, and those left fail with that reason.

    Raises:
        InvalidError: As `choose_probes`; nothing has run.
    """
    chosen = choose_probes(specs, disks)
    sweep(work_dir, _PREFIX)
    runner = ProbeRunner(work_dir, limits or ProbeLimits(), stop or threading.Event())
    return [runner.run(probe) for probe in chosen]


class ProbeRunner:
    """Runs probes one at a time, for who wants each result as soon as it is there."""

    def __init__(self, work_dir: Path, limits: ProbeLimits, stop: threading.Event) -> None:
        """Take what `run_probes` describes."""
        self._work_dir = work_dir
        self._limits = limits
        self._stop = stop

    def run(self, probe: ChosenProbe) -> ProbeResult:
        """Run one probe; when this returns, nothing of it is left but its artefacts."""
        spec = probe.spec
        started_ns, start = time.time_ns(), time.monotonic()
        output = Output(spec.output_bytes_max)
        artefacts: list[Artefact] = []
        if self._stop.is_set():
            verdict = Verdict(passed=False, reason="stopped before it began", conclusive=False)
        else:
            folder, lock = make_folder(self._work_dir, _PREFIX)
            try:
                job = {"spec": spec, "disks": probe.disks, "limits": self._limits, "folder": folder}
                verdict = watch(job, output, self._stop)
                artefacts = _keep(folder / "artefacts", self._work_dir / spec.name)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
        return ProbeResult(
            probe=spec.name,
            verdict="pass" if verdict.passed else "fail",
            reason=verdict.reason,
            conclusive=verdict.conclusive,
            output=output.text(),
            output_cut=output.cut,
            started_ns=started_ns,
            seconds=time.monotonic() - start,
            artefacts=artefacts,
        )


def _keep(made: Path, place: Path) -> list[Artefact]:
    """Move artefacts where people find them; links and other oddities that a program left are not taken."""
    kept = []
    for path in sorted(made.iterdir())[:_ARTEFACTS_MAX] if made.is_dir() else []:
        info = path.lstat()
        if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and path.name.isprintable():
            place.mkdir(exist_ok=True)
            target = place / path.name
            os.replace(path, target)
            os.chown(target, os.geteuid(), os.getegid())
            target.chmod(0o600)
            with target.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            kept.append(Artefact(path=f"{place.name}/{path.name}", size_bytes=info.st_size, sha256=digest))
    return kept
