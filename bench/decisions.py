"""How many decisions a second the rights manager gives and records through the REST API of a provider that runs."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from itertools import cycle
from typing import Final, NamedTuple

from dr_cloud.client.client import Client
from dr_cloud.model.cloud import CheckpointFilter

CLIENTS: Final = 4
_START_SECONDS: Final = 8.0
"""So long the clients may take to start."""


class Caller(NamedTuple):
    """How a client reaches the API."""

    url: str
    token: str
    ca_pem: str


class Decisions(NamedTuple):
    """What was measured."""

    per_second: float
    """Decisions that were made, and are on record."""
    p50_ms: float
    p99_ms: float
    """Of a whole call over TLS: decided, recorded, carried out, answered."""


def measure_decisions(caller: Caller, vpgs: Sequence[tuple[str, str]], seconds: float) -> Decisions:
    """Read checkpoints of (enterprise, VPG) with several clients at once, each a process; each call is decided."""
    before = _recorded(caller, vpgs)
    parts = [vpgs[number::CLIENTS] or vpgs for number in range(CLIENTS)]
    begin_s = time.time() + _START_SECONDS
    with multiprocessing.get_context("spawn").Pool(CLIENTS) as pool:
        found = pool.starmap(_call, [(caller, part, begin_s, seconds) for part in parts])
    made = _recorded(caller, vpgs) - before
    cuts = statistics.quantiles([span for spans in found for span in spans], n=100)
    return Decisions(made / seconds, cuts[49] * 1000, cuts[98] * 1000)


def _recorded(caller: Caller, vpgs: Sequence[tuple[str, str]]) -> int:
    with Client(caller.url, caller.token, ca_pem=caller.ca_pem, timeout_seconds=120.0) as client:
        total = 0
        for enterprise in {enterprise for enterprise, _ in vpgs}:
            client.enterprise_name = enterprise
            total += client.verify_decisions().last
        return total


def _call(caller: Caller, vpgs: Sequence[tuple[str, str]], begin_s: float, seconds: float) -> list[float]:
    spans = []
    with Client(caller.url, caller.token, ca_pem=caller.ca_pem, timeout_seconds=120.0) as client:
        client.health()  # connected before the time begins
        time.sleep(max(0.0, begin_s - time.time()))
        for enterprise, vpg in cycle(vpgs):
            if time.time() > begin_s + seconds:
                break
            client.enterprise_name = enterprise
            begun = time.monotonic()
            list(client.checkpoints(vpg, None, CheckpointFilter(since_ns=time.time_ns())))
            spans.append(time.monotonic() - begun)
    return spans
