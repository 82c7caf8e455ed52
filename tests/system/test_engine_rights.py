"""R13.3: who may read what recovery tests serve, and what their probes printed and left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud_databases import new_world
from cloud_world import LAW
from quiet_fabric import probed
from rights_world import RightsWorld

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.errors import ConflictError, DeniedError, InvalidError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Role
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.recovery import RecoveryTest, StopTest, TestsRequest


@pytest.fixture(params=["sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RightsWorld]:
    yield from new_world(request, tmp_path / "provider", RightsWorld)  # type: ignore[misc]


LEFT = [{"path": "fsck/log", "size_bytes": 3, "sha256": "0" * 64}]


def probed_test(world: RightsWorld, target: str = "us", **more: object) -> RecoveryTest:
    """Return a test of acme's whose probe has printed and left something; it runs on."""
    who = world.principal("acme")
    at_ns = world.fabric.journals[Scope("acme", "erp", target)][-1].time_ns
    world.fabric.answers[at_ns] = [probed("fsck", output="a secret", artefacts=LEFT)]
    request = TestsRequest(target=target, times_ns=[at_ns], probes=[ProbeSpec(kind="fsck")], keep=True, remote=True)
    task = world.done(world.cloud.start_tests(who, "acme", "erp", request.model_copy(update=more)))
    return world.cloud.test(SYSTEM, "acme", task.result["tests"][0])


def until_judged(world: RightsWorld, test: str) -> RecoveryTest:
    for _ in range(400):
        found = world.cloud.test(SYSTEM, "acme", test)
        if found.verdict is not None:
            return found
        world.clock.pass_seconds(0.5)
        time.sleep(0.02)
    raise AssertionError(f"nobody judges {found}")


def test_who_sits_elsewhere_reads_nothing_of_a_test(world: RightsWorld) -> None:
    """R13.3: credentials, artefacts and outputs; each asked for is decided and on the record."""
    here, far = world.principal("acme"), world.person("acme", Role.ENTERPRISE_ADMIN, "APAC")
    world.two_targets(here)
    test = until_judged(world, probed_test(world).id)
    world.fabric.artefacts[test.id, "fsck/log"] = b"log"
    seen = world.cloud.test(far, "acme", test.id)
    assert (seen.uris, seen.results[0].output, seen.results[0].artefacts) == ({}, "", [])
    assert "the person sits in APAC" in seen.denied
    for act in (
        lambda: world.cloud.test_credential(far, "acme", test.id),
        lambda: world.cloud.test_artefact(far, "acme", test.id, "fsck/log"),
    ):
        before = len(world.decisions())
        with pytest.raises(DeniedError, match="the person sits in APAC"):
            act()
        (no,) = world.decisions()[before:]
        assert (no.point, no.subject, no.allow) == ("read", f"test/{test.id}", False)
    assert world.fabric.asked("credential") == world.fabric.asked("artefact") == []
    assert world.cloud.test(here, "acme", test.id).results[0].output == "a secret"
    assert world.cloud.tests(here, "acme").items[0].results[0].output == ""
    (yes,) = world.written(lambda: world.cloud.test_credential(here, "acme", test.id))
    assert (yes.point, yes.allow) == ("read", True)
    assert world.cloud.test_artefact(here, "acme", test.id, "fsck/log") == b"log"
    told = [(entry.operation, entry.outcome) for entry in world.cloud.audit(SYSTEM, "acme").items]
    assert {("test.attach", "done"), ("test.attach", "denied"), ("test.read", "done")} <= set(told)
    assert world.cloud.verify_decisions(SYSTEM, "acme").whole


def test_credentials_are_for_remote_tests_that_run(world: RightsWorld) -> None:
    who = world.principal("acme")
    world.two_targets(who)
    local, remote = until_judged(world, probed_test(world, remote=False).id), probed_test(world)
    with pytest.raises(InvalidError, match="not served to other machines"):
        world.cloud.test_credential(who, "acme", local.id)
    assert "the key" not in repr(world.cloud.test_credential(who, "acme", remote.id))
    del world.fabric.served[remote.id]
    with pytest.raises(NotFoundError, match="stack is gone"):
        world.cloud.test_credential(who, "acme", remote.id)
    world.done(world.cloud.stop_test(who, "acme", local.id, StopTest()))
    with pytest.raises(ConflictError, match="the test is stopped"):
        world.cloud.test_credential(who, "acme", local.id)
    with pytest.raises(NotFoundError):
        world.cloud.test_artefact(who, "acme", local.id, "fsck/other")


def test_a_test_that_policy_stops_while_it_is_probed_ends_alone(world: RightsWorld) -> None:
    """R13: probes of a stack that may answer nothing any more say nothing about the data."""
    who = world.principal("acme")
    world.two_targets(who)
    world.fabric.ended_max = 0
    there, here = probed_test(world, "uk", keep=False), probed_test(world, "us", keep=False)
    world.law(LAW)
    world.look()
    found = until_judged(world, there.id)
    assert (found.verdict, found.problem) == (
        "fail",
        "policy has stopped it: uk-south lies in UK: nothing opens USA to UK",
    )
    world.fabric.ended_max = 1
    assert until_judged(world, here.id).verdict == "pass"
