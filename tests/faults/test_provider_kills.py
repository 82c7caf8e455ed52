"""Real processes end to end, over TLS, under load: each of them killed with -9 in turn, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import wait_until
from provider_world import CloudWorld, Server

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def world() -> Iterator[CloudWorld]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(folder)
    try:
        world.start_provider()
        world.start_site("acme")
        server = world.add_server("acme", "web")
        world.protect(server, "us-east")
        world.wait_newest(server)
        server.guest.start()
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


def writes_go_on(server: Server, count: int = 100) -> None:
    """R1: the guest does not notice."""
    before = len(server.guest.writes)
    wait_until(lambda: len(server.guest.writes) > before + count or server.guest.failures, 30)
    assert server.guest.failures == []


@pytest.mark.parametrize("killed", ["Vdsa", "Connector", "CloudManager", "RightsManager", "chicago"])
def test_killed_under_load(world: CloudWorld, killed: str) -> None:
    """Invariants 1, 2, 3: kill -9 of each process; the guest goes on, checkpoints come again, images are right."""
    (server,) = world.servers
    writes_go_on(server)
    if killed == "chicago":
        world.kill(killed)
        writes_go_on(server)
        world.start_site("acme", again=True)
    else:
        world.kill_actors(killed)
    writes_go_on(server)
    at_ns = server.guest.writes[-1].begun_ns
    world.wait_newest(server, time.time_ns())
    images = world.images(server, [at_ns])
    for served_ns, image in images.items():
        server.guest.check({"root": image}, served_ns)


def test_the_tap_killed(world: CloudWorld) -> None:
    """Invariant 2: the bitmap that the tap left says what is missing."""
    (server,) = world.servers
    server.guest.may_break = True
    world.kill("tap-acme-web")
    world.start_tap(server)
    writes_go_on(server)
    server.guest.may_break = False
    world.wait_newest(server)


def test_the_provider_killed_and_started_again(world: CloudWorld) -> None:
    """Invariant 5: kill -9 of `provider up`: Ray ends with it; started again, everything is as it was."""
    (server,) = world.servers
    api = world.api
    world.kill("provider")
    writes_go_on(server)
    world.start_provider()
    assert world.api == api
    assert "token" not in world.line
    writes_go_on(server)
    world.wait_newest(server)


def test_image_of_every_time_equals_what_was_written(world: CloudWorld) -> None:
    """R3, R14: after all of that, images at random times are those the guest remembers."""
    (server,) = world.servers
    assert len(server.guest.writes) > 1000
    world.check(server, times=5)


def test_a_second_provider_of_one_state_folder_is_refused(world: CloudWorld) -> None:
    command = [sys.executable, "-m", "dr_cloud.cli.main", "provider", "up", "-c", str(world.folder / "provider.yaml")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert "another process runs the provider" in second.stderr


def test_sigterm_ends_everything(world: CloudWorld) -> None:
    """The contract: on SIGTERM every actor ends, and Ray, and the exit code is 0."""
    pids = [pid for kind in ("CloudManager", "Connector", "Vdsa") for pid in world.actors(kind)]
    assert len(pids) >= 4
    assert world.stop("provider") == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)


def test_a_signal_to_the_whole_group_ends_everything_too(world: CloudWorld) -> None:
    """As a terminal's Ctrl-C and service managers send it: Ray's own processes are told as well."""
    world.start_provider(process_group=0)
    pids = [pid for kind in ("CloudManager", "Connector", "Vdsa") for pid in world.actors(kind)]
    os.killpg(world.running["provider"].pid, signal.SIGTERM)
    assert world.running["provider"].wait(60) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)


def test_rebuilt_from_the_store_alone(world: CloudWorld) -> None:
    """Invariant 5: the database is lost; the registry in the store fills a new one, and everything goes on."""
    (server,) = world.servers
    config = str(world.folder / "provider.yaml")
    command = [sys.executable, "-m", "dr_cloud.cli.main", "provider", "rebuild", "-c", config]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "not empty" in refused.stderr
    for path in (world.folder / "p").glob("provider.db*"):
        path.unlink()
    rebuilt = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert "acme" in rebuilt.stdout
    world.start_provider()
    server.guest.start()
    writes_go_on(server)
    world.check(server, times=2)
