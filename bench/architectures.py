"""What each of the four architectures takes for the same enterprises: processes, memory, processor, connections.

    python -m bench.architectures [--enterprises 3] [--vpgs 2] [--seconds 10]

The same cloud as in `bench.scale`, once for each word of the provider's configuration: real processes, every server
writing. It writes docs/architectures.md. It is not among the measurements of `make bench`: it takes minutes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bench.chain import folder
from bench.figures import console, machine
from bench.scale import Step, measure
from bench.scale_world import World
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import Architecture

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
_KINDS: Final = ("manager", "enterprise's manager", "connector", "target VDSA")
"""The provider's own processes that the architectures differ in."""
_APART: Final = {
    Architecture.MANAGER_PER_ENTERPRISE: (
        "Control: tasks, orders, reports and calls of an enterprise are carried out in its own process, which is its "
        "door too. VDSAs serve all enterprises of a host, each with its own keys, stores and streams."
    ),
    Architecture.VDSA_PER_ENTERPRISE: (
        "Control as before, and the data path: what hangs, grows or falls in one enterprise's VDSA touches no other's. "
        "The VDSA of no enterprise, one per host, stands for the host itself and serves nobody."
    ),
    Architecture.CLOUD_CONNECTOR: (
        "The link: each enterprise's own door, port and process; the site's control and each of its VPGs dial on their "
        "own, so a slow connection of one VPG is no other's."
    ),
    Architecture.PAIRED_CONNECTORS: (
        "The link, as before; the site's end gathers control and all VPGs on one dialled connection: one way through "
        "NAT and proxies, one throttle for all."
    ),
}
_HEAD: Final = """# The four architectures

Chosen by one word, `architecture`, in the provider's configuration; the same system test passes on all four
(`tests/system/test_provider_architectures.py`), and shows what is apart: one enterprise's own processes are stopped,
and the other's checkpoints and calls go on. Keys, journals, caches and rows are each enterprise's own in all of them.

| architecture | what is apart |
|---|---|
{apart}

## What each takes

Made by `.venv/bin/python -m bench.architectures`: {enterprises} enterprises with {vpgs} VPGs each, every server
writing, one data center of two hosts. Memory is proportional set size, in MiB.

{machine}. Load of the machine before: {load:.1f}.

"""


def page(steps: Mapping[Architecture, Step], load: float) -> str:
    """Return the page."""
    first = next(iter(steps.values()))
    text = _HEAD.format(
        apart="\n".join(f"| `{architecture.value}` | {what} |" for architecture, what in _APART.items()),
        enterprises=first.enterprises,
        vpgs=first.vpgs // first.enterprises,
        machine="; ".join(f"{key}: {value}" for key, value in machine().items()),
        load=load,
    )
    text += "| architecture | " + " | ".join(f"{kind}: processes, MiB" for kind in _KINDS)
    text += " | connections | provider's memory | its cores |\n"
    text += "|---" * (len(_KINDS) + 4) + "|\n"
    for architecture, step in steps.items():
        used = [step.usage.get(kind) for kind in _KINDS]
        cells = ["–" if use is None else f"{use.processes}, {use.bytes_resident >> 20}" for use in used]
        memory = sum(use.bytes_resident for use in used if use is not None) >> 20
        cores = sum(use.processor_seconds for use in used if use is not None) / step.seconds
        cells += [str(step.connections), str(memory), f"{cores:.2f}"]
        text += f"| `{architecture.value}` | " + " | ".join(cells) + " |\n"
    return text


def main(arguments: list[str]) -> int:
    """Measure all four and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--enterprises", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--vpgs", type=int, default=2, help="VPGs of each (default 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each is watched (default 10)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = os.getloadavg()[0]
    steps: dict[Architecture, Step] = {}
    for architecture in Architecture:
        with folder(in_memory=True) as directory:
            world = World(directory, options.vpgs, architecture)
            try:
                world.start()
                world.add(options.enterprises)
                steps[architecture] = measure(world, options.seconds)
            except (DrCloudError, OSError, subprocess.SubprocessError) as error:
                print(f"bench: {error}. {getattr(error, 'remedy', '')}".rstrip(), file=sys.stderr)
                return 1
            finally:
                world.close()
        console.print(f"{architecture.value} is measured")
    PAGE.write_text(page(steps, load))
    print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
