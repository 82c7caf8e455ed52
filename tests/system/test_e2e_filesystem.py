"""A real file system on a tapped disk: ext4 and SQLite, recovered at random times as after a power failure."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from e2e_sqlite import COMMIT_DTYPE
from e2e_world import MIB, SECOND_NS, Chain, Stacks, make_disk, wait_until

from dr_cloud.model.journal import ImagePlan

pytestmark = [pytest.mark.system, pytest.mark.fuse]

SQLITE = Path(__file__).parents[1] / "e2e_sqlite.py"
STACKS = 21
AT_ONCE = 3
RUN_SECONDS = 8


def run(*command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in codes, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def insist(*commands: tuple[str | Path, ...]) -> None:
    """Try the commands in turn, for some seconds, until one succeeds: a mount may be busy for a moment."""
    for _ in range(20):
        for command in commands:
            if subprocess.run([str(word) for word in command], capture_output=True, check=False).returncode == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"left behind: {commands}")


@contextlib.contextmanager
def block_device(uri: str, folder: Path) -> Iterator[str]:
    """Give an NBD export as a loop device; everything is detached at the end, whatever happened."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        fuse = subprocess.Popen(["nbdfuse", folder / "disk", uri])
        stack.callback(fuse.wait)
        stack.callback(insist, ("fusermount3", "-u", folder), ("fusermount3", "-uz", folder))
        wait_until(lambda: fuse.poll() is not None or (folder / "disk").exists())
        assert fuse.poll() is None, "nbdfuse has ended"
        device = run("losetup", "--find", "--show", folder / "disk").strip()
        stack.callback(insist, ("losetup", "--detach", device))
        yield device


@contextlib.contextmanager
def mounted(device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    run("mount", "-t", "ext4", device, folder)
    try:
        yield folder
    finally:
        insist(("umount", folder))


class Found(NamedTuple):
    at_ns: int
    low: int
    high: int
    rows: int


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chain = Chain(folder)
        self.disk = folder / "disk"
        self.log = folder / "commits"
        make_disk(self.disk, 64 * MIB)
        self.stacks = Stacks(self.chain)

    def commits(self) -> np.ndarray:
        data = self.log.read_bytes()
        return np.frombuffer(data[: len(data) // COMMIT_DTYPE.itemsize * COMMIT_DTYPE.itemsize], COMMIT_DTYPE)

    def recover(self, number: int, plan: ImagePlan) -> Found:
        """Open a stack and recover from it as a machine does that comes up again; check what it holds."""
        assert plan.at_ns == plan.asked_ns
        folder = self.folder / f"test-{number}"
        with self.stacks.at(plan) as server, block_device(server.uris["tap/d"][0], folder) as device:
            thorough = number % 4 == 0
            if thorough:
                assert "needs_recovery" in run("dumpe2fs", "-h", device)
            with mounted(device, self.folder / f"mount-{number}") as mount:
                told = json.loads(run(sys.executable, SQLITE, "check", mount / "database"))
            if thorough:
                run("e2fsck", "-f", "-n", device)
                assert "needs_recovery" not in run("dumpe2fs", "-h", device)
            assert server.stack.statistics().blocks_written > 0
        commits = self.commits()
        low = int(np.searchsorted(commits["acked_ns"], plan.at_ns, "right"))
        high = int(np.searchsorted(commits["begun_ns"], plan.at_ns, "right"))
        assert (told["integrity"], told["right"]) == ("ok", True), (plan.at_ns, told)
        assert low <= told["rows"] <= high <= low + 1
        return Found(plan.at_ns, low, high, told["rows"])


@pytest.fixture
def world(tmp_socket_dir: Path) -> Iterator[World]:
    world = World(tmp_socket_dir)
    try:
        yield world
    finally:
        world.stacks.close()
        world.chain.end()


def test_ext4_and_sqlite_at_random_times(world: World) -> None:
    """R14.1, R14.3, R5: at any T ext4 replays its journal, and SQLite holds the commits acknowledged by T, no more."""
    chain = world.chain
    chain.start_all({"d": world.disk})
    with block_device(chain.uri("d"), world.folder / "production") as device:
        run("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", device)
        with mounted(device, world.folder / "mount") as mount, contextlib.ExitStack() as stack:
            workload = subprocess.Popen([sys.executable, SQLITE, "commit", mount / "database", world.log])
            stack.callback(workload.wait)
            stack.callback(workload.kill)
            wait_until(lambda: world.log.exists() and len(world.commits()) > 20)
            time.sleep(RUN_SECONDS)
            # The database goes on while its past is tested (R14.6).
            during = chain.wait_newest(time.time_ns())
            during_ns = during.newest_ns
            span = (int(world.commits()["acked_ns"][0]), during_ns)
            plans = [during.plan(random.randint(*span)) for _ in range(STACKS)]
            count = len(world.commits())
            with ThreadPoolExecutor(AT_ONCE) as threads:
                found = list(threads.map(world.recover, range(STACKS), plans))
            assert workload.poll() is None
            assert len(world.commits()) > count
            chain.wait_newest(during_ns + SECOND_NS)
            assert len({test.rows for test in found}) > STACKS // 3, "the times are too much alike"
            workload.send_signal(signal.SIGTERM)
            assert workload.wait(30) == 0
    # Unmounted, production is as the newest image, and the last test finds all of it.
    run("e2fsck", "-f", "-n", world.disk)
    after = chain.wait_newest(time.time_ns())
    assert world.stacks.image(after.plan(after.newest_ns)) == {"d": world.disk.read_bytes()}
    assert world.stacks.folder.joinpath("cache").exists()
    assert [path.name for path in world.stacks.folder.iterdir()] == ["cache"]
