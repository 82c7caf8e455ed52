"""Telling those who follow orders that there are new ones.

A *party* follows orders: a site of an enterprise, or a host of a data center. Its orders are computed from the rows
when they are asked for; only their revision is stored. It is raised here, after the change was committed; then the
party is told to fetch. A crash in between is made good at the start, when every party's revision is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.fabric import Fabric
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER, Database
from dr_cloud.model.errors import DrCloudError

log = structlog.get_logger(__name__)


class Party(NamedTuple):
    """Someone who follows orders."""

    kind: Literal["site", "host"]
    owner: str
    """The enterprise, or the data center."""
    name: str
    """The site, or the host."""


Follower = tables.Site | tables.CenterHost


def find(session: Session, party: Party) -> Follower | None:
    """Return the party's row, in a session that may see it."""
    if party.kind == "site":
        return session.get(tables.Site, (party.owner, party.name))
    return session.get(tables.CenterHost, (party.owner, party.name))


class Publisher:
    """Raises revisions, and has parties told."""

    def __init__(self, database: Database, fabric: Fabric) -> None:
        self._database = database
        self._fabric = fabric

    def publish(self, parties: Iterable[Party]) -> dict[Party, int]:
        """Raise the revision of each party and have it told; return the new revisions (not of those who are gone)."""
        revisions = {}
        with self._database.write(EVERYONE) as session:
            for party in sorted(set(parties)):
                row = find(session, party)
                if row is not None:
                    row.orders_revision += 1
                    revisions[party] = row.orders_revision
        for party in revisions:
            self._tell(party)
        return revisions

    def publish_all(self, answers_for: Callable[[str], bool]) -> None:
        """Do so for everyone that this process answers for: at the start."""
        with self._database.read(EVERYONE) as session:
            sites = session.execute(select(tables.Site.enterprise, tables.Site.name)).all()
            hosts = session.execute(select(tables.CenterHost.data_center, tables.CenterHost.name)).all()
        parties = [Party("site", enterprise, name) for enterprise, name in sites if answers_for(enterprise)]
        if answers_for(PROVIDER):
            parties += [Party("host", data_center, name) for data_center, name in hosts]
        self.publish(parties)

    def waiting_for(self, needs: Iterable[tuple[Party, int]]) -> list[str]:
        """Return, in words, who does not yet follow the revision it should."""
        waiting = []
        with self._database.read(EVERYONE) as session:
            for party, revision in needs:
                row = find(session, party)
                if row is None or row.followed_revision >= revision:
                    continue
                away = isinstance(row, tables.Site) and not row.connected
                state = "is not connected" if away else "has not yet followed its orders"
                waiting.append(f"{party.kind} {party.name} {state}")
        return waiting

    def _tell(self, party: Party) -> None:
        try:
            if party.kind == "site":
                self._fabric.orders_changed(party.owner, party.name)
            else:
                self._fabric.host_orders_changed(party.owner, party.name)
        except DrCloudError as error:  # it fetches its orders when it comes back
            log.info("publish.away", party="/".join(party), error=str(error))
