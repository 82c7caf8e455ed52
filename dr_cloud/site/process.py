"""The site process: everything of one enterprise's site on one event loop.

    taps ──▶ source hub ──▶ sources ══▶ uplink ══▶ provider       enterprise → cloud
                            target  ◀══ uplink ◀══ provider       cloud → enterprise
                 orders, reports, logs, renewal: calls over the same uplink

Start
    State folder locked, log begun, paired if need be, the last orders followed, then the line that says what is ready;
    then the link, for ever. So a site whose provider is away serves its taps as before.

Crash recovery
    Nothing here is lost with the process but what the taps' bitmaps have marked: sources begin new streams and the
    taps send what is missing. Guests do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from pydantic import JsonValue

from dr_cloud.link.purpose import LOGS, REPLICATION, replication_scope
from dr_cloud.link.rpc import Params
from dr_cloud.link.session import ChannelStream
from dr_cloud.model.errors import DrCloudError, NotFoundError, ProtocolError
from dr_cloud.model.replication import LogAnswer, LogRequest
from dr_cloud.seal.identity import Credentials, new_key_and_csr
from dr_cloud.seal.keyring import Keyring
from dr_cloud.site.config import SiteSettings
from dr_cloud.site.follower import VERSION, Follower, essence
from dr_cloud.site.logs import SiteLog, archive, core_state
from dr_cloud.site.orders import read_orders
from dr_cloud.site.pairing import paired
from dr_cloud.site.state import IDENTITY, ORDERS, Identity, StateFolder
from dr_cloud.site.uplink import Uplink
from dr_cloud.vdsa.analysis.analyzers import Analyzers
from dr_cloud.vdsa.hub import SourceHub
from dr_cloud.vdsa.target_io import TargetVdsa

REPORT_SECONDS: Final = 5.0
"""So often everything is told, figures too."""
LOOK_SECONDS: Final = 0.5
"""A change is told after this time at most, and not more often."""
TEND_SECONDS: Final = 2.0
SAVE_SECONDS: Final = 300.0
"""So often what the analyzers have learnt is saved. It is a cache."""
RENEW_SECONDS: Final = 2.0
"""So often it is looked whether the certificate is to be renewed,"""
RENEW_APART_SECONDS: Final = 60.0
"""and so far apart it is tried."""
_ARCHIVE_PART_BYTES: Final = 256 << 10

_log = structlog.get_logger(__name__)


class Site:
    """See the module's docstring. All methods belong to one event loop."""

    def __init__(self, settings: SiteSettings, state: StateFolder, identity: Identity, log: SiteLog) -> None:
        self._settings = settings
        self._state = state
        self._identity = identity
        self._log = log
        self._following = asyncio.Lock()
        self._told: object = None
        self._told_at = 0.0
        self._renew_from = 0.0
        keyring = Keyring.open(state.path / "keyring.json")
        self.follower = Follower(settings, time.time_ns)
        self.uplink = Uplink(
            identity.link,
            Credentials(identity.key, identity.certificate, identity.ca),
            settings.proxy,
            methods={"logs": self._collect_logs},
            on_channel=self._on_channel,
            on_orders=self._follow,
        )
        self.follower.analyzers = Analyzers(state.path / "analysis")
        self.follower.hub = SourceHub(keyring, self.uplink.open, analyzers=self.follower.analyzers)
        self.follower.target = TargetVdsa(keyring, state.path / "work", self.follower.admit)

    async def run(self, ready: Callable[[str], None]) -> None:
        """Run until cancelled."""
        hub, target = self.follower.hub, self.follower.target
        try:
            await self._recall()
            places = " ".join(f"{host.name}={host.listen}" for host in self._settings.hosts)
            identity = self._identity
            ready(f"site {identity.enterprise}/{identity.site} ready: {places} link={identity.link}")
            async with asyncio.TaskGroup() as work:
                work.create_task(self.uplink.run(), name="uplink")
                work.create_task(self._repeat(self._report, LOOK_SECONDS), name="report")
                work.create_task(self._repeat(self.follower.tend, TEND_SECONDS), name="tend")
                work.create_task(self._repeat(self._renew_in_time, RENEW_SECONDS), name="renew")
                work.create_task(self._repeat(self._save_analyses, SAVE_SECONDS), name="save")
        finally:
            await hub.close()
            await target.close()
            self.follower.analyzers.save()

    # Orders.

    async def _recall(self) -> None:
        """Follow the last orders that were received, so that a site without its provider goes on."""
        document = self._state.read(ORDERS)
        if document is None:
            return
        try:
            accepted = read_orders(document, self._identity.enterprise, self.follower.datastores)
        except ProtocolError as error:
            _log.error("site.orders_damaged", reason=str(error))
            return
        self.uplink.set_orders(accepted.orders)
        await self.follower.follow(accepted)

    async def _follow(self, document: Params) -> None:
        """Follow orders, then keep them. Raises `ProtocolError` if they are none."""
        async with self._following:
            try:
                accepted = read_orders(document, self._identity.enterprise, self.follower.datastores)
            except ProtocolError as error:
                self.follower.accepted = self.follower.accepted._replace(problems=[str(error)])
                raise
            self.uplink.set_orders(accepted.orders)
            await self.follower.follow(accepted)
            await asyncio.to_thread(self._state.write, ORDERS, json.dumps(document))

    # What is done again and again.

    async def _repeat(self, step: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Do `step` for ever. Nothing it meets may end the site, whose taps and streams stand."""
        problem = ""
        while True:
            await asyncio.sleep(seconds)
            try:
                await step()
                problem = ""
            except (DrCloudError, OSError) as error:
                if str(error) != problem:
                    problem = str(error)
                    _log.warning("site.again", step=step.__name__.strip("_"), reason=problem)
            except Exception:
                _log.exception("site.failed", step=step.__name__.strip("_"))
                await asyncio.sleep(TEND_SECONDS)

    async def _report(self) -> None:
        """Tell the provider everything, if five seconds have passed or something has changed."""
        if not self.uplink.linked:
            self._told = None
            return
        report = self.follower.report()
        what = essence(report)
        if what == self._told and time.monotonic() - self._told_at < REPORT_SECONDS:
            return
        # If it is lost, the next one tells everything anew.
        self._told = None
        report = report.model_copy(update={"analyses": self.follower.analyses()})
        await self.uplink.call("report", report.model_dump(mode="json"))
        self._told, self._told_at = what, time.monotonic()

    async def _renew_in_time(self) -> None:
        due = time.time_ns() >= self.uplink.credentials.renew_at_ns and time.monotonic() >= self._renew_from
        if self.uplink.linked and due:
            self._renew_from = time.monotonic() + RENEW_APART_SECONDS
            await self._renew()

    async def _save_analyses(self) -> None:
        await asyncio.to_thread(self.follower.analyzers.save)

    # The certificate.

    async def _renew(self) -> None:
        key, csr = new_key_and_csr()
        answer = await self.uplink.call("renew", {"csr": csr})
        certificate = str(answer.get("certificate")) if isinstance(answer, dict) else ""
        credentials = Credentials(key, certificate, self._identity.ca)
        mine = self.uplink.credentials.peer
        if (credentials.peer.enterprise, credentials.peer.site) != (mine.enterprise, mine.site):
            raise ProtocolError("the renewed certificate is another site's")
        identity = self._identity.model_copy(update={"key": key, "certificate": certificate})
        await asyncio.to_thread(self._state.save, IDENTITY, identity)
        self._identity, self.uplink.credentials = identity, credentials
        _log.info("site.renewed", serial=credentials.peer.serial)

    # What the provider asks for.

    async def _on_channel(self, purpose: str, arguments: Params, stream: ChannelStream) -> None:
        if purpose != REPLICATION:
            raise NotFoundError(f"a site serves no channel of purpose {purpose!r}", "Bring both sides to one release.")
        self.follower.admit(replication_scope(arguments, self._identity.enterprise))
        await self.follower.target.serve(stream)

    async def _collect_logs(self, params: Params) -> JsonValue:
        """Send the archive in a channel; answer what it was."""
        request = LogRequest.model_validate(params)
        report = self.follower.report()
        documents: dict[str, Any] = {
            "about.json": {
                "enterprise": self._identity.enterprise,
                "site": self._identity.site,
                "version": VERSION,
                "request": request.model_dump(),
                "certificate": repr(self.uplink.credentials),
                "lines_left_out": self._log.left_out,
            }
        }
        if request.vdsa:
            documents["vdsa.json"] = report.model_dump(mode="json")
        if request.core:
            documents["core.json"] = core_state()
        packed = await asyncio.to_thread(archive, self._log, request, documents)
        stream = await self.uplink.channel(LOGS, {"id": request.id})
        try:
            for at in range(0, len(packed), _ARCHIVE_PART_BYTES):
                await stream.send(memoryview(packed)[at : at + _ARCHIVE_PART_BYTES])
        finally:
            stream.end()
        return LogAnswer(size_bytes=len(packed), sha256=hashlib.sha256(packed).hexdigest()).model_dump()


async def serve(settings: SiteSettings, state: StateFolder, log: SiteLog, ready: Callable[[str], None]) -> None:
    """Run the site until SIGTERM or SIGINT.

    Args:
        settings: The configuration.
        state: The locked state folder.
        log: Where its lines go.
        ready: Called once with one line that names every address.

    Raises:
        DrCloudError: It cannot be paired, or what it keeps is damaged.
    """
    identity = await asyncio.to_thread(paired, state, settings.pairing_token(), settings.proxy)
    site = asyncio.create_task(Site(settings, state, identity, log).run(ready))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, site.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await site
    _log.info("site.stopped")
