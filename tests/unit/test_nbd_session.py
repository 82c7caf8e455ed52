"""The server on real sockets, on both event loops: order, bounds, errors."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from nbd_session import DISK_BYTES, Served, SlowExport, closed, event_loop_policy, request, served, simple, told  # noqa: F401

from dr_cloud.nbd import protocol as p
from dr_cloud.nbd import server as server_module
from dr_cloud.nbd import session as session_module
from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.nbd.memory import MemoryExport

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")


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
    in_kernel = 2 * server_module.SEND_BUFFER_BYTES  # It keeps twice what it is asked for.
    assert reads <= (session_module.REPLY_BYTES_HIGH + session_module.BATCH_BYTES + in_kernel) // length + 2

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
