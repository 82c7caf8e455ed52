"""Recovery tests in a world of which a test moves the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cloud_world import World

from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.recovery import RecoveryTest, TestsRequest
from dr_cloud.model.units import SECOND_NS

SCOPE = Scope("acme", "erp", "dc1")
FSCK = ProbeSpec(kind="fsck")
ENTROPY = ProbeSpec(kind="entropy", disk="sd*")


def furnish(world: World) -> Principal:
    """Protect `erp`, with a journal of 20 seconds; return its administrator."""
    who = world.principal("acme")
    world.protect(who)
    world.journal(SCOPE, 20)
    return who


def begin(world: World, who: Principal, ages_seconds: Sequence[float] = (0,), **more: object) -> list[RecoveryTest]:
    """Start tests at these ages; return them when their stacks are open, in this order."""
    times = [world.clock() - int(age * SECOND_NS) for age in ages_seconds]
    request = TestsRequest.model_validate({"times_ns": times, "probes": [FSCK, ENTROPY]} | more)
    task = world.done(world.cloud.start_tests(who, "acme", "erp", request))
    found = {test.asked_ns: test for test in world.cloud.tests(who, "acme", "erp").items if test.task == task.id}
    return [found[at_ns] for at_ns in times]


def until(world: World, condition: Callable[[], bool], step_seconds: float = 0.5) -> None:
    """Let time pass until something is so."""
    for _ in range(600):
        if condition():
            return
        world.clock.pass_seconds(step_seconds)
        world.cloud._context.tasks.wake()
        time.sleep(0.02)
    raise AssertionError("it does not come about")


def ended(world: World, who: Principal, test: str) -> RecoveryTest:
    """Let time pass until a test has ended; return it."""
    until(world, lambda: world.cloud.test(who, "acme", test).stopped_ns is not None)
    return world.cloud.test(who, "acme", test)
