"""The analyzer of one virtual server: what its writes tell, kept in little memory. No I/O, no clock but the writes'.

Purpose
    `observe` takes every write as it passes by, `interval` closes what lies between two checkpoints, `report` says what
    was inferred (`dr_cloud.model.analysis`), `suspicions` which checkpoints to look at.

What it sees
    Only what is written. The first synchronisation of a disk brings all of it by, so the layout is whole from then on;
    reads are never seen. An analyzer that begins later, with nothing kept, learns what is written again: superblocks
    within minutes, a partition table perhaps never. So its owner keeps `state` over a restart.

Cost
    One block in `STRIDE_BLOCKS` is sampled, and one in twice as many after every `SAMPLES_BEFORE_DOUBLING` of a second:
    some hundreds at any rate. Layouts are read at most `PARSES_PER_SECOND` times, and before a report. Beyond that a
    write costs a few look-ups.

Threads
    Any thread may call; a lock per server. Writes of one disk may come slightly out of order (batches of threads); the
    block that came last is then kept, and the next write of it puts that right.

Hostile guests
    All bytes are the guest's. Parsers bound what they read and believe nothing they cannot check; texts are made fit to
    be shown.
"""

from __future__ import annotations

import random
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from dr_cloud.model.analysis import Activity, Period, ServerAnalysis, Suspicion
from dr_cloud.model.blocks import BLOCK_SHIFT, BLOCK_SIZE
from dr_cloud.model.journal import Disk
from dr_cloud.model.units import SECOND_NS
from dr_cloud.tap import wire
from dr_cloud.vdsa.analysis.anomaly import Detector, Interval
from dr_cloud.vdsa.analysis.disk import FIRST_BYTES, SeenDisk
from dr_cloud.vdsa.analysis.ground import sample
from dr_cloud.vdsa.analysis.systems import SystemSeen
from dr_cloud.vdsa.feed import Record

STRIDE_BLOCKS: Final = 16
SAMPLES_BEFORE_DOUBLING: Final = 64
PARSES_PER_SECOND: Final = 16
_WRITES: Final = (wire.WRITE, wire.ZERO)
_INTERVAL_SECONDS_MIN: Final = 1.0
_PERIOD_SECONDS: Final = 300
_PERIODS_MAX: Final = 288
_HOUR_NS: Final = 3600 * SECOND_NS
_QUIET_BYTES_PER_SECOND: Final = 4096
_WINDOWS_TYPES: Final = ("Microsoft reserved", "Windows recovery", "Microsoft LDM metadata")


class ServerAnalyzer:
    """See the module's docstring."""

    def __init__(self, server: str, disks: Sequence[Disk], seed: int | None = None) -> None:
        """Begin with nothing known. `seed` makes the choice of samples repeatable."""
        self.server = server
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._system = SystemSeen()
        self._disks: dict[int, SeenDisk] = {}
        self._detector = Detector()
        self._since_ns: int | None = None
        self._until_ns: int | None = None
        self._interval: Interval | None = None
        self._skip = 0
        self._stride = STRIDE_BLOCKS
        self._second_end_ns = 0
        self._second_samples = 0
        self._second_parses = 0
        self._hour = 0
        self._hours = array("d", bytes(8 * 24))
        self._periods: deque[Period] = deque(maxlen=_PERIODS_MAX)
        self._period: list[float] = []
        self._period_ns = 0
        self.set_disks(disks)

    def set_disks(self, disks: Sequence[Disk]) -> None:
        """The server has these disks now. One of another size is looked at anew, as its layout may be another."""
        with self._lock:
            self._disks = {
                disk.index: known
                if (known := self._disks.get(disk.index)) is not None and known.disk == disk
                else SeenDisk(disk, self._system)
                for disk in disks
            }

    # What passes by.

    def observe(self, disk: int, first_block: int, data: memoryview, time_ns: int) -> None:
        """Blocks were written from `first_block` on. `data` is only read, and not kept."""
        self.take([Record(wire.WRITE, disk, len(data) >> BLOCK_SHIFT, 0, time_ns, first_block, 0, data)])

    def zeroed(self, disk: int, first_block: int, blocks: int, time_ns: int) -> None:
        """Blocks were zeroed or trimmed."""
        self.take([Record(wire.ZERO, disk, blocks, 0, time_ns, first_block, 0, memoryview(b""))])

    def take(self, records: Iterable[Record]) -> None:
        """Records of the server's tap pass by; those that are no writes are left alone."""
        with self._lock:
            for kind, index, count, _, time_ns, first, _, data, *_ in records:
                disk = self._disks.get(index)
                if disk is None or not count or kind not in _WRITES:
                    continue
                interval = self._interval
                if interval is None or time_ns >= self._second_end_ns:
                    interval = self._turn_to(time_ns)
                interval.writes += 1
                self._until_ns = disk.last_write_ns = time_ns
                if kind == wire.ZERO:
                    disk.zeroed(first, count, self._may_parse)
                    continue
                size = count << BLOCK_SHIFT
                interval.bytes_raw += size
                disk.bytes_written += size
                # The short way of most small writes: nothing is kept of them.
                if count > 1 or first in disk.kept.wanted_blocks or data[0] in FIRST_BYTES:
                    disk.wrote(first, count, data, self._may_parse)
                while self._skip < count:
                    at = self._skip << BLOCK_SHIFT
                    self._sample(interval, disk, first + self._skip, bytes(data[at : at + BLOCK_SIZE]))
                    # Uniform around the stride: no pattern of the guest's hides from it.
                    self._skip += self._random.randrange(1, 2 * self._stride)
                self._skip -= count

    def _may_parse(self) -> bool:
        """Whether a layout may be read now; if so it counts."""
        self._second_parses += 1
        return self._second_parses <= PARSES_PER_SECOND

    def _turn_to(self, time_ns: int) -> Interval:
        if time_ns >= self._second_end_ns:
            # Less than before at once, so that a steady load is sampled evenly.
            self._stride = max(STRIDE_BLOCKS, self._stride >> 2)
            self._second_end_ns = (time_ns // SECOND_NS + 1) * SECOND_NS
            self._second_samples = self._second_parses = 0
        if self._since_ns is None:
            self._since_ns = time_ns
        self._period_ns = self._period_ns or time_ns
        if self._interval is None:
            self._interval = Interval(time_ns)
        return self._interval

    def _sample(self, interval: Interval, disk: SeenDisk, block: int, data: bytes) -> None:
        self._second_samples += 1
        if self._second_samples % SAMPLES_BEFORE_DOUBLING == 0:
            self._stride *= 2
        figures = sample(data)
        if figures.empty:
            return
        interval.samples += 1
        interval.entropy_bits += figures.entropy_bits
        if figures.random:
            interval.random += 1
            interval.evenness += figures.evenness
        else:
            self._system.sample(data)
        disk.note(block, self._stride)
        expected = disk.ground.expect(block, figures.random)
        if expected is not None:
            interval.known += 1
            interval.excess += figures.random - expected
            interval.variance += expected * (1 - expected)

    # Checkpoints.

    def interval(self, checkpoint_ns: int, bytes_raw: int = 0, bytes_sealed: int = 0, whole: bool = True) -> None:
        """A checkpoint was made.

        Args:
            checkpoint_ns: Its time.
            bytes_raw: What was written in the whole VPG since the checkpoint before, in bytes.
            bytes_sealed: What that became when it was sealed.
            whole: False if a disk synchronised meanwhile.
        """
        with self._lock:
            seen = self._interval
            if seen is None:
                self._interval = Interval(checkpoint_ns)
                return
            seen.until_ns = checkpoint_ns
            if seen.seconds < _INTERVAL_SECONDS_MIN:
                return
            self._interval = Interval(checkpoint_ns)
            for disk in self._disks.values():
                disk.ground.end_interval()
            self._detector.interval(seen, whole)
            self._hours[checkpoint_ns // _HOUR_NS % 24] += seen.bytes_raw
            self._add_to_period(seen, bytes_raw, bytes_sealed)
            if checkpoint_ns // _HOUR_NS != self._hour:
                self._hour = checkpoint_ns // _HOUR_NS
                for disk in self._disks.values():
                    disk.cool()
                if self._hour % 24 == 0:
                    self._hours = array("d", [amount / 2 for amount in self._hours])

    def _add_to_period(self, seen: Interval, bytes_raw: int, bytes_sealed: int) -> None:
        figures = [
            seen.seconds,
            seen.writes,
            seen.bytes_raw,
            seen.samples,
            seen.entropy_bits,
            seen.random,
            bytes_raw,
            bytes_sealed,
        ]
        self._period = [a + b for a, b in zip(self._period, figures, strict=True)] if self._period else figures
        if (seen.until_ns - self._period_ns) >= _PERIOD_SECONDS * SECOND_NS:
            self._periods.append(self._close_period())
            self._period, self._period_ns = [], seen.until_ns

    def _close_period(self) -> Period:
        seconds, writes, raw, samples, entropy, random_count, vpg_raw, vpg_sealed = self._period
        return Period(
            since_ns=self._period_ns,
            seconds=round(seconds, 1),
            writes=int(writes),
            bytes_raw=int(raw),
            sealed_ratio=round(vpg_sealed / vpg_raw, 4) if vpg_raw else None,
            entropy_bits=round(entropy / samples, 3) if samples else None,
            random_share=round(random_count / samples, 4) if samples else None,
        )

    # What was inferred.

    @property
    def suspicions(self) -> list[Suspicion]:
        """Which checkpoints are suspicious, oldest first."""
        with self._lock:
            return self._detector.suspicions

    def report(self) -> ServerAnalysis:
        """Return everything that is known now."""
        with self._lock:
            return ServerAnalysis(
                server=self.server,
                since_ns=self._since_ns,
                until_ns=self._until_ns,
                disks=[self._disks[index].report() for index in sorted(self._disks)],
                system=self._system.report(self._boot_sectors()),
                activity=self._activity(),
                suspicions=self._detector.suspicions,
            )

    def _boot_sectors(self) -> list[str]:
        seen = []
        for disk in self._disks.values():
            if disk.layout.boot_loader:
                seen.append(f"boot loader {disk.layout.boot_loader}")
            for partition in disk.layout.table.partitions:
                if partition.type_name in _WINDOWS_TYPES:
                    seen.append(f"Windows partition: {partition.type_name}")
                if partition.file_system is not None and partition.file_system.type == "BitLocker":
                    seen.append("Windows volume: BitLocker")
        return list(dict.fromkeys(seen))

    def _activity(self) -> Activity:
        periods = list(self._periods)
        if self._period:
            periods.append(self._close_period())
        last = periods[-1] if periods else None
        seconds = sum(period.seconds for period in periods)
        written = sum(period.bytes_raw for period in periods)
        mean = sum(self._hours) / 24
        return Activity(
            writes_per_second=round(last.writes / last.seconds, 2) if last and last.seconds else 0.0,
            bytes_per_second=round(last.bytes_raw / last.seconds) if last and last.seconds else 0.0,
            busy_hours=[hour for hour, amount in enumerate(self._hours) if mean and amount >= 2 * mean],
            quiet=bool(seconds) and written / seconds < _QUIET_BYTES_PER_SECOND,
            periods=periods[-_PERIODS_MAX:],
        )

    # Over a restart.

    def state(self) -> dict[str, Any]:
        """Return what was learnt, fit for JSON."""
        with self._lock:
            return {
                "system": self._system.state(),
                "detector": self._detector.state(),
                "hours": list(self._hours),
                "periods": [period.model_dump() for period in self._periods],
                "since_ns": self._since_ns,
                "disks": [[disk.disk.model_dump(), disk.state()] for disk in self._disks.values()],
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; disks that are others now begin anew. Any error: it is not such a state."""
        with self._lock:
            self._system.restore(state["system"])
            self._detector.restore(state["detector"])
            self._hours = array("d", state["hours"])
            self._periods.extend(Period.model_validate(period) for period in state["periods"])
            self._since_ns = state["since_ns"]
            for record, learnt in state["disks"]:
                disk = self._disks.get(Disk.model_validate(record).index)
                if disk is not None and disk.disk == Disk.model_validate(record):
                    disk.restore(learnt)
