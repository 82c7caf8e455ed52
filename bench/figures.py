"""A figure: ours, a peer's, their ratio, the target; and interleaved runs, so that the ratio means something."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

SETTLE_SECONDS: Final = 0.25
SETTLE_SECONDS_MAX: Final = 10.0
SETTLED_IDLE: Final = 0.85

Runs = dict[str, list[float]]

console: Final = Console(highlight=False, stderr=True)


class Target(NamedTuple):
    """What a ratio must reach. With a unit it is `ours` that must, and there is no peer but the bound."""

    sign: Literal["≤", "≥"]
    bound: float
    unit: str = ""

    def met_by(self, value: float) -> bool:
        """Does `value` reach it?"""
        return value <= self.bound if self.sign == "≤" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g} {self.unit}".rstrip()


class Figure(BaseModel):
    """One line of the table."""

    ours: float
    peer: float | None
    ratio: float | None
    unit: str
    target: str
    met: bool | None
    """None where there is no target: a figure for information."""
    runs_ours: list[float] = []
    runs_peer: list[float] = []


Figures = dict[str, Figure]


def interleaved(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Runs:
    """Run each contestant once per round, one after another, never two at once; the order turns from round to round."""
    runs: Runs = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            settle()
            runs[name].append(contestants[name]())
    return runs


def settle() -> None:
    """Wait until the cores are idle, at most `SETTLE_SECONDS_MAX`: who ran before may have work left to do."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while time.monotonic() < deadline:
        idle, all_ = _processor_ticks()
        time.sleep(SETTLE_SECONDS)
        idle_now, all_now = _processor_ticks()
        if idle_now - idle >= SETTLED_IDLE * (all_now - all_):
            return


def _processor_ticks() -> tuple[int, int]:
    """Return the ticks that all cores were idle, and all ticks, since the machine started (proc(5))."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)


def beside(runs: Runs, ours: str, peer: str, unit: str, target: Target | None = None) -> Figure:
    """Return the figure of two contestants.

    The ratio is the median of the rounds' ratios: what drifts between rounds falls out of it.
    """
    pairs = zip(runs[ours], runs[peer], strict=True)
    ratio = statistics.median(mine / other for mine, other in pairs)
    return Figure(
        ours=statistics.median(runs[ours]),
        peer=statistics.median(runs[peer]),
        ratio=ratio,
        unit=unit,
        target=str(target or ""),
        met=target.met_by(ratio) if target else None,
        runs_ours=runs[ours],
        runs_peer=runs[peer],
    )


def against(values: list[float], unit: str, target: Target | None = None) -> Figure:
    """Return the figure of values that have a bound of their own, or none."""
    ours = statistics.median(values)
    return Figure(
        ours=ours,
        peer=target.bound if target else None,
        ratio=ours / target.bound if target and target.bound else None,
        unit=unit,
        target=str(target or ""),
        met=target.met_by(ours) if target else None,
        runs_ours=values,
    )


def show(figures: Figures) -> None:
    """Print the table."""
    table = Table(title="Measured beside peers", title_justify="left")
    table.add_column("figure", no_wrap=True)
    for name in ("ours", "peer", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("target", no_wrap=True)
    table.add_column("met")
    for name, figure in figures.items():
        met = "" if figure.met is None else "[green]yes[/]" if figure.met else "[red]no[/]"
        numbers = (_short(value) for value in (figure.ours, figure.peer, figure.ratio))
        table.add_row(name, *numbers, figure.unit, figure.target, met)
    Console(highlight=False, width=None if Console().is_terminal else 160).print(table)


def machine() -> dict[str, str | int]:
    """Return what the figures were measured on."""
    return {
        "cores": os.cpu_count() or 0,
        "cpu": _cpu_model(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "fio": _version("fio"),
        "nbdkit": _version("nbdkit"),
        "qemu-nbd": _version("qemu-nbd"),
    }


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip()
