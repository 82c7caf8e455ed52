"""A disk behind an NBD server that goes away and comes back."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.nbd.export import Extent
from dr_cloud.nbd.memory import PIECE_BYTES, MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable
from dr_cloud.tap import upstream as upstream_module
from dr_cloud.tap.upstream import NbdDisk

SIZE = 4 * PIECE_BYTES


class Upstream:
    """An NBD server of one RAM disk that can be stopped and started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.export = MemoryExport("up", SIZE)
        self.uri = f"nbd+unix:///up?socket={path}"

    async def start(self) -> None:
        self.table = ExportTable()
        self.table.add(self.export)
        self.server = NbdServer(self.table)
        await self.server.start(unix_path=str(self.path))

    async def stop(self) -> None:
        await self.server.close(0.1)


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[Upstream]:
    upstream = Upstream(tmp_path / "up.sock")
    await upstream.start()
    yield upstream
    await upstream.stop()


async def eventually(call: Callable[[], Awaitable[object]]) -> None:
    for _ in range(200):
        try:
            await call()
            return
        except OSError:
            await asyncio.sleep(0.02)
    pytest.fail("it did not come back")


async def test_same_calls_as_a_file(upstream: Upstream) -> None:
    """R1: read, write, zero, flush and extents reach the upstream disk."""
    disk = await NbdDisk.connect(upstream.uri)
    assert disk.size_bytes == SIZE
    await disk.pwrite(PIECE_BYTES + 100, memoryview(b"a" * 9000))
    await disk.zero(PIECE_BYTES + 200, 50, True)
    await disk.flush()
    assert b"".join(await disk.pread(PIECE_BYTES + 99, 202)) == b"\0" + b"a" * 100 + bytes(50) + b"a" * 51
    assert await disk.extents(0, SIZE, 2) == [Extent(PIECE_BYTES, True), Extent(PIECE_BYTES, False)]
    await disk.close()


async def test_server_without_write_zeroes_gets_data(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = await NbdDisk.connect(upstream.uri)
    await disk.pwrite(0, memoryview(b"a" * (3 << 20)))

    async def unsupported(offset: int, length: int, *, may_trim: bool) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such command")

    assert disk._client is not None
    monkeypatch.setattr(disk._client, "write_zeroes", unsupported)
    await disk.zero(10, (2 << 20) + 5, False)
    content = b"".join(await disk.pread(0, 3 << 20))
    assert content == b"a" * 10 + bytes((2 << 20) + 5) + b"a" * ((1 << 20) - 15)
    await disk.close()


async def test_requests_wait_for_the_server_to_come_back(upstream: Upstream) -> None:
    """R1: an upstream that restarts costs time, no errors."""
    disk = await NbdDisk.connect(upstream.uri)
    await upstream.stop()
    writes = [asyncio.create_task(disk.pwrite(at * 4096, memoryview(bytes([at]) * 4096))) for at in range(8)]
    await asyncio.sleep(0.2)
    assert not any(write.done() for write in writes)
    await upstream.start()
    await asyncio.wait_for(asyncio.gather(*writes), 5)
    assert bytes((await disk.pread(7 * 4096, 1))[0]) == b"\x07"
    await disk.close()


async def test_long_outage_is_eio_until_it_ends(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "OUTAGE_SECONDS_MAX", 0.2)
    disk = await NbdDisk.connect(upstream.uri)
    await upstream.stop()
    for _ in range(2):
        with pytest.raises(OSError, match="gone away") as raised:
            await asyncio.wait_for(disk.pwrite(0, memoryview(b"x")), 5)
        assert raised.value.errno == errno.EIO
    await upstream.start()
    await eventually(lambda: disk.pwrite(0, memoryview(b"x")))
    await disk.close()


async def test_another_size_is_not_the_same_disk(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "OUTAGE_SECONDS_MAX", 0.2)
    disk = await NbdDisk.connect(upstream.uri)
    await upstream.stop()
    upstream.export = MemoryExport("up", SIZE * 2)
    await upstream.start()
    with pytest.raises(OSError, match="gone away"):
        await asyncio.wait_for(disk.pread(0, 1), 5)
    await disk.close()


def test_connection_that_just_broke_can_be_closed(tmp_path: Path) -> None:
    """R1: else nobody would connect anew, and the guest would wait for ever. (Only uvloop minds.)"""

    async def main() -> None:
        upstream = Upstream(tmp_path / "up.sock")
        await upstream.start()
        client = await AsyncNbdClient.connect(upstream.uri)
        client._writer.transport.abort()
        await asyncio.sleep(0)
        await client.close()
        await upstream.stop()

    uvloop.run(main())


async def test_resized_upstream(upstream: Upstream) -> None:
    """R5: a disk that has grown behind its server is measured on a new connection, and used on it."""
    disk = await NbdDisk.connect(upstream.uri)
    assert await disk.measure() == SIZE
    await upstream.table.remove("up")
    upstream.export = MemoryExport("up", SIZE * 2)
    upstream.table.add(upstream.export)
    await eventually(lambda: measured(disk, SIZE * 2))
    disk.size_bytes = SIZE * 2
    await disk.pwrite(SIZE * 2 - 4096, memoryview(b"g" * 4096))
    assert bytes((await disk.pread(SIZE * 2 - 4096, 4096))[0]) == b"g" * 4096
    await upstream.stop()
    assert await disk.measure() == SIZE * 2
    await disk.close()


async def measured(disk: NbdDisk, size_bytes: int) -> None:
    if await disk.measure() != size_bytes:
        raise OSError(errno.EAGAIN, "not yet")


async def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    for uri in (f"nbd+unix:///x?socket={tmp_path}/none", "http://x/", "nbd+unix:///x"):
        with pytest.raises(DrCloudError, match="cannot be opened"):
            await NbdDisk.connect(uri)
