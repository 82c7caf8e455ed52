"""Clients that send anything at all: the server lives, and a client at real work beside them sees nothing of it."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.client import NbdClient
from dr_cloud.nbd.memory import MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable

DISK_BYTES = 8 << 20


class Victim:
    """A server in a thread, and a client that writes and reads back all the time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.failures: list[BaseException] = []
        self.rounds = 0
        self._loop = uvloop.new_event_loop()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._serving = threading.Thread(target=self._serve)
        self._serving.start()
        assert self._ready.wait(5)
        self._working = threading.Thread(target=self._work)
        self._working.start()

    def _serve(self) -> None:
        async def run() -> None:
            table = ExportTable()
            table.add(MemoryExport("disk", DISK_BYTES))
            table.add(MemoryExport("work", DISK_BYTES))
            server = NbdServer(table, handshake_seconds_max=1)
            await server.start(unix_path=self.path)
            self._ready.set()
            while not self._stop.is_set():
                await asyncio.sleep(0.05)
            await server.close(1)

        try:
            self._loop.run_until_complete(run())
        finally:
            self._loop.close()

    def _work(self) -> None:
        try:
            with NbdClient.connect(f"nbd+unix:///work?socket={self.path}", timeout_seconds=10) as client:
                while not self._stop.wait(0.001):
                    self.rounds += 1
                    offset = self.rounds * 4096 % DISK_BYTES
                    data = os.urandom(4096)
                    client.pwrite(offset, data)
                    assert client.pread(offset, 4096) == data
        except BaseException as error:
            self.failures.append(error)

    def close(self) -> None:
        self._stop.set()
        self._working.join(10)
        self._serving.join(10)
        assert not self._serving.is_alive()


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with tempfile.TemporaryDirectory(prefix="drc-") as folder:
        victim = Victim(str(Path(folder) / "s"))
        yield victim
        victim.close()
        assert victim.failures == []
        assert victim.rounds > 10


def u(bits: int) -> st.SearchStrategy[int]:
    edges = [0, 1, (1 << bits) - 1, 1 << (bits - 1), DISK_BYTES & ((1 << bits) - 1)]
    return st.sampled_from(edges) | st.integers(0, (1 << bits) - 1)


known_option = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) | u(32)
known_command = st.sampled_from([0, 1, 3, 4, 5, 6, 7]) | u(16)
names = st.sampled_from([b"disk", b"work", b"", b"\xff\xfe", b"x" * 5000])


@st.composite
def named_option(draw: st.DrawFn) -> bytes:
    name = draw(names)
    body = draw(st.sampled_from([p.U32.pack(len(name)), b"\xff" * 4])) + name
    body += draw(st.sampled_from([b"\0\0", b"\0\x01\0\x03", b"\xff\xff", p.U32.pack(1) + p.U32.pack(5) + b"base:"]))
    return body


@st.composite
def an_option(draw: st.DrawFn) -> bytes:
    body = draw(named_option() | st.binary(max_size=200))
    length = draw(st.just(len(body)) | u(32))
    return p.OPTION.pack(draw(st.just(p.OPTION_MAGIC) | u(64)), draw(known_option), length) + body


@st.composite
def a_request(draw: st.DrawFn) -> bytes:
    command = draw(known_command)
    length = draw(st.sampled_from([0, 1, 512, 4096, 65536]) | u(32))
    # Flags stay clear of huge zeroing at the end of the disk only by the server's own checks.
    offset = draw(st.sampled_from([0, 4096, DISK_BYTES - 512, DISK_BYTES]) | u(64))
    magic = draw(st.sampled_from([p.REQUEST_MAGIC] * 9 + [0]))
    head = p.REQUEST.pack(magic, draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 0xFFFF])), command, 1, offset, length)
    return head + (bytes(min(length, 70_000)) if command == 1 else b"")


conversation = st.builds(
    lambda flags, opening, options, select, requests, tail: (
        flags + opening + b"".join(options) + select + b"".join(requests) + tail
    ),
    st.sampled_from([p.CLIENT_FLAGS.pack(3), p.CLIENT_FLAGS.pack(1), p.CLIENT_FLAGS.pack(0)]) | st.binary(max_size=8),
    st.sampled_from([b"", p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STRUCTURED_REPLY, 0)]),
    st.lists(an_option(), max_size=3),
    st.sampled_from([b"", p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk"]),
    st.lists(a_request(), max_size=6),
    st.binary(max_size=64),
)


def send(path: str, data: bytes, keep: int, read: bool) -> None:
    with socket.socket(socket.AF_UNIX) as hostile:
        hostile.settimeout(2)
        hostile.connect(path)
        try:
            hostile.sendall(data[:keep])
            if read:
                hostile.shutdown(socket.SHUT_WR)
                while hostile.recv(1 << 16):
                    pass
        except (ConnectionError, TimeoutError) as error:
            assert not isinstance(error, TimeoutError), "the server neither answers nor closes"


@settings(max_examples=300)
@given(data=conversation, cut=st.integers(0, 100), read=st.booleans())
def test_no_conversation_takes_the_server_down(victim: Victim, data: bytes, cut: int, read: bool) -> None:
    send(victim.path, data, len(data) - cut if cut < len(data) else len(data), read)
    assert victim.failures == []


@settings(max_examples=100)
@given(requests=st.lists(a_request(), min_size=1, max_size=8), cut=st.integers(0, 40))
def test_no_request_takes_the_server_down(victim: Victim, requests: list[bytes], cut: int) -> None:
    opening = p.CLIENT_FLAGS.pack(3) + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STRUCTURED_REPLY, 0)
    opening += p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk"
    data = opening + b"".join(requests)
    send(victim.path, data, max(len(opening), len(data) - cut), True)
    assert victim.failures == []


def test_many_greedy_clients_do_not_fill_memory(victim: Victim) -> None:
    """Each asks for gigabytes and never reads a byte; the process does not grow by what they asked for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opening = p.CLIENT_FLAGS.pack(3) + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk"
    read = p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_READ, 1, 0, DISK_BYTES)
    greedy = []
    for _ in range(20):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(2)
        client.connect(victim.path)
        client.sendall(opening + read * 400)
        greedy.append(client)
    rounds = victim.rounds
    threading.Event().wait(0.5)
    assert victim.rounds > rounds
    for client in greedy:
        client.close()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 100 << 10
    assert victim.failures == []
