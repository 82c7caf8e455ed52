"""`sqlite`: a database is whole, and answers a query as expected.

The database is copied with its write-ahead log or rollback journal, as a machine that comes up again finds it: SQLite
recovers from them on the copy. The shared-memory file is not copied; SQLite makes it of the log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

import apsw
from pydantic import BaseModel, ConfigDict, model_validator

from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import FailedError
from dr_cloud.recovery.probes.root import Root

_COMPLAINTS_MAX: Final = 20
_ROWS_MAX: Final = 1000
_BESIDE: Final = ("-wal", "-journal")


class SqliteProbe(BaseModel):
    """A SQLite database is whole and answers a query as expected."""

    model_config = ConfigDict(extra="forbid")

    path: str
    """In the file system that is mounted."""
    partition: int | None = None
    """Where there are several file systems; 0 is a whole disk."""
    query: str | None = None
    expect: str | None = None
    """The query's whole answer: columns parted by `|`, rows by line ends, NULL as nothing."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.expect is not None and self.query is None:
            raise ValueError("expect= needs a query=")
        return self

    def run(self, bench: Bench) -> str:
        """Copy, check, ask."""
        root = Root(bench.mount(bench.the_volume(self.partition)))
        path = root.real(self.path)
        copy = bench.home / "database"
        size = root.copy(path, copy, bench.apart.user)
        for end in _BESIDE:
            if root.exists(path + end):
                print(f"with {path}{end}: {root.copy(path + end, Path(f'{copy}{end}'), bench.apart.user)} bytes")
        answer = bench.apart.call(lambda: self._look(copy))
        return f"{self.path} is whole ({size} bytes)" + (f", answers {answer!r}" if self.query is not None else "")

    def _look(self, copy: Path) -> str:
        try:
            database = apsw.Connection(str(copy), flags=apsw.SQLITE_OPEN_READWRITE)
            database.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
            database.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
            complaints = [str(line) for (line,) in database.execute(f"pragma integrity_check({_COMPLAINTS_MAX})")]
            if complaints != ["ok"]:
                print("\n".join(complaints))
                raise FailedError(f"{self.path} is damaged: {' '.join(complaints[0].split())[:200]}")
            if self.query is None:
                return ""
            rows = []
            for row in database.execute(self.query):
                rows.append("|".join("" if value is None else str(value) for value in row))
                if len(rows) == _ROWS_MAX:
                    break
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise FailedError(f"{self.path} is damaged: {error}") from error
        except apsw.Error as error:
            raise FailedError(f"{self.path}: {type(error).__name__}: {error}") from error
        return matched("\n".join(rows), self.expect)


def matched(answer: str, expect: str | None) -> str:
    """Return a query's answer. Raises `FailedError` if another was expected."""
    print(f"answer: {answer}")
    if expect is not None and answer.strip() != expect.strip():
        raise FailedError(f"the query answers {answer[:200]!r}, not {expect[:200]!r}")
    return answer[:200]
