"""How a provider grows: enterprises with VPGs that all replicate small writes, beside memory, processor, connections.

    python -m bench.scale [--steps 10,25,50] [--vpgs 2] [--seconds 30]

Everything is real and runs on this machine: `dr-cloud provider up` (default architecture), one `dr-cloud site up` per
enterprise with its own pairing, certificate and link, one `dr-cloud tap` per VPG, and this process as the guests: it
writes 4 KiB blocks over NBD, a few a second on each disk. What is measured per step, after a pause to settle:

- age of each VPG's newest checkpoint, in checkpoint intervals: read afterwards from the journals themselves, where each
  checkpoint has its time, and its object's file the time when it became durable. So it is known at every moment, and
  asking costs nothing. What the API tells of it comes with reports, and is a few seconds older;
- memory as proportional set size, which counts shared pages once, by kind of process;
- processor time by kind of process; established connections between sites and connectors.

It writes docs/scale.md. It is not among the measurements of `make bench`: it takes many minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from bench import many
from bench.chain import folder
from bench.decisions import NOW, Decisions, measure_decisions, told
from bench.figures import console, machine
from bench.scale_world import INTERVAL_SECONDS, WRITES_PER_SECOND, Guests, World, ages, oldest
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.units import SECOND_NS, format_size

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
_AGE_INTERVALS_MAX: Final = 2.0
_SETTLE_SECONDS: Final = 15.0
_MEMORY_LEFT_BYTES_MIN: Final = 2 << 30
_ENTERPRISE_BYTES: Final = 300 << 20
"""What one enterprise with its site and two taps needs, generously."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_KINDS: Final = (
    ("ray::CloudManager", "manager"),
    ("ray::StackActor", many.STACKS),
    ("ray::Connector", "connector"),
    ("ray::EnterpriseManager", "enterprise's manager"),
    ("ray::Vdsa", "target VDSA"),
    ("ray::", "other Ray workers"),
    ("ray", "Ray itself"),
    ("site up", "site"),
    ("provider up", "provider up"),
    ("tap --server", "tap"),
    ("multiprocessing.spawn", "clients"),
)


class Usage(NamedTuple):
    """Processes of one kind."""

    processes: int
    bytes_resident: int
    processor_seconds: float


class Step(NamedTuple):
    """What was measured with so many enterprises."""

    enterprises: int
    vpgs: int
    seconds: float
    ages: list[float]
    """Of every VPG at every second, in intervals."""
    oldest: list[float]
    """Of each VPG: how old its newest checkpoint ever was, in intervals, ascending."""
    writes: int
    connections: int
    usage: dict[str, Usage]


def _children() -> list[int]:
    """Return every process that this one started, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        more = parents.get(waiting.pop(), [])
        found += more
        waiting += more
    return found


def _kind(command: str) -> str:
    return next((kind for mark, kind in _KINDS if mark in command), "other")


def usage() -> dict[str, Usage]:
    """Return memory and processor time of all processes that were started, by kind."""
    found: dict[str, Usage] = {}
    for pid in _children():
        with contextlib.suppress(OSError, ValueError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            resident = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) << 10
            before = found.get(_kind(command), Usage(0, 0, 0.0))
            seconds = (int(fields[11]) + int(fields[12])) / _TICKS
            found[_kind(command)] = Usage(
                before.processes + 1, before.bytes_resident + resident, before.processor_seconds + seconds
            )
    return found


def _used() -> dict[str, float]:
    return {kind: use.processor_seconds for kind, use in usage().items()}


def _resident(kind: str) -> tuple[int, int]:
    """Return (processes, bytes of memory) of a kind."""
    found = usage().get(kind, Usage(0, 0, 0.0))
    return found.processes, found.bytes_resident


def connections(ports: set[int]) -> int:
    """Return how many established connections go to these ports."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    peers = [(int(line.split()[2].rpartition(":")[2], 16), line.split()[3]) for line in lines]
    return sum(1 for port, state in peers if port in ports and state == "01")


def memory_left_bytes() -> int:
    """Return the memory that may still be used."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


# The cloud.


def measure(world: World, seconds: float) -> Step:
    """Let every server write, and look on."""
    guests = Guests(world.uris)
    with guests.writing():
        time.sleep(_SETTLE_SECONDS)
        before, writes, since_ns = usage(), guests.writes, time.time_ns()
        time.sleep(seconds)
        after, written, until_ns = usage(), guests.writes - writes, time.time_ns()
        used = {
            kind: now._replace(processor_seconds=now.processor_seconds - before.get(kind, now).processor_seconds)
            for kind, now in after.items()
        }
        made = world.checkpoints()
        return Step(
            world.enterprises,
            world.enterprises * world.vpgs,
            (until_ns - since_ns) / SECOND_NS,
            [age for one in made for age in ages(one, range(since_ns, until_ns, SECOND_NS))],
            sorted(oldest(one, since_ns, until_ns) for one in made),
            written,
            connections(world.ports),
            used,
        )


_HEAD: Final = """# How a provider grows

Made by `.venv/bin/python -m bench.scale`; nothing is simulated. One machine carries all of it: the provider (default
architecture: one manager, a connector per enterprise, a target VDSA per host), a site process per enterprise, a tap
process per VPG, and the guests, who write {writes:g} blocks of 4 KiB a second to each disk. Checkpoints every
{interval:g} s; how old the newest one is at each moment is read from the journals.

{machine}. Load of the machine before: {load:.1f}.

"""


def page(
    steps: Sequence[Step], load: float, decisions: Sequence[Decisions] = (), tests: many.Many | None = None
) -> str:
    """Return the page."""
    text = _HEAD.format(
        writes=WRITES_PER_SECOND,
        interval=INTERVAL_SECONDS,
        load=load,
        machine="; ".join(f"{key}: {value}" for key, value in machine().items()),
    )
    rows: list[tuple[str, list[str]]] = [
        ("VPGs", [str(step.vpgs) for step in steps]),
        ("writes a second", [f"{step.writes / step.seconds:.0f}" for step in steps]),
        ("newest checkpoint's age, intervals: median", [f"{statistics.median(step.ages):.2f}" for step in steps]),
        ("the same: oldest that any ever was (at most 2)", [f"{step.oldest[-1]:.2f}" for step in steps]),
        ("connections between sites and provider", [str(step.connections) for step in steps]),
        ("processor, cores in use", [f"{_processor(step):.2f}" for step in steps]),
    ]
    for kind in dict.fromkeys(kind for step in steps for kind in step.usage):
        cells = [step.usage.get(kind, Usage(0, 0, 0.0)) for step in steps]
        shares = [use.processor_seconds / step.seconds for use, step in zip(cells, steps, strict=True)]
        rows.append(
            (
                f"{kind}: processes, MiB, cores",
                [
                    f"{use.processes}, {use.bytes_resident >> 20}, {share:.2f}"
                    for use, share in zip(cells, shares, strict=True)
                ],
            )
        )
    text += "| enterprises | " + " | ".join(str(step.enterprises) for step in steps) + " |\n"
    text += "|---|" + "---|" * len(steps) + "\n"
    text += "".join(f"| {name} | " + " | ".join(cells) + " |\n" for name, cells in rows)
    if len(steps) > 1:
        text += "\n" + _growth(steps[0], steps[-1])
    if decisions:
        text += told(decisions, steps[0].enterprises)
    if tests is not None:
        text += many.told(tests)
    return text


def _processor(step: Step) -> float:
    return sum(use.processor_seconds for use in step.usage.values()) / step.seconds


def _growth(first: Step, last: Step) -> str:
    more = last.enterprises - first.enterprises
    nothing = Usage(0, 0, 0.0)
    parts = {
        kind: (use.bytes_resident - first.usage.get(kind, nothing).bytes_resident) / more / (1 << 20)
        for kind, use in last.usage.items()
    }
    listed = ", ".join(
        f"{kind} {mib:.1f}" for kind, mib in sorted(parts.items(), key=lambda item: -item[1]) if mib > 0.1
    )
    cores = (_processor(last) - _processor(first)) / more
    return (
        f"Each further enterprise costs, by the difference between {first.enterprises} and {last.enterprises}: "
        f"{(last.connections - first.connections) / more:.1f} connections, {cores * 1000:.0f} thousandths of a core in "
        f"all, and in MiB: {listed}.\n"
    )


def _many(enterprises: int, vpgs: int, count: int) -> many.Many:
    """Measure many tests at once, in a cloud of their own: on a disk, for probes do not see the machine's /dev/shm."""
    with folder(in_memory=False) as directory:
        world = World(directory, vpgs)
        try:
            world.start()
            world.add(enterprises)
            return many.measure_many(world, count, _resident)
        finally:
            world.close()


def main(arguments: list[str]) -> int:
    """Measure all steps and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default="10,25,50", help="numbers of enterprises, ascending (default 10,25,50)")
    parser.add_argument("--vpgs", type=int, default=2, help="VPGs of each (default 2)")
    parser.add_argument("--tests", type=int, default=64, help="recovery tests at once (default 64; 0: none)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each step is watched (default 30)")
    options = parser.parse_args(arguments)
    counts = sorted({int(count) for count in options.steps.split(",")})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    steps: list[Step] = []
    decisions: list[Decisions] = []
    tests: many.Many | None = None
    load = os.getloadavg()[0]
    with folder(in_memory=True) as directory:
        world = World(directory, options.vpgs)
        try:
            world.start()
            for count in counts:
                needed = _MEMORY_LEFT_BYTES_MIN + (count - world.enterprises) * _ENTERPRISE_BYTES
                if memory_left_bytes() < needed:
                    console.print(f"{count} enterprises are left out: they need {format_size(needed)} of free memory")
                    break
                world.add(count)
                steps.append(measure(world, options.seconds))
                if len(steps) == 1:
                    below = {
                        "checkpoints of a VPG, from its journal": [
                            (enterprise, f"vpgs/{vpg}/checkpoints?since_ns={NOW}") for enterprise, vpg in world.names()
                        ],
                        "a recovery test, with what its probes found": [
                            (enterprise, f"tests/{test}") for enterprise, test in world.tested()
                        ],
                    }
                    with Guests(world.uris).writing():
                        decisions = [
                            measure_decisions(what, world.caller(), paths, options.seconds / 2, _used)
                            for what, paths in below.items()
                        ]
                console.print(page(steps[-1:], load, decisions, tests))
        except (DrCloudError, OSError, subprocess.SubprocessError) as error:
            print(f"bench: {error}. {getattr(error, 'remedy', '')}".rstrip(), file=sys.stderr)
            return 1
        finally:
            world.close()
    if options.tests > 1:
        tests = _many(counts[0], options.vpgs, options.tests)
    PAGE.write_text(page(steps, load, decisions, tests))
    late = int(tests is not None and tests.oldest_intervals > _AGE_INTERVALS_MAX)
    late += sum(age > _AGE_INTERVALS_MAX for step in steps for age in step.oldest)
    print(f"wrote {PAGE.name}; {late} VPGs were ever more than {_AGE_INTERVALS_MAX:g} intervals behind")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
