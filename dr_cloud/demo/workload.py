"""The production machine of the demonstration, a process of its own: a database that commits rows all the time.

Run as `python -m dr_cloud.demo.workload URI DIRECTORY [--corrupt-from A --corrupt-to B]`. It prints one line when it
begins and stops on SIGTERM. If it is given two times: at a moment that it draws at random, A to B seconds after that,
and tells nobody, it overwrites pages of old rows with noise, as a ransomware or a failing controller would; the
database does not notice. It writes to DIRECTORY:

    commits    per committed row: u64 number, u64 time before the commit, u64 time after it
    versions   per block written: `dr_cloud.demo.disks.VERSION_DTYPE`
    secret     JSON: when the corruption was begun and acknowledged; to be read only after the search
"""

from __future__ import annotations

import json
import math
import random
import secrets
import signal
import time
from pathlib import Path
from typing import Final

import apsw
import numpy as np
import typer

from dr_cloud.demo.disks import ByteDisk, RawFile
from dr_cloud.demo.sqlite_disk import DiskVfs, open_database
from dr_cloud.nbd.client import NbdClient

COMMIT_DTYPE: Final = np.dtype([("number", "<u8"), ("begun_ns", "<u8"), ("acked_ns", "<u8")])
_CORRUPTED_PAGES: Final = 8
_PAGE_BYTES: Final = 4096
_DATABASE_AT: Final = 1 << 20
_WORDS: Final = ("anvil", "beacon", "cedar", "dynamo", "ember", "fathom", "girder", "harbor", "ingot", "jetty", "keel")


def insert(database: apsw.Connection, number: int) -> None:
    """Commit one row, and the running total in the same transaction."""
    text = " ".join(random.choices(_WORDS, k=20))
    with database:
        database.execute("insert into orders values (?, ?, ?)", (number, text, secrets.token_bytes(120)))
        database.execute("update totals set orders = ?", (number,))


def fill(image: Path, rows: int) -> None:
    """Make the database on a raw disk image, with `rows` rows: what the disk holds before it is protected."""
    raw = RawFile(image)
    vfs = DiskVfs(f"fill {image}", ByteDisk(raw))  # SQLite knows them by name, and several are filled at once
    database = open_database(vfs)
    database.execute("create table orders (number integer primary key, text, payload)")
    database.execute("create table totals (orders integer)")
    database.execute("insert into totals values (0)")
    database.execute("begin")
    for number in range(1, rows + 1):
        database.execute(
            "insert into orders values (?, ?, ?)",
            (number, " ".join(random.choices(_WORDS, k=20)), secrets.token_bytes(120)),
        )
    database.execute("update totals set orders = ?", (rows,))
    database.execute("commit")
    database.close()
    raw.close()


def corrupt(disk: ByteDisk, pages: int) -> None:
    """Overwrite pages of rows that nobody has touched for long."""
    for page in random.sample(range(10, max(20, pages // 2)), _CORRUPTED_PAGES):
        disk.pwrite(_DATABASE_AT + page * _PAGE_BYTES, secrets.token_bytes(_PAGE_BYTES))


def main(
    uri: str,
    directory: Path,
    pause_seconds: float = 0.0,
    corrupt_from: float = math.inf,
    corrupt_to: float = math.inf,
) -> None:
    """Commit rows until SIGTERM; corrupt old ones at a moment drawn between the two times."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    with (
        open(directory / "versions", "wb", buffering=0) as versions,
        open(directory / "commits", "wb", buffering=0) as commits,
        NbdClient.connect(uri) as client,
    ):
        disk = ByteDisk(client, versions)
        vfs = DiskVfs("production", disk)
        database = open_database(vfs)
        database.execute("pragma wal_autocheckpoint=200")
        (number,) = database.execute("select max(number) from orders").fetchone() or (0,)
        (pages,) = database.execute("pragma page_count").fetchone() or (0,)
        corrupted = False
        print("committing", flush=True)
        drawn = random.SystemRandom().uniform(corrupt_from, corrupt_to) if corrupt_from < math.inf else math.inf
        moment = time.monotonic() + drawn
        while not stop:
            number += 1
            begun_ns = time.time_ns()
            insert(database, number)
            commits.write(np.array([(number, begun_ns, time.time_ns())], COMMIT_DTYPE).tobytes())
            if not corrupted and time.monotonic() >= moment:
                begun_ns = time.time_ns()
                corrupt(disk, pages)
                secret = {"begun_ns": begun_ns, "acked_ns": time.time_ns()}
                (directory / "secret").write_text(json.dumps(secret))
                corrupted = True
            time.sleep(pause_seconds)
        client.flush()


if __name__ == "__main__":
    typer.run(main)
