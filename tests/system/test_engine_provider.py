"""Recovery tests with probes on a real provider: real disks, real probes, and what is killed in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from e2e_world import MIB, wait_until
from provider_world import DISK_BYTES, CloudWorld, Server

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest
from dr_cloud.model.vpg import VpgStatus
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.probes.spec import parse_spec

pytestmark = [pytest.mark.system, pytest.mark.fuse]
SIZES = 'for u in $(env | sed -n "s/^DRC_DISK_.*_URI=//p"); do test $(nbdinfo --size $u) = 4194304 || exit 1; done'


@pytest.fixture(scope="module")
def world() -> Iterator[CloudWorld]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(folder)
    try:
        world.start_provider()
        world.start_site("acme")
        server = world.add_server("acme", "web")
        world.protect(server, "us-east")
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


def write(server: Server, data: bytes) -> None:
    """Write through the tap, as a guest does."""
    with NbdClient.connect(f"nbd+unix:///root?socket={server.socket}") as disk:
        for offset in range(0, len(data), MIB):
            disk.pwrite(offset, data[offset : offset + MIB])
        disk.flush()


def begin(world: CloudWorld, times_ns: Sequence[int], *probes: str, **more: object) -> list[RecoveryTest]:
    """Start tests of `web`; return them when their stacks are open."""
    client = world.client("acme")
    specs = [parse_spec(text) for text in probes]
    request = TestsRequest.model_validate({"times_ns": list(times_ns), "probes": specs} | more)
    task = world.done("acme", client.start_tests("web", request))
    return sorted((t for t in client.tests("web") if t.task == task.id), key=lambda test: test.asked_ns)


def ended(world: CloudWorld, test: RecoveryTest, seconds: float = 60) -> RecoveryTest:
    client = world.client("acme")
    try:
        wait_until(lambda: client.test(test.id).stopped_ns is not None, seconds)
    except AssertionError:
        raise AssertionError(f"{client.test(test.id)}\n{world.said()}") from None
    return client.test(test.id)


def left_behind(world: CloudWorld) -> list[Path]:
    """Return what probes have left on the node."""
    return [path for path in (world.folder / "p").rglob("test-*") if "probes" in path.parts]


def running(words: bytes) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == words:
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def test_probes_say_of_every_time_how_the_disks_were(world: CloudWorld, tmp_path: Path) -> None:
    """R14.2, R14.3, R14.7: a file system that is encrypted at one moment: before it tests pass, after it they fail."""
    (server,) = world.servers
    image = tmp_path / "ext4"
    image.write_bytes(bytes(DISK_BYTES))
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    write(server, image.read_bytes())
    good_ns = world.wait_newest(server)
    between_ns = time.time_ns()
    write(server, os.urandom(2 * MIB))
    bad_ns = world.wait_newest(server)
    tests = begin(world, [good_ns, between_ns, bad_ns], "fsck", "entropy", f"command:/bin/sh -c '{SIZES}'")
    found = [ended(world, test) for test in tests]
    assert [test.verdict for test in found] == ["pass", "pass", "fail"], found
    assert [[result.verdict for result in test.results] for test in found] == [
        ["pass"] * 3,
        ["pass"] * 3,
        ["fail", "fail", "pass"],
    ]
    assert "it looks encrypted" in found[2].results[1].reason
    assert found[2].verdict_note == f"fsck: {found[2].results[0].reason}"
    assert all(test.ended == "its probes have ended" for test in found)
    assert [test.rto_seconds is None for test in found] == [False, False, True]
    assert all(test.statistics["blocks_read"] for test in found)
    assert world.client("acme").vpg_status("web") is VpgStatus.PROTECTING
    assert left_behind(world) == []


def test_a_stack_that_is_killed_and_a_test_that_is_stopped_end_alone(world: CloudWorld) -> None:
    """R14.7: a summary of each; nothing of their probes is left."""
    (server,) = world.servers
    client, newest_ns = world.client("acme"), world.newest_ns(server)
    others = set(world.actors("StackActor"))
    (last,) = begin(world, [newest_ns])
    others |= set(world.actors("StackActor"))
    tests = begin(world, [newest_ns] * 2, "command:/bin/true", "command:/bin/sleep 77.25")
    wait_until(lambda: all(len(client.test(test.id).results) == 1 for test in tests), 60)
    wait_until(lambda: len(running(b"/bin/sleep\x0077.25\x00")) == 2, 30)
    os.kill((set(world.actors("StackActor")) - others).pop(), signal.SIGKILL)
    wait_until(lambda: any(client.test(test.id).status == "failed" for test in tests), 60)
    (killed,) = [test for test in (client.test(test.id) for test in tests) if test.status == "failed"]
    assert (killed.verdict, killed.ended) == ("fail", "its stack has died")
    (stopped,) = (test for test in tests if test.id != killed.id)
    world.done("acme", client.stop_test(stopped.id, StopTest()))
    found = client.test(stopped.id)
    assert (found.status, found.verdict) == ("stopped", "fail")
    assert found.verdict_note == "stopped before its probes had ended"
    assert [result.verdict for result in found.results] == ["pass"]
    assert client.test(last.id).status == "running"
    assert client.vpg_status("web") is VpgStatus.TEST
    world.done("acme", client.stop_test(last.id, StopTest(verdict="pass")))
    assert client.test(last.id).verdict == "pass"
    assert client.vpg_status("web") is VpgStatus.PROTECTING
    wait_until(lambda: not running(b"/bin/sleep\x0077.25\x00"), 20)


def test_a_manager_that_is_killed_in_the_middle_goes_on(world: CloudWorld) -> None:
    """Tests outlive their manager; what it was doing for them goes on."""
    (server,) = world.servers
    client = world.client("acme")
    (test,) = begin(world, [world.newest_ns(server)], "command:/bin/sleep 6", "command:/bin/true")
    world.kill_actors("CloudManager")

    def answers() -> bool:
        try:
            return client.test(test.id).id == test.id
        except DrCloudError:
            return False

    wait_until(answers, 60)
    found = ended(world, test)
    assert (found.verdict, found.ended, len(found.results)) == ("pass", "its probes have ended", 2)


def test_a_test_ends_when_its_time_is_over(world: CloudWorld) -> None:
    (server,) = world.servers
    (test,) = begin(world, [world.newest_ns(server)], lifetime_seconds=10)
    assert test.expires_ns is not None
    found = ended(world, test, 30)
    assert (found.status, found.ended, found.verdict) == ("stopped", "its time is over", None)
    assert found.stopped_ns is not None
    assert -1e9 < found.stopped_ns - test.expires_ns < 5e9


def test_a_disk_that_is_full_ends_one_test(world: CloudWorld) -> None:
    """R14.5: a quota that is spent ends the test that spent it, with a summary."""
    (server,) = world.servers
    tests = begin(world, [world.newest_ns(server)] * 2, quota_bytes=MIB)
    (uris,) = tests[0].uris.values()
    with NbdClient.connect(uris[0]) as disk, pytest.raises(OSError, match="quota"):
        for offset in range(0, DISK_BYTES, 1 << 16):
            disk.pwrite(offset, os.urandom(1 << 16))
    found = ended(world, tests[0])
    assert (found.status, found.ended) == ("failed", "it can write no more")
    assert found.statistics["written_bytes"] == MIB
    client = world.client("acme")
    assert client.test(tests[1].id).status == "running"
    world.done("acme", client.stop_test(tests[1].id, StopTest()))
