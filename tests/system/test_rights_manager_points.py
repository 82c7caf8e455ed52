"""R13: every point asks the rights manager, and goes on only with a yes that is on record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud_databases import new_world, postgres  # noqa: F401
from cloud_world import LAW, OPEN_LAW
from rights_world import UK, US, RightsWorld, on_both, target, to
from sqlalchemy import select

from dr_cloud.manager import tables
from dr_cloud.manager.access import ASKED, OF_OWN_PEOPLE
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import CheckpointOrder, LogRequest, SiteUpdate, TokenRequest, VdsaDeployment
from dr_cloud.model.decision import Decision
from dr_cloud.model.errors import DeniedError, DrCloudError, ForbiddenError
from dr_cloud.model.principal import Role
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.recovery import CleanRequest, DrillSettings, FailoverRequest, StopTest, TestsRequest
from dr_cloud.model.rights import Action
from dr_cloud.model.vpg import ProtectedServer
from dr_cloud.rights import grant


@pytest.fixture(params=["sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RightsWorld]:
    yield from new_world(request, tmp_path / "provider", RightsWorld)


def refused(world: RightsWorld, act: Callable[[], Any], enterprise: str = "acme") -> tuple[DeniedError, list[Decision]]:
    """See that an act is denied; return the error, and what was written."""
    before = len(world.decisions(enterprise))
    with pytest.raises(DeniedError) as told:
        act()
    written = world.later(before, enterprise)
    assert written, "the denial is not on record"
    assert all(not decision.allow for decision in written)
    assert [decision.revision for decision in written] == [told.value.revision] * len(written)
    assert (
        told.value.reasons == [reason for decision in written for reason in decision.reasons][: len(told.value.reasons)]
    )
    return told.value, written


@pytest.mark.parametrize(
    ("site", "datastore", "reason"),
    [
        ("apac-1", "ds-1", "apac-1 lies in APAC: nothing opens USA to APAC"),
        ("us-west", "abroad", "datastore abroad of us-west lies in APAC: nothing opens USA to APAC"),
        ("us-keys", "ds-1", "the key of us-keys is held in APAC: nothing opens USA to APAC"),
    ],
    ids=["data center", "bucket", "key"],
)
def test_a_group_is_created_only_where_its_data_may_go(world: RightsWorld, site: str, datastore: str, reason: str):
    """R13.1, R13.3: the place of the data center, of the bucket and of the key; nothing is left of what was denied."""
    who = world.principal("acme")
    error, written = refused(world, lambda: world.cloud.create_vpg(who, "acme", to(site, datastore)))
    assert error.reasons == [reason]
    assert error.open == ["us-east", "uk-south", "us-west"]
    assert {d.point for d in written} == {"vpg"}
    assert {d.action for d in written} <= {"replicate", "keep"}
    assert world.cloud.vpgs(who, "acme").items == []
    assert [(e.outcome, e.operation) for e in world.cloud.audit(who).items if e.operation == "vpg.create"] == [
        ("denied", "vpg.create")
    ]
    made = world.written(lambda: world.cloud.create_vpg(who, "acme", to("us-east")))
    assert [(d.point, d.action, d.allow, d.subject) for d in made] == [
        ("operator", "operate", True, "vpg erp"),
        ("vpg", "replicate", True, "vpg/erp"),
        ("vpg", "keep", True, "vpg/erp"),
    ]


def test_owners_open_no_door(world: RightsWorld):
    """R13.1: enterprises of one owner are blocked all the same."""
    assert world.cloud.enterprise(SYSTEM, "acme").owner == world.cloud.enterprise(SYSTEM, "brit").owner == "one"
    world.law(LAW)
    for enterprise in ("acme", "brit"):
        settings = to("uk-south", source_site=f"{enterprise}-hq")
        refused(world, lambda e=enterprise, s=settings: world.cloud.create_vpg(SYSTEM, e, s), enterprise)


def test_a_territory_binds_place_bucket_and_key(world: RightsWorld):
    """R13.2: the choice of a target is checked against the group's territory."""
    who = world.principal("acme")
    error, _ = refused(world, lambda: world.cloud.create_vpg(who, "acme", to("uk-south", territory=["USA"])))
    assert "outside of the territory USA" in error.reasons[0]
    world.protect(who, targets=[target("dr", "uk-south")], territory=["UK", "USA"])


def test_a_pool_is_used_where_it_may_be(world: RightsWorld):
    """R13.3: of a pool over a border, only what lies on this side is chosen."""
    who = world.principal("acme")
    world.protect(who, targets=[target("dr", "us-west", "mixed")])
    (order,) = world.cloud.host_orders("us-west", "h1").targets
    assert order.store.endswith("/near")
    with world.cloud._database.write(EVERYONE) as session:  # the near one is full: the far one would be chosen
        session.scalars(select(tables.VpgTarget)).one().journal_bytes = 1 << 60
    world.protect(who, "crm", targets=[target("dr", "us-west", "mixed")], servers=[{"name": "web"}])
    assert {order.store[-5:] for order in world.cloud.host_orders("us-west", "h1").targets} == {"/near"}


@on_both
def test_a_group_is_changed_only_to_what_is_allowed(world: RightsWorld):
    """R13.1: also by a target that was allowed when it was made; the way out is to remove it."""
    who = world.principal("acme")
    world.protect(who, targets=[target("us", "us-east")])
    settings = world.cloud.vpg(who, "acme", "erp").settings
    both = settings.model_copy(update={"targets": to("apac-1").targets + settings.targets})
    refused(world, lambda: world.cloud.update_vpg(who, "acme", "erp", both))
    uk = settings.model_copy(update={"targets": to("uk-south").targets + settings.targets})
    world.done(world.cloud.update_vpg(who, "acme", "erp", uk))
    world.law(LAW)
    for act in (
        lambda: world.cloud.add_server(who, "acme", "erp", ProtectedServer(name="new")),
        lambda: world.cloud.remove_server(who, "acme", "erp", "web"),
    ):
        _, written = refused(world, act)
        assert {d.input["target"] for d in written} == {"dr"}
    assert [server.name for server in world.cloud.vpg(who, "acme", "erp").settings.servers] == ["db", "web"]
    world.done(world.cloud.update_vpg(who, "acme", "erp", settings))


@on_both
def test_tests_and_failovers_run_where_they_may(world: RightsWorld):
    """R13.3: test placement, failover."""
    who = world.principal("acme")
    world.two_targets(who)
    tests = TestsRequest(target="uk", times_ns=[world.clock()])
    for act, point, action in (
        (lambda: world.cloud.start_tests(who, "acme", "erp", tests), "stack", "test"),
        (lambda: world.cloud.failover(who, "acme", "erp", FailoverRequest(target="uk")), "failover", "failover"),
    ):
        world.law(LAW)
        error, written = refused(world, act)
        assert [(d.point, d.action) for d in written] == [(point, action)]
        assert "us-east" in error.open
        assert world.cloud.tests(who, "acme").items == []
        world.law(OPEN_LAW)
        made = world.written(act)
        assert [(d.point, d.action, d.allow) for d in made] == [(point, action, True)]
        (test,) = world.cloud.tests(who, "acme").items
        world.done(world.cloud.wait_task(who, test.task))
        if test.kind == "test":
            world.done(world.cloud.stop_test(who, "acme", test.id, StopTest()))
            world.cloud.discard_tests(who, "acme", "erp", 1)


@on_both
def test_frames_flow_only_where_they_may(world: RightsWorld):
    """R13.1: at the connector, which a forged client reaches without the API."""
    world.two_targets(world.principal("acme"))
    (first,) = [d for d in world.written(lambda: world.cloud.route(UK)) if d.action == "replicate"]
    assert (first.point, first.subject, first.allow) == ("frames", "vpg/erp/uk", True)
    world.law(LAW)
    _, written = refused(world, lambda: world.cloud.route(UK))
    assert {d.point for d in written} == {"frames"}
    assert world.cloud.route(US).site == "us-east"


def test_a_route_and_orders_carry_the_grant(world: RightsWorld):
    """R13.1: the store path is closed without the rights manager's signature, which names scope, place and store."""
    world.two_targets(world.principal("acme"))
    route = world.cloud.route(UK)
    public, now_s = world.rights.public_key, world.clock() // 10**9
    checked = grant.verify(route.grant, public, UK, "uk-south", route.store, now_s)
    assert now_s + 600 < checked.until_s <= now_s + 900
    (order,) = world.cloud.host_orders("uk-south", "h1").targets
    assert order.grant == route.grant
    for scope, center in ((US, "uk-south"), (UK, "us-east")):
        with pytest.raises(DrCloudError):
            grant.verify(route.grant, public, scope, center, route.store, now_s)
    assert route.grant not in repr(route)
    assert order.grant not in repr(order)


def test_orders_are_cheap_and_grants_are_renewed(world: RightsWorld, monkeypatch: pytest.MonkeyPatch):
    """R13: a grant is kept for a third of its life, and not beyond a new revision."""
    world.two_targets(world.principal("acme"))
    asked: list[int] = []
    inner = world.rights.grant
    monkeypatch.setattr(world.rights, "grant", lambda wanted: asked.append(len(wanted)) or inner(wanted))

    def orders() -> str:
        (order,) = world.cloud.host_orders("uk-south", "h1").targets
        return order.grant

    first = orders()
    asked.clear()
    for _ in range(20):
        assert orders() == first
    assert asked == []
    world.clock.pass_seconds(299)
    assert orders() == first
    world.clock.pass_seconds(2)
    second = orders()
    assert second != first
    assert asked == [1]
    world.law(LAW)
    world.cloud._context.desk.state()  # as each look does
    assert world.cloud.host_orders("uk-south", "h1").targets == []
    world.law(OPEN_LAW)
    world.cloud._context.desk.state()
    assert orders() not in (first, second, "")


@on_both
def test_a_site_connects_only_where_it_may(world: RightsWorld):
    """R13.1: at the door, and afterwards its certificate is refused."""
    serial = world.pair("isle", "isle-hq")
    assert world.cloud.certificate_ok(serial)
    _, written = refused(world, lambda: world.cloud.site_connected("isle", "isle-hq", serial), "isle")
    assert [(d.point, d.action, d.subject) for d in written] == [("connector", "connect", "site/isle-hq")]
    assert not world.cloud.certificate_ok(serial)
    site = world.cloud.site(world.principal("isle"), "isle", "isle-hq")
    assert not site.connected
    assert "no data center is open" in site.denied
    world.law(OPEN_LAW.model_copy(update={"mechanisms": [*OPEN_LAW.mechanisms, *opened("BR", "USA")]}))
    (yes,) = world.written(lambda: world.cloud.site_connected("isle", "isle-hq", serial), "isle")
    assert yes.allow
    assert world.cloud.certificate_ok(serial)


def opened(origin: str, place: str) -> list[Any]:
    bridge = OPEN_LAW.mechanisms[0]
    return [type(bridge).model_validate(bridge.model_dump(by_alias=True) | {"from": origin, "to": place})]


@on_both
def test_who_sits_elsewhere_reads_nothing(world: RightsWorld):
    """R13.3: access from a third country is a transfer: checkpoints, writes, images, logs."""
    here, far = world.principal("acme"), world.person("acme", Role.ENTERPRISE_ADMIN, "APAC")
    world.two_targets(here)
    world.done(world.cloud.start_tests(here, "acme", "erp", TestsRequest(target="us", times_ns=[world.clock()])))
    (test,) = world.cloud.tests(here, "acme").items
    assert test.uris
    logs = world.done(world.cloud.collect_logs(here, "acme", LogRequest(site="acme-hq")))
    made = world.cloud.insert_checkpoint(here, "acme", "erp", CheckpointOrder(tag="t"))
    assert world.cloud.inserted_checkpoint(far, "acme", "erp", made.id).arrived == {}
    arrived = world.fabric.journals[US][-1].model_copy(update={"request": "request-1"})
    world.fabric.journals[US].append(arrived)
    before = len(world.fabric.asked("writes"))
    for act, point, action in (
        (lambda: world.cloud.checkpoints(far, "acme", "erp", "us"), "read", "read"),
        (lambda: world.cloud.writes(far, "acme", "erp", "us"), "read", "read"),
        (lambda: world.cloud.inserted_checkpoint(far, "acme", "erp", made.id), "read", "read"),
        (lambda: world.cloud.collect_logs(far, "acme", LogRequest(site="acme-hq")), "logs", "logs"),
        (lambda: world.cloud.log_archive(far, logs.id), "logs", "logs"),
    ):
        error, written = refused(world, act)
        assert error.reasons == ["the person sits in APAC: nothing opens USA to APAC"]
        assert [(d.point, d.action) for d in written] == [(point, action)]
        assert written[0].input["operator"] == {"role": "enterprise-admin", "jurisdiction": "APAC"}
    assert len(world.fabric.asked("writes")) == before
    for seen in (world.cloud.test(far, "acme", test.id), world.cloud.tests(far, "acme").items[0]):
        assert seen.uris == {}
        assert "the person sits in APAC" in seen.denied
        assert seen.status == "running"
    assert [d.allow for d in world.decisions()][-2:] == [False, False]
    for act in (
        lambda: world.cloud.checkpoints(here, "acme", "erp", "us"),
        lambda: world.cloud.test(here, "acme", test.id),
        lambda: world.cloud.log_archive(here, logs.id),
    ):
        (yes,) = world.written(act)
        assert yes.allow


def acts(world: RightsWorld, test: str, task: str) -> dict[str, Callable[[Any], Any]]:
    """Return by operation of the table a call of it, by somebody, on acme's things."""
    cloud = world.cloud
    settings = cloud.vpg(SYSTEM, "acme", "erp").settings
    spare = TokenRequest(name="spare", role=Role.AUDITOR, enterprise="acme")
    token = cloud.create_token(SYSTEM, spare).token.id
    drill = DrillSettings(name="d", schedule="0 3 * * 1", target="us", probes=[ProbeSpec(kind="entropy")])
    cloud.put_drill(SYSTEM, "acme", "erp", drill)
    search = CleanRequest(target="us", since_ns=1, until_ns=2, probes=drill.probes)
    return {
        "vpg.create": lambda who: cloud.create_vpg(who, "acme", to("us-east", name="new")),
        "vpg.update": lambda who: cloud.update_vpg(who, "acme", "erp", settings),
        "vpg.remove": lambda who: cloud.remove_vpg(who, "acme", "erp"),
        "vpg.pause": lambda who: cloud.pause(who, "acme", "erp"),
        "vpg.resume": lambda who: cloud.resume(who, "acme", "erp"),
        "vpg.sync": lambda who: cloud.force_sync(who, "acme", "erp"),
        "checkpoint.insert": lambda who: cloud.insert_checkpoint(who, "acme", "erp", CheckpointOrder(tag="t")),
        "checkpoint.read": lambda who: cloud.checkpoints(who, "acme", "erp", "us"),
        "failover.start": lambda who: cloud.failover(who, "acme", "erp", FailoverRequest(target="us")),
        "failover.commit": lambda who: cloud.commit_failover(who, "acme", "erp"),
        "failover.release": lambda who: cloud.release_failover(who, "acme", "erp"),
        "failover.rollback": lambda who: cloud.rollback_failover(who, "acme", "erp"),
        "test.start": lambda who: cloud.start_tests(who, "acme", "erp", TestsRequest(target="us", times_ns=[1])),
        "test.stop": lambda who: cloud.stop_test(who, "acme", test, StopTest()),
        "test.discard": lambda who: cloud.discard_tests(who, "acme", "erp", 1),
        "clean.find": lambda who: cloud.find_clean(who, "acme", "erp", search),
        "drill.put": lambda who: cloud.put_drill(who, "acme", "erp", drill),
        "drill.run": lambda who: cloud.run_drill(who, "acme", "erp", "d"),
        "drill.remove": lambda who: cloud.remove_drill(who, "acme", "erp", "d"),
        "task.abort": lambda who: cloud.abort_task(who, task),
        "logs.collect": lambda who: cloud.collect_logs(who, "acme", LogRequest(site="acme-hq")),
        "site.update": lambda who: cloud.update_site(who, "acme", "acme-hq", SiteUpdate(location="x")),
        "site.pair": lambda who: cloud.create_pairing(who, "acme", "acme-hq"),
        "site.unpair": lambda who: cloud.unpair(who, "acme", "acme-hq"),
        "vdsa.deploy": lambda who: cloud.deploy_vdsa(who, "acme", "acme-hq", "h1", VdsaDeployment()),
        "token.create": lambda who: cloud.create_token(
            who, TokenRequest(name="x", role=Role.AUDITOR, enterprise="acme")
        ),
        "token.revoke": lambda who: cloud.revoke_token(who, token),
        "vdsa.undeploy": lambda who: cloud.undeploy_vdsa(who, "acme", "acme-hq", "h1"),
    }


def test_an_operator_acts_only_from_where_it_may(world: RightsWorld):
    """R13.3: every operation on an enterprise's protection asks where the person sits; who does not say it, may not."""
    here = world.principal("acme")
    world.two_targets(here)
    task = world.done(world.cloud.start_tests(here, "acme", "erp", TestsRequest(target="us", times_ns=[world.clock()])))
    calls = acts(world, task.result["tests"][0], task.id)
    elsewhere = {"test.read", "test.attach", "logs.read"}
    assert set(calls) | elsewhere == set(ASKED)
    nowhere = world.person(None, Role.PROVIDER_ADMIN, None).model_copy(update={"place": ""})
    far = world.person("acme", Role.ENTERPRISE_ADMIN, "BR")
    for operation, call in calls.items():
        for who in (far,) if operation in OF_OWN_PEOPLE else (nowhere, far):
            error, written = refused(world, lambda c=call, w=who: c(w))
            assert "person sits" in error.reasons[0], operation
            assert written[0].action == ASKED[operation].value, operation
            assert (written[0].point == "operator") == (ASKED[operation] is Action.OPERATE)
    assert world.cloud.vpg(here, "acme", "erp").paused == ""
    assert [call[0] for call in world.fabric.calls].count("close_stack") == 0
    world.cloud.pause(here, "acme", "erp")


def test_where_people_sit(world: RightsWorld):
    """R13.3: an enterprise's people at its home unless told; the provider's first where it says; others nowhere."""
    assert world.principal("acme").place == "USA"
    assert world.principal("isle").place == "BR"
    assert world.person("acme", Role.AUDITOR, "UK").place == "UK"
    first = world.principal(None, Role.PROVIDER_ADMIN)
    assert first.place == "USA"
    request = TokenRequest(name="x", role=Role.PROVIDER_OPERATOR)
    second = world.cloud.authenticate(world.cloud.create_token(first, request).secret)
    assert second.place == ""
    refused(world, lambda: world.cloud.pause(second, "acme", "erp"))
    third = request.model_copy(update={"place": "USA"})
    assert world.cloud.authenticate(world.cloud.create_token(first, third).secret).place == "USA"


def test_a_role_is_looked_at_before_policy(world: RightsWorld):
    """What a role does not allow is no decision of policy, and not on that record."""
    auditor = world.person("acme", Role.AUDITOR, "BR")
    with pytest.raises(ForbiddenError) as told:
        world.cloud.pause(auditor, "acme", "erp")
    assert not isinstance(told.value, DeniedError)
    assert world.decisions() == []


def test_data_centers_and_groups_say_what_is_denied(world: RightsWorld):
    """R13.1, R15: a tenant sees which data centers are closed to it, and why."""
    who = world.principal("acme")
    world.two_targets(who)
    shown = {center.name: center.denied for center in world.cloud.data_centers(who).items}
    assert {name for name, denied in shown.items() if denied} == {"apac-1", "us-keys"}
    assert shown["apac-1"] == "apac-1 lies in APAC: nothing opens USA to APAC" or "APAC" in shown["apac-1"]
    assert world.cloud.data_center(who, "us-keys").denied == shown["us-keys"]
    assert all(not center.denied for center in world.cloud.data_centers(SYSTEM).items)
    world.law(LAW)
    world.look()
    states = {t.name: t.denied for t in world.cloud.vpg(who, "acme", "erp").targets}
    assert states == {"us": "", "uk": world.denied(UK)}
    assert "nothing opens USA to UK" in states["uk"]
