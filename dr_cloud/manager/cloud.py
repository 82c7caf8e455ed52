"""The manager's operations. (Signatures first: each body follows in a module of its own noun.)

Every method takes the caller first. A tenant's own enterprise is named in full; another's is "not found". Long work
returns a `Task`. Errors: `NotFoundError`, `ForbiddenError`, `ConflictError`, `InvalidError`, `UnauthenticatedError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

from dr_cloud.model import cloud as c
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import PairAnswer, PairRequest
from dr_cloud.model.principal import Principal
from dr_cloud.model.provider import EnterpriseConfig
from dr_cloud.model.replication import SiteOrders, SiteReport
from dr_cloud.model.task import Task, TaskStatus
from dr_cloud.model.vpg import ProtectedServer, VpgSettings, VpgState, VpgStatus

M = TypeVar("M", bound=BaseModel)
P = c.PageRequest()


class Cloud:
    """All of it."""

    # Idempotency: `once` runs `call` at most once per (who, key); the answer is stored in call's own transaction.
    # The same key with another digest, or one still under way, is a ConflictError. Secrets of an answer are blank then.
    def once(self, who: Principal, key: str, digest: str, kind: type[M], call: Callable[[], M]) -> M:
        raise NotImplementedError

    # enterprises, tokens, pairing
    def register_enterprise(self, who: Principal, config: EnterpriseConfig) -> c.Enterprise:
        raise NotImplementedError

    def enterprises(self, who: Principal, page: c.PageRequest = P) -> c.Page[c.Enterprise]:
        raise NotImplementedError

    def enterprise(self, who: Principal, enterprise: str) -> c.Enterprise:
        raise NotImplementedError

    def update_enterprise(self, who: Principal, enterprise: str, update: c.EnterpriseUpdate) -> c.Enterprise:
        raise NotImplementedError

    def remove_enterprise(self, who: Principal, enterprise: str) -> None:
        raise NotImplementedError

    def create_token(self, who: Principal, request: c.TokenRequest) -> c.NewToken:
        raise NotImplementedError

    def tokens(self, who: Principal, enterprise: str | None, page: c.PageRequest = P) -> c.Page[c.Token]:
        raise NotImplementedError

    def revoke_token(self, who: Principal, token: str) -> c.Token:
        raise NotImplementedError

    def authenticate(self, secret: str) -> Principal:
        raise NotImplementedError

    def create_pairing(self, who: Principal, enterprise: str, site: str, lifetime_seconds: int = 3600) -> c.NewPairing:
        raise NotImplementedError

    def pair(self, request: PairRequest) -> PairAnswer:
        raise NotImplementedError

    def unpair(self, who: Principal, enterprise: str, site: str) -> c.Site:
        raise NotImplementedError

    # sites, data centers, hosts
    def sites(self, who: Principal, enterprise: str, page: c.PageRequest = P) -> c.Page[c.Site]:
        raise NotImplementedError

    def site(self, who: Principal, enterprise: str, site: str) -> c.Site:
        raise NotImplementedError

    def update_site(self, who: Principal, enterprise: str, site: str, update: c.SiteUpdate) -> c.Site:
        raise NotImplementedError

    def data_centers(self, who: Principal, page: c.PageRequest = P) -> c.Page[c.DataCenter]:
        raise NotImplementedError

    def data_center(self, who: Principal, name: str) -> c.DataCenter:
        raise NotImplementedError

    def center_hosts(self, who: Principal, data_center: str, vdsa: c.VdsaState | None = None) -> list[c.Host]:
        raise NotImplementedError

    def deploy_center_vdsa(self, who: Principal, data_center: str, host: str, deployment: c.VdsaDeployment) -> Task:
        raise NotImplementedError

    def undeploy_center_vdsa(self, who: Principal, data_center: str, host: str) -> Task:
        raise NotImplementedError

    def hosts(
        self, who: Principal, enterprise: str, site: str, vdsa: c.VdsaState | None = None, page: c.PageRequest = P
    ) -> c.Page[c.Host]:
        raise NotImplementedError

    def deploy_vdsa(self, who: Principal, enterprise: str, site: str, host: str, deployment: c.VdsaDeployment) -> Task:
        raise NotImplementedError

    def undeploy_vdsa(self, who: Principal, enterprise: str, site: str, host: str) -> Task:
        raise NotImplementedError

    def servers(self, who: Principal, enterprise: str, site: str, page: c.PageRequest = P) -> c.Page[c.Server]:
        raise NotImplementedError

    def server_report(self, who: Principal, enterprise: str, site: str, server: str) -> c.ServerReport:
        raise NotImplementedError

    # VPGs
    def create_vpg(self, who: Principal, enterprise: str, settings: VpgSettings) -> Task:
        raise NotImplementedError

    def update_vpg(self, who: Principal, enterprise: str, vpg: str, settings: VpgSettings, force: bool = False) -> Task:
        raise NotImplementedError

    def remove_vpg(self, who: Principal, enterprise: str, vpg: str, force: bool = False) -> Task:
        raise NotImplementedError

    def add_server(self, who: Principal, enterprise: str, vpg: str, server: ProtectedServer) -> Task:
        raise NotImplementedError

    def remove_server(self, who: Principal, enterprise: str, vpg: str, server: str) -> Task:
        raise NotImplementedError

    def vpgs(
        self, who: Principal, enterprise: str | None, page: c.PageRequest = P, which: c.VpgFilter = c.VpgFilter()
    ) -> c.Page[c.Vpg]:
        raise NotImplementedError

    def vpg(self, who: Principal, enterprise: str, vpg: str) -> c.Vpg:
        raise NotImplementedError

    def vpg_status(self, who: Principal, enterprise: str, vpg: str) -> VpgStatus:
        raise NotImplementedError

    def vpg_state(self, who: Principal, enterprise: str, vpg: str) -> VpgState:
        raise NotImplementedError

    def reverse_settings(self, who: Principal, enterprise: str, vpg: str, target: str | None = None) -> VpgSettings:
        raise NotImplementedError

    def pause(self, who: Principal, enterprise: str, vpg: str, reason: str = "") -> c.Vpg:
        raise NotImplementedError

    def resume(self, who: Principal, enterprise: str, vpg: str) -> c.Vpg:
        raise NotImplementedError

    def force_sync(self, who: Principal, enterprise: str, vpg: str, target: str | None = None) -> Task:
        raise NotImplementedError

    # checkpoints
    def checkpoints(
        self,
        who: Principal,
        enterprise: str,
        vpg: str,
        target: str | None = None,
        which: c.CheckpointFilter = c.CheckpointFilter(),
        page: c.PageRequest = P,
    ) -> c.Page[c.CheckpointView]:
        raise NotImplementedError

    def insert_checkpoint(
        self, who: Principal, enterprise: str, vpg: str, order: c.CheckpointOrder
    ) -> c.InsertedCheckpoint:
        raise NotImplementedError

    def inserted_checkpoint(self, who: Principal, enterprise: str, vpg: str, id: str) -> c.InsertedCheckpoint:
        raise NotImplementedError

    # Returns as it stands when all have arrived or the time is over: look at `complete`.
    def wait_checkpoint(
        self,
        who: Principal,
        enterprise: str,
        vpg: str,
        id: str,
        timeout_seconds: float = 60.0,
        poll_seconds: float = 0.5,
    ) -> c.InsertedCheckpoint:
        raise NotImplementedError

    # recovery
    def failover(self, who: Principal, enterprise: str, vpg: str, request: c.FailoverRequest) -> Task:
        raise NotImplementedError

    def rollback_failover(self, who: Principal, enterprise: str, vpg: str) -> Task:
        raise NotImplementedError

    def start_tests(self, who: Principal, enterprise: str, vpg: str, request: c.TestsRequest) -> Task:
        raise NotImplementedError

    def tests(
        self, who: Principal, enterprise: str, vpg: str | None = None, page: c.PageRequest = P
    ) -> c.Page[c.RecoveryTest]:
        raise NotImplementedError

    def test(self, who: Principal, enterprise: str, test: str) -> c.RecoveryTest:
        raise NotImplementedError

    def stop_test(self, who: Principal, enterprise: str, test: str, how: c.StopTest) -> Task:
        raise NotImplementedError

    def discard_tests(self, who: Principal, enterprise: str, vpg: str, count: int) -> int:
        raise NotImplementedError

    # tasks; `enterprise` None: the provider's own and all that the caller sees
    def tasks(
        self,
        who: Principal,
        enterprise: str | None,
        page: c.PageRequest = P,
        vpg: str | None = None,
        status: TaskStatus | None = None,
    ) -> c.Page[Task]:
        raise NotImplementedError

    def task(self, who: Principal, task: str) -> Task:
        raise NotImplementedError

    # Returns as it stands when it has ended or the time is over.
    def wait_task(self, who: Principal, task: str, timeout_seconds: float = 60.0, poll_seconds: float = 0.5) -> Task:
        raise NotImplementedError

    def abort_task(self, who: Principal, task: str) -> Task:
        raise NotImplementedError

    def active_task(self, who: Principal, enterprise: str, vpg: str) -> Task | None:
        raise NotImplementedError

    def active_task_at_site(self, who: Principal, enterprise: str, vpg: str, site: str) -> Task | None:
        raise NotImplementedError

    # logs, health, audit, events
    # The task's result: {"archive": id, "bytes": n, "name": "….tar.gz"}.
    def collect_logs(self, who: Principal, enterprise: str | None, request: c.LogRequest) -> Task:
        raise NotImplementedError

    def log_archive(self, who: Principal, task: str) -> bytes:
        raise NotImplementedError

    def health(self, who: Principal, enterprise: str | None = None) -> c.Health:
        raise NotImplementedError

    def alerts(
        self, who: Principal, enterprise: str | None = None, page: c.PageRequest = P, cleared: bool = False
    ) -> c.Page[c.Alert]:
        raise NotImplementedError

    def audit(self, who: Principal, enterprise: str | None = None, page: c.PageRequest = P) -> c.Page[c.AuditEntry]:
        raise NotImplementedError

    # Ascending, at most `limit`; only what the caller may see. `after` 0: from the oldest kept.
    def events(self, who: Principal, after: int, limit: int = 100) -> list[c.Event]:
        raise NotImplementedError

    def newest_event(self, who: Principal) -> int:
        raise NotImplementedError

    # from the fabric (no principal: the connector has proven who speaks)
    def certificate_ok(self, serial: str) -> bool:
        raise NotImplementedError

    def site_connected(self, enterprise: str, site: str, serial: str) -> SiteOrders:
        raise NotImplementedError

    def site_lost(self, enterprise: str, site: str) -> None:
        raise NotImplementedError

    def site_report(self, enterprise: str, site: str, report: SiteReport) -> None:
        raise NotImplementedError

    def host_report(self, data_center: str, host: str, report: SiteReport) -> None:
        raise NotImplementedError

    def orders_for(self, enterprise: str, site: str) -> SiteOrders:
        raise NotImplementedError

    # One per (data center, host), over all enterprises: scopes say whose. With `enterprise`: only that one's.
    def host_orders(self, data_center: str, host: str, enterprise: str | None = None) -> SiteOrders:
        raise NotImplementedError

    def route(self, scope: Scope) -> c.Route:
        raise NotImplementedError

    def renew(self, enterprise: str, site: str, serial: str, csr: str) -> c.Renewal:
        raise NotImplementedError
