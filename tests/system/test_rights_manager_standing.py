"""R13: what was allowed is judged again: stopped within seconds when it no longer is, and freed when it is again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from cloud_databases import new_world, postgres  # noqa: F401
from cloud_world import BACK, BRIDGE, LAW, OPEN_LAW
from rights_world import BRITS, UK, US, RightsWorld, on_both, target, to, until

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.decision import PolicyChange
from dr_cloud.model.errors import DeniedError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest
from dr_cloud.model.replication import SourceOrders
from dr_cloud.model.rights import GRACE_SECONDS, Regulation
from dr_cloud.model.units import SECOND_NS, format_time


@pytest.fixture(params=["sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RightsWorld]:
    yield from new_world(request, tmp_path / "provider", RightsWorld)


def sources(world: RightsWorld, enterprise: str = "acme") -> dict[Scope, SourceOrders]:
    return {order.scope: order for order in world.cloud.orders_for(enterprise, f"{enterprise}-hq").sources}


def held(world: RightsWorld, center: str) -> list[Scope]:
    return [order.scope for order in world.cloud.host_orders(center, "h1").targets]


def alerts(world: RightsWorld, enterprise: str | None = None) -> dict[str, str]:
    world.cloud.monitor.judge()
    return {a.subject: a.message for a in world.cloud.alerts(SYSTEM, enterprise).items if a.kind == "rights"}


def running(world: RightsWorld, name: str) -> RecoveryTest:
    """Start a test of acme's at a target; return it."""
    who = world.principal("acme")
    request = TestsRequest(target=name, times_ns=[world.fabric.journals[UK][-1].time_ns])
    task = world.done(world.cloud.start_tests(who, "acme", "erp", request))
    return world.cloud.test(SYSTEM, "acme", task.result["tests"][0])


@on_both
def test_a_policy_change_stops_the_right_targets_in_five_seconds(world: RightsWorld):
    """R13: the right ones stop, with the reason; the others do not notice; allowed again, they go on by delta."""
    who = world.principal("acme")
    world.two_targets(who)
    world.protect(world.principal("brit"), enterprise="brit", targets=[target("us", "us-east")])
    numbers = {scope: order.sync_number for scope, order in sources(world).items()}
    world.law(LAW)
    until(lambda: world.denied(UK), 20)  # far below the minute after which all is judged anyhow
    assert world.denied(UK) == "uk-south lies in UK: nothing opens USA to UK"
    until(lambda: sources(world)[UK].paused, 20)
    assert sources(world)[UK].paused == f"policy denies it: {world.denied(UK)}"
    until(lambda: held(world, "uk-south") == [], 20)
    assert sources(world)[US].paused == "" == sources(world, "brit")[BRITS].paused
    until(lambda: sorted(held(world, "us-east")) == [US, BRITS], 20)
    vpg = world.cloud.vpg(who, "acme", "erp")
    assert {t.name: bool(t.denied) for t in vpg.targets} == {"us": False, "uk": True}
    assert vpg.paused == ""
    told = ("uk-south", "h1")
    until(lambda: told in world.fabric.asked("host_orders_changed"), 20)
    until(lambda: set(alerts(world, "acme")) == {"vpg/erp/uk"}, 20)
    stops = [d for d in world.decisions() if d.point == "standing"]
    assert [(d.subject, d.allow) for d in stops] == [("vpg/erp/uk", False)] * len(stops)
    assert stops
    world.law(OPEN_LAW)
    until(lambda: not world.denied(UK), 20)  # far below the minute after which all is judged anyhow
    until(lambda: held(world, "uk-south") == [UK], 20)
    assert sources(world)[UK].paused == ""
    assert {scope: order.sync_number for scope, order in sources(world).items()} == numbers
    until(lambda: alerts(world, "acme") == {}, 20)
    assert [d.allow for d in world.decisions() if d.point == "standing"][-2:] == [True, True]
    assert world.cloud.verify_decisions(SYSTEM, "acme").whole


def test_a_revision_counts_as_judged_only_if_the_answers_name_it(world: RightsWorld, monkeypatch: pytest.MonkeyPatch):
    """R13: the rights manager says that it has come to new policies, answers by the old ones, and then by the new."""
    world.two_targets(world.principal("acme"))
    world.cloud.standing.close()
    before = world.cloud._context.policies.in_force()
    world.law(LAW)
    state = world.rights.state()
    with monkeypatch.context() as patch:
        patch.setattr(world.rights, "state", lambda: state)
        world.rights.put_sources(before)
        world.look()
        assert world.denied(UK) == ""
        world.rights.put_sources(world.cloud._context.policies.in_force())
        world.look()
    assert world.denied(UK) == "uk-south lies in UK: nothing opens USA to UK"


def test_what_could_not_be_carried_out_is_tried_again(world: RightsWorld, monkeypatch: pytest.MonkeyPatch):
    """R13: the database fails just when a target is to be stopped."""
    world.two_targets(world.principal("acme"))
    world.cloud.standing.close()
    world.law(LAW)
    with monkeypatch.context() as patch:
        patch.setattr("dr_cloud.manager.standing.append", Mock(side_effect=OSError("the disk is full")))
        with pytest.raises(OSError, match="full"):
            world.look()
    assert world.denied(UK) == ""
    world.look()
    assert world.denied(UK) == "uk-south lies in UK: nothing opens USA to UK"


def test_a_mechanism_that_ends_closes_what_it_opened(world: RightsWorld):
    """R13: an adequacy decision passes its date, under the same revision; another begins."""
    now_ns = world.clock()
    ends = {**BRIDGE, "valid_until": format_time(now_ns + 100 * SECOND_NS)}
    begins = {**BRIDGE, "reference": "next", "valid_from": format_time(now_ns + 200 * SECOND_NS)}
    world.law(Regulation.model_validate(LAW.model_dump(by_alias=True) | {"mechanisms": [ends, begins, BACK]}))
    world.two_targets(world.principal("acme"))
    world.clock.now_ns = now_ns + 99 * SECOND_NS
    world.look()
    assert world.denied(UK) == ""
    hosts, sites = len(world.fabric.asked("host_orders_changed")), len(world.fabric.asked("orders_changed"))
    world.clock.now_ns = now_ns + 100 * SECOND_NS
    world.look()
    assert "nothing opens USA to UK" in world.denied(UK)
    assert ("uk-south", "h1") in world.fabric.asked("host_orders_changed")[hosts:]
    assert world.fabric.asked("orders_changed")[sites:] == [("acme", "acme-hq")]
    world.clock.now_ns = now_ns + 200 * SECOND_NS
    world.look()
    assert world.denied(UK) == ""


def test_a_grant_ends_with_its_ground(world: RightsWorld):
    """R13: what the orders carry never outlives the mechanism it rests on."""
    ends_s = world.clock() // SECOND_NS + 100
    ends = {**BRIDGE, "valid_until": format_time(ends_s * SECOND_NS)}
    world.law(Regulation.model_validate(LAW.model_dump(by_alias=True) | {"mechanisms": [ends, BACK]}))
    world.protect(SYSTEM, targets=[target("uk", "uk-south")])
    world.clock.now_ns = ends_s * SECOND_NS
    assert world.cloud.host_orders("uk-south", "h1").targets == []


@on_both
def test_a_running_test_is_stopped_and_goes_on(world: RightsWorld):
    """R13.3: its stack answers nothing until it is allowed again; others go on; one that is not heard is told again."""
    world.two_targets(world.principal("acme"))
    here, there = running(world, "us"), running(world, "uk")
    world.look()
    world.fabric.broken["pause_stack"] = UnavailableError("the stack does not answer now")
    world.law(LAW)
    world.look()
    shown = world.cloud.test(SYSTEM, "acme", there.id)
    assert shown.status == "running"
    assert "nothing opens USA to UK" in shown.denied
    assert world.fabric.paused == {}
    del world.fabric.broken["pause_stack"]
    world.look()
    assert world.fabric.paused == {there.id: shown.denied}
    assert world.cloud.test(SYSTEM, "acme", here.id).denied == ""
    world.law(OPEN_LAW)
    world.look()
    assert world.fabric.paused == {}
    assert world.cloud.test(SYSTEM, "acme", there.id).denied == ""
    world.law(LAW)
    world.look()
    stopped = world.done(world.cloud.stop_test(SYSTEM, "acme", there.id, StopTest(verdict="fail")))
    assert stopped.result == {"test": there.id}


def test_a_restarted_manager_tells_stacks_what_it_finds(world: RightsWorld):
    """R13.3: what was stopped stays so; a stack that missed its word hears it from the next manager."""
    world.two_targets(world.principal("acme"))
    here, there = running(world, "us"), running(world, "uk")
    world.law(LAW)
    world.look()
    world.fabric.paused = {here.id: "left over"}
    world.restart()
    world.look()
    assert set(world.fabric.paused) == {there.id}


@on_both
def test_a_link_that_is_no_longer_allowed_is_closed(world: RightsWorld):
    """R13.1: and let in again when it is."""
    serial = world.pair("isle", "isle-hq")
    bridge = BRIDGE | {"from": "BR", "to": "USA"}
    open_to_isle = Regulation.model_validate(LAW.model_dump(by_alias=True) | {"mechanisms": [bridge]})
    world.law(open_to_isle)
    world.cloud.site_connected("isle", "isle-hq", serial)
    before = len(world.fabric.asked("disconnect"))
    world.law(LAW)
    world.look()
    assert world.fabric.asked("disconnect")[before:] == [("isle", "isle-hq")]
    assert not world.cloud.certificate_ok(serial)
    site = world.cloud.site(SYSTEM, "isle", "isle-hq")
    assert (site.connected, bool(site.denied)) == (False, True)
    assert set(alerts(world, "isle")) == {"site/isle-hq"}
    world.law(open_to_isle)
    world.look()
    assert world.cloud.certificate_ok(serial)
    assert world.cloud.site(SYSTEM, "isle", "isle-hq").denied == ""


def test_what_stays_as_it_is_is_not_written(world: RightsWorld):
    """R13: only what stops or frees something; a minute of rest adds nothing to any record."""
    world.two_targets(world.principal("acme"))
    world.look()
    before = {name: world.decisions(name) for name in ("acme", "brit", "isle")}
    for _ in range(4):
        world.clock.pass_seconds(61)
        world.look()
    assert {name: world.decisions(name) for name in before} == before


@on_both
def test_without_an_answer_nothing_new_begins_and_what_stands_goes_on(world: RightsWorld):
    """R13: no answer is a no to what is new; what stands goes on for a while, with an alert; then it stops too."""
    who = world.principal("acme")
    world.two_targets(who)
    serial = world.pair("acme", "acme-hq")
    world.cloud.site_connected("acme", "acme-hq", serial)
    test = running(world, "uk")
    world.look()
    world.law(OPEN_LAW)
    world.look()
    (granted,) = world.cloud.host_orders("uk-south", "h1").targets
    world.engine.mute = True
    world.clock.pass_seconds(3)
    world.look()
    for act in (
        lambda: world.cloud.create_vpg(who, "acme", to("us-east", name="crm")),
        lambda: world.cloud.start_tests(who, "acme", "erp", TestsRequest(target="us", times_ns=[world.clock()])),
        lambda: world.cloud.checkpoints(who, "acme", "erp", "us"),
        lambda: world.cloud.pause(who, "acme", "erp"),
    ):
        with pytest.raises(DeniedError) as told:
            act()
        assert told.value.revision == ""
        assert "does not answer" in told.value.reasons[0]
        assert world.decisions()[-1].revision == ""
    assert alerts(world)["rights"] == "the engine does not answer"
    assert world.denied(UK) == world.denied(US) == ""
    assert world.cloud.site_connected("acme", "acme-hq", serial).sources  # a link that was cut comes back
    assert world.cloud.route(UK).grant == granted.grant  # and its streams
    assert world.cloud.host_orders("uk-south", "h1").targets == [granted]
    assert world.fabric.paused == {}
    last = world.decisions()[-1]
    assert (last.allow, last.revision) == (True, world.cloud.policies(SYSTEM).items[0].revision)
    assert "no engine answers; allowed at" in last.reasons[-1]
    world.clock.pass_seconds(GRACE_SECONDS)
    world.look()
    assert "does not answer" in world.denied(UK)
    assert "does not answer" in world.denied(US)
    assert set(world.fabric.paused) == {test.id}
    with pytest.raises(DeniedError):
        world.cloud.route(US)
    world.engine.mute = False
    world.look()
    assert world.denied(UK) == world.denied(US) == ""
    assert world.fabric.paused == {}
    assert "rights" not in alerts(world)
    assert world.cloud.verify_decisions(SYSTEM, "acme").whole


def test_a_manager_that_begins_without_an_answer_stops_nothing(world: RightsWorld):
    """R13: it has no memory of a yes; what stands is left for a while, what was stopped stays stopped."""
    world.two_targets(world.principal("acme"))
    world.law(LAW)
    world.look()
    assert world.denied(UK)
    world.engine.mute = True
    world.restart()
    world.look()
    assert world.denied(US) == ""
    assert world.denied(UK)
    world.clock.pass_seconds(GRACE_SECONDS + 1)
    world.look()
    assert world.denied(US)
    world.engine.mute = False
    world.look()
    assert world.denied(US) == ""
    assert world.denied(UK)


@on_both
def test_what_if_lists_exactly_what_would_change(world: RightsWorld):
    """R13: before the change: what it would cut off, and what it would free; nothing is changed by asking."""
    world.two_targets(world.principal("acme"))
    test = running(world, "uk")
    world.pair("isle", "isle-hq")
    world.pair("acme", "acme-hq")
    world.look()
    admin = SYSTEM
    before = world.decisions()
    found = world.cloud.what_if(admin, PolicyChange(regulation=LAW))
    assert {(one.kind, one.enterprise, one.subject, one.before, one.after) for one in found} == {
        ("vpg", "acme", "erp/uk", True, False),
        ("test", "acme", test.id, True, False),
    }
    assert all("nothing opens USA to UK" in one.reasons[0] for one in found)
    bridge = BRIDGE | {"from": "BR", "to": "USA"}
    wider = Regulation.model_validate(LAW.model_dump(by_alias=True) | {"mechanisms": [BRIDGE, BACK, bridge]})
    (freed,) = world.cloud.what_if(admin, PolicyChange(regulation=wider))
    assert (freed.kind, freed.enterprise, freed.subject, freed.after) == ("link", "isle", "isle-hq", True)
    assert world.cloud.what_if(admin, PolicyChange(regulation=OPEN_LAW)) == []
    assert world.decisions() == before
    assert len(world.cloud.policies(SYSTEM).items) == 1
    world.look()
    assert world.denied(UK) == ""


def test_a_group_in_recovery_or_removed_is_left_alone(world: RightsWorld):
    """What is in nobody's orders is not judged; removing a stopped group works."""
    who = world.principal("acme")
    world.two_targets(who)
    world.law(LAW)
    world.look()
    world.done(world.cloud.remove_vpg(who, "acme", "erp"))
    world.look()
    assert world.cloud.vpgs(who, "acme").items == []
