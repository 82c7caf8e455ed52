"""For the tests of the site process: a small provider of the real parts in this process, site and taps beside it.

The provider pairs over HTTPS, serves the link over TLS, is the target of what comes (enterprise → cloud) and the source
of what goes (cloud → enterprise); only its manager is a document that the test writes.
"""

from __future__ import annotations

import hashlib
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from e2e_world import Guest, Processes, make_disk, wait_until
from site_provider import ENTERPRISE, KEY, SITE, PairingApi, open_authority
from vdsa_images import ImageReader

from dr_cloud.actors.node import LoopThread
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.link.purpose import REPLICATION, replication_arguments, replication_scope
from dr_cloud.link.session import ChannelStream, Session
from dr_cloud.link.stream import MessageStream
from dr_cloud.link.websocket import LinkServer, serve
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import ForbiddenError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import SiteReport, SourceOrders
from dr_cloud.seal.identity import Peer
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.vdsa.hub import SourceHub
from dr_cloud.vdsa.target_io import TargetVdsa

SHOP = Scope(ENTERPRISE, "shop", "dc1")
BACK = Scope(ENTERPRISE, "back", SITE)
SECONDS = 0.3
"""Between checkpoints."""


def order(scope: Scope = SHOP, server: str = "web", **changes: Any) -> dict[str, Any]:
    """A source's order: one server with the disk `root`."""
    members = {server: {"root": 0}}
    return {"scope": list(scope), "copy_number": 0, "members": members, "checkpoint_seconds": SECONDS, **changes}


class Provider:
    """See the module's docstring. `orders` is what the site is to do; `tell` sends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = LoopThread("provider")
        self.authority = open_authority(folder / "provider")
        self.credentials = self.authority.service_credentials(f"connector-{ENTERPRISE}", ["127.0.0.1"])
        self.keyring = Keyring.open(folder / "provider" / "keyring.json")
        self.keyring.put(ENTERPRISE, bytes.fromhex(KEY))
        self.store_url = f"file://{folder}/store"
        self.store = open_store(self.store_url)
        self.orders: dict[str, Any] = {"revision": 1, "hosts": ["h1"], "sources": [order()], "targets": []}
        self.reports: list[SiteReport] = []
        self.revoked: set[str] = set()
        self.serials: list[str] = []
        self.sessions: list[Session] = []
        self.controls: list[Session] = []
        self.archives: dict[str, bytes] = {}
        self.renewals = 0
        self.port = 0
        self.server: LinkServer | None = None
        self.start()
        self.api = PairingApi(self.authority, f"wss://127.0.0.1:{self.port}/link")

    # Its life.

    def start(self) -> None:
        self.loop.call(self._start(), 10)

    def stop(self) -> None:
        self.loop.call(self._stop(), 20)

    async def _start(self) -> None:
        self.target = TargetVdsa(self.keyring, self.folder / "digests", self.admit)
        self.hub = SourceHub(self.keyring, self.back)
        self.server = await serve(
            "127.0.0.1", self.port, self.credentials.server_context(), self.on_session, self.on_peer
        )
        self.port = self.server.port

    async def _stop(self) -> None:
        assert self.server is not None
        await self.server.close()
        await self.hub.close()
        await self.target.close()
        self.server = None

    def close(self) -> None:
        self.api.close()
        if self.server is not None:
            self.stop()
        self.loop.loop.call_soon_threadsafe(self.loop.loop.stop)

    # The link.

    async def on_peer(self, peer: Peer) -> None:
        if peer.enterprise != ENTERPRISE or peer.serial in self.revoked:
            raise ForbiddenError("the certificate is revoked", "Pair the site anew.")

    async def on_session(self, session: Session) -> None:
        assert session.peer is not None

        async def give_orders(_: Any) -> Any:
            self.controls.append(session)
            return self.orders

        async def take_report(params: Any) -> Any:
            self.reports.append(SiteReport.model_validate(params))
            return {}

        async def renew(params: Any) -> Any:
            self.renewals += 1
            issued = self.authority.issue_site(params["csr"], ENTERPRISE, SITE)
            return {"certificate": issued.certificate, "serial": issued.serial}

        session.methods.update({"orders": give_orders, "report": take_report, "renew": renew})
        session.on_channel = self.on_channel
        self.serials.append(session.peer.serial)
        self.sessions.append(session)
        async with session:
            await session.wait_closed()
        self.sessions.remove(session)
        if session in self.controls:
            self.controls.remove(session)

    async def on_channel(self, purpose: str, arguments: Any, stream: ChannelStream) -> None:
        if purpose == REPLICATION:
            replication_scope(arguments, ENTERPRISE)
            await self.target.serve(stream)
            return
        parts = []
        while (part := await stream.receive()) is not None:
            assert not isinstance(part, str)
            parts.append(bytes(part))
        self.archives[arguments["id"]] = b"".join(parts)

    def admit(self, scope: Scope) -> Store:
        if scope.target != "dc1":
            raise NotFoundError("no such scope")
        return self.store

    async def back(self, scope: Scope) -> MessageStream:
        """Cloud → enterprise: a channel to the site over the connection that the site dialled."""
        if not self.controls:
            raise ConnectionRefusedError("the site is not linked")
        return await self.controls[-1].open(REPLICATION, replication_arguments(scope))

    # What a manager does.

    def tell(self, **changes: Any) -> None:
        """Change the orders and send them."""
        self.orders = {**self.orders, **changes, "revision": self.orders["revision"] + 1}
        self.loop.call(self.controls[-1].call("orders", self.orders), 20)

    def call(self, method: str, **params: Any) -> Any:
        return self.loop.call(self.controls[-1].call(method, params), 20)

    def replicate_back(self, socket: Path) -> None:
        """Be the source of BACK: taps come to `socket`."""
        orders = SourceOrders.model_validate(order(BACK, server="cloudy"))

        async def begin() -> None:
            await self.hub.listen("cloud", f"unix:{socket}", None)
            await self.hub.configure([orders])

        self.loop.call(begin(), 10)

    def report(self) -> SiteReport:
        """The next report that comes."""
        count = len(self.reports)
        wait_until(lambda: len(self.reports) > count, 20)
        return self.reports[-1]

    def logs(self, **request: Any) -> dict[str, bytes]:
        answer = self.call("logs", id="log-1", **request)
        wait_until(lambda: "log-1" in self.archives, 10)
        packed = self.archives.pop("log-1")
        assert (len(packed), hashlib.sha256(packed).hexdigest()) == (answer["size_bytes"], answer["sha256"])
        with tarfile.open(fileobj=BytesIO(packed)) as opened:
            files = {name: opened.extractfile(name) for name in opened.getnames()}
            return {name: file.read() for name, file in files.items() if file is not None}


class World(Processes):
    """A provider, a site, a tap with one disk. `folder` has a short path: sockets lie in it."""

    def __init__(self, folder: Path, **site: Any) -> None:
        super().__init__(folder)
        self.provider = Provider(folder)
        self.keys = self.provider.keyring.vpg_keys
        self.settings: dict[str, Any] = {
            "state": "site",
            "token": self.provider.api.token(),
            "hosts": [{"name": "h1", "listen": "unix:h1.sock"}],
            "datastores": [{"name": "ds", "store": "file://site-store"}],
            **site,
        }
        self.disk = folder / "disk"
        make_disk(self.disk, 512 * BLOCK_SIZE, [(0, 64 * BLOCK_SIZE)])
        self.guest = Guest({"root": self.uri("tap")}, {"root": self.disk.read_bytes()}, seed=3)

    def start_site(self) -> str:
        path = self.folder / "site.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        self.start("site", "dr_cloud.cli.site_up", "-c", str(path))
        return self.wait_ready("site")

    def start_tap(self, name: str = "tap", server: str = "web", host: str = "h1", disk: Path | None = None) -> None:
        (self.folder / f"{name}.sock").unlink(missing_ok=True)
        self.start(
            name, "dr_cloud.cli.tap", "--server", server, "--disk", f"root={disk or self.disk}",
            "--socket", f"{self.folder}/{name}.sock", "--vdsa", f"{self.folder}/{host}.sock",
            "--state", f"{self.folder}/{name}.state",
        )  # fmt: skip
        self.wait_ready(name)

    def uri(self, tap: str) -> str:
        return f"nbd+unix:///root?socket={self.folder}/{tap}.sock"

    def wait_linked(self) -> None:
        wait_until(lambda: self.provider.controls, 20)
        self.provider.report()

    # What a journal holds, read from its store alone.

    def catalogue(self, scope: Scope = SHOP, store_url: str = "") -> Catalogue:
        return Catalogue.load(open_store(store_url or self.provider.store_url), self.keys(scope), scope)

    def wait_newest(self, scope: Scope = SHOP, store_url: str = "", seconds: float = 40) -> Catalogue:
        """Wait for a checkpoint to recover to that is later than now."""
        now = time.time_ns()
        try:
            wait_until(lambda: (self.catalogue(scope, store_url).newest_ns or 0) > now, seconds)
        except AssertionError:
            raise AssertionError(f"no checkpoint: {self.log('site')[-3000:]}") from None
        return self.catalogue(scope, store_url)

    def image(self, at_ns: int, scope: Scope = SHOP, store_url: str = "", size_bytes: int = 512 * BLOCK_SIZE) -> bytes:
        """The disk at a time."""
        plan = self.catalogue(scope, store_url).plan(at_ns)
        assert plan.at_ns == at_ns, plan.note
        image = bytearray(size_bytes)
        blocks = ImageReader(open_store(store_url or self.provider.store_url), self.keys(scope)).image(plan)
        for (_, block), data in blocks.items():
            image[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = data
        return bytes(image)

    def check(self) -> None:
        """Stop the guest; nothing failed, the newest image is the disk, exact times hold what was written by then."""
        self.guest.stop()
        assert self.guest.failures == []
        catalogue = self.wait_newest()
        assert self.image(catalogue.newest_ns or 0) == self.disk.read_bytes()
        exact = [
            c
            for c in catalogue.checkpoints
            if c.testable and self.guest.writes[0].begun_ns < c.exact_from_ns < c.time_ns
        ]
        for checkpoint in self.guest.random.sample(exact, min(len(exact), 6)):
            at_ns = self.guest.random.randint(checkpoint.exact_from_ns, checkpoint.time_ns)
            self.guest.check({"root": self.image(at_ns)}, at_ns)

    def close(self) -> None:
        self.guest.stop()
        self.end()
        self.provider.close()
