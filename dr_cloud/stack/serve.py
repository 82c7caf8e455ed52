"""A stack behind an NBD server, on the event loop that calls: the shell around the stack's pure core."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Final

import structlog

from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import Allow, ExportTable
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.stack import Stack

log = structlog.get_logger(__name__)

TIDY_SECONDS: Final = 30.0


class StackServer:
    """Serves one stack until closed, and keeps its cache tidy meanwhile."""

    def __init__(self, stack: Stack, cache: ObjectCache, server: NbdServer) -> None:
        """Use `serve_stack`."""
        self.stack = stack
        self.server = server
        self._tidying = asyncio.create_task(_keep_tidy(cache), name="stack-tidy")

    @property
    def uris(self) -> dict[str, list[str]]:
        """The NBD URIs of each disk, by the disk's name."""
        return {
            disk.name: self.server.uris(export.name)
            for disk, export in zip(self.stack.plan.disks, self.stack.exports, strict=True)
        }

    async def close(self, grace_seconds: float = 5.0) -> None:
        """Answer what is under way, close every connection, and remove every trace of the test."""
        self._tidying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._tidying
        await self.server.close(grace_seconds)
        self.stack.close()


async def serve_stack(
    stack: Stack,
    cache: ObjectCache,
    *,
    unix_path: str | None = None,
    host: str | None = None,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
    allow: Allow | None = None,
) -> StackServer:
    """Serve the disks of `stack` on a unix socket, on TCP, or both.

    Args:
        stack: What to serve.
        cache: The cache that it was opened with.
        unix_path: Path of the socket.
        host: Address to listen on; None for no TCP.
        port: TCP port; 0 takes a free one.
        tls: The server's certificate; with one, TLS is required.
        allow: Which peers may see which export; None for all.

    Raises:
        DrCloudError: The path or the port is in use.
    """
    table = ExportTable(allow)
    for export in stack.exports:
        table.add(export)
    server = NbdServer(table, tls=tls)
    await server.start(unix_path=unix_path, host=host, port=port)
    return StackServer(stack, cache, server)


async def _keep_tidy(cache: ObjectCache) -> None:
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        try:
            await asyncio.wrap_future(cache.pool.submit(cache.tidy))
        except OSError as error:
            log.warning("stack.cache_not_tidied", error=str(error))
