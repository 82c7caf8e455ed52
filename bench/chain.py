"""The chain that protects disks, as real processes: tap, source VDSA, target VDSA, and a store in a directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dr_cloud.demo.process import Process
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.checkpoint import read_checkpoint
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store import layout
from dr_cloud.store.errors import ObjectMissingError
from dr_cloud.store.open import open_store

SCOPE: Final = Scope("acme", "bench", "dc-east")
WAIT_SECONDS_MAX: Final = 120.0
MEMORY_BYTES_MIN: Final = 6 << 30
_CLI: Final = "dr_cloud.cli.main"


def memory_directory() -> Path | None:
    """Return a directory in memory with room for disks, None if there is none.

    Where guests' disks are measured they lie there, those of the peers too: else the machine's disk is measured.
    """
    shared = Path("/dev/shm")
    with contextlib.suppress(OSError):
        state = os.statvfs(shared)
        if os.access(shared, os.W_OK) and state.f_bavail * state.f_frsize >= MEMORY_BYTES_MIN:
            return shared
    return None


@contextlib.contextmanager
def folder(*, in_memory: bool = False) -> Iterator[Path]:
    """Give a new directory, and remove it with all that is in it."""
    directory = Path(tempfile.mkdtemp(prefix="drc-bench-", dir=memory_directory() if in_memory else None))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def tap(directory: Path, name: str, disk: Path, vdsa: Path, queue: str = "64MiB") -> Iterator[str]:
    """Run a tap in front of `disk`; gives its URI."""
    socket = directory / f"{name}.sock"
    process = Process(
        f"tap-{name}", directory, _CLI, "tap", "--server", "server", "--disk", f"disk={disk}", "--socket", str(socket),
        "--vdsa", str(vdsa), "--state", str(directory / f"{name}.state"), "--queue", queue,
    )  # fmt: skip
    with _stopped(process):
        yield f"nbd+unix:///disk?socket={socket}"


@contextlib.contextmanager
def _stopped(process: Process) -> Iterator[Process]:
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


class Chain:
    """A source VDSA and a target VDSA, and what is durable in their store."""

    def __init__(self, directory: Path) -> None:
        """Use `running_chain`."""
        self.directory = directory
        self.store_directory = directory / "store"
        self.store = open_store(f"file://{self.store_directory}")
        keyring = Keyring.open(directory / "keyring.json")
        keyring.create(SCOPE.enterprise)
        self._keys = keyring.vpg_keys(SCOPE)
        self.source_socket = directory / "source.sock"
        self._next = 0

    def wait_in_sync(self) -> None:
        """Wait for the first checkpoint after the first synchronisation."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while Catalogue.load(self.store, self._keys, SCOPE).newest_ns is None:
            _check(deadline, "the first synchronisation")
        self.wait_durable(time.time_ns())

    def wait_durable(self, after_ns: int) -> int:
        """Wait for a durable, testable checkpoint at or after `after_ns`; return when it became durable."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while True:
            checkpoint = self._next_checkpoint()
            if checkpoint is None:
                _check(deadline, "a checkpoint")
            elif checkpoint.testable and checkpoint.time_ns >= after_ns:
                path = self.store_directory / layout.checkpoint_key(SCOPE, checkpoint.number)
                return os.stat(path).st_mtime_ns

    def stored_bytes(self) -> int:
        """Return the size of everything in the store."""
        return sum(size for _, size in self.store.list(""))

    def _next_checkpoint(self) -> Checkpoint | None:
        try:
            checkpoint = read_checkpoint(self.store, self._keys, self._next)
        except ObjectMissingError:
            return None
        self._next += 1
        return checkpoint


@contextlib.contextmanager
def running_chain(
    directory: Path, checkpoint_seconds: float, target: tuple[str, ...] = (_CLI, "vdsa", "target")
) -> Iterator[tuple[Chain, Process]]:
    """Run both sides.

    Args:
        directory: Where everything is.
        checkpoint_seconds: The time between checkpoints.
        target: The module of the target's process and what comes before its options.
    """
    chain = Chain(directory)
    keyring, address = str(directory / "keyring.json"), f"unix:{directory}/target.sock"
    process = Process(
        "target", directory, *target, "--name", SCOPE.target, "--listen", address,
        "--store", f"file://{chain.store_directory}", "--keyring", keyring, "--work", str(directory / "work"),
    )  # fmt: skip
    with _stopped(process):
        source = Process(
            "source", directory, _CLI, "vdsa", "source", "--scope", "/".join(SCOPE), "--member", "server/disk=0",
            "--target", address,
            "--socket", str(chain.source_socket), "--keyring", keyring,
            "--checkpoint-seconds", str(checkpoint_seconds),
        )  # fmt: skip
        with _stopped(source):
            yield chain, process


def _check(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise DrCloudError(f"after {WAIT_SECONDS_MAX:g} s still waiting: {what}")
    time.sleep(0.01)
