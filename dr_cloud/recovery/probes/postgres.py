"""`postgres`: the server starts on the mounted data directory, recovers, its tables are whole, a query answers right.

A data directory may come from anyone. So the server runs as a user that nobody else is, with settings of ours (those
in the directory are set aside: they can name programs to run), without network and preloaded libraries, on a unix
socket in the probe's scratch space; nothing on the mount can be executed. The directory is changed on the layer: its
files are given to that user, a stale lock file and marks of a standby are removed, and absolute links (a WAL directory
or table spaces elsewhere on the same file system) are bent to where it is mounted.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from pydantic import BaseModel, ConfigDict, model_validator

from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import CannotRunError, FailedError
from dr_cloud.recovery.probes.root import Root
from dr_cloud.recovery.probes.sqlite import matched

_SERVERS: Final = Path("/usr/lib/postgresql")
"""Where Debian keeps them, by version."""
_SET_ASIDE: Final = ("postmaster.pid", "postgresql.auto.conf", "standby.signal", "recovery.signal")
_SETTINGS: Final = """\
listen_addresses = ''
shared_buffers = 32MB
max_connections = 10
autovacuum = off
archive_mode = off
wal_level = logical
max_wal_senders = 0
max_replication_slots = 1000
max_prepared_transactions = 1000
restore_command = ''
ssl = off
logging_collector = off
log_destination = stderr
fsync = off
data_sync_retry = off
dynamic_shared_memory_type = posix
"""
"""Recovery refuses to start with fewer slots or prepared transactions than the directory holds."""
_ROWS_MAX: Final = 1000
_STOP_SECONDS: Final = 3.0


class PostgresProbe(BaseModel):
    """A PostgreSQL server starts on the data directory, its tables are whole, a query answers as expected."""

    model_config = ConfigDict(extra="forbid")

    path: str
    """The data directory in the file system that is mounted, such as /var/lib/postgresql/15/main."""
    partition: int | None = None
    """Where there are several file systems; 0 is a whole disk."""
    user: str = "postgres"
    database: str = "postgres"
    amcheck: bool = True
    """Whether every table and index of the database is checked by pg_amcheck (PostgreSQL 14 and newer)."""
    query: str | None = None
    expect: str | None = None
    """The query's whole answer: columns parted by `|`, rows by line ends, NULL as nothing."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.expect is not None and self.query is None:
            raise ValueError("expect= needs a query=")
        return self

    def run(self, bench: Bench) -> str:
        """Start, check, ask, stop."""
        mount = bench.mount(bench.the_volume(self.partition), write=True)
        root = Root(mount)
        data = root.real(self.path)
        with root.open(f"{data}/PG_VERSION") as file:
            version = file.read(16).decode(errors="replace").strip()
        programs = _SERVERS / version / "bin"
        if not version.isdigit():
            raise FailedError(f"{self.path} is of PostgreSQL {version!r}, which there is not")
        if not (programs / "postgres").exists():
            raise CannotRunError(f"{self.path} is of PostgreSQL {version!r}; this node has not that server")
        take_over(mount, mount / data.lstrip("/"), bench.apart.user)
        server = self._start(bench, programs / "postgres", mount / data.lstrip("/"))
        with contextlib.closing(self._connect(server, bench)) as connection:
            answer = self._ask(connection)
            tables = self._check(bench, programs / "pg_amcheck") if self.amcheck else "not checked"
        server.terminate()  # "smart" would wait for clients, of which there are none
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(min(max(bench.seconds_left - _STOP_SECONDS, 0), 60))
        if server.returncode != 0:
            raise FailedError(f"the server did not stop cleanly ({server.returncode})")
        return f"PostgreSQL {version} recovers, its tables are {tables}" + (f", answers {answer!r}" if answer else "")

    def _start(self, bench: Bench, program: Path, data: Path) -> subprocess.Popen[bytes]:
        settings = bench.home / "settings.conf"
        settings.write_text(_SETTINGS)
        access = bench.home / "access.conf"
        access.write_text("local all all trust\n")
        (bench.home / "names.conf").write_text("")
        for path in (settings, access, bench.home / "names.conf"):
            path.chmod(0o644)
        places = {"config_file": settings, "hba_file": access, "ident_file": bench.home / "names.conf"}
        options = [f"--{name}={place}" for name, place in places.items()]
        return bench.apart.start(program, "-D", data, *options, f"--unix_socket_directories={bench.home}")

    def _connect(self, server: subprocess.Popen[bytes], bench: Bench) -> psycopg.Connection[Any]:
        """Wait for the end of recovery."""
        while True:
            try:
                return psycopg.connect(
                    host=str(bench.home), user=self.user, dbname=self.database, autocommit=True, connect_timeout=10
                )
            except psycopg.OperationalError as error:
                said = str(error).strip().splitlines()[-1]
            if server.poll() is not None:
                raise FailedError(f"the server ended with {server.returncode} while it started; see the output")
            if bench.seconds_left < _STOP_SECONDS:
                raise FailedError(f"the server takes no connections in time: {said}")
            if "does not exist" in said:
                raise FailedError(f"the server says: {said}")
            time.sleep(0.05)

    def _ask(self, connection: psycopg.Connection[Any]) -> str:
        if self.query is None:
            return ""
        try:
            rows = connection.execute(self.query).fetchmany(_ROWS_MAX)
        except psycopg.Error as error:
            raise FailedError(f"the query fails: {str(error).strip().splitlines()[0]}") from error
        lines = ("|".join("" if value is None else str(value) for value in row) for row in rows)
        return matched("\n".join(lines), self.expect)

    def _check(self, bench: Bench, program: Path) -> str:
        where = ("-h", bench.home, "-U", self.user, "-d", self.database)
        done = bench.apart.run(program, *where, "--install-missing", "--heapallindexed")
        if done.code:
            raise FailedError(f"pg_amcheck finds damage (it ends with {done.code})")
        return "whole"


def take_over(mount: Path, data: Path, user: int) -> None:
    """Make a data directory on a layer fit to be started by `user`."""
    for name in _SET_ASIDE:
        with contextlib.suppress(FileNotFoundError):
            (data / name).unlink()
    links = [data / "pg_wal", *(data / "pg_tblspc").glob("*")]
    places = [data]
    for link in links:
        if link.is_symlink():
            target = Root(mount).real(os.path.join("/", os.path.relpath(link.parent, mount), os.readlink(link)))
            link.unlink()
            link.symlink_to(mount / target.lstrip("/"))
            places.append(mount / target.lstrip("/"))
    for place in places:
        for _, folders, names, at in os.fwalk(place):
            for name in (*folders, *names):
                os.chown(name, user, user, dir_fd=at, follow_symlinks=False)
            os.fchown(at, user, user)
    data.chmod(0o700)
    # The way there must be open; on the layer it may be.
    for folder in {parent for place in places for parent in place.parents if parent.is_relative_to(mount)}:
        folder.chmod(folder.stat().st_mode | 0o111)
