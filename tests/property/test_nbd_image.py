"""Whatever a client does to a disk, the disk is what a byte array would be; pipelined or not."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.nbd.memory import PIECE_BYTES, MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable

DISK_BYTES = 3 * PIECE_BYTES + 512

offsets = st.integers(0, DISK_BYTES - 1) | st.sampled_from([PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES - 512])
lengths = st.sampled_from([1, 511, 512, 4096, 40_000, PIECE_BYTES, 2 * PIECE_BYTES + 7]) | st.integers(1, 200_000)
verbs = st.sampled_from(["write", "write", "read", "trim", "zero", "allocate", "status"])
steps = st.lists(st.tuples(verbs, offsets, lengths), min_size=1, max_size=25)


async def play(path: str, actions: list[tuple[str, int, int]], together: bool) -> None:
    table = ExportTable()
    table.add(MemoryExport("disk", DISK_BYTES))
    server = NbdServer(table)
    await server.start(unix_path=path)
    client = await AsyncNbdClient.connect(server.uris("disk")[0])
    image = bytearray(DISK_BYTES)

    async def read(offset: int, length: int, expected: bytes) -> None:
        assert await client.pread(offset, length) == expected

    async def status(offset: int, length: int, expected: bytes) -> None:
        at = 0
        for extent in await client.block_status(offset, length):
            assert not extent.hole or not any(expected[at : at + extent.length])
            at += extent.length
        assert at == length

    jobs: list[asyncio.Task[None]] = []
    for verb, offset, wanted in actions:
        length = min(wanted, DISK_BYTES - offset)
        span = slice(offset, offset + length)
        if verb == "write":
            data = os.urandom(length)
            image[span] = data
            jobs.append(asyncio.create_task(client.pwrite(offset, data)))
        elif verb in ("trim", "zero", "allocate"):
            image[span] = bytes(length)
            change = (
                client.trim(offset, length)
                if verb == "trim"
                else client.write_zeroes(offset, length, may_trim=verb == "zero")
            )
            jobs.append(asyncio.create_task(change))
        elif verb == "read":
            # A view is sent as it is then; what a later write of the pipeline does to it is the client's own race.
            if not together:
                jobs.append(asyncio.create_task(read(offset, length, bytes(image[span]))))
        elif not together:
            jobs.append(asyncio.create_task(status(offset, length, bytes(image[span]))))
        if not together:
            await jobs[-1] if jobs else None
    # This disk answers at once, so even overlapping writes land in the order in which they were sent.
    await asyncio.gather(*jobs)
    assert await client.pread(0, DISK_BYTES) == image
    await client.close()
    await server.close()


@settings(max_examples=40)
@given(actions=steps, together=st.booleans())
def test_a_disk_is_its_bytes(actions: list[tuple[str, int, int]], together: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="drc-") as folder:
        uvloop.run(play(str(Path(folder) / "s"), actions, together))
