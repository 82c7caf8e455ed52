"""Recovery tests with probes: verdicts, what is kept of them, and every way in which a test can end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cloud_databases import new_world, postgres, world  # noqa: F401
from cloud_world import World
from engine_world import ENTROPY, FSCK, begin, ended, furnish, until
from quiet_fabric import probed
from sqlalchemy import select

from dr_cloud.manager import tables
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import PageRequest
from dr_cloud.model.errors import ConflictError, DrCloudError, InvalidError, UnavailableError
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.recovery import StopTest, TestsRequest
from dr_cloud.model.task import CompletionCode
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import VpgStatus
from dr_cloud.recovery.verdicts import probes_digest


@pytest.fixture(params=["sqlite"])
def quick(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A manager on SQLite, for what does not depend on the database."""
    yield from new_world(request, tmp_path / "provider")


DIRTY = [probed("fsck", "the file system is damaged"), probed("entropy")]


def verdicts(world: World) -> dict[int, tuple[bool, str]]:
    """Return what is kept of probes, by time."""
    with world.cloud._database.read(EVERYONE) as session:
        rows = session.scalars(select(tables.ProbeVerdict)).all()
    assert {row.probes for row in rows} <= {probes_digest([FSCK, ENTROPY])}
    return {row.at_ns: (row.clean, row.reason) for row in rows}


def test_tests_are_judged_by_their_probes_and_end(world: World) -> None:
    """R14.2, R14.7: one stack for each time, each judged by itself; the group's status Test ends with the last."""
    who = furnish(world)
    now_ns = world.clock()
    world.fabric.answers[now_ns] = DIRTY
    dirty, clean = begin(world, who, [0, 7])
    dirty, clean = ended(world, who, dirty.id), ended(world, who, clean.id)
    assert (clean.status, clean.verdict, clean.verdict_note) == ("stopped", "pass", "")
    assert (dirty.status, dirty.verdict) == ("stopped", "fail")
    assert dirty.verdict_note == "fsck: the file system is damaged"
    assert [result.probe for result in dirty.results] == ["fsck", "entropy"]
    assert clean.ended == dirty.ended == "its probes have ended"
    assert clean.rto_seconds is not None
    assert dirty.rto_seconds is None
    assert clean.statistics["blocks_read"] == 7
    assert verdicts(world) == {
        now_ns: (False, "fsck: the file system is damaged"),
        now_ns - 7 * SECOND_NS: (True, ""),
    }
    assert world.fabric.served == {}
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING


def test_results_are_seen_as_they_come(quick: World) -> None:
    """R14.7: a watcher sees each probe's result when that has ended, and an event for it."""
    who = furnish(quick)
    quick.fabric.ended_max = 1
    before = quick.cloud.newest_event(who)
    (test,) = begin(quick, who)
    until(quick, lambda: len(quick.cloud.test(who, "acme", test.id).results) == 1)
    seen = quick.cloud.test(who, "acme", test.id)
    assert (seen.status, seen.verdict, seen.results[0].probe) == ("running", None, "fsck")
    until(
        quick,
        lambda: 1 in [told.data.get("results") for told in quick.cloud.events(who, before) if told.subject == test.id],
    )
    quick.fabric.ended_max = 2
    assert ended(quick, who, test.id).verdict == "pass"


def test_a_kept_test_is_judged_and_served_on(quick: World) -> None:
    who = furnish(quick)
    (test,) = begin(quick, who, keep=True)
    until(quick, lambda: quick.cloud.test(who, "acme", test.id).verdict is not None)
    kept = quick.cloud.test(who, "acme", test.id)
    assert (kept.status, kept.verdict, kept.stopped_ns) == ("running", "pass", None)
    assert list(quick.fabric.served) == [test.id]
    quick.cloud.tending.mend()
    quick.done(quick.cloud.stop_test(who, "acme", test.id, StopTest(note="looked at it")))
    stopped = quick.cloud.test(who, "acme", test.id)
    assert (stopped.verdict, stopped.verdict_note, stopped.ended) == ("pass", "looked at it", f"stopped by {who.name}")


@pytest.mark.parametrize(
    ("told", "wanted", "kept"),
    [(None, ("fail", "stopped before its probes had ended"), {}), ("pass", ("pass", "seen by eye"), {})],
)
def test_a_test_that_is_stopped_in_the_middle_keeps_what_has_ended(
    world: World, told: str | None, wanted: tuple[str, str], kept: dict[int, object]
) -> None:
    """R14.7: the verdict is the person's, else fail; half of the probes say nothing about the data."""
    who = furnish(world)
    world.fabric.ended_max = 1
    (test, other) = begin(world, who, [0, 5])
    until(world, lambda: len(world.cloud.test(who, "acme", other.id).results) == 1)
    how = StopTest.model_validate({"verdict": told, "note": "seen by eye" if told else ""})
    world.done(world.cloud.stop_test(who, "acme", test.id, how))
    stopped = world.cloud.test(who, "acme", test.id)
    assert (stopped.verdict, stopped.verdict_note) == wanted
    assert [result.probe for result in stopped.results] == ["fsck"]
    assert verdicts(world) == kept
    assert world.cloud.test(who, "acme", other.id).status == "running"
    with pytest.raises(ConflictError):
        world.cloud.stop_test(who, "acme", test.id, StopTest())


@pytest.mark.parametrize(
    "results",
    [
        [probed("fsck", "no verdict within 120 s", conclusive=False), probed("entropy")],
        [probed("fsck"), probed("entropy", "stopped", conclusive=False)],
    ],
)
def test_a_probe_that_could_not_say_makes_no_verdict_about_the_data(
    quick: World, results: Sequence[ProbeResult]
) -> None:
    who = furnish(quick)
    quick.fabric.answers[quick.clock()] = results
    (test,) = begin(quick, who)
    assert ended(quick, who, test.id).verdict == "fail"
    assert verdicts(quick) == {}


def test_what_a_stack_could_not_read_is_not_taken_for_damage(quick: World) -> None:
    """A store that does not answer fails the test, and leaves the time untested."""
    who = furnish(quick)
    quick.fabric.answers[quick.clock()] = DIRTY
    quick.fabric.ended_max = 0
    (test,) = begin(quick, who)
    quick.fabric.counted[test.id] = {"failures": 3}
    quick.fabric.ended_max = 2
    found = ended(quick, who, test.id)
    assert (found.verdict, found.results[0].conclusive) == ("fail", False)
    assert verdicts(quick) == {}


def test_specs_are_checked_before_anything_begins(quick: World) -> None:
    who = furnish(quick)
    for spec in (ProbeSpec(kind="nothing"), ProbeSpec(kind="fsck", parameters={"deep": 1, "no": 2})):
        with pytest.raises(InvalidError):
            quick.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[1], probes=[spec]))
    twice = [ProbeSpec(kind="fsck", name="a"), ProbeSpec(kind="entropy", name="a")]
    with pytest.raises(InvalidError):
        quick.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[1], probes=twice))
    assert quick.cloud.tests(who, "acme", "erp").items == []
    assert quick.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING


def test_a_node_that_cannot_run_them_ends_the_test_with_the_reason(quick: World) -> None:
    who = furnish(quick)
    quick.fabric.broken["start_probes"] = InvalidError("probes need root", "Run the node as root.")
    (test,) = begin(quick, who)
    found = ended(quick, who, test.id)
    assert (found.status, found.verdict) == ("failed", "fail")
    assert found.problem == "its probes cannot run: probes need root"
    assert verdicts(quick) == {}


def test_a_node_that_does_not_answer_is_asked_again(quick: World) -> None:
    who = furnish(quick)
    quick.fabric.broken["probe_progress"] = UnavailableError("the node is busy")
    (test,) = begin(quick, who)
    until(quick, lambda: len(quick.fabric.asked("probe_progress")) >= 3)
    assert quick.cloud.test(who, "acme", test.id).status == "running"
    del quick.fabric.broken["probe_progress"]
    assert ended(quick, who, test.id).verdict == "pass"


def test_a_node_that_never_answers_again_does_not_keep_its_test_open(quick: World) -> None:
    who = furnish(quick)
    quick.fabric.broken["probe_progress"] = UnavailableError("the node is away")
    (test,) = begin(quick, who)
    until(quick, lambda: quick.cloud.test(who, "acme", test.id).stopped_ns is not None, 20.0)
    found = quick.cloud.test(who, "acme", test.id)
    assert (found.status, found.verdict) == ("failed", "fail")
    assert found.problem == "its node does not answer: the node is away"


def test_a_stack_that_dies_while_it_is_probed_ends_one_test_alone(quick: World) -> None:
    who = furnish(quick)
    quick.fabric.ended_max = 1
    (test, other) = begin(quick, who, [0, 5])
    until(quick, lambda: all(len(quick.cloud.test(who, "acme", t.id).results) == 1 for t in (test, other)))
    del quick.fabric.served[test.id]
    found = ended(quick, who, test.id)
    assert (found.status, found.verdict, found.ended) == ("failed", "fail", "its stack has died")
    assert [result.probe for result in found.results] == ["fsck"]
    quick.fabric.ended_max = 2
    assert ended(quick, who, other.id).verdict == "pass"
    assert quick.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING


def test_a_test_ends_when_its_time_is_over(quick: World) -> None:
    """R14.7: nobody need stop it; its summary stays."""
    who = furnish(quick)
    (short,) = begin(quick, who, [0], lifetime_seconds=60, probes=[])
    (long,) = begin(quick, who, [2], lifetime_seconds=4000, probes=[])
    until(quick, lambda: quick.cloud.test(who, "acme", short.id).status == "stopped", 5.0)  # by its own round
    found = ended(quick, who, short.id)
    assert (found.status, found.ended, found.verdict) == ("stopped", "its time is over", None)
    assert found.expires_ns is not None
    assert found.statistics["blocks_read"] == 7
    assert quick.cloud.test(who, "acme", long.id).status == "running"


def test_a_test_whose_time_is_over_before_its_probes_have_ended_has_failed(quick: World) -> None:
    who = furnish(quick)
    quick.fabric.ended_max = 1
    (test,) = begin(quick, who, lifetime_seconds=60)
    quick.clock.pass_seconds(61)
    quick.cloud.tending.expire()
    found = ended(quick, who, test.id)
    assert (found.ended, found.verdict) == ("its time is over", "fail")
    assert verdicts(quick) == {}


def test_a_test_that_finds_no_room_for_its_writes_ends(quick: World) -> None:
    """R14.5: a full disk or a spent quota ends one test alone, with a summary."""
    who = furnish(quick)
    full, other = begin(quick, who, [0, 5], probes=[])
    quick.fabric.counted[full.id] = {"writes_refused": 2}
    quick.cloud.tending.look()
    found = ended(quick, who, full.id)
    assert (found.status, found.ended) == ("failed", "it can write no more")
    assert found.problem.startswith("2 writes found no room")
    assert found.statistics["writes_refused"] == 2
    assert quick.cloud.test(who, "acme", other.id).status == "running"


def test_a_stack_that_cannot_be_closed_does_not_keep_its_test_open(quick: World) -> None:
    who = furnish(quick)
    (test,) = begin(quick, who, probes=[])
    quick.fabric.broken["close_stack"] = DrCloudError("the node does not answer")
    quick.cloud.stop_test(who, "acme", test.id, StopTest(verdict="pass"))
    assert ended(quick, who, test.id).verdict == "pass"
    assert list(quick.fabric.served) == [test.id]
    del quick.fabric.broken["close_stack"]
    quick.cloud.tending.sweep()
    assert quick.fabric.served == {}


def test_a_test_that_could_not_be_opened_is_summarised(quick: World) -> None:
    who = furnish(quick)
    good, gone = begin(quick, who, [0, 10**6])
    found = ended(quick, who, gone.id)
    assert (found.status, found.verdict, found.ended) == ("failed", "fail", "it could not be opened")
    assert found.verdict_note == found.problem == "the journal does not hold that time"
    assert ended(quick, who, good.id).verdict == "pass"


# What a crash leaves.


def test_a_manager_that_is_killed_goes_on_with_tests(world: World) -> None:
    """Tests outlive their manager: probes are followed to their end by the next one."""
    who = furnish(world)
    world.fabric.ended_max = 1
    (test,) = begin(world, who)
    until(world, lambda: len(world.cloud.test(who, "acme", test.id).results) == 1)
    world.restart()
    world.fabric.ended_max = 2
    found = ended(world, who, test.id)
    assert (found.verdict, len(found.results)) == ("pass", 2)
    assert world.fabric.asked("open_stacks") == [("acme", "erp", "dc1", test.id)]


@pytest.mark.parametrize("status", ["opening", "running", "closing"])
def test_tests_whose_task_is_gone_are_found_and_ended(world: World, status: str) -> None:
    """Whatever became of a task (it broke, the database was rebuilt), no test stays open for ever."""
    who = furnish(world)
    world.fabric.ended_max = 1
    (test,) = begin(world, who)
    world.cloud.tending.mend()
    assert world.cloud.test(who, "acme", test.id).status == "running"
    with world.cloud._database.write("acme") as session:
        row = session.get_one(tables.RecoveryTest, ("acme", test.id))
        row.status = status
        for task in session.scalars(select(tables.Task).where(tables.Task.type == "test.probe")):
            session.delete(task)
    world.cloud.tending.mend()
    found = ended(world, who, test.id)
    assert (found.status, found.verdict, found.ended) == ("failed", "fail", "the manager lost it")
    assert world.fabric.served == {}
    assert world.cloud.vpg_status(who, "acme", "erp") is VpgStatus.PROTECTING


def test_a_stack_without_a_test_is_closed(quick: World) -> None:
    who = furnish(quick)
    (test, other) = begin(quick, who, [0, 5], probes=[])
    with quick.cloud._database.write("acme") as session:
        session.delete(session.get_one(tables.RecoveryTest, ("acme", test.id)))
    quick.cloud.tending.sweep()
    assert list(quick.fabric.served) == [other.id]


def test_a_group_that_is_removed_takes_its_tests_along(world: World) -> None:
    who = furnish(world)
    world.fabric.ended_max = 0
    begin(world, who, [0, 5])
    world.done(world.cloud.remove_vpg(who, "acme", "erp", force=True))
    until(world, lambda: world.fabric.served == {})
    open_tasks = [t for t in world.cloud.tasks(who, "acme").items if t.completion is CompletionCode.NOT_AVAILABLE]
    until(world, lambda: all(world.cloud.task(who, task.id).ended_ns is not None for task in open_tasks))


def test_verdicts_are_kept_once_for_a_time(world: World) -> None:
    """Two tests of one time, judged at the same moment."""
    who = furnish(world)
    at_ns = world.clock()
    world.done(world.cloud.start_tests(who, "acme", "erp", TestsRequest(times_ns=[at_ns] * 4, probes=[FSCK, ENTROPY])))
    tests = world.cloud.tests(who, "acme", "erp", PageRequest()).items
    assert {ended(world, who, test.id).verdict for test in tests} == {"pass"}
    assert verdicts(world) == {at_ns: (True, "")}
