"""Two enterprises at one provider, all real but Ray: manager and database, a door each over TLS, one VDSA for both.

The attacker's enterprise, `acme`, attacks from a site that it has given the name of the other's site.
The second enterprise, `brit`, lives: its site is linked, replicates, has a request for a checkpoint and one for logs
under way. Whoever attacks it is to find all of that as it was (`unchanged`).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from api_world import MARKER, TwoEnterprises
from cloud_world import CONFIG
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from isolation_frames import HandSource, durable, greet, heard, newest_image
from sqlalchemy import select

from dr_cloud.actors.gate import Gate, Office, Target
from dr_cloud.actors.inner import Inner
from dr_cloud.link import messages as link
from dr_cloud.link.purpose import LOGS, REPLICATION, replication_arguments
from dr_cloud.link.session import ChannelStream, Session
from dr_cloud.link.stream import Message, MessageStream, Received
from dr_cloud.link.websocket import LinkServer, dial, serve
from dr_cloud.manager import tables
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.errors import DrCloudError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import PairingToken, PairRequest
from dr_cloud.model.provider import EnterpriseConfig, SiteConfig
from dr_cloud.model.replication import LogRequest
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import Credentials, Peer, key_pem, new_key_and_csr
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.vdsa.target_io import TargetVdsa

HOST = "127.0.0.1"
OURS = Scope("acme", "erp", "dc1")
THEIRS = Scope("brit", f"{MARKER}-erp", f"{MARKER}-dc")
THEIR_SITE = "brit-hq"
TO_THEIR_SITE = Scope("brit", f"{MARKER}-back", THEIR_SITE)


class Aim(NamedTuple):
    """What an attacker names: things of the other's, or things that nobody has."""

    scope: Scope
    back: Scope
    """Replicated to the other's site."""
    site: str
    host: str
    server: str
    serial: str
    tap: str
    stream: str
    log: str
    """Id of a request for logs that is under way."""
    request: str
    """Id of a request for a checkpoint that is under way."""
    channel: int
    digests: bytes
    frame: bytes
    """Item 2 of the stream, as a message."""

    @classmethod
    def nowhere(cls) -> Aim:
        """Return an aim at nothing: every name has the length of a real one."""
        source = HandSource(VpgKeys(secrets.token_bytes(32), Scope("none", "none-erp", "none-dc")))
        source.number = 1
        return cls(
            scope=source.scope,
            back=Scope("none", "none-back", "none-hq"),
            site="none-hq",
            host="none-host",
            server="none-sql",
            serial=secrets.token_hex(20),
            tap=source.tap,
            stream=source.stream.hex(),
            log=secrets.token_hex(16),
            request=secrets.token_hex(16),
            channel=999_999,
            digests=secrets.token_bytes(32),
            frame=source.frame(),
        )

    def blank(self, text: str) -> str:
        """Return `text` without the names that the attacker sent."""
        text = text.replace(THEIR_SITE, "SITE")  # The attacker's own too.
        names = [*self.scope, *self.back, *(value for value in self if isinstance(value, str))]
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, "NAME")
        return text


class Recorder:
    """`MessageStream` that keeps what came."""

    def __init__(self, inner: MessageStream) -> None:
        self.heard: list[str | bytes] = []
        self._inner = inner

    async def send(self, message: Message) -> None:
        await self._inner.send(message)

    async def receive(self) -> Received | None:
        message = await self._inner.receive()
        if message is not None:
            self.heard.append(message if isinstance(message, str) else bytes(message))
        return message

    def end(self) -> None:
        self._inner.end()

    def close(self) -> None:
        self._inner.close()


class World(TwoEnterprises):
    """The first enterprise has a site of the same name as the other's."""

    def populate(self) -> None:
        for name, names in (("acme", ["acme-hq", THEIR_SITE]), ("brit", [THEIR_SITE])):
            sites = [SiteConfig(name=site, jurisdiction="USA", location="Main Street") for site in names]
            self.cloud.register_enterprise(SYSTEM, EnterpriseConfig(name=name, jurisdiction="USA", sites=sites))
            self.report(name)


class Provider:
    """See the module's docstring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(folder, now_ns=time.time_ns())
        self.world.populate()
        self.world.protect(SYSTEM, OURS.vpg, "acme")
        self.world.protect(
            SYSTEM,
            THEIRS.vpg,
            "brit",
            servers=[{"name": f"{MARKER}-sql"}],
            targets=[{"name": THEIRS.target, "site": "us-east", "host": "compute", "datastore": "gold"}],
        )
        home = {"name": THEIR_SITE, "site": THEIR_SITE, "host": f"{MARKER}-host", "datastore": "local"}
        app = [{"name": f"{MARKER}-app"}]
        self.world.protect(SYSTEM, TO_THEIR_SITE.vpg, "brit", source_site="us-east", servers=app, targets=[home])
        self.cloud = self.world.cloud
        self.authority = self.world.authority
        self.keyring = self.world.keyring
        self.journals = open_store("memory:")
        self.credentials = {name: self.pair(name, THEIR_SITE) for name in ("acme", "brit")}
        self.gates: dict[str, Gate] = {}
        self.doors: dict[str, LinkServer] = {}
        self._admitted: set[Scope] = set()
        # What rounds of the monitor find is found now, so that later ones change nothing.
        self.cloud.standing.look()
        self.cloud.monitor.judge()
        self.cloud.monitor.forecast()

    def pair(self, enterprise: str, site: str) -> Credentials:
        """Pair a site as it is paired."""
        token = PairingToken.decode(self.cloud.create_pairing(SYSTEM, enterprise, site).token)
        key, csr = new_key_and_csr()
        answer = self.cloud.pair(PairRequest(enterprise=enterprise, site=token.site, secret=token.secret, csr=csr))
        return Credentials(key, answer.certificate, answer.ca)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.vdsa = TargetVdsa(self.keyring, self.folder / "digests", self._store)
        inner = Inner()
        self._inner, self._address = await inner.listen(self.folder / "v.sock", self.vdsa.serve)
        service = self.authority.service_credentials("connector", [HOST])
        for enterprise in self.credentials:
            gate = self.gates[enterprise] = Gate(CONFIG.name, enterprise, Office(enterprise, self._ask), inner.connect)
            self.doors[enterprise] = await serve(HOST, 0, service.server_context(), gate.serve, gate.admit)

        def disconnect(enterprise: str, site: str) -> None:
            loop.call_soon_threadsafe(self.gates[enterprise].disconnect, site, "the certificate is revoked")

        self.world.fabric.disconnect = disconnect  # type: ignore[method-assign]
        self.victim = Victim(self)
        await self.victim.start()

    async def close(self) -> None:
        await self.victim.close()
        for door in self.doors.values():
            await door.close()
        self._inner.close()
        await self.vdsa.close()

    async def _ask(self, name: str, *arguments: Any) -> Any:
        if name != "target":
            return await asyncio.to_thread(getattr(self.cloud, name), *arguments)
        (scope,) = arguments
        route = await asyncio.to_thread(self.cloud.route, scope)
        self._admitted.add(scope)
        return Target(route=route, address=self._address)

    def _store(self, scope: Scope) -> Store:
        if scope not in self._admitted:
            raise NotFoundError(f"{scope.prefix} is not served here")
        return self.journals

    def url(self, enterprise: str) -> str:
        return f"wss://{HOST}:{self.doors[enterprise].port}/link"

    async def dial(self, enterprise: str, credentials: Credentials | None = None) -> tuple[Session, Recorder]:
        """Dial an enterprise's door; nothing passes before the session is entered."""
        session = await dial(self.url(enterprise), (credentials or self.credentials[enterprise]).client_context())
        recorder = Recorder(session._carrier)
        session._carrier = recorder
        return session, recorder

    def source(self, scope: Scope) -> HandSource:
        return HandSource(self.keyring.vpg_keys(scope), time.time_ns())

    def kept(self, scope: Scope) -> dict[str, Any]:
        """Return all that is kept of a scope and its enterprise: objects, registry, every row of the database."""
        owner = scope.enterprise
        kept: dict[str, Any] = {}
        for store, prefix in ((self.journals, f"{owner}/"), (self.world.store, f"registry/{owner}/")):
            for key, _ in store.list(prefix):
                kept[key] = hashlib.sha256(store.get(key)).hexdigest()
        with self.cloud._database.engine.connect() as connection:
            for table in tables.Base.metadata.sorted_tables:
                if "enterprise" in table.columns:
                    rows = connection.execute(select(table).where(table.columns.enterprise == owner)).all()
                    kept[table.name] = sorted(map(repr, rows))
        return kept


@asynccontextmanager
async def provider_in(folder: Path) -> AsyncIterator[Provider]:
    """Make such a provider, and end it."""
    provider = await asyncio.to_thread(Provider, folder)
    try:
        await provider.start()
        yield provider
    finally:
        await provider.close()
        await asyncio.to_thread(provider.world.close)


class Victim:
    """The other enterprise's site, by hand: linked, replicating, with two requests under way."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.source = provider.source(THEIRS)
        self.archive = secrets.token_bytes(100_000)
        self._release = asyncio.Event()
        self._asked: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        provider, source = self.provider, self.source
        self.session, _ = await provider.dial("brit")
        self.session.methods["logs"] = self._logs
        await self.session.__aenter__()
        await self.session.call("orders")
        for _ in range(20):
            await refused(self.session.open(LOGS, {"id": "none"}))
        self.stream = await self.session.open(REPLICATION, replication_arguments(THEIRS))
        await greet(self.stream, source)
        await self.stream.send(source.taps())
        frame = source.frame()
        await self.stream.send(frame)
        await durable(self.stream, source)
        request = await provider.vdsa.checkpoint(THEIRS, "by hand", "", None)
        assert isinstance(await heard(self.stream), link.RequestCheckpoint)
        self.collecting = asyncio.create_task(provider.gates["brit"].collect_logs(THEIR_SITE, LogRequest(id="0")))
        self.aim = Aim(
            scope=THEIRS,
            back=TO_THEIR_SITE,
            site=THEIR_SITE,
            host=f"{MARKER}-host",
            server=f"{MARKER}-sql",
            serial=provider.credentials["brit"].peer.serial,
            tap=source.tap,
            stream=source.stream.hex(),
            log=await self._asked,
            request=request,
            channel=self.stream._channel.number,
            digests=b"".join(source.keys.digest(block) for block in list(source.blocks.values())[:2]),
            frame=frame,
        )
        assert await self.known() == 2, "the victim's own offer finds what it has sent"
        self._kept = provider.kept(THEIRS)

    async def _logs(self, params: dict[str, Any]) -> Any:
        self._asked.set_result(str(params["id"]))
        await self._release.wait()
        stream = await self.session.open(LOGS, {"id": params["id"]})
        await stream.send(self.archive)
        stream.end()
        return {"size_bytes": len(self.archive), "sha256": hashlib.sha256(self.archive).hexdigest()}

    async def known(self) -> int:
        """Return of how many of its blocks the target says to have them."""
        await self.stream.send(link.encode_data(link.OFFER, 99, self.aim.digests))
        message = await asyncio.wait_for(self.stream.receive(), 10)
        assert message is not None and not isinstance(message, str)
        return sum(any(message[at : at + 8]) for at in range(link.HEAD_BYTES, len(message), 8))

    async def unchanged(self) -> None:
        """Fail unless everything is as it was, and alive."""
        assert not self.session.reason
        await self.stream.send(link.encode_control(link.Ping()))
        assert await heard(self.stream) == link.Pong()
        assert self.aim.log in self.provider.gates["brit"]._archives
        assert not self.provider.gates["brit"]._archives[self.aim.log]
        assert not self.collecting.done()
        assert list(self.provider.vdsa._scopes[THEIRS]._requests) == [self.aim.request]
        kept = self.provider.kept(THEIRS)
        assert kept.keys() == self._kept.keys()
        for name, value in self._kept.items():
            assert kept[name] == value, name

    async def go_on(self) -> None:
        """Finish all that is under way; everything is as it would have been."""
        await self.stream.send(self.source.frame())
        answer = await durable(self.stream, self.source, self.aim.request)
        assert answer.request == self.aim.request
        assert newest_image(self.provider.journals, self.source.keys) == self.source.blocks
        self._release.set()
        assert await self.collecting == self.archive

    async def close(self) -> None:
        self.collecting.cancel()
        self.session.close("done")
        await self.session.wait_closed()


async def refused(attempt: Any) -> str:
    """Return in what words something was refused."""
    try:
        result = await attempt
    except DrCloudError as error:
        return f"{type(error).__name__}: {error}. {error.remedy}"
    if isinstance(result, ChannelStream):
        result.close()
    return f"not refused: {result}"


def forged(authority: Authority, uris: Sequence[str], hosts: Sequence[str] = (HOST,)) -> Credentials:
    """Return a certificate of the real CA, for both ends of TLS, that says whatever is asked: a CA that went wrong."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority._certificate.subject)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .public_key(key.public_key())
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=True
        )
    )
    names += [x509.IPAddress(ip_address(host)) for host in hosts]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    # Made without the check that `Credentials` itself does: it would find out.
    credentials = Credentials.__new__(Credentials)
    credentials.key = key_pem(key)
    credentials.certificate = (
        builder.sign(authority._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    )
    credentials.ca = authority.certificate
    credentials.peer = Peer(authority.provider, None, None, None)
    return credentials
