"""The command line and the client against the API over TLS, with a real manager behind it."""

from __future__ import annotations

import os
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from cli_run import run_cli
from cli_world import Provider, provider  # noqa: F401

from dr_cloud.client.client import Client
from dr_cloud.model.cloud import CheckpointFilter, TokenRequest, VpgFilter
from dr_cloud.model.errors import DrCloudError, NotFoundError, UnauthenticatedError, UnavailableError
from dr_cloud.model.principal import Role
from dr_cloud.model.task import CompletionCode
from dr_cloud.model.units import format_time

pytestmark = pytest.mark.system


def test_a_group_lives_its_life_by_command(provider: Provider) -> None:
    """R8, R18, R19: created, changed, marked, tested, failed over, rolled back, removed; each waits for its task."""
    target = "dc1=us-east:compute:gold"
    made = run_cli("vpg", "create", "life", "--source", "acme-hq", "--server", "web:sda", "--target", target, "--json")
    assert (made.code, made.stderr) == (0, "")
    assert (made.json["type"], made.json["completion"]) == ("vpg.create", "Success")
    assert run_cli("vpg", "update", "life", "--history-hours", "48", "--throttle", "20MiB").code == 0
    shown = run_cli("vpg", "show", "life", "--json").json
    assert shown["settings"]["history_hours"] == 48
    assert shown["settings"]["throttle_bytes_per_second"] == 20 << 20
    assert shown["settings"]["servers"] == [{"name": "web", "disks": ["sda"], "boot_order": 0}]
    assert run_cli("vpg", "add-server", "life", "db").code == 0
    assert run_cli("vpg", "status", "life").stdout == "Protecting\n"
    assert run_cli("vpg", "state", "life", "--json").json == {"state": 0}
    assert run_cli("vpg", "pause", "life", "--reason", "nightly").code == 0
    assert run_cli("vpg", "show", "life", "--json").json["paused"] == "nightly"
    assert run_cli("vpg", "resume", "life").code == 0
    assert run_cli("checkpoint", "insert", "life", "before-patch", "--json").json["tag"] == "before-patch"
    assert run_cli("vpg", "remove-server", "life", "db").code == 0
    assert run_cli("vpg", "remove", "life").stdout == "life is removed\n"
    gone = run_cli("vpg", "show", "life", "--json")
    assert (gone.code, gone.stdout) == (1, "")
    assert "there is no" in gone.stderr


def test_recovery_tests_by_command(provider: Provider) -> None:
    """R14: several times at once, each stopped alone with its verdict; a failover and its rollback."""
    journal = run_cli("checkpoint", "list", "erp", "--testable", "--json").json
    times = sorted(format_time(checkpoint["time_ns"]) for checkpoint in journal[2:5])
    started = run_cli("test", "start", "erp", *(word for text in times for word in ("--at", text)), "--json")
    assert started.code == 0, started.stderr
    tests = started.json
    assert sorted(format_time(test["at_ns"]) for test in tests) == times
    assert all(test["uris"]["sda"] for test in tests)
    stopped = run_cli("test", "stop", tests[0]["id"], "--verdict", "pass", "--note", "fsck", "--json").json
    assert (stopped["status"], stopped["verdict"], stopped["verdict_note"]) == ("stopped", "pass", "fsck")
    assert run_cli("test", "show", tests[1]["id"], "--json").json["status"] == "running"
    table = run_cli("test", "list", "erp").stdout
    assert times[0].removesuffix("Z") in table
    for test in run_cli("test", "list", "erp", "--json").json:
        if test["status"] == "running":
            assert run_cli("test", "stop", test["id"]).code == 0
    assert run_cli("test", "discard-old", "erp", "--count", "2", "--json").json == {"discarded": 2}
    failed_over = run_cli("failover", "start", "erp", "--at", times[0], "--json")
    assert failed_over.code == 0, failed_over.stderr
    assert [test["kind"] for test in failed_over.json] == ["failover"]
    assert run_cli("vpg", "status", "erp").stdout == "Failover\n"
    assert run_cli("failover", "rollback", "erp").code == 0
    assert run_cli("vpg", "status", "erp").stdout == "Protecting\n"


READS = [
    "enterprise list",
    "enterprise show",
    "site list",
    "site show acme-hq",
    "host list acme-hq",
    "host list acme-hq --vdsa installed",
    "host servers acme-hq",
    "host report acme-hq db",
    "datacenter list",
    "datacenter show us-east",
    "vpg list",
    "vpg list --status Protecting --begins e",
    "vpg show erp",
    "vpg status erp",
    "vpg state erp",
    "vpg reverse-settings erp",
    "vpg active-task erp",
    "vpg active-task erp --site acme-hq",
    "checkpoint list erp",
    "checkpoint writes erp",
    "test list",
    "task list",
    "token list",
    "alert list --cleared",
    "audit list",
    "health show",
    "health follow --after 0 --count 3",
]


@pytest.mark.parametrize("words", READS)
def test_what_is_read_is_a_table_for_people_and_one_document_for_programs(provider: Provider, words: str) -> None:
    document = run_cli(*words.split(), "--profile", "acme", "--json")
    assert (document.code, document.stderr) == (0, "")
    assert document.stdout.endswith("\n")
    document.json  # noqa: B018  # it is one, and nothing else
    table = run_cli(*words.split(), "--profile", "acme")
    assert (table.code, table.stderr) == (0, "")
    assert table.stdout.strip()


def test_a_site_and_a_host_by_command(provider: Provider, tmp_path: Path) -> None:
    """R16, R17: information, VDSA port, pairing; a VDSA is undeployed and deployed."""
    site = run_cli(
        "site", "update", "acme-hq", "--vdsa-port", "4006", "--throttle-at", "08:00-18:00=5MiB", "--json"
    ).json
    assert site["vdsa_port"] == 4006
    assert site["throttle"]["windows"][0]["bytes_per_second"] == 5 << 20
    paired = run_cli("site", "pair", "acme-hq", "--out", str(tmp_path / "pairing"), "--json")
    assert paired.code == 0, paired.stderr
    secret = (tmp_path / "pairing").read_text().strip()
    assert secret.startswith("drp1.")
    assert secret not in paired.stdout
    assert stat.S_IMODE((tmp_path / "pairing").stat().st_mode) == 0o600
    again = run_cli("site", "pair", "acme-hq", "--out", str(tmp_path / "pairing"))
    assert (again.code, again.stderr.startswith("dr-cloud: ")) == (1, True)
    centers = ("--data-center", "--profile", "provider-admin")
    undeployed = run_cli("host", "undeploy", "us-east", "h3", "--no-wait", "--json", *centers).json
    assert (undeployed["type"], undeployed["completion"]) == ("vdsa.undeploy", "NotAvailable")
    assert run_cli("host", "deploy", "us-east", "h2", *centers).stdout == "h2 has a VDSA\n"


def test_logs_by_command(provider: Provider, tmp_path: Path) -> None:
    """R20: one archive."""
    out = tmp_path / "logs.tar.gz"
    done = run_cli("logs", "collect", "--site", "acme-hq", "--core", "--out", str(out), "--json")
    assert done.code == 0, done.stderr
    assert out.read_bytes() == b"logs of acme/acme-hq"
    assert done.json["size_bytes"] == out.stat().st_size
    assert run_cli("logs", "fetch", done.json["task"], "--out", str(tmp_path / "again")).code == 0


def test_an_enterprise_and_tokens_by_command(provider: Provider, tmp_path: Path) -> None:
    """R11: registered from its file, with a token of its own that sees nothing else; removed."""
    as_admin = ("--profile", "provider-admin")
    file = tmp_path / "coral.yaml"
    file.write_text("name: coral\njurisdiction: APAC\nsites:\n  - {name: coral-hq, jurisdiction: APAC}\n")
    assert run_cli("enterprise", "register", str(file), *as_admin).code == 0
    assert run_cli("enterprise", "update", "coral", "--title", "Coral Ltd.", *as_admin).code == 0
    secret_file = tmp_path / "coral.token"
    words = ["token", "create", "boss", "--role", "enterprise-admin", "--enterprise", "coral", *as_admin]
    made = run_cli(*words, "--out", str(secret_file), "--json")
    assert made.code == 0, made.stderr
    assert secret_file.read_text().strip() not in made.stdout
    with provider.client(secret_file.read_text().strip()) as client:
        assert [enterprise.name for enterprise in client.enterprises()] == ["coral"]
        assert list(client.vpgs()) == []
        assert run_cli("token", "revoke", made.json["id"], *as_admin).code == 0
        with pytest.raises(UnauthenticatedError):
            client.enterprise()
    assert run_cli("enterprise", "remove", "coral", *as_admin).code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("vpg remove erp --profile auditor", 3, "does not allow"),
        ("enterprise remove acme --profile acme", 3, "Ask provider-admin"),
        ("vpg show nothing", 1, "there is no"),
        ("vpg show", 2, "Missing argument"),
        ("vpg fly", 2, "No such command"),
        ("vpg create x --server db --target nonsense", 2, "NAME=SITE:HOST:DATASTORE"),
        ("vpg create x --server db", 1, "source_site"),
        ("checkpoint list erp --since yesterday", 1, "Write RFC 3339 with a zone"),
        ("test start erp --at 1999-01-01T00:00:00Z", 1, "ended Failed"),
        ("checkpoint insert erp tag --wait 0.1", 1, "has not arrived"),
        ("health follow --json", 2, "say --count"),
        ("task show ../../etc", 1, "there is nothing at this path"),
    ],
)
def test_what_is_wrong_is_told_on_stderr_with_its_exit_code(
    provider: Provider, words: str, code: int, message: str
) -> None:
    """R21: 1 it failed, 2 wrong usage, 3 not allowed; standard output stays empty."""
    done = run_cli(*words.split(), *([] if "--profile" in words else ["--profile", "acme"]))
    assert (done.code, done.stdout) == (code, ""), done
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_the_program_itself(provider: Provider) -> None:
    """The installed command, in a process of its own, by its environment."""
    program = Path(sys.executable).parent / "dr-cloud"
    environment = {**os.environ, "DR_CLOUD_PROFILE": "auditor"}
    done = subprocess.run([program, "vpg", "pause", "erp"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("dr-cloud: the role auditor does not allow vpg.pause. Ask ")


def test_only_the_providers_own_ca_is_trusted(provider: Provider) -> None:
    with pytest.raises(DrCloudError, match="is not trusted"), Client(provider.url, provider.api.token_a) as client:
        client.enterprise()


def test_tls_is_1_3_alone(provider: Provider) -> None:
    """R11: traffic is encrypted, and not by anything old."""
    old = ssl.create_default_context(cadata=provider.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError):
        httpx.get(provider.url + "/v1/openapi.json", verify=old)


def test_the_client_says_what_the_provider_said(provider: Provider) -> None:
    with provider.client(provider.api.token_a) as client:
        with pytest.raises(NotFoundError) as error:
            client.vpg("../vpgs")
        assert error.value.remedy
        assert [vpg.name for vpg in client.vpgs(VpgFilter(name_begins="er"))] == ["erp"]
        task = client.wait(client.force_sync("hr"))
        assert task.completion in (CompletionCode.SUCCESS, CompletionCode.FAILED)


def test_a_lost_answer_is_asked_for_again_and_the_work_done_once(provider: Provider) -> None:
    """R21: the provider is gone for a moment, with the answer under way; the same key brings the same answer."""
    calls = []

    class Cutting(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            response = super().handle_request(request)
            response.read()
            calls.append(request.headers.get("Idempotency-Key"))
            if len(calls) == 1:
                raise httpx.ReadError("cut")
            return response

    with provider.client(provider.api.token_a) as client:
        context = ssl.create_default_context(cadata=provider.ca)
        client._session._http._transport = Cutting(verify=context)
        made = client.create_token(TokenRequest(name="once-only", role=Role.AUDITOR, enterprise="acme"))
        names = [token.name for token in client.tokens()]
    assert calls[0] == calls[1] is not None
    assert names.count("once-only") == 1
    assert made.token.name == "once-only"


def test_a_list_goes_on_over_its_pages(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """R21: each page is what follows the one before, still narrowed as the list was asked for."""
    with provider.client(provider.api.token_a) as client:
        whole = [checkpoint.number for checkpoint in client.checkpoints("erp")]
        since_ns = sorted(checkpoint.time_ns for checkpoint in client.checkpoints("erp"))[2]
        monkeypatch.setattr("dr_cloud.client.calls._PAGE", 3)
        assert [checkpoint.number for checkpoint in client.checkpoints("erp")] == whole
        narrowed = CheckpointFilter(since_ns=since_ns)
        assert [checkpoint.number for checkpoint in client.checkpoints("erp", None, narrowed)] == whole[:-2]
        assert len(whole) > 7


def test_events_come_and_go_on_after_a_cut(provider: Provider) -> None:
    """R21: a stream of what changes, of one's own enterprise alone; nothing is missed by coming back."""
    with provider.client(provider.api.token_a) as client:
        before = provider.api.cloud.newest_event(provider.api.principal_a)
        client.pause("crm", "watched")
        client.resume("crm")
        stream = client.events(after=before)
        first = next(stream)
        stream.close()
        rest = client.events(after=first.number)
        second = next(rest)
        assert first.number < second.number
        assert {first.enterprise, second.enterprise} == {"acme"}
        rest.close()


def test_the_stream_is_kept_alive_and_ends_with_its_token(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """R11: a token that is revoked hears nothing more."""
    monkeypatch.setattr("dr_cloud.api.watch.TOKEN_CHECK_SECONDS", 1.0)
    monkeypatch.setattr("dr_cloud.api.watch.KEEP_ALIVE_SECONDS", 0.1)
    cloud = provider.api.cloud
    admin = cloud.authenticate(provider.api.tokens["provider-admin"])
    made = cloud.create_token(admin, TokenRequest(name="short", role=Role.AUDITOR, enterprise="acme"))
    context = ssl.create_default_context(cadata=provider.ca)
    headers = {"Authorization": f"Bearer {made.secret}"}
    with httpx.stream("GET", provider.url + "/v1/events", headers=headers, verify=context, timeout=10) as response:
        lines = response.iter_lines()
        assert response.headers["content-type"].startswith("text/event-stream")
        while not next(lines).startswith(": ping"):
            pass
        cloud.revoke_token(admin, made.token.id)
        began = time.monotonic()
        for _ in lines:
            assert time.monotonic() - began < 8
    assert time.monotonic() - began < 8


def test_a_provider_that_stops_is_told(provider: Provider) -> None:
    dead = Client("https://127.0.0.1:9", provider.api.token_a, ca_pem=provider.ca)
    with dead, pytest.raises(UnavailableError, match="does not answer"):
        dead.enterprise()
