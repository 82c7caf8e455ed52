"""Samples of what is written, and how random each part of a disk is known to be: its ground.

A block is sampled now and then: its Shannon entropy, and whether it looks random, as encrypted or well compressed data
does (at least `RANDOM_BITS` of 8 bits per byte). The ground of a part of the disk is the share of random-looking blocks
among those sampled there, recent ones counting most. A sample is told beside what the ground was when its interval
began, so that an interval is never its own ground.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Final, NamedTuple

import numpy as np

from dr_cloud.model.blocks import BLOCK_SIZE

PARTS_MAX: Final = 65536
PART_BLOCKS_SHIFT_MIN: Final = 10
"""Parts are 4 MiB, or as large as needed for a disk to have at most `PARTS_MAX`."""
RANDOM_BITS: Final = 7.9
EVENNESS_MAX: Final = 400.0
_MEMORY_SAMPLES: Final = 32
_UNKNOWN: Final = -1.0
_COUNTS: Final = np.arange(BLOCK_SIZE + 1, dtype=np.float64)
_TERMS: Final = _COUNTS * np.log2(np.maximum(_COUNTS, 1)) / BLOCK_SIZE


class Sample(NamedTuple):
    """One block's figures."""

    entropy_bits: float
    """0 to 8 per byte."""
    random: bool
    evenness: float
    """Chi-square of its bytes, at most `EVENNESS_MAX`."""
    empty: bool


def sample(block: bytes) -> Sample:
    """Measure one block of 4096 bytes."""
    counts = np.bincount(np.frombuffer(block, np.uint8), minlength=256)
    entropy = 12.0 - float(_TERMS[counts].sum())
    random = entropy >= RANDOM_BITS
    evenness = min(EVENNESS_MAX, float(np.dot(counts, counts)) / 16 - BLOCK_SIZE) if random else EVENNESS_MAX
    return Sample(entropy, random, evenness, counts[0] == BLOCK_SIZE)


def part_shift(blocks: int) -> int:
    """Return log2 of the blocks of one part of a disk of `blocks` blocks."""
    return max(PART_BLOCKS_SHIFT_MIN, (max(blocks - 1, 0) // PARTS_MAX).bit_length())


class Ground:
    """The ground of one disk: two bytes for each part, 128 KiB at most."""

    def __init__(self, blocks: int) -> None:
        self.shift = part_shift(blocks)
        self._shares = np.full((blocks >> self.shift) + 1, _UNKNOWN, np.float16)
        self._new: dict[int, list[int]] = {}
        """By part: samples and random ones of the interval under way."""

    def expect(self, block: int, random: bool) -> float | None:
        """Note a sample; return the share of random ones that was known there before, None if nothing was."""
        part = block >> self.shift
        new = self._new.get(part)
        if new is None:
            new = self._new[part] = [0, 0]
        new[0] += 1
        new[1] += random
        share = float(self._shares[part])
        return share if share >= 0 else None

    def emptied(self, first: int, blocks: int) -> None:
        """Whole parts were zeroed: nothing is known of them any more."""
        begin = -(-first >> self.shift)
        end = (first + blocks) >> self.shift
        if begin < end:
            self._shares[begin:end] = _UNKNOWN
            for part in [part for part in self._new if begin <= part < end]:
                del self._new[part]

    def end_interval(self) -> None:
        """What was noted becomes ground."""
        for part, (samples, random) in self._new.items():
            before = float(self._shares[part])
            share = random / samples
            if before >= 0:
                weight = (1 - 1 / _MEMORY_SAMPLES) ** samples
                share = before * weight + share * (1 - weight)
            self._shares[part] = share
        self._new.clear()

    def state(self) -> str:
        """Return the ground, fit for JSON."""
        return b64encode(self._shares.tobytes()).decode()

    def restore(self, state: str) -> None:
        """Take up what `state` returned. Raises `ValueError` if it is of another disk."""
        shares = np.frombuffer(b64decode(state), np.float16)
        if shares.shape != self._shares.shape or not bool(
            (((shares >= 0) & (shares <= 1)) | (shares == _UNKNOWN)).all()
        ):
            raise ValueError("ground of another disk")
        self._shares = shares.copy()
