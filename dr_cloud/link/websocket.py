"""The link's carrier between sites: WebSocket over TLS 1.3, dialled by the site, both ends proven by certificates.

Purpose
    `dial` and `serve` make a `Session` of a connection. The server asks `admit` about every certificate before the
    connection is made; a site must find a service of its provider at the other end. The path is `/link`, the
    subprotocol names the version of the layout, and a peer with another one is refused in the handshake.

Scheduling
    Nothing is compressed: frames are sealed. Little waits below the session: 128 KiB in this process, and 128 KiB not
    yet sent in the kernel, so control is not held up by data that is already on its way out.

Proxies
    `dial` goes through an HTTP proxy (CONNECT) where one is named. TLS and the certificates stay end to end.

Life
    A session ends when its certificate does. The library's own pings are off: the session has its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Final, cast

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import (
    ConnectionClosed,
    ConnectionClosedOK,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from dr_cloud.link.channels import CARRIED_BYTES_MAX
from dr_cloud.link.session import Session
from dr_cloud.link.stream import Message, Received
from dr_cloud.model.errors import DrCloudError, ForbiddenError
from dr_cloud.model.units import SECOND_NS
from dr_cloud.seal.identity import Peer

PATH: Final = "/link"
_SUBPROTOCOL: Final = Subprotocol("dr-cloud-link.1")
_HANDSHAKE_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 2.0
_WRITE_BYTES: Final = 128 << 10
_UNSENT_BYTES: Final = 128 << 10
_QUEUE_MESSAGES: Final = 16

_log = structlog.get_logger(__name__)


class WebSocketStream:
    """`MessageStream` over one WebSocket."""

    def __init__(self, connection: Connection) -> None:
        """Carry messages over `connection`."""
        self._connection = connection
        self._closing: asyncio.Task[None] | None = None
        sock: socket.socket = connection.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # A connection that is gone already: the first use tells.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    async def send(self, message: Message) -> None:
        """Send one message; waits while the peer is slow."""
        if not isinstance(message, str | bytes | bytearray | memoryview):
            message = b"".join(message)
        try:
            await self._connection.send(message)
        except ConnectionClosed as error:
            raise ConnectionResetError(_told(error)) from None

    async def receive(self) -> Received | None:
        """Return the next message, None at a clean end."""
        try:
            message = await self._connection.recv()
        except ConnectionClosedOK:
            return None
        except ConnectionClosed as error:
            raise ConnectionResetError(_told(error)) from None
        return message if isinstance(message, str) else memoryview(message)

    def end(self) -> None:
        """Close after what was sent has left."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._connection.close())

    def close(self) -> None:
        """Close at once."""
        self._connection.transport.abort()


class _Connect(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        """Follow nobody elsewhere."""
        return exc


async def dial(url: str, context: ssl.SSLContext, proxy: str | None = None) -> Session:
    """Dial the provider's end of the link.

    Args:
        url: wss://host:port/link.
        context: `Credentials.client_context()`.
        proxy: http://[user:password@]host:port of a proxy, or None to dial directly.

    Returns:
        The session; nothing passes before `async with`.

    Raises:
        ForbiddenError: The provider refuses this certificate.
        DrCloudError: The URL or the proxy's is wrong, or the other end is no service of the provider.
        OSError: It cannot be reached, or TLS fails (`ssl.SSLError`).
    """
    connection: ClientConnection
    try:
        connection = await _Connect(
            url,
            ssl=context,
            proxy=proxy,
            subprotocols=[_SUBPROTOCOL],
            compression=None,
            user_agent_header=None,
            open_timeout=_HANDSHAKE_SECONDS,
            close_timeout=_CLOSE_SECONDS,
            ping_interval=None,
            max_size=CARRIED_BYTES_MAX,
            max_queue=_QUEUE_MESSAGES,
            write_limit=_WRITE_BYTES,
        )
    except InvalidStatus as error:
        body = (error.response.body or b"").decode(errors="replace").strip()[:1000]
        if error.response.status_code == http.HTTPStatus.FORBIDDEN:
            raise ForbiddenError(f"the provider refuses this site: {body}", "Ask it for a new pairing token.") from None
        raise ConnectionRefusedError(f"the provider answered {error.response.status_code}: {body}") from None
    except ssl.SSLError:  # Some of these are also ValueErrors.
        raise
    except InvalidProxy as error:
        # The proxy's URL may hold a password: it is not repeated.
        raise DrCloudError(f"the proxy's URL is wrong: {error.msg}", "Write http://host:port.") from None
    except (InvalidURI, ValueError) as error:
        raise DrCloudError(f"no link can be made to {url!r}: {error}", "Write wss://host:port/link.") from None
    except WebSocketException as error:
        # A certificate that the other end does not accept looks like this too: TLS 1.3 tells it after the handshake.
        raise ConnectionRefusedError(f"no link could be made: {error}{_cause(error)}") from error
    try:
        peer = _peer(connection)
        if peer.service is None:
            raise ForbiddenError(f"{url} is answered by {peer.uri}", "Dial a service of the provider.")
        if connection.subprotocol != _SUBPROTOCOL:
            raise DrCloudError(f"{url} speaks another version of the link", "Bring both sides to the same release.")
    except DrCloudError:
        connection.transport.abort()
        raise
    return Session(WebSocketStream(connection), dialled=True, peer=peer)


class LinkServer:
    """The provider's end: takes in sites."""

    def __init__(
        self, on_session: Callable[[Session], Awaitable[None]], admit: Callable[[Peer], Awaitable[None]]
    ) -> None:
        """Use `serve`."""
        self.sessions: set[Session] = set()
        """Those that stand now."""
        self._on_session = on_session
        self._admit = admit
        self.port = 0
        """Where it listens."""
        self._server: Server | None = None

    def revoke(self, serial: str) -> None:
        """Close the sessions of a certificate that `admit` refuses from now on."""
        for session in list(self.sessions):
            if session.peer is not None and session.peer.serial == serial:
                session.close("the certificate is revoked")

    async def close(self, reason: str = "the provider's end is shutting down") -> None:
        """Take in nobody any more, close every session, and wait for them."""
        if self._server is None:
            return
        self._server.close(close_connections=False)
        sessions = list(self.sessions)
        for session in sessions:
            session.close(reason)
        await asyncio.gather(*(session.wait_closed() for session in sessions))
        await self._server.wait_closed()

    async def _start(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._server = await serve_websocket(
            self._serve,
            host,
            port,
            ssl=context,
            subprotocols=[_SUBPROTOCOL],
            compression=None,
            server_header=None,
            process_request=self._check,
            open_timeout=_HANDSHAKE_SECONDS,
            close_timeout=_CLOSE_SECONDS,
            ping_interval=None,
            max_size=CARRIED_BYTES_MAX,
            max_queue=_QUEUE_MESSAGES,
            write_limit=_WRITE_BYTES,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def _check(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path != PATH:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"the link is at {PATH}\n")
        try:
            await self._admit(_peer(connection))
        except DrCloudError as error:
            _log.warning("link.refused", address=str(connection.remote_address), reason=str(error))
            return connection.respond(http.HTTPStatus.FORBIDDEN, f"{error}. {error.remedy}\n")
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        peer = _peer(connection)
        session = Session(WebSocketStream(connection), dialled=False, peer=peer)
        seconds_left = max(peer.expires_ns - time.time_ns(), 0) / SECOND_NS
        expiry = asyncio.get_running_loop().call_later(seconds_left, session.close, "the certificate has expired")
        self.sessions.add(session)
        _log.info("link.open", peer=peer.uri, serial=peer.serial)
        try:
            await self._on_session(session)
        finally:
            expiry.cancel()
            session.close("the other end has finished")
            await session.wait_closed()
            self.sessions.discard(session)


async def serve(
    host: str,
    port: int,
    context: ssl.SSLContext,
    on_session: Callable[[Session], Awaitable[None]],
    admit: Callable[[Peer], Awaitable[None]],
) -> LinkServer:
    """Serve the provider's end of the link.

    Args:
        host: Where to listen.
        port: 0 takes a free one; see `LinkServer.port`.
        context: `Credentials.server_context()`: it must ask for client certificates.
        on_session: Serves one session; it fills `methods` and `on_channel`, enters the session and waits for its end.
        admit: Raises `DrCloudError` unless this peer may come in; its words are told to the peer.

    Raises:
        OSError: The address cannot be used.
    """
    if context.verify_mode is not ssl.CERT_REQUIRED:
        raise ValueError("the link is not served without client certificates")
    server = LinkServer(on_session, admit)
    await server._start(host, port, context)
    return server


def _peer(connection: Connection) -> Peer:
    der = cast("ssl.SSLObject", connection.transport.get_extra_info("ssl_object")).getpeercert(binary_form=True)
    if not der:
        raise ForbiddenError("there is no certificate", "Pair the site with the provider.")
    return Peer.of_certificate(der)


def _told(error: ConnectionClosed) -> str:
    return f"the connection was closed: {error}{_cause(error)}"


def _cause(error: BaseException) -> str:
    return f" ({error.__cause__})" if error.__cause__ is not None else ""
