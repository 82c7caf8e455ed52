"""What goes out to sites and hosts: their orders, and where the target of a scope is.

Orders are computed from the rows whenever they are asked for. The revision is read before the rest: orders may be newer
than the revision they carry, never older. What is to lie in a data center goes out with a grant, which `desk` keeps
fresh; without one it goes out too, and whoever follows the orders uses the grant that it has, as long as that lasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from dr_cloud.manager import tables
from dr_cloud.manager.operations import Operations, denied, missing
from dr_cloud.manager.orders import replicates, source_orders, target_orders
from dr_cloud.manager.placement import store_of
from dr_cloud.manager.questions import HELD, about_target, by_person, place_of_target, subject_of
from dr_cloud.manager.record import Entry
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import Route
from dr_cloud.model.errors import ConflictError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.replication import SiteOrders, TargetOrders, Throttle
from dr_cloud.model.rights import Action
from dr_cloud.rights.rights import GrantRequest

_LOADS = (selectinload(tables.Vpg.members), selectinload(tables.Vpg.targets), selectinload(tables.Vpg.disks))


class Way(NamedTuple):
    """Where a scope is, with what the grant for it needs."""

    route: Route
    request: GrantRequest | None
    """None at a site of the enterprise: its own datastores need no grant."""


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
            held = [
                (vpg, [t for t in vpg.targets if t.in_center and (t.site, t.placed_host) == (data_center, host)])
                for vpg in vpgs
            ]
            targets = [order for vpg, here_ in held for order in target_orders(vpg, here_, self._store_of)]
            requests = {
                request.scope: request
                for vpg, here_ in held
                for target in here_
                if (request := self._grant_request(vpg, target)) is not None
            }
            orders = SiteOrders(
                revision=revision,
                hosts=[host] if wanted else [],
                sources=[order for vpg in sources for order in source_orders(vpg)],
                architecture=self._context.config.architecture,
            )
        return orders.model_copy(update={"targets": self._with_grants(targets, requests)})

    def _with_grants(self, targets: Sequence[TargetOrders], requests: dict[Scope, GrantRequest]) -> list[TargetOrders]:
        """Give each its grant. One that policy forbids is left out: it is about to be stopped."""
        given = self._context.desk.grants([requests[target.scope] for target in targets])
        return [
            target.model_copy(update={"grant": grant})
            for target, (answer, grant) in zip(targets, given, strict=True)
            if grant or not answer.answered
        ]

    def _grant_request(self, vpg: tables.Vpg, target: tables.VpgTarget) -> GrantRequest | None:
        store = self._store_of(target) if target.in_center else None
        if store is None:
            return None
        (question,) = about_target(vpg, target, [Action.KEEP])
        return GrantRequest(question=question, scope=Scope(vpg.enterprise, vpg.name, target.name), store=store)

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
        """Return where the target of a scope is, for frames to flow.

        Raises:
            NotFoundError: The scope is none that is to be replicated.
            DeniedError: Policy forbids it.
        """
        with self._database.read(scope.enterprise) as session:
            vpg, target = self._find(session, scope)
            if not replicates(vpg):
                raise NotFoundError(f"{'/'.join(scope)} is not replicated", "Look at the VPG's status.")
            way = self._way(session, vpg, target)
            questions = about_target(vpg, target, HELD)
        answers = self._context.desk.ask_standing(questions)
        self._record_decisions(scope.enterprise, "frames", subject_of(scope), questions, answers)
        return self._granted([way])[0]

    def _find(self, session: Session, scope: Scope) -> tuple[tables.Vpg, tables.VpgTarget]:
        target = session.get(tables.VpgTarget, tuple(scope))
        vpg = session.get(tables.Vpg, (scope.enterprise, scope.vpg))
        if target is None or vpg is None:
            raise missing("replication", "/".join(scope))
        return vpg, target

    def _permit_reading(self, who: Principal, vpg: str, targets: Iterable[tables.VpgTarget]) -> None:
        """Go on only if the caller may read what lies at these targets. Raises `DeniedError`."""
        for target in targets if who.place is not None else ():
            question = by_person(who, Action.READ, target.enterprise, place_of_target(target), vpg)
            self._permit(target.enterprise, "read", subject_of((target.enterprise, vpg, target.name)), [question])

    def _granted(self, ways: Sequence[Way]) -> list[Route]:
        """Return the routes, with their grants. Raises `DeniedError` where policy forbids one."""
        requests = [way.request for way in ways if way.request is not None]
        given = iter(self._context.desk.grants(requests))
        routes = []
        for way in ways:
            grant = ""
            if way.request is not None:
                answer, grant = next(given)
                if answer.answered and not answer.allow:
                    raise denied([Entry("frames", subject_of(way.route.scope), way.request.question, answer)])
            routes.append(way.route.model_copy(update={"grant": grant}))
        return routes

    def _way(self, session: Session, vpg: tables.Vpg, target: tables.VpgTarget) -> Way:
        scope = Scope(target.enterprise, target.vpg, target.name)
        if not target.in_center:
            site = session.get_one(tables.Site, (target.enterprise, target.site))
            route = Route(
                scope=scope,
                kind="site",
                site=target.site,
                host=target.placed_host,
                store=target.placed_datastore,
                jurisdiction=site.jurisdiction,
            )
            return Way(route, None)
        center = self._context.config.data_center(target.site)
        request = self._grant_request(vpg, target)
        if center is None or request is None:
            raise ConflictError(
                f"the datastore of {'/'.join(scope)} is gone from {target.site}",
                "Put it back into the provider's configuration.",
            )
        route = Route(
            scope=scope,
            kind="data center",
            site=target.site,
            host=target.placed_host,
            store=request.store,
            jurisdiction=center.jurisdiction,
        )
        return Way(route, request)
