"""Virtual protection groups: create, update, remove, pause, and how they stand.

A change is made in the database at once; its task ends when the sites and hosts concerned follow their new orders, or
fails with the reason, and then the change stands all the same: they follow when they come back. A forced update or
removal does not wait for anyone.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session, selectinload, undefer

from dr_cloud.manager import tables
from dr_cloud.manager.operations import Change, Operations, decided, missing
from dr_cloud.manager.paging import paged
from dr_cloud.manager.placement import Load, behind, choose
from dr_cloud.manager.protect import (
    apply,
    check_settings,
    known_servers,
    missing_of,
    only_target,
    parties_of,
    source_party,
    target_party,
)
from dr_cloud.manager.publish import Party
from dr_cloud.manager.questions import HELD, about_target, keeps
from dr_cloud.manager.tasks import Done, Later, TaskFailedError, TaskType, view
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.manager.vpgview import target_gone, vpg_view
from dr_cloud.model.cloud import Page, PageRequest, Vpg, VpgFilter
from dr_cloud.model.errors import ConflictError, InvalidError
from dr_cloud.model.principal import Principal
from dr_cloud.model.provider import DataCenterConfig, ProviderConfig
from dr_cloud.model.task import Task, TaskStatus
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import (
    TRANSITIONS,
    ProtectedServer,
    TargetConfig,
    VpgEvent,
    VpgSettings,
    VpgState,
    VpgStatus,
    next_status,
)

_OPEN = (TaskStatus.ACTIVE.value, TaskStatus.RUNNING.value)
EXCLUSIVE = (
    "vpg.create",
    "vpg.update",
    "vpg.remove",
    "vpg.sync",
    "failover.start",
    "failover.commit",
    "failover.rollback",
)
"""Tasks of which a VPG has one at a time."""


class Vpgs(Operations):
    """Operations on VPGs."""

    @decided
    def create_vpg(self, who: Principal, enterprise: str, settings: VpgSettings) -> Task:
        """Protect servers. A server that has not been seen yet makes the group wait for it (MissingConfiguration)."""
        with self._change(who, "vpg.create", enterprise, f"vpg {settings.name}") as change:
            if change.session.get(tables.Vpg, (enterprise, settings.name)) is not None:
                raise ConflictError(f"VPG {settings.name!r} exists already", "Choose another name, or update it.")
            check_settings(change.session, self._context.config, enterprise, settings)
            row = tables.Vpg(
                enterprise=enterprise,
                name=settings.name,
                status=VpgStatus.PROTECTING.value,
                created_ns=change.now_ns,
                settings={},
                source_site=settings.source_site,
                source_in_center=False,
                source_host="",
                paused="",
                problem="",
            )
            change.session.add(row)
            self._apply(change, row, settings, who)
            return change.done(self._tell(change, row, "vpg.create", {"settings": settings.model_dump(mode="json")}))

    @decided
    def update_vpg(self, who: Principal, enterprise: str, vpg: str, settings: VpgSettings, force: bool = False) -> Task:
        """Give a VPG new settings. `force` does not wait until the sites follow, nor for another task."""
        with self._change(who, "vpg.update", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            if settings.name != vpg:
                raise InvalidError("a VPG cannot be renamed: its journal carries its name", "Keep the name.")
            return change.done(self._update(change, row, settings, who, force))

    @decided
    def add_server(self, who: Principal, enterprise: str, vpg: str, server: ProtectedServer) -> Task:
        """Protect one more server in a VPG."""
        with self._change(who, "vpg.update", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            settings = VpgSettings.model_validate(row.settings)
            if any(known.name == server.name for known in settings.servers):
                raise ConflictError(f"server {server.name} is in {vpg} already", "Update the VPG to change its disks.")
            settings = settings.model_copy(update={"servers": [*settings.servers, server]})
            return change.done(self._update(change, row, settings, who, force=False))

    @decided
    def remove_server(self, who: Principal, enterprise: str, vpg: str, server: str) -> Task:
        """Protect one server less. Its history stays in the journal."""
        with self._change(who, "vpg.update", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            settings = VpgSettings.model_validate(row.settings)
            rest = [known for known in settings.servers if known.name != server]
            if len(rest) == len(settings.servers):
                raise missing("server", server)
            if not rest:
                raise ConflictError(f"{server} is the last server of {vpg}", "Remove the VPG instead.")
            return change.done(
                self._update(change, row, settings.model_copy(update={"servers": rest}), who, force=False)
            )

    def _update(self, change: Change, row: tables.Vpg, settings: VpgSettings, who: Principal, force: bool) -> Task:
        if VpgStatus(row.status) is VpgStatus.REMOVE_IN_PROGRESS:
            raise ConflictError(f"{row.name} is being removed", "Wait until it is gone.")
        if not force:
            self._one_at_a_time(change.session, row)
        had = [target_party(target) for target in row.targets]
        if settings.source_site != row.source_site:
            raise InvalidError("a VPG's source cannot be changed", "Fail it over, or create another VPG.")
        check_settings(change.session, self._context.config, row.enterprise, settings)
        self._apply(change, row, settings, who)
        inputs: dict[str, Any] = {"settings": settings.model_dump(mode="json"), "force": force}
        return self._tell(change, row, "vpg.update", inputs, had)

    def remove_vpg(self, who: Principal, enterprise: str, vpg: str, force: bool = False) -> Task:
        """Stop protecting, and forget the VPG. Its journal stays in the store. `force` takes it out of any status."""
        with self._change(who, "vpg.remove", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            wanted = select(tables.RecoveryTest.id).where(
                tables.RecoveryTest.vpg == vpg,
                tables.RecoveryTest.kind == "failover",
                tables.RecoveryTest.stopped_ns.is_(None),
            )
            if change.session.scalars(wanted).first() is not None:
                raise ConflictError(
                    f"servers of {vpg} run from recovered disks", "Roll the failover back, or release its servers."
                )
            if not force:
                self._one_at_a_time(change.session, row)
                row.status = next_status(VpgStatus(row.status), VpgEvent.REMOVE_STARTED).value
                return change.done(self._tell(change, row, "vpg.remove", {"force": False}))
            tests = change.session.scalars(
                select(tables.RecoveryTest.id).where(
                    tables.RecoveryTest.vpg == vpg,
                    tables.RecoveryTest.kind == "test",
                    tables.RecoveryTest.stopped_ns.is_(None),
                )
            )
            inputs = {"force": True, "stacks": list(tests)}
            task = self._tell(change, row, "vpg.remove", inputs)
            self._forget(change.session, row)
            return change.done(task)

    def force_sync(self, who: Principal, enterprise: str, vpg: str, target: str | None = None) -> Task:
        """Have all that the disks hold sent again, to one target or to all."""
        with self._change(who, "vpg.sync", enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            self._one_at_a_time(change.session, row)
            for chosen in row.targets if target is None else [only_target(row, target)]:
                chosen.sync_number += 1
            return change.done(self._tell(change, row, "vpg.sync", {"target": target}))

    def pause(self, who: Principal, enterprise: str, vpg: str, reason: str = "") -> Vpg:
        """Stop replicating for a while: taps go on by bitmap, and nothing is lost."""
        return self._pause(who, "vpg.pause", enterprise, vpg, reason[:1024] or f"paused by {who.name}")

    def resume(self, who: Principal, enterprise: str, vpg: str) -> Vpg:
        """Replicate again: what has changed meanwhile is sent first."""
        return self._pause(who, "vpg.resume", enterprise, vpg, "")

    def _pause(self, who: Principal, operation: str, enterprise: str, vpg: str, reason: str) -> Vpg:
        with self._change(who, operation, enterprise, f"vpg {vpg}") as change:
            row = self._row(change.session, enterprise, vpg)
            row.paused = reason
            change.registry = True
            change.event("vpg", vpg, paused=reason)
            party = source_party(row)
            change.after.append(lambda: _ignore(self._context.publisher.publish([party])))
            return change.done(self._view(row, who))

    # Reading.

    def vpgs(
        self,
        who: Principal,
        enterprise: str | None,
        page: PageRequest = PageRequest(),
        which: VpgFilter = VpgFilter(),
    ) -> Page[Vpg]:
        """List VPGs; None: of all enterprises that the caller may see."""
        table = tables.Vpg
        loads = (selectinload(table.targets), selectinload(table.disks), undefer(table.last_passed_test_ns))
        wanted = select(table).options(*loads)
        if which.status is not None:
            wanted = wanted.where(table.status == which.status.value)
        if which.source_site is not None:
            wanted = wanted.where(table.source_site == which.source_site)
        if which.target_site is not None:
            wanted = wanted.where(table.targets.any(tables.VpgTarget.site == which.target_site))
        if which.name_begins:
            wanted = wanted.where(table.name.startswith(which.name_begins, autoescape=True))
        keys = [table.name] if enterprise is not None or who.enterprise is not None else [table.enterprise, table.name]
        with self._read(who, "vpg.read", enterprise) as session:
            return paged(session, wanted, keys, page, lambda row: self._view(row, who))

    def vpg(self, who: Principal, enterprise: str, vpg: str) -> Vpg:
        """Return one VPG."""
        with self._read(who, "vpg.read", enterprise) as session:
            return self._view(self._row(session, enterprise, vpg), who)

    def vpg_status(self, who: Principal, enterprise: str, vpg: str) -> VpgStatus:
        """Return a VPG's status."""
        return self.vpg(who, enterprise, vpg).status

    def vpg_state(self, who: Principal, enterprise: str, vpg: str) -> VpgState:
        """Return whether a VPG's servers are protected or recovered."""
        return self.vpg(who, enterprise, vpg).state

    def reverse_settings(self, who: Principal, enterprise: str, vpg: str, target: str | None = None) -> VpgSettings:
        """Return settings for replication back from a target, as defaults to start from."""
        with self._read(who, "vpg.read", enterprise) as session:
            row = self._row(session, enterprise, vpg)
            chosen = only_target(row, target)
            settings = VpgSettings.model_validate(row.settings)
            servers = {server.name: server for server in known_servers(session, row).values()}
            hosts = sorted({server.host for server in servers.values()})
            back = TargetConfig(name=chosen.name, site=row.source_site, host=chosen.host, datastore=chosen.datastore)
            if row.source_in_center:
                center = self._context.config.data_center(row.source_site)
                if center is not None:
                    host = (center.clusters or center.hosts)[0].name
                    store = (center.pools or center.datastores)[0].name
                    back = back.model_copy(update={"host": host, "datastore": store})
            else:
                site = session.get(tables.Site, (enterprise, row.source_site))
                names = {"host": hosts[:1], "datastore": site.datastores[:1] if site is not None else []}
                back = back.model_copy(update={key: value[0] for key, value in names.items() if value})
            return settings.model_copy(update={"source_site": chosen.site, "targets": [back]})

    # What the operations above share.

    def _row(self, session: Session, enterprise: str, vpg: str) -> tables.Vpg:
        row = session.get(tables.Vpg, (enterprise, vpg))
        if row is None:
            raise missing("VPG", vpg)
        return row

    def _view(self, row: tables.Vpg, who: Principal) -> Vpg:
        return vpg_view(row, self._context.clock_ns(), to_provider=who.enterprise is None)

    def _apply(self, change: Change, row: tables.Vpg, settings: VpgSettings, who: Principal) -> None:
        config = self._context.config

        def place(target: TargetConfig) -> tuple[str, str]:
            center = config.data_center(target.site)
            if center is None:
                raise missing("data center", target.site)
            return choose(
                center,
                target.host,
                target.datastore,
                self._load(target.site),
                to_provider=who.enterprise is None,
                closed=_closed(change, row, center, target),
            )

        apply(change.session, config, row, settings, place)
        asked = [question for target in row.targets for question in about_target(row, target, HELD)]
        change.decide("vpg", f"vpg/{row.name}", asked)
        if row.source_in_center and not row.source_host:
            center = config.data_center(row.source_site)
            scopes = self._load(row.source_site).scopes
            if center is not None:
                row.source_host = min(
                    (host.name for host in center.hosts), key=lambda name: (scopes.get(name, 0), name)
                )
        self._judge(change, row)
        change.session.flush()

    def _judge(self, change: Change, row: tables.Vpg) -> None:
        """Set the status by what is missing of the configuration."""
        judge(change.session, self._context.config, row, change.now_ns)

    def _load(self, data_center: str) -> Load:
        """Return what a data center carries, over all enterprises."""
        target = tables.VpgTarget
        with self._database.read(EVERYONE) as session:
            scopes = session.execute(
                select(target.placed_host, func.count(target.name))
                .where(target.site == data_center, target.in_center)
                .group_by(target.placed_host)
            ).all()
            sizes = session.execute(
                select(target.placed_datastore, func.sum(target.journal_bytes))
                .where(target.site == data_center, target.in_center)
                .group_by(target.placed_datastore)
            ).all()
            sources = session.execute(
                select(tables.Vpg.source_host, func.count(tables.Vpg.name))
                .where(tables.Vpg.source_site == data_center, tables.Vpg.source_in_center)
                .group_by(tables.Vpg.source_host)
            ).all()
        counted: dict[str, int] = {}
        for host, count in (*scopes, *sources):
            counted[host] = counted.get(host, 0) + count
        return Load(counted, {datastore: int(size or 0) for datastore, size in sizes})

    def _one_at_a_time(self, session: Session, row: tables.Vpg) -> None:
        table = tables.Task
        wanted = select(table).where(table.vpg == row.name, table.status.in_(_OPEN), table.type.in_(EXCLUSIVE))
        if (task := session.scalars(wanted.limit(1)).first()) is not None:
            raise ConflictError(
                f"task {task.id} ({task.type}) is changing {row.name} now", "Wait until it has ended, or abort it."
            )

    def _tell(
        self, change: Change, row: tables.Vpg, type_: str, inputs: dict[str, Any], had: list[Party] | None = None
    ) -> Task:
        """Add the task that tells everyone concerned, and waits for them."""
        change.registry = True
        change.event("vpg", row.name, status=row.status)
        parties = list(dict.fromkeys([*parties_of(row), *(had or [])]))
        task = change.task(type_, inputs, vpg=row.name, site=row.source_site)
        task.state = {"parties": [list(party) for party in parties]}
        return view(task)

    @staticmethod
    def _forget(session: Session, row: tables.Vpg) -> None:
        for disk in session.scalars(select(tables.VpgDisk).where(tables.VpgDisk.vpg == row.name)):
            disk.removed = True  # the row stays: its index must not be given again
        for kind in (tables.RecoveryTest, tables.InsertedCheckpoint):
            session.execute(delete(kind).where(kind.vpg == row.name))
        session.delete(row)

    # Tasks.

    def _register_vpg_tasks(self) -> None:
        for type_ in ("vpg.create", "vpg.update", "vpg.remove", "vpg.sync"):
            self._context.tasks.register(type_, TaskType(self._step_vpg, abort=lambda task: None))

    def _step_vpg(self, task: tables.Task) -> Later | Done:
        clock_ns, publisher = self._context.clock_ns, self._context.publisher
        if "needs" not in task.state:
            for stack in task.inputs.get("stacks", []):
                self._context.fabric.close_stack(stack)
            revisions = publisher.publish(Party(*party) for party in task.state["parties"])
            needs = [[list(party), revision] for party, revision in revisions.items()]
            task.state = {**task.state, "needs": needs, "since_ns": clock_ns()}
            if task.inputs.get("force"):
                return Done({"waited": False})
            return Later(0.05, 0.2)
        waiting = publisher.waiting_for((Party(*party), revision) for party, revision in task.state["needs"])
        if not waiting and task.type == "vpg.remove":
            self._removed(task)
            return Done()
        if not waiting and (problem := self._not_replicating(task)) == "":
            return Done()
        seconds = (clock_ns() - int(task.state["since_ns"])) / SECOND_NS
        if seconds > self._context.follow_seconds:
            why = "; ".join(waiting) or problem
            raise TaskFailedError(
                f"after {seconds:.0f} s: {why}",
                "The change stands, and is followed as soon as it can be. To wait for nobody, force it.",
            )
        return Later(0.2, 0.2 if waiting else 0.8)

    def _removed(self, task: tables.Task) -> None:
        with self._database.write(task.enterprise) as session:
            row = session.get(tables.Vpg, (task.enterprise, task.vpg))
            if row is not None:
                self._forget(session, row)
                self._context.registry.touch(session, task.enterprise)
        self._context.registry.wake()

    def _not_replicating(self, task: tables.Task) -> str:
        """Return why the source does not yet do what it was told, or the empty string."""
        with self._database.read(task.enterprise) as session:
            row = session.get(tables.Vpg, (task.enterprise, task.vpg))
            if row is None:
                return ""
            if row.paused or VpgStatus(row.status) is VpgStatus.MISSING_CONFIGURATION:
                return ""  # it is as it should be: the status says what is awaited
            for target in row.targets:
                if target.denied:
                    continue  # its status says why it waits
                if target.reported_ns < int(task.state["since_ns"]):
                    return f"no report yet on target {target.name}"
                if target.problem or target.target_problem:
                    return f"target {target.name}: {target.problem or target.target_problem}"
        return ""


def judge(session: Session, config: ProviderConfig, row: tables.Vpg, now_ns: int) -> bool:
    """Note what is missing of a VPG, and set its status accordingly; return whether the status changed."""
    servers = known_servers(session, row)
    problem = missing_of(row, servers, lambda target: target_gone(session, config, target), now_ns)
    row.problem = problem
    event = VpgEvent.CONFIGURATION_LOST if problem else VpgEvent.CONFIGURATION_FOUND
    following = TRANSITIONS.get((VpgStatus(row.status), event))
    if following is None:
        return False
    row.status = following.value
    return True


def _closed(change: Change, row: tables.Vpg, center: DataCenterConfig, target: TargetConfig) -> set[str]:
    """Return which of a pool are not for this VPG. Asked only where a pool lies on both sides of a border."""
    stores = [store for store in center.datastores if store.name in behind(center, target.datastore)]
    if len({store.jurisdiction or center.jurisdiction for store in stores}) < 2:
        return set()
    asked = [keeps(row, target.name, center.name, store.name) for store in stores]
    return {store.name for store, answer in zip(stores, change.ask(asked), strict=True) if not answer.allow}


def _ignore(_: object) -> None:
    return None
