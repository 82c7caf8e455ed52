"""What the demonstration shows at its end: tables for people, one document for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from dr_cloud.demo.enterprise import Denied, Enterprise
from dr_cloud.demo.recovery import Tested
from dr_cloud.model.decision import EnterpriseRights
from dr_cloud.model.units import format_size, format_time


class Outcome(NamedTuple):
    """How it went for one enterprise."""

    enterprise: Enterprise
    tested: list[Tested]
    lag_seconds: list[float]
    """Of each target, while its database worked."""
    kept_in: set[str]
    """The data centers whose stores hold its journal."""

    @property
    def at_home(self) -> bool:
        """Whether its data is where it is to be, and nowhere else."""
        return self.kept_in == {center.name for center in self.enterprise.data_centers}

    @property
    def blocks_wrong(self) -> int:
        """Blocks of its stacks that were not what had been written."""
        return sum(test.finding.blocks_wrong for test in self.tested)


def tests_table(tested: list[Tested]) -> Table:
    """Return a table of recovery tests."""
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
            format_size(test.stored_bytes),
        )
    return table


def enterprises_table(outcomes: list[Outcome]) -> Table:
    """Return a table of enterprises."""
    table = Table(title="Enterprises", title_justify="left")
    for name in ("enterprise", "law", "data in"):
        table.add_column(name)
    for name in ("lag", "stacks", "passed", "blocks", "wrong"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            outcome.enterprise.name,
            outcome.enterprise.config.jurisdiction,
            "\n".join(sorted(outcome.kept_in)),
            f"{max(outcome.lag_seconds, default=0.0):.1f} s",
            str(len(outcome.tested)),
            str(sum(test.finding.passed for test in outcome.tested)),
            f"{sum(test.finding.blocks_checked for test in outcome.tested):,}",
            str(outcome.blocks_wrong),
        )
    return table


def matrix_table(matrix: Sequence[EnterpriseRights]) -> Table:
    """Return a table of who may send where."""
    table = Table(title="Rights", title_justify="left")
    table.add_column("enterprise")
    for place in matrix[0].data_centers:
        table.add_column(f"{place.data_center}\n{place.jurisdiction}")
    for row in matrix:
        marks = ("[green]open[/]" if place.open else "[red]closed[/]" for place in row.data_centers)
        table.add_row(f"{row.enterprise} [dim]{row.jurisdiction}[/]", *marks)
    return table


def document(
    outcomes: list[Outcome],
    last_clean_ns: int,
    seconds: Mapping[str, float],
    right: bool,
    denied: Sequence[Denied],
    matrix: Sequence[EnterpriseRights],
) -> dict[str, Any]:
    """Return the report: `stacks` and `last_clean` of the first enterprise, whose data was corrupted."""
    return {
        "right": right,
        "stacks": _stacks(outcomes[0]),
        "last_clean": format_time(last_clean_ns),
        "denied": [refusal._asdict() for refusal in denied],
        "rights": {row.enterprise: {place.data_center: place.open for place in row.data_centers} for row in matrix},
        "seconds": dict(seconds),
        "enterprises": [
            {
                "enterprise": outcome.enterprise.name,
                "jurisdiction": outcome.enterprise.config.jurisdiction,
                "data_centers": sorted(outcome.kept_in),
                "lag_seconds": outcome.lag_seconds,
                "stacks": _stacks(outcome),
            }
            for outcome in outcomes
        ],
    }


def _stacks(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "at": format_time(test.at_ns),
            "verdict": "pass" if test.finding.passed else "fail",
            "reason": test.finding.reason,
            "rows": test.finding.rows,
            "blocks_checked": test.finding.blocks_checked,
            "blocks_wrong": test.finding.blocks_wrong,
            "first_byte_seconds": round(test.first_byte_seconds, 6),
            "stored_bytes": test.stored_bytes,
        }
        for test in outcome.tested
    ]
