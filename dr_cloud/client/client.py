"""The client: one method for each operation of the API, with the manager's names and records.

Everything named lies under an enterprise; a client has one in mind (`enterprise`), so that most calls need not say it.
`-` is the token's own; provider people's clients name one, or `-` for all where a list is asked for. Lists are
iterators that fetch page after page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final

from dr_cloud.client.calls import M, dump, path_of
from dr_cloud.client.drills import DrillCalls
from dr_cloud.client.events import EventSource
from dr_cloud.model import cloud as c
from dr_cloud.model import decision as d
from dr_cloud.model import recovery as r
from dr_cloud.model import watch as w
from dr_cloud.model.errors import LimitError
from dr_cloud.model.journal import Write
from dr_cloud.model.pairing import PairAnswer, PairRequest
from dr_cloud.model.provider import EnterpriseConfig
from dr_cloud.model.rights import RightsState, WhatIf
from dr_cloud.model.task import CompletionCode, Task, TaskStatus
from dr_cloud.model.vpg import ProtectedServer, VpgSettings, VpgState, VpgStatus

_WAIT_SECONDS: Final = 20.0
"""How long one request for a wait may take; longer waits ask again."""


class Client(DrillCalls):
    """A caller of one provider's API. Not for several threads at once."""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    # What follows is short because each operation is one line: method, path, record.

    @property
    def _narrow(self) -> dict[str, str | None]:
        return {"enterprise": None if self.enterprise_name == "-" else self.enterprise_name}

    # enterprises, tokens, pairing

    def enterprises(self) -> Iterator[c.Enterprise]:
        """List enterprises."""
        return self._pages(c.Enterprise, path_of("enterprises"))

    def register_enterprise(self, config: EnterpriseConfig) -> c.Enterprise:
        """Register an enterprise."""
        return self._send(c.Enterprise, "POST", path_of("enterprises"), config)

    def enterprise(self, name: str = "") -> c.Enterprise:
        """Show an enterprise; the client's own if it is not named."""
        return self._get(c.Enterprise, path_of("enterprises", name) if name else self._own())

    def update_enterprise(self, update: c.EnterpriseUpdate) -> c.Enterprise:
        """Change what is told of the enterprise."""
        return self._send(c.Enterprise, "PATCH", self._own(), update)

    def remove_enterprise(self, name: str) -> None:
        """Remove an enterprise that has no VPGs."""
        self._session.call("DELETE", path_of("enterprises", name))

    def tokens(self) -> Iterator[c.Token]:
        """List tokens."""
        return self._pages(c.Token, path_of("tokens"), self._narrow)

    def create_token(self, request: c.TokenRequest) -> c.NewToken:
        """Make a token."""
        return self._send(c.NewToken, "POST", path_of("tokens"), request)

    def revoke_token(self, token: str) -> c.Token:
        """Revoke a token."""
        return self._send(c.Token, "DELETE", path_of("tokens", token))

    def create_pairing(self, site: str, lifetime_seconds: int = 3600) -> c.NewPairing:
        """Make a one-time pairing token for a site."""
        parameters = {"lifetime_seconds": lifetime_seconds}
        return self._send(c.NewPairing, "POST", self._own("sites", site, "pairing"), None, parameters)

    def unpair(self, site: str) -> c.Site:
        """Unpair a site."""
        return self._send(c.Site, "DELETE", self._own("sites", site, "pairing"))

    def pair(self, request: PairRequest) -> PairAnswer:
        """Exchange a pairing secret for a certificate; the client needs no token for it."""
        return self._send(PairAnswer, "POST", path_of("pair"), request)

    # sites, data centers, hosts

    def sites(self) -> Iterator[c.Site]:
        """List the enterprise's sites."""
        return self._pages(c.Site, self._own("sites"))

    def site(self, site: str) -> c.Site:
        """Show a site."""
        return self._get(c.Site, self._own("sites", site))

    def update_site(self, site: str, update: c.SiteUpdate) -> c.Site:
        """Change a site."""
        return self._send(c.Site, "PATCH", self._own("sites", site), update)

    def hosts(self, site: str, vdsa: c.VdsaState | None = None) -> Iterator[c.Host]:
        """List a site's hosts, all or by the state of their VDSA."""
        return self._pages(c.Host, self._own("sites", site, "hosts"), {"vdsa": vdsa})

    def deploy_vdsa(self, site: str, host: str, deployment: c.VdsaDeployment) -> Task:
        """Deploy a VDSA."""
        return self._send(Task, "POST", self._own("sites", site, "hosts", host, "vdsa"), deployment)

    def undeploy_vdsa(self, site: str, host: str) -> Task:
        """Undeploy a VDSA."""
        return self._send(Task, "DELETE", self._own("sites", site, "hosts", host, "vdsa"))

    def servers(self, site: str) -> Iterator[c.Server]:
        """List the virtual servers of a site."""
        return self._pages(c.Server, self._own("sites", site, "servers"))

    def server_report(self, site: str, server: str) -> c.ServerReport:
        """Show what is known of a virtual server."""
        return self._get(c.ServerReport, self._own("sites", site, "servers", server, "report"))

    def data_centers(self) -> Iterator[c.DataCenter]:
        """List data centers."""
        return self._pages(c.DataCenter, path_of("data-centers"))

    def data_center(self, name: str) -> c.DataCenter:
        """Show a data center."""
        return self._get(c.DataCenter, path_of("data-centers", name))

    def center_hosts(self, data_center: str, vdsa: c.VdsaState | None = None) -> list[c.Host]:
        """List a data center's hosts."""
        answer = self._session.call("GET", path_of("data-centers", data_center, "hosts"), parameters={"vdsa": vdsa})
        return [c.Host.model_validate(item) for item in answer.json()]

    def deploy_center_vdsa(self, data_center: str, host: str, deployment: c.VdsaDeployment) -> Task:
        """Deploy a VDSA on a data center's host."""
        return self._send(Task, "POST", path_of("data-centers", data_center, "hosts", host, "vdsa"), deployment)

    def undeploy_center_vdsa(self, data_center: str, host: str) -> Task:
        """Undeploy the VDSA of a data center's host."""
        return self._send(Task, "DELETE", path_of("data-centers", data_center, "hosts", host, "vdsa"))

    # protection groups

    def vpgs(self, which: c.VpgFilter = c.VpgFilter()) -> Iterator[c.Vpg]:
        """List protection groups."""
        return self._pages(c.Vpg, self._own("vpgs"), dump(which))

    def create_vpg(self, settings: VpgSettings) -> Task:
        """Create a protection group."""
        return self._send(Task, "POST", self._own("vpgs"), settings)

    def vpg(self, vpg: str) -> c.Vpg:
        """Show a protection group."""
        return self._get(c.Vpg, self._own("vpgs", vpg))

    def update_vpg(self, vpg: str, settings: VpgSettings, force: bool = False) -> Task:
        """Change a protection group's settings."""
        return self._send(Task, "PUT", self._own("vpgs", vpg), settings, {"force": force})

    def remove_vpg(self, vpg: str, force: bool = False) -> Task:
        """Remove a protection group."""
        return self._send(Task, "DELETE", self._own("vpgs", vpg), None, {"force": force})

    def add_server(self, vpg: str, server: ProtectedServer) -> Task:
        """Add a virtual server to a protection group."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "servers"), server)

    def remove_server(self, vpg: str, server: str) -> Task:
        """Take a virtual server out of a protection group."""
        return self._send(Task, "DELETE", self._own("vpgs", vpg, "servers", server))

    def vpg_status(self, vpg: str) -> VpgStatus:
        """Tell a protection group's status."""
        return VpgStatus(self._session.call("GET", self._own("vpgs", vpg, "status")).json()["status"])

    def vpg_state(self, vpg: str) -> VpgState:
        """Tell a protection group's state."""
        return VpgState(self._session.call("GET", self._own("vpgs", vpg, "state")).json()["state"])

    def reverse_settings(self, vpg: str, target: str | None = None) -> VpgSettings:
        """Tell the settings that reverse replication would begin with."""
        return self._get(VpgSettings, self._own("vpgs", vpg, "reverse-settings"), {"target": target})

    def pause(self, vpg: str, reason: str = "") -> c.Vpg:
        """Pause replication."""
        return self._send(c.Vpg, "POST", self._own("vpgs", vpg, "pause"), {"reason": reason})

    def resume(self, vpg: str) -> c.Vpg:
        """Let replication go on."""
        return self._send(c.Vpg, "POST", self._own("vpgs", vpg, "resume"))

    def force_sync(self, vpg: str, target: str | None = None) -> Task:
        """Compare all disks with the target and send what differs."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "force-sync"), None, {"target": target})

    def active_task(self, vpg: str) -> Task | None:
        """Tell the task that is at work on a protection group."""
        found = self._session.call("GET", self._own("vpgs", vpg, "active-task")).json()["task"]
        return None if found is None else Task.model_validate(found)

    def active_task_at_site(self, vpg: str, site: str) -> Task | None:
        """Tell the task that is at work on a protection group at one site."""
        found = self._session.call("GET", self._own("sites", site, "vpgs", vpg, "active-task")).json()["task"]
        return None if found is None else Task.model_validate(found)

    # checkpoints

    def checkpoints(
        self, vpg: str, target: str | None = None, which: c.CheckpointFilter = c.CheckpointFilter()
    ) -> Iterator[c.CheckpointView]:
        """List a protection group's checkpoints."""
        parameters = dump(which) | {"target": target}
        return self._pages(c.CheckpointView, self._own("vpgs", vpg, "checkpoints"), parameters)

    def writes(
        self, vpg: str, target: str | None = None, since_ns: int | None = None, until_ns: int | None = None
    ) -> Iterator[Write]:
        """List when was written, as the journal at a target tells it, oldest first."""
        parameters = {"target": target, "since_ns": since_ns, "until_ns": until_ns}
        return self._pages(Write, self._own("vpgs", vpg, "writes"), parameters)

    def insert_checkpoint(self, vpg: str, order: c.CheckpointOrder) -> c.InsertedCheckpoint:
        """Ask for a tagged checkpoint; returns at once."""
        return self._send(c.InsertedCheckpoint, "POST", self._own("vpgs", vpg, "checkpoints"), order)

    def inserted_checkpoint(self, vpg: str, id: str) -> c.InsertedCheckpoint:
        """Tell whether a checkpoint by hand has arrived."""
        return self._get(c.InsertedCheckpoint, self._own("vpgs", vpg, "inserted-checkpoints", id))

    def wait_checkpoint(
        self, vpg: str, id: str, timeout_seconds: float = 60.0, poll_seconds: float = 0.5
    ) -> c.InsertedCheckpoint:
        """Wait until a checkpoint by hand has arrived, or the time is over: look at `complete`."""
        path = self._own("vpgs", vpg, "inserted-checkpoints", id, "wait")
        return self._wait(c.InsertedCheckpoint, path, lambda seen: seen.complete, timeout_seconds, poll_seconds)

    # recovery

    def failover(self, vpg: str, request: r.FailoverRequest) -> Task:
        """Fail over."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "failover"), request)

    def commit_failover(self, vpg: str) -> Task:
        """Have the recovered servers stay."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "failover", "commit"))

    def release_failover(self, vpg: str) -> Task:
        """End the servers of a committed failover, with their disks."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "failover", "release"))

    def rollback_failover(self, vpg: str) -> Task:
        """Roll a failover back."""
        return self._send(Task, "DELETE", self._own("vpgs", vpg, "failover"))

    def start_tests(self, vpg: str, request: r.TestsRequest) -> Task:
        """Start recovery tests, one at each of the times."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "tests"), request)

    def find_clean(self, vpg: str, request: r.CleanRequest) -> Task:
        """Search the last clean time; the task's result is a `CleanPoint`, as it grows."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "find-clean"), request)

    def tests(self, vpg: str | None = None) -> Iterator[r.RecoveryTest]:
        """List recovery tests."""
        return self._pages(r.RecoveryTest, self._own("tests"), {"vpg": vpg})

    def test(self, test: str) -> r.RecoveryTest:
        """Show one recovery test."""
        return self._get(r.RecoveryTest, self._own("tests", test))

    def stop_test(self, test: str, how: r.StopTest) -> Task:
        """Stop one test."""
        return self._send(Task, "POST", self._own("tests", test, "stop"), how)

    def test_credential(self, test: str) -> r.TestCredential:
        """Get what a client needs to attach the disks of a remote test."""
        return self._get(r.TestCredential, self._own("tests", test, "credential"))

    def test_artefact(self, test: str, path: str) -> bytes:
        """Download a file that a probe of a test left, `<probe>/<file>`."""
        probe, _, file = path.partition("/")
        place = self._own("tests", test, "artefacts", probe, file)
        return self._session.call("GET", place, timeout_seconds=300.0).content

    def discard_tests(self, vpg: str, count: int) -> int:
        """Forget the oldest tests that have ended; returns how many."""
        answer = self._session.call("DELETE", self._own("vpgs", vpg, "tests"), parameters={"count": count})
        return int(answer.json()["discarded"])

    # tasks, logs

    def tasks(self, vpg: str | None = None, status: TaskStatus | None = None) -> Iterator[Task]:
        """List tasks."""
        return self._pages(Task, path_of("tasks"), self._narrow | {"vpg": vpg, "status": status})

    def task(self, task: str) -> Task:
        """Show a task."""
        return self._get(Task, path_of("tasks", task))

    def wait_task(
        self,
        task: str,
        timeout_seconds: float = 60.0,
        poll_seconds: float = 0.5,
        on_progress: Callable[[Task], None] = lambda seen: None,
    ) -> Task:
        """Wait until a task has ended, or the time is over: look at `completion`."""

        def ended(seen: Task) -> bool:
            on_progress(seen)
            return seen.completion is not CompletionCode.NOT_AVAILABLE

        return self._wait(Task, path_of("tasks", task, "wait"), ended, timeout_seconds, poll_seconds)

    def wait(self, task: Task, timeout_seconds: float = 600.0) -> Task:
        """Wait for what an operation returned. Raises `LimitError` if it has not ended in time."""
        seen = self.wait_task(task.id, timeout_seconds)
        if seen.completion is CompletionCode.NOT_AVAILABLE:
            raise LimitError(f"task {task.id} ({task.type}) has not ended", "Wait again, or abort it.")
        return seen

    def abort_task(self, task: str) -> Task:
        """Abort a task."""
        return self._send(Task, "POST", path_of("tasks", task, "abort"))

    def collect_logs(self, request: c.LogRequest) -> Task:
        """Collect logs into an archive."""
        return self._send(Task, "POST", self._own("logs"), request)

    def log_archive(self, task: str) -> bytes:
        """Download the archive of a collection that is done."""
        return self._session.call("GET", path_of("tasks", task, "archive"), timeout_seconds=300.0).content

    # rights

    def rights_state(self) -> RightsState:
        """Tell how the rights manager stands."""
        return self._get(RightsState, path_of("rights"))

    def rights_matrix(self) -> list[d.EnterpriseRights]:
        """Tell which enterprise's data may come to which data center."""
        answer = self._session.call("GET", path_of("rights", "matrix"))
        return [d.EnterpriseRights.model_validate(item) for item in answer.json()]

    def explain(self, enterprise: str = "") -> d.EnterpriseRights:
        """Tell where an enterprise's data may come to; the client's own if it is not named."""
        path = path_of("enterprises", enterprise, "rights") if enterprise else self._own("rights")
        return self._get(d.EnterpriseRights, path)

    def policies(self) -> Iterator[d.PolicyRevision]:
        """List the policies that were put in force, newest first."""
        return self._pages(d.PolicyRevision, path_of("rights", "policies"))

    def apply_policies(self, change: d.PolicyChange) -> d.PolicyRevision:
        """Put other policies in force."""
        return self._send(d.PolicyRevision, "POST", path_of("rights", "policies"), change)

    def what_if(self, change: d.PolicyChange) -> list[WhatIf]:
        """Tell what a change of policies would stop or free."""
        answer = self._session.call("POST", path_of("rights", "what-if"), body=dump(change), timeout_seconds=300.0)
        return [WhatIf.model_validate(item) for item in answer.json()]

    def rights_bundle(self) -> tuple[str, bytes]:
        """Download (revision, the newest signed bundle)."""
        answer = self._session.call("GET", path_of("rights", "bundle"))
        return answer.headers["etag"].strip('"'), answer.content

    def decisions(self) -> Iterator[d.Decision]:
        """List the record of decisions, oldest first: the enterprise's, or the provider's own."""
        return self._pages(d.Decision, self._own("decisions"))

    def verify_decisions(self) -> d.DecisionCheck:
        """Tell whether that record is whole."""
        path = self._own("decisions", "verify")
        return d.DecisionCheck.model_validate_json(self._session.call("GET", path, timeout_seconds=300.0).content)

    # health

    def health(self) -> w.Health:
        """Tell how everything stands."""
        return self._get(w.Health, path_of("health"), self._narrow)

    def alerts(self, cleared: bool = False) -> Iterator[w.Alert]:
        """List alerts."""
        return self._pages(w.Alert, path_of("alerts"), self._narrow | {"cleared": cleared})

    def audit(self) -> Iterator[w.AuditEntry]:
        """List what was changed, or tried to be."""
        return self._pages(w.AuditEntry, path_of("audit"), self._narrow)

    def events(self, after: int | None = None) -> Iterator[w.Event]:
        """Follow what changes, for ever, from now or from after an event's number; comes back after a cut by itself."""
        return EventSource(self._session, after).events()

    def _wait(
        self, kind: type[M], path: str, ended: Callable[[M], bool], timeout_seconds: float, poll_seconds: float
    ) -> M:
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            parameters = {"timeout_seconds": min(left, _WAIT_SECONDS), "poll_seconds": poll_seconds}
            seen = self._get(kind, path, parameters)
            if ended(seen) or time.monotonic() >= deadline:
                return seen
