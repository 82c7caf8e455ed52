"""The server on real sockets, on both event loops: order, bounds, errors, ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import uvloop

from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd import protocol as p
from dr_cloud.nbd import session as session_module
from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.nbd.memory import MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable

DISK_BYTES = 64 << 20
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")


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


async def test_replies_overtake_each_other(served: Served) -> None:
    slow = SlowExport("slow")
    served.add(slow)
    reader, writer = await served.raw("slow")
    writer.write(b"".join(request(p.CMD_WRITE, n, n * 4096, 4096, bytes([n]) * 4096) for n in (1, 2, 3)))
    writer.write(request(p.CMD_FLUSH, 4, 0, 0))
    await slow.until(3)
    assert slow.calls == [("write", 4096), ("write", 8192), ("write", 12288)], "called in the order of arrival"
    assert await simple(reader) == (0, 4), "the flush covers no write that was not answered, and overtakes them"
    for index, cookie in ((2, 3), (0, 1), (1, 2)):
        slow.gates[index].set_result(None)
        assert await simple(reader) == (0, cookie)
    writer.close()


async def test_data_of_a_write_under_way_stays_as_it_is(served: Served) -> None:
    """Many awaited writes, small and large, keep their payloads while the receive buffer goes round and round."""
    slow = SlowExport("slow")
    client = await AsyncNbdClient.connect(served.add(slow))
    sizes = [512, 4096, 20_000, 40_000, 300_000]
    expected = bytearray(DISK_BYTES)
    for _ in range(3):
        jobs, offset, begun = [], 0, len(slow.calls)
        for index in range(100):
            data = os.urandom(sizes[index % len(sizes)])
            expected[offset : offset + len(data)] = data
            jobs.append(asyncio.create_task(client.pwrite(offset, data)))
            offset += len(data)
        await slow.until(begun + 100)
        for gate in reversed(slow.gates[begun:]):
            gate.set_result(None)
        await asyncio.gather(*jobs)
    assert b"".join(MemoryExport.pread(slow, 0, offset)) == expected[:offset]
    await client.close()


@pytest.mark.parametrize("flags", [0, p.CMD_FLAG_FUA])
async def test_the_next_request_does_not_overwrite_a_write_under_way(served: Served, flags: int) -> None:
    slow = SlowExport("slow")
    served.add(slow)
    reader, writer = await served.raw("slow")
    for n in (1, 2):
        writer.write(request(p.CMD_WRITE, n, n * 4096, 4096, bytes([n]) * 4096, flags))
        await slow.until(n)
    for n in (1, 2):
        slow.gates[n - 1].set_result(None)
        assert await simple(reader) == (0, n)
    assert b"".join(MemoryExport.pread(slow, 4096, 8192)) == b"\1" * 4096 + b"\2" * 4096
    assert served.server.connections == {"slow": 1}
    writer.close()


async def test_requests_under_way_are_bounded(served: Served) -> None:
    slow = SlowExport("slow")
    served.add(slow)
    reader, writer = await served.raw("slow")
    writer.write(b"".join(request(p.CMD_READ, n, 0, 4096) for n in range(1000)))
    await slow.until(session_module.PENDING_MAX)
    await asyncio.sleep(0.05)
    assert len(slow.calls) == session_module.PENDING_MAX
    answered = 0
    while answered < 1000:
        for gate in slow.gates:
            if not gate.done():
                gate.set_result(None)
        await simple(reader)
        await reader.readexactly(4096)
        answered += 1
    assert len(slow.calls) == 1000
    writer.close()


async def test_a_client_that_does_not_read_waits_alone(served: Served) -> None:
    """Replies are held back to a bound; another client is served meanwhile; reading on brings everything."""
    disk = MemoryExport("disk", DISK_BYTES)
    reads = 0

    def counted(offset: int, length: int) -> Sequence[Buffer]:
        nonlocal reads
        reads += 1
        return MemoryExport.pread(disk, offset, length)

    disk.pread = counted  # type: ignore[method-assign]
    uri = served.add(disk)
    loop = asyncio.get_running_loop()
    deaf = socket.socket(socket.AF_UNIX)
    deaf.setblocking(False)
    await loop.sock_connect(deaf, served.path)
    opening = p.CLIENT_FLAGS.pack(3) + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk"
    await loop.sock_sendall(deaf, opening)
    count, length = 200, 1 << 20
    await loop.sock_sendall(deaf, b"".join(request(p.CMD_READ, n, 0, length) for n in range(count)))
    await asyncio.sleep(0.1)
    assert reads <= (session_module.REPLY_BYTES_HIGH + session_module.BATCH_BYTES) // length + 2

    other = await AsyncNbdClient.connect(uri)
    await other.pwrite(1 << 20, b"alive")
    assert await other.pread(1 << 20, 5) == b"alive"
    await other.close()

    left = p.GREETING.size + p.EXPORT_NAME_REPLY.size + count * (16 + length)
    async with asyncio.timeout(20):
        while left:
            data = await loop.sock_recv(deaf, 1 << 20)
            assert data
            left -= len(data)
    assert reads == count + 1
    deaf.close()


async def test_half_a_write_never_reaches_the_disk(served: Served) -> None:
    disk = MemoryExport("disk", DISK_BYTES)
    uri = served.add(disk)
    for length in (4096, 1 << 20):
        reader, writer = await served.raw("disk")
        writer.write(request(p.CMD_WRITE, 1, 0, 4096, b"a" * 4096))
        assert await simple(reader) == (0, 1)
        writer.write(request(p.CMD_WRITE, 2, 0, length, b"b" * (length // 2)))
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    client = await AsyncNbdClient.connect(uri)
    assert await client.pread(0, 4096) == b"a" * 4096
    await client.close()


class FailingExport(MemoryExport):
    """Raises what the test sets."""

    error: Exception | None = None
    later = False

    def _fail(self) -> Any:
        if not self.later:
            assert self.error is not None
            raise self.error

        async def fail() -> Any:
            assert self.error is not None
            raise self.error

        return fail()

    def pread(self, offset: int, length: int) -> Any:
        return self._fail()

    def pwrite(self, offset: int, data: memoryview, fua: bool = False) -> Any:
        return self._fail()

    def flush(self) -> Any:
        return self._fail()

    def block_status(self, offset: int, length: int) -> Any:
        return self._fail()


@pytest.mark.parametrize("later", [False, True])
async def test_errors_reach_the_client_and_the_connection_lives(served: Served, told: list[Any], later: bool) -> None:
    failing = FailingExport("bad", DISK_BYTES)
    failing.later = later
    client = await AsyncNbdClient.connect(served.add(failing))
    for raised, code in [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.ESHUTDOWN, "stopping"), errno.ESHUTDOWN),
        (OSError(errno.EPERM, "no"), errno.EPERM),
        (OSError(errno.EINVAL, "bad"), errno.EINVAL),
        (OSError(errno.EIO, "object e/v/t/journal/1-7.jrn is damaged"), errno.EIO),
        (OSError(errno.ENOENT, "gone"), errno.EIO),
        (OSError("without a number"), errno.EIO),
        (ZeroDivisionError("a bug"), errno.EIO),
    ]:
        failing.error = raised
        for call in (
            client.pread(0, 4096),
            client.pwrite(0, b"x" * 4096),
            client.pwrite(0, b"x" * 100_000),
            client.flush(),
            client.block_status(0, 4096),
        ):
            with pytest.raises(OSError) as caught:
                await call
            assert caught.value.errno == code
            if isinstance(raised, OSError) and raised.strerror:
                assert raised.strerror in str(caught.value)
            else:
                assert "bug" not in str(caught.value)
    await client.close()
    bugs = [entry for entry in told if entry["event"] == "nbd.export_failed"]
    assert [entry["export"] for entry in bugs] == ["bad"] * 5
    assert isinstance(bugs[0]["exc_info"], ZeroDivisionError)
    assert any("1-7.jrn" in entry["error"] for entry in told if entry["event"] == "nbd.io_error")


@pytest.mark.parametrize("later", [False, True])
async def test_a_read_of_the_wrong_length_is_an_error_not_wrong_data(served: Served, later: bool) -> None:
    disk = MemoryExport("disk", DISK_BYTES)

    async def waited(parts: Any) -> Any:
        return parts

    def short(offset: int, length: int) -> Any:
        parts = [bytes(length - 1)] if offset else [bytes(length), b"x"]
        return waited(parts) if later else parts

    disk.pread = short  # type: ignore[method-assign]
    disk.block_status = lambda offset, length: [Extent(0, True)]  # type: ignore[method-assign]
    client = await AsyncNbdClient.connect(served.add(disk))
    for call in (client.pread(0, 4096), client.pread(4096, 4096), client.block_status(0, 4096)):
        with pytest.raises(OSError) as caught:
            await call
        assert caught.value.errno == errno.EIO
    await client.flush()
    await client.close()


async def test_fua_and_no_hole_reach_the_disk(served: Served) -> None:
    seen: list[tuple[Any, ...]] = []
    disk = MemoryExport("disk", DISK_BYTES)
    disk.pwrite = lambda offset, data, fua=False: seen.append(("write", fua))  # type: ignore[method-assign]
    disk.trim = lambda offset, length, fua=False: seen.append(("trim", fua))  # type: ignore[method-assign]
    disk.write_zeroes = lambda *a: seen.append(("zero", *a[2:]))  # type: ignore[method-assign]
    disk.flush = lambda: seen.append(("flush",))  # type: ignore[method-assign]
    client = await AsyncNbdClient.connect(served.add(disk))
    await client.pwrite(0, bytes(4096))
    await client.pwrite(0, bytes(4096), fua=True)
    await client.pwrite(0, bytes(100_000), fua=True)
    await client.trim(0, 4096, fua=True)
    await client.write_zeroes(0, 4096)
    await client.write_zeroes(0, 4096, fua=True, may_trim=False)
    await client.flush()
    await client.close()
    assert seen == [
        ("write", False), ("write", True), ("write", True), ("trim", True),
        ("zero", False, True), ("zero", True, False), ("flush",),
    ]  # fmt: skip


async def test_block_status_of_one_run(served: Served) -> None:
    disk = MemoryExport("disk", DISK_BYTES)
    disk.pwrite(1 << 20, memoryview(b"x"))
    client = await AsyncNbdClient.connect(served.add(disk))
    ask = client._do(p.CMD_BLOCK_STATUS, 4096, 4 << 20, p.CMD_FLAG_REQ_ONE)
    assert (await ask).extents == [Extent((1 << 20) - 4096, True)]
    assert await client.block_status(4096, 4 << 20) == [
        Extent((1 << 20) - 4096, True), Extent(1 << 20, False), Extent((2 << 20) + 4096, True),
    ]  # fmt: skip
    await client.close()


async def test_read_only_and_out_of_range(served: Served) -> None:
    uri = served.add(MemoryExport("ro", 1 << 20, read_only=True))
    client = await AsyncNbdClient.connect(uri)
    assert client.info.read_only
    for size in (4096, 100_000):
        with pytest.raises(OSError) as caught:
            await client.pwrite(0, bytes(size))
        assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError) as caught:
        await client.pread(1 << 20, 1)
    assert caught.value.errno == errno.EINVAL
    assert await client.pread(0, 1 << 20) == bytes(1 << 20)
    await client.close()


async def test_what_breaks_the_protocol_is_closed(served: Served) -> None:
    served.add(MemoryExport("disk", DISK_BYTES))
    for bad in (
        b"\0" * 28,
        request(p.CMD_WRITE, 1, 0, p.PAYLOAD_BYTES_MAX + 1),
        request(p.CMD_READ, 1, 0, 4096)[:4] + b"\xff" * 24 + b"\xff" * 28,
    ):
        reader, writer = await served.raw("disk")
        writer.write(bad)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
    reader, writer = await served.raw("disk", structured=True)
    writer.write(request(99, 5, 0, 0))
    head = await reader.readexactly(p.CHUNK.size)
    assert p.CHUNK.unpack(head)[1:4] == (p.CHUNK_DONE, p.CHUNK_ERROR, 5), "an unknown command is only refused"
    writer.close()


async def test_a_half_open_handshake_times_out(served: Served) -> None:
    reader, writer = await asyncio.open_unix_connection(served.path)
    await reader.readexactly(p.GREETING.size)
    writer.write(p.CLIENT_FLAGS.pack(3) + b"IHAVE")
    assert await closed(reader)
    writer.close()


async def test_an_open_connection_has_no_deadline(served: Served) -> None:
    served.add(MemoryExport("disk", DISK_BYTES))
    reader, writer = await served.raw("disk")
    await asyncio.sleep(0.5)
    writer.write(request(p.CMD_FLUSH, 9, 0, 0))
    assert await simple(reader) == (0, 9)
    writer.close()


async def test_the_number_of_connections_is_bounded(tmp_socket_dir: Path) -> None:
    table = ExportTable()
    table.add(MemoryExport("disk", DISK_BYTES))
    server = NbdServer(table, connections_max=2)
    await server.start(unix_path=str(tmp_socket_dir / "s"))
    uri = server.uris("disk")[0]
    first, second = await AsyncNbdClient.connect(uri), await AsyncNbdClient.connect(uri)
    assert server.connections == {"disk": 2}
    with pytest.raises(OSError):
        await AsyncNbdClient.connect(uri)
    await first.close()
    async with asyncio.timeout(5):
        while server.connections["disk"] == 2:
            await asyncio.sleep(0.01)
    third = await AsyncNbdClient.connect(uri)
    await asyncio.gather(second.close(), third.close())
    await server.close()


async def test_disconnect_answers_what_is_under_way(served: Served) -> None:
    slow = SlowExport("slow")
    served.add(slow)
    reader, writer = await served.raw("slow")
    writer.write(request(p.CMD_WRITE, 1, 0, 4096, b"z" * 4096) + request(p.CMD_DISCONNECT, 2, 0, 0) + b"garbage")
    await slow.until(1)
    await asyncio.sleep(0.02)
    slow.gates[0].set_result(None)
    assert await simple(reader) == (0, 1)
    assert await closed(reader)
    writer.close()


async def test_removing_an_export_ends_its_connections_and_calls(served: Served) -> None:
    slow, disk = SlowExport("slow"), MemoryExport("disk", DISK_BYTES)
    slow_client = await AsyncNbdClient.connect(served.add(slow))
    disk_client = await AsyncNbdClient.connect(served.add(disk))
    write = asyncio.create_task(slow_client.pwrite(0, b"w" * 4096))
    await slow.until(1)
    removal = asyncio.create_task(served.table.remove("slow"))
    await asyncio.sleep(0.05)
    assert not removal.done(), "a call is under way"
    slow.gates[0].set_result(None)
    await asyncio.wait_for(removal, 5)
    await asyncio.wait_for(write, 5)
    with pytest.raises(ConnectionError):
        await slow_client.pread(0, 1)
    with pytest.raises(DrCloudError):
        await AsyncNbdClient.connect(served.server.uris("slow")[0])
    await disk_client.pwrite(0, b"fine")
    assert served.server.connections == {"disk": 1}
    await asyncio.gather(slow_client.close(), disk_client.close())


async def test_a_client_that_goes_leaves_its_writes_to_finish(served: Served) -> None:
    slow = SlowExport("slow")
    served.add(slow)
    _, writer = await served.raw("slow")
    writer.write(request(p.CMD_WRITE, 1, 0, 4096, b"q" * 4096))
    await slow.until(1)
    writer.transport.abort()
    await asyncio.sleep(0.05)
    assert served.server.connections == {"slow": 1}, "its call still runs"
    slow.gates[0].set_result(None)
    await asyncio.sleep(0.05)
    assert served.server.connections == {}
    assert slow.cancelled == 0
    assert b"".join(MemoryExport.pread(slow, 0, 4)) == b"qqqq"


async def test_close_is_bounded_by_its_grace(tmp_socket_dir: Path) -> None:
    table = ExportTable()
    slow = SlowExport("slow")
    table.add(slow)
    server = NbdServer(table)
    await server.start(unix_path=str(tmp_socket_dir / "s"))
    client = await AsyncNbdClient.connect(server.uris("slow")[0])
    read = asyncio.create_task(client.pread(0, 4096))
    await slow.until(1)
    await asyncio.wait_for(server.close(0.1), 3)
    assert slow.cancelled == 1
    with pytest.raises(ConnectionError):
        await read
    assert not (tmp_socket_dir / "s").exists()
    await client.close()


async def test_a_socket_in_use_is_not_taken_a_stale_one_is(served: Served, tmp_socket_dir: Path) -> None:
    with pytest.raises(DrCloudError, match="cannot listen"):
        await NbdServer(ExportTable()).start(unix_path=served.path)
    served.add(MemoryExport("disk", DISK_BYTES))
    await (await AsyncNbdClient.connect(served.server.uris("disk")[0])).close()
    stale = tmp_socket_dir / "stale"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    server = NbdServer(ExportTable())
    await server.start(unix_path=str(stale))
    assert stale.stat().st_mode & 0o777 == 0o600
    await server.close()


async def test_the_rule_sees_who_asks(tmp_socket_dir: Path) -> None:
    """R11: who connects to a unix socket is told by the kernel, not by the client."""
    peers = []
    table = ExportTable(lambda peer, name: peers.append(peer) is None)
    table.add(MemoryExport("disk", 4096))
    server = NbdServer(table)
    await server.start(unix_path=str(tmp_socket_dir / "s"), host="127.0.0.1")
    for uri in server.uris("disk"):
        await (await AsyncNbdClient.connect(uri)).close()
    assert (peers[0].address, peers[0].uid, peers[0].pid) == ("unix", os.getuid(), os.getpid())
    assert peers[-1].address.startswith("127.0.0.1:") and peers[-1].uid is None
    await server.close()


async def test_client_fails_everything_under_way_when_the_server_breaks(tmp_socket_dir: Path) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(p.GREETING.pack(p.NBD_MAGIC, p.OPTION_MAGIC, 3))
        await reader.readexactly(4)
        while True:
            _, option, length = p.OPTION.unpack(await reader.readexactly(16))
            await reader.readexactly(length)
            if option == p.OPT_GO:
                info = p.INFO_EXPORT_BODY.pack(p.INFO_EXPORT, 1 << 20, 1)
                writer.write(p.option_reply(option, p.REP_INFO, info) + p.option_reply(option, p.REP_ACK))
                break
            writer.write(p.option_reply(option, p.REP_ERR_UNSUP))
        await reader.readexactly(3 * 28)
        writer.write(struct.pack(">IIQ", p.SIMPLE_REPLY_MAGIC, 0, 999))
        await reader.read()
        writer.close()

    path = str(tmp_socket_dir / "b")
    server = await asyncio.start_unix_server(broken, path)
    client = await AsyncNbdClient.connect(f"nbd+unix:///x?socket={path}")
    results = await asyncio.gather(*[client.pread(0, 512) for _ in range(3)], return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionError] * 3
    with pytest.raises(ConnectionError, match="broke"):
        await client.pread(0, 512)
    await client.close()
    server.close()
