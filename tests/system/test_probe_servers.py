"""Probes that start something from the disks: a PostgreSQL server, a whole machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import probe_guest
import psycopg
import pytest
from probe_world import MIB, World, ext4, overwrite, run, wait_until, world

__all__ = ["world"]
pytestmark = [pytest.mark.system, pytest.mark.fuse]
NOBODY = 65534
ROWS = 5000


class Database:
    """A data directory as it is after its server was killed, and where its table lies."""

    def __init__(self, folder: Path, rows: int, table: str) -> None:
        self.folder = folder
        self.rows = rows
        self.table = table


def postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("postgresql is missing; see: python3 infra/tools.py")
    return found[-1].parent


@pytest.fixture(scope="module")
def database(world: World) -> Database:
    """A server that is killed while it writes; its settings would run a program and open a port."""
    programs = postgres_programs()
    tree = world.folder / "pg"
    data = tree / "lib" / "main"
    tree.mkdir()
    (tree / "lib").mkdir()
    os.chown(tree / "lib", NOBODY, NOBODY)
    drop = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    init = ("-U", "postgres", "--no-sync", "-k", "--wal-segsize=1", "-E", "UTF8", "--locale=C")
    run(programs / "initdb", "-D", data, *init, **drop)
    with (data / "postgresql.auto.conf").open("a") as settings:
        settings.write(
            "archive_mode = on\narchive_command = 'touch ran'\nwal_level = logical\nmax_prepared_transactions = 3\n"
        )
    log = (world.folder / "pg.log").open("wb")
    port = os.getpid() % 30000 + 20000
    command = [programs / "postgres", "-D", data, "-c", "listen_addresses=", "-k", "/tmp", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log, **drop)
    try:
        where = f"host=/tmp port={port} user=postgres dbname=postgres"

        def up() -> bool:
            try:
                psycopg.connect(where).close()
            except psycopg.OperationalError:
                return False
            return True

        assert wait_until(up, 20)
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute("create table orders (number int primary key, note text)")
            connection.execute(f"insert into orders select n, repeat('x', 50) from generate_series(1, {ROWS}) n")
            connection.execute("select pg_create_logical_replication_slot('slot', 'pgoutput')")
            connection.execute("create table later (number int)")
            connection.execute("begin")
            connection.execute("insert into later values (1)")
            connection.execute("prepare transaction 'pending'")
            connection.execute("checkpoint")
            connection.execute("insert into orders values (0, 'after the last checkpoint')")
            (table,) = connection.execute("select pg_relation_filepath('orders')").fetchone()
            server.kill()
    finally:
        server.kill()
        server.wait()
        log.close()
    assert (data / "postmaster.pid").exists()
    return Database(data, ROWS + 1, table)


def image(world: World, name: str, tree: Path) -> str:
    return ext4(world.images / name, tree, 128 * MIB, "-J", "size=4").name


@pytest.fixture(scope="module")
def postgres_disk(world: World, database: Database) -> str:
    return image(world, "postgres", database.folder.parents[1])


def test_a_killed_server_recovers(world: World, database: Database, postgres_disk: str) -> None:
    """R14.3: a database as after a power failure recovers to what was committed, is whole, and answers."""
    spec = "postgres:path=/lib/main,query=select count(*), min(note) from orders,expect=5001|after the last checkpoint"
    before = (world.images / postgres_disk).stat().st_mtime_ns
    result = world.probe(spec, postgres_disk)
    assert result.passed, result.output
    assert result.reason.startswith("PostgreSQL ")
    assert "tables are whole, answers '5001|after the last checkpoint'" in result.reason
    assert "automatic recovery in progress" in result.output
    assert "database system is shut down" in result.output
    # Nothing that the directory's own settings name is run.
    assert "archive" not in result.output
    assert (world.images / postgres_disk).stat().st_mtime_ns == before
    wrong = world.probe(
        "postgres:path=/lib/main,amcheck=no,query=select count(*) from orders,expect=5000", postgres_disk
    )
    assert wrong.reason == "the query answers '5001', not '5000'"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("postgres:path=/lib/other", "/lib/other: No such file or directory"),
        ("postgres:path=/lib", "/lib/PG_VERSION: No such file or directory"),
        ("postgres:path=/lib/main,database=gone", 'database "gone" does not exist'),
        ("postgres:path=/lib/main,amcheck=no,query=select * from gone", 'relation "gone" does not exist'),
    ],
)
def test_what_a_database_lacks_is_told(world: World, postgres_disk: str, spec: str, reason: str) -> None:
    result = world.probe(spec, postgres_disk)
    assert not result.passed
    assert reason in result.reason


def test_a_damaged_database_fails(world: World, database: Database) -> None:
    tree = world.folder / "pg-damaged"
    shutil.copytree(database.folder.parents[1], tree, symlinks=True)
    data = tree / "lib" / "main"
    overwrite(data / database.table, 8192 * 3 + 4000, os.urandom(2000))
    damaged = world.probe("postgres:path=/lib/main", image(world, "pg-table", tree))
    assert damaged.reason == "pg_amcheck finds damage (it ends with 2)"
    assert "orders" in damaged.output
    overwrite(data / "global" / "pg_control", 100, os.urandom(100))
    dead = world.probe("postgres:path=/lib/main", image(world, "pg-control", tree))
    assert "the server ended with 1 while it started" in dead.reason
    (data / "PG_VERSION").write_text("9\n")
    old = world.probe("postgres:path=/lib/main", image(world, "pg-old", tree))
    assert old.reason == "/lib/main is of PostgreSQL '9'; this node has not that server"


def test_logs_and_table_spaces_elsewhere_on_the_disk(world: World, database: Database) -> None:
    """Absolute links are the machine's own; a hostile one leads nowhere on this node."""
    tree = world.folder / "pg-links"
    shutil.copytree(database.folder.parents[1], tree, symlinks=True)
    data = tree / "lib" / "main"
    (tree / "srv").mkdir(mode=0o700)
    shutil.move(data / "pg_wal", tree / "srv" / "wal")
    (data / "pg_wal").symlink_to("/srv/wal")
    result = world.probe(
        "postgres:path=/lib/main,query=select count(*) from orders,expect=5001", image(world, "pg-wal", tree)
    )
    assert result.passed, result.output
    (data / "pg_wal").unlink()
    (data / "pg_wal").symlink_to(database.folder / "pg_wal")
    hostile = world.probe("postgres:path=/lib/main", image(world, "pg-hostile", tree))
    assert not hostile.passed
    assert "No such file" in hostile.reason


@pytest.fixture(scope="module")
def machine(world: World, require_tool: Callable[[str], str]) -> str:
    """The parameters of a guest, and its disk `guest`."""
    require_tool("qemu-system-x86_64")
    kernel = probe_guest.kernel()
    initrd = probe_guest.make_initrd(world.folder)
    image(world, "guest", probe_guest.make_root(world.folder))
    boot = f"boot:kernel={kernel},initrd={initrd},append=console=ttyS0 panic=-1 quiet"
    return f"{boot},memory_mib=256,accel=tcg,timeout=90"


def test_a_machine_boots(world: World, machine: str) -> None:
    """R14.7: a real kernel mounts its root from the stack, writes to it, and its data is right."""
    result = world.probe(machine, "guest")
    assert result.passed, result.output
    assert result.reason == "the console says 'login:' (emulation)"
    assert "var/data: OK" in result.output
    assert [made.path for made in result.artefacts] == ["boot/console.txt", "boot/screen.png"]
    assert (world.work / result.artefacts[0].path).read_bytes().rstrip().endswith(b"var/data: OK\r\nguest login:")
    assert (world.work / result.artefacts[1].path).read_bytes().startswith(b"\x89PNG")


def test_machines_that_do_not_boot(world: World, machine: str) -> None:
    """Damaged data, a damaged root, no boot loader, and a console that never says it: each with its reason."""
    image_of = world.images
    shutil.copy(image_of / "guest", image_of / "guest-data")
    at = (image_of / "guest").read_bytes().index(bytes(range(256)) * 4096)
    overwrite(image_of / "guest-data", at + 5000, b"ransom")
    data = world.probe(f"{machine},reject=damaged", "guest-data")
    assert data.reason == "the console says 'damaged'"
    shutil.copy(image_of / "guest", image_of / "guest-root")
    overwrite(image_of / "guest-root", 1024, os.urandom(1024))
    root = world.probe(f"{machine}", "guest-root")
    assert root.reason.startswith("the machine ended with 0")
    assert "boot/console.txt" in [made.path for made in root.artefacts]
    panic = world.probe(machine.replace("panic=-1 quiet", "quiet rdinit=/gone root=/dev/none") + "", "guest")
    assert panic.reason == "the console says 'Kernel panic'"
    start = time.monotonic()
    silent = world.probe("boot:match=never,timeout=6", "guest")
    assert silent.reason == "the console did not match 'never' in time"
    assert [made.path for made in silent.artefacts] == ["boot/console.txt", "boot/screen.png"]
    assert 2 < time.monotonic() - start < 11
    assert "are more than the probe may use" in world.probe("boot:memory_mib=4096", "guest").reason
