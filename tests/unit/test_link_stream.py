from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from dr_cloud.link.messages import MESSAGE_BYTES_MAX
from dr_cloud.link.stream import PlainStream, address_of, connect, listen, split_address
from dr_cloud.model.errors import DrCloudError, ProtocolError


async def echo(stream: PlainStream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_messages_keep_their_kind_and_order(kind: str, tmp_socket_dir: Path) -> None:
    server = await listen("tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_socket_dir}/s", echo)
    stream = await connect(address_of(server))
    sent = ["text ü", b"", b"data", "", bytes(3 << 20)]
    for message in sent:
        await stream.send(message)
    assert [await stream.receive() for _ in sent] == sent
    stream.end()
    assert await stream.receive() is None
    with pytest.raises(OSError):
        await stream.send("late")
    server.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<IB", 3, 0) + b"abc",
        struct.pack("<IB", MESSAGE_BYTES_MAX + 1, 2),
        struct.pack("<IB", 2, 1) + b"\xff\xff",
        struct.pack("<IB", 10, 2) + b"short",
        b"\x01",
    ],
    ids=range(6),
)
async def test_garbage_is_a_protocol_error(data: bytes, tmp_socket_dir: Path) -> None:
    seen: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def serve(stream: PlainStream) -> None:
        try:
            seen.set_result(await stream.receive())
        except Exception as error:
            seen.set_exception(error)

    server = await listen(f"unix:{tmp_socket_dir}/s", serve)
    _, writer = await asyncio.open_unix_connection(f"{tmp_socket_dir}/s")
    writer.write(data)
    writer.write_eof()
    with pytest.raises(ProtocolError):
        await asyncio.wait_for(seen, 5)
    writer.close()
    server.close()


@pytest.mark.parametrize("address", ["", "unix:", "tcp:host", "tcp::1", "tcp:h:x", "tcp:h:70000", "http://h"])
def test_a_bad_address_says_how_to_write_one(address: str) -> None:
    with pytest.raises(DrCloudError, match="not an address"):
        split_address(address)
