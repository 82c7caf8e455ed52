"""The provider's actors on local Ray, behind a real tap and source: many stacks at once, and each of them killed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from e2e_world import MIB, SCOPE, Chain, Guest, make_disk, read_disk, wait_until

from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.provider import LocalProvider, RunningStack
from dr_cloud.actors.stack import StackActor
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd.client import NbdClient
from dr_cloud.store import layout
from dr_cloud.store.open import open_store

pytestmark = pytest.mark.system

SIZE = 8 * MIB
AREA = (2 * MIB, 6 * MIB)
STACKS = 8


class World:
    """Provider and site. The guest writes all the time; every test leaves all of it running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chain = Chain(folder)
        self.disk = folder / "disk"
        base = make_disk(self.disk, SIZE, [(0, 5 * MIB)])
        for name in ("run", "work", "cache"):
            (folder / name).mkdir(mode=0o700)
        self.settings = NodeSettings(
            keyring=self.chain.keyring,
            work_dir=folder / "work",
            cache_dir=folder / "cache",
            run_dir=folder / "run",
        )
        self.guest = Guest({"d": self.chain.uri("d")}, {"d": base}, seed=3)
        self.guest.areas = {"d": AREA}
        self.guest.pause_seconds = 0.005

    def start(self) -> None:
        node = ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            object_store_memory=128 << 20,
        )  # fmt: skip
        self.logs = Path(node.address_info["session_dir"]) / "logs"
        self.provider = LocalProvider(self.settings, self.chain.store_url, [SCOPE], self.folder / "target.sock", STACKS)
        self.chain.start_source()
        self.chain.start_tap({"d": self.disk})
        for name in ("source", "tap"):
            self.chain.wait_ready(name)
        self.wait_newest(time.time_ns())
        self.guest.start()
        wait_until(lambda: len(self.guest.writes) > 200)

    def newest_ns(self) -> int:
        with contextlib.suppress(DrCloudError):
            return self.provider.status(SCOPE).newest_ns or 0
        return 0

    def wait_newest(self, after_ns: int) -> int:
        wait_until(lambda: self.newest_ns() > after_ns)
        return self.newest_ns()

    def random_times(self, count: int) -> list[int]:
        """Return times from the guest's first write to the newest checkpoint."""
        span = (self.guest.writes[0].begun_ns, self.newest_ns())
        return [random.randint(*span) for _ in range(count)]

    def open(self, times_ns: Sequence[int]) -> list[Open]:
        stacks = self.provider.open_stacks(SCOPE, times_ns)
        return [Open(stack) for stack in stacks]

    def log_of(self, pid: int) -> str:
        return "".join(path.read_text(errors="replace") for path in self.logs.glob(f"worker-*-{pid}.*"))

    def close(self) -> None:
        self.guest.stop()
        self.chain.end()
        if hasattr(self, "provider"):
            self.provider.close()
        ray.shutdown()


class Open:
    """A stack that serves."""

    def __init__(self, stack: RunningStack) -> None:
        self.stack = stack
        opened = stack.wait_open()
        self.at_ns = opened.at_ns
        self.uri = opened.uris["tap/d"][0]

    @property
    def pid(self) -> int:
        return int(ray.get(self.stack.actor.where.remote()).pid)

    def image(self) -> dict[str, bytes]:
        return {"d": read_disk(self.uri)}

    def close(self) -> None:
        self.stack.close()


class Reader(threading.Thread):
    """Reads a stack again and again until it is told to stop, or a read fails or gives other bytes than before."""

    def __init__(self, opened: Open) -> None:
        super().__init__(name="reader")
        self.opened = opened
        self.rounds = 0
        self.failure = ""
        self._stop_asked = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with NbdClient.connect(self.opened.uri) as client:
                first = bytes(client.pread(0, SIZE))
                while not self._stop_asked.is_set():
                    assert client.pread(0, SIZE) == first, "other bytes"
                    self.rounds += 1
        except Exception as error:
            self.failure = repr(error)

    def goes_on(self) -> bool:
        """Wait for two more rounds."""
        rounds = self.rounds
        wait_until(lambda: self.rounds > rounds + 1 or self.failure, 30)
        return not self.failure

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(60)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = World(folder)
    try:
        world.start()
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def guest_is_well(world: World) -> Iterator[None]:
    """R1: whatever happens to stacks and VDSA, the guest's writes go on."""
    before = len(world.guest.writes)
    yield
    assert not world.guest.failures
    wait_until(lambda: len(world.guest.writes) > before)


def test_eight_stacks_at_eight_times(world: World) -> None:
    """R14.1, R14.2, R14.3, R14.6: eight times at once, each its image, while the VPG's checkpoints go on."""
    times = world.random_times(STACKS)
    opened = world.open(times)
    opened_ns = time.time_ns()
    with ThreadPoolExecutor(STACKS) as threads:
        images = list(threads.map(Open.image, opened))
    assert world.wait_newest(opened_ns) > opened_ns
    assert len({one.pid for one in opened}) == STACKS
    for one, at_ns, image in zip(opened, times, images, strict=True):
        assert one.at_ns == at_ns
        world.guest.check(image, at_ns)
    for one in opened:
        one.close()


def test_writes_stay_in_their_test_and_are_gone_with_it(world: World) -> None:
    """R14.5: what one test writes is seen by it alone; when it ends, nothing of it is left anywhere."""
    (at_ns,) = world.random_times(1)
    written, beside = world.open([at_ns, at_ns])
    before = written.image()
    with NbdClient.connect(written.uri) as client:
        for offset in range(0, SIZE, MIB):
            client.pwrite(offset, b"TEST" * (MIB // 8))
    assert written.image()["d"].count(b"TEST" * 1024) == SIZE // MIB * (MIB // 2 // 4096)
    assert beside.image() == before
    written.close()
    beside.close()
    assert list((world.settings.work_dir / "writelogs").iterdir()) == []
    (again,) = world.open([at_ns])
    assert again.image() == before
    again.close()
    assert b"TEST" * 1024 not in world.disk.read_bytes()


def test_one_is_stopped_and_the_others_go_on(world: World) -> None:
    """R14.7: a test is stopped on its own."""
    opened = world.open(world.random_times(3))
    readers = [Reader(one) for one in opened]
    try:
        assert all(reader.goes_on() for reader in readers)
        opened[1].close()
        readers[1].join(30)
        assert "Error" in readers[1].failure
        assert readers[0].goes_on() and readers[2].goes_on()
    finally:
        for reader in readers:
            reader.stop()
    opened[0].close()
    opened[2].close()


def test_a_killed_stack_loses_its_own_test_only(world: World) -> None:
    """Invariant 9: kill -9 of one stack's process; the others read on, and the pool gives another for the same time."""
    opened = world.open(world.random_times(3))
    readers = [Reader(one) for one in opened]
    try:
        assert all(reader.goes_on() for reader in readers)
        os.kill(opened[1].pid, signal.SIGKILL)
        readers[1].join(30)
        assert "Connection" in readers[1].failure
        with pytest.raises(DrCloudError, match="died"):
            opened[1].close()
        assert readers[0].goes_on() and readers[2].goes_on()
        (another,) = world.open([opened[1].at_ns])
        world.guest.check(another.image(), another.at_ns)
        another.close()
    finally:
        for reader in readers:
            reader.stop()
    opened[0].close()
    opened[2].close()


def test_a_stack_that_died_idle_is_never_given_out(world: World) -> None:
    """Invariant 9: idle stacks that were killed cost no test."""
    opened = world.open(world.random_times(2))
    pids = [one.pid for one in opened]
    for one in opened:
        one.close()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for one in world.open(world.random_times(3)):
        world.guest.check(one.image(), one.at_ns)
        one.close()


def vdsa_pid(world: World) -> int:
    """Return the process that listens for sources, as the kernel knows it."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(world.chain.target_address.removeprefix("unix:"))
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("iII", credentials)[0]
    return pid


def test_a_killed_vdsa_comes_back_and_nothing_is_lost(world: World) -> None:
    """Invariants 2, 3 and 4: kill -9 of the VDSA's process under load; a new generation goes on where it stood."""
    guest = world.guest
    before = world.provider.checkpoints(SCOPE)
    (running,) = world.open(world.random_times(1))
    reader = Reader(running)
    pid = vdsa_pid(world)
    os.kill(pid, signal.SIGKILL)
    killed_ns = time.time_ns()
    newest_ns = world.wait_newest(killed_ns)
    assert vdsa_pid(world) != pid
    status = world.provider.status(SCOPE)
    assert status.generation == before[-1].generation + 1
    after = world.provider.checkpoints(SCOPE)
    assert after[: len(before)] == before
    assert reader.goes_on(), "a stack needs no VDSA"
    reader.stop()
    running.close()
    guest.stop()
    assert not guest.failures
    newest_ns = world.wait_newest(time.time_ns())
    times = [
        newest_ns,
        killed_ns,
        *(random.randint(before[0].time_ns or guest.writes[0].begun_ns, newest_ns) for _ in range(4)),
    ]
    times = [max(at_ns, guest.writes[0].begun_ns) for at_ns in times]
    opened = world.open(times)
    for one in opened:
        guest.check(one.image(), one.at_ns)
    assert opened[0].image() == {"d": world.disk.read_bytes()}
    for one in opened:
        one.close()
    guest.start()


def test_a_damaged_object_is_an_error_and_nothing_else(world: World) -> None:
    """R14.3, invariant 3: a flipped bit in the store is EIO that names the object; never other bytes; others go on."""
    newest_ns = world.newest_ns()
    (healthy,) = world.open([newest_ns])
    expected = healthy.image()["d"]
    plan = healthy.stack.plan
    # The first synchronisation's object: its blocks are in every image.
    reader = JournalReader(open_store(world.chain.store_url), world.chain.keys, SCOPE, plan.generations)
    number = plan.generations[0][0]
    index = reader.index(number)
    key = reader.object_key(number)
    assert key.startswith(layout.journal_prefix(SCOPE))
    path = Path(world.chain.store_url.removeprefix("file://")) / key
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[int(index.offset[3]) + int(index.length[3]) // 2] ^= 0x10
    other = world.settings.model_copy(update={"cache_dir": world.folder / "other-cache"})
    actor: Any = StackActor.remote(other)  # type: ignore[attr-defined]
    beside = Reader(healthy)
    try:
        path.write_bytes(damaged)
        opened = ray.get(actor.open.remote("damaged", plan, world.chain.store_url))
        wrong = []
        with NbdClient.connect(opened.uris["tap/d"][0]) as client:
            for block in range(SIZE // BLOCK_SIZE):
                start = block * BLOCK_SIZE
                try:
                    assert client.pread(start, BLOCK_SIZE) == expected[start : start + BLOCK_SIZE]
                except OSError as error:
                    assert error.errno == errno.EIO
                    wrong.append(block)
        assert 1 <= len(wrong) <= 16
        pid = ray.get(actor.where.remote()).pid
        wait_until(lambda: key in world.log_of(pid), 10)
        assert beside.goes_on()
    finally:
        path.write_bytes(sound)
        ray.kill(actor)
        beside.stop()
    healthy.close()
