"""Signed reports through the manager, the API and the command line."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_run import run_cli
from cli_world import Provider, provider  # noqa: F401
from cloud_databases import BOTH, new_world, postgres  # noqa: F401
from cloud_world import World
from engine_world import begin, ended, furnish
from quiet_fabric import probed

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.cloud import TokenRequest
from dr_cloud.model.errors import InvalidError, NotFoundError
from dr_cloud.model.principal import Role
from dr_cloud.model.probe import Artefact
from dr_cloud.model.recovery import ReportQuery
from dr_cloud.recovery.report import check_report


@pytest.fixture(params=BOTH)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    yield from new_world(request, tmp_path / "provider")


def test_a_report_is_made_of_what_is_known(world: World) -> None:
    """R14.7, R14.8, R13: of one test or several; without what the caller may not read; none of what was discarded."""
    who, other = furnish(world), world.principal("brit")
    shot = Artefact(path="fsck/screen.png", size_bytes=3, sha256="cd" * 32)
    world.fabric.answers[world.clock()] = [
        probed("fsck", "it is damaged", output="S3CRET of inode 12", artefacts=[shot]),
        probed("entropy"),
    ]
    tests = begin(world, who, [0, 7])
    ids = [ended(world, who, test.id).id for test in tests]
    public = world.cloud.report_key().public
    both = check_report(world.cloud.tests_report(who, "acme", ReportQuery(task=tests[0].task)).encode(), public)
    assert {test.id for test in both.tests} == set(ids)
    one = check_report(world.cloud.test_report(who, "acme", ids[0]).encode(), public)
    (test,) = one.tests
    assert (test.verdict, test.started_as, test.started_by, test.withheld) == ("fail", "person", who.name, "")
    assert test.probes[0].output == "S3CRET of inode 12"
    assert test.probes[0].artefacts == [shot]
    assert (one.enterprise, one.provider, one.key) == ("acme", "provider", world.cloud.report_key().id)
    asked = next(d for d in world.cloud.decisions(who, "acme").items if d.number in test.decisions)
    assert (asked.action, asked.allow, asked.subject) == ("test", True, "vpg/erp/dc1")

    request = TokenRequest(name="abroad", role=Role.AUDITOR, enterprise="acme", place="BR")
    abroad = world.cloud.authenticate(world.cloud.create_token(SYSTEM, request).secret)
    for form in ("json", "html"):
        data = world.cloud.test_report(abroad, "acme", ids[0], form)  # type: ignore[arg-type]
        assert "S3CRET" not in data
        assert "screen.png" not in data
        (test,) = check_report(data.encode(), public).tests
        assert "left out" in test.withheld
        assert (test.verdict, test.probes[0].output, test.probes[0].artefacts) == ("fail", None, None)
    refused = world.cloud.decisions(who, "acme").items[-1]
    assert (refused.point, refused.subject, refused.allow) == ("read", "vpg/erp/dc1", False)

    for which in (ReportQuery(test=[ids[0]]), ReportQuery(task=tests[0].task), ReportQuery(vpg="erp")):
        with pytest.raises(NotFoundError, match="'acme'"):
            world.cloud.tests_report(other, "acme", which)
        with pytest.raises(NotFoundError):
            world.cloud.tests_report(other, "brit", which)
    with pytest.raises(NotFoundError, match="nothing"):
        world.cloud.tests_report(who, "acme", ReportQuery(test=[ids[0], "nothing"]))
    world.cloud.discard_tests(who, "acme", "erp", 2)
    with pytest.raises(NotFoundError, match=ids[0]):
        world.cloud.test_report(who, "acme", ids[0])


def test_a_report_has_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    who = furnish(world)
    tests = [ended(world, who, test.id).id for test in begin(world, who, [0, 7])]
    monkeypatch.setattr("dr_cloud.manager.testreports.TEST_TIMES_MAX", 1)
    with pytest.raises(InvalidError, match="more than 1 tests"):
        world.cloud.tests_report(who, "acme", ReportQuery(vpg="erp"))
    assert world.cloud.test_report(who, "acme", tests[0])


@pytest.mark.system
def test_drills_and_reports_by_command(provider: Provider, tmp_path: Path) -> None:
    """FIELD: scheduled drills with evidence, by command; a report is verified without the provider."""
    arguments = ["--schedule", "0 3 * * 1", "--age", "0", "--age", "2s", "--probe", "fsck", "--ttl", "20m"]
    made = run_cli("drill", "set", "erp", "weekly", *arguments, "--json")
    assert made.code == 0, made.stderr
    assert made.json["settings"]["ages_seconds"] == [0, 2]
    assert (made.json["settings"]["lifetime_seconds"], made.json["last_verdict"]) == (1200, None)
    assert "0 3 * * 1" in run_cli("drill", "list", "erp").stdout
    wrong = run_cli("drill", "set", "erp", "weekly", "--schedule", "often", "--probe", "fsck")
    assert (wrong.code, "five fields" in wrong.stderr) == (1, True)
    world = provider.api.world
    world.journal(next(scope for scope in world.fabric.journals if scope.vpg == "erp"), 40)
    ran = run_cli("drill", "run", "erp", "weekly", "--json")
    assert ran.code == 0, ran.stderr
    shown = run_cli("drill", "show", "erp", "weekly", "--json").json
    assert len(shown["last_tests"]) == 2
    for test in shown["last_tests"]:
        ended_ = run_cli("test", "show", test, "--json").json
        assert ended_["origin"] == "drill/weekly"

    page, document, key = tmp_path / "report.html", tmp_path / "report.json", tmp_path / "key.pem"
    assert run_cli("report", "make", "--vpg", "erp", "--drill", "weekly", "--format", "html", "-o", str(page)).code == 0
    assert run_cli("test", "report", *shown["last_tests"], "--out", str(document)).code == 0
    assert stat.S_IMODE(document.stat().st_mode) == 0o600
    assert [test["id"] for test in json.loads(document.read_bytes())["report"]["tests"]]
    assert run_cli("report", "key", "--out", str(key)).code == 0
    assert run_cli("report", "make", "--out", str(tmp_path / "none")).code == 1
    for file in (page, document):
        asked = run_cli("report", "verify", str(file))
        assert (asked.code, asked.stderr) == (0, "")
        assert "the report is whole" in asked.stdout
        for given in (str(key), key.read_text()):
            # Offline: this profile does not exist, so nobody could be asked.
            done = run_cli("report", "verify", str(file), "--key", given, "--profile", "none", "--json")
            assert (done.code, done.json["enterprise"]) == (0, "acme")
        changed = tmp_path / f"changed{file.suffix}"
        changed.write_bytes(file.read_bytes().replace(b"weekly", b"daily!", 1))
        found = run_cli("report", "verify", str(changed), "--key", str(key))
        assert (found.code, found.stdout) == (1, "")
        assert "changed since it was signed" in found.stderr
    assert run_cli("drill", "remove", "erp", "weekly").stdout == "drill weekly of erp is removed\n"
    assert run_cli("drill", "show", "erp", "weekly").code == 1
