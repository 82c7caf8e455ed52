"""What the manager looks at by itself, every few seconds: silence, alerts, forecasts, and what is old.

Judgements are pure (`dr_cloud.manager.health`); here rows are read, alerts are raised and cleared, and watchers told.
Each round is a few queries over whole tables, whatever the number of enterprises. A round that fails is logged, and the
next one comes: nothing is remembered between rounds but what is in the database.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

import structlog
from sqlalchemy import delete, select, update

from dr_cloud.manager import tables
from dr_cloud.manager.drills import judgements
from dr_cloud.manager.health import (
    STALE_NS,
    Judgement,
    TargetFacts,
    forecast,
    history_seconds,
    judge_denied,
    judge_link,
    judge_rights,
    judge_target,
    judge_vdsa,
    lag_now,
    promised_seconds,
)
from dr_cloud.manager.operations import Context
from dr_cloud.manager.orders import AT_REST
from dr_cloud.manager.rounds import Rounds
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import VpgStatus

ROUND_SECONDS: Final = 5.0
FORECAST_SECONDS: Final = 60.0
TIDY_SECONDS: Final = 600.0
DAY_NS: Final = 86400 * SECOND_NS
KEPT_DAYS: Final = 30
"""How long ended tasks and cleared alerts are kept. The audit log is kept for ever."""
_Key = tuple[str, str, str]
"""(enterprise, kind, subject) of an alert."""
log = structlog.get_logger(__name__)


class Monitor:
    """The rounds."""

    def __init__(self, context: Context, answers_for: Callable[[str], bool]) -> None:
        self._context = context
        self._database = context.database
        self._answers_for = answers_for
        acts = (self.note_silence, self.judge, self._seldom)
        self._rounds = Rounds("monitor", ROUND_SECONDS, acts)
        self.start, self.close = self._rounds.start, self._rounds.close
        self._due = {"forecast": 0.0, "tidy": 0.0}

    def _seldom(self) -> None:
        for name, seconds, act in (("forecast", FORECAST_SECONDS, self.forecast), ("tidy", TIDY_SECONDS, self.tidy)):
            if time.monotonic() >= self._due[name]:
                self._due[name] = time.monotonic() + seconds
                act()

    def note_silence(self) -> None:
        """Take sites for lost that have not reported: their connector may have died before it could say so."""
        now_ns = self._context.clock_ns()
        table = tables.Site
        silent = select(table.enterprise, table.name).where(table.connected, table.last_seen_ns < now_ns - STALE_NS)
        with self._database.read(EVERYONE) as session:
            found = [key for key in session.execute(silent).all() if self._answers_for(key[0])]
        for enterprise, site in found:
            with self._database.write(enterprise) as session:
                still = (table.name == site) & table.connected & (table.last_seen_ns < now_ns - STALE_NS)
                session.execute(update(table).where(still).values(connected=False))
            self._context.events.emit(enterprise, now_ns, [("site", site, {"connected": False})])

    # Alerts.

    def judge(self) -> None:
        """Raise and clear alerts."""
        now_ns = self._context.clock_ns()
        with self._database.read(EVERYONE) as session:
            rows = session.scalars(select(tables.Alert).where(tables.Alert.cleared_ns.is_(None))).all()
        standing: dict[_Key, tables.Alert] = {(row.enterprise, row.kind, row.subject): row for row in rows}
        judged: dict[_Key, Judgement] = {}
        for enterprise, judgement in self._judgements(now_ns, standing):
            judged[enterprise, judgement.kind, judgement.subject] = judgement
        for key, judgement in judged.items():
            if judgement.raised and key not in standing:
                self._raise(key, judgement, now_ns)
        for key, row in standing.items():
            if self._answers_for(row.enterprise) and (key not in judged or not judged[key].raised):
                self._clear(row, now_ns)

    def _judgements(self, now_ns: int, standing: dict[_Key, tables.Alert]) -> Iterator[tuple[str, Judgement]]:
        raised: dict[tuple[str, str], set[str]] = {}
        for enterprise, kind, subject in standing:
            raised.setdefault((enterprise, subject), set()).add(kind)
        target, vpg = tables.VpgTarget, tables.Vpg
        wanted = select(
            target.enterprise,
            target.vpg,
            target.name,
            target.reported_ns,
            target.lag_seconds,
            target.newest_ns,
            target.horizon_ns,
            target.forecast_seconds,
            target.problem,
            target.target_problem,
            target.denied,
            vpg.status,
            vpg.paused,
            vpg.created_ns,
            vpg.settings["checkpoint_seconds"].as_float().label("interval_seconds"),
            vpg.settings["history_hours"].as_float().label("history_hours"),
        ).join(vpg, (vpg.enterprise == target.enterprise) & (vpg.name == target.vpg))
        with self._database.read(EVERYONE) as session:
            targets = session.execute(wanted).all()
            sites = session.scalars(select(tables.Site)).all()
            hosts = session.scalars(select(tables.Host)).all()
            center_hosts = session.scalars(select(tables.CenterHost)).all()
            drilled = judgements(session, self._context.config.untested_days, now_ns, standing)
        for row in targets:
            if self._answers_for(row.enterprise):
                subject = f"vpg/{row.vpg}/{row.name}"
                standing_here = frozenset(raised.get((row.enterprise, subject), ()))
                for judgement in judge_target(_facts(row, subject, now_ns), standing_here):
                    yield row.enterprise, judgement
                yield row.enterprise, judge_denied(subject, row.denied)
        connected = set()
        for site in filter(lambda row: self._answers_for(row.enterprise), sites):
            if site.connected:
                connected.add((site.enterprise, site.name))
            seen_ns = now_ns if site.connected else site.last_seen_ns
            let_in = bool(site.certificate) and not site.denied
            yield site.enterprise, judge_link(f"site/{site.name}", let_in, seen_ns, now_ns)
            yield site.enterprise, judge_denied(f"site/{site.name}", site.denied)
        for host in hosts:
            # Of a site that is away nothing is known but that.
            if (host.enterprise, host.site) in connected:
                up = host.present and host.vdsa not in ("failed", "not installed")
                yield host.enterprise, judge_vdsa(f"host/{host.site}/{host.name}", host.wanted, up, host.problem)
        for center in center_hosts if self._answers_for(PROVIDER) else ():
            up = center.last_seen_ns is None or now_ns - center.last_seen_ns < STALE_NS
            yield PROVIDER, judge_vdsa(f"host/{center.data_center}/{center.name}", center.wanted, up, center.problem)
        yield from (judged for judged in drilled if self._answers_for(judged[0]))
        if self._answers_for(PROVIDER):
            state = self._context.desk.state()
            yield PROVIDER, judge_rights(state.problem if state is not None else "the rights manager does not answer")

    def _raise(self, key: _Key, judgement: Judgement, now_ns: int) -> None:
        enterprise, kind, subject = key
        with self._database.write(enterprise or EVERYONE) as session:
            if enterprise != PROVIDER and session.get(tables.Enterprise, enterprise) is None:
                return
            row = tables.Alert(
                enterprise=enterprise,
                id=uuid.uuid4().hex,
                kind=kind,
                subject=subject,
                message=judgement.message,
                remedy=judgement.remedy,
                raised_ns=now_ns,
            )
            session.add(row)
            data = {"id": row.id, "kind": kind, "raised": True, "message": judgement.message}
        self._context.events.emit(enterprise, now_ns, [("alert", subject, data)])

    def _clear(self, row: tables.Alert, now_ns: int) -> None:
        with self._database.write(row.enterprise or EVERYONE) as session:
            stored = session.get(tables.Alert, (row.enterprise, row.id))
            if stored is None:
                return
            stored.cleared_ns = now_ns
        data = {"id": row.id, "kind": row.kind, "raised": False}
        self._context.events.emit(row.enterprise, now_ns, [("alert", row.subject, data)])

    # Now and then.

    def forecast(self) -> None:
        """Tell how much history each journal will have, by the free space of its datastore."""
        target, vpg = tables.VpgTarget, tables.Vpg
        wanted = (
            select(target, vpg.settings["history_hours"].as_float())
            .join(vpg, (vpg.enterprise == target.enterprise) & (vpg.name == target.vpg))
            .where(target.in_center)
        )
        with self._database.read(EVERYONE) as session:
            rows = [(row, hours) for row, hours in session.execute(wanted).all()]
        free: dict[tuple[str, str], int | None] = {}
        rates: dict[tuple[str, str], float] = {}
        for row, _ in rows:
            place = (row.site, row.placed_datastore)
            if place not in free:
                free[place] = self._free(*place)
            seconds = history_seconds(row.newest_ns, row.horizon_ns)
            rates[place] = rates.get(place, 0.0) + (row.journal_bytes / seconds if seconds > 0 else 0.0)
        told: dict[str, list[tuple[tables.VpgTarget, float | None]]] = {}
        for row, hours in rows:
            place = (row.site, row.placed_datastore)
            seconds = history_seconds(row.newest_ns, row.horizon_ns)
            expected = forecast(seconds, promised_seconds(hours), free[place], rates[place])
            if expected != row.forecast_seconds and self._answers_for(row.enterprise):
                told.setdefault(row.enterprise, []).append((row, expected))
        for enterprise, changes in told.items():
            with self._database.write(enterprise) as session:
                for row, expected in changes:
                    stored = session.get(target, (enterprise, row.vpg, row.name))
                    if stored is not None:
                        stored.forecast_seconds = expected

    def _free(self, data_center: str, datastore: str) -> int | None:
        try:
            return self._context.fabric.free_bytes(data_center, datastore)
        except DrCloudError as error:
            log.info("monitor.free", data_center=data_center, datastore=datastore, error=str(error))
            return None

    def tidy(self) -> None:
        """Delete what is too old to matter: answers of a day ago, ended tasks and cleared alerts of a month ago."""
        if not self._answers_for(PROVIDER):
            return
        now_ns = self._context.clock_ns()
        long_ago_ns = now_ns - KEPT_DAYS * DAY_NS
        with self._database.write(EVERYONE) as session:
            for gone in (
                delete(tables.Idempotency).where(tables.Idempotency.created_ns < now_ns - DAY_NS),
                delete(tables.Pairing).where(tables.Pairing.expires_ns < now_ns - DAY_NS),
                delete(tables.Task).where(tables.Task.ended_ns < long_ago_ns),
                delete(tables.Alert).where(tables.Alert.cleared_ns < long_ago_ns),
            ):
                session.execute(gone)
        for path in (self._context.work_dir / "logs").glob("*.tar.gz"):
            if time.time() - path.stat().st_mtime > DAY_NS / SECOND_NS:
                path.unlink(missing_ok=True)


def _facts(row: Any, subject: str, now_ns: int) -> TargetFacts:
    return TargetFacts(
        subject=subject,
        replicating=not row.paused and not row.denied and VpgStatus(row.status) not in AT_REST,
        interval_seconds=row.interval_seconds,
        promised_seconds=promised_seconds(row.history_hours),
        age_seconds=(now_ns - row.created_ns) / SECOND_NS,
        lag_seconds=lag_now(row.lag_seconds, row.reported_ns, now_ns),
        history_seconds=history_seconds(row.newest_ns, row.horizon_ns),
        forecast_seconds=row.forecast_seconds,
        problem=row.problem or row.target_problem,
    )
