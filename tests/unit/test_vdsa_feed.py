from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.journal.frame import open_frame, open_group
from dr_cloud.link.messages import decode_data
from dr_cloud.model.blocks import BLOCK_SIZE, LOCAL_BIT
from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.tap import wire
from dr_cloud.vdsa.batch import BATCH_BLOCKS_MAX, Batch, prepare, seal
from dr_cloud.vdsa.feed import FeedParser, Record

KEYS = VpgKeys(bytes(32), Scope("acme", "shop", "dc1"))
DISK = Disk(index=3, name="d", size_bytes=1 << 30)


def head(kind: int, disk: int = 3, count: int = 0, sequence: int = 1, time_ns: int = 1, block: int = 0) -> bytes:
    return wire.HEAD.pack(kind, 0, disk, count, sequence, time_ns, block, 0)


def hello(version: int = wire.FEED_VERSION) -> bytes:
    body = wire.Hello(version=version, tap="ab" * 16, server="db", sequence=0, disks=[DISK]).model_dump_json().encode()
    return head(wire.HELLO, 0, len(body)) + body


def feed(parser: FeedParser, data: bytes, cuts: list[int]) -> list[Record]:
    """Parse `data` as it comes in pieces; the tap is attached as soon as it has said HELLO, its disk 3 as disk 7."""
    records: list[Record] = []
    attached = parser.hello is not None
    position = 0
    for cut in [*sorted(cuts), len(data)]:
        while position < cut:
            room = parser.buffer()
            count = min(len(room), cut - position)
            room[:count] = data[position : position + count]
            position += count
            records += parser.advance(count)
            if parser.hello is not None and not attached:
                assert not records, "nothing comes out before it is attached"
                attached = True
                parser.attach({3: 7})
                records += parser.advance(0)
    return records


@given(st.lists(st.integers(1, wire.WRITE_BLOCKS_MAX), max_size=12), st.lists(st.integers(0, 4 << 20), max_size=8))
def test_records_come_out_whole_however_the_bytes_come_in(sizes: list[int], cuts: list[int]) -> None:
    parts = [hello()]
    for number, size in enumerate(sizes, 1):
        body = bytes([number]) * (size * BLOCK_SIZE)
        parts.append(head(wire.WRITE, count=size, sequence=number, time_ns=number, block=number) + body)
        parts.append(head(wire.ZERO, count=size, sequence=number, time_ns=number))
    data = b"".join(parts)
    records = feed(FeedParser(), data, [min(cut, len(data)) for cut in cuts])
    assert [record.type for record in records] == [wire.WRITE, wire.ZERO] * len(sizes)
    assert {record.disk for record in records} <= {7}
    for number, (size, record) in enumerate(zip(sizes, records[::2], strict=True), 1):
        assert (record.sequence, record.blocks, record.block) == (number, size, number)
        assert record.body == bytes([number]) * (size * BLOCK_SIZE)


BLOCK = bytes(BLOCK_SIZE)


@pytest.mark.parametrize(
    "data",
    [
        head(99),
        head(wire.DURABLE),
        head(wire.WRITE, count=1) + BLOCK,
        head(wire.MARKED),
        hello(version=1),
        head(wire.HELLO, count=1 << 30),
        head(wire.HELLO, count=2) + b"{}",
        hello() + hello(),
        hello() + head(wire.WRITE, count=257),
        hello() + head(wire.WRITE, count=0),
        hello() + head(wire.WRITE, disk=4, count=1) + BLOCK,
        hello() + head(wire.WRITE, count=2, block=(1 << 18) - 1) + BLOCK * 2,
        hello() + head(wire.ZERO, count=1, block=(1 << 64) - 1),
        hello() + head(wire.ZERO, count=1, sequence=2) + head(wire.ZERO, count=1),
        hello() + head(wire.ZERO, count=1, time_ns=2) + head(wire.ZERO, count=1),
        hello() + head(wire.ZERO, count=1, time_ns=1 << 63),
        hello() + head(wire.SYNC_BEGIN, count=1),
    ],
    ids=range(17),
)
def test_what_no_tap_sends_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(FeedParser(), data, [])


def test_disks_that_are_not_protected_are_left_out() -> None:
    """R8: a VPG gets the disks that it names; the others of the server pass by, checked all the same."""
    parser = FeedParser()
    other = DISK.model_copy(update={"index": 4, "name": "e"})
    body = wire.Hello(tap="ab" * 16, server="db", sequence=0, disks=[DISK, other]).model_dump_json().encode()
    data = head(wire.HELLO, 0, len(body)) + body + head(wire.WRITE, 4, 1) + BLOCK + head(wire.ZERO, 3, 1, 2, 2)
    records = feed(parser, data, [])
    assert [(record.type, record.disk, record.sequence) for record in records] == [(wire.ZERO, 7, 2)]
    with pytest.raises(ProtocolError):
        feed(parser, head(wire.ZERO, 4, 1, 1, 1), [])


def test_buffers_are_small_until_much_comes_at_once() -> None:
    parser = FeedParser()
    feed(parser, hello() + head(wire.ZERO, count=1), [])
    for number in range(2, 5000):
        assert len(parser.buffer()) <= 64 << 10
        feed(parser, head(wire.ZERO, count=1, sequence=number), [])
    while len(parser.buffer()) <= 64 << 10:
        feed(parser, (head(wire.WRITE, count=200, sequence=5000) + BLOCK * 200) * 4, [])


@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_a_protocol_error(data: bytes) -> None:
    try:
        feed(FeedParser(), hello() + data, [])
    except ProtocolError:
        return


def write(sequence: int, first: int, *blocks: bytes) -> Record:
    return Record(wire.WRITE, 3, len(blocks), sequence, sequence + 100, first, 0, memoryview(b"".join(blocks)))


def test_a_batch_becomes_a_frame_with_every_block_once() -> None:
    """R2: zero blocks are holes, equal blocks are one, known ones are named, the rest is sealed."""
    one, two, three = (bytes([value]) * BLOCK_SIZE for value in (1, 2, 3))
    batch = Batch()
    batch.add(0, write(1, 10, one, BLOCK, two))
    batch.add(1, Record(wire.ZERO, 3, 500, 2, 102, 40, 0, memoryview(b"")))
    batch.add(0, write(3, 20, one, three))
    prepared = prepare(KEYS, batch)
    assert prepared.digests == b"".join(KEYS.digest(block) for block in (one, two, three))
    message = seal(KEYS, b"s" * 16, 7, prepared, np.array([0, 77 << 32 | 5, 0], np.uint64))
    frame = open_frame(KEYS, decode_data(b"".join(message)).body)
    columns = frame.columns
    assert columns["block"].tolist() == [10, 11, 12, 40, 20, 21]
    assert columns["count"].tolist() == [1, 1, 1, 500, 1, 1]
    assert columns["tap"].tolist() == [0, 0, 0, 1, 0, 0]
    assert columns["time_ns"].tolist() == [101, 101, 101, 102, 103, 103]
    assert columns["ref"].tolist() == [LOCAL_BIT, 0, 77 << 32 | 5, 0, LOCAL_BIT, LOCAL_BIT | 1]
    group = open_group(KEYS, b"s" * 16, 7, 0, 2, frame.data[frame.groups_offset :])
    assert group == one + three
    assert frame.digests == KEYS.digest(one) + KEYS.digest(three)


def test_a_batch_holds_no_more_than_a_frame_should() -> None:
    batch = Batch()
    batch.add(0, write(1, 0, *[BLOCK] * BATCH_BLOCKS_MAX))
    assert not batch.fits(write(2, 0, BLOCK))
    assert batch.fits(Record(wire.ZERO, 3, 1 << 20, 2, 2, 0, 0, memoryview(b"")))
