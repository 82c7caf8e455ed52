"""The search for the last clean point through a whole provider: manager, VDSA, stacks and probes as processes."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_world import MIB, wait_until
from provider_world import CloudWorld

from dr_cloud.model.errors import UnavailableError
from dr_cloud.model.recovery import CleanPoint, CleanRequest
from dr_cloud.model.task import CompletionCode
from dr_cloud.recovery.probes.spec import parse_spec

pytestmark = [pytest.mark.system, pytest.mark.fuse]
ROT = b"ROTTEN" * 512


@pytest.fixture
def world() -> Iterator[CloudWorld]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    folder.chmod(0o755)
    world = CloudWorld(folder)
    try:
        world.start_provider()
        world.start_site("acme")
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_corruption_is_found_to_the_very_write(world: CloudWorld, require_tool: Callable[[str], str]) -> None:
    """R14.2: probes on real stacks find the write; replication goes on; a manager that is killed in between goes on."""
    server = world.add_server("acme", "web")
    world.protect(server, "us-east")
    since_ns = world.wait_newest(server)
    server.guest.areas = {"root": (0, 2 * MIB)}
    server.guest.start()
    time.sleep(2)
    server.guest.stop()
    # Two blocks in one write.
    server.guest.write("root", 3 * MIB, (ROT * 3)[:8192])
    rotten = server.guest.writes[-1]
    server.guest.start()
    time.sleep(1.5)
    until_ns = world.wait_newest(server)
    look = 'd=$(mktemp) && "$0" "$DRC_DISK_WEB_ROOT_URI" "$d" && ! grep -qa ROTTENROTTEN "$d"'
    probe = parse_spec(f"command:/bin/sh -c '{look}' {require_tool('nbdcopy')}")
    client = world.client("acme")
    request = CleanRequest(since_ns=since_ns, until_ns=until_ns, probes=[probe], parallel=4)
    task = client.find_clean(server.name, request)
    wait_until(lambda: (client.task(task.id).result or {}).get("rounds"), 90)
    world.kill_actors("CloudManager")
    seen: list[CleanPoint] = []

    def ended() -> bool:
        try:
            now = client.task(task.id)
        except UnavailableError:
            return False  # the manager is not back yet
        seen[:] = [CleanPoint.model_validate(now.result)]
        assert now.completion in (CompletionCode.NOT_AVAILABLE, CompletionCode.SUCCESS), now
        return now.completion is CompletionCode.SUCCESS

    wait_until(ended, 120)
    (point,) = seen
    assert point.clean_ns is not None and point.dirty_ns is not None, point
    assert rotten.begun_ns <= point.dirty_ns <= rotten.acked_ns
    between = [write.time_ns for write in client.writes(server.name, "east", point.clean_ns, point.dirty_ns)]
    assert between == [point.clean_ns, point.dirty_ns]
    assert point.monotone and point.reason == "command: /bin/sh ends with 1"
    bound = 0
    while 5**bound < point.writes + 2:
        bound += 1
    assert len(point.rounds) <= bound
    tests = [test for test in client.tests(server.name) if test.origin == f"clean/{task.id}"]
    assert len(tests) == sum(one.tests for one in point.rounds)
    assert {test.status for test in tests} == {"stopped"}
    again = client.wait(client.find_clean(server.name, request), 60)
    assert CleanPoint.model_validate(again.result).rounds == [], "what is known is not tested again"
    world.check(server, times=1)
