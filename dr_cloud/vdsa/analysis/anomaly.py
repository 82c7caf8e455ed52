"""The detector: which intervals between a server's checkpoints are suspicious. A pure core without a clock.

Three measures of each interval, all in bytes per second and judged by their logarithm, because what servers write is
spread over orders of magnitude:

`encrypted in place`
    How much more of the sampled data looks random than the ground it falls on did before (`dr_cloud.vdsa.analysis.
    ground`). In ordinary life that sum stays around zero, however much is written; so it is judged at once, by its
    standard deviation.
`entropy`, `change rate`
    How much random-looking data, and how much at all, is written. Usual is what the last day's minutes say: the median
    and six times their median deviation (which a burst of an hour does not move, as it would move mean and variance),
    or the 99th percentile where bursts are common. Twice that, in two intervals one after another, is suspicious. The
    first hour only learns. While something is marked nothing is learnt, so that it does not become usual as it goes on;
    after an hour it does, and the mark ends.

A nightly job is a habit: what was reached on two other days of the last week at that hour of the day (or the hour
before or after) is usual, for all three measures. So a job's first two nights may be marked; a single attack never
becomes usual.

A mark ends after six quiet intervals, quiet being half of what begins one, and goes on if the same begins again within
ten minutes: no flapping.

Strength
    Above 0.5 only for data encrypted in place that is as even as a cipher makes it: the chi-square of its bytes is that
    of random data, which gzip, zstd and bzip2 do not reach over some dozens of samples. All else is below. What is as
    even as that without an attacker, an xz archive or an encrypted backup, is told as strongly where it is first
    written over other data.

What it does not find
    An attack slower than about 100 KiB a second, one on a disk whose content is encrypted already (only its rate), and
    one that imitates the data it replaces.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dr_cloud.model.analysis import Suspicion, SuspicionReason
from dr_cloud.model.units import SECOND_NS, format_size

REASONS: Final[tuple[SuspicionReason, ...]] = ("encrypted in place", "entropy", "change rate")
SUSPICIONS_MAX: Final = 64
_FLOORS_BYTES_PER_SECOND: Final = (64 << 10, 1 << 20, 4 << 20)
"""By measure: what is not worth a mark, however unusual it is."""
_LEARN_MINUTES: Final = 60
_DAY_MINUTES: Final = 1440
_DAYS: Final = 7
_DAY_NS: Final = 86_400 * SECOND_NS
_HOUR_NS: Final = 3600 * SECOND_NS
_MINUTE_NS: Final = 60 * SECOND_NS
_MAD_TO_DEVIATION: Final = 1.4826
_DEVIATIONS: Final = 6.0
_SAMPLES_MIN: Final = 16
_EXCESS_MIN: Final = 8.0
_EXCESS_SHARE_MIN: Final = 0.05
_QUIET_INTERVALS: Final = 6
_REOPEN_NS: Final = 600 * SECOND_NS
EVEN_MEAN: Final = 255.0
_EVEN_DEVIATION: Final = 22.6
"""Chi-square of 4096 random bytes over 256 values: mean and standard deviation."""


@dataclass(slots=True)
class Interval:
    """What was seen of a server between two checkpoints."""

    since_ns: int
    until_ns: int = 0
    writes: int = 0
    bytes_raw: int = 0
    samples: int = 0
    entropy_bits: float = 0.0
    """Sum over the samples."""
    random: int = 0
    """Samples that look random."""
    evenness: float = 0.0
    """Sum of the (bounded) chi-square of those."""
    known: int = 0
    """Samples on ground that was known before."""
    excess: float = 0.0
    """Random ones of these, less those that the ground let expect."""
    variance: float = 0.0
    """Of `excess`, by chance."""

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.until_ns - self.since_ns) / SECOND_NS

    def looks_even(self) -> bool:
        """Whether its random samples are as even as a cipher's output."""
        n = self.random
        return n >= _SAMPLES_MIN and self.evenness / n <= EVEN_MEAN + 4 * _EVEN_DEVIATION / math.sqrt(n)


def _level(measure: int, bytes_per_second: float) -> float:
    return math.log2(1 + max(0.0, bytes_per_second) / _FLOORS_BYTES_PER_SECOND[measure])


class _Mark:
    """One suspicion under way."""

    __slots__ = ("detail", "quiet", "since_ns", "strength", "until_ns")

    def __init__(self, since_ns: int) -> None:
        self.since_ns = since_ns
        self.until_ns = since_ns
        self.strength = 0.0
        self.detail = ""
        self.quiet = 0


class Detector:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[float, float]] = deque(maxlen=_DAY_MINUTES)
        """Of each of the last day's minutes: level of random-looking data, level of all data."""
        self._minute = 0
        self._minute_seconds = 0.0
        self._minute_bytes = [0.0, 0.0]
        self._usual = (0.0, 0.0)
        self._peaks = np.zeros((_DAYS, 24, len(REASONS)))
        self._day = -1
        self._hour = -1
        self._habit = np.zeros(len(REASONS))
        self._open: dict[int, _Mark] = {}
        self._before: dict[int, int] = {}
        """By measure: when the interval before began, if that was over what is usual."""
        self._ended: deque[Suspicion] = deque(maxlen=SUSPICIONS_MAX)

    @property
    def suspicions(self) -> list[Suspicion]:
        """The marks of the last time, by their beginning."""
        under_way = [self._record(measure, mark, False) for measure, mark in self._open.items()]
        return sorted([*self._ended, *under_way], key=lambda suspicion: suspicion.since_ns)

    def interval(self, seen: Interval, whole: bool = True) -> None:
        """Judge one interval, then learn from it.

        `whole` is False while a disk synchronises: what is sent again says nothing of rates, but what is encrypted in
        place is told all the same.
        """
        seconds = seen.seconds
        if seconds <= 0:
            return
        rate = seen.bytes_raw / seconds
        samples = max(seen.samples, 1)
        bytes_per_second = (seen.excess / samples * rate, seen.random / samples * rate, rate)
        levels = [_level(measure, value) for measure, value in enumerate(bytes_per_second)]
        self._turn_to(seen.until_ns)
        judged = range(3) if whole and len(self._minutes) >= _LEARN_MINUTES else range(1)
        for measure in judged:
            self._judge(measure, levels[measure], seen, bytes_per_second[measure])
        if not whole:
            levels[1:] = [0.0, 0.0]
        peaks = self._peaks[self._day % _DAYS, self._hour]
        np.maximum(peaks, levels, out=peaks)
        young = any(seen.until_ns - mark.since_ns < _HOUR_NS for mark in self._open.values())
        if whole and not young:
            self._learn(seen.until_ns, seconds, bytes_per_second[1] * seconds, seen.bytes_raw)

    # What is usual.

    def _turn_to(self, now_ns: int) -> None:
        day, hour = now_ns // _DAY_NS, now_ns // _HOUR_NS % 24
        if day != self._day:
            for passed in range(max(self._day + 1, day - _DAYS + 1), day + 1):
                self._peaks[passed % _DAYS] = 0
            self._day = day
        elif hour == self._hour:
            return
        self._hour = hour
        others = [row for row in range(_DAYS) if row != day % _DAYS]
        around = self._peaks[others][:, [(hour - 1) % 24, hour, (hour + 1) % 24]].max(axis=1)
        # The second highest of the other days: reached on two of them.
        self._habit = np.sort(around, axis=0)[-2]

    def _learn(self, now_ns: int, seconds: float, bytes_random: float, bytes_raw: float) -> None:
        self._minute_seconds += seconds
        self._minute_bytes[0] += bytes_random
        self._minute_bytes[1] += bytes_raw
        minute = now_ns // _MINUTE_NS
        if minute == self._minute:
            return
        self._minute = minute
        random, raw = (_level(at, amount / self._minute_seconds) for at, amount in enumerate(self._minute_bytes, 1))
        self._minutes.append((random, raw))
        self._minute_seconds, self._minute_bytes = 0.0, [0.0, 0.0]
        self._find_usual()

    def _find_usual(self) -> None:
        if not self._minutes:
            return
        levels = np.array(self._minutes)
        median = np.median(levels, axis=0)
        deviation = np.median(np.abs(levels - median), axis=0) * _MAD_TO_DEVIATION
        usual = np.maximum(median + _DEVIATIONS * deviation, np.percentile(levels, 99, axis=0))
        self._usual = (float(usual[0]), float(usual[1]))

    # Marks.

    def _judge(self, measure: int, level: float, seen: Interval, bytes_per_second: float) -> None:
        habit = float(self._habit[measure])
        if measure == 0:
            usual = habit
            deviations = seen.excess / math.sqrt(seen.variance + 1)
            over = (
                seen.known >= _SAMPLES_MIN
                and seen.excess >= max(_EXCESS_MIN, _EXCESS_SHARE_MIN * seen.known)
                and deviations >= _DEVIATIONS
                and level > (habit + 1 if habit else 0)
            )
        else:
            usual = max(habit, self._usual[measure - 1])
            over = level > usual + 1 and seen.samples >= (_SAMPLES_MIN if measure == 1 else 0)
        mark = self._open.get(measure)
        if over:
            before = self._before.setdefault(measure, seen.since_ns)
            if mark is None and (measure == 0 or before != seen.since_ns):
                mark = self._open[measure] = self._begin(measure, before)
        else:
            self._before.pop(measure, None)
        if mark is None:
            return
        if over:
            mark.until_ns, mark.quiet = seen.until_ns, 0
            strength = self._strength(measure, level - usual, seen)
            if strength > mark.strength:
                mark.strength = strength
                mark.detail = self._detail(measure, seen, bytes_per_second)
        elif measure == 0 or level <= usual:
            mark.quiet += 1
            if mark.quiet >= _QUIET_INTERVALS:
                self._ended.append(self._record(measure, self._open.pop(measure), True))

    def _begin(self, measure: int, since_ns: int) -> _Mark:
        for place, ended in enumerate(self._ended):
            if ended.reason == REASONS[measure] and since_ns - ended.until_ns <= _REOPEN_NS:
                del self._ended[place]
                mark = _Mark(ended.since_ns)
                mark.strength, mark.detail = ended.strength, ended.detail
                return mark
        return _Mark(since_ns)

    @staticmethod
    def _strength(measure: int, over: float, seen: Interval) -> float:
        if measure == 0:
            share = min(1.0, seen.excess / seen.known)
            return 0.55 + 0.45 * share if seen.looks_even() else 0.2 + 0.25 * share
        most = 0.4 if measure == 1 and seen.looks_even() else 0.3
        return min(most, 0.1 + 0.05 * over)

    @staticmethod
    def _detail(measure: int, seen: Interval, bytes_per_second: float) -> str:
        rate = f"{format_size(bytes_per_second)}/s"
        if measure == 0:
            kind = "as even as a cipher's output" if seen.looks_even() else "as even as compressed data"
            return f"{seen.excess / seen.known:.0%} of {seen.known} samples turned random, {kind}; about {rate}"
        if measure == 1:
            return f"{seen.random / seen.samples:.0%} of {seen.samples} samples look random; about {rate}"
        return f"{rate} written"

    @staticmethod
    def _record(measure: int, mark: _Mark, ended: bool) -> Suspicion:
        return Suspicion(
            since_ns=mark.since_ns,
            until_ns=mark.until_ns,
            reason=REASONS[measure],
            strength=round(mark.strength, 2),
            ended=ended,
            detail=mark.detail,
        )

    # Over a restart.

    def state(self) -> dict[str, Any]:
        """Return what was learnt, fit for JSON."""
        return {
            "minutes": [[round(level, 3) for level in minute] for minute in self._minutes],
            "day": self._day,
            "peaks": self._peaks.round(3).tolist(),
            "suspicions": [suspicion.model_dump() for suspicion in self.suspicions],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned. A mark that was under way has ended, and goes on if it begins again."""
        peaks = np.array(state["peaks"], float)
        if peaks.shape != self._peaks.shape:
            raise ValueError("peaks of another shape")
        self._minutes.extend((float(random), float(raw)) for random, raw in state["minutes"])
        self._day = int(state["day"])
        self._peaks = peaks
        records = [Suspicion.model_validate(record) for record in state["suspicions"]]
        self._ended.extend(record.model_copy(update={"ended": True}) for record in records)
        self._find_usual()
