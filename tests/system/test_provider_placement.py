"""Ray on several nodes, one or two for each data center: who touches an enterprise's data runs where it must."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from e2e_world import wait_until
from provider_world import PROVIDER, CloudWorld, Server
from ray.cluster_utils import Cluster

from dr_cloud.actors.cluster import Where, ask
from dr_cloud.actors.up import RunningProvider
from dr_cloud.model.errors import UnavailableError
from dr_cloud.model.recovery import TestsRequest

pytestmark = pytest.mark.system

STORE_BYTES = 80 << 20
ABROAD: dict[str, Any] = {
    "name": "apac-1",
    "jurisdiction": "APAC",
    "datastores": [{"name": "ds-1", "store": "file://apac-1/ds-1"}],
    "hosts": [{"name": "h1", "datastores": ["ds-1"]}],
}
"""A data center that has no node."""


class Nodes(NamedTuple):
    cluster: Cluster
    world: CloudWorld
    provider: RunningProvider
    server: Server

    def where(self, name: str, seconds: float = 60) -> Where:
        """Where an actor runs, once it runs."""
        found: list[Where] = []

        def look() -> bool:
            try:
                found.append(ask(self.provider.settings.placement.find(name).where.remote(), name, 5))
            except UnavailableError:
                return False
            return True

        wait_until(look, seconds)
        return found[-1]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(folder, ray=cluster.address, data_centers=[*PROVIDER["data_centers"], ABROAD])
    provider: RunningProvider | None = None
    try:
        # The first claims to be of a data center that lies elsewhere: nothing may ever run there.
        for center, jurisdiction in (("us-east", "UK"), ("us-east", "USA"), ("us-east", "USA"), ("uk-south", "UK")):
            labels = {"data-center": center, "jurisdiction": jurisdiction}
            cluster.add_node(num_cpus=0, labels=labels, object_store_memory=STORE_BYTES, wait=False)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        provider = world.start_provider_here()
        world.start_site("acme")
        server = world.add_server("acme", "web")
        world.protect(server, "us-east")
        world.wait_newest(server)
        server.guest.start()
        yield Nodes(cluster, world, provider, server)
    finally:
        world.close()
        if provider is not None:
            provider.close()
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def located(labels: Mapping[str, str]) -> tuple[str, str]:
    return labels["data-center"], labels["jurisdiction"]


def test_data_actors_run_in_their_data_center_only(nodes: Nodes) -> None:
    """R13.1: VDSAs and stacks by data center and jurisdiction, connectors by jurisdiction: Ray itself was told."""
    labels = {name: nodes.where(name).labels for name in ("vdsa/us-east/h1/", "vdsa/uk-south/h1/")}
    assert located(labels["vdsa/us-east/h1/"]) == ("us-east", "USA")
    assert located(labels["vdsa/uk-south/h1/"]) == ("uk-south", "UK")
    assert nodes.where("connector/acme").labels["jurisdiction"] == "USA"
    assert nodes.where("connector/brit").labels["jurisdiction"] == "UK"
    client = nodes.world.client("acme")
    nodes.world.done("acme", client.start_tests("web", TestsRequest(times_ns=[nodes.world.newest_ns(nodes.server)])))
    stacks = [name for name in nodes.provider.actors() if name.startswith("stack/")]
    assert stacks
    assert {located(nodes.where(name).labels) for name in stacks} == {("us-east", "USA")}


def test_where_no_node_fits_it_waits(nodes: Nodes) -> None:
    """R13.1: the VDSA of a data center without a node runs nowhere, however many nodes others have."""
    assert "vdsa/apac-1/h1/" in nodes.provider.actors()
    with pytest.raises(UnavailableError, match="has not answered"):
        ask(nodes.provider.settings.placement.find("vdsa/apac-1/h1/").where.remote(), "it", 3)
    (host,) = nodes.world.client("-").center_hosts("apac-1")
    assert host.vdsa != "installed"


def test_a_lost_nodes_actors_come_back_in_the_same_data_center(nodes: Nodes) -> None:
    """R13.1, invariants 1 to 4: a node lost under load; its VDSA comes back on the other one, and nothing is lost."""
    before = nodes.where("vdsa/us-east/h1/")
    (node,) = [node for node in nodes.cluster.worker_nodes if node.node_id == before.node]
    nodes.cluster.remove_node(node, allow_graceful=False)
    lost_ns = time.time_ns()
    wait_until(lambda: nodes.where("vdsa/us-east/h1/").node != before.node, 60)
    assert located(nodes.where("vdsa/us-east/h1/").labels) == ("us-east", "USA")
    assert nodes.where("connector/acme").labels["jurisdiction"] == "USA"
    nodes.world.wait_newest(nodes.server, lost_ns)
    nodes.world.check(nodes.server, times=2)
