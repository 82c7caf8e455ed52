"""(7) Requests to the object store while a VPG is protected: each is paid for.

A target whose store notes every request, behind a real tap and source. A guest writes all the time, a few MiB in each
interval; the intervals are short, so that there is a keyframe in the run.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

from bench import chain, fio
from bench.figures import Figures, Target, against
from bench.noted import read_notes

DISK_BYTES: Final = 256 << 20
CHECKPOINT_SECONDS: Final = 0.1
SECONDS: Final = 18.0


def measure(rounds: int) -> Figures:
    """Return the figures. Counts do not depend on the machine's speed: one round is enough."""
    del rounds
    with chain.folder() as directory:
        disk, notes = directory / "disk.raw", directory / "notes"
        with open(disk, "wb") as file:
            file.truncate(DISK_BYTES)
        target = ("bench.noted", "target", "--notes", str(notes))
        with (
            chain.running_chain(directory, CHECKPOINT_SECONDS, target) as (behind, _),
            chain.tap(directory, "tap", disk, behind.source_socket) as uri,
        ):
            behind.wait_in_sync()
            since_ns = time.time_ns()
            fio.run(uri, "randwrite", "64k", 1, SECONDS, directory, rate_mib=10)
            until_ns = time.time_ns()
        asked = [request for request in read_notes(notes) if since_ns <= request.time_ns <= until_ns]
    puts = Counter(request.key.split("/")[3] for request in asked if request.verb == "put")
    verbs = Counter(request.verb for request in asked)
    intervals = max(puts["checkpoints"], 1)
    return {
        "PUT of journal objects per interval": against([puts["journal"] / intervals], "requests", Target("≤", 1, "")),
        "PUT of everything per interval": against([verbs["put"] / intervals], "requests", Target("≤", 2.05, "")),
        "keyframes in the run": against([float(puts["replica"])], f"of {intervals} intervals"),
        "LIST while writing": against([float(verbs["list"])], "requests", Target("≤", 0, "")),
        "GET while writing": against([float(verbs["get"] + verbs["size"])], "requests"),
    }
