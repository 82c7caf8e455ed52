"""The NBD server: listeners on a unix socket and TCP, the handshake of each connection, and what is open.

Purpose: serve an `ExportTable` to any NBD client. One event loop; uvloop is the fast one.

Hostile clients. A handshake has one deadline from accept to the chosen export, TLS included; it holds at most one
option; the number of connections is bounded. What breaks the protocol closes its own connection and nothing else.

Crash recovery: the server keeps no state. A unix socket left behind by a dead process is replaced; one that is
answered is not taken away from its owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
import struct
from collections import Counter
from collections.abc import Generator
from typing import Any, Final, cast
from urllib.parse import quote

import structlog

from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Export
from dr_cloud.nbd.handshake import TlsMode, negotiate
from dr_cloud.nbd.protocol import START_TLS, Step
from dr_cloud.nbd.rules import Selected
from dr_cloud.nbd.session import Session
from dr_cloud.nbd.table import ExportTable, Peer

log = structlog.get_logger(__name__)

HANDSHAKE_SECONDS_MAX: Final = 10.0
CONNECTIONS_MAX: Final = 1024
GRACE_SECONDS: Final = 5.0
SEND_BUFFER_BYTES: Final = 2 << 20
"""Asked of the kernel for a unix socket; it gives no more than its limit."""
_GREETER_BYTES: Final = 64 << 10
_CREDENTIALS: Final = struct.Struct("3i")


class NbdServer:
    """Serves the exports of a table until closed."""

    def __init__(
        self,
        exports: ExportTable,
        *,
        tls: ssl.SSLContext | None = None,
        tls_mode: TlsMode | None = None,
        handshake_seconds_max: float = HANDSHAKE_SECONDS_MAX,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            exports: What is served; it may change at any time.
            tls: The server's certificate; see `tls.server_context`.
            tls_mode: Default is REQUIRE where there is a certificate, else OFF.
            handshake_seconds_max: A connection that has not chosen an export by then is closed.
            connections_max: A connection over this number is closed at once.

        Raises:
            ValueError: A TLS mode without a certificate.
        """
        self.exports = exports
        self.tls = tls
        self.tls_mode = tls_mode or (TlsMode.REQUIRE if tls else TlsMode.OFF)
        if self.tls_mode is not TlsMode.OFF and tls is None:
            raise ValueError(f"TLS mode {self.tls_mode.value} needs a certificate: give tls=server_context(...)")
        self.handshake_seconds_max = handshake_seconds_max
        self.connections_max = connections_max
        self._listeners: list[asyncio.AbstractServer] = []
        self._unix_path: str | None = None
        self._tcp: tuple[str, int] | None = None
        self._greeters: set[_Greeter] = set()
        self._sessions: set[Session] = set()

    async def start(self, *, unix_path: str | None = None, host: str | None = None, port: int = 0) -> None:
        """Listen on a unix socket (mode 0600), on TCP, or both.

        Args:
            unix_path: Path of the socket.
            host: Address to listen on; None for no TCP.
            port: TCP port; 0 takes a free one.

        Raises:
            DrCloudError: The path or the port is in use.
            ValueError: Neither is given.
        """
        if unix_path is None and host is None:
            raise ValueError("give a unix_path, a host, or both")
        loop = asyncio.get_running_loop()
        self.exports.on_remove.append(self.close_export)
        try:
            if unix_path is not None:
                listening = _bind_unix(unix_path)
                self._unix_path = os.path.abspath(unix_path)
                self._listeners.append(await loop.create_unix_server(lambda: _Greeter(self), sock=listening))
            if host is not None:
                try:
                    server = await loop.create_server(lambda: _Greeter(self), host, port)
                except OSError as error:
                    raise DrCloudError(f"cannot listen on {host}:{port}: {error}", "choose another port") from error
                self._listeners.append(server)
                self._tcp = (host, server.sockets[0].getsockname()[1])
        except BaseException:
            await self.close(0)
            raise

    @property
    def addresses(self) -> list[str]:
        """The listeners as NBD URIs without an export name; `uri` gives them with one."""
        return self.uris("")

    def uris(self, name: str) -> list[str]:
        """Return the NBD URIs of an export, the unix socket first."""
        scheme = "nbds" if self.tls_mode is TlsMode.REQUIRE else "nbd"
        path = quote(name, safe="")
        found = []
        if self._unix_path is not None:
            found.append(f"{scheme}+unix:///{path}?socket={quote(self._unix_path)}")
        if self._tcp is not None:
            host, port = self._tcp
            found.append(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{path}")
        return found

    @property
    def connections(self) -> Counter[str]:
        """How many connections each export has."""
        return Counter(session.export.name for session in self._sessions)

    async def close_export(self, export: Export) -> None:
        """Close the connections to one export; return when no call into it is under way."""
        await self._close_sessions([session for session in self._sessions if session.export is export], GRACE_SECONDS)

    async def close(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Stop listening, answer what is under way, close every connection."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._unix_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._unix_path)
            self._unix_path = None
        self._tcp = None
        with contextlib.suppress(ValueError):
            self.exports.on_remove.remove(self.close_export)
        for greeter in list(self._greeters):
            greeter.abort()
        await self._close_sessions(list(self._sessions), grace_seconds)

    async def _close_sessions(self, sessions: list[Session], grace_seconds: float) -> None:
        await asyncio.gather(*[session.close(grace_seconds) for session in sessions])

    def _accept(self, greeter: _Greeter) -> bool:
        if len(self._greeters) + len(self._sessions) >= self.connections_max:
            log.warning("nbd.too_many_connections", most=self.connections_max)
            return False
        self._greeters.add(greeter)
        return True

    def _open(self, transport: asyncio.Transport, selected: Selected, received: bytes) -> None:
        session = Session(transport, selected, self._sessions.discard)
        self._sessions.add(session)
        session.start(received)


class _Greeter(asyncio.BufferedProtocol):
    """Carries one connection through the handshake, then hands its transport to a session."""

    def __init__(self, server: NbdServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._steps: Generator[Step, bytes, Selected | None] | None = None
        self._wanted = 0
        self._received = bytearray()
        self._chunk = memoryview(bytearray(4096))
        self._paused = False
        self._upgrade: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._peer = Peer("")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses
        if not self._server._accept(self):
            self._transport.abort()
            return
        self._deadline = asyncio.get_running_loop().call_later(self._server.handshake_seconds_max, self.abort)
        self._peer = _peer_of(self._transport)
        self._steps = negotiate(self._server.exports, lambda: self._peer, self._server.tls_mode)
        self._step(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._chunk

    def buffer_updated(self, nbytes: int) -> None:
        self._received += self._chunk[:nbytes]
        if len(self._received) > _GREETER_BYTES + p.OPTION_BYTES_MAX:
            self.abort()  # sends on and on without reading
        else:
            self._go_on()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def abort(self) -> None:
        """Close at once."""
        self._leave()
        if self._upgrade is not None:
            self._upgrade.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _leave(self) -> None:
        self._steps = None
        self._server._greeters.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    def _go_on(self) -> None:
        while (
            self._steps is not None
            and self._upgrade is None
            and not self._paused
            and len(self._received) >= self._wanted
        ):
            data = bytes(self._received[: self._wanted])
            del self._received[: self._wanted]
            self._step(data)

    def _step(self, data: bytes | None) -> None:
        """Run the handshake until it needs bytes or TLS."""
        assert self._steps is not None
        assert self._transport is not None
        try:
            step = next(self._steps) if data is None else self._steps.send(data)
            while isinstance(step, bytes):
                self._transport.write(step)
                step = next(self._steps)
        except StopIteration as stop:
            self._leave()
            if stop.value is None:
                self._transport.close()
            else:
                self._server._open(self._transport, stop.value, bytes(self._received))
        except ProtocolError as error:
            log.warning("nbd.handshake_failed", peer=self._peer.address, reason=str(error))
            self.abort()
        else:
            if step is START_TLS:
                self._start_tls()
            else:
                self._wanted = int(step)

    def _start_tls(self) -> None:
        assert self._transport is not None
        if self._received:
            # Bytes sent in the clear behind STARTTLS would be taken for encrypted ones.
            log.warning("nbd.handshake_failed", peer=self._peer.address, reason="data before TLS")
            self.abort()
            return
        self._transport.pause_reading()
        self._upgrade = asyncio.ensure_future(self._run_tls(self._transport))

    async def _run_tls(self, plain: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        assert self._server.tls is not None
        try:
            transport = await loop.start_tls(
                plain,
                self,
                self._server.tls,
                server_side=True,
                ssl_handshake_timeout=self._server.handshake_seconds_max,
            )
        except (OSError, ssl.SSLError) as error:
            log.warning("nbd.tls_failed", peer=self._peer.address, reason=str(error))
            self._upgrade = None
            self.abort()
            return
        self._upgrade = None
        if self._steps is None or transport is None:
            plain.abort()
            return
        self._transport = transport
        self._peer = _peer_with_certificate(self._peer, transport.get_extra_info("peercert"))
        self._step(None)
        self._go_on()


def _peer_of(transport: asyncio.Transport) -> Peer:
    opened = transport.get_extra_info("socket")
    if opened.family == socket.AF_UNIX:
        # A large reply then leaves in one call. (TCP finds its own size.)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        pid, uid, gid = _CREDENTIALS.unpack(opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return Peer("unix", pid, uid, gid)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    host, port = transport.get_extra_info("peername")[:2]
    return Peer(f"{host}:{port}")


def _peer_with_certificate(peer: Peer, certificate: dict[str, Any] | None) -> Peer:
    if not certificate:
        return peer._replace(tls=True)
    subject = ",".join(f"{key}={value}" for part in certificate.get("subject", ()) for key, value in part)
    names = tuple(f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ()))
    return peer._replace(tls=True, subject=subject, names=names)


def _bind_unix(path: str) -> socket.socket:
    """Bind a unix socket that only its owner may connect to; replace one that a dead process left."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) == errno.ECONNREFUSED:
                    os.unlink(path)
    except FileNotFoundError:
        pass
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(path)
        os.chmod(path, 0o600)
    except OSError as error:
        listening.close()
        raise DrCloudError(f"cannot listen on {path}: {error}", "choose another path, or stop who uses it") from error
    return listening
