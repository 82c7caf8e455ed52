"""A provider behind its REST API, with two enterprises that both have everything an operation can aim at.

All that belongs to `brit` carries the marker, so that a trace of it in an answer to `acme` can be found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from cloud_world import World
from fastapi import FastAPI
from fastapi.testclient import TestClient
from quiet_fabric import GIB

from dr_cloud.api.app import make_app
from dr_cloud.manager.cloud import SYSTEM, Cloud
from dr_cloud.model.cloud import CheckpointOrder, LogRequest, SiteUpdate, TokenRequest
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import PairingToken
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.recovery import DrillSettings, TestsRequest
from dr_cloud.seal.identity import new_key_and_csr

MARKER = "zeta"
Names = dict[str, str]

OPEN = {"pair", "report_key"}
"""Needs no token."""
VPG_BODY = {
    "name": "{fresh}",
    "source_site": "{site}",
    "servers": [{"name": "{server}"}],
    "targets": [{"name": "dr", "site": "{target_site}", "host": "{target_host}", "datastore": "{datastore}"}],
}
BODIES: dict[str, dict[str, Any]] = {
    "register_enterprise": {
        "name": "{enterprise}",
        "jurisdiction": "UK",
        "sites": [{"name": "{site}", "jurisdiction": "UK"}],
    },
    "update_enterprise": {"title": "x"},
    "create_token": {"name": "x", "role": "auditor", "enterprise": "{enterprise}"},
    "update_site": {"location": "x"},
    "deploy_vdsa": {"datastore": "{datastore}"},
    "deploy_center_vdsa": {},
    "create_vpg": VPG_BODY,
    "update_vpg": {**VPG_BODY, "name": "{vpg}"},
    "add_server": {"name": "{server}"},
    "pause": {"reason": "x"},
    "insert_checkpoint": {"tag": "x"},
    "failover": {"target": "{target}"},
    "start_tests": {"target": "{target}", "times_ns": [1]},
    "find_clean": {"target": "{target}", "since_ns": 1, "until_ns": 2, "probes": [{"kind": "entropy"}]},
    "stop_test": {"verdict": "pass"},
    "put_drill": {"name": "fresh", "schedule": "0 3 * * 1", "target": "{target}", "probes": [{"kind": "entropy"}]},
    "collect_logs": {"site": "{site}"},
    "apply_policies": {},
    "what_if": {},
}
"""By operation, a body that names all that it can name."""
PROVIDERS = {"target_host": "compute", "datastore": "gold", "data_center": "us-east", "fresh": "fresh"}
"""Names that are nobody's alone."""
QUERIES = {
    "discard_tests": "?count=1",
    "tests_report": "?task=nothing",
    "wait_task": "?timeout_seconds=0",
    "wait_checkpoint": "?timeout_seconds=0",
}


def filled(template: Any, names: Names) -> Any:
    """Return a body with its places filled."""
    text = json.dumps(template)
    for kind, name in names.items():
        text = text.replace(f"{{{kind}}}", name)
    return json.loads(text)


@cache
def operations() -> dict[str, tuple[str, str, bool]]:
    """Return by name (method, path, whether it takes a body) of every operation in the OpenAPI document."""
    document = make_app(Cloud.__new__(Cloud)).openapi()
    return {
        operation["operationId"]: (method.upper(), path, "requestBody" in operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


class TwoEnterprises(World):
    """Its second enterprise has other servers, on a host of another name."""

    def report(
        self, enterprise: str, servers: Mapping[str, Mapping[str, int]] | None = None, *, host: str = "", **more: Any
    ) -> None:
        if enterprise == "brit":
            servers, host = servers or {f"{MARKER}-sql": {f"{MARKER}-disk": GIB}}, host or f"{MARKER}-host"
        super().report(enterprise, servers, host=host or "h1", **more)


class ApiWorld:
    """What tests of the API hold in their hands."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._stack = stack
        self.world = TwoEnterprises(folder)
        stack.callback(self.world.close)
        self.world.populate()
        self.cloud = self.world.cloud
        self.app = make_app(self.cloud)
        self.cloud.update_site(SYSTEM, "brit", "brit-hq", SiteUpdate(contact=f"{MARKER} contact"))
        self.tokens = {role.value: self.token(role, None) for role in (Role.PROVIDER_ADMIN, Role.PROVIDER_OPERATOR)}
        for role in (Role.ENTERPRISE_ADMIN, Role.ENTERPRISE_OPERATOR, Role.AUDITOR):
            self.tokens[role.value] = self.token(role, "acme")
        self.token_a, self.token_b = self.tokens["enterprise-admin"], self.token(Role.ENTERPRISE_ADMIN, "brit")
        self.principal_a = self.cloud.authenticate(self.token_a)
        self.by_role = {role: self.client(token) for role, token in self.tokens.items()}
        self.a, self.b, self.anyone = self.by_role["enterprise-admin"], self.client(self.token_b), self.client("")
        self.names_a = self._furnish("acme", ("erp", "crm", "hr"), "db", "h1", self.principal_a)
        principal_b = self.cloud.authenticate(self.token_b)
        self.names_b = self._furnish(
            "brit", (f"{MARKER}-erp", f"{MARKER}-crm"), f"{MARKER}-sql", f"{MARKER}-host", principal_b
        )
        self.names_missing = {kind: f"missing-{kind}".replace("_", "-") for kind in self.names_b}
        pairing = PairingToken.decode(self.cloud.create_pairing(SYSTEM, "brit", "brit-hq").token)
        self.pairing = pairing
        self.pair_body = {"secret": "not-the-secret-of-anything", "csr": new_key_and_csr()[1]}

    def _furnish(self, enterprise: str, vpgs: tuple[str, ...], server: str, host: str, who: Principal) -> Names:
        """Give an enterprise all that an operation can aim at; return the names."""
        mark = MARKER if enterprise == "brit" else "plain"
        target = f"{mark}-dc"
        for name in vpgs:
            changes = {
                "description": f"{mark} description",
                "servers": [{"name": "web" if name == "hr" else server}],
                "targets": [{"name": target, "site": "us-east", "host": "compute", "datastore": "gold"}],
            }
            self.world.protect(who, name, enterprise, **changes)
        checkpoints = self.world.journal(Scope(enterprise, vpgs[0], target))
        started = self.cloud.start_tests(
            who, enterprise, vpgs[0], TestsRequest(times_ns=[checkpoints[3].time_ns], note=f"{mark} note")
        )
        self.world.done(started, enterprise)
        probes = [ProbeSpec(kind="entropy")]
        drill = DrillSettings(name=f"{mark}-drill", schedule="0 3 * * 1", note=f"{mark} drill", probes=probes)
        self.cloud.put_drill(who, enterprise, vpgs[0], drill)
        inserted = self.cloud.insert_checkpoint(who, enterprise, vpgs[0], CheckpointOrder(tag=f"{mark}-tag"))
        logs = self.world.done(
            self.cloud.collect_logs(who, enterprise, LogRequest(site=f"{enterprise}-hq")), enterprise
        )
        token = self.cloud.create_token(
            who, TokenRequest(name=f"{mark} token", role=Role.AUDITOR, enterprise=enterprise)
        )
        return {
            "enterprise": enterprise,
            "site": f"{enterprise}-hq",
            "host": host,
            "server": server,
            "vpg": vpgs[0],
            "target": target,
            "test": self.cloud.tests(who, enterprise).items[0].id,
            "probe": f"{mark}-probe",
            "file": "console",
            "task": logs.id,
            "drill": drill.name,
            "id": inserted.id,
            "token": token.token.id,
            "target_site": f"{enterprise}-hq" if enterprise == "brit" else "us-east",
        } | ({} if enterprise == "brit" else PROVIDERS)

    def token(self, role: Role, enterprise: str | None) -> str:
        """Return a new token's secret."""
        request = TokenRequest(name=f"{role.value} of {enterprise}", role=role, enterprise=enterprise)
        return self.cloud.create_token(SYSTEM, request).secret

    def spare_token(self) -> str:
        """Return the id of a token of `acme` that nobody needs."""
        request = TokenRequest(name="spare", role=Role.AUDITOR, enterprise="acme")
        return self.cloud.create_token(SYSTEM, request).token.id

    def client(self, token: str, app: FastAPI | None = None) -> TestClient:
        """Return a client with this token; the empty string: with none."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = TestClient(app or self.app, "https://api", raise_server_exceptions=False, headers=headers)
        return self._stack.enter_context(client)


@contextmanager
def api_world(folder: Path) -> Iterator[ApiWorld]:
    """Make such a world, and end it."""
    with ExitStack() as stack:
        yield ApiWorld(folder, stack)
