"""What the analyzer finds suspicious, and what not: streams of writes, and days of intervals."""

from __future__ import annotations

import gzip
import random

import numpy as np
import pytest
import zstandard
from analyzer_feed import BLOCK, START_NS, make_analyzer

from dr_cloud.model.units import SECOND_NS
from dr_cloud.vdsa.analysis.anomaly import Detector, Interval
from dr_cloud.vdsa.analysis.ground import Ground, sample

MIB = 1 << 20
GIB = 1 << 30
INTERVAL_NS = 5 * SECOND_NS
DAY_INTERVALS = 86_400 // 5
FILES_AT = GIB // BLOCK
DATABASE_AT = 3 * GIB // BLOCK
FILES = 800
FILE_BLOCKS = 64


def words(rng, size):
    """Text as people write it."""
    vocabulary = ["invoice", "order", "the", "of", "total", "customer", "2026", "amount", "and", "ship", "part", "unit"]
    return " ".join(rng.choices(vocabulary, k=size // 4)).encode().ljust(size, b".")[:size]


def page(rng):
    """A database's page: text, numbers, free space."""
    return words(rng, 2200) + rng.randbytes(400) + bytes(BLOCK - 2600)


class Server:
    """A file server with a database: its disk is synchronised, then it lives, five seconds at a time."""

    def __init__(self, seed=7):
        self.rng = random.Random(seed)
        self.now_ns = START_NS
        self.block_ns = 20_000
        self.analyzer = make_analyzer(8 * GIB, seed)
        self.pages = [page(self.rng) for _ in range(64)]
        self.text = words(self.rng, FILE_BLOCKS * BLOCK)
        for file in range(FILES):
            self.write(FILES_AT + file * FILE_BLOCKS, self.text)
        for block in range(0, 65536, 64):
            self.write(DATABASE_AT + block, b"".join(self.rng.choices(self.pages, k=64)))
        self.end(whole=False)

    def write(self, block, data):
        self.now_ns += len(data) // BLOCK * self.block_ns
        self.analyzer.observe(0, block, memoryview(data), self.now_ns)

    def transactions(self, count=400):
        """Random writes of the database's pages."""
        for _ in range(count):
            self.write(DATABASE_AT + self.rng.randrange(65536), self.rng.choice(self.pages))

    def end(self, whole=True):
        """Sleep until five seconds are over, and make a checkpoint. Returns its time."""
        self.now_ns = (self.now_ns // INTERVAL_NS + 1) * INTERVAL_NS
        self.analyzer.interval(self.now_ns, 100, 60, whole)
        return self.now_ns

    def rewrite_files(self, encode, files):
        """Put `encode(text)` in the place of files."""
        for file in files:
            data = encode(self.text)
            self.write(FILES_AT + file * FILE_BLOCKS, data[: len(data) // BLOCK * BLOCK])

    def strongest(self):
        return max((s.strength for s in self.analyzer.suspicions), default=0.0)


@pytest.fixture(scope="module")
def lived():
    """What a server looks like after its synchronisation and a minute of life; a function makes it again."""

    def make():
        server = Server()
        for _ in range(12):
            server.transactions()
            server.end()
        return server

    return make


@pytest.mark.parametrize("whole", [True, False])
def test_files_encrypted_in_place_are_flagged_within_two_intervals(lived, whole):
    """R2: a file tree is rewritten with random bytes, in a stream of ordinary writes of a database."""
    server = lived()
    assert server.analyzer.suspicions == []
    clean_ns = server.now_ns
    flagged_at = None
    for number in range(4):
        server.transactions()
        server.rewrite_files(lambda text: server.rng.randbytes(len(text)), range(number * 40, number * 40 + 40))
        server.end(whole)
        if flagged_at is None and server.strongest() >= 0.5:
            flagged_at = number
    assert flagged_at is not None
    assert flagged_at <= 1
    (found,) = server.analyzer.suspicions
    assert (found.reason, found.ended) == ("encrypted in place", False)
    assert (found.since_ns, found.until_ns) == (clean_ns, server.now_ns)
    for _ in range(8):
        server.transactions()
        server.end()
    (after,) = server.analyzer.suspicions
    assert (after.ended, after.until_ns) == (True, found.until_ns)


def test_slow_encryption_is_flagged_too(lived):
    """R2: one file of 256 KiB a second, 12 % of a server's writes, within a minute."""
    server = lived()
    server.block_ns = 1_500_000
    for number in range(12):
        for second in range(5):
            server.transactions(500)
            server.rewrite_files(lambda text: server.rng.randbytes(len(text)), [number * 5 + second])
        server.end()
    assert server.strongest() >= 0.5


@pytest.mark.parametrize("compress", [lambda t: gzip.compress(t, 6), lambda t: zstandard.compress(t, 3)])
def test_files_compressed_in_place_are_no_attack(lived, compress):
    """R2: gzip and zstd leave bytes less even than a cipher does."""
    server = lived()
    source = words(server.rng, 8 * MIB) + server.rng.randbytes(MIB // 2)
    packed = compress(source)
    for number in range(4):
        server.transactions()
        server.rewrite_files(lambda _: packed[: FILE_BLOCKS * BLOCK], range(number * 40, number * 40 + 40))
        server.end()
    assert 0 < server.strongest() < 0.5


def test_random_data_on_its_own_ground_is_ordinary(lived):
    """R2: an encrypted file that is written again and again, and new random data on free space."""
    server = lived()
    free = 6 * GIB // BLOCK
    for number in range(10):
        server.transactions()
        for file in range(20):
            server.write(free + file * 64, server.rng.randbytes(64 * BLOCK))
            server.write(free + 65536 + (number * 20 + file) * 64, server.rng.randbytes(64 * BLOCK))
        server.end()
    assert server.analyzer.suspicions == []


def life(rng, number, day, backup_hour):
    """The figures of one interval of an ordinary server: day and night, bursts, a compressed backup every night."""
    since = START_NS // (86_400 * SECOND_NS) * 86_400 * SECOND_NS + (day * DAY_INTERVALS + number) * INTERVAL_NS
    hour = number / 720
    busy = 1.0 if 8 <= hour < 18 else 0.15
    raw = int(5 * 600_000 * busy * rng.lognormvariate(0, 0.7))
    if rng.random() < 0.002:
        raw *= 10
    random_share = rng.betavariate(2, 40)
    start = backup_hour + rng.uniform(-0.1, 0.1)
    if start <= hour < start + 0.5:
        raw += 5 * 40 * MIB
        random_share = 0.9
    samples = min(raw // (16 * BLOCK), 1280)
    interval = Interval(since, since + INTERVAL_NS, raw // 8192, raw, samples)
    interval.random = int(samples * random_share)
    interval.known = samples
    # Ground as ground is: random data mostly where it was before, but not only there.
    interval.variance = samples * 0.03
    interval.excess = rng.gauss(0, interval.variance**0.5)
    interval.evenness = interval.random * 285.0
    return interval


def test_ten_days_of_ordinary_life_are_quiet():
    """R2: no strong mark at all; weak ones for a new job's first two nights, and hardly any else."""
    rng = random.Random(1)
    detector = Detector()
    for day in range(10):
        for number in range(0, DAY_INTERVALS):
            detector.interval(life(rng, number, day, 1.5))
    marks = detector.suspicions
    assert [mark for mark in marks if mark.strength >= 0.5] == []
    days = [(mark.since_ns - START_NS) / (86_400 * SECOND_NS) for mark in marks]
    nightly = [mark for mark in marks if mark.since_ns // (3600 * SECOND_NS) % 24 in (1, 2)]
    assert len(nightly) == 4, days
    assert all((mark.since_ns // (86_400 * SECOND_NS)) - START_NS // (86_400 * SECOND_NS) <= 1 for mark in nightly)
    assert len(marks) - len(nightly) <= 2


def test_an_attack_in_ordinary_life_is_found_on_any_day():
    """R2: what was learnt in nine days does not hide it, not even in the hour of the backup."""
    rng = random.Random(5)
    detector = Detector()
    for day in range(3):
        for number in range(DAY_INTERVALS):
            detector.interval(life(rng, number, day, 1.5))
    assert all(mark.strength < 0.5 for mark in detector.suspicions)
    for number in range(1100, 1102):
        interval = life(rng, number, 3, 1.5)
        interval.known += 200
        interval.samples += 200
        interval.random += 190
        interval.excess += 190
        interval.evenness = interval.random * 256.0
        detector.interval(interval)
    (found,) = [mark for mark in detector.suspicions if mark.strength >= 0.5]
    assert found.reason == "encrypted in place"


def steady(number, rate, since=START_NS):
    return Interval(since + number * INTERVAL_NS, since + (number + 1) * INTERVAL_NS, 100, rate * 5)


def test_a_rate_far_above_the_usual_is_marked_once_and_without_flapping():
    """R2: change rate; hysteresis."""
    rng = random.Random(1)
    detector = Detector()
    for number in range(2000):
        detector.interval(steady(number, int(5 * MIB * rng.lognormvariate(0, 0.3))))
    assert detector.suspicions == []
    for number in range(2000, 2040):
        # On and off, every other interval pair: one mark.
        detector.interval(steady(number, 200 * MIB if number % 4 < 2 else 5 * MIB))
    (mark,) = detector.suspicions
    assert mark.reason == "change rate"
    assert mark.since_ns == START_NS + 2000 * INTERVAL_NS
    assert 0 < mark.strength < 0.5


def test_one_odd_interval_and_the_first_hour_mark_nothing():
    """R2: rates are judged by two intervals, and after an hour of learning."""
    detector = Detector()
    for number in range(600):
        detector.interval(steady(number, 200 * MIB if number > 300 else MIB))
    assert detector.suspicions == []
    for number in range(600, 3000):
        detector.interval(steady(number, MIB))
    detector.interval(steady(3000, 900 * MIB))
    detector.interval(steady(3001, MIB))
    assert detector.suspicions == []


def test_what_was_learnt_outlives_a_restart():
    """R2: state, over JSON."""
    rng = random.Random(2)
    detector = Detector()
    for day in range(3):
        for number in range(0, DAY_INTERVALS, 5):
            detector.interval(life(rng, number, day, 1.5))
    again = Detector()
    again.restore(detector.state())
    assert [m.since_ns for m in again.suspicions] == [m.since_ns for m in detector.suspicions]
    quiet = len(again.suspicions)
    for number in range(0, DAY_INTERVALS, 5):
        again.interval(life(rng, number, 3, 1.5))
    assert len(again.suspicions) <= quiet + 1
    with pytest.raises(ValueError, match="shape"):
        Detector().restore(detector.state() | {"peaks": [[0.0]]})


def test_samples_tell_random_compressed_and_plain_blocks():
    """R2: entropy against the definition; evenness against what random bytes give."""
    rng = np.random.default_rng(3)
    block = bytes(rng.integers(0, 200, BLOCK, np.uint8))
    shares = np.bincount(np.frombuffer(block, np.uint8), minlength=256) / BLOCK
    expected = -sum(p * np.log2(p) for p in shares if p)
    assert sample(block).entropy_bits == pytest.approx(expected)
    assert not sample(block).random
    assert sample(bytes(BLOCK)) == (0.0, False, 400.0, True)
    figures = [sample(rng.bytes(BLOCK)) for _ in range(200)]
    assert all(figure.random for figure in figures)
    assert np.mean([figure.evenness for figure in figures]) == pytest.approx(255, abs=8)


def test_ground_is_what_was_there_before_the_interval():
    """R2: an interval is never its own ground; trimmed parts are unknown again."""
    ground = Ground(1 << 20)
    assert ground.shift == 10
    assert [ground.expect(5, False) for _ in range(50)] == [None] * 50
    ground.end_interval()
    assert [ground.expect(7, True) for _ in range(50)] == [0.0] * 50
    ground.end_interval()
    share = ground.expect(9, True)
    assert share == pytest.approx(1 - (31 / 32) ** 50, abs=0.01)
    ground.emptied(1, 1200)
    assert ground.expect(9, True) is not None
    ground.emptied(0, 1024)
    assert ground.expect(9, True) is None
    assert Ground(1 << 38).shift == 22
