"""One connection after its handshake: the hot path of the server.

Layout. Requests lie one after another in a receive buffer that is used again and again. Everything in it is parsed and
the export called at once; what answered at once goes out in one `writelines`, heads and the export's own buffers side
by side, without a copy. The payload of a large write goes straight from the socket into a buffer of its own size.

Consistency. The export is called in the order of arrival. Where it returned an awaitable, its reply is sent when that
is done, and later requests may overtake it, as NBD allows (the cookie tells which is answered). A flush covers every
write answered before it was received.

Bounds. A connection holds at most one receive buffer, one write payload, `PENDING_MAX` requests under way with
`PENDING_BYTES_MAX`, and about `REPLY_BYTES_HIGH` plus one reply not yet sent. At a bound it stops parsing and reading
until there is room: a client that does not read its replies waits, and only it.

Ends. A request that breaks the protocol closes the connection. Writes under way when a client goes are not cancelled:
they finish as the disk sees fit, and the session has ended only after them.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import structlog

from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.nbd.rules import Selected, refusal

log = structlog.get_logger(__name__)

RECEIVE_BYTES: Final = 256 << 10
DIRECT_BYTES: Final = 32 << 10
"""A write payload over this that has not wholly arrived gets a buffer of its own."""
ROOM_BYTES: Final = 64 << 10
"""Free space that the receive buffer always offers; more than one request below DIRECT_BYTES."""
SPARE_BYTES_MAX: Final = 4 << 20
"""A payload buffer up to this is kept for the next large write."""
BATCH_BYTES: Final = 1 << 20
REPLY_BYTES_HIGH: Final = 4 << 20
REPLY_BYTES_LOW: Final = 1 << 20
PENDING_MAX: Final = 128
PENDING_BYTES_MAX: Final = 64 << 20

_SIMPLE: Final = p.SIMPLE_REPLY.pack
_READ_CHUNK: Final = p.READ_CHUNK.pack
_REQUEST: Final = p.REQUEST.unpack_from
_REQUEST_BYTES: Final = p.REQUEST.size
_REQUEST_MAGIC: Final = p.REQUEST_MAGIC
_SIMPLE_MAGIC: Final = p.SIMPLE_REPLY_MAGIC
_CHUNK_MAGIC: Final = p.CHUNK_MAGIC
_PAYLOAD_BYTES_MAX: Final = p.PAYLOAD_BYTES_MAX
_REQ_ONE_BIT: Final = 1 << 32
"""Set in the length (32 bits on the wire) of a block status that wants one run."""
_AT_ONCE: Final = (list, tuple)
"""What an export returns that did not return an awaitable."""


class Session(asyncio.BufferedProtocol):
    """Serves one export to one client until either end closes."""

    __slots__ = (
        "_body",
        "_body_end",
        "_body_request",
        "_end",
        "_ending",
        "_held",
        "_loop",
        "_lost",
        "_mask",
        "_on_end",
        "_out",
        "_pending",
        "_pending_bytes",
        "_pinned",
        "_position",
        "_reading",
        "_selected",
        "_size_bytes",
        "_spare",
        "_structured",
        "_transport",
        "_view",
        "_wake_due",
        "_writing_paused",
        "ended",
        "export",
    )

    def __init__(self, transport: asyncio.Transport, selected: Selected, on_end: Callable[[Session], None]) -> None:
        """Take over `transport` from the handshake; `start` begins."""
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._selected = selected
        self._on_end = on_end
        self.export = selected.export
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection is gone and no call into the export is under way."""
        self._size_bytes = selected.export.size_bytes
        self._mask = selected.export.block_size_minimum - 1
        self._structured = selected.structured

        self._view = memoryview(bytearray(RECEIVE_BYTES))
        self._position = 0  # first byte not yet parsed
        self._end = 0  # first byte not yet received
        self._pinned = 0  # writes under way whose data lies in a receive buffer
        self._body: memoryview | None = None  # payload of a large write on its way in
        self._body_end = 0
        self._body_request = (0, 0, 0)  # its flags, cookie, offset
        self._spare: memoryview | None = None

        self._out: list[Buffer] = []
        self._pending: set[asyncio.Future[Any]] = set()
        self._pending_bytes = 0
        self._held = False  # at a bound, or ending: nothing more is parsed
        self._reading = True
        self._writing_paused = False
        self._wake_due = False
        self._ending = False
        self._lost = False

    def start(self, received: bytes) -> None:
        """Serve, beginning with what arrived behind the handshake (at most one receive buffer)."""
        self._transport.set_write_buffer_limits(high=REPLY_BYTES_HIGH, low=REPLY_BYTES_LOW)
        self._transport.set_protocol(self)
        self._view[: len(received)] = received
        self._end = len(received)
        self._serve()

    async def close(self, grace_seconds: float) -> None:
        """Answer what is under way, then close; after `grace_seconds` without mercy."""
        self._finish()
        done, _ = await asyncio.wait([self.ended], timeout=grace_seconds)
        if not done:
            self._transport.abort()
            for future in self._pending:
                future.cancel()
            done, _ = await asyncio.wait([self.ended], timeout=max(grace_seconds, 1.0))
            if not done:
                log.error("nbd.calls_hang", export=self.export.name, calls=len(self._pending))

    # What the event loop calls ---------------------------------------------------------------------
    def get_buffer(self, sizehint: int) -> memoryview:
        """Offer where the next bytes belong."""
        body = self._body
        return self._view[self._end :] if body is None else body[self._body_end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes that have arrived."""
        body = self._body
        if body is None:
            self._end += nbytes
            self._serve()
            return
        self._body_end += nbytes
        if self._body_end == len(body):
            self._body = None
            flags, cookie, offset = self._body_request
            if not self._write(flags, cookie, offset, body, in_receive_buffer=False) and len(body) <= SPARE_BYTES_MAX:
                self._spare = body
            self._serve()

    def pause_writing(self) -> None:
        """Stop serving: the client has not read its replies."""
        self._writing_paused = self._held = True

    def resume_writing(self) -> None:
        """Go on: it has."""
        self._writing_paused = False
        self._wake_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """End, once nothing is under way."""
        self._lost = self._ending = self._held = True
        self._out.clear()
        self._body = self._spare = None
        if not self._pending:
            self._end_now()

    # Requests --------------------------------------------------------------------------------------
    def _serve(self) -> None:
        """Parse and answer everything that lies in the receive buffer, up to a bound."""
        view = self._view
        position = self._position
        end = self._end
        size_bytes = self._size_bytes
        mask = self._mask
        structured = self._structured
        export = self.export
        pread = export.pread
        pwrite = export.pwrite
        out = self._out
        batch_bytes = 0

        while end - position >= _REQUEST_BYTES and not self._held:
            magic, flags, command, cookie, offset, length = _REQUEST(view, position)
            if magic != _REQUEST_MAGIC:
                self._abort(f"wrong request magic {magic:#x}")
                return
            start = position + _REQUEST_BYTES
            if command == 0:  # CMD_READ
                position = start
                if (
                    flags
                    or not 0 < length <= _PAYLOAD_BYTES_MAX
                    or offset + length > size_bytes
                    or ((offset | length) & mask)
                ):
                    refused = refusal(self._selected, command, flags, offset, length)
                    if refused:
                        self._fail(command, cookie, offset, refused)
                        continue
                try:
                    parts = pread(offset, length)
                except Exception as error:
                    self._fail(command, cookie, offset, error)
                    continue
                if isinstance(parts, _AT_ONCE):
                    if (len(parts[0]) if len(parts) == 1 else sum(map(len, parts))) != length:
                        self._fail(command, cookie, offset, RuntimeError(f"pread did not return {length} bytes"))
                        continue
                    if structured:
                        out.append(_READ_CHUNK(_CHUNK_MAGIC, 1, 1, cookie, length + 8, offset))
                    else:
                        out.append(_SIMPLE(_SIMPLE_MAGIC, 0, cookie))
                    out += parts
                    batch_bytes += length
                    if batch_bytes >= BATCH_BYTES:
                        batch_bytes = 0
                        self._send()
                else:
                    self._wait(parts, command, cookie, offset, length)
            elif command == 1:  # CMD_WRITE
                stop = start + length
                if stop > end:
                    if length > DIRECT_BYTES:
                        if length > _PAYLOAD_BYTES_MAX:
                            self._abort(f"write of {length} bytes")
                            return
                        self._begin_body(flags, cookie, offset, view[start:end], length)
                        position = end
                    break
                position = stop
                if flags or not length or offset + length > size_bytes or (offset | length) & mask or export.read_only:
                    self._write(flags, cookie, offset, view[start:stop], in_receive_buffer=True)
                    continue
                try:
                    result = pwrite(offset, view[start:stop], False)
                except Exception as error:
                    self._fail(command, cookie, offset, error)
                    continue
                if result is None:
                    out.append(_SIMPLE(_SIMPLE_MAGIC, 0, cookie))
                else:
                    self._pinned += 1
                    self._wait(result, command, cookie, offset, length, in_receive_buffer=True)
            elif command == p.CMD_DISCONNECT:
                self._finish()
                return
            else:
                position = start
                self._serve_other(command, flags, cookie, offset, length)

        self._keep(position, end)
        if out:
            self._send()
        if self._held:
            if self._reading:
                self._reading = False
                self._transport.pause_reading()
        elif not self._reading:
            self._reading = True
            self._transport.resume_reading()

    def _keep(self, position: int, end: int) -> None:
        """Make room behind the bytes not yet parsed. Data of writes under way stays where it is."""
        if position == end and not self._pinned:
            self._position = self._end = 0
            return
        if RECEIVE_BYTES - end < ROOM_BYTES and position:
            rest = bytes(self._view[position:end])
            if self._pinned:
                self._view = memoryview(bytearray(RECEIVE_BYTES))
            position, end = 0, len(rest)
            self._view[:end] = rest
        self._position, self._end = position, end

    def _begin_body(self, flags: int, cookie: int, offset: int, begin: memoryview, length: int) -> None:
        spare = self._spare
        self._spare = None
        self._body = spare[:length] if spare is not None and len(spare) >= length else memoryview(bytearray(length))
        self._body[: len(begin)] = begin
        self._body_end = len(begin)
        self._body_request = (flags, cookie, offset)

    def _write(self, flags: int, cookie: int, offset: int, data: memoryview, in_receive_buffer: bool) -> bool:
        """Do a write whose payload is complete; return whether it still needs `data`."""
        refused = refusal(self._selected, p.CMD_WRITE, flags, offset, len(data))
        if refused:
            self._fail(p.CMD_WRITE, cookie, offset, refused)
            return False
        try:
            result = self.export.pwrite(offset, data, bool(flags & p.CMD_FLAG_FUA))
        except Exception as error:
            self._fail(p.CMD_WRITE, cookie, offset, error)
            return False
        if result is None:
            self._out.append(_SIMPLE(p.SIMPLE_REPLY_MAGIC, 0, cookie))
            return False
        self._pinned += in_receive_buffer
        self._wait(result, p.CMD_WRITE, cookie, offset, len(data), in_receive_buffer)
        return True

    def _serve_other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        """Do everything but reads and writes."""
        refused = refusal(self._selected, command, flags, offset, length)
        if refused:
            self._fail(command, cookie, offset, refused)
            return
        export, fua = self.export, bool(flags & p.CMD_FLAG_FUA)
        result: Any
        try:
            if command == p.CMD_FLUSH:
                result = export.flush()
            elif command == p.CMD_TRIM:
                result = export.trim(offset, length, fua)
            elif command == p.CMD_WRITE_ZEROES:
                result = export.write_zeroes(offset, length, fua, not flags & p.CMD_FLAG_NO_HOLE)
            else:
                result = export.block_status(offset, length)
                if flags & p.CMD_FLAG_REQ_ONE:
                    length |= _REQ_ONE_BIT
            if result is None or isinstance(result, _AT_ONCE):
                self._answer(command, cookie, offset, length, result)
                return
        except Exception as error:
            self._fail(command, cookie, offset, error)
            return
        self._wait(result, command, cookie, offset, length)

    # Replies ---------------------------------------------------------------------------------------
    def _wait(
        self,
        awaitable: Any,
        command: int,
        cookie: int,
        offset: int,
        length: int,
        in_receive_buffer: bool = False,
    ) -> None:
        """Answer when `awaitable` is done."""
        future = asyncio.ensure_future(awaitable)
        self._pending.add(future)
        if command <= p.CMD_WRITE:
            self._pending_bytes += length
        if len(self._pending) >= PENDING_MAX or self._pending_bytes >= PENDING_BYTES_MAX:
            self._held = True
        future.add_done_callback(partial(self._done, command, cookie, offset, length, in_receive_buffer))

    def _done(
        self,
        command: int,
        cookie: int,
        offset: int,
        length: int,
        in_receive_buffer: bool,
        future: asyncio.Future[Any],
    ) -> None:
        self._pending.discard(future)
        self._pinned -= in_receive_buffer
        if command <= p.CMD_WRITE:
            self._pending_bytes -= length
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            self._fail(command, cookie, offset, error)
        elif not self._lost:
            try:
                self._answer(command, cookie, offset, length, future.result())
            except Exception as unfit:
                self._fail(command, cookie, offset, unfit)
        if self._lost:
            self._out.clear()
            if not self._pending:
                self._end_now()
        else:
            self._wake_soon()

    def _answer(self, command: int, cookie: int, offset: int, length: int, result: Any) -> None:
        """Queue the reply to a request that went well.

        Raises:
            RuntimeError: The export's answer does not fit the request.
        """
        if command == p.CMD_READ:
            parts: Sequence[Buffer] = result
            if sum(map(len, parts)) != length:
                raise RuntimeError(f"pread did not return {length} bytes")
            if self._structured:
                self._out.append(
                    _READ_CHUNK(p.CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_OFFSET_DATA, cookie, length + 8, offset)
                )
            else:
                self._out.append(_SIMPLE(p.SIMPLE_REPLY_MAGIC, 0, cookie))
            self._out += parts
        elif command == p.CMD_BLOCK_STATUS:
            extents: list[Extent] = p.clip_extents(result, length & ~_REQ_ONE_BIT, bool(length & _REQ_ONE_BIT))
            body = p.U32.pack(p.BASE_ALLOCATION_ID) + p.pack_extents(extents)
            self._out.append(p.CHUNK.pack(p.CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_BLOCK_STATUS, cookie, len(body)) + body)
        else:
            self._out.append(_SIMPLE(p.SIMPLE_REPLY_MAGIC, 0, cookie))

    def _fail(self, command: int, cookie: int, offset: int, error: int | BaseException) -> None:
        """Queue an error reply; tell the log of what the export did wrong, not of what the client did."""
        text = ""
        if isinstance(error, int):
            code = error
        elif isinstance(error, OSError):
            code = error.errno if error.errno in p.ERRORS_SENT and error.errno else errno.EIO
            text = error.strerror or str(error)
            if code == errno.EIO:
                log.warning("nbd.io_error", export=self.export.name, command=command, offset=offset, error=str(error))
        else:
            code = errno.EIO
            log.error("nbd.export_failed", export=self.export.name, command=command, offset=offset, exc_info=error)
        if not self._structured:
            self._out.append(_SIMPLE(p.SIMPLE_REPLY_MAGIC, code, cookie))
            return
        message = (text or os.strerror(code)).encode()[: p.ERROR_TEXT_BYTES_MAX]
        body = p.ERROR_BODY.pack(code, len(message)) + message
        self._out.append(p.CHUNK.pack(p.CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_ERROR, cookie, len(body)) + body)

    def _send(self) -> None:
        out = self._out
        if not self._transport.is_closing():
            self._transport.writelines(out)
        out.clear()

    def _wake_soon(self) -> None:
        """Send replies and go on parsing in the next turn of the loop, once for everything that ends in this turn."""
        if not self._wake_due:
            self._wake_due = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._wake_due = False
        if self._lost:
            return
        if self._ending:
            self._finish()
            return
        self._held = (
            self._writing_paused or len(self._pending) >= PENDING_MAX or self._pending_bytes >= PENDING_BYTES_MAX
        )
        self._serve()

    # Ends ------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        """Take no more requests; close when the last is answered."""
        self._ending = self._held = True
        if self._lost:
            return
        if self._out:
            self._send()
        if self._pending:
            self._transport.pause_reading()
        else:
            self._transport.close()

    def _abort(self, reason: str) -> None:
        log.warning("nbd.protocol_error", export=self.export.name, reason=reason)
        self._ending = self._held = True
        self._transport.abort()

    def _end_now(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
            self._on_end(self)
