"""Drills: when they run, as whom, what they test, how they end, what is told of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud_databases import BOTH, new_world, postgres  # noqa: F401
from cloud_world import LAW, World, settings
from engine_world import ENTROPY, FSCK, SCOPE, furnish, until
from quiet_fabric import START_NS, probed

from dr_cloud.manager import tables
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.cloud import TokenRequest
from dr_cloud.model.decision import PolicyChange
from dr_cloud.model.errors import ConflictError, ForbiddenError, InvalidError, NotFoundError
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.recovery import Drill, DrillSettings, RecoveryTest, ReportQuery
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import VpgStatus
from dr_cloud.recovery.report import check_report

HOUR, DAY = 3600.0, 86400.0
HOURLY = DrillSettings(name="hourly", schedule="0 * * * *", probes=[FSCK, ENTROPY], note="as agreed")


@pytest.fixture(params=["sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    yield from new_world(request, tmp_path / "provider")


on_both = pytest.mark.parametrize("world", BOTH, indirect=True)


@pytest.fixture
def who(world: World) -> Principal:
    """Its administrator; the rounds are taken by hand."""
    world.cloud.drill_rounds.close()
    return furnish(world)


def put(world: World, who: Principal, **changes: object) -> Drill:
    made = DrillSettings.model_validate(HOURLY.model_dump() | changes)
    return world.cloud.put_drill(who, "acme", "erp", made)


def pass_seconds(world: World, seconds: float) -> None:
    """Let time pass; the target reports, and its journal has grown."""
    world.clock.pass_seconds(seconds)
    world.journal(SCOPE, 20)
    for data_center, host in world._concerned():
        world.report_host(data_center, host)


def look(world: World, who: Principal, name: str = "hourly") -> Drill:
    world.cloud.look_at_drills()
    return world.cloud.drill(who, "acme", "erp", name)


def listed(world: World, who: Principal) -> list[RecoveryTest]:
    return world.cloud.tests(who, "acme", "erp").items


def finished(world: World, who: Principal) -> Drill:
    """Let time pass until a run has ended; return the drill with its verdict."""
    until(world, lambda: all(test.stopped_ns is not None for test in listed(world, who)))
    return look(world, who)


def alerts(world: World, kind: str = "drill") -> dict[str, str]:
    world.cloud.monitor.judge()
    return {alert.subject: alert.message for alert in world.cloud.alerts(SYSTEM).items if alert.kind == kind}


@on_both
def test_a_drill_runs_when_it_is_due(world: World, who: Principal) -> None:
    """FIELD: scheduled drills with evidence. Once for each due time; every test by its probes; a signed report."""
    made = put(world, who, ages_seconds=[0, 7])
    assert made.next_ns is not None
    assert START_NS < made.next_ns <= START_NS + int(HOUR * SECOND_NS)
    assert made.next_ns % int(HOUR * SECOND_NS) == 0
    look(world, who)
    assert listed(world, who) == []
    pass_seconds(world, HOUR)
    begun = look(world, who)
    assert (begun.last_ns, begun.last_verdict, begun.problem) == (world.clock(), None, "")
    assert begun.next_ns == made.next_ns + int(HOUR * SECOND_NS)
    for _ in range(3):
        look(world, who)
    found = listed(world, who)
    assert sorted(begun.last_tests) == sorted(test.id for test in found)
    assert sorted(test.asked_ns for test in found) == [world.clock() - 7 * SECOND_NS, world.clock()]
    assert {(test.origin, test.note) for test in found} == {("drill/hourly", "as agreed")}
    assert finished(world, who).last_verdict == "pass"
    assert world.cloud.vpg(who, "acme", "erp").last_passed_test_ns == begun.last_ns
    whole = world.cloud.tests_report(who, "acme", ReportQuery(vpg="erp", drill="hourly"), "html").encode()
    report = check_report(whole, world.cloud.report_key().public)
    assert [test.verdict for test in report.tests] == ["pass", "pass"]
    assert report.tests[0].started_as == "drill"
    assert report.tests[0].data_center == "us-east"


def test_it_acts_as_whoever_made_it(world: World, who: Principal) -> None:
    """R13, R11: the place as stored, decisions and audit as for a person."""
    put(world, who)
    pass_seconds(world, HOUR)
    look(world, who)
    (test,) = listed(world, who)
    name = f"drill hourly of {who.name}"
    assert test.started_by == name
    entries = world.cloud.audit(who, "acme").items
    assert [(e.operation, e.principal, e.principal_name, e.outcome) for e in entries][:2] == [
        ("drill.run", who.id, name, "done"),
        ("drill.put", who.id, who.name, "done"),
    ]
    decision = next(d for d in world.cloud.decisions(who, "acme").items[::-1] if d.action == "test")
    assert decision.input["operator"] == {"role": "enterprise-admin", "jurisdiction": who.place}
    report = json.loads(world.cloud.test_report(who, "acme", test.id))["report"]
    assert decision.number in report["tests"][0]["decisions"]


@on_both
def test_what_is_killed_between_is_begun_once(world: World, who: Principal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' rows and the next due time are one transaction: there is no moment with one of them."""
    due = put(world, who).next_ns
    pass_seconds(world, HOUR)
    begin = world.cloud._begin_tests

    def killed(*arguments: object, **named: object) -> None:
        begin(*arguments, **named)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(world.cloud, "_begin_tests", killed)
    with pytest.raises(KeyboardInterrupt):
        world.cloud.look_at_drills()
    monkeypatch.undo()
    assert listed(world, who) == []
    assert world.cloud.drill(who, "acme", "erp", "hourly").next_ns == due
    world.restart()
    world.cloud.drill_rounds.close()
    look(world, who)
    world.restart()
    world.cloud.drill_rounds.close()
    look(world, who)
    assert len(listed(world, who)) == 1


def test_what_was_missed_is_made_good_or_noted(world: World, who: Principal) -> None:
    """A manager that was away begins the newest due time once when it is back, if that is no older than an hour."""
    due = put(world, who, schedule="0 9 * * *").next_ns
    assert due is not None
    pass_seconds(world, (due - world.clock()) / SECOND_NS + 5 * HOUR)
    back = look(world, who)
    assert listed(world, who) == []
    assert back.next_ns == due + int(DAY * SECOND_NS)
    assert "missed at 2027-01-15T09:00:00" in back.problem
    assert list(alerts(world)) == ["vpg/erp/drill/hourly"]
    pass_seconds(world, 3 * DAY - 4.1 * HOUR)
    back = look(world, who)
    assert len(listed(world, who)) == 1
    assert back.problem == ""
    assert back.next_ns == due + int(4 * DAY * SECOND_NS)


def test_of_many_missed_times_the_newest_is_begun(world: World, who: Principal) -> None:
    put(world, who, schedule="*/10 * * * *")
    pass_seconds(world, 5 * HOUR + 60)
    back = look(world, who)
    assert len(listed(world, who)) == 1
    assert back.problem == ""
    assert back.next_ns is not None
    assert 0 < back.next_ns - world.clock() <= 600 * SECOND_NS


def test_times_that_the_journal_does_not_hold_are_its_first(world: World, who: Principal) -> None:
    """The newest time minus the ages; two ages before the journal's beginning are one test, and its note says so."""
    put(world, who, ages_seconds=[0, 7 * DAY, 8 * DAY])
    pass_seconds(world, HOUR)
    look(world, who)
    horizon_ns = world.cloud.vpg(who, "acme", "erp").targets[0].horizon_ns
    assert horizon_ns == START_NS - int(HOUR * SECOND_NS)
    found = listed(world, who)
    assert sorted(test.asked_ns for test in found) == [horizon_ns, world.clock()]
    assert all("the journal does not hold 604800, 691200 s ago" in test.note for test in found)


def test_one_run_at_a_time(world: World, who: Principal) -> None:
    put(world, who, lifetime_seconds=5 * 3600)
    world.fabric.ended_max = 0
    pass_seconds(world, HOUR)
    first = look(world, who)
    until(world, lambda: listed(world, who)[0].status == "running")
    pass_seconds(world, HOUR)
    second = look(world, who)
    assert second.last_tests == first.last_tests
    assert "still under way" in second.problem
    with pytest.raises(ConflictError, match="still under way"):
        world.cloud.run_drill(who, "acme", "erp", "hourly")
    world.fabric.ended_max = 9
    assert finished(world, who).last_verdict == "pass"
    pass_seconds(world, HOUR)
    assert look(world, who).problem == ""
    assert len(listed(world, who)) == 2


def test_it_rests_while_the_group_is_failed_over(world: World, who: Principal) -> None:
    """R18: after a failover no test begins; due times pass by, and that is no problem."""
    put(world, who)
    with world.cloud._database.write("acme") as session:
        session.get_one(tables.Vpg, ("acme", "erp")).status = VpgStatus.NEED_REVERSE_CONFIGURATION.value
    pass_seconds(world, HOUR)
    resting = look(world, who)
    assert (resting.resting, resting.problem, resting.last_ns) == (True, "", None)
    assert resting.next_ns is not None
    assert resting.next_ns > world.clock()
    assert listed(world, who) == []
    assert alerts(world) == {}


def test_a_drill_that_fails_raises_an_alert_until_one_passes(world: World, who: Principal) -> None:
    """FIELD: an alert when a drill has failed or could not begin; the next one that passes clears it."""
    put(world, who, ages_seconds=[0, 7])
    pass_seconds(world, HOUR)
    world.fabric.answers[world.clock()] = [probed("fsck", "the file system is damaged"), probed("entropy")]
    look(world, who)
    assert alerts(world) == {}
    assert finished(world, who).last_verdict == "fail"
    assert list(alerts(world)) == ["vpg/erp/drill/hourly"]
    pass_seconds(world, HOUR)
    look(world, who)
    assert list(alerts(world)) == ["vpg/erp/drill/hourly"]  # while the next one goes on
    assert finished(world, who).last_verdict == "pass"
    assert alerts(world) == {}


def test_what_policy_denies_is_noted_and_tried_at_the_next_time(world: World, who: Principal) -> None:
    """R13: a drill whose maker may no longer test is a problem, an audit row, a decision; nothing is begun."""
    abroad = world.cloud.authenticate(
        world.cloud.create_token(
            SYSTEM, TokenRequest(name="abroad", role=Role.ENTERPRISE_ADMIN, enterprise="acme", place="UK")
        ).secret
    )
    put(world, abroad)
    world.cloud.apply_policies(SYSTEM, PolicyChange(regulation=LAW))
    pass_seconds(world, HOUR)
    refused = look(world, who)
    assert "policy denies it" in refused.problem
    assert refused.next_ns is not None
    assert refused.next_ns > world.clock()
    assert listed(world, who) == []
    entry = next(e for e in world.cloud.audit(who, "acme").items if e.operation == "drill.run")
    assert (entry.outcome, entry.principal_name) == ("denied", "drill hourly of abroad")
    assert list(alerts(world)) == ["vpg/erp/drill/hourly"]


def test_a_group_that_passes_no_test_for_long(world: World, who: Principal) -> None:
    """FIELD: a reminder when a group is overdue. It counts from the group's creation."""
    pass_seconds(world, 29 * DAY)
    assert alerts(world, "untested") == {}
    pass_seconds(world, 2 * DAY)
    assert "for 31 days" in alerts(world, "untested")["vpg/erp"]
    put(world, who)
    pass_seconds(world, HOUR)
    look(world, who)
    finished(world, who)
    assert alerts(world, "untested") == {}
    pass_seconds(world, 31 * DAY)
    assert list(alerts(world, "untested")) == ["vpg/erp"]


def test_settings_are_checked_and_replaced(world: World, who: Principal) -> None:
    for schedule in ("0 3 * *", "61 * * * *", "0 0 30 2 *", "* * * * * *", "@daily", "0 3 * * x"):
        with pytest.raises(InvalidError, match="no schedule"):
            put(world, who, schedule=schedule)
    with pytest.raises(InvalidError, match="two probes"):
        put(world, who, probes=[{"kind": "fsck", "name": "a"}, {"kind": "fsck", "name": "a"}])
    with pytest.raises(NotFoundError):
        put(world, who, target="nowhere")
    put(world, who)
    assert put(world, who, enabled=False).next_ns is None
    pass_seconds(world, 2 * HOUR)
    assert look(world, who).last_ns is None
    assert [drill.settings.name for drill in world.cloud.drills(who, "acme", "erp").items] == ["hourly"]
    world.done(world.cloud.run_drill(who, "acme", "erp", "hourly"))
    assert listed(world, who)[0].started_by == who.name
    world.cloud.remove_drill(who, "acme", "erp", "hourly")
    with pytest.raises(NotFoundError, match="hourly"):
        world.cloud.drill(who, "acme", "erp", "hourly")
    assert len(listed(world, who)) == 1


def test_drills_are_the_tenants_own(world: World, who: Principal) -> None:
    """R11, R12: another enterprise sees none; an auditor reads and changes nothing; who removes a group, its drills."""
    put(world, who)
    other, auditor = world.principal("brit"), world.principal("acme", Role.AUDITOR)
    for call in (world.cloud.drill, world.cloud.run_drill, world.cloud.remove_drill):
        with pytest.raises(NotFoundError, match="acme"):
            call(other, "acme", "erp", "hourly")
    assert world.cloud.drill(auditor, "acme", "erp", "hourly").created_by == who.name
    for call in (world.cloud.run_drill, world.cloud.remove_drill):
        with pytest.raises(ForbiddenError):
            call(auditor, "acme", "erp", "hourly")
    with pytest.raises(ForbiddenError):
        world.cloud.put_drill(auditor, "acme", "erp", HOURLY)
    world.done(world.cloud.remove_vpg(who, "acme", "erp"))
    world.done(world.cloud.create_vpg(who, "acme", settings()))
    assert world.cloud.drills(who, "acme", "erp").items == []


def test_one_enterprises_trouble_does_not_keep_the_others_back(world: World, who: Principal) -> None:
    """R12: the drills of all enterprises are begun by one round."""
    put(world, who)
    world.protect(world.principal("brit"), enterprise="brit")
    world.cloud.put_drill(world.principal("brit"), "brit", "erp", HOURLY)
    with world.cloud._database.write("acme") as session:
        session.get_one(tables.Drill, ("acme", "erp", "hourly")).maker = {}  # of which nothing can be made
    pass_seconds(world, HOUR)
    world.cloud.look_at_drills()
    assert [test.enterprise for test in world.cloud.tests(SYSTEM, "brit").items] == ["brit"]
    assert world.cloud.tests(SYSTEM, "acme").items == []
