"""Whatever a guest writes, the analyzer neither raises nor keeps more than it may, and its report can be shown."""

from __future__ import annotations

import json
import struct
from zlib import crc32

from analyzer_feed import BLOCK, make_analyzer
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_cloud.model.analysis import ServerAnalysis
from dr_cloud.vdsa.analysis import linux, windows
from dr_cloud.vdsa.analysis.kept import BLOCKS_MAX, Kept
from dr_cloud.vdsa.analysis.layout import read_layout

DISK_BLOCKS = 2048
MARKS = [
    (510, b"\x55\xaa"),
    (450, b"\xee"),
    (450, b"\x05"),
    (512, b"EFI PART" + struct.pack("<IIII", 65536, 92, 0, 0)),
    (1080, b"\x53\xef"),
    (0, b"XFSB\0\0\x10\0"),
    (64, b"_BHRfS_M"),
    (4086, b"SWAPSPACE2"),
    (512, b"LABELONE" + struct.pack("<QII8s", 1, 0, 32, b"LVM2 001")),
    (0, b"LUKS\xba\xbe\0\x02"),
    (3, b"NTFS    \0\x02\x08"),
    (3, b"EXFAT   "),
    (3, b"-FVE-FS-"),
    (0, b"\xeb\x3c\x90mkfs.fat\0\x02\x04\x01\0\x02\0\x02\0\x10\xf8\x04\0"),
    (0, b"FILE"),
    (0, b"regf"),
    (0, b"hbin"),
    (0, b'NAME="\xff\x1b[2J"\nID=\x00'),
    (0, b"MZ"),
    (0x202, b"HdrS"),
    (900, b'PRETTY_NAME="\x1b[31m"\nID=x\n'),
    (2000, b"Linux version 6.1.0 ("),
]
marks = st.lists(st.tuples(st.sampled_from(MARKS), st.integers(-1, 3)), max_size=6)
noise = st.lists(st.tuples(st.integers(0, BLOCK - 8), st.binary(min_size=1, max_size=8)), max_size=8)


@st.composite
def blocks(draw):
    """A block that is nearly one of those that parsers look for."""
    fill = draw(st.sampled_from([b"\0", b"\xff", b"\x01", b"A"]))
    data = bytearray(fill * BLOCK)
    for (at, mark), shift in draw(marks):
        at = max(0, at + (shift if shift > 1 else 0))
        data[at : at + len(mark)] = mark
    for at, raw in draw(noise):
        data[at : at + len(raw)] = raw
    return bytes(data[:BLOCK])


positions = st.one_of(st.integers(0, 40), st.integers(0, DISK_BLOCKS - 1), st.just(DISK_BLOCKS - 1))
writes = st.lists(st.tuples(positions, st.lists(blocks(), min_size=1, max_size=3), st.integers(0, 40)), max_size=12)


@settings(max_examples=150)
@given(writes, st.booleans())
def test_no_write_of_a_guest_breaks_the_analyzer(written, restart):
    """R2: a bug here must not be a guest's to call."""
    analyzer = make_analyzer(DISK_BLOCKS * BLOCK - 512)
    now_ns = 10**18
    for block, parts, repeat in written:
        data = b"".join(parts) * (1 + repeat)
        block = min(block, DISK_BLOCKS - 1)
        data = data[: (DISK_BLOCKS - block) * BLOCK]
        now_ns += 10**8
        analyzer.observe(0, block, memoryview(data), now_ns)
    analyzer.observe(9, 0, memoryview(bytes(BLOCK)), now_ns)
    analyzer.interval(now_ns + 5 * 10**9)
    if restart:
        again = make_analyzer(DISK_BLOCKS * BLOCK - 512)
        again.restore(json.loads(json.dumps(analyzer.state())))
        analyzer = again
    report = analyzer.report()
    text = report.model_dump_json()
    assert "\\u001b" not in text and "\x1b" not in text
    assert ServerAnalysis.model_validate_json(text) == report
    kept = analyzer.state()["disks"][0][1]["kept"]
    assert len(kept) <= BLOCKS_MAX


@settings(max_examples=300)
@given(st.binary(max_size=700), st.integers(0, 1 << 64), st.sampled_from(range(9)), st.sampled_from(MARKS))
def test_no_parser_raises(raw, size, number, mark):
    """R2: every parser on bytes that are anything, with its own mark in place."""
    probes = (linux.ext, linux.xfs, linux.btrfs, linux.swap, linux.lvm, linux.luks, windows.fat, windows.exfat)
    probe = (*probes, windows.ntfs)[number]
    at, sign = mark

    def read(offset, length):
        if length > 1 << 20 or offset > size:
            return None
        data = bytearray((raw or b"\0") * (length // max(len(raw), 1) + 1))[:length]
        if at < offset + length and at >= offset:
            data[at - offset : at - offset + len(sign)] = sign
        return bytes(data[:length].ljust(length, b"\0"))

    found = probe(read)
    assert found is None or found.type


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 1 << 64), st.integers(0, 1 << 64)), max_size=128), st.integers(92, 512))
def test_a_gpt_with_right_checksums_and_any_numbers_is_read(entries, header_bytes):
    """R2: entries that lie outside of the disk are left out."""
    kind = bytes(range(1, 17))
    clipped = [(first & (1 << 64) - 1, last & (1 << 64) - 1) for first, last in entries]
    table = b"".join((kind + kind + struct.pack("<QQ", *ends)).ljust(128, b"\xff") for ends in clipped)
    table = table.ljust(128 * 128, b"\0")
    header = bytearray(512)
    struct.pack_into("<8sIII", header, 0, b"EFI PART", 65536, header_bytes, 0)
    struct.pack_into("<QIII", header, 72, 2, 128, 128, crc32(table))
    struct.pack_into("<I", header, 16, crc32(header[:header_bytes]))
    mbr = bytearray(512)
    mbr[450], mbr[510:512] = 0xEE, b"\x55\xaa"
    data = bytes(mbr + header) + table
    analyzer = make_analyzer(DISK_BLOCKS * BLOCK)
    analyzer.observe(0, 0, memoryview(data.ljust(5 * BLOCK, b"\0")), 1)
    disk = analyzer.report().disks[0]
    assert disk.table == "gpt"
    sectors = DISK_BLOCKS * 8
    assert len(disk.partitions) == sum(1 for first, last in clipped if first <= last < sectors)


def test_a_chain_of_logical_partitions_that_bites_its_tail_ends():
    """R2: a loop of extended boot records."""
    sector = bytearray(512)
    sector[450], sector[510:512] = 0x05, b"\x55\xaa"
    struct.pack_into("<II", sector, 454, 8, 1000)
    chained = bytearray(512)
    chained[510:512] = b"\x55\xaa"
    struct.pack_into("<BBBBBBBBII", chained, 446, 0, 0, 0, 0, 0x83, 0, 0, 0, 1, 5)
    struct.pack_into("<BBBBBBBBII", chained, 462, 0, 0, 0, 0, 0x05, 0, 0, 0, 0, 5)
    analyzer = make_analyzer(DISK_BLOCKS * BLOCK)
    data = bytes(sector).ljust(BLOCK, b"\0") + bytes(chained).ljust(BLOCK, b"\0")
    analyzer.observe(0, 0, memoryview(data), 1)
    assert [partition.number for partition in analyzer.report().disks[0].partitions] == [1, 5]
    assert read_layout(make_analyzer(BLOCK)._disks[0].kept).table.kind == ""


def test_a_label_cannot_write_to_a_terminal():
    """R2: control characters of a guest's label."""
    block = bytearray(BLOCK)
    struct.pack_into("<II", block, 1024, 16, 100)
    block[1024 + 24] = 2
    struct.pack_into("<I", block, 1024 + 32, 8192)
    block[1024 + 56 : 1024 + 58] = b"\x53\xef"
    block[1024 + 120 : 1024 + 136] = b"\x1b[2J\xc2\x9b\xff\nevil\0xxx"
    analyzer = make_analyzer(DISK_BLOCKS * BLOCK)
    analyzer.observe(0, 0, memoryview(bytes(block)), 1)
    assert analyzer.report().disks[0].file_system.label == "\ufffd[2J\ufffd\ufffd\ufffdevil"


def test_reading_ends_at_the_disk_and_at_the_bound():
    """R2: what a superblock points to may lie anywhere."""
    kept = Kept(10 * BLOCK - 512)
    kept.begin()
    for block in range(10):
        kept.read(block * BLOCK, 512)
    kept.end()
    kept.put(9, b"x" * BLOCK)
    kept.begin()
    assert kept.read(9 * BLOCK, 512) == b"x" * 512
    assert kept.read(10 * BLOCK - 512, 1) is None
    assert kept.read(10 * BLOCK - 513, 2) is None
    assert kept.read(-1, 1) is None
    large = Kept(1 << 40)
    large.begin()
    for block in range(1000):
        large.read(block * BLOCK, 1)
    large.end()
    assert len(large.wanted(0, 1 << 28)) < BLOCKS_MAX
