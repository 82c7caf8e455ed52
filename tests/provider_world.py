"""A whole cloud as real processes: `provider up`, `site up`, taps; and guests whose every write is known.

Each server has one disk, `root`. Its VPG carries its name and is replicated to one data center.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from e2e_world import MIB, Guest, Processes, make_disk, read_disk, wait_until

from dr_cloud.actors.settings import load_provider
from dr_cloud.actors.up import RunningProvider
from dr_cloud.client.client import Client
from dr_cloud.model.cloud import TokenRequest
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.principal import Role
from dr_cloud.model.recovery import StopTest, TestsRequest
from dr_cloud.model.task import CompletionCode, Task
from dr_cloud.model.vpg import VpgSettings
from dr_cloud.rights.regulation import POLICIES, REGULATION

DISK_BYTES = 4 * MIB
CHECKPOINT_SECONDS = 0.5
PROVIDER: dict[str, Any] = {
    "name": "provider",
    "state": "p",
    "api": "127.0.0.1:0",
    "link_ports": [0, 0],
    "idle_stacks": 0,
    "tenants": "tenants",
    "operators": "USA",
    "rights": {"policies": "policies"},
    "data_centers": [
        {
            "name": "us-east",
            "jurisdiction": "USA",
            "datastores": [{"name": "ds-1", "store": "file://us-east/ds-1"}],
            "hosts": [{"name": "h1", "datastores": ["ds-1"]}],
        },
        {
            "name": "uk-south",
            "jurisdiction": "UK",
            "datastores": [{"name": "ds-1", "store": "file://uk-south/ds-1"}],
            "hosts": [{"name": "h1", "datastores": ["ds-1"]}],
        },
    ],
}
TENANTS = {"acme": ("USA", "chicago"), "brit": ("UK", "leeds")}
"""The jurisdiction and the one site of each. All have one owner, which opens nothing."""
TRADE = [
    {
        "kind": "adequacy",
        "from": one,
        "to": other,
        "reference": f"the decision on {one} and {other}",
        "valid_from": "2020-01-01T00:00:00Z",
        "valid_until": "2100-01-01T00:00:00Z",
    }
    for one, other in (("USA", "UK"), ("UK", "USA"))
]
"""With these mechanisms the two jurisdictions are open to one another."""


class Server:
    """A protected server: its disk, its guest, and where it belongs."""

    def __init__(self, folder: Path, enterprise: str, name: str, site: str, vdsa: Path, seed: int) -> None:
        self.enterprise = enterprise
        self.name = name
        self.site = site
        self.vdsa = vdsa
        self.path = folder / f"{enterprise}-{name}.img"
        base = make_disk(self.path, DISK_BYTES, [(0, MIB)], seed)
        self.socket = folder / f"{enterprise}-{name}.nbd"
        self.guest = Guest({"root": f"nbd+unix:///root?socket={self.socket}"}, {"root": base}, seed)
        self.guest.pause_seconds = 0.005


def write_policies(folder: Path, mechanisms: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the product's policies, with these mechanisms."""
    shutil.copytree(POLICIES, folder, dirs_exist_ok=True)
    regulation = yaml.safe_load((folder / REGULATION).read_text())
    (folder / REGULATION).write_text(yaml.safe_dump({**regulation, "mechanisms": [dict(one) for one in mechanisms]}))


def settings_of(
    server: Server, site: str, host: str = "h1", datastore: str = "ds-1", *more: str, name: str = ""
) -> VpgSettings:
    """Return the settings of a server's VPG: its target `east` is where it is told, others are called as their site."""
    targets = [{"name": "east", "site": site, "host": host, "datastore": datastore}]
    targets += [{"name": center, "site": center, "host": "h1", "datastore": "ds-1"} for center in more]
    return VpgSettings.model_validate(
        {
            "name": name or server.name,
            "source_site": server.site,
            "servers": [{"name": server.name}],
            "targets": targets,
            "checkpoint_seconds": CHECKPOINT_SECONDS,
        }
    )


class CloudWorld(Processes):
    """See the module's docstring. `folder` has a short path: sockets lie in it."""

    def __init__(
        self,
        folder: Path,
        mechanisms: Sequence[Mapping[str, Any]] = (),
        tenants: Mapping[str, tuple[str, str]] = TENANTS,
        **config: Any,
    ) -> None:
        super().__init__(folder, {"RAY_USAGE_STATS_ENABLED": "0"})
        self.tenants = tenants
        self.config = PROVIDER | config
        self.servers: list[Server] = []
        self.clients: dict[str, Client] = {}
        self.line = ""
        (folder / "tenants").mkdir()
        for name, (jurisdiction, site) in tenants.items():
            tenant = {
                "name": name,
                "owner": "holding",
                "jurisdiction": jurisdiction,
                "sites": [{"name": site, "jurisdiction": jurisdiction}],
            }
            (folder / "tenants" / f"{name}.yaml").write_text(yaml.safe_dump(tenant))
        write_policies(folder / "policies", mechanisms)
        (folder / "provider.yaml").write_text(yaml.safe_dump(self.config))

    # The provider.

    def start_provider(self, process_group: int | None = None) -> None:
        """As a process of its own, with a Ray of its own."""
        config = str(self.folder / "provider.yaml")
        self.start("provider", "dr_cloud.cli.main", "provider", "up", "-c", config, process_group=process_group)
        self.line = self.wait_ready("provider")

    def start_provider_here(self) -> RunningProvider:
        """On the Ray of this process; the caller closes it."""
        provider = RunningProvider(load_provider(self.folder / "provider.yaml"))
        self.line = provider.line
        return provider

    @property
    def api(self) -> str:
        found = re.search(r"https://\S+", self.line)
        assert found is not None, self.line
        return found[0]

    def client(self, enterprise: str) -> Client:
        """The administrator of an enterprise, who sits in its jurisdiction; "-" is the provider's own."""
        if enterprise not in self.clients:
            ca = (self.folder / "p" / "ca" / "ca-cert.pem").read_text()
            if enterprise == "-":
                token = (self.folder / "p" / "admin-token").read_text().strip()
            else:
                request = TokenRequest(name=f"admin of {enterprise}", role=Role.ENTERPRISE_ADMIN, enterprise=enterprise)
                token = self.client("-").create_token(request).secret
            self.clients[enterprise] = Client(self.api, token, ca_pem=ca, enterprise=enterprise)
        return self.clients[enterprise]

    def done(self, enterprise: str, task: Task, seconds: float = 90) -> Task:
        ended = self.client(enterprise).wait(task, seconds)
        assert ended.completion is CompletionCode.SUCCESS, f"{ended}\n{self.said()}"
        return ended

    def actors(self, kind: str) -> list[int]:
        """Return the processes of actors of one class: Ray names its processes so."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "cmdline").read_bytes().startswith(f"ray::{kind}".encode()) and self._mine(folder.name):
                    found.append(int(folder.name))
        return found

    def _mine(self, pid: str) -> bool:
        while pid not in ("0", "1"):
            if int(pid) == self.running["provider"].pid:
                return True
            pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        return False

    def kill_actors(self, kind: str) -> None:
        """Kill -9 every actor of one class."""
        found = self.actors(kind)
        assert found, kind
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    # Sites.

    def start_site(self, enterprise: str, again: bool = False) -> None:
        site = self.tenants[enterprise][1]
        path = self.folder / f"{site}.yaml"
        if not again:
            settings: dict[str, Any] = {
                "state": f"s-{site}",
                "token": self.client(enterprise).create_pairing(site).token,
                "hosts": [{"name": "esx1", "listen": f"unix:{site}.vdsa"}],
                "datastores": [{"name": "local", "store": f"file://{site}-store"}],
            }
            path.write_text(yaml.safe_dump(settings))
        self.start(site, "dr_cloud.cli.site_up", "-c", str(path))
        self.wait_ready(site)

    def add_server(self, enterprise: str, name: str, copies: int = 1) -> Server:
        """A server at the enterprise's site; returns when the manager knows it."""
        site = self.tenants[enterprise][1]
        vdsa = self.folder / f"{site}.vdsa"
        server = self._add(Server(self.folder, enterprise, name, site, vdsa, len(self.servers)), copies)
        client = self.client(enterprise)
        wait_until(lambda: name in [one.name for one in client.servers(site)], 30)
        return server

    def add_cloud_server(self, enterprise: str, name: str, data_center: str) -> Server:
        """A server in a data center: its tap looks for the VDSA of its host."""
        vdsa = self.folder / "p" / "run" / "taps" / data_center / "h1" / f"{enterprise}.sock"
        return self._add(Server(self.folder, enterprise, name, data_center, vdsa, len(self.servers)))

    def _add(self, server: Server, copies: int = 1) -> Server:
        self.servers.append(server)
        self.start_tap(server, copies)
        return server

    def start_tap(self, server: Server, copies: int = 1) -> None:
        name = f"tap-{server.enterprise}-{server.name}"
        server.socket.unlink(missing_ok=True)
        self.start(
            name, "dr_cloud.cli.tap", "--server", server.name, "--disk", f"root={server.path}",
            "--socket", str(server.socket), "--vdsa", str(server.vdsa), "--state", f"{self.folder}/{name}.state",
            "--copies", str(copies),
        )  # fmt: skip
        self.wait_ready(name)

    def protect(self, server: Server, site: str, host: str = "h1", datastore: str = "ds-1", *more: str) -> None:
        """Replicate it to a site; to each of `more` data centers as well."""
        client = self.client(server.enterprise)
        self.done(server.enterprise, client.create_vpg(settings_of(server, site, host, datastore, *more)))

    # What came of it.

    def newest_ns(self, server: Server) -> int:
        with contextlib.suppress(DrCloudError):
            found = [c for c in self.client(server.enterprise).checkpoints(server.name, target="east") if c.testable]
            return max((checkpoint.time_ns for checkpoint in found), default=0)
        return 0

    def wait_newest(self, server: Server, after_ns: int | None = None, seconds: float = 90) -> int:
        """Wait for a checkpoint that is later than `after_ns` (now); return its time."""
        after_ns = time.time_ns() if after_ns is None else after_ns
        try:
            wait_until(lambda: self.newest_ns(server) > after_ns, seconds)
        except AssertionError:
            raise AssertionError(f"no checkpoint of {server.name} within {seconds} s\n{self.said()}") from None
        return self.newest_ns(server)

    def images(self, server: Server, times_ns: Sequence[int]) -> Mapping[int, bytes]:
        """Recovery tests at these times, all at once: what their disks hold."""
        client = self.client(server.enterprise)
        task = self.done(
            server.enterprise, client.start_tests(server.name, TestsRequest(target="east", times_ns=sorted(times_ns)))
        )
        found = {}
        tests = [test for test in client.tests(server.name) if test.task == task.id]
        for test in tests:
            assert test.status == "running", test
            assert test.at_ns is not None
            (uris,) = test.uris.values()
            found[test.at_ns] = read_disk(uris[0])
        for test in tests:
            self.done(server.enterprise, client.stop_test(test.id, StopTest(verdict="pass")))
        return found

    def check(self, server: Server, times: int = 3) -> None:
        """Stop the guest: nothing failed; the newest image is the disk, and others are what was written by then."""
        guest = server.guest
        guest.stop()
        assert guest.failures == []
        newest_ns = self.wait_newest(server)
        wanted = [newest_ns, *guest.random_times(times)]
        images = self.images(server, wanted)
        assert images[newest_ns] == server.path.read_bytes()
        for at_ns, image in images.items():
            guest.check({"root": image}, at_ns)

    def said(self) -> str:
        """The end of everything that was logged."""
        logs = [self.folder / f"{name}.log" for name in self.running]
        logs += sorted((self.folder / "p" / "logs").glob("*/log.jsonl"))
        return "\n".join(f"--- {path}\n{path.read_text()[-2500:]}" for path in logs if path.exists())

    def close(self) -> None:
        for server in self.servers:
            server.guest.may_break = True
            server.guest.stop()
        for client in self.clients.values():
            client.close()
        if "provider" in self.running:
            self.running["provider"].terminate()
            with contextlib.suppress(Exception):
                self.running["provider"].wait(60)
        self.end()
        if sys.exc_info()[0] is not None:
            print(self.said())
