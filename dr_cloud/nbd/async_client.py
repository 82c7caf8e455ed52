"""An NBD client on asyncio with any number of requests in flight; replies are matched by cookie.

Retries: none. When the connection breaks, every request under way and every later one raises `ConnectionError`; which
of the writes under way reached the disk is then unknown, as with any disk.
Cancellation: a call that is cancelled leaves its request under way, and its data must stay as it is until `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ssl
from typing import Self, cast

from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.client import context_for
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.nbd.protocol import START_TLS
from dr_cloud.nbd.requests import RANGE_BYTES_MAX, Joined, Request, covered, join, pieces, take_reply
from dr_cloud.nbd.uri import NbdUri, parse_uri

CONNECT_SECONDS_MAX = 30.0
_STREAM_BYTES = 1 << 20


class AsyncNbdClient:
    """An open export. Its calls mirror `Export`, and may be made at the same time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, info: Joined) -> None:
        """Wrap streams whose handshake is done; `connect` is the usual way."""
        self.info = info
        self.size_bytes = info.size_bytes
        self._reader = reader
        self._writer = writer
        self._cookie = 0
        self._requests: dict[int, Request] = {}
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._broken: str | None = None
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def connect(
        cls, uri: str, *, tls: ssl.SSLContext | None = None, timeout_seconds: float = CONNECT_SECONDS_MAX
    ) -> Self:
        """Open the export that an NBD URI names. Arguments and errors as for `NbdClient.connect`."""
        address = parse_uri(uri)
        context = context_for(address, tls)
        async with asyncio.timeout(timeout_seconds):
            if address.unix_path is not None:
                reader, writer = await asyncio.open_unix_connection(address.unix_path, limit=_STREAM_BYTES)
            else:
                reader, writer = await asyncio.open_connection(address.host, address.port, limit=_STREAM_BYTES)
            try:
                info = await _join(reader, writer, address, context)
            except BaseException as error:
                writer.transport.abort()
                if isinstance(error, EOFError):
                    raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection") from error
                raise
        return cls(reader, writer, info)

    async def pread(self, offset: int, length: int) -> bytearray:
        """Read `length` bytes at `offset`.

        Raises:
            OSError: The server reports it; `ConnectionError` where the connection is gone.
        """
        if length <= self.info.block_size_maximum:
            return cast(bytearray, (await self._do(p.CMD_READ, offset, length)).view.obj)
        data = bytearray()
        for start, size in pieces(offset, length, self.info.block_size_maximum):
            data += (await self._do(p.CMD_READ, start, size)).view
        return data

    async def pwrite(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is durable on return. Errors as for `pread`."""
        view = memoryview(data).cast("B")
        flags = self._fua_flag(fua)
        for start, size in pieces(offset, len(view), self.info.block_size_maximum):
            await self._do(p.CMD_WRITE, start, size, flags, view[start - offset : start - offset + size])
        if fua and not flags:
            await self.flush()

    async def flush(self) -> None:
        """Make every write that has returned durable. Errors as for `pread`."""
        if self.info.can(p.SEND_FLUSH):
            await self._do(p.CMD_FLUSH, 0, 0)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """Discard. Errors as for `pread`; EOPNOTSUPP where the server cannot."""
        await self._range(p.CMD_TRIM, p.SEND_TRIM, offset, length, 0, fua)

    async def write_zeroes(self, offset: int, length: int, fua: bool = False, may_trim: bool = True) -> None:
        """Write zeroes, which may leave a hole. Errors as for `pread`; EOPNOTSUPP where the server cannot."""
        flags = 0 if may_trim else p.CMD_FLAG_NO_HOLE
        await self._range(p.CMD_WRITE_ZEROES, p.SEND_WRITE_ZEROES, offset, length, flags, fua)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Return the runs of data and zeroes that make up the range; all data where the server does not tell."""
        if not self.info.contexts:
            return [Extent(length, False)]
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            size = min(end - offset, RANGE_BYTES_MAX)
            runs = covered((await self._do(p.CMD_BLOCK_STATUS, offset, size)).extents, size)
            found += runs
            offset += sum(run.length for run in runs)
        return found

    async def close(self) -> None:
        """Say good-bye and close; requests under way raise `ConnectionError`. Nothing is flushed."""
        if self._broken is None:
            if not self._writer.is_closing():
                self._writer.write(Request(p.CMD_DISCONNECT, 0, 0, 0).head())
            self._break("the NBD connection is closed")
        self._receiver.cancel()
        await asyncio.wait([self._receiver])
        self._writer.close()
        with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
            async with asyncio.timeout(1):
                await self._writer.wait_closed()

    def _fua_flag(self, fua: bool) -> int:
        return p.CMD_FLAG_FUA if fua and self.info.can(p.SEND_FUA) else 0

    async def _range(self, command: int, needed: int, offset: int, length: int, flags: int, fua: bool) -> None:
        if not self.info.can(needed):
            raise OSError(errno.EOPNOTSUPP, "the NBD server does not offer this command for this export")
        fua_flag = self._fua_flag(fua)
        for start, size in pieces(offset, length, RANGE_BYTES_MAX):
            await self._do(command, start, size, flags | fua_flag)
        if fua and not fua_flag:
            await self.flush()

    async def _do(self, command: int, offset: int, length: int, flags: int = 0, payload: Buffer = b"") -> Request:
        """Send one request and wait for its reply."""
        if self._broken is not None or self._writer.is_closing():
            # A failed write closes the transport before the receiver hears of it.
            raise ConnectionError(self._broken or "the NBD connection broke")
        self._cookie = cookie = self._cookie + 1
        request = self._requests[cookie] = Request(command, cookie, offset, length)
        future = self._waiting[cookie] = asyncio.get_running_loop().create_future()
        if payload:
            self._writer.writelines([request.head(flags), payload])
        else:
            self._writer.write(request.head(flags))
        await future
        request.check()
        return request

    async def _receive(self) -> None:
        """Take replies as long as the connection lives."""
        read = self._reader.readexactly
        try:
            while True:
                steps = take_reply(self._requests)
                need = next(steps)
                try:
                    while True:
                        if isinstance(need, int):
                            need = steps.send(await read(need))
                        else:
                            need[:] = await read(len(need))
                            need = next(steps)
                except StopIteration as stop:
                    future = self._waiting.pop(stop.value.cookie)
                    if not future.done():
                        future.set_result(None)
        except Exception as error:
            # Whatever it is: nobody may wait for ever.
            self._break(f"the NBD connection broke: {error}")
            self._writer.transport.abort()

    def _break(self, reason: str) -> None:
        self._broken = reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError(reason))
        self._waiting.clear()
        self._requests.clear()


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    address: NbdUri,
    context: ssl.SSLContext | None,
) -> Joined:
    steps = join(address.name, address.tls)
    answer: bytes | None = None
    try:
        while True:
            step = next(steps) if answer is None else steps.send(answer)
            answer = None
            if isinstance(step, int):
                answer = await reader.readexactly(step)
            elif step is START_TLS:
                assert context is not None
                await writer.start_tls(context, server_hostname=address.host or None)
            else:
                writer.write(step)
    except StopIteration as stop:
        return cast(Joined, stop.value)
