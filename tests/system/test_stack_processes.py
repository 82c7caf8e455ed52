"""Stacks as processes: one cache for all, each fails alone, nothing is left of a dead one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import stack_process
from stack_journal import History, answer, open_cache, read

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import Disk, ImagePlan
from dr_cloud.stack.stack import Stack
from dr_cloud.store.open import open_store

pytestmark = pytest.mark.system

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["stack_process"])
BLOCKS = 4096
DISK = Disk(index=0, name="root", size_bytes=BLOCKS * BLOCK_SIZE)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """16 MiB of random blocks in a directory store, in four objects."""
    rng = random.Random(1)
    history = History(open_store(f"file://{tmp_path_factory.getbasetemp() / 'stack-store'}"), [DISK])
    for part in range(4):
        for block in range(BLOCKS // 4):
            history.write(0, part * (BLOCKS // 4) + block, rng.randbytes(BLOCK_SIZE))
        history.checkpoint()
    yield history
    history.writer.close()


class Processes:
    """Starts stack processes, all forked from one that has the modules loaded; ends those that still run."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self.root = root
        self.started: list[tuple[BaseProcess, Connection]] = []

    def start(self, plan: ImagePlan, delay_seconds: float = 0) -> tuple[BaseProcess, Connection]:
        mine, its = FORKS.Pipe()
        process = FORKS.Process(
            target=stack_process.run, args=(its, self.url, self.root, plan.model_dump_json(), delay_seconds)
        )
        process.start()
        its.close()
        self.started.append((process, mine))
        return process, mine

    def read_all(self, plan: ImagePlan, count: int) -> list[dict[str, Any]]:
        running = [self.start(plan) for _ in range(count)]
        for _, told in running:
            assert told.recv() == "ready"
        for seed, (_, told) in enumerate(running):
            told.send(("read", seed))
        return [told.recv() for _, told in running]


@pytest.fixture
def processes(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Processes]:
    monkeypatch.setenv("PYTHONPATH", str(Path(stack_process.__file__).parent))
    processes = Processes(f"file://{tmp_path_factory.getbasetemp() / 'stack-store'}", tmp_path)
    yield processes
    for process, _ in processes.started:
        process.kill()
        process.join()


def test_eight_processes_fetch_what_one_fetches(history: History, processes: Processes) -> None:
    """R14.2, R14.4: eight stacks read one disk at once; together they fetch at most 1.1 times one stack's bytes."""
    plan = history.plan(history.time_ns)
    expected = hashlib.sha256(history.disk_at(0, plan.at_ns)).hexdigest()
    one = processes.read_all(plan, 1)
    processes.root = processes.root / "another"
    processes.root.mkdir()
    eight = processes.read_all(plan, 8)
    assert {found["sha256"] for found in one + eight} == {expected}
    ratio = sum(found["fetched_bytes"] for found in eight) / one[0]["fetched_bytes"]
    assert one[0]["fetched_bytes"] > DISK.size_bytes
    assert 0.9 < ratio <= 1.1
    assert sum(found["fetched_bytes"] > 0 for found in eight) > 1, "they shared the work"


def test_killed_while_filling(history: History, processes: Processes) -> None:
    """Invariant 9: whatever moment a filling process is killed at, the next one reads right bytes from the cache."""
    plan = history.plan(history.time_ns)
    expected = hashlib.sha256(history.disk_at(0, plan.at_ns)).hexdigest()

    def filled_bytes() -> int:
        return sum(path.stat().st_blocks for path in (processes.root / "cache").rglob("*.blocks")) * 512

    for attempt in range(4):
        process, told = processes.start(plan, 0.02)
        assert told.recv() == "ready"
        enough_bytes = filled_bytes() + (1 << 20) + attempt * 100_000
        told.send(("read", attempt))
        while filled_bytes() < enough_bytes:
            time.sleep(0.001)
        process.kill()
        process.join()
    assert filled_bytes() < DISK.size_bytes, "they were killed in the middle"
    (found,) = processes.read_all(plan, 1)
    assert found["sha256"] == expected
    assert found["fetched_bytes"] < DISK.size_bytes, "what they had brought was used"


def test_a_killed_stack_leaves_nothing(history: History, processes: Processes) -> None:
    """R14.5: a stack that is killed -9 leaves no file and no space taken outside the shared cache."""
    process, told = processes.start(history.plan(history.time_ns))
    assert told.recv() == "ready"
    told.send(("write", 2000))
    assert told.recv() == "written"
    assert {path.name for path in processes.root.iterdir()} == {"cache"}
    files = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
    assert any("(deleted)" in name and str(processes.root) in name for name in files), "the log is there, unnamed"
    process.kill()
    process.join()
    assert {path.name for path in processes.root.iterdir()} == {"cache"}


@contextlib.contextmanager
def small_file_system(path: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a small tmpfs is mounted by root only")
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


async def test_a_full_disk_fails_one_stack_alone(history: History, tmp_path: Path) -> None:
    """R14.5, invariant 9: a stack whose log's disk is full gets ENOSPC; reads, and the stack beside it, go on."""
    plan = history.plan(history.time_ns)
    cache = open_cache(tmp_path / "cache", history.store, plan)
    before = history.disk_at(0, plan.at_ns)
    with small_file_system(tmp_path / "small", "1m") as small:
        full = Stack.open(plan, cache, small, clock_ns=lambda: 0)
        beside = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0)
        written = 0
        with pytest.raises(OSError) as caught:
            for block in range(BLOCKS):
                await answer(full.exports[0].pwrite(block * BLOCK_SIZE, memoryview(b"f" * BLOCK_SIZE)))
                written += 1
        assert caught.value.errno == errno.ENOSPC
        assert 200 <= written <= 256, "nearly all of the megabyte was used"
        assert (
            await read(full.exports[0], 0, DISK.size_bytes) == b"f" * (written * BLOCK_SIZE) + before[written * 4096 :]
        )
        await answer(full.exports[0].pwrite(0, memoryview(b"g" * BLOCK_SIZE)))  # its slot is there already
        await answer(beside.exports[0].pwrite(0, memoryview(b"b" * BLOCK_SIZE)))
        assert (await read(beside.exports[0], 0, DISK.size_bytes)) == b"b" * BLOCK_SIZE + before[BLOCK_SIZE:]
        assert (await read(full.exports[0], 0, BLOCK_SIZE)) == b"g" * BLOCK_SIZE
        full.close()
        beside.close()
    cache.close()


async def test_a_cache_on_a_full_tmpfs(history: History, tmp_path: Path) -> None:
    """Invariant 9: a tmpfs too small for the cache ends in ENOSPC inside, not in a signal, and reads stay right."""
    plan = history.plan(history.time_ns)
    with small_file_system(tmp_path / "small", "3m") as small:
        cache = open_cache(small, history.store, plan)
        stack = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0)
        parts = []
        for offset in range(0, DISK.size_bytes, 1 << 20):
            parts.append(await read(stack.exports[0], offset, 1 << 20))
        assert b"".join(parts) == history.disk_at(0, plan.at_ns)
        stack.close()
        cache.close()


def test_eight_stacks_open_fast(tmp_path: Path) -> None:
    """R14.2: eight stacks of one history open at once, each within half a second to its first block."""
    rng = random.Random(2)
    disk = Disk(index=0, name="root", size_bytes=1 << 40)
    history = History(open_store("memory:"), [disk])
    low_ns = history.time_ns
    for _ in range(20):
        for _ in range(1000):
            history.write(0, rng.randrange(1 << 28), b"abcd" * 1024)
        history.checkpoint()
    plans = [history.plan(rng.randint(low_ns, history.time_ns)) for _ in range(8)]
    cache = open_cache(tmp_path, history.store, plans[0])

    async def first_block(plan: ImagePlan) -> float:
        started_ns = time.monotonic_ns()
        stack = await asyncio.to_thread(
            Stack.open, plan, cache, tmp_path, clock_ns=time.monotonic_ns, started_ns=started_ns
        )
        await read(stack.exports[0], rng.randrange(1 << 28) * BLOCK_SIZE, BLOCK_SIZE)
        seconds = stack.statistics().first_byte_seconds
        stack.close()
        assert seconds is not None
        return seconds

    async def all_at_once() -> list[float]:
        return await asyncio.gather(*(first_block(plan) for plan in plans))

    assert max(asyncio.run(all_at_once())) < 0.5
    cache.close()
    history.writer.close()
