"""(2) The tap: 4 KiB writes at depth 1 and 16, beside nbdkit's file plugin and qemu-nbd on the same raw disk.

Three taps: behind one is a VDSA that takes everything and calls it durable at once (the figures that have a target),
behind one the whole chain, behind one nothing.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Final

from bench import chain, content, fio, peers
from bench.figures import Figures, Target, beside, interleaved
from dr_cloud.demo.site import Process

DISK_BYTES: Final = 512 << 20
SECONDS: Final = 2.0
FILE, QEMU = "nbdkit file", "qemu-nbd, raw"
TAP, TAP_CHAIN, TAP_ALONE = "tap", "tap with the whole chain", "tap without a VDSA"


def measure(rounds: int) -> Figures:
    """Return the figures."""
    with chain.folder(in_memory=True) as directory, contextlib.ExitStack() as running:
        disk = directory / "disk.raw"
        with open(disk, "wb") as file:
            file.truncate(DISK_BYTES)
        drain = Process("drain", directory, "bench.drain", str(directory / "drain.sock"))
        running.callback(drain.stop)
        drain.wait_ready()
        behind, _ = running.enter_context(chain.running_chain(directory, 5.0))
        uris = {
            TAP: running.enter_context(chain.tap(directory, "drained", disk, directory / "drain.sock")),
            FILE: running.enter_context(peers.nbdkit_file(disk, directory / "file.sock")),
            QEMU: running.enter_context(peers.qemu_nbd(disk, "raw", directory / "qemu.sock")),
            TAP_CHAIN: running.enter_context(chain.tap(directory, "chained", disk, behind.source_socket)),
            TAP_ALONE: running.enter_context(chain.tap(directory, "alone", disk, directory / "nobody.sock")),
        }
        drain.wait_ready()
        behind.wait_in_sync()
        # Only now is there data, so that the first synchronisations were short, and writes are in place.
        with open(disk, "r+b") as file:
            file.write(content.random(DISK_BYTES).data)
        return _compare(uris, rounds, directory)


def _compare(uris: dict[str, str], rounds: int, directory: Path) -> Figures:
    def load(uri: str, depth: int) -> float:
        measured = fio.run(uri, "randwrite", "4k", depth, SECONDS, directory)
        return measured.latency_us if depth == 1 else measured.requests_per_second

    one = interleaved({name: partial(load, uri, 1) for name, uri in uris.items()}, rounds)
    many = interleaved({name: partial(load, uri, 16) for name, uri in uris.items()}, rounds)
    latency, rate = "write 4 KiB, depth 1, latency", "write 4 KiB, depth 16, rate"
    figures = {
        f"{TAP} {latency} / {QEMU}": beside(one, TAP, QEMU, "µs", Target("≤", 0.9)),
        f"{TAP} {latency} / {FILE}": beside(one, TAP, FILE, "µs", Target("≤", 1.25)),
        f"{TAP} {rate} / {FILE}": beside(many, TAP, FILE, "requests/s", Target("≥", 0.8)),
        f"{TAP} {rate} / {QEMU}": beside(many, TAP, QEMU, "requests/s", Target("≥", 2)),
    }
    for other in (TAP_CHAIN, TAP_ALONE):
        figures[f"{other}: {latency} / {FILE}"] = beside(one, other, FILE, "µs")
        figures[f"{other}: {rate} / {FILE}"] = beside(many, other, FILE, "requests/s")
    return figures
