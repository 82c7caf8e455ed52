"""The journal against a dictionary of versions: random writes, several disks and taps, reopened writers, any time."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dr_cloud.journal import writer as writer_module
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.frame import COLUMN_DTYPE, seal_frame
from dr_cloud.journal.objects import group_of
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writer import JournalWriter
from dr_cloud.model.blocks import BLOCK_SIZE, HOLE, INDEX_MASK, LOCAL_BIT, REGION_BLOCKS, REGION_MASK, REGION_SHIFT
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk, ImagePlan
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store

SCOPE = Scope("acme", "shop", "dc1")
KEYS = VpgKeys(bytes(range(32)), SCOPE)
DISKS = [Disk(index=0, name="root", size_bytes=40 * BLOCK_SIZE), Disk(index=3, name="data", size_bytes=3 << 30)]
BLOCKS = {0: list(range(40)), 3: [0, 1, 2, REGION_BLOCKS - 1, REGION_BLOCKS, REGION_BLOCKS + 1, 2 * REGION_BLOCKS + 5]}
TAPS = ["a" * 32, "b" * 32]


class Oracle:
    """Every version of every block: (disk, block) → [(time, content)], ascending."""

    def __init__(self) -> None:
        self.versions: dict[tuple[int, int], list[tuple[int, bytes]]] = {}

    def write(self, disk: int, block: int, time_ns: int, content: bytes) -> None:
        self.versions.setdefault((disk, block), []).append((time_ns, content))

    def at(self, disk: int, block: int, time_ns: int) -> bytes:
        content = bytes(BLOCK_SIZE)
        for when, data in self.versions.get((disk, block), []):
            if when <= time_ns:
                content = data
        return content


def image_locs(reader: JournalReader, plan: ImagePlan) -> Callable[[int, int], int]:
    """The plain reading of a plan: one row after the other. (A stack does the same, vectorised.)"""
    base = reader.keyframe(plan.base) if plan.base else None
    locs: dict[tuple[int, int], int] = {}
    rows = [row for ref in plan.objects for row in reader.rows(ref).tolist()]
    base_ns = plan.base.time_ns if plan.base else -1
    if plan.direction == "redo":
        for time_ns, _, block, loc, _, disk, _ in rows:
            if base_ns < time_ns <= plan.at_ns:
                locs[disk, block] = loc
    else:
        for time_ns, _, block, _, previous, disk, _ in reversed(rows):
            if plan.at_ns < time_ns <= base_ns:
                locs[disk, block] = previous

    def find(disk: int, block: int) -> int:
        if (disk, block) in locs:
            return locs[disk, block]
        region = reader.region(base, disk, block >> REGION_SHIFT) if base else None
        return int(region[block & REGION_MASK]) if region is not None else HOLE

    return find


def read_block(reader: JournalReader, loc: int) -> bytes:
    if loc == HOLE:
        return bytes(BLOCK_SIZE)
    number, block = loc >> 32, loc & INDEX_MASK
    index = reader.index(number)
    group = group_of(index, block)
    data = reader.read_groups(number, index, group, 1)[0]
    within = (block - int(index.first_block[group])) * BLOCK_SIZE
    return data[within : within + BLOCK_SIZE]


class Source:
    """A stream of frames as a source VDSA makes them, and the oracle beside it."""

    def __init__(self, rng: random.Random, writer: JournalWriter, oracle: Oracle, start_ns: int) -> None:
        self.rng, self.writer, self.oracle = rng, writer, oracle
        self.stream, self.number = secrets.token_bytes(16), 0
        self.sequence = [0, 0]
        self.time_ns = start_ns

    def frames(self, writes: int) -> None:
        """Append a frame of each tap: their times interleave, their frames do not."""
        order = self.rng.sample([0, 1], 2)
        made: list[list[tuple[int, ...]]] = [[], []]
        blocks: list[list[bytes]] = [[], []]
        for _ in range(writes):
            tap = self.rng.randrange(2)
            self._write(tap, made[tap], blocks[tap])
        for tap in order:
            digests = b"".join(map(KEYS.digest, blocks[tap]))
            columns = np.array(made[tap], COLUMN_DTYPE)
            self.number += 1
            self.writer.append(
                b"".join(seal_frame(KEYS, self.stream, self.number, columns, blocks[tap], digests)), TAPS
            )

    def _write(self, tap: int, columns: list[tuple[int, ...]], blocks: list[bytes]) -> None:
        rng = self.rng
        disk = rng.choice([0, 3])
        self.sequence[tap] += 1
        self.time_ns += rng.randrange(1, 5)
        block = rng.choice(BLOCKS[disk])
        kind = rng.random()
        if kind < 0.15:
            count = rng.choice([1, 1, 3, 40]) if disk == 0 else rng.choice([1, 5000, 3 << 18])
            limit = 40 if disk == 0 else 3 << 18
            count = min(count, limit - block)
            columns.append((self.sequence[tap], self.time_ns, block, 0, count, disk, tap))
            for b in BLOCKS[disk]:
                if block <= b < block + count:
                    self.oracle.write(disk, b, self.time_ns, bytes(BLOCK_SIZE))
            return
        content = bytes([rng.randrange(1, 6)]) * BLOCK_SIZE if kind < 0.5 else rng.randbytes(BLOCK_SIZE)
        known = int(self.writer.known(KEYS.digest(content))[0])
        if not known:
            blocks.append(content)
        ref = known or LOCAL_BIT | (len(blocks) - 1)
        columns.append((self.sequence[tap], self.time_ns, block, ref, 1, disk, tap))
        self.oracle.write(disk, block, self.time_ns, content)


def check_everywhere(store: Store, catalogue: Catalogue, oracle: Oracle, times: list[int]) -> set[str]:
    directions = set()
    for at_ns in times:
        plan = catalogue.plan(at_ns)
        assert plan.at_ns == at_ns
        directions.add(plan.direction)
        reader = JournalReader(store, KEYS, SCOPE, plan.generations)
        find = image_locs(reader, plan)
        for disk, blocks in BLOCKS.items():
            for block in blocks:
                assert read_block(reader, find(disk, block)) == oracle.at(disk, block, at_ns), (at_ns, disk, block)
    return directions


@pytest.mark.parametrize("keyframe_rows", [20, 1 << 18])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_image_equals_oracle_at_any_time(
    seed: int, keyframe_rows: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3.1, R3.2, R14.1, R14.3: image(T) equals the dictionary of versions for arbitrary T, by undo and by redo."""
    monkeypatch.setattr(writer_module, "KEYFRAME_ROWS", keyframe_rows)
    rng = random.Random(seed)
    store = open_store("memory:")
    work_dir = tmp_path_factory.mktemp("index")
    oracle = Oracle()
    time_ns = 1_000
    cut_times: list[int] = []
    exact_spans: list[tuple[int, int]] = []
    for _ in range(rng.randrange(1, 4)):
        writer = JournalWriter.open(store, KEYS, SCOPE, clock_ns=lambda: 1, work_dir=work_dir)
        writer.set_disks(DISKS)
        source = Source(rng, writer, oracle, time_ns)
        first = True
        for _ in range(rng.randrange(1, 12)):
            for _ in range(rng.randrange(0, 3)):
                source.frames(rng.randrange(1, 30))
            # The last cut of a writer takes all; others may leave some entries to the next.
            cut_ns = source.time_ns - rng.choice([0, 0, 20])
            checkpoint = writer.commit(writer.cut(cut_ns, "auto", {TAPS[0]: source.sequence[0]}, exact=not first))
            assert checkpoint.exact_from_ns == (checkpoint.time_ns if first else cut_times[-1])
            exact_spans.append((checkpoint.exact_from_ns, checkpoint.time_ns))
            cut_times.append(checkpoint.time_ns)
            first = False
        checkpoint = writer.commit(writer.cut(source.time_ns, "tag", {}, exact=True, tag="end", description="all"))
        exact_spans.append((checkpoint.exact_from_ns, checkpoint.time_ns))
        cut_times.append(checkpoint.time_ns)
        time_ns = source.time_ns + 1
        writer.close()
    loaded = Catalogue.load(store, KEYS, SCOPE)
    assert [c.number for c in loaded.checkpoints] == list(range(len(writer.catalogue.checkpoints)))
    spans = [rng.choice(exact_spans) for _ in range(6)]
    times = [rng.randint(low, high) for low, high in spans]
    check_everywhere(store, loaded, oracle, times)
    check_everywhere(store, writer.catalogue, oracle, times)


def test_both_directions_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4.3, R14.3: near a later keyframe an image is made by undo, near an earlier one by redo."""
    monkeypatch.setattr(writer_module, "KEYFRAME_ROWS", 60)
    store = open_store("memory:")
    oracle = Oracle()
    writer = JournalWriter.open(store, KEYS, SCOPE, clock_ns=lambda: 1)
    writer.set_disks(DISKS)
    source = Source(random.Random(7), writer, oracle, 1_000)
    times = []
    for step in range(40):
        source.frames(10)
        times.append(writer.commit(writer.cut(source.time_ns, "auto", {}, exact=step > 0)).time_ns)
        if writer._keyframe_job:
            writer._keyframe_job[0].result()
    assert len(writer.catalogue.keyframes) > 3
    assert check_everywhere(store, writer.catalogue, oracle, times) == {"redo", "undo"}
    writer.close()
