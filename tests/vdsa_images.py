"""For the tests of VDSAs: image(T) of a journal, read from the store alone."""

from __future__ import annotations

import numpy as np

from dr_cloud.journal.objects import ObjectIndex, group_of
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.blocks import BLOCK_SIZE, INDEX_MASK
from dr_cloud.model.journal import ImagePlan
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.store import Store


class ImageReader:
    """Reads images of one scope, and keeps the blocks that it has decoded."""

    def __init__(self, store: Store, keys: VpgKeys) -> None:
        self._store = store
        self._keys = keys
        self._indexes: dict[int, ObjectIndex] = {}
        self._groups: dict[tuple[int, int], bytes] = {}

    def image(self, plan: ImagePlan) -> dict[tuple[int, int], bytes]:
        """Return every block that is no hole: (disk, block) → its bytes."""
        reader = JournalReader(self._store, self._keys, plan.scope, plan.generations)
        locs: dict[tuple[int, int], int] = {}
        if plan.base is not None:
            keyframe = reader.keyframe(plan.base)
            for disk, region in keyframe.homes:
                table = reader.region(keyframe, disk, region)
                if table is not None:
                    for place in np.flatnonzero(table).tolist():
                        locs[disk, (region << 18) + place] = int(table[place])
        tables = [reader.rows(ref) for ref in plan.objects]
        for table in tables if plan.direction == "redo" else reversed(tables):
            rows = table if plan.direction == "redo" else table[::-1]
            for row in rows:
                redo = plan.direction == "redo" and row["time_ns"] <= plan.at_ns
                undo = plan.direction == "undo" and row["time_ns"] > plan.at_ns
                if redo or undo:
                    locs[int(row["disk"]), int(row["block"])] = int(row["loc"] if redo else row["previous"])
        return {place: self._block(reader, loc) for place, loc in locs.items() if loc}

    def _block(self, reader: JournalReader, loc: int) -> bytes:
        number, block = loc >> 32, loc & INDEX_MASK
        index = self._indexes.get(number)
        if index is None:
            index = self._indexes[number] = reader.index(number)
        group = group_of(index, block)
        data = self._groups.get((number, group))
        if data is None:
            data = self._groups[number, group] = reader.read_groups(number, index, group, 1)[0]
        at = (block - int(index.first_block[group])) * BLOCK_SIZE
        return data[at : at + BLOCK_SIZE]
