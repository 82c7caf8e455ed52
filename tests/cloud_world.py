"""A real manager over a fabric that only remembers: for tests of the manager, the API, the client and the command line.

`QuietFabric` tells what connectors, VDSAs and stacks would, and notes what it was asked. Nothing runs behind it:
checkpoints are those that a test puts there, stacks are names. `World` is a `Cloud` over it, with a clock that stands
unless it is moved, and sites that follow their orders when a test says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quiet_fabric import GIB, START_NS, QuietFabric

from dr_cloud.manager.cloud import SYSTEM, Cloud
from dr_cloud.manager.db import open_engine
from dr_cloud.model.cloud import TokenRequest
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, Disk
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.provider import EnterpriseConfig, ProviderConfig, RightsConfig, SiteConfig
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
from dr_cloud.store.objects import open_memory
from dr_cloud.store.store import Store

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
