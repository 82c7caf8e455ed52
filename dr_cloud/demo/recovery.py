"""Recovery tests of the demonstration: asked for through the API, their disks probed over NBD.

What is found is checked against records that the workload itself keeps, apart from everything that dr_cloud does.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

from dr_cloud.demo.cloud import done
from dr_cloud.demo.enterprise import VPG, Enterprise
from dr_cloud.demo.probe import Finding, probe
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest, Verdict
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.search import CleanSearch, Known

_PIECE_BYTES = 4 << 20


class Tested(NamedTuple):
    """One recovery test: its time, what the probe found, what it took."""

    id: str
    at_ns: int
    finding: Finding
    first_byte_seconds: float
    """From the request, made of the API for all tests together, to the first 4 KiB of this one's disk."""
    stored_bytes: int
    """Space that its write log took."""


class Recovery:
    """Tests of one enterprise, at its first target unless another is named."""

    def __init__(self, enterprise: Enterprise, probes: ProcessPoolExecutor) -> None:
        """Test `enterprise`, probing in the processes of `probes`."""
        self.enterprise = enterprise
        self._client = enterprise.client
        self._probes = probes

    def test(self, times_ns: list[int], *, compare_blocks: bool) -> list[Tested]:
        """Have a stack opened at each time, all in parallel, probe each, and end them."""
        asked = time.monotonic()
        running = self._start(times_ns)

        def first_byte(test: RecoveryTest) -> float:
            with NbdClient.connect(_uri(test)) as client:
                client.pread(0, 4096)
                return time.monotonic() - asked

        with ThreadPoolExecutor(len(running)) as threads:
            first_bytes = list(threads.map(first_byte, running))
        size, folder = self.enterprise.size, self.enterprise.folder
        base = self.enterprise.base if compare_blocks else None
        probing = [self._probes.submit(probe, _uri(test), _time(test), folder, size.rows, base) for test in running]
        findings = [job.result() for job in probing]
        verdicts: list[Verdict] = ["pass" if finding.passed else "fail" for finding in findings]
        ended = self._stop(running, verdicts)
        return [
            Tested(test.id, _time(test), finding, seconds, int(test.statistics.get("stored_bytes") or 0))
            for test, finding, seconds in zip(ended, findings, first_bytes, strict=True)
        ]

    def _start(self, times_ns: list[int], target: str | None = None) -> list[RecoveryTest]:
        target = target or self.enterprise.data_centers[0].name
        task = done(self._client, self._client.start_tests(VPG, TestsRequest(target=target, times_ns=times_ns)))
        tests = [test for test in self._client.tests(VPG) if test.task == task.id]
        broken = [test for test in tests if test.status != "running"]
        if broken:
            raise DrCloudError(f"a test of {self.enterprise.name} is {broken[0].status}: {broken[0].problem}")
        return sorted(tests, key=lambda test: test.asked_ns)

    def _stop(self, tests: list[RecoveryTest], verdicts: list[Verdict] | None = None) -> list[RecoveryTest]:
        """End tests; return what is kept of them."""
        how = [StopTest(verdict=verdict) for verdict in verdicts] if verdicts else [StopTest()] * len(tests)
        for task in [self._client.stop_test(test.id, stop) for test, stop in zip(tests, how, strict=True)]:
            done(self._client, task)
        return [self._client.test(test.id) for test in tests]

    def find_last_clean(
        self, tested: list[Tested], parallel: int, told: Callable[[CleanSearch, list[bool]], None]
    ) -> tuple[int, int, CleanSearch]:
        """Return the time of the last clean write, the time of the write after it, and the search.

        Args:
            tested: What is known, ascending.
            parallel: Stacks in each round.
            told: Called after each round with the search and the round's verdicts.
        """
        dirty_ns = min((test.at_ns for test in tested if not test.finding.passed), default=None)
        if dirty_ns is None:
            raise DrCloudError("every test passed, also the last: the corruption is not in any stack")
        clean_ns = max((test.at_ns for test in tested if test.at_ns < dirty_ns), default=None)
        if clean_ns is None:
            raise DrCloudError(f"the first test failed already: {tested[0].finding.reason}")
        target = self.enterprise.data_centers[0].name
        writes = self._client.writes(VPG, target, clean_ns + 1, dirty_ns)
        times = [clean_ns, *(write.time_ns for write in writes)]
        search = CleanSearch(candidates=len(times))
        search.learn([_known(times, 0, True), _known(times, len(times) - 1, False)])
        while not search.done:
            candidates = search.next_candidates(parallel)
            round_tests = self.test([times[candidate] for candidate in candidates], compare_blocks=False)
            verdicts = [test.finding.passed for test in round_tests]
            search.answer([_known(times, *answer) for answer in zip(candidates, verdicts, strict=True)])
            told(search, verdicts)
        (edge, *_) = search.edges
        assert edge.clean is not None and edge.dirty is not None, "both ends are known"
        return edge.clean.time_ns, edge.dirty.time_ns, search

    def hash_images(self, at_ns: int) -> list[str]:
        """Return the hash of each target's image at a time, read through stacks of their own."""
        digests = []
        for center in self.enterprise.data_centers:
            (test,) = self._start([at_ns], center.name)
            digest = hashlib.sha256()
            with NbdClient.connect(_uri(test)) as client:
                for offset in range(0, client.size_bytes, _PIECE_BYTES):
                    digest.update(client.pread(offset, min(_PIECE_BYTES, client.size_bytes - offset)))
            self._stop([test])
            digests.append(digest.hexdigest())
        return digests

    def write_to_a_stack(self, at_ns: int) -> tuple[int, int]:
        """Write noise over a stack's disk and stop it; return bytes written and bytes that its log took."""
        (test,) = self._start([at_ns])
        written = 0
        with NbdClient.connect(_uri(test)) as client:
            for offset in range(0, client.size_bytes, _PIECE_BYTES):
                client.pwrite(offset, secrets.token_bytes(1 << 20))
                written += 1 << 20
        (ended,) = self._stop([test])
        return written, int(ended.statistics.get("stored_bytes") or 0)


def _uri(test: RecoveryTest) -> str:
    ((uri, *_),) = test.uris.values()
    return uri


def _time(test: RecoveryTest) -> int:
    assert test.at_ns is not None, "it runs"
    return test.at_ns


def _known(times_ns: list[int], candidate: int, clean: bool) -> Known:
    return Known(first=candidate, last=candidate, time_ns=times_ns[candidate], clean=clean)
