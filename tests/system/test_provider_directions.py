"""Enterprise → cloud, data center → data center and cloud → enterprise at once, over one provider and one link."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from e2e_world import wait_until
from provider_world import DISK_BYTES, TRADE, CloudWorld, Server
from vdsa_images import ImageReader

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.cloud import LogRequest
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def world() -> Iterator[CloudWorld]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(folder, TRADE)
    provider = world.start_provider_here()
    try:
        world.start_site("acme")
        yield world
    finally:
        world.close()
        provider.close()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def check_at_site(world: CloudWorld, server: Server) -> None:
    """The image that the site's own store holds is the disk."""
    server.guest.stop()
    assert server.guest.failures == []
    scope = Scope(server.enterprise, server.name, "east")
    keys = Keyring.open(world.folder / "p" / "keyring.json").vpg_keys(scope)
    store = open_store(f"file://{world.folder}/chicago-store")
    stopped_ns = time.time_ns()

    def newest_ns() -> int:
        try:
            return Catalogue.load(store, keys, scope).newest_ns or 0
        except DrCloudError:
            return 0

    wait_until(lambda: newest_ns() > stopped_ns, 60)
    image = bytearray(DISK_BYTES)
    for (_, block), data in (
        ImageReader(store, keys).image(Catalogue.load(store, keys, scope).plan(newest_ns())).items()
    ):
        image[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = data
    assert bytes(image) == server.path.read_bytes()


def test_all_directions_at_once(world: CloudWorld) -> None:
    """R9, R6: each server is replicated to where its VPG says; what arrives is what was written.

    Two enterprises have servers of one name on one host of a data center: each finds its own.
    """
    up = world.add_server("acme", "web")
    across = world.add_cloud_server("acme", "cloud-db", "us-east")
    back = world.add_cloud_server("acme", "cloud-app", "us-east")
    namesake = world.add_cloud_server("brit", "cloud-db", "us-east")
    world.protect(namesake, "uk-south")
    world.protect(up, "us-east")
    world.protect(across, "uk-south")
    world.protect(back, "chicago", "esx1", "local")
    for server in (up, across, namesake):
        world.wait_newest(server)
    client = world.client("acme")
    wait_until(lambda: client.vpg("cloud-app").targets[0].checkpoints > 1, 60)
    for server in world.servers:
        server.guest.start()
    wait_until(lambda: all(len(server.guest.writes) > 200 for server in world.servers))
    for server in (up, across, namesake):
        world.check(server, times=2)
    check_at_site(world, back)
    assert {vpg.name: vpg.status for vpg in client.vpgs()} == dict.fromkeys(
        ("web", "cloud-db", "cloud-app"), "Protecting"
    )


def files_in(world: CloudWorld, enterprise: str, request: LogRequest) -> dict[str, bytes]:
    client = world.client(enterprise)
    task = world.done(enterprise, client.collect_logs(request))
    with tarfile.open(fileobj=io.BytesIO(client.log_archive(task.id))) as packed:
        found = {name: packed.extractfile(name) for name in packed.getnames()}
        return {name: file.read() for name, file in found.items() if file is not None}


def test_logs_of_a_site_and_of_the_provider(world: CloudWorld) -> None:
    """R20: a site's come over its link, the provider's from its processes; no secret is in either."""
    of_site = files_in(world, "acme", LogRequest(site="chicago", core=True))
    assert b"vdsa.source" in of_site["log.jsonl"]
    assert {"about.json", "vdsa.json", "core.json"} <= set(of_site)
    of_provider = files_in(world, "-", LogRequest())
    assert b"manager.open" in of_provider["manager.jsonl"]
    assert b"link.open" in of_provider["connector+acme.jsonl"]
    assert "vdsa+us-east+h1.jsonl" in of_provider
    assert not [name for name in files_in(world, "-", LogRequest(vdsa=False)) if name.startswith("vdsa")]
    keyring = json.loads((world.folder / "p" / "keyring.json").read_text())["enterprises"]
    token = (world.folder / "p" / "admin-token").read_text().strip()
    pairing = yaml.safe_load((world.folder / "chicago.yaml").read_text())["token"]
    for text in (*of_site.values(), *of_provider.values()):
        assert not [secret for secret in (*keyring.values(), token, pairing) if secret.encode() in text]
        assert b"PRIVATE KEY" not in text


def test_unpairing_cuts_the_link_at_once(world: CloudWorld) -> None:
    """R7: a site whose certificate is revoked is out within a moment, and stays out."""
    client = world.client("acme")
    assert client.site("chicago").connected
    begun = time.monotonic()
    client.unpair("chicago")
    wait_until(lambda: "revoked" in world.log("chicago"), 10)
    assert time.monotonic() - begun < 5
    time.sleep(2)
    site = client.site("chicago")
    assert (site.connected, site.paired) == (False, False)
