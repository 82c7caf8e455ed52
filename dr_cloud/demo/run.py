"""The demonstration, step by step: three enterprises protected, one corrupted, many tests at once, no trace left.

Everything is real: databases on tapped disks, a provider with four data centers, a paired site for each enterprise,
links with TLS, sealed frames, journals in stores, stacks. What is asked of it goes through the API. What is shown is
checked against records that the workloads themselves keep, apart from everything that dr_cloud does.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from dr_cloud.client.client import Client
from dr_cloud.demo.cloud import LocalCloud
from dr_cloud.demo.enterprise import Denied, Enterprise, Size
from dr_cloud.demo.probe import be_quiet, warm
from dr_cloud.demo.recovery import Recovery, Tested
from dr_cloud.demo.report import Outcome, document, enterprises_table, matrix_table, tests_table
from dr_cloud.demo.wall import aim
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import EnterpriseConfig, ProviderConfig, load_yaml
from dr_cloud.model.units import format_size, format_time
from dr_cloud.recovery.search import CleanSearch

ROOT: Final = Path(__file__).resolve().parents[2]
CORRUPTED: Final = "acme-us"
RUN_SECONDS: Final = 12.0
CORRUPT_FROM_SECONDS: Final = 3.0
CORRUPT_TO_SECONDS: Final = 9.0
STACKS_OF_OTHERS: Final = 2
_PATH_LENGTH_MAX: Final = 40
"""Of the directory: Ray's sockets lie in it, and a unix socket's path has 107 bytes."""
_SVG_FORMAT: Final = re.sub(r"@font-face \{\{.*?\}\}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""The picture asks for no font from a network."""

R = TypeVar("R")


class DemoRun:
    """One run, with its console and its report."""

    def __init__(self, directory: Path, console: Console, parallel: int) -> None:
        """Run in `directory` with `parallel` stacks at once."""
        self.console = console
        self.parallel = parallel
        self.seconds: dict[str, float] = {}
        self.cloud = LocalCloud(directory)
        self.file, self.config = _provider(parallel)
        self.enterprises = [self._enterprise(tenant) for tenant in _tenants()]
        self.corrupted = self.enterprises[0]
        self._threads = ThreadPoolExecutor(len(self.enterprises))
        self._workers = min(parallel, os.cpu_count() or 2)
        context = multiprocessing.get_context("spawn")
        self._probes = ProcessPoolExecutor(self._workers, mp_context=context, initializer=be_quiet)
        self.recovery: dict[str, Recovery] = {}

    def _enterprise(self, tenant: EnterpriseConfig) -> Enterprise:
        centers = [center for center in self.config.data_centers if center.jurisdiction == tenant.jurisdiction]
        if tenant.name == CORRUPTED:
            size = Size(32 << 20, 10_000, 0.005, self.parallel)
        else:
            size = Size(16 << 20, 3_000, 0.03, STACKS_OF_OTHERS)
        return Enterprise(self.cloud, tenant, centers, size)

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

    def each(self, do: Callable[[Enterprise], R]) -> list[R]:
        """Do something for all enterprises at once."""
        return list(self._threads.map(do, self.enterprises))

    def start(self, admin: Client) -> None:
        """Bring every enterprise in, and wait until all are protected."""
        for enterprise in self.enterprises:
            enterprise.join(admin)
        self.each(lambda enterprise: enterprise.protect())
        self.recovery = {one.name: Recovery(one, self._probes) for one in self.enterprises}
        self.wait_newest(0, "the first checkpoint of every group")

    def try_abroad(self) -> list[Denied]:
        """Have each enterprise try every data center that is not of its jurisdiction; return the refusals."""

        def attempt(enterprise: Enterprise) -> list[Denied]:
            home = enterprise.config.jurisdiction
            return enterprise.try_abroad([c for c in self.config.data_centers if c.jurisdiction != home])

        return [refusal for refusals in self.each(attempt) for refusal in refusals]

    def wait_newest(self, after_ns: int, what: str, enterprises: Sequence[Enterprise] = ()) -> None:
        """Wait until every target of these enterprises (all) has an image of a time after this."""
        for enterprise in enterprises or self.enterprises:
            self.cloud.wait_until(lambda one=enterprise: one.newest_ns() > after_ns, what)  # type: ignore[misc]

    def test(self, span: tuple[int, int]) -> list[list[Tested]]:
        """Test every enterprise at arbitrary times, all at once: of the corrupted one also at the span's ends."""

        def test(enterprise: Enterprise) -> list[Tested]:
            ends = list(span) if enterprise is self.corrupted else []
            times = [*ends, *(random.randrange(*span) for _ in range(enterprise.size.stacks - len(ends)))]
            return self.recovery[enterprise.name].test(sorted(times), compare_blocks=True)

        return self.each(test)

    def show_round(self, search: CleanSearch, verdicts: list[bool]) -> None:
        """Show one round of the search."""
        marks = "".join("[green]●[/]" if passed else "[red]●[/]" for passed in verdicts)
        self.console.print(f"  round {search.rounds}: {marks}  [dim]{search.left} writes left to look at[/]")

    def line(self, good: bool, text: str) -> bool:
        """Show whether something is as it must be."""
        self.console.print(f"{'[green]✓[/]' if good else '[red]✗[/]'} {text}")
        return good

    def close(self) -> None:
        """Let everything go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.cloud.close()
        self._probes.shutdown(cancel_futures=True)


def _provider(stacks: int) -> tuple[dict[str, Any], ProviderConfig]:
    """Return the example provider as a document, with as many idle stacks as are used, and what it means."""
    file = ROOT / "infra" / "local.yaml"
    config = load_yaml(file, ProviderConfig)
    raw = yaml.safe_load(file.read_text())
    wanted = {tenant.jurisdiction: stacks if tenant.name == CORRUPTED else STACKS_OF_OTHERS for tenant in _tenants()}
    for center in raw["data_centers"]:  # in the first of each jurisdiction
        center["idle_stacks"] = wanted.pop(center["jurisdiction"], 0)
    rights = {**raw["rights"], "policies": str(ROOT / "policies")}
    return {**raw, "tenants": str(ROOT / "tenants"), "rights": rights}, config


def _tenants() -> list[EnterpriseConfig]:
    """Return the example enterprises, the one that will be corrupted first."""
    tenants = [load_yaml(path, EnterpriseConfig) for path in sorted((ROOT / "tenants").glob("*.yaml"))]
    return sorted(tenants, key=lambda tenant: tenant.name != CORRUPTED)


def run_demo(parallel: int, report: Path | None, picture: Path | None) -> bool:
    """Run the demonstration; return whether everything that it shows is right.

    Args:
        parallel: Stacks at once, of the enterprise that is corrupted.
        report: Where to write the report as JSON.
        picture: Where to save what was shown as SVG.
    """
    if not (ROOT / "infra" / "local.yaml").exists():
        raise DrCloudError("the example provider, infra/local.yaml, is not here", "Run it in a checkout: make demo.")
    console = Console(highlight=False, record=picture is not None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = _directory()
    run: DemoRun | None = None
    try:
        run = DemoRun(directory, console, parallel)
        right = _run(run, report)
        if picture is not None:
            console.save_svg(str(picture), title="dr-cloud demo", code_format=_SVG_FORMAT)
        return right
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with console.status("everything is stopped and removed"):
            if run is not None:
                run.close()
            shutil.rmtree(directory, ignore_errors=True)


def _directory() -> Path:
    made = Path(tempfile.mkdtemp(prefix="drc-"))
    if len(str(made)) > _PATH_LENGTH_MAX:
        made.rmdir()
        made = Path(tempfile.mkdtemp(prefix="drc-", dir="/tmp"))
    return made


def _run(run: DemoRun, report: Path | None) -> bool:
    console, cloud, corrupted = run.console, run.cloud, run.corrupted
    names = ", ".join(enterprise.name for enterprise in run.enterprises)
    console.print(
        f"[bold]dr_cloud[/]: {names}; {len(run.config.data_centers)} data centers; {run.parallel} stacks at once\n"
    )
    cloud.begin_provider(run.file)
    with run.phase("prepare", "a machine with a database for each enterprise"):
        run.each(lambda enterprise: enterprise.prepare())
    with run.phase("provider", "provider on Ray: manager, API, connectors, VDSAs, idle stacks"):
        admin = cloud.wait_provider()
        run.warm_up()
    with run.phase("protect", "sites paired over TLS, taps, protection groups; first synchronisation"):
        run.start(admin)
    with run.phase("rights", "every enterprise asks for copies in data centers that are closed to it"):
        matrix = admin.rights_matrix()
        denied = run.try_abroad()
    with run.phase("workload", f"{RUN_SECONDS:g} s of commits; {corrupted.name} is corrupted at an untold moment"):
        for enterprise in run.enterprises:
            moments = (CORRUPT_FROM_SECONDS, CORRUPT_TO_SECONDS) if enterprise is corrupted else ()
            enterprise.start_workload(*moments)
        started_ns = time.time_ns()
        time.sleep(RUN_SECONDS)
        until_ns = time.time_ns()
        lags = {
            vpg.enterprise: [target.lag_seconds for target in vpg.targets if target.lag_seconds is not None]
            for vpg in admin.vpgs()
        }
        alerts = [alert.message for alert in admin.health().alerts]
        run.wait_newest(until_ns, "a checkpoint after the last of it")
    stacks = sum(enterprise.size.stacks for enterprise in run.enterprises)
    with run.phase("stacks", f"{stacks} stacks in parallel, at arbitrary times, while the databases go on"):
        tested = run.test((started_ns, until_ns))
    for enterprise in run.enterprises[1:]:
        enterprise.stop_workload()
    recovery = run.recovery[corrupted.name]
    with run.phase("search", f"the last clean time of {corrupted.name}, to within one write"):
        clean_ns, dirty_ns, search = recovery.find_last_clean(tested[0], run.parallel, run.show_round)
    with run.phase("wall", "every enterprise aims at the others' things, with a good token"):
        aims, leaks = _aim_all(run, tested)
    with run.phase("isolation", "a stack is written to and stopped; production and replicas are compared"):
        corrupted.stop_workload()
        stopped_ns = time.time_ns()
        run.wait_newest(stopped_ns, "the last checkpoint", [corrupted])
        before = {_hash_file(corrupted.image), *recovery.hash_images(stopped_ns)}
        written, stored = recovery.write_to_a_stack(stopped_ns)
        after = {_hash_file(corrupted.image), *recovery.hash_images(stopped_ns)}
    stores = cloud.state / "stores"
    outcomes = [
        Outcome(enterprise, tests, lags.get(enterprise.name, []), enterprise.kept_in(stores))
        for enterprise, tests in zip(run.enterprises, tested, strict=True)
    ]
    console.print(matrix_table(matrix))
    console.print(tests_table(tested[0]))
    for reason in sorted({test.finding.reason for tests in tested for test in tests if not test.finding.passed}):
        console.print(f"  [red]fail[/]: {reason}", highlight=False, markup=True)
    console.print(enterprises_table(outcomes))
    # Only now is it looked at when the corruption really came.
    secret = json.loads((corrupted.folder / "secret").read_text())
    found = secret["begun_ns"] <= dirty_ns <= secret["acked_ns"] and clean_ns < secret["begun_ns"]
    verdicts_right = all(test.finding.passed == (test.at_ns < dirty_ns) for test in tested[0])
    others_right = all(test.finding.passed for tests in tested[1:] for test in tests)
    checked = sum(test.finding.blocks_checked for tests in tested for test in tests)
    wrong = sum(outcome.blocks_wrong for outcome in outcomes)
    lag_seconds = [lag for of_one in lags.values() for lag in of_one]
    targets = sum(len(enterprise.data_centers) for enterprise in run.enterprises)
    unchanged = before == after and len(before) == 1
    closed = {
        (enterprise.name, center.name)
        for enterprise in run.enterprises
        for center in run.config.data_centers
        if center.jurisdiction != enterprise.config.jurisdiction
    }
    told_closed = {
        (row.enterprise, place.data_center) for row in matrix for place in row.data_centers if not place.open
    }
    kept_out = {(refusal.enterprise, refusal.data_center) for refusal in denied} == closed == told_closed
    right = [
        run.line(found, f"last clean time {format_time(clean_ns)}, found in {search.rounds} rounds"),
        run.line(found, f"the next write, at {format_time(dirty_ns)[11:]}, is the corruption's first"),
        run.line(verdicts_right, "every verdict is right: before it all tests pass, from it on all fail"),
        run.line(others_right, "the others' tests, at the same time, all pass, with the right rows"),
        run.line(wrong == 0, f"{checked:,} blocks compared with the workloads' own records, {wrong} wrong"),
        run.line(all(outcome.at_home for outcome in outcomes), "data lies in its own jurisdiction, and nowhere else"),
        run.line(kept_out, f"{len(closed)} ways out of a jurisdiction tried, and refused with the reason"),
        run.line(not leaks, f"{aims} calls aimed at others' things: 'not found', as what does not exist"),
        run.line(
            len(lag_seconds) == targets,
            f"{targets} replications, at most {max(lag_seconds, default=0):.1f} s behind; {len(alerts)} alerts",
        ),
        run.line(unchanged, f"{format_size(written)} written to a stack, {format_size(stored)} stored, gone with it"),
        run.line(unchanged, "production and its replicas are equal, and as they were before"),
    ]
    for leak in leaks:
        console.print(f"  [red]told[/]: {leak}", markup=True)
    if report is not None:
        told = document(outcomes, clean_ns, run.seconds, all(right), denied, matrix)
        report.write_text(json.dumps(told, indent=2) + "\n")
    console.print(
        f"\n[bold]{'All right' if all(right) else '[red]Something is wrong[/]'}[/] in {sum(run.seconds.values()):.0f} s"
    )
    return all(right)


def _aim_all(run: DemoRun, tested: list[list[Tested]]) -> tuple[int, list[str]]:
    """Have each enterprise aim at each other's things; return how often, and what was told."""
    aims, leaks = 0, []
    for stranger in run.enterprises:
        for owner, tests in zip(run.enterprises, tested, strict=True):
            if owner is not stranger:
                count, told = aim(stranger, owner, tests[0].id)
                aims += count
                leaks += [f"{stranger.name}: {text}" for text in told]
        seen = {vpg.enterprise for vpg in stranger.client.vpgs()}
        leaks += [f"{stranger.name} sees groups of {name}" for name in seen - {stranger.name}]
    return aims, leaks


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
