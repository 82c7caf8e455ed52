"""What can be asked and changed about rights: who may go where, what a change would do, policies, the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sqlalchemy import select
from sqlalchemy.orm import Session

from dr_cloud.manager import record, tables
from dr_cloud.manager.operations import Operations
from dr_cloud.manager.paging import paged
from dr_cloud.manager.policies import view as policy_view
from dr_cloud.manager.questions import HELD
from dr_cloud.manager.standing import everything
from dr_cloud.manager.tenancy import PROVIDER
from dr_cloud.model.cloud import Page, PageRequest
from dr_cloud.model.decision import (
    Decision,
    DecisionCheck,
    EnterpriseRights,
    PlaceRight,
    PolicyChange,
    PolicyRevision,
)
from dr_cloud.model.errors import ForbiddenError, InvalidError, UnavailableError
from dr_cloud.model.principal import Principal
from dr_cloud.model.provider import DataCenterConfig
from dr_cloud.model.rights import Answer, Place, PolicySources, Question, RightsState, WhatIf


class RightsOperations(Operations):
    """Operations on rights."""

    def rights_state(self, who: Principal) -> RightsState:
        """Return how the rights manager stands."""
        with self._read(who, "rights.read", None):
            pass
        state = self._context.desk.state()
        if state is None:
            raise UnavailableError("the rights manager does not answer", "Try again.")
        return state

    def rights_matrix(self, who: Principal) -> list[EnterpriseRights]:
        """Return for each enterprise that the caller may see, to which data centers its data may go."""
        with self._read(who, "rights.read", None) as session:
            enterprises = list(session.scalars(select(tables.Enterprise).order_by(tables.Enterprise.enterprise)))
            sites = _sites(session)
        return self._explained([(row, sites.get(row.enterprise, [])) for row in enterprises])

    def explain(self, who: Principal, enterprise: str) -> EnterpriseRights:
        """Return to which data centers an enterprise's data may go, and why not to each of the others."""
        with self._read(who, "rights.read", enterprise) as session:
            row = session.get_one(tables.Enterprise, enterprise)
            sites = _sites(session)
        return self._explained([(row, sites.get(enterprise, []))])[0]

    def _explained(self, enterprises: Sequence[tuple[tables.Enterprise, list[str]]]) -> list[EnterpriseRights]:
        """Ask about every site and data center. It permits nothing, so it is not recorded."""
        centers = sorted(self._context.config.data_centers, key=lambda center: center.name)
        asked = [
            question
            for row, sites in enterprises
            for center in centers
            for site in sites
            for question in _to_center(row.enterprise, site, center)
        ]
        answers = iter(self._context.desk.ask(asked))
        found = []
        for row, sites in enterprises:
            places, revision = [], ""
            for center in centers:
                by_site: dict[str, list[Answer]] = {}
                for site in sites:
                    by_site[site] = [next(answers) for _ in _to_center(row.enterprise, site, center)]
                    revision = next((a.revision for a in by_site[site] if a.revision), revision)
                places.append(_place_right(center, by_site))
            found.append(
                EnterpriseRights(
                    enterprise=row.enterprise, jurisdiction=row.jurisdiction, revision=revision, data_centers=places
                )
            )
        return found

    # Policies.

    def policies(self, who: Principal, page: PageRequest = PageRequest()) -> Page[PolicyRevision]:
        """List the policies that were put in force, newest first."""
        table = tables.PolicyRevision
        self._check_provider(who)
        with self._read(who, "policy.read", None) as session:
            return paged(session, select(table), [table.number], page, policy_view, newest_first=True)

    def apply_policies(self, who: Principal, change: PolicyChange) -> PolicyRevision:
        """Put other policies in force. What no longer is allowed is stopped within seconds."""
        with self._change(who, "policy.apply", PROVIDER, "policies") as applied:
            sources = self._changed(change)
            row = self._context.policies.add(applied.session, sources, who.name, applied.now_ns)
            applied.registry = True
            applied.after.append(self._context.policies.tell)
            return applied.done(policy_view(row))

    def what_if(self, who: Principal, change: PolicyChange) -> list[WhatIf]:
        """Return what of all that stands a change of policies would stop or free. Nothing is changed."""
        self._check_provider(who)
        with self._read(who, "policy.read", None) as session:
            standing = everything(session)
        sources = self._changed(change)
        asked = [question for one in standing for question in one.questions]
        before = iter(self._context.desk.ask(asked))
        after = iter(self._context.desk.rights.what_if(sources, asked))
        found = []
        for one in standing:
            was = all([next(before).allow for _ in one.questions])
            answers = [next(after) for _ in one.questions]
            will = all(answer.allow for answer in answers)
            if was != will:
                found.append(
                    WhatIf(
                        kind=one.kind,
                        enterprise=one.enterprise,
                        subject=one.name,
                        before=was,
                        after=will,
                        reasons=_reasons(answers, allowed=will),
                    )
                )
        return found

    def _changed(self, change: PolicyChange) -> PolicySources:
        if change.modules is None and change.regulation is None:
            raise InvalidError("nothing is changed", "Give modules, a regulation, or both.")
        now = self._context.policies.in_force()
        return PolicySources(modules=change.modules or now.modules, regulation=change.regulation or now.regulation)

    def rights_bundle(self, who: Principal) -> tuple[str, bytes]:
        """Return (revision, the newest signed bundle)."""
        self._check_provider(who)
        with self._read(who, "policy.read", None):
            pass
        return self._context.desk.rights.bundle()

    @staticmethod
    def _check_provider(who: Principal) -> None:
        if who.enterprise is not None:
            raise ForbiddenError("this is the provider's own", "Ask the provider.")

    # The record.

    def decisions(self, who: Principal, enterprise: str | None, page: PageRequest = PageRequest()) -> Page[Decision]:
        """List an enterprise's decisions, oldest first; None: the provider's own."""
        table = tables.Decision
        with self._recorded(who, enterprise) as session:
            wanted = select(table).where(table.enterprise == (enterprise or PROVIDER))
            return paged(session, wanted, [table.number], page, record.view)

    def verify_decisions(self, who: Principal, enterprise: str | None) -> DecisionCheck:
        """Look whether a record is whole: nothing changed, removed or cut off; None: the provider's own."""
        owner = enterprise or PROVIDER
        with self._recorded(who, enterprise) as session:
            return record.check(session, owner, self._context.registry.heads(owner))

    @contextmanager
    def _recorded(self, who: Principal, enterprise: str | None) -> Iterator[Session]:
        if enterprise is None:
            self._check_provider(who)
        with self._read(who, "decision.read", enterprise) as session:
            yield session


def _sites(session: Session) -> dict[str, list[str]]:
    """Return by enterprise the names of its sites, in a session of one or of all."""
    found: dict[str, list[str]] = {}
    for row in session.execute(select(tables.Site.enterprise, tables.Site.name).order_by(tables.Site.name)).all():
        found.setdefault(row.enterprise, []).append(row.name)
    return found


def _to_center(enterprise: str, site: str, center: DataCenterConfig) -> list[Question]:
    """Return what is asked of a site and a data center: for each of its datastores, what a target is for."""
    return [
        Question(
            action=action,
            enterprise=enterprise,
            source=Place(kind="site", name=site),
            place=Place(kind="data center", name=center.name, datastore=store.name),
        )
        for store in center.datastores
        for action in HELD
    ]


def _place_right(center: DataCenterConfig, by_site: Mapping[str, Sequence[Answer]]) -> PlaceRight:
    """A data center is open to a site if one of its datastores is."""
    sources, reasons = [], []
    for site, answers in by_site.items():
        stores = [answers[n : n + len(HELD)] for n in range(0, len(answers), len(HELD))]
        useful = [store for store in stores if all(answer.allow for answer in store)]
        if useful:
            sources.append(site)
        reasons += _reasons((useful or stores)[0], allowed=bool(useful))
    return PlaceRight(
        data_center=center.name,
        jurisdiction=center.jurisdiction,
        open=bool(sources),
        sources=sources,
        reasons=list(dict.fromkeys(reasons)),
    )


def _reasons(answers: Sequence[Answer], *, allowed: bool) -> list[str]:
    return list(dict.fromkeys(reason for a in answers if a.allow is allowed for reason in a.reasons))
