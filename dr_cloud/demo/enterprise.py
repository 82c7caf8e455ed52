"""An enterprise of the demonstration: its machine with a database, its site, its protection group.

What it does with the cloud it does as its own administrator, with a token of its own, through the API.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from dr_cloud.client.client import Client
from dr_cloud.demo.cloud import LocalCloud, done
from dr_cloud.demo.process import Process
from dr_cloud.demo.workload import fill
from dr_cloud.model.cloud import TokenRequest, Vpg
from dr_cloud.model.errors import DeniedError
from dr_cloud.model.principal import Role
from dr_cloud.model.provider import DataCenterConfig, EnterpriseConfig
from dr_cloud.model.vpg import ProtectedServer, TargetConfig, VpgSettings

VPG: Final = "shop"
"""Every enterprise calls its group so: names of one are nothing to another."""
SERVER: Final = "shop-db"
ABROAD: Final = "abroad"
"""What each tries to have in data centers that are closed to it."""
CHECKPOINT_SECONDS: Final = 1.0


class Denied(NamedTuple):
    """What policy has refused."""

    enterprise: str
    data_center: str
    reasons: list[str]


class Size(NamedTuple):
    """How much an enterprise does."""

    disk_bytes: int
    rows: int
    """In the database before it is protected."""
    pause_seconds: float
    """Between two commits."""
    stacks: int


class Enterprise:
    """See the module's docstring."""

    def __init__(
        self, cloud: LocalCloud, config: EnterpriseConfig, data_centers: list[DataCenterConfig], size: Size
    ) -> None:
        """Prepare.

        Args:
            cloud: Where it runs.
            config: As the provider registers it.
            data_centers: Those of its own jurisdiction: all of them are targets.
            size: How much it does.
        """
        self.config = config
        self.name = config.name
        self.data_centers = data_centers
        self.size = size
        self.folder = cloud.folder(self.name)
        self.image = self.folder / "production.img"
        self.base = self.folder / "base.img"
        """The image before the workload."""
        self._cloud = cloud
        self._client: Client | None = None
        self._starting: list[Process] = []
        self._workload: Process | None = None

    @property
    def client(self) -> Client:
        """Its administrator's."""
        assert self._client is not None, "join comes first"
        return self._client

    def prepare(self) -> None:
        """Make its disk, with a database on it."""
        with open(self.image, "wb") as image:
            image.truncate(self.size.disk_bytes)
        fill(self.image, self.size.rows)
        shutil.copyfile(self.image, self.base)

    def join(self, admin: Client) -> None:
        """Get a token of its own from the provider, and with it pair and start its site; start its server's tap."""
        request = TokenRequest(name=f"demo {self.name}", role=Role.ENTERPRISE_ADMIN, enterprise=self.name)
        self._client = self._cloud.client("-", admin.create_token(request).secret)
        pairing = self.client.create_pairing(self.site)
        self._starting = [
            self._cloud.begin_site(self.name, pairing.token),
            self._cloud.begin_tap(self.name, SERVER, self.image, copies=len(self.data_centers)),
        ]

    @property
    def site(self) -> str:
        """The name of its site."""
        return self.config.sites[0].name

    def protect(self) -> None:
        """Wait until its server is seen, and protect it: a copy in each of its data centers."""
        for process in self._starting:
            process.wait_ready()
        self._cloud.wait_until(
            lambda: SERVER in [server.name for server in self.client.servers(self.site)],
            f"{self.name} tells its server",
        )
        done(self.client, self.client.create_vpg(self._settings(VPG, self.data_centers)))

    def _settings(self, name: str, centers: Sequence[DataCenterConfig]) -> VpgSettings:
        targets = [
            TargetConfig(
                name=center.name, site=center.name, host=center.clusters[0].name, datastore=center.pools[0].name
            )
            for center in centers
        ]
        return VpgSettings(
            name=name,
            source_site=self.site,
            servers=[ProtectedServer(name=SERVER)],
            targets=targets,
            checkpoint_seconds=CHECKPOINT_SECONDS,
        )

    def try_abroad(self, closed: Sequence[DataCenterConfig]) -> list[Denied]:
        """Ask for a copy in each of these data centers; return the refusals. One that is allowed is in none of them."""
        refused = []
        for center in closed:
            settings = self._settings(ABROAD, [center])
            try:
                self.client.create_vpg(settings)
            except DeniedError as denial:
                refused.append(Denied(self.name, center.name, denial.reasons))
        return refused

    def start_workload(self, corrupt_from: float | None = None, corrupt_to: float | None = None) -> None:
        """Start its database's work; it corrupts itself between the two times (seconds from now), if given."""
        moments = [] if corrupt_from is None else ["--corrupt-from", str(corrupt_from), "--corrupt-to", str(corrupt_to)]
        self._workload = self._cloud.processes.start(
            f"workload-{self.name}", "dr_cloud.demo.workload", self._cloud.uri(self.name, SERVER), str(self.folder),
            "--pause-seconds", str(self.size.pause_seconds), *moments,
        )  # fmt: skip
        self._workload.wait_ready()

    def stop_workload(self) -> None:
        """Stop it; all that it committed is on the disk."""
        assert self._workload is not None, "start_workload comes first"
        self._workload.stop()

    def vpg(self) -> Vpg:
        """Return its protection group as the API tells it."""
        return self.client.vpg(VPG)

    def newest_ns(self) -> int:
        """Return the latest time that has an image at every target, 0 if there is none yet."""
        return min(target.newest_ns or 0 for target in self.vpg().targets)

    def kept_in(self, stores: Path) -> set[str]:
        """Return the data centers under `stores` whose object stores hold any of its journal."""
        return {path.relative_to(stores).parts[0] for path in stores.glob(f"*/*/{self.name}/**/*.jrn")}
