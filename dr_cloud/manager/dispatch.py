"""What goes out to sites and hosts: their orders, and where the target of a scope is.

Orders are computed from the rows whenever they are asked for. The revision is read before the rest: orders may be newer
than the revision they carry, never older.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from dr_cloud.manager import tables
from dr_cloud.manager.operations import Operations, missing
from dr_cloud.manager.orders import replicates, source_orders, target_orders
from dr_cloud.manager.placement import store_of
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import Route
from dr_cloud.model.errors import ConflictError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import SiteOrders, Throttle

_LOADS = (selectinload(tables.Vpg.members), selectinload(tables.Vpg.targets), selectinload(tables.Vpg.disks))


class Dispatch(Operations):
    """Orders and routes."""

    def orders_for(self, enterprise: str, site: str) -> SiteOrders:
        """Return what a site of an enterprise is to do."""
        with self._database.read(enterprise) as session:
            row = session.get(tables.Site, (enterprise, site))
            if row is None:
                raise missing("site", site)
            hosts = select(tables.Host.name).where(tables.Host.site == site, tables.Host.wanted)
            vpgs = session.scalars(select(tables.Vpg).options(*_LOADS).order_by(tables.Vpg.name)).all()
            return SiteOrders(
                revision=row.orders_revision,
                hosts=list(session.scalars(hosts.order_by(tables.Host.name))),
                sources=[order for vpg in vpgs if vpg.source_site == site for order in source_orders(vpg)],
                targets=[
                    order
                    for vpg in vpgs
                    for order in target_orders(
                        vpg, [t for t in vpg.targets if t.site == site], lambda target: target.placed_datastore
                    )
                ],
                throttle=Throttle.model_validate(row.throttle),
                architecture=self._context.config.architecture,
            )

    def host_orders(self, data_center: str, host: str, enterprise: str | None = None) -> SiteOrders:
        """Return what the VDSA of a data center's host is to do: for all enterprises, or for one."""
        with self._database.read(enterprise if enterprise is not None else EVERYONE) as session:
            revision, wanted = self._host_revision(data_center, host)
            table = tables.Vpg
            here = (table.source_site == data_center) & (table.source_host == host)
            there = table.targets.any(
                (tables.VpgTarget.site == data_center)
                & (tables.VpgTarget.placed_host == host)
                & tables.VpgTarget.in_center
            )
            found = select(table).where((here & table.source_in_center) | there).options(*_LOADS)
            vpgs = session.scalars(found.order_by(table.enterprise, table.name)).all()
            sources = [
                vpg
                for vpg in vpgs
                if vpg.source_in_center and (vpg.source_site, vpg.source_host) == (data_center, host)
            ]
            return SiteOrders(
                revision=revision,
                hosts=[host] if wanted else [],
                sources=[order for vpg in sources for order in source_orders(vpg)],
                targets=[
                    order
                    for vpg in vpgs
                    for order in target_orders(
                        vpg,
                        [t for t in vpg.targets if t.in_center and (t.site, t.placed_host) == (data_center, host)],
                        self._store_of,
                    )
                ],
                architecture=self._context.config.architecture,
            )

    def _host_revision(self, data_center: str, host: str) -> tuple[int, bool]:
        with self._database.read(EVERYONE) as session:
            row = session.get(tables.CenterHost, (data_center, host))
        if row is None:
            raise missing("host", host)
        return row.orders_revision, row.wanted

    def _store_of(self, target: tables.VpgTarget) -> str | None:
        center = self._context.config.data_center(target.site)
        return store_of(center, target.placed_datastore) if center is not None else None

    def route(self, scope: Scope) -> Route:
        """Return where the target of a scope is; `NotFoundError` unless it is one that is to be replicated."""
        with self._database.read(scope.enterprise) as session:
            vpg, target = self._find(session, scope)
            if not replicates(vpg):
                raise NotFoundError(f"{'/'.join(scope)} is not replicated", "Look at the VPG's status.")
            return self._route(session, target)

    def _find(self, session: Session, scope: Scope) -> tuple[tables.Vpg, tables.VpgTarget]:
        target = session.get(tables.VpgTarget, tuple(scope))
        vpg = session.get(tables.Vpg, (scope.enterprise, scope.vpg))
        if target is None or vpg is None:
            raise missing("replication", "/".join(scope))
        return vpg, target

    def _route(self, session: Session, target: tables.VpgTarget) -> Route:
        scope = Scope(target.enterprise, target.vpg, target.name)
        if not target.in_center:
            site = session.get_one(tables.Site, (target.enterprise, target.site))
            return Route(
                scope=scope,
                kind="site",
                site=target.site,
                host=target.placed_host,
                store=target.placed_datastore,
                jurisdiction=site.jurisdiction,
            )
        center = self._context.config.data_center(target.site)
        store = self._store_of(target)
        if center is None or store is None:
            raise ConflictError(
                f"the datastore of {'/'.join(scope)} is gone from {target.site}",
                "Put it back into the provider's configuration.",
            )
        return Route(
            scope=scope,
            kind="data center",
            site=target.site,
            host=target.placed_host,
            store=store,
            jurisdiction=center.jurisdiction,
        )
