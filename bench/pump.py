"""A guest that writes prepared data as fast as it is taken: `python -m bench.pump URI FILE SIZES`.

SIZES is `small` (4 KiB each, anywhere) or `large` (64 KiB to 1 MiB each, in order). Prints the time before the first
write and the time after the last answer, in ns since the epoch.
"""

from __future__ import annotations

import asyncio
import mmap
import random
import sys
import time
from collections.abc import Iterator
from typing import Final

import uvloop

from dr_cloud.nbd.async_client import AsyncNbdClient

DEPTH: Final = 16
SMALL_BYTES: Final = 4 << 10
LARGE_BYTES: Final = (64 << 10, 1 << 20)


def pieces(size_bytes: int, sizes: str) -> list[tuple[int, int]]:
    """Return (offset, length) of each write; together they write every byte once."""
    draw = random.Random(size_bytes)
    if sizes == "small":
        found = [(at, SMALL_BYTES) for at in range(0, size_bytes, SMALL_BYTES)]
        draw.shuffle(found)
        return found
    found, at = [], 0
    while at < size_bytes:
        length = min(draw.randrange(LARGE_BYTES[0], LARGE_BYTES[1] + 1, SMALL_BYTES), size_bytes - at)
        found.append((at, length))
        at += length
    return found


async def pump(uri: str, path: str, sizes: str) -> None:
    """Write the file's bytes to the same places of the disk."""
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    writes = iter(pieces(len(data), sizes))
    client = await AsyncNbdClient.connect(uri)

    async def worker(writes: Iterator[tuple[int, int]]) -> None:
        for at, length in writes:
            await client.pwrite(at, data[at : at + length])

    begun_ns = time.time_ns()
    await asyncio.gather(*(worker(writes) for _ in range(DEPTH)))
    print(begun_ns, time.time_ns(), flush=True)
    await client.close()


if __name__ == "__main__":
    uvloop.run(pump(*sys.argv[1:]))
