"""Many recovery tests of one VPG at once, on a provider that goes on replicating: what each takes, what it delays.

The times are spread evenly over the journal that there is. Each test's disks are looked at by a probe (`entropy`),
which reads all over the disk, and stay served until all have been looked at.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from bench.scale_world import Guests, World, oldest
from dr_cloud.client.client import Client
from dr_cloud.model.errors import UnavailableError
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest

_WAIT_SECONDS: Final = 400.0
_HISTORY_SECONDS: Final = 60.0
STACKS: Final = "stacks"
"""The kind of their processes."""

_TOLD: Final = """
## Many tests at once

{count} recovery tests of one VPG, at {count} times, all at once, while {vpgs} VPGs replicate: {passed} passed their
probe (`entropy`); all were served {served:.0f} s after they were asked for and all looked at after {looked:.0f} s. The
oldest that any VPG's newest checkpoint ever was meanwhile: {oldest:.2f} intervals (at most 2). From a test's start to
its first byte: {first:.1f} s (median), {last:.1f} s (the last).

Each takes {mib:.1f} MiB of memory (proportional, its process included), {log:.0f} KiB of disk for its write log and
{map:.0f} KiB of its own map.
"""


class Many(NamedTuple):
    """What was measured."""

    tests: list[RecoveryTest]
    """While all were served."""
    served_seconds: float
    looked_seconds: float
    stack_bytes: float
    """Of memory, each."""
    oldest_intervals: float
    vpgs: int


def measure_many(world: World, count: int, resident: Callable[[str], tuple[int, int]]) -> Many:
    """Start them, have them looked at, stop them.

    Args:
        world: Who replicates.
        count: How many.
        resident: Returns (processes, bytes) of a kind of process.
    """
    caller = world.caller()
    enterprise, vpg = world.names()[0]
    before_processes, before_bytes = resident(STACKS)
    guests = Guests(world.uris)
    with guests.writing(), Client(caller.url, caller.token, ca_pem=caller.ca_pem) as client:
        client.enterprise_name = enterprise
        time.sleep(_HISTORY_SECONDS)
        since_ns = time.time_ns()
        found = [checkpoint.time_ns for checkpoint in client.checkpoints(vpg) if checkpoint.testable]
        first, last = min(found), max(found)
        times = [first + (last - first) * number // (count - 1) for number in range(count)]
        request = TestsRequest(times_ns=times, probes=[ProbeSpec(kind="entropy")], keep=True)
        begun = time.monotonic()
        task = client.wait_task(client.start_tests(vpg, request).id, _WAIT_SECONDS)
        served = time.monotonic() - begun

        def mine() -> list[RecoveryTest]:
            return [test for test in client.tests(vpg) if test.task == task.id]

        while any(test.verdict is None and test.stopped_ns is None for test in mine()):
            if time.monotonic() - begun > _WAIT_SECONDS:
                raise UnavailableError(f"not all of {count} tests have been looked at", "Ask for fewer.")
            time.sleep(1.0)
        looked = time.monotonic() - begun
        tests = [client.test(test.id) for test in mine()]
        processes, memory = resident(STACKS)
        until_ns = time.time_ns()
        late = max(oldest(made, since_ns, until_ns) for made in world.checkpoints())
        ends = [client.stop_test(test.id, StopTest()) for test in tests if test.stopped_ns is None]
        for end in ends:
            client.wait_task(end.id, _WAIT_SECONDS)
    each = (memory - before_bytes) / max(1, processes - before_processes)
    return Many(tests, served, looked, each, late, len(world.names()))


def told(many: Many) -> str:
    """Return what was measured, as a part of a page."""
    counted = [test.statistics for test in many.tests]
    waits = [float(one.get("first_byte_seconds") or 0.0) for one in counted]
    return _TOLD.format(
        count=len(many.tests),
        vpgs=many.vpgs,
        passed=sum(test.verdict == "pass" for test in many.tests),
        served=many.served_seconds,
        looked=many.looked_seconds,
        oldest=many.oldest_intervals,
        first=statistics.median(waits),
        last=max(waits),
        mib=many.stack_bytes / (1 << 20),
        log=statistics.mean(float(one.get("stored_bytes") or 0) for one in counted) / 1024,
        map=statistics.mean(float(one.get("map_bytes") or 0) for one in counted) / 1024,
    )
