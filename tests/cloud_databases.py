"""Databases for tests of the manager: each test gets a new one, of SQLite and of PostgreSQL.

PostgreSQL is Debian's own, started once in a session, in a folder of its own, on a unix socket only. It refuses root,
so it runs as the user `postgres` then. The manager's role owns its databases and is no superuser, as it should be.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from cloud_world import World

from dr_cloud.manager.db import migrate, open_engine

ROLE = "manager"
_names = itertools.count(1)


class Postgres:
    """One server."""

    def __init__(self, bin_dir: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="drc-pg-"))
        self._migrated = False
        user = {}
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        data = self.folder / "data"
        initdb = [bin_dir / "initdb", "-D", data, "-U", "owner", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=self.folder, **user)
        options = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "max_connections": 200,
        }
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [bin_dir / "postgres", "-D", data, *arguments], stderr=log, stdout=log, cwd=self.folder, **user
            )
        self._wait()
        self._run(f"CREATE ROLE {ROLE} LOGIN")

    def _wait(self) -> None:
        for _ in range(200):
            with contextlib.suppress(psycopg.OperationalError):
                self._run("SELECT 1")
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text(errors="replace"))

    def _run(self, statement: str) -> None:
        with psycopg.connect(host=str(self.folder), user="owner", dbname="postgres", autocommit=True) as connection:
            connection.execute(statement)

    def create(self, role: str = ROLE, template: str = "") -> tuple[str, Callable[[], None]]:
        """Return the URL of a new database, and what drops it."""
        name = f"test{next(_names)}"
        self._run(f"CREATE DATABASE {name} OWNER {role} TEMPLATE {template or 'template1'}")
        return self._url(role, name), lambda: self._run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def create_migrated(self) -> tuple[str, Callable[[], None]]:
        """Do so, with the schema in it: migrations run once for all."""
        if not self._migrated:
            self._run(f"CREATE DATABASE migrated OWNER {ROLE}")
            engine = open_engine(self._url(ROLE, "migrated"))
            migrate(engine)
            engine.dispose()
            self._migrated = True
        return self.create(template="migrated")

    def _url(self, role: str, name: str) -> str:
        return f"postgresql://{role}@/{name}?host={self.folder}"

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_server: list[Postgres] = []


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest, require_tool: Callable[[str], str]) -> Postgres:
    """The session's PostgreSQL."""
    if not _server:
        newest = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, newest[-1:])])
        _server.append(Postgres(Path(require_tool("initdb")).resolve().parent))
        request.config.add_cleanup(lambda: _server.pop().stop())
    return _server[0]


def new_world(request: pytest.FixtureRequest, folder: Path, kind: type[World] = World) -> Iterator[World]:
    """Give a manager on a new database of the kind `request.param`, with two enterprises."""
    url, drop = "", lambda: None
    if request.param == "postgresql":
        url, drop = request.getfixturevalue("postgres").create_migrated()
    made = kind(folder, url)
    made.populate()
    yield made
    made.close()
    drop()


BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.system)]


@pytest.fixture(params=BOTH)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A manager on a new database, with two enterprises."""
    yield from new_world(request, tmp_path / "provider")
