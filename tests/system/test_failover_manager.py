"""Failover through the whole manager: committed, rolled back, by itself, lost and found again, released."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from cloud_databases import postgres, world  # noqa: F401
from cloud_world import World
from quiet_fabric import GIB

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.cloud import Vpg
from dr_cloud.model.errors import ConflictError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.recovery import FailoverRequest, RecoveryTest
from dr_cloud.model.task import CompletionCode
from dr_cloud.model.vpg import VpgState, VpgStatus

SCOPE = Scope("acme", "erp", "dc1")


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.02)


def failed_over(world: World, request: FailoverRequest = FailoverRequest()) -> RecoveryTest:
    """Protect a group and fail it over; return the failover."""
    who = world.principal("acme")
    world.protect(who)
    world.journal(SCOPE, 10)
    task = world.done(world.cloud.failover(who, "acme", "erp", request))
    return world.cloud.test(who, "acme", task.result["test"])


def vpg(world: World) -> Vpg:
    return world.cloud.vpg(SYSTEM, "acme", "erp")


def test_committed_the_servers_stay(world: World) -> None:
    """R10, R18: promoted while they run; the group is replicated no more, and is not removed from under them."""
    who = world.principal("acme")
    failover = failed_over(world)
    assert failover.uris and failover.expires_ns is None
    assert failover.statistics["missing_bytes"] == GIB
    assert len(world.cloud.orders_for("acme", "acme-hq").sources) == 1
    task = world.cloud.commit_failover(who, "acme", "erp")
    assert vpg(world).status in (
        VpgStatus.PROMOTING_AND_NEED_REVERSE_CONFIGURATION,
        VpgStatus.NEED_REVERSE_CONFIGURATION,
    )
    world.done(task)
    assert (vpg(world).status, vpg(world).state) == (VpgStatus.NEED_REVERSE_CONFIGURATION, VpgState.RECOVERED)
    assert world.cloud.orders_for("acme", "acme-hq").sources == []
    assert world.cloud.host_orders("us-east", "h1").targets == []
    assert ("acme", "acme-hq") in world.fabric.asked("orders_changed")
    shown = world.cloud.test(who, "acme", failover.id)
    assert (shown.status, shown.statistics["promoted"], shown.statistics["missing_bytes"]) == ("running", True, 0)
    for act in (world.cloud.rollback_failover, world.cloud.commit_failover):
        with pytest.raises(ConflictError):
            act(who, "acme", "erp")
    for force in (False, True):
        with pytest.raises(ConflictError, match="run from recovered disks"):
            world.cloud.remove_vpg(who, "acme", "erp", force)
    world.done(world.cloud.release_failover(who, "acme", "erp"))
    assert world.fabric.recoverable == {}
    ended = world.cloud.test(who, "acme", failover.id)
    assert (ended.status, ended.ended, ended.uris) == ("stopped", f"released by {who.name}", {})
    world.follow(world.cloud.remove_vpg(who, "acme", "erp"))


def test_rolled_back_they_are_gone(world: World) -> None:
    """R10: and the group is protected as before."""
    who = world.principal("acme")
    failover = failed_over(world)
    world.done(world.cloud.rollback_failover(who, "acme", "erp"))
    assert world.fabric.recoverable == world.fabric.recovering == {}
    assert vpg(world).status is VpgStatus.PROTECTING
    assert world.cloud.test(who, "acme", failover.id).ended == f"rolled back by {who.name}"
    with pytest.raises(ConflictError):
        world.cloud.release_failover(who, "acme", "erp")


@pytest.mark.parametrize(
    ("then", "status"),
    [("commit", VpgStatus.NEED_REVERSE_CONFIGURATION), ("rollback", VpgStatus.PROTECTING)],
)
def test_it_ends_by_itself(world: World, then: str, status: VpgStatus) -> None:
    """R10: a commit policy: automatic after a time, and not before."""
    failover = failed_over(world, FailoverRequest.model_validate({"then": then, "after_seconds": 600}))
    assert (failover.then, failover.expires_ns) == (then, world.clock() + 600 * 10**9)
    world.cloud.recovering.look()
    assert vpg(world).status is VpgStatus.FAILOVER
    world.clock.pass_seconds(600)
    world.cloud.recovering.look()
    until(lambda: vpg(world).status is status)


def test_what_nobody_serves_is_started_again(world: World) -> None:
    """R10: the actors' Ray has ended: the servers come back with their disks, in the middle of a promotion too."""
    who = world.principal("acme")
    failover = failed_over(world)
    world.fabric.recovering.clear()
    world.fabric.broken["recover"] = UnavailableError("the recovered disks are not on this node")
    world.cloud.recovering.look()
    shown = world.cloud.test(SYSTEM, "acme", failover.id)
    assert (shown.status, shown.problem) == (
        "running",
        "its servers are not served: the recovered disks are not on this node",
    )
    task = world.cloud.commit_failover(who, "acme", "erp")
    world.fabric.broken.clear()
    world.cloud.recovering.look()
    assert world.fabric.asked("recover")[-1] == (*SCOPE, failover.id, "None")
    for _ in range(400):
        if world.cloud.task(who, task.id).ended_ns is not None:
            break
        world.clock.pass_seconds(1)
        world.cloud.wait_task(who, task.id, 0.05, 0.02)
    assert world.cloud.task(who, task.id).completion is CompletionCode.SUCCESS
    world.cloud.recovering.look()
    assert world.cloud.test(SYSTEM, "acme", failover.id).problem == ""


def test_a_failover_that_cannot_begin_leaves_nothing(world: World) -> None:
    """R10: the group is as before, and nothing is left where its servers would have been."""
    who = world.principal("acme")
    world.protect(who)
    world.journal(SCOPE, 10)
    world.fabric.broken["recover"] = UnavailableError("no node is there")
    task = world.follow(world.cloud.failover(who, "acme", "erp", FailoverRequest()))
    assert (task.completion, vpg(world).status) == (CompletionCode.FAILED, VpgStatus.PROTECTING)
    assert world.fabric.asked("discard_recovered") == [(world.cloud.tests(who, "acme").items[0].id,)]
