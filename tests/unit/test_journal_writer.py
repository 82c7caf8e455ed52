"""The journal's writer: fencing, order of durability, damage, dedup, keyframes."""

from __future__ import annotations

import secrets
from pathlib import Path

import lmdb
import numpy as np
import pytest

from dr_cloud.journal import writer as writer_module
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.frame import COLUMN_DTYPE, open_frame, seal_frame
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.verify import verify_object
from dr_cloud.journal.writer import JournalWriter
from dr_cloud.journal.writes import list_writes
from dr_cloud.model.blocks import BLOCK_SIZE, LOCAL_BIT, REGION_BLOCKS
from dr_cloud.model.errors import DamagedError, FencedError, TimeOutOfRangeError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.errors import StoreUnavailableError
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Data, Store

SCOPE = Scope("acme", "shop", "dc1")
KEYS = VpgKeys(bytes(range(32)), SCOPE)
DISK = Disk(index=0, name="root", size_bytes=1 << 30)
TAP = "a" * 32


class Feeder:
    """Makes frames of one stream."""

    def __init__(self, keys: VpgKeys = KEYS) -> None:
        self.keys, self.stream, self.number, self.time_ns = keys, secrets.token_bytes(16), 0, 100

    def frame(self, blocks: dict[int, bytes], **changes: int) -> bytes:
        columns = np.zeros(len(blocks), COLUMN_DTYPE)
        for i, block in enumerate(blocks):
            self.time_ns += 10
            columns[i] = (self.time_ns, self.time_ns, block, LOCAL_BIT | i, 1, 0, 0)
        for name, value in changes.items():
            columns[name] = value
        self.number += 1
        digests = b"".join(self.keys.digest(content) for content in blocks.values())
        return b"".join(seal_frame(self.keys, self.stream, self.number, columns, list(blocks.values()), digests))


def open_writer(store: Store, work_dir: Path | None = None) -> JournalWriter:
    writer = JournalWriter.open(store, KEYS, SCOPE, clock_ns=lambda: 5, work_dir=work_dir)
    writer.set_disks([DISK])
    return writer


def content(value: int) -> bytes:
    return bytes([value]) * BLOCK_SIZE


def test_an_older_writer_is_fenced_and_adopted() -> None:
    """Invariant 4: after a take-over the older writer's checkpoint fails; what it made durable before is kept."""
    store = open_store("memory:")
    old, feeder = open_writer(store), Feeder()
    old.append(feeder.frame({1: content(1)}), [TAP])
    old.commit(old.cut(feeder.time_ns, "auto", {TAP: 1}, exact=False))
    new = open_writer(store)
    assert new.generation == old.generation + 1
    assert new.cuts == {TAP: 1}
    old.append(feeder.frame({2: content(2)}), [TAP])
    with pytest.raises(FencedError, match="generation 2"):
        old.commit(old.cut(feeder.time_ns, "auto", {TAP: 2}, exact=True))
    other = Feeder()
    new.append(other.frame({2: content(3)}), [TAP])
    new.commit(new.cut(feeder.time_ns + 1, "auto", {TAP: 9}, exact=False))
    assert [c.generation for c in Catalogue.load(store, KEYS, SCOPE).checkpoints] == [1, 1, 2, 2]


class Until:
    """A store that fails for good after a number of puts: a crash point."""

    def __init__(self, inner: Store, puts: int) -> None:
        self._inner, self._puts = inner, puts

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def put_new(self, key: str, data: Data) -> None:
        if self._puts == 0:
            raise StoreUnavailableError("crash")
        self._puts -= 1
        self._inner.put_new(key, data)


@pytest.mark.parametrize("puts", range(6))
def test_every_crash_point_leaves_a_readable_journal(puts: int) -> None:
    """Invariant 3: whatever was stored when the writer died, the next one opens and every checkpoint can be read."""
    store = open_store("memory:")
    first, feeder = open_writer(store), Feeder()
    first.append(feeder.frame({1: content(1)}), [TAP])
    first.commit(first.cut(feeder.time_ns, "auto", {TAP: 1}, exact=False))
    durable = 1
    try:
        second = open_writer(Until(store, puts))  # type: ignore[arg-type]
        second.append(feeder.frame({1: content(2)}), [TAP])
        second.commit(second.cut(feeder.time_ns, "auto", {TAP: 2}, exact=False))
        durable = 2
    except StoreUnavailableError:
        pass
    third = open_writer(store)
    assert third.cuts == {TAP: durable}
    assert (durable == 2) == (puts >= 4), "claim, opening, object, checkpoint"
    for key, _ in store.list(SCOPE.prefix):
        verify_object(store, KEYS, key)


def test_commit_may_be_called_again() -> None:
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    for puts in (0, 1):
        writer._store = Until(store, puts)  # type: ignore[assignment]
        writer.append(feeder.frame({1: secrets.token_bytes(BLOCK_SIZE)}), [TAP])
        cut = writer.cut(feeder.time_ns, "auto", {}, exact=True)
        with pytest.raises(StoreUnavailableError):
            writer.commit(cut)
        writer._store = store
        assert writer.commit(cut) == cut.checkpoint
    assert Catalogue.load(store, KEYS, SCOPE).checkpoints == writer.catalogue.checkpoints


def test_every_flipped_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 3: a flipped bit at any byte of any kind of object is an error that names the object."""
    monkeypatch.setattr(writer_module, "KEYFRAME_ROWS", 20)
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    for step in range(3):
        blocks = {b: content(step * 16 + b + 1) for b in range(20)} | {30 + step: secrets.token_bytes(BLOCK_SIZE)}
        writer.append(feeder.frame(blocks), [TAP])
        writer.append(feeder.frame({50: content(77)}), [TAP])
        writer.commit(writer.cut(feeder.time_ns, "tag", {}, exact=True, tag="t", description="d"))
    writer.close()
    kinds = set()
    for key, size in store.list(SCOPE.prefix):
        kinds.add(key.split("/")[3])
        verify_object(store, KEYS, key)
        data = store.get(key)
        for place in range(0, size, max(1, size // 600)):
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 8
            other = open_store("memory:")
            other.put_new(key, damaged)
            with pytest.raises(DamagedError, match=key):
                verify_object(other, KEYS, key)
        for cut_short in (0, 10, size // 2, size - 1):
            other = open_store("memory:")
            other.put_new(key, data[:cut_short])
            with pytest.raises(DamagedError, match=key):
                verify_object(other, KEYS, key)
    assert kinds == {"writers", "journal", "replica", "checkpoints"}


def test_an_object_in_another_place_does_not_open() -> None:
    """Invariant 7: nothing can be spliced: an object under another's key, or a frame of another scope, is refused."""
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    for value in (1, 2):
        writer.append(feeder.frame({1: content(value)}), [TAP])
        writer.commit(writer.cut(feeder.time_ns, "auto", {}, exact=True))
    for kind in ("journal", "checkpoints"):
        (first, _), (second, _) = store.list(f"{SCOPE.prefix}/{kind}")[-2:]
        other = open_store("memory:")
        other.put_new(first, store.get(second))
        with pytest.raises(DamagedError, match=first):
            verify_object(other, KEYS, first)
    foreign = VpgKeys(bytes(range(32)), Scope("acme", "other", "dc1"))
    with pytest.raises(DamagedError, match="not of acme/other/dc1"):
        open_frame(foreign, feeder.frame({1: content(1)}))
    before = writer.pending_bytes
    with pytest.raises(DamagedError):
        writer.append(Feeder(foreign).frame({1: content(1)}), [TAP])
    assert writer.pending_bytes == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 1 << 18}, "outside disk"),
        ({"disk": 4}, "outside disk"),
        ({"tap": 1}, "a tap"),
        ({"ref": 99 << 32}, "not stored yet"),
        ({"count": 2}, "wrong count"),
        ({"count": 0}, "wrong count"),
        ({"ref": LOCAL_BIT | 7}, "do not fit"),
    ],
)
def test_a_frame_that_names_what_cannot_be_is_refused_whole(changes: dict[str, int], message: str) -> None:
    writer = open_writer(open_store("memory:"))
    with pytest.raises(DamagedError, match=message):
        writer.append(Feeder().frame({1: content(1)}, **changes), [TAP])
    assert not writer.pending_bytes


def test_dedup_knows_durable_blocks_only(tmp_path: Path) -> None:
    """R2: equal data is stored once, and "same as" never names what is not durable."""
    store = open_store("memory:")
    writer, feeder = open_writer(store, tmp_path), Feeder()
    digest = KEYS.digest(content(1))
    writer.append(feeder.frame({1: content(1), 2: content(2)}), [TAP])
    cut = writer.cut(feeder.time_ns, "auto", {}, exact=True)
    assert writer.known(digest).tolist() == [0]
    writer.commit(cut)
    assert writer.known(digest + KEYS.digest(content(2)) + bytes(16)).tolist() == [1 << 32, 1 << 32 | 1, 0]
    writer.close()
    again = open_writer(store, tmp_path)
    assert again.known(digest).tolist() == [1 << 32]
    again.close()
    other = open_store("memory:")
    first = JournalWriter.open(other, KEYS, SCOPE, clock_ns=lambda: 6)
    for _ in range(3):
        first.commit(first.cut(10, "auto", {}, exact=True))
    elsewhere = open_writer(other, tmp_path)
    assert elsewhere.known(digest).tolist() == [0], "an index of another journal is dropped"
    elsewhere.close()


def test_an_index_that_cannot_be_written_costs_space_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2: a full disk under the digest index stops no checkpoint."""
    store = open_store("memory:")
    writer, feeder = open_writer(store, tmp_path), Feeder()

    class Full:
        def begin(self, **_: object) -> None:
            raise lmdb.DiskError("full")

    assert writer._index is not None
    env = writer._index._env
    for value in (1, 2):
        monkeypatch.setattr(writer._index, "_env", Full() if value == 1 else env)
        writer.append(feeder.frame({value: content(value)}), [TAP])
        writer.commit(writer.cut(feeder.time_ns, "auto", {TAP: value}, exact=True))
    assert writer.cuts == {TAP: 2}
    assert writer.known(KEYS.digest(content(1)) + KEYS.digest(content(2))).tolist() == [0, 2 << 32]
    writer.close()


def test_a_late_entry_changes_no_image_that_could_be_seen() -> None:
    """R5: a tap whose clock is behind the last checkpoint is ordered after it."""
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    writer.append(feeder.frame({1: content(1)}), [TAP])
    writer.commit(writer.cut(1_000_000, "auto", {}, exact=False))
    writer.append(feeder.frame({1: content(2)}, time_ns=500), [TAP])
    checkpoint = writer.commit(writer.cut(2_000_000, "auto", {}, exact=True))
    assert writer.late_entries == 1
    assert checkpoint.rows == 1
    assert writer.catalogue.plan(1_000_000).objects == writer.catalogue.checkpoints[1].objects
    reader = JournalReader(store, KEYS, SCOPE, checkpoint.generations)
    assert reader.rows(checkpoint.objects[0])["time_ns"].tolist() == [1_000_001]


def test_writes_are_listed_from_any_time_on() -> None:
    """R14.2: every time at which something was written, once, and whether it has an image of its own."""
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    writer.commit(writer.cut(500, "auto", {}, exact=False))
    expected = []
    for interval in range(1, 5):
        for at_ns in (interval * 1_000 + 100, interval * 1_000 + 900):
            writer.append(feeder.frame({1: content(1), 2: content(2)}, time_ns=at_ns), [TAP])
            # The interval after a synchronisation is exact from its end on only.
            expected.append((at_ns, 2, interval in (1, 4)))
        kind = "sync" if interval == 2 else "auto"
        writer.commit(writer.cut((interval + 1) * 1_000, kind, {}, exact=interval != 2))
    reader = JournalReader(store, KEYS, SCOPE, writer.catalogue.checkpoints[-1].generations)

    def told(since_ns: int, until_ns: int, limit: int = 100) -> list[tuple[int, int, bool]]:
        found = list_writes(writer.catalogue, reader, since_ns, until_ns, limit)
        return [(write.time_ns, write.blocks, write.exact) for write in found]

    assert told(0, 1 << 62) == expected
    assert told(0, 1 << 62, limit=3) == expected[:3]
    assert told(1_101, 4_100) == expected[1:7]
    assert told(1_100, 1_100) == expected[:1]
    assert told(5_001, 1 << 62) == told(3, 2) == []
    for write in list_writes(writer.catalogue, reader, 0, 1 << 62, 100):
        assert (writer.catalogue.plan(write.time_ns).at_ns == write.time_ns) == write.exact


def test_times_that_cannot_be_had() -> None:
    """R14.1: a time outside the journal is an error that tells the range; one in a synchronisation is moved down."""
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    with pytest.raises(TimeOutOfRangeError, match="no checkpoint yet"):
        writer.catalogue.plan(1)
    writer.commit(writer.cut(1_000, "auto", {}, exact=False))
    writer.append(feeder.frame({1: content(2)}, time_ns=1_500), [TAP])
    writer.commit(writer.cut(2_000, "sync", {}, exact=False))
    writer.commit(writer.cut(3_000, "auto", {}, exact=True))
    writer.commit(writer.cut(4_000, "auto", {}, exact=True))
    for at_ns in (999, 4_001):
        with pytest.raises(TimeOutOfRangeError) as error:
            writer.catalogue.plan(at_ns)
        assert "1970-01-01T00:00:00.000001000Z to 1970-01-01T00:00:00.000004000Z" in error.value.remedy
    for at_ns, served in {1_000: 1_000, 1_700: 1_000, 2_000: 1_000, 2_500: 1_000, 3_000: 3_000, 3_500: 3_500}.items():
        plan = writer.catalogue.plan(at_ns)
        assert (plan.at_ns, plan.asked_ns, bool(plan.note)) == (served, at_ns, served != at_ns)


def test_a_keyframe_that_cannot_be_stored_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "KEYFRAME_ROWS", 3)
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    put_new = store.put_new

    def broken(key: str, data: Data) -> None:
        if "/replica/" in key:
            raise StoreUnavailableError("full")
        put_new(key, data)

    monkeypatch.setattr(store, "put_new", broken)
    for value in range(4):
        writer.append(feeder.frame({b: content(value + b + 1) for b in range(3)}), [TAP])
        writer.commit(writer.cut(feeder.time_ns, "auto", {}, exact=True))
        if writer._keyframe_job:
            writer._keyframe_job[0].exception()
    assert not store.list(f"{SCOPE.prefix}/replica")
    monkeypatch.setattr(store, "put_new", put_new)
    for _ in range(3):
        writer.commit(writer.cut(feeder.time_ns, "auto", {}, exact=True))
        if writer._keyframe_job:
            writer._keyframe_job[0].result()
    assert len(writer.catalogue.keyframes) == 1
    assert open_writer(store)._map.regions.keys() == writer._map.regions.keys()


def test_a_keyframe_keeps_the_regions_that_did_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 5: a region written before an earlier keyframe is in every later one, by its older home."""
    monkeypatch.setattr(writer_module, "KEYFRAME_ROWS", 1)
    store = open_store("memory:")
    writer, feeder = open_writer(store), Feeder()
    writer.set_disks([DISK.model_copy(update={"size_bytes": 4 << 30})])
    for block in (1, REGION_BLOCKS + 1, 2 * REGION_BLOCKS + 1):
        writer.append(feeder.frame({block: content(block % 7 + 1)}), [TAP])
        writer.commit(writer.cut(feeder.time_ns, "auto", {}, exact=True))
        if writer._keyframe_job:
            writer._keyframe_job[0].result()
    writer.commit(writer.cut(feeder.time_ns, "auto", {}, exact=True))
    newest = writer.catalogue.keyframes[-1]
    keyframe = JournalReader(store, KEYS, SCOPE, writer.newest.generations).keyframe(newest)
    assert set(keyframe.homes) == {(0, 0), (0, 1), (0, 2)}
    assert len({home.number for home in keyframe.homes.values()}) == 3
    again = open_writer(store)
    assert {key: int(locs[1]) for key, locs in again._map.regions.items()} == {
        key: int(locs[1]) for key, locs in writer._map.regions.items()
    }
