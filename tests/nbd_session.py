"""What tests of the NBD server's sessions share: a server, a slow export, raw requests, both event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import uvloop

from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Buffer
from dr_cloud.nbd.memory import MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable

DISK_BYTES = 64 << 20


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(autouse=True)
def told() -> Iterator[list[Any]]:
    """What the log was told."""
    with structlog.testing.capture_logs() as entries:
        yield entries


class SlowExport(MemoryExport):
    """Answers only when the test lets it, in the order that the test likes."""

    def __init__(self, name: str) -> None:
        super().__init__(name, DISK_BYTES)
        self.calls: list[tuple[str, int]] = []
        self.gates: list[asyncio.Future[None]] = []
        self.cancelled = 0

    async def _gated(self, verb: str, offset: int, action: Callable[[], Any]) -> Any:
        gate = asyncio.get_running_loop().create_future()
        self.gates.append(gate)
        self.calls.append((verb, offset))
        try:
            await gate
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return action()

    def pread(self, offset: int, length: int) -> Awaitable[Sequence[Buffer]]:  # type: ignore[override]
        return self._gated("read", offset, lambda: MemoryExport.pread(self, offset, length))

    def pwrite(self, offset: int, data: memoryview, fua: bool = False) -> Awaitable[None]:  # type: ignore[override]
        return self._gated("write", offset, lambda: MemoryExport.pwrite(self, offset, data, fua))

    async def until(self, calls: int) -> None:
        async with asyncio.timeout(5):
            while len(self.calls) < calls:
                await asyncio.sleep(0.001)


class Served:
    def __init__(self, server: NbdServer, table: ExportTable, path: str) -> None:
        self.server, self.table, self.path = server, table, path

    def add(self, export: Any) -> str:
        self.table.add(export)
        return self.server.uris(export.name)[0]

    async def raw(self, name: str, *, structured: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open an export by hand, to send what no client would."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        await reader.readexactly(p.GREETING.size)
        writer.write(p.CLIENT_FLAGS.pack(3))
        if structured:
            writer.write(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STRUCTURED_REPLY, 0))
            await reader.readexactly(p.OPTION_REPLY.size)
        writer.write(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, len(name)) + name.encode())
        await reader.readexactly(p.EXPORT_NAME_REPLY.size)
        return reader, writer


@pytest.fixture
async def served(tmp_socket_dir: Path) -> AsyncIterator[Served]:
    table = ExportTable()
    path = str(tmp_socket_dir / "nbd.sock")
    server = NbdServer(table, handshake_seconds_max=0.3)
    await server.start(unix_path=path)
    yield Served(server, table, path)
    await server.close(1)


def request(command: int, cookie: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return p.REQUEST.pack(p.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


async def simple(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Take a simple reply; return error and cookie."""
    async with asyncio.timeout(5):
        magic, error, cookie = p.SIMPLE_REPLY.unpack(await reader.readexactly(16))
    assert magic == p.SIMPLE_REPLY_MAGIC
    return error, cookie


async def closed(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(5):
        try:
            return await reader.read(1) == b""
        except ConnectionError:
            return True
