"""Where a replica is put: pure choices over a data center's configuration.

A tenant names a host or a cluster, a datastore or a pool. Clusters and pools hide what they are made of: a host that is
in a cluster, or a datastore that is in a pool, cannot be named by a tenant. The host is the one with the fewest
scopes among those that reach a datastore that will do; the datastore is the one of these with the fewest bytes. Ties
go to the first name, so that the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dr_cloud.model.cloud import DataCenter, Place
from dr_cloud.model.errors import InvalidError, NotFoundError
from dr_cloud.model.provider import DataCenterConfig


@dataclass(frozen=True)
class Load:
    """What a data center carries already."""

    scopes: Mapping[str, int] = field(default_factory=dict)
    """By host."""
    bytes: Mapping[str, int] = field(default_factory=dict)
    """By datastore."""


def shown(center: DataCenterConfig, *, to_provider: bool, denied: str = "") -> DataCenter:
    """Return the data center as far as the caller may see it; `denied`: why it is closed to the caller."""
    clustered = {host for cluster in center.clusters for host in cluster.hosts}
    pooled = {store for pool in center.pools for store in pool.datastores}
    hosts = [Place(name=host.name, kind="host") for host in center.hosts if to_provider or host.name not in clustered]
    hosts += [
        Place(name=cluster.name, kind="cluster", members=cluster.hosts if to_provider else [])
        for cluster in center.clusters
    ]
    stores = [
        Place(name=store.name, kind="datastore")
        for store in center.datastores
        if to_provider or store.name not in pooled
    ]
    stores += [Place(name=p.name, kind="pool", members=p.datastores if to_provider else []) for p in center.pools]
    return DataCenter(
        name=center.name,
        jurisdiction=center.jurisdiction,
        location=center.location,
        contact=center.contact,
        hosts=hosts,
        datastores=stores,
        denied=denied,
    )


def choose(
    center: DataCenterConfig,
    host: str,
    datastore: str,
    load: Load,
    *,
    to_provider: bool,
    closed: Collection[str] = (),
) -> tuple[str, str]:
    """Return (host, datastore) for a target; of a pool no datastore that is `closed`, while there is another.

    Raises:
        NotFoundError: The data center has no such place, or none that the caller may name.
        InvalidError: No host of the one reaches a datastore of the other.
    """
    view = shown(center, to_provider=to_provider)
    for kind, name, places in (
        ("host or cluster", host, view.hosts),
        ("datastore or pool", datastore, view.datastores),
    ):
        if name not in {place.name for place in places}:
            offered = ", ".join(place.name for place in places) or "none"
            raise NotFoundError(f"{center.name} has no {kind} {name!r}", f"Choose one of: {offered}.")
    hosts = next((cluster.hosts for cluster in center.clusters if cluster.name == host), [host])
    stores = behind(center, datastore)
    stores = [store for store in stores if store not in closed] or stores
    reach = {h.name: [store for store in h.datastores if store in stores] for h in center.hosts if h.name in hosts}
    able = [name for name, reached in reach.items() if reached]
    if not able:
        raise InvalidError(f"{host} does not reach {datastore} in {center.name}", "Choose another host or datastore.")
    chosen = min(able, key=lambda name: (load.scopes.get(name, 0), name))
    return chosen, min(reach[chosen], key=lambda name: (load.bytes.get(name, 0), name))


def behind(center: DataCenterConfig, datastore: str) -> list[str]:
    """Return the datastores that a name stands for: a pool's, or itself."""
    return next((pool.datastores for pool in center.pools if pool.name == datastore), [datastore])


def store_of(center: DataCenterConfig, datastore: str) -> str | None:
    """Return the URL of a datastore's object store; None if the data center has it no more."""
    return next((store.store for store in center.datastores if store.name == datastore), None)
