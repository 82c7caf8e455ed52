"""The walls around a probe: whatever it does, it fails alone, in time, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import probe_plugin
import pytest
from probe_world import MIB, World, command_of, ext4, loops, processes_of, run, sparse, wait_until, world

from dr_cloud.model.probe import ProbeLimits, ProbeResult
from dr_cloud.recovery.probes.runner import run_probes
from dr_cloud.recovery.probes.spec import parse_spec

__all__ = ["world"]
pytestmark = [pytest.mark.system, pytest.mark.fuse]


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plug-in"
    folder.mkdir()
    probe_plugin.install(folder)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(autouse=True)
def nothing_left(world: World) -> Iterator[None]:
    before = loops()
    yield
    assert processes_of(world.work) == []
    assert wait_until(lambda: loops() == before)
    assert list(world.work.glob(".*")) == []


@pytest.fixture(scope="module")
def disk(world: World) -> str:
    tree = world.folder / "tree"
    tree.mkdir()
    return ext4(world.images / "disk", tree).name


def test_a_probe_that_hangs_and_hides_is_ended(world: World, disk: str) -> None:
    """R14.7: a time-out is a failed test; daemons, mounts and loop devices go with it."""
    done = threading.Event()
    seen = 0

    def watch() -> None:
        nonlocal seen
        while not done.wait(0.05):
            seen = max(seen, len(processes_of(world.work)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = world.probe("hangs:timeout=4", disk)
    done.set()
    watcher.join()
    assert result.reason == "no verdict within 4 s"
    assert "hanging" in result.output
    assert 4 <= result.seconds < 9
    assert seen >= 7  # keeper, process 1, probe, layer, nbdfuse, and those that hide


def test_a_probe_that_answers_takes_its_programs_with_it(world: World, disk: str) -> None:
    result = world.probe("leaves", disk)
    assert result.passed
    assert result.seconds < 15


def test_a_crash_is_a_failed_test_with_the_reason(world: World, disk: str) -> None:
    """R14.7: and the probes after it run."""
    specs = [parse_spec(text) for text in ("raises", "killed", "command:/bin/true")]
    raised, killed, last = run_probes(specs, {disk: world.uri(disk)}, world.work)
    assert raised.reason == "the probe crashed: ZeroDivisionError: integer division or modulo by zero"
    assert "Traceback" in raised.output
    assert killed.reason == "the probe crashed: killed by SIGSEGV"
    assert last.passed


def test_a_flood_of_output_is_cut(world: World, disk: str) -> None:
    """Neither the runner's memory nor the probe's time is taken by it; beginning and end are told."""
    result = world.probe("command:/bin/sh -c 'echo first; yes | head -c 30000000; echo last'", disk)
    assert result.passed
    assert result.output_cut
    assert len(result.output) < 66_000
    assert "first" in result.output
    assert result.output.endswith("last\n")
    endless = run_probes(
        [parse_spec("command:yes").model_copy(update={"timeout_seconds": 3})],
        {disk: world.uri(disk)},
        world.work,
    )[0]
    assert (endless.verdict, endless.reason, endless.output_cut) == ("fail", "no verdict within 3 s", True)


@pytest.mark.parametrize(
    ("what", "said"), [("memory", "MemoryError"), ("file", "File too large"), ("processes", "BlockingIOError")]
)
def test_limits_hold(world: World, disk: str, what: str, said: str) -> None:
    limits = ProbeLimits(memory_bytes=768 * MIB, scratch_bytes=3 * MIB, processes=20)
    (result,) = run_probes([parse_spec(f"eats:what={what}")], {disk: world.uri(disk)}, world.work, limits)
    assert not result.passed
    assert said in result.reason
    assert run_probes([parse_spec(f"eats:what={what}")], {disk: world.uri(disk)}, world.work)[0].passed


def test_the_layer_is_bounded(world: World, disk: str) -> None:
    """What a probe writes on a disk counts: it gets an I/O error, and the stack nothing of it."""
    limits = ProbeLimits(scratch_bytes=4 * MIB)
    spec = parse_spec("command:/bin/sh -c 'head -c 20000000 /dev/zero | tr \"\\0\" x | nbdcopy - $DRC_DISK_DISK_URI'")
    (result,) = run_probes([spec], {disk: world.uri(disk)}, world.work, limits)
    assert not result.passed
    assert "No space left" in result.output or "File too large" in result.output or "error" in result.output
    assert run_probes([spec], {disk: world.uri(disk)}, world.work)[0].passed


def test_secrets_and_the_network_stay_outside(world: World, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DR_CLOUD_TOKEN", "very-secret")
    result = world.probe("command:/bin/sh -c 'env; cat /proc/1/environ; ls /proc; cat /proc/net/dev'", disk)
    assert "very-secret" not in result.output
    assert str(os.getpid()) not in result.output.split()
    assert "/proc/1/environ: Permission denied" in result.output
    assert [line.split()[0] for line in result.output.splitlines() if line.count(": ") and "0" in line] == ["lo:"]
    assert world.probe("look", disk).reason == "[True, [], [0, 1, 2, 3], True, 1]"


def test_stopped_in_the_middle(world: World, disk: str) -> None:
    stop = threading.Event()
    found: list[ProbeResult] = []
    specs = [parse_spec("hangs"), parse_spec("fsck")]
    runner = threading.Thread(
        target=lambda: found.extend(run_probes(specs, {disk: world.uri(disk)}, world.work, stop=stop))
    )
    runner.start()
    assert wait_until(lambda: len(processes_of(world.work)) > 6)
    stop.set()
    runner.join(5)
    assert [result.reason for result in found] == ["stopped", "stopped before it began"]


@pytest.fixture(scope="module")
def xfs_disk(world: World, require_tool: Callable[[str], str]) -> str:
    require_tool("mkfs.xfs")
    run("mkfs.xfs", "-q", sparse(world.images / "xfs", 320 * MIB))
    return "xfs"


@pytest.mark.parametrize("kind", ["disk", "xfs_disk"])
def test_a_stack_that_stops_answering(world: World, request: pytest.FixtureRequest, kind: str) -> None:
    """In the middle of the kernel's own I/O, which nothing interrupts: a stop ends it all the same."""
    image = world.images / request.getfixturevalue(kind)
    socket = world.folder / f"{kind}.sock"
    stack = subprocess.Popen(["nbdkit", "--exit-with-parent", "-f", "-r", "-U", socket, "file", image])
    found: list[ProbeResult] = []
    stop = threading.Event()
    specs, disks = [parse_spec("writes")], {"disk": f"nbd+unix:///?socket={socket}"}
    runner = threading.Thread(target=lambda: found.extend(run_probes(specs, disks, world.work, stop=stop)))
    try:
        assert wait_until(socket.exists)
        runner.start()
        assert wait_until(lambda: bool(list(world.work.glob(".probe-*/artefacts/writing"))))
        stack.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # by then it waits for it
        stopped = time.monotonic()
        stop.set()
        runner.join(25)
        assert time.monotonic() - stopped < 5
        assert processes_of(world.work) == []
        assert loops() == []
    finally:
        stack.kill()
        stack.wait()
    assert [result.reason for result in found] == ["stopped"]


@pytest.mark.parametrize(("which", "kind"), [("runner", "disk"), ("keeper", "disk"), ("keeper", "xfs_disk")])
def test_killed_with_nine(world: World, request: pytest.FixtureRequest, which: str, kind: str) -> None:
    """The runner or the keeper gone at once, in the middle of a mount: the kernel ends the rest."""
    path = os.pathsep.join(filter(None, sys.path))
    served: set[int] = set()
    disk = request.getfixturevalue(kind)
    command = [sys.executable, "-m", "dr_cloud.cli.main", "probe", "run", "hangs", "--work", str(world.work)]
    runner = subprocess.Popen(
        [*command, "--disk", f"{disk}={world.uri(disk)}"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    try:
        assert wait_until(lambda: len(processes_of(world.work)) > 6 and bool(loops()))
        for pid in processes_of(world.work):
            # What serves a file system's disk must not be what the kernel unmounts it by.
            if command_of(pid).startswith((b"nbdfuse\0", b"qemu-nbd\0")):
                assert "-mounted" not in Path(f"/proc/{pid}/mountinfo").read_text()
                served.add(pid)
        assert len(served) == 2
        keepers = run("ps", "--ppid", runner.pid, "-o", "pid=").split()
        os.kill(runner.pid if which == "runner" else int(keepers[0]), signal.SIGKILL)
        assert wait_until(lambda: processes_of(world.work) == [], 5)
        assert wait_until(lambda: loops() == [], 5)
        printed, _ = runner.communicate(timeout=10)
    finally:
        runner.kill()
        runner.communicate()
    if which == "runner":
        assert len(list(world.work.glob(".probe-*"))) == 1
    else:
        assert b"killed by SIGKILL" in printed
    # The next run in this folder removes what a dead one left, and not what a living one holds.
    assert world.probe("fsck", disk).passed
    assert list(world.work.glob(".probe-*")) == []


def test_many_at_once(world: World, disk: str) -> None:
    """R14.2: stacks are probed in parallel; none disturbs another, in one folder or in several."""
    results: list[ProbeResult] = []
    keeps = parse_spec("command:/bin/sh -c 'touch $DRC_ARTEFACTS/a'")

    def probe(number: int) -> None:
        specs = [parse_spec(f"mount:name=m{number}"), keeps.model_copy(update={"name": f"c{number}"})]
        results.extend(run_probes(specs, {disk: world.uri(disk)}, world.work))

    threads = [threading.Thread(target=probe, args=(number,)) for number in range(6)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.reason for result in results if not result.passed] == []
    assert len({result.artefacts[0].path for result in results if result.artefacts}) == 6
    assert time.monotonic() - start < 30
