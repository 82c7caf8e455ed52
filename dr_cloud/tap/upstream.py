"""A disk behind an upstream NBD server, for example a qcow2 image through qemu-nbd.

Retries
    When the connection breaks, requests under way wait, and are made again on a new one (50 ms to 2 s between tries).
    After 30 s without a connection they and later ones fail with EIO, until there is one again. Errors that the server
    reports are passed on at once. A server that is there and does not answer is a disk that hangs: the guest waits.

Knowingly tolerated, as with any client that reconnects: a server that died may have lost writes that it had answered
but not flushed, and one that lives may still work off a request of the connection that broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Self, TypeVar

import structlog

from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.nbd.export import Buffer, Extent

OUTAGE_SECONDS_MAX: Final = 30.0
EXTENTS_BYTES_MAX: Final = 1 << 30
"""Block status is asked for at most this much at a time."""
_BACKOFF_SECONDS_MIN: Final = 0.05
_BACKOFF_SECONDS_MAX: Final = 2.0
_ZEROES: Final = bytes(1 << 20)

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class NbdDisk:
    """An export of another NBD server. Make it with `connect`."""

    def __init__(self, uri: str, client: AsyncNbdClient) -> None:
        self.size_bytes = client.size_bytes
        self.block_size_minimum = client.info.block_size_minimum
        self._uri = uri
        self._client: AsyncNbdClient | None = client
        self._connected = asyncio.Event()
        self._connected.set()
        self._down = asyncio.Event()
        """The outage has lasted too long: requests fail."""
        self._reconnecting: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, uri: str) -> Self:
        """Open the export that `uri` names.

        Raises:
            DrCloudError: It is no NBD URI, nobody answers, or the export cannot be used.
        """
        try:
            client = await AsyncNbdClient.connect(uri)
        except (OSError, ValueError, ProtocolError, ssl.SSLError) as error:
            raise DrCloudError(
                f"upstream disk {uri} cannot be opened: {error}",
                "Start its NBD server first, or check the address and the name of the export.",
            ) from error
        return cls(uri, client)

    async def pread(self, offset: int, length: int) -> Sequence[Buffer]:
        """Read."""
        return (await self._call(lambda client: client.pread(offset, length)),)

    async def pwrite(self, offset: int, data: memoryview) -> None:
        """Write."""
        await self._call(lambda client: client.pwrite(offset, data))

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Write zeroes; where the server has no such command, as data."""
        try:
            # Not TRIM: what it leaves need not read as zeroes.
            await self._call(lambda client: client.write_zeroes(offset, length, may_trim=may_trim))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            for start in range(offset, offset + length, len(_ZEROES)):
                await self.pwrite(start, memoryview(_ZEROES)[: offset + length - start])

    async def flush(self) -> None:
        """Flush the server's disk."""
        await self._call(lambda client: client.flush())

    async def extents(self, offset: int, length: int, count_max: int) -> Sequence[Extent]:
        """Return the server's block status."""
        length = min(length, EXTENTS_BYTES_MAX)
        return (await self._call(lambda client: client.block_status(offset, length)))[:count_max]

    async def measure(self) -> int:
        """Ask the server on a new connection, and go on with that if the size is another."""
        try:
            client = await AsyncNbdClient.connect(self._uri, timeout_seconds=_BACKOFF_SECONDS_MAX)
        except (OSError, ProtocolError, ssl.SSLError):
            return self.size_bytes
        size_bytes = client.size_bytes
        old = client
        if size_bytes != self.size_bytes and self._client is not None:
            old, self._client = self._client, client
        # Requests under way on the old one are made again on the new.
        with contextlib.suppress(OSError, ssl.SSLError):
            await old.close()
        return size_bytes

    async def close(self) -> None:
        """Close the connection."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait({self._reconnecting})
        if self._client is not None:
            await self._client.close()

    async def _call(self, request: Callable[[AsyncNbdClient], Awaitable[_T]]) -> _T:
        """Make a request, again on each new connection while one breaks."""
        while True:
            client = self._client
            if client is None:
                client = await self._wait_connected()
            try:
                return await request(client)
            except ConnectionError as error:
                self._lost(client, error)

    async def _wait_connected(self) -> AsyncNbdClient:
        while self._client is None:
            if self._down.is_set():
                raise OSError(errno.EIO, f"upstream disk {self._uri} has gone away")
            waits = {asyncio.ensure_future(self._connected.wait()), asyncio.ensure_future(self._down.wait())}
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return self._client

    def _lost(self, client: AsyncNbdClient, error: ConnectionError) -> None:
        if self._client is client:
            _log.error("tap.upstream_lost", uri=self._uri, error=str(error))
            self._client = None
            self._connected.clear()
            self._reconnecting = asyncio.create_task(self._reconnect(client))

    async def _reconnect(self, old: AsyncNbdClient) -> None:
        loop = asyncio.get_running_loop()
        lost = loop.time()
        backoff = _BACKOFF_SECONDS_MIN
        with contextlib.suppress(OSError, ssl.SSLError):
            await old.close()
        while self._client is None:
            if loop.time() - lost > OUTAGE_SECONDS_MAX and not self._down.is_set():
                _log.error("tap.upstream_down", uri=self._uri, seconds=OUTAGE_SECONDS_MAX)
                self._down.set()
            try:
                self._client = await self._open_again()
            except (OSError, ProtocolError, ssl.SSLError):
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _BACKOFF_SECONDS_MAX)
        self._down.clear()
        self._connected.set()
        _log.info("tap.upstream_back", uri=self._uri)

    async def _open_again(self) -> AsyncNbdClient:
        client = await AsyncNbdClient.connect(self._uri, timeout_seconds=_BACKOFF_SECONDS_MAX)
        if client.size_bytes != self.size_bytes:
            await client.close()
            _log.error("tap.upstream_resized", uri=self._uri, size_bytes=client.size_bytes)
            raise OSError(errno.EIO, "the upstream disk has another size now")
        return client
