"""Tenancy: no statement crosses from one enterprise to another, on either database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from cloud_databases import BOTH, Postgres, new_world, postgres  # noqa: F401
from quiet_fabric import START_NS
from sqlalchemy import create_engine, delete, func, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.orm import aliased, selectinload

from dr_cloud.manager import tables
from dr_cloud.manager.db import migrate, open_engine
from dr_cloud.manager.tables import PROVIDER_ONLY, Base, Owned
from dr_cloud.manager.tenancy import EVERYONE, Database, TenancyError
from dr_cloud.model.errors import DrCloudError

OWNED = sorted((m.class_ for m in Base.registry.mappers if issubclass(m.class_, Owned)), key=lambda c: c.__name__)


@pytest.fixture(scope="module", params=BOTH)
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Two enterprises, each with a VPG and a row in every table of theirs."""
    worlds = new_world(request, tmp_path_factory.mktemp("provider"))
    world = next(worlds)
    for name in ("acme", "brit"):
        world.protect(world.principal(name), enterprise=name)
    found = Database(world.cloud._database.engine)
    with found.write(EVERYONE) as session:
        for name in ("acme", "brit"):
            for kind in OWNED:
                wanted = select(kind).where(kind.enterprise == name)
                if session.scalars(wanted.limit(1)).first() is None:
                    session.add(kind(**_row(kind, name)))
                    session.flush()
    yield found
    next(worlds, None)


def _row(kind: type[Any], enterprise: str) -> dict[str, Any]:
    """Return values for every column of a row that is wanted in a table."""
    known = {"enterprise": enterprise, "vpg": "erp", "site": f"{enterprise}-hq", "id": f"{enterprise}-id"}
    values: dict[str, Any] = {}
    for column in inspect(kind).columns:
        if column.name in known:
            values[column.key] = known[column.name]
        elif not column.nullable and column.default is None:
            kinds: dict[type, Any] = {int: START_NS, str: enterprise, bool: False, object: {}, float: 1.0}
            values[column.key] = kinds[column.type.python_type]
    return values


def test_every_table_is_a_tenants_or_on_the_list():
    """R11: no table can be forgotten by the wall."""
    mapped = {mapper.class_ for mapper in Base.registry.mappers}
    assert {kind for kind in mapped if not issubclass(kind, Owned)} == set(PROVIDER_ONLY)
    assert all("enterprise" in inspect(kind).columns for kind in mapped - set(PROVIDER_ONLY))
    assert {table.name for table in Base.metadata.tables.values()} == {kind.__tablename__ for kind in mapped}


def test_a_session_sees_its_own_rows_only(database: Database):
    """R11: whatever is asked, of every table."""
    for kind in OWNED:
        with database.read(EVERYONE) as session:
            everyones = set(session.scalars(select(kind.enterprise)))
        assert {"acme", "brit"} <= everyones, kind
        with database.read("acme") as session:
            other = aliased(kind)
            key = getattr(kind, inspect(kind).get_property_by_column(inspect(kind).primary_key[-1]).key)
            whole = session.scalars(select(kind)).all()
            assert {row.enterprise for row in whole} == {"acme"}
            assert session.scalars(select(kind).where(kind.enterprise == "brit")).all() == []
            assert session.scalars(select(other).where(other.enterprise == "brit")).all() == []
            assert session.execute(select(kind, other).join(other, kind.enterprise != other.enterprise)).all() == []
            assert session.scalar(select(func.count(key)).where(kind.enterprise == "brit")) == 0
            inner = select(kind.enterprise).where(kind.enterprise == "brit")
            assert session.scalars(select(tables.Enterprise).where(tables.Enterprise.enterprise.not_in(inner))).all()
            assert (
                session.scalars(
                    select(tables.Enterprise).where(select(other).where(other.enterprise == "brit").exists())
                ).all()
                == []
            )


def test_a_foreign_row_cannot_be_fetched_by_its_key(database: Database):
    """R11."""
    for kind in OWNED:
        names = [column.key for column in inspect(kind).primary_key]
        with database.read(EVERYONE) as session:
            foreign = session.scalars(select(kind).where(kind.enterprise == "brit").limit(1)).one()
            key = tuple(getattr(foreign, inspect(kind).get_property_by_column(inspect(kind).c[n]).key) for n in names)
        with database.read("acme") as session:
            assert session.get(kind, key) is None
            assert session.get(kind, key, with_for_update=True) is None


def test_relationships_do_not_cross(database: Database):
    """R11: eager or lazy."""
    with database.read("acme") as session:
        loads = (selectinload(tables.Vpg.targets), selectinload(tables.Vpg.disks))
        (eager,) = session.scalars(select(tables.Vpg).options(*loads)).all()
        assert {disk.enterprise for disk in eager.disks} == {"acme"}
        session.expire_all()
        (lazy,) = session.scalars(select(tables.Vpg)).all()
        assert [target.enterprise for target in lazy.targets] == ["acme"]


def test_foreign_rows_cannot_be_changed(database: Database):
    """R11: neither by statements nor by objects."""
    for kind in OWNED:
        with database.write("acme") as session:
            changed = session.execute(update(kind).where(kind.enterprise == "brit").values(enterprise="brit"))
            assert changed.rowcount == 0
            assert session.execute(delete(kind).where(kind.enterprise == "brit")).rowcount == 0
    with database.read(EVERYONE) as session:
        row = session.get_one(tables.Site, ("brit", "brit-hq"))
    with pytest.raises(TenancyError), database.write("acme") as session:
        merged = session.merge(row, load=False)
        merged.location = "elsewhere"
    with pytest.raises(TenancyError), database.write("acme") as session:
        session.add(tables.Site(enterprise="brit", name="new", jurisdiction="USA", location="", contact=""))
    with pytest.raises(TenancyError), database.write("acme") as session:
        session.delete(session.merge(row, load=False))


@pytest.mark.parametrize(
    "statement",
    [
        text("SELECT * FROM sites"),
        select(tables.Site.__table__),
        insert(tables.Site).values(enterprise="brit", name="x", jurisdiction="USA", location="", contact=""),
        update(tables.Site.__table__).values(location="x"),
        select(tables.CenterHost),
        select(func.count()).select_from(tables.Site),
    ],
    ids=["text", "table", "insert", "update", "provider", "count"],
)
def test_what_cannot_be_restricted_is_refused(database: Database, statement: Any):
    """R11: text, plain tables, bulk inserts, the provider's own tables."""
    with pytest.raises(TenancyError), database.read("acme") as session:
        session.execute(statement)


@pytest.mark.system
def test_postgresql_keeps_tenants_apart_by_itself(database: Database):
    """R11: raw statements under a tenant's setting meet the policies; without a setting nothing is seen."""
    engine = database.engine
    if engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no row-level security")
    for kind in OWNED:
        table = kind.__tablename__
        with engine.begin() as connection:
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 0
            connection.execute(text("SELECT set_config('dr_cloud.enterprise', 'acme', true)"))
            assert set(connection.execute(text(f"SELECT enterprise FROM {table}")).scalars()) == {"acme"}
            assert connection.execute(text(f"DELETE FROM {table} WHERE enterprise = 'brit'")).rowcount == 0
            with pytest.raises(DBAPIError), connection.begin_nested():
                connection.execute(text(f"UPDATE {table} SET enterprise = 'brit'"))
            connection.rollback()
    with pytest.raises(ProgrammingError, match="row-level security"), database.write("acme") as session:
        raw = "INSERT INTO registry (enterprise, changed, written) VALUES ('nobody', 1, 1)"
        session.connection().execute(text(raw))


@pytest.mark.system
def test_a_role_that_bypasses_the_policies_is_refused(postgres: Postgres):
    """R11."""
    url, drop = postgres.create("owner")
    with pytest.raises(DrCloudError, match="bypasses row-level security"):
        migrate(open_engine(url))
    drop()


@pytest.mark.system
def test_the_servers_role_cannot_become_mighty(postgres: Postgres):
    url, drop = postgres.create()
    with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("ALTER ROLE manager SUPERUSER")
    create_engine(url.replace("postgresql:", "postgresql+psycopg:")).dispose()
    drop()
