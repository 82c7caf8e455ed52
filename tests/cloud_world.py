"""A real manager over a fabric that only remembers: for tests of the manager, the API, the client and the command line.

`QuietFabric` tells what connectors, VDSAs and stacks would, and notes what it was asked. Nothing runs behind it:
checkpoints are those that a test puts there, stacks are names. `World` is a `Cloud` over it, with a clock that stands
unless it is moved, and sites that follow their orders when a test says so.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writes import images_at, writes_at
from dr_cloud.manager.cloud import SYSTEM, Cloud
from dr_cloud.manager.db import open_engine
from dr_cloud.manager.fabric import ProbeProgress, ServedStack
from dr_cloud.model.cloud import CheckpointFilter, LogRequest, Route, TokenRequest
from dr_cloud.model.errors import DrCloudError, NotFoundError, TimeOutOfRangeError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, Disk, PlacedImage, PlacedWrite, Write
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.provider import EnterpriseConfig, ProviderConfig, RightsConfig, SiteConfig
from dr_cloud.model.recovery import TestCredential
from dr_cloud.model.replication import HostReport, SeenServer, SiteOrders, SiteReport, SourceReport, TargetReport
from dr_cloud.model.rights import Answer, Regulation
from dr_cloud.model.task import CompletionCode, Task
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import ProtectedServer, TargetConfig, VpgSettings
from dr_cloud.recovery.report_key import ReportSigner
from dr_cloud.rights.embedded import EmbeddedEngine
from dr_cloud.rights.engine import no_answer
from dr_cloud.rights.regulation import POLICIES, REGULATION, load_policies, load_regulation
from dr_cloud.rights.service import RightsService
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.keyring import Keyring
from dr_cloud.stack.stack import StackStatistics
from dr_cloud.store.objects import open_memory
from dr_cloud.store.store import Store

START_NS = 1_800_000_000 * SECOND_NS
GIB = 1 << 30

CONFIG = ProviderConfig.model_validate(
    {
        "name": "provider",
        "operators": "USA",
        "data_centers": [
            {
                "name": "us-east",
                "jurisdiction": "USA",
                "location": "Ashburn",
                "datastores": [{"name": f"ds-{i}", "store": f"file:///stores/us-east/ds-{i}"} for i in (1, 2, 3)],
                "pools": [{"name": "gold", "datastores": ["ds-1", "ds-2"]}],
                "hosts": [
                    {"name": "h1", "datastores": ["ds-1", "ds-2", "ds-3"]},
                    {"name": "h2", "datastores": ["ds-1", "ds-2"]},
                    {"name": "h3", "datastores": ["ds-3"]},
                ],
                "clusters": [{"name": "compute", "hosts": ["h1", "h2"]}],
            },
            {
                "name": "uk-south",
                "jurisdiction": "UK",
                "datastores": [{"name": "ds-1", "store": "file:///stores/uk-south/ds-1"}],
                "hosts": [{"name": "h1", "datastores": ["ds-1"]}],
            },
        ],
    }
)
ENTERPRISES = ("acme", "brit")


LAW = load_regulation(POLICIES / REGULATION)
"""No border is open."""
DATES = {"valid_from": "2026-01-01T00:00:00Z", "valid_until": "2099-01-01T00:00:00Z"}
BRIDGE = {"kind": "adequacy", "from": "USA", "to": "UK", "reference": "UK-US bridge", **DATES}
BACK = BRIDGE | {"from": "UK", "to": "USA"}
OPEN_LAW = Regulation.model_validate(LAW.model_dump(by_alias=True) | {"mechanisms": [BRIDGE, BACK]})
"""Between the USA and the UK data may go, as it is at first in these worlds."""


def write_policies(folder: Path, regulation: Regulation) -> Path:
    """Write the product's policies with another regulation; return the folder."""
    folder.mkdir(parents=True)
    for name, text in load_policies().modules.items():
        (folder / name).write_text(text)
    (folder / REGULATION).write_text(regulation.model_dump_json(by_alias=True))
    return folder


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


class MuteEngine(EmbeddedEngine):
    """The embedded engine, which can be made to give no answer."""

    mute = False

    @property
    def revision(self) -> str:
        return "" if self.mute else super().revision

    @property
    def problem(self) -> str:  # type: ignore[override]
        return "the engine does not answer" if self.mute else ""

    @problem.setter
    def problem(self, told: str) -> None:
        pass

    def answer(self, inputs: Sequence[Mapping[str, Any]]) -> list[Answer]:
        return [no_answer("the engine does not answer") for _ in inputs] if self.mute else super().answer(inputs)


class Clock:
    """A clock that a test moves."""

    def __init__(self, now_ns: int = START_NS) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns

    def pass_seconds(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND_NS)


class World:
    """A manager, its fabric and its clock; two enterprises, each with one site of one host and two servers."""

    def __init__(
        self,
        folder: Path,
        url: str = "",
        store: Store | None = None,
        *,
        start: bool = True,
        now_ns: int = START_NS,
        config: ProviderConfig = CONFIG,
    ) -> None:
        self.folder = folder
        self.url = url or f"sqlite:///{folder / 'manager.db'}"
        self.fabric = QuietFabric()
        self.clock = Clock(now_ns)
        self._told = 0
        self._busy: set[tuple[str, str]] = set()
        self.store = store if store is not None else open_memory()
        self.keyring = Keyring(folder / "keyring.json")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.authority = Authority.open(folder, "provider", self.clock)
        policies = folder / "policies"
        self.policies = policies if policies.exists() else write_policies(policies, OPEN_LAW)
        self.config = config.model_copy(update={"rights": RightsConfig(policies=self.policies)})
        self.engine = MuteEngine()
        self.rights = RightsService(folder, self.engine, lambda: self.clock() / SECOND_NS)
        self.cloud = self.open()
        if start:
            self.cloud.start()

    def open(self, follow_seconds: float = 20.0) -> Cloud:
        """Return a manager on this database, not started."""
        return Cloud(
            open_engine(self.url),
            self.fabric,
            authority=self.authority,
            keyring=self.keyring,
            config=self.config,
            store=self.store,
            work_dir=self.folder,
            api_url="https://127.0.0.1:8440",
            clock_ns=self.clock,
            rights=self.rights,
            report_signer=ReportSigner.open(self.folder),
            follow_seconds=follow_seconds,
        )

    def close(self) -> None:
        self.cloud.close()
        self.rights.close()

    def restart(self) -> None:
        """Another manager takes the place of this one, on the same database."""
        self.cloud.close()
        self.cloud = self.open()
        self.cloud.start()

    def populate(self) -> None:
        """Register the two enterprises, and have their sites report."""
        for name in ENTERPRISES:
            site = SiteConfig(name=f"{name}-hq", jurisdiction="USA", location="Main Street")
            config = EnterpriseConfig(name=name, title=name.title(), jurisdiction="USA", owner="one", sites=[site])
            self.cloud.register_enterprise(SYSTEM, config)
            self.report(name)

    def principal(self, enterprise: str | None, role: Role = Role.ENTERPRISE_ADMIN) -> Principal:
        """Return someone whose token has been proven."""
        request = TokenRequest(name=f"{role.value} of {enterprise}", role=role, enterprise=enterprise)
        return self.cloud.authenticate(self.cloud.create_token(SYSTEM, request).secret)

    # Sites that do as they are told.

    def report(
        self,
        enterprise: str,
        servers: Mapping[str, Mapping[str, int]] | None = None,
        *,
        host: str = "h1",
        revision: int | None = None,
        problem: str = "",
    ) -> None:
        """Have the enterprise's site follow its orders, and report: `servers` are its servers' disks and sizes."""
        site = f"{enterprise}-hq"
        orders = self.cloud.orders_for(enterprise, site)
        found = {"web": {"sda": GIB, "sdb": 2 * GIB}, "db": {"sda": GIB}} if servers is None else servers
        seen = [
            SeenServer(
                name=name,
                host=host,
                tap="00" * 16,
                connected=True,
                disks=[Disk(index=i, name=disk, size_bytes=size) for i, (disk, size) in enumerate(disks.items())],
            )
            for name, disks in found.items()
        ]
        self.cloud.site_report(
            enterprise,
            site,
            SiteReport(
                revision=orders.revision if revision is None else revision,
                time_ns=self.clock(),
                version="1",
                hosts=[HostReport(host=host, vdsa="installed", servers=seen)],
                sources=self._sources(orders, problem),
                datastores=["local"],
            ),
        )

    def report_host(self, data_center: str, host: str) -> None:
        """Have the VDSA of a data center's host follow its orders, and report."""
        orders = self.cloud.host_orders(data_center, host)
        targets = [
            TargetReport(
                scope=order.scope,
                generation=1,
                connections=1,
                newest=None,
                horizon_ns=START_NS - 3600 * SECOND_NS,
                newest_ns=self.clock(),
                journal_bytes=GIB,
            )
            for order in orders.targets
        ]
        report = SiteReport(
            revision=orders.revision,
            time_ns=self.clock(),
            version="1",
            hosts=[HostReport(host=host, vdsa="installed")],
            sources=self._sources(orders, ""),
            targets=targets,
        )
        self.cloud.host_report(data_center, host, report)

    def _sources(self, orders: SiteOrders, problem: str) -> list[SourceReport]:
        return [
            SourceReport(
                scope=order.scope,
                linked=True,
                problem=problem,
                taps=dict.fromkeys(order.members, "whole"),
                kept_bytes=0,
                durable_ns=self.clock() - SECOND_NS,
                lag_seconds=1.0,
                checkpoints=1,
                skipped=0,
                resyncs=0,
            )
            for order in orders.sources
        ]

    def follow(self, task: Task, enterprise: str = "acme") -> Task:
        """Have everyone follow until the task has ended; return it."""
        for _ in range(400):
            found = self.cloud.wait_task(SYSTEM, task.id, timeout_seconds=0.05, poll_seconds=0.02)
            if found.ended_ns is not None:
                return found
            self.clock.pass_seconds(0.25)
            self.report(enterprise)
            for data_center, host in self._concerned():
                self.report_host(data_center, host)
        raise AssertionError(f"the task does not end: {found}")

    def _concerned(self) -> set[tuple[str, str]]:
        """Return the hosts that were told of new orders, and those that replicate: nobody waits for the others."""
        told = self.fabric.asked("host_orders_changed")
        new, self._told = told[self._told :], len(told)
        self._busy |= {(data_center, host) for data_center, host in new}
        self._busy = {place for place in self._busy if place in new or self.cloud.host_orders(*place).targets}
        return set(self._busy)

    def done(self, task: Task, enterprise: str = "acme") -> Task:
        """Do so, and see that it ended well."""
        found = self.follow(task, enterprise)
        assert found.completion is CompletionCode.SUCCESS, found
        return found

    def protect(self, who: Principal, name: str = "erp", enterprise: str = "acme", **changes: object) -> Task:
        """Create a VPG of the enterprise's two servers, and wait for it."""
        return self.done(self.cloud.create_vpg(who, enterprise, settings(name, enterprise, **changes)), enterprise)

    def journal(self, scope: Scope, count: int = 10) -> list[Checkpoint]:
        """Put checkpoints into a scope's journal, one a second up to now."""
        first_ns = self.clock() - (count - 1) * SECOND_NS
        self.fabric.journals[scope] = [
            Checkpoint(
                number=number,
                generation=1,
                kind="auto",
                time_ns=first_ns + number * SECOND_NS,
                exact_from_ns=first_ns + max(0, number - 1) * SECOND_NS,
                created_ns=first_ns + number * SECOND_NS,
                rows_before=0,
            )
            for number in range(count)
        ]
        return self.fabric.journals[scope]


def settings(name: str = "erp", enterprise: str = "acme", **changes: object) -> VpgSettings:
    """Return settings of a VPG of both servers, replicated to a cluster and a pool of us-east."""
    made = VpgSettings(
        name=name,
        source_site=f"{enterprise}-hq",
        servers=[ProtectedServer(name="db"), ProtectedServer(name="web")],
        targets=[TargetConfig(name="dc1", site="us-east", host="compute", datastore="gold")],
    )
    return VpgSettings.model_validate(made.model_dump() | changes)
