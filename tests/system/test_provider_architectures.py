"""The same cloud in each of the four architectures: two enterprises, their sites and taps as processes, real TLS."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from e2e_world import wait_until
from provider_world import TRADE, CloudWorld, Server

from dr_cloud.actors.cluster import ask
from dr_cloud.actors.up import RunningProvider
from dr_cloud.model.provider import Architecture

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=128 << 20,
    )  # fmt: skip
    yield
    ray.shutdown()


EXPECTED = {
    Architecture.PAIRED_CONNECTORS: {"manager", "connector/acme", "connector/brit", "vdsa/us-east/h1/"},
    Architecture.CLOUD_CONNECTOR: {"manager", "connector/acme", "connector/brit", "vdsa/us-east/h1/"},
    Architecture.MANAGER_PER_ENTERPRISE: {"manager", "connector/acme", "connector/brit", "vdsa/us-east/h1/"},
    Architecture.VDSA_PER_ENTERPRISE: {"manager", "vdsa/us-east/h1/acme", "vdsa/us-east/h1/brit"},
}


def links(provider: RunningProvider, enterprise: str) -> int:
    """How many connections an enterprise's door has."""
    port = int(provider.ready.links[enterprise].rpartition(":")[2].partition("/")[0])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(1 for row in rows if row[3] == "01" and int(row[1].partition(":")[2], 16) == port)


def check_apart(world: CloudWorld, provider: RunningProvider, other: Server) -> None:
    """What is one enterprise's own may hang: the other's checkpoints and calls go on (R12)."""
    placement = provider.settings.placement
    own = [name for name in ("connector/acme", "vdsa/us-east/h1/acme") if name in provider.actors()]
    pids = [ask(placement.find(name).where.remote(), name).pid for name in own]
    with ThreadPoolExecutor(1) as threads:
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            call = threads.submit(world.client("acme").vpg, "web")
            world.wait_newest(other)
            assert world.client("brit").vpg("web").name == "web"
            assert call.done() != provider.settings.manager_per_enterprise, "whose control carried it out?"
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        assert call.result(60).enterprise == "acme"


@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("architecture", list(Architecture))
def test_tap_to_image(architecture: Architecture) -> None:
    """R12: by one word of the configuration; what was written is what is recovered, for both enterprises at once."""
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(folder, TRADE, name=architecture.value, architecture=architecture.value)
    provider = world.start_provider_here()
    try:
        for enterprise in ("acme", "brit"):
            world.start_site(enterprise)
        servers = [world.add_server(enterprise, "web") for enterprise in ("acme", "brit")]
        for server in servers:
            world.protect(server, "us-east")
        for server in servers:
            world.wait_newest(server)
            server.guest.start()
        wait_until(lambda: all(len(server.guest.writes) > 300 for server in servers))
        time.sleep(1)
        assert set(provider.actors()) >= EXPECTED[architecture]
        alone = architecture is not Architecture.PAIRED_CONNECTORS
        assert links(provider, "acme") == (2 if alone else 1), "control, and each VPG on its own where not gathered"
        check_apart(world, provider, servers[1])
        for server in servers:
            world.check(server, times=2)
    finally:
        world.close()
        provider.close()
        shutil.rmtree(folder, ignore_errors=True)
