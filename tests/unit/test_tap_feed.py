"""The feed over a real unix socket: reconnecting, breaking off, synchronising around blocks that cannot be read."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd.export import Buffer
from dr_cloud.seal.authority import Authority
from dr_cloud.tap import feed as feed_module
from dr_cloud.tap import wire
from dr_cloud.tap.address import TlsFiles, VdsaAddress
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.copy import State
from dr_cloud.tap.disk import FileDisk
from dr_cloud.tap.export import TapExport
from dr_cloud.tap.feed import Feed
from dr_cloud.tap.tap import Tap

BLOCKS = 300


class Rig:
    """A tap over a file of random blocks, and a VDSA's listening socket whose connections the test serves."""

    def __init__(self, folder: Path) -> None:
        path = folder / "disk"
        path.write_bytes(os.urandom(BLOCKS * BLOCK_SIZE))
        self.disk = FileDisk(path)
        self.bitmap = IntentBitmap(folder / "state", [("d", BLOCKS * BLOCK_SIZE)])
        self.tap = Tap("db", [self.bitmap])
        self.copy = self.tap.copies[0]
        self.export = TapExport(self.tap, self.tap.disks[0], self.disk)
        self.path = folder / "vdsa.sock"
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def start(self) -> None:
        self.feed = asyncio.create_task(Feed(self.copy, {0: self.disk}, VdsaAddress(self.path)).run())

    async def listen(self) -> None:
        self.server = await asyncio.start_unix_server(lambda *ends: self.connections.put_nowait(ends), self.path)

    async def accept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(self.connections.get(), 5)

    async def close(self) -> None:
        self.feed.cancel()
        await asyncio.wait({self.feed})
        self.server.close()
        while not self.connections.empty():
            self.connections.get_nowait()[1].close()
        await self.disk.close()
        self.bitmap.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    await rig.start()
    await asyncio.sleep(0.02)
    await rig.listen()
    yield rig
    await rig.close()


async def next_message(reader: asyncio.StreamReader) -> tuple[int, int, int, int, bytes]:
    """Return (kind, count, sequence, block, body)."""
    head = await asyncio.wait_for(reader.readexactly(wire.HEAD_BYTES), 5)
    kind, _, _, count, sequence, _, block, _ = wire.HEAD.unpack(head)
    length = {wire.WRITE: count * BLOCK_SIZE, wire.HELLO: count}.get(kind, 0)
    return kind, count, sequence, block, await reader.readexactly(length)


async def read_sync(reader: asyncio.StreamReader) -> tuple[set[int], int]:
    """Read up to SYNC_END; return the blocks that came and the last sequence."""
    blocks: set[int] = set()
    while True:
        kind, count, sequence, block, _ = await next_message(reader)
        if kind in (wire.WRITE, wire.ZERO):
            blocks.update(range(block, block + count))
        if kind == wire.SYNC_END:
            return blocks, sequence


def head(kind: int, sequence: int = 0) -> bytes:
    return wire.HEAD.pack(kind, 0, 0, 0, sequence, 0, 0, 0)


async def test_connects_syncs_and_clears(rig: Rig) -> None:
    reader, writer = await rig.accept()
    kind, _, _, _, body = await next_message(reader)
    assert kind == wire.HELLO
    hello = wire.Hello.model_validate_json(body)
    assert (hello.tap, hello.server, hello.copy_number) == (rig.bitmap.tap_id, "db", 0)
    blocks, sequence = await read_sync(reader)
    assert blocks == set(range(BLOCKS))
    rig.export.pwrite(5 * BLOCK_SIZE, memoryview(b"z" * BLOCK_SIZE), False)
    assert await next_message(reader) == (wire.WRITE, 1, sequence + 1, 5, b"z" * BLOCK_SIZE)
    message = head(wire.DURABLE, sequence + 1)
    writer.write(message[:7])
    await writer.drain()
    await asyncio.sleep(0.01)
    writer.write(message[7:])
    for _ in range(100):
        await asyncio.sleep(0.01)
        if not rig.bitmap.dirty:
            break
    assert not rig.bitmap.dirty
    writer.close()


@pytest.mark.parametrize("message", [head(wire.DURABLE, 1 << 63), head(99), b"\xff" * 40])
async def test_vdsa_that_talks_nonsense_is_left_and_tried_again(rig: Rig, message: bytes) -> None:
    """R1: nonsense costs the connection, clears no bit, and never reaches the guest."""
    reader, writer = await rig.accept()
    await read_sync(reader)
    writer.write(message)
    reader, again = await rig.accept()
    rig.export.pwrite(0, memoryview(b"z" * BLOCK_SIZE), False)
    blocks, _ = await read_sync(reader)
    assert blocks == set(range(BLOCKS))
    writer.close()
    again.close()


async def test_resync_sends_every_set_bit_again(rig: Rig) -> None:
    """Invariant 2: what was lost on the way comes again: exactly the blocks not yet durable."""
    reader, writer = await rig.accept()
    _, sequence = await read_sync(reader)
    writer.write(head(wire.DURABLE, sequence))
    rig.export.pwrite(7 * BLOCK_SIZE, memoryview(b"z" * BLOCK_SIZE * 2), False)
    await next_message(reader)
    writer.write(head(wire.RESYNC))
    blocks, _ = await read_sync(reader)
    assert blocks == {7, 8}
    writer.close()


async def test_unreadable_block_keeps_its_bit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2: a bad sector holds up its own piece only, and comes when it can be read."""
    monkeypatch.setattr(feed_module, "UNREADABLE_SECONDS", 0.1)
    real = rig.disk.pread
    bad = True

    def pread(offset: int, length: int) -> Sequence[Buffer]:
        if bad and offset <= 100 * BLOCK_SIZE < offset + length:
            raise OSError(errno.EIO, "bad sector")
        answer = real(offset, length)
        assert isinstance(answer, Sequence)
        return answer

    monkeypatch.setattr(rig.disk, "pread", pread)
    reader, writer = await rig.accept()
    seen: set[int] = set()
    begun = 0
    while begun < 2:
        kind, count, sequence, block, _ = await next_message(reader)
        begun += kind == wire.SYNC_BEGIN
        assert kind != wire.SYNC_END
        if kind == wire.WRITE:
            seen.update(range(block, block + count))
            writer.write(head(wire.DURABLE, sequence))
    assert seen == set(range(BLOCKS)) - set(range(64, 128))
    bad = False
    blocks, sequence = await read_sync(reader)
    while rig.copy.state is not State.STREAMING or 100 not in blocks:
        more, sequence = await read_sync(reader)
        blocks |= more
    writer.write(head(wire.DURABLE, sequence))
    await asyncio.sleep(0.05)
    assert not rig.bitmap.dirty
    writer.close()


class Pki:
    """A certificate authority, and files of certificates that it issued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.open(folder, "provider")

    def files(self, name: str) -> TlsFiles:
        """Return what someone called `name` needs, reachable at localhost."""
        credentials = self.authority.service_credentials(name, ["localhost"])
        files = TlsFiles(*(self.folder / f"{name}-{part}.pem" for part in ("cert", "key", "ca")))
        texts = (credentials.certificate, credentials.key, credentials.ca)
        for path, text in zip(files, texts, strict=True):
            path.write_text(text)
        return files


async def test_vdsa_on_another_host(tmp_path: Path) -> None:
    """R1, R11: over TLS 1.3, both ends proven; who is not the VDSA gets no byte."""
    (tmp_path / "other").mkdir()
    pki, other = Pki(tmp_path), Pki(tmp_path / "other")
    mine, its = pki.files("tap"), pki.files("vdsa")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(its.certificate, its.key)
    context.load_verify_locations(its.authority)
    rig = Rig(tmp_path)
    accepted = rig.connections
    rig.server = await asyncio.start_server(lambda *ends: accepted.put_nowait(ends), "localhost", 0, ssl=context)
    port = rig.server.sockets[0].getsockname()[1]
    rig.feed = asyncio.create_task(
        Feed(rig.copy, {0: rig.disk}, VdsaAddress.parse(f"tls:localhost:{port}", other.files("tap"))).run()
    )
    await asyncio.sleep(0.3)
    assert accepted.empty()
    assert rig.copy.state is State.CONNECTING
    rig.feed.cancel()
    await asyncio.wait({rig.feed})
    rig.feed = asyncio.create_task(
        Feed(rig.copy, {0: rig.disk}, VdsaAddress.parse(f"tls:localhost:{port}", mine)).run()
    )
    reader, writer = await rig.accept()
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    assert (await next_message(reader))[0] == wire.HELLO
    blocks, sequence = await read_sync(reader)
    assert blocks == set(range(BLOCKS))
    writer.write(head(wire.DURABLE, sequence))
    for _ in range(100):
        await asyncio.sleep(0.01)
        if not rig.bitmap.dirty:
            break
    assert not rig.bitmap.dirty
    writer.close()
    await rig.close()


@pytest.mark.parametrize("text", ["tls:host", "tls:host:0", "tls::1", "tls:host:99999", "tls:host:x"])
def test_what_is_no_address_is_told(text: str, tmp_path: Path) -> None:
    files = Pki(tmp_path).files("tap")
    with pytest.raises(DrCloudError, match="no address"):
        VdsaAddress.parse(text, files)
    with pytest.raises(DrCloudError, match="needs certificates"):
        VdsaAddress.parse("tls:host:1")
    with pytest.raises(DrCloudError, match="certificates are for"):
        VdsaAddress.parse("unix:/x", files)
    with pytest.raises(DrCloudError, match="cannot be used"):
        VdsaAddress.parse("tls:host:1", files._replace(key=tmp_path / "none"))
    assert VdsaAddress.parse("unix:/x") == VdsaAddress.parse("/x") == VdsaAddress(Path("/x"))
