"""The `Connector` actor: an enterprise's door (`dr_cloud.actors.gate`) in a process of its own.

Crash recovery
    Ray starts it again, on the same port. It knows nothing then: the manager certifies a new key, the sites dial again,
    ask for their orders, and their sources go on from the last durable frame. While the port is not free yet, or the
    manager is away, it tries on.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Final

import ray
import structlog

from dr_cloud.actors.cluster import START_SECONDS, UNHEARD_SECONDS, Where, node_address, whereabouts
from dr_cloud.actors.gate import Ask, Gate, Office
from dr_cloud.actors.inner import Inner
from dr_cloud.actors.logs import start_log
from dr_cloud.actors.node import LoopThread
from dr_cloud.actors.settings import ManagerDesk, ProviderSettings
from dr_cloud.link.websocket import LinkServer, serve
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.replication import LogRequest
from dr_cloud.tap.memory import keep_freed_memory

_RETRY_SECONDS: Final = 0.5

_log = structlog.get_logger(__name__)


class Door:
    """What connectors and managers of one enterprise share: a door, on an event loop of its own."""

    def __init__(self, settings: ProviderSettings, enterprise: str, port: int, ask: Ask) -> None:
        """Begin to open.

        Args:
            settings: The provider.
            enterprise: Whose door it is.
            port: Where its sites dial; always the same.
            ask: Asks the enterprise's manager.
        """
        keep_freed_memory()
        settings.node.make_folders()
        self._settings = settings
        self._enterprise = enterprise
        self._port = port
        self._desk = ManagerDesk(settings.placement)
        self._office = Office(enterprise, ask)
        self._problem = ""
        self._is_open = threading.Event()
        self._loop = LoopThread("link")
        self._loop.call(self._begin())

    async def _begin(self) -> None:
        self._opening = asyncio.create_task(self._open_until_done(), name="open")

    async def _open_until_done(self) -> None:
        while True:
            try:
                await self._open()
            except (DrCloudError, OSError) as error:
                self._problem = str(error)
                _log.warning("connector.not_open", enterprise=self._enterprise, reason=self._problem)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                break
        self._is_open.set()
        _log.info("connector.open", enterprise=self._enterprise, port=self._port)
        await self._gate.watch()

    async def _open(self) -> None:
        config = self._settings.config
        address = node_address()
        credentials = await asyncio.to_thread(self._desk.certified, "connector", [config.link_host, address])
        inner = Inner() if self._settings.placement.local else Inner(address, credentials)
        self._gate = Gate(config.name, self._enterprise, self._office, inner.connect)
        self._links: LinkServer = await serve(
            config.link_host, self._port, credentials.server_context(), self._gate.serve, self._gate.admit
        )
        name = self._settings.connector_name(self._enterprise)
        self._inner_server, self._inner_address = await inner.listen(
            self._settings.node.socket(name), self._gate.serve_inner
        )

    def _wait_open(self, timeout_seconds: float = 0.0) -> Gate:
        if not self._is_open.wait(timeout_seconds):
            raise UnavailableError(
                f"the connector of {self._enterprise} is not open yet: {self._problem or 'it starts'}",
                "It tries on by itself; see that its port is free.",
            )
        return self._gate

    # What the manager asks.

    def ready(self) -> str:
        """Wait until it is open; return its inner address."""
        self._wait_open(START_SECONDS)
        return self._inner_address

    def where(self) -> Where:
        """Return where it runs."""
        return whereabouts()

    def orders_changed(self, site: str) -> None:
        """Fetch the orders of a site, and send them on."""
        if self._is_open.is_set():  # Before that no site has any.
            self._loop.loop.call_soon_threadsafe(self._gate.orders_changed, site)

    def disconnect(self, site: str) -> None:
        """Close the links of a site."""
        if self._is_open.is_set():
            self._loop.loop.call_soon_threadsafe(
                self._gate.disconnect, site, "its certificate is revoked, or policy denies it"
            )

    def collect_logs(self, site: str, request: LogRequest) -> bytes:
        """Return the archive of a site's logs."""
        return self._loop.call(self._wait_open().collect_logs(site, request))

    def stop(self) -> None:
        """Close every link; the actor is of no use afterwards."""

        async def stop() -> None:
            self._opening.cancel()
            if self._is_open.is_set():
                self._inner_server.close()
                await asyncio.wait_for(self._links.close(), UNHEARD_SECONDS)

        self._loop.call(stop())


@ray.remote(max_restarts=-1, max_task_retries=3, num_cpus=0)
class Connector(Door):
    """An enterprise's door; the manager is elsewhere."""

    def __init__(self, settings: ProviderSettings, enterprise: str, port: int) -> None:
        """Begin to open; see `Door`."""
        self._log_files = start_log(settings, settings.connector_name(enterprise))
        super().__init__(settings, enterprise, port, ManagerDesk(settings.placement).ask)
