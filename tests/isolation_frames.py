"""A source by hand: it seals frames of known writes, says them to a target in any order, and knows every image."""

from __future__ import annotations

import asyncio
import secrets

import numpy as np
from vdsa_images import ImageReader

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.frame import COLUMN_DTYPE, seal_frame
from dr_cloud.link import messages as link
from dr_cloud.link.stream import MessageStream
from dr_cloud.model.blocks import BLOCK_SIZE, LOCAL_BIT
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.store import Store

DISK_BLOCKS = 256
FRAME_BLOCKS = 20
"""More than a group holds."""


class HandSource:
    """One stream of a scope. Each frame writes `FRAME_BLOCKS` blocks that no other frame has."""

    def __init__(self, keys: VpgKeys, time_ns: int = 1_000) -> None:
        self.keys = keys
        self.scope: Scope = keys.scope
        self.stream = secrets.token_bytes(16)
        self.tap = secrets.token_hex(16)
        self.number = 0
        self.sequence = 0
        self.time_ns = time_ns
        self.blocks: dict[int, bytes] = {}
        """What the disk holds after all that `frame` has made."""

    def hello(self) -> str:
        return link.encode_control(link.Hello(scope=self.scope, stream=self.stream.hex(), connection=0, connections=1))

    def taps(self) -> str:
        self.number += 1
        disk = Disk(index=0, name="root", size_bytes=DISK_BLOCKS * BLOCK_SIZE)
        taps = [link.TapDisks(tap=self.tap, disks=[disk])]
        return link.encode_control(link.Taps(number=self.number, taps=taps))

    def frame(self) -> bytes:
        """Seal the next frame; the message is returned."""
        self.number += 1
        return link.encode_data(link.FRAME, self.number, self.sealed(self.number))

    def sealed(self, number: int, first: int | None = None) -> bytes:
        """Return a frame of this number: `FRAME_BLOCKS` writes from block `first` on (any place)."""
        first = secrets.randbelow(DISK_BLOCKS - FRAME_BLOCKS) if first is None else first
        blocks = [secrets.token_bytes(BLOCK_SIZE) for _ in range(FRAME_BLOCKS)]
        columns = np.zeros(FRAME_BLOCKS, COLUMN_DTYPE)
        for at, block in enumerate(blocks):
            self.sequence += 1
            self.time_ns += 1
            columns[at] = (self.sequence, self.time_ns, first + at, LOCAL_BIT | at, 1, 0, 0)
            self.blocks[first + at] = block
        digests = b"".join(map(self.keys.digest, blocks))
        return b"".join(seal_frame(self.keys, self.stream, number, columns, blocks, digests))

    def checkpoint(self, request: str = "") -> str:
        self.number += 1
        return link.encode_control(
            link.CheckpointItem(
                number=self.number,
                kind="auto",
                time_ns=self.time_ns,
                exact=True,
                cuts={self.tap: self.sequence},
                request=request,
            )
        )


async def heard(stream: MessageStream) -> link.Control:
    """Return the next message of a target that is text."""
    while True:
        message = await asyncio.wait_for(stream.receive(), 10)
        assert message is not None, "the stream has ended"
        if isinstance(message, str):
            return link.decode_control(message)


async def greet(stream: MessageStream, source: HandSource) -> link.Welcome:
    """Say hello; return the welcome."""
    await stream.send(source.hello())
    welcome = await heard(stream)
    assert isinstance(welcome, link.Welcome), welcome
    return welcome


async def durable(stream: MessageStream, source: HandSource, request: str = "") -> link.Durable:
    """Have what was sent cut and made durable."""
    await stream.send(source.checkpoint(request))
    answer = await heard(stream)
    assert isinstance(answer, link.Durable), answer
    return answer


def newest_image(store: Store, keys: VpgKeys) -> dict[int, bytes]:
    """Return what the journal's newest image holds, from the store alone: every block that is no hole."""
    catalogue = Catalogue.load(store, keys, keys.scope)
    assert catalogue.newest is not None
    at_ns = catalogue.newest_ns
    assert at_ns is not None
    return {block: data for (_, block), data in ImageReader(store, keys).image(catalogue.plan(at_ns)).items()}
