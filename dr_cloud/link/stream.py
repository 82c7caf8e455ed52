"""Messages over a plain unix or TCP stream: the local transport under `dr_cloud.link.messages`.

Layout. Each message is a 5-byte little-endian head and its bytes::

    offset  size  field
         0     4  length of the bytes that follow the head
         4     1  kind: 1 text (UTF-8), 2 binary

Addresses are written `unix:/path/to/socket` or `tcp:host:port`. The transport neither proves who speaks nor hides
what is said: use it inside one machine. `MessageStream` has the same shape as a WebSocket connection, which takes
its place between sites.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from dr_cloud.link.messages import MESSAGE_BYTES_MAX
from dr_cloud.model.errors import DrCloudError, ProtocolError

_HEAD: Final = struct.Struct("<IB")
_TEXT: Final = 1
_BINARY: Final = 2
_READ_AHEAD_BYTES: Final = 1 << 20
_WRITE_HIGH_BYTES: Final = 2 << 20


class MessageStream(Protocol):
    """An ordered, reliable carrier of text and binary messages."""

    async def send(self, message: str | bytes) -> None:
        """Send one message; waits while the peer is slow. Raises `OSError` if the peer is gone."""

    async def receive(self) -> str | bytes | None:
        """Return the next message, None at a clean end. Raises `ProtocolError` or `OSError`."""

    def end(self) -> None:
        """Close after what was sent has left."""

    def close(self) -> None:
        """Close at once; what was not sent is lost."""


class PlainStream:
    """`MessageStream` over a unix or TCP stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)

    async def send(self, message: str | bytes) -> None:
        """Send one message; waits while the peer is slow."""
        body, kind = (message.encode(), _TEXT) if isinstance(message, str) else (message, _BINARY)
        if self._writer.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._writer.writelines((_HEAD.pack(len(body), kind), body))
        await self._writer.drain()

    async def receive(self) -> str | bytes | None:
        """Return the next message, None at a clean end between two messages."""
        try:
            length, kind = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ProtocolError("the connection ended in the middle of a message") from None
            return None
        if kind not in (_TEXT, _BINARY) or length > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a message of kind {kind} and {length} bytes is not of this protocol")
        try:
            body = await self._reader.readexactly(length)
        except asyncio.IncompleteReadError:
            raise ProtocolError("the connection ended in the middle of a message") from None
        if kind == _BINARY:
            return body
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"a text message is not UTF-8: {error}") from None

    def end(self) -> None:
        """Close after what was sent has left."""
        self._writer.close()

    def close(self) -> None:
        """Close at once."""
        self._writer.transport.abort()


def split_address(address: str) -> tuple[str, str, int]:
    """Return (`unix`, path, 0) or (`tcp`, host, port), or raise `DrCloudError` that says how to write one."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        return "unix", rest, 0
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdecimal() and int(port) < 1 << 16:
        return "tcp", host.strip("[]"), int(port)
    raise DrCloudError(f"{address!r} is not an address", "Write unix:/path/to/socket or tcp:host:port.")


async def connect(address: str) -> PlainStream:
    """Connect to `address`. Raises `OSError` if nobody answers."""
    scheme, host, port = split_address(address)
    if scheme == "unix":
        return PlainStream(*await asyncio.open_unix_connection(host, limit=_READ_AHEAD_BYTES))
    return PlainStream(*await asyncio.open_connection(host, port, limit=_READ_AHEAD_BYTES))


async def listen(address: str, serve: Callable[[PlainStream], Awaitable[None]]) -> asyncio.Server:
    """Serve every connection to `address` with `serve`; the stream is closed when it returns."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = PlainStream(reader, writer)
        try:
            await serve(stream)
        finally:
            stream.end()

    scheme, host, port = split_address(address)
    if scheme == "unix":
        return await asyncio.start_unix_server(on_connection, host, limit=_READ_AHEAD_BYTES)
    return await asyncio.start_server(on_connection, host, port, limit=_READ_AHEAD_BYTES)


def address_of(server: asyncio.Server) -> str:
    """Return the address that `server` listens on (the real port where 0 was asked for)."""
    name = server.sockets[0].getsockname()
    return f"unix:{name}" if isinstance(name, str) else f"tcp:{name[0]}:{name[1]}"
