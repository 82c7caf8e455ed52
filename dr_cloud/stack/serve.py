"""A stack behind NBD servers, on the event loop that calls: the shell around the stack's pure core.

A unix socket serves this node; TCP with TLS, where it is wanted, serves others. Both serve the same exports on one
loop: a write is seen by every connection, of either, as soon as it is answered, and so a flush of one client holds for
all of them. That is what the exports' multi-conn flag promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from typing import Final

import structlog

from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.stack import Stack

log = structlog.get_logger(__name__)

TIDY_SECONDS: Final = 30.0


class StackServer:
    """Serves one stack until closed, and keeps its cache tidy meanwhile."""

    def __init__(self, stack: Stack, cache: ObjectCache, servers: Sequence[NbdServer]) -> None:
        """Use `serve_stack`."""
        self.stack = stack
        self.servers = servers
        self._tidying = asyncio.create_task(keep_tidy(cache), name="stack-tidy")

    @property
    def uris(self) -> dict[str, list[str]]:
        """The NBD URIs of each disk, by the disk's name: the unix socket first, then TCP if it is served there."""
        return {
            disk.name: [uri for server in self.servers for uri in server.uris(export.name)]
            for disk, export in zip(self.stack.plan.disks, self.stack.exports, strict=True)
        }

    async def close(self, grace_seconds: float = 5.0) -> None:
        """Answer what is under way, close every connection, and remove every trace of the test."""
        self._tidying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._tidying
        await asyncio.gather(*(server.close(grace_seconds) for server in self.servers))
        self.stack.close()


async def serve_stack(
    stack: Stack, cache: ObjectCache, *, unix_path: str, host: str = "", tls: ssl.SSLContext | None = None
) -> StackServer:
    """Serve the disks of `stack` on a unix socket, and, with a host, on a free TCP port over TLS alone.

    Args:
        stack: What to serve.
        cache: The cache that it was opened with.
        unix_path: Path of the socket.
        host: Name or address to listen on; empty for no TCP.
        tls: The server's certificate, and which clients it takes; needed with `host`.

    Raises:
        DrCloudError: The path is in use, or the host is not this machine's.
        ValueError: A host without a certificate.
    """
    if host and tls is None:
        raise ValueError(f"a stack is not served on {host} in the clear: give tls=")
    table = ExportTable()
    for export in stack.exports:
        table.add(export)
    local = NbdServer(table)
    await local.start(unix_path=unix_path)
    if not host:
        return StackServer(stack, cache, [local])
    remote = NbdServer(table, tls=tls)
    try:
        await remote.start(host=host)
    except BaseException:
        await local.close(0)
        raise
    return StackServer(stack, cache, [local, remote])


async def keep_tidy(cache: ObjectCache) -> None:
    """Let go of what is idle in a cache, and keep its folder below its limit, now and then; until cancelled."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        try:
            await asyncio.wrap_future(cache.pool.submit(cache.tidy))
        except OSError as error:
            log.warning("stack.cache_not_tidied", error=str(error))
