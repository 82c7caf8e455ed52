"""A process that opens one stack, for the tests of stacks that share a cache and of stacks that die.

It sends "ready", then does what it is told: ("read", seed) reads the whole disk in an order drawn from the seed and
sends what it found and fetched; ("write", count) writes blocks, sends "written", and stays until killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

from stack_journal import answer, open_cache, read

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import ImagePlan
from dr_cloud.stack.stack import Stack
from dr_cloud.store.faults import CountingStore, DelayedStore
from dr_cloud.store.open import open_store


def run(told: Connection, url: str, root: Path, plan_json: str, delay_seconds: float) -> None:
    asyncio.run(_run(told, url, root, ImagePlan.model_validate_json(plan_json), delay_seconds))


async def _run(told: Connection, url: str, root: Path, plan: ImagePlan, delay_seconds: float) -> None:
    store = CountingStore(DelayedStore(open_store(url), delay_seconds, ["get"]))
    told.send("ready")
    verb, number = told.recv()
    cache = open_cache(root / "cache", store, plan)
    stack = Stack.open(plan, cache, root, clock_ns=time.monotonic_ns)
    export = stack.exports[0]
    if verb == "write":
        for block in range(number):
            await answer(export.pwrite(block * BLOCK_SIZE, memoryview(b"w" * BLOCK_SIZE)))
        told.send("written")
        told.recv()
    size = 16 * BLOCK_SIZE
    offsets = list(range(0, export.size_bytes, size))
    random.Random(number).shuffle(offsets)
    pieces: dict[int, bytes] = {}
    for start in range(0, len(offsets), 8):
        some = offsets[start : start + 8]
        for offset, data in zip(some, await asyncio.gather(*(read(export, o, size) for o in some)), strict=True):
            pieces[offset] = data
    whole = hashlib.sha256(b"".join(pieces[offset] for offset in sorted(pieces))).hexdigest()
    told.send({"sha256": whole, "fetched_bytes": store.bytes["get"]})
    stack.close()
    cache.close()
