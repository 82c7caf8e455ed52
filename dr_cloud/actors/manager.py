"""The manager, its tasks and the REST API in one process, so that they come back together.

Start
    The database is opened, what runs is found by name (VDSAs, stacks), the rights manager is told policies and facts,
    the API is served; when there are decisions, the tenants that were given are registered and what is missing is
    started. All of it is safe to repeat.

Enterprises with a manager of their own
    In two of the architectures an `EnterpriseManager` per enterprise carries its control and is its door: one process
    with the manager's code over the same database, bound to that enterprise's tasks and sites. The API's process then
    passes calls on (`dr_cloud.actors.divided`).

Crash recovery
    Ray starts each again, with the same arguments; the API listens on the same port. Links and data paths go on
    meanwhile; sites' calls wait or are made again.

Files in the state folder
    `provider.db` (unless another database is named), `ca/`, `keyring.json`, `ports.json`, `api-port`, `admin-token`
    (mode 0600: the first administrator's, written once), `rights/` (keys, `bundle-token` with which an OPA server
    fetches its bundle), `logs/`, `run/`, `work/`, `cache/`, `stores/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import ray
import structlog

from dr_cloud.actors.cluster import START_SECONDS
from dr_cloud.actors.connector import Connector, Door
from dr_cloud.actors.divided import DividedCloud, Key, carry_out
from dr_cloud.actors.fabric import RayFabric
from dr_cloud.actors.gate import Target
from dr_cloud.actors.https import ApiServer, api_address
from dr_cloud.actors.logs import start_log
from dr_cloud.actors.rights import RightsDesk
from dr_cloud.actors.settings import ADMIN_TOKEN, MANAGER, ProviderSettings, Ready, registry_url
from dr_cloud.api.app import make_app
from dr_cloud.manager.cloud import SYSTEM, Cloud
from dr_cloud.manager.db import open_engine
from dr_cloud.model.cloud import PAGE_LIMIT_MAX, PageRequest, TokenRequest
from dr_cloud.model.errors import ConflictError, DrCloudError, ForbiddenError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Role
from dr_cloud.model.provider import EnterpriseConfig
from dr_cloud.recovery.report_key import ReportSigner
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import replace_file
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store

_ADMIN_LIFETIME_SECONDS: Final = 365 * 86400
_ENGINE_TOKEN_SECONDS: Final = 365 * 86400
_RETRY_SECONDS: Final = 1.0
_PATIENCE_SECONDS: Final = 15.0
"""A former self may hold a port for a moment."""
_RIGHTS_SECONDS: Final = 20.0
_INBOUND: Final = frozenset(
    {
        "certificate_ok",
        "host_orders",
        "host_report",
        "orders_for",
        "renew",
        "site_connected",
        "site_lost",
        "site_report",
    }
)
"""What connectors and VDSAs may ask of the manager's operations."""

_log = structlog.get_logger(__name__)


class Core:
    """A manager in this process, over the provider's database: opened in the background, and tried until it is."""

    def __init__(self, settings: ProviderSettings, owner: str, door: Any, idle_stacks: Mapping[str, int]) -> None:
        """Prepare; `start` opens it.

        Args:
            settings: The provider.
            owner: The enterprise whose manager it is; empty for the provider's.
            door: The actor class of enterprises' doors.
            idle_stacks: How many stack actors to keep at hand, by data center.
        """
        self._settings = settings
        self._owner = owner
        self._open = threading.Event()
        self.problem: Exception | None = None
        self.authority = Authority.open(settings.config.state / "ca", settings.config.name)
        self.rights = RightsDesk(settings.placement, settings.config.rights.engine)
        self.fabric = RayFabric(settings, door, lambda: self.cloud, idle_stacks, self.rights, owner)
        self._cloud: Cloud | None = None
        self._begun = False

    @property
    def cloud(self) -> Cloud:
        """The manager. Raises `UnavailableError` before it is open."""
        if self._cloud is None:
            raise UnavailableError(f"the manager is not open yet: {self.problem or 'it starts'}", "Try again.")
        return self._cloud

    def open(self, api_url: str) -> Cloud:
        """Open it, once. Raises `DrCloudError` or the database's error; may then be called again."""
        if self._cloud is None:
            config = self._settings.config
            self._cloud = Cloud(
                open_engine(config.database),
                self.fabric,
                authority=self.authority,
                keyring=Keyring.open(config.state / "keyring.json"),
                config=config,
                store=open_store(registry_url(config)),
                work_dir=config.state / "archives",
                api_url=api_url,
                clock_ns=time.time_ns,
                answers_for=self._answers_for,
                rights=self.rights,
                report_signer=ReportSigner.open(config.state),
            )
        return self._cloud

    def begin(self, api_url: str) -> Cloud:
        """Open it, take over what runs, and have it begin; once. Raises as `open` does; may then be called again."""
        cloud = self.open(api_url)
        if not self._begun:
            self.fabric.take_over()
            cloud.start()
            self._begun = True
        return cloud

    def target(self, scope: Scope) -> Target:
        """Return where the target of a scope is, ready to serve it."""
        return self.fabric.target(self.cloud.route(scope))

    def _answers_for(self, enterprise: str) -> bool:
        return not self._settings.manager_per_enterprise or enterprise == self._owner

    def until_done(self, step: Callable[[], None]) -> None:
        """Take a step in a thread of its own, again and again until it succeeds."""

        def run() -> None:
            while True:
                try:
                    step()
                except Exception as error:
                    self.problem = error
                    _log.exception("manager.not_open", owner=self._owner)
                    time.sleep(_RETRY_SECONDS)
                else:
                    self.problem = None
                    self._open.set()
                    _log.info("manager.open", owner=self._owner)
                    return

        threading.Thread(target=run, name="start", daemon=True).start()

    def wait_open(self, timeout_seconds: float) -> None:
        """Wait until all steps have succeeded. Raises what stands in the way, and does not go away by itself."""
        begun = time.monotonic()
        while not self._open.wait(0.1):
            problem, seconds = self.problem, time.monotonic() - begun
            if isinstance(problem, UnavailableError) and seconds > _PATIENCE_SECONDS:
                raise DrCloudError(str(problem), problem.remedy)
            if problem is not None and not isinstance(problem, UnavailableError):
                raise problem
            if seconds > timeout_seconds:
                raise UnavailableError(f"the manager is not open after {timeout_seconds:g} s", "Look at its log.")

    def close(self) -> None:
        """End what runs by itself."""
        if self._cloud is not None:
            self._cloud.close()
        self.fabric.close()


class Headquarters:
    """The provider's manager and its API. Its actor is `dr_cloud.actors.cloud.CloudManager`."""

    def __init__(self, settings: ProviderSettings, tenants: Sequence[EnterpriseConfig]) -> None:
        """Begin to open.

        Args:
            settings: The provider.
            tenants: Enterprises to be registered if they are not.
        """
        settings.node.make_folders()
        self._log_files = start_log(settings, MANAGER)
        self._settings = settings
        self._tenants = tenants
        self._api: ApiServer | None = None
        door = EnterpriseManager if settings.manager_per_enterprise else Connector
        self._core = Core(settings, "", door, settings.idle_stacks)
        self._core.until_done(self._start)

    def _start(self) -> None:
        core, config = self._core, self._settings.config
        host, port = api_address(config)
        cloud = core.begin(f"https://{host}:{port}")
        self._make_administrator(cloud)
        self._make_engine_token(cloud)
        if self._api is None:
            answering = DividedCloud(cloud, core.fabric.connector) if self._settings.manager_per_enterprise else cloud
            credentials = core.authority.service_credentials("api", [host])
            self._api = ApiServer(make_app(answering), host, port, credentials)  # type: ignore[arg-type]
        self._wait_rights()  # an engine may fetch its bundle from the API; where doors may stand, it decides
        self._register_tenants(cloud)
        for enterprise in self._enterprises(cloud):
            cloud.connector_started(enterprise, core.fabric.start_connector(enterprise))
        for center in config.data_centers:
            for host_view in cloud.center_hosts(SYSTEM, center.name):
                if host_view.vdsa not in ("removing", "not installed"):
                    core.fabric.start_vdsa(center.name, host_view.name)
        core.fabric.refill()

    def _register_tenants(self, cloud: Cloud) -> None:
        known = set(self._enterprises(cloud))
        for tenant in self._tenants:
            if tenant.name not in known:
                with contextlib.suppress(ConflictError):
                    cloud.register_enterprise(SYSTEM, tenant)

    @staticmethod
    def _enterprises(cloud: Cloud) -> list[str]:
        names: list[str] = []
        page = cloud.enterprises(SYSTEM, PageRequest(limit=PAGE_LIMIT_MAX))
        while True:
            names += [enterprise.name for enterprise in page.items]
            if page.next_cursor is None:
                return names
            page = cloud.enterprises(SYSTEM, PageRequest(limit=PAGE_LIMIT_MAX, cursor=page.next_cursor))

    def _make_administrator(self, cloud: Cloud) -> None:
        """Make the first administrator's token, if nobody has any."""
        path = self._settings.config.state / ADMIN_TOKEN
        if not path.exists() and not cloud.tokens(SYSTEM, None, PageRequest(limit=1)).items:
            request = TokenRequest(
                name="first administrator", role=Role.PROVIDER_ADMIN, lifetime_seconds=_ADMIN_LIFETIME_SECONDS
            )
            replace_file(path, cloud.create_token(SYSTEM, request).secret + "\n", 0o600)

    def _make_engine_token(self, cloud: Cloud) -> None:
        """Make the token with which an OPA server fetches its bundle from the API, if it is missing or old."""
        path = self._settings.bundle_token
        fresh = path.exists() and time.time() - path.stat().st_mtime < _ENGINE_TOKEN_SECONDS / 2
        if self._settings.config.rights.engine == "opa" and not fresh:
            request = TokenRequest(name="policy engine", role=Role.AUDITOR, lifetime_seconds=_ENGINE_TOKEN_SECONDS)
            replace_file(path, cloud.create_token(SYSTEM, request).secret, 0o600)

    def _wait_rights(self) -> None:
        """Wait a while until the rights manager decides; without it the provider starts too, and allows nothing new."""
        deadline = time.monotonic() + _RIGHTS_SECONDS
        while (state := self._core.rights.state()).revision != state.wanted or not state.wanted:
            if time.monotonic() > deadline:
                _log.warning("manager.no_rights", reason=state.problem)
                return
            time.sleep(0.1)

    def ready(self) -> Ready:
        """Wait until everything is open; return where it is. Raises what stands in the way."""
        core, config = self._core, self._settings.config
        core.wait_open(START_SECONDS)
        links = {}
        for enterprise in self._enterprises(core.cloud):
            core.fabric.wait_connector(enterprise)
            links[enterprise] = core.cloud.enterprise(SYSTEM, enterprise).link
        host, port = api_address(config)
        return Ready(
            provider=config.name,
            api=f"https://{host}:{port}",
            ca=str(config.state / "ca" / "ca-cert.pem"),
            links=links,
        )

    def certify(self, csr: str, service: str, hosts: list[str]) -> tuple[str, str]:
        """Return a service's certificate and the CA's, both PEM."""
        authority = self._core.authority
        return authority.issue_service(csr, service, hosts).certificate, authority.certificate

    def inbound(self, method: str, *arguments: Any) -> Any:
        """Carry out what a connector or a VDSA asks."""
        if method == "target":
            return self._core.target(*arguments)
        if method not in _INBOUND:
            raise ForbiddenError(f"{method} is not for connectors and VDSAs")
        return getattr(self._core.cloud, method)(*arguments)

    def stop(self) -> None:
        """End the API and what runs by itself; the actor is of no use afterwards."""
        if self._api is not None:
            self._api.close()
        self._core.close()


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)
class EnterpriseManager(Door):
    """An enterprise's control in a process of its own, which is also its door."""

    def __init__(self, settings: ProviderSettings, enterprise: str, port: int) -> None:
        """Begin to open; see `Door`."""
        self._log_files = start_log(settings, settings.connector_name(enterprise))
        self._core = Core(settings, enterprise, EnterpriseManager, {})
        super().__init__(settings, enterprise, port, self._ask_core)
        self._core.until_done(self._start)

    def _start(self) -> None:
        self._core.begin(f"https://{self._settings.config.api}")

    def ready(self) -> str:
        """Wait until manager and door are open; return the door's inner address."""
        self._core.wait_open(START_SECONDS)
        return super().ready()

    async def _ask_core(self, method: str, *arguments: Any) -> Any:
        def carry_out() -> Any:
            if method == "target":
                return self._core.target(*arguments)
            return getattr(self._core.cloud, method)(*arguments)

        return await asyncio.to_thread(carry_out)

    def call(self, name: str, arguments: Sequence[Any], named: dict[str, Any], key: Key | None) -> Any:
        """Carry out a call of the API."""
        return carry_out(self._core.cloud, name, arguments, named, key)

    def stop(self) -> None:
        """Close every link, and end what runs by itself; the actor is of no use afterwards."""
        super().stop()
        self._core.close()
