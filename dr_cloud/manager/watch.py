"""What comes in from sites and hosts: connections and reports.

A report comes every few seconds and says everything. What it says that is new is written at once, and the VPGs follow:
a disk that was added gets an index, one that was removed is retired, a server that moved is where it is now, one that
is gone makes its group say so. If nothing but its figures has changed, these alone are written, every few seconds: how
things stand is then at most that old. All of a report is written again after a while, and each time as long as a VPG
lacks something or a server is not connected, for then time alone can change how that is judged.

A report is believed only for what its sender is concerned with: a site for its own enterprise's VPGs that it is the
source or the target of, a data center's host for the scopes that were placed on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session, selectinload

from dr_cloud.manager import tables
from dr_cloud.manager.access import no_enterprise
from dr_cloud.manager.dispatch import Dispatch
from dr_cloud.manager.operations import denied, missing
from dr_cloud.manager.pairing import Pairings
from dr_cloud.manager.protect import follow_disks, known_servers, source_party
from dr_cloud.manager.publish import Party
from dr_cloud.manager.questions import connects
from dr_cloud.manager.record import Entry, append
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.manager.vpgs import judge
from dr_cloud.model.analysis import ServerAnalysis
from dr_cloud.model.replication import HostReport, SeenServer, SiteOrders, SiteReport, SourceReport, TargetReport
from dr_cloud.model.units import SECOND_NS

FIGURES_EVERY_NS: Final = 4 * SECOND_NS
"""Less than lies between two reports that tell of nothing new."""
WHOLE_EVERY_NS: Final = 30 * SECOND_NS
_Events = list[tuple[str, str, str, dict[str, Any]]]
"""(enterprise, kind, subject, data)"""


class _Written(NamedTuple):
    """What was last written of a party's reports."""

    signature: int
    figures_ns: int
    whole_ns: int
    settled: bool
    """Whether time alone changes nothing of what was judged."""


class Watch(Pairings, Dispatch):
    """What the fabric tells."""

    def _prepare_watch(self) -> None:
        self._written: dict[Party, _Written] = {}
        self._written_lock = threading.Lock()

    def site_connected(self, enterprise: str, site: str, serial: str) -> SiteOrders:
        """Note that a site has connected; return its orders.

        Raises:
            ForbiddenError: The certificate is not good.
            DeniedError: Policy forbids the site to connect; from now on its certificate is refused at the door.
        """
        self.check_certificate(enterprise, site, serial)
        question = connects(enterprise, site)
        (answer,) = self._context.desk.ask_standing([question])
        entry, now_ns = Entry("connector", f"site/{site}", question, answer), self._context.clock_ns()
        with self._database.write(enterprise) as session:
            row = session.get(tables.Site, (enterprise, site))
            if row is None:
                raise missing("site", site)
            append(session, enterprise, [entry], now_ns)
            if answer.allow:
                row.connected, row.last_seen_ns, row.denied = True, now_ns, ""
            elif answer.answered:
                row.connected, row.denied = False, "; ".join(answer.reasons)
        if not answer.allow:
            raise denied([entry])
        self._emit([(enterprise, "site", site, {"connected": True})])
        return self.orders_for(enterprise, site)

    def site_lost(self, enterprise: str, site: str) -> None:
        """Note that a site's link is gone."""
        with self._database.write(enterprise) as session:
            row = session.get(tables.Site, (enterprise, site))
            if row is None or not row.connected:
                return
            row.connected = False
        self._forget_written(Party("site", enterprise, site))
        self._emit([(enterprise, "site", site, {"connected": False})])

    def site_report(self, enterprise: str, site: str, report: SiteReport) -> None:
        """Take a site's report."""
        party = Party("site", enterprise, site)
        now_ns = self._context.clock_ns()
        news = self._news(party, report, now_ns)
        if not news or (news == "figures" and self._write_site_figures(enterprise, site, report, now_ns)):
            return
        events: _Events = []
        parties: list[Party] = []
        with self._database.write(enterprise) as session:
            if session.get(tables.Enterprise, enterprise) is None:
                raise no_enterprise(enterprise)
            row = session.get(tables.Site, (enterprise, site))
            if row is None:
                raise missing("site", site)
            if not row.connected:
                events.append((enterprise, "site", site, {"connected": True}))
            row.connected, row.last_seen_ns, row.version = True, now_ns, report.version[:255]
            row.followed_revision = report.revision
            row.problems = [problem[:1024] for problem in report.problems[:100]]
            row.datastores = sorted(set(report.datastores))
            if _take_hosts(session, enterprise, site, report.hosts, now_ns):
                parties.append(party)
                self._context.registry.touch(session, enterprise)
            _take_servers(session, enterprise, site, _seen(report.hosts), now_ns)
            session.flush()
            _take_analyses(session, enterprise, site, report.analyses, now_ns)
            for source in report.sources:
                target = _target(session, source)
                if target is not None and _vpg(session, target).source_site == site:
                    _take_source(target, source, now_ns)
            for kept in report.targets:
                target = _target(session, kept)
                if target is not None and target.site == site:
                    _take_target(target, kept, now_ns)
            wanted = select(tables.Vpg).where(tables.Vpg.source_site == site)
            changed, settled = self._follow(session, wanted, now_ns, events)
            parties += changed
        self._note_written(party, report, now_ns, settled)
        self._publish(parties)
        self._emit(events)

    def host_report(self, data_center: str, host: str, report: SiteReport) -> None:
        """Take the report of a data center's host: of its VDSA, or of one of its VDSAs."""
        party = Party("host", data_center, host)
        now_ns = self._context.clock_ns()
        news = self._news(party, report, now_ns)
        if not news:
            return
        if news == "figures":
            self._write_host_figures(data_center, host, report, now_ns)
            return
        events: _Events = []
        with self._database.write(EVERYONE) as session:
            row = session.get(tables.CenterHost, (data_center, host))
            if row is None:
                raise missing("host", host)
            row.last_seen_ns, row.followed_revision = now_ns, report.revision
            row.problem = "; ".join(problem for told in report.hosts if (problem := told.problem))[:1024]
            for source in report.sources:
                target = _target(session, source)
                if target is not None and source_party(_vpg(session, target)) == party:
                    _take_source(target, source, now_ns)
            for kept in report.targets:
                target = _target(session, kept)
                if target is not None and (target.site, target.placed_host, target.in_center) == (
                    data_center,
                    host,
                    True,
                ):
                    _take_target(target, kept, now_ns)
            here = select(tables.Vpg).where(
                tables.Vpg.source_site == data_center, tables.Vpg.source_host == host, tables.Vpg.source_in_center
            )
            self._take_center_servers(session, data_center, here, _seen(report.hosts), now_ns)
            parties, settled = self._follow(session, here, now_ns, events)
        self._note_written(party, report, now_ns, settled and not report.sources)
        self._publish(parties)
        self._emit(events)

    def _take_center_servers(
        self, session: Session, data_center: str, here: Any, seen: Sequence[SeenServer], now_ns: int
    ) -> None:
        """A server in a data center is known as the member of a VPG. Two enterprises' may have one name."""
        known = {(server.enterprise, server.name): server for server in seen}
        owned: dict[str, list[SeenServer]] = {}
        for vpg in session.scalars(here.options(selectinload(tables.Vpg.members))):
            keys = [(vpg.enterprise, member.server) for member in vpg.members]
            found = [known[key] for key in keys if key in known]
            owned.setdefault(vpg.enterprise, []).extend(found)
        for enterprise, servers in owned.items():
            _take_servers(session, enterprise, data_center, servers, now_ns)

    def _write_site_figures(self, enterprise: str, site: str, report: SiteReport, now_ns: int) -> bool:
        """Write a site's figures; False if the site is not known as connected, so that more is to be written."""
        vpg, target = tables.Vpg, tables.VpgTarget
        of_vpg = (vpg.enterprise == target.enterprise) & (vpg.name == target.vpg)
        with self._database.write(enterprise) as session:
            row = session.get(tables.Site, (enterprise, site))
            if row is None or not row.connected:
                return False
            row.last_seen_ns = now_ns
            for seen, there in ((tables.Host, tables.Host.present), (tables.Server, tables.Server.connected)):
                session.execute(update(seen).where(seen.site == site, there).values(last_seen_ns=now_ns))
            _take_analyses(session, enterprise, site, report.analyses, now_ns)
            sent = session.scalars(select(target).join(vpg, of_vpg).where(vpg.source_site == site)).all()
            _take_sources(sent, report.sources, now_ns)
            if report.targets:
                _take_targets(session.scalars(select(target).where(target.site == site)).all(), report.targets, now_ns)
        self._note_figures(Party("site", enterprise, site), now_ns)
        return True

    def _write_host_figures(self, data_center: str, host: str, report: SiteReport, now_ns: int) -> None:
        """Write the figures of a data center's host that is the source of nothing."""
        target = tables.VpgTarget
        there = (target.site == data_center) & (target.placed_host == host) & target.in_center
        with self._database.write(EVERYONE) as session:
            row = session.get(tables.CenterHost, (data_center, host))
            if row is None:
                raise missing("host", host)
            row.last_seen_ns = now_ns
            _take_targets(session.scalars(select(target).where(there)).all(), report.targets, now_ns)
        self._note_figures(Party("host", data_center, host), now_ns)

    def _follow(self, session: Session, wanted: Any, now_ns: int, events: _Events) -> tuple[list[Party], bool]:
        """Have VPGs follow what their servers are now.

        Returns:
            Whose orders change, and whether nothing is missing and every server is connected.
        """
        parties = []
        settled = True
        loads = (selectinload(tables.Vpg.members), selectinload(tables.Vpg.targets), selectinload(tables.Vpg.disks))
        session.flush()
        for vpg in session.scalars(wanted.options(*loads)).all():
            servers = known_servers(session, vpg)
            disks_changed = follow_disks(session, vpg, servers)
            if disks_changed:
                parties.append(source_party(vpg))
            status_changed = judge(session, self._context.config, vpg, now_ns)
            if status_changed:
                events.append((vpg.enterprise, "vpg", vpg.name, {"status": vpg.status, "problem": vpg.problem}))
            if disks_changed or status_changed:
                self._context.registry.touch(session, vpg.enterprise)
            settled = settled and not vpg.problem and all(server.connected for server in servers.values())
        return parties, settled

    def _publish(self, parties: list[Party]) -> None:
        if parties:
            self._context.publisher.publish(parties)
            self._context.registry.wake()

    def _emit(self, events: _Events) -> None:
        for enterprise, kind, subject, data in events:
            self._context.events.emit(enterprise, self._context.clock_ns(), [(kind, subject, data)])

    def _news(self, party: Party, report: SiteReport, now_ns: int) -> Literal["", "figures", "whole"]:
        """Return what of a report is to be written now."""
        with self._written_lock:
            written = self._written.get(party)
        if written is None or written.signature != hash(_signature(report)):
            return "whole"
        if now_ns - written.figures_ns < FIGURES_EVERY_NS and not report.analyses:
            return ""
        return "figures" if written.settled and now_ns - written.whole_ns < WHOLE_EVERY_NS else "whole"

    def _note_written(self, party: Party, report: SiteReport, now_ns: int, settled: bool) -> None:
        with self._written_lock:
            self._written[party] = _Written(hash(_signature(report)), now_ns, now_ns, settled)

    def _note_figures(self, party: Party, now_ns: int) -> None:
        with self._written_lock:
            if (written := self._written.get(party)) is not None:
                self._written[party] = written._replace(figures_ns=now_ns)

    def _forget_written(self, party: Party) -> None:
        with self._written_lock:
            self._written.pop(party, None)


def _signature(report: SiteReport) -> tuple[Any, ...]:
    """Return what of a report is worth telling at once."""
    hosts = tuple(
        (
            h.host,
            h.vdsa,
            h.problem,
            tuple((s.name, s.connected, tuple((d.name, d.size_bytes) for d in s.disks)) for s in h.servers),
        )
        for h in report.hosts
    )
    sources = tuple(
        (
            s.scope,
            s.linked,
            s.problem,
            s.paused,
            tuple(sorted(s.taps.items())),
            s.durable_ns > 0,
        )
        for s in report.sources
    )
    targets = tuple((t.scope, t.problem, t.newest_ns is None) for t in report.targets)
    return (report.revision, report.version, tuple(report.problems), tuple(report.datastores), hosts, sources, targets)


def _seen(hosts: Iterable[HostReport]) -> list[SeenServer]:
    """Return each server once: while it moves, where it is connected."""
    found: dict[str, SeenServer] = {}
    for server in (server for host in hosts for server in host.servers):
        if server.name not in found or server.connected:
            found[server.name] = server
    return list(found.values())


def _take_hosts(session: Session, enterprise: str, site: str, hosts: Sequence[HostReport], now_ns: int) -> bool:
    """Note a site's hosts; return whether there is a new one."""
    wanted = select(tables.Host).where(tables.Host.enterprise == enterprise, tables.Host.site == site)
    have = {row.name: row for row in session.scalars(wanted)}
    for row in have.values():
        row.present = False
    new = False
    for host in hosts:
        found = have.get(host.host)
        if found is None:
            new = True
            found = tables.Host(enterprise=enterprise, site=site, name=host.host, wanted=True, deployment={})
            session.add(found)
        found.present, found.vdsa, found.problem, found.last_seen_ns = True, host.vdsa, host.problem[:1024], now_ns
    return new


def _take_servers(session: Session, enterprise: str, site: str, seen: Sequence[SeenServer], now_ns: int) -> None:
    wanted = select(tables.Server).where(tables.Server.enterprise == enterprise, tables.Server.site == site)
    have = {row.name: row for row in session.scalars(wanted)}
    told = {server.name: server for server in seen}
    for name in have.keys() - told.keys():
        have[name].connected = False
    for name, server in told.items():
        row = have.get(name)
        disks = [[disk.name, disk.size_bytes] for disk in server.disks]
        if row is None:
            row = tables.Server(
                enterprise=enterprise, site=site, name=name, host=server.host, disks=disks, last_seen_ns=now_ns
            )
            session.add(row)
        row.connected = server.connected
        if server.connected:
            row.host, row.disks, row.last_seen_ns = server.host, disks, now_ns


def _target(session: Session, told: SourceReport | TargetReport) -> tables.VpgTarget | None:
    """Return the row that a report is about. To a session of another enterprise it is not there."""
    return session.get(tables.VpgTarget, tuple(told.scope))


def _vpg(session: Session, target: tables.VpgTarget) -> tables.Vpg:
    return session.get_one(tables.Vpg, (target.enterprise, target.vpg))


def _take_analyses(session: Session, enterprise: str, site: str, told: Iterable[ServerAnalysis], now_ns: int) -> None:
    for analysis in told:
        server = session.get(tables.Server, (enterprise, site, analysis.server))
        if server is not None:
            server.analysis, server.analysed_ns = analysis.model_dump(mode="json"), now_ns


def _take_sources(rows: Iterable[tables.VpgTarget], told: Iterable[SourceReport], now_ns: int) -> None:
    """Note what is told of those of `rows` that it is about."""
    known = {(row.enterprise, row.vpg, row.name): row for row in rows}
    for source in told:
        if (row := known.get(source.scope)) is not None:
            _take_source(row, source, now_ns)


def _take_targets(rows: Iterable[tables.VpgTarget], told: Iterable[TargetReport], now_ns: int) -> None:
    known = {(row.enterprise, row.vpg, row.name): row for row in rows}
    for kept in told:
        if (row := known.get(kept.scope)) is not None:
            _take_target(row, kept, now_ns)


def _take_source(row: tables.VpgTarget, told: SourceReport, now_ns: int) -> None:
    row.reported_ns, row.linked, row.problem = now_ns, told.linked, told.problem[:1024]
    row.durable_ns, row.lag_bytes = told.durable_ns, told.kept_bytes
    row.lag_seconds = told.lag_seconds if told.durable_ns else None
    row.taps = dict(told.taps)
    row.checkpoints, row.skipped, row.resyncs = told.checkpoints, told.skipped, told.resyncs


def _take_target(row: tables.VpgTarget, told: TargetReport, now_ns: int) -> None:
    row.target_reported_ns, row.target_problem = now_ns, told.problem[:1024]
    row.newest_ns, row.horizon_ns, row.journal_bytes = told.newest_ns, told.horizon_ns, told.journal_bytes
