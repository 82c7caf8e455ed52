"""Eight machines booted at once, from eight times of one disk: those before the damage come up, those after do not."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import probe_guest
import pytest
from e2e_world import wait_until
from probe_world import ext4
from provider_world import CloudWorld, Server

from dr_cloud.model.recovery import RecoveryTest, TestsRequest
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.probes.spec import parse_spec

pytestmark = [pytest.mark.system, pytest.mark.fuse]
DATA = bytes(range(256)) * 4096
"""What the guest looks at when it starts."""
GOOD, BAD = 5, 3


class Machine:
    """A protected server whose disk boots."""

    def __init__(self, world: CloudWorld, image: bytes) -> None:
        self.world = world
        self.data_at = image.index(DATA)
        site = world.tenants["acme"][1]
        self.server = Server(world.folder, "acme", "vm", site, world.folder / f"{site}.vdsa", 0)
        self.server.path.write_bytes(image)
        world._add(self.server)
        wait_until(lambda: "vm" in [one.name for one in world.client("acme").servers(site)], 30)
        world.protect(self.server, "us-east")
        world.wait_newest(self.server)

    def write(self, data: bytes) -> int:
        """Write over the guest's data; return a time after which nothing was written for a moment."""
        with NbdClient.connect(f"nbd+unix:///root?socket={self.server.socket}") as disk:
            disk.pwrite(self.data_at, data)
            disk.flush()
        time.sleep(0.05)
        at_ns = time.time_ns()
        time.sleep(0.05)
        return at_ns


@pytest.fixture
def machine(require_tool: Callable[[str], str]) -> Iterator[tuple[Machine, str]]:
    """A machine under protection, and the probe that boots it."""
    require_tool("qemu-system-x86_64")
    kernel = probe_guest.kernel()
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    guest = folder / "guest"
    guest.mkdir()
    image = ext4(guest / "image", probe_guest.make_root(guest), 24 << 20).read_bytes()
    initrd = probe_guest.make_initrd(guest)
    world = CloudWorld(folder)
    try:
        world.start_provider()
        world.start_site("acme")
        boot = f"boot:kernel={kernel},initrd={initrd},append=console=ttyS0 panic=-1 quiet,memory_mib=256,accel=tcg"
        yield Machine(world, image), f"{boot},reject=damaged,timeout=120"
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_machines_boot_from_eight_times_at_once(machine: tuple[Machine, str]) -> None:
    """R14.1, R14.2, R14.7: a real kernel, its root on a stack, says of each time whether its data is whole."""
    vm, boot = machine
    times = [vm.write(DATA[: 4096 * (number + 1)]) for number in range(GOOD)]
    times += [vm.write(bytes([number]) * 4096) for number in range(BAD)]
    vm.world.wait_newest(vm.server)
    client = vm.world.client("acme")
    request = TestsRequest(target="east", times_ns=times, probes=[parse_spec(boot)])
    task = vm.world.done("acme", client.start_tests("vm", request))

    def mine() -> list[RecoveryTest]:
        return sorted((t for t in client.tests("vm") if t.task == task.id), key=lambda test: test.asked_ns)

    wait_until(lambda: all(test.stopped_ns is not None for test in mine()), 240)
    tests = [client.test(test.id) for test in mine()]
    assert [test.verdict for test in tests] == ["pass"] * GOOD + ["fail"] * BAD, tests
    assert all(test.verdict_note == "boot: the console says 'damaged'" for test in tests[GOOD:])
    assert {made.path for test in tests for result in test.results for made in result.artefacts} == {
        "boot/console.txt",
        "boot/screen.png",
    }
    console = client.test_artefact(tests[0].id, "boot/console.txt")
    assert console.rstrip().endswith(b"guest login:")
