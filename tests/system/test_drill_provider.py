"""A drill on a real provider: real disks, real stacks, real probes; and its report, checked offline."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import MIB, wait_until
from provider_world import CloudWorld
from report_parts import OTHER

from dr_cloud.model.errors import DamagedError
from dr_cloud.model.recovery import DrillSettings, ReportQuery
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.probes.spec import parse_spec
from dr_cloud.recovery.report import check_report

pytestmark = pytest.mark.system
LOOK = "command:sh -c 'nbdinfo --size $(env | sed -n s/^DRC_DISK_.*_URI=//p) | grep -x 4194304'"


@pytest.fixture
def world() -> Iterator[CloudWorld]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    made = CloudWorld(folder)
    try:
        made.start_provider()
        made.start_site("acme")
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_drill_of_real_disks_and_its_evidence(world: CloudWorld) -> None:
    """FIELD: scheduled drills with evidence: who, what time, which checks, how long (achieved RTO), a signed report."""
    server, client = world.add_server("acme", "web"), world.client("acme")
    world.protect(server, "us-east")
    with NbdClient.connect(f"nbd+unix:///root?socket={server.socket}") as disk:
        disk.pwrite(0, b"a" * MIB)
        disk.flush()
    wait_until(lambda: all(target.newest_ns is not None for target in client.vpg("web").targets), 90)
    probes = [parse_spec(LOOK)]
    drill = DrillSettings(name="nightly", schedule="0 3 * * *", ages_seconds=[0, 86400], probes=probes)
    assert client.put_drill("web", drill).next_ns is not None
    world.done("acme", client.run_drill("web", "nightly"))
    try:
        wait_until(lambda: client.drill("web", "nightly").last_verdict is not None, 90)
    except AssertionError:
        raise AssertionError(f"{list(client.tests('web'))}\n{world.said()}") from None
    assert client.drill("web", "nightly").last_verdict == "pass", list(client.tests("web"))
    assert client.vpg("web").last_passed_test_ns == client.drill("web", "nightly").last_ns
    key = client.report_key().public
    for form in ("json", "html"):
        data = client.tests_report(ReportQuery(vpg="web", drill="nightly"), form)  # type: ignore[arg-type]
        found = check_report(data, key)
        with pytest.raises(DamagedError, match="another key"):
            check_report(data, OTHER.public.public)
    assert {test.served for test in found.tests} == {test.asked for test in found.tests}
    assert "the journal does not hold 86400 s ago" in found.tests[0].note
    for test in found.tests:
        assert (test.verdict, test.started_as, test.data_center) == ("pass", "drill", "us-east")
        assert test.rto_us is not None
        assert test.duration_us is not None
        assert 0 < test.rto_us <= test.duration_us
        assert test.decisions
        assert [probe.verdict for probe in test.probes] == ["pass"]
        assert test.probes[0].reason == "sh ends with 0"
    made = world.folder / "p"
    assert [path.stat().st_mode & 0o777 for path in made.rglob("report-key.pem")] == [0o600]
