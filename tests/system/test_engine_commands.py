"""Recovery tests by command, over the API: probes, regular times, credentials and what probes leave."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cli_run import run_cli
from cli_world import Provider, provider  # noqa: F401
from quiet_fabric import probed

from dr_cloud.model.ids import Scope
from dr_cloud.model.units import SECOND_NS, format_time

pytestmark = pytest.mark.system
SCOPE = Scope("acme", "crm", "plain-dc")


@pytest.fixture
def newest_ns(provider: Provider) -> int:
    """The newest time of a journal of 20 seconds."""
    provider.api.world.fabric.answers.clear()
    return provider.api.world.journal(SCOPE, 20)[-1].time_ns


def test_tests_with_probes_end_with_their_verdicts(provider: Provider, newest_ns: int) -> None:
    """R14.7: every time is told as it ends; the exit code says whether all have passed."""
    fabric = provider.api.world.fabric
    since_ns = newest_ns - 4 * SECOND_NS
    fabric.answers[newest_ns] = [probed("fsck", "the file system is damaged", output="line 1\nline 2")]
    between = ("--every", "2s", "--from", format_time(since_ns), "--to", format_time(newest_ns))
    done = run_cli("test", "start", "crm", *between, "--probe", "fsck:disk=sd*", "--ttl", "2h", "--note", "weekly")
    assert done.code == 1, done.stderr
    for second in (0, 2):
        assert f"{format_time(since_ns + second * SECOND_NS)} pass" in done.stdout
    assert f"{format_time(newest_ns)} fail: fsck: the file system is damaged" in done.stdout
    clean = run_cli("test", "start", "crm", "--at", format_time(since_ns), "--probe", "fsck", "--json")
    assert (clean.code, [test["verdict"] for test in clean.json]) == (0, ["pass"])
    assert clean.json[0]["expires_ns"] - clean.json[0]["started_ns"] == 86400 * SECOND_NS
    listed = run_cli("test", "list", "crm", "--json").json
    dirty = next(test for test in listed if test["verdict"] == "fail")
    assert dirty["expires_ns"] - dirty["started_ns"] == 7200 * SECOND_NS
    shown = run_cli("test", "show", dirty["id"]).stdout
    assert "fsck printed:\nline 1\nline 2" in shown
    assert "the file system is damaged" in shown
    assert run_cli("test", "show", dirty["id"], "--json").json["results"][0]["reason"] == "the file system is damaged"
    assert run_cli("test", "discard-old", "crm", "--count", "9", "--json").json == {"discarded": 4}


def test_a_file_of_probes(provider: Provider, newest_ns: int, tmp_path: Path) -> None:
    path = tmp_path / "probes.yaml"
    path.write_text("- fsck\n- kind: entropy\n  name: random\n")
    done = run_cli(
        "test", "start", "crm", "--at", format_time(newest_ns), "--probes-file", str(path), "--keep", "--json"
    )
    assert done.code == 0, done.stderr
    (test,) = done.json
    assert ([spec["name"] for spec in test["probes"]], test["status"]) == (["fsck", "random"], "running")
    stopped = run_cli("test", "stop", test["id"], "--json").json
    assert (stopped["verdict"], stopped["status"]) == ("pass", "stopped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no time is given"),
        (["--every", "10m"], "belong together"),
        (["--every", "1s", "--from", "2026-01-01T00:00:00Z", "--to", "2026-01-02T00:00:00Z"], "more than 256 times"),
        (["--every", "1h", "--from", "2026-01-02T00:00:00Z", "--to", "2026-01-01T00:00:00Z"], "is after"),
        (["--at", "2026-01-01T00:00:00Z", "--probe", "nothing"], "there is no probe 'nothing'"),
        (["--at", "2026-01-01T00:00:00Z", "--probe", "fsck:deep=7"], "probe 'fsck'"),
        (["--at", "2026-01-01T00:00:00Z", "--ttl", "soon"], "is not a duration"),
        (["--at", "2026-01-01T00:00:00Z", "--ttl", "1s"], "lifetime_seconds"),
    ],
)
def test_what_cannot_be_is_told_before_anything_begins(
    provider: Provider,
    options: list[str],
    message: str,
) -> None:
    done = run_cli("test", "start", "crm", *options)
    assert (done.code, done.stdout) == (1, "")
    assert message in done.stderr
    assert [test for test in run_cli("test", "list", "crm", "--json").json if test["stopped_ns"] is None] == []


def test_disks_for_anyone(provider: Provider, newest_ns: int, tmp_path: Path) -> None:
    """R14.9: a remote test's credential is written for its owner alone, with the texts to attach it."""
    local, remote = (
        run_cli("test", "start", "crm", "--at", format_time(newest_ns), *options, "--json").json[0]
        for options in ([], ["--remote"])
    )
    folder = tmp_path / "credential"
    assert run_cli("test", "attach", local["id"], "--json").json["files"] == []
    said = run_cli("test", "attach", remote["id"], "--out", str(folder))
    assert said.code == 0, said.stderr
    assert "qemu-system-x86_64" in said.stdout
    assert f"sda-{remote['id']}" in said.stdout
    assert "the key" not in said.stdout
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(
        ("ca-cert.pem", "client-cert.pem", "client-key.pem"), 0o600
    )
    assert (folder / "client-key.pem").read_text() == "the key"
    again = run_cli("test", "attach", remote["id"], "--out", str(folder))
    assert (again.code, "Name a new folder." in again.stderr) == (1, True)
    refused = run_cli("test", "attach", remote["id"], "--out", str(tmp_path / "other"), "--profile", "auditor")
    assert (refused.code, "does not allow test.attach" in refused.stderr) == (3, True)
    for test in (local, remote):
        assert run_cli("test", "stop", test["id"]).code == 0
    gone = run_cli("test", "attach", remote["id"], "--out", str(tmp_path / "late"))
    assert (gone.code, "the test is stopped" in gone.stderr) == (1, True)
    assert not (tmp_path / "late").exists()


def test_what_probes_leave_is_fetched_and_forgotten(
    provider: Provider,
    newest_ns: int,
    tmp_path: Path,
) -> None:
    fabric = provider.api.world.fabric
    left = [{"path": "boot/screen ä.png", "size_bytes": 5, "sha256": "0" * 64}]
    fabric.answers[newest_ns] = [probed("boot", artefacts=left)]
    (test,) = run_cli(
        "test", "start", "crm", "--at", format_time(newest_ns), "--probe", "boot:match=login", "--json"
    ).json
    fabric.artefacts[test["id"], "boot/screen ä.png"] = b"image"
    out = tmp_path / "screen.png"
    fetched = run_cli("test", "artefact", test["id"], "boot/screen ä.png", "--out", str(out))
    assert (fetched.code, out.read_bytes()) == (0, b"image"), fetched.stderr
    for path in ("boot/other", "boot/..", "../boot/screen ä.png"):
        assert run_cli("test", "artefact", test["id"], path, "--out", str(tmp_path / "none")).code == 1
    assert not (tmp_path / "none").exists()
    assert fabric.asked("artefact") == [(test["id"], "boot/screen ä.png")]
    assert run_cli("test", "discard-old", "crm", "--count", "100").code == 0
    assert fabric.artefacts == {}
