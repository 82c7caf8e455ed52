"""VPGs, their tests and checkpoints through the whole manager, on either database."""

from __future__ import annotations

import pytest
from cloud_databases import postgres, world  # noqa: F401
from cloud_world import World, settings
from quiet_fabric import GIB, START_NS

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.cloud import CheckpointFilter, CheckpointOrder, PageRequest, VpgFilter
from dr_cloud.model.errors import ConflictError, DeniedError, DrCloudError, InvalidError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.recovery import FailoverRequest, StopTest, TestsRequest
from dr_cloud.model.replication import HostReport, SiteReport
from dr_cloud.model.task import CompletionCode
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import ProtectedServer, TargetConfig, VpgState, VpgStatus

SCOPE = Scope("acme", "erp", "dc1")


def indexes(world: World) -> dict[tuple[str, str], int]:
    vpg = world.cloud.vpg(SYSTEM, "acme", "erp")
    return {(disk.server, disk.name): disk.index for disk in vpg.disks}


def test_a_group_is_protected_and_everyone_is_told(world: World):
    """R8: servers as a unit; a target is a cluster and a pool, which hide the provider's hosts from the tenant."""
    who = world.principal("acme")
    task = world.cloud.create_vpg(who, "acme", settings())
    assert task.completion is CompletionCode.NOT_AVAILABLE
    assert world.done(task).result == {}
    vpg = world.cloud.vpg(who, "acme", "erp")
    assert (vpg.status, vpg.state, vpg.problem) == (VpgStatus.PROTECTING, VpgState.PROTECTED, "")
    assert indexes(world) == {("db", "sda"): 0, ("web", "sda"): 1, ("web", "sdb"): 2}
    assert [disk.size_bytes for disk in vpg.disks] == [GIB, GIB, 2 * GIB]
    (order,) = world.cloud.orders_for("acme", "acme-hq").sources
    assert order.scope == SCOPE
    assert order.members == {"db": {"sda": 0}, "web": {"sda": 1, "sdb": 2}}
    assert vpg.targets[0].placed_host is None
    placed = world.cloud.vpg(SYSTEM, "acme", "erp").targets[0]
    assert (placed.placed_host, placed.placed_datastore) == ("h1", "ds-1")
    (kept,) = world.cloud.host_orders("us-east", "h1").targets
    assert (kept.scope, kept.store) == (SCOPE, "file:///stores/us-east/ds-1")
    route = world.cloud.route(SCOPE)
    assert (route.site, route.host, route.store, route.jurisdiction) == ("us-east", "h1", kept.store, "USA")
    assert ("acme", "acme-hq") in world.fabric.asked("orders_changed")
    assert ("us-east", "h1") in world.fabric.asked("host_orders_changed")


def test_places_are_spread_over_hosts_and_datastores(world: World):
    """R8: the manager picks the host with the fewest scopes, over all enterprises."""
    for name in ("acme", "brit"):
        world.protect(world.principal(name), enterprise=name)
    placed = {name: world.cloud.vpg(SYSTEM, name, "erp").targets[0] for name in ("acme", "brit")}
    assert {target.placed_host for target in placed.values()} == {"h1", "h2"}
    assert {target.placed_datastore for target in placed.values()} == {"ds-1", "ds-2"}
    assert [order.scope.enterprise for order in world.cloud.host_orders("us-east", "h2").targets] == ["brit"]
    assert world.cloud.host_orders("us-east", "h2", "acme").targets == []


def test_a_group_follows_its_servers(world: World):
    """R7: a disk is added, resized, removed, comes back; a server moves. No index is ever used again."""
    who = world.principal("acme")
    world.protect(who)
    before = world.cloud.orders_for("acme", "acme-hq").revision
    world.report("acme", {"web": {"sda": GIB, "sdb": 3 * GIB, "sdc": GIB}, "db": {"sda": GIB}})
    orders = world.cloud.orders_for("acme", "acme-hq")
    assert orders.revision > before
    assert orders.sources[0].members["web"] == {"sda": 1, "sdb": 2, "sdc": 3}
    sizes = {disk.index: disk.size_bytes for disk in world.cloud.vpg(who, "acme", "erp").disks}
    assert sizes[2] == 3 * GIB
    world.report("acme", {"web": {"sda": GIB, "sdb": 3 * GIB}, "db": {"sda": GIB}})
    assert ("web", "sdc") not in indexes(world)
    world.report("acme", {"web": {"sda": GIB, "sdb": GIB, "sdc": GIB}, "db": {"sda": GIB}}, host="h2")
    assert indexes(world)["web", "sdc"] == 4
    (web,) = [s for s in world.cloud.servers(who, "acme", "acme-hq").items if s.name == "web"]
    assert (web.host, web.vpgs) == ("h2", ["erp"])
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING


def test_a_server_that_is_gone_is_missed_and_found(world: World):
    """R18: MissingConfiguration, and back. What it had stays protected under its indexes."""
    who = world.principal("acme")
    world.protect(who)
    had = indexes(world)
    world.report("acme", {"db": {"sda": GIB}})
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING  # perhaps it only restarts
    world.clock.pass_seconds(40)
    world.report("acme", {"db": {"sda": GIB}})
    vpg = world.cloud.vpg(who, "acme", "erp")
    assert vpg.status is VpgStatus.MISSING_CONFIGURATION
    assert "web" in vpg.problem
    world.report("acme")
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING
    assert indexes(world) == had


def test_servers_that_have_not_been_seen_are_waited_for(world: World):
    """R18: the order in which things are started does not matter."""
    who = world.principal("acme")
    world.protect(who, servers=[ProtectedServer(name="later")])
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.MISSING_CONFIGURATION
    assert world.cloud.orders_for("acme", "acme-hq").sources[0].members == {"later": {}}
    world.report("acme", {"later": {"vda": GIB}})
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING
    assert world.cloud.orders_for("acme", "acme-hq").sources[0].members == {"later": {"vda": 0}}


def test_update_add_and_remove_servers(world: World):
    """R18: update, add a server; indexes of a server that left are not given again."""
    who = world.principal("acme")
    world.protect(who, servers=[ProtectedServer(name="db")])
    world.done(world.cloud.add_server(who, "acme", "erp", ProtectedServer(name="web", disks=["sdb"])))
    assert indexes(world) == {("db", "sda"): 0, ("web", "sdb"): 1}
    world.done(world.cloud.remove_server(who, "acme", "erp", "web"))
    world.done(world.cloud.add_server(who, "acme", "erp", ProtectedServer(name="web")))
    assert indexes(world) == {("db", "sda"): 0, ("web", "sda"): 2, ("web", "sdb"): 3}
    two = [settings().targets[0], TargetConfig(name="dc2", site="uk-south", host="h1", datastore="ds-1")]
    world.done(world.cloud.update_vpg(who, "acme", "erp", settings(targets=two, checkpoint_seconds=2.0)))
    orders = world.cloud.orders_for("acme", "acme-hq").sources
    assert {(o.scope.target, o.copy_number, o.checkpoint_seconds) for o in orders} == {("dc1", 0, 2), ("dc2", 1, 2)}
    world.done(world.cloud.update_vpg(who, "acme", "erp", settings(targets=two[1:])))
    assert world.cloud.host_orders("us-east", "h1").targets == []
    assert [order.copy_number for order in world.cloud.orders_for("acme", "acme-hq").sources] == [1]
    for change, error in (
        ({"name": "other"}, InvalidError),
        ({"source_site": "us-east"}, InvalidError),
        ({"territory": ["USA"]}, DrCloudError),
        ({"targets": [TargetConfig(name="dc2", site="us-east", host="compute", datastore="gold")]}, InvalidError),
    ):
        with pytest.raises(error):
            world.cloud.update_vpg(who, "acme", "erp", settings(**{"targets": two[1:], **change}))


def test_a_server_has_three_copies_at_most(world: World):
    """R8: up to three targets of a server, over all its groups, each a copy of its own at the tap."""
    who = world.principal("acme")
    for number, name in enumerate(("a", "b", "c")):
        world.protect(who, name)
        orders = world.cloud.orders_for("acme", "acme-hq").sources
        assert {o.copy_number for o in orders if o.scope.vpg == name} == {number}
    with pytest.raises(ConflictError, match="3 targets already"):
        world.cloud.create_vpg(who, "acme", settings("d"))
    assert [vpg.name for vpg in world.cloud.vpgs(who, "acme").items] == ["a", "b", "c"]


def test_targets_that_cannot_be(world: World):
    """R8: hosts in clusters and datastores in pools are hidden; another enterprise's site is not there."""
    who = world.principal("acme")
    wrong: list[tuple[dict[str, str], type[DrCloudError]]] = [
        ({"site": "nowhere"}, NotFoundError),
        ({"host": "h1"}, NotFoundError),
        ({"datastore": "ds-1"}, NotFoundError),
        ({"host": "h3"}, InvalidError),
        ({"site": "brit-hq"}, NotFoundError),
        ({"site": "acme-hq"}, InvalidError),
    ]
    for change, error in wrong:
        target = {"name": "dc1", "site": "us-east", "host": "compute", "datastore": "gold"} | change
        with pytest.raises(error):
            world.cloud.create_vpg(who, "acme", settings(targets=[target]))
        assert world.cloud.audit(who, "acme").items[0].outcome == "refused"
    assert world.cloud.vpgs(who, "acme").items == []


def test_territory(world: World):
    """R13.2: the choice of a target is checked against the group's territory."""
    who = world.principal("acme")
    uk = TargetConfig(name="dc1", site="uk-south", host="h1", datastore="ds-1")
    with pytest.raises(DeniedError, match="territory"):
        world.cloud.create_vpg(who, "acme", settings(targets=[uk], territory=["USA"]))
    world.protect(who, targets=[uk], territory=["UK", "USA"])


def test_remove_waits_for_everyone_and_force_for_nobody(world: World):
    """R18: remove and force-remove. A group of the same name begins with new indexes."""
    who = world.principal("acme")
    world.protect(who)
    world.done(world.cloud.remove_vpg(who, "acme", "erp"))
    with pytest.raises(NotFoundError):
        world.cloud.vpg(who, "acme", "erp")
    assert world.cloud.orders_for("acme", "acme-hq").sources == []
    with pytest.raises(NotFoundError):
        world.cloud.route(SCOPE)
    world.protect(who)
    assert sorted(indexes(world).values()) == [3, 4, 5]
    world.journal(SCOPE)
    world.done(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[world.clock()])))
    with pytest.raises(ConflictError, match="remove started"):
        world.cloud.remove_vpg(who, "acme", "erp")
    task = world.cloud.remove_vpg(who, "acme", "erp", force=True)
    with pytest.raises(NotFoundError):
        world.cloud.vpg(who, "acme", "erp")
    assert world.cloud.wait_task(who, task.id, 10, 0.05).completion is CompletionCode.SUCCESS
    assert world.fabric.served == {}


def test_a_task_tells_who_does_not_follow(world: World):
    """R19: a task that cannot end says why; the change stands."""
    who = world.principal("acme")
    world.cloud.site_lost("acme", "acme-hq")
    task = world.cloud.create_vpg(who, "acme", settings())
    running = world.cloud.wait_task(who, task.id, 1.0, 0.05)
    assert running.completion is CompletionCode.NOT_AVAILABLE
    assert world.cloud.active_task(who, "acme", "erp") == running
    assert world.cloud.active_task_at_site(who, "acme", "erp", "acme-hq") is not None
    assert world.cloud.active_task_at_site(who, "acme", "erp", "us-east") is None
    with pytest.raises(ConflictError, match=task.id):
        world.cloud.remove_vpg(who, "acme", "erp")
    world.clock.pass_seconds(21)
    failed = world.cloud.wait_task(who, task.id, 10, 0.05)
    assert failed.completion is CompletionCode.FAILED
    assert "acme-hq is not connected" in failed.exception
    assert failed.remedy
    assert world.cloud.vpg(who, "acme", "erp").targets[0].linked is False
    world.clock.pass_seconds(1)
    world.report("acme", problem="the target refuses")
    task = world.cloud.force_sync(who, "acme", "erp")
    for _ in range(8):
        world.clock.pass_seconds(6)
        world.report("acme", problem="the target refuses")
        world.report_host("us-east", "h1")
        world.cloud.wait_task(who, task.id, 0.3, 0.05)
    assert "the target refuses" in world.cloud.task(who, task.id).exception
    assert world.cloud.orders_for("acme", "acme-hq").sources[0].sync_number == 1


def test_tasks_are_aborted_where_they_can_be(world: World):
    """R19: Aborted, with its completion code."""
    who = world.principal("acme")
    task = world.cloud.create_vpg(who, "acme", settings())
    world.cloud.abort_task(who, task.id)
    ended = world.cloud.wait_task(who, task.id, 10, 0.05)
    assert (ended.status.value, ended.completion) == ("Aborted", CompletionCode.ABORTED)
    with pytest.raises(ConflictError):
        world.cloud.abort_task(who, task.id)
    world.done(world.cloud.update_vpg(who, "acme", "erp", settings()))


def test_pause_and_resume(world: World):
    who = world.principal("acme")
    world.protect(who)
    assert world.cloud.pause(who, "acme", "erp").paused == f"paused by {who.name}"
    assert world.cloud.orders_for("acme", "acme-hq").sources[0].paused
    with pytest.raises(ConflictError):
        world.cloud.insert_checkpoint(who, "acme", "erp", CheckpointOrder(tag="x"))
    assert world.cloud.resume(who, "acme", "erp").paused == ""
    assert world.cloud.orders_for("acme", "acme-hq").sources[0].paused == ""


def test_both_directions_and_between_data_centers(world: World):
    """R9: a source in a data center, a target at the enterprise's site, and both in data centers, at once."""
    who = world.principal("acme")
    world.protect(who)
    home = TargetConfig(name="home", site="acme-hq", host="h1", datastore="local")
    over = TargetConfig(name="uk", site="uk-south", host="h1", datastore="ds-1")
    back = settings("back", source_site="us-east", targets=[home, over], servers=[ProtectedServer(name="app")])
    world.done(world.cloud.create_vpg(who, "acme", back))
    source_host = "h2"  # the one that carries nothing yet
    (first, second) = world.cloud.host_orders("us-east", source_host).sources
    assert {first.scope, second.scope} == {Scope("acme", "back", "home"), Scope("acme", "back", "uk")}
    (kept,) = world.cloud.orders_for("acme", "acme-hq").targets
    assert (kept.scope.target, kept.store) == ("home", "local")
    route = world.cloud.route(Scope("acme", "back", "home"))
    assert (route.kind, route.site, route.store) == ("site", "acme-hq", "local")
    assert [order.scope.target for order in world.cloud.host_orders("uk-south", "h1").targets] == ["uk"]
    reverse = world.cloud.reverse_settings(who, "acme", "erp")
    assert (reverse.source_site, reverse.targets[0].site) == ("us-east", "acme-hq")
    assert (reverse.targets[0].host, reverse.targets[0].datastore) == ("h1", "local")
    for wrong in ({"host": "h9"}, {"datastore": "none"}):
        bad = settings("bad", source_site="us-east", targets=[home.model_copy(update=wrong)])
        with pytest.raises(NotFoundError):
            world.cloud.create_vpg(who, "acme", bad)


def test_writes_are_listed_page_by_page(world: World):
    """R14.2: the times between which the last clean one is searched, oldest first, each once."""
    who = world.principal("acme")
    world.protect(who)
    times = [checkpoint.time_ns - 1 for checkpoint in world.journal(SCOPE, 10)]
    page = world.cloud.writes(who, "acme", "erp", page=PageRequest(limit=4))
    assert [write.time_ns for write in page.items] == times[:4]
    rest = world.cloud.writes(who, "acme", "erp", page=PageRequest(limit=6, cursor=page.next_cursor))
    assert ([write.time_ns for write in rest.items], rest.next_cursor) == (times[4:], None)
    between = world.cloud.writes(who, "acme", "erp", "dc1", times[3], times[5])
    assert [write.time_ns for write in between.items] == times[3:6]
    with pytest.raises(NotFoundError):
        world.cloud.writes(who, "acme", "erp", "elsewhere")


def test_checkpoints_are_listed_and_made_by_hand(world: World):
    """R3.3, R18: insert returns at once; wait tells when it is in the journal, or times out."""
    who = world.principal("acme")
    world.protect(who)
    journal = world.journal(SCOPE, 10)
    page = world.cloud.checkpoints(who, "acme", "erp", page=PageRequest(limit=4))
    assert [c.number for c in page.items] == [9, 8, 7, 6]
    rest = world.cloud.checkpoints(who, "acme", "erp", page=PageRequest(limit=10, cursor=page.next_cursor))
    assert ([c.number for c in rest.items], rest.next_cursor) == ([5, 4, 3, 2, 1, 0], None)
    some = CheckpointFilter(since_ns=journal[3].time_ns, until_ns=journal[5].time_ns)
    assert [c.number for c in world.cloud.checkpoints(who, "acme", "erp", which=some).items] == [5, 4, 3]
    asked = world.cloud.insert_checkpoint(who, "acme", "erp", CheckpointOrder(tag="before update"))
    assert (asked.targets, asked.complete) == (["dc1"], False)
    assert not world.cloud.wait_checkpoint(who, "acme", "erp", asked.id, 0.1, 0.02).complete
    made = {"number": 10, "kind": "tag", "tag": "before update", "request": "request-1", "created_ns": world.clock()}
    world.fabric.journals[SCOPE].append(journal[-1].model_copy(update=made))
    found = world.cloud.wait_checkpoint(who, "acme", "erp", asked.id, 5, 0.02)
    assert (found.complete, found.arrived["dc1"].number) == (True, 10)
    tagged = world.cloud.checkpoints(who, "acme", "erp", which=CheckpointFilter(tag="before update"))
    assert [c.request for c in tagged.items] == ["request-1"]
    world.fabric.broken["insert_checkpoint"] = DrCloudError("no source is connected")
    with pytest.raises(ConflictError, match="no source is connected"):
        world.cloud.insert_checkpoint(who, "acme", "erp", CheckpointOrder(tag="x"))


def test_recovery_tests_run_side_by_side_and_end_one_by_one(world: World):
    """R14.1, R14.7, R14.8: any times at once; each is stopped by itself, gets its verdict; old ones are discarded."""
    who = world.principal("acme")
    world.protect(who)
    world.journal(SCOPE, 10)
    times = [world.clock() - seconds * SECOND_NS for seconds in (0, 3, 5)]
    task = world.done(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[*times, START_NS - 10**15])))
    assert len(task.result["tests"]) == 4
    assert len(task.result["failed"]) == 1
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.TEST
    running = [t for t in world.cloud.tests(who, "acme", "erp").items if t.status == "running"]
    assert sorted(test.at_ns for test in running) == sorted(times)
    assert world.cloud.test(who, "acme", running[0].id).statistics["blocks_read"] == 7
    world.clock.pass_seconds(90)
    for number, test in enumerate(running):
        assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.TEST
        verdict = "pass" if number else "fail"
        world.done(world.cloud.stop_test(who, "acme", test.id, StopTest(verdict=verdict, note="seen")))
        ended = world.cloud.test(who, "acme", test.id)
        assert (ended.status, ended.verdict, ended.uris, ended.verdict_note) == ("stopped", verdict, {}, "seen")
        assert ended.seconds >= 90
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING
    assert world.fabric.served == {}
    with pytest.raises(ConflictError):
        world.cloud.stop_test(who, "acme", running[0].id, StopTest())
    assert world.cloud.discard_tests(who, "acme", "erp", 3) == 3
    assert len(world.cloud.tests(who, "acme", "erp").items) == 1


def test_a_test_whose_stack_dies_fails_alone(world: World):
    """R14.7: the others go on."""
    who = world.principal("acme")
    world.protect(who)
    world.journal(SCOPE, 10)
    world.done(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[world.clock()] * 2)))
    first, second = world.cloud.tests(who, "acme").items
    del world.fabric.served[first.id]
    world.cloud.tending.look()
    assert (world.cloud.test(who, "acme", first.id).problem, world.cloud.test(who, "acme", second.id).status) == (
        "its stack has died",
        "running",
    )
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.TEST
    del world.fabric.served[second.id]
    world.cloud.tending.look()
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING


def test_tests_that_cannot_be_opened_leave_the_group_as_it_was(world: World):
    who = world.principal("acme")
    world.protect(who)
    world.fabric.broken["open_stacks"] = DrCloudError("no stack is idle", "Wait.")
    task = world.follow(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[world.clock()])))
    assert (task.completion, task.remedy) == (CompletionCode.FAILED, "Wait.")
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING
    task = world.follow(world.cloud.failover(who, "acme", "erp", FailoverRequest()))
    assert task.completion is CompletionCode.FAILED
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING
    assert {test.status for test in world.cloud.tests(who, "acme").items} == {"failed"}


def test_failover_and_rollback(world: World):
    """R10, R18: to the latest, to a checkpoint; rolled back, tests that ran go on."""
    who = world.principal("acme")
    world.protect(who)
    journal = world.journal(SCOPE, 10)
    world.done(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[world.clock()])))
    task = world.done(world.cloud.failover(who, "acme", "erp", FailoverRequest()))
    assert task.result["at_ns"] == journal[-1].time_ns
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.FAILOVER
    assert world.cloud.vpg_state(who, "acme", "erp") is VpgState.PROTECTED
    with pytest.raises(ConflictError):
        world.cloud.remove_vpg(who, "acme", "erp")
    world.done(world.cloud.rollback_failover(who, "acme", "erp"))
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.TEST
    task = world.done(world.cloud.failover(who, "acme", "erp", FailoverRequest(checkpoint=4)))
    assert task.result["at_ns"] == journal[4].time_ns
    failover = world.cloud.test(who, "acme", task.result["test"])
    assert (failover.kind, failover.status) == ("failover", "running")
    world.done(world.cloud.rollback_failover(who, "acme", "erp"))
    task = world.follow(world.cloud.failover(who, "acme", "erp", FailoverRequest(checkpoint=99)))
    assert task.completion is CompletionCode.FAILED


def test_lists_are_paged_and_filtered(world: World):
    who = world.principal("acme")
    for name in ("a", "b", "c"):
        world.protect(who, name)
    world.protect(world.principal("brit"), "b", "brit")
    first = world.cloud.vpgs(who, "acme", PageRequest(limit=2))
    second = world.cloud.vpgs(who, "acme", PageRequest(limit=2, cursor=first.next_cursor))
    assert [vpg.name for page in (first, second) for vpg in page.items] == ["a", "b", "c"]
    every, cursor = [], None
    while cursor is not None or not every:
        page = world.cloud.vpgs(SYSTEM, None, PageRequest(limit=1, cursor=cursor))
        every += [(vpg.enterprise, vpg.name) for vpg in page.items]
        cursor = page.next_cursor
    assert every == [("acme", "a"), ("acme", "b"), ("acme", "c"), ("brit", "b")]
    assert [v.name for v in world.cloud.vpgs(who, "acme", which=VpgFilter(name_begins="b")).items] == ["b"]
    assert world.cloud.vpgs(who, "acme", which=VpgFilter(target_site="uk-south")).items == []
    assert world.cloud.vpgs(who, "acme", which=VpgFilter(status=VpgStatus.TEST)).items == []
    for name in ("a\0", "\ud800", "x" * 70000):
        with pytest.raises((InvalidError, NotFoundError)):
            world.cloud.vpg(who, "acme", name)
        with pytest.raises((InvalidError, NotFoundError)):
            world.cloud.pause(who, "acme", name)
    for cursor in ("x", "W10", "WzFd", "\u00e9", "WyJcdWQ4MDAiXQ"):
        with pytest.raises(InvalidError):
            world.cloud.vpgs(who, "acme", PageRequest(cursor=cursor))


def test_reports_are_believed_only_of_whom_they_concern(world: World):
    """R11: a site cannot tell about another enterprise's groups, nor about those that it has no part in."""
    for name in ("acme", "brit"):
        world.protect(world.principal(name), enterprise=name)
    world.clock.pass_seconds(10)
    orders = world.cloud.orders_for("acme", "acme-hq")
    told = world._sources(orders, "forged")
    forged = [source.model_copy(update={"scope": Scope("brit", "erp", "dc1")}) for source in told]
    report = SiteReport(
        revision=9, time_ns=0, version="1", hosts=[HostReport(host="h1", vdsa="installed")], sources=forged
    )
    world.cloud.site_report("acme", "acme-hq", report)
    assert world.cloud.vpg(SYSTEM, "brit", "erp").targets[0].problem == ""
    with pytest.raises(NotFoundError):
        world.cloud.site_report("acme", "brit-hq", report)
