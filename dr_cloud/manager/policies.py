"""What the rights manager decides by: policies in force, from the database, and facts, from registry and configuration.

The rows are the truth. They are put to the rights manager at the start, after each change, and again whenever it is
found to want something else than it was last told: it may have lost its state, or a call to it may have been lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.record import Entry, append
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER, Database
from dr_cloud.model.decision import PolicyRevision
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.model.rights import Answer, DataCenterFacts, EnterpriseFacts, Facts, PolicySources, RightsState
from dr_cloud.rights.regulation import load_policies
from dr_cloud.rights.rights import Rights

log = structlog.get_logger(__name__)


class Policies:
    """See the module's docstring. May be used from any thread."""

    def __init__(
        self,
        database: Database,
        config: ProviderConfig,
        rights: Rights,
        clock_ns: Callable[[], int],
    ) -> None:
        """Keep the policies of a provider."""
        self._database = database
        self._config = config
        self._rights = rights
        self._clock_ns = clock_ns
        self._told = ""
        """The revision that the rights manager was to have."""
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Tell the rights manager all; at the very first start, put the configured policies in force.

        If it is away, that is left to `reconcile`. Raises `InvalidError` if the policies cannot be used.
        """
        try:
            self._begin()
        except UnavailableError as error:
            log.warning("policies.untold", error=str(error))

    def _begin(self) -> None:
        self.tell()
        with self._database.read(EVERYONE) as session:
            if newest(session) is not None:
                return
        with self._database.write(EVERYONE) as session:
            folder = self._config.rights.policies
            sources = load_policies(folder) if folder is not None else load_policies()
            self.add(session, sources, "the provider itself", self._clock_ns())
        self.tell()

    def add(self, session: Session, sources: PolicySources, by: str, at_ns: int) -> tables.PolicyRevision:
        """Put policies in force: the row, its record, and the rights manager, which may refuse them.

        After the commit call `tell`. If there is none, `reconcile` puts back what was in force.

        Raises:
            InvalidError: They do not compile; the transaction must be rolled back.
            UnavailableError: The rights manager is away; likewise.
        """
        before = newest(session)
        number = before.number + 1 if before is not None else 1
        row = tables.PolicyRevision(
            number=number, at_ns=at_ns, by=by, revision="", sources=sources.model_dump(mode="json", by_alias=True)
        )
        with self._lock:
            row.revision = self._rights.put_sources(sources)
        session.add(row)
        put = Answer(allow=True, reasons=[f"put in force by {by}"], revision=row.revision)
        append(session, PROVIDER, [Entry("policies", f"policies/{number}", None, put)], at_ns)
        return row

    def tell(self) -> None:
        """Tell the rights manager policies and facts as they are. Raises `UnavailableError`."""
        with self._lock:
            with self._database.read(EVERYONE) as session:
                row = newest(session)
                facts = facts_of(session, self._config)
            self._told = self._rights.put_facts(facts)
            if row is not None:
                self._told = self._rights.put_sources(view(row).sources)

    def tell_facts(self) -> None:
        """Tell it the facts: they have changed. Raises `UnavailableError`."""
        with self._lock:
            with self._database.read(EVERYONE) as session:
                facts = facts_of(session, self._config)
            self._told = self._rights.put_facts(facts)

    def reconcile(self, state: RightsState) -> None:
        """Tell it again, if it wants something else than it was told."""
        if state.wanted != self._told:
            try:
                self._begin()
            except DrCloudError as error:
                log.warning("policies.untold", error=str(error))

    def in_force(self) -> PolicySources:
        """Return policies and regulation that are in force."""
        with self._database.read(EVERYONE) as session:
            row = newest(session)
        if row is None:
            raise UnavailableError("no policies are in force yet", "Try again when the provider has started.")
        return view(row).sources


def newest(session: Session) -> tables.PolicyRevision | None:
    """Return the row of the policies that are in force."""
    table = tables.PolicyRevision
    return session.scalars(select(table).order_by(table.number.desc()).limit(1)).first()


def view(row: tables.PolicyRevision) -> PolicyRevision:
    """Return it as it is shown."""
    return PolicyRevision(
        number=row.number,
        at_ns=row.at_ns,
        by=row.by,
        revision=row.revision,
        sources=PolicySources.model_validate(row.sources),
    )


def facts_of(session: Session, config: ProviderConfig) -> Facts:
    """Return what the provider is made of, in a session that sees everyone."""
    sites: dict[str, dict[str, str]] = {}
    for row in session.execute(select(tables.Site.enterprise, tables.Site.name, tables.Site.jurisdiction)).all():
        sites.setdefault(row.enterprise, {})[row.name] = row.jurisdiction
    return Facts(
        data_centers={
            center.name: DataCenterFacts(
                jurisdiction=center.jurisdiction,
                keys=center.keys or center.jurisdiction,
                datastores={store.name: store.jurisdiction or center.jurisdiction for store in center.datastores},
            )
            for center in config.data_centers
        },
        enterprises={
            row.enterprise: EnterpriseFacts(
                jurisdiction=row.jurisdiction, owner=row.owner, sites=sites.get(row.enterprise, {})
            )
            for row in session.scalars(select(tables.Enterprise))
        },
    )
