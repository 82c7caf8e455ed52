"""One stack's disk: its life, its edges, and how what is shared stays as it was."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stack_journal import History, answer, open_cache, read

from dr_cloud.model.blocks import BLOCK_SIZE, REGION_BLOCKS
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk, ImagePlan
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.export import EXTENTS_MAX, StackExport
from dr_cloud.stack.image import HOLES, Image
from dr_cloud.stack.stack import Stack
from dr_cloud.store.faults import CountingStore, DelayedStore
from dr_cloud.store.open import open_store

REGION_BYTES = REGION_BLOCKS * BLOCK_SIZE
DISKS = [
    Disk(index=0, name="root", size_bytes=100 * BLOCK_SIZE),
    Disk(index=1, name="wide", size_bytes=8 * REGION_BYTES),
]


@pytest.fixture(scope="module")
def history() -> Iterator[History]:
    rng = random.Random(1)
    history = History(open_store("memory:"), DISKS)
    for block in range(50):
        history.write(0, block, rng.randbytes(BLOCK_SIZE))
    for region in range(4):
        history.write(1, region * REGION_BLOCKS + 1, rng.randbytes(BLOCK_SIZE))
    history.checkpoint()
    yield history
    history.writer.close()


@pytest.fixture
def plan(history: History) -> ImagePlan:
    return history.plan(history.time_ns)


@pytest.fixture
def cache(history: History, plan: ImagePlan, tmp_path: Path) -> Iterator[ObjectCache]:
    cache = open_cache(tmp_path / "cache", history.store, plan)
    yield cache
    cache.close()


def open_stack(plan: ImagePlan, cache: ObjectCache, work_dir: Path) -> Stack:
    return Stack.open(plan, cache, work_dir, clock_ns=time.monotonic_ns)


def wide(stack: Stack) -> StackExport:
    return stack.exports[1]


async def test_a_warm_read_is_a_view_and_not_a_copy(plan: ImagePlan, cache: ObjectCache, tmp_path: Path) -> None:
    export = open_stack(plan, cache, tmp_path).exports[0]
    await read(export, 0, export.size_bytes)
    for length in (BLOCK_SIZE, 50 * BLOCK_SIZE):
        (view,) = export.pread(0, length)  # type: ignore[misc]
        assert view.obj is cache.objects[1].data.obj and len(view) == length
    for length in (20 * BLOCK_SIZE, 50 * BLOCK_SIZE):
        assert [len(view) for view in export.pread(50 * BLOCK_SIZE, length)] == [length]  # type: ignore[union-attr]


async def test_times_and_counters(plan: ImagePlan, cache: ObjectCache, tmp_path: Path) -> None:
    """R14.7: what a test's summary tells of its stack."""
    clock = iter(range(0, 10**12, 10**9))
    stack = Stack.open(plan, cache, tmp_path, clock_ns=lambda: next(clock), prefix="t1/", started_ns=-(10**9))
    assert [export.name for export in stack.exports] == ["t1/root", "t1/wide"]
    assert stack.statistics().open_seconds == 1 and stack.statistics().first_byte_seconds is None
    await read(stack.exports[0], 100, BLOCK_SIZE)
    await read(stack.exports[0], 0, BLOCK_SIZE)
    await answer(stack.exports[0].pwrite(0, memoryview(bytes(3 * BLOCK_SIZE))))
    await answer(stack.exports[0].pwrite(10, memoryview(bytes(10))))
    found = stack.statistics()
    assert found.first_byte_seconds == 2
    assert (found.blocks_read, found.blocks_written, found.written_bytes) == (3, 4, 3 * BLOCK_SIZE)
    assert found.stored_bytes == 64 << 10
    assert found.map_bytes == REGION_BLOCKS * 8
    assert found.fetched_bytes > 0
    stack.close()


@pytest.mark.parametrize("before", ["block_status", "pwrite", "trim"])
async def test_the_first_byte_is_timed_whatever_came_before(
    before: str, plan: ImagePlan, cache: ObjectCache, tmp_path: Path
) -> None:
    stack = open_stack(plan, cache, tmp_path)
    export = wide(stack)
    second = memoryview(bytes(BLOCK_SIZE)) if before == "pwrite" else BLOCK_SIZE
    await answer(getattr(export, before)(6 * REGION_BYTES, second))
    assert stack.statistics().first_byte_seconds is None
    await read(export, 6 * REGION_BYTES, BLOCK_SIZE)
    assert stack.statistics().first_byte_seconds is not None
    stack.close()


async def test_a_paused_stack_refuses_everything_and_goes_on_as_it_was(
    history: History, plan: ImagePlan, tmp_path: Path
) -> None:
    """R13.3: warm and cold, reads and writes, also what waits for the store: EPERM; then all is as before."""
    slow = DelayedStore(history.store, 0.2)
    cache = open_cache(tmp_path / "cache", slow, plan)
    stack = open_stack(plan, cache, tmp_path)
    export = stack.exports[0]
    await read(export, 0, 40 * BLOCK_SIZE)
    await answer(export.pwrite(BLOCK_SIZE, memoryview(b"mine" * 1024)))
    before = await read(export, 0, 40 * BLOCK_SIZE)
    stack.pause("uk-south is closed to acme")
    stack.pause("said again")
    held = stack.statistics().map_bytes
    assert held == REGION_BLOCKS * 8
    for request in (
        lambda: export.pread(0, BLOCK_SIZE),
        lambda: export.pread(BLOCK_SIZE, 100),
        lambda: export.pread(60 * BLOCK_SIZE, 8 * BLOCK_SIZE),
        lambda: export.pwrite(0, memoryview(bytes(BLOCK_SIZE))),
        lambda: export.pwrite(BLOCK_SIZE + 7, memoryview(bytes(7))),
        lambda: export.trim(0, REGION_BYTES),
        lambda: export.write_zeroes(0, 100),
        lambda: export.block_status(0, BLOCK_SIZE),
        lambda: wide(stack).trim(0, REGION_BYTES),
        lambda: wide(stack).pread(6 * REGION_BYTES, BLOCK_SIZE),
        export.flush,
    ):
        with pytest.raises(OSError) as caught:
            await answer(request())
        assert caught.value.errno == errno.EPERM
    stack.resume()
    stack.resume()
    assert await read(export, 0, 40 * BLOCK_SIZE) == before
    under_way = [
        asyncio.ensure_future(answer(request))
        for request in (
            wide(stack).pread(BLOCK_SIZE, BLOCK_SIZE),
            wide(stack).pwrite(BLOCK_SIZE + 1, memoryview(b"part")),
            wide(stack).pread(2 * REGION_BYTES, 4 * BLOCK_SIZE),
        )
    ]
    await asyncio.sleep(0.02)
    assert not any(one.done() for one in under_way)
    stack.pause("closed again")
    for one in under_way:
        with pytest.raises(OSError) as caught:
            await one
        assert caught.value.errno == errno.EPERM
    stack.resume()
    assert await read(wide(stack), BLOCK_SIZE, BLOCK_SIZE) == history.at(1, 1, plan.at_ns)
    stack.pause("to the end")
    stack.close()
    stack.resume()
    with pytest.raises(OSError) as caught:
        await answer(export.pread(0, BLOCK_SIZE))
    assert caught.value.errno == errno.ESHUTDOWN
    cache.close()


async def test_close_leaves_nothing_and_is_told(plan: ImagePlan, cache: ObjectCache, tmp_path: Path) -> None:
    """R14.5: after the end neither a file, nor an open one, nor a mapping of the log is left."""
    work_dir = tmp_path / "log-place"
    work_dir.mkdir()
    stack = open_stack(plan, cache, work_dir)
    export = stack.exports[0]
    for block in range(100):
        await answer(export.pwrite(block * BLOCK_SIZE, memoryview(b"x" * BLOCK_SIZE)))

    def traces() -> list[str]:
        found = Path("/proc/self/maps").read_text().splitlines()
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry.path))
        return [name for name in found if "log-place" in name]

    assert os.listdir(work_dir) == [] and traces()
    stack.close()
    assert os.listdir(work_dir) == [] and not traces()
    for request in (
        lambda: export.pread(0, BLOCK_SIZE),
        lambda: export.pwrite(0, memoryview(bytes(BLOCK_SIZE))),
        lambda: export.trim(0, 100),
        lambda: export.block_status(0, BLOCK_SIZE),
    ):
        with pytest.raises(OSError) as caught:
            await answer(request())
        assert caught.value.errno == errno.ESHUTDOWN


async def test_writes_change_nothing_that_is_shared(
    history: History, plan: ImagePlan, cache: ObjectCache, tmp_path: Path
) -> None:
    """R14.5: a region is copied before this stack's first write in it; the keyframe's and the holes stay."""
    one, two = open_stack(plan, cache, tmp_path), open_stack(plan, cache, tmp_path)
    for region in range(8):
        at = region * REGION_BYTES
        await answer(wide(one).pwrite(at + BLOCK_SIZE, memoryview(b"w" * 2 * BLOCK_SIZE)))
        await answer(wide(one).trim(at, BLOCK_SIZE))
        expected = history.at(1, region * REGION_BLOCKS + 1, plan.at_ns)
        assert await read(wide(two), at, 3 * BLOCK_SIZE) == bytes(BLOCK_SIZE) + expected + bytes(BLOCK_SIZE)
        assert await read(wide(one), at, 3 * BLOCK_SIZE) == bytes(BLOCK_SIZE) + b"w" * 2 * BLOCK_SIZE
    assert not HOLES.any()
    assert wide(one).own_map_bytes == 8 * REGION_BLOCKS * 8
    one.close()
    two.close()


async def test_a_trim_of_everything_takes_no_memory(
    history: History, plan: ImagePlan, tmp_path: Path, cache: ObjectCache
) -> None:
    """mkfs discards whole disks first: whole regions become the one region of holes, nothing is fetched or copied."""
    stack = open_stack(plan, cache, tmp_path)
    assert wide(stack).trim(0, wide(stack).size_bytes) is None
    assert wide(stack).own_map_bytes == 0
    assert await answer(wide(stack).block_status(0, wide(stack).size_bytes)) == [(wide(stack).size_bytes, True)]
    assert await read(wide(stack), BLOCK_SIZE, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    await answer(wide(stack).pwrite(BLOCK_SIZE, memoryview(b"y" * BLOCK_SIZE)))
    assert await read(wide(stack), 0, 3 * BLOCK_SIZE) == bytes(4096) + b"y" * BLOCK_SIZE + bytes(4096)
    assert not HOLES.any()
    stack.close()


async def test_a_block_keeps_its_slot(plan: ImagePlan, cache: ObjectCache, tmp_path: Path) -> None:
    """R14.4: writing and trimming the same blocks again and again takes no more space."""
    stack = open_stack(plan, cache, tmp_path)
    export = stack.exports[0]
    for number in range(20):
        data = bytes([number + 1]) * 10 * BLOCK_SIZE
        await answer(export.pwrite(0, memoryview(data)))
        await answer(export.trim(2 * BLOCK_SIZE, 3 * BLOCK_SIZE))
        expected = data[: 2 * BLOCK_SIZE] + bytes(3 * BLOCK_SIZE) + data[5 * BLOCK_SIZE :]
        assert await read(export, 0, 10 * BLOCK_SIZE) == expected
        assert await answer(export.block_status(0, 10 * BLOCK_SIZE)) == [(8192, False), (12288, True), (20480, False)]
    assert stack.statistics().written_bytes == 10 * BLOCK_SIZE
    stack.close()


async def test_block_status_is_bounded_and_goes_on(plan: ImagePlan, cache: ObjectCache, tmp_path: Path) -> None:
    stack = open_stack(plan, cache, tmp_path)
    export = wide(stack)
    for block in range(0, 3 * EXTENTS_MAX, 2):
        await answer(export.pwrite(5 * REGION_BYTES + block * BLOCK_SIZE, memoryview(b"z" * BLOCK_SIZE)))
    offset, extents = 4 * REGION_BYTES, []
    while offset < export.size_bytes:
        found = await answer(export.block_status(offset, export.size_bytes - offset))
        assert 0 < len(found) <= EXTENTS_MAX
        extents += found
        offset += sum(extent.length for extent in found)
    assert offset == export.size_bytes
    assert sum(not extent.hole for extent in extents) == 3 * EXTENTS_MAX // 2
    assert all(extent.length == BLOCK_SIZE for extent in extents if not extent.hole)
    stack.close()


async def test_a_request_given_up_does_not_spoil_the_others(history: History, plan: ImagePlan, tmp_path: Path) -> None:
    """A client that goes away while a group is on its way: others that wait for the group get it."""
    cache = open_cache(tmp_path / "slow", DelayedStore(history.store, 0.05, ["get"]), plan, threads=1)
    stack = await asyncio.to_thread(open_stack, plan, cache, tmp_path)
    for first in (0, 20):
        # The one thread is busy, so that what the requests wait for has not begun when half of them are given up.
        cache.pool.submit(time.sleep, 0.1)
        reads = [read(stack.exports[0], block * BLOCK_SIZE, BLOCK_SIZE) for block in range(first, first + 16)]
        tasks = [asyncio.ensure_future(one) for one in reads]
        await asyncio.sleep(0.03)
        for task in tasks[::2]:
            assert task.cancel()
        for block, data in zip(range(first + 1, first + 16, 2), await asyncio.gather(*tasks[1::2]), strict=True):
            assert data == history.at(0, block, plan.at_ns)
    assert await read(stack.exports[0], 0, 100 * BLOCK_SIZE) == history.disk_at(0, plan.at_ns)
    stack.close()
    cache.close()


async def test_partial_writes_of_one_cold_block_are_all_there(
    history: History, plan: ImagePlan, tmp_path: Path
) -> None:
    """Eight sectors of one block, written while the block is still being fetched: none is lost."""
    cache = open_cache(tmp_path / "slow", DelayedStore(history.store, 0.02, ["get"]), plan)
    stack = await asyncio.to_thread(open_stack, plan, cache, tmp_path)
    export = stack.exports[0]
    sectors = [bytes([number + 1]) * 512 for number in range(8)]
    writes = [answer(export.pwrite(3 * BLOCK_SIZE + i * 512, memoryview(sectors[i]))) for i in (0, 5, 2, 7, 1, 6)]
    await asyncio.gather(*writes)
    old = history.at(0, 3, plan.at_ns)
    expected = b"".join(old[i * 512 : i * 512 + 512] if i in (3, 4) else sectors[i] for i in range(8))
    assert await read(export, 3 * BLOCK_SIZE, BLOCK_SIZE) == expected
    stack.close()
    cache.close()


def test_a_cache_serves_its_own_journal_only(
    history: History, plan: ImagePlan, cache: ObjectCache, tmp_path: Path
) -> None:
    """R11: a plan of another enterprise, or of a journal of the same name, is refused."""
    for other in (
        plan.model_copy(update={"journal": "another"}),
        plan.model_copy(update={"scope": Scope("bolt", "shop", "dc1")}),
    ):
        with pytest.raises(ValueError, match="another journal"):
            open_stack(other, cache, tmp_path)


def test_opening_asks_for_rows_and_not_for_blocks(history: History, plan: ImagePlan, tmp_path: Path) -> None:
    """R14.4: nothing of a disk is copied or fetched by opening."""
    store = CountingStore(history.store)
    cache = open_cache(tmp_path / "c", store, plan)
    stack = open_stack(plan, cache, tmp_path)
    assert store.requests["get"] == len(plan.objects) and store.requests["list"] == 0
    assert stack.statistics().fetched_bytes == stack.statistics().map_bytes == 0
    stack.close()
    cache.close()


@pytest.mark.parametrize("disk_regions", [1, 70_000])
def test_rows_of_disks_and_parts_that_do_not_exist_at_that_time(
    history: History, plan: ImagePlan, cache: ObjectCache, disk_regions: int
) -> None:
    """A disk that came or grew after T has rows between T and the keyframe: they are left out, the others applied."""
    tables = [cache.rows(ref) for ref in plan.objects]
    disks = [Disk(index=1, name="wide", size_bytes=disk_regions * REGION_BYTES)]
    image = Image(plan.model_copy(update={"disks": disks}), None, tables, cache)
    assert int(image.region(1, 0)[1]) >> 32 == 1
    assert np.count_nonzero(image.region(1, 0)) == 1
    if disk_regions > 1:
        assert np.count_nonzero(image.region(1, 3)) == 1
        assert image.is_hole(1, 69_999)
    assert len(image._rows.position) == (1 if disk_regions == 1 else 4)
