"""A link without sockets: two carriers in memory that can be cut, stalled and looked into; and two sessions on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dr_cloud.link.session import Session
from dr_cloud.link.stream import Message, Received

LIMIT = 4


class MemoryCarrier:
    """One end of a connection. It holds `LIMIT` messages, as a socket holds some bytes."""

    def __init__(self) -> None:
        self.peer: MemoryCarrier
        self.sent: list[bytes | str] = []
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.closed = False
        self._inbox: asyncio.Queue[str | bytes | Exception | None] = asyncio.Queue(LIMIT)

    async def send(self, message: Message) -> None:
        if not isinstance(message, str | bytes | bytearray | memoryview):
            message = b"".join(message)
        if self.closed:
            raise ConnectionResetError("the carrier is closed")
        await self.open_gate.wait()
        message = message if isinstance(message, str) else bytes(message)
        await self.peer._inbox.put(message)
        self.sent.append(message)
        if self.closed:
            raise ConnectionResetError("the carrier is closed")

    async def receive(self) -> Received | None:
        message = await self._inbox.get()
        if isinstance(message, Exception):
            raise message
        return memoryview(message) if isinstance(message, bytes) else message

    def _finish(self, what: Exception | None) -> None:
        self.closed = True
        queue = self._inbox
        if isinstance(what, Exception):
            while not queue.empty():
                queue.get_nowait()
        queue._queue.append(what)  # type: ignore[attr-defined]  # The end always finds room.
        queue._wakeup_next(queue._getters)  # type: ignore[attr-defined]
        queue._wakeup_next(queue._putters)  # type: ignore[attr-defined]

    def end(self) -> None:
        if not self.closed:
            self.closed = True
            self.peer._finish(None)

    def close(self) -> None:
        if not self.closed:
            self._finish(ConnectionResetError("cut"))
            self.peer._finish(ConnectionResetError("cut"))


def carriers() -> tuple[MemoryCarrier, MemoryCarrier]:
    one, other = MemoryCarrier(), MemoryCarrier()
    one.peer, other.peer = other, one
    return one, other


@asynccontextmanager
async def linked(ping_seconds: float = 5.0) -> AsyncIterator[tuple[Session, Session]]:
    """Two sessions on one memory connection; the first one has dialled."""
    one, other = carriers()
    site = Session(one, dialled=True, ping_seconds=ping_seconds)
    provider = Session(other, dialled=False, ping_seconds=ping_seconds)
    async with site, provider:
        yield site, provider
