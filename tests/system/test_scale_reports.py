"""What of the sites' and hosts' reports is written, and when: a cloud of many enterprises sends them all the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloud_databases import postgres, world  # noqa: F401
from cloud_world import World
from quiet_fabric import GIB
from sqlalchemy import event

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.vpg import VpgStatus


@contextmanager
def statements(world: World) -> Iterator[list[str]]:
    """Gather what the database is told, but for the ends of transactions."""
    found: list[str] = []
    engine = world.cloud._database.engine

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not statement.startswith(("BEGIN", "SELECT set_config")):
            found.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)


def settle(world: World) -> tuple[str, str]:
    """Protect, and report until there is nothing new; return the host that is the target."""
    world.protect(world.principal("acme"))
    target = world.cloud.route(next(iter(world.cloud.orders_for("acme", "acme-hq").sources)).scope)
    for _ in range(3):
        world.clock.pass_seconds(5)
        world.report("acme")
        world.report_host(target.site, target.host)
    return target.site, target.host


def test_of_a_report_that_tells_nothing_new_the_figures_are_written(world: World):
    """R10: how a replication stands is a few seconds old at most, and hundreds of reports cost little."""
    host = settle(world)
    world.clock.pass_seconds(5)
    with statements(world) as told:
        world.report("acme")
    assert sorted(one.split()[1] for one in told if one.startswith("UPDATE")) == [
        "hosts",
        "servers",
        "sites",
        "vpg_targets",
    ]
    assert len([one for one in told if "vpg_members" in one]) == 1, "that was the world asking for the site's orders"
    world.report_host(*host)
    vpg = world.cloud.vpg(SYSTEM, "acme", "erp")
    assert [target.newest_ns for target in vpg.targets] == [world.clock()]
    assert world.cloud.sites(SYSTEM, "acme").items[0].last_seen_ns == world.clock()


def test_a_report_that_comes_too_soon_is_not_written(world: World):
    settle(world)
    world.clock.pass_seconds(5)
    world.report("acme")
    world.clock.pass_seconds(1)
    with statements(world) as told:
        world.report("acme")
    assert not [one for one in told if one.startswith(("UPDATE", "INSERT"))]


def test_what_is_new_is_written_at_once(world: World):
    """R18: a change never waits for the time of the figures."""
    settle(world)
    world.report("acme", problem="the target's disk is full")
    assert world.cloud.vpg(SYSTEM, "acme", "erp").targets[0].problem == "the target's disk is full"
    world.report("acme", {"web": {"sda": GIB, "sdb": 2 * GIB, "sdc": GIB}, "db": {"sda": GIB}})
    assert ("web", "sdc") in {(d.server, d.name) for d in world.cloud.vpg(SYSTEM, "acme", "erp").disks}


def test_what_time_alone_changes_is_noticed(world: World):
    """R18: a server that is gone is missed though its site's reports say the same all the time."""
    settle(world)
    left = {"db": {"sda": GIB}}
    for _ in range(6):
        world.report("acme", left)
        assert world.cloud.vpg_status(SYSTEM, "acme", "erp") is VpgStatus.PROTECTING
        world.clock.pass_seconds(5)
    world.clock.pass_seconds(1)
    world.report("acme", left)
    assert world.cloud.vpg_status(SYSTEM, "acme", "erp") is VpgStatus.MISSING_CONFIGURATION


def test_a_site_that_was_taken_for_lost_is_there_again_with_its_next_report(world: World):
    settle(world)
    world.clock.pass_seconds(20)
    world.cloud.monitor.note_silence()
    assert not world.cloud.sites(SYSTEM, "acme").items[0].connected
    world.report("acme")
    assert world.cloud.sites(SYSTEM, "acme").items[0].connected
    assert world.cloud.sites(SYSTEM, "acme").items[0].last_seen_ns == world.clock()
