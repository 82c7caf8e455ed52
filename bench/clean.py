"""`python -m bench.clean`: the search for the last clean point in a day of a million writes.

The journal is made by its real writer, in a folder store: single blocks, evenly over 24 hours, a checkpoint every 5
seconds. What is measured is what the search adds to its tests: how many rounds, and how long each round's positions
take. Tests are not run: a round takes as long as the slowest of them besides.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.content import realistic
from bench.figures import machine
from bench.history import DAY_NS, History
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writes import images_at, writes_at
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.ids import Scope
from dr_cloud.recovery.search import CleanSearch, Known
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store

CHECKPOINT_SECONDS: Final = 5
BLOCKS: Final = 1 << 20
PARALLEL: Final = (1, 8, 64)


def build(folder: Path, writes: int) -> tuple[History, JournalReader]:
    """Write the journal."""
    store = open_store(f"file://{folder / 'store'}")
    history = History(
        store, Keyring(folder / "keyring.json"), Scope("bench", "day", "dc"), BLOCKS * BLOCK_SIZE, DAY_NS // writes
    )
    content = realistic(BLOCK_SIZE)
    each = max(1, writes * CHECKPOINT_SECONDS // 86_400)
    blocks = np.random.default_rng(1).integers(0, BLOCKS, writes, np.uint64)
    for first in range(0, writes, each):
        history.write(blocks[first : first + each], content)
        history.checkpoint()
    newest = history.catalogue.checkpoints[-1]
    return history, JournalReader(store, history.keys, history.scope, newest.generations)


def search(history: History, reader: JournalReader, last_clean: int, parallel: int) -> tuple[CleanSearch, list[float]]:
    """Search the edge after row `last_clean`; return the search and the seconds of each round's positions."""
    catalogue = history.catalogue
    begun = time.perf_counter()
    since, until = images_at(catalogue, reader, [catalogue.horizon_ns or 0, catalogue.newest_ns or 0])
    found = CleanSearch(candidates=until.rows - since.rows + 1)
    seconds = [time.perf_counter() - begun]
    while not found.done:
        begun = time.perf_counter()
        # Candidate 0 is the image before the first write; it has no position, and costs nothing.
        asked = [candidate for candidate in found.next_candidates(parallel) if candidate]
        writes = writes_at(catalogue, reader, [since.rows + candidate - 1 for candidate in asked])
        seconds.append(time.perf_counter() - begun)
        found.answer(
            [
                Known(
                    first=write.first - since.rows + 1,
                    last=write.last - since.rows + 1,
                    time_ns=write.time_ns,
                    clean=write.last <= last_clean,
                )
                for write in writes
            ]
        )
    return found, seconds


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.clean", description=__doc__)
    parser.add_argument("--writes", type=int, default=10**6)
    parser.add_argument("--searches", type=int, default=10)
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=100)
    with tempfile.TemporaryDirectory(prefix="drc-clean-") as folder:
        begun = time.perf_counter()
        history, reader = build(Path(folder), options.writes)
        console.print(
            f"{machine()['cpu']}; {options.writes} writes in {len(history.catalogue.checkpoints)} checkpoints, "
            f"made in {time.perf_counter() - begun:.0f} s"
        )
        table = Table("stacks a round", "rounds", "at most", "positions of a round, ms", "the slowest, ms")
        met = True
        for parallel in PARALLEL:
            rounds, seconds = [], []
            for seed in range(options.searches):
                edge = random.Random(seed).randrange(1, options.writes - 1)
                found, took = search(history, reader, edge, parallel)
                (answer,) = found.edges
                assert answer.clean is not None and answer.dirty is not None, "there is an edge"
                assert (answer.clean.last, answer.dirty.first) == (edge + 1, edge + 2), "it is the very write"
                rounds.append(found.rounds)
                seconds += took
            most = 0
            while (parallel + 1) ** most < options.writes + 2:
                most += 1
            met = met and max(rounds) <= most
            table.add_row(
                str(parallel),
                f"{min(rounds)} to {max(rounds)}",
                str(most),
                f"{statistics.median(seconds) * 1000:.1f}",
                f"{max(seconds) * 1000:.1f}",
            )
        history.close()
        console.print(table)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
