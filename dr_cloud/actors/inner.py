"""How the provider's own processes reach one another: streams between connectors and VDSAs.

On one machine these are unix sockets in a folder that is the provider's alone. Between machines they are TCP with
TLS 1.3, where both ends show certificates of the provider's CA for a *service*; a site's certificate is of the same CA
and is refused here: an enterprise has one door, its connector.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import structlog

from dr_cloud.link.stream import PlainStream, address_of, split_address
from dr_cloud.model.errors import DrCloudError
from dr_cloud.seal.identity import Credentials, Peer

_log = structlog.get_logger(__name__)


class _ProvenStream(PlainStream):
    """A stream whose other end must be a service of the provider."""

    def __init__(self, provider: str, serve: Callable[[PlainStream], Awaitable[None]] | None = None) -> None:
        super().__init__(serve)
        self._provider = provider

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or end at once."""
        certificate = cast("Any", transport).get_extra_info("ssl_object").getpeercert(binary_form=True)
        try:
            peer = Peer.of_certificate(certificate)
            if peer.service is None or peer.provider != self._provider:
                raise DrCloudError(f"{peer.uri} is no service of {self._provider}")
        except DrCloudError as error:
            _log.warning("inner.refused", reason=str(error))
            cast("asyncio.Transport", transport).abort()
        else:
            super().connection_made(transport)


class Inner:
    """One process's end of all its inner connections."""

    def __init__(self, host: str = "", credentials: Credentials | None = None) -> None:
        """Prepare.

        Args:
            host: The address of this node; empty where all is on one machine.
            credentials: This service's, for connections between machines.
        """
        self._host = host
        self._credentials = credentials

    async def listen(self, path: Path, serve: Callable[[PlainStream], Awaitable[None]]) -> tuple[asyncio.Server, str]:
        """Serve connections: on the unix socket `path`, or on a free port where there are several machines.

        Returns:
            The server, and the address for `connect`.
        """
        loop = asyncio.get_running_loop()
        if self._credentials is None:
            path.unlink(missing_ok=True)  # of a former self: an actor's name makes sure that there is one at a time
            server = await loop.create_unix_server(lambda: PlainStream(serve), str(path))
        else:
            provider = self._credentials.peer.provider
            server = await loop.create_server(
                lambda: _ProvenStream(provider, serve), self._host, 0, ssl=self._credentials.server_context()
            )
        return server, address_of(server)

    async def connect(self, address: str) -> PlainStream:
        """Connect to another service. Raises `OSError` if nobody answers, `DrCloudError` if it is not allowed."""
        scheme, host, port = split_address(address)
        loop = asyncio.get_running_loop()
        if scheme == "unix":
            _, stream = await loop.create_unix_connection(PlainStream, host)
            return stream
        if self._credentials is None:
            raise DrCloudError(f"{address} needs a certificate", "Start the provider with the cluster's address.")
        provider = self._credentials.peer.provider
        _, proven = await loop.create_connection(
            lambda: _ProvenStream(provider), host, port, ssl=self._credentials.client_context()
        )
        return proven
