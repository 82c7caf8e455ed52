"""How many decisions a second the rights manager gives and records through the REST API of a provider that runs.

The clients are as small as Python has them: `http.client` over one kept connection each, in a process of its own. The
product's client makes records of answers and tries again what fails, which costs more than the API does; here the API
is measured, on a machine that both share. Each call is whole: TLS, token, decision, record, answer.
"""

from __future__ import annotations

import http.client
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import cycle
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from dr_cloud.client.client import Client
from dr_cloud.client.session import tls_context
from dr_cloud.model.errors import DrCloudError

CLIENTS: Final = 8
NOW: Final = "NOW"
_START_SECONDS: Final = 8.0
"""So long the clients may take to start."""
_ANSWER_SECONDS: Final = 120.0

_HEAD: Final = """
## Decisions

At {enterprises} enterprises, all of them replicating, {clients} clients ask the API over TLS, as fast as they can, one
call at a time on a connection that is kept (Python's `http.client`, each in a process of its own). Each call shows a
token, is decided by the rights manager (embedded engine), and is on record before it is answered.

| what is read | decisions a second | whole call, median | p99 | processor time, with the replication meanwhile |
|---|---|---|---|---|
"""
_ROW: Final = (
    "| {what} | {per_second:.0f} | {p50_ms:.1f} ms | {p99_ms:.0f} ms | {all_ms:.1f} ms for each, of that {parts} |\n"
)
_LEAST_MS: Final = 0.05
"""What used less for a decision is not named."""


class Caller(NamedTuple):
    """How a client reaches the API."""

    url: str
    token: str
    ca_pem: str


class Decisions(NamedTuple):
    """What was measured."""

    what: str
    """What was read."""
    per_second: float
    """Decisions that were made, and are on record."""
    p50_ms: float
    p99_ms: float
    """Of a whole call over TLS: decided, recorded, carried out, answered."""
    processor_ms: dict[str, float]
    """Processor time that all processes of a kind used meanwhile, for each decision."""


def measure_decisions(
    what: str,
    caller: Caller,
    paths: Sequence[tuple[str, str]],
    seconds: float,
    used: Callable[[], dict[str, float]],
) -> Decisions:
    """Read with several clients at once, each a process; each call is decided.

    Args:
        what: What is read, in words.
        caller: Who asks.
        paths: (enterprise, path below it) of all that is read in turn; `NOW` in it stands for the time.
        seconds: For so long.
        used: Returns the processor seconds of all processes up to now, by kind.
    """
    before = _recorded(caller, paths)
    parts = [paths[number::CLIENTS] or paths for number in range(CLIENTS)]
    begin_s = time.time() + _START_SECONDS
    with multiprocessing.get_context("spawn").Pool(CLIENTS) as pool:
        calls = pool.starmap_async(_call, [(caller, part, begin_s, seconds) for part in parts])
        time.sleep(max(0.0, begin_s - time.time()))
        used_before = used()
        time.sleep(max(0.0, begin_s + seconds - time.time()))
        used_after = used()
        found = calls.get()
    made = _recorded(caller, paths) - before
    cuts = statistics.quantiles([span for spans in found for span in spans], n=100)
    processor_ms = {kind: (now - used_before.get(kind, now)) / made * 1000 for kind, now in used_after.items()}
    return Decisions(what, made / seconds, cuts[49] * 1000, cuts[98] * 1000, processor_ms)


def told(measured: Sequence[Decisions], enterprises: int) -> str:
    """Return what was measured, at so many enterprises, as a part of a page."""
    text = _HEAD.format(enterprises=enterprises, clients=CLIENTS)
    for decisions in measured:
        spent = sorted(decisions.processor_ms.items(), key=lambda item: -item[1])
        text += _ROW.format(
            all_ms=sum(decisions.processor_ms.values()),
            parts=", ".join(f"{kind} {ms:.1f}" for kind, ms in spent if ms >= _LEAST_MS),
            **decisions._asdict(),
        )
    return text


def _recorded(caller: Caller, paths: Sequence[tuple[str, str]]) -> int:
    with Client(caller.url, caller.token, ca_pem=caller.ca_pem, timeout_seconds=_ANSWER_SECONDS) as client:
        total = 0
        for enterprise in {enterprise for enterprise, _ in paths}:
            client.enterprise_name = enterprise
            total += client.verify_decisions().last
        return total


def _call(caller: Caller, paths: Sequence[tuple[str, str]], begin_s: float, seconds: float) -> list[float]:
    spans = []
    headers = {"Authorization": f"Bearer {caller.token}"}
    address = urlsplit(caller.url)
    context = tls_context(caller.ca_pem)
    with closing(
        http.client.HTTPSConnection(address.hostname or "", address.port, timeout=_ANSWER_SECONDS, context=context)
    ) as connection:
        connection.connect()  # before the time begins
        time.sleep(max(0.0, begin_s - time.time()))
        for enterprise, below in cycle(paths):
            if time.time() > begin_s + seconds:
                break
            path = f"/v1/enterprises/{enterprise}/{below}".replace(NOW, str(time.time_ns()))
            begun = time.monotonic()
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
            spans.append(time.monotonic() - begun)
            if answer.status != http.client.OK:
                raise DrCloudError(f"the API answered {answer.status}: {body[:200]!r}", "Look at the manager's log.")
    return spans
