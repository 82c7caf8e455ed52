"""Both sides of the handshake, run against each other and against bad peers, without a socket."""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import Any

import pytest

from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Extent
from dr_cloud.nbd.handshake import TlsMode, negotiate
from dr_cloud.nbd.memory import MemoryExport
from dr_cloud.nbd.requests import Joined, Request, join, pieces, take_reply
from dr_cloud.nbd.rules import Selected, refusal
from dr_cloud.nbd.table import ExportTable, Peer
from dr_cloud.nbd.uri import parse_uri

ALICE = Peer("unix", uid=1000)
MALLORY = Peer("unix", uid=666)


def table() -> ExportTable:
    exports = ExportTable(lambda peer, name: name != "secret" or peer.uid == 1000)
    exports.add(MemoryExport("disk", 1 << 20, description="a disk"))
    exports.add(MemoryExport("secret", 4096, read_only=True))
    return exports


class Side:
    """One generator with the bytes that wait for it."""

    def __init__(self, steps: Generator[Any, bytes, Any]) -> None:
        self.steps, self.inbox, self.sent = steps, bytearray(), bytearray()
        self.want: int | None = None
        self.result: Any = None
        self.ended = self.tls = False
        self.advance(None)

    def advance(self, data: bytes | None) -> None:
        try:
            step = next(self.steps) if data is None else self.steps.send(data)
            while not isinstance(step, int):
                if step is p.START_TLS:
                    self.tls = True
                else:
                    self.sent += step
                step = next(self.steps)
            self.want = step
        except StopIteration as stop:
            self.ended, self.result = True, stop.value

    def feed(self, data: bytes) -> bytes:
        """Give it bytes; return what it sends."""
        self.inbox += data
        while not self.ended and self.want is not None and len(self.inbox) >= self.want:
            taken = bytes(self.inbox[: self.want])
            del self.inbox[: self.want]
            self.advance(taken)
        sent = bytes(self.sent)
        self.sent.clear()
        return sent


def server(peer: Peer = ALICE, tls: TlsMode = TlsMode.OFF) -> Side:
    side = Side(negotiate(table(), lambda: peer, tls))
    side.greeting = bytes(side.sent)  # type: ignore[attr-defined]
    side.sent.clear()
    side.feed(p.CLIENT_FLAGS.pack(3))
    return side


def option(number: int, data: bytes = b"") -> bytes:
    return p.OPTION.pack(p.OPTION_MAGIC, number, len(data)) + data


def named(name: str) -> bytes:
    return p.U32.pack(len(name.encode())) + name.encode()


def go(name: str) -> bytes:
    return named(name) + p.U16.pack(0)


def replies(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        _, _, reply, length = p.OPTION_REPLY.unpack_from(data, at)
        found.append((reply, data[at + p.OPTION_REPLY.size : at + p.OPTION_REPLY.size + length]))
        at += p.OPTION_REPLY.size + length
    return found


def run(client_name: str, *, tls: bool = False, mode: TlsMode = TlsMode.OFF, peer: Peer = ALICE) -> tuple[Joined, Any]:
    ours, theirs = Side(join(client_name, tls)), Side(negotiate(table(), lambda: peer, mode))
    for _ in range(50):
        to_client, to_server = bytes(theirs.sent), bytes(ours.sent)
        theirs.sent.clear()
        ours.sent.clear()
        ours.sent += ours.feed(to_client)
        theirs.sent += theirs.feed(to_server)
        if ours.ended and theirs.ended:
            return ours.result, theirs
    raise AssertionError("the two sides did not come to an end")


def test_client_joins_an_export() -> None:
    joined, theirs = run("disk")
    assert (joined.size_bytes, joined.structured, joined.contexts, joined.read_only) == (1 << 20, True, True, False)
    assert joined.block_size_maximum == p.PAYLOAD_BYTES_MAX
    assert joined.can(p.SEND_FAST_ZERO) and joined.can(p.CAN_MULTI_CONN) and joined.can(p.SEND_DF)
    assert theirs.result.export.name == "disk"
    assert (theirs.result.structured, theirs.result.contexts) == (True, True)
    read_only, _ = run("secret")
    assert read_only.read_only and not read_only.can(p.SEND_TRIM | p.SEND_WRITE_ZEROES | p.SEND_FUA)


def test_tls_is_started_before_anything_is_told() -> None:
    _, theirs = run("disk", tls=True, mode=TlsMode.REQUIRE)
    assert theirs.tls
    with pytest.raises(DrCloudError, match=r"nbds|TLS"):
        run("disk", mode=TlsMode.REQUIRE)
    with pytest.raises(DrCloudError, match="refuses TLS"):
        run("disk", tls=True, mode=TlsMode.OFF)


def test_tls_required_answers_every_option_alike() -> None:
    side = server(tls=TlsMode.REQUIRE)
    for number in (p.OPT_LIST, p.OPT_GO, p.OPT_INFO, p.OPT_STRUCTURED_REPLY, 99):
        assert replies(side.feed(option(number, b"")))[0][0] == p.REP_ERR_TLS_REQD
    side.feed(option(p.OPT_EXPORT_NAME, b"disk"))
    assert side.ended and side.result is None


def test_what_was_agreed_in_the_clear_does_not_count_after_tls() -> None:
    side = server(tls=TlsMode.ALLOW)
    side.feed(option(p.OPT_STRUCTURED_REPLY))
    side.feed(option(p.OPT_STARTTLS))
    assert side.tls
    assert replies(side.feed(option(p.OPT_STARTTLS)))[0][0] == p.REP_ERR_INVALID
    side.feed(option(p.OPT_GO, go("disk")))
    assert side.result.structured is False


def test_a_hidden_export_looks_missing() -> None:
    """R11: an enterprise sees only its own exports."""
    hidden, missing = server(MALLORY), server(MALLORY)
    for number, extra in ((p.OPT_INFO, b"\0\0"), (p.OPT_GO, b"\0\0")):
        assert hidden.feed(option(number, named("secret") + extra)) == missing.feed(
            option(number, named("absent") + extra)
        )
    assert [body[4:8] for reply, body in replies(hidden.feed(option(p.OPT_LIST))) if reply == p.REP_SERVER] == [b"disk"]
    hidden.feed(option(p.OPT_STRUCTURED_REPLY))
    answer = hidden.feed(option(p.OPT_SET_META_CONTEXT, named("secret") + p.U32.pack(0)))
    assert replies(answer)[0][0] == p.REP_ERR_UNKNOWN
    hidden.feed(option(p.OPT_EXPORT_NAME, b"secret"))
    assert hidden.ended and hidden.result is None
    assert len(replies(server(ALICE).feed(option(p.OPT_LIST)))) == 3


def test_a_rule_that_breaks_is_a_no() -> None:
    def broken(peer: Peer, name: str) -> bool:
        raise RuntimeError("no decision")

    exports = ExportTable(broken)
    exports.add(MemoryExport("disk", 4096))
    assert exports.find("disk", ALICE) is None
    assert exports.visible(ALICE) == []


def test_old_style_open_with_export_name() -> None:
    side = server()
    answer = side.feed(option(p.OPT_EXPORT_NAME, b"disk"))
    assert p.EXPORT_NAME_REPLY.unpack(answer)[0] == 1 << 20
    assert side.result.export.name == "disk" and not side.result.structured
    zeroes = Side(negotiate(table(), lambda: ALICE, TlsMode.OFF))
    zeroes.sent.clear()
    zeroes.feed(p.CLIENT_FLAGS.pack(1))
    assert len(zeroes.feed(option(p.OPT_EXPORT_NAME, b"disk"))) == p.EXPORT_NAME_REPLY.size + 124


def test_info_tells_names_and_block_sizes() -> None:
    wanted = named("disk") + p.U16.pack(2) + p.U16.pack(p.INFO_NAME) + p.U16.pack(p.INFO_DESCRIPTION)
    answer = replies(server().feed(option(p.OPT_INFO, wanted)))
    bodies = {p.U16.unpack_from(body)[0]: body for reply, body in answer if reply == p.REP_INFO}
    assert bodies[p.INFO_NAME][2:] == b"disk"
    assert bodies[p.INFO_DESCRIPTION][2:] == b"a disk"
    assert p.INFO_BLOCK_SIZE_BODY.unpack(bodies[p.INFO_BLOCK_SIZE])[1:] == (1, 4096, 32 << 20)
    assert answer[-1][0] == p.REP_ACK


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (p.OPT_GO, b""),
        (p.OPT_GO, p.U32.pack(1 << 31)),
        (p.OPT_GO, named("disk") + p.U16.pack(7)),
        (p.OPT_GO, named("disk") + p.U16.pack(0) + b"more"),
        (p.OPT_GO, named("x" * 5000) + p.U16.pack(0)),
        (p.OPT_LIST, b"surplus"),
        (p.OPT_STARTTLS, b"surplus"),
        (p.OPT_STRUCTURED_REPLY, b"surplus"),
        (p.OPT_SET_META_CONTEXT, named("disk") + p.U32.pack(2) + named("base:allocation")),
        (p.OPT_SET_META_CONTEXT, named("disk")),
    ],
)
def test_a_malformed_option_is_refused_and_the_next_one_served(number: int, data: bytes) -> None:
    side = server(tls=TlsMode.ALLOW)
    side.feed(option(p.OPT_STRUCTURED_REPLY))
    assert replies(side.feed(option(number, data)))[0][0] == p.REP_ERR_INVALID
    side.feed(option(p.OPT_GO, go("disk")))
    assert side.result.export.name == "disk"


def test_lengths_and_counts_are_bounded() -> None:
    with pytest.raises(ProtocolError, match="carries"):
        server().feed(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_GO, p.OPTION_BYTES_MAX + 1))
    with pytest.raises(ProtocolError, match="magic"):
        server().feed(p.OPTION.pack(1, p.OPT_GO, 0))
    with pytest.raises(ProtocolError, match="flags"):
        Side(negotiate(table(), lambda: ALICE, TlsMode.OFF)).feed(p.CLIENT_FLAGS.pack(0xFF))
    side = server()
    side.feed(option(p.OPT_STRUCTURED_REPLY))
    many = named("disk") + p.U32.pack(1000) + named("x") * 1000
    assert replies(side.feed(option(p.OPT_SET_META_CONTEXT, many)))[0][0] == p.REP_ERR_TOO_BIG


def test_meta_contexts() -> None:
    side = server()
    ask = named("disk") + p.U32.pack(1) + named("base:allocation")
    assert replies(side.feed(option(p.OPT_SET_META_CONTEXT, ask)))[0][0] == p.REP_ERR_INVALID, "no structured replies"
    side.feed(option(p.OPT_STRUCTURED_REPLY))
    for queries in ([], ["base:"], ["base:allocation", "other:thing"]):
        data = named("disk") + p.U32.pack(len(queries)) + b"".join(map(named, queries))
        assert replies(side.feed(option(p.OPT_LIST_META_CONTEXT, data)))[0] == (
            p.REP_META_CONTEXT,
            p.U32.pack(0) + b"base:allocation",
        )
    other = named("disk") + p.U32.pack(1) + named("qemu:dirty-bitmap:x")
    assert replies(side.feed(option(p.OPT_SET_META_CONTEXT, other)))[0][0] == p.REP_ACK
    # Selected for one export, opened with another: does not hold.
    for name in ("disk", "secret"):
        for opening in (option(p.OPT_GO, go(name)), option(p.OPT_EXPORT_NAME, name.encode())):
            side = server()
            side.feed(option(p.OPT_STRUCTURED_REPLY) + option(p.OPT_SET_META_CONTEXT, ask) + opening)
            assert side.result.contexts is (name == "disk")


def read_request() -> tuple[dict[int, Request], Request]:
    request = Request(p.CMD_READ, 7, 4096, 1024)
    return {7: request}, request


def answer(requests: dict[int, Request], data: bytes) -> Request:
    steps, at = take_reply(requests), 0
    try:
        need = next(steps)
        while True:
            if isinstance(need, int):
                at += need
                need = steps.send(data[at - need : at])
            else:
                need[:] = data[at : at + len(need)]
                at += len(need)
                need = next(steps)
    except StopIteration as stop:
        assert at == len(data)
        return stop.value


def chunk(kind: int, body: bytes, *, done: bool = False, cookie: int = 7) -> bytes:
    return p.CHUNK.pack(p.CHUNK_MAGIC, int(done), kind, cookie, len(body)) + body


def test_a_read_may_come_in_chunks_and_holes() -> None:
    requests, request = read_request()
    data = chunk(p.CHUNK_OFFSET_DATA, (4096 + 512).to_bytes(8) + b"b" * 512)
    data += chunk(p.CHUNK_OFFSET_HOLE, (4096).to_bytes(8) + (512).to_bytes(4)) + chunk(0, b"", done=True)
    assert answer(requests, data) is request
    assert bytes(request.view) == bytes(512) + b"b" * 512
    assert requests == {}


def test_an_error_chunk_names_the_cause() -> None:
    requests, request = read_request()
    message = b"object journal/1-7.jrn is damaged"
    answer(requests, chunk(p.CHUNK_ERROR, p.ERROR_BODY.pack(5, len(message)) + message, done=True))
    with pytest.raises(OSError, match=r"journal/1-7\.jrn") as caught:
        request.check()
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    "data",
    [
        p.SIMPLE_REPLY.pack(0xDEAD, 0, 7),
        p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, 8),
        chunk(0, b"", done=True, cookie=8),
        chunk(0, b"", done=True),
        chunk(p.CHUNK_OFFSET_DATA, (0).to_bytes(8) + b"x"),
        chunk(p.CHUNK_OFFSET_DATA, (4096 + 1024).to_bytes(8) + b"x"),
        chunk(p.CHUNK_OFFSET_HOLE, (4096).to_bytes(8) + (1 << 31).to_bytes(4)),
        chunk(p.CHUNK_OFFSET_DATA, (4096).to_bytes(8) + b"x" * 1024) * 2,
        chunk(p.CHUNK_BLOCK_STATUS, bytes(12)),
        chunk(p.CHUNK_NONE, b"surplus"),
        chunk(77, b""),
        p.CHUNK.pack(p.CHUNK_MAGIC, 1, p.CHUNK_ERROR, 7, 1 << 31),
    ],
)
def test_a_reply_that_does_not_fit_ends_the_connection(data: bytes) -> None:
    requests, _ = read_request()
    with pytest.raises(ProtocolError):
        answer(requests, data)


def test_refusals() -> None:
    """Limits and permissions hold before the export is asked."""
    disk = MemoryExport("disk", 1 << 20)
    disk.block_size_minimum = 512
    writable = Selected(disk, structured=True, contexts=True)
    plain = Selected(disk, structured=False, contexts=False)
    read_only = Selected(MemoryExport("ro", 1 << 20, read_only=True), structured=True, contexts=True)
    cases = [
        (writable, p.CMD_READ, 0, 0, 512, 0),
        (writable, p.CMD_READ, p.CMD_FLAG_DF, 0, 512, 0),
        (plain, p.CMD_READ, p.CMD_FLAG_DF, 0, 512, errno.EINVAL),
        (writable, p.CMD_READ, p.CMD_FLAG_NO_HOLE, 0, 512, errno.EINVAL),
        (writable, p.CMD_READ, 0, 0, 0, errno.EINVAL),
        (writable, p.CMD_READ, 0, 1, 512, errno.EINVAL),
        (writable, p.CMD_READ, 0, 0, 513, errno.EINVAL),
        (writable, p.CMD_READ, 0, 1 << 20, 512, errno.EINVAL),
        (writable, p.CMD_READ, 0, (1 << 64) - 512, 1024, errno.EINVAL),
        (writable, p.CMD_WRITE, p.CMD_FLAG_FUA, 0, 512, 0),
        (writable, p.CMD_WRITE, 0, (1 << 20) - 512, 1024, errno.ENOSPC),
        (read_only, p.CMD_WRITE, 0, 0, 512, errno.EPERM),
        (read_only, p.CMD_TRIM, 0, 0, 512, errno.EPERM),
        (read_only, p.CMD_WRITE_ZEROES, 0, 0, 512, errno.EPERM),
        (read_only, p.CMD_READ, 0, 0, 512, 0),
        (writable, p.CMD_FLUSH, 0, 0, 0, 0),
        (writable, p.CMD_FLUSH, 0, 0, 1, errno.EINVAL),
        (writable, p.CMD_WRITE_ZEROES, p.CMD_FLAG_FAST_ZERO, 0, 512, 0),
        (plain, p.CMD_BLOCK_STATUS, 0, 0, 512, errno.EINVAL),
        (writable, p.CMD_BLOCK_STATUS, p.CMD_FLAG_REQ_ONE, 0, 512, 0),
        (writable, 77, 0, 0, 512, errno.EINVAL),
    ]
    for selected, command, flags, offset, length, expected in cases:
        assert refusal(selected, command, flags, offset, length) == expected, (command, flags, offset, length)
    disk.fast_zeroes = False
    assert refusal(writable, p.CMD_WRITE_ZEROES, p.CMD_FLAG_FAST_ZERO, 0, 512) == errno.EOPNOTSUPP


def test_extents_are_joined_and_cut() -> None:
    runs = [Extent(10, True), Extent(5, True), Extent(5, False), Extent(100, True)]
    assert p.clip_extents(runs, 30, one=False) == [Extent(15, True), Extent(5, False), Extent(10, True)]
    assert p.clip_extents(runs, 30, one=True) == [Extent(15, True)]
    alternating = [Extent(1, index % 2 == 0) for index in range(p.EXTENTS_MAX * 2)]
    assert len(p.clip_extents(alternating, 1 << 30, one=False)) == p.EXTENTS_MAX
    with pytest.raises(ValueError, match="no byte"):
        p.clip_extents([], 30, one=False)


def test_uris() -> None:
    assert parse_uri("nbd://h:99/a%2Fb").name == "a/b"
    assert parse_uri("nbd://[::1]/x")[2:4] == ("::1", 10809)
    unix = parse_uri("nbds+unix:///disk?socket=/run/my%20sock&tls-certificates=/etc/pki")
    assert unix == ("disk", "/run/my sock", "", 0, True, "/etc/pki")
    for bad in ("http://x/", "nbd+unix:///x", "nbd+tcp://h/x", "disk"):
        with pytest.raises(ValueError, match=r"NBD address|names no socket"):
            parse_uri(bad)


def test_pieces_cover_a_range_exactly() -> None:
    assert list(pieces(5, 10, 4)) == [(5, 4), (9, 4), (13, 2)]
    assert list(pieces(5, 0, 4)) == []
