"""Stacks against a dictionary of versions, and their writes against a plain byte array."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stack_journal import History, answer, open_cache, read

from dr_cloud.journal import writer as writer_module
from dr_cloud.model.blocks import BLOCK_SIZE, REGION_BLOCKS
from dr_cloud.model.journal import Disk
from dr_cloud.stack.stack import Stack
from dr_cloud.store.open import open_store

DISKS = [Disk(index=0, name="root", size_bytes=60 * BLOCK_SIZE - 1024), Disk(index=5, name="data", size_bytes=3 << 30)]
EDGES = [0, 1, 2, REGION_BLOCKS - 2, REGION_BLOCKS - 1, REGION_BLOCKS, REGION_BLOCKS + 7, 3 * REGION_BLOCKS - 1]


def random_history(rng: random.Random, history: History, steps: int) -> None:
    for _ in range(steps):
        for _ in range(rng.randrange(1, 40)):
            disk = rng.choice([0, 5])
            block = rng.randrange(60) if disk == 0 else rng.choice(EDGES)
            content = None if rng.random() < 0.2 else rng.randbytes(16) * 256
            count = min(rng.choice([1, 1, 1, 5]), 60 - block) if disk == 0 else 1
            history.write(disk, block, content, count)
        history.checkpoint()


@pytest.mark.parametrize("keyframe_rows", [30, 1 << 18])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
async def test_image_equals_the_oracle(seed: int, keyframe_rows: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """R14.1, R14.3: eight stacks at random times, by undo and by redo, read what the dictionary of versions says."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "KEYFRAME_ROWS", keyframe_rows)
        history = History(open_store("memory:"), DISKS)
        begin_ns = history.time_ns
        random_history(rng, history, rng.randrange(1, 12))
    root = tmp_path_factory.mktemp("cache")
    cache = open_cache(root, history.store, history.plan(history.time_ns))
    try:
        for at_ns in [begin_ns, history.time_ns, *(rng.randint(begin_ns, history.time_ns) for _ in range(6))]:
            stack = Stack.open(history.plan(at_ns), cache, root, clock_ns=lambda: 0)
            root_disk, data_disk = stack.exports
            assert await read(root_disk, 0, root_disk.size_bytes) == history.disk_at(0, at_ns)
            for _ in range(10):
                offset = rng.randrange(root_disk.size_bytes)
                length = rng.randrange(1, root_disk.size_bytes - offset + 1)
                expected = history.disk_at(0, at_ns)[offset : offset + length]
                assert await read(root_disk, offset, length) == expected
            for block in EDGES:
                assert await read(data_disk, block * BLOCK_SIZE, BLOCK_SIZE) == history.at(5, block, at_ns)
            across = (REGION_BLOCKS - 2) * BLOCK_SIZE + 512
            expected = b"".join(history.at(5, REGION_BLOCKS - 2 + i, at_ns) for i in range(10))[512:]
            assert await read(data_disk, across, len(expected)) == expected
            stack.close()
    finally:
        cache.close()
        history.writer.close()


def test_both_directions_are_tried() -> None:
    """R14.3: with keyframes close together the plans above go forward and backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "KEYFRAME_ROWS", 30)
        history = History(open_store("memory:"), DISKS)
        begin_ns = history.time_ns
        random_history(random.Random(5), history, 12)
    plans = [history.plan(at_ns) for at_ns in range(begin_ns, history.time_ns)]
    assert {plan.direction for plan in plans} == {"redo", "undo"}
    assert any(plan.base for plan in plans) and any(plan.base is None for plan in plans)
    history.writer.close()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
async def test_writes_equal_a_byte_array(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """R14.5: any order of writes, trims and reads, aligned or not, over a cold image; block status tells no lie."""
    rng = random.Random(seed)
    history = History(open_store("memory:"), DISKS)
    begin_ns = history.time_ns
    random_history(rng, history, 3)
    root = tmp_path_factory.mktemp("cache")
    plan = history.plan(rng.randint(begin_ns, history.time_ns))
    cache = open_cache(root, history.store, plan)
    stack = Stack.open(plan, cache, root, clock_ns=lambda: 0)
    export = stack.exports[0]
    mirror = bytearray(history.disk_at(0, plan.at_ns))
    grain = rng.choice([1, 512, 4096])
    try:
        for _ in range(60):
            offset = rng.randrange(len(mirror)) // grain * grain
            length = min(len(mirror) - offset, max(grain, rng.choice([100, 5000, 70_000]) // grain * grain))
            what = rng.randrange(5)
            if what <= 1:
                data = rng.randbytes(length)
                await answer(export.pwrite(offset, memoryview(data)))
                mirror[offset : offset + length] = data
            elif what == 2:
                zero = rng.choice([export.trim, export.write_zeroes])
                await answer(zero(offset, length))
                mirror[offset : offset + length] = bytes(length)
            elif what == 3:
                assert await read(export, offset, length) == mirror[offset : offset + length]
            else:
                at = offset
                for extent in await answer(export.block_status(offset, length)):
                    assert extent.length > 0
                    if extent.hole:
                        assert not any(mirror[at : at + extent.length])
                    at += extent.length
                assert offset < at <= offset + length
        assert await read(export, 0, len(mirror)) == mirror
        blocks = np.frombuffer(bytes(mirror).ljust(60 * BLOCK_SIZE, b"\0"), np.uint8).reshape(60, BLOCK_SIZE)
        assert stack.statistics().written_bytes <= blocks.nbytes
    finally:
        stack.close()
        cache.close()
        history.writer.close()


@pytest.mark.parametrize("direction", ["redo", "undo"])
def test_many_rows_of_one_block_keep_their_order(direction: str, tmp_path: Path) -> None:
    """R14.3: the version that wins is the one the order says, also among thousands of one block."""
    rng = random.Random(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "KEYFRAME_ROWS", 4000)
        history = History(open_store("memory:"), DISKS)
        low_ns = history.time_ns + 1
        for number in range(6000):
            history.write(5, rng.choice([3, REGION_BLOCKS + 3]), number.to_bytes(2, "little") * 2048)
            if number % 1000 == 999:
                history.checkpoint()
        history.checkpoint()
        plans = [history.plan(rng.randint(low_ns, history.time_ns)) for _ in range(40)]
    cache = open_cache(tmp_path, history.store, plans[0])
    chosen = [plan for plan in plans if plan.direction == direction]
    assert chosen
    for plan in chosen:
        stack = Stack.open(plan, cache, tmp_path, clock_ns=lambda: 0)
        for block in (3, REGION_BLOCKS + 3):
            region = stack.exports[0]._image.region(5, block // REGION_BLOCKS)
            loc = int(region[block % REGION_BLOCKS])
            cached = cache.open(loc >> 32).result() if loc else None
            if cached:
                for future in cache.fetch(cached, loc & 0xFFFFFFFF, 1):
                    assert future.result() == {}
                at = (loc & 0xFFFFFFFF) * BLOCK_SIZE
                assert cached.data[at : at + BLOCK_SIZE] == history.at(5, block, plan.at_ns)
            else:
                assert history.at(5, block, plan.at_ns) == bytes(BLOCK_SIZE)
        stack.close()
    cache.close()
    history.writer.close()
