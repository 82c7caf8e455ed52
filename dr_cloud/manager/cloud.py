"""The manager of the cloud: every operation, over one database.

Purpose
    `Cloud` is what the REST API, the connectors and the VDSAs talk to. Its operations are in modules by noun; here they
    come together and get what they stand on. It is synchronous and may be called from any thread. Every operation takes
    the caller first; a tenant's things are named by (enterprise, name), another's are "not found". Long work returns a
    `Task`. What comes from the fabric takes no caller: a connector has proven who speaks.

Layout
    `tables` and `db` the schema · `tenancy` the one place that every query passes · `access` who may do what ·
    `operations` what all share (audit, idempotency, paging) · `enterprises`, `pairing`, `sites`, `vpgs`, `checkpoints`,
    `recovery_tests`, `probing`, `failover`, `clean`, `drills`, `testreports`, `rights`, `reports` the operations ·
    `watch` reports that come in, `dispatch` and `publish` orders that go out · `protect`, `placement`, `orders`,
    `questions`, `health` pure decisions · `desk` where the rights manager is asked, `record` what it answered,
    `policies` what it decides by · `tasks`, `registry`, `monitor`, `tending`, `standing` what runs by itself, in
    `rounds` · `fabric` the world outside.

Consistency
    A change and its audit row are one transaction. Orders are computed from rows when they are asked for, so nobody is
    told what was not committed. The world outside is reached after the commit, and from tasks.

Retries
    Whoever follows orders gets all of them each time; whoever reports tells everything each time. So a message that was
    lost is made good by the next. Tasks are taken again after a restart where their type is safe to repeat.

Crash recovery
    All state is in the database, and what people decided is in the store as well (`registry`). At the start everyone is
    told to fetch their orders anew. If the database is lost, `registry.rebuild` fills a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, select

from dr_cloud.manager import tables
from dr_cloud.manager.clean import CleanSearches
from dr_cloud.manager.db import migrate
from dr_cloud.manager.desk import Desk
from dr_cloud.manager.drills import ROUND_SECONDS as DRILL_SECONDS
from dr_cloud.manager.drills import Drills
from dr_cloud.manager.enterprises import Enterprises
from dr_cloud.manager.events import Events
from dr_cloud.manager.fabric import Fabric
from dr_cloud.manager.failover import Failover
from dr_cloud.manager.monitor import Monitor
from dr_cloud.manager.operations import Clock, Context
from dr_cloud.manager.policies import Policies
from dr_cloud.manager.probing import Probing
from dr_cloud.manager.publish import Publisher
from dr_cloud.manager.record import Recorder
from dr_cloud.manager.recovering import Recovering
from dr_cloud.manager.registry import Registry
from dr_cloud.manager.reports import Reports
from dr_cloud.manager.rounds import Rounds
from dr_cloud.manager.sites import Sites
from dr_cloud.manager.standing import StandingRights
from dr_cloud.manager.tasks import Tasks
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER, Database
from dr_cloud.manager.tending import Tending
from dr_cloud.manager.testreports import TestReports
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.recovery.report_key import ReportSigner
from dr_cloud.rights.rights import Rights
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.store import Store

SYSTEM: Final = Principal(id="system", name="the provider itself", role=Role.PROVIDER_ADMIN, place=None)
"""Who acts where nobody has asked: the first token, the tenants that are loaded at the start."""
FOLLOW_SECONDS: Final = 60.0


class Cloud(Enterprises, Sites, Failover, Probing, CleanSearches, Drills, TestReports, Reports):
    """All operations."""

    def __init__(
        self,
        engine: Engine,
        fabric: Fabric,
        *,
        authority: Authority,
        keyring: Keyring,
        config: ProviderConfig,
        store: Store,
        work_dir: Path,
        api_url: str,
        clock_ns: Clock,
        rights: Rights,
        report_signer: ReportSigner,
        answers_for: Callable[[str], bool] = lambda enterprise: True,
        follow_seconds: float = FOLLOW_SECONDS,
    ) -> None:
        """Open the database, and bring its schema up to date. Nothing runs before `start`.

        Args:
            engine: From `db.open_engine`.
            fabric: The world outside.
            authority: The provider's CA.
            keyring: The provider's keyring.
            config: The provider, with its data centers.
            store: Where the registry is written.
            work_dir: A folder for archives of logs.
            api_url: `https://host:port` of the API, as sites reach it: for pairing tokens.
            clock_ns: The time.
            rights: The rights manager; it is told policies and facts, and asked at every point.
            report_signer: Signs reports of recovery tests.
            answers_for: Whether this process runs the tasks, alerts and registry of an enterprise (the empty string:
                of the provider itself). Exactly one process must answer for each.
            follow_seconds: How long a task waits until sites follow their orders.
        """
        migrate(engine)
        database = Database(engine)
        events = Events(database)
        tasks = Tasks(database, events, clock_ns, answers_for)
        registry = Registry(database, store, keyring, answers_for)
        context = Context(
            database=database,
            fabric=fabric,
            authority=authority,
            keyring=keyring,
            config=config,
            clock_ns=clock_ns,
            work_dir=work_dir,
            api_url=api_url,
            tasks=tasks,
            events=events,
            registry=registry,
            publisher=Publisher(database, fabric),
            desk=Desk(rights, clock_ns),
            policies=Policies(database, config, rights, clock_ns),
            recorder=Recorder(database, clock_ns),
            report_signer=report_signer,
            follow_seconds=follow_seconds,
        )
        super().__init__(context)
        self._answers_for = answers_for
        self._prepare_watch()
        self._register_site_tasks()
        self._register_vpg_tasks()
        self._register_test_tasks()
        self._register_probe_tasks()
        self._register_failover_tasks()
        self._register_clean_tasks()
        self._register_log_tasks()
        self.monitor = Monitor(context, answers_for)
        self.drill_rounds = Rounds("drills", DRILL_SECONDS, [self.look_at_drills])
        self.tending = Tending(context, answers_for)
        self.recovering = Recovering(context, self, answers_for)
        self.standing = StandingRights(context, answers_for)

    def start(self) -> None:
        """Begin: the rights manager is told all, tasks go on, everyone fetches orders, what stands is judged.

        Without the rights manager it begins too, and allows nothing new; it is told all when it comes back.

        Raises:
            InvalidError: The configured policies cannot be used; nothing runs yet.
        """
        if self._answers_for(PROVIDER):
            self._note_center_hosts()
            self._context.policies.begin()
        self._context.publisher.publish_all(self._answers_for)
        self._context.tasks.start()
        self._context.registry.start()
        self.monitor.start()
        self.tending.start()
        self.recovering.start()
        self.standing.start()
        self.drill_rounds.start()

    def close(self) -> None:
        """End what runs by itself, after the step it is at."""
        self.drill_rounds.close()
        self.standing.close()
        self.tending.close()
        self.recovering.close()
        self.monitor.close()
        self._context.tasks.close()
        self._context.registry.close()
        self._database.engine.dispose()

    def _note_center_hosts(self) -> None:
        """Give every host of the configuration its row; a host that is no longer there loses it."""
        wanted = {(center.name, host.name) for center in self._context.config.data_centers for host in center.hosts}
        with self._database.write(EVERYONE) as session:
            rows = {(row.data_center, row.name): row for row in session.scalars(select(tables.CenterHost))}
            for key in rows.keys() - wanted:
                session.delete(rows[key])
            for data_center, name in wanted - rows.keys():
                session.add(tables.CenterHost(data_center=data_center, name=name))
