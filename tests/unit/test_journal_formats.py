"""Every released version of the stored formats can be read for ever.

`tests/data/format-v1` is a journal as version 1 wrote it (two generations, keyframes, a tag); it is never made anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.objects import group_of
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.verify import verify_object
from dr_cloud.model.blocks import BLOCK_SIZE, INDEX_MASK, REGION_MASK, REGION_SHIFT
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.open import open_store

DATA = Path(__file__).parents[1] / "data" / "format-v1"
SCOPE = Scope("acme", "shop", "dc1")
KEYS = VpgKeys(bytes(range(32)), SCOPE)


def test_version_1_is_read(tmp_path: Path) -> None:
    """Invariant 5: a journal of version 1 is read from its bucket alone, at each of its checkpoints."""
    shutil.copytree(DATA / "store", tmp_path / "store")
    store = open_store(f"file://{tmp_path}/store")
    for key, _ in store.list(SCOPE.prefix):
        verify_object(store, KEYS, key)
    catalogue = Catalogue.load(store, KEYS, SCOPE)
    assert [c.tag for c in catalogue.checkpoints if c.kind == "tag"] == ["gold", "gold"]
    directions = set()
    for expected in json.loads((DATA / "expected.json").read_text()):
        plan = catalogue.plan(expected["at_ns"])
        directions.add(plan.direction)
        reader = JournalReader(store, KEYS, SCOPE, plan.generations)
        locs: dict[int, int] = {}
        base_ns = plan.base.time_ns if plan.base else -1
        rows = [row for ref in plan.objects for row in reader.rows(ref).tolist()]
        for time_ns, _, block, loc, previous, _, _ in rows if plan.direction == "redo" else reversed(rows):
            if plan.direction == "redo" and base_ns < time_ns <= plan.at_ns:
                locs[block] = loc
            elif plan.direction == "undo" and plan.at_ns < time_ns <= base_ns:
                locs[block] = previous
        for name, value in expected["blocks"].items():
            block = int(name)
            loc = locs.get(block)
            if loc is None:
                assert plan.base is not None
                region = reader.region(reader.keyframe(plan.base), 0, block >> REGION_SHIFT)
                assert region is not None
                loc = int(region[block & REGION_MASK])
            index = reader.index(loc >> 32)
            group = group_of(index, loc & INDEX_MASK)
            start = ((loc & INDEX_MASK) - int(index.first_block[group])) * BLOCK_SIZE
            data = reader.read_groups(loc >> 32, index, group, 1)[0][start : start + BLOCK_SIZE]
            assert data == bytes([value]) * BLOCK_SIZE, (expected["at_ns"], block)
    assert directions == {"redo", "undo"}
