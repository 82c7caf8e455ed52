"""The server on real sockets, on both event loops: how sessions, exports and the server end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path

import pytest
from nbd_session import DISK_BYTES, Served, SlowExport, closed, event_loop_policy, request, served, simple, told  # noqa: F401

from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.nbd.memory import MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")


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
