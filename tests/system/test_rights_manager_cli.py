"""R13, R21: `dr-cloud rights`, against the API over TLS with a real manager and rights manager behind it."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog
from api_world import ApiWorld
from cli_run import run_cli
from cloud_world import LAW, OPEN_LAW, write_policies

from dr_cloud.actors.https import ApiServer
from dr_cloud.manager import tables
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.decision import Decision, PolicyChange
from dr_cloud.rights.bundle import open_bundle
from dr_cloud.seal.authority import Authority

pytestmark = pytest.mark.system
ADMIN = ("--profile", "provider-admin")


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiWorld]:
    folder = tmp_path_factory.mktemp("provider")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        stack.callback(structlog.reset_defaults)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        made = ApiWorld(folder / "state", stack)
        (folder / "tls").mkdir()
        credentials = Authority.open(folder / "tls", "provider").service_credentials("api", ["127.0.0.1"])
        server = ApiServer(made.app, "127.0.0.1", 0, credentials)
        stack.callback(server.close)
        (folder / "ca.pem").write_text(credentials.ca)
        for name, token in (("acme", made.token_a), ("provider-admin", made.tokens["provider-admin"])):
            (folder / f"{name}.token").write_text(token)
            where = ("--url", f"https://127.0.0.1:{server.port}", "--ca", str(folder / "ca.pem"))
            assert run_cli("profile", "add", name, *where, "--token-file", str(folder / f"{name}.token")).code == 0
        yield made


@pytest.fixture
def law(tmp_path: Path, provider: ApiWorld) -> Iterator[Path]:
    """A regulation in a file, under which no border is open. What is in force afterwards is as it was."""
    path = tmp_path / "regulation.yaml"
    path.write_text(LAW.model_dump_json(by_alias=True))
    yield path
    provider.cloud.apply_policies(SYSTEM, PolicyChange(regulation=OPEN_LAW))


def test_a_denied_command_says_why_where_and_exits_3(provider: ApiWorld, law: Path) -> None:
    """R13.1: exit code 3, the reasons and the data centers that would be open, and nothing on standard output."""
    assert run_cli("rights", "apply", "--data", str(law), *ADMIN).code == 0
    options = ("--source", "acme-hq", "--server", "web:sda", "--target", "dr=uk-south:h1:ds-1")
    for more in ((), ("--json",)):
        done = run_cli("vpg", "create", "denied", *options, *more)
        assert (done.code, done.stdout) == (3, "")
        assert done.stderr == (
            "dr-cloud: policy denies it: uk-south lies in UK: nothing opens USA to UK. Open to acme: us-east.\n"
        )


def test_matrix_and_explain(provider: ApiWorld, law: Path) -> None:
    """R13.1: enterprise by data center; which are open to one, and why each other is not."""
    assert run_cli("rights", "apply", "--data", str(law), *ADMIN).code == 0
    shown = run_cli("rights", "matrix", *ADMIN)
    rows = [line.split() for line in shown.stdout.splitlines() if line.strip()]
    assert rows[0] == ["enterprise", "jurisdiction", "uk-south", "us-east"]
    assert ["acme", "USA", "no", "yes"] in rows
    assert ["brit", "USA", "no", "yes"] in rows
    assert [row["enterprise"] for row in run_cli("rights", "matrix", "--json", *ADMIN).json] == ["acme", "brit"]
    assert [row["enterprise"] for row in run_cli("rights", "matrix", "--json").json] == ["acme"]
    told = run_cli("rights", "explain")
    assert "closed" in told.stdout
    assert "uk-south lies in UK: nothing opens USA to UK" in told.stdout
    places = {
        p["data_center"]: p["open"] for p in run_cli("rights", "explain", "brit", "--json", *ADMIN).json["data_centers"]
    }
    assert places == {"us-east": True, "uk-south": False}
    assert run_cli("rights", "explain", "brit").code == 1
    assert run_cli("datacenter", "show", "uk-south", "--json").json["denied"]


def test_what_if_then_apply(provider: ApiWorld, law: Path, tmp_path: Path) -> None:
    """R13: what a change would stop is listed before; a folder of policies, a file of data, or both."""
    lost = tmp_path / "lost.yaml"
    lost.write_text("jurisdictions: {UK: {}}")
    found = run_cli("rights", "what-if", "--data", str(lost), "--json", *ADMIN).json
    assert {(one["enterprise"], one["kind"]) for one in found} >= {("acme", "vpg"), ("acme", "test"), ("brit", "vpg")}
    table = run_cli("rights", "what-if", "--data", str(lost), *ADMIN).stdout
    assert "stopped" in table
    folder = write_policies(tmp_path / "policies", OPEN_LAW)
    assert run_cli("rights", "what-if", "--policies", str(folder), "--json", *ADMIN).json == []
    (folder / "rights.rego").write_text("package dr_cloud.rights\n\nimport rego.v1\n\ndefault decision := {}\n")
    assert run_cli("rights", "what-if", "--policies", str(folder), *ADMIN).code == 1
    before = run_cli("rights", "policies", "--json", *ADMIN).json
    made = run_cli(
        "rights",
        "apply",
        "--policies",
        str(write_policies(tmp_path / "new", OPEN_LAW)),
        "--data",
        str(law),
        "--json",
        *ADMIN,
    )
    assert made.json["number"] == before[0]["number"] + 1
    assert made.json["sources"]["regulation"]["mechanisms"] == []
    assert run_cli("rights", "show", "--json").json["revision"] == made.json["revision"]
    for wrong in (("apply",), ("what-if",)):
        assert "Give --policies DIR, --data FILE, or both" in run_cli("rights", *wrong, *ADMIN).stderr
    for mine in (("apply", "--data", str(law)), ("what-if", "--data", str(law)), ("policies",)):
        assert run_cli("rights", *mine).code == 3
    missing = run_cli("rights", "apply", "--data", str(tmp_path / "none.yaml"), *ADMIN)
    assert "none.yaml cannot be read" in missing.stderr


def test_the_record_is_exported_and_verified(provider: ApiWorld, tmp_path: Path) -> None:
    """R13: export as JSON lines, which prove themselves; a change is found, with exit code 1."""
    out = tmp_path / "record.jsonl"
    made = run_cli("rights", "audit", "export", "-o", str(out), "--json")
    assert made.code == 0, made.stderr
    decisions = [Decision.model_validate(json.loads(line)) for line in out.read_text().splitlines()]
    assert len(decisions) == made.json["decisions"] > 5
    assert all(decision.digest() == decision.hash for decision in decisions)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run_cli("rights", "audit", "export", "-o", str(out)).code == 1
    listed = run_cli("rights", "decisions", "--json").json
    assert [Decision.model_validate(item) for item in listed] == decisions
    good = run_cli("rights", "audit", "verify")
    assert good.code == 0
    assert decisions[-1].hash in good.stdout
    assert run_cli("rights", "audit", "verify", "--json", *ADMIN).json["enterprise"] == ""
    with provider.cloud._database.write(EVERYONE) as session:
        row = session.get_one(tables.Decision, ("acme", 3))
        row.allow = not row.allow
    bad = run_cli("rights", "audit", "verify", "--json")
    assert (bad.code, bad.stdout) == (1, "")
    assert "the record is not whole: decision 3 was changed" in bad.stderr
    with provider.cloud._database.write(EVERYONE) as session:
        row = session.get_one(tables.Decision, ("acme", 3))
        row.allow = not row.allow


def test_the_bundle_is_fetched(provider: ApiWorld, tmp_path: Path) -> None:
    """R13: as it is signed."""
    out = tmp_path / "bundle.tar.gz"
    made = run_cli("rights", "bundle", "-o", str(out), "--json", *ADMIN)
    assert open_bundle(out.read_bytes(), provider.world.rights.public_key).revision == made.json["revision"]


def test_a_token_says_where_its_bearer_sits(provider: ApiWorld) -> None:
    """R13.3."""
    auditor = ("--role", "auditor", "--enterprise", "acme", "--json")
    assert run_cli("token", "create", "far", "--place", "APAC", *auditor).json["token"]["place"] == "APAC"
    assert run_cli("token", "create", "near", *auditor).json["token"]["place"] == "USA"
    assert run_cli("token", "create", "x", "--place", "nowhere at all", *auditor).code == 1
