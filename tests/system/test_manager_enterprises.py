"""Enterprises, tokens, pairing, hosts, the audit log, idempotency; and the wall around every operation."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cloud_databases import postgres, world  # noqa: F401
from cloud_world import World, settings

from dr_cloud.manager.access import ALLOWED
from dr_cloud.manager.cloud import SYSTEM, Cloud
from dr_cloud.model.cloud import (
    CheckpointOrder,
    EnterpriseUpdate,
    LogRequest,
    NewToken,
    PageRequest,
    SiteUpdate,
    TokenRequest,
    VdsaDeployment,
)
from dr_cloud.model.decision import PolicyChange
from dr_cloud.model.errors import ConflictError, DrCloudError, ForbiddenError, NotFoundError, UnauthenticatedError
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import PairingToken, PairRequest
from dr_cloud.model.principal import Role
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.provider import EnterpriseConfig, SiteConfig
from dr_cloud.model.recovery import CleanRequest, DrillSettings, FailoverRequest, ReportQuery, StopTest, TestsRequest
from dr_cloud.model.replication import HostReport, SiteReport, Throttle
from dr_cloud.model.task import CompletionCode, Task
from dr_cloud.model.vpg import ProtectedServer
from dr_cloud.seal.identity import new_key_and_csr

PROBES = [ProbeSpec(kind="entropy")]
INBOUND = {
    "authenticate", "known_caller", "pair", "renew", "certificate_ok", "check_certificate", "connector_started",
    "site_connected", "site_lost", "site_report", "host_report", "orders_for", "host_orders", "route", "start", "close",
    "once", "route_to", "look_at_drills", "report_key",
}  # fmt: skip


def operations() -> list[str]:
    """Every operation that takes a caller."""
    public = [name for name, _ in inspect.getmembers(Cloud, inspect.isfunction) if not name.startswith("_")]
    return sorted(name for name in public if name not in INBOUND)


def arguments(name: str, enterprise: str, thing: str, site: str, ids: dict[str, str]) -> dict[str, Any]:
    """Return arguments that aim an operation at an enterprise's things."""
    values: dict[str, Any] = {
        "enterprise": enterprise,
        "vpg": thing,
        "site": site,
        "host": "h1",
        "server": "web",
        "target": None,
        "config": EnterpriseConfig(name="new", jurisdiction="USA", sites=[SiteConfig(name="s", jurisdiction="USA")]),
        "settings": settings(thing, enterprise),
        "deployment": VdsaDeployment(),
        "order": CheckpointOrder(tag="t"),
        "how": StopTest(),
        "id": ids["checkpoint"],
        "test": ids["test"],
        "task": ids["task"],
        "token": ids["token"],
        "count": 1,
        "path": "fsck/report",
        "drill": "nightly",
        "after": 0,
        "timeout_seconds": 0.0,
        "data_center": "us-east",
        "name": "us-east",
        "change": PolicyChange(),
    }
    special: dict[str, dict[str, Any]] = {
        "add_server": {"server": ProtectedServer(name="new")},
        "update_enterprise": {"update": EnterpriseUpdate(title="x")},
        "update_site": {"update": SiteUpdate(location="x")},
        "create_token": {"request": TokenRequest(name="x", role=Role.AUDITOR, enterprise=enterprise)},
        "failover": {"request": FailoverRequest()},
        "start_tests": {"request": TestsRequest(times_ns=[1])},
        "collect_logs": {"request": LogRequest(site=site)},
        "find_clean": {"request": CleanRequest(since_ns=1, until_ns=2, probes=PROBES)},
        "put_drill": {"settings": DrillSettings(name="nightly", schedule="0 3 * * *", probes=PROBES)},
        "tests_report": {"which": ReportQuery(test=[ids["test"]])},
    }
    values |= special.get(name, {})
    parameters = inspect.signature(getattr(Cloud, name)).parameters
    return {key: values[key] for key in parameters if key in values and key not in ("self", "who")}


WITHOUT_ENTERPRISE = {
    "register_enterprise", "enterprises", "data_centers", "data_center", "events", "newest_event", "rights_matrix",
    "rights_state",
}  # fmt: skip
OF_PROVIDER = {
    "center_hosts", "deploy_center_vdsa", "undeploy_center_vdsa", "policies", "apply_policies", "what_if",
    "rights_bundle",
}  # fmt: skip


def test_another_enterprises_things_are_not_there(world: World):
    """R11: every operation, with valid credentials of another enterprise: told exactly as for a thing that is missing.

    The walk is over all operations there are, so a new one without arguments here fails.
    """
    brit, acme = world.principal("brit"), world.principal("acme")
    world.protect(brit, "secret", "brit")
    world.journal(Scope("brit", "secret", "dc1"))
    started = world.cloud.start_tests(brit, "brit", "secret", TestsRequest(times_ns=[world.clock()]))
    task = world.done(started, "brit")
    token = world.cloud.create_token(brit, TokenRequest(name="x", role=Role.AUDITOR, enterprise="brit")).token
    asked = world.cloud.insert_checkpoint(brit, "brit", "secret", CheckpointOrder(tag="t"))
    ids = {"checkpoint": asked.id, "test": task.result["tests"][0], "task": task.id, "token": token.id}
    none = dict.fromkeys(ids, "0" * 32)
    for name in operations():
        if name in WITHOUT_ENTERPRISE:
            continue
        call = getattr(world.cloud, name)
        if name in OF_PROVIDER:
            with pytest.raises(ForbiddenError):
                call(acme, **arguments(name, "brit", "secret", "brit-hq", ids))
            continue
        with pytest.raises(NotFoundError) as foreign:
            call(acme, **arguments(name, "brit", "secret", "brit-hq", ids))
        with pytest.raises(NotFoundError) as absent:
            call(acme, **arguments(name, "nobody", "secret", "nobody-hq", none))
        told = str(foreign.value).replace("brit", "nobody")
        for key, value in ids.items():
            told = told.replace(value, none[key])
        assert told == str(absent.value), name
        # Named as one's own it is not there either, whether it is another's or nobody's.
        if (
            "enterprise" in inspect.signature(call).parameters
            and {"vpg", "test", "task"} & set(inspect.signature(call).parameters)
            and name not in ("tests", "tasks", "create_vpg")
        ):
            with pytest.raises(NotFoundError):
                call(acme, **arguments(name, "acme", "secret", "acme-hq", ids))
    assert all(entry.enterprise == "acme" for entry in world.cloud.audit(acme).items)
    assert {entry.enterprise for entry in world.cloud.events(acme, 0)} <= {"acme"}
    assert [enterprise.name for enterprise in world.cloud.enterprises(acme).items] == ["acme"]
    assert world.cloud.vpg(brit, "brit", "secret").settings == settings("secret", "brit")


@pytest.mark.parametrize("role", [Role.AUDITOR, Role.ENTERPRISE_OPERATOR])
def test_a_role_may_what_the_table_says(world: World, role: Role):
    """R11: an auditor changes nothing; an operator operates what an administrator made."""
    who = world.principal("acme", role)
    world.protect(world.principal("acme"))
    world.cloud.vpg(who, "acme", "erp")
    denied = [
        lambda: world.cloud.create_vpg(who, "acme", settings("new")),
        lambda: world.cloud.create_token(who, TokenRequest(name="x", role=role, enterprise="acme")),
        lambda: world.cloud.create_pairing(who, "acme", "acme-hq"),
    ]
    if role is Role.AUDITOR:
        denied.append(lambda: world.cloud.pause(who, "acme", "erp"))
    else:
        world.cloud.pause(who, "acme", "erp")
    for call in denied:
        with pytest.raises(ForbiddenError):
            call()
    entries = world.cloud.audit(world.principal("acme"), "acme").items
    assert sum(entry.outcome == "denied" and entry.principal == who.id for entry in entries) == len(denied)


def test_no_token_gives_more_than_its_maker_has(world: World):
    """R11."""
    admin = world.principal("acme")
    operator = world.principal(None, Role.PROVIDER_OPERATOR)
    for who, role, enterprise in (
        (admin, Role.PROVIDER_ADMIN, None),
        (admin, Role.PROVIDER_OPERATOR, None),
        (admin, Role.AUDITOR, None),
        (operator, Role.PROVIDER_ADMIN, None),
        (SYSTEM, Role.PROVIDER_ADMIN, "acme"),
        (SYSTEM, Role.ENTERPRISE_ADMIN, None),
    ):
        with pytest.raises(DrCloudError):
            world.cloud.create_token(who, TokenRequest(name="x", role=role, enterprise=enterprise))
    with pytest.raises(NotFoundError):
        world.cloud.create_token(admin, TokenRequest(name="x", role=Role.AUDITOR, enterprise="brit"))
    assert "token.create" not in ALLOWED[Role.PROVIDER_OPERATOR]


def test_tokens_expire_and_are_revoked(world: World):
    """R11: the database has a hash, never the secret."""
    made = world.cloud.create_token(SYSTEM, TokenRequest(name="t", role=Role.AUDITOR, enterprise="acme"))
    assert made.secret not in repr(made)
    who = world.cloud.authenticate(made.secret)
    assert (who.id, who.role, who.enterprise) == (made.token.id, Role.AUDITOR, "acme")
    short = world.cloud.create_token(
        SYSTEM, TokenRequest(name="s", role=Role.AUDITOR, enterprise="acme", lifetime_seconds=60)
    )
    world.cloud.authenticate(short.secret)
    world.clock.pass_seconds(61)
    for secret in (short.secret, "drt1.wrong", ""):
        with pytest.raises(UnauthenticatedError):
            world.cloud.authenticate(secret)
    listed = world.cloud.tokens(SYSTEM, "acme").items
    assert {token.name for token in listed} >= {"t", "s"}
    assert next(token for token in listed if token.name == "t").last_used_ns is not None
    world.cloud.revoke_token(SYSTEM, made.token.id)
    with pytest.raises(UnauthenticatedError, match="revoked"):
        world.cloud.authenticate(made.secret)
    if world.url.startswith("sqlite"):
        held = b"".join(path.read_bytes() for path in world.folder.glob("manager.db*"))
        assert made.token.id.encode() in held
        assert made.secret.encode() not in held
        assert made.secret.removeprefix("drt1.").encode() not in held


def test_a_site_is_paired_once_renewed_and_unpaired(world: World):
    """R11, R16: one-time tokens, certificates of the provider's CA, revocation at once."""
    who = world.principal("acme")
    made = world.cloud.create_pairing(who, "acme", "acme-hq")
    token = PairingToken.decode(made.token)
    assert (token.ca, token.api) == (world.authority.fingerprint, "https://127.0.0.1:8440")
    _, csr = new_key_and_csr()
    request = PairRequest(enterprise="acme", site="acme-hq", secret=token.secret, csr=csr)
    for wrong in ({"secret": "x" * 43}, {"site": "brit-hq"}, {"enterprise": "brit"}, {"enterprise": "nobody"}):
        with pytest.raises(UnauthenticatedError):
            world.cloud.pair(request.model_copy(update=wrong))
    answer = world.cloud.pair(request)
    assert answer.enterprise_key == world.keyring.key("acme").hex()
    assert answer.link.startswith("wss://")
    assert world.cloud.certificate_ok(answer.serial)
    assert world.cloud.pair(request) == answer, "a site that crashed asks again"
    _, other = new_key_and_csr()
    with pytest.raises(UnauthenticatedError, match="used"):
        world.cloud.pair(request.model_copy(update={"csr": other}))
    assert world.cloud.site_connected("acme", "acme-hq", answer.serial).hosts == ["h1"]
    renewed = world.cloud.renew("acme", "acme-hq", answer.serial, other)
    assert world.cloud.certificate_ok(renewed.serial) and world.cloud.certificate_ok(answer.serial)
    with pytest.raises(ForbiddenError):
        world.cloud.renew("brit", "brit-hq", answer.serial, other)
    assert world.cloud.site(who, "acme", "acme-hq").paired
    assert not world.cloud.unpair(who, "acme", "acme-hq").paired
    assert ("acme", "acme-hq") in world.fabric.asked("disconnect")
    assert not world.cloud.certificate_ok(answer.serial) and not world.cloud.certificate_ok(renewed.serial)
    for call in (
        lambda: world.cloud.site_connected("acme", "acme-hq", answer.serial),
        lambda: world.cloud.renew("acme", "acme-hq", renewed.serial, other),
        lambda: world.cloud.site_connected("acme", "acme-hq", "0"),
    ):
        with pytest.raises(ForbiddenError):
            call()
    with pytest.raises(UnauthenticatedError):
        world.cloud.pair(request)
    late = PairingToken.decode(world.cloud.create_pairing(who, "acme", "acme-hq", 60).token)
    world.clock.pass_seconds(61)
    with pytest.raises(UnauthenticatedError, match="expired"):
        world.cloud.pair(request.model_copy(update={"secret": late.secret}))


def test_of_many_that_pair_at_once_one_does(world: World):
    """R11: the secret is used atomically."""
    token = PairingToken.decode(world.cloud.create_pairing(SYSTEM, "acme", "acme-hq").token)

    def pair(_: int) -> bool:
        _, csr = new_key_and_csr()
        try:
            world.cloud.pair(PairRequest(enterprise="acme", site="acme-hq", secret=token.secret, csr=csr))
        except UnauthenticatedError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(pair, range(6))) == 1


def test_enterprises_come_and_go(world: World):
    """R11: registering makes a key and a connector; removing ends tokens and certificates."""
    config = EnterpriseConfig(name="coral", jurisdiction="APAC", sites=[SiteConfig(name="s1", jurisdiction="APAC")])
    made = world.cloud.register_enterprise(SYSTEM, config)
    assert (made.sites, made.link) == (["s1"], world.fabric.start_connector("coral"))
    with pytest.raises(ConflictError):
        world.cloud.register_enterprise(SYSTEM, config)
    for name in ("registry", "provider"):
        with pytest.raises(DrCloudError):
            world.cloud.register_enterprise(SYSTEM, config.model_copy(update={"name": name}))
    with pytest.raises(ForbiddenError):
        world.cloud.register_enterprise(world.principal("acme"), config)
    assert world.cloud.update_enterprise(SYSTEM, "coral", EnterpriseUpdate(title="Coral")).title == "Coral"
    secret = world.cloud.create_token(SYSTEM, TokenRequest(name="x", role=Role.AUDITOR, enterprise="coral")).secret
    world.protect(world.principal("acme"))
    with pytest.raises(ConflictError):
        world.cloud.remove_enterprise(SYSTEM, "acme")
    world.cloud.remove_enterprise(SYSTEM, "coral")
    assert ("coral",) in world.fabric.asked("stop_connector")
    with pytest.raises(UnauthenticatedError):
        world.cloud.authenticate(secret)
    with pytest.raises(NotFoundError):
        world.cloud.enterprise(SYSTEM, "coral")
    assert any(e.operation == "enterprise.remove" for e in world.cloud.audit(SYSTEM).items)


def test_vdsas_are_deployed_and_taken_away(world: World):
    """R17: the four lists; a host in use is kept."""
    who = world.principal("acme")
    (host,) = world.cloud.hosts(who, "acme", "acme-hq", "installed").items
    assert (host.name, host.servers) == ("h1", 2)
    task = world.cloud.undeploy_vdsa(who, "acme", "acme-hq", "h1")
    assert [h.vdsa for h in world.cloud.hosts(who, "acme", "acme-hq").items] == ["removing"]
    assert world.cloud.orders_for("acme", "acme-hq").hosts == []
    gone = SiteReport(revision=99, time_ns=0, version="1", hosts=[HostReport(host="h1", vdsa="not installed")])
    world.cloud.site_report("acme", "acme-hq", gone)
    for _ in range(100):
        world.clock.pass_seconds(0.2)
        if world.cloud.wait_task(who, task.id, 0.05, 0.02).ended_ns is not None:
            break
    assert world.cloud.task(who, task.id).completion is CompletionCode.SUCCESS
    assert [h.name for h in world.cloud.hosts(who, "acme", "acme-hq", "not installed").items] == ["h1"]
    how = VdsaDeployment(datastore="local", network="static", ip="10.0.0.5", mask="255.255.255.0", gateway="10.0.0.1")
    task = world.cloud.deploy_vdsa(who, "acme", "acme-hq", "h1", how)
    assert [h.deployment for h in world.cloud.hosts(who, "acme", "acme-hq", "installing").items] == [how]
    assert world.done(task).result == {"host": "h1", "vdsa": "installed"}
    world.protect(who)
    with pytest.raises(ConflictError, match="is protected"):
        world.cloud.undeploy_vdsa(who, "acme", "acme-hq", "h1")
    with pytest.raises(ConflictError):
        world.cloud.undeploy_center_vdsa(SYSTEM, "us-east", "h1")
    world.done(world.cloud.deploy_center_vdsa(SYSTEM, "us-east", "h3", VdsaDeployment()))
    assert "h3" in {h.name for h in world.cloud.center_hosts(SYSTEM, "us-east", "installed")}
    with pytest.raises(NotFoundError):
        world.cloud.deploy_vdsa(who, "acme", "acme-hq", "h9", how)


def test_what_a_tenant_sees_of_data_centers(world: World):
    """R8: clusters and pools, and only hosts and datastores that are in none."""
    who = world.principal("acme")
    seen = world.cloud.data_center(who, "us-east")
    assert [(place.name, place.members) for place in seen.hosts] == [("h3", []), ("compute", [])]
    assert [place.name for place in seen.datastores] == ["ds-3", "gold"]
    assert [place.name for place in world.cloud.data_center(SYSTEM, "us-east").hosts] == ["h1", "h2", "h3", "compute"]
    first = world.cloud.data_centers(who, PageRequest(limit=1))
    second = world.cloud.data_centers(who, PageRequest(limit=1, cursor=first.next_cursor))
    assert [c.name for page in (first, second) for c in page.items] == ["uk-south", "us-east"]


def test_site_settings_reach_the_site(world: World):
    """R16: details, information, the VDSAs' port; the link's throttle."""
    who = world.principal("acme")
    update = SiteUpdate(address="198.51.100.7", port=9443, vdsa_port=9444, throttle=Throttle(bytes_per_second=1000))
    site = world.cloud.update_site(who, "acme", "acme-hq", update)
    assert (site.address, site.port, site.vdsa_port, site.location) == ("198.51.100.7", 9443, 9444, "Main Street")
    assert world.cloud.orders_for("acme", "acme-hq").throttle.bytes_per_second == 1000


def test_a_creating_call_with_a_key_is_made_once(world: World):
    """The same key and request give the same answer; another request is refused; a secret is not repeated."""
    who = world.principal("acme")
    create = lambda: world.cloud.create_vpg(who, "acme", settings())  # noqa: E731
    first = world.cloud.once(who, "k1", "digest", Task, create)
    again = world.cloud.once(who, "k1", "digest", Task, create)
    assert again == first
    assert len(world.cloud.tasks(who, "acme").items) == 1
    with pytest.raises(ConflictError, match="another request"):
        world.cloud.once(who, "k1", "other", Task, create)
    with pytest.raises(ConflictError, match="exists already"):
        world.cloud.once(who, "k2", "digest", Task, create)
    request = TokenRequest(name="x", role=Role.AUDITOR, enterprise="acme")
    make = lambda: world.cloud.create_token(who, request)  # noqa: E731
    made = world.cloud.once(who, "k3", "digest", NewToken, make)
    repeated = world.cloud.once(who, "k3", "digest", NewToken, make)
    assert (made.token, made.secret != "", repeated.secret) == (repeated.token, True, "")
    other = world.principal("brit")
    world.cloud.once(other, "k1", "mine", Task, lambda: world.cloud.create_vpg(other, "brit", settings("x", "brit")))


def test_of_many_calls_with_one_key_one_is_made(world: World):
    who = world.principal("acme")
    request = TokenRequest(name="x", role=Role.AUDITOR, enterprise="acme")

    def make(_: int) -> str:
        return world.cloud.once(who, "k", "d", NewToken, lambda: world.cloud.create_token(who, request)).token.id

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(make, range(6)))) == 1
    assert sum(token.name == "x" for token in world.cloud.tokens(who, "acme").items) == 1


def test_every_change_leaves_its_row(world: World):
    """The audit log: who, what, on what, with which outcome; also what was refused."""
    who = world.principal("acme")
    with pytest.raises(NotFoundError):
        world.cloud.pause(who, "acme", "none")
    with pytest.raises(NotFoundError):
        world.cloud.pause(who, "brit", "erp")
    world.cloud.create_vpg(who, "acme", settings())
    told = [(e.operation, e.subject, e.outcome) for e in world.cloud.audit(who, "acme").items[:3]]
    assert told == [
        ("vpg.create", "vpg erp", "done"),
        ("vpg.pause", "vpg erp", "refused"),
        ("vpg.pause", "vpg none", "refused"),
    ]
    assert world.cloud.audit(world.principal("brit"), "brit").items[-1].operation == "enterprise.register"
    assert not any(e.principal == who.id for e in world.cloud.audit(SYSTEM, "brit").items)


def test_logs_are_collected_into_an_archive(world: World):
    """R20: of the enterprise's own sites; the provider's own are the provider's."""
    who = world.principal("acme")
    task = world.done(world.cloud.collect_logs(who, "acme", LogRequest(site="acme-hq")))
    assert task.result["bytes"] == len(b"logs of acme/acme-hq")
    assert world.cloud.log_archive(who, task.id) == b"logs of acme/acme-hq"
    assert (world.folder / "logs" / f"{task.id}.tar.gz").stat().st_mode & 0o777 == 0o600
    with pytest.raises(NotFoundError):
        world.cloud.log_archive(world.principal("brit"), task.id)
    with pytest.raises(ForbiddenError):
        world.cloud.collect_logs(who, None, LogRequest())
    with pytest.raises(NotFoundError):
        world.cloud.collect_logs(who, "acme", LogRequest(site="us-east"))
    world.done(world.cloud.collect_logs(SYSTEM, None, LogRequest(site="us-east")))
