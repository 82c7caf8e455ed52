"""(5) Bytes fetched from the store by 8 stacks that read the same disk at once, over those of one stack.

Each stack is a process of its own whose store notes every request; the folder of the cache is theirs together.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from bench import content
from bench.chain import folder
from bench.figures import Figures, Target, against, beside
from bench.noted import Request, read_notes
from bench.provider import STACKS, Provider
from dr_cloud.demo.process import Process
from dr_cloud.model.blocks import blocks_of
from dr_cloud.model.journal import ImagePlan
from dr_cloud.nbd.client import NbdClient

DISK_BYTES: Final = 128 << 20
READ_BYTES: Final = 256 << 10
REWRITES: Final = 2_000


def measure(provider: Provider, rounds: int) -> Figures:
    """Return the figures. Nothing in them depends on the machine's speed: one round is enough, two show that."""
    history = provider.history("sharing", DISK_BYTES)
    blocks = blocks_of(DISK_BYTES)
    data = content.realistic(DISK_BYTES)
    history.write(np.arange(blocks, dtype=np.uint64), data)
    history.checkpoint()
    begun_ns = history.time_ns
    history.write(np.random.default_rng(5).integers(0, blocks, REWRITES, np.uint64), data)
    history.close()
    times = [begun_ns + (history.time_ns - begun_ns) * step // STACKS for step in range(1, STACKS + 1)]
    stacks = provider.local.open_stacks(history.scope, times)
    plans = [stack.plan for stack in stacks]
    for stack in stacks:
        stack.wait_open()
        stack.close()
    same = plans[STACKS // 2]
    runs: dict[str, list[float]] = {"one": [], "eight": [], "times": []}
    listed = 0
    for _ in range(min(rounds, 2)):
        for name, chosen in (("one", [same]), ("eight", [same] * STACKS), ("times", plans)):
            notes = _read_all(provider, chosen)
            listed += sum(request.verb == "list" for request in notes)
            runs[name].append(sum(request.bytes for request in notes if request.verb == "get") / (1 << 20))
    return {
        f"bytes fetched, {STACKS} stacks / one": beside(runs, "eight", "one", "MiB", Target("≤", 1.1)),
        f"bytes fetched, {STACKS} stacks at {STACKS} times / one": beside(runs, "times", "one", "MiB"),
        "LIST requests of stacks": against([float(listed)], "requests", Target("≤", 0, "requests")),
    }


def _read_all(provider: Provider, plans: list[ImagePlan]) -> list[Request]:
    """Open a process per plan, read every disk whole, all at once; return what was asked of the store."""
    settings = provider.settings
    with folder() as directory, contextlib.ExitStack() as running:
        processes = []
        for number, plan in enumerate(plans):
            path = directory / f"{number}.json"
            path.write_text(plan.model_dump_json())
            process = Process(
                f"stack-{number}", directory, "bench.noted", "stack", "--notes", str(directory / "notes"),
                "--store", provider.local.store_url, "--keyring", str(settings.keyring), "--work", str(directory),
                "--listen", str(directory / f"{number}.sock"), "--plan", str(path),
            )  # fmt: skip
            running.callback(process.stop)
            processes.append(process)
        uris = [process.wait_ready() for process in processes]

        def read(uri: str) -> None:
            with NbdClient.connect(uri) as client:
                for at in range(0, client.size_bytes, READ_BYTES):
                    client.pread(at, READ_BYTES)

        with ThreadPoolExecutor(len(uris)) as threads:
            list(threads.map(read, uris))
        return read_notes(directory / "notes")
