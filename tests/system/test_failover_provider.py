"""Failover on a real provider: its servers outlive everything, stay when they are committed, vanish when not."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import MIB, wait_until
from provider_world import CloudWorld, read_disk

from dr_cloud.model.recovery import FailoverRequest, RecoveryTest
from dr_cloud.model.vpg import VpgStatus
from dr_cloud.nbd.client import NbdClient

pytestmark = pytest.mark.system


@pytest.fixture
def world() -> Iterator[CloudWorld]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(folder)
    try:
        world.start_provider()
        world.start_site("acme")
        world.protect(world.add_server("acme", "web"), "us-east")
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


def fail_over(world: CloudWorld, request: FailoverRequest = FailoverRequest()) -> RecoveryTest:
    client = world.client("acme")
    task = world.done("acme", client.failover("web", request))
    assert task.result is not None
    return client.test(task.result["test"])


def disk_of(failover: RecoveryTest) -> str:
    (uris,) = failover.uris.values()
    return uris[0]


def write(failover: RecoveryTest, offset: int, data: bytes) -> None:
    with NbdClient.connect(disk_of(failover)) as disk:
        disk.pwrite(offset, data)
        disk.flush()


def recovered(world: CloudWorld) -> list[Path]:
    return [path for path in (world.folder / "p" / "work" / "recovered").glob("*") if path.is_dir()]


def test_failover_lasts_and_stays(world: CloudWorld) -> None:
    """R10, R18: rolled back as if nothing had happened; then with the source dead: killed, restarted, promoted."""
    (server,) = world.servers
    client = world.client("acme")
    server.guest.start()
    world.wait_newest(server)
    trial = fail_over(world)
    assert trial.at_ns is not None
    server.guest.check({"root": read_disk(disk_of(trial))}, trial.at_ns)
    write(trial, 0, b"x" * MIB)
    world.done("acme", client.rollback_failover("web"))
    assert recovered(world) == []
    assert client.vpg_status("web") is VpgStatus.PROTECTING
    world.wait_newest(server)  # replication has gone on
    server.guest.may_break = True
    for name in ("tap-acme-web", world.tenants["acme"][1]):
        world.running[name].send_signal(signal.SIGKILL)
    failover = fail_over(world)
    assert failover.at_ns is not None
    image = bytearray(read_disk(disk_of(failover)))
    server.guest.check({"root": bytes(image)}, failover.at_ns)
    write(failover, MIB // 2, b"what a recovered server wrote" * 1000)
    image[MIB // 2 : MIB // 2 + 29000] = b"what a recovered server wrote" * 1000
    world.kill_actors("Recovered")
    wait_until(lambda: _reads(failover) == image, 60)
    world.running["provider"].send_signal(signal.SIGKILL)
    world.running["provider"].wait()
    world.start_provider()
    world.clients.clear()
    client = world.client("acme")
    wait_until(lambda: _reads(client.test(failover.id)) == image, 90)
    world.done("acme", client.commit_failover("web"))
    assert client.vpg_status("web") is VpgStatus.NEED_REVERSE_CONFIGURATION
    found = client.test(failover.id)
    assert (found.status, found.statistics["promoted"], found.problem) == ("running", True, "")
    (raw,) = recovered(world)[0].glob("*.raw")
    assert raw.read_bytes() == image == read_disk(disk_of(found))
    world.done("acme", client.release_failover("web"))
    assert recovered(world) == []


def _reads(failover: RecoveryTest) -> bytes | None:
    try:
        return read_disk(disk_of(failover))
    except (OSError, ValueError):
        return None
