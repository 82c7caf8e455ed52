"""A blocking NBD client: one request at a time over a plain socket. For programs that want a disk as function calls.

Thread-safe: a lock lets one call through at a time. Retries: none. A connection that broke, timed out or was cut in
the middle of a reply is of no more use: every later call raises `ConnectionError`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
from types import TracebackType
from typing import Self, cast

from dr_cloud.model.errors import ProtocolError
from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.nbd.protocol import START_TLS
from dr_cloud.nbd.requests import RANGE_BYTES_MAX, Joined, Request, covered, join, pieces, take_reply
from dr_cloud.nbd.tls import client_context
from dr_cloud.nbd.uri import NbdUri, parse_uri

TIMEOUT_SECONDS = 60.0
_TOGETHER_BYTES = 64 << 10
"""A payload up to this goes out in one piece with its head."""


def context_for(address: NbdUri, tls: ssl.SSLContext | None) -> ssl.SSLContext | None:
    """Return the TLS context to reach an address with, or None for a plain one.

    Raises:
        ValueError: TLS is asked for and there are no certificates.
    """
    if not address.tls:
        return None
    if tls is not None:
        return tls
    if address.certificates is None:
        raise ValueError("a TLS address needs certificates: give tls=client_context(...) or ?tls-certificates=DIR")
    return client_context(address.certificates, check_hostname=address.unix_path is None)


class NbdClient:
    """An open export."""

    def __init__(self, connected: socket.socket, info: Joined) -> None:
        """Wrap a socket whose handshake is done; `connect` is the usual way."""
        self.info = info
        self.size_bytes = info.size_bytes
        self._socket: socket.socket | None = connected
        self._lock = threading.Lock()
        self._cookie = 0

    @classmethod
    def connect(
        cls, uri: str, *, tls: ssl.SSLContext | None = None, timeout_seconds: float | None = TIMEOUT_SECONDS
    ) -> Self:
        """Open the export that an NBD URI names.

        Args:
            uri: `nbd://`, `nbds://`, `nbd+unix://` or `nbds+unix://`.
            tls: Certificates for the two TLS forms, unless the URI names a folder of them.
            timeout_seconds: For connecting, and later for each answer; None waits for ever.

        Raises:
            OSError: The server cannot be reached, or closes.
            DrCloudError: It refuses, or breaks the protocol.
            ValueError: The URI is none.
        """
        address = parse_uri(uri)
        context = context_for(address, tls)
        if address.unix_path is not None:
            connected = socket.socket(socket.AF_UNIX)
            connected.settimeout(timeout_seconds)
        else:
            connected = socket.create_connection((address.host, address.port), timeout_seconds)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if address.unix_path is not None:
                connected.connect(address.unix_path)
            steps = join(address.name, address.tls)
            answer: bytes | None = None
            while True:
                step = next(steps) if answer is None else steps.send(answer)
                answer = None
                if isinstance(step, int):
                    answer = _receive(connected, step)
                elif step is START_TLS:
                    assert context is not None
                    connected = context.wrap_socket(connected, server_hostname=address.host or None)
                else:
                    connected.sendall(step)
        except StopIteration as stop:
            return cls(connected, stop.value)
        except BaseException:
            connected.close()
            raise

    def pread(self, offset: int, length: int) -> bytearray:
        """Read `length` bytes at `offset`.

        Raises:
            OSError: The server reports it; `ConnectionError` and `TimeoutError` where the connection is gone.
        """
        if length <= self.info.block_size_maximum:
            return cast(bytearray, self._do(p.CMD_READ, offset, length).view.obj)
        data = bytearray()
        for start, size in pieces(offset, length, self.info.block_size_maximum):
            data += self._do(p.CMD_READ, start, size).view
        return data

    def pwrite(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is durable on return. Errors as for `pread`."""
        view = memoryview(data).cast("B")
        flags = self._fua_flag(fua)
        for start, size in pieces(offset, len(view), self.info.block_size_maximum):
            self._do(p.CMD_WRITE, start, size, flags, view[start - offset : start - offset + size])
        if fua and not flags:
            self.flush()

    def flush(self) -> None:
        """Make every write that has returned durable. Errors as for `pread`."""
        if self.info.can(p.SEND_FLUSH):
            self._do(p.CMD_FLUSH, 0, 0)

    def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """Discard. Errors as for `pread`; EOPNOTSUPP where the server cannot."""
        self._range(p.CMD_TRIM, p.SEND_TRIM, offset, length, 0, fua)

    def write_zeroes(self, offset: int, length: int, fua: bool = False, may_trim: bool = True) -> None:
        """Write zeroes, which may leave a hole. Errors as for `pread`; EOPNOTSUPP where the server cannot."""
        flags = 0 if may_trim else p.CMD_FLAG_NO_HOLE
        self._range(p.CMD_WRITE_ZEROES, p.SEND_WRITE_ZEROES, offset, length, flags, fua)

    def block_status(self, offset: int, length: int) -> list[Extent]:
        """Return the runs of data and zeroes that make up the range; all data where the server does not tell."""
        if not self.info.contexts:
            return [Extent(length, False)]
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            size = min(end - offset, RANGE_BYTES_MAX)
            runs = covered(self._do(p.CMD_BLOCK_STATUS, offset, size).extents, size)
            found += runs
            offset += sum(run.length for run in runs)
        return found

    def close(self) -> None:
        """Say good-bye and close. Nothing is flushed."""
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.sendall(Request(p.CMD_DISCONNECT, 0, 0, 0).head())
                self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fua_flag(self, fua: bool) -> int:
        return p.CMD_FLAG_FUA if fua and self.info.can(p.SEND_FUA) else 0

    def _range(self, command: int, needed: int, offset: int, length: int, flags: int, fua: bool) -> None:
        if not self.info.can(needed):
            raise OSError(errno.EOPNOTSUPP, "the NBD server does not offer this command for this export")
        fua_flag = self._fua_flag(fua)
        for start, size in pieces(offset, length, RANGE_BYTES_MAX):
            self._do(command, start, size, flags | fua_flag)
        if fua and not fua_flag:
            self.flush()

    def _do(self, command: int, offset: int, length: int, flags: int = 0, payload: Buffer = b"") -> Request:
        """Send one request and take its reply."""
        with self._lock:
            connected = self._socket
            if connected is None:
                raise ConnectionError("the NBD connection is closed")
            self._cookie += 1
            request = Request(command, self._cookie, offset, length)
            try:
                if len(payload) <= _TOGETHER_BYTES:
                    connected.sendall(b"".join((request.head(flags), payload)))
                else:
                    connected.sendall(request.head(flags))
                    connected.sendall(payload)
                steps = take_reply({self._cookie: request})
                need = next(steps)
                while True:
                    if isinstance(need, int):
                        need = steps.send(_receive(connected, need))
                    else:
                        _fill(connected, need)
                        need = next(steps)
            except StopIteration:
                pass
            except ProtocolError as error:
                self._drop()
                raise ConnectionError(f"the NBD server broke the protocol: {error}") from error
            except BaseException:
                # What is still on its way would be taken for the answer to the next request.
                self._drop()
                raise
        request.check()
        return request

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _receive(connected: socket.socket, length: int) -> bytes:
    data = connected.recv(length)
    if len(data) == length:
        return data
    whole = bytearray(length)
    whole[: len(data)] = data
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
    _fill(connected, memoryview(whole)[len(data) :])
    return bytes(whole)


def _fill(connected: socket.socket, view: memoryview) -> None:
    while view:
        count = connected.recv_into(view)
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
        view = view[count:]
