"""The search for the last clean point, as the manager runs it: rounds of tests over a journal with real writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clean_world import SCOPE, Answers, CleanWorld, found
from cloud_databases import BOTH, new_world, postgres  # noqa: F401

from dr_cloud.manager import clean
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.manager.tasks import Later, Tasks
from dr_cloud.model.cloud import PageRequest
from dr_cloud.model.errors import DrCloudError, ForbiddenError, InvalidError, NotFoundError, UnavailableError
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.recovery import StopTest
from dr_cloud.model.task import CompletionCode, Task
from dr_cloud.model.units import SECOND_NS, format_time

on_both = pytest.mark.parametrize("world", BOTH, indirect=True)


@pytest.fixture(params=["sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CleanWorld]:
    for made in new_world(request, tmp_path / "provider", CleanWorld):
        made.furnish(made.principal("acme"))
        yield made


@pytest.fixture
def who(world: CleanWorld) -> Principal:
    return world.principal("acme", Role.ENTERPRISE_OPERATOR)


@on_both
def test_the_write_that_made_it_dirty_is_found(world: CleanWorld, who: Principal):
    """R14.2: to the very write, in ⌈log₉⌉ rounds of eight; its tests are in the name of who asked, and end."""
    times = world.journal_of_erp.times
    world.dirty_from(times[617])
    task = world.begin(who)
    ended = world.end(task)
    point = found(ended)
    assert (point.clean_ns, point.dirty_ns) == (times[616], times[617])
    assert point.reason == f"entropy: looks encrypted at {times[617]}"
    assert point.monotone and not point.problem and point.known == 0
    assert point.writes == 1000 and point.target == "dc1"
    assert len(point.rounds) <= 4  # 9⁴ = 6561, and 9³ = 729
    assert [point.edges[0].clean_ns, point.edges[0].dirty_ns] == [point.clean_ns, point.dirty_ns]
    assert [checkpoint.tag for checkpoint in point.checkpoints] == [f"tag {n}" for n in (15, 20, 25, 30, 35, 40)]
    tests = world.tests_of(task)
    assert len(tests) == sum(one.tests for one in point.rounds)
    assert {test.status for test in tests} == {"stopped"} and not world.fabric.served
    assert {test.started_by for test in tests} == {who.name}
    assert {test.verdict for test in tests} == {"pass", "fail"}
    audit = world.cloud.audit(SYSTEM, "acme", page=PageRequest(limit=200)).items
    begun = [entry.operation for entry in audit if entry.principal_name == who.name]
    assert begun.count("clean.find") == 1 and begun.count("test.start") == len(point.rounds)
    assert ended.progress == 1.0
    lefts = [one.left for one in point.rounds]
    assert lefts == sorted(lefts, reverse=True) and lefts[-1] == 0


def test_what_is_known_is_not_tested_again(world: CleanWorld, who: Principal):
    """R14.2: verdicts are kept by time: the same search takes no test, one nearby fewer."""
    times = world.journal_of_erp.times
    world.dirty_from(times[700])
    first = world.search(who)
    opened = len(world.fabric.asked("open_stacks"))
    again = world.search(who, until_ns=times[900] + 5)
    assert (again.clean_ns, again.dirty_ns, again.reason) == (first.clean_ns, first.dirty_ns, first.reason)
    assert again.rounds == [] and again.known > 0
    assert len(world.fabric.asked("open_stacks")) == opened
    other = world.search(who, until_ns=times[5], probes=[ProbeSpec(kind="entropy", disk="sd?")])
    assert other.known == 0 and len(other.rounds) > 0


def test_neither_end_need_be_clean_or_dirty(world: CleanWorld, who: Principal):
    times = world.journal_of_erp.times
    world.dirty_from(1 << 62)
    point = world.search(who, until_ns=times[60])
    assert (point.clean_ns, point.dirty_ns, point.edges) == (times[60], None, [])
    world.dirty_from(0)
    point = world.search(who, since_ns=times[500] + 1, until_ns=times[560])
    assert (point.clean_ns, point.dirty_ns) == (None, times[500] + 1)
    point = world.search(who, since_ns=times[980], until_ns=times[980])
    assert (point.clean_ns, point.writes) == (None, 0)


def test_what_was_written_without_order_is_one_candidate(world: CleanWorld, who: Principal):
    """R14.1, R14.2: no time within a synchronisation is told as clean or dirty: its end is."""
    gap_ns = world.gap_ends_ns()
    world.dirty_from(gap_ns - SECOND_NS // 2)
    point = world.search(who, since_ns=gap_ns - 3 * SECOND_NS, until_ns=gap_ns + SECOND_NS)
    before = max(at for at in world.journal_of_erp.times if at <= gap_ns - SECOND_NS)
    assert (point.clean_ns, point.dirty_ns) == (before, gap_ns)


def test_it_stops_when_it_is_near_enough(world: CleanWorld, who: Principal):
    times = world.journal_of_erp.times
    world.dirty_from(times[750])
    point = world.search(who, precision_ns=3 * SECOND_NS)
    assert point.clean_ns is not None and point.dirty_ns is not None
    assert point.clean_ns < times[750] <= point.dirty_ns <= point.clean_ns + 3 * SECOND_NS
    exact = world.search(who, since_ns=point.clean_ns, until_ns=point.dirty_ns, parallel=1)
    assert exact.dirty_ns == times[750]


def test_every_edge_is_told_where_there_are_several(world: CleanWorld, who: Principal):
    """R14.2: answers that are not monotone are said to be so, with every clean→dirty edge that was seen."""
    times = world.journal_of_erp.times
    dirty = [(200, 350), (550, 700), (850, 1000)]
    spans = [(times[low], times[high] if high < 1000 else 1 << 62) for low, high in dirty]
    world.dirty_from(0)
    world.fabric.answers.judge = lambda at_ns: not any(low <= at_ns < high for low, high in spans)  # type: ignore[attr-defined]
    point = world.search(who, parallel=12)
    assert not point.monotone
    assert [(edge.clean_ns, edge.dirty_ns) for edge in point.edges] == [(times[n - 1], times[n]) for n, _ in dirty]
    assert (point.clean_ns, point.dirty_ns) == (times[199], times[200])


def test_tests_that_cannot_say_are_tried_once_more(world: CleanWorld, who: Principal):
    """R14.2: a stack that does not open, a probe that runs out of time: never taken for an answer."""
    times = world.journal_of_erp.times
    world.dirty_from(times[450])
    judge = world.fabric.answers.judge  # type: ignore[attr-defined]
    lost = set(times[100:900:3])
    world.fabric.answers.judge = lambda at_ns: None if at_ns in lost else judge(at_ns)  # type: ignore[attr-defined]
    point = world.search(who)
    assert point.clean_ns is not None and point.clean_ns < times[450] <= (point.dirty_ns or 0)
    assert any(one.silent for one in point.rounds)
    world.fabric.broken["open_stacks"] = DrCloudError("no room on any node")
    point = world.search(who, since_ns=times[950], until_ns=times[990])
    assert (point.clean_ns, point.dirty_ns) == (None, None)
    assert point.problem == "tests could not say whether their times are clean: no room on any node"
    assert [(one.tests, one.silent) for one in point.rounds] == [(8, 8), (8, 8)]


@on_both
def test_a_manager_that_is_killed_at_any_step_goes_on(
    world: CleanWorld, who: Principal, monkeypatch: pytest.MonkeyPatch
):
    """R14.2: whichever step's end is lost, no time is tested twice and the answer is the same."""
    times = world.journal_of_erp.times
    world.dirty_from(times[321])
    put_off, lost = Tasks._put_off, []

    def die(self: Tasks, row: object, later: Later) -> None:
        """Every second end of a step of the search is lost, as if the process had been killed before it."""
        if row.type == "clean.find" and len(lost) % 2 == 0:  # type: ignore[attr-defined]
            lost.append(dict(row.state))  # type: ignore[attr-defined]
            return
        lost.append(None)
        put_off(self, row, later)  # type: ignore[arg-type]

    monkeypatch.setattr(Tasks, "_put_off", die)
    task = world.begin(who)
    for _ in range(3):
        seen = len(lost)
        world.until(lambda seen=seen: len(lost) >= seen + 3 or world.cloud.task(who, task.id).ended_ns)
        world.restart()
    point = found(world.end(task))
    assert (point.clean_ns, point.dirty_ns) == (times[320], times[321])
    asked = [test.asked_ns for test in world.tests_of(task)]
    assert len(asked) == len(set(asked)) == sum(one.tests for one in point.rounds)
    assert sum(item is not None for item in lost) >= 2


def test_it_waits_while_the_journal_is_away(world: CleanWorld, who: Principal, monkeypatch: pytest.MonkeyPatch):
    times = world.journal_of_erp.times
    world.dirty_from(times[5])
    world.fabric.broken["writes_at"] = UnavailableError("the VDSA starts anew")
    task = world.begin(who, until_ns=times[9])
    world.until(lambda: len(world.fabric.asked("writes_at")) > 3)
    world.fabric.broken.clear()
    assert found(world.end(task)).dirty_ns == times[5]
    monkeypatch.setattr(clean, "_AWAY_MAX", 3)
    world.fabric.broken["images_at"] = UnavailableError("the VDSA is gone")
    ended = world.end(world.begin(who))
    assert (ended.completion, ended.exception) == (CompletionCode.FAILED, "the VDSA is gone")


class FirstRound(Answers):
    """Answers for the first eight times that are asked about; the probes of all others never end."""

    def __init__(self, judge: Callable[[int], bool | None]) -> None:
        super().__init__(judge)
        self.first: set[int] = set()

    def get(self, at_ns: int, default: Any = None) -> Any:
        if len(self.first) < 8:
            self.first.add(at_ns)
        return super().get(at_ns) if at_ns in self.first else []


def test_an_abort_ends_the_tests_under_way_and_keeps_what_is_known(world: CleanWorld, who: Principal):
    times = world.journal_of_erp.times
    world.fabric.answers = FirstRound(lambda at_ns: at_ns < times[600])
    task = world.begin(who)
    world.until(lambda: (world.cloud.task(who, task.id).result or {}).get("rounds"))
    assert 0 < world.cloud.task(who, task.id).progress < 1
    world.until(lambda: world.fabric.served)
    world.cloud.abort_task(who, task.id)
    ended = world.end(task)
    assert ended.completion is CompletionCode.ABORTED
    assert found(ended).rounds
    world.until(lambda: {test.status for test in world.tests_of(task)} == {"stopped"} and not world.fabric.served)
    last = world.tests_of(task)[-1]
    assert last.verdict == "fail" and last.verdict_note == "its search was aborted"


def test_an_abort_just_before_a_round_begins_none(world: CleanWorld, who: Principal, monkeypatch: pytest.MonkeyPatch):
    world.dirty_from(world.journal_of_erp.times[600])
    writes_at, tasks = world.fabric.writes_at, []

    def abort(*arguments: Any) -> Any:
        """A person aborts while the search looks where its first round is to be."""
        world.until(lambda: tasks)
        world.cloud.abort_task(who, tasks[0].id)
        return writes_at(*arguments)

    monkeypatch.setattr(world.fabric, "writes_at", abort)
    tasks.append(world.begin(who))
    assert world.end(tasks[0]).completion is CompletionCode.ABORTED
    assert world.tests_of(tasks[0]) == []


def test_a_test_that_a_person_stops_says_nothing(world: CleanWorld, who: Principal):
    """A verdict given by hand is no probe's: the search looks beside it."""
    times = world.journal_of_erp.times
    world.dirty_from(times[10])
    world.fabric.ended_max = 0
    task = world.begin(who, until_ns=times[20], parallel=1)
    world.until(lambda: world.fabric.served)
    (test,) = world.tests_of(task)
    world.cloud.stop_test(who, "acme", test.id, StopTest(verdict="pass", note="looks fine to me"))
    # Until it has ended: what its probes had found by then would count.
    world.until(lambda: world.cloud.test(who, "acme", test.id).status == "stopped")
    world.fabric.ended_max = 1000
    point = found(world.end(task))
    assert (point.clean_ns, point.dirty_ns) == (times[9], times[10])
    assert point.rounds[0].silent == 1
    assert abs(world.tests_of(task)[1].asked_ns - test.asked_ns) < SECOND_NS


def test_what_cannot_be_searched(world: CleanWorld, who: Principal):
    """R19: bad input begins nothing; a time that the journal does not hold is told with what it holds."""
    for probes in ([ProbeSpec(kind="no-such-probe")], [ProbeSpec(kind="sqlite", parameters={"nonsense": 1})]):
        with pytest.raises(InvalidError):
            world.begin(who, probes=probes)
    with pytest.raises(ForbiddenError):
        world.begin(world.principal("acme", Role.AUDITOR))
    with pytest.raises(NotFoundError):
        world.begin(world.principal("brit"))
    with pytest.raises(NotFoundError):
        world.cloud.find_clean(who, "acme", "erp", world.request(target="elsewhere"))
    early = world.end(world.begin(who, since_ns=world.begun_ns - 1))
    assert early.completion is CompletionCode.FAILED
    assert format_time(world.begun_ns) in early.remedy
    assert not world.fabric.asked("open_stacks")


def test_one_key_begins_one_search(world: CleanWorld, who: Principal):
    def find() -> Task:
        return world.begin(who, until_ns=world.journal_of_erp.times[2])

    first = world.cloud.once(who, "k" * 32, "digest", Task, find)
    assert world.cloud.once(who, "k" * 32, "digest", Task, find).id == first.id
    world.end(first)
    assert len([t for t in world.cloud.tasks(who, "acme").items if t.type == "clean.find"]) == 1


def test_a_round_that_is_no_longer_allowed_ends_the_search(world: CleanWorld, who: Principal):
    """R13: each round is asked for anew."""
    world.dirty_from(world.journal_of_erp.times[600])
    world.fabric.ended_max = 0
    task = world.begin(who)
    world.until(lambda: world.fabric.served)
    decide = world.cloud._context.desk.ask
    denied = []

    def deny(questions: list) -> list:
        answers = list(decide(questions))
        denied.extend(q.action for q in questions)
        return [a.model_copy(update={"allow": False, "reasons": ["not any more"]}) for a in answers]

    world.cloud._context.desk.ask = deny  # type: ignore[method-assign, assignment]
    world.fabric.ended_max = 1000
    ended = world.end(task)
    world.cloud._context.desk.ask = decide  # type: ignore[method-assign]
    assert ended.completion is CompletionCode.FAILED
    assert "not any more" in ended.exception and denied
    assert world.fabric.written[SCOPE]
