"""The same cloud in each of the four architectures: two enterprises, their sites and taps as processes, real TLS."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from e2e_world import wait_until
from provider_world import CloudWorld

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


@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("architecture", list(Architecture))
def test_tap_to_image(architecture: Architecture) -> None:
    """R12: by one word of the configuration; what was written is what is recovered, for both enterprises at once."""
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(folder, name=architecture.value, architecture=architecture.value)
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
        for server in servers:
            world.check(server, times=2)
    finally:
        world.close()
        provider.close()
        shutil.rmtree(folder, ignore_errors=True)
