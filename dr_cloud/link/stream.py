"""Messages over a plain unix or TCP stream: the local transport under `dr_cloud.link.messages`.

Layout. Each message is a 5-byte little-endian head and its bytes::

    offset  size  field
         0     4  length of the bytes that follow the head
         4     1  kind: 1 text (UTF-8), 2 binary

Addresses are written `unix:/path/to/socket` or `tcp:host:port`. The transport neither proves who speaks nor hides
what is said: use it inside one machine. `MessageStream` has the same shape as a WebSocket connection, which takes
its place between sites.

Copies. A message of many parts is handed to the socket part by part. One that comes in is read into a buffer of its
own length, but for what arrived together with the message before it.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, cast

import numpy as np

from dr_cloud.link.messages import MESSAGE_BYTES_MAX
from dr_cloud.model.errors import DrCloudError, ProtocolError

_HEAD: Final = struct.Struct("<IB")
_TEXT: Final = 1
_BINARY: Final = 2
_STAGING_BYTES: Final = 16 << 10
_WAITING_BYTES_MAX: Final = 4 << 20
"""Received and not yet asked for: beyond this no more is read."""
_WRITE_HIGH_BYTES: Final = 2 << 20

Parts = Sequence[bytes | bytearray | memoryview]
Message = str | bytes | bytearray | memoryview | Parts
"""What can be sent: text, or binary in one or many parts."""
Received = str | memoryview
"""What comes: text, or binary as a view of a buffer that nobody else holds."""


class MessageStream(Protocol):
    """An ordered, reliable carrier of text and binary messages."""

    async def send(self, message: Message) -> None:
        """Send one message; waits while the peer is slow. Raises `OSError` if the peer is gone."""

    async def receive(self) -> Received | None:
        """Return the next message, None at a clean end. Raises `ProtocolError` or `OSError`."""

    def end(self) -> None:
        """Close after what was sent has left."""

    def close(self) -> None:
        """Close at once; what was not sent is lost."""


def parts_of(message: Message) -> tuple[bool, Parts]:
    """Return whether a message is text, and its bytes in parts."""
    if isinstance(message, str):
        return True, (message.encode(),)
    if isinstance(message, bytes | bytearray | memoryview):
        return False, (message,)
    return False, message


class PlainStream(asyncio.BufferedProtocol):
    """`MessageStream` over a unix or TCP stream."""

    def __init__(self, serve: Callable[[PlainStream], Awaitable[None]] | None = None) -> None:
        """Make the protocol of one connection; `serve` is run when it stands, and the stream closed when it returns."""
        self._serve = serve
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._staged = 0
        self._body: memoryview | None = None
        self._filled = 0
        self._kind = 0
        self._messages: deque[tuple[int, memoryview]] = deque()
        self._waiting_bytes = 0
        self._reading = True
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = False
        self._error: Exception | None = None

    # The event loop's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        if self._serve is not None:
            self._task = asyncio.get_running_loop().create_task(self._run(self._serve))

    async def _run(self, serve: Callable[[PlainStream], Awaitable[None]]) -> None:
        try:
            await serve(self)
        finally:
            self.end()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go: into the message under way, or to what is not parsed yet."""
        if self._body is not None:
            return self._body[self._filled :]
        return self._staging[self._staged :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take in `nbytes`."""
        if self._body is not None:
            self._filled += nbytes
            if self._filled == len(self._body):
                self._complete(self._body)
        else:
            self._staged += nbytes
            self._parse()

    def _parse(self) -> None:
        at, staging = 0, self._staging
        while self._staged - at >= _HEAD.size:
            length, kind = _HEAD.unpack_from(staging, at)
            if kind not in (_TEXT, _BINARY) or length > MESSAGE_BYTES_MAX:
                self._fail(ProtocolError(f"a message of kind {kind} and {length} bytes is not of this protocol"))
                return
            at += _HEAD.size
            self._kind = kind
            body = np.empty(length, np.uint8).data
            there = min(length, self._staged - at)
            body[:there] = staging[at : at + there]
            at += there
            if there < length:
                self._body, self._filled = body, there
                break
            self._complete(body)
        staging[: self._staged - at] = bytes(staging[at : self._staged])
        self._staged -= at

    def _complete(self, body: memoryview) -> None:
        self._body = None
        self._messages.append((self._kind, body))
        self._waiting_bytes += len(body)
        self._arrived.set()
        if self._reading and self._waiting_bytes > _WAITING_BYTES_MAX and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.close()
        self._arrived.set()

    def pause_writing(self) -> None:
        """The peer is slow."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The peer reads on."""
        self._writable.set()

    def eof_received(self) -> bool:
        """The peer sends no more."""
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        if exc is not None:
            self._error = self._error or exc
        self._end()
        self._writable.set()

    def _end(self) -> None:
        if not self._ended and (self._staged or self._body is not None):
            self._error = self._error or ProtocolError("the connection ended in the middle of a message")
        self._ended = True
        self._arrived.set()

    # The owner's side.

    async def send(self, message: Message) -> None:
        """Send one message; waits while the peer is slow."""
        text, parts = parts_of(message)
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        transport.writelines((_HEAD.pack(sum(map(len, parts)), _TEXT if text else _BINARY), *parts))
        if not self._writable.is_set():
            await self._writable.wait()
            if self._ended:
                raise ConnectionResetError("the connection is closed")

    async def receive(self) -> Received | None:
        """Return the next message, None at a clean end between two messages."""
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        kind, body = self._messages.popleft()
        self._waiting_bytes -= len(body)
        if not self._reading and self._waiting_bytes <= _WAITING_BYTES_MAX and self._transport is not None:
            self._reading = True
            if not self._transport.is_closing():
                self._transport.resume_reading()
        if kind == _BINARY:
            return body
        try:
            return str(body, "utf-8")
        except UnicodeDecodeError as error:
            raise ProtocolError(f"a text message is not UTF-8: {error}") from None

    def end(self) -> None:
        """Close after what was sent has left."""
        if self._transport is not None:
            self._transport.close()

    def close(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


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
    loop = asyncio.get_running_loop()
    if scheme == "unix":
        _, stream = await loop.create_unix_connection(PlainStream, host)
    else:
        _, stream = await loop.create_connection(PlainStream, host, port)
    return stream


async def listen(address: str, serve: Callable[[PlainStream], Awaitable[None]]) -> asyncio.Server:
    """Serve every connection to `address` with `serve`; the stream is closed when it returns."""
    scheme, host, port = split_address(address)
    loop = asyncio.get_running_loop()
    if scheme == "unix":
        return await loop.create_unix_server(lambda: PlainStream(serve), host)
    return await loop.create_server(lambda: PlainStream(serve), host, port)


def address_of(server: asyncio.Server) -> str:
    """Return the address that `server` listens on (the real port where 0 was asked for)."""
    name = server.sockets[0].getsockname()
    return f"unix:{name}" if isinstance(name, str) else f"tcp:{name[0]}:{name[1]}"
