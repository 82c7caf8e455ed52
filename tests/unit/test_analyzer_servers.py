"""The analyzers of a site: fed with a tap's records, kept apart from replication, kept over a restart; activity."""

from __future__ import annotations

import random

import pytest
from analyzer_feed import BLOCK, START_NS, make_analyzer

from dr_cloud.model.journal import Disk
from dr_cloud.model.units import SECOND_NS
from dr_cloud.tap import wire
from dr_cloud.vdsa.analysis.analyzers import Analyzers
from dr_cloud.vdsa.analysis.server import ServerAnalyzer
from dr_cloud.vdsa.feed import Record

DISK = Disk(index=3, name="sda", size_bytes=1 << 30)
SWAP = bytearray(BLOCK)
SWAP[4086:] = b"SWAPSPACE2"
SWAP[1024:1032] = (1).to_bytes(4, "little") + (262143).to_bytes(4, "little")
SWAP[1052:1057] = b"pages"


def record(kind, block, body=b"", count=0, number=1):
    return Record(kind, 3, count or len(body) // BLOCK, number, START_NS + number, block, 0, memoryview(body))


def swap_records():
    return [record(wire.MARKED, 0), record(wire.WRITE, 0, bytes(SWAP)), record(wire.ZERO, 8, count=4, number=2)]


def test_the_records_of_a_tap_make_a_report():
    """R2: the analyzer beside the path of replication."""
    analyzers = Analyzers()
    assert analyzers.report("db") is None
    analyzers.take("db", swap_records())
    analyzers.announce("db", [DISK])
    analyzers.take("db", swap_records())
    analyzers.interval(["db", "other"], START_NS + 5 * SECOND_NS, 1000, 250, True)
    report = analyzers.report("db")
    disk = report.disks[0]
    assert (disk.index, disk.name, disk.file_system.type, disk.file_system.label) == (3, "sda", "swap", "pages")
    assert (report.since_ns, report.until_ns) == (START_NS + 1, START_NS + 2)
    (period,) = report.activity.periods
    assert (period.writes, period.bytes_raw, period.sealed_ratio) == (2, BLOCK, 0.25)
    assert analyzers.servers() == ["db"]
    assert analyzers.suspicions() == {}


def test_a_bug_ends_one_analyzer_and_nothing_else(monkeypatch):
    """R2, invariant 1: whatever happens in here, the caller goes on, and the report says so."""
    analyzers = Analyzers()
    analyzers.announce("bad", [DISK])
    analyzers.announce("good", [DISK])

    def take(self, records):
        if self.server == "bad":
            raise IndexError("secret bytes")
        return real(self, records)

    real = ServerAnalyzer.take
    monkeypatch.setattr(ServerAnalyzer, "take", take)
    for _ in range(2):
        analyzers.take("bad", swap_records())
        analyzers.take("good", swap_records())
        analyzers.interval(["bad", "good"], START_NS + 5 * SECOND_NS, 1, 1, True)
    assert analyzers.report("good").problem == ""
    problem = analyzers.report("bad").problem
    assert "IndexError" in problem
    assert "secret" not in problem
    monkeypatch.undo()
    analyzers.announce("bad", [DISK])
    assert analyzers.report("bad").problem == ""


def test_more_disks_than_the_bound_are_told_and_not_analysed():
    """R2: bounded memory."""
    analyzers = Analyzers(disks_max=2)
    for name in ("a", "b", "c"):
        analyzers.announce(name, [DISK])
        analyzers.take(name, swap_records())
    assert "2 disks" in analyzers.report("c").problem
    assert analyzers.report("a").problem == ""
    analyzers.forget("a")
    assert analyzers.report("a") is None
    analyzers.announce("c", [DISK])
    assert analyzers.report("c").problem == ""


def test_what_was_learnt_is_there_after_a_restart(tmp_path):
    """R2: a partition table passes by once; a restarted process still knows it."""
    analyzers = Analyzers(tmp_path / "analysis")
    analyzers.announce("db", [DISK])
    analyzers.take("db", swap_records())
    analyzers.interval(["db"], START_NS + 5 * SECOND_NS, 10, 5, True)
    analyzers.save()
    analyzers.save()
    (path,) = (tmp_path / "analysis").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    again = Analyzers(tmp_path / "analysis")
    again.announce("db", [DISK])
    assert again.report("db").disks == analyzers.report("db").disks

    other = Analyzers(tmp_path / "analysis")
    other.announce("db", [DISK.model_copy(update={"size_bytes": 2 << 30})])
    assert other.report("db").disks[0].file_system is None

    path.write_bytes(path.read_bytes()[:-20])
    damaged = Analyzers(tmp_path / "analysis")
    damaged.announce("db", [DISK])
    assert damaged.report("db").disks[0].file_system is None
    assert damaged.report("db").problem == ""
    damaged.forget("db")
    assert list((tmp_path / "analysis").iterdir()) == []


def test_a_disk_that_grew_is_looked_at_anew_and_the_others_stay():
    """R7: resize."""
    second = Disk(index=4, name="sdb", size_bytes=1 << 30)
    analyzers = Analyzers()
    analyzers.announce("db", [DISK, second])
    analyzers.take("db", [record(wire.WRITE, 0, bytes(SWAP)), record(wire.WRITE, 0, bytes(SWAP))._replace(disk=4)])
    analyzers.announce("db", [DISK, second.model_copy(update={"size_bytes": 2 << 30})])
    first, grown = analyzers.report("db").disks
    assert first.file_system.type == "swap"
    assert (grown.file_system, grown.size_bytes) == (None, 2 << 30)


@pytest.mark.parametrize("busy_hour", [3, 15])
def test_activity_tells_busy_hours_and_hot_ranges(busy_hour):
    """R2: activity."""
    rng = random.Random(1)
    analyzer = make_analyzer(64 << 30)
    day = START_NS // (86_400 * SECOND_NS) * 86_400 * SECOND_NS
    hot = (32 << 30) // BLOCK
    data = memoryview(rng.randbytes(16 * BLOCK))
    for minute in range(2 * 1440):
        now_ns = day + minute * 60 * SECOND_NS
        for _ in range(20 if minute // 60 % 24 == busy_hour else 1):
            block = hot + rng.randrange(4096) if rng.random() < 0.6 else rng.randrange(16 << 20 >> 4)
            analyzer.observe(0, block, data, now_ns)
        analyzer.interval(now_ns + 60 * SECOND_NS - 1, 16 * BLOCK, 16 * BLOCK)
    report = analyzer.report()
    assert report.activity.busy_hours == [busy_hour]
    hottest = report.disks[0].hot[0]
    assert hottest.start_bytes <= 32 << 30 < hottest.start_bytes + hottest.size_bytes
    assert 0.4 < hottest.share < 0.8
    assert 280 <= len(report.activity.periods) <= 288
    assert all(period.entropy_bits > 7.9 for period in report.activity.periods if period.entropy_bits)
    assert len(report.model_dump_json()) < 100_000
