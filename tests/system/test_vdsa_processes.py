"""A guest, a tap, both VDSAs and a store on disk, as real processes that are killed and hung while the guest writes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vdsa_images import ImageReader

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint
from dr_cloud.nbd.client import NbdClient
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store

pytestmark = pytest.mark.system

SCOPE = Scope("acme", "shop", "dc1")
BLOCKS = 2048
ZERO = bytes(BLOCK_SIZE)


class Rig:
    """Tap, source and target in one folder; every process is ended at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.disk.write_bytes(os.urandom(64 * BLOCK_SIZE) + bytes((BLOCKS - 64) * BLOCK_SIZE))
        self.keyring = Keyring.open(folder / "keyring")
        self.keyring.create(SCOPE.enterprise)
        self.processes: list[subprocess.Popen[str]] = []
        self.store_url = f"file://{folder}/store"
        self.history: list[tuple[int, int, int, bytes]] = []
        self.stop = threading.Event()
        self.failure: Exception | None = None
        self.guest_thread = threading.Thread(target=self.guest)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        return process

    def start_tap(self) -> subprocess.Popen[str]:
        return self.start(
            "dr_cloud.cli.tap", "--server", "db", "--disk", f"d={self.disk}", "--socket", f"{self.folder}/tap.sock",
            "--vdsa", f"{self.folder}/source.sock", "--state", f"{self.folder}/state",
        )  # fmt: skip

    def start_source(self) -> subprocess.Popen[str]:
        return self.start(
            "dr_cloud.cli.vdsa", "source", "--scope", SCOPE.prefix, "--member", "db/d=0",
            "--target", f"unix:{self.folder}/target.sock",
            "--socket", f"{self.folder}/source.sock", "--keyring", str(self.keyring.path), "--connections", "3",
            "--checkpoint-seconds", "0.25",
        )  # fmt: skip

    def start_target(self) -> subprocess.Popen[str]:
        return self.start(
            "dr_cloud.cli.vdsa", "target", "--name", "dc1", "--listen", f"unix:{self.folder}/target.sock",
            "--store", self.store_url, "--keyring", str(self.keyring.path), "--work", f"{self.folder}/work",
        )  # fmt: skip

    def guest(self) -> None:
        """Write blocks one after another, and note between which times each write was."""
        chance = random.Random(7)
        try:
            with NbdClient.connect(f"nbd+unix:///d?socket={self.folder}/tap.sock") as client:
                count = 0
                while not self.stop.is_set():
                    count += 1
                    block = chance.randrange(BLOCKS)
                    data = ZERO if chance.random() < 0.05 else count.to_bytes(8, "big") * (BLOCK_SIZE // 8)
                    before = time.time_ns()
                    client.pwrite(block * BLOCK_SIZE, data)
                    self.history.append((before, time.time_ns(), block, data))
                    time.sleep(0.0005)
        except Exception as error:
            self.failure = error

    def catalogue(self) -> Catalogue:
        return Catalogue.load(open_store(self.store_url), self.keyring.vpg_keys(SCOPE), SCOPE)

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 40) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in {seconds} s: {what}"
            time.sleep(0.1)

    def newer_checkpoint(self) -> None:
        """Wait for a checkpoint to recover to whose time is later than now."""
        now = time.time_ns()
        self.wait("a newer checkpoint", lambda: (self.catalogue().newest_ns or 0) > now)

    @staticmethod
    def exact(catalogue: Catalogue) -> list[Checkpoint]:
        return [c for c in catalogue.checkpoints if c.testable and c.exact_from_ns < c.time_ns]

    def check(self) -> None:
        """End the guest; then the newest image is the disk, and exact times hold just what was written by then."""
        self.stop.set()
        self.guest_thread.join(20)
        assert self.failure is None, "the guest's I/O must not fail"
        self.newer_checkpoint()
        catalogue = self.catalogue()
        reader = ImageReader(open_store(self.store_url), self.keyring.vpg_keys(SCOPE))
        disk = self.disk.read_bytes()
        expected = {
            (0, at): disk[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]
            for at in range(BLOCKS)
            if disk[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE] != ZERO
        }
        assert reader.image(catalogue.plan(catalogue.newest_ns or 0)) == expected
        exact = self.exact(catalogue)
        chance = random.Random(11)
        for checkpoint in chance.sample(exact, min(len(exact), 12)):
            at_ns = chance.randint(checkpoint.exact_from_ns, checkpoint.time_ns)
            image = reader.image(catalogue.plan(at_ns))
            done = {block: data for _, end, block, data in self.history if end < at_ns}
            running = {block for start, end, block, _ in self.history if start <= at_ns <= end}
            for block, data in done.items():
                if block not in running:
                    assert image.get((0, block), ZERO) == data, f"block {block} at {at_ns}"

    def end(self) -> None:
        self.stop.set()
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if self.guest_thread.is_alive():
            self.guest_thread.join(20)


@pytest.fixture
def rig(tmp_socket_dir: Path) -> Iterator[Rig]:
    rig = Rig(tmp_socket_dir)
    yield rig
    rig.end()


def test_killed_and_hung_parts_lose_nothing(rig: Rig) -> None:
    """R1, R3, R5: each side killed -9 and the target hung while the guest writes: it never fails, replica = disk."""
    rig.start_tap()
    source, target = rig.start_source(), rig.start_target()
    rig.guest_thread.start()
    rig.newer_checkpoint()

    generation = rig.catalogue().checkpoints[-1].generation
    target.kill()
    target.wait()
    time.sleep(0.3)
    target = rig.start_target()
    rig.newer_checkpoint()
    assert rig.catalogue().checkpoints[-1].generation == generation + 1

    source.kill()
    source.wait()
    time.sleep(0.3)
    source = rig.start_source()
    rig.newer_checkpoint()

    writes = len(rig.history)
    target.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    assert len(rig.history) > writes + 100, "the guest goes on while the target hangs"
    target.send_signal(signal.SIGCONT)
    rig.newer_checkpoint()

    before = len(rig.exact(rig.catalogue()))
    rig.wait("times between checkpoints", lambda: len(rig.exact(rig.catalogue())) >= before + 3)
    rig.check()
    source.terminate()
    target.terminate()
    assert (source.wait(10), target.wait(10)) == (0, 0), "both end cleanly on SIGTERM"


def test_a_second_source_takes_over_and_the_first_one_stops(rig: Rig) -> None:
    """One source per VPG: a newer one takes over, the older one ends with a reason."""
    rig.start_tap()
    rig.start_target()
    first = rig.start_source()
    rig.guest_thread.start()
    rig.newer_checkpoint()
    rig.start_source()
    assert first.wait(20) == 1
    rig.newer_checkpoint()
    rig.check()
