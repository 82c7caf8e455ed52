"""For tests of the manager: the world outside of it, by heart."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writes import images_at, writes_at
from dr_cloud.manager.fabric import ProbeProgress, ServedStack
from dr_cloud.model.cloud import CheckpointFilter, LogRequest, Route
from dr_cloud.model.errors import DrCloudError, NotFoundError, TimeOutOfRangeError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, PlacedImage, PlacedWrite, Write
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.recovery import TestCredential
from dr_cloud.model.units import SECOND_NS
from dr_cloud.recovery.servers import RecoveredProgress
from dr_cloud.stack.stack import StackStatistics

START_NS = 1_800_000_000 * SECOND_NS
GIB = 1 << 30


class QuietFabric:
    """The world outside, by heart."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.journals: dict[Scope, list[Checkpoint]] = {}
        self.written: dict[Scope, tuple[Catalogue, JournalReader]] = {}
        """Journals that hold real writes, where a test looks for their positions."""
        self.served: dict[str, ServedStack] = {}
        """Open stacks."""
        self._owners: dict[str, str] = {}
        self.paused: dict[str, str] = {}
        """Open stacks that answer nothing: why."""
        self.broken: dict[str, DrCloudError] = {}
        """By method: what it raises."""
        self.free: dict[tuple[str, str], int] = {}
        self.remote: set[str] = set()
        """Open stacks that are served remotely."""
        self.answers: dict[int, Sequence[ProbeResult]] = {}
        """By the time that is served: what its probes say, in their order, for as many as may have ended."""
        self.ended_max = 1000
        """How many probes of a stack may have ended."""
        self.probing: dict[str, list[ProbeSpec]] = {}
        """By open stack."""
        self.artefacts: dict[tuple[str, str], bytes] = {}
        self.counted: dict[str, dict[str, int]] = {}
        """Counters of an open stack that are not the usual ones."""
        self.recoverable: dict[str, int] = {}
        """By failover: the time that the disks on the node began as."""
        self.recovering: dict[str, RecoveredProgress] = {}
        """Of servers that are served."""
        self._lock = threading.Lock()
        self._requests = itertools.count(1)

    def _call(self, name: str, *arguments: str) -> None:
        with self._lock:
            self.calls.append((name, *arguments))
        if name in self.broken:
            raise self.broken[name]

    def asked(self, name: str) -> list[tuple[str, ...]]:
        with self._lock:
            return [call[1:] for call in self.calls if call[0] == name]

    def start_connector(self, enterprise: str) -> str:
        self._call("start_connector", enterprise)
        return f"wss://127.0.0.1:85{len(enterprise):02d}/link"

    def stop_connector(self, enterprise: str) -> None:
        self._call("stop_connector", enterprise)

    def disconnect(self, enterprise: str, site: str) -> None:
        self._call("disconnect", enterprise, site)

    def orders_changed(self, enterprise: str, site: str) -> None:
        self._call("orders_changed", enterprise, site)

    def host_orders_changed(self, data_center: str, host: str) -> None:
        self._call("host_orders_changed", data_center, host)

    def deploy_vdsa(self, data_center: str, host: str) -> None:
        self._call("deploy_vdsa", data_center, host)

    def undeploy_vdsa(self, data_center: str, host: str) -> None:
        self._call("undeploy_vdsa", data_center, host)

    def checkpoints(
        self,
        route: Route,
        which: CheckpointFilter = CheckpointFilter(),
        before: int | None = None,
        limit: int | None = None,
    ) -> Sequence[Checkpoint]:
        self._call("checkpoints", *route.scope)
        return which.newest(self.journals.get(route.scope, []), before, limit)

    def writes(self, route: Route, since_ns: int, until_ns: int, limit: int) -> Sequence[Write]:
        """One write for each checkpoint, a nanosecond before it."""
        self._call("writes", *route.scope)
        times = [checkpoint.time_ns - 1 for checkpoint in self.journals.get(route.scope, [])]
        return [Write(time_ns=t, blocks=1, exact=True) for t in times if since_ns <= t <= until_ns][:limit]

    def images_at(self, route: Route, times_ns: Sequence[int]) -> Sequence[PlacedImage]:
        self._call("images_at", *route.scope)
        return images_at(*self._journal(route.scope), times_ns)

    def writes_at(self, route: Route, positions: Sequence[int]) -> Sequence[PlacedWrite]:
        self._call("writes_at", *route.scope, *map(str, positions))
        return writes_at(*self._journal(route.scope), positions)

    def _journal(self, scope: Scope) -> tuple[Catalogue, JournalReader]:
        if scope not in self.written:
            raise NotFoundError(f"nothing was written to {scope.prefix}")
        return self.written[scope]

    def insert_checkpoint(self, route: Route, tag: str, description: str) -> str:
        self._call("insert_checkpoint", *route.scope, tag, description)
        return f"request-{next(self._requests)}"

    def open_stacks(
        self, route: Route, times_ns: Mapping[str, int], quota_bytes: int | None, remote: bool = False
    ) -> Mapping[str, ServedStack | DrCloudError]:
        self._call("open_stacks", *route.scope, *sorted(times_ns))
        opened: dict[str, ServedStack | DrCloudError] = {}
        times = [c.time_ns for c in self.journals.get(route.scope, []) if c.testable]
        for id_, at_ns in times_ns.items():
            if not times or not times[0] <= at_ns <= times[-1]:
                opened[id_] = TimeOutOfRangeError("the journal does not hold that time", "Choose another.")
                continue
            uris = {"sda": [f"nbd+unix:///sda?socket=/run/{id_}.sock"]}
            self.served[id_] = ServedStack(at_ns=at_ns, note="", uris=uris, open_seconds=0.01)
            opened[id_] = self.served[id_]
            self._owners[id_] = route.scope.enterprise
            if remote:
                self.remote.add(id_)
        return opened

    def stacks(self) -> Mapping[str, str]:
        self._call("stacks")
        return {stack: self._owners.get(stack, "") for stack in list(self.served)}

    def stack_statistics(self, stack: str) -> StackStatistics | None:
        self._call("stack_statistics", stack)
        return self._statistics(self.served[stack], stack) if stack in self.served else None

    def close_stack(self, stack: str) -> StackStatistics | None:
        self._call("close_stack", stack)
        served = self.served.pop(stack, None)
        return self._statistics(served, stack) if served is not None else None

    def _statistics(self, served: ServedStack, stack: str) -> StackStatistics:
        known = {"at_ns": served.at_ns, "open_seconds": served.open_seconds, "first_byte_seconds": None}
        known |= {"failures": 0, "writes_refused": 0} | self.counted.get(stack, {})
        return StackStatistics.model_validate({name: known.get(name, 7) for name in StackStatistics.model_fields})

    def credential(self, stack: str) -> TestCredential | None:
        self._call("credential", stack)
        if stack not in self.served or stack not in self.remote:
            return None
        uris = {"sda": [f"nbds://10.0.0.1:10809/sda-{stack}"]}
        return TestCredential(uris=uris, ca="the CA", certificate="the certificate", key="the key")

    def start_probes(self, route: Route, stack: str, probes: Sequence[ProbeSpec]) -> None:
        self._call("start_probes", stack)
        if stack not in self.served:
            raise NotFoundError("there is no such stack")
        self.probing.setdefault(stack, list(probes))

    def probe_progress(self, stack: str) -> ProbeProgress | None:
        """What `answers` says for the time that is served; without an answer every probe passes."""
        self._call("probe_progress", stack)
        if stack not in self.served:
            return None
        specs = self.probing.get(stack)
        if specs is None:
            return ProbeProgress(started=False, done=False, results=[])
        results = self.answers.get(self.served[stack].at_ns)
        if results is None:
            results = [probed(spec.name) for spec in specs]
        results = list(results)[: self.ended_max]
        return ProbeProgress(started=True, done=len(results) == len(specs), results=results)

    def artefact(self, route: Route, stack: str, path: str) -> bytes:
        self._call("artefact", stack, path)
        if (stack, path) not in self.artefacts:
            raise NotFoundError(f"there is no {path}")
        return self.artefacts[stack, path]

    def forget_artefacts(self, route: Route, stacks: Sequence[str]) -> None:
        self._call("forget_artefacts", *stacks)
        for key in [key for key in self.artefacts if key[0] in stacks]:
            del self.artefacts[key]

    def recover(self, route: Route, failover: str, at_ns: int | None) -> ServedStack:
        """Servers are as good as stacks; `recoverable` tells whose disks there are."""
        self._call("recover", *route.scope, failover, str(at_ns))
        if at_ns is not None:
            self.recoverable.setdefault(failover, at_ns)
        if failover not in self.recoverable:
            raise UnavailableError("the recovered disks are not on this node")
        uris = {"web/sda": [f"nbd+unix:///sda?socket=/run/{failover}.sock"]}
        self.recovering.setdefault(
            failover, RecoveredProgress(promoting=False, promoted=False, size_bytes=GIB, missing_bytes=GIB, problem="")
        )
        return ServedStack(at_ns=self.recoverable[failover], note="", uris=uris, open_seconds=0.01)

    def recovered(self, failover: str) -> RecoveredProgress | None:
        self._call("recovered", failover)
        return self.recovering.get(failover)

    def promote(self, failover: str) -> None:
        self._call("promote", failover)
        if failover not in self.recovering:
            raise UnavailableError("the recovered servers are not served now")
        self.recovering[failover] = self.recovering[failover].model_copy(
            update={"promoting": False, "promoted": True, "missing_bytes": 0}
        )

    def discard_recovered(self, route: Route, failover: str) -> None:
        self._call("discard_recovered", failover)
        self.recovering.pop(failover, None)
        self.recoverable.pop(failover, None)

    def pause_stack(self, stack: str, reason: str) -> None:
        self._call("pause_stack", stack, reason)
        if stack in self.served:
            self.paused[stack] = reason

    def resume_stack(self, stack: str) -> None:
        self._call("resume_stack", stack)
        self.paused.pop(stack, None)

    def free_bytes(self, data_center: str, datastore: str) -> int | None:
        self._call("free_bytes", data_center, datastore)
        return self.free.get((data_center, datastore))

    def collect_logs(self, enterprise: str, site: str, request: LogRequest) -> bytes:
        self._call("collect_logs", enterprise, site)
        return f"logs of {enterprise}/{site}".encode()


def probed(name: str, reason: str = "", **more: Any) -> ProbeResult:
    """Return the result of a probe that passed, or with a reason failed."""
    told = {"verdict": "fail" if reason else "pass", "reason": reason or "all is well", "started_ns": START_NS}
    return ProbeResult.model_validate({"probe": name, "seconds": 0.1} | told | more)
