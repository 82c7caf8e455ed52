"""What the manager survives: restarts, a lost database, a store that is away; and its schema."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from cloud_databases import BOTH, postgres, world  # noqa: F401
from cloud_world import CONFIG, World, settings
from sqlalchemy import inspect, select

from dr_cloud.manager import tables
from dr_cloud.manager.cloud import SYSTEM, Cloud
from dr_cloud.manager.db import WRITES, alembic_config, migrate, open_engine
from dr_cloud.manager.registry import rebuild
from dr_cloud.manager.tasks import Done, Later, TaskType
from dr_cloud.manager.tenancy import EVERYONE, Database
from dr_cloud.model.cloud import EnterpriseUpdate, LogRequest, TokenRequest
from dr_cloud.model.errors import ConflictError, DamagedError, DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import PairingToken, PairRequest
from dr_cloud.model.principal import Role
from dr_cloud.model.recovery import StopTest, TestsRequest
from dr_cloud.model.task import CompletionCode
from dr_cloud.model.vpg import ProtectedServer
from dr_cloud.seal.identity import new_key_and_csr
from dr_cloud.store.errors import StoreUnavailableError
from dr_cloud.store.objects import open_memory
from dr_cloud.store.store import Data, Store

SCOPE = Scope("acme", "erp", "dc1")


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.02)


@pytest.fixture(params=BOTH)
def url(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'x.db'}"
    else:
        found, drop = request.getfixturevalue("postgres").create()
        yield found
        drop()


def test_migrations_make_what_the_tables_say(url: str):
    """Up, down, and up again; and no difference between the two."""
    engine = open_engine(url)
    migrate(engine)
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.Base.metadata) == []
    with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        command.downgrade(alembic_config(connection), "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrate(engine)
    assert set(inspect(engine).get_table_names()) == {"alembic_version", *tables.Base.metadata.tables}
    engine.dispose()


def test_a_database_that_cannot_be_used_is_told(tmp_path: Path):
    for url in (
        "nonsense",
        "mysql://x/y",
        f"sqlite:///{tmp_path}/no/such/folder.db",
        "postgresql:///x?host=/nonexistent",
    ):
        with pytest.raises(DrCloudError) as told:
            migrate(open_engine(url))
        assert told.value.remedy


def test_a_manager_that_restarts_goes_on(world: World):
    """R19: a task that waited is waited for again; everyone is told to fetch orders anew."""
    who = world.principal("acme")
    task = world.cloud.create_vpg(who, "acme", settings())
    until(lambda: world.cloud.task(who, task.id).started_ns is not None)
    before = world.cloud.orders_for("acme", "acme-hq").revision
    world.restart()
    assert world.cloud.orders_for("acme", "acme-hq").revision > before
    world.done(task)
    world.journal(SCOPE)
    tests = world.done(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[world.clock()])))
    world.restart()
    (test,) = tests.result["tests"]
    assert world.cloud.test(who, "acme", test).statistics["blocks_read"] == 7
    world.done(world.cloud.stop_test(who, "acme", test, StopTest(verdict="pass")))


def test_a_task_that_must_not_be_repeated_says_so(world: World):
    """R19: HadException with the reason; likewise a type that this version does not know, and a step that breaks."""
    who = world.principal("acme")

    def waits(row: tables.Task) -> Later | Done:
        return Later(3600)

    def breaks(row: tables.Task) -> Later | Done:
        raise ZeroDivisionError("by zero")

    tasks = world.cloud._context.tasks
    tasks.register("once", TaskType(waits, repeatable=False))
    tasks.register("broken", TaskType(breaks))
    ids = {}
    for type_ in ("once", "broken", "unknown"):
        with world.cloud._change(who, "vpg.update", "acme", "x") as change:
            ids[type_] = change.task(type_, {}).id
    until(lambda: all(world.cloud.task(who, id_).started_ns is not None for id_ in ids.values()))
    until(lambda: world.cloud.task(who, ids["unknown"]).ended_ns is not None)
    until(lambda: world.cloud.task(who, ids["broken"]).ended_ns is not None)
    world.restart()
    ended = {type_: world.cloud.task(who, id_) for type_, id_ in ids.items()}
    assert {type_: task.completion for type_, task in ended.items()} == {
        "once": CompletionCode.HAD_EXCEPTION,
        "broken": CompletionCode.HAD_EXCEPTION,
        "unknown": CompletionCode.FAILED,
    }
    assert "not safe to repeat" in ended["once"].exception
    assert ended["broken"].exception == "ZeroDivisionError: by zero"


def test_a_task_whose_end_cannot_be_written_is_taken_again_later(world: World, monkeypatch: pytest.MonkeyPatch):
    """R19: while the database fails, nothing turns round and round; afterwards the task ends as it should."""
    who = world.principal("acme")
    tasks = world.cloud._context.tasks
    steps = []

    def ends(row: tables.Task) -> Later | Done:
        steps.append(row.id)
        return Done()

    def fails(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    tasks.register("ends", TaskType(ends))
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "_finish", fails)
        with world.cloud._change(who, "vpg.update", "acme", "x") as change:
            id_ = change.task("ends", {}).id
        until(lambda: steps)
        time.sleep(0.5)
        assert len(steps) == 1
    until(lambda: world.cloud.task(who, id_).completion is CompletionCode.SUCCESS)


def test_an_enterprise_cannot_take_all_workers(world: World):
    """R11: four of eight at most; another enterprise's task runs meanwhile."""
    release = []

    def blocks(row: tables.Task) -> Later | Done:
        until(lambda: release)
        return Done()

    world.cloud._context.tasks.register("blocks", TaskType(blocks))
    for _ in range(10):
        with world.cloud._change(world.principal("acme"), "vpg.update", "acme", "x") as change:
            change.task("blocks", {})
    brit = world.principal("brit")
    task = world.cloud.collect_logs(brit, "brit", LogRequest(site="brit-hq"))
    assert world.cloud.wait_task(brit, task.id, 10, 0.02).completion is CompletionCode.SUCCESS
    release.append(True)


def _everything(cloud: Cloud) -> dict[str, object]:
    """Return all that matters, as it is shown. When a token was last used is only a figure: it need not be whole."""
    found: dict[str, object] = {}
    for enterprise in cloud.enterprises(SYSTEM).items:
        name = enterprise.name
        found[name] = [
            enterprise,
            cloud.sites(SYSTEM, name).items,
            cloud.hosts(SYSTEM, name, f"{name}-hq").items,
            cloud.servers(SYSTEM, name, f"{name}-hq").items,
            [(v, v.targets[0].placed_host) for v in cloud.vpgs(SYSTEM, name).items],
            [test.model_dump(exclude={"seconds", "statistics"}) for test in cloud.tests(SYSTEM, name).items],
            [token.model_dump(exclude={"last_used_ns"}) for token in cloud.tokens(SYSTEM, name).items],
            cloud.orders_for(name, f"{name}-hq").model_dump(exclude={"revision"}),
        ]
    own = [token for token in cloud.tokens(SYSTEM, None).items if token.enterprise is None]
    found[""] = [token.model_dump(exclude={"last_used_ns"}) for token in own]
    return found


def test_a_lost_database_is_made_anew_from_the_store(world: World, tmp_path: Path):
    """R21, invariant 5: registry, disk indexes, verdicts, tokens and pairings come back from the store alone."""
    who = world.principal("acme")
    world.principal(None, Role.PROVIDER_OPERATOR)
    secret = world.cloud.create_token(SYSTEM, TokenRequest(name="x", role=Role.AUDITOR, enterprise="brit")).secret
    token = PairingToken.decode(world.cloud.create_pairing(who, "acme", "acme-hq").token)
    _, csr = new_key_and_csr()
    paired = world.cloud.pair(PairRequest(enterprise="acme", site="acme-hq", secret=token.secret, csr=csr))
    world.protect(who)
    world.done(world.cloud.remove_server(who, "acme", "erp", "web"))
    world.protect(world.principal("brit"), "gone", "brit")
    world.done(world.cloud.remove_vpg(world.principal("brit"), "brit", "gone"), "brit")
    world.journal(SCOPE)
    tests = world.done(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[world.clock()] * 2)))
    stop = StopTest(verdict="fail", note="the database does not start")
    world.done(world.cloud.stop_test(who, "acme", tests.result["tests"][0], stop))
    world.cloud.close()
    before = _everything(world.open())

    engine = open_engine(f"sqlite:///{tmp_path / 'fresh.db'}")
    migrate(engine)
    numbers = rebuild(Database(engine), world.store, world.keyring)
    assert set(numbers) == {"acme", "brit", "provider"}
    with pytest.raises(ConflictError, match="not empty"):
        rebuild(Database(engine), world.store, world.keyring)
    world.url = f"sqlite:///{tmp_path / 'fresh.db'}"
    world.cloud = world.open()
    assert _everything(world.cloud) == before
    world.cloud.start()
    assert world.cloud.authenticate(secret).enterprise == "brit"
    assert world.cloud.certificate_ok(paired.serial)
    world.done(world.cloud.add_server(who, "acme", "erp", ProtectedServer(name="web")))
    indexes = {(disk.server, disk.name): disk.index for disk in world.cloud.vpg(who, "acme", "erp").disks}
    assert indexes == {("db", "sda"): 0, ("web", "sda"): 3, ("web", "sdb"): 4}
    world.protect(world.principal("brit"), "gone", "brit")
    assert min(disk.index for disk in world.cloud.vpg(SYSTEM, "brit", "gone").disks) == 3


def test_a_damaged_object_is_passed_over(tmp_path: Path):
    """The one before it is used; if none is whole, that is told. Another enterprise's object is no stand-in."""
    store = open_memory()
    world = World(tmp_path / "provider", store=store, start=False)
    world.populate()
    registry = world.cloud._context.registry
    for title in ("first", "second"):
        world.cloud.update_enterprise(SYSTEM, "acme", EnterpriseUpdate(title=title))
        assert registry.write_behind() == 0
    (older, _), (newest, _) = store.list("registry/acme")
    _spoil(store, newest)
    found = _fresh(tmp_path / "a.db")
    rebuild(found, store, world.keyring)
    with found.read("acme") as session:
        assert session.get_one(tables.Enterprise, "acme").title == "first"
    whole = store.get(store.list("registry/brit")[-1][0])
    store.delete(newest)
    store.put_new(newest, whole)
    _spoil(store, older)
    with pytest.raises(DamagedError, match="registry/acme"):
        rebuild(_fresh(tmp_path / "b.db"), store, world.keyring)
    world.close()


def _spoil(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[-3] ^= 1
    store.delete(key)
    store.put_new(key, bytes(data))


def _fresh(path: Path) -> Database:
    engine = open_engine(f"sqlite:///{path}")
    migrate(engine)
    return Database(engine)


class AwayStore:
    """A store that fails while it is away."""

    def __init__(self) -> None:
        self.inner = open_memory()
        self.away = True
        self.refused = 0

    def put_new(self, key: str, data: Data) -> None:
        if self.away:
            self.refused += 1
            raise StoreUnavailableError("the store is away")
        self.inner.put_new(key, data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_the_registry_is_written_when_the_store_is_back(tmp_path: Path):
    """Requests go on meanwhile. What a former life of the database has written is never the newest."""
    store = AwayStore()
    world = World(tmp_path / "provider", store=store, start=False)  # type: ignore[arg-type]
    world.populate()
    registry = world.cloud._context.registry
    store.inner.put_new("registry/brit/0000000009.reg", b"of a former life")
    assert registry.write_behind() == 2
    assert (store.refused, store.list("registry/acme")) == (2, [])
    store.away = False
    assert registry.write_behind() == 0
    assert sorted(store.list("registry/brit"))[-1][0] == "registry/brit/0000000010.reg"
    number = int(store.list("registry/acme")[-1][0][-14:-4])
    store.inner.put_new(f"registry/acme/{number + 1:010d}.reg", b"of another process")
    world.cloud.update_enterprise(SYSTEM, "acme", EnterpriseUpdate(title="new"))
    assert [registry.write_behind(), registry.write_behind()] == [0, 0]
    assert store.list("registry/acme")[-1][0] == f"registry/acme/{number + 2:010d}.reg"
    with Database(world.cloud._database.engine).read(EVERYONE) as session:
        rows = session.scalars(select(tables.RegistryState)).all()
    assert all(row.changed == row.written for row in rows)
    world.close()


def test_alerts_are_raised_and_cleared(world: World):
    """Alerts when a link, a VDSA, the lag or the history falls short; each is told to those who watch."""
    who = world.principal("acme")
    token = PairingToken.decode(world.cloud.create_pairing(who, "acme", "acme-hq").token)
    _, csr = new_key_and_csr()
    world.cloud.pair(PairRequest(enterprise="acme", site="acme-hq", secret=token.secret, csr=csr))
    world.protect(who)
    for center in CONFIG.data_centers:
        for host in center.hosts:
            world.report_host(center.name, host.name)
    monitor = world.cloud.monitor
    monitor.judge()
    assert world.cloud.health(who).alerts == []
    seen = world.cloud.newest_event(who)
    world.clock.pass_seconds(60)
    monitor.note_silence()
    monitor.judge()
    kinds = {(alert.kind, alert.subject) for alert in world.cloud.alerts(who, "acme").items}
    assert kinds == {("link", "site/acme-hq"), ("lag", "vpg/erp/dc1")}
    assert not world.cloud.site(who, "acme", "acme-hq").connected
    told = [e for e in world.cloud.events(who, seen) if e.kind == "alert"]
    assert {(e.subject, e.data["raised"]) for e in told} == {("site/acme-hq", True), ("vpg/erp/dc1", True)}
    assert {a.subject for a in world.cloud.alerts(SYSTEM, None).items} >= {"host/us-east/h1", "site/acme-hq"}
    assert world.cloud.alerts(world.principal("brit"), "brit").items == []
    world.report("acme")
    monitor.judge()
    assert world.cloud.alerts(who, "acme").items == []
    assert {a.kind for a in world.cloud.alerts(who, "acme", cleared=True).items} == {"link", "lag"}
    # 1 GiB in an hour, and space for six more: seven hours of twenty-four.
    world.report_host("us-east", "h1")
    world.fabric.free["us-east", "ds-1"] = 6 << 30
    monitor.forecast()
    monitor.judge()
    target = world.cloud.vpg(who, "acme", "erp").targets[0]
    assert 6.9 * 3600 < (target.history_forecast_seconds or 0) < 7.2 * 3600
    assert {a.kind for a in world.cloud.alerts(who, "acme").items} == {"history", "history-critical"}
    world.cloud.pause(who, "acme", "erp")
    monitor.judge()
    assert world.cloud.alerts(who, "acme").items == []


def test_events_are_bounded_and_ascend(world: World):
    who = world.principal("acme")
    events = world.cloud._context.events
    for _ in range(6):
        events.emit("acme", 0, [("vpg", "x", {})] * 500)
    events.emit("brit", 0, [("vpg", "y", {})])
    numbers = [event.number for event in world.cloud.events(who, 0, 1000)]
    assert numbers == sorted(numbers)
    kept = world.cloud.events(who, 0, 1000)
    assert len(kept) == 1000
    with Database(world.cloud._database.engine).read("acme") as session:
        assert len(session.scalars(select(tables.Event.number)).all()) < 2600
    assert world.cloud.events(world.principal("brit"), 0)[-1].subject == "y"
