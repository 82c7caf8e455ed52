"""Probes, artefacts and remote disks through a whole provider: manager, VDSA and stacks as actors."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_world import wait_until
from probe_world import loops, processes_of
from provider_world import PROVIDER, CloudWorld, Server

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.attach import attach
from dr_cloud.recovery.probes.spec import parse_spec

pytestmark = [pytest.mark.system, pytest.mark.fuse]
SECRET = "what lies on the disk of acme"


@pytest.fixture(scope="module")
def world() -> Iterator[CloudWorld]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    folder.chmod(0o755)
    east, uk = PROVIDER["data_centers"]
    west = east | {"name": "us-west", "datastores": [{"name": "ds-1", "store": "file://us-west/ds-1"}]}
    world = CloudWorld(folder, data_centers=[east | {"stacks": "*"}, uk, west])
    before = loops()
    try:
        world.start_provider()
        world.start_site("acme")
        server = world.add_server("acme", "web", copies=2)
        world.protect(server, "us-east", "h1", "ds-1", "us-west")
        world.wait_newest(server)
        yield world
    finally:
        world.close()
        assert loops() == before
        assert str(folder) not in Path("/proc/mounts").read_text()
        shutil.rmtree(folder, ignore_errors=True)


def started(world: CloudWorld, server: Server, *probes: str, times: int = 1, **more: bool) -> list[RecoveryTest]:
    """Start tests of the newest time; return them as they are once their disks are served."""
    client, newest_ns = world.client("acme"), world.newest_ns(server)
    request = TestsRequest(
        target="east", times_ns=[newest_ns] * times, probes=[parse_spec(text) for text in probes], **more
    )
    task = world.done("acme", client.start_tests(server.name, request))
    return [test for test in client.tests(server.name) if test.task == task.id]


def ended(world: CloudWorld, test: RecoveryTest) -> RecoveryTest:
    client = world.client("acme")
    wait_until(lambda: client.test(test.id).status in ("stopped", "failed"), 60)
    return client.test(test.id)


def test_a_test_with_probes_leaves_sealed_artefacts(world: CloudWorld) -> None:
    """R14.6, R14.8, R3: the verdict comes by itself; the artefact is read through API and VDSA, after the test too."""
    (server,) = world.servers
    probe = f"command:/bin/sh -c 'echo {SECRET} > $DRC_ARTEFACTS/console.txt'"
    (test,) = started(world, server, probe, "entropy:share_max=1.0")
    after = ended(world, test)
    assert after.verdict == "pass", after
    assert [result.probe for result in after.results] == ["command", "entropy"]
    client = world.client("acme")
    assert client.test_artefact(test.id, "command/console.txt") == SECRET.encode() + b"\n"
    with pytest.raises(DrCloudError):
        client.test_artefact(test.id, "command/other.txt")
    with pytest.raises(DrCloudError):
        world.client("brit").test_artefact(test.id, "command/console.txt")
    sealed = list((world.folder / "p" / "stores").rglob(f"artefacts/{test.id}/*"))
    assert len(sealed) == 1 and SECRET.encode() not in sealed[0].read_bytes()
    assert list((world.folder / "p" / "work" / "probes").glob("test-*")) == []


def test_remote_disks_with_the_credential(
    world: CloudWorld, require_tool: Callable[[str], str], tmp_path: Path
) -> None:
    """R14.4, R14.9: from the API's answer to a copy by an outside client; without `stacks` there are none."""
    (server,) = world.servers
    (test,) = started(world, server, remote=True)
    client = world.client("acme")
    credential = client.test_credential(test.id)
    texts = attach(client.test(test.id), credential, tmp_path)
    for name, text in texts.files.items():
        (tmp_path / name).write_text(text)
    (uri,) = texts.uris.values()
    subprocess.run([require_tool("nbdcopy"), uri, tmp_path / "copy"], check=True, timeout=60)
    (local,) = (uris[0] for uris in test.uris.values())
    with NbdClient.connect(local) as reader:
        assert reader.pread(0, 1 << 20) == (tmp_path / "copy").read_bytes()[: 1 << 20]
    with pytest.raises(DrCloudError):
        world.client("brit").test_credential(test.id)
    key = credential.key.splitlines()[2]
    written = [path for path in (world.folder / "p").rglob("*") if path.is_file() and "stores" not in path.parts]
    assert not [path for path in written if key.encode() in path.read_bytes()]
    world.done("acme", client.stop_test(test.id, StopTest()))
    assert subprocess.run(["nbdinfo", uri], capture_output=True, timeout=30, check=False).returncode != 0
    request = TestsRequest(target="us-west", times_ns=[world.newest_ns(server)], remote=True)
    task = client.wait(client.start_tests(server.name, request), 60)
    (refused,) = [test for test in client.tests(server.name) if test.task == task.id]
    assert refused.status == "failed" and "us-west serves no disks to other machines" in refused.problem


def test_a_killed_stack_ends_its_test_alone(world: CloudWorld) -> None:
    """R14.5, R14.7: its probe goes with it, its files are removed by the next; the other test goes on."""
    (server,) = world.servers
    tests = started(world, server, "command:sleep 300", times=2)
    probes = world.folder / "p" / "work" / "probes"

    def running() -> dict[Path, list[int]]:
        return {folder: processes_of(folder / "work") for folder in probes.glob("test-*")}

    wait_until(lambda: len(running()) == 2 and all(len(found) >= 4 for found in running().values()), 60)
    stacks = world.actors("StackActor")
    victim = next(pid for pid in stacks for found in running().values() if parent_of(found) == pid)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: sorted(bool(found) for found in running().values()) == [False, True], 20)
    client = world.client("acme")
    wait_until(lambda: sorted(client.test(test.id).status for test in tests) == ["failed", "running"], 90)
    (third,) = started(world, server, "entropy:share_max=1.0")
    assert ended(world, third).verdict == "pass"
    assert len(running()) == 1, "what the dead one left is gone"
    for test in tests:
        if client.test(test.id).status == "running":
            world.done("acme", client.stop_test(test.id, StopTest()))
    assert running() == {}


def parent_of(processes: list[int]) -> int:
    """Return the process that has started a probe's: all but the first of them have parents among themselves."""
    parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes}
    (parent,) = parents - set(processes)
    return parent
