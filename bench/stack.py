"""(1) A stack, warm: random and sequential reads, random writes, beside nbdkit's memory and qemu-nbd's qcow2."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from bench import content, fio, peers
from bench.figures import Figures, Target, beside, interleaved
from bench.provider import Provider, uri_of
from dr_cloud.model.blocks import BLOCK_SIZE, blocks_of
from dr_cloud.model.ids import Scope

DISK_BYTES: Final = 512 << 20
REWRITTEN: Final = 100
"""One block in so many was written again by the guest: an image is never in one piece."""
SECONDS: Final = 2.0
STACK, QEMU, MEMORY = "stack", "qemu-nbd, qcow2", "nbdkit memory"
NOTHING: Final = "a server that does nothing"
"""How far any server gets beside this load generator on these cores."""

READS: Final[list[tuple[str, fio.Pattern, str, int]]] = [
    ("read 4 KiB, depth 1", "randread", "4k", 1),
    ("read 4 KiB, depth 16", "randread", "4k", 16),
    ("read 1 MiB in sequence", "read", "1m", 4),
]
WRITES: Final[list[tuple[str, fio.Pattern, str, int]]] = [
    ("write 4 KiB, depth 1", "randwrite", "4k", 1),
    ("write 4 KiB, depth 16", "randwrite", "4k", 16),
]
TARGETS: Final[dict[str, tuple[Target, Target]]] = {
    "read 4 KiB, depth 16": (Target("≥", 5), Target("≥", 1.3)),
    "write 4 KiB, depth 16": (Target("≥", 5), Target("≥", 1.3)),
    "read 1 MiB in sequence": (Target("≥", 3), Target("≥", 0.9)),
}
"""Beside qemu-nbd on qcow2, and beside nbdkit's memory."""


def measure(provider: Provider, rounds: int) -> Figures:
    """Return the figures."""
    directory = provider.directory
    scope, at_ns = _disk_with_history(provider)
    figures: Figures = {}
    reading, writing = provider.local.open_stacks(scope, [at_ns, at_ns])
    backing = directory / "backing.raw"
    peers.copy(uri_of(reading), str(backing))  # This also warms the cache.
    overlay = directory / "overlay.qcow2"
    peers.make_overlay(backing, overlay)
    with contextlib.ExitStack() as servers:
        memory = servers.enter_context(peers.nbdkit_memory(DISK_BYTES, directory / "run" / "memory.sock"))
        qemu = servers.enter_context(peers.qemu_nbd(overlay, "qcow2", directory / "run" / "qcow2.sock"))
        nothing = servers.enter_context(peers.nbdkit_null(DISK_BYTES, directory / "run" / "null.sock"))
        peers.copy(str(backing), memory)
        for works, ours in ((READS, uri_of(reading)), (WRITES, uri_of(writing))):
            uris = {STACK: ours, QEMU: qemu, MEMORY: memory, NOTHING: nothing}
            for work in works:
                figures |= _compare(work, uris, rounds, directory)
    for stack in (reading, writing):
        stack.close()
    return figures


def _disk_with_history(provider: Provider) -> tuple[Scope, int]:
    """Return a scope whose disk was filled in order and then written here and there, and a time in the middle."""
    history = provider.history("stack", DISK_BYTES)
    blocks = blocks_of(DISK_BYTES)
    data = content.realistic(64 << 20)
    history.write(np.arange(blocks, dtype=np.uint64), data)
    history.checkpoint()
    draw = np.random.default_rng(7)
    history.write(draw.integers(0, blocks, blocks // REWRITTEN, np.uint64), data)
    history.checkpoint()
    at_ns = history.time_ns
    history.write(draw.integers(0, blocks, blocks // REWRITTEN, np.uint64), data[: 1024 * BLOCK_SIZE])
    history.close()
    provider.take_over(history.scope)
    return history.scope, at_ns


def _compare(work: tuple[str, fio.Pattern, str, int], uris: dict[str, str], rounds: int, directory: Path) -> Figures:
    name, pattern, size, depth = work
    sequential = size == "1m"

    def load(uri: str) -> float:
        measured = fio.run(uri, pattern, size, depth, SECONDS, directory)
        return measured.mib_per_second if sequential else measured.requests_per_second

    runs = interleaved({server: partial(load, uri) for server, uri in uris.items()}, rounds)
    unit = "MiB/s" if sequential else "requests/s"
    targets = TARGETS.get(name, (None, None))
    figures = {
        f"stack {name} / {other}": beside(runs, STACK, other, unit, target)
        for other, target in zip((QEMU, MEMORY), targets, strict=True)
    }
    return figures | {f"{NOTHING} {name} / {QEMU}": beside(runs, NOTHING, QEMU, unit)}
