"""A manager over a journal with real writes, of which a test says when they became dirty."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from clean_journal import WrittenJournal
from cloud_world import World
from quiet_fabric import probed

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.recovery import CleanPoint, CleanRequest, RecoveryTest
from dr_cloud.model.task import CompletionCode, Task
from dr_cloud.model.units import SECOND_NS
from dr_cloud.store.objects import open_memory

SCOPE = Scope("acme", "erp", "dc1")
PROBES = [ProbeSpec(kind="entropy")]


class Answers(dict[int, Sequence[ProbeResult]]):
    """What the probe says of the image of a time: clean, dirty, or (None) nothing."""

    def __init__(self, judge: Callable[[int], bool | None]) -> None:
        super().__init__()
        self.judge = judge

    def get(self, at_ns: int, default: Any = None) -> Any:
        said = self.judge(at_ns)
        if said is None:
            return [probed("entropy", "ran out of time", conclusive=False)]
        return [probed("entropy", "" if said else f"looks encrypted at {at_ns}")]


class CleanWorld(World):
    """Its journal has fifty intervals of a second, with twenty writes each, and a synchronisation."""

    INTERVALS = 50
    GAP = 20
    """The interval whose order is not known."""

    def furnish(self, who: Principal) -> None:
        """Protect a VPG, and write."""
        self.protect(who)
        self.begun_ns = self.clock() - self.INTERVALS * SECOND_NS
        self.journal_of_erp = journal = WrittenJournal(open_memory(), SCOPE, self.begun_ns)
        for interval in range(self.INTERVALS):
            start_ns = self.begun_ns + interval * SECOND_NS
            journal.write([start_ns + (at + 1) * SECOND_NS // 25 for at in range(20)])
            tag = f"tag {interval}" if interval % 5 == 0 else ""
            journal.cut(start_ns + SECOND_NS, "tag" if tag else "auto", exact=interval != self.GAP, tag=tag)
        self.fabric.journals[SCOPE] = journal.writer.catalogue.checkpoints
        self.fabric.written[SCOPE] = (journal.writer.catalogue, journal.reader())

    def gap_ends_ns(self) -> int:
        return self.begun_ns + (self.GAP + 1) * SECOND_NS

    def dirty_from(self, at_ns: int) -> None:
        """Have every image from this time on be dirty."""
        self.fabric.answers = Answers(lambda served_ns: served_ns < at_ns)

    def request(self, **changes: Any) -> CleanRequest:
        now = self.begun_ns + self.INTERVALS * SECOND_NS
        given = {"since_ns": self.begun_ns, "until_ns": now, "probes": PROBES, "parallel": 8} | changes
        return CleanRequest.model_validate(given)

    def begin(self, who: Principal, **changes: Any) -> Task:
        return self.cloud.find_clean(who, "acme", "erp", self.request(**changes))

    def search(self, who: Principal, **changes: Any) -> CleanPoint:
        """Search to the end."""
        ended = self.end(self.begin(who, **changes))
        assert ended.completion is CompletionCode.SUCCESS, ended
        return found(ended)

    def until(self, so: Callable[[], object]) -> None:
        """Have time pass until it is so; no site reports meanwhile."""
        deadline = time.monotonic() + 60
        while not so():
            assert time.monotonic() < deadline, "it does not come to pass"
            self.clock.pass_seconds(1.0)
            self.cloud._context.tasks.wake()
            time.sleep(0.005)

    def end(self, task: Task) -> Task:
        """Have time pass until a task has ended; return it."""
        self.until(lambda: self.cloud.task(SYSTEM, task.id).ended_ns is not None)
        return self.cloud.task(SYSTEM, task.id)

    def tests_of(self, task: Task) -> list[RecoveryTest]:
        """Return the tests of a search, oldest first."""
        page = self.cloud.tests(self.principal("acme"), "acme", "erp").items
        return [test for test in reversed(page) if test.origin == f"clean/{task.id}"]


def found(task: Task) -> CleanPoint:
    return CleanPoint.model_validate(task.result)
