"""What the demonstration asks of one stack: does the database open, is it whole, does it hold what it held then?

Runs in processes of its own, so that eight stacks are probed on all cores.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NamedTuple

import apsw
import numpy as np
from numpy.typing import NDArray

from dr_cloud.demo.disks import ByteDisk, Record
from dr_cloud.demo.sqlite_disk import DiskVfs, open_database
from dr_cloud.demo.workload import COMMIT_DTYPE
from dr_cloud.nbd.client import NbdClient


class Finding(NamedTuple):
    """What a probe found on one stack."""

    passed: bool
    reason: str
    rows: int
    rows_low: int
    """Rows whose commit was acknowledged by the stack's time."""
    rows_high: int
    """Rows whose commit was begun by the stack's time."""
    blocks_checked: int
    blocks_wrong: int


def read_commits(directory: Path) -> NDArray[np.void]:
    """Return the log of commits, ascending."""
    data = (directory / "commits").read_bytes()
    size = COMMIT_DTYPE.itemsize
    return np.frombuffer(data[: len(data) // size * size], COMMIT_DTYPE)


def probe(uri: str, at_ns: int, directory: Path, rows_before: int, base: Path | None) -> Finding:
    """Probe the stack at `uri`.

    Args:
        uri: The stack's disk.
        at_ns: Its time.
        directory: Where the workload's logs are.
        rows_before: Rows that were there before the first commit of the log.
        base: The raw image before the workload; with it, every block is compared with the record.
    """
    with NbdClient.connect(uri) as client:
        blocks, wrong = Record(base, directory / "versions").check(client, at_ns) if base else (0, 0)
        commits = read_commits(directory)
        low = rows_before + int(np.searchsorted(commits["acked_ns"], at_ns, "right"))
        high = rows_before + int(np.searchsorted(commits["begun_ns"], at_ns, "right"))
        rows, reason = _check_database(client)
        if not reason and not low <= rows <= high:
            reason = f"{rows} rows, {low} to {high} expected"
        return Finding(not reason, reason, rows, low, high, blocks, wrong)


def be_quiet() -> None:
    """Begin a process of probes: Ctrl-C is for the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def warm(_: int) -> None:
    """Do nothing, in a process that has everything imported by then."""


def _check_database(client: NbdClient) -> tuple[int, str]:
    """Return the number of rows, and what is wrong (empty if nothing is)."""
    vfs = DiskVfs(f"stack-{id(client)}", ByteDisk(client))
    try:
        database = open_database(vfs)
        (answer,) = database.execute("pragma integrity_check(1)").fetchone() or ("no answer",)
        if answer != "ok":
            # The first line only names the database.
            return 0, str(answer).splitlines()[-1][:100]
        rows, highest = database.execute("select count(*), max(number) from orders").fetchone() or (0, 0)
        (total,) = database.execute("select orders from totals").fetchone() or (0,)
        database.close()
        if not rows == highest == total:
            return int(rows), f"{rows} rows, the last is {highest}, the total says {total}"
        return int(rows), ""
    except apsw.Error as error:
        return 0, f"{type(error).__name__}: {error}"[:100]
    finally:
        vfs.unregister()
