from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from dr_cloud.journal.frame import COLUMN_DTYPE, seal_frame
from dr_cloud.link import messages as link
from dr_cloud.link.stream import PlainStream, connect, listen
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.seal.keyring import Keyring
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.vdsa.target_io import TargetVdsa

SCOPE = Scope("acme", "shop", "dc1")
TAP = "ab" * 16


class Rig:
    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/t"
        self.keyring = Keyring.open(folder / "keyring")
        self.keyring.create("acme")
        self.keyring.create("umbrella")
        self.store = open_store("memory:")
        self.vdsa = TargetVdsa(self.keyring, None, self.admit)
        self.streams: list[PlainStream] = []

    def admit(self, scope: Scope) -> Store:
        if scope.target != "dc1":
            raise DrCloudError("another target")
        return self.store

    async def open(self, hello: link.Hello) -> PlainStream:
        stream = await connect(self.address)
        self.streams.append(stream)
        await stream.send(link.encode_control(hello))
        return stream


@pytest.fixture
async def rig(tmp_socket_dir: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_socket_dir)
    server = await listen(rig.address, rig.vdsa.serve)
    yield rig
    for stream in rig.streams:
        stream.close()
    server.close()
    await rig.vdsa.close()


def hello(scope: Scope = SCOPE, stream: bytes = b"s" * 16, version: int = link.LINK_VERSION) -> link.Hello:
    return link.Hello(version=version, scope=scope, stream=stream.hex(), connection=0, connections=1)


async def heard(stream: PlainStream) -> link.Control:
    message = await asyncio.wait_for(stream.receive(), 5)
    assert isinstance(message, str)
    return link.decode_control(message)


async def refused(stream: PlainStream) -> str:
    message = await heard(stream)
    assert isinstance(message, link.Refused), message
    assert await asyncio.wait_for(stream.receive(), 5) is None, "closed after the reason"
    return message.code


def items(keys: VpgKeys, stream: bytes) -> list[str | bytes]:
    """A tap, one frame of one written block, a checkpoint."""
    disk = Disk(index=0, name="d", size_bytes=1 << 20)
    columns = np.zeros(1, COLUMN_DTYPE)
    columns[0] = (1, 100, 5, 1 << 63, 1, 0, 0)
    block = b"x" * 4096
    frame = b"".join(seal_frame(keys, stream, 2, columns, [block], keys.digest(block)))
    return [
        link.encode_control(link.Taps(number=1, taps=[link.TapDisks(tap=TAP, disks=[disk])])),
        link.encode_data(link.FRAME, 2, frame),
        link.encode_control(link.CheckpointItem(number=3, kind="auto", time_ns=100, exact=False, cuts={TAP: 1})),
    ]


async def test_items_in_any_order_and_twice_are_journaled_once(rig: Rig) -> None:
    """R5: reordered at the target, then journaled; the same frame twice is journaled once."""
    stream = await rig.open(hello())
    assert isinstance(await heard(stream), link.Welcome)
    first, frame, checkpoint = items(rig.keyring.vpg_keys(SCOPE), b"s" * 16)
    for message in (checkpoint, frame, frame, first, frame, first):
        await stream.send(message)
    durable = await heard(stream)
    assert isinstance(durable, link.Durable)
    assert (durable.number, durable.cuts) == (3, {TAP: 1})
    assert [c.rows for c in (await rig.vdsa.catalogue(SCOPE)).checkpoints] == [0, 1]
    while rig.vdsa.status(SCOPE).duplicates < 3:
        await asyncio.sleep(0.01)
    again = await rig.open(hello())
    welcome = await heard(again)
    assert isinstance(welcome, link.Welcome)
    assert welcome.received == 3
    assert await heard(again) == durable, "a durable may have been lost with the connection: it is said again"


@pytest.mark.parametrize(
    "bad",
    [
        hello(Scope("acme", "shop", "dc2")),
        hello(Scope("nobody", "shop", "dc1")),
        hello(Scope("..", "shop", "dc1")),
        hello(version=99),
    ],
    ids=["target", "enterprise", "name", "version"],
)
async def test_a_wrong_hello_is_denied_with_a_reason(rig: Rig, bad: link.Hello) -> None:
    assert await refused(await rig.open(bad)) == "denied"


async def test_frames_of_other_keys_end_the_stream_and_no_other(rig: Rig) -> None:
    """R11: what another enterprise's keys sealed is not taken; the others go on."""
    good = await rig.open(hello())
    await heard(good)
    other = Scope("umbrella", "shop", "dc1")
    bad = await rig.open(hello(other, b"t" * 16))
    await heard(bad)
    for message in items(VpgKeys(secrets.token_bytes(32), other), b"t" * 16):
        await bad.send(message)
    assert await refused(bad) == "stream"
    for message in items(rig.keyring.vpg_keys(SCOPE), b"s" * 16):
        await good.send(message)
    assert isinstance(await heard(good), link.Durable)
    assert await refused(await rig.open(hello(other, b"t" * 16))) == "stream", "begin a new one"


@pytest.mark.parametrize(
    "garbage",
    ["nonsense", '{"type":"pong"}', link.encode_data(link.KNOWN, 1, bytes(8)), b"short"],
    ids=["text", "control", "kind", "short"],
)
async def test_garbage_after_hello_is_refused(rig: Rig, garbage: str | bytes) -> None:
    stream = await rig.open(hello())
    await heard(stream)
    await stream.send(garbage)
    assert await refused(stream) == "stream"
    assert isinstance(await heard(await rig.open(hello())), link.Welcome)


async def test_a_newer_stream_takes_the_place_of_the_old_one(rig: Rig) -> None:
    old = await rig.open(hello())
    await heard(old)
    await heard(await rig.open(hello(stream=b"t" * 16)))
    assert await refused(old) == "replaced"
    assert await refused(await rig.open(hello())) == "replaced"


async def test_a_fenced_target_says_so(rig: Rig) -> None:
    stream = await rig.open(hello())
    await heard(stream)
    newer = TargetVdsa(rig.keyring, None, rig.admit)
    await newer._service(SCOPE)
    for message in items(rig.keyring.vpg_keys(SCOPE), b"s" * 16):
        await stream.send(message)
    assert await refused(stream) == "fenced"
    assert await refused(await rig.open(hello())) == "fenced"
    assert "generation" in rig.vdsa.status(SCOPE).problem
    await newer.close()
