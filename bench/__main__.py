"""`python -m bench [NAME …] [--rounds N]`: measure, print one table, write bench/results/latest.json."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench import journal, opening, peers, provider, requests, sharing, stack, stored, tap
from bench.figures import Figures, console, machine, show
from dr_cloud.model.errors import DrCloudError

ON_PROVIDER: Final[dict[str, Callable[[provider.Provider, int], Figures]]] = {
    "stack": stack.measure,
    "opening": opening.measure,
    "sharing": sharing.measure,
    "stored": stored.measure,
}
"""Measurements that share one provider on Ray."""
ALONE: Final[dict[str, Callable[[int], Figures]]] = {
    "tap": tap.measure,
    "journal": journal.measure,
    "requests": requests.measure,
}
NAMES: Final = [*ALONE, *ON_PROVIDER]
RESULTS: Final = Path(__file__).resolve().parent / "results" / "latest.json"


def main(arguments: list[str]) -> int:
    """Measure what is named, or everything."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; all without one")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default 3)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    names = options.names or NAMES
    logging.getLogger().setLevel(logging.ERROR)
    # What was started is stopped, and every file removed, on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures: Figures = {}
    started = time.monotonic()
    try:
        peers.check_programs()
        for name in ALONE:
            if name in names:
                _note(name, started)
                figures |= ALONE[name](options.rounds)
        if set(names) & set(ON_PROVIDER):
            _note("provider", started)
            with provider.running() as running:
                for name in ON_PROVIDER:
                    if name in names:
                        _note(name, started)
                        figures |= ON_PROVIDER[name](running, options.rounds)
    except (DrCloudError, OSError) as error:
        print(f"bench: {error}. {getattr(error, 'remedy', '')}".rstrip(), file=sys.stderr)
        return 1
    seconds = round(time.monotonic() - started)
    RESULTS.parent.mkdir(exist_ok=True)
    document = {
        "machine": machine(),
        "rounds": options.rounds,
        "seconds": seconds,
        "ratios": {name: figure.model_dump() for name, figure in figures.items()},
    }
    RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    show(figures)
    missed = [name for name, figure in figures.items() if figure.met is False]
    print(f"{seconds} s; {RESULTS.relative_to(RESULTS.parents[2])}; {len(missed)} of {len(figures)} miss their target")
    return 0


def _note(name: str, started: float) -> None:
    console.print(f"[dim]{time.monotonic() - started:4.0f} s[/] {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
