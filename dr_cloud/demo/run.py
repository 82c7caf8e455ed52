"""The demonstration, step by step: protect, corrupt, test many times at once, find the last clean one, leave no trace.

Everything is real: a database on a tapped disk, sealed frames, a journal in a store, stacks as Ray actors. What is
shown is checked against records that the workload itself keeps, apart from everything that dr_cloud does.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.table import Table

from dr_cloud.actors.provider import RunningStack
from dr_cloud.actors.stack import OpenedStack
from dr_cloud.demo.probe import Finding, probe, warm
from dr_cloud.demo.site import SCOPE, Demonstration
from dr_cloud.demo.workload import fill
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.units import format_size, format_time
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.search import CleanSearch
from dr_cloud.stack.stack import StackStatistics

DISK_BYTES: Final = 64 << 20
ROWS_BEFORE: Final = 20_000
RUN_SECONDS: Final = 16.0
CORRUPT_FROM_SECONDS: Final = 3.0
CORRUPT_TO_SECONDS: Final = 13.0
_DISK: Final = "shop/shop"
_SVG_FORMAT: Final = re.sub(r"@font-face \{\{.*?\}\}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""The picture asks for no font from a network."""


class Tested(NamedTuple):
    """One recovery test: its time, what the probe found, what the stack counted."""

    at_ns: int
    finding: Finding
    first_byte_seconds: float
    statistics: StackStatistics


class DemoRun:
    """One run, with its console and its report."""

    def __init__(self, world: Demonstration, console: Console, parallel: int) -> None:
        """Run in `world` with `parallel` stacks at once."""
        self.world = world
        self.console = console
        self.parallel = parallel
        self.seconds: dict[str, float] = {}
        self.base = world.directory / "base.img"
        context = multiprocessing.get_context("spawn")
        self._workers = min(parallel, os.cpu_count() or 2)
        self._probes = ProcessPoolExecutor(self._workers, mp_context=context)

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Show what is done and note how long it took."""
        started = time.monotonic()
        with self.console.status(what):
            yield
        self.seconds[name] = round(time.monotonic() - started, 3)
        self.console.print(f"[green]✓[/] {what} [dim]{self.seconds[name]:.1f} s[/]")

    def warm_up(self) -> None:
        """Have the probes' processes imported and idle, as the stacks are."""
        list(self._probes.map(warm, range(self._workers)))

    def test(self, times_ns: list[int], *, compare_blocks: bool) -> list[Tested]:
        """Open a stack at each time, all in parallel, probe each, and end them."""
        stacks = self.world.provider.open_stacks(SCOPE, times_ns)
        with ThreadPoolExecutor(len(stacks)) as threads:
            opened = list(threads.map(_first_read, stacks))
        base = self.base if compare_blocks else None
        site = self.world.directory / "site"
        probing = [
            self._probes.submit(probe, stack.uris[_DISK][0], stack.at_ns, site, ROWS_BEFORE, base) for stack in opened
        ]
        findings = [job.result() for job in probing]
        statistics = [stack.close() for stack in stacks]
        return [
            Tested(stack.at_ns, finding, stat.first_byte_seconds or 0.0, stat)
            for stack, finding, stat in zip(opened, findings, statistics, strict=True)
        ]

    def find_last_clean(self, tested: list[Tested]) -> tuple[int, int, CleanSearch]:
        """Return the time of the last clean write, the time of the write after it, and the search."""
        dirty_ns = min((test.at_ns for test in tested if not test.finding.passed), default=None)
        if dirty_ns is None:
            raise DrCloudError("every test passed, also the last: the corruption is not in any stack")
        clean_ns = max((test.at_ns for test in tested if test.at_ns < dirty_ns), default=None)
        if clean_ns is None:
            raise DrCloudError(f"the first test failed already: {tested[0].finding.reason}")
        writes = self.world.provider.write_times(SCOPE, clean_ns, dirty_ns).tolist()
        times = [clean_ns, *writes]
        search = CleanSearch(len(times))
        while not search.done:
            candidates = search.next_candidates(self.parallel)
            round_tests = self.test([times[candidate] for candidate in candidates], compare_blocks=False)
            verdicts = [test.finding.passed for test in round_tests]
            search.answer(dict(zip(candidates, verdicts, strict=True)))
            marks = "".join("[green]●[/]" if passed else "[red]●[/]" for passed in verdicts)
            left = search.dirty - search.clean - 1
            self.console.print(f"  round {search.rounds}: {marks}  [dim]{left} writes left to look at[/]")
        return times[search.clean], times[search.dirty], search

    def hash_image(self, at_ns: int) -> str:
        """Return the hash of the replica's image at a time, read through a stack of its own."""
        (stack,) = self.world.provider.open_stacks(SCOPE, [at_ns])
        with NbdClient.connect(stack.wait_open().uris[_DISK][0]) as client:
            digest = hashlib.sha256(client.pread(0, client.size_bytes)).hexdigest()
        stack.close()
        return digest

    def write_to_a_stack(self, at_ns: int) -> tuple[int, int]:
        """Write noise over a stack's disk and stop it; return bytes written and bytes that its log took."""
        (stack,) = self.world.provider.open_stacks(SCOPE, [at_ns])
        written = 0
        with NbdClient.connect(stack.wait_open().uris[_DISK][0]) as client:
            for offset in range(0, client.size_bytes, 4 << 20):
                client.pwrite(offset, secrets.token_bytes(1 << 20))
                written += 1 << 20
        return written, stack.close().stored_bytes

    def close(self) -> None:
        """Let the probes' processes go."""
        self._probes.shutdown()


def _first_read(stack: RunningStack) -> OpenedStack:
    """Wait for a stack and read its first 4 KiB: the stack counts the time from the request to the answer."""
    opened = stack.wait_open()
    with NbdClient.connect(opened.uris[_DISK][0]) as client:
        client.pread(0, 4096)
    return opened


def run_demo(parallel: int, report: Path | None, picture: Path | None) -> bool:
    """Run the demonstration; return whether everything that it shows is right.

    Args:
        parallel: Stacks at once.
        report: Where to write the report as JSON.
        picture: Where to save what was shown as SVG.
    """
    console = Console(highlight=False, record=picture is not None)
    directory = Path(tempfile.mkdtemp(prefix="drc-"))
    world = Demonstration(directory, parallel)
    run = DemoRun(world, console, parallel)
    try:
        right = _run(run, console, report)
        if picture is not None:
            console.save_svg(str(picture), title="dr-cloud demo", code_format=_SVG_FORMAT)
        return right
    finally:
        run.close()
        world.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _run(run: DemoRun, console: Console, report: Path | None) -> bool:
    world = run.world
    console.print(f"[bold]dr_cloud[/]: one protected database, {run.parallel} recovery tests at once\n")
    with run.phase("prepare", f"production disk with a database of {ROWS_BEFORE:,} rows"):
        with open(world.image, "wb") as image:
            image.truncate(DISK_BYTES)
        fill(world.image, ROWS_BEFORE)
        shutil.copyfile(world.image, run.base)
    with run.phase("provider", f"provider on Ray: target VDSA, {run.parallel} idle stacks"):
        world.start_provider()
        run.warm_up()
    with run.phase("protect", "site: tap and source VDSA; first synchronisation"):
        world.start_site()
        world.wait_until(lambda: world.newest_ns() > 0, "the first checkpoint")
    with run.phase("workload", f"{RUN_SECONDS:g} s of commits; corrupted at a moment that only the workload knows"):
        workload = world.start_workload(CORRUPT_FROM_SECONDS, CORRUPT_TO_SECONDS)
        workload.wait_ready()
        started_ns = time.time_ns()
        time.sleep(RUN_SECONDS)
        until_ns = time.time_ns()
        world.wait_until(lambda: world.newest_ns() > until_ns, "a checkpoint after the last of it")
    span = (started_ns, until_ns)
    times = sorted([*(random.randrange(*span) for _ in range(run.parallel - 2)), span[0], span[1]])
    with run.phase("stacks", f"{len(times)} stacks in parallel, at arbitrary times, while the database goes on"):
        tested = run.test(times, compare_blocks=True)
    with run.phase("search", "the last clean time, to within one write"):
        clean_ns, dirty_ns, search = run.find_last_clean(tested)
    with run.phase("isolation", "a stack is written to and stopped; production and replica are compared"):
        workload.stop()
        stopped_ns = time.time_ns()
        world.wait_until(lambda: world.newest_ns() > stopped_ns, "the last checkpoint")
        before = (_hash_file(world.image), run.hash_image(stopped_ns))
        written, stored = run.write_to_a_stack(stopped_ns)
        after = (_hash_file(world.image), run.hash_image(stopped_ns))
    console.print(_table(tested))
    for reason in sorted({test.finding.reason for test in tested if not test.finding.passed}):
        console.print(f"  [red]fail[/]: {reason}", highlight=False, markup=True)
    # Only now is it looked at when the corruption really came.
    secret = json.loads((world.directory / "site" / "secret").read_text())
    found = secret["begun_ns"] <= dirty_ns <= secret["acked_ns"] and clean_ns < secret["begun_ns"]
    unchanged = before == after and before[0] == before[1]
    wrong = sum(test.finding.blocks_wrong for test in tested)
    verdicts_right = all(test.finding.passed == (test.at_ns < dirty_ns) for test in tested)
    _line(console, found, f"last clean time {format_time(clean_ns)}, found in {search.rounds} rounds")
    _line(console, found, f"the next write, at {format_time(dirty_ns)[11:]}, is the corruption's first")
    _line(console, verdicts_right, "every verdict is right: before it all tests pass, from it on all fail")
    checked = sum(test.finding.blocks_checked for test in tested)
    _line(console, wrong == 0, f"{checked:,} blocks compared with the workload's own record, {wrong} wrong")
    _line(console, unchanged, f"{format_size(written)} written to a stack, {format_size(stored)} stored, gone with it")
    _line(console, unchanged, "production and replica are equal, and as they were before")
    right = found and verdicts_right and wrong == 0 and unchanged
    if report is not None:
        report.write_text(json.dumps(_report(run, tested, clean_ns, right), indent=2) + "\n")
    console.print(f"\n[bold]{'All right' if right else '[red]Something is wrong[/]'}[/] "
                  f"in {sum(run.seconds.values()):.0f} s")  # fmt: skip
    return right


def _line(console: Console, good: bool, text: str) -> None:
    console.print(f"{'[green]✓[/]' if good else '[red]✗[/]'} {text}")


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _table(tested: list[Tested]) -> Table:
    table = Table(title="Recovery tests", title_justify="left")
    table.add_column("time (UTC)")
    table.add_column("verdict")
    for name in ("rows", "expected", "first byte", "stored"):
        table.add_column(name, justify="right", no_wrap=True)
    for test in tested:
        finding = test.finding
        low, high = finding.rows_low, finding.rows_high
        table.add_row(
            format_time(test.at_ns)[11:23],
            "[green]pass[/]" if finding.passed else "[red]fail[/]",
            f"{finding.rows:,}" if finding.rows else "–",
            f"{low:,}" if low == high else f"{low:,}–{high:,}",
            f"{test.first_byte_seconds * 1000:.0f} ms",
            format_size(test.statistics.stored_bytes),
        )
    return table


def _report(run: DemoRun, tested: list[Tested], clean_ns: int, right: bool) -> dict[str, Any]:
    return {
        "right": right,
        "stacks": [
            {
                "at": format_time(test.at_ns),
                "verdict": "pass" if test.finding.passed else "fail",
                "reason": test.finding.reason,
                "rows": test.finding.rows,
                "blocks_checked": test.finding.blocks_checked,
                "blocks_wrong": test.finding.blocks_wrong,
                "first_byte_seconds": round(test.first_byte_seconds, 6),
                "stored_bytes": test.statistics.stored_bytes,
            }
            for test in tested
        ],
        "last_clean": format_time(clean_ns),
        "denied": [],
        "seconds": run.seconds,
    }
