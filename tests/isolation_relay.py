"""A TCP relay in front of a provider's port: it counts what passes, and loses the link in either of two ways.

`stall` lets packets vanish: connections stay as they are, nothing passes, new ones get no answer. `refuse` breaks every
connection and lets nobody through.
"""

from __future__ import annotations

import asyncio
import contextlib

from dr_cloud.actors.node import LoopThread

_PIECE_BYTES = 64 << 10


class Relay:
    """Relays 127.0.0.1:`port` to another port, on an event loop of its own."""

    def __init__(self, far_port: int) -> None:
        self.up_bytes = 0
        """From the site to the provider, as delivered."""
        self.down_bytes = 0
        self.connections = 0
        """Ever made."""
        self._far_port = far_port
        self._refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = LoopThread("relay")
        self.port: int = self._loop.call(self._start(), 10)

    async def _start(self) -> int:
        self._passing = asyncio.Event()
        self._passing.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_PIECE_BYTES)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.connections += 1
        writers = {near}
        self._writers.add(near)
        try:
            await self._passing.wait()
            if self._refusing:
                return
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._far_port, limit=_PIECE_BYTES)
            writers.add(far)
            self._writers.add(far)
            ways = [
                asyncio.create_task(self._pass(near_reader, far, up=True)),
                asyncio.create_task(self._pass(far_reader, near, up=False)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._writers -= writers
            for writer in writers:
                writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                await self._passing.wait()
                writer.write(data)
                if up:
                    self.up_bytes += len(data)
                else:
                    self.down_bytes += len(data)
                await writer.drain()

    # What a test does.

    def stall(self) -> None:
        """From now on nothing passes."""
        self._loop.loop.call_soon_threadsafe(self._passing.clear)

    def refuse(self) -> None:
        """Break all connections, and every new one."""

        async def refuse() -> None:
            self._refusing = True
            for writer in list(self._writers):
                writer.transport.abort()

        self._loop.call(refuse(), 10)

    def restore(self) -> None:
        """Let everything pass again."""
        self._refusing = False
        self._loop.loop.call_soon_threadsafe(self._passing.set)

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            self._refusing = True
            self._passing.set()
            for writer in list(self._writers):
                writer.transport.abort()
            while self._writers:
                await asyncio.sleep(0.01)

        self._loop.call(close(), 10)
        self._loop.loop.call_soon_threadsafe(self._loop.loop.stop)
