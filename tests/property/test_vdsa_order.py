"""Write order over several hosts whose clocks differ."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from vdsa_hosts import Hosts, run_simulated

from dr_cloud.vdsa.actions import SourceLimits

MS = 1_000_000


def world(skews_ms: list[int], limits: SourceLimits, delay_seconds: float, seed: int) -> Hosts:
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(Path(folder), [skew * MS for skew in skews_ms], limits, delay_seconds, seed)
        run_simulated(hosts.run(1.0, clients=3))
    return hosts


@settings(max_examples=6)
@given(
    skews_ms=st.lists(st.integers(-150, 150), min_size=2, max_size=4),
    delay_ms=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 1 << 30),
)
def test_a_barrier_holds_the_order_of_all_hosts(skews_ms: list[int], delay_ms: float, seed: int) -> None:
    """R5: at every checkpoint, each write acknowledged before a write in it was issued is in it too, on any host."""
    hosts = world(skews_ms, SourceLimits(checkpoint_seconds=0.2), delay_ms / 1000, seed)
    assert hosts.check(between=False) >= 4, "most intervals end with a checkpoint"
    longest = max(write.acked - write.begun for write in hosts.writes)
    assert longest < 0.022, "no guest waits longer than a barrier may take"


@settings(max_examples=6)
@given(
    skews_ms=st.lists(st.integers(-5, 5), min_size=2, max_size=4),
    delay_ms=st.sampled_from([0.2, 3.0]),
    seed=st.integers(0, 1 << 30),
)
def test_commit_wait_holds_the_order_at_any_time(skews_ms: list[int], delay_ms: float, seed: int) -> None:
    """R5: with `order: commit-wait` the same holds at every time between checkpoints."""
    limits = SourceLimits(checkpoint_seconds=0.2, order="commit-wait")
    hosts = world(skews_ms, limits, delay_ms / 1000, seed)
    assert hosts.check(between=True) >= 100
    assert sum(item.exact for item in hosts.checkpoints) >= 5
