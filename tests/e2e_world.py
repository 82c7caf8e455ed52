"""The whole chain, tap ▸ source VDSA ▸ target VDSA ▸ store ▸ stacks, as real processes, and an oracle beside it.

The oracle is a guest that writes one thing after another and notes, by its own clock, when each write was begun and
acknowledged. So at every time T the disks are those after n writes, where n is the number acknowledged by T, or one
more if a write was under way: one of at most two states, over all disks together (R5).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dr_cloud.actors.node import LoopThread
from dr_cloud.journal.catalogue import Catalogue, read_after
from dr_cloud.journal.envelope import Opened
from dr_cloud.journal.frame import COLUMN_DTYPE, open_frame
from dr_cloud.journal.objects import MAGIC, ROW_DTYPE, VERSION, read_rows
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.blocks import BLOCK_SIZE, SECTOR_SIZE
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import ImagePlan
from dr_cloud.nbd.client import NbdClient
from dr_cloud.seal.keyring import Keyring
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.stack.serve import StackServer, serve_stack
from dr_cloud.stack.stack import Stack
from dr_cloud.store import layout
from dr_cloud.store.open import open_store

SCOPE = Scope("acme", "shop", "dc-east")
MIB = 1 << 20
SECOND_NS = 1_000_000_000


def wait_until(what: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


class Processes:
    """Real processes by name. What they say on stderr is in `<name>.log`. `end` ends those that still run."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = {**os.environ, **(environment or {})}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, process_group: int | None = None) -> None:
        """Start `python -m`; `wait_ready` waits for its first line. Process group 0 is one of its own."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                process_group=process_group,
            )

    def wait_ready(self, name: str) -> str:
        stdout = self.running[name].stdout
        assert stdout is not None
        line = stdout.readline().decode()
        assert "ready" in line, f"{name} did not start: {self.log(name)[-2000:]}"
        return line

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        """Kill -9."""
        self._end(self.running.pop(name))

    def hang(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGSTOP)

    def wake(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGCONT)

    def stop(self, name: str) -> int:
        """Stop with SIGTERM and return the exit code."""
        self.running[name].terminate()
        code = self.running[name].wait(30)
        self._end(self.running.pop(name))
        return code

    def end(self) -> None:
        while self.running:
            self._end(self.running.popitem()[1])

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Chain(Processes):
    """Tap, source and target of one VPG, each a process of its own. `folder` has a short path: sockets lie in it."""

    def __init__(
        self,
        folder: Path,
        store_url: str = "",
        checkpoint_seconds: float = 0.25,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, environment)
        self.members = ["tap/d=0"]
        """SERVER/DISK=INDEX of every disk; a tap's server has the tap's name."""
        self.store_url = store_url or f"file://{folder}/store"
        self.checkpoint_seconds = checkpoint_seconds
        self.keyring = folder / "keyring.json"
        Keyring.open(self.keyring).create(SCOPE.enterprise)
        self.keys = Keyring.open(self.keyring).vpg_keys(SCOPE)
        self.target_address = f"unix:{folder}/target.sock"
        self._store = open_store(self.store_url)
        self._catalogue: Catalogue | None = None

    # Parts.

    def start_target(self) -> None:
        self.start(
            "target", "dr_cloud.cli.main", "vdsa", "target", "--name", SCOPE.target, "--listen", self.target_address,
            "--store", self.store_url, "--keyring", str(self.keyring), "--work", f"{self.folder}/digests",
        )  # fmt: skip

    def start_source(self) -> None:
        members = [word for member in self.members for word in ("--member", member)]
        self.start(
            "source", "dr_cloud.cli.main", "vdsa", "source", "--scope", "/".join(SCOPE), *members,
            "--target", self.target_address, "--socket", f"{self.folder}/source.sock", "--keyring", str(self.keyring),
            "--checkpoint-seconds", str(self.checkpoint_seconds), "--connections", "2",
        )  # fmt: skip

    def start_tap(self, disks: Mapping[str, Path], *more: str, name: str = "tap") -> None:
        (self.folder / f"{name}.sock").unlink(missing_ok=True)
        given = [word for disk, path in disks.items() for word in ("--disk", f"{disk}={path}")]
        self.start(
            name, "dr_cloud.cli.main", "tap", "--server", name, *given, "--socket", f"{self.folder}/{name}.sock",
            "--vdsa", f"{self.folder}/source.sock", "--state", f"{self.folder}/{name}.state", *more,
        )  # fmt: skip

    def start_all(self, disks: Mapping[str, Path], *more: str) -> None:
        """Start the three parts and wait until the first synchronisation is testable."""
        self.members = [f"tap/{disk}={index}" for index, disk in enumerate(disks)]
        self.start_target()
        self.start_source()
        self.start_tap(disks, *more)
        for name in ("target", "source", "tap"):
            self.wait_ready(name)
        self.wait_newest(time.time_ns())

    def uri(self, disk: str, tap: str = "tap") -> str:
        return f"nbd+unix:///{disk}?socket={self.folder}/{tap}.sock"

    # What the store holds, read from the store alone.

    def catalogue(self) -> Catalogue:
        """Return the catalogue, read on from where the last call ended."""
        if self._catalogue is None:
            self._catalogue = Catalogue.load(self._store, self.keys, SCOPE)
        for checkpoint in read_after(self._store, self.keys, len(self._catalogue.checkpoints)):
            self._catalogue.add(checkpoint)
        return self._catalogue

    def wait_newest(self, after_ns: int, seconds: float = 60.0) -> Catalogue:
        """Wait for a checkpoint to recover to that is later than `after_ns`."""
        try:
            wait_until(lambda: (self.catalogue().newest_ns or 0) > after_ns, seconds)
        except AssertionError:
            logs = "\n".join(f"{name}: {self.log(name)[-1500:]}" for name in self.running)
            raise AssertionError(f"no checkpoint within {seconds} s\n{logs}") from None
        return self.catalogue()

    def wait_quiet(self) -> Catalogue:
        """Wait until nothing is on its way, and no intent bit is set: both epochs had their turn."""
        number = self.wait_newest(time.time_ns()).checkpoints[-1].number
        wait_until(lambda: self.catalogue().checkpoints[-1].number >= number + 3)
        return self.catalogue()

    def entries(self, after: int, catalogue: Catalogue) -> Any:
        """Return the entries of every frame that came after checkpoint `after`: `COLUMN_DTYPE`, as the source sent."""
        found = [np.empty(0, COLUMN_DTYPE)]
        for checkpoint in catalogue.checkpoints[after + 1 :]:
            for ref in checkpoint.objects:
                key = layout.journal_key(SCOPE, ref.generation, ref.number)
                opened = Opened(self._store, self.keys, key, MAGIC, VERSION)
                body = opened.read(opened.body_offset, opened.body_bytes) if opened.body_bytes else memoryview(b"")
                while len(body):
                    frame = open_frame(self.keys, body, partial=True)
                    found.append(frame.columns)
                    body = body[len(frame.data) :]
        return np.concatenate(found)

    def blocks_sent(self, after: int, catalogue: Catalogue) -> list[tuple[int, int]]:
        """Return (disk, block) of every block in those entries, as often as it was sent."""
        return [
            (int(entry["disk"]), int(entry["block"]) + at)
            for entry in self.entries(after, catalogue)
            for at in range(int(entry["count"]))
        ]

    def rows(self, catalogue: Catalogue) -> Any:
        """Return every change row of the journal, ascending in time."""
        refs = [ref for checkpoint in catalogue.checkpoints for ref in checkpoint.objects if ref.rows]
        keys = [layout.journal_key(SCOPE, ref.generation, ref.number) for ref in refs]
        return np.concatenate([np.empty(0, ROW_DTYPE), *(read_rows(self._store, self.keys, key) for key in keys)])


class Stacks:
    """Stacks of a chain's VPG, served by a thread of this process over one cache."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.folder = chain.folder / "stacks"
        self.folder.mkdir(mode=0o700)
        self._loop = LoopThread("stacks")
        self._store = open_store(chain.store_url)
        self._caches: dict[int, ObjectCache] = {}
        self._servers: list[StackServer] = []
        self._numbers = iter(range(1 << 30))

    def serve(self, plan: ImagePlan) -> StackServer:
        cache = self._cache(plan)
        stack = Stack.open(plan, cache, self.folder, clock_ns=time.monotonic_ns)
        path = str(self.chain.folder / f"stack-{next(self._numbers)}.sock")
        server = self._loop.call(serve_stack(stack, cache, unix_path=path))
        self._servers.append(server)
        return server

    def _cache(self, plan: ImagePlan) -> ObjectCache:
        writers = len(plan.generations)
        if writers not in self._caches:
            reader = JournalReader(self._store, self.chain.keys, SCOPE, plan.generations)
            folder = CacheFolder(self.folder / "cache", SCOPE, plan.journal, limit_bytes=1 << 30)
            self._caches[writers] = ObjectCache(folder, reader)
        return self._caches[writers]

    def stop(self, server: StackServer) -> None:
        self._servers.remove(server)
        self._loop.call(server.close(), 30)

    @contextlib.contextmanager
    def at(self, plan: ImagePlan) -> Iterator[StackServer]:
        server = self.serve(plan)
        try:
            yield server
        finally:
            self.stop(server)

    def image(self, plan: ImagePlan) -> dict[str, bytes]:
        """Return whole disks of a stack by their servers' names for them, read over NBD."""
        with self.at(plan) as server:
            return {disk.partition("/")[2]: read_disk(uris[0]) for disk, uris in server.uris.items()}

    def close(self) -> None:
        for server in list(self._servers):
            self.stop(server)
        for cache in self._caches.values():
            cache.close()
        self._loop.loop.call_soon_threadsafe(self._loop.loop.stop)


def read_disk(uri: str) -> bytes:
    """Return a whole disk, over NBD."""
    with NbdClient.connect(uri) as client:
        return b"".join(client.pread(at, min(MIB, client.size_bytes - at)) for at in range(0, client.size_bytes, MIB))


class GuestWrite(NamedTuple):
    """One write as the guest saw it. `data` is None for zeroes."""

    begun_ns: int
    acked_ns: int
    disk: str
    offset: int
    length: int
    data: bytes | None


class Guest:
    """Writes to disks over NBD, one write after another, and notes each; see the module's docstring.

    Attributes:
        disks: NBD URI by disk.
        areas: Where `run` may write on each disk: (start, end) in bytes.
        base: The disks before the first write.
        writes: Every write, in order.
        failures: What failed in `run`, other than connections that broke where that was allowed.
    """

    def __init__(self, disks: Mapping[str, str], base: Mapping[str, bytes], seed: int) -> None:
        self.disks = dict(disks)
        self.base = dict(base)
        self.areas = {disk: (0, len(data)) for disk, data in base.items()}
        self.writes: list[GuestWrite] = []
        self.failures: list[str] = []
        self.random = random.Random(seed)
        self.pause_seconds = 0.001
        self.may_break = False
        self._clients: dict[str, NbdClient] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # Writing.

    def write(self, disk: str, offset: int, data: bytes | None, length: int = 0) -> None:
        """Make one write; `data` None makes `length` bytes zero."""
        if disk not in self._clients:
            self._clients[disk] = NbdClient.connect(self.disks[disk])
        client = self._clients[disk]
        length = length if data is None else len(data)
        begun_ns = time.time_ns()
        if data is not None:
            client.pwrite(offset, data)
        elif self.random.random() < 0.5:
            client.trim(offset, length)
        else:
            client.write_zeroes(offset, length)
        self.writes.append(GuestWrite(begun_ns, time.time_ns(), disk, offset, length, data))

    def write_something(self) -> None:
        """Write 512 bytes to 32 KiB, of any alignment; sometimes zeroes, sometimes what is elsewhere too."""
        disk = self.random.choice(list(self.areas))
        start, end = self.areas[disk]
        length = self.random.choice((1, 3, 8, 8, 8, 16, 64)) * SECTOR_SIZE
        unit = SECTOR_SIZE if self.random.random() < 0.3 else BLOCK_SIZE
        offset = self.random.randrange(start, end - length + 1) // unit * unit
        kind = self.random.random()
        data = None if kind < 0.1 else b"same" * (length // 4) if kind < 0.2 else self.random.randbytes(length)
        begun_ns = time.time_ns()
        try:
            self.write(disk, offset, data, length)
        except OSError:
            if not self.may_break:
                raise
            self._settle(begun_ns, disk, offset, length)

    def _settle(self, begun_ns: int, disk: str, offset: int, length: int) -> None:
        """The connection broke: when it is back, look whether the write was done, wholly or in part."""
        self.drop()
        while not self._stop.is_set():
            try:
                client = self._clients[disk] = NbdClient.connect(self.disks[disk])
                data = bytes(client.pread(offset, length))
            except OSError:
                self.drop()
                time.sleep(0.02)
            else:
                self.writes.append(GuestWrite(begun_ns, time.time_ns(), disk, offset, length, data))
                return

    def start(self) -> None:
        """Write in a thread until `stop`."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="guest")
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self.pause_seconds):
                self.write_something()
        except Exception as error:
            self.failures.append(repr(error))

    def stop(self) -> None:
        """Stop the thread, and close the connections."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(90)
        self.drop()

    def drop(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    # The oracle.

    def acked(self, at_ns: int) -> int:
        """Return how many writes were acknowledged by `at_ns`."""
        return bisect_right(self.writes, at_ns, key=lambda write: write.acked_ns)

    def begun(self, at_ns: int) -> int:
        """Return how many writes were begun by `at_ns`."""
        return bisect_right(self.writes, at_ns, key=lambda write: write.begun_ns)

    def state(self, count: int) -> dict[str, bytes]:
        """Return the disks after the first `count` writes."""
        disks = {disk: bytearray(data) for disk, data in self.base.items()}
        for write in self.writes[:count]:
            data = bytes(write.length) if write.data is None else write.data
            disks[write.disk][write.offset : write.offset + write.length] = data
        return {disk: bytes(data) for disk, data in disks.items()}

    def check(self, image: Mapping[str, bytes], at_ns: int) -> None:
        """Fail unless `image` is what all disks held at `at_ns`."""
        low, high = self.acked(at_ns), self.begun(at_ns)
        assert low <= high <= low + 1
        if image == self.state(low) or (high > low and image == self.state(high)):
            return
        wrong = wrong_blocks(self.state(low), image)
        raise AssertionError(f"image at {at_ns} (after {low} to {high} writes) differs in blocks {wrong[:20]}")

    def random_times(self, count: int) -> list[int]:
        """Return times from the first write to the last, drawn at random."""
        span = (self.writes[0].begun_ns, self.writes[-1].acked_ns)
        return [self.random.randint(*span) for _ in range(count)]


def wrong_blocks(expected: Mapping[str, bytes], found: Mapping[str, bytes]) -> list[tuple[str, int]]:
    return [
        (disk, at // BLOCK_SIZE)
        for disk, data in expected.items()
        for at in range(0, len(data), BLOCK_SIZE)
        if data[at : at + BLOCK_SIZE] != found[disk][at : at + BLOCK_SIZE]
    ]


def make_disk(path: Path, size_bytes: int, data: Sequence[tuple[int, int]] = (), seed: int = 0) -> bytes:
    """Make a sparse raw disk with random bytes at each (offset, length); return what it holds."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for offset, length in data:
            file.seek(offset)
            file.write(rng.randbytes(length))
    return path.read_bytes()
