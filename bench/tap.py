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
from dr_cloud.demo.process import Process

DISK_BYTES: Final = 512 << 20
SECONDS: Final = 2.0
FILE, QEMU = "nbdkit file", "qemu-nbd, raw"
LATENCY, RATE = "write 4 KiB, depth 1, latency", "write 4 KiB, depth 16, rate"
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
        uris = {
            TAP: running.enter_context(chain.tap(directory, "drained", disk, directory / "drain.sock")),
            FILE: running.enter_context(peers.nbdkit_file(disk, directory / "file.sock")),
            QEMU: running.enter_context(peers.qemu_nbd(disk, "raw", directory / "qemu.sock")),
            TAP_ALONE: running.enter_context(chain.tap(directory, "alone", disk, directory / "nobody.sock")),
        }
        drain.wait_ready()
        # Only now is there data, so that the first synchronisations were short, and writes are in place.
        with open(disk, "r+b") as file:
            file.write(content.random(DISK_BYTES).data)
        figures = _compare(uris, rounds, directory)
        # The chain comes last and alone: what it has still to carry after a run would take the cores from the others.
        behind, _ = running.enter_context(chain.running_chain(directory, 5.0))
        chained = running.enter_context(chain.tap(directory, "chained", disk, behind.source_socket))
        behind.wait_in_sync()
        return figures | _compare_chain({TAP_CHAIN: chained, FILE: uris[FILE]}, directory)


def _load(directory: Path, uri: str, depth: int) -> float:
    measured = fio.run(uri, "randwrite", "4k", depth, SECONDS, directory)
    return measured.latency_us if depth == 1 else measured.requests_per_second


def _compare(uris: dict[str, str], rounds: int, directory: Path) -> Figures:
    one = interleaved({name: partial(_load, directory, uri, 1) for name, uri in uris.items()}, rounds)
    many = interleaved({name: partial(_load, directory, uri, 16) for name, uri in uris.items()}, rounds)
    return {
        f"{TAP} {LATENCY} / {QEMU}": beside(one, TAP, QEMU, "µs", Target("≤", 0.9)),
        f"{TAP} {LATENCY} / {FILE}": beside(one, TAP, FILE, "µs", Target("≤", 1.25)),
        f"{TAP} {RATE} / {FILE}": beside(many, TAP, FILE, "requests/s", Target("≥", 0.8)),
        f"{TAP} {RATE} / {QEMU}": beside(many, TAP, QEMU, "requests/s", Target("≥", 2)),
        f"{TAP_ALONE}: {LATENCY} / {FILE}": beside(one, TAP_ALONE, FILE, "µs"),
        f"{TAP_ALONE}: {RATE} / {FILE}": beside(many, TAP_ALONE, FILE, "requests/s"),
    }


def _compare_chain(uris: dict[str, str], directory: Path) -> Figures:
    one = interleaved({name: partial(_load, directory, uri, 1) for name, uri in uris.items()}, 1)
    many = interleaved({name: partial(_load, directory, uris[name], 16) for name in (FILE, TAP_CHAIN)}, 1)
    return {
        f"{TAP_CHAIN}: {LATENCY} / {FILE}": beside(one, TAP_CHAIN, FILE, "µs"),
        f"{TAP_CHAIN}: {RATE} / {FILE}": beside(many, TAP_CHAIN, FILE, "requests/s"),
    }
