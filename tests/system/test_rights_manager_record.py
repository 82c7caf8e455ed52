"""R13: the record of decisions: in the transaction of what they permit, chained, never dropped, and never another's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cloud_databases import new_world, postgres  # noqa: F401
from cloud_world import LAW, OPEN_LAW
from rights_world import UK, RightsWorld, on_both, to, until
from sqlalchemy import delete, select, text
from sqlalchemy.exc import OperationalError

from dr_cloud.manager import operations, record, tables, watch
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.manager.db import migrate, open_engine
from dr_cloud.manager.questions import connects
from dr_cloud.manager.registry import rebuild
from dr_cloud.manager.tenancy import EVERYONE, Database
from dr_cloud.model.cloud import CheckpointOrder, PageRequest
from dr_cloud.model.decision import Decision, PolicyChange
from dr_cloud.model.errors import (
    ConflictError,
    DeniedError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from dr_cloud.model.principal import Role


@pytest.fixture(params=["sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RightsWorld]:
    yield from new_world(request, tmp_path / "provider", RightsWorld)


def furnish(world: RightsWorld) -> list[Decision]:
    """Make a record of some length; return it."""
    who = world.principal("acme")
    world.two_targets(who)
    for _ in range(3):
        world.cloud.checkpoints(who, "acme", "erp", "us")
    with pytest.raises(DeniedError):
        world.cloud.create_vpg(who, "acme", to("apac-1", name="crm"))
    return world.decisions()


def stored(world: RightsWorld) -> None:
    """Have the heads in the store."""
    world.clock.pass_seconds(61)
    world.look()
    assert world.cloud._context.registry.write_behind() == 0


@on_both
def test_a_record_is_a_chain(world: RightsWorld):
    """R13: numbers without gaps, each with the hash of the one before, and what was asked, answered and why."""
    found = furnish(world)
    assert [decision.number for decision in found] == list(range(1, len(found) + 1))
    assert [d.previous for d in found] == ["", *(d.hash for d in found[:-1])]
    assert all(decision.digest() == decision.hash for decision in found)
    last = found[-1]
    assert (last.allow, last.point, last.revision) == (False, "vpg", world.rights.state().revision)
    assert last.input["place"] == {"kind": "data center", "name": "apac-1", "datastore": "ds-1"}
    assert last.at_ns == world.clock()
    check = world.cloud.verify_decisions(world.principal("acme"), "acme")
    assert (check.whole, check.first, check.last, check.hash) == (True, 1, len(found), last.hash)


@on_both
def test_what_is_rolled_back_leaves_no_yes(world: RightsWorld):
    """R13: a yes is written in the transaction of what it permits, and goes with it."""
    who = world.principal("acme")
    world.protect(who)
    for refusal, act in (
        (ConflictError, lambda: world.cloud.create_vpg(who, "acme", to("us-east"))),
        (NotFoundError, lambda: world.cloud.pause(who, "acme", "missing")),
    ):
        before = world.decisions()
        with pytest.raises(refusal):
            act()
        assert world.decisions() == before
    before = world.decisions()
    with pytest.raises(RuntimeError), world.cloud._change(who, "vpg.pause", "acme", "vpg erp"):
        raise RuntimeError("at the last moment")
    assert world.decisions() == before


@on_both
def test_no_record_no_permission(world: RightsWorld, monkeypatch: pytest.MonkeyPatch):
    """R13: a decision that cannot be recorded is a no: nothing is changed, read or given."""
    who = world.principal("acme")
    world.two_targets(who)
    before = len(world.decisions())
    asked = len(world.fabric.asked("checkpoints"))
    serial = world.pair("acme", "acme-hq")

    def broken(*arguments: object) -> None:
        raise OperationalError("INSERT INTO decisions", {}, Exception("no space left"))

    for module in (operations, record, watch):
        monkeypatch.setattr(module, "append", broken)
    for act in (
        lambda: world.cloud.pause(who, "acme", "erp"),
        lambda: world.cloud.create_vpg(who, "acme", to("us-east", name="crm")),
        lambda: world.cloud.site_connected("acme", "acme-hq", serial),
    ):
        with pytest.raises(OperationalError):
            act()
    for act in (
        lambda: world.cloud.checkpoints(who, "acme", "erp", "us"),
        lambda: world.cloud.writes(who, "acme", "erp", "us"),
        lambda: world.cloud.route(UK),
    ):
        with pytest.raises(UnavailableError, match="cannot be recorded"):
            act()
    monkeypatch.undo()
    assert len(world.fabric.asked("checkpoints")) == asked
    shown = world.cloud.vpg(who, "acme", "erp")
    assert shown.paused == ""
    assert [vpg.name for vpg in world.cloud.vpgs(who, "acme").items] == ["erp"]
    assert len(world.decisions()) == before


@on_both
def test_nothing_is_lost_when_many_ask_at_once(world: RightsWorld):
    """R13: never dropped under load, never two of one number."""
    who = world.principal("acme")
    world.two_targets(who)
    before = len(world.decisions())

    def read(_: int) -> int:
        return len(world.cloud.checkpoints(who, "acme", "erp", "us", page=PageRequest(limit=1)).items)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(80))) == [1] * 80
    found = world.decisions()
    assert len(found) == before + 80
    assert world.cloud.verify_decisions(SYSTEM, "acme").whole


def test_nobody_is_refused_for_what_another_brings(world: RightsWorld, monkeypatch: pytest.MonkeyPatch):
    """R13: callers share a transaction; one whose decision cannot be written fails alone, and has no permission."""
    question = connects("acme", "acme-hq")
    answer = world.cloud._context.desk.ask([question])[0]
    inner = record.append

    def picky(session: object, enterprise: str, entries: list[record.Entry], at_ns: int) -> None:
        if any(entry.subject == "bad" for entry in entries):
            raise OperationalError("INSERT INTO decisions", {}, Exception("it cannot be"))
        inner(session, enterprise, entries, at_ns)  # type: ignore[arg-type]

    monkeypatch.setattr(record, "append", picky)
    before = len(world.decisions())
    recorder = record.Recorder(world.cloud._database, world.clock)
    failed: list[str] = []

    def write(subject: str) -> None:
        try:
            recorder.write("acme", [record.Entry("connector", subject, question, answer)])
        except OperationalError:
            failed.append(subject)

    with recorder._writing:  # until all wait
        threads = [threading.Thread(target=write, args=[name]) for name in ("a", "bad", "b", "c")]
        for thread in threads:
            thread.start()
        until(lambda: len(recorder._waiting) == 4, 5)
    for thread in threads:
        thread.join()
    assert failed == ["bad"]
    assert sorted(d.subject for d in world.decisions()[before:]) == ["a", "b", "c"]
    assert world.cloud.verify_decisions(SYSTEM, "acme").whole


DAMAGES = {
    "changed": "UPDATE decisions SET subject = 'vpg/other' WHERE number = 3 AND enterprise = 'acme'",
    "yes of a no": "UPDATE decisions SET allow = true WHERE number = :last AND enterprise = 'acme'",
    "removed": "DELETE FROM decisions WHERE number = 4 AND enterprise = 'acme'",
    "first removed": "DELETE FROM decisions WHERE number <= 2 AND enterprise = 'acme'",
    "cut off": "DELETE FROM decisions WHERE number > :last - 2 AND enterprise = 'acme'",
    "renumbered": "UPDATE decisions SET number = number + 100 WHERE number = :last AND enterprise = 'acme'",
    "all gone": "DELETE FROM decisions WHERE enterprise = 'acme'",
}


@on_both
def test_every_damage_is_found(world: RightsWorld):
    """R13: removal and change are found."""
    last = len(furnish(world))
    for damage, statement in DAMAGES.items():
        with pytest.raises(ZeroDivisionError), world.cloud._database.write(EVERYONE) as session:
            values = {"last": last} if ":last" in statement else {}
            assert session.connection().execute(text(statement), values).rowcount > 0
            check = record.check(session, "acme", [])
            assert (check.whole, bool(check.problem)) == (False, True), damage
            assert record.check(session, "brit", []).whole
            raise ZeroDivisionError("and all is as it was")
    assert world.cloud.verify_decisions(SYSTEM, "acme").whole


def test_a_row_that_is_forged_with_its_hash_is_found(world: RightsWorld):
    """R13: right in itself, but the next one does not follow on it."""
    furnish(world)
    with world.cloud._database.write("acme") as session:
        row = session.get_one(tables.Decision, ("acme", 3))
        row.subject = "vpg/innocent"
        row.hash = record.view(row).digest()
    check = world.cloud.verify_decisions(SYSTEM, "acme")
    assert check.problem == "decision 4 does not follow on 3"


@on_both
def test_a_tail_that_is_cut_off_with_its_head_is_found(world: RightsWorld):
    """R13: the heads in the store bear witness against whoever can write rows."""
    found = furnish(world)
    stored(world)
    table = tables.Decision
    with world.cloud._database.write("acme") as session:
        session.execute(delete(table).where(table.number > 5))
        head = session.get_one(tables.DecisionHead, "acme")
        head.number, head.hash = 5, found[4].hash
    check = world.cloud.verify_decisions(SYSTEM, "acme")
    assert not check.whole
    assert f"decision {len(found)} was made" in check.problem
    assert check.witnesses


def test_a_record_that_is_forged_anew_is_found(world: RightsWorld):
    """R13: a chain that was made anew, right in itself, is not the one that was witnessed."""
    found = furnish(world)
    stored(world)
    previous = ""
    with world.cloud._database.write("acme") as session:
        for decision in found:
            subject = "vpg/innocent" if decision.number == 3 else decision.subject
            made = decision.model_copy(update={"previous": previous, "subject": subject})
            row = session.get_one(tables.Decision, ("acme", decision.number))
            row.previous, row.subject, row.hash = previous, made.subject, made.digest()
            previous = row.hash
        session.get_one(tables.DecisionHead, "acme").hash = previous
        session.flush()
        assert record.check(session, "acme", []).whole
    check = world.cloud.verify_decisions(SYSTEM, "acme")
    assert not check.whole
    assert "not the one that was witnessed" in check.problem


def test_heads_are_in_the_store_within_a_minute(world: RightsWorld, monkeypatch: pytest.MonkeyPatch):
    """R13: without any other change of the registry; and only when there is something new."""
    registry = world.cloud._context.registry
    touched: list[str] = []
    inner = registry.touch
    monkeypatch.setattr(registry, "touch", lambda session, name: touched.append(name) or inner(session, name))
    furnish(world)
    for _ in range(2):
        stored(world)
        newest = world.decisions()[-1]
        assert (newest.number, newest.hash) in [tuple(head) for head in registry.heads("acme")]
        touched.clear()
        stored(world)
        assert touched == []
        world.cloud.checkpoints(world.principal("acme"), "acme", "erp", "us")
        touched.clear()
        stored(world)
        assert "acme" in touched


def test_a_database_that_was_lost_goes_on_with_the_record_and_the_policies(world: RightsWorld, tmp_path: Path):
    """R13: heads and policies come back from the store; the new record says what it lacks, and hangs on the old."""
    furnish(world)
    world.law(LAW)
    stored(world)
    found = world.decisions()
    world.cloud.close()
    engine = open_engine(f"sqlite:///{tmp_path / 'new.db'}")
    migrate(engine)
    rebuild(Database(engine), world.store, world.keyring, world.clock)
    engine.dispose()
    again = RightsWorld(world.folder, f"sqlite:///{tmp_path / 'new.db'}", store=world.store, start=False)
    try:
        again.cloud.start()
        applied = again.cloud.policies(SYSTEM).items
        assert [row.number for row in applied] == [2, 1]
        assert applied[0].sources.regulation == LAW
        (first,) = again.decisions()
        assert (first.number, first.point, first.previous) == (len(found) + 1, "rebuild", found[-1].hash)
        assert found[-1].hash in first.reasons[0]
        with pytest.raises(DeniedError):  # by the policies of before
            again.cloud.create_vpg(SYSTEM, "acme", to("uk-south", name="crm"))
        check = again.cloud.verify_decisions(SYSTEM, "acme")
        assert check.whole, check
        assert "former database" in check.note
    finally:
        again.close()
        world.cloud = world.open()


@on_both
def test_a_record_is_its_enterprises_alone(world: RightsWorld):
    """R11: nobody sees another's decisions, nor the provider's; an auditor sees its own; an operator none."""
    furnish(world)
    world.law(OPEN_LAW)
    acme, brit = world.principal("acme"), world.principal("brit")
    for act in (world.cloud.decisions, world.cloud.verify_decisions, world.cloud.explain):
        with pytest.raises(NotFoundError) as foreign:
            act(brit, "acme")
        with pytest.raises(NotFoundError) as absent:
            act(brit, "nobody")
        assert str(foreign.value).replace("acme", "nobody") == str(absent.value)
    assert {d.enterprise for d in world.cloud.decisions(acme, "acme").items} == {"acme"}
    assert world.cloud.decisions(world.person("acme", Role.AUDITOR, "USA"), "acme").items
    for act in (world.cloud.decisions, world.cloud.verify_decisions):
        with pytest.raises(ForbiddenError):
            act(world.principal("acme", Role.ENTERPRISE_OPERATOR), "acme")
        with pytest.raises(ForbiddenError):
            act(acme, None)
    assert [rights.enterprise for rights in world.cloud.rights_matrix(acme)] == ["acme"]
    own = world.decisions(None)
    assert {d.point for d in own} == {"policies"}
    with world.cloud._database.read("brit") as session:
        assert session.scalars(select(tables.Decision).where(tables.Decision.enterprise == "acme")).all() == []
        assert session.get(tables.DecisionHead, "acme") is None


def test_what_a_provider_does_is_on_the_enterprises_record(world: RightsWorld):
    """R13.3: the enterprise sees who acted on its protection, from where."""
    world.two_targets(world.principal("acme"))
    operator = world.principal(None, Role.PROVIDER_ADMIN)
    world.cloud.insert_checkpoint(operator, "acme", "erp", CheckpointOrder(tag="t"))
    last = world.cloud.decisions(world.principal("acme"), "acme", PageRequest(limit=1000)).items[-1]
    assert last.input["operator"] == {"role": "provider-admin", "jurisdiction": "USA"}


def test_a_record_has_pages(world: RightsWorld):
    found = furnish(world)
    page = world.cloud.decisions(SYSTEM, "acme", PageRequest(limit=4))
    assert [d.number for d in page.items] == [1, 2, 3, 4]
    rest = world.cloud.decisions(SYSTEM, "acme", PageRequest(limit=1000, cursor=page.next_cursor))
    assert page.items + rest.items == found


@on_both
def test_a_record_outlives_its_enterprise(world: RightsWorld):
    """R13: never dropped; one of the same name goes on with it."""
    who = world.principal("brit")
    world.protect(who, enterprise="brit")
    world.done(world.cloud.remove_vpg(who, "brit", "erp"), "brit")
    before = world.decisions("brit")
    world.cloud.remove_enterprise(SYSTEM, "brit")
    world.register("brit")
    world.protect(world.principal("brit"), enterprise="brit")
    after = world.decisions("brit")
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert world.cloud.verify_decisions(SYSTEM, "brit").whole


@on_both
def test_policies_are_kept_and_only_good_ones_taken(world: RightsWorld):
    """R13: numbers, who, when; the first from the configured folder; what does not compile changes nothing."""
    (first,) = world.cloud.policies(SYSTEM).items
    assert (first.number, first.sources.regulation) == (1, OPEN_LAW)
    assert sorted(first.sources.modules) == sorted(path.name for path in world.policies.glob("*.rego"))
    made = world.law(LAW)
    assert (made.number, made.revision, made.by) == (2, world.rights.state().wanted, "the provider itself")
    for change in (
        PolicyChange(modules={"x.rego": "package dr_cloud.x\n\nthis is none"}),
        PolicyChange(modules={"x.rego": "package dr_cloud.x\n"}),
        PolicyChange(),
    ):
        with pytest.raises(InvalidError):
            world.cloud.apply_policies(SYSTEM, change)
    assert [row.number for row in world.cloud.policies(SYSTEM).items] == [2, 1]
    assert world.rights.state().revision == made.revision
    assert [(d.subject, d.revision) for d in world.decisions(None)] == [
        ("policies/1", first.revision),
        ("policies/2", made.revision),
    ]
    world.cloud.apply_policies(SYSTEM, PolicyChange(modules=first.sources.modules))
    assert world.cloud.policies(SYSTEM).items[0].sources.regulation == LAW


def test_a_rights_manager_that_lost_its_state_is_told_again(world: RightsWorld):
    """R13: policies and facts are the manager's; whoever wants something else is put right within a look."""
    wanted = world.rights.state().wanted
    world.rights.put_sources(world.cloud._context.policies.in_force().model_copy(update={"regulation": LAW}))
    assert world.rights.state().wanted != wanted
    world.look()
    assert world.rights.state().wanted == wanted


def test_facts_follow_what_is_registered(world: RightsWorld, monkeypatch: pytest.MonkeyPatch):
    """R13.1: who is registered can be decided on at once; one whose facts could not be told is denied."""
    told: list[frozenset[str]] = []
    inner = world.rights.put_facts
    monkeypatch.setattr(
        world.rights, "put_facts", lambda facts: told.append(frozenset(facts.enterprises)) or inner(facts)
    )
    world.cloud.remove_enterprise(SYSTEM, "isle")
    assert told[-1] == {"acme", "brit"}

    def away(facts: object) -> str:
        raise UnavailableError("the rights manager is away")

    monkeypatch.setattr(world.rights, "put_facts", away)
    world.register("isle")
    with pytest.raises(DeniedError):
        world.cloud.create_vpg(SYSTEM, "isle", to("us-east", source_site="isle-hq"))
    monkeypatch.undo()
    world.cloud._context.policies.tell()
    world.cloud.create_vpg(SYSTEM, "isle", to("us-east", source_site="isle-hq"))


@on_both
def test_two_processes_keep_one_chain(world: RightsWorld):
    """R13: managers over one database add to one record; neither repeats a number of the other's."""
    who = world.principal("acme")
    world.two_targets(who)
    other = world.open()
    try:
        begun = threading.Barrier(2)

        def read(cloud: object) -> None:
            begun.wait()
            for _ in range(15):
                cloud.checkpoints(who, "acme", "erp", "us")  # type: ignore[attr-defined]

        threads = [threading.Thread(target=read, args=[cloud]) for cloud in (world.cloud, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [d.action for d in world.decisions()][-30:] == ["read"] * 30
        assert world.cloud.verify_decisions(SYSTEM, "acme").whole
    finally:
        other.close()


def test_an_export_proves_itself(world: RightsWorld):
    """R13: lines of JSON with which anybody can compute the chain."""
    lines = [decision.model_dump_json() for decision in furnish(world)]
    previous = ""
    for line in lines:
        decision = Decision.model_validate(json.loads(line))
        assert decision.previous == previous
        assert decision.digest() == decision.hash
        previous = decision.hash
