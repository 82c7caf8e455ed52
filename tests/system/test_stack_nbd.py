"""Stacks behind a real NBD server, as outside clients see them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from stack_journal import KEYS, SCOPE, History, open_cache
from structlog.testing import capture_logs

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import Disk
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.serve import StackServer, serve_stack
from dr_cloud.stack.stack import Stack
from dr_cloud.store import layout
from dr_cloud.store.faults import DamagingStore
from dr_cloud.store.open import open_store

pytestmark = pytest.mark.system

BLOCKS = 2048
DISKS = [
    Disk(index=0, name="root", size_bytes=BLOCKS * BLOCK_SIZE),
    Disk(index=1, name="big", size_bytes=1 << 40),
]


@pytest.fixture(scope="module")
def history() -> Iterator[History]:
    """Data in the first half of `root`, with a hole of 64 blocks in it; a few blocks far apart on `big`."""
    rng = random.Random(1)
    history = History(open_store("memory:"), DISKS)
    for block in range(BLOCKS // 2):
        if not 256 <= block < 320:
            history.write(0, block, rng.randbytes(64) * 64)
    for block in (0, 1 << 20, (1 << 28) - 1):
        history.write(1, block, b"big!" * 1024)
    history.checkpoint()
    for block in range(0, 200, 2):
        history.write(0, block, rng.randbytes(64) * 64)
    history.checkpoint()
    yield history
    history.writer.close()


class Node:
    """Opens and serves stacks, all over one cache."""

    def __init__(self, history: History, cache: ObjectCache, work_dir: Path, sockets: Path) -> None:
        self.history, self.cache, self.work_dir, self.sockets = history, cache, work_dir, sockets
        self.servers: list[StackServer] = []
        self.numbers = itertools.count()

    async def serve(self, at_ns: int, quota_bytes: int | None = None) -> StackServer:
        plan = self.history.plan(at_ns)
        stack = await asyncio.to_thread(
            Stack.open, plan, self.cache, self.work_dir, clock_ns=time.monotonic_ns, quota_bytes=quota_bytes
        )
        server = await serve_stack(stack, self.cache, unix_path=str(self.sockets / f"{next(self.numbers)}.sock"))
        self.servers.append(server)
        return server


@pytest.fixture
async def node(history: History, tmp_path: Path, tmp_socket_dir: Path) -> AsyncIterator[Node]:
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    cache = open_cache(tmp_path / "cache", history.store, history.plan(history.time_ns))
    node = Node(history, cache, work_dir, tmp_socket_dir)
    yield node
    for server in node.servers:
        await server.close()
    cache.close()
    assert os.listdir(work_dir) == [] and os.listdir(tmp_socket_dir) == []


async def run(*command: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


async def copy_out(uri: str, path: Path) -> bytes:
    code, _, err = await run("nbdcopy", uri, str(path))
    assert code == 0, err
    return path.read_bytes()


async def test_nbdcopy_reads_each_time(
    node: Node, history: History, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    """R14.1, R14.2: stacks of several times at once, each copied whole by an outside client."""
    require_tool("nbdcopy")
    rng = random.Random(3)
    times = [rng.randint(1_000, history.time_ns) for _ in range(4)]
    servers = await asyncio.gather(*(node.serve(at_ns) for at_ns in times))
    copies = await asyncio.gather(*(copy_out(s.uris["root"][0], tmp_path / f"{i}.raw") for i, s in enumerate(servers)))
    for at_ns, copy in zip(times, copies, strict=True):
        assert copy == history.disk_at(0, at_ns)


async def test_nbdinfo_map_shows_holes(node: Node, history: History, require_tool: Callable[[str], str]) -> None:
    require_tool("nbdinfo")
    server = await node.serve(history.time_ns)
    code, out, err = await run("nbdinfo", "--map", "--json", server.uris["root"][0])
    assert code == 0, err
    assert [(e["offset"] // 4096, e["length"] // 4096, e["type"]) for e in json.loads(out)] == [
        (0, 256, 0),
        (256, 64, 3),
        (320, BLOCKS // 2 - 320, 0),
        (BLOCKS // 2, BLOCKS // 2, 3),
    ]
    started = time.monotonic()
    code, out, err = await run("nbdinfo", "--map", "--json", server.uris["big"][0])
    assert code == 0, err
    data = [(e["offset"] // 4096, e["length"] // 4096) for e in json.loads(out) if e["type"] == 0]
    assert data == [(0, 1), (1 << 20, 1), ((1 << 28) - 1, 1)]
    assert time.monotonic() - started < 10, "a terabyte of holes is told quickly"


async def test_fio_verifies_what_it_wrote(node: Node, history: History, require_tool: Callable[[str], str]) -> None:
    """R14.5: fio writes blocks of many sizes at random places and verifies each one's checksum."""
    require_tool("fio")
    server = await node.serve(history.time_ns)
    code, out, err = await run(
        "fio",
        "--name=v",
        "--ioengine=nbd",
        f"--uri={server.uris['root'][0]}",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--bs_unaligned=0",
        "--blockalign=512",
        "--iodepth=16",
        f"--size={BLOCKS * BLOCK_SIZE}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randseed=5",
    )
    assert code == 0, out + err
    statistics = server.stack.statistics()
    assert statistics.blocks_written > 1000
    assert statistics.stored_bytes <= 1.1 * statistics.written_bytes + (64 << 10)


async def test_qemu_io_sees_writes_zeroes_and_trims(
    node: Node, history: History, require_tool: Callable[[str], str]
) -> None:
    require_tool("qemu-io")
    server = await node.serve(history.time_ns)
    commands = [
        "write -P 0xab 1000 5000",
        "read -P 0xab 1000 5000",
        "write -z 2048 4096",
        "read -P 0 2048 4096",
        "read -P 0xab 1000 1048",
        "discard 1M 256k",
        "read -P 0 1M 256k",
        "write -P 0xcd -f 1100k 8k",
        "read -P 0xcd 1100k 8k",
        "read -P 0 1M 76k",
        "flush",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    code, out, err = await run("qemu-io", "-f", "raw", *arguments, server.uris["root"][0])
    assert code == 0, out + err
    assert "failed" not in out, out


async def test_writes_stay_in_their_stack(
    node: Node, history: History, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    """R14.5: one test overwrites its whole disk; another of the same time, the cache and the store show none of it."""
    require_tool("nbdcopy")
    before = {key: history.store.get(key) for key, _ in history.store.list("")}
    writes, beside = await node.serve(history.time_ns), await node.serve(history.time_ns)
    expected = history.disk_at(0, history.time_ns)
    assert await copy_out(beside.uris["root"][0], tmp_path / "before.raw") == expected
    noise = tmp_path / "noise.raw"
    noise.write_bytes(random.Random(9).randbytes(DISKS[0].size_bytes))
    code, _, err = await run("nbdcopy", str(noise), writes.uris["root"][0])
    assert code == 0, err
    assert await copy_out(writes.uris["root"][0], tmp_path / "written.raw") == noise.read_bytes()
    assert await copy_out(beside.uris["root"][0], tmp_path / "after.raw") == expected
    await writes.close()
    fresh = await node.serve(history.time_ns)
    assert await copy_out(fresh.uris["root"][0], tmp_path / "fresh.raw") == expected
    assert {key: history.store.get(key) for key, _ in history.store.list("")} == before
    noisy = noise.read_bytes()[:64]
    assert not any(noisy in path.read_bytes() for path in node.cache.folder.path.iterdir())


async def test_a_quota_reaches_the_client_as_enospc(
    node: Node, history: History, require_tool: Callable[[str], str]
) -> None:
    """R14.5, invariant 9: the test that writes too much is told "no space"; the one beside it goes on."""
    require_tool("qemu-io")
    small, beside = await node.serve(history.time_ns, quota_bytes=1 << 20), await node.serve(history.time_ns)
    code, out, err = await run("qemu-io", "-f", "raw", "-c", "write -P 1 0 2M", small.uris["root"][0])
    assert code == 1 and "No space left" in out + err
    code, out, err = await run("qemu-io", "-f", "raw", "-c", "write -P 1 0 2M", beside.uris["root"][0])
    assert code == 0, out + err
    code, out, err = await run("qemu-io", "-f", "raw", "-c", "read 0 2M", small.uris["root"][0])
    assert code == 0, out + err


async def test_a_damaged_object_reaches_the_client_as_eio(
    history: History, tmp_path: Path, tmp_socket_dir: Path, require_tool: Callable[[str], str]
) -> None:
    """R14.3, invariant 3: flipped bytes in the store are EIO on the wire and the object's key in the log."""
    require_tool("qemu-io")
    store = DamagingStore(history.store)
    plan = history.plan(history.time_ns)
    key = layout.journal_key(SCOPE, history.writer.generation, 1)
    assert KEYS.scope == SCOPE
    cache = open_cache(tmp_path / "cache", store, plan)
    index = cache.open(1).result().index
    group = int(index.first_block.searchsorted(400, "right")) - 1
    store.flip(key, int(index.offset[group]) + 20)
    stack = Stack.open(plan, cache, tmp_path, clock_ns=time.monotonic_ns)
    server = await serve_stack(stack, cache, unix_path=str(tmp_socket_dir / "s"))
    with capture_logs() as logs:
        code, out, err = await run("qemu-io", "-f", "raw", "-c", "read 0 4M", server.uris["root"][0])
    assert code == 1 and "Input/output error" in out + err
    assert any(key in str(entry) for entry in logs)
    code, out, err = await run("qemu-io", "-f", "raw", "-c", "read 0 1M", server.uris["root"][0])
    assert code == 0, out + err
    await server.close()
    cache.close()
