"""What can be looked at: tasks, logs, health, alerts, the audit log, events."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.health import lag_now
from dr_cloud.manager.operations import Operations, missing
from dr_cloud.manager.paging import paged
from dr_cloud.manager.questions import by_person
from dr_cloud.manager.tasks import Done, Later, TaskType, view
from dr_cloud.manager.tenancy import PROVIDER
from dr_cloud.model.cloud import LogRequest, Page, PageRequest
from dr_cloud.model.errors import ConflictError, InvalidError
from dr_cloud.model.principal import Principal
from dr_cloud.model.rights import Action
from dr_cloud.model.task import Task, TaskStatus
from dr_cloud.model.vpg import VpgStatus
from dr_cloud.model.watch import Alert, AuditEntry, Event, Health, SiteHealth

_OPEN: Final = (TaskStatus.ACTIVE.value, TaskStatus.RUNNING.value)
_ID: Final = re.compile(r"[0-9a-f]{32}")
_ALERTS_MAX: Final = 1000


class Reports(Operations):
    """Operations that tell how things are."""

    # Tasks.

    def tasks(
        self,
        who: Principal,
        enterprise: str | None,
        page: PageRequest = PageRequest(),
        vpg: str | None = None,
        status: TaskStatus | None = None,
    ) -> Page[Task]:
        """List tasks, newest first; None: all that the caller may see."""
        table = tables.Task
        wanted = select(table)
        if vpg is not None:
            wanted = wanted.where(table.vpg == vpg)
        if status is not None:
            wanted = wanted.where(table.status == status.value)
        with self._read(who, "task.read", enterprise) as session:
            return paged(session, wanted, [table.created_ns, table.id], page, view, newest_first=True)

    def task(self, who: Principal, task: str) -> Task:
        """Return one task."""
        with self._read(who, "task.read", None) as session:
            return view(_task(session, task))

    def wait_task(self, who: Principal, task: str, timeout_seconds: float = 60.0, poll_seconds: float = 0.5) -> Task:
        """Wait until a task has ended; return it as it stands then, or at the time-out."""
        until = time.monotonic() + timeout_seconds
        while True:
            found = self.task(who, task)
            left = until - time.monotonic()
            if found.ended_ns is not None or left <= 0:
                return found
            time.sleep(min(max(poll_seconds, 0.02), left))

    def abort_task(self, who: Principal, task: str) -> Task:
        """Have a task end before its work is done, where its type can; what it did stands."""
        with self._read(who, "task.read", None) as session:
            found = _task(session, task)
        with self._change(who, "task.abort", found.enterprise, f"task {task}") as change:
            # Locked: else the time that a step sets just now would stay, unseen here.
            row = change.session.get_one(tables.Task, (found.enterprise, task), with_for_update=True)
            if row.ended_ns is not None:
                raise ConflictError("the task has ended already", "Nothing is left to abort.")
            if not self._context.tasks.can_abort(row.type):
                raise ConflictError(f"a task of type {row.type} cannot be aborted", "Wait until it has ended.")
            row.abort, row.due_ns = True, 0
            return change.done(view(row))

    def active_task(self, who: Principal, enterprise: str, vpg: str) -> Task | None:
        """Return the task that is being performed on a VPG, if there is one."""
        return self._active(who, enterprise, vpg, None)

    def active_task_at_site(self, who: Principal, enterprise: str, vpg: str, site: str) -> Task | None:
        """Return the task that is being performed on a VPG at a site, if there is one."""
        return self._active(who, enterprise, vpg, site)

    def _active(self, who: Principal, enterprise: str, vpg: str, site: str | None) -> Task | None:
        table = tables.Task
        wanted = select(table).where(table.vpg == vpg, table.status.in_(_OPEN)).order_by(table.created_ns)
        if site is not None:
            wanted = wanted.where(table.site == site)
        with self._read(who, "task.read", enterprise) as session:
            if session.get(tables.Vpg, (enterprise, vpg)) is None:
                raise missing("VPG", vpg)
            known = site is None or self._context.config.data_center(site) is not None
            if not known and session.get(tables.Site, (enterprise, site)) is None:
                raise missing("site", site or "")
            row = session.scalars(wanted.limit(1)).first()
        return view(row) if row is not None else None

    # Logs.

    def collect_logs(self, who: Principal, enterprise: str | None, request: LogRequest) -> Task:
        """Collect logs into an archive: of a site of an enterprise, or (None) of the provider's own processes."""
        owner = enterprise or PROVIDER
        with self._change(who, "logs.collect", owner, f"logs {request.site or 'provider'}") as change:
            if owner != PROVIDER:
                if request.site is None:
                    raise InvalidError("no site is named", "Name the site whose logs are wanted.")
                if change.session.get(tables.Site, (owner, request.site)) is None:
                    raise missing("site", request.site)
            elif request.site is not None and self._context.config.data_center(request.site) is None:
                raise missing("data center", request.site)
            return change.done(view(change.task("logs.collect", request.model_dump(mode="json"), site=request.site)))

    def log_archive(self, who: Principal, task: str) -> bytes:
        """Return the archive that a task has collected."""
        with self._read(who, "logs.read", None) as session:
            row = _task(session, task)
        path = self._archive(row.id)
        if row.type != "logs.collect" or row.result is None or not path.is_file():
            raise missing("archive of task", task)
        if row.enterprise != PROVIDER and who.place is not None:
            self._permit(row.enterprise, "logs", f"task {task}", [by_person(who, Action.LOGS, row.enterprise)])
        return path.read_bytes()

    def _archive(self, task: str) -> Path:
        if not _ID.fullmatch(task):
            raise missing("task", task)
        return self._context.work_dir / "logs" / f"{task}.tar.gz"

    def _register_log_tasks(self) -> None:
        self._context.tasks.register("logs.collect", TaskType(self._step_logs))

    def _step_logs(self, task: tables.Task) -> Later | Done:
        request = LogRequest.model_validate(task.inputs)
        data = self._context.fabric.collect_logs(task.enterprise, request.site or "", request)
        path = self._archive(task.id)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        name = "-".join(filter(None, ("logs", task.enterprise, request.site, task.id[:8]))) + ".tar.gz"
        return Done({"archive": task.id, "bytes": len(data), "name": name})

    # Health, alerts, audit, events.

    def health(self, who: Principal, enterprise: str | None = None) -> Health:
        """Return how everything stands that the caller may see."""
        now_ns = self._context.clock_ns()
        with self._read(who, "health.read", enterprise) as session:
            counted = session.execute(
                select(tables.Vpg.status, func.count(tables.Vpg.name)).group_by(tables.Vpg.status)
            )
            vpgs = {VpgStatus(status): count for status, count in counted.all()}
            lags = session.execute(select(tables.VpgTarget.lag_seconds, tables.VpgTarget.reported_ns)).all()
            known = [lag for told, at in lags if (lag := lag_now(told, at, now_ns)) is not None]
            running = session.scalar(select(func.count(tables.Task.id)).where(tables.Task.status.in_(_OPEN)))
            standing = select(tables.Alert).where(tables.Alert.cleared_ns.is_(None))
            alerts = session.scalars(standing.order_by(tables.Alert.raised_ns.desc()).limit(_ALERTS_MAX)).all()
            return Health(
                at_ns=now_ns,
                sites=_site_health(session),
                vpgs=vpgs,
                alerts=[alert_view(row) for row in alerts],
                lag_seconds_max=max(known, default=None),
                tasks_running=running or 0,
            )

    def alerts(
        self,
        who: Principal,
        enterprise: str | None = None,
        page: PageRequest = PageRequest(),
        cleared: bool = False,
    ) -> Page[Alert]:
        """List alerts, newest first: those that stand, or with `cleared` also those that stood."""
        table = tables.Alert
        wanted = select(table) if cleared else select(table).where(table.cleared_ns.is_(None))
        with self._read(who, "health.read", enterprise) as session:
            return paged(session, wanted, [table.raised_ns, table.id], page, alert_view, newest_first=True)

    def audit(
        self, who: Principal, enterprise: str | None = None, page: PageRequest = PageRequest()
    ) -> Page[AuditEntry]:
        """List mutating calls, newest first."""
        with self._read(who, "audit.read", enterprise) as session:
            return paged(session, select(tables.Audit), [tables.Audit.id], page, _audit_view, newest_first=True)

    def events(self, who: Principal, after: int, limit: int = 100) -> list[Event]:
        """Return what changed after event `after`, ascending, at most `limit`."""
        with self._read(who, "event.read", None) as session:
            wanted = select(tables.Event).where(tables.Event.number > after).order_by(tables.Event.number)
            return [_event(row) for row in session.scalars(wanted.limit(max(1, min(limit, 1000))))]

    def newest_event(self, who: Principal) -> int:
        """Return the number of the newest event that the caller may see; 0 if there is none."""
        with self._read(who, "event.read", None) as session:
            return session.scalar(select(func.max(tables.Event.number))) or 0


def _task(session: Session, task: str) -> tables.Task:
    row = session.scalars(select(tables.Task).where(tables.Task.id == task)).first()
    if row is None:
        raise missing("task", task)
    return row


def _site_health(session: Session) -> list[SiteHealth]:
    host = tables.Host
    counted = session.execute(
        select(host.enterprise, host.site, host.wanted, host.vdsa, func.count(host.name)).group_by(
            host.enterprise, host.site, host.wanted, host.vdsa
        )
    ).all()
    hosts: dict[tuple[str, str], int] = {}
    failed: dict[tuple[str, str], int] = {}
    for enterprise, site, wanted, vdsa, count in counted:
        hosts[enterprise, site] = hosts.get((enterprise, site), 0) + count
        if wanted and vdsa == "failed":
            failed[enterprise, site] = failed.get((enterprise, site), 0) + count
    rows = session.scalars(select(tables.Site).order_by(tables.Site.enterprise, tables.Site.name)).all()
    return [
        SiteHealth(
            enterprise=row.enterprise,
            site=row.name,
            connected=row.connected,
            last_seen_ns=row.last_seen_ns,
            hosts=hosts.get((row.enterprise, row.name), 0),
            hosts_failed=failed.get((row.enterprise, row.name), 0),
        )
        for row in rows
    ]


def alert_view(row: tables.Alert) -> Alert:
    """Return an alert as it is shown."""
    return Alert.model_validate({name: getattr(row, name) for name in Alert.model_fields})


def _audit_view(row: tables.Audit) -> AuditEntry:
    return AuditEntry.model_validate({name: getattr(row, name) for name in AuditEntry.model_fields})


def _event(row: tables.Event) -> Event:
    return Event.model_validate({name: getattr(row, name) for name in Event.model_fields})
