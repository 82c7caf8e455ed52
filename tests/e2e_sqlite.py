"""An ordinary SQLite user on a mounted file system: `commit DATABASE LOG` until SIGTERM, or `check DATABASE`.

`commit` appends to LOG, per commit: u64 number, u64 time before the commit, u64 time after it. `check` prints JSON:
what `pragma integrity_check` says, how many rows there are, and whether they are the first ones with their contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np

COMMIT_DTYPE = np.dtype([("number", "<u8"), ("begun_ns", "<u8"), ("acked_ns", "<u8")])


def payload(number: int) -> bytes:
    """Return what row `number` holds: 32 to 3200 bytes."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest() * (1 + number * 37 % 100)


def commit(database: Path, log: Path) -> None:
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    with contextlib.closing(sqlite3.connect(database)) as connection, open(log, "ab", buffering=0) as commits:
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=full")
        connection.execute("pragma wal_autocheckpoint=100")
        connection.execute("create table if not exists entries (number integer primary key, payload blob)")
        connection.commit()
        number = 0
        while not stop:
            number += 1
            begun_ns = time.time_ns()
            connection.execute("insert into entries values (?, ?)", (number, payload(number)))
            connection.commit()
            commits.write(np.array([(number, begun_ns, time.time_ns())], COMMIT_DTYPE).tobytes())


def check(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (integrity,) = connection.execute("pragma integrity_check").fetchone()
        rows = connection.execute("select number, payload from entries order by number").fetchall()
    right = all(number == at and data == payload(at) for at, (number, data) in enumerate(rows, 1))
    print(json.dumps({"integrity": integrity, "rows": len(rows), "right": right}))


if __name__ == "__main__":
    if sys.argv[1] == "commit":
        commit(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        check(Path(sys.argv[2]))
