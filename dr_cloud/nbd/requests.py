"""The client's side of the wire, without I/O: joining an export, sending requests, taking replies.

`join` and `take_reply` are generators. They yield what they need and are sent what they asked for:

    int         that many bytes of the server, sent in as `bytes`
    memoryview  to be filled by the server's next bytes
    bytes       to be sent to the server
    START_TLS   the transport is to be upgraded before anything else is read

Every length that a server sends is checked against what was asked for before its bytes are taken.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Extent
from dr_cloud.nbd.protocol import START_TLS, Step

RANGE_BYTES_MAX = 1 << 30
"""The most that one trim, write-zeroes or block status asks for."""


class Joined(NamedTuple):
    """What the server said of the export."""

    size_bytes: int
    flags: int
    structured: bool
    contexts: bool
    block_size_minimum: int
    block_size_preferred: int
    block_size_maximum: int

    @property
    def read_only(self) -> bool:
        """Writes are refused."""
        return bool(self.flags & p.READ_ONLY)

    def can(self, flag: int) -> bool:
        """Tell whether the server takes what a transmission flag (`protocol.SEND_…`) stands for."""
        return bool(self.flags & flag)


def join(name: str, tls: bool) -> Generator[Step, bytes, Joined]:
    """Run the handshake up to an open export.

    Args:
        name: Of the export.
        tls: Start TLS first.

    Raises:
        ProtocolError: The server broke the protocol, or speaks an older one.
        DrCloudError: The server refuses.
    """
    magic, option_magic, flags = p.GREETING.unpack((yield p.GREETING.size))
    if magic != p.NBD_MAGIC or option_magic != p.OPTION_MAGIC or not flags & p.FLAG_FIXED_NEWSTYLE:
        raise ProtocolError("the server does not speak NBD's fixed newstyle")
    no_zeroes = flags & p.FLAG_NO_ZEROES
    yield p.CLIENT_FLAGS.pack(p.FLAG_FIXED_NEWSTYLE | no_zeroes)
    if tls:
        reply, text = yield from _ask(p.OPT_STARTTLS, b"")
        if reply != p.REP_ACK:
            raise DrCloudError(f"the server refuses TLS {text}", "use an nbd:// address, or set TLS up on the server")
        yield START_TLS

    encoded = name.encode()
    name_field = p.U32.pack(len(encoded)) + encoded
    structured = (yield from _ask(p.OPT_STRUCTURED_REPLY, b""))[0] == p.REP_ACK
    contexts = False
    if structured:
        query = p.BASE_ALLOCATION.encode()
        data = name_field + p.U32.pack(1) + p.U32.pack(len(query)) + query
        answers: list[tuple[int, bytes]] = []
        if (yield from _ask(p.OPT_SET_META_CONTEXT, data, answers))[0] == p.REP_ACK:
            contexts = [(p.REP_META_CONTEXT, query)] == [(reply, body[4:]) for reply, body in answers]

    answers = []
    wanted = name_field + p.U16.pack(1) + p.U16.pack(p.INFO_BLOCK_SIZE)
    reply, text = yield from _ask(p.OPT_GO, wanted, answers)
    if reply == p.REP_ERR_UNSUP:
        yield p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, len(encoded)) + encoded
        size_bytes, export_flags = p.EXPORT_NAME_REPLY.unpack((yield p.EXPORT_NAME_REPLY.size))
        if not no_zeroes:
            yield len(p.EXPORT_NAME_ZEROES)
        return Joined(size_bytes, export_flags, structured, contexts, 1, 4096, p.PAYLOAD_BYTES_MAX)
    if reply != p.REP_ACK:
        remedy = "use an nbds:// address" if reply == p.REP_ERR_TLS_REQD else "ask the server for its list of exports"
        raise DrCloudError(f"the server refuses export {name!r} ({reply & ~p.REP_ERROR_BIT}) {text}".rstrip(), remedy)

    size: int | None = None
    export_flags, minimum, preferred, maximum = 0, 1, 4096, p.PAYLOAD_BYTES_MAX
    for reply, body in answers:
        kind = p.U16.unpack_from(body)[0] if reply == p.REP_INFO and len(body) >= 2 else -1
        if kind == p.INFO_EXPORT and len(body) == p.INFO_EXPORT_BODY.size:
            _, size, export_flags = p.INFO_EXPORT_BODY.unpack(body)
        elif kind == p.INFO_BLOCK_SIZE and len(body) == p.INFO_BLOCK_SIZE_BODY.size:
            _, minimum, preferred, maximum = p.INFO_BLOCK_SIZE_BODY.unpack(body)
    if size is None or not 0 < minimum <= maximum:
        raise ProtocolError("the server does not tell the size of the export")
    return Joined(size, export_flags, structured, contexts, minimum, preferred, min(maximum, p.PAYLOAD_BYTES_MAX))


def _ask(
    option: int, data: bytes, answers: list[tuple[int, bytes]] | None = None
) -> Generator[Step, bytes, tuple[int, str]]:
    """Send an option; return the last reply's number and text, and put those before it into `answers`."""
    yield p.OPTION.pack(p.OPTION_MAGIC, option, len(data)) + data
    for _ in range(p.CONTEXT_QUERIES_MAX):
        magic, echoed, reply, length = p.OPTION_REPLY.unpack((yield p.OPTION_REPLY.size))
        if magic != p.OPTION_REPLY_MAGIC or echoed != option or length > p.OPTION_BYTES_MAX:
            raise ProtocolError("the server's answer to an option is malformed")
        body = (yield length) if length else b""
        if reply == p.REP_ACK or reply & p.REP_ERROR_BIT:
            return reply, body.decode(errors="replace")
        if answers is not None:
            answers.append((reply, body))
    raise ProtocolError("the server's answer to an option does not end")


class Request:
    """One request under way, and what has come back for it."""

    __slots__ = ("command", "cookie", "error", "extents", "length", "missing", "offset", "view")

    def __init__(self, command: int, cookie: int, offset: int, length: int) -> None:
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.view = memoryview(bytearray(length)) if command == p.CMD_READ else memoryview(b"")
        self.missing = len(self.view)
        self.extents: list[Extent] = []
        self.error: OSError | None = None

    def head(self, flags: int = 0) -> bytes:
        """Pack what goes out, without a write's payload."""
        return p.REQUEST.pack(p.REQUEST_MAGIC, flags, self.command, self.cookie, self.offset, self.length)

    def check(self) -> None:
        """Raise what the server reported.

        Raises:
            OSError: The request failed.
        """
        if self.error is not None:
            raise self.error


def pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into requests of at most `most` bytes."""
    end = offset + length
    while offset < end:
        yield offset, min(most, end - offset)
        offset += most


def take_reply(requests: dict[int, Request]) -> Generator[int | memoryview, bytes, Request]:
    """Take replies until one request is answered whole; remove it from `requests` and return it.

    Raises:
        ProtocolError: The server broke the protocol; the connection is of no more use.
    """
    while True:
        head = yield p.SIMPLE_REPLY.size
        magic, number, cookie = p.SIMPLE_REPLY.unpack(head)
        if magic == p.SIMPLE_REPLY_MAGIC:
            request = requests.pop(cookie, None)
            if request is None:
                raise ProtocolError(f"a reply to no request ({cookie})")
            if number:
                request.error = p.error_from_wire(number)
            elif request.missing:
                yield request.view
            return request
        if magic != p.CHUNK_MAGIC:
            raise ProtocolError(f"wrong reply magic {magic:#x}")
        _, flags, kind, cookie, length = p.CHUNK.unpack(head + (yield p.U32.size))
        request = requests.get(cookie)
        if request is None:
            raise ProtocolError(f"a reply to no request ({cookie})")
        yield from _take_chunk(request, kind, length)
        if flags & p.CHUNK_DONE:
            del requests[cookie]
            if request.error is None and request.missing:
                raise ProtocolError(f"a read ended {request.missing} bytes short")
            return request


def _take_chunk(request: Request, kind: int, length: int) -> Generator[int | memoryview, bytes, None]:
    if kind == p.CHUNK_OFFSET_DATA and request.command == p.CMD_READ and length > 8:
        start = int.from_bytes((yield 8)) - request.offset
        yield _part(request, start, length - 8)
    elif kind == p.CHUNK_OFFSET_HOLE and request.command == p.CMD_READ and length == 12:
        body = yield 12
        # The buffer was made of zeroes.
        _part(request, int.from_bytes(body[:8]) - request.offset, int.from_bytes(body[8:]))
    elif kind == p.CHUNK_BLOCK_STATUS and request.command == p.CMD_BLOCK_STATUS:
        if length > 4 + p.EXTENT.size * (p.EXTENTS_MAX << 6) or length % p.EXTENT.size != 4:
            raise ProtocolError(f"a block status of {length} bytes")
        body = yield length
        request.extents += [Extent(size, bool(state & p.STATE_ZERO)) for size, state in p.EXTENT.iter_unpack(body[4:])]
    elif kind & p.CHUNK_ERROR_BIT and p.ERROR_BODY.size <= length <= p.OPTION_BYTES_MAX:
        body = yield length
        number, text_bytes = p.ERROR_BODY.unpack_from(body)
        text = body[p.ERROR_BODY.size : p.ERROR_BODY.size + text_bytes].decode(errors="replace")
        request.error = request.error or p.error_from_wire(number, text)
    elif kind != p.CHUNK_NONE or length:
        raise ProtocolError(f"an unexpected chunk of type {kind} with {length} bytes")


def _part(request: Request, start: int, length: int) -> memoryview:
    """Return the part of a read that a chunk brings."""
    if start < 0 or start + length > request.length or length > request.missing:
        raise ProtocolError("a chunk lies outside of its read")
    request.missing -= length
    return request.view[start : start + length]


def covered(extents: list[Extent], length: int) -> list[Extent]:
    """Cut a block status at `length` bytes.

    Raises:
        ProtocolError: It covers nothing.
    """
    try:
        return p.clip_extents(extents, length, one=False)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
