"""(4) Opening: from the request for 8 stacks at once to the first 4 KiB of the slowest, on idle actors.

Each run takes actors that served nobody and a cache folder in which nothing is. The same again right after it, with the
same actors and what the cache then holds, is the warm figure. The disk's writes lie in 64 places of 16 MiB each,
whatever its size.
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple

import numpy as np

from bench import content
from bench.figures import Figures, Target, against, beside
from bench.history import STEP_NS
from bench.provider import STACKS, Provider
from dr_cloud.model.blocks import BLOCK_SIZE, blocks_of
from dr_cloud.model.ids import Scope

SIZES: Final = {"1 GiB": 1 << 30, "1 TiB": 1 << 40}
WRITES: Final = {"10⁴ writes": 10**4, "10⁶ writes": 10**6}
INTERVAL_WRITES: Final = 5_000
"""Of each checkpoint."""
PLACES: Final = 64
PLACE_BLOCKS: Final = (1 << 30) // BLOCK_SIZE // PLACES


class _Case(NamedTuple):
    scope: Scope
    begun_ns: int
    ended_ns: int
    offsets: list[int]
    """Bytes at which every image has data."""


def measure(provider: Provider, rounds: int) -> Figures:
    """Return the figures."""
    cases = {
        (size, writes): _case(provider, f"open-{number}-{index}", SIZES[size], WRITES[writes])
        for number, size in enumerate(SIZES)
        for index, writes in enumerate(WRITES)
    }
    cold: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    warm: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    keys = list(cases)
    for number in range(rounds):
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            seconds = _open_twice(provider, cases[key], number)
            cold[key].append(seconds[0])
            warm[key].append(seconds[1])
    figures: Figures = {}
    for key in keys:
        name = f"opening {STACKS} stacks, {', '.join(key)}"
        figures[name] = against(cold[key], "s", Target("≤", 0.5, "s"))
        figures[f"{name}, cache warm"] = against(warm[key], "s")
    small, large = SIZES
    few, many = WRITES
    for writes in WRITES:
        runs = {size: cold[size, writes] for size in SIZES}
        figures[f"opening, {large} / {small}, {writes}"] = beside(runs, large, small, "s", Target("≤", 1.2))
    for size in SIZES:
        runs = {writes: cold[size, writes] for writes in WRITES}
        figures[f"opening, {many} / {few}, {size}"] = beside(runs, many, few, "s", Target("≤", 3))
    return figures


def _case(provider: Provider, name: str, size_bytes: int, writes: int) -> _Case:
    """Write a history: first every place once in part, then anywhere in them."""
    history = provider.history(name, size_bytes)
    data = content.realistic(64 * BLOCK_SIZE)
    stride = blocks_of(size_bytes) // PLACES
    draw = np.random.default_rng(3)
    first = np.arange(PLACES, dtype=np.uint64) * np.uint64(stride)
    history.write(first, data)
    history.checkpoint()
    begun_ns = history.time_ns
    left = writes - PLACES
    while left > 0:
        count = min(left, INTERVAL_WRITES)
        place = draw.integers(0, PLACES, count, np.uint64)
        history.write(place * np.uint64(stride) + draw.integers(0, PLACE_BLOCKS, count, np.uint64), data)
        history.checkpoint()
        left -= count
    history.close()
    provider.take_over(history.scope)
    return _Case(history.scope, begun_ns, history.time_ns, [int(block) * BLOCK_SIZE for block in first])


def _open_twice(provider: Provider, case: _Case, seed: int) -> tuple[float, float]:
    """Return the slowest stack's seconds, cold and then warm."""
    draw = random.Random(seed)
    asked = [
        (draw.randrange(case.begun_ns, case.ended_ns, STEP_NS // 2), draw.choice(case.offsets)) for _ in range(STACKS)
    ]
    provider.empty_cache()
    provider.renew_pool()
    cold, warm = (max(provider.first_bytes(case.scope, asked)) for _ in range(2))
    return cold, warm
