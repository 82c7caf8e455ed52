"""What a stack reads of the journal: object indexes, groups, rows, keyframe regions. No LIST, no writer needed.

Every byte is checked (lengths, CRC-32C of heads, authentication tags of everything else); `DamagedError` names the
object. Nothing is cached but the directories of keyframes: the stack's object cache does that. Safe from many threads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from dr_cloud.journal.envelope import Opened
from dr_cloud.journal.keyframe import Keyframe, open_keyframe, read_keyframe, read_region
from dr_cloud.journal.objects import ObjectIndex, Rows, read_groups, read_index, read_rows
from dr_cloud.journal.replica import Locs
from dr_cloud.model.errors import DamagedError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import KeyframeRef, ObjectRef
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.store import Store


class JournalReader:
    """Reads one scope's journal."""

    def __init__(self, store: Store, keys: VpgKeys, scope: Scope, generations: Sequence[tuple[int, int]]) -> None:
        """Read with the plan's `generations`: (first object number, generation), ascending."""
        self.scope = scope
        self._store = store
        self._keys = keys
        self._generations = sorted(generations)
        self._first_numbers = [first for first, _ in self._generations]
        self.keyframe = lru_cache(maxsize=8)(self._read_keyframe)
        self._home = lru_cache(maxsize=256)(self._open_home)

    def object_key(self, number: int) -> str:
        """Return the key in the store of journal object `number`."""
        place = bisect_right(self._first_numbers, number)
        if not place:
            raise DamagedError(f"no writer of {self.scope.prefix} made a journal object {number}")
        return layout.journal_key(self.scope, self._generations[place - 1][1], number)

    def index(self, number: int) -> ObjectIndex:
        """Fetch the index of object `number`."""
        return read_index(self._store, self._keys, self.object_key(number))

    def read_groups(self, number: int, index: ObjectIndex, first_group: int, group_count: int) -> list[bytes]:
        """Fetch consecutive groups with one request; one entry per group, its blocks joined."""
        return read_groups(self._store, self._keys, self.object_key(number), index, first_group, group_count)

    def rows(self, ref: ObjectRef) -> Rows:
        """Fetch the change rows of an object, ascending (time, sequence)."""
        key = layout.journal_key(self.scope, ref.generation, ref.number)
        rows = read_rows(self._store, self._keys, key)
        if len(rows) != ref.rows:
            raise DamagedError(f"object {key} is damaged: it has {len(rows)} rows, its checkpoint says {ref.rows}")
        return rows

    def _read_keyframe(self, ref: KeyframeRef) -> Keyframe:
        return read_keyframe(self._store, self._keys, ref.number, ref.generation, page=False)

    def region(self, keyframe: Keyframe, disk: int, region: int) -> Locs | None:
        """Fetch one region of a keyframe's map: 262,144 loc, or None where every block is a hole."""
        home = keyframe.homes.get((disk, region))
        return read_region(self._home(home.number, home.generation), (disk, region), home) if home else None

    def _open_home(self, number: int, generation: int) -> Opened:
        return open_keyframe(self._store, self._keys, number, generation)
