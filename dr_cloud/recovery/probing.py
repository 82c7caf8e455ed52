"""The probes of one recovery test, run beside its stack: in a thread, one after another, each result as it comes.

Files: `<place>/test-…/` while they run, with what they work with and leave; `<place>/slot-<number>`, locked by a probe
that runs. Of one node's tests at most so many probes run at once as there are slots; the others wait, and a probe's
time-out counts from when it begins.

Artefacts are handed over as soon as their probe has ended and then removed here, at most 4 MiB each and 16 MiB a test.
What was too much, or could not be kept, is said at the end of the probe's output.

Cancellation: `stop` ends the probe that runs, its processes and mounts with it; what it left is not kept.

Crash recovery: the kernel ends a probe with this process. The folder is removed by the next `sweep` of the same place.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.probe import Artefact, ProbeLimits, ProbeResult, ProbeSpec
from dr_cloud.recovery.artefacts import ARTEFACT_BYTES_MAX, TEST_BYTES_MAX
from dr_cloud.recovery.probes.folders import make_folder, slot, sweep
from dr_cloud.recovery.probes.runner import ChosenProbe, ProbeRunner, choose_probes

log = structlog.get_logger(__name__)

_PREFIX: Final = "test-"


def sweep_probing(place: Path) -> None:
    """Remove what tests whose process was killed have left in `place`, a folder that is made if it is not there."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    sweep(place, _PREFIX)


class Probing:
    """See the module's docstring. Safe to use from many threads."""

    def __init__(
        self,
        specs: Sequence[ProbeSpec],
        disks: Mapping[str, str],
        place: Path,
        slots: int,
        keep: Callable[[str, bytes], None],
        limits: ProbeLimits,
    ) -> None:
        """Check the probes and begin to run them.

        Args:
            specs: What to run.
            disks: The stack's disks: name → NBD address.
            place: The node's folder for this; what killed tests left there is removed.
            slots: How many probes may run at once on the node.
            keep: Takes an artefact: its path and its bytes. Raises `DrCloudError`.
            limits: What each probe may use.

        Raises:
            InvalidError: A probe is not known, names no disk, or this process is not root; nothing runs.
            UnavailableError: `place` cannot be used.
        """
        self._chosen = choose_probes(specs, disks)
        self._place = place
        self._slots = slots
        self._keep = keep
        self._kept_bytes = 0
        self._stop = threading.Event()
        self._results: list[ProbeResult] = []
        try:
            sweep_probing(place)
            self._folder, self._lock = make_folder(place, _PREFIX)
            # The folder itself is locked by its lock; the runner's has locks of its own.
            self._work_dir = self._folder / "work"
            self._work_dir.mkdir(mode=0o700)
        except OSError as error:
            raise UnavailableError(
                f"the node's folder for probes cannot be used: {error.strerror}", "Make room there; try again."
            ) from error
        self._runner = ProbeRunner(self._work_dir, limits, self._stop)
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)
        self._thread.start()

    @property
    def results(self) -> list[ProbeResult]:
        """Of the probes that have ended, in their order."""
        return list(self._results)

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return len(self._results) == len(self._chosen)

    def stop(self, wait_seconds: float) -> bool:
        """End the probe that runs and let no other begin; return whether nothing of them is left after a while."""
        self._stop.set()
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for probe in self._chosen:
                self._results.append(self._result(probe))
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)

    def _result(self, probe: ChosenProbe) -> ProbeResult:
        started_ns = time.time_ns()
        try:
            with slot(self._place, self._slots, self._stop):
                result = self._runner.run(probe)
            return self._with_artefacts(result)
        except Exception as error:
            # One test fails, with the reason; its stack and the node go on.
            log.exception("probe.not_run", probe=probe.spec.name)
            return ProbeResult(
                probe=probe.spec.name,
                verdict="fail",
                reason=f"the node could not run it: {_why(error)}",
                conclusive=False,
                started_ns=started_ns,
                seconds=(time.time_ns() - started_ns) / 1e9,
            )

    def _with_artefacts(self, result: ProbeResult) -> ProbeResult:
        """Hand over what a probe left; return its result with what was kept."""
        kept: list[Artefact] = []
        notes = []
        for artefact in result.artefacts:
            if self._stop.is_set():
                break
            room = min(ARTEFACT_BYTES_MAX, TEST_BYTES_MAX - self._kept_bytes)
            if artefact.size_bytes > room:
                notes.append(f"{artefact.path} is left out: of its {artefact.size_bytes} bytes {room} may be kept")
                continue
            try:
                self._keep(artefact.path, (self._work_dir / artefact.path).read_bytes())
            except (DrCloudError, OSError) as error:
                log.warning("probe.artefact_not_kept", probe=result.probe, error=str(error))
                notes.append(f"{artefact.path} is left out: {_why(error)}")
            else:
                self._kept_bytes += artefact.size_bytes
                kept.append(artefact)
        shutil.rmtree(self._work_dir / result.probe, ignore_errors=True)
        output = "\n".join([*([result.output.rstrip("\n")] if result.output else []), *notes])
        return result.model_copy(update={"artefacts": kept, "output": output if notes else result.output})


def _why(error: Exception) -> str:
    # Where files lie on the node is nobody's matter but the provider's.
    return error.strerror or "a file cannot be used" if isinstance(error, OSError) else str(error)
