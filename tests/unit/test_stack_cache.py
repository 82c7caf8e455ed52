"""The object cache within one process: fetched once, kept apart, never wrong bytes, evicted only when unused."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stack_journal import SCOPE, History, open_cache, read
from structlog.testing import capture_logs

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.stack import folder as folder_module
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.stack.stack import Stack
from dr_cloud.store import layout
from dr_cloud.store.errors import StoreUnavailableError
from dr_cloud.store.faults import CountingStore, DamagingStore, DelayedStore, FailingStore, Fault
from dr_cloud.store.open import open_store

BLOCKS = 512
DISK = Disk(index=0, name="root", size_bytes=BLOCKS * BLOCK_SIZE)


@pytest.fixture(scope="module")
def history() -> Iterator[History]:
    """Two objects of 256 random blocks, adjacent on the disk: 16 groups each."""
    rng = random.Random(1)
    history = History(open_store("memory:"), [DISK])
    for half in range(2):
        for block in range(256):
            history.write(0, half * 256 + block, rng.randbytes(BLOCK_SIZE))
        history.checkpoint()
    yield history
    history.writer.close()


def journal_key(history: History, number: int = 1) -> str:
    return layout.journal_key(SCOPE, history.writer.generation, number)


async def test_what_one_stack_fetched_no_other_fetches(history: History, tmp_path: Path) -> None:
    """R14.4: a second stack (its own view of the cache, its own store) asks the store for nothing at all."""
    stores = [CountingStore(history.store) for _ in range(2)]
    plan = history.plan(history.time_ns)
    expected = history.disk_at(0, plan.at_ns)
    for store in stores:
        cache = open_cache(tmp_path, store, plan)
        stack = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0)
        assert await read(stack.exports[0], 0, len(expected)) == expected
        stack.close()
        cache.close()
    assert stores[0].bytes["get"] > len(expected)
    assert stores[1].requests["get"] == 0


async def test_sequential_reading_asks_seldom_and_random_reading_little(history: History, tmp_path: Path) -> None:
    plan = history.plan(history.time_ns)
    store = CountingStore(history.store)
    cache = open_cache(tmp_path / "a", store, plan)
    export = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0).exports[0]
    await read(export, 0, BLOCK_SIZE)
    await read(export, 256 * BLOCK_SIZE, BLOCK_SIZE)
    store.reset()
    for block in range(BLOCKS):
        await read(export, block * BLOCK_SIZE, BLOCK_SIZE)
    assert store.requests["get"] <= 10, "32 groups in 10 requests, because they are asked for in order"
    cache.close()
    store = CountingStore(history.store)
    cache = open_cache(tmp_path / "b", store, plan)
    export = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0).exports[0]
    await read(export, 0, BLOCK_SIZE)
    store.reset()
    for block in (200, 40, 100):
        await read(export, block * BLOCK_SIZE, BLOCK_SIZE)
    assert store.requests["get"] == 3
    assert store.bytes["get"] < 3 * 17 * BLOCK_SIZE, "one group each"
    cache.close()


def test_many_threads_fetch_a_group_once(history: History, tmp_path: Path) -> None:
    plan = history.plan(history.time_ns)
    store = CountingStore(DelayedStore(history.store, 0.01, ["get"]))
    caches = [open_cache(tmp_path, store, plan) for _ in range(4)]
    caches[0].open(1).result()
    store.reset()
    start = threading.Barrier(8)

    def work(number: int) -> None:
        cache = caches[number % 4]
        cached = cache.open(1).result()
        start.wait()
        for block in range(0, 256, 16):
            for future in cache.fetch(cached, block, 1):
                assert future.result() == {}
            assert cached.data[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] == history.at(0, block, plan.at_ns)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 256 * BLOCK_SIZE < store.bytes["get"] < 256 * BLOCK_SIZE * 1.05
    for cache in caches:
        cache.close()


async def test_a_damaged_group_is_eio_and_the_rest_is_served(history: History, tmp_path: Path) -> None:
    """R14.3, invariant 3: flipped bytes in the store give EIO, a log line with the object's key, never other bytes."""
    plan = history.plan(history.time_ns)
    store = DamagingStore(history.store)
    cache = open_cache(tmp_path, store, plan)
    export = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0).exports[0]
    index = cache.open(1).result().index
    store.flip(journal_key(history), int(index.offset[3]) + 100, 1)
    # One request of the store brings all groups; who waits for a sound one of them gets it.
    whole, sound = await asyncio.gather(
        read(export, 0, 256 * BLOCK_SIZE), read(export, 100 * BLOCK_SIZE, BLOCK_SIZE), return_exceptions=True
    )
    assert isinstance(whole, OSError) and sound == history.at(0, 100, plan.at_ns)
    for _ in range(2):
        with capture_logs() as logs, pytest.raises(OSError) as caught:
            await read(export, 0, 256 * BLOCK_SIZE)
        assert caught.value.errno == errno.EIO
        assert any(journal_key(history) in entry["error"] for entry in logs)
    assert store.fired
    for block in [*range(48), *range(64, BLOCKS)]:
        assert await read(export, block * BLOCK_SIZE, BLOCK_SIZE) == history.at(0, block, plan.at_ns)
    for block in range(48, 64):
        with pytest.raises(OSError):
            await read(export, block * BLOCK_SIZE, BLOCK_SIZE)
    store.heal()
    assert await read(export, 0, DISK.size_bytes) == history.disk_at(0, plan.at_ns)
    cache.close()


async def test_a_store_outage_is_eio_until_it_ends(history: History, tmp_path: Path) -> None:
    plan = history.plan(history.time_ns)
    store = FailingStore(history.store, [Fault("get", "journal/", skip=2, times=6)])
    cache = open_cache(tmp_path, store, plan)
    export = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0).exports[0]
    failed = 0
    for _ in range(20):
        try:
            data = await read(export, 0, 16 * BLOCK_SIZE)
        except OSError as error:
            assert error.errno == errno.EIO
            failed += 1
        else:
            assert data == history.disk_at(0, plan.at_ns)[: 16 * BLOCK_SIZE]
            break
    assert 1 <= failed <= 6 and store.fired == [6]
    cache.close()


def test_an_outage_while_opening_is_told(history: History, tmp_path: Path) -> None:
    plan = history.plan(history.time_ns)
    cache = open_cache(tmp_path, FailingStore(history.store, [Fault("get", times=100)]), plan)
    with pytest.raises(StoreUnavailableError):
        Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0)
    cache.close()


@pytest.mark.parametrize("room_bytes", [0, 3000, 300_000, 600_000])
async def test_a_full_file_system_costs_speed_only(
    room_bytes: int, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 9: without space for the cache every read is answered all the same."""
    plan = history.plan(history.time_ns)
    room = [room_bytes]
    real_write = folder_module._write_all

    def write(fd: int, data: bytes | memoryview, offset: int) -> None:
        if len(data) > room[0]:
            # A part is written, as a full file system does.
            real_write(fd, memoryview(data)[: room[0]], offset)
            room[0] = 0
            raise OSError(errno.ENOSPC, "no space left")
        room[0] -= len(data)
        real_write(fd, data, offset)

    monkeypatch.setattr(folder_module, "_write_all", write)
    cache = open_cache(tmp_path, history.store, plan)
    export = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0).exports[0]
    for _ in range(2):
        for block in random.Random(2).sample(range(BLOCKS), 60):
            assert await read(export, block * BLOCK_SIZE, BLOCK_SIZE) == history.at(0, block, plan.at_ns)
    assert await read(export, 0, DISK.size_bytes) == history.disk_at(0, plan.at_ns)
    await_nothing = export.pwrite(512, memoryview(b"x" * 100))
    if await_nothing is not None:
        await await_nothing
    assert (await read(export, 0, 1024))[512:612] == b"x" * 100
    assert room[0] == 0
    cache.close()


async def test_bytes_without_presence_are_not_served(history: History, tmp_path: Path) -> None:
    """A process that dies between the data and its presence byte leaves nothing wrong behind."""
    plan = history.plan(history.time_ns)
    cache = open_cache(tmp_path, history.store, plan)
    cached = cache.open(1).result()
    path = next(cache.folder.path.glob("object-*.blocks"))
    with path.open("r+b") as file:
        file.write(b"garbage " * 512 * 256)
    assert not cached.has(0, 1)
    export = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0).exports[0]
    assert await read(export, 0, DISK.size_bytes) == history.disk_at(0, plan.at_ns)
    cache.close()


async def test_eviction_takes_what_is_longest_unused_and_never_what_is_mapped(history: History, tmp_path: Path) -> None:
    plan = history.plan(history.time_ns)
    first = open_cache(tmp_path, history.store, plan)
    export = Stack.open(plan, first, tmp_path, clock_ns=lambda: 0).exports[0]
    await read(export, 0, DISK.size_bytes)
    second = open_cache(tmp_path, history.store, plan, limit_bytes=1 << 20)
    assert second.folder.used_bytes() > 2 << 20
    second.tidy()
    assert len(list(first.folder.path.glob("*.blocks"))) == 2, "mapped by the first"
    # The first uses object 2 only, and is over its limit as well: object 1 goes.
    first.folder.limit_bytes = 1_700_000
    names: list[str] = []
    for _ in range(100):
        first.tidy()
        await read(export, 300 * BLOCK_SIZE, BLOCK_SIZE)
        names = [path.name for path in first.folder.path.glob("*.blocks")]
        if len(names) == 1:
            break
        await asyncio.sleep(0.01)  # A thread that filled object 1 may still be leaving its job.
    assert len(names) == 1 and "2" in names[0].split("-")[-1]
    assert first.folder.used_bytes() <= 1_700_000
    assert await read(export, 0, DISK.size_bytes) == history.disk_at(0, plan.at_ns)
    first.close()
    second.close()


async def test_reads_are_right_while_everything_is_evicted(history: History, tmp_path: Path) -> None:
    """Views that are still being sent, and fetches under way, stay right while another process evicts all it can."""
    plan = history.plan(history.time_ns)
    cache = open_cache(tmp_path, history.store, plan, limit_bytes=4096)
    other = open_cache(tmp_path, history.store, plan, limit_bytes=4096)
    export = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0).exports[0]
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            cache.tidy()
            other.tidy()
            time.sleep(0.001)

    thread = threading.Thread(target=evict)
    thread.start()
    rng = random.Random(4)
    held = []
    for _ in range(60):
        first = rng.randrange(BLOCKS - 20)
        result = export.pread(first * BLOCK_SIZE, 20 * BLOCK_SIZE)
        held.append((first, result if isinstance(result, list) else await result))  # type: ignore[misc]
    stop.set()
    thread.join()
    whole = history.disk_at(0, plan.at_ns)
    for first, parts in held:
        assert b"".join(map(bytes, parts)) == whole[first * BLOCK_SIZE : (first + 20) * BLOCK_SIZE]
    cache.close()
    other.close()


def test_a_table_is_made_once_and_a_broken_one_begun_again(tmp_path: Path) -> None:
    folders = [CacheFolder(tmp_path, SCOPE, "x", 1 << 30) for _ in range(4)]
    (folders[0].path / "rows.part").write_bytes(b"left by a crash, longer than the table")
    made = []

    def build() -> bytes:
        made.append(1)
        time.sleep(0.05)
        return b"the table"

    threads = [threading.Thread(target=lambda f=folder: f.table("rows", build)) for folder in folders * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert folders[0].table("rows", build) == b"the table"
    assert {path.name for path in folders[0].path.iterdir()} == {"rows", "lock"}


def test_scopes_and_journals_are_apart_and_private(tmp_path: Path) -> None:
    """R11: every enterprise's cache is a folder of its own that others may not enter; eviction stays inside it."""
    acme = CacheFolder(tmp_path, SCOPE, "one", 1)
    same_names = CacheFolder(tmp_path, SCOPE, "two", 1 << 30)
    other = CacheFolder(tmp_path, Scope("bolt", "shop", "dc1"), "one", 1 << 30)
    for folder, text in ((acme, b"1"), (same_names, b"2"), (other, b"3")):
        assert folder.table("t", lambda text=text: text) == text
    for directory in (acme.path, *acme.path.parents):
        if directory == tmp_path:
            break
        assert directory.stat().st_mode & 0o777 == 0o700
    assert (acme.path / "t").stat().st_mode & 0o777 == 0o600
    acme.evict()
    assert not (acme.path / "t").exists() and (other.path / "t").exists()
    os.chmod(other.path, 0o755)
    with pytest.raises(DrCloudError, match="not private"):
        CacheFolder(tmp_path, Scope("bolt", "shop", "dc1"), "one", 1)


def test_the_cache_of_another_boot_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """After a power cut pages may have reached the disk in any order: what another boot left is not trusted."""
    old = tmp_path / "boot-01234567-89ab-cdef-0123-456789abcdef" / "acme"
    old.mkdir(parents=True)
    (old / "table").write_text("old")
    (tmp_path / "boot-sequence").mkdir()
    (tmp_path / "mine").write_text("kept")
    folder = CacheFolder(tmp_path, SCOPE, "x", 1)
    assert {path.name for path in tmp_path.iterdir()} == {folder.path.parents[3].name, "boot-sequence", "mine"}
