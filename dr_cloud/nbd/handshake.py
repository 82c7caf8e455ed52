"""The server's side of the handshake, without I/O.

`negotiate` is a generator. It yields what it needs and is sent what it asked for:

    int        that many bytes of the client, sent in as `bytes`
    bytes      to be sent to the client
    START_TLS  the transport is to be upgraded before anything else is read

It returns the `Selected` export, or None when the connection is to be closed. Every length is checked before its bytes
are asked for, so at most `OPTION_BYTES_MAX` are ever held. A wrong magic or an oversized option raises `ProtocolError`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from enum import Enum

from dr_cloud.model.errors import ProtocolError
from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Export
from dr_cloud.nbd.protocol import START_TLS, Step
from dr_cloud.nbd.rules import Selected, transmission_flags
from dr_cloud.nbd.table import ExportTable, Peer


class TlsMode(Enum):
    """Whether connections are encrypted."""

    OFF = "off"
    ALLOW = "allow"
    """The client may ask for TLS."""
    REQUIRE = "require"
    """Nothing is told to a client before it has started TLS."""


def negotiate(exports: ExportTable, peer: Callable[[], Peer], tls: TlsMode) -> Generator[Step, bytes, Selected | None]:
    """Run the handshake up to the chosen export.

    Args:
        exports: What may be chosen.
        peer: Tells who the client is; asked again after TLS has started.
        tls: TLS mode of this listener.

    Raises:
        ProtocolError: The client broke the protocol.
    """
    yield p.GREETING.pack(p.NBD_MAGIC, p.OPTION_MAGIC, p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)
    (client_flags,) = p.CLIENT_FLAGS.unpack((yield p.CLIENT_FLAGS.size))
    if client_flags & ~(p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES):
        raise ProtocolError(f"unknown client flags {client_flags:#x}")

    secure = structured = False
    context_of: str | None = None
    """The export for which base:allocation was selected."""
    while True:
        magic, option, length = p.OPTION.unpack((yield p.OPTION.size))
        if magic != p.OPTION_MAGIC:
            raise ProtocolError(f"wrong option magic {magic:#x}")
        if length > p.OPTION_BYTES_MAX:
            raise ProtocolError(f"option {option} carries {length} bytes, at most {p.OPTION_BYTES_MAX} are taken")
        data = (yield length) if length else b""

        if option == p.OPT_ABORT:
            yield p.option_reply(option, p.REP_ACK)
            return None
        if option == p.OPT_STARTTLS:
            if tls is TlsMode.OFF:
                yield p.option_reply(option, p.REP_ERR_POLICY, b"TLS is not set up on this server")
            elif secure or data:
                yield p.option_reply(option, p.REP_ERR_INVALID)
            else:
                yield p.option_reply(option, p.REP_ACK)
                yield START_TLS
                # What was agreed in the clear does not count.
                secure, structured, context_of = True, False, None
            continue
        if tls is TlsMode.REQUIRE and not secure:
            if option == p.OPT_EXPORT_NAME:
                return None
            yield p.option_reply(option, p.REP_ERR_TLS_REQD, b"start TLS first")
            continue

        if option == p.OPT_EXPORT_NAME:
            # The one option without an error reply: a name that is not there closes the connection.
            export = exports.find(_text(data), peer()) if len(data) <= p.NAME_BYTES_MAX else None
            if export is None:
                return None
            yield p.EXPORT_NAME_REPLY.pack(export.size_bytes, transmission_flags(export, structured)) + (
                b"" if client_flags & p.FLAG_NO_ZEROES else p.EXPORT_NAME_ZEROES
            )
            return Selected(export, structured, structured and context_of == export.name)
        if option in (p.OPT_INFO, p.OPT_GO):
            export = yield from _answer_info(exports, peer(), option, data, structured)
            if export is not None and option == p.OPT_GO:
                return Selected(export, structured, structured and context_of == export.name)
        elif option == p.OPT_LIST:
            yield _answer_list(exports, peer(), data)
        elif option == p.OPT_STRUCTURED_REPLY:
            structured = structured or not data
            yield p.option_reply(option, p.REP_ERR_INVALID if data else p.REP_ACK)
        elif option in (p.OPT_LIST_META_CONTEXT, p.OPT_SET_META_CONTEXT):
            answer, chosen = _answer_contexts(exports, peer(), option, data, structured)
            if option == p.OPT_SET_META_CONTEXT:
                context_of = chosen
            yield answer
        else:
            yield p.option_reply(option, p.REP_ERR_UNSUP)


def _text(data: bytes) -> str:
    """Decode a name. Bytes that are not UTF-8 stay distinct and match no export."""
    return data.decode("utf-8", "surrogateescape")


def _take_text(data: bytes, at: int) -> tuple[str, int]:
    """Take a string with its length before it; return it and where it ends.

    Raises:
        ValueError: It does not fit.
    """
    if len(data) < at + 4:
        raise ValueError("the length of a string is cut off")
    (length,) = p.U32.unpack_from(data, at)
    if length > p.NAME_BYTES_MAX or len(data) < at + 4 + length:
        raise ValueError("a string is too long")
    return _text(data[at + 4 : at + 4 + length]), at + 4 + length


def _answer_list(exports: ExportTable, peer: Peer, data: bytes) -> bytes:
    if data:
        return p.option_reply(p.OPT_LIST, p.REP_ERR_INVALID)
    answer = bytearray()
    for export in exports.visible(peer):
        name = export.name.encode()
        answer += p.option_reply(
            p.OPT_LIST, p.REP_SERVER, p.U32.pack(len(name)) + name + export.description.encode()[: p.NAME_BYTES_MAX]
        )
    return bytes(answer) + p.option_reply(p.OPT_LIST, p.REP_ACK)


def _answer_info(
    exports: ExportTable, peer: Peer, option: int, data: bytes, structured: bool
) -> Generator[Step, bytes, Export | None]:
    try:
        name, at = _take_text(data, 0)
        if len(data) < at + 2 or len(data) != at + 2 + 2 * p.U16.unpack_from(data, at)[0]:
            raise ValueError("the list of wanted items is malformed")
    except ValueError as error:
        yield p.option_reply(option, p.REP_ERR_INVALID, str(error).encode())
        return None
    wanted = {p.U16.unpack_from(data, item)[0] for item in range(at + 2, len(data), 2)}
    export = exports.find(name, peer)
    if export is None:
        yield p.option_reply(option, p.REP_ERR_UNKNOWN, b"no export of this name")
        return None
    minimum, preferred = export.block_size_minimum, export.block_size_preferred
    items = [
        p.INFO_EXPORT_BODY.pack(p.INFO_EXPORT, export.size_bytes, transmission_flags(export, structured)),
        p.INFO_BLOCK_SIZE_BODY.pack(p.INFO_BLOCK_SIZE, minimum, max(minimum, preferred), p.PAYLOAD_BYTES_MAX),
    ]
    if p.INFO_NAME in wanted:
        items.append(p.U16.pack(p.INFO_NAME) + export.name.encode())
    if p.INFO_DESCRIPTION in wanted and export.description:
        items.append(p.U16.pack(p.INFO_DESCRIPTION) + export.description.encode()[: p.NAME_BYTES_MAX])
    answer = b"".join([p.option_reply(option, p.REP_INFO, item) for item in items])
    yield answer + p.option_reply(option, p.REP_ACK)
    return export


def _answer_contexts(
    exports: ExportTable, peer: Peer, option: int, data: bytes, structured: bool
) -> tuple[bytes, str | None]:
    """Answer LIST or SET_META_CONTEXT; also return the export for which base:allocation was chosen."""
    if not structured:
        return p.option_reply(option, p.REP_ERR_INVALID, b"ask for structured replies first"), None
    try:
        name, at = _take_text(data, 0)
        if len(data) < at + 4:
            raise ValueError("the number of queries is cut off")
        (count,) = p.U32.unpack_from(data, at)
        if count > p.CONTEXT_QUERIES_MAX:
            return p.option_reply(option, p.REP_ERR_TOO_BIG, b"too many queries"), None
        at += 4
        queries = []
        for _ in range(count):
            query, at = _take_text(data, at)
            queries.append(query)
        if at != len(data):
            raise ValueError("bytes are left over")
    except ValueError as error:
        return p.option_reply(option, p.REP_ERR_INVALID, str(error).encode()), None
    if exports.find(name, peer) is None:
        return p.option_reply(option, p.REP_ERR_UNKNOWN, b"no export of this name"), None
    listing = option == p.OPT_LIST_META_CONTEXT
    chosen = p.BASE_ALLOCATION in queries or (listing and (not queries or "base:" in queries))
    answer = p.option_reply(option, p.REP_ACK)
    if not chosen:
        return answer, None
    # The id of a listed context means nothing and is 0.
    body = p.U32.pack(0 if listing else p.BASE_ALLOCATION_ID) + p.BASE_ALLOCATION.encode()
    return p.option_reply(option, p.REP_META_CONTEXT, body) + answer, name
