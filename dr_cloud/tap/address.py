"""Where a tap's VDSA is: a unix socket on this host, or TLS 1.3 where it is on another.

`unix:PATH`, or a path alone; `tls:HOST:PORT`, with a certificate of the tap and the authority that vouches for the
VDSA. A host that vanishes without a word is given up after `SILENCE_SECONDS`, whatever the kernel's own patience.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Self

from dr_cloud.model.errors import DrCloudError

CONNECT_SECONDS_MAX: Final = 10.0
SILENCE_SECONDS: Final = 15
SEND_BUFFER_BYTES: Final = 2 << 20
"""Asked of the kernel for a unix socket, so that a batch leaves in one call; it gives no more than its limit."""


class TlsFiles(NamedTuple):
    """PEM files: who the tap is, and whom it trusts."""

    certificate: Path
    key: Path
    authority: Path

    def context(self) -> ssl.SSLContext:
        """Return a client's context. Raises `DrCloudError` that names the file that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except OSError as error:
            raise DrCloudError(
                f"the certificates {self.certificate}, {self.key}, {self.authority} cannot be used: {error}",
                "Give PEM files: --cert and --key that belong together, and --ca that signed the VDSA's.",
            ) from error
        return context


class VdsaAddress(NamedTuple):
    """The other end of the feed."""

    path: Path | None
    host: str = ""
    port: int = 0
    tls: ssl.SSLContext | None = None

    @classmethod
    def parse(cls, text: str, files: TlsFiles | None = None) -> Self:
        """Return the address in `text`. Raises `DrCloudError` if there is none, or `files` do not go with it."""
        kind, colon, rest = text.partition(":")
        if kind != "tls":
            if files is not None:
                raise DrCloudError("certificates are for a VDSA at tls:HOST:PORT", "Leave --cert, --key and --ca away.")
            return cls(Path(rest if kind == "unix" and colon else text))
        host, colon, port = rest.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) <= 0xFFFF:
            raise DrCloudError(f"{text!r} is no address of a VDSA", "Give unix:PATH or tls:HOST:PORT.")
        if files is None:
            raise DrCloudError("a VDSA on another host needs certificates", "Give --cert, --key and --ca.")
        return cls(None, host.strip("[]"), int(port), files.context())

    def __str__(self) -> str:
        return f"tls:{self.host}:{self.port}" if self.path is None else str(self.path)

    async def connect(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Connect `protocol`. Raises `OSError` (also for what TLS refuses, and when nobody answers in time)."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                if self.path is not None:
                    transport, _ = await loop.create_unix_connection(protocol, str(self.path))
                    connected = transport.get_extra_info("socket")
                    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                    return
                opened = await self._open_socket()
                try:
                    await loop.create_connection(protocol, ssl=self.tls, sock=opened, server_hostname=self.host)
                except BaseException:
                    opened.close()
                    raise
        except TimeoutError as error:
            raise OSError(f"no answer within {CONNECT_SECONDS_MAX:g} s") from error

    async def _open_socket(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        failure = OSError("no address")
        for family, kind, protocol, _, address in found:
            opened = socket.socket(family, kind, protocol)
            opened.setblocking(False)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_SECONDS // 3)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_SECONDS // 3)
            try:
                await loop.sock_connect(opened, address)
            except OSError as error:
                opened.close()
                failure = error
            except BaseException:
                opened.close()
                raise
            else:
                return opened
        raise failure
