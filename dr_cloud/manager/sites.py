"""Sites, their hosts and servers; data centers and theirs.

A host that a site reports for the first time is to have a VDSA: the enterprise has named it in its site's own
configuration. `undeploy` takes the VDSA away, `deploy` brings it back. A data center's hosts are the provider's; a
tenant sees clusters and pools, and the hosts and datastores that are in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.operations import Change, missing
from dr_cloud.manager.paging import decode_cursor, encode_cursor, paged
from dr_cloud.manager.placement import shown
from dr_cloud.manager.publish import Party
from dr_cloud.manager.rights import RightsOperations
from dr_cloud.manager.tasks import Done, Later, TaskFailedError, TaskType, view
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER
from dr_cloud.model.cloud import (
    DataCenter,
    Host,
    Page,
    PageRequest,
    Server,
    ServerDisk,
    ServerReport,
    Site,
    SiteUpdate,
    VdsaDeployment,
    VdsaState,
)
from dr_cloud.model.errors import ConflictError, NotFoundError
from dr_cloud.model.principal import Principal
from dr_cloud.model.provider import DataCenterConfig
from dr_cloud.model.replication import Throttle
from dr_cloud.model.task import Task
from dr_cloud.model.units import SECOND_NS

SILENT_NS: Final = 15 * SECOND_NS
"""Who has not reported for so long is taken for gone."""


class Sites(RightsOperations):
    """Operations on sites, hosts, servers and data centers."""

    def sites(self, who: Principal, enterprise: str, page: PageRequest = PageRequest()) -> Page[Site]:
        """List an enterprise's sites."""
        with self._read(who, "site.read", enterprise) as session:
            return paged(session, select(tables.Site), [tables.Site.name], page, site_view)

    def site(self, who: Principal, enterprise: str, site: str) -> Site:
        """Return one site."""
        with self._read(who, "site.read", enterprise) as session:
            return site_view(_site(session, enterprise, site))

    def update_site(self, who: Principal, enterprise: str, site: str, update: SiteUpdate) -> Site:
        """Change what may be changed of a site; its throttle is in force as soon as the site follows."""
        with self._change(who, "site.update", enterprise, f"site {site}") as change:
            row = _site(change.session, enterprise, site)
            for name, value in update.model_dump(exclude_none=True).items():
                setattr(row, name, value)
            change.registry = True
            if update.throttle is not None:
                change.after.append(lambda: self._tell_party(Party("site", enterprise, site)))
            return change.done(site_view(row))

    def _tell_party(self, party: Party) -> None:
        self._context.publisher.publish([party])

    # Hosts and servers of a site.

    def hosts(
        self,
        who: Principal,
        enterprise: str,
        site: str,
        vdsa: VdsaState | None = None,
        page: PageRequest = PageRequest(),
    ) -> Page[Host]:
        """List a site's hosts; with `vdsa`, those whose VDSA is in that state."""
        with self._read(who, "host.read", enterprise) as session:
            _site(session, enterprise, site)
            rows = session.scalars(select(tables.Host).where(tables.Host.site == site).order_by(tables.Host.name)).all()
            counted = (
                select(tables.Server.host, func.count(tables.Server.name))
                .where(tables.Server.site == site, tables.Server.connected)
                .group_by(tables.Server.host)
            )
            servers = {host: count for host, count in session.execute(counted).all()}
        found = [_host(row, servers.get(row.name, 0)) for row in rows]
        return _page_of_hosts([host for host in found if vdsa is None or host.vdsa == vdsa], page)

    def deploy_vdsa(self, who: Principal, enterprise: str, site: str, host: str, deployment: VdsaDeployment) -> Task:
        """Have a VDSA on a host."""
        with self._change(who, "vdsa.deploy", enterprise, f"host {site}/{host}") as change:
            row = _host_row(change.session, enterprise, site, host)
            row.wanted = True
            row.deployment = deployment.model_dump()
            change.registry = True
            inputs = {"host": host, **deployment.model_dump()}
            return change.done(view(change.task("vdsa.deploy", inputs, site=site)))

    def undeploy_vdsa(self, who: Principal, enterprise: str, site: str, host: str) -> Task:
        """Have none there. Servers of a VPG must not run on the host."""
        with self._change(who, "vdsa.undeploy", enterprise, f"host {site}/{host}") as change:
            row = _host_row(change.session, enterprise, site, host)
            protected = (
                select(tables.VpgMember.server)
                .join(
                    tables.Server,
                    (tables.Server.site == tables.VpgMember.site) & (tables.Server.name == tables.VpgMember.server),
                )
                .where(tables.Server.site == site, tables.Server.host == host)
                .limit(1)
            )
            if (server := change.session.scalars(protected).first()) is not None:
                raise ConflictError(
                    f"server {server} on {host} is protected", "Move it, or take it out of its VPG, first."
                )
            row.wanted = False
            change.registry = True
            return change.done(view(change.task("vdsa.undeploy", {"host": host}, site=site)))

    def servers(self, who: Principal, enterprise: str, site: str, page: PageRequest = PageRequest()) -> Page[Server]:
        """List the virtual servers that taps of a site have announced."""
        with self._read(who, "server.read", enterprise) as session:
            self._check_place(session, enterprise, site)
            vpgs = _vpgs_by_server(session, site)
            wanted = select(tables.Server).where(tables.Server.site == site)
            return paged(
                session, wanted, [tables.Server.name], page, lambda row: server_view(row, vpgs.get(row.name, []))
            )

    def server_report(self, who: Principal, enterprise: str, site: str, server: str) -> ServerReport:
        """Return what is known of a server, with what the analyzer infers."""
        with self._read(who, "server.read", enterprise) as session:
            row = session.get(tables.Server, (enterprise, site, server))
            if row is None:
                raise missing("server", server)
            return ServerReport(
                enterprise=enterprise,
                server=server_view(row, _vpgs_by_server(session, site).get(server, [])),
                at_ns=row.analysed_ns,
                analysis=row.analysis,
            )

    def _check_place(self, session: Session, enterprise: str, site: str) -> None:
        if self._context.config.data_center(site) is None:
            _site(session, enterprise, site)

    # Data centers.

    def data_centers(self, who: Principal, page: PageRequest = PageRequest()) -> Page[DataCenter]:
        """List the provider's data centers, as far as the caller may see them."""
        with self._read(who, "datacenter.read", None):
            pass
        found = sorted(self._context.config.data_centers, key=lambda center: center.name)
        if page.cursor is not None:
            (after,) = decode_cursor(page.cursor, [str])
            found = [center for center in found if center.name > after]
        closed = self._closed(who)
        views = [
            shown(center, to_provider=who.enterprise is None, denied=closed.get(center.name, ""))
            for center in found[: page.limit + 1]
        ]
        more = len(views) > page.limit
        return Page(
            items=views[: page.limit],
            next_cursor=encode_cursor([views[page.limit - 1].name]) if more else None,
        )

    def data_center(self, who: Principal, name: str) -> DataCenter:
        """Return one data center."""
        with self._read(who, "datacenter.read", None):
            center = self._center(name)
        return shown(center, to_provider=who.enterprise is None, denied=self._closed(who).get(name, ""))

    def _closed(self, who: Principal) -> dict[str, str]:
        """Return the data centers to which the caller's enterprise may send nothing, each with the reasons."""
        if who.enterprise is None:
            return {}
        places = self.explain(who, who.enterprise).data_centers
        return {place.data_center: "; ".join(place.reasons) for place in places if not place.open}

    def center_hosts(self, who: Principal, data_center: str, vdsa: VdsaState | None = None) -> list[Host]:
        """List a data center's hosts: for the provider's own people."""
        with self._read(who, "center.read", None) as session:
            center = self._center(data_center)
            rows = {
                row.name: row
                for row in session.scalars(
                    select(tables.CenterHost).where(tables.CenterHost.data_center == data_center)
                )
            }
            now_ns = self._context.clock_ns()
            found = [_center_host(center, host.name, rows.get(host.name), now_ns) for host in center.hosts]
        return [host for host in found if vdsa is None or host.vdsa == vdsa]

    def deploy_center_vdsa(self, who: Principal, data_center: str, host: str, deployment: VdsaDeployment) -> Task:
        """Have a VDSA on a data center's host."""
        return self._center_vdsa(who, data_center, host, deployment)

    def undeploy_center_vdsa(self, who: Principal, data_center: str, host: str) -> Task:
        """Have none there. No replica may be placed on the host, and no server of it be protected."""
        return self._center_vdsa(who, data_center, host, None)

    def _center_vdsa(self, who: Principal, data_center: str, host: str, deployment: VdsaDeployment | None) -> Task:
        with self._change(who, "center.deploy", PROVIDER, f"host {data_center}/{host}") as change:
            self._center(data_center)
            row = change.session.get(tables.CenterHost, (data_center, host))
            if row is None:
                raise missing("host", host)
            if deployment is None:
                _check_idle(change, data_center, host)
            row.wanted = deployment is not None
            row.deployment = deployment.model_dump() if deployment is not None else {}
            change.registry = True
            kind = "vdsa.deploy" if deployment is not None else "vdsa.undeploy"
            return change.done(view(change.task(kind, {"host": host, "data_center": data_center}, site=data_center)))

    def _center(self, name: str) -> DataCenterConfig:
        center = self._context.config.data_center(name)
        if center is None:
            raise missing("data center", name)
        return center

    # Tasks.

    def _register_site_tasks(self) -> None:
        self._context.tasks.register("vdsa.deploy", TaskType(lambda row: self._step_vdsa(row, wanted=True)))
        self._context.tasks.register("vdsa.undeploy", TaskType(lambda row: self._step_vdsa(row, wanted=False)))

    def _step_vdsa(self, task: tables.Task, *, wanted: bool) -> Later | Done:
        site, host = task.site or "", str(task.inputs["host"])
        in_center = "data_center" in task.inputs
        if "since_ns" not in task.state:
            task.state = {"since_ns": self._context.clock_ns()}
            if in_center and wanted:
                self._context.fabric.deploy_vdsa(site, host)
            elif in_center:
                self._context.fabric.undeploy_vdsa(site, host)
            self._tell_party(Party("host", site, host) if in_center else Party("site", task.enterprise, site))
            return Later(0.1, 0.1)
        state, problem = self._vdsa_state(task.enterprise, site, host, in_center)
        if state == ("installed" if wanted else "not installed"):
            return Done({"host": host, "vdsa": state})
        seconds = (self._context.clock_ns() - int(task.state["since_ns"])) / SECOND_NS
        if state == "failed" and seconds > 1:
            raise TaskFailedError(
                f"the VDSA of {host} has failed: {problem}", "Look at the host, then deploy it again."
            )
        if seconds > self._context.follow_seconds:
            raise TaskFailedError(
                f"after {seconds:.0f} s the VDSA of {host} is {state}", "It is done as soon as the site is connected."
            )
        return Later(0.25, 0.5)

    def _vdsa_state(self, enterprise: str, site: str, host: str, in_center: bool) -> tuple[VdsaState, str]:
        with self._database.read(EVERYONE) as session:
            if in_center:
                row = session.get(tables.CenterHost, (site, host))
                view_ = _center_host(self._center(site), host, row, self._context.clock_ns())
            else:
                view_ = _host(_host_row(session, enterprise, site, host), 0)
        return view_.vdsa, view_.problem


def site_view(row: tables.Site) -> Site:
    """Return a site as it is shown."""
    return Site(
        enterprise=row.enterprise,
        name=row.name,
        jurisdiction=row.jurisdiction,
        location=row.location,
        contact=row.contact,
        address=row.address or "",
        port=row.port or 0,
        vdsa_port=row.vdsa_port or 0,
        paired=bool(row.certificate),
        certificate=row.certificate or "",
        connected=bool(row.connected),
        last_seen_ns=row.last_seen_ns,
        version=row.version or "",
        orders_revision=row.orders_revision or 0,
        followed_revision=row.followed_revision or 0,
        throttle=Throttle.model_validate(row.throttle or {}),
        denied=row.denied or "",
    )


def server_view(row: tables.Server, vpgs: Sequence[str]) -> Server:
    """Return a server as it is shown."""
    return Server(
        site=row.site,
        name=row.name,
        host=row.host,
        connected=row.connected,
        disks=[ServerDisk(name=name, size_bytes=size) for name, size in row.disks],
        vpgs=list(vpgs),
        last_seen_ns=row.last_seen_ns,
    )


def _site(session: Session, enterprise: str, site: str) -> tables.Site:
    row = session.get(tables.Site, (enterprise, site))
    if row is None:
        raise missing("site", site)
    return row


def _host_row(session: Session, enterprise: str, site: str, host: str) -> tables.Host:
    _site(session, enterprise, site)
    row = session.get(tables.Host, (enterprise, site, host))
    if row is None:
        raise NotFoundError(f"site {site} has no host {host!r}", "Name it in the site's configuration, and connect it.")
    return row


def _host(row: tables.Host, servers: int) -> Host:
    state: VdsaState = "not installed"
    if row.vdsa == "failed" and row.wanted:
        state = "failed"
    elif row.wanted:
        state = "installed" if row.vdsa == "installed" else "installing"
    elif row.vdsa in ("installed", "removing"):
        state = "removing"
    return Host(
        site=row.site,
        name=row.name,
        vdsa=state,
        deployment=VdsaDeployment.model_validate(row.deployment or {}),
        problem=row.problem,
        servers=servers,
        last_seen_ns=row.last_seen_ns,
    )


def _center_host(center: DataCenterConfig, name: str, row: tables.CenterHost | None, now_ns: int) -> Host:
    seen = row is not None and row.last_seen_ns is not None and now_ns - row.last_seen_ns < SILENT_NS
    wanted = row is None or row.wanted
    state: VdsaState
    if wanted:
        state = "installed" if seen else "installing" if row is None or row.last_seen_ns is None else "failed"
    else:
        state = "removing" if seen else "not installed"
    return Host(
        site=center.name,
        name=name,
        vdsa=state,
        deployment=VdsaDeployment.model_validate(row.deployment if row is not None else {}),
        problem=(row.problem if row is not None else "") or ("it has not reported" if state == "failed" else ""),
        servers=0,
        last_seen_ns=row.last_seen_ns if row is not None else None,
    )


def _page_of_hosts(found: list[Host], page: PageRequest) -> Page[Host]:
    if page.cursor is not None:
        (after,) = decode_cursor(page.cursor, [str])
        found = [host for host in found if host.name > after]
    more = len(found) > page.limit
    return Page(items=found[: page.limit], next_cursor=encode_cursor([found[page.limit - 1].name]) if more else None)


def _vpgs_by_server(session: Session, site: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    wanted = select(tables.VpgMember.server, tables.VpgMember.vpg).where(tables.VpgMember.site == site)
    for server, vpg in session.execute(wanted.order_by(tables.VpgMember.vpg)).all():
        found.setdefault(server, []).append(vpg)
    return found


def _check_idle(change: Change, data_center: str, host: str) -> None:
    placed = select(tables.VpgTarget.name).where(
        tables.VpgTarget.site == data_center, tables.VpgTarget.placed_host == host, tables.VpgTarget.in_center
    )
    sources = select(tables.Vpg.name).where(tables.Vpg.source_site == data_center, tables.Vpg.source_host == host)
    if change.session.scalars(placed.limit(1)).first() or change.session.scalars(sources.limit(1)).first():
        raise ConflictError(f"replication runs through {host}", "Remove or move the VPGs that use it first.")
